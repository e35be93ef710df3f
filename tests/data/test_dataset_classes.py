"""The classes of datasets against those of the student that they train and evaluate."""

import datasets
import pytest
from tiny import make_trainer, timm_cnn
from torch.utils.data import ConcatDataset, Subset

from nkd_hf import create_student
from nkd_hf.data.dataset_classes import check_dataset_classes
from nkd_hf.data.image_datasets import ImageDataset, StreamingImageDataset
from nkd_hf.data.labels import describe_synsets

ABC = ["cat", "dog", "owl"]


def images(names, streaming=False):
    """A dataset with these classes, or with integers where there are no names."""
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"", "path": None}] * 2, "label": [0, 1]}, features=features
    )
    return StreamingImageDataset(rows.to_iterable_dataset(), None) if streaming else ImageDataset(rows, None)


OTHER_ORDER = "must stand in the order of the {}'s, got '{}' for class 0, which is '{}' there"


@pytest.mark.parametrize(
    ("student", "train", "evaluated", "message"),
    [
        (ABC, ["owl", "dog", "cat"], ABC, "train_dataset " + OTHER_ORDER.format("student", "owl", "cat")),
        (ABC, ABC, ["owl", "dog", "cat"], "eval_dataset " + OTHER_ORDER.format("student", "owl", "cat")),
        (ABC, None, ["owl", "dog", "cat"], "eval_dataset " + OTHER_ORDER.format("student", "owl", "cat")),
        (
            ["LABEL_0", "LABEL_1", "LABEL_2"],
            ABC,
            ["owl", "dog", "cat"],
            OTHER_ORDER.format("train_dataset", "owl", "cat"),
        ),
        (["0", "1", "2"], ABC, ["owl", "dog", "cat"], OTHER_ORDER.format("train_dataset", "owl", "cat")),
        (["0", "1", "2"], ["1", "0", "2"], None, OTHER_ORDER.format("student", "1", "0")),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "0", "2"], None, OTHER_ORDER.format("student", "1", "LABEL_0")),
        (ABC, ["cat", "dog", "cow"], None, "class 2 is 'owl' for the student and 'cow' for the train_dataset"),
        (ABC, ABC, ["cat", "dog"], "eval_dataset has 2 classes and the student 3"),
        (ABC, ["1", "2", "3"], None, "class 0 is 'cat' for the student and '1' for the train_dataset"),
        (ABC, [*ABC, "yak"], None, "train_dataset must have the student's 3 classes at most, got 4"),
        (["LABEL_0", "LABEL_1"], ABC, None, "train_dataset must have the student's 2 classes at most, got 3"),
        (ABC, [f"LABEL_{i}" for i in range(4)], None, "must have the student's 3 classes at most, got 4"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_other_classes_is_refused(student, train, evaluated, message, streaming):
    by_argument = {"train_dataset": images(train, streaming), "eval_dataset": images(evaluated, streaming)}
    with pytest.raises(ValueError, match="id2label=label_names") as error:
        check_dataset_classes(student, by_argument)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("student", "dataset"),
    [
        (ABC, ABC),
        ({"1": "dog", "0": "cat", "2": "owl"}, ABC),
        (ABC, None),
        (ABC, ["LABEL_0", "LABEL_1"]),
        (ABC, ["0", "1", "2"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ABC),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "2", "3"]),
        (["0", "1", "2"], ["000", "001", "002"]),
        (["crane", "tench", "crane"], ["crane", "tench", "crane2"]),
        (describe_synsets(["n01440764", "n01443537"]), ["n01440764", "n01443537"]),
        (["n01440764", "n01443537"], ["n01440764", "n01443537"]),
    ],
)
def test_the_same_classes_pass_however_they_are_named(student, dataset, caplog):
    check_dataset_classes(student, {"train_dataset": images(dataset), "eval_dataset": None, "other": [{"labels": 7}]})
    assert not caplog.records


def test_the_trainer_compares_all_of_its_datasets(tmp_path):
    student = create_student("resnet18", id2label=ABC, image_size=32, model_args={"channels": [8] * 4})
    good, bad = images(ABC), images(["owl", "dog", "cat"])
    wrapped = ConcatDataset([good, Subset(bad, [0])])
    for train, evaluated in ((bad, None), (wrapped, None), (good, bad), (good, {"one": good, "two": bad})):
        with pytest.raises(ValueError, match=r"the classes of (train|eval)_dataset\S* must stand in the order"):
            make_trainer(tmp_path, student, train, evaluated)
    trainer = make_trainer(tmp_path, student, good, {"one": good})
    for evaluate in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=r"the classes of (eval|test)_dataset must stand in the order"):
            evaluate(bad)
    make_trainer(tmp_path, timm_cnn(), good)
