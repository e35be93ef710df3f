"""The page of the benchmarks, and what decides its verdicts."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import digits  # noqa: E402

from nkd_hf import DataArguments, load_image_dataset  # noqa: E402


def test_the_tables_are_those_of_the_results():
    done = subprocess.run([sys.executable, BENCHMARKS / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_is_on_the_page():
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for script in BENCHMARKS.glob("*.py"):
        assert script.name in page


# Of 21 values the sign test's interval goes from the 6th to the 16th (binomial: 2 * P(X <= 5) = 0.027, P(X <= 6) 0.078).
@pytest.mark.parametrize(("rounds", "low", "high"), [(21, 6, 16), (6, 1, 6), (5, 1, 5), (1, 1, 1)])
def test_a_ratio_has_the_interval_of_its_median(rounds, low, high):
    values = np.random.default_rng(0).permutation(np.arange(1.0, rounds + 1))
    others = np.full(rounds, 2.0)
    assert common.ratio(values, others) == ((rounds + 1) / 4, low / 2, high / 2)


@pytest.mark.parametrize(
    ("value", "spread", "at_least", "verdict"),
    [
        (1.0, (0.9, 1.02), False, "met"),
        (1.0, (0.9, 1.04), False, "within noise"),
        (1.1, (1.0, 1.2), False, "within noise"),
        (1.1, (1.04, 1.2), False, "NOT MET"),
        (1.1, (1.04, 1.2), True, "met"),
        (1.1, None, False, "NOT MET"),
    ],
)
def test_verdicts(value, spread, at_least, verdict):
    met = value >= 1.03 if at_least else value <= 1.03
    aim = {"what": "time", "value": value, "bound": 1.03, "at_least": at_least, "spread": spread, "met": met}
    assert common.describe_aim(aim).endswith(f": {verdict}")


def test_numbers_are_two_digits_of_their_own_split(tmp_path):
    digits.write_numbers(tmp_path / "numbers", 200, 100)
    numbers = load_image_dataset(DataArguments(str(tmp_path / "numbers")))
    known = load_image_dataset(DataArguments("digits"))
    for split, size in (("train", 200), ("validation", 100)):
        rows = known[split]
        labels = {
            np.asarray(PIL.Image.open(io.BytesIO(image["bytes"]))).tobytes(): label
            for image, label in zip(rows["image"], rows["label"], strict=True)
        }
        assert len(numbers[split]) == size
        for image, label in zip(numbers[split]["image"], numbers[split]["label"], strict=True):
            pixels = np.asarray(PIL.Image.open(io.BytesIO(image["bytes"])).convert("L"))
            assert pixels.shape == (16, 16)
            assert not pixels[:4].any()
            assert not pixels[12:].any()
            assert [labels[pixels[4:12, half].tobytes()] for half in (slice(8), slice(8, 16))] == [*divmod(label, 10)]
