"""What was pushed opens in another process that has transformers and timm alone, and an empty cache."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub_server import OTHERS_TOKEN, TOKEN
from PIL import Image
from tiny import DIGITS, digits, make_trainer, native_vit, timm_deit
from transformers import ViTImageProcessor

from nkd_hf import (
    DataArguments,
    NKDLoss,
    create_student,
    load_image_dataset,
    load_image_processor,
    processor_transform,
)
from nkd_hf.models.saving import save_student

PULL = """
import gc, json, sys
gc.disable()  # a fifth of the time of the imports
sys.modules["nkd_hf"] = None  # not installed, as it were
import numpy as np, timm, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

image, answers = Image.open("image.png"), {}
for name, trust in (("deit", False), ("vit", False), ("shufflenet", True)):
    expected = np.load(f"{name}.npz")
    trust = {"trust_remote_code": True} if trust else {}
    model = AutoModelForImageClassification.from_pretrained(f"me/{name}", **trust)
    pixels = AutoImageProcessor.from_pretrained(f"me/{name}")(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        difference = np.abs(model(pixels).logits.numpy() - expected["logits"]).max()
    answer = pipeline("image-classification", model=f"me/{name}", device="cpu", **trust)(image, top_k=10)
    scores = np.exp(expected["logits"][0]) / np.exp(expected["logits"][0]).sum()
    answers[name] = {
        "pixels": bool((pixels.numpy() == expected["pixels"]).all()),
        "logits": float(difference),
        "pipeline": max(abs(entry["score"] - float(scores[int(entry["label"])])) for entry in answer),
        "labels": sorted(entry["label"] for entry in answer),
    }
expected = np.load("deit.npz")
model = timm.create_model("hf-hub:me/deit", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
pixels = transform(image)[None]
with torch.no_grad():
    answers["timm"] = {
        "pixels": bool((pixels.numpy() == expected["pixels"]).all()),
        "logits": float(np.abs(model(pixels).numpy() - expected["logits"]).max()),
    }
try:
    AutoModelForImageClassification.from_pretrained("me/vit", token=False, force_download=True)
except OSError as error:
    answers["private"] = type(error).__name__
print(json.dumps(answers))
"""

DATA = """
import gc, json, os, sys
gc.disable()
import huggingface_hub.utils._http as http
http.time.sleep = lambda seconds: None
import datasets, torch
from nkd_hf import DataArguments, load_image_dataset, load_teacher

answers = {}
for name in ("them/digits", "them/gated", "we/gated", "them/none"):
    try:
        data = load_image_dataset(DataArguments(dataset_name=name))
        answers[name] = [len(data["train"]), len(data["validation"]), data["train"].features["label"].names]
    except ValueError as error:
        answers[name] = str(error)
os.environ.pop("HF_TOKEN", None)
try:
    load_image_dataset(DataArguments(dataset_name="them/gated"))
except ValueError as error:
    answers["without a token"] = str(error)
teacher = load_teacher("them/teacher")
answers["teacher"] = teacher(torch.ones(1, 3, 32, 32)).sum().item()
print(json.dumps(answers))
"""


def in_a_new_process(hub, tmp_path, code, **environment):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.runs
def test_pull_in_a_fresh_process(hub, no_curves, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    vit_processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6])
    students = {
        "deit": (timm_deit(), None),
        "vit": (native_vit(), vit_processor),
        "shufflenet": (create_student("shufflenet_v2_x1_0", id2label=DIGITS, image_size=64, crop_pct=0.9), None),
    }
    for name, (student, processor) in students.items():
        processor = processor or load_image_processor(student)
        size = {"vit": 32, "deit": 32, "shufflenet": 64}[name]
        rows = [row | {"pixel_values": torch.nn.functional.interpolate(row["pixel_values"][None], size)[0]} for row in digits(0, 16)]  # fmt: skip
        trainer = make_trainer(
            tmp_path / name, student, rows, teacher=native_vit(1) if size == 32 else None,
            distillation_loss=NKDLoss() if size == 32 else None, max_steps=2,
        )  # fmt: skip
        trainer.processing_class = processor
        trainer.train()
        trainer.push_to_hub(private=name == "vit")
        # What evaluation makes of the image, and the trainer of that.
        pixels = processor_transform(processor)(image)[None]
        with torch.no_grad():
            logits = trainer.student.eval()(pixels).logits
        np.savez(tmp_path / f"{name}.npz", pixels=pixels.numpy(), logits=logits.numpy())
    assert "modeling_shufflenet_v2.py" in hub.repos["models/me/shufflenet"].files()

    answers = in_a_new_process(hub, tmp_path, PULL, HF_TOKEN=TOKEN)
    assert answers.pop("private") == "OSError"
    for name, answer in answers.items():
        assert answer["pixels"], name
        assert answer["logits"] < 1e-5, name
    for name in students:
        assert answers[name]["pipeline"] < 1e-5
        assert answers[name]["labels"] == sorted(DIGITS.values())


@pytest.mark.runs
def test_datasets_and_teachers_of_the_hub(hub, tmp_path):
    data = load_image_dataset(DataArguments(max_train_samples=40, max_eval_samples=20))
    files = {}
    for split in ("train", "validation"):
        data[split].to_parquet(str(tmp_path / "split.parquet"))
        files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / "split.parquet").read_bytes()
    for name in ("digits", "gated"):
        hub.create(f"them/{name}", files, kind="datasets", gated=name == "gated")
    teacher = native_vit()
    save_student(teacher, str(tmp_path / "teacher"))
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "teacher")
    hub.create("them/teacher", {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()})

    # Of an account that has accepted the one's terms, and not the other's.
    hub.users[OTHERS_TOKEN] = "we"
    hub.create("we/gated", files, kind="datasets", gated=True)
    online = in_a_new_process(hub, tmp_path, DATA, HF_TOKEN=OTHERS_TOKEN)
    assert online["them/digits"] == online["we/gated"] == [40, 20, list(DIGITS.values())]
    accept = f"it is gated: accept its terms on {hub.endpoint}/datasets/them/gated, then run `hf auth login` with an account"
    assert online["them/gated"].startswith(f"dataset_name='them/gated' could not be loaded: {accept}")
    assert online["without a token"] == online["them/gated"]
    assert "dataset_name='them/none' could not be loaded (DatasetNotFoundError" in online["them/none"]

    before = len(hub.requests)
    offline = in_a_new_process(hub, tmp_path, DATA, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before
    for name in ("them/digits", "we/gated", "teacher"):
        assert offline[name] == online[name]
    assert "with no network, only one that was loaded before" in offline["them/none"]
