"""Images without labels in a recipe and in `nkd-hf distill`: beside labelled ones and alone, planned and refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from image_text_models import save_image_text_model
from safetensors.torch import load_file
from tiny import digit_folder

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    cli,
    create_student,
    distill,
    parse_args,
)
from nkd_hf.data.image_datasets import ImageDataset
from nkd_hf.data.unlabeled_images import JoinedImageDataset
from nkd_hf.models.saving import save_student
from nkd_hf.recipe import deployment
from nkd_hf.recipe.checks import check_arguments
from nkd_hf.recipe.run_folder import unlock_folder

pytestmark = pytest.mark.usefixtures("no_curves")
NAMES = ["one", "three", "two", "zero"]
MODEL = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """A folder of four classes, one of images without classes, and teachers."""
    folder = tmp_path_factory.mktemp("inputs")
    digit_folder(folder / "images", ["zero", "one", "two", "three"], train=8, validation=4)
    digit_folder(folder / "others", [str(digit) for digit in range(5)], train=10, validation=0)
    (folder / "many").mkdir()
    for number, image in enumerate(sorted((folder / "others").rglob("*.png"))):
        image.rename(folder / "many" / f"{number}.png")
    for seed, (name, classes) in enumerate({"a": NAMES, "b": NAMES, "pets": ["cat", "dog"]}.items()):
        torch.manual_seed(seed)
        save_student(create_student("resnet18", id2label=classes, image_size=32, model_args=MODEL), str(folder / name))
    save_image_text_model("clip", str(folder / "clip"))
    return {name: str(folder / name) for name in ("images", "many", "a", "b", "pets", "clip")}


@pytest.fixture(scope="module")
def quick(inputs) -> dict:
    return {
        "dataset_name": inputs["images"], "unlabeled_dataset": inputs["many"], "student": "resnet18", "student_args": MODEL,
        "image_size": 32, "num_train_epochs": 1, "per_device_train_batch_size": 8, "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip


def make_recipe(folder: Path, values: dict) -> Recipe:
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    config = folder / "config.yaml"
    values = {"report_to": "none", "logging_steps": 1, "output_dir": str(folder / "run"), **values}
    config.write_text(yaml.safe_dump(values))
    return Recipe(*parse_args(types, args=["--config", str(config)]))


def test_the_student_alone_sees_them_beside_the_labelled_images_of_a_recipe(tmp_path, quick, inputs, capsys):
    values = {
        "teacher": inputs["clip"],
        "teacher_prompts": "a {}",
        "compare_with_baseline": True,
        "unlabeled_ratio": 0.5,
    }
    run = make_recipe(tmp_path, {**quick, **values})
    batches = {name: next(iter(run.make_stage(name).get_train_dataloader())) for name in run.stages}
    assert list(batches) == ["baseline", "student"]
    assert "unlabeled_pixel_values" not in batches["baseline"]
    assert len(batches["student"]["labels"]) == 8
    assert len(batches["student"]["unlabeled_pixel_values"]) == 4
    assert isinstance(run.make_stage("student").train_dataset, JoinedImageDataset)
    assert type(run.make_stage("baseline").train_dataset) is ImageDataset
    run.train_student()
    history = run.result_trainer.state.log_history
    assert {"task", "nkd_target"} <= history[0].keys()
    run.report()
    recorded = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (recorded["unlabeled_dataset"], recorded["unlabeled_ratio"]) == (inputs["many"], 0.5)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert (
        "with [NKD](https://arxiv.org/abs/2303.13005) (`gamma=1.5, temperature=1.0`), on `images` and 50 images of `many` "
        in card
    )
    assert "- data without labels: 50 images of `many`" in card
    assert "- data: `images`, 32 images" in card
    assert "- loss: cross-entropy + [NKD]" in card
    capsys.readouterr()


def test_distill_without_any_label_under_two_teachers(tmp_path, quick, inputs, capsys, monkeypatch):
    calibration = []

    def export(*args, **kwargs):
        calibration.extend(kwargs["calibration"])
        raise ValueError("no ONNX here")

    monkeypatch.setattr(deployment, "export_student", export)
    pair = [inputs["a"], inputs["b"]]
    results = distill(**quick, teacher=pair, train_split="none", mixup_alpha=0.2, output_dir=tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "train 50 images without labels validation 16 images, 4 classes" in said
    assert (
        f"without labels all training images, those of {inputs['many']}: labels are for the evaluation alone" in said
    )
    assert "loss nkd, without labels" in said
    assert "1 epochs, 7 steps of 8 images" in said
    assert results["dataset"]["images"] == {"train": 50, "validation": 16}
    assert sum(len(batch["pixel_values"]) for batch in calibration) == 50
    assert "unlabeled_dataset" in results["settings"]
    log = json.loads((tmp_path / "out" / "student" / "trainer_state.json").read_text())["log_history"]
    assert "nkd_target" in log[0]
    assert not any("task" in entry for entry in log)
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert "temperature=1.0`), on 50 images of `many` without labels." in card
    assert "- loss: [NKD]" in card
    assert "\n- data: " not in card
    report = (tmp_path / "out" / "report.html").read_text()
    assert str(tmp_path) not in report
    assert f"<title>resnet18, distilled on {inputs['many']}</title>" in report


@pytest.fixture(scope="module")
def stored(quick, inputs) -> dict:
    """Arguments of a run without labels, whose teacher's logits can be stored."""
    return {
        **quick, "train_split": "none", "mixup_alpha": 0.8, "finetune_teacher": "never", "save_strategy": "no",
        "loss_args": {"temperature": 2.0}, "report_to": "none",
    }  # fmt: skip


@pytest.fixture(scope="module")
def live(stored, inputs, tmp_path_factory) -> tuple[list[dict], dict]:
    return train(tmp_path_factory.mktemp("live"), {**stored, "teacher": inputs["a"], "mix_pairs": True})


def train(folder: Path, values: dict) -> tuple[list[dict], dict]:
    """The log of the losses, and the weights of the student."""
    run = make_recipe(folder, values)
    run.train_student()
    unlock_folder(run.folder)
    history = run.result_trainer.state.log_history
    return [
        {name: entry[name] for name in ("loss", "nkd_target", "nkd_non_target")}
        for entry in history
        if "loss" in entry
    ], load_file(run.folder / "student" / "model.safetensors")


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_store_of_images_without_labels_is_the_live_teacher(top_k, stored, live, inputs, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    options = ["--output", str(tmp_path / "store"), "--epochs", "1", "--batch_size", "8", "--shard_size", "16"]
    options += ["--top_k", str(top_k)] if top_k else []
    cli.main(["teacher-logits", *options, "--config", str(tmp_path / "config.yaml"), "--teacher", inputs["a"]])
    log, weights = train(tmp_path, {**stored, "teacher_logits": str(tmp_path / "store")})
    live_log, live_weights = live
    assert len(log) == 7
    if top_k is None:
        assert log == live_log
        torch.testing.assert_close(weights, live_weights, rtol=0, atol=0)
    else:  # all other logits, in half precision
        for entry, expected in zip(log, live_log, strict=True):
            assert entry == pytest.approx(expected, rel=2e-3)
    # A store of other images is refused.
    with pytest.raises(ValueError, match=r"not of this run: num_samples: store 50, run 40"):
        make_recipe(
            tmp_path,
            {
                **stored,
                "teacher_logits": str(tmp_path / "store"),
                "max_train_samples": 40,
                "output_dir": str(tmp_path / "other"),
            },
        )
    capsys.readouterr()


def test_the_plan_knows_them(quick, inputs, capsys):
    def plan(*args: str) -> tuple[dict, str]:
        values = {"num_processes": 2, "num_train_images": 64, "num_classes": 4, "report_to": "none", "output_dir": "x"}
        values = quick | values | {"teacher": inputs["a"]}
        words = [
            word
            for name, value in values.items()
            for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
        ]
        cli.main(["plan", *words, *args])
        text = capsys.readouterr().out
        cli.main(["plan", *words, *args, "--json"])
        return json.loads(capsys.readouterr().out), text

    smoothing = ["--label_smoothing_factor", "0.1"]
    joined, text = plan("--unlabeled_ratio", "1.5", *smoothing)
    assert "label smoothing 0.1" in joined["augmentation"]
    assert f"without labels  1.5 of {inputs['many']} for each labelled image of the student's batches" in text
    alone, text = plan("--train_split", "none", *smoothing)
    assert not any("smoothing" in line for line in alone["augmentation"])
    assert f"without labels  all training images, those of {inputs['many']}" in text
    assert joined["steps_per_epoch"] == alone["steps_per_epoch"] == 4
    assert (joined["decoded_images"], alone["decoded_images"]) == (160, 64)
    for name in ("pixels", "activations"):
        assert joined["memory"][name] == pytest.approx(2.5 * alone["memory"][name], rel=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distillation_loss": "uskd", "teacher": None}, "images without labels need a teacher, and the distillation loss uskd has none"),
        ({"distillation_loss": "nkd+tfkd"}, "the distillation loss tfkd has none"),
        ({"distillation_loss": "none"}, "images without labels need a distillation loss with a teacher, got none"),
        ({"teacher_logits": "store"}, "teacher_logits must be omitted with unlabeled_dataset, got 'store'.*train_split to none"),
        ({"train_split": "none", "compare_with_baseline": True}, "compare_with_baseline must be false with train_split=none"),
        ({"train_split": "none", "class_weights": "balanced"}, "class_weights must be omitted with train_split=none"),
        ({"train_split": "none", "teacher": "resnet34"}, "the teacher must know the classes of the data.*got resnet34, which"),
        ({"train_split": "none", "finetune_teacher": "always"}, "the teacher must know the classes of the data"),
    ],
)  # fmt: skip
def test_what_needs_labels_is_refused(values, message):
    values = {"student": "resnet18", "teacher": "me/a", "unlabeled_dataset": "digits"} | values
    data = DataArguments(**{name: values.pop(name) for name in ("unlabeled_dataset", "train_split") if name in values})
    with pytest.raises(ValueError, match=message):
        check_arguments(RecipeArguments(**values), data, DistillationTrainingArguments("x", use_cpu=True))


def test_a_teacher_of_other_classes_is_not_fine_tuned_without_labels(tmp_path, quick, inputs):
    with pytest.raises(
        ValueError, match=r"the teacher must know the classes of the data with train_split=none, got .*pets"
    ):
        make_recipe(tmp_path, {**quick, "teacher": inputs["pets"], "train_split": "none", "finetune_teacher": "auto"})
    unlock_folder(tmp_path / "run")
