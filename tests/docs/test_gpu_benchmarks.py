"""benchmarks/gpu: the scripts with tiny sizes on the CPU, the commands for a GPU, the page, and a machine without torchcodec."""

import argparse
import contextlib
import importlib.util
import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import in_a_process

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import tables  # noqa: E402

BENCH = runpy.run_path(str(BENCHMARKS / "gpu" / "bench.py"))
CHECK = runpy.run_path(str(BENCHMARKS / "gpu" / "check.py"))
# Of each script one part, and those that compile, which takes a minute.
COMPILED = ["losses_compiled", "teacher_compiled"]
PARTS = ["step", "throughput", "losses", "loss_costs", "memory", "scale", "teacher", "teacher_store"]


class Parsed(Exception):
    """The command line was read."""


@pytest.mark.parametrize("part", BENCH["PARTS"])
def test_the_commands_for_a_gpu_are_read(monkeypatch, part):
    def parsed() -> None:
        raise Parsed

    monkeypatch.setattr(common, "keep_freed_memory", parsed)  # the first call after the arguments
    script, *arguments = shlex.split(BENCH["PARTS"][part][0])
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--device", "cuda", "--json", "file"])
    with pytest.raises(Parsed):
        importlib.import_module(Path(script).stem).main()


def test_all_parts_may_take_their_time():
    assert len({command.split()[0] for command, _ in BENCH["PARTS"].values()}) == len(PARTS)
    assert {*PARTS, *COMPILED} == set(BENCH["PARTS"])
    assert BENCH["SECONDS"] < 360


def run_here(script: Path, arguments: list[str], seconds: float) -> None:
    """Runs a script's main in this process, in which all modules are loaded."""
    sys.argv = [f"benchmarks/{script.name}", *arguments]
    importlib.import_module(script.stem).main()


def launch_here(num_processes: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """scale.launch without torchrun, and hence with one process alone."""
    import scale

    options.worker = options.json.with_suffix(".times")
    scale.work(options)
    return json.loads(options.worker.read_text())


# The smallest models whose mid feature is known.
TINY = ("mobilenetv2_050", "mobilenetv2_035", 112)


@pytest.fixture
def meta(monkeypatch) -> str:
    """A device beside the CPU that every machine has: a call with tensors of both fails, as one with a GPU's would."""
    import turns

    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # does not know it
    monkeypatch.setattr(turns.Images.__init__, "__defaults__", (1000, 32, False, "cpu"))  # in place of 224 pixels
    for pair in turns.PAIRS:
        monkeypatch.setitem(turns.PAIRS, pair, TINY)
    return "meta"


def losses_rows(device: str, folder: Path) -> list:
    import losses

    rows = [losses.make_rows(4, 10, dtype, False, device) for dtype in (torch.float32, torch.bfloat16)]
    # Boolean masks and timm's task (step.py) read values, which this device has not.
    return [{name: run for name, run in each.items() if "literal" not in name} for each in rows]


def loss_costs_rows(device: str, folder: Path) -> list:
    import loss_costs

    maps, steps = loss_costs.make_map_rows(2, 10, device), loss_costs.make_steps(1, device)
    return [loss_costs.make_rows(4, 10, device), maps, steps]


def step_rows(device: str, folder: Path) -> list:
    import step

    options = argparse.Namespace(device=device, batch=2, bf16=False)
    student, teacher = (step.create_student(name, num_labels=step.CLASSES) for name in TINY[1::-1])
    data = step.Data(step.Images(2, step.CLASSES, device=device))
    loop = step.handwritten(step.nkd_of(student, teacher, options), student, data, options)
    return [{"loop": lambda: loop(lambda: None)}]


def teacher_store_rows(device: str, folder: Path) -> list:
    import teacher_store

    options = argparse.Namespace(device=device, bf16=False, top_k=[])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("Trainer", "DistillationTrainer", "trainer_loop"):  # which choose their device themselves
            patch.setattr(teacher_store, name, lambda *args, **kwargs: None)
        loops = teacher_store.make_loops("resnet34 -> resnet18", options, 2, 1, folder)
    return [{"teacher": lambda: loops["teacher"](lambda: None)}]


def memory_rows(device: str, folder: Path) -> list:
    import memory

    options = argparse.Namespace(device=device, bf16=False, optim="sgd")
    student = memory.create_student(TINY[1], num_labels=10).to(device)
    teacher = memory.load_teacher(memory.create_student(TINY[0], num_labels=10)).to(device)
    return [{"parts": lambda: memory.measure_parts(student, teacher, 2, 10, options)}]


@pytest.mark.parametrize("make", [losses_rows, loss_costs_rows, step_rows, teacher_store_rows, memory_rows])
def test_all_that_is_measured_lies_on_the_device(meta, tmp_path, make):
    for rows in make(meta, tmp_path):
        for run in rows.values():
            run()


def test_the_time_of_a_gpus_kernels_is_theirs_alone(monkeypatch):
    class Profile(contextlib.nullcontext):
        def events(self):
            kinds = [(common.DeviceType.CPU, 900.0), (common.DeviceType.CUDA, 30.0), (common.DeviceType.CUDA, 12.5)]
            for kind, microseconds in kinds:
                span = argparse.Namespace(elapsed_us=lambda microseconds=microseconds: microseconds)
                yield argparse.Namespace(device_type=kind, time_range=span)

    profile = Profile()
    monkeypatch.setattr(common, "profile", lambda activities: Profile(profile))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    calls = []
    assert common.measure_device_ms(lambda: calls.append(1), "cuda") == 0.0425
    assert common.measure_device_ms(lambda: calls.append(1), "cpu") is None
    assert calls == [1]


def test_a_script_that_is_stopped_leaves_the_tables_that_were_done(tmp_path):
    options = argparse.Namespace(json=tmp_path / "step-gpu.json", rounds=3, threads=1, device="cuda")
    report = common.Report(options)
    report.table("first pair", ["", "ms"], [["NKD", "1.0"]])
    report.write(is_partial=True)
    result = json.loads(options.json.read_text())
    assert "**Stopped before its end**" in tables.header(result)
    assert [table["title"] for table in result["tables"]] == ["first pair"]
    report.write()
    assert "Stopped" not in tables.header(json.loads(options.json.read_text()))


def measure(folder: Path, parts: list[str]) -> None:
    """Runs parts with tiny sizes on the CPU, in a process of its own."""

    def work() -> None:
        import scale
        import teacher_store
        import turns

        turns.PAIRS.update(dict.fromkeys(turns.PAIRS, TINY))
        turns.Images.__init__.__defaults__ = (1000, 32, False, "cpu")  # in place of 224 pixels
        common.WINDOW_MS = 1
        scale.launch = launch_here
        torch.distributed.destroy_process_group = lambda: None
        teacher_store.measure_sizes = lambda *args: None  # of 21841 classes, which takes long and is of the CPU
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", "0")
            patch.setenv("WORLD_SIZE", "1")
            patch.setitem(BENCH["measure"].__globals__, "SECONDS", 600)  # of a machine that does much else
            faults = BENCH["measure"](folder, "cpu", parts, run_here)
        assert faults == []

    assert in_a_process(work, folder / "log") == 0, (folder / "log").read_text()[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu-results")
    measure(folder, PARTS)
    return folder


@pytest.mark.slow
def test_the_parts_that_compile_write_their_figures(tmp_path):
    measure(tmp_path, COMPILED)
    losses, teacher = (json.loads((tmp_path / f"{part}-gpu.json").read_text())["tables"] for part in COMPILED)
    assert [table["compiled"] for table in losses] == [True]
    assert {"NKD", "USKD"} <= set(losses[0]["rows"])
    assert {"float32, compiled", "bf16, compiled", "fp16, compiled"} <= {row[0] for row in teacher[0]["rows"]}


@pytest.mark.runs
def test_each_part_writes_its_figures(results):
    for part in PARTS:
        result = json.loads((results / f"{part}-gpu.json").read_text())
        assert result["tables"], part
        assert Path(shlex.split(result["command"])[1]).name == BENCH["PARTS"][part][0].split()[0]
    sides = json.loads((results / "step-gpu.json").read_text())["raw"]["resnet34 -> resnet18"]["ms"]
    assert list(sides) == ["NKD, loop", "NKD, trainer", "KD, timm", "KD, trainer", "CE, trainer", "USKD, trainer"]
    assert set(json.loads((results / "throughput-gpu.json").read_text())["raw"]) == {
        "recipe",
        "loader alone",
        "compute alone",
    }


@pytest.mark.runs
def test_the_page_shows_the_figures_of_a_gpu_once_they_exist(results, tmp_path, monkeypatch):
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for part in BENCH["PARTS"]:
        assert f"<!-- {part}-gpu.json -->" in page
    for part in PARTS:
        result = json.loads((results / f"{part}-gpu.json").read_text())
        result["settings"]["device"], result["machine"]["gpu"] = "cuda", "A GPU of tomorrow"
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / f"{part}-gpu.json").write_text(json.dumps(result))
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.count("A GPU of tomorrow") == len(PARTS)
    assert "| KD, timm |" in page
    assert "Not measured yet: results/losses_compiled-gpu.json." in page


def test_a_part_that_fails_or_hangs_is_named_and_the_next_one_runs(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    for content, seconds, fault in (
        ("import sys; sys.exit(3)", 60, "exit code 3"), ("import time; time.sleep(60)", 0.5, "stopped after 0 s"), ("", 60, None)
    ):  # fmt: skip
        script.write_text(content)
        assert BENCH["run"](script, [], seconds) == fault
    outcomes = iter(["exit code 1", None])
    assert BENCH["measure"](tmp_path, "cuda", ["step", "losses"], lambda *args: next(outcomes)) == [
        "step: exit code 1"
    ]
    monkeypatch.setitem(BENCH["measure"].__globals__, "SECONDS", 10)
    assert BENCH["measure"](tmp_path, "cuda", ["step"], lambda *args: None) == ["step: no time is left"]


def test_what_is_missing_is_named():
    missing, old = CHECK["find_faults"](["torch>=2.11.0", "no-such-package>=1", "numpy>=999"])
    assert missing == ["no-such-package>=1"]
    assert [each.partition(" ")[0] for each in old] == ["numpy>=999"]


def test_all_that_the_package_requires_is_carried_or_large():
    lines = (BENCHMARKS / "gpu" / "wheels.txt").read_text().splitlines()
    carried = {line.partition("==")[0].replace("_", "-") for line in lines if not line.startswith("#")}
    large = {"torch", "torchvision", "numpy", "pillow", "pyarrow", "pandas", "scipy", "scikit-learn", "matplotlib"}
    assert all(name in lines[2] for name in large)
    config = (BENCHMARKS.parent / "setup.cfg").read_text().partition("install_requires =\n")[2].partition("\n\n")[0]
    required = {line.strip().partition(">=")[0].replace("_", "-") for line in config.splitlines()}
    assert required - CHECK["OPTIONAL"] <= carried | large


def test_only_the_decoder_and_a_benchmark_of_it_need_torchcodec(monkeypatch):
    files = [
        *(BENCHMARKS.parent / "nkd_hf").rglob("*.py"),
        *BENCHMARKS.glob("*.py"),
        *(BENCHMARKS / "gpu").glob("*.py"),
    ]
    assert [path.name for path in files if "from torchcodec" in path.read_text()] == ["decoding.py", "input.py"]
    assert not any("import torchcodec" in path.read_text() for path in files)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    path = BENCHMARKS.parent / "nkd_hf" / "data" / "decoding.py"
    spec = importlib.util.spec_from_file_location("nkd_hf.data.decoding_without_torchcodec", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert module.decode_jpeg is None


# In an interpreter of its own, in which nothing of torchcodec can be loaded.
WITHOUT_TORCHCODEC = """
import importlib, pkgutil, sys
sys.modules["torchcodec"] = None
sys.path.insert(0, "benchmarks")
import nkd_hf
for module in pkgutil.walk_packages(nkd_hf.__path__, "nkd_hf."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in sys.argv[1:]:
    importlib.import_module(name)
from nkd_hf.data import decoding
assert decoding.decode_jpeg is None
"""


@pytest.mark.runs
def test_all_is_there_without_torchcodec():
    scripts = [Path(command.split()[0]).stem for command, _ in BENCH["PARTS"].values()]
    command = [sys.executable, "-c", WITHOUT_TORCHCODEC, *scripts]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
