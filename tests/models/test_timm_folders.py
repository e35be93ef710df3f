"""Folders go to timm and come from timm: what one writes, the other opens with equal logits."""

import json

import pytest
import timm
import timm.models
import torch
from model_folders import change_config
from tiny import DIGITS, make_trainer, timm_cnn, timm_deit
from transformers import AutoModelForImageClassification

from nkd_hf import create_student, load_image_processor, load_teacher
from nkd_hf.cli.export import export
from nkd_hf.models.loading import open_classifier
from nkd_hf.models.saving import save_student

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain_cnn():
    return create_student("resnet18", id2label=DIGITS, image_size=32)


def logits(model):
    with torch.no_grad():
        output = model.eval()(PIXELS)
    return getattr(output, "logits", output)


# ---- to timm


@pytest.mark.parametrize("model", [plain_cnn, timm_cnn, timm_deit])
def test_timm_opens_a_saved_student(tmp_path, model):
    student = model()
    save_student(student, str(tmp_path))
    assert isinstance(json.loads((tmp_path / "config.json").read_text())["model_args"], dict)
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(logits(opened), logits(student), rtol=1e-5, atol=1e-6)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(student), rtol=1e-5, atol=1e-6)


def test_folders_whose_model_args_are_null_are_mended(tmp_path):
    student = plain_cnn()
    save_student(student, str(tmp_path / "old"))
    change_config(tmp_path / "old", model_args=None)
    with pytest.raises(AttributeError):
        timm.create_model(f"local-dir:{tmp_path / 'old'}")
    export(str(tmp_path / "old"), str(tmp_path / "exported"))
    save_student(create_student(str(tmp_path / "old")), str(tmp_path / "saved"))
    for folder in ("exported", "saved"):
        opened = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True)
        torch.testing.assert_close(logits(opened), logits(student), rtol=1e-5, atol=1e-6)


@pytest.mark.runs
def test_a_checkpoint_whose_model_args_are_null_resumes(tmp_path):
    data = [{"pixel_values": pixels, "labels": i} for i, pixels in enumerate(PIXELS.repeat(8, 1, 1, 1))]
    for row in data:
        row["labels"] %= 10
    make_trainer(tmp_path, plain_cnn(), data, max_steps=1, save_strategy="steps", save_steps=1).train()
    change_config(tmp_path / "checkpoint-1", model_args=None)
    record = tmp_path / "checkpoint-1" / "checkpoint_files.json"
    sizes = json.loads(record.read_text())
    record.write_text(json.dumps(sizes | {"config.json": (tmp_path / "checkpoint-1" / "config.json").stat().st_size}))
    trainer = make_trainer(tmp_path, plain_cnn(), data, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    timm.create_model(f"local-dir:{tmp_path / 'checkpoint-2'}", pretrained=True)


# ---- from timm


def timm_models():
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return {
        "a CNN": timm.create_model("resnet18", num_classes=12, channels=(8, 16, 32, 64)),
        "another pooling": timm.create_model("resnet18", num_classes=12, channels=(8, 16, 32, 64), global_pool="max"),
        "a ViT": timm.create_model("vit_tiny_patch16_224", num_classes=12, in_chans=3, global_pool="avg", **args),
    }


NAMES = [f"kind {i}" for i in range(12)]


@pytest.mark.parametrize("name", ["a CNN", "another pooling", "a ViT"])
@pytest.mark.parametrize("form", ["list", "mapping", "none"])
def test_a_folder_that_timm_wrote(tmp_path, name, form):
    model = timm_models()[name]
    # As JSON has it, sorted as text: 0, 1, 10, 11, 2.
    names = {"list": NAMES, "mapping": {str(i): NAMES[i] for i in sorted(range(12), key=str)}}.get(form)
    settings = {} if names is None else {"label_names": names}
    timm.models.save_for_hf(model, tmp_path, model_config=settings, safe_serialization=True)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_args"]["num_classes"] == 12
    check_opened(tmp_path, model, dict(enumerate(NAMES)) if names else None)


def test_a_folder_that_an_old_timm_wrote(tmp_path):
    # Before 0.9, timm wrote all into one mapping.
    model = timm.create_model("resnet18", num_classes=12)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    settings = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    settings |= {"architecture": "resnet18", "num_features": 512, "labels": NAMES}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check_opened(tmp_path, model, dict(enumerate(NAMES)))


def check_opened(tmp_path, model, id2label):
    """What transformers and timm open of a folder, and of what is saved of that, answers as the model does."""
    expected = logits(model)
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(logits(by_timm), expected, rtol=1e-5, atol=1e-6)
    for opened in (open_classifier(str(tmp_path)), load_teacher(str(tmp_path)).model, create_student(str(tmp_path))):
        torch.testing.assert_close(logits(opened), expected, rtol=1e-5, atol=1e-6)
        if id2label is not None:
            assert opened.config.id2label == id2label
        assert load_image_processor(opened).data_config["input_size"] == (3, *by_timm.pretrained_cfg["input_size"][1:])
    assert create_student(str(tmp_path), num_labels=3).config.num_labels == 3
    # What is saved of it, both open.
    save_student(open_classifier(str(tmp_path)), str(tmp_path / "saved"))
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    torch.testing.assert_close(logits(by_timm), expected, rtol=1e-5, atol=1e-6)
