"""A recipe's folder: who works in it, what in it is the run's, and what is said when it is not in order."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
from hub_server import Failure

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, RecipeArguments, parse_args
from nkd_hf.recipe import recipe as recipe_module
from nkd_hf.recipe import run_folder, stage
from nkd_hf.recipe.run_folder import (
    can_continue,
    clear_run,
    finish_run,
    is_trained,
    lock_folder,
    read_history,
    unlock_folder,
    write_results,
)
from nkd_hf.trainer.checkpoints import UNFINISHED, find_damage, remove_unfinished

CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "digits_distill_cnn.yaml"
SETTINGS = {"learning_rate": 0.1, "teacher": "resnet34"}
# The baseline alone, in two steps.
TINY = {
    "student_args": '{"channels": [8, 16, 32, 64]}',
    "distillation_loss": "none",
    "max_train_samples": "32",
    "max_eval_samples": "20",
    "per_device_train_batch_size": "16",
    "num_train_epochs": "1",
    "save_strategy": "no",
    "dataloader_num_workers": "0",
    "dataloader_persistent_workers": "false",
    "disable_tqdm": "true",
    "use_cpu": "true",
}


def recipe_in(folder: Path, **settings: str) -> Recipe:
    arguments = [part for name, value in (TINY | settings).items() for part in (f"--{name}", value)]
    return Recipe(
        *parse_args(
            (RecipeArguments, DataArguments, DistillationTrainingArguments),
            args=["--config", str(CONFIG), "--output_dir", str(folder), *arguments],
        )
    )


def run(folder: Path, **settings: str) -> Recipe:
    recipe = recipe_in(folder, **settings)
    recipe.train_baseline()
    recipe.report()
    return recipe


def begin(folder: Path, settings: dict, afresh: bool = False) -> bool:
    """As a recipe does whose checks pass: whether the run in the folder goes on."""
    goes_on = can_continue(folder, settings, afresh)
    if not goes_on:
        clear_run(folder, settings)
    return goes_on


def stopped_run(folder: Path) -> None:
    """As a run leaves it that was stopped after its first checkpoint."""
    begin(folder, SETTINGS)
    (folder / "student" / "checkpoint-4").mkdir(parents=True)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_folder, "_LOCK_TIMEOUT", 0.2)


# Who works in it


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, monkeypatch):
    code = f"import fcntl, time; file = open({str(tmp_path / '.lock')!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        monkeypatch.setattr(run_folder, "_LOCK_TIMEOUT", 0.2)
        with pytest.raises(SystemExit) as error:
            recipe_in(tmp_path)
        assert error.value.code == (
            f"error: another run is at work in {tmp_path}: wait until it ends, or choose another --output_dir"
        )
        assert {path.name for path in tmp_path.iterdir()} == {".lock"}
        other.kill()
        monkeypatch.setattr(run_folder, "_LOCK_TIMEOUT", 5.0)
        lock_folder(tmp_path)
    unlock_folder(tmp_path)


def test_a_forked_worker_that_outlives_its_parent_keeps_nobody_out(tmp_path, impatient):
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        lock_folder(tmp_path)
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writer, str(worker).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(ValueError, match="another run is at work"):
            lock_folder(tmp_path)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        lock_folder(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        unlock_folder(tmp_path)


def test_a_process_may_start_again_in_its_own_folder_also_when_it_was_deleted(tmp_path):
    lock_folder(tmp_path / "run")
    lock_folder(tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run").rmdir()
    lock_folder(tmp_path / "run")
    unlock_folder(tmp_path / "run")
    assert (tmp_path / "run").resolve() not in run_folder._locks


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_a_run_goes_on(tmp_path, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("there is nothing to wait for"))
    lock_folder(tmp_path)
    lock_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    unlock_folder(tmp_path)


# What in it is the run's


def test_other_folders_are_no_run_and_survive_a_start(tmp_path):
    others = [
        tmp_path / "notebook_run" / "checkpoint-1000" / "model.safetensors",
        tmp_path / "checkpoint-3" / "model.safetensors",
        tmp_path / "student" / "unfinished" / "thesis.txt",
        tmp_path / "student" / "checkpoint-best" / "model.safetensors",
        tmp_path / "student" / UNFINISHED / "notes.txt",
    ]
    for path in others:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    assert not begin(tmp_path, SETTINGS)
    # Other settings, and yet no refusal: there is no run.
    assert not begin(tmp_path, SETTINGS | {"learning_rate": 0.2})
    stopped_run(tmp_path)
    assert begin(tmp_path, SETTINGS)
    assert not begin(tmp_path, SETTINGS, afresh=True)
    assert not (tmp_path / "student" / "checkpoint-4").exists()
    assert [path.read_text() for path in others] == ["mine"] * len(others)


def test_what_was_half_written_is_removed_alone(tmp_path):
    folder = tmp_path / UNFINISHED
    assert remove_unfinished(str(tmp_path)) == []
    for name in ("checkpoint-4", "replaced", "mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").touch()
    assert set(remove_unfinished(str(tmp_path))) == {"checkpoint-4", "replaced"}
    assert {path.name for path in folder.iterdir()} == {"mine"}
    (folder / "mine" / "model.safetensors").unlink()
    (folder / "mine").rmdir()
    (folder / "checkpoint-4").mkdir()
    assert remove_unfinished(str(tmp_path)) == ["checkpoint-4"]
    assert not folder.exists()


def test_a_run_whose_report_was_stopped_goes_on_with_it(tmp_path):
    results = {"teacher": None, "baseline": 0.5, "distilled": None}
    stopped_run(tmp_path)
    (tmp_path / ".unreported").touch()  # and not a byte of the results
    assert begin(tmp_path, SETTINGS)
    assert not is_trained(tmp_path)
    write_results(tmp_path, results)
    assert begin(tmp_path, SETTINGS)
    assert is_trained(tmp_path)
    assert (tmp_path / "student" / "checkpoint-4").is_dir()
    finish_run(tmp_path)
    assert not begin(tmp_path, SETTINGS)
    assert not (tmp_path / "student" / "checkpoint-4").exists()
    write_results(tmp_path, results)
    assert not begin(tmp_path, SETTINGS, afresh=True)
    assert not is_trained(tmp_path)


def test_a_recipe_that_was_killed_in_its_report_trains_nothing_again(tmp_path, monkeypatch, capsys):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe_module, "show_example", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert (tmp_path / "accuracy.png").is_file()
    weights = tmp_path / "baseline" / "model.safetensors"
    written, shown = weights.stat().st_mtime_ns, capsys.readouterr().out
    table = shown[shown.index("top-1 accuracy") :].splitlines()[:2]
    run(tmp_path)
    shown = capsys.readouterr().out
    assert f"All models in {tmp_path} are trained: only the report is unfinished" in shown
    assert shown[shown.index("top-1 accuracy") :].splitlines()[:2] == table
    assert ">>> classifier(" in shown
    assert weights.stat().st_mtime_ns == written
    assert not recipe_in(tmp_path).goes_on  # finished: the next one is new


def test_a_recipe_whose_push_failed_pushes_when_it_is_started_again(hub, tmp_path):
    push = {"push_to_hub": "true", "hub_model_id": "me/digits"}
    recipe = recipe_in(tmp_path, **push)
    recipe.train_baseline()
    hub.fail = Failure("commit", 500)
    with pytest.raises(SystemExit, match=r"^error: the push of .* failed"):
        recipe.report()
    hub.fail = None
    card = (tmp_path / "baseline" / "README.md").read_text()
    weights = tmp_path / "baseline" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    run(tmp_path, **push)
    assert weights.stat().st_mtime_ns == written
    files = hub.repos["models/me/digits"].files()
    assert {"model.safetensors", "config.json", "training_curves.png"} <= set(files)
    assert files["README.md"].decode() == card
    assert not is_trained(tmp_path)


def test_a_start_that_is_refused_leaves_the_finished_run(tmp_path):
    images, folder = tmp_path / "images", tmp_path / "run"
    for name in ("cat", "dog"):
        (images / name).mkdir(parents=True)
        for i in range(12):
            PIL.Image.new("RGB", (32, 32), (20 * i, 90, 0)).save(images / name / f"{i}.png")
    run(folder, dataset_name=str(images), train_val_split="0.5")
    left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for image in images.rglob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be decoded"):
        run(folder, dataset_name=str(images), train_val_split="0.5")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == left


# What is said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"learning_rate: [0.1", "its run.yaml cannot be read: "),
        (b"learning_rate: \xff", "its run.yaml cannot be read: "),
        (b"- 0.1\n", "its run.yaml holds no mapping"),
        (b"", "its run.yaml holds no mapping"),
        (None, "it has no run.yaml"),
    ],
)
def test_a_record_that_cannot_be_read_is_said(tmp_path, content, said):
    stopped_run(tmp_path)
    record = tmp_path / "run.yaml"
    record.unlink() if content is None else record.write_bytes(content)
    with pytest.raises(ValueError, match="holds a run with other settings") as error:
        begin(tmp_path, SETTINGS)
    message = str(error.value)
    assert f"({said}" in message
    assert message.endswith("set another output_dir, or restart in its place with --resume_from_checkpoint false")
    assert "\n" not in message
    assert not begin(tmp_path, SETTINGS, afresh=True)


def test_a_field_that_is_new_and_not_set_is_no_other_setting(tmp_path):
    stopped_run(tmp_path)
    assert begin(tmp_path, SETTINGS | {"new_field": None})
    with pytest.raises(ValueError, match=r"other settings \(new_field was None and is 1\)"):
        begin(tmp_path, SETTINGS | {"new_field": 1})
    with pytest.raises(ValueError, match=r"other settings \(teacher was 'resnet34' and is None\)"):
        begin(tmp_path, {"learning_rate": 0.1})


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SystemExit) as error:
            recipe_in(folder)
        assert error.value.code.startswith(f"error: the folder {folder} cannot be written to (")
        assert error.value.code.endswith("): check the path and the disk, or choose another --output_dir")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        SystemExit, match=r"^error: the folder .* \(OSError: \[Errno 30\] Read-only file system\): allow this user"
    ):
        recipe_in(tmp_path / "run")


def checkpoint_in(folder: Path, *names: str) -> Path:
    """A whole checkpoint, as far as its record knows."""
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    (folder / "trainer_state.json").write_text('{"log_history": []}')
    (folder / "checkpoint_files.json").write_text(json.dumps(dict.fromkeys(names, 0)))
    return folder


def test_a_named_checkpoint_is_looked_at_before_anything_is_trained(tmp_path):
    damaged = checkpoint_in(tmp_path / "checkpoint-1", "model.safetensors", "optimizer.pt")
    (damaged / "optimizer.pt").unlink()
    model_only = checkpoint_in(tmp_path / "checkpoint-2", "model.safetensors")
    for checkpoint, fault in (
        (tmp_path / "checkpoint-0", "there is no such folder"),
        (damaged, "it has no optimizer.pt"),
        (model_only, "saved with save_only_model, which omits the optimiser's state"),
    ):
        with pytest.raises(SystemExit) as error:
            recipe_in(tmp_path / "run", resume_from_checkpoint=str(checkpoint))
        assert error.value.code.startswith(
            f"error: the checkpoint {checkpoint} cannot be resumed: {fault}. Nothing was trained yet: name another one"
        )
    assert not (tmp_path / "run").exists()
    whole = checkpoint_in(tmp_path / "checkpoint-3", "model.safetensors", "optimizer.pt")
    assert recipe_in(tmp_path / "run", resume_from_checkpoint=str(whole)).goes_on


@pytest.mark.parametrize("name", ["checkpoint_files.json", "trainer_state.json"])
def test_a_record_that_is_no_mapping_is_a_fault(tmp_path, name):
    checkpoint = checkpoint_in(tmp_path / "checkpoint-1", "optimizer.pt")
    assert find_damage(str(checkpoint)) is None
    (checkpoint / name).write_text("[1, 2]")
    assert find_damage(str(checkpoint)) == f"{name} holds no mapping"


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"log_history": null}', '{"log_history": [1]}', '{"log_history": [{"loss": 1.0}]}'),
        *(b"\xff", None),
    ],
)
def test_a_model_without_a_whole_log_is_not_trained_yet(tmp_path, content):
    path = tmp_path / "trainer_state.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_history(tmp_path) is None


@pytest.mark.parametrize(
    ("module", "function", "limit", "said"),
    [
        (
            stage,
            "exit_if_not_written",
            100_000,
            "the baseline could not be written to {folder}/baseline (SafetensorError: ",
        ),
        (stage, "exit_if_not_written", 10, "the baseline could not be written to {folder}/baseline (OSError: "),
        (recipe_module, "plot_curves", 10, "the report could not be written to {folder} (OSError: "),
    ],
)
def test_a_full_disk_after_training_is_said_and_the_run_goes_on(tmp_path, module, function, limit, said):
    folder = tmp_path / "run"
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            recipe = recipe_in(folder, save_strategy="epoch")
            original = getattr(module, function)

            def on_a_full_disk(*args):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                return original(*args)

            setattr(module, function, on_a_full_disk)
            recipe.train_baseline()
            recipe.report()
        except SystemExit as exit:
            os.write(writer, exit.code.encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    message = os.read(reader, 100_000).decode()
    assert message.startswith(f"error: {said.format(folder=folder)}")
    assert message.endswith("are free there). The checkpoints are as they were: make room, and start the run again")
    assert find_damage(str(folder / "baseline" / "checkpoint-2")) is None
    recipe = run(folder, save_strategy="epoch")
    assert recipe.goes_on
    assert recipe.results["baseline"] is not None


def test_a_full_disk_at_a_checkpoint_of_a_recipe_is_a_message(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nkd_hf.trainer.checkpoint_writer.write_files", full)
    recipe = recipe_in(tmp_path, save_strategy="epoch")
    with pytest.raises(SystemExit, match=r"^error: the checkpoint of step 2 could not be written to .*No space left"):
        recipe.train_baseline()


def test_a_stage_whose_checkpoints_hold_the_model_only_starts_from_the_beginning(tmp_path, capsys):
    settings = {"save_strategy": "steps", "save_steps": "1", "save_only_model": "true"}
    recipe_in(tmp_path, **settings).train_baseline()
    folder = tmp_path / "baseline"
    (folder / "trainer_state.json").unlink()  # as if it had been stopped before its end
    again = recipe_in(tmp_path, **settings)
    assert again.goes_on
    capsys.readouterr()
    again.train_baseline()
    said = (
        f"The checkpoints in {folder} hold the model only (save_only_model): this training starts from the beginning"
    )
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("stop", ["touch", "replace"])
def test_results_of_a_run_that_is_killed_while_it_writes_them(tmp_path, monkeypatch, stop):
    """The mark comes first: results without it would count as those of a run that has reported."""

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    stopped_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "touch") if stop == "touch" else (os, "replace")), kill)
        with pytest.raises(KeyboardInterrupt):
            write_results(tmp_path, {"distilled": 0.5})
    assert not (tmp_path / "results.json").exists()
    assert not is_trained(tmp_path)
    assert can_continue(tmp_path, SETTINGS, False)
    write_results(tmp_path, {"distilled": 0.5})
    assert is_trained(tmp_path)


def test_a_stage_that_one_process_does_not_see_ends_the_run(tmp_path, monkeypatch):
    # The first answer is that of the first process, the second one that of each for itself.
    views = iter([[{"eval_accuracy": 0.5}], None])
    monkeypatch.setattr(stage, "read_history", lambda folder: next(views))
    with pytest.raises(
        SystemExit, match=r"must be one folder for all processes: .*/teacher lacks the trained teacher$"
    ):
        stage.find_trained(tmp_path / "teacher")


def test_a_setting_without_effect_is_known_by_how_its_name_begins(tmp_path):
    training = DistillationTrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="epoch", report_to="none")
    settings = run_folder.collect_settings(
        RecipeArguments("resnet18", distillation_loss="none"), DataArguments(max_eval_samples=5), training
    )
    assert settings["max_eval_samples"] == 5
    assert settings.keys().isdisjoint({"eval_strategy", "push_to_hub", "output_dir", "report_to"})
