"""CLIP and SigLIP as teachers: the logits of the model itself, with class embeddings that are computed once."""

import json
from pathlib import Path

import pytest
import torch
from image_text_models import save_image_text_model
from tiny import timm_cnn
from transformers import AutoTokenizer, CLIPTextModel, SiglipTextModel

from nkd_hf import load_teacher
from nkd_hf.hub.model_card.facts import architecture
from nkd_hf.models.preprocessing import load_image_processor
from nkd_hf.models.saving import save_student
from nkd_hf.models.zero_shot import embed_classes, is_zero_shot

PROMPTS = ["a photo of a {}.", "{}"]
NAMES = ["owl", "cat", "a long dog"]
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KINDS = ("clip", "siglip")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """Folder and model by kind."""
    folders = {kind: str(tmp_path_factory.mktemp(kind)) for kind in KINDS}
    return {kind: (folder, save_image_text_model(kind, folder)) for kind, folder in folders.items()}


def logits_per_image(kind: str, folder: str, model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    """The logits [B, number of texts] as transformers computes them, padded as the model's documentation says."""
    padding = {"clip": True, "siglip": "max_length"}[kind]
    inputs = AutoTokenizer.from_pretrained(folder)(
        texts, padding=padding, truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        return model(pixel_values=PIXELS, **inputs).logits_per_image


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models_own(kind, models):
    folder, model = models[kind]
    teacher = load_teacher(folder, prompts=PROMPTS[0], class_names=NAMES)
    logits = teacher(PIXELS)
    expected = logits_per_image(kind, folder, model, [f"a photo of a {name}." for name in NAMES])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert logits.std(0).min() > 0.01
    assert (logits[:, 0] - logits[:, 1]).abs().min() > 0.01
    # The order of the names is that of the logits, and a student's order is another one.
    teacher.align(teacher.preprocessing, {0: NAMES[2], 1: NAMES[0], 2: NAMES[1]})
    torch.testing.assert_close(teacher(PIXELS), expected[:, [2, 0, 1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_embeddings_of_several_prompts_are_averaged(kind, models):
    folder, model = models[kind]
    logits = load_teacher(folder, prompts=PROMPTS, class_names=NAMES)(PIXELS)
    texts = [prompt.format(name) for prompt in PROMPTS for name in NAMES]
    scale, bias = model.logit_scale.detach().exp(), getattr(model, "logit_bias", torch.zeros(1)).detach()
    # cos(image, mean) from the cosines of image and texts, and of text and text.
    cosines = ((logits_per_image(kind, folder, model, texts) - bias) / scale).double().view(len(PIXELS), 2, 3).mean(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, second = (embed_classes(model, tokenizer, [prompt], NAMES).double() for prompt in PROMPTS)
    length = (0.5 + 0.5 * (first * second).sum(1)).sqrt()
    torch.testing.assert_close(logits.double(), cosines / length * scale + bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "text_model"), [("clip", CLIPTextModel), ("siglip", SiglipTextModel)])
def test_texts_are_computed_once_and_the_text_side_is_not_kept(kind, text_model, models, monkeypatch):
    calls, forward = [], text_model.forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(text_model, "forward", counted)
    folder, model = models[kind]
    teacher = load_teacher(folder, prompts=PROMPTS, class_names=NAMES)
    copy = teacher.copy().for_inference("bf16")
    for _ in range(2):
        teacher(PIXELS)
        copy(PIXELS)
    assert len(calls) == 1
    parts = (model.vision_model, getattr(model, "visual_projection", torch.nn.Identity()))
    expected = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert sum(parameter.numel() for parameter in teacher.parameters()) == expected
    assert not any(isinstance(module, text_model) for module in teacher.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_like_any_other(kind, models):
    folder, model = models[kind]
    teacher = load_teacher(folder, prompts=PROMPTS, class_names=NAMES)
    assert teacher.id2label == dict(enumerate(NAMES))
    assert teacher.preprocessing.size == (32, 32)
    assert type(load_image_processor(teacher.model)).__name__.lower() == f"{kind}imageprocessor"
    assert architecture(teacher.model) == type(model).__name__
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    # In half precision, by its dtype or by autocast, the product of the embeddings is float32.
    logits = teacher(PIXELS)
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = teacher(PIXELS)
    for rounded in (by_autocast, teacher.copy().for_inference("bf16")(PIXELS)):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - logits).abs().max() < 2
        assert not torch.equal(rounded, rounded.bfloat16().float())
    for names in (["teacher_low"], ["teacher_map"], ["teacher_head_weight"]):
        with pytest.raises(ValueError, match="ZeroShotClassifier"):
            teacher.tap(names)


def test_two_models_with_one_image_side_have_two_hashes(models, tmp_path):
    folder, model = models["clip"]
    save_image_text_model("clip", str(tmp_path))
    before = model.text_projection.weight.detach().clone()
    with torch.no_grad():
        model.text_projection.weight.mul_(2)
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.text_projection.weight.data.copy_(before)
    one, same, other = (
        load_teacher(name, prompts=PROMPTS, class_names=NAMES).model.state_dict()
        for name in (folder, folder, tmp_path)
    )
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["text_sha256"]
    assert torch.equal(one["text_sha256"], same["text_sha256"])


def test_prompts_of_a_list_are_for_those_that_take_them(models, tmp_path):
    cnn = str(tmp_path / "cnn")
    save_student(timm_cnn(), cnn)
    folders = [models[kind][0] for kind in KINDS]
    names = [str(number) for number in range(10)]
    together = load_teacher([cnn, *folders], prompts=PROMPTS, class_names=names)
    alone = [load_teacher(cnn), *(load_teacher(folder, prompts=PROMPTS, class_names=names) for folder in folders)]
    for member, teacher in zip(together.members, alone, strict=True):
        assert member.name == teacher.name
        torch.testing.assert_close(member(PIXELS), teacher(PIXELS), rtol=0, atol=0)


def test_what_is_no_zero_shot_teacher(models, tmp_path):
    folder, _ = models["clip"]
    cnn = str(tmp_path / "cnn")
    save_student(timm_cnn(), cnn)
    no_tokenizer = tmp_path / "no_tokenizer"
    save_image_text_model("clip", str(no_tokenizer))
    for file in no_tokenizer.glob("*token*"):
        file.unlink()
    for given, message in [
        ({"teacher": folder}, "it classifies by texts, so it needs prompts"),
        ({"teacher": cnn, "prompts": PROMPTS, "class_names": NAMES}, "prompts are for a CLIP or SigLIP model.*, got TimmWrapper"),
        ({"teacher": folder, "prompts": PROMPTS}, "prompts and class_names must come together"),
        ({"teacher": [cnn, timm_cnn()], "prompts": PROMPTS, "class_names": NAMES}, "prompts are for a CLIP or SigLIP model.*, got .*, TimmWrapper.*Omit them"),
        ({"teacher": [cnn, folder]}, "it classifies by texts, so it needs prompts"),
        ({"teacher": timm_cnn(), "prompts": PROMPTS, "class_names": NAMES}, "prompts must come with the Hub id or folder .* got a TimmWrapper"),
        ({"teacher": folder, "prompts": "a photo", "class_names": NAMES}, r"must be texts with one {} each, .* got \['a photo'\]"),
        ({"teacher": folder, "prompts": ["{} {}"], "class_names": NAMES}, "must be texts with one {} each"),
        ({"teacher": folder, "prompts": [], "class_names": NAMES}, r"must be texts with one {} each, .* got \[\]"),
        ({"teacher": str(no_tokenizer), "prompts": "{}", "class_names": NAMES}, "its tokenizer must have the 76 tokens of its text side, got 2"),
        ({"teacher": str(tmp_path / "nowhere"), "prompts": "{}", "class_names": NAMES}, "nowhere"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            load_teacher(**given)
        assert "\n" not in str(error.value)


def test_a_fine_tuned_clip_is_an_ordinary_teacher(models, tmp_path):
    folder, _ = models["clip"]
    assert is_zero_shot(folder)
    config = json.loads((Path(folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPForImageClassification"]}))
    assert not is_zero_shot(str(tmp_path))
