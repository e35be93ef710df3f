"""A store whose epochs are repeated: the same augmented and mixed images and logits, in another order each time."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from store_runs import MIXING, NUM_TRAIN, Pixels, Position, arguments, train, write
from tiny import make_trainer, timm_cnn
from torch.utils.data import BatchSampler, DataLoader

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    ImageDataset,
    NKDLoss,
    Recipe,
    RecipeArguments,
    cli,
    load_image_dataset,
    parse_args,
    train_transform,
)
from nkd_hf.data.orders import shuffled_runs
from nkd_hf.data.sampler import EpochSampler
from nkd_hf.hub.teacher_logits import store_card
from nkd_hf.models.preprocessing import load_image_processor, read_preprocessing
from nkd_hf.models.saving import save_student
from nkd_hf.recipe import time_budget
from nkd_hf.recipe.run_folder import unlock_folder
from nkd_hf.recipe.time_budget import Speed
from nkd_hf.teacher_logits.info import STORE, StoreInfo, TeacherDescription
from nkd_hf.teacher_logits.store import TeacherLogits, shard_path

pytestmark = pytest.mark.usefixtures("no_curves")


def keys(epoch: int, size: int = 13, **kwargs) -> list[tuple]:
    sampler = EpochSampler(size, seed=0, positions=True, **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


# --- the order ---


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("size", [12, 13])
def test_an_epoch_is_repeated_in_another_order(size, pairs):
    """The first cycle is a run without one; later epochs hold the keys of the first ones, of each epoch in a new order."""
    for epoch in (0, 1, 2):
        assert keys(epoch, size, pairs=pairs, cycle=3) == keys(epoch, size, pairs=pairs)
    orders = [keys(epoch, size, pairs=pairs, cycle=3) for epoch in (1, 4, 7, 10)]
    assert all(Counter(order) == Counter(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    if not pairs:
        return
    for order in orders:
        positions = [key[2] for key in order]
        partners = {tuple(positions[at : at + 2]) for at in range(0, len(positions), 2)}
        assert all(second == min(first + 1, size - 1) and first % 2 == 0 for first, second in partners)
    # The pairs are shuffled, not the two of a pair.
    assert [key[2] for key in orders[1]] != list(range(len(orders[1])))


def test_the_order_of_a_repeated_epoch_is_uniform_and_sequential_where_it_is_set():
    places = [shuffled_runs(10, 2, seed=3, epoch=epoch).index(4) for epoch in range(400)]
    counts = Counter(places)
    assert set(counts) == {0, 2, 4, 6, 8}
    assert all(50 < count < 110 for count in counts.values())  # 80 expected, standard deviation 8
    assert keys(4, shuffle=False, cycle=3) == keys(1, shuffle=False)
    with pytest.raises(ValueError, match=r"cycle must be positive, got 0\. Omit it to repeat no epoch"):
        keys(0, cycle=0)


def test_pairs_are_mixed_alike_in_each_repetition():
    """The mix of a position is that of the stored epoch, in any batch of any repetition."""
    collator = Position(ImageCollator(5, 0.8, 1.0, seed=0, mix_pairs=True))
    found: dict[int, list[torch.Tensor]] = {}
    for epoch, batch in ((2, 14), (5, 4), (8, 6)):
        sampler = EpochSampler(13, seed=0, positions=True, pairs=True, cycle=3)
        sampler.set_epoch(epoch)
        seen = []
        for result in DataLoader(Pixels(13), batch_sampler=BatchSampler(sampler, batch, False), collate_fn=collator):
            for position, *values in zip(
                *(result[key] for key in ("position", "pixel_values", "labels")), strict=True
            ):
                seen.append(position.item())
                before = found.setdefault(position.item(), values)
                assert all(torch.equal(*pair) for pair in zip(before, values, strict=True))
        assert Counter(seen) == Counter({**dict.fromkeys(range(12), 1), 12: 2})
    assert len({values[0].sum().item() for values in found.values()}) == 13


# --- the store ---


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "resnet"
    save_student(timm_cnn(seed=1), str(folder))
    return str(folder)


@pytest.fixture
def info() -> StoreInfo:
    return StoreInfo(10, 40, 2, None, [1.0], 8, {}, TeacherDescription(None, "resnet34", 1))


@pytest.fixture(scope="module")
def stores(tmp_path_factory, teacher) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    write(folder / "cycle", teacher, *MIXING, "--epochs", "6", "--cycle", "2")
    write(folder / "plain", teacher, *MIXING, "--epochs", "2")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.runs
def test_the_cycle_is_a_part_of_the_store(stores, teacher, tmp_path):
    """Its shards are those of a store of so many epochs; more epochs add nothing, and another cycle is another store."""
    cyclic, plain = (StoreInfo.read(stores[name]) for name in ("cycle", "plain"))
    assert (cyclic.epochs, cyclic.cycle, plain.epochs, plain.cycle) == (2, 2, 2, None)
    assert "cycle" not in json.loads((stores["plain"] / STORE).read_text())
    paths = {path.relative_to(stores["plain"]) for path in stores["plain"].glob("epoch-*/*")}
    assert {path.relative_to(stores["cycle"]) for path in stores["cycle"].glob("epoch-*/*")} == paths
    assert all((stores["plain"] / path).read_bytes() == (stores["cycle"] / path).read_bytes() for path in paths)

    folder = tmp_path / "store"
    shutil.copytree(stores["cycle"], folder)
    first = shard_path(folder, 0, 0).stat().st_mtime_ns
    assert write(folder, teacher, *MIXING, "--epochs", "50", "--cycle", "2").info.epochs == 2
    assert shard_path(folder, 0, 0).stat().st_mtime_ns == first
    assert not (folder / "epoch-0002").exists()
    for name, more, message in (
        ("cycle", ["--epochs", "6", "--cycle", "3"], "holds another store .cycle: store 2, run 3."),
        ("cycle", ["--epochs", "6"], "holds another store .cycle: store 2, run None."),
        ("plain", ["--epochs", "2", "--cycle", "2"], "holds another store .cycle: store None, run 2."),
    ):
        with pytest.raises(SystemExit, match=message):
            write(stores[name], teacher, *MIXING, *more)

    store = TeacherLogits(folder)
    store.check_complete(300)
    shard_path(folder, 1, 1).unlink()
    with pytest.raises(ValueError, match="lacks 1 of 6 shards"):
        store.check_complete(300)
    store.check_complete(1)
    with pytest.raises(ValueError, match="has the logits of 2 epochs, and the run takes 3"):
        TeacherLogits(stores["plain"]).check_complete(3)


@pytest.mark.parametrize("cycle", ["0", "7"])
def test_a_cycle_beyond_the_epochs_is_refused(tmp_path, capsys, cycle):
    with pytest.raises(SystemExit) as error:
        cli.main(["teacher-logits", "--output", str(tmp_path), "--epochs", "6", "--cycle", cycle])
    assert error.value.code == 2
    message = f"cycle must be from 1 to 6, the epochs, got {cycle}. Omit it to store each epoch"
    assert message in capsys.readouterr().err


def test_cards_say_that_epochs_are_repeated(info):
    assert "in each of 2 epochs, 10 classes" in store_card(info, "logits")
    info.cycle = 2
    assert "in each of 2 epochs, which a longer training repeats, 10 classes" in store_card(info, "logits")


@pytest.mark.parametrize("cycle", [3, 0, "2", 2.0])
def test_a_damaged_cycle_is_told(info, tmp_path, cycle):
    info.write(tmp_path)
    values = json.loads((tmp_path / STORE).read_text())
    (tmp_path / STORE).write_text(json.dumps(values | {"cycle": cycle}))
    with pytest.raises(ValueError, match="is damaged, its cycle is"):
        StoreInfo.read(tmp_path)


# --- training ---


@pytest.mark.runs
def test_a_training_repeats_the_samples_of_an_epoch_in_another_order(stores, tmp_path, monkeypatch):
    """Each repetition has the augmented, mixed images of the stored epoch with their logits, in an order of its own."""
    seen, compute_loss = [], DistillationTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        if torch.is_grad_enabled():
            values = {name: inputs[name] for name in ("index", "pixel_values", "labels")} | inputs["teacher_logits"]
            seen.append({name: value.clone() for name, value in values.items()})
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", record)
    train(tmp_path, *arguments(None, *MIXING, "--num_train_epochs", "6", "--teacher_logits", str(stores["cycle"])))
    assert len(seen) == 36
    epochs = [
        {name: torch.cat([batch[name] for batch in seen[6 * at : 6 * at + 6]]) for name in seen[0]} for at in range(6)
    ]
    orders = [epoch["index"] for epoch in epochs]
    assert len({tuple(order.tolist()) for order in orders}) == 6
    for epoch, other in ((0, 2), (0, 4), (1, 3), (1, 5)):
        places, others = orders[epoch].argsort(stable=True), orders[other].argsort(stable=True)
        for name, values in epochs[epoch].items():
            torch.testing.assert_close(values[places], epochs[other][name][others], rtol=0, atol=0)
    first, second = (epochs[at]["pixel_values"][orders[at].argsort(stable=True)] for at in (0, 1))
    assert not torch.equal(first, second)


def test_a_run_longer_than_the_cycle_trains_from_it(stores, tmp_path, capsys):
    """Its first cycle is, bit for bit, a run from a store of all epochs; the run, the card and the plan name the cycle."""
    given = [*MIXING, "--num_train_epochs", "3", "--lr_scheduler_type", "constant"]
    _, log = train(tmp_path / "cycle", *arguments(None, *given, "--teacher_logits", str(stores["cycle"])))
    short = [*MIXING, "--lr_scheduler_type", "constant"]
    _, plain = train(tmp_path / "plain", *arguments(None, *short, "--teacher_logits", str(stores["plain"])))
    losses, first = ([entry["loss"] for entry in each if "loss" in entry] for each in (log, plain))
    assert (len(losses), len(first)) == (18, 12)
    assert losses[:12] == first
    card = (tmp_path / "cycle" / "student" / "README.md").read_text()
    assert "cutmix_alpha=1.0, cycle=2" in card
    assert "cycle=" not in (tmp_path / "plain" / "student" / "README.md").read_text()

    capsys.readouterr()
    more = ["--num_processes", "1", "--num_train_images", str(NUM_TRAIN), "--num_classes", "10"]
    cli.main(["plan", *arguments(None, *given, *more, "--teacher_logits", str(stores["cycle"]))])
    assert f"cycle, 2 epochs of {NUM_TRAIN} images, which training repeats, 0.0 MB" in capsys.readouterr().out


def test_a_stopped_run_goes_on_from_a_store_of_the_same_logits_alone(stores, teacher, tmp_path):
    """The record of a run names no store: its place may change, and older versions wrote none."""
    folder, given = tmp_path / "run", [*MIXING, "--save_strategy", "epoch", "--teacher_logits"]
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)

    def start(store: str, *more: str) -> Recipe:
        options = [*arguments(None, *given, str(stores[store])), "--output_dir", str(folder), *more]
        values = parse_args(types, args=options)
        try:
            return Recipe(*values)
        finally:
            unlock_folder(folder)

    start("cycle").train_student()
    stored = folder / ".teacher_logits.json"
    assert json.loads(stored.read_text()) == {"top_k": None, "cycle": 2}
    assert start("cycle").goes_on
    with pytest.raises(
        SystemExit, match="with top_k=None, cycle=2, got a store with top_k=None, cycle=None: name that"
    ):
        start("plain")
    checkpoint = str(folder / "student" / "checkpoint-6")
    assert start("plain", "--resume_from_checkpoint", checkpoint).goes_on, (
        "whoever names a checkpoint compares no settings"
    )
    stored.unlink()
    assert start("plain").goes_on, "as a run of an older version"


@pytest.mark.parametrize(("name", "epochs"), [("plain", 2), ("cycle", 849)])
def test_a_time_budget_chooses_no_epoch_whose_logits_are_missing(name, epochs, stores, tmp_path, monkeypatch):
    speed = Speed("student", epochs=2, step=0.1, steps_per_epoch=5, evaluation=0.5)
    monkeypatch.setattr(time_budget, "measure_speed", lambda trainer, name: speed)
    given = arguments(None, *MIXING, "--teacher_logits", str(stores[name]), "--time_budget", "1000s")
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    run = Recipe(*parse_args(types, args=[*given, "--output_dir", str(tmp_path)]))
    run.check()
    assert run.training_args.num_train_epochs == epochs
    assert json.loads((tmp_path / time_budget.CHOSEN_EPOCHS).read_text()) == {"student": epochs}


def test_a_training_from_a_cycle_resumes_bit_for_bit(stores, tmp_path):
    """Stopped in the middle of its fourth epoch, the second one that is repeated."""
    data = load_image_dataset(DataArguments(max_train_samples=NUM_TRAIN), 0)
    student = timm_cnn()
    pixels = read_preprocessing(student, load_image_processor(student))
    transform = train_transform(DataArguments(random_resized_crop=[0.6, 1.0]), 32, pixels.mean, pixels.std)

    def run(**kwargs):
        trainer = make_trainer(
            tmp_path, timm_cnn(), ImageDataset(data["train"], transform), distillation_loss=NKDLoss(),
            data_collator=ImageCollator(10, 0.8, 1.0, mix_pairs=True, teacher_logits=TeacherLogits(stores["cycle"])),
            per_device_train_batch_size=8, max_steps=26, save_strategy="steps", save_steps=20,
        )  # fmt: skip
        trainer.train(**kwargs)
        return trainer.student.state_dict()

    whole = {name: value.clone() for name, value in run().items()}
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
