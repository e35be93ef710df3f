"""The evidence benchmark: its data, its statistics, its page, and a tiny real run."""

import contextlib
import gzip
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fashion_files import write_fashion_files, write_idx

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import evidence  # noqa: E402
import evidence_page  # noqa: E402
from evidence_data import KeptImages, has_fashion, read_idx  # noqa: E402
from evidence_losses import ABLATIONS, USKDVariantLoss, uskd_labels  # noqa: E402
from evidence_runs import DATA, SHARED  # noqa: E402

from nkd_hf import DataArguments, USKDLoss  # noqa: E402
from nkd_hf.data.image_datasets import ImageDataset  # noqa: E402
from nkd_hf.data.loading import load_image_dataset  # noqa: E402
from nkd_hf.data.transforms import train_transform  # noqa: E402
from nkd_hf.losses import nkd_loss  # noqa: E402


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    write_fashion_files(folder)
    return folder


class TestData:
    def test_an_idx_file_is_read(self, tmp_path):
        values = np.arange(24).reshape(2, 3, 4)
        write_idx(tmp_path / "a.gz", values)
        assert (read_idx(tmp_path / "a.gz") == values).all()
        (tmp_path / "a").write_bytes(gzip.decompress((tmp_path / "a.gz").read_bytes()))
        assert (read_idx(tmp_path / "a") == values).all()
        integers = bytes([0, 0, 0x0C, 1, 0, 0, 0, 2, 0, 0, 1, 0, 255, 255, 255, 255])
        (tmp_path / "b").write_bytes(integers)
        assert read_idx(tmp_path / "b").tolist() == [256, -1]

    def test_a_damaged_idx_file_is_refused(self, tmp_path):
        write_idx(tmp_path / "a.gz", np.arange(24))
        content = gzip.decompress((tmp_path / "a.gz").read_bytes())
        (tmp_path / "a").write_bytes(content[:-1])
        with pytest.raises(ValueError, match="23 bytes of values, and its head says \\[24\\]"):
            read_idx(tmp_path / "a")
        for content in (b"\x89PNG", b"", b"\0\0"):
            (tmp_path / "b").write_bytes(content)
            with pytest.raises(ValueError, match="is no IDX file"):
                read_idx(tmp_path / "b")

    def test_the_parts_are_disjoint_and_of_all_classes(self, fashion, tmp_path):
        evidence.Bench(tmp_path, images=40, fashion=fashion).write_data("fashion")
        seen = []
        for part, number in (("train", 40), ("validation", 40), ("test", 40)):
            folder = tmp_path / "data" / "fashion"
            data = load_image_dataset(DataArguments(str(folder), validation_split=part))["validation"]
            assert len(data) == number
            assert np.bincount(data["label"]).tolist() == [4] * 10
            assert data.features["label"].names[9] == "ankle boot"
            seen += [row["bytes"] for row in data["image"]]
        assert len(set(seen)) == 120

    def test_the_test_digits_are_those_of_the_package(self, tmp_path):
        evidence.Bench(tmp_path).write_data("digits")
        folder = tmp_path / "data" / "digits"
        test = load_image_dataset(DataArguments(str(folder), validation_split="test"))["validation"]
        packaged = load_image_dataset(DataArguments("digits"))
        assert [row["bytes"] for row in test["image"]] == [row["bytes"] for row in packaged["validation"]["image"]]
        own = load_image_dataset(DataArguments(str(folder), validation_split="validation"))
        assert (len(own["train"]), len(own["validation"])) == (1150, 287)
        every = {row["bytes"] for part in own.values() for row in part["image"]}
        assert every == {row["bytes"] for row in packaged["train"]["image"]}

    @pytest.mark.parametrize("name", DATA)
    def test_kept_images_are_those_of_the_dataset(self, name, fashion, tmp_path):
        bench = evidence.Bench(tmp_path, images=20, fashion=fashion)
        bench.write_data(name)
        own = {key: value for key, value in DATA[name].items() if key not in ("images", "epochs")}
        args = DataArguments(str(bench.data_folder(name)), **own)
        transform = train_transform(args, 28, SHARED["image_mean"], SHARED["image_std"], SHARED["interpolation"])
        dataset = ImageDataset(load_image_dataset(args)["train"], transform, seed=3)
        for _ in ("made", "read"):
            kept = KeptImages(dataset, tmp_path / "images" / "a.npy", 2)
            assert len(kept) == len(dataset)
            for key in [(epoch, index, 5) for epoch in range(2) for index in range(20)]:
                assert kept[key].keys() == dataset[key].keys()
                assert all(torch.equal(torch.as_tensor(kept[key][name]), torch.as_tensor(value))
                           for name, value in dataset[key].items())  # fmt: skip

    def test_images_that_bytes_cannot_hold_are_refused(self, tmp_path):
        args = DataArguments("digits", max_train_samples=4)
        dataset = ImageDataset(load_image_dataset(args)["train"], train_transform(args, 28, [0.4] * 3, [0.5] * 3))
        with pytest.raises(ValueError, match="cannot be kept so"):
            KeptImages(dataset, tmp_path / "a.npy", 1)


class TestLosses:
    def inputs(self):
        generator = torch.Generator().manual_seed(0)
        feature, student = (torch.randn(6, size, generator=generator) for size in (4, 10))
        return feature, student.requires_grad_(), torch.tensor([0, 3, 9, 9, 5, 1])

    def test_the_variant_without_a_change_is_uskd(self):
        feature, student, labels = self.inputs()
        torch.manual_seed(0)
        ours = USKDVariantLoss(in_features=4, num_classes=10)
        torch.manual_seed(0)
        theirs = USKDLoss(4, 10)
        gradients = []
        for loss in (ours, theirs):
            components = loss(feature, student, labels)
            total = sum(components.values())
            gradients.append((*torch.autograd.grad(total, [student, loss.head.weight]), *components.values()))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)

    def test_soft_labels_change_as_they_say(self):
        feature, student, labels = self.inputs()
        mid = torch.nn.functional.pad(feature, (0, 6))
        target, others = uskd_labels(mid, student, labels, smoothed=False, zipf=False, rank="official")
        assert target.tolist() == [1] * 6
        rest = torch.full((6, 10), 1 / 9).scatter_(1, labels[:, None], 0)
        torch.testing.assert_close(others, rest)
        student_alone = [uskd_labels(other, student, labels, True, True, "student")[1] for other in (mid, -mid)]
        assert torch.equal(*student_alone)
        # Without the auxiliary head the others follow the student's own order.
        order = student.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
        assert (student_alone[0].gather(1, order)[:, :9].diff(dim=1) <= 0).all()

    def test_the_terms_of_nkd(self):
        _, student, labels = self.inputs()
        teacher = student.detach().flip(0)
        whole = nkd_loss(student, teacher, labels, gamma=1.5)
        alone = ABLATIONS["nkd-non-target"].loss(gamma=1.5)(student, teacher, labels)
        target = nkd_loss(student, teacher, labels, **ABLATIONS["nkd-target"].loss_args)
        torch.testing.assert_close(sum(alone.values()) + target, whole)


class TestStatistics:
    def test_the_interval_is_students(self):
        # t(0.975, 4) = 2.776445; the differences 1..5 have the deviation sqrt(2.5)
        difference = evidence_page.paired_difference([11, 22, 33, 44, 55], [10, 20, 30, 40, 50])
        half = 2.776445 * math.sqrt(2.5 / 5)
        assert difference == pytest.approx((3, 3 - half, 3 + half), abs=1e-5)
        assert str(difference) == "+3.00 [+1.04, +4.96]"
        assert evidence_page.mean_and_deviation([1, 2, 3, 4, 5]) == "3.00 +- 1.58"

    def test_one_seed_decides_nothing(self):
        difference = evidence_page.paired_difference([2.0], [1.0])
        assert (difference.mean, evidence_page.verdict(difference)) == (1.0, "undecided")

    @pytest.mark.parametrize(("low", "high", "answer"), [(0.1, 1, "yes"), (-1, -0.1, "no"), (-1, 1, "undecided")])
    def test_verdicts(self, low, high, answer):
        assert evidence_page.verdict(evidence_page.Difference((low + high) / 2, low, high)) == answer


def test_the_page_is_of_its_result():
    with pytest.raises(SystemExit) as done:
        evidence_page.main(["--check"])
    assert done.value.code == 0


def test_without_fashion_mnist_there_is_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "run_all", lambda bench, options: {"data": options.data})
    assert not has_fashion(tmp_path)
    evidence.main(["--fashion", str(tmp_path), "--output", str(tmp_path / "out")])
    assert f"Fashion-MNIST is skipped: {tmp_path} lacks its files" in capsys.readouterr().out


def test_calls_in_processes_of_their_own(capsys):
    evidence.in_parallel([(math.sqrt, 4), (math.sqrt, 9)], 2, "roots")
    assert sorted(capsys.readouterr().out.split()) == ["1/2]", "2.0", "2/2]", "3.0", "[roots", "[roots"]
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        evidence.in_parallel([(math.sqrt, -1)], 2, "roots")


@pytest.mark.runs
class TestRun:
    ABLATIONS = ("nkd-target", "nkd-non-target", "nkd-gamma-4.5", "uskd-weak", "uskd-uniform", "uskd-rank")
    ARGS = ("--students", "cnn", "--methods", "baseline", "nkd", "uskd", "--ablations", *ABLATIONS, "--seeds", "2")

    @classmethod
    def arguments(cls, fashion, epochs):
        trial = ["--fashion", str(fashion), "--epochs", epochs, "--images", "80", "--jobs", "1"]
        return ["--data", "fashion", *trial, *cls.ARGS]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def few_images(cls):
        """Small batches, for more steps; and the settings of this process are left as they are."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SHARED, "per_device_train_batch_size", 10)
            patch.setattr(evidence, "_set_up_worker", lambda: None)
            yield

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, few_images, fashion, tmp_path_factory):
        folder = tmp_path_factory.mktemp("evidence")
        args = [*cls.arguments(fashion, "2"), "--output", str(folder / "out"), "--json", str(folder / "evidence.json")]
        evidence.main(args)
        before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").iterdir()}
        first = json.loads((folder / "evidence.json").read_text())
        evidence.main(args)
        after = {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").iterdir()}
        assert before == after, "a second start trains nothing again"
        second = json.loads((folder / "evidence.json").read_text())
        assert first["runs"] == second["runs"]
        return folder

    def test_the_result(self, folder):
        result = json.loads((folder / "evidence.json").read_text())
        runs = {(run["method"], run["seed"]): run for run in result["runs"]}
        chosen = result["chosen"]["fashion/cnn/nkd"]
        same = {f"nkd-gamma-{chosen['loss_args']['gamma']:g}"}
        methods = {"baseline", "nkd", "uskd", *self.ABLATIONS} - same
        assert set(runs) == {(method, seed) for method in methods for seed in (0, 1)}
        for cell in ("baseline", "nkd", "uskd"):
            assert len(result["chosen"][f"fashion/cnn/{cell}"]["tried"]) == 6
        assert all(0 <= run["test"] <= 1 and len(run["curve"]) == 2 for run in runs.values())
        # Another loss, another training.
        assert len({runs[method, 0]["test_loss"] for method in methods}) == len(methods)
        labels = runs["uskd", 0]["soft_labels"]
        others = np.array(labels["uskd_others"])
        assert others.shape == (len(labels["labels"]), 10)
        assert others.sum(1) == pytest.approx(1, abs=1e-3)
        assert np.array(labels["images"]).shape == (len(others), 28, 28)
        teacher = np.array(labels["teacher"])[range(len(others)), labels["labels"]]
        assert teacher == pytest.approx(labels["nkd_target"])

    def test_other_settings_need_another_folder(self, folder, fashion):
        with pytest.raises(SystemExit, match="other settings"):
            evidence.main(
                ["--data", "fashion", "--fashion", str(fashion), "--output", str(folder / "out"), *self.ARGS]
            )

    def test_a_result_is_extended(self, folder, fashion, tmp_path):
        known = folder / "evidence.json"
        # The teacher and the stores of seeds 0 and 1 are there, and no training.
        shutil.copytree(folder / "out", tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
        args = [*self.arguments(fashion, "2"), "--extend", "--seeds", "3", "--output", str(tmp_path / "out")]
        evidence.main([*args, "--result", str(known), "--json", str(tmp_path / "more.json")])
        before, after = (json.loads(path.read_text()) for path in (known, tmp_path / "more.json"))
        assert after["chosen"] == before["chosen"]
        assert [run for run in after["runs"] if run["seed"] < 2] == before["runs"], "to the seconds that they took"
        assert {run["method"] for run in after["runs"] if run["seed"] == 2} == {
            run["method"] for run in before["runs"]
        }
        before["teachers"]["fashion"]["test"] += 0.1
        (tmp_path / "other.json").write_text(json.dumps(before))
        with pytest.raises(SystemExit, match="the teachers are others"):
            evidence.main([*args, "--result", str(tmp_path / "other.json")])

    def test_a_result_of_other_conditions_is_not_extended(self, folder, fashion, tmp_path):
        args = ["--extend", "--output", str(tmp_path), "--result", str(folder / "evidence.json")]
        with pytest.raises(SystemExit, match="under other conditions: settings"):
            evidence.main([*self.arguments(fashion, "3"), *args])
        result = json.loads((folder / "evidence.json").read_text())
        result["machine"]["torch"] = "2.0"
        (tmp_path / "other.json").write_text(json.dumps(result))
        args[-1] = str(tmp_path / "other.json")
        with pytest.raises(SystemExit, match=r"torch: .*, there 2\.0$"):
            evidence.main([*self.arguments(fashion, "2"), *args])

    def test_a_cell_is_built_anew(self, folder, fashion, capsys, monkeypatch, tmp_path):
        kept = SimpleNamespace(TemporaryDirectory=lambda: contextlib.nullcontext(tmp_path))
        monkeypatch.setattr(evidence, "tempfile", kept)
        args = ["--only", "fashion/cnn/nkd", "--result", str(folder / "evidence.json"), "--fashion", str(fashion)]
        with pytest.raises(SystemExit) as done:
            evidence.main([*args, "--jobs", "1"])
        assert done.value.code == 0, "the same figures, from another store"
        result = json.loads((folder / "evidence.json").read_text())
        [run] = [run for run in result["runs"] if (run["method"], run["seed"]) == ("nkd", 1)]
        run["test"] += 0.1
        (folder / "other.json").write_text(json.dumps(result))
        args[3] = str(folder / "other.json")
        # Its trainings are in the folder by now, and are compared again.
        with pytest.raises(SystemExit, match="the figures differ"):
            evidence.main([*args, "--jobs", "1"])
        assert "committed" in capsys.readouterr().out

    def test_the_page_is_made_of_the_json(self, folder):
        page, result = folder / "page.md", folder / "evidence.json"
        page.write_text(evidence_page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
        args = ["--page", str(page), "--result", str(result)]
        evidence_page.main(args)
        text = page.read_text(encoding="utf-8")
        values = [100 * run["test"] for run in json.loads(result.read_text())["runs"] if run["method"] == "nkd"]
        assert f"| NKD | {evidence_page.mean_and_deviation(values)} |" in text
        assert "Not measured yet" not in text
        assert "| USKD above baseline | fashion, cnn |" in text
        for name in ("curves", "gains", "ablations", "labels"):
            assert (folder / f"evidence-{name}.png").stat().st_size > 5000
        with pytest.raises(SystemExit) as done:
            evidence_page.main([*args, "--check"])
        assert done.value.code == 0
        page.write_text(text.replace("| NKD |", "| NKD? |"))
        with pytest.raises(SystemExit, match="is not of its result"):
            evidence_page.main([*args, "--check"])
