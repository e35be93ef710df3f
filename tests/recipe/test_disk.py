"""What a run writes must fit on its disk: in a recipe, in `nkd-hf teacher-logits`, and in a run that goes on."""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import in_processes
from safetensors import safe_open
from tiny import timm_cnn

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, RecipeArguments, cli, parse_args
from nkd_hf.models.saving import save_student

pytestmark = pytest.mark.usefixtures("no_curves")
MODEL = '{"channels": [8, 16, 32, 64]}'
# Four epochs, each with a checkpoint.
COMMON = [
    "--student", "resnet18", "--student_args", MODEL, "--image_size", "32", "--max_train_samples", "32", "--max_eval_samples", "8",
    "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--num_train_epochs", "4", "--save_strategy", "epoch",
    "--eval_strategy", "epoch", "--per_device_train_batch_size", "16", "--random_resized_crop", "0.6", "1.0",
    "--optim", "adamw_torch",
]  # fmt: skip


def make_recipe(folder: Path, *args: str) -> Recipe:
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    return Recipe(*parse_args(types, args=[*COMMON, "--output_dir", str(folder), *args]))


@pytest.fixture
def full_disk(monkeypatch):
    """A function that sets the bytes that are free; at first none are."""

    def set_free(free: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    set_free(0)
    return set_free


@pytest.fixture(scope="module")
def weights() -> int:
    """The bytes of the student: float32 numbers and BatchNorm's counters."""
    model = timm_cnn()
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def needed(error: pytest.ExceptionInfo) -> float:
    number, unit = re.search(r"must have ([\d.]+) (MiB|GiB) of free disk", str(error.value)).groups()
    return float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]


@pytest.mark.parametrize(
    ("args", "num_checkpoints", "num_models"),
    [
        ([], 4, 1),
        (["--save_total_limit", "1"], 2, 1),
        (["--save_total_limit", "1", "--load_best_model_at_end", "true", "--metric_for_best_model", "accuracy"], 3, 1),
        (["--save_total_limit", "1", "--compare_with_baseline", "true"], 3, 2),  # the baseline keeps one
        (["--teacher_epochs", "2", "--teacher", "resnet18", "--teacher_args", MODEL, "--distillation_loss", "nkd"], 6, 2),
    ],
)  # fmt: skip
def test_a_recipe_needs_room_for_its_models_and_checkpoints(
    tmp_path, full_disk, weights, args, num_checkpoints, num_models
):
    loss = [] if "--distillation_loss" in args else ["--distillation_loss", "uskd"]
    with pytest.raises(ValueError, match=r"of free disk for the checkpoints, got 0\.00 MiB in") as error:
        make_recipe(tmp_path / "run", *loss, *args).train_teacher()
    # A checkpoint has the weights and AdamW's two moments of them. USKD's head is a hundredth.
    assert needed(error) == pytest.approx((num_models + 3 * num_checkpoints) * weights, rel=0.06)
    assert ("set save_total_limit to 1" in str(error.value)) == ("--save_total_limit" not in args)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.runs
def test_checkpoints_that_are_there_need_no_room(tmp_path, full_disk, weights):
    stopped = ["--distillation_loss", "uskd", "--save_total_limit", "2"]
    full_disk(2**40)
    recipe = make_recipe(tmp_path / "run", *stopped)
    recipe.train_student()
    # Only the last checkpoint is left, and the model is not trained to its end.
    (tmp_path / "run" / "student" / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "run" / "student" / "checkpoint-6")
    full_disk(6.5 * weights)
    with pytest.raises(ValueError, match="of free disk for the checkpoints") as error:
        make_recipe(tmp_path / "run", *stopped).check()
    assert needed(error) == pytest.approx((1 + 3 * 2) * weights, rel=0.25)  # RNG states and logs are files, too
    full_disk(8 * weights)
    make_recipe(tmp_path / "run", *stopped).check()


@pytest.mark.runs
def test_the_room_that_a_store_needs_is_what_it_takes(tmp_path, full_disk, capsys):
    save_student(timm_cnn(seed=1), str(tmp_path / "teacher"))
    command = ["teacher-logits", *COMMON, "--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "store")]
    full_disk(2**40)
    cli.main([*command, "--epochs", "1"])
    (shard,) = (tmp_path / "store").glob("epoch-*/*.safetensors")
    with safe_open(shard, "pt") as file:
        content = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    full_disk(0)
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--epochs", "100001"])
    said = re.search(r"must have ([\d.]+) MiB of free disk for the teacher's logits", capsys.readouterr().err)
    assert len(list((tmp_path / "store").glob("epoch-*"))) == 1
    assert float(said[1]) == pytest.approx(content * 100_001 / 2**20, rel=1e-3)


@pytest.mark.runs
@pytest.mark.parametrize("is_shared", [False, True])
def test_machines_with_folders_of_their_own_need_room_for_what_they_write_there(tmp_path, is_shared):
    save_student(timm_cnn(seed=1), str(tmp_path / "teacher"))
    options = ["--epochs", "2", "--shard_size", "16", "--teacher", str(tmp_path / "teacher")]
    # 4 shards of 16 samples with 10 float32 logits, of which each process writes 2; with room for 3.
    free = [2000, 2000]

    def write() -> None:
        rank = os.environ["RANK"]
        os.environ["LOCAL_RANK"] = "0"  # the only process of its machine
        shutil.disk_usage = lambda path: SimpleNamespace(free=free[int(rank)])
        folder = tmp_path / "store" if is_shared else tmp_path / f"machine-{rank}"
        cli.main(["teacher-logits", *COMMON, *options, "--output", str(folder)])

    log = tmp_path / "log"
    codes = in_processes(2, write, log)
    if is_shared:
        assert codes == [2, 2], log.read_text()[-3000:]
        assert "free disk for the teacher's logits, got 0.00 MiB in" in log.read_text()
        return
    assert codes == [1, 0], log.read_text()[-3000:]
    assert "2 shards are not in" in log.read_text()
    written = [{path.name for path in tmp_path.glob(f"machine-{rank}/epoch-*/*.safetensors")} for rank in range(2)]
    assert written == [{"shard-00000.safetensors"}, {"shard-00001.safetensors"}]
    # What is written there already needs no more room, and the second machine lacks it for two epochs more.
    free[:] = [2000, 0]
    options[1] = "4"
    assert in_processes(2, write, log) == [2, 2]
    assert "(said by process 1 of 2)" in log.read_text()
    free[:], options[1] = [0, 0], "2"
    assert in_processes(2, write, log) == [1, 0]
