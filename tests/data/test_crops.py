"""Several crops of a decoded image: their order, one decoding for all of them, mixing, resuming, several processes, stores."""

import itertools
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from store_runs import MIXING, NUM_TRAIN, arguments, train, write
from tiny import make_trainer, timm_cnn
from torch.utils.data import BatchSampler, DataLoader

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    ImageCollator,
    ImageDataset,
    NKDLoss,
    Recipe,
    RecipeArguments,
    cli,
    load_image_dataset,
    train_transform,
)
from nkd_hf.data import decoding, kept_rows
from nkd_hf.data.orders import crop_order
from nkd_hf.data.sampler import EpochSampler
from nkd_hf.models.saving import save_student
from nkd_hf.teacher_logits.store import TeacherLogits
from nkd_hf.trainer.batch_norm import estimate_batch_norm
from nkd_hf.trainer.loaders import make_epoch_sampler

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def rows():
    return load_image_dataset(DataArguments(max_train_samples=26), 0)["train"]


def images(rows, crops: int = 4, **kwargs) -> ImageDataset:
    transform = train_transform(DataArguments(random_resized_crop=[0.6, 1.0]), 16, [0.5] * 3, [0.5] * 3)
    return ImageDataset(rows, transform, crops_per_image=crops, **kwargs)


def keys(epoch: int, size: int = 26, crops: int = 4, **kwargs) -> list[tuple]:
    sampler = EpochSampler(size, seed=0, crops=crops, **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.fixture
def decoded(monkeypatch) -> list:
    """The names of the rows that were decoded, in order."""
    names, read = [], decoding.read_sample
    monkeypatch.setattr(
        decoding, "read_sample", lambda sample, name, *args: (names.append(name), read(sample, name, *args))[1]
    )
    return names


# --- the order ---


@pytest.mark.parametrize("crops", [2, 3, 4])
@pytest.mark.parametrize("size", [24, 25, 26, 27])
def test_so_many_epochs_take_each_row_and_an_epoch_takes_its_part(size, crops):
    for group in (0, 1):
        parts = [crop_order(size, crops, seed=0, epoch=crops * group + part) for part in range(crops)]
        for rows, numbers in parts:
            assert len(rows) == len(numbers) == size
            assert len(set(rows)) == -(-size // crops)
            assert len(set(zip(rows, numbers, strict=True))) == size  # no crop comes twice
            assert all(first != second for first, second in itertools.pairwise(rows))
        taken = Counter(row for rows, _ in parts for row in set(rows))
        assert set(taken) == set(range(size))
        assert sum(taken.values()) - size < crops  # two parts share a row where the size is no multiple
    assert parts != [crop_order(size, crops, seed=0, epoch=part) for part in range(crops)]


def test_the_positions_of_two_rows_alternate():
    rows, numbers = crop_order(64, 4, seed=0, epoch=1)
    for start in range(0, 64, 8):
        first, second = rows[start : start + 2]
        assert rows[start : start + 8] == [first, second] * 4
        assert numbers[start : start + 8] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_one_crop_is_the_order_without_crops():
    assert keys(5, crops=1) == keys(5, crops=1, labels=None)
    for epoch in (0, 3):
        rows, numbers = crop_order(26, 1, seed=0, epoch=epoch)
        assert [(epoch, row) for row in rows] == keys(epoch, crops=1)
        assert set(numbers) == {0}
    with pytest.raises(ValueError, match=r"crops must be positive, and 1 with labels, got 4\. Omit it"):
        keys(0, labels=torch.zeros(26).numpy())


@pytest.mark.parametrize("cycle", [None, 4])
def test_the_crops_of_a_row_are_eight_batches_apart(cycle):
    """In the first and in a repeated epoch; the last block has the rest of the rows, too."""
    ordered = keys(5, 352, positions=True, pairs=True, cycle=cycle, batch=4)  # 88 rows: blocks of 32 and of 56
    start = 0
    for size in (32, 56):
        rows = [key[1] for key in ordered[start : start + 4 * size]]
        assert len(set(rows[:size])) == size
        assert rows == rows[:size] * 4
        start += 4 * size
    crops = [(*key, 0, 0)[3] if len(key) > 3 else 0 for key in ordered]
    assert crops[:128] == [crop for crop in range(4) for _ in range(32)]


@pytest.mark.parametrize("size", [24, 25, 26, 27, 30, 88])
@pytest.mark.parametrize("crops", [2, 3, 4])
def test_spread_samples_are_those_of_the_positions(size, crops):
    """Of an epoch and of a repeated one; pairs stay together."""
    plain, spread, again = (
        keys(epoch, size, crops, positions=True, pairs=True, cycle=crops, batch=batch)
        for epoch, batch in ((1, None), (1, 2), (1 + crops, 2))
    )
    assert Counter(plain) == Counter(spread) == Counter(again)
    pairs = [plain[at : at + 2] for at in range(0, len(plain), 2)]
    for order in (spread, again):
        assert sorted(map(str, pairs)) == sorted(str(order[at : at + 2]) for at in range(0, len(order), 2))
    assert spread != again or size < 88


def test_a_repeated_epoch_of_positions_keeps_the_crops_of_a_row_together():
    first, again = (keys(epoch, 64, positions=True, pairs=True, cycle=4) for epoch in (1, 5))
    assert Counter(first) == Counter(again)
    assert first != again
    for start in range(0, 64, 8):
        assert again[start : start + 8] in [first[place : place + 8] for place in range(0, 64, 8)]


def test_the_batches_of_an_optimiser_step_count_as_one(rows):
    args = DistillationTrainingArguments(
        "unused", per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True, report_to="none"
    )
    assert make_epoch_sampler(images(rows), args, list).batch == 8


# --- the samples ---


def test_the_first_crop_is_the_sample_without_crops(rows):
    several, single = images(rows), images(rows, crops=1)
    for row in (0, 7):
        assert torch.equal(several[3, row]["pixel_values"], single[3, row]["pixel_values"])


def test_statistics_of_batch_norm_keep_no_images(rows):
    """They read one sample of each row, which no other crop follows."""
    dataset = images(rows)
    dataset[0, 3]
    estimate_batch_norm(
        timm_cnn(), dataset, 16, Accelerator(cpu=True), key=(0, 7), batch_size=8, collate_fn=ImageCollator(10)
    )
    assert list(dataset._kept._rows) == [3]


def test_kept_images_have_a_limit_and_are_gone_in_the_next_epoch(rows, decoded, monkeypatch):
    dataset = images(rows)
    for key in keys(2, batch=8)[:8]:
        dataset[key]
    assert len(dataset._kept._rows) == 4 == len(decoded)
    width, height = dataset._kept.take(2, keys(2, batch=8)[0][1])["decoded"][0].size
    dataset[3, 0]
    assert len(dataset._kept._rows) == 1
    monkeypatch.setattr(kept_rows, "_MAX_BYTES", 3 * 4 * width * height)
    decoded.clear()
    dataset = images(rows)
    for key in keys(2, batch=8):
        dataset[key]
        assert len(dataset._kept._rows) <= 3
    assert 7 < len(decoded) < 26  # some are found


@pytest.mark.parametrize("batch", [None, 2, 8])
def test_an_image_is_decoded_once_for_its_crops(rows, decoded, batch):
    dataset = images(rows)
    samples = [dataset[key] for key in keys(2, batch=batch)]
    assert len(decoded) == len(set(decoded)) == 7
    views = {tuple(sample["pixel_values"].flatten().tolist()) for sample in samples}
    assert len(views) == 26  # each crop is another view
    # The same crops, in any order and without anything kept.
    for key, sample in zip(keys(2, batch=batch), samples, strict=True):
        assert torch.equal(images(rows)[key]["pixel_values"], sample["pixel_values"])
    decoded.clear()
    dataset = images(rows, crops=1)
    for key in keys(2, crops=1):
        dataset[key]
    assert len(decoded) == 26


@pytest.mark.parametrize("num_processes", [1, 2])
def test_each_worker_of_each_process_decodes_its_own_images_once(num_processes, monkeypatch):
    data = load_image_dataset(DataArguments(max_train_samples=512), 0)["train"]
    dataset, count, read = images(data), torch.zeros(1, dtype=torch.int64).share_memory_(), decoding.read_sample
    monkeypatch.setattr(decoding, "read_sample", lambda *args: (count.add_(1), read(*args))[1])
    for rank in range(num_processes):
        sampler = EpochSampler(512, seed=0, crops=4, batch=4 * num_processes)
        batches = BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), num_processes, rank)
        list(DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=2))
    assert count.item() == 128


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_and_workers_share_the_samples_of_an_epoch(rows, workers, drop_last):
    """Each sample once, but for those that fill up the last batches; its pixels do not depend on the process."""
    dataset = images(rows)
    alone = {key: dataset[key]["pixel_values"] for key in keys(2)}
    seen = Counter()
    for rank in range(2):
        sampler = EpochSampler(26, seed=0, crops=4)
        sampler.set_epoch(2)
        batches = BatchSamplerShard(BatchSampler(sampler, 8, drop_last), 2, rank)
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=workers)
        for sample in (sample for batch in loader for sample in batch):
            key = (2, sample["index"], None, sample["draw"]) if sample["draw"] else (2, sample["index"])
            assert torch.equal(sample["pixel_values"], alone[key])
            seen[key] += 1
    assert len(seen) == (16 if drop_last else 26)
    assert sum(seen.values()) == (16 if drop_last else 32)


@pytest.mark.parametrize("mix_pairs", [False, True])
def test_images_are_mixed_with_others(rows, mix_pairs):
    """A crop is never mixed with another crop of its image: where labels differ, both are in the mix."""
    labels = rows["label"][:]
    sampler = EpochSampler(26, seed=0, crops=4, positions=True, pairs=mix_pairs)
    collator = ImageCollator(10, mixup_alpha=1.0, seed=0, mix_pairs=mix_pairs)
    dataset = images(rows)
    for batch in BatchSampler(sampler, 8, drop_last=True):
        mixed = collator([dataset[key] for key in batch])["labels"]
        for at, key in enumerate(batch):
            partner = batch[at ^ 1 if mix_pairs else at - 1]
            assert partner[1] != key[1]
            assert set(mixed[at].nonzero().flatten().tolist()) == {labels[key[1]], labels[partner[1]]}


def test_a_bad_row_gives_its_crops_to_the_next_one(rows, monkeypatch):
    dataset = images(rows, on_bad_image="skip")
    read = decoding.read_sample

    def broken(sample, name, *args):
        if name.startswith("row 3 "):
            raise decoding.BadSampleError(f"{name} is broken")
        return read(sample, name, *args)

    monkeypatch.setattr(decoding, "read_sample", broken)
    samples = [dataset[0, 3, None, crop] for crop in range(4)]
    assert [(sample["index"], sample["draw"]) for sample in samples] == [(4, crop) for crop in range(4)]
    assert dataset.bad_rows == [3]


# --- the run ---


@pytest.mark.parametrize(
    "other",
    [["--streaming", "true", "--max_steps", "2"], ["--balanced_sampling", "true"], ["--unlabeled_dataset", "digits"]],
)
def test_what_has_another_order_is_refused(other, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", "--student", "resnet18", "--distillation_loss", "none", "--crops_per_image", "4", *other])
    assert error.value.code == 2
    expected = f"crops_per_image must be 1 with {other[0][2:]}, which has another order of its images, got 4."
    assert expected in capsys.readouterr().err


def test_the_plan_counts_the_images_that_are_decoded(capsys):
    given = ["--num_processes", "1", "--num_train_images", "1281167", "--student", "resnet18", "--image_size", "32"]
    cli.main(["plan", *given, "--distillation_loss", "none", "--crops_per_image", "4"])
    text = capsys.readouterr().out
    assert "3 epochs of 1,281,167 images, 320,292 of them decoded" in text
    assert "4 crops of each decoded image" in text


def uneven(name: str, got: str, multiples: str) -> str:
    return (
        f"{name} should be a multiple of crops_per_image, which is 4, got {got}: some images are taken more often than others. "
        f"Set {name} to {multiples}."
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num_train_epochs", "6"], [("num_train_epochs", "6", "4 or 8")]),
        (["--num_train_epochs", "2.5"], [("num_train_epochs", "2.5", "4")]),
        (["--num_train_epochs", "8"], []),
        (["--num_train_epochs", "2.5", "--crops_per_image", "1"], []),
        (["--num_train_epochs", "6", "--max_steps", "5"], []),
        (["--max_steps", "5", "--teacher_epochs", "9"], [("teacher_epochs", "9", "8 or 12")]),
        (["--num_train_epochs", "6", "--time_budget", "1h"], []),
        (["--num_train_epochs", "8", "--teacher_epochs", "9"], [("teacher_epochs", "9", "8 or 12")]),
        (["--num_train_epochs", "8", "--teacher_epochs", "9", "--teacher", "timm/resnet18.a1_in1k"], []),
    ],
)
def test_the_plan_names_epochs_that_take_some_images_more_often(arguments, expected, capsys):
    given = ["--num_processes", "1", "--num_train_images", "100", "--student", "resnet18", "--image_size", "32"]
    cli.main(["plan", *given, "--teacher", "resnet18", "--crops_per_image", "4", *arguments])
    said = [line for line in capsys.readouterr().out.splitlines() if "should be a multiple" in line]
    assert said == [f"Note: {uneven(*each)}" for each in expected]


@pytest.mark.parametrize(("workers", "is_noted"), [(0, False), (4, False), (3, True), (16, True)])
def test_the_plan_names_a_number_of_workers_that_decode_images_again(workers, is_noted, capsys):
    given = ["--num_processes", "1", "--num_train_images", "100", "--student", "resnet18", "--image_size", "32"]
    given += ["--distillation_loss", "none", "--num_train_epochs", "8", "--dataloader_num_workers", str(workers)]
    cli.main(["plan", *given, "--crops_per_image", "4"])
    said = "dataloader_num_workers should be 1, 2, 4 or 8 with crops_per_image" in capsys.readouterr().out
    assert said == is_noted


@pytest.mark.parametrize(("images", "most"), [(512, None), (511, 3), (100, 1)])
def test_the_plan_names_crops_that_come_close_together(images, most, capsys):
    given = ["--num_processes", "2", "--num_train_images", str(images), "--student", "resnet18", "--image_size", "32"]
    given += ["--distillation_loss", "none", "--num_train_epochs", "8", "--per_device_train_batch_size", "8"]
    cli.main(["plan", *given, "--gradient_accumulation_steps", "2", "--crops_per_image", "4"])
    out = capsys.readouterr().out
    said = f"crops_per_image should be at most {most} with {images} images in steps of 32, got 4" in out
    assert said == (most is not None)
    assert ("crops_per_image should be" in out) == said


def test_a_run_warns_of_epochs_that_take_some_images_more_often(tmp_path, caplog):
    recipe = RecipeArguments("resnet18", distillation_loss="tfkd", image_size=32)
    data = DataArguments("digits", crops_per_image=4, max_train_samples=40, max_eval_samples=8)
    training = DistillationTrainingArguments(str(tmp_path), num_train_epochs=6, use_cpu=True, report_to="none")
    Recipe(recipe, data, training).check()
    expected = uneven("num_train_epochs", "6", "4 or 8")
    assert [record.getMessage() for record in caplog.records if "multiple" in record.getMessage()] == [expected]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "resnet"
    save_student(timm_cnn(seed=1), str(folder))
    return str(folder)


CROPS = [*MIXING, "--crops_per_image", "2"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, teacher) -> TeacherLogits:
    return write(tmp_path_factory.mktemp("store"), teacher, *CROPS, "--epochs", "4", "--cycle", "2")


def test_a_store_of_crops_is_the_live_teacher(store, teacher, tmp_path):
    """An odd number of images, mixed in pairs; the card names the crops, and a run without them is refused."""
    assert store.info.fingerprint["crops_per_image"] == 2
    assert store.info.num_samples == NUM_TRAIN
    _, live = train(tmp_path / "live", *arguments(teacher, *CROPS, "--mix_pairs", "true"))
    _, stored = train(tmp_path / "stored", *arguments(None, *CROPS, "--teacher_logits", str(store.folder)))
    losses, live_losses = ([entry["loss"] for entry in log if "loss" in entry] for log in (stored, live))
    assert len(losses) == 12
    assert losses == pytest.approx(live_losses, rel=1e-6)
    assert "crops_per_image=2, cycle=2" in (tmp_path / "stored" / "student" / "README.md").read_text()
    with pytest.raises(ValueError, match="not of this run: crops_per_image: store 2, run None"):
        train(tmp_path / "other", *arguments(None, *MIXING, "--teacher_logits", str(store.folder)))


def test_a_cycle_takes_each_image_equally_often(teacher, tmp_path, capsys):
    with pytest.raises(SystemExit):
        write(tmp_path, teacher, *CROPS, "--epochs", "4", "--cycle", "3")
    assert "cycle must be a multiple of 2, the crops_per_image, got 3" in capsys.readouterr().err


@pytest.mark.runs
@pytest.mark.parametrize("with_store", [False, True])
def test_a_training_on_crops_resumes_bit_for_bit(store, teacher, tmp_path, with_store):
    """Stopped in the middle of its second epoch; with the store, in the middle of a repeated one."""
    data = load_image_dataset(DataArguments(max_train_samples=NUM_TRAIN), 0)
    transform = train_transform(DataArguments(random_resized_crop=[0.6, 1.0]), 32, [0.5] * 3, [0.5] * 3)
    logits = {"mix_pairs": True, "teacher_logits": store} if with_store else {}
    kind = {"distillation_loss": NKDLoss()} if with_store else {}
    start = 12 if with_store else 0

    def run(**kwargs):
        trainer = make_trainer(
            tmp_path, timm_cnn(), ImageDataset(data["train"], transform, crops_per_image=2),
            data_collator=ImageCollator(10, 0.8, 1.0, **logits), per_device_train_batch_size=8,
            max_steps=start + 11, save_strategy="steps", save_steps=start + 8, **kind,
        )  # fmt: skip
        trainer.train(**kwargs)
        return trainer.student.state_dict()

    whole = {name: value.clone() for name, value in run().items()}
    resumed = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start + 8}"))
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
