"""Opens CLIP and SigLIP models as image classifiers, whose classes are texts."""

import contextlib
import copy
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
    CLIPModel,
    PreTrainedTokenizerBase,
    SiglipModel,
)

from ..errors import RefusedError, reason
from .hashing import hash_tensors
from .labels import invert_labels
from .loading import open_pretrained
from .model_config import read_config

# Number of texts in a forward pass.
_BATCH = 256


class ZeroShotClassifier(nn.Module):
    """The image side of a CLIP or SigLIP model, and its embedding of each class.

    Args:
        model (`CLIPModel` or `SiglipModel`): the model; its image side is used, and its text side is not kept.
        class_embeddings (`Tensor`): [C, D] float, each of length 1; see [`embed_classes`].
        class_names (`Sequence[str]`): the names of the C classes.
    """

    def __init__(self, model: CLIPModel | SiglipModel, class_embeddings: Tensor, class_names: Sequence[str]):
        super().__init__()
        self.architecture = type(model).__name__
        self.config = copy.deepcopy(model.config)
        self.config.id2label = dict(enumerate(class_names))
        self.config.label2id = invert_labels(self.config.id2label)
        self.name_or_path = model.name_or_path
        self.vision_model = model.vision_model
        self.visual_projection = getattr(model, "visual_projection", nn.Identity())
        scale, bias = model.logit_scale.detach().exp(), getattr(model, "logit_bias", torch.zeros(1)).detach()
        # The buffers are not in the state dict, whose hash a store of logits contains: their last bits differ between
        # machines.
        for name, value in {"class_embeddings": class_embeddings, "scale": scale, "bias": bias}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns the logits [B, C], float32, of pixels [B, 3, H, W]: the model's `logits_per_image`."""
        images = self.visual_projection(self.vision_model(pixel_values, return_dict=True).pooler_output)
        # Autocast would choose half precision, whose rounding a scale of 100 would turn into steps of the logits.
        with _without_autocast(images.device.type):
            images = nn.functional.normalize(images.float(), dim=-1)
            return images @ self.class_embeddings.float().T * self.scale.float() + self.bias.float()


def open_zero_shot(
    name: str,
    prompts: Sequence[str],
    class_names: Sequence[str],
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> ZeroShotClassifier:
    """Opens a CLIP or SigLIP model as a classifier, and computes the embeddings of its classes.

    Args:
        name: a folder or a Hub id, for which [`is_zero_shot`] is true.
        prompts: see [`embed_classes`].
        class_names: the names of the classes in the order of the logits.
        allow_pickle, trust_remote_code: see [`~nkd_hf.models.loading.open_pretrained`].

    Raises:
        RefusedError, ValueError, OSError: as in [`~nkd_hf.models.loading.open_pretrained`], or there is no tokenizer.
    """
    model = open_pretrained(
        name,
        model_class=AutoModelForZeroShotImageClassification,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        raise RefusedError(
            f"its tokenizer cannot be opened: {reason(error)}. Save the model's beside it (tokenizer.save_pretrained)"
        ) from error
    # Without the tokenizer's files, AutoTokenizer makes a tokenizer of a few tokens.
    if 2 * len(tokenizer) < (size := model.config.text_config.vocab_size):
        raise RefusedError(
            f"its tokenizer must have the {size} tokens of its text side, got {len(tokenizer)}. Save the model's beside it "
            "(tokenizer.save_pretrained)"
        )
    classifier = ZeroShotClassifier(model.eval(), embed_classes(model, tokenizer, prompts, class_names), class_names)
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith(("vision_", "visual_"))}
    # The hash is in the state dict, so that the state dicts of two models that differ only in their text side differ,
    # too.
    classifier.register_buffer("text_sha256", torch.tensor(list(bytes.fromhex(hash_tensors(rest))), dtype=torch.uint8))
    return classifier


def embed_classes(
    model: CLIPModel | SiglipModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    class_names: Sequence[str],
) -> Tensor:
    """Computes the embedding of each class: the mean of its prompts' normalised embeddings, normalised again to length
    1.

    Args:
        model: the model in eval mode.
        tokenizer: the model's tokenizer.
        prompts: templates with one `{}` each, for the name of a class.
        class_names: the names of the classes in the order of the result.

    Returns:
        `Tensor`: [C, D].
    """
    longest = model.config.text_config.max_position_embeddings
    # SigLIP was trained with padding, which its text side reads.
    padding = "max_length" if isinstance(model, SiglipModel) else True
    texts = [prompt.replace("{}", name) for name in class_names for prompt in prompts]
    parts = []
    with torch.no_grad():
        for start in range(0, len(texts), _BATCH):
            inputs = tokenizer(
                texts[start : start + _BATCH],
                padding=padding,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            parts.append(model.get_text_features(**inputs, return_dict=True).pooler_output)
        embeddings = nn.functional.normalize(torch.cat(parts), dim=-1)
        means = embeddings.unflatten(0, (len(class_names), len(prompts))).mean(1)
        return nn.functional.normalize(means, dim=-1)


def check_prompts(prompts: str | Sequence[str], name: str = "prompts") -> list[str]:
    """Returns the prompts of a zero-shot teacher as a list.

    Args:
        prompts: one prompt, or several.
        name: the name of the prompts in the message.

    Raises:
        ValueError: there is no prompt, or a prompt has not exactly one `{}`.

    Example:

    ```python
    >>> from nkd_hf.models.zero_shot import check_prompts
    >>> check_prompts("a photo of a {}.")
    ['a photo of a {}.']

    ```
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed or any(prompt.count("{}") != 1 for prompt in listed):
        raise ValueError(
            f"{name} must be texts with one {{}} each, for the name of a class, got {listed}. Write 'a photo of a {{}}.', "
            "for example"
        )
    return listed


def is_zero_shot(name: str, trust_remote_code: bool = False, **where) -> bool:
    """Whether a folder or a Hub id is a CLIP or SigLIP model with both of its sides.

    Args:
        name: a folder or a Hub id.
        trust_remote_code, where: see [`~nkd_hf.models.model_config.read_config`].
    """
    config = read_config(os.path.expanduser(name), trust_remote_code, **where) or {}
    # A fine-tuned CLIPForImageClassification has the same model_type.
    return (config.get("model_type"), config.get("architectures")) in (
        ("clip", ["CLIPModel"]),
        ("siglip", ["SiglipModel"]),
    )


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    # The meta device, of `nkd-hf plan`, has no autocast.
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
