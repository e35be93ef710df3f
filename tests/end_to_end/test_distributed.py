"""Several real processes on the CPU, joined by gloo, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from distributed_runs import EVALUATION_SIZES, STEPS, read
from tiny import digits

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def weights(folder: Path, world_size: int, case: str, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / str(world_size) / f"{case}-{batch}-{accumulation}.safetensors")


def difference(values: list[float], others: list[float]) -> float:
    return max(abs(value - other) / abs(value) for value, other in zip(values, others, strict=True))


# Batch and accumulation of one process, and of each of two.
SAME_MICRO_BATCHES = [((8, 2), (8, 1)), ((8, 4), (8, 2))]
ONE_MICRO_BATCH = ((16, 1), (8, 1))


@pytest.mark.parametrize(
    ("case", "one", "two"),
    [(case, *splits) for case in ("nkd", "uskd", "vitkd") for splits in SAME_MICRO_BATCHES]
    + [(case, *ONE_MICRO_BATCH) for case in ("nkd", "vitkd")],
)
def test_two_processes_give_what_one_gives(runs, case, one, two):
    logs = [read(runs, size, f"{case} {batch} x {steps}")["log"] for size, (batch, steps) in ((1, one), (2, two))]
    assert len(logs[0]) == len(logs[1]) == STEPS
    assert {"nkd": "nkd_target", "uskd": "uskd_weak", "vitkd": "vitkd_generation"}[case] in logs[0][0]
    for name in logs[0][0].keys() - {"step", "epoch"}:
        assert difference(*([entry[name] for entry in log] for log in logs)) < 1e-5, name
    before = weights(runs, 1, case, *one)
    after = weights(runs, 2, case, *two)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # Attention is blind to the bias of its keys: what they move is rounding.
        tolerance = 1e-9 if name.endswith("k_proj.bias") else 1e-5 * tensor.abs().max()
        assert (after[name] - tensor).abs().max() <= tolerance, name


def test_uskds_mean_is_of_the_local_batch(runs):
    logs = [read(runs, 1, "uskd 16 x 1")["log"], read(runs, 2, "uskd 8 x 1")["log"]]
    first, second = ([entry["uskd_target"] for entry in log] for log in logs)
    # Measured 7e-5: the target's weight is the squared probability less its mean over 16 images, or over 8.
    assert 1e-5 < difference(first, second) < 1e-3


def test_batch_norms_statistics_are_of_the_first_process(runs):
    logs = [read(runs, 1, "batch_norm 8 x 2")["log"], read(runs, 2, "batch_norm 8 x 1")["log"]]
    assert difference(*([entry["loss"] for entry in log] for log in logs)) < 1e-5
    one, two = weights(runs, 1, "batch_norm", 8, 2), weights(runs, 2, "batch_norm", 8, 1)
    moved = {name for name in one if not torch.allclose(one[name], two[name], rtol=1e-5)}
    assert moved == {name for name in one if "running_" in name or "num_batches" in name}


@pytest.mark.parametrize("case", ["nkd", "uskd", "vitkd", "batch_norm"])
def test_what_trains_stays_identical_in_all_processes(runs, case):
    for split in ("8 x 1", "8 x 2"):
        assert read(runs, 2, f"{case} {split}")["parameters_equal"]
    start = weights(runs, 1, case, 8, 2)
    assert any(name.startswith("losses.") for name in start) == (case != "nkd")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", EVALUATION_SIZES)
def test_evaluation_counts_every_image_once(runs, world_size, size):
    labels = [sample["labels"] for sample in digits(64, 64 + size)]
    alone = torch.tensor(read(runs, 1, "evaluation")[f"{size} list"]["logits"])
    for data in ("list", "Stream", "list drop_last", "Stream drop_last"):
        result = read(runs, world_size, "evaluation")[f"{size} {data}"]
        assert result["labels"] == labels
        torch.testing.assert_close(torch.tensor(result["logits"]), alone)
        assert result["loss"] == pytest.approx(F.cross_entropy(alone, torch.tensor(labels)).item(), rel=1e-6)


def test_two_processes_resume_in_the_middle_of_an_epoch_bit_for_bit(runs):
    result = read(runs, 2, "resume")
    assert result["differ"] == []
    assert "distillation_losses.safetensors" in result["checkpoint"]
    assert "training_args.bin" not in result["checkpoint"]


def test_two_processes_share_statistics_average_and_a_scaled_rate(runs):
    result = read(runs, 2, "statistics")
    assert result["equal"]
    # Each process trains with its own statistics, and evaluates with those of the first one, which are saved.
    assert result["differed_before_evaluation"]
    assert result["equal_after_evaluation"]
    # The 64 images are divided between the two, and their mean is that of all of them.
    assert result["error"] < 1e-5
    assert result["learning_rate"] == pytest.approx(0.05 * 16 / 32)


@pytest.mark.parametrize("sampler", ["own sampler", "random", "own loader"])
def test_each_process_draws_for_itself_from_rows_that_are_shared(runs, sampler):
    result = read(runs, 2, "streams")[sampler]
    assert result["equal_at_start"]
    assert result["equal_at_end"]
    for generator, (one, other) in zip(("random", "numpy", "torch"), zip(*result["draws"], strict=True), strict=True):
        assert one != other, generator
    # Two trainings of two epochs, of four batches of eight for each process.
    assert [len(batches) for batches in result["rows"]] == [16, 16]
    orders = []
    for start in (0, 4, 8, 12):
        shares = [[row for batch in batches[start : start + 4] for row in batch] for batches in result["rows"]]
        assert sorted(shares[0] + shares[1]) == list(range(64))
        orders.append(shares)
    assert orders[0] != orders[1]
    assert orders[:2] == orders[2:]


@pytest.mark.parametrize("event", ["on_step_begin", "on_evaluate", "on_save"])
def test_sigterm_to_one_process_as_training_ends_is_noted_by_both(runs, event):
    assert read(runs, 2, "sigterm")[event] == {"codes": [143, 143], "steps": 4, "fault": None}


def test_student_and_loss_sharded_by_fsdp2_give_the_same_gradients(runs):
    result = read(runs, 2, "shard")
    assert result["sharded"]
    assert result["losses"][0] == pytest.approx(result["losses"][1], rel=1e-6)
    assert result["error"] < 1e-6


def test_recipe_in_two_processes_writes_all_its_results(tmp_path):
    done = subprocess.run(
        [
            Path(sys.executable).with_name("accelerate"), "launch", "--config_file", "recipes/accelerate/cpu.yaml",
            "recipes/distill_cnn.py", "--use_cpu", "true", "--max_train_samples", "160", "--max_eval_samples", "41",
            "--num_train_epochs", "1", "--compare_with_baseline", "false", "--output_dir", tmp_path,
        ],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"teacher", "student", "results.json", "accuracy.png", "example.png"}
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("teacher", "distilled"):  # of 41 images, none counted twice
        assert results[name] * 41 == pytest.approx(round(results[name] * 41))
    # Three batches of 64: two steps for two processes, three for one.
    state = json.loads((tmp_path / "student" / "trainer_state.json").read_text())
    assert (state["train_batch_size"], state["global_step"]) == (64, 2)
