"""The teacher's logits ahead of time: pairs that mix alike everywhere, the store, the command, and training from it."""

import dataclasses
import functools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import ClassLabel, Dataset, Features
from huggingface_hub import constants
from store_runs import MIXING, NUM_TRAIN, Pixels, Position, arguments, train, write
from tiny import Mimic, make_trainer, timm_cnn
from torch.utils.data import BatchSampler, DataLoader

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    DKDLoss,
    ImageCollator,
    ImageDataset,
    KDLoss,
    NKDLoss,
    RecipeArguments,
    load_image_dataset,
    load_teacher,
    nkd_loss,
    train_transform,
)
from nkd_hf.data.sampler import EpochSampler
from nkd_hf.data.transforms import PIXELS_VERSION
from nkd_hf.hub.teacher_logits import find_store, push_store
from nkd_hf.models.preprocessing import Preprocessing, load_image_processor, read_preprocessing
from nkd_hf.models.saving import save_student
from nkd_hf.recipe.fingerprint import check_fingerprint, fingerprint_run, hash_weights
from nkd_hf.recipe.plan import PlannedTrainingArguments, make_plan
from nkd_hf.teacher_logits.compression import dense_logits, sparse_logits
from nkd_hf.teacher_logits.info import STORE, StoreInfo, TeacherDescription
from nkd_hf.teacher_logits.store import TeacherLogits, read_record, shard_path, unfinished, write_shard

pytestmark = pytest.mark.usefixtures("no_curves")

# --- pairs ---


def mixed(size: int, batch: int, processes: int, workers: int = 0, split_batches: bool = False) -> dict:
    """What becomes of each position in epoch 3, asserting that it is the same wherever it stands."""
    sampler = EpochSampler(size, seed=0, positions=True, pairs=True)
    sampler.set_epoch(3)
    collator = Position(ImageCollator(5, 0.8, 1.0, seed=0, mix_pairs=True))
    found = {}
    for rank in range(processes):
        batches = BatchSampler(sampler, batch, drop_last=False)
        batches = BatchSamplerShard(batches, processes, rank, split_batches=split_batches)
        for result in DataLoader(Pixels(size), batch_sampler=batches, collate_fn=collator, num_workers=workers):
            for position, *values in zip(
                *(result[key] for key in ("position", "pixel_values", "labels")), strict=True
            ):
                before = found.setdefault(position.item(), values)
                assert all(torch.equal(*pair) for pair in zip(before, values, strict=True))
    assert sorted(found) == list(range(size))
    return found


@pytest.mark.parametrize("size", [12, 13, 3, 25])
def test_pairs_mix_alike_in_any_number_of_processes_and_any_even_batch(size):
    expected = mixed(size, size + size % 2, 1)
    for processes in (1, 2, 3):
        for batch in (2, 4, 6):
            for split_batches in (False, True):
                if split_batches and batch // processes % 2:
                    continue
                batch_size = batch * processes if split_batches else batch
                found = mixed(size, batch_size, processes, split_batches=split_batches)
                for position, values in expected.items():
                    assert all(torch.equal(*pair) for pair in zip(values, found[position], strict=True))
    is_hard = {position: bool(labels.max() == 1) for position, (_, labels) in expected.items()}
    assert not all(is_hard.values())
    if size % 2:
        assert is_hard[size - 1]  # it has no partner


def test_pairs_mix_alike_with_workers():
    alone, with_workers = mixed(13, 4, 1), mixed(13, 4, 1, workers=2)
    assert all(torch.equal(alone[position][0], with_workers[position][0]) for position in alone)


def test_each_pair_has_its_own_draw_and_partners_share_it():
    labels = torch.stack([values[1] for _, values in sorted(mixed(24, 24, 1).items())])
    ratios = [sorted(row[row > 0].tolist()) for row in labels]
    assert len({tuple(round(value, 4) for value in ratio) for ratio in ratios}) > 4  # cutmix of 4 x 4 pixels has few
    for first, second in zip(labels[::2], labels[1::2], strict=True):
        assert torch.equal(first > 0, second > 0)
        torch.testing.assert_close(first + second, (first + second > 0).float() * (2 if (first > 0).sum() == 1 else 1))


def test_a_torn_pair_is_an_error():
    dataset, collator = Pixels(6), ImageCollator(5, mixup_alpha=0.8, mix_pairs=True)
    keys = list(EpochSampler(6, 0, positions=True, pairs=True))
    for rows in ([0, 1, 2], [1, 2], [1, 0], [0, 2]):
        with pytest.raises(ValueError, match="the local batch must be even"):
            collator([dataset[keys[row]] for row in rows])
    with pytest.raises(ValueError, match="carry epoch and position"):
        collator([dataset[(0, 1)], dataset[(0, 2)]])
    # Without mixing there is nothing to tear.
    assert ImageCollator(5, mix_pairs=True)([dataset[keys[0]]])["labels"].ndim == 1
    with pytest.raises(ValueError, match="mix_pairs must be false with streaming"):
        DataArguments(mix_pairs=True, streaming=True)


# --- logits, stored and restored ---


def random_logits(n: int = 64, classes: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(n, classes, generator=generator)
    target = torch.randint(classes, (n,), generator=generator)
    logits[torch.arange(n), target] += 8
    return logits, target


@pytest.mark.parametrize("top_k", [1, 10, 48, 49])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_target_term_and_normaliser_are_exact_at_every_k(top_k, temperature):
    logits, target = random_logits()
    rows = sparse_logits(logits, target, top_k, [1.0, 3.0])
    assert (rows["classes"].dtype, rows["values"].dtype) == (torch.int16, torch.float16)
    assert torch.equal(rows["target_logit"], logits.gather(1, target[:, None])[:, 0])
    dense = dense_logits(rows, 50, [1.0, 3.0], temperature)

    def probability(values):
        return values.double().softmax(1).gather(1, target[:, None])[:, 0]

    torch.testing.assert_close(probability(dense), probability(logits), rtol=2e-6, atol=1e-7)
    # The share of the classes that are not stored, at the temperature of the loss: all of the normaliser that is not in fp16.
    others = [values.double().scatter(1, target[:, None], -math.inf) / temperature for values in (logits, dense)]
    stored = rows["classes"].long()
    rest = [values.scatter(1, stored, -math.inf).logsumexp(1) - values.amax(1) for values in others]
    torch.testing.assert_close(rest[1], rest[0], rtol=1e-6, atol=2e-6)
    totals = [values.logsumexp(1) - values.amax(1) for values in others]
    torch.testing.assert_close(totals[1], totals[0], rtol=0, atol=3e-4)  # what float16 leaves of the K largest

    student = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    exact, stored = (NKDLoss(1.5, temperature)(student, values, target) for values in (logits, dense))
    assert stored["nkd_target"].item() == pytest.approx(exact["nkd_target"].item(), rel=1e-6)
    tolerance = 1e-4 if top_k >= 48 else 0.2
    assert stored["nkd_non_target"].item() == pytest.approx(exact["nkd_non_target"].item(), rel=tolerance)


def test_all_classes_are_exact_and_a_masked_class_stays_masked():
    logits, target = random_logits()
    assert torch.equal(dense_logits(sparse_logits(logits, target, None, [1.0]), 50, [1.0], 1.0), logits)
    logits[:, 7] = -math.inf
    target[target == 7] = 8
    dense = dense_logits(sparse_logits(logits, target, 10, [1.0]), 50, [1.0], 1.0)
    assert dense.logsumexp(1).isfinite().all()
    assert nkd_loss(torch.zeros(64, 50), dense, target).isfinite()


@pytest.mark.parametrize(("classes", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_the_last_class_has_its_place_in_a_store(classes, dtype, top_k):
    logits = torch.zeros(1, classes)
    logits[0, -2:] = torch.tensor([2.0, 3.0])
    rows = sparse_logits(logits, torch.tensor([classes - 1]), top_k, [1.0])
    assert rows["target"].dtype == dtype
    assert rows["target"].item() == classes - 1
    if top_k:
        assert rows["classes"].dtype == dtype
        assert rows["classes"][0, 0] == classes - 2


def test_a_file_of_a_store_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda *paths: synced.append("named") or replace(*paths))
    write_shard(tmp_path / "shard-0.safetensors", {"target": torch.zeros(2, dtype=torch.int16)})
    sizes, names = synced[0::2], synced[1::2]
    assert names == ["named"] * len(names)
    assert names
    assert sorted(sizes) == sorted(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


def make_store(folder: Path, num_samples: int = 20, shard_size: int = 8, top_k: int | None = None) -> torch.Tensor:
    """A store of random logits, which are returned: [epochs, samples, 10]."""
    logits = torch.randn(2, num_samples, 10, generator=torch.Generator().manual_seed(0))
    teacher = TeacherDescription(None, "resnet18", 1000)
    info = StoreInfo(10, num_samples, 2, top_k, [1.0], shard_size, {}, teacher)
    folder.mkdir(parents=True, exist_ok=True)
    info.write(folder)
    for epoch in range(2):
        for shard in range(info.num_shards):
            rows = logits[epoch, shard * shard_size : (shard + 1) * shard_size]
            write_shard(shard_path(folder, epoch, shard), sparse_logits(rows, rows.argmax(1), top_k, [1.0]))
    return logits


def test_rows_are_read_across_shards_and_round_the_end(tmp_path):
    logits = make_store(tmp_path)
    store = TeacherLogits(tmp_path)
    store.check_complete(2)
    for positions in ([0], [6, 7, 8, 9], [18, 19, 0, 1], [3, 2], [5] * 3):
        assert torch.equal(store.read(1, positions)["logits"], logits[1, positions])
    again = pickle.loads(pickle.dumps(store))  # as a spawned worker gets it
    assert torch.equal(again.read(0, [4])["logits"], logits[0, [4]])
    for epoch in range(2):
        for position in (0, 8, 16):
            store.read(epoch, [position])
    assert len(store._open) == 4
    for epoch, position in ((2, 0), (0, 20), (-1, 0)):
        with pytest.raises(ValueError, match="2 epochs of 20 samples"):
            store.read(epoch, [position])


def test_a_damaged_or_missing_shard_is_refused(tmp_path):
    make_store(tmp_path)
    path = shard_path(tmp_path, 1, 2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store = TeacherLogits(tmp_path)
    store.read(1, [0])
    with pytest.raises(
        ValueError, match=r"shard-00002.safetensors is damaged.*remove it and run `nkd-hf teacher-logits`"
    ):
        store.read(1, [16])
    path.write_bytes(content[:-10])
    assert unfinished(tmp_path, store.info, 2) == [(1, 2)]
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        store.read(1, [16])
    TeacherLogits(tmp_path).check_complete(1)
    with pytest.raises(ValueError, match=r"lacks 1 of 6 shards.*continues where it stopped"):
        store.check_complete(2)
    with pytest.raises(ValueError, match=r"logits of 2 epochs, and the run takes 3: .*--epochs 3"):
        store.check_complete(3)


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"it has no store\.json: write a store with"):
        TeacherLogits(tmp_path)
    make_store(tmp_path)
    values = json.loads((tmp_path / STORE).read_text())
    (tmp_path / STORE).write_text(json.dumps(values | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, expected 1"):
        TeacherLogits(tmp_path)


@pytest.mark.parametrize(
    "change",
    ["{", "[" * 100_000, "[1]", "null", {"shard_size": 0}, {"shard_size": True}, {"num_samples": "8"}, {"epochs": -1},
     {"top_k": [1]}, {"temperatures": 1}, {"temperatures": [None]}, {"fingerprint": None}, {"versions": [1]},
     {"teacher": None}, {"teacher": {}}, {"teacher": {"name": 1, "architecture": "a", "num_parameters": 1}},
     {"teacher": []}, {"teacher": [{"name": None, "architecture": "a", "num_parameters": 1, "weight": "1"}]},
     {"teacher_accuracy": "high"}],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_malformed_store_is_told_with_what_to_do(tmp_path, change):
    make_store(tmp_path)
    file = tmp_path / STORE
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | change) if isinstance(change, dict) else change)
    advice = f"remove {tmp_path} and write it again" if change not in ("[1]", "null") else "expected 1: write a store"
    with pytest.raises(ValueError, match=rf"(store.json (cannot be read|is damaged)|format None).*{advice}"):
        TeacherLogits(tmp_path)


@pytest.mark.parametrize(
    "record", ["[1]", "null", "{}", '{"bytes": 1}', "[" * 100_000, "\xff"], ids=lambda text: text[:12]
)
def test_a_malformed_record_is_a_shard_that_is_not_finished(tmp_path, record):
    make_store(tmp_path)
    shard_path(tmp_path, 1, 2).with_suffix(".json").write_text(record, encoding="latin-1")
    store = TeacherLogits(tmp_path)
    assert unfinished(tmp_path, store.info, 2) == [(1, 2)]  # and `nkd-hf teacher-logits` writes it again
    with pytest.raises(ValueError, match=r"shard-00002.safetensors cannot be read \(.*remove it and run"):
        store.read(1, [16])


def test_a_full_disk_is_told_with_what_to_do(tmp_path):
    path, rows = (
        tmp_path / "epoch-0000" / "shard-00000.safetensors",
        {"target": torch.zeros(90_000, dtype=torch.int16)},
    )
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            write_shard(path, rows)
        except OSError as error:
            (tmp_path / "message").write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    message = (tmp_path / "message").read_text()
    assert re.fullmatch(
        rf"{path} of 0 MiB could not be written \(OSError: .*GiB are free there\). The shards before it are finished: make "
        "room, and run `nkd-hf teacher-logits` again, which continues where it stopped",
        message,
    )
    assert list(path.parent.iterdir()) == []


def test_a_target_that_is_not_the_runs_is_an_error(tmp_path):
    make_store(tmp_path, num_samples=6, shard_size=6)
    collator, dataset = ImageCollator(10, teacher_logits=TeacherLogits(tmp_path)), Pixels(6)
    with pytest.raises(ValueError, match=r"target class .* at position .* of epoch 0"):
        collator([dataset[key] for key in EpochSampler(6, 0, positions=True)])
    with pytest.raises(ValueError, match="set mix_pairs"):
        ImageCollator(10, mixup_alpha=1.0, teacher_logits=TeacherLogits(tmp_path))
    with pytest.raises(ValueError, match="logits of 10 classes, and there are 5 labels"):
        ImageCollator(5, teacher_logits=TeacherLogits(tmp_path))


# --- the command, and training from what it wrote ---


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "resnet"
    save_student(timm_cnn(seed=1), str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, teacher) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    write(folder / "plain", teacher)
    write(folder / "mixed", teacher, *MIXING)
    write(folder / "top3", teacher, *MIXING, "--top_k", "3", "--temperatures", "3")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def train_live(tmp_path_factory, teacher):
    """Trains from the teacher itself, once for equal arguments."""
    return functools.cache(
        lambda *more: train(tmp_path_factory.mktemp("live"), *arguments(teacher, *more, "--mix_pairs", "true"))
    )


@pytest.mark.runs
@pytest.mark.parametrize(("store", "workers"), [("plain", 0), ("mixed", 2), ("top3", 0)])
def test_the_curve_is_that_of_the_live_teacher(stores, teacher, train_live, tmp_path, store, workers):
    more = MIXING if store != "plain" else []
    live, live_log = train_live(*more)
    more = [*more, "--dataloader_num_workers", str(workers)]
    name = [] if store == "mixed" else ["--teacher", teacher]
    stored, log = train(tmp_path / "stored", *arguments(None, *more, *name, "--teacher_logits", str(stores[store])))
    assert len(log) == len(live_log) > 12
    # With all classes the two are equal to rounding; at K = 3 they part as training goes on.
    tolerance = 0.2 if store == "top3" else 1e-6
    for name in ("loss", "task", "nkd_target", "nkd_non_target"):
        values, live_values = ([entry[name] for entry in each if name in entry] for each in (log, live_log))
        assert values == pytest.approx(live_values, rel=tolerance), name
    assert log[0]["nkd_target"] == pytest.approx(live_log[0]["nkd_target"], rel=1e-6)
    assert stored.results["teacher"] == pytest.approx(live.results["teacher"])
    assert stored.teacher is None
    card = (tmp_path / "stored" / "student" / "README.md").read_text()
    assert "distilled from `resnet` (190 k parameters)" in card
    assert f"the teacher, `resnet18` | {100 * live.results['teacher']:.2f}" in card


def test_bytes_of_a_sample(stores):
    def size(name):
        return read_record(shard_path(stores[name], 0, 0))["bytes"] / 16

    header = 60  # its share, of a shard of 16 samples
    assert 42 <= size("plain") < 42 + header
    assert 34 <= size("top3") < 34 + header


def test_a_store_of_images_that_leave_one_for_the_last_batch(teacher, tmp_path):
    """BatchNorm of the student cannot train on that batch, and nothing is trained to write a store."""
    images = ["--max_train_samples", "33", "--per_device_train_batch_size", "16"]
    store = write(tmp_path / "store", teacher, "--epochs", "1", *images)
    assert store.info.num_samples == 33
    more = ["--teacher_logits", str(store.folder), "--num_train_epochs", "1", "--dataloader_drop_last", "true"]
    train(tmp_path / "run", *arguments(None, *more, *images))


def test_an_interrupted_run_goes_on_where_it_stopped(stores, teacher, tmp_path, monkeypatch):
    replace, calls = __import__("os").replace, []

    def killed(source, destination):
        calls.append(Path(destination))
        if len(calls) == stop:
            raise KeyboardInterrupt
        replace(source, destination)

    # run.yaml, store.json, then each shard and its record: killed within the second shard, after it, between the two.
    for stop in (5, 6, 4):
        calls.clear()
        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", killed)
            with pytest.raises(SystemExit, match="130"):  # the command's answer to Ctrl-C
                write(folder, teacher, *MIXING)
        assert len(unfinished(folder, StoreInfo.read(folder), 2)) == (5 if stop > 4 else 6)
        finished = shard_path(folder, 0, 0)
        before = finished.stat().st_mtime_ns if stop > 4 else None
        write(folder, teacher, *MIXING)
        assert before in (None, finished.stat().st_mtime_ns)
        assert_same_store(folder, stores["mixed"])


def assert_same_store(folder: Path, other: Path) -> None:
    paths = {path.relative_to(other) for path in other.glob("epoch-*/*")}
    assert {path.relative_to(folder) for path in folder.glob("epoch-*/[!.]*")} == paths
    assert len(paths) == 12
    for path in [*paths, STORE]:
        assert (folder / path).read_bytes() == (other / path).read_bytes(), path


def test_more_epochs_are_added_and_another_store_is_left_alone(stores, teacher, tmp_path, capsys):
    folder = tmp_path / "store"
    shutil.copytree(stores["plain"], folder)
    first = shard_path(folder, 0, 0).stat().st_mtime_ns
    assert write(folder, teacher, "--epochs", "3").info.epochs == 3
    assert shard_path(folder, 0, 0).stat().st_mtime_ns == first
    TeacherLogits(folder).check_complete(3)
    assert write(folder, teacher, "--epochs", "1").info.epochs == 3
    with pytest.raises(SystemExit, match=r"holds another store \(.*; seed: store 0, run 1; data_seed"):
        write(folder, teacher, "--seed", "1")
    with pytest.raises(SystemExit, match=r"top_k: store None, run 3"):
        write(folder, teacher, "--top_k", "3")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--top_k", "none"], "--top_k must be a positive integer or all"),
        (["--batch_size", "7"], "must be even"),
        (["--epochs", "0"], "--epochs must be positive"),
        (["--temperatures", "-1"], "--temperatures must be positive"),
        (["--distillation_loss", "tiny.Mimic", "--top_k", "3"], "tiny.Mimic needs top_k = all: omit --top_k"),
        (["--distillation_loss", "vitkd"], "reads layers of the teacher"),
        (["--distillation_loss", "none"], "the recipe has no teacher"),
    ],
)
def test_wrong_arguments_are_said_in_a_line(teacher, tmp_path, capsys, args, message):
    with pytest.raises(SystemExit) as error:
        write(tmp_path, teacher, *args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.runs
def test_two_processes_write_what_one_writes(runs):
    assert_same_store(runs / "2" / "store", runs / "1" / "store")


@pytest.mark.runs
def test_a_store_of_classes_that_are_drawn_equally_often_is_of_its_run(teacher, tmp_path):
    """An odd number of images that are mixed in pairs, some of them drawn several times."""
    drawn = [*MIXING, "--balanced_sampling", "true"]
    store = write(tmp_path / "store", teacher, *drawn)
    assert store.info.fingerprint["balanced_sampling"] is True
    _, live = train(tmp_path / "live", *arguments(teacher, *drawn, "--mix_pairs", "true"))
    _, stored = train(tmp_path / "stored", *arguments(None, *drawn, "--teacher_logits", str(store.folder)))
    losses, live_losses = ([entry["loss"] for entry in log if "loss" in entry] for log in (stored, live))
    assert losses == pytest.approx(live_losses, rel=1e-6)
    with pytest.raises(ValueError, match="not of this run: balanced_sampling: store True, run None"):
        train(tmp_path / "other", *arguments(None, *MIXING, "--teacher_logits", str(store.folder)))


# --- what does not match ---


def fingerprint(data: dict | None = None, **training) -> dict:
    args = DataArguments(**{"max_train_samples": 40, "random_resized_crop": [0.6, 1.0], **(data or {})})
    training = DistillationTrainingArguments("unused", report_to="none", use_cpu=True, **{"seed": 0, **training})
    loaded = load_image_dataset(args, training.seed)
    student = timm_cnn()
    pixels = read_preprocessing(student, load_image_processor(student))
    return fingerprint_run(args, training, loaded["train"], [str(i) for i in range(10)], pixels)


CHANGES = {
    "num_samples": {"data": {"max_train_samples": 41}},
    "labels_sha256": {"seed": 1},
    "images_sha256": {"seed": 1},
    "seed": {"seed": 1},
    "data_seed": {"data_seed": 1},
    "shuffle": {"train_sampling_strategy": "sequential"},
    "random_resized_crop": {"data": {"random_resized_crop": [0.5, 1.0]}},
    "random_crop_padding": {"data": {"random_crop_padding": 4}},
    "horizontal_flip": {"data": {"horizontal_flip": 0.1}},
    "auto_augment": {"data": {"auto_augment": "rand-m9-n2"}},
    "random_erasing": {"data": {"random_erasing": 0.1}},
    "pca_lighting": {"data": {"pca_lighting": 0.1}},
    "mixup_alpha": {"data": {"mixup_alpha": 0.1}},
    "cutmix_alpha": {"data": {"cutmix_alpha": 0.1}},
    "balanced_sampling": {"data": {"balanced_sampling": True}},
    "crops_per_image": {"data": {"crops_per_image": 2}},
}


@pytest.fixture(scope="module")
def info() -> StoreInfo:
    teacher = {
        "teacher": "resnet34",
        "teacher_args": {"width": 1},
        "teacher_sha256": "0" * 64,
        "teacher_dtype": "float32",
    }
    return StoreInfo(10, 40, 2, None, [1.0], 8, fingerprint() | teacher, TeacherDescription(None, "resnet34", 1))


@pytest.mark.parametrize("part", CHANGES)
def test_a_run_with_another_fingerprint_is_refused(info, part):
    recipe = RecipeArguments(student="resnet18", teacher_logits="store")
    check_fingerprint(Path("store"), info, recipe, fingerprint())
    with pytest.raises(ValueError, match=rf"not of this run: .*\b{part}: store .*, run "):
        check_fingerprint(Path("store"), info, recipe, fingerprint(**CHANGES[part]))


def test_a_store_of_earlier_decoding_or_transforms_is_refused(info, monkeypatch):
    recipe = RecipeArguments(student="resnet18", teacher_logits="store")
    before = dataclasses.replace(info, fingerprint=dict(info.fingerprint))
    del before.fingerprint["pixels_version"]  # as in stores from before there was one
    with pytest.raises(ValueError, match=rf"pixels_version: store None, run {PIXELS_VERSION}\. .*nkd_hf's own code"):
        check_fingerprint(Path("store"), before, recipe, fingerprint())
    monkeypatch.setattr("nkd_hf.recipe.fingerprint.PIXELS_VERSION", PIXELS_VERSION + 1)
    with pytest.raises(ValueError, match=rf"pixels_version: store {PIXELS_VERSION}, run {PIXELS_VERSION + 1}"):
        check_fingerprint(Path("store"), info, recipe, fingerprint())


def test_a_run_with_other_pixels_classes_or_teacher_is_refused(info, teacher):
    same, recipe = fingerprint(), RecipeArguments(student="resnet18", teacher_logits="store")
    for part in ("image_size", "image_mean", "image_std", "interpolation", "classes_sha256"):
        with pytest.raises(ValueError, match=f"{part}: store"):
            check_fingerprint(Path("store"), info, recipe, same | {part: "another"})
    for name, teacher_args, wrong in (
        ("resnet34", {"width": 1}, None),
        ("resnet34", None, r"teacher_args: store {'width': 1}, run None"),
        ("timm/resnet50.tv_in1k", None, "teacher: store 'resnet34', run 'timm/resnet50.tv_in1k'"),
        (teacher, None, r"teacher_sha256: store 000000000000\.\.\., run [0-9a-f]{12}"),
    ):
        recipe = RecipeArguments(student="resnet18", teacher=name, teacher_args=teacher_args, teacher_logits="store")
        if wrong is None:
            check_fingerprint(Path("store"), info, recipe, same)
        else:
            with pytest.raises(ValueError, match=wrong):
                check_fingerprint(Path("store"), info, recipe, same)


def test_new_weights_of_a_teacher_on_the_hub_are_noticed(hub, teacher, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in Path(teacher).iterdir()}
    repo = hub.create("them/teacher", files)
    write(tmp_path / "store", "them/teacher")
    info = StoreInfo.read(tmp_path / "store")
    assert info.fingerprint["teacher_revision"] == repo.branches["main"]
    recipe = RecipeArguments(student="resnet18", teacher="them/teacher", teacher_logits="store")
    run = {"seed": 0}

    with monkeypatch.context() as patch:
        patch.setattr("nkd_hf.recipe.fingerprint.open_teacher", None)  # at the same revision nothing is opened
        check_fingerprint(Path("store"), info, recipe, run)
    repo.add({"README.md": "Words."})
    check_fingerprint(Path("store"), info, recipe, run)
    write(tmp_path / "store", "them/teacher")
    assert StoreInfo.read(tmp_path / "store").fingerprint["teacher_revision"] == repo.branches["main"]

    save_student(timm_cnn(seed=2), str(tmp_path / "other"))
    repo.add({"model.safetensors": (tmp_path / "other" / "model.safetensors").read_bytes()})
    with pytest.raises(ValueError, match="not of this run: teacher_sha256: store"):
        check_fingerprint(Path("store"), info, recipe, run)
    check_fingerprint(Path("store"), info, dataclasses.replace(recipe, teacher=None), run)
    del hub.repos["models/them/teacher"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    check_fingerprint(Path("store"), info, recipe, run)  # nothing is known


@pytest.mark.runs
def test_the_teachers_precision_is_of_the_store_and_what_rounds_alone_is_not(teacher, tmp_path):
    store = write(tmp_path / "bf16", teacher, "--teacher_dtype", "bf16", "--teacher_channels_last", "true")
    assert store.info.fingerprint["teacher_dtype"] == "bf16"
    assert store.info.fingerprint["teacher_sha256"] == hash_weights(load_teacher(teacher).model)
    assert not {"teacher_channels_last", "teacher_compile"} & set(store.info.fingerprint)
    more = ["--teacher_dtype", "bf16", "--teacher_channels_last", "true"]
    _, live = train(tmp_path / "live", *arguments(teacher, *more, "--mix_pairs", "true"))
    from_store = ["--teacher_logits", str(store.folder)]
    _, stored = train(tmp_path / "stored", *arguments(None, *more, *from_store))
    losses, live_losses = ([entry["loss"] for entry in log if "loss" in entry] for log in (stored, live))
    assert losses == pytest.approx(live_losses, rel=1e-6)
    with pytest.raises(ValueError, match="teacher_dtype: store 'bf16', run 'fp16'"):
        train(tmp_path / "other", *arguments(None, "--teacher_dtype", "fp16", *from_store))
    # The same folder goes on in another memory format, and not in another precision.
    write(store.folder, teacher, "--teacher_dtype", "bf16")
    with pytest.raises(SystemExit, match="teacher_dtype: store 'bf16', run 'float32'"):
        write(store.folder, teacher)


def test_the_hash_of_weights_is_of_names_and_values():
    model = timm_cnn()
    before = hash_weights(model)
    assert before == hash_weights(timm_cnn()) != hash_weights(timm_cnn(seed=1))
    model.timm_model.fc.bias.data[0] += 1
    assert hash_weights(model) != before
    # Equal bytes under other names, and in another shape.
    values = torch.arange(4.0)
    hashes = {
        hash_weights(SimpleNamespace(state_dict=lambda state=state: state))
        for state in ({"a": values}, {"b": values}, {"a": values.view(2, 2)}, {"a": values.view(torch.int32)})
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("row", [0, 99, 199])
def test_the_hash_of_images_is_of_some_that_are_spread_over_all(row):
    """Of 200 images, 64 are hashed: the first, the last and 62 between."""
    images = [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(200)]
    spread = np.linspace(0, 199, 64).astype(int)
    row = spread[np.abs(spread - row).argmin()]

    def images_sha256(images):
        features = Features({"image": datasets.Image(), "label": ClassLabel(num_classes=2)})
        rows = {"image": [PIL.Image.fromarray(image) for image in images], "label": [0, 1] * 100}
        train = Dataset.from_dict(rows, features).cast_column("image", datasets.Image(decode=False))
        training = DistillationTrainingArguments("unused", report_to="none", use_cpu=True)
        pixels = read_preprocessing(timm_cnn())
        return fingerprint_run(DataArguments(), training, train, ["a", "b"], pixels)["images_sha256"]

    before = images_sha256(images)
    images[row] = images[row] + 1
    assert images_sha256(images) != before


def test_a_recipe_says_what_differs_before_it_trains(stores, teacher, tmp_path):
    store = ["--teacher_logits", str(stores["plain"])]
    with pytest.raises(ValueError, match=r"mixup_alpha: store 0.0, run 0.8; cutmix_alpha: store 0.0, run 1.0"):
        train(tmp_path / "a", *arguments(None, *store, *MIXING))
    with pytest.raises(ValueError, match="the run takes 3"):
        train(tmp_path / "b", *arguments(None, *store, "--num_train_epochs", "3"))
    with pytest.raises(ValueError, match="the run takes 4"):
        train(tmp_path / "c", *arguments(None, *store, "--max_steps", "19"))
    with pytest.raises(ValueError, match="it is no folder, and no dataset of the Hub"):
        train(tmp_path / "d", *arguments(None, "--teacher_logits", "me/nothing"))
    with pytest.raises(ValueError, match="reads layers of the teacher"):
        RecipeArguments(student="resnet18", distillation_loss="nkd+vitkd", teacher_logits="store")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Mimic(), "Mimic needs top_k = all"),
        ({"nkd": NKDLoss(), "mimic": Mimic()}, "Mimic needs top_k = all"),
        (KDLoss(), r"KDLoss's temperature must be one of 1.0, 3.0, .* got 4.0: write a store with"),
        ({"nkd": NKDLoss(), "dkd": DKDLoss()}, "DKDLoss's temperature must be one of 1.0, 3.0"),
        (
            KDLoss(temperature=3.0, standardize=True),
            "KDLoss's temperature of standardised logits .* which has none, got 3.0",
        ),
        (NKDLoss(temperature=2.0), "temperature must be one of 1.0, 3.0"),
        (None, "asks for no teacher"),
    ],
)
def test_a_store_serves_the_losses_that_it_can(stores, tmp_path, loss, message):
    collator = ImageCollator(10, 0.8, 1.0, mix_pairs=True, teacher_logits=TeacherLogits(stores["top3"]))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, timm_cnn(), data_collator=collator, distillation_loss=loss)
    make_trainer(tmp_path, timm_cnn(), data_collator=collator, distillation_loss=NKDLoss(temperature=3.0))
    collator = ImageCollator(10, 0.8, 1.0, mix_pairs=True, teacher_logits=TeacherLogits(stores["mixed"]))
    make_trainer(tmp_path, timm_cnn(), data_collator=collator, distillation_loss=KDLoss())
    with pytest.raises(ValueError, match="omit teacher"):
        make_trainer(
            tmp_path, timm_cnn(), data_collator=collator, distillation_loss=KDLoss(), teacher=timm_cnn(seed=1)
        )


# --- resuming, the Hub, the plan ---


def test_a_training_from_a_store_resumes_bit_for_bit(stores, tmp_path):
    data = load_image_dataset(DataArguments(max_train_samples=NUM_TRAIN), 0)
    student = timm_cnn()
    pixels = read_preprocessing(student, load_image_processor(student))
    transform = train_transform(DataArguments(random_resized_crop=[0.6, 1.0]), 32, pixels.mean, pixels.std)

    def run(**kwargs):
        trainer = make_trainer(
            tmp_path, timm_cnn(), ImageDataset(data["train"], transform), distillation_loss=NKDLoss(temperature=3.0),
            data_collator=ImageCollator(10, 0.8, 1.0, mix_pairs=True, teacher_logits=TeacherLogits(stores["top3"])),
            per_device_train_batch_size=8, max_steps=10, save_strategy="steps", save_steps=8,
        )  # fmt: skip
        trainer.train(**kwargs)
        return trainer.student.state_dict()

    whole = {name: value.clone() for name, value in run().items()}
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def test_a_store_goes_to_the_hub_and_comes_back(hub, stores, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(stores["top3"], folder)
    address = push_store(folder, "me/logits")
    assert address == f"{hub.endpoint}/datasets/me/logits"
    files = hub.repos["datasets/me/logits"].files()
    assert len(files) == 12 + 3
    assert "tags:\n- knowledge-distillation" in files["README.md"].decode()
    assert not any(name.startswith(("teacher/", "run.yaml")) for name in files)
    sent = len(hub.paths("PUT"))
    push_store(folder, "me/logits")
    assert len(hub.paths("PUT")) == sent
    found = find_store("me/logits", 1)
    store = TeacherLogits(found)
    store.check_complete(1)
    assert not (found / "epoch-0001").exists()
    assert torch.equal(store.read(0, [3])["values"], TeacherLogits(folder).read(0, [3])["values"])
    shard_path(folder, 0, 0).unlink()
    with pytest.raises(ValueError, match="lacks 1 shards"):
        push_store(folder, "me/logits")


def test_a_damaged_store_is_not_pushed(hub, teacher, stores, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(stores["plain"], folder)
    path = shard_path(folder, 1, 2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"epoch-0001/shard-00002.safetensors is damaged.*: remove it and run"):
        push_store(folder, "me/damaged")
    with pytest.raises(SystemExit, match=r"shard-00002.safetensors is damaged"):
        write(folder, teacher, "--push_to_hub", "me/damaged")
    assert not hub.repos
    path.unlink()
    write(folder, teacher, "--push_to_hub", "me/mended")
    assert_same_store(folder, stores["plain"])


def test_the_command_pushes_what_it_wrote(hub, teacher, stores, tmp_path, capsys):
    folder = tmp_path / "store"
    shutil.copytree(stores["plain"], folder)
    write(folder, teacher, "--push_to_hub", "me/plain", "--private")
    assert f"{hub.endpoint}/datasets/me/plain" in capsys.readouterr().out
    assert hub.repos["datasets/me/plain"].private
    with pytest.raises(SystemExit, match="the token may not write there"):
        write(folder, teacher, "--push_to_hub", "other/plain")


def test_the_plan_of_a_run_without_its_teacher():
    recipe = RecipeArguments(student="resnet18", teacher_logits="me/logits", num_processes=1)
    data = DataArguments(num_train_images=1000, num_classes=10)
    plan = make_plan(recipe, data, PlannedTrainingArguments("unused", report_to="none"))
    assert (plan["teacher"], plan["runs"], plan["memory"]["teacher"]) == (None, ["student"], 0)
    assert plan["notes"] == ["the teacher does not run: its logits come from me/logits"]


@pytest.mark.parametrize("top_k", [None, 2, 4])
def test_a_teacher_that_rules_out_all_other_classes_is_stored(top_k):
    teacher = torch.tensor([[2.0, *[-math.inf] * 4], [2.0, 1.0, 0.0, -math.inf, -1.0]])
    target = torch.tensor([0, 1])
    rows = sparse_logits(teacher, target, top_k, [1.0])
    dense = dense_logits(rows, 5, [1.0], 1.0)
    student = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    if top_k == 2:  # the others share what they have
        assert dense.softmax(1)[0].tolist() == [1, 0, 0, 0, 0]
        assert nkd_loss(student, dense, target).isfinite()
    else:
        torch.testing.assert_close(
            nkd_loss(student, dense, target), nkd_loss(student, teacher, target), rtol=1e-3, atol=0
        )


def test_a_fingerprint_passes_bad_rows(tmp_path):
    images = [None, {"bytes": None, "path": None}, {"bytes": None, "path": str(tmp_path / "none.png")}, {"bytes": b"", "path": None},
              {"bytes": None, "path": "https://host/a.png"}, {"bytes": b"text", "path": None}]  # fmt: skip
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a"]))
    table = pa.table(
        {
            "image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "label": [None, -1, 0, 0, 0, 0],
        }
    )
    train = datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))
    pixels = Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 32), "bilinear")
    training = DistillationTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    fingerprint = fingerprint_run(DataArguments(), training, train, ["a"], pixels)
    assert fingerprint["num_samples"] == 6
    rows = ImageDataset(train, lambda image: image, on_bad_image="skip")
    with pytest.raises(ValueError, match="all 6 rows are bad"):
        rows[0]
