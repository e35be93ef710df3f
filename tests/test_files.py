"""Folders that a killed process leaves."""

import os
import signal
from pathlib import Path

import pytest
from tiny import digits, make_trainer, timm_cnn

from nkd_hf.files import TemporaryFolder, new_folder, remove_leftovers
from nkd_hf.trainer.pushing import _linked_copy


def killed(work) -> None:
    """Runs the function in a process that SIGKILL ends at the end of it."""
    pid = os.fork()
    if pid == 0:
        try:
            kept = work()  # noqa: F841 (garbage would clean up)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def write_and_die(target: Path) -> None:
    with new_folder(str(target)) as folder:
        Path(folder, "config.json").write_text("{}")
        os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    for name in (".student-20240101", ".student.nkd_hf-mine", ".student-2.nkd_hf-abcdefgh"):
        (tmp_path / name).mkdir()  # somebody's
    before = names(tmp_path)
    killed(lambda: write_and_die(tmp_path / "student"))
    assert len(names(tmp_path) - before) == 1
    with new_folder(str(tmp_path / "student")) as folder:
        Path(folder, "config.json").write_text("{}")
        assert len(names(tmp_path) - before) == 1
        remove_leftovers(".student.nkd_hf-", tmp_path)  # another process that writes the same does not take it away
    assert names(tmp_path) - before == {"student"}


@pytest.mark.parametrize("next_one", ["push", "start"])
def test_the_copy_of_a_killed_push_is_removed_by_the_next_push_or_start(tmp_path, next_one):
    checkpoint, output = tmp_path / "checkpoint-1", tmp_path / "output"
    checkpoint.mkdir()
    (checkpoint / "a.json").write_text("{}")
    output.mkdir()
    killed(lambda: _linked_copy(checkpoint, str(output)))
    (left,) = names(output)
    assert left.startswith("_push-")
    with TemporaryFolder("_push-", output) as under_way:
        assert left not in names(output)
        killed(lambda: _linked_copy(checkpoint, str(output)))
        if next_one == "push":
            with _linked_copy(checkpoint, str(output)) as copy:
                assert names(output) == {Path(under_way).name, Path(copy).name}
                assert names(Path(copy)) == {"a.json"}
        else:
            make_trainer(output, timm_cnn(), digits(0, 16), max_steps=1).train()
            assert [name for name in names(output) if name.startswith("_push-")] == [Path(under_way).name]
    assert not any(name.startswith("_push-") for name in names(output))
