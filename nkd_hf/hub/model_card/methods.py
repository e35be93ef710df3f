"""The distillation methods by their losses, with their papers, for the model card."""

from typing import NamedTuple

from ...losses import DISTLoss, DKDLoss, KDLoss, MGDLoss, NKDLoss, SRRLLoss, USKDLoss, ViTKDLoss, WSLDLoss, WTTMLoss


class Method(NamedTuple):
    """A distillation method: its name, its paper and how that is cited."""

    name: str
    paper: str
    citation: str


_NKD_CITATION = """@inproceedings{yang2023from,
  title     = {From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels},
  author    = {Yang, Zhendong and Zeng, Ailing and Li, Zhe and Zhang, Tianke and Yuan, Chun and Li, Yu},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023}
}"""
_VITKD_CITATION = """@article{yang2022vitkd,
  title   = {ViTKD: Practical Guidelines for ViT feature knowledge distillation},
  author  = {Yang, Zhendong and Li, Zhe and Zeng, Ailing and Li, Zexian and Yuan, Chun and Li, Yu},
  journal = {arXiv preprint arXiv:2209.02432},
  year    = {2022}
}"""
_KD_CITATION = """@article{hinton2015distilling,
  title   = {Distilling the Knowledge in a Neural Network},
  author  = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal = {arXiv preprint arXiv:1503.02531},
  year    = {2015}
}"""
_DKD_CITATION = """@inproceedings{zhao2022decoupled,
  title     = {Decoupled Knowledge Distillation},
  author    = {Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}"""
_WSLD_CITATION = """@inproceedings{zhou2021rethinking,
  title     = {Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective},
  author    = {Zhou, Helong and Song, Liangchen and Chen, Jiajie and Zhou, Ye and Wang, Guoli and Yuan, Junsong and Zhang, Qian},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2021}
}"""
_DIST_CITATION = """@inproceedings{huang2022knowledge,
  title     = {Knowledge Distillation from A Stronger Teacher},
  author    = {Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2022}
}"""
_WTTM_CITATION = """@inproceedings{zheng2024knowledge,
  title     = {Knowledge Distillation Based on Transformed Teacher Matching},
  author    = {Zheng, Kaixiang and Yang, En-Hui},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2024}
}"""
_MGD_CITATION = """@inproceedings{yang2022masked,
  title     = {Masked Generative Distillation},
  author    = {Yang, Zhendong and Li, Zhe and Shao, Mingqi and Shi, Dachuan and Yuan, Zehuan and Yuan, Chun},
  booktitle = {Proceedings of the European Conference on Computer Vision (ECCV)},
  year      = {2022}
}"""
_SRRL_CITATION = """@inproceedings{yang2021knowledge,
  title     = {Knowledge Distillation via Softmax Regression Representation Learning},
  author    = {Yang, Jing and Martinez, Brais and Bulat, Adrian and Tzimiropoulos, Georgios},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2021}
}"""
METHODS = {
    NKDLoss: Method("NKD", "https://arxiv.org/abs/2303.13005", _NKD_CITATION),
    USKDLoss: Method("USKD", "https://arxiv.org/abs/2303.13005", _NKD_CITATION),
    ViTKDLoss: Method("ViTKD", "https://arxiv.org/abs/2209.02432", _VITKD_CITATION),
    KDLoss: Method("KD", "https://arxiv.org/abs/1503.02531", _KD_CITATION),
    DKDLoss: Method("DKD", "https://arxiv.org/abs/2203.08679", _DKD_CITATION),
    WSLDLoss: Method("WSLD", "https://arxiv.org/abs/2102.00650", _WSLD_CITATION),
    DISTLoss: Method("DIST", "https://arxiv.org/abs/2205.10536", _DIST_CITATION),
    WTTMLoss: Method("WTTM", "https://arxiv.org/abs/2402.11148", _WTTM_CITATION),
    MGDLoss: Method("MGD", "https://arxiv.org/abs/2205.01529", _MGD_CITATION),
    SRRLLoss: Method("SRRL", "https://openreview.net/forum?id=ZzwDy_wiWv", _SRRL_CITATION),
}
