"""Classes whose names are numbers: in a dataset, and where a model's names tell nothing."""

import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from tiny import timm_cnn

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    create_student,
    load_image_dataset,
)
from nkd_hf.cli.evaluate import evaluate
from nkd_hf.data.labels import label_names
from nkd_hf.data.loading import load_evaluation_split
from nkd_hf.models.saving import save_student


def encoded_image() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(buffer, format="PNG")
    return buffer.getvalue()


PNG = encoded_image()


def load(name, **arguments):
    return load_image_dataset(DataArguments(dataset_name=str(name), **arguments))


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["folder", "parquet", "text"])
def test_classes_that_are_numbers_stand_in_their_order(tmp_path, kind):
    """In all kinds of splits; as text, 10 would come before 2."""
    names = sorted(map(str, range(12)))
    if kind == "folder":
        for split in ("train", "validation"):
            for name in names:
                (tmp_path / split / name).mkdir(parents=True)
                for number in range(int(name) + 1):
                    (tmp_path / split / name / f"{number}.png").write_bytes(PNG)
    else:
        feature = datasets.Value("string") if kind == "text" else datasets.ClassLabel(names=names)
        for split in ("train", "validation"):
            labels = [name for name in names for _ in range(int(name) + 1)]
            if kind == "parquet":
                labels = list(map(feature.str2int, labels))
            features = datasets.Features(image=datasets.Image(decode=False), label=feature)
            rows = {"image": [{"bytes": PNG, "path": None}] * len(labels), "label": labels}
            Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    data = load(tmp_path)
    assert label_names(data) == [str(i) for i in range(12)]
    for split in ("train", "validation"):
        assert data[split].features["label"].names == [str(i) for i in range(12)]
        assert np.bincount(data[split]["label"][:]).tolist() == list(range(1, 13))
        assert str(data[split].split) == split
    if kind == "folder":
        for row in data["train"]:
            assert Path(row["image"]["path"]).parent.name == str(row["label"])
    if kind != "text":
        stream = load(tmp_path, streaming=True)
        assert label_names(stream) == label_names(data)
        for split in ("train", "validation"):
            rows = list(stream[split])
            assert [row["label"] for row in rows] == data[split]["label"][:]
            assert rows[0]["image"] == data[split][0]["image"]
    subset = load(tmp_path, max_eval_samples=30)["validation"]
    assert len(subset) == 30
    name, split = load_evaluation_split(DataArguments(dataset_name=str(tmp_path)))
    assert (name, split["label"][:]) == ("validation", data["validation"]["label"][:])


def test_numbers_with_gaps_keep_their_names_and_missing_labels_stay_missing(tmp_path):
    image = {"bytes": PNG, "path": None}
    names = ["007", "1000", "12"]
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))
    rows = {"image": [image] * 6, "label": [0, 1, 2, None, -1, 2]}
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    data = load(tmp_path)
    assert label_names(data) == ["007", "12", "1000"]
    assert data["train"]["label"][:] == [0, 2, 1, None, -1, 1]
    assert [row["label"] for row in load(tmp_path, streaming=True)["train"]] == [0, 2, 1, None, -1, 1]


def test_other_names_are_left_as_they_are(tmp_path):
    image = {"bytes": PNG, "path": None}
    for number, names in enumerate((["b", "a", "10"], ["1", "01", "2"], ["-1", "0", "10", "2"], ["2", "10", "3.0"])):
        features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))
        rows = Dataset.from_dict({"image": [image] * len(names), "label": range(len(names))}, features=features)
        (tmp_path / str(number)).mkdir()
        for split in ("train", "validation"):
            rows.to_parquet(tmp_path / str(number) / f"{split}.parquet")
        data = load(tmp_path / str(number))
        assert label_names(data) == names
        assert data["train"]["label"][:] == list(range(len(names)))


def write_numbers(root, names, images):
    """A folder of images for each name; of that one class, `images` of them."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(images.get(name, 1)):
            (root / name / f"{i}.png").write_bytes(PNG)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("pattern", ["{}", "{:03d}", "LABEL_{}"])
def test_folders_that_are_numbers_are_the_numbers_of_the_classes(tmp_path, pattern, streaming, caplog):
    write_numbers(tmp_path / "test", [pattern.format(i) for i in range(12)], {pattern.format(10): 9})
    data = DataArguments(dataset_name=str(tmp_path), streaming=streaming)
    unnamed = create_student("resnet18", num_labels=12, image_size=32, model_args={"channels": [8, 16, 32, 64]})
    with torch.no_grad():
        unnamed.timm_model.fc.bias[10] += 1e6  # whatever it sees, it sees a ten
    # As text, the names stand in the order 0, 1, 10, 11, 2, ...
    for match_names in (True, False):
        assert evaluate(unnamed, data, match_names=match_names)["top1"] == 9 / 20
    text_order = sorted(range(12), key=str)
    unnamed.config.id2label = {i: str(number) for i, number in enumerate(text_order)}
    assert evaluate(unnamed, data, match_names=False)["top1"] == 9 / 20
    if pattern != "LABEL_{}":
        # By name, its class 10 is the 8.
        assert evaluate(unnamed, data)["top1"] == 1 / 20


@pytest.mark.parametrize("streaming", [False, True])
def test_integers_are_the_numbers_that_a_model_has_for_names(tmp_path, streaming, caplog):
    rows = {"image": [{"bytes": PNG, "path": None}] * 20, "label": [*range(12), *[10] * 8]}
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    data = DataArguments(dataset_name=str(tmp_path), streaming=streaming)
    model = create_student("resnet18", num_labels=12, image_size=32, model_args={"channels": [8, 16, 32, 64]})
    with torch.no_grad():
        model.timm_model.fc.bias[2] += 1e6
    # As a folder of images names them: its class 2 is called 10.
    model.config.id2label = sorted(map(str, range(12)))
    assert evaluate(model, data)["top1"] == 9 / 20
    assert evaluate(model, data, match_names=False)["top1"] == 1 / 20
    small = create_student("resnet18", num_labels=10, image_size=32, model_args={"channels": [8, 16, 32, 64]})
    with pytest.raises(ValueError, match="the labels go up to 11, but the model has 10 classes"):
        evaluate(small, data, match_names=False)
    with pytest.raises(ValueError, match=r"the labels go up to 11, but|has 10 classes and the dataset 12"):
        evaluate(small, data)


def test_numbers_of_some_classes_are_theirs_and_others_are_refused(tmp_path):
    model = timm_cnn()
    with torch.no_grad():
        model.timm_model.fc.bias[7] += 1e6
    write_numbers(tmp_path / "few" / "test", ["3", "7"], {"7": 3})
    data = DataArguments(dataset_name=str(tmp_path / "few"))
    results = evaluate(model, data, match_names=False)
    assert (results["top1"], results["images"]) == (3 / 4, 4)
    write_numbers(tmp_path / "many" / "test", [str(i) for i in range(1, 11)], {})
    with pytest.raises(ValueError, match="must be from 0 to 9 to be taken as the numbers of 10 classes, got 1 to 10"):
        evaluate(model, DataArguments(dataset_name=str(tmp_path / "many")), match_names=False)


def test_names_of_a_model_may_stand_in_any_order_under_any_keys(tmp_path):
    write_numbers(tmp_path / "test", [f"class {i}" for i in range(12)], {"class 10": 9})
    data = DataArguments(dataset_name=str(tmp_path))
    names = {i: f"class {i}" for i in range(12)}
    model = create_student("resnet18", id2label=names, image_size=32, model_args={"channels": [8, 16, 32, 64]})
    with torch.no_grad():
        model.timm_model.fc.bias[10] += 1e6
    for id2label in (names, {str(i): name for i, name in names.items()}, list(names.values())):
        model.config.id2label = id2label
        assert evaluate(model, data)["top1"] == 9 / 20
    model.config.id2label = dict.fromkeys(range(12), 7)
    with pytest.raises(ValueError, match="the model's id2label must hold text, got 7"):
        evaluate(model, data)


def recipe(folder, on_non_finite_loss="error", **arguments) -> Recipe:
    small = {"channels": [8, 16, 32, 64]}
    return Recipe(
        RecipeArguments(distillation_loss="nkd", student="resnet18", student_args=small, image_size=32,
                        compare_with_baseline=False, **arguments),
        DataArguments(dataset_name=str(folder / "data")),
        DistillationTrainingArguments(str(folder / "run"), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True,
                                      per_device_train_batch_size=4, resume_from_checkpoint="false",
                                      on_non_finite_loss=on_non_finite_loss),
    )  # fmt: skip


@pytest.mark.parametrize("answer", [10, None])
@pytest.mark.parametrize("ignore_label_names", [False, True])
def test_a_teacher_without_names_knows_the_classes_by_their_numbers(tmp_path, ignore_label_names, answer, caplog):
    names = list(map(str, range(12)))
    for split in ("train", "val"):
        write_numbers(tmp_path / "data" / split, names, {"10": 9})
    teacher = create_student("resnet18", num_labels=12, image_size=32, model_args={"channels": [8, 16, 32, 64]})
    with torch.no_grad():
        if answer is None:
            teacher.timm_model.fc.bias[0] = torch.nan  # which argmax takes for the largest: class 0 would be right
        else:
            teacher.timm_model.fc.bias[answer] += 1e6
    save_student(teacher, str(tmp_path / "teacher"))
    settings = {"teacher": str(tmp_path / "teacher"), "ignore_label_names": ignore_label_names}
    if answer is None:
        with pytest.raises(ValueError, match="an image gives no finite loss before anything is trained"):
            recipe(tmp_path, **settings).train_student()
        settings["on_non_finite_loss"] = "skip"
    run = recipe(tmp_path, **settings)
    assert list(run.id2label.values()) == names
    run.train_student()
    assert ("predicts nothing for 20 of 20 samples, since their logits are NaN" in caplog.text) == (answer is None)
    assert run.results["teacher"] == (0 if answer is None else 9 / 20)


def test_a_recipe_refuses_numbers_that_are_no_classes(tmp_path):
    for split in ("train", "val"):
        write_numbers(tmp_path / "data" / split, list(map(str, range(1, 12))), {})
    assert list(recipe(tmp_path, teacher="resnet34").id2label.values()) == list(map(str, range(1, 12)))
    with pytest.raises(ValueError, match="must be from 0 to 10 to be taken as the numbers of 11 classes, got 1 to 11"):
        recipe(tmp_path, teacher="resnet34", ignore_label_names=True)
