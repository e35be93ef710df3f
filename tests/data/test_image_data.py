import io
import pathlib
import pickle
import random
import traceback
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, load_dataset
from sklearn.datasets import load_digits, load_sample_image
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, TimmWrapperConfig, TimmWrapperForImageClassification, pipeline
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from nkd_hf.data.arguments import DataArguments, streaming_max_steps
from nkd_hf.data.collator import ImageCollator
from nkd_hf.data.image_datasets import ImageDataset, StreamingImageDataset
from nkd_hf.data.labels import label_names
from nkd_hf.data.loading import load_evaluation_split, load_image_dataset
from nkd_hf.data.sampler import EpochSampler
from nkd_hf.data.seeding import seeded
from nkd_hf.data.transforms import processor_transform, train_transform

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
RANDAUGMENT = {"auto_augment": "rand-m9-n2-mstd0.5-inc1", "random_erasing": 0.25}


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Keeps what `datasets` prepares out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # `datasets` 5.0 and newer waits five seconds after each pass over several streamed shards.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
        yield


def digit(row):
    return PIL.Image.fromarray((load_digits_once()[row] * 15).astype(np.uint8))


def load_digits_once(store=[]):  # noqa: B006
    if not store:
        store.append(load_digits().images)
    return store[0]


def write_folder(root, counts):
    """`counts`: {split: images per class}; classes `zero` to `two`, digits as PNG files."""
    row = 0
    for split, count in counts.items():
        for name in ("zero", "one", "two"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                digit(row).save(folder / f"{number}.png")
                row += 1
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"), {"train": 10, "val": 4})


def with_bytes(row):
    path = Path(row["image"]["path"])
    return {"image": {"bytes": path.read_bytes(), "path": path.name}}


@pytest.fixture(scope="session")
def parquet(folder, tmp_path_factory):
    """The same images as parquet, as `push_to_hub` writes it: four shards, named splits, embedded bytes."""
    root = tmp_path_factory.mktemp("parquet")
    loaded = load_dataset(str(folder)).cast_column("image", datasets.Image(decode=False)).map(with_bytes)
    train = loaded["train"].shuffle(seed=0)
    for part in range(4):
        train.shard(4, part).to_parquet(root / f"train-{part:05d}-of-00004.parquet")
    loaded["validation"].to_parquet(root / "validation-00000-of-00001.parquet")
    return root


def encoded(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def load(name, seed=42, **arguments):
    return load_image_dataset(DataArguments(dataset_name=str(name), **arguments), seed=seed)


@pytest.mark.parametrize("load_it", [load_image_dataset, load_evaluation_split])
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_number_their_classes_alike(parquet, tmp_path, load_it, streaming):
    def write(folder, **names_by_file):
        for name, names in names_by_file.items():
            label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
            # Features of a column that isn't read may differ.
            features = {
                "image": datasets.Image(decode=False),
                "label": label,
                "more": datasets.ClassLabel(names=[name]),
            }
            rows = {"image": [{"bytes": encoded(digit(0)), "path": None}] * 4, "label": [0, 1, 0, 1], "more": [0] * 4}
            (tmp_path / folder).mkdir(exist_ok=True)
            rows = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
            rows.to_parquet(tmp_path / folder / f"{name.replace('_', '-')}.parquet")
        return str(tmp_path / folder)

    def load_from(source):
        return load_it(DataArguments(dataset_name=source, streaming=streaming))

    ab, ba = ["cat", "dog", "owl"], ["owl", "cat", "dog"]
    load_from(str(parquet))
    load_from(write("good", train_0=ab, train_1=ab[:2], validation=None))
    bad = {
        "splits": {"train": ab, "validation": ba},
        "shards": {"train_0": ab, "train_1": ba, "validation": ab},
        "more": {"train": ab, "validation": [*ab, "yak"]},
        "unnamed": {"train_0": None, "train_1": ab, "validation": ba},
    }
    for folder, files in bad.items():
        with pytest.raises(
            ValueError, match=r"must number their classes alike, got '(owl|yak)' for class [03] in "
        ) as error:
            load_from(write(folder, **files))
        assert str(error.value).count(".parquet, ") + str(error.value).count(".parquet. ") == 2
    with pytest.raises(ValueError, match="must number their classes alike"):
        load_image_dataset(DataArguments(dataset_name=f"{tmp_path}/shards/train-*.parquet", train_val_split=0.5))
    readme = "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
    readme += (
        "".join(f"          '{i}': {name}\n" for i, name in enumerate(ba)) + "  - name: more\n    dtype: int64\n---\n"
    )
    card = pathlib.Path(write("card", train=ab, validation=ab))
    (card / "README.md").write_text(readme)
    with pytest.raises(
        ValueError, match=r"'cat' for class 0 in .*train.parquet, which is 'owl' in the dataset's card"
    ):
        load_from(str(card))


def transform(size=16, **arguments):
    return train_transform(DataArguments(**arguments), size, MEAN, STD)


def to_pixels(image):
    """A transform with no randomness."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def rows_of(path, **keywords):
    return ImageDataset(load(path, **keywords)["train"], to_pixels)


# Loading


def test_digits_have_a_fixed_stratified_split():
    first, second = load("digits", seed=1), load("digits", seed=2)
    assert {name: len(split) for name, split in first.items()} == {"train": 1437, "validation": 360}
    assert first["train"][0] == second["train"][0]
    counts = np.bincount(first["validation"]["label"])
    assert counts.min() >= 34
    assert counts.max() <= 38
    shown = np.array(datasets.Image().decode_example(first["train"][0]["image"]))
    row = int(first["train"][0]["image"]["path"][6:10])
    np.testing.assert_array_equal(shown, np.rint(load_digits_once()[row] * 255 / 16))
    assert shown.max() == 255
    assert load_digits().target[row] == first["train"][0]["label"]


def test_folder_of_images(folder):
    data = load(folder)
    assert {name: len(split) for name, split in data.items()} == {"train": 30, "validation": 12}
    assert data["train"].column_names == ["image", "label"]
    assert label_names(data) == ["one", "two", "zero"]
    assert data["train"][0]["image"]["path"].endswith("one/0.png")  # encoded: a broken file can be named


def test_parquet_folder_file_and_glob(parquet):
    data = load(parquet)
    assert {name: len(split) for name, split in data.items()} == {"train": 30, "validation": 12}
    assert label_names(data) == ["one", "two", "zero"]
    assert sum(map(len, load(parquet / "train-00000-of-00004.parquet", train_val_split=0.25).values())) == 8
    assert sum(map(len, load(parquet / "train-*.parquet").values())) == 30


def test_columns_are_found_or_set(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet",
        img=[encoded(digit(row)) for row in range(20)],
        coarse_label=[0, 1] * 10,
        fine_label=list(range(10)) * 2,
        photo=[encoded(digit(row + 20)) for row in range(20)],
        image=["not", "used"] * 10,
    )
    data = load(path, image_column_name="img")
    assert data["train"].column_names == ["image", "label"]
    assert sorted(data["train"]["label"][:] + data["validation"]["label"][:]) == sorted(list(range(10)) * 2)
    data = load(path, image_column_name="photo", label_column_name="coarse_label", train_val_split=0.5)
    assert label_names(data) == ["LABEL_0", "LABEL_1"]
    assert data["train"].column_names == ["image", "label"]
    sample = ImageDataset(data["train"], to_pixels)[0]
    photos = [np.array(digit(row + 20)) for row in range(20)]
    assert any(np.array_equal(sample["pixel_values"][0].numpy(), photo) for photo in photos)


@pytest.mark.parametrize("streaming", [False, True])
def test_img_and_fine_label_are_found(tmp_path, streaming):
    for split in ("train", "test"):
        write_parquet(
            tmp_path / f"{split}.parquet", img=[encoded(digit(row)) for row in range(6)], fine_label=[0, 1, 2] * 2
        )
    data = load(tmp_path, streaming=streaming)
    assert set(data) == {"train", "validation"}
    sample = next(iter(data["validation"]))
    assert sample["label"] == 0
    assert sample["image"]["bytes"] == encoded(digit(0))


def test_text_labels_become_classes_of_all_splits(tmp_path):
    image = encoded(digit(0))
    write_parquet(tmp_path / "train.parquet", image=[image] * 4, label=["dog", "cat", "dog", None])
    write_parquet(tmp_path / "validation.parquet", image=[image] * 3, label=["cat", "emu", "dog"])
    data = load(tmp_path)
    assert label_names(data) == ["cat", "dog", "emu"]
    assert data["train"]["label"][:] == [1, 0, 1, None]
    assert data["validation"]["label"][:] == [0, 2, 1]
    assert data["train"].features == data["validation"].features
    with pytest.raises(ValueError, match=r"labels .* are text, .*: load without streaming"):
        load(tmp_path, streaming=True)


def test_integer_labels_get_generic_names_before_any_subset(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image=[encoded(digit(0))] * 40, label=[0, 1, 2, 7] * 10)
    data = load(path, max_train_samples=1)
    assert label_names(data) == [f"LABEL_{label}" for label in range(8)]
    stream = load(parquet_pair(tmp_path / "pair", [0, 1, 2, 7]), streaming=True)
    with pytest.raises(ValueError, match=r"int64 without names, .*: load without streaming"):
        label_names(stream)


@pytest.mark.parametrize("labels", [["b", "a", None], [1, 0, -1], [1.0, 0.0, None]])
def test_labels_are_numbered_at_once(tmp_path, labels, monkeypatch):
    """In batches, the schema with the names of all classes costs more than the rows: 79 s for 200 000 of 100 000 classes."""
    path = write_parquet(tmp_path / "a.parquet", image=[encoded(digit(0))] * 30, label=labels * 10)
    monkeypatch.setattr(datasets.Dataset, "map", None)
    train = load(path, train_val_split=0.1)["train"]
    assert len(train.features["label"].names) == 2
    assert set(train["label"]) == {1, 0, labels[2]}


def parquet_pair(root, labels):
    root.mkdir()
    for split in ("train", "validation"):
        write_parquet(root / f"{split}.parquet", image=[encoded(digit(0))] * len(labels), label=labels)
    return root


def test_a_validation_split_is_made_stratified_and_from_the_seed(tmp_path):
    root = write_folder(tmp_path, {"train": 20})
    first = load(root, train_val_split=0.2)
    assert {name: len(split) for name, split in first.items()} == {"train": 48, "validation": 12}
    assert np.bincount(first["validation"]["label"]).tolist() == [4, 4, 4]
    paths = {name: [image["path"] for image in split["image"]] for name, split in first.items()}
    assert len({*paths["train"], *paths["validation"]}) == 60

    def validation_paths(seed):
        return [image["path"] for image in load(root, seed, train_val_split=0.2)["validation"]["image"]]

    assert validation_paths(42) == paths["validation"]
    assert sorted(validation_paths(43)) != sorted(paths["validation"])


def test_a_class_of_one_image_does_not_prevent_the_split(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image=[encoded(digit(0))] * 10, label=["a"] * 9 + ["b"])
    assert {name: len(split) for name, split in load(path).items()} == {"train": 9, "validation": 1}


def test_splits_are_found_or_set(tmp_path):
    for split, label in (("train", 0), ("validation", 1), ("test", -1)):
        write_parquet(tmp_path / f"{split}.parquet", image=[encoded(digit(0))] * 3, label=[label] * 3)
    assert load(tmp_path)["validation"]["label"][:] == [1] * 3
    assert load(tmp_path, validation_split="test")["validation"]["label"][:] == [-1] * 3
    data = load(tmp_path, train_split="validation")
    assert data["train"]["label"][:] == [1] * 3
    assert data["validation"]["label"][:] == [-1] * 3
    with pytest.raises(ValueError, match=r"no split 'dev', only .*train.*: set validation_split"):
        load(tmp_path, validation_split="dev")
    with pytest.raises(ValueError, match=r"no split 'training', only .*: set train_split"):
        load(tmp_path, train_split="training")


def test_max_samples_draws_from_all_classes(folder, parquet):
    data = load(folder, max_train_samples=12, max_eval_samples=9)
    assert {name: len(split) for name, split in data.items()} == {"train": 12, "validation": 9}
    assert set(data["train"]["label"]) == {0, 1, 2}
    assert data["train"][:] == load(folder, max_train_samples=12)["train"][:]
    assert data["train"][:] != load(folder, seed=1, max_train_samples=12)["train"][:]
    assert len(load(folder, max_train_samples=10**6)["train"]) == 30
    stream = load(parquet, streaming=True, max_train_samples=12, max_eval_samples=5)
    assert {name: len(list(split)) for name, split in stream.items()} == {"train": 12, "validation": 5}


@pytest.mark.parametrize("name", [".", "./"])
def test_the_folder_of_the_images_may_be_the_current_one(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    assert len(load(name)["train"]) == len(load(folder)["train"])


def test_what_cannot_be_loaded_is_said(tmp_path, folder):
    with pytest.raises(ValueError, match=r"dataset_name='nobody/nothing' .*gated.*hf auth login.*no network"):
        load("nobody/nothing")
    with pytest.raises(ValueError, match=r"could not be loaded: there is no folder .*existing folder"):
        load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"could not be loaded .*doesn't contain any data files"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="could not be loaded"):
        load(tmp_path / "*.parquet")
    with pytest.raises(ValueError, match="no image column 'photo', only image, label: set image_column_name"):
        load(folder, image_column_name="photo")
    with pytest.raises(ValueError, match="both taken from the column 'image'"):
        load(folder, label_column_name="image")
    with pytest.raises(ValueError, match=r"no validation split .*: name one with validation_split, or load without"):
        load(write_folder(tmp_path / "one", {"train": 1}), streaming=True)
    path = write_parquet(tmp_path / "a.parquet", image=[1, 2], label=[0, 1], weight=[0.5, 1.5], kind=[0, 1])
    with pytest.raises(
        ValueError, match="no label column 'tag', only image, label, weight, kind: set label_column_name"
    ):
        load(path, label_column_name="tag")
    with pytest.raises(ValueError, match=r"image column is Value\('int64'\), expected images"):
        load(path)
    path = write_parquet(tmp_path / "c.parquet", image=[encoded(digit(0))] * 2, label=[[0, 1], [1, 1]])
    with pytest.raises(ValueError, match=r"expected one integer or name a row\. Several labels an image are not supp"):
        load(path)
    path = write_parquet(tmp_path / "b.parquet", image=[encoded(digit(0))] * 2, label=[0.5, 1.5], kind=[0, 1])
    with pytest.raises(ValueError, match=r"label column holds fractions .*, expected one integer or name"):
        load(path)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"could not be loaded \(ArrowInvalid: .*[Pp]arquet"):
        load(tmp_path / "c.parquet")


# Arguments


def test_arguments_come_from_a_command_line():
    line = ["--dataset_name", "a/b", "--random_resized_crop", "0.5", "1.0", "--streaming", "--on_bad_image", "skip"]
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(line)
    assert (args.dataset_name, args.random_resized_crop, args.streaming) == ("a/b", [0.5, 1.0], True)
    assert args.on_bad_image == "skip"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_bad_image": "ignore"}, "on_bad_image must be error or skip, got 'ignore'"),
        ({"train_val_split": 1.0}, "train_val_split must lie between 0 and 1, got 1.0"),
        ({"max_train_samples": 0}, "max_train_samples must be positive, got 0"),
        ({"horizontal_flip": 1.5}, "horizontal_flip is a probability from 0 to 1, got 1.5"),
        ({"random_resized_crop": [0.5]}, "random_resized_crop must be two fractions"),
        ({"random_resized_crop": [0.9, 0.5]}, "random_resized_crop must be two fractions"),
        ({"mixup_alpha": -1.0}, "mixup_alpha must be a finite number >= 0"),
        ({"pca_lighting": -0.1}, "pca_lighting must be a finite number >= 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


def test_streaming_max_steps():
    assert streaming_max_steps(1000, 3, 256) == 12
    assert streaming_max_steps(1024, 1, 256) == 4
    with pytest.raises(ValueError, match=r"num_train_images must be positive .* got None: set num_train_images"):
        streaming_max_steps(None, 3, 256)


# Transforms


@pytest.fixture(scope="session")
def photo():
    return PIL.Image.fromarray(load_sample_image("china.jpg"))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        RANDAUGMENT,
        {"random_crop_padding": 4},
        {"pca_lighting": 0.1},
        {"random_erasing": 1.0},
        {"random_crop_padding": 4, "pca_lighting": 0.1, **RANDAUGMENT},
    ],
)
def test_training_transforms_give_float_pixels(photo, arguments):
    pixels = train_transform(DataArguments(**arguments), 24, MEAN, STD, "bicubic")(photo)
    assert type(pixels) is torch.Tensor
    assert pixels.shape == (3, 24, 24)
    assert pixels.dtype == torch.float32


@pytest.mark.parametrize("arguments", [{}, {"auto_augment": "rand-m0-n1"}])
def test_normalisation_and_size(arguments):
    grey = PIL.Image.new("RGB", (40, 30), (51, 102, 153))
    run = train_transform(DataArguments(**arguments), (12, 20), MEAN, STD)
    random.seed(3)
    np.random.seed(1)
    pixels = run(grey)
    assert pixels.shape == (3, 12, 20)
    if not arguments:
        expected = (torch.tensor([0.2, 0.4, 0.6]) - torch.tensor(MEAN)) / torch.tensor(STD)
        torch.testing.assert_close(pixels, expected[:, None, None].expand(3, 12, 20))


def test_erasing_fills_a_rectangle_with_noise():
    with seeded(0):
        pixels = transform(32, random_erasing=1.0)(PIL.Image.new("RGB", (40, 40), (128, 128, 128)))
    noise = pixels[0] != pixels[0].mode().values.mode().values
    assert 20 < noise.sum() < 400
    assert len(pixels[0][noise].unique()) == noise.sum()  # each pixel its own value


def test_lighting_shifts_all_pixels_along_the_principal_axes():
    args = DataArguments(pca_lighting=0.1, horizontal_flip=0.0)
    transform = train_transform(args, 8, mean=[0.0] * 3, std=[1.0] * 3)
    grey = PIL.Image.new("RGB", (8, 8), (128, 128, 128))
    torch.manual_seed(0)
    shifts = torch.stack([transform(grey) for _ in range(4000)]) - 128 / 255
    assert (shifts - shifts[:, :, :1, :1]).abs().max() < 1e-6
    # The variances along the axes are (0.1 x eigenvalue)^2: pycls's eigenvalues for RGB in 0..1.
    variances = torch.linalg.eigvalsh(shifts[:, :, 0, 0].T.cov())
    torch.testing.assert_close(variances.sqrt(), torch.tensor([0.00045, 0.00188, 0.02175]), rtol=0.1, atol=0)


def test_the_cifar_crop_moves_by_the_padding_at_most():
    args = DataArguments(random_crop_padding=2, horizontal_flip=0.0)
    run = train_transform(args, 8, [0.0] * 3, [1.0] * 3)
    image = digit(0).convert("RGB")
    padded = torch.nn.functional.pad(to_pixels(image) / 255, (2, 2, 2, 2))
    windows = [padded[:, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
    seen = set()
    for _ in range(100):
        pixels = run(image)
        matches = [number for number, window in enumerate(windows) if torch.allclose(pixels, window)]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 15


@pytest.mark.parametrize("policy", ["rand-m10-n2-inc1", "rand-m0-n2", "v0-mstd0.5", "originalr", "augmix-m10"])
def test_the_strongest_posterize_is_black_with_any_pillow(policy):
    run = train_transform(DataArguments(auto_augment=policy), 8, [0.5] * 3, [0.5] * 3)
    pixels = []
    for key in range(200):
        with seeded(key):
            pixels.append(run(digit(key).convert("RGB").resize((8, 8))))
    assert torch.stack(pixels).isfinite().all()
    if policy == "rand-m10-n2-inc1":
        assert any((each == -1).all() for each in pixels)


@pytest.mark.parametrize("text", ["rand-x9", "nonsense"])
def test_a_wrong_auto_augment_is_said(text):
    with pytest.raises(ValueError, match=r"auto_augment=.* is not in timm's syntax .*: write for example rand-m9"):
        transform(auto_augment=text)


def test_a_wrong_interpolation_is_said():
    with pytest.raises(ValueError, match="interpolation must be bilinear or bicubic, got 'nearest'"):
        train_transform(DataArguments(), 8, MEAN, STD, "nearest")


# ImageDataset


@pytest.mark.parametrize("arguments", [{}, RANDAUGMENT])
def test_samples_are_a_pure_function_of_seed_epoch_and_index(folder, arguments):
    data = load(folder)["train"]
    dataset = ImageDataset(data, transform(**arguments), seed=1)

    def pixels(epoch, index, of=dataset):
        random.seed(epoch + index), np.random.seed(epoch), torch.manual_seed(index)
        return of[(epoch, index)]["pixel_values"]

    first = pixels(0, 4)
    pixels(9, 9)
    assert torch.equal(pixels(0, 4), first)
    assert torch.equal(dataset[4]["pixel_values"], first)
    assert torch.equal(pixels(0, 4, ImageDataset(data, transform(**arguments), seed=1)), first)
    assert not torch.equal(pixels(1, 4), first)
    assert not torch.equal(pixels(0, 4, ImageDataset(data, transform(**arguments), seed=2)), first)
    sample = dataset[(3, 4)]
    assert {key: sample[key] for key in ("labels", "epoch", "index")} == {"labels": 0, "epoch": 3, "index": 4}


@pytest.mark.parametrize("arguments", [{}, RANDAUGMENT])
def test_equal_images_are_augmented_differently_and_nothing_else_is_disturbed(photo, arguments, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image=[encoded(photo.resize((64, 64)))] * 20, label=[0] * 20)
    dataset = ImageDataset(load(path)["train"], transform(**arguments))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert not torch.equal(dataset[0]["pixel_values"], dataset[1]["pixel_values"])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def epochs(dataset, num_epochs=2, **keywords):
    sampler = EpochSampler(len(dataset), seed=0)
    collator = ImageCollator(3, mixup_alpha=0.8, cutmix_alpha=1.0)
    loader = DataLoader(dataset, batch_size=7, sampler=sampler, collate_fn=collator, **keywords)
    result = []
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        result.append(list(loader))
    return result


@pytest.mark.parametrize("arguments", [{}, RANDAUGMENT])
def test_batches_are_the_same_with_any_number_of_workers(folder, arguments):
    dataset = ImageDataset(load(folder)["train"], transform(**arguments))
    expected = epochs(dataset)
    assert not torch.equal(expected[0][0]["pixel_values"], expected[1][0]["pixel_values"])
    for keywords in ({"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}):
        torch.manual_seed(0)
        for epoch, epoch_expected in zip(epochs(dataset, **keywords), expected, strict=True):
            for batch, batch_expected in zip(epoch, epoch_expected, strict=True):
                assert torch.equal(batch["pixel_values"], batch_expected["pixel_values"])
                assert torch.equal(batch["labels"], batch_expected["labels"])


def test_evaluation_samples_carry_no_keys(folder):
    dataset = ImageDataset(load(folder)["validation"], to_pixels, training=False)
    assert set(dataset[0]) == {"pixel_values", "labels"}
    assert len(dataset) == 12


def test_a_dataset_that_decodes_and_one_without_columns(folder):
    dataset = ImageDataset(load_dataset(str(folder), split="train"), to_pixels)
    assert dataset[0]["pixel_values"].shape == (3, 8, 8)
    for kind in (ImageDataset, StreamingImageDataset):
        with pytest.raises(ValueError, match="expected the columns image and label, got image: "):
            kind(load(folder)["train"].remove_columns("label"), to_pixels)
        with pytest.raises(ValueError, match="on_bad_image must be"):
            kind(load(folder)["train"], to_pixels, on_bad_image="ignore")


# Odd images, next to transformers' pipeline


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory, photo):
    """A folder with one file of each kind; the pipeline reads the same files."""
    root = tmp_path_factory.mktemp("odd") / "train" / "class"
    root.mkdir(parents=True)
    small = photo.resize((61, 43))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    alpha = small.convert("RGBA")
    alpha.putalpha(100)
    palette = small.convert("P")
    palette.info["transparency"] = 3
    digit(0).save(root / "grayscale.png")
    alpha.save(root / "rgba.png")
    palette.save(root / "palette.png", transparency=3)
    small.convert("LA").save(root / "la.png")
    small.convert("CMYK").save(root / "cmyk.jpg")
    small.save(root / "rotated.jpg", exif=exif)
    return root


@pytest.fixture(scope="session")
def processor():
    cfg = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "crop_pct": 0.875, "interpolation": "bicubic"}
    return TimmWrapperImageProcessor(pretrained_cfg=cfg, architecture="test_resnet")


def test_evaluation_pixels_are_those_of_the_pipeline(odd_images, processor):
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    classify = pipeline(
        "image-classification", model=TimmWrapperForImageClassification(config), image_processor=processor
    )
    run = pickle.loads(pickle.dumps(processor_transform(processor)))
    rows = load_dataset(str(odd_images.parent.parent), split="train").cast_column(
        "image", datasets.Image(decode=False)
    )
    dataset = ImageDataset(rows.add_column("label", [0] * len(rows)) if "label" not in rows.features else rows, run)
    assert len(dataset) == 6
    for row in range(len(dataset)):
        path = dataset.dataset[row]["image"]["path"]
        pixels = dataset[row]["pixel_values"]
        assert pixels.shape == (3, 32, 32)
        assert torch.equal(pixels, classify.preprocess(path)["pixel_values"][0]), path
        assert torch.equal(pixels, run(PIL.ImageOps.exif_transpose(PIL.Image.open(path)).convert("RGB"))), path


def test_a_rotated_photo_is_turned_upright(odd_images):
    dataset = ImageDataset(
        datasets.Dataset.from_dict({"image": [str(odd_images / "rotated.jpg")], "label": [0]}), to_pixels
    )
    assert dataset[0]["pixel_values"].shape == (3, 61, 43)


# Bad images


def write_bad_folder(root, bad=("two/1.jpg", "zero/3.jpg")):
    photo = PIL.Image.fromarray(load_sample_image("flower.jpg")).resize((48, 32))
    for name in ("one", "two", "zero"):
        (root / "train" / name).mkdir(parents=True)
        for number in range(4):
            photo.rotate(number).save(root / "train" / name / f"{number}.jpg")
    for name in bad:
        path = root / "train" / name
        path.write_bytes(path.read_bytes()[:400] if name.startswith("two") else b"")
    return root


def bad_rows(root):
    """Rows 5 (truncated) and 11 (empty file, the last row) are bad."""
    return load_dataset(str(write_bad_folder(root)), split="train")


def test_a_bad_image_is_an_error_that_names_its_file_or_row(tmp_path):
    dataset = ImageDataset(bad_rows(tmp_path), to_pixels)
    with pytest.raises(ValueError, match=r"row 5 of the training data \(.*two/1.jpg\) cannot be decoded .*Truncated"):
        dataset[5]
    dataset = ImageDataset(dataset.dataset.select(range(6, 12)), to_pixels)
    with pytest.raises(ValueError, match=r"row 5 .*zero/3.jpg.* set on_bad_image to skip") as error:
        next(iter(DataLoader(dataset, batch_size=6, num_workers=1, collate_fn=ImageCollator(3))))
    traceback.clear_frames(error.tb)  # an iterator that the garbage collector finds waits 5 s for its worker
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"junk", "path": None}, None], "label": [0, 0]},
        features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64")),
    )
    dataset = ImageDataset(rows, to_pixels, training=False)
    with pytest.raises(ValueError, match=r"^row 0 of the evaluation data cannot be decoded .*no image of a format"):
        dataset[0]
    with pytest.raises(ValueError, match=r"^row 1 of the evaluation data has no image"):
        dataset[1]


@pytest.mark.runs
@pytest.mark.parametrize(
    "keywords",
    [{}, {"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}],
)
def test_skip_takes_the_next_good_row_and_counts(tmp_path, keywords, caplog):
    dataset = ImageDataset(bad_rows(tmp_path), transform(), on_bad_image="skip")
    loader = DataLoader(dataset, batch_size=12, collate_fn=list, **keywords)
    for _ in range(2):
        (batch,) = loader
        assert [sample["index"] for sample in batch] == [0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 0]
    assert torch.equal(batch[5]["pixel_values"], batch[6]["pixel_values"])
    assert dataset.num_bad_images == 2
    if not keywords:
        assert [record.getMessage().count("takes its place") for record in caplog.records] == [1, 1]
        assert "two/1.jpg" in caplog.text


def test_all_bad_is_an_error(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [{"bytes": b"junk", "path": None}] * 3, "label": [0] * 3})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    with pytest.raises(ValueError, match="all 3 rows are bad"):
        ImageDataset(rows, to_pixels, on_bad_image="skip")[1]
    with pytest.raises(ValueError, match="no rows"):
        ImageDataset(rows.select([]), to_pixels)


def test_missing_labels_are_bad_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image=[encoded(digit(0))] * 20, label=[2, -1, None, 0] * 5)
    data = load(path, validation_split="train")
    assert data["train"]["label"][:4] == [2, -1, None, 0]
    dataset = ImageDataset(data["train"], to_pixels)
    for row, label in ((1, -1), (2, None)):
        with pytest.raises(ValueError, match=rf"row {row} of the training data.* has no label \({label}\)"):
            dataset[row]
    dataset = ImageDataset(data["train"], to_pixels, on_bad_image="skip")
    assert [dataset[row]["labels"] for row in range(4)] == [2, 0, 0, 0]
    assert dataset.num_bad_images == 2
    assert set(load(path)["train"]["label"]) <= {2, -1, None, 0}


# Streaming


def stream(root, training=True, run=to_pixels, **keywords):
    split = "train" if training else "validation"
    return StreamingImageDataset(load(root, streaming=True)[split], run, training=training, **keywords)


def taken(dataset, count, **keywords):
    loader = DataLoader(dataset, batch_size=None, **keywords)
    return [sample for sample, _ in zip(loader, range(count), strict=False)]


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_a_training_stream_goes_through_pass_after_pass(source, request):
    dataset = stream(request.getfixturevalue(source))
    samples = taken(dataset, 90)
    passes = [samples[start : start + 30] for start in (0, 30, 60)]
    for number, seen in enumerate(passes):
        assert {sample["epoch"] for sample in seen} == {number}
        assert len({sample["index"] for sample in seen}) == 30
        assert np.bincount([sample["labels"] for sample in seen]).tolist() == [10, 10, 10]
    orders = [[sample["index"] for sample in seen] for seen in passes]
    assert orders[0] != orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1])
    assert [sample["index"] for sample in taken(stream(request.getfixturevalue(source)), 90)] == [
        index for order in orders for index in order
    ]
    assert [sample["index"] for sample in taken(stream(request.getfixturevalue(source), seed=1), 30)] != orders[0]


@pytest.mark.parametrize("arguments", [{}, RANDAUGMENT])
def test_streamed_augmentation_is_the_same_with_any_number_of_workers(parquet, arguments):
    def one_pass(**keywords):
        samples = taken(stream(parquet, run=transform(**arguments)), 60, **keywords)
        return {(sample["epoch"], sample["index"]): sample["pixel_values"] for sample in samples}

    expected = one_pass()
    assert len(expected) == 60
    # 8x8 pixels leave few different crops, so that some images get the same one twice.
    indices = {index for _, index in expected}
    assert sum(torch.equal(expected[0, index], expected[1, index]) for index in indices) < 5
    seen = one_pass(num_workers=2)
    assert len(seen) >= 55  # both workers go through their own shards, so that one may begin a pass earlier
    common = seen.keys() & expected.keys()
    assert len(common) >= 55
    for key in common:
        assert torch.equal(seen[key], expected[key])


def test_workers_divide_the_shards(parquet):
    samples = taken(stream(parquet), 30, num_workers=2)
    first_pass = [sample["index"] for sample in samples if sample["epoch"] == 0]
    assert len(first_pass) == len(set(first_pass))
    assert len(first_pass) >= 28


def test_workers_without_a_shard_stop_and_leave_the_rest_to_others(folder):
    samples = taken(stream(folder), 70, num_workers=2)  # a folder of images is one shard
    assert [sample["epoch"] for sample in samples] == [0] * 30 + [1] * 30 + [2] * 10


def test_set_epoch_reaches_persistent_workers(parquet):
    dataset = stream(parquet)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 5, 1):
        dataset.set_epoch(epoch)
        assert next(iter(loader))["epoch"] == epoch


def test_an_evaluation_stream_is_one_pass_in_order(parquet):
    samples = list(stream(parquet, training=False))
    assert len(samples) == 12
    assert set(samples[0]) == {"pixel_values", "labels"}
    rows = ImageDataset(load(parquet)["validation"], to_pixels, training=False)
    for sample, row in zip(samples, rows, strict=True):
        assert torch.equal(sample["pixel_values"], row["pixel_values"])
        assert sample["labels"] == row["labels"]


def bad_stream(root, **keywords):
    rows = bad_rows(root).cast_column("image", datasets.Image(decode=False))
    return StreamingImageDataset(rows.to_iterable_dataset(num_shards=2), to_pixels, **keywords)


def test_a_bad_image_in_a_stream_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^.*/(two/1|zero/3).jpg cannot be decoded"):
        taken(bad_stream(tmp_path), 12)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_skips_bad_images_and_counts_them(tmp_path, num_workers, caplog):
    dataset = bad_stream(tmp_path, on_bad_image="skip", training=False)
    samples = list(DataLoader(dataset, batch_size=None, num_workers=num_workers))
    assert len(samples) == 10
    assert dataset.num_bad_images == 2
    if num_workers == 0:
        assert len(caplog.records) == 2
    dataset.training = True
    samples = taken(dataset, 20, num_workers=num_workers)
    assert len(samples) == 20
    assert len({sample["index"] for sample in samples}) == 10


def test_a_stream_with_nothing_good_ends_in_an_error():
    rows = datasets.Dataset.from_dict({"image": [{"bytes": b"junk", "path": None}] * 3, "label": [0] * 3})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    with pytest.raises(ValueError, match="all 3 images of a pass are bad"):
        next(iter(StreamingImageDataset(rows.to_iterable_dataset(), to_pixels, on_bad_image="skip")))
    with pytest.raises(ValueError, match=r"CRC-32 0x[0-9a-f]{8} cannot be decoded"):
        next(iter(StreamingImageDataset(rows.to_iterable_dataset(), to_pixels)))


def test_streamed_digits(tmp_path):
    data = load("digits", streaming=True)
    assert data["train"].num_shards == 4
    assert label_names(data) == [str(label) for label in range(10)]
    assert isinstance(data["train"].features["label"], ClassLabel)


def test_classes_are_numbered_by_training_where_the_evaluation_lacks_one(tmp_path):
    """Text labels: the split to evaluate on has neither the first class nor the third."""
    for split, names in (("train", "abcd"), ("validation", "bd")):
        (tmp_path / split).mkdir()
        for name in names:
            PIL.Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(tmp_path / split / f"{name}.png")
        rows = "".join(f"{name}.png,{name}\n" for name in names)
        (tmp_path / split / "metadata.csv").write_text(f"file_name,label\n{rows}")
    name, split = load_evaluation_split(DataArguments(dataset_name=str(tmp_path)), 0)
    assert (name, split["label"][:]) == ("validation", [1, 3])
    assert split.features["label"].names == ["a", "b", "c", "d"]


@pytest.mark.parametrize("singles", [0, 1])
def test_a_validation_split_is_made_of_a_class_with_one_image_too(tmp_path, singles):
    """scikit-learn refuses to stratify by it. Without it, each class has its share."""
    labels = [0] * 20 + [1] * 60 + [2] * singles
    path = write_parquet(tmp_path / "train.parquet", image=[encoded(digit(0))] * len(labels), label=labels)
    data = load(path)
    assert len(data["train"]) + len(data["validation"]) == len(labels)
    assert len(data["validation"]) == 8 + singles
    if not singles:
        assert np.bincount(data["validation"]["label"][:]).tolist() == [2, 6]
