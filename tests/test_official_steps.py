"""One step of the trainer gives the official distiller's components and gradient norms.

`data/mmcls_steps.json` was written by the official code (github.com/yzd-v/cls_KD, branch 1.0) on the CPU in float32, for
weights that are made from their official names and four random images; student and teacher were in eval mode there.
"""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from tiny import make_trainer
from transformers import TrainerCallback

from nkd_hf import NKDLoss, USKDLoss, create_student

STEPS = json.loads((Path(__file__).parent / "data" / "mmcls_steps.json").read_text())


def official_tensor(key: str, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if not like.is_floating_point():
        return torch.zeros_like(like)
    if key.endswith("running_var"):
        return 0.5 + torch.rand(like.shape, generator=generator)
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim == 1:
        return 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise
    return noise / math.sqrt(like[0].numel())


def official_resnet(name: str, prefix: str = ""):
    model = create_student(name)
    network = model.timm_model
    state = {}
    for key, value in network.state_dict().items():
        official = f"head.{key}" if key.startswith("fc.") else f"backbone.{key}"
        state[key] = official_tensor(prefix + official, value)
    network.load_state_dict(state)
    return model


class GradientNorms(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        def norm(module):
            return math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in module.parameters()))

        self.student, self.auxiliary = norm(model.student), norm(model.losses)


@pytest.mark.parametrize("row", STEPS)
def test_one_step_is_the_official_one(tmp_path, row):
    expected = STEPS[row]
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    samples = [
        {"pixel_values": image, "labels": label} for image, label in zip(images, [3, 141, 592, 653], strict=True)
    ]
    student = official_resnet("resnet18").eval()
    student.train = lambda mode=True: student  # running statistics, as in the official figures
    if row.startswith("nkd"):
        teacher, loss = official_resnet("resnet34", "teacher."), NKDLoss()
    else:
        teacher, loss = None, USKDLoss(256, 1000)
        for name, tensor in loss.head.named_parameters():
            tensor.data = official_tensor(f"loss.loss_uskd.fc.{name}", tensor.data)
    norms = GradientNorms()
    trainer = make_trainer(
        tmp_path, student, samples, teacher=teacher, distillation_loss=loss, callbacks=[norms], max_steps=1, max_grad_norm=0,
        per_device_train_batch_size=4, optim="sgd", learning_rate=0.0,
    )  # fmt: skip
    trainer.train()

    logged = trainer.state.log_history[0]
    distillation = sum(value for name, value in logged.items() if name.startswith(("nkd_", "uskd_")))
    name = "loss_nkd" if row.startswith("nkd") else "loss_uskd"
    assert logged["task"] == pytest.approx(expected["ori_loss"], rel=1e-4)
    assert distillation == pytest.approx(expected[name], rel=1e-4)
    assert norms.student == pytest.approx(expected["grad_norm_student"], rel=1e-4)
    assert norms.auxiliary == pytest.approx(expected["grad_norm_auxiliary"], rel=1e-4)
    assert {key.removeprefix("loss_uskd.fc."): list(shape) for key, shape in expected["auxiliary_keys"].items()} == {
        key.removeprefix("head."): list(value.shape) for key, value in loss.state_dict().items()
    }
