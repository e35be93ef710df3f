"""Images without labels: which ones there are, their order, and their place in a batch."""

from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard
from tiny import digit_folder, timm_cnn
from torch.utils.data import BatchSampler

from nkd_hf import DataArguments, ImageCollator, load_image_dataset, make_datasets
from nkd_hf.data import label_names
from nkd_hf.data.bad_images import describe_bad_images
from nkd_hf.data.sampler import EpochSampler
from nkd_hf.data.unlabeled import load_unlabeled_images
from nkd_hf.data.unlabeled_images import UNLABELED, JoinedImageDataset, UnlabeledImageDataset


def plain(image) -> torch.Tensor:
    return torch.full((3, 16, 16), float(sum(image.getpixel((2, 3)))))


def joined(num_labeled: int, num_unlabeled: int, ratio: float, **kwargs) -> JoinedImageDataset:
    rows = load_image_dataset(DataArguments())["train"]
    unlabeled = UnlabeledImageDataset(rows.select(range(num_unlabeled)), plain, seed=1)
    return JoinedImageDataset(rows.select(range(num_labeled)), plain, unlabeled=unlabeled, ratio=ratio, **kwargs)


def keys(
    images: JoinedImageDataset, epoch: int, process: int = 0, num_processes: int = 1, batch: int = 4
) -> list[list]:
    sampler = EpochSampler(len(images), 0, positions=True)
    sampler.set_epoch(epoch)
    return list(BatchSamplerShard(BatchSampler(sampler, batch, False), num_processes, process))


def rows_of(images: JoinedImageDataset, batch: list) -> list[tuple[int, int]]:
    return [(each["epoch"], each["index"]) for key in batch for each in images[key]["unlabeled"]]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_processes_see_each_image_once_a_pass(num_processes):
    images = joined(16, 24, 1.5)
    for epoch in range(2):
        seen = [
            row
            for process in range(num_processes)
            for batch in keys(images, epoch, process, num_processes, batch=4 // num_processes)
            for row in rows_of(images, batch)
        ]
        # An epoch of 16 labelled images has 24 without labels, which are one pass.
        assert sorted(seen) == [(epoch, row) for row in range(24)]


def test_a_batch_has_the_ratio_exactly_and_passes_follow_each_other_in_new_orders():
    images = joined(16, 10, 0.25)
    seen = [rows_of(images, batch) for epoch in range(10) for batch in keys(images, epoch)]
    assert {len(rows) for rows in seen} == {1}
    rows = [row for batch in seen for row in batch]
    assert Counter(rows) == Counter((passed, row) for passed in range(4) for row in range(10))
    orders = [[row for passed, row in rows if passed == number] for number in range(4)]
    assert len(set(map(tuple, orders))) == 4
    # As floats, 0.29 * 100 is less than 29.
    images = joined(100, 10, 0.29)
    assert [len(rows_of(images, batch)) for batch in keys(images, 0, batch=100)] == [29]
    # Where it is no integer, batches differ by one.
    images = joined(16, 10, 0.4)
    assert [len(rows_of(images, batch)) for batch in keys(images, 0)] == [1, 2, 1, 2]


def test_a_sample_is_a_function_of_its_key_and_one_without_a_position_stands_alone():
    data = DataArguments(unlabeled_dataset="digits", max_train_samples=20, unlabeled_ratio=2.0)
    images, evaluation, _ = make_datasets(data, timm_cnn(), seed=3)
    other, *_ = make_datasets(data, timm_cnn(), seed=3)
    torch.manual_seed(0)
    for key in ((0, 4, 0), (7, 4, 19)):
        for first, second in zip(images[key]["unlabeled"], other[key]["unlabeled"], strict=True):
            assert first.keys() == {UNLABELED, "epoch", "index", "draw"}
            assert first["index"] == second["index"]
            torch.testing.assert_close(first[UNLABELED], second[UNLABELED], rtol=0, atol=0)
    assert "unlabeled" not in images[4] | images[0, 4]
    # The same row in the same epoch, with and without a label, is not augmented alike.
    assert not torch.equal(images[0, 4]["pixel_values"], images.unlabeled[0, 4][UNLABELED])
    assert not isinstance(evaluation, JoinedImageDataset)


def test_the_collator_mixes_images_without_labels_among_themselves():
    images = joined(8, 40, 1.0)
    samples = [images[key] for key in keys(images, 0, batch=8)[0]]
    unmixed = ImageCollator(10)(samples)
    for name in ("mixup_alpha", "cutmix_alpha"):
        batch = ImageCollator(10, **{name: 1.0}, seed=0)(samples)
        labelled = [{key: value for key, value in sample.items() if key != "unlabeled"} for sample in samples]
        alone = ImageCollator(10, **{name: 1.0}, seed=0)(labelled)
        for key in ("pixel_values", "labels"):
            torch.testing.assert_close(batch[key], alone[key], rtol=0, atol=0)
        assert batch["labels"].shape == (8, 10)
        assert not torch.equal(batch[UNLABELED], unmixed[UNLABELED])
        # Each is a mixture of itself and its predecessor, all with one ratio.
        own, predecessor = unmixed[UNLABELED].mean((1, 2, 3)), unmixed[UNLABELED].roll(1, 0).mean((1, 2, 3))
        shares = (batch[UNLABELED].mean((1, 2, 3)) - predecessor) / (own - predecessor)
        shares = shares[own != predecessor]
        torch.testing.assert_close(shares, shares[:1].expand_as(shares))
        assert 0 < shares[0] < 1
    rows = [each["index"] for sample in samples for each in sample["unlabeled"]]
    assert unmixed["index"].tolist() == [sample["index"] for sample in samples] + [-1 - row for row in rows]
    evaluated = ImageCollator(10, mixup_alpha=1.0).without_mixing()(samples)
    torch.testing.assert_close(evaluated[UNLABELED], unmixed[UNLABELED])


def write_split(folder: Path, name: str, num_images: int, **columns) -> None:
    rows = load_image_dataset(DataArguments())["train"].select(range(num_images)).remove_columns("label")
    for column, values in columns.items():
        rows = rows.add_column(column, values)
    rows.cast_column("image", datasets.Image()).to_parquet(folder / f"{name}.parquet")


def test_any_dataset_or_folder_gives_its_images_and_nothing_else(tmp_path):
    def load(folder: Path) -> datasets.Dataset:
        return load_unlabeled_images(DataArguments(unlabeled_dataset=str(folder)))

    with_classes = Path(digit_folder(tmp_path / "classes", ["zero", "one"], train=3, validation=2))
    assert len(load(with_classes)) == 6
    # Images that lie in one folder, and have no classes.
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted(with_classes.rglob("*.png"))):
        image.rename(flat / f"{number}.png")
    assert len(load(flat)) == 10
    for name in ("splits", "other"):
        (tmp_path / name).mkdir()
    # Several labels an image, which a labelled dataset may not have.
    write_split(tmp_path / "splits", "train", 5, label=[[1, 2]] * 5)
    write_split(tmp_path / "splits", "test", 4, label=[[1, 2]] * 4)
    rows = load(tmp_path / "splits")
    assert (len(rows), rows.column_names) == (5, ["image"])
    write_split(tmp_path / "other", "test", 4)
    assert len(load(tmp_path / "other")) == 4
    write_split(tmp_path / "other", "validation", 4)
    with pytest.raises(ValueError, match=r"must have a split unlabeled or train, or one alone, got .*test"):
        load(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^unlabeled_dataset='.*none' could not be loaded: there is no folder"):
        load(tmp_path / "none")


def test_one_of_several_configurations_is_named(tmp_path):
    folder = tmp_path / "several"
    for name, sizes in {"labelled": {"train": 30, "test": 5}, "rest": {"train": 7, "test": 6}}.items():
        (folder / name).mkdir(parents=True)
        for split, size in sizes.items():
            write_split(folder / name, split, size, label=[0, 1, 2, 3, 4] * (size // 5) + [0] * (size % 5))
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}.parquet"} for split in ("train", "test")],
        }
        for name in ("labelled", "rest")
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")

    def load(**arguments) -> dict[str, int]:
        data = load_image_dataset(DataArguments(unlabeled_dataset=str(folder), **arguments))
        return {name: len(split) for name, split in data.items()}

    named = {"dataset_name": str(folder), "dataset_config_name": "labelled"}
    other = {"unlabeled_dataset_config_name": "rest"}
    assert load(**other)["unlabeled"] == 7
    assert load(**named) == {"train": 30, "validation": 5, "unlabeled": 30}
    assert load(**named, **other) == {"train": 30, "validation": 5, "unlabeled": 7}
    assert load(**named, **other, train_split="none") == {"train": 7, "validation": 5}
    # The same split of another configuration has other images.
    assert load(**named, **other, validation_split="train")["unlabeled"] == 7
    with pytest.raises(ValueError, match="must be without the images of the evaluation"):
        load(**named, unlabeled_dataset_config_name="labelled", validation_split="train")
    for given, found in (
        (None, "Config name is missing.*labelled.*rest"),
        ("more", "'more' not found.*labelled.*rest"),
    ):
        with pytest.raises(
            ValueError, match=rf"^unlabeled_dataset=.*{found}.*check its name and unlabeled_dataset_config_name"
        ):
            load(unlabeled_dataset_config_name=given)


def test_images_of_the_evaluation_are_not_trained_on(tmp_path):
    folder = digit_folder(tmp_path / "all", ["zero", "one"], train=20, validation=5)
    data = load_image_dataset(DataArguments(folder, unlabeled_dataset=folder, max_train_samples=8))
    assert {name: len(split) for name, split in data.items()} == {"train": 8, "validation": 10, "unlabeled": 40}
    for arguments in ({"validation_split": "train"}, {"validation_split": "train", "train_split": "none"}):
        with pytest.raises(ValueError, match=r"must be without the images of the evaluation, got .*whose split train"):
            load_image_dataset(DataArguments(folder, unlabeled_dataset=f"{folder}/", **arguments))
    for split in Path(folder, "validation").iterdir():
        for image in split.iterdir():
            image.unlink()
    # A configuration that nobody named is called default, and is the same by its name.
    for config in (None, "default"):
        arguments = {"unlabeled_dataset": folder, "unlabeled_dataset_config_name": config}
        with pytest.raises(ValueError, match="must be without the images of the evaluation"):
            load_image_dataset(DataArguments(folder, **arguments))


def test_without_a_training_split_classes_are_those_of_the_evaluation(tmp_path):
    folder = digit_folder(tmp_path, ["zero", "one"], train=3, validation=2)
    data = load_image_dataset(
        DataArguments(folder, train_split="none", unlabeled_dataset="digits", max_train_samples=50)
    )
    assert (len(data["train"]), data["train"].column_names) == (50, ["image"])
    assert label_names(data) == ["one", "zero"]
    images, evaluation, _ = make_datasets(
        DataArguments(folder, train_split="none", unlabeled_dataset="digits"), timm_cnn(), seed=0
    )
    assert isinstance(images, UnlabeledImageDataset)
    assert (len(images), len(evaluation)) == (1437, 4)
    folder = digit_folder(tmp_path / "train_only", ["zero", "one"], train=3, validation=0)
    with pytest.raises(ValueError, match="no split 'validation', only train: set validation_split to one of these"):
        load_image_dataset(DataArguments(folder, train_split="none", unlabeled_dataset="digits"))


def test_images_that_cannot_be_read_follow_the_rule_of_the_others():
    broken = load_image_dataset(DataArguments())["train"].select(range(4)).remove_columns("label").to_list()
    broken[2]["image"]["bytes"] = b"no image"
    rows = datasets.Dataset.from_list(broken, features=datasets.Features(image=datasets.Image(decode=False)))
    with pytest.raises(
        ValueError, match=r"row 2 of the unlabelled data \(digit-.*cannot be decoded.*set on_bad_image"
    ):
        UnlabeledImageDataset(rows, plain)[0, 2]
    images = UnlabeledImageDataset(rows, plain, on_bad_image="skip")
    assert images[0, 2]["index"] == 3
    assert describe_bad_images(images).startswith("1 of 4 unlabelled images were bad so far")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_split": "none", "unlabeled_dataset": None}, "unlabeled_dataset must be set for train_split=none"),
        ({"unlabeled_ratio": 2.0, "unlabeled_dataset": None}, "unlabeled_dataset must be set for unlabeled_ratio=2"),
        (
            {"unlabeled_dataset_config_name": "all", "unlabeled_dataset": None},
            "unlabeled_dataset must be set for unlabeled_dataset_config_name=all, got None",
        ),
        ({"unlabeled_ratio": 0.0}, "unlabeled_ratio must be a finite number > 0"),
        ({"unlabeled_ratio": 2.0, "train_split": "none"}, "unlabeled_ratio must be omitted with train_split=none"),
        ({"streaming": True}, "streaming must be false with unlabeled_dataset"),
        ({"streaming": True, "train_split": "none"}, "streaming must be false with unlabeled_dataset"),
        ({"mix_pairs": True}, "mix_pairs must be false with unlabeled_dataset"),
        ({"balanced_sampling": True, "train_split": "none"}, "balanced_sampling must be false with unlabeled_dataset"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**{"unlabeled_dataset": "digits"} | arguments)
