"""benchmarks/any_teacher.py with tiny sizes: its data, what each arm is trained on, its statistics, and a second start."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from fashion_files import write_fashion_files
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import any_teacher
import common
import evidence

SIZES = any_teacher.Sizes(20, 60, 100, 20, 40, steps=3, teacher_epochs=1, batch=8)
# Made up, on the validation part; the first one is trained, and the others are its copies.
VALIDATION = {200: 0.5, 201: 0.7, 202: 0.6}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Data, teachers, and the three kinds of training: labels alone, with images without labels, and without any label."""
    folder = tmp_path_factory.mktemp("any_teacher")
    write_fashion_files(folder)
    bench = any_teacher.Bench(folder / "out", SIZES, folder, "cpu", torch.get_num_threads(), "unknown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(any_teacher.SETTINGS, "logging_steps", 1)
        bench.check_settings()
        bench.write_data()
        bench.train_teacher(200)
        for seed, validation in VALIDATION.items():
            teacher = bench.work / "teachers" / str(seed)
            if seed != 200:
                shutil.copytree(bench.work / "teachers" / "200", teacher)
            record = json.loads((teacher / "done.json").read_text())
            assert 0 <= record["validation"] <= 1
            (teacher / "done.json").write_text(json.dumps(record | {"seed": seed, "validation": validation}))
        for name in ("few", "joined-teacher", "label-free"):
            bench.train(name, 0)
        yield bench


@pytest.mark.runs
def test_the_parts_share_no_image_and_others_have_no_label(bench):
    parts = {"few": 20, "others": 60, "all": 80, "all-unlabelled": 80, "teacher": 100}
    rows = {name: Dataset.from_parquet(str(bench.work / "data" / name / "train.parquet")) for name in parts}
    rows["validation"] = Dataset.from_parquet(str(bench.work / "data" / "teacher" / "validation.parquet"))
    images = {name: {image["bytes"] for image in part["image"]} for name, part in rows.items()}
    assert {name: len(part) for name, part in images.items()} == parts | {"validation": 20}
    assert images["few"] | images["others"] == images["all"] == images["all-unlabelled"]
    assert len(images["all"] | images["teacher"] | images["validation"]) == 200
    assert {name for name, part in rows.items() if "label" not in part.column_names} == {"others", "all-unlabelled"}
    assert np.bincount(rows["few"]["label"]).tolist() == [2] * 10


@pytest.mark.runs
@pytest.mark.parametrize(
    ("name", "labelled", "unlabelled", "losses"),
    [("few", 20, 0, {"task"}), ("joined-teacher", 20, 60, {"kd", "task"}), ("label-free", 0, 80, {"kd"})],
)
def test_a_student_is_trained_on_what_its_arm_says(bench, name, labelled, unlabelled, losses):
    run = bench.read(name, 0)
    assert (run["labelled"], run["unlabelled"], run["steps"]) == (labelled, unlabelled, 3)
    assert losses == {key for key in run["first_log"] if key in ("kd", "task")}
    assert (run["teacher"] is not None) == ("kd" in losses)
    assert 0 <= run["top1"] <= 1


@pytest.mark.runs
def test_each_arm_has_its_images_and_its_teachers(bench):
    settings = {name: bench.settings_of(name, 3) for name in any_teacher.ARMS}
    teachers = {name: [Path(folder).parts[-3] for folder in own.get("teacher", ())] for name, own in settings.items()}
    best_first = ["201", "202", "200"]
    assert teachers == {
        "few": [], "few-teacher": best_first[:1], "few-ensemble": best_first, "joined-teacher": best_first[:1],
        "label-free": best_first[:1], "all-teacher": best_first[:1], "all-ensemble": best_first, "all": [],
    }  # fmt: skip
    for name, own in settings.items():
        assert own["distillation_loss"] == ("kd" if teachers[name] else "none")
        assert (own["seed"], own["max_steps"], own["validation_split"]) == (3, 3, "test")
        assert Path(own["dataset_name"]).name == ("all" if name.startswith("all") else "few")
    assert {name for name, own in settings.items() if "unlabeled_dataset" in own} == {"joined-teacher", "label-free"}
    # As many images a step as the others: 2 with labels and 6 without.
    joined = settings["joined-teacher"]
    assert joined["per_device_train_batch_size"] * (1 + joined["unlabeled_ratio"]) == SIZES.batch


def test_the_share_s_interval_is_fieller_s():
    gains, full_gains = [4.1, 4.6, 5.2, 3.9, 4.4], [4.6, 4.7, 5.1, 4.5, 4.9]
    share = any_teacher.gain_share(gains, full_gains)
    assert share.mean == pytest.approx(sum(gains) / sum(full_gains))
    for bound in (share.low, share.high):
        assert stats.ttest_1samp(np.subtract(gains, np.multiply(bound, full_gains)), 0).pvalue == pytest.approx(0.05)
    assert share.low < share.mean < share.high
    assert any_teacher.gain_share([1.8, 2.7, 2.25], [2.0, 3.0, 2.5]) == pytest.approx((0.9, 0.9, 0.9))
    unbounded = (-math.inf, math.inf)
    assert any_teacher.gain_share([1.0], [2.0]) == (0.5, *unbounded)
    assert any_teacher.gain_share([1.0, 1.0, 1.0], [3.0, -1.0, 1.0])[1:] == unbounded
    assert any_teacher.gain_share([1.0, -1.0], [0.0, 0.0])[1:] == unbounded


@pytest.mark.runs
def test_a_second_start_trains_nothing_and_judges_the_aim(bench, tmp_path, monkeypatch):
    work, result = tmp_path / "work", tmp_path / "any_teacher.json"
    shutil.copytree(bench.work, work)
    top1 = dict.fromkeys(any_teacher.ARMS, (0.8, 0.82))
    top1 |= {
        "few": (0.7, 0.73),
        "label-free": (0.79, 0.82),
        "few-ensemble": (0.81, 0.85),
        "all-ensemble": (0.81, 0.83),
    }
    for name, values in top1.items():
        for seed, value in enumerate(values):
            record = bench.read("few" if name in ("few", "all") else "joined-teacher", 0)
            record |= {"arm": name, "seed": seed, "top1": value}
            (work / "runs" / f"{name}-seed{seed}.json").write_text(json.dumps(record))
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.name != "settings.json"}
    text = f"--images 20 60 100 20 40 --steps 3 --teacher_epochs 1 --batch 8 --rounds 2 --work {work} --json {result}"
    command = f"benchmarks/any_teacher.py {text} --fashion {bench.fashion} --device cpu --jobs 1".split()
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(common, "parse", lambda parser: parser.parse_args())
    monkeypatch.setattr(evidence, "_set_up_worker", lambda: None)
    monkeypatch.setattr(any_teacher, "Recipe", None)
    any_teacher.main()
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.name != "settings.json"}

    report = json.loads(result.read_text())
    [aim] = report["aims"]
    # Gains of 9 and 9 points, of 10 and 9.
    assert aim["value"] == pytest.approx(9 / 9.5)
    assert tuple(aim["spread"]) == pytest.approx(any_teacher.gain_share([9.0, 9.0], [10.0, 9.0])[1:])
    assert (aim["bound"], aim["at_least"], aim["met"]) == (0.95, True, False)
    arms, teachers, ensembles = (table["rows"] for table in report["tables"])
    assert [row[0] for row in arms] == [arm.text for arm in any_teacher.ARMS.values()]
    assert [row[0] for row in teachers] == ["seed 201, the teacher", "seed 202", "seed 200"]
    assert [row[1].split()[0] for row in ensembles] == ["+2.00", "+1.00"]

    monkeypatch.setattr(sys, "argv", [*command, "--steps", "4"])
    with pytest.raises(SystemExit, match="other settings"):
        any_teacher.main()
