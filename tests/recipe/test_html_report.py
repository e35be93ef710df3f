"""report.html, in a browser: the digits, seen by scikit-learn's classifiers as teacher, baseline and student."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from browsers import chromium
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from nkd_hf.recipe.figures import agreement, model_figures
from nkd_hf.recipe.html_elements import compare, file_size, milliseconds, points, short_number
from nkd_hf.recipe.html_report import write_html_report

COSTS = {
    "teacher": (21_800_000, 87_300_000, 48.31, 55.12, 21.4),
    "baseline": (11_200_000, 44_800_000, 12.61, 14.23, 88.1),
    "student": (11_200_000, 44_800_000, 12.64, 14.42, 87.4),
    "student_onnx": (11_200_000, 44_700_000, 8.31, 9.02, 140.2),
    "student_int8": (11_200_000, 11_340_000, 2.412, 2.91, 498.0),
}
SWAPPED_LABELS = [50, 500]  # both models are sure of these images
HOSTILE = [
    "<script>alert(1)</script>",
    "a & b \"c\" 'd' </style>",
    "犬の写真はとても長い名前です",
    "nul\x00 \ud800 line\nbreak",
]


@pytest.fixture(scope="module")
def digits() -> dict:
    """Arguments of write_html_report for all five models of ten classes; the labels of SWAPPED_LABELS are wrong."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels / 16, labels.copy()
    train, held_out = slice(0, 300), slice(300, None)
    models = {
        "teacher": SVC(probability=True, gamma=0.05, C=5, random_state=0),
        "baseline": LogisticRegression(max_iter=4),
        "student": LogisticRegression(max_iter=9),
    }
    with pytest.warns():  # logistic regression has not converged
        logits = {
            key: model.fit(pixels[train], labels[train]).predict_log_proba(pixels[held_out]).astype(np.float32)
            for key, model in models.items()
        }
    logits |= {"student_onnx": logits["student"], "student_int8": np.round(logits["student"])}
    pixels, labels = pixels[held_out], labels[held_out]
    labels[SWAPPED_LABELS] = (labels[SWAPPED_LABELS] + 1) % 10
    images = [Image.fromarray(image) for image in (pixels.reshape(-1, 8, 8) * 255).astype("uint8")]
    return {
        "results": results_of(logits, labels),
        "logits": logits,
        "labels": labels,
        "class_names": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        "curves": {name: [(n + 1.0, 0.9 - 0.5 / (n + 1)) for n in range(8)] for name in ("baseline", "distilled")},
        "read_image": images.__getitem__,
        "title": "Distillation on digits",
    }


def results_of(logits: dict[str, np.ndarray], labels: np.ndarray) -> dict:
    models = {}
    for key, values in logits.items():
        parameters, size, p50, p95, rate = COSTS[key]
        models[key] = model_figures(values, labels) | {"parameters": parameters, "size_bytes": size}
        models[key] |= {"latency_ms": {"p50": p50, "p95": p95}, "images_per_second": rate}
    return {
        "models": models,
        "agreement_with_teacher": agreement(logits.get("teacher", logits["student"]), logits["student"]),
        "settings": {
            "student": "resnet18",
            "loss": {"name": "nkd"},
            "output": "/home/me/<secret>/runs",
            "token": "hf_" + "a" * 30,
        },
        "dataset": "digits",
    }


def select(run: dict, models: list[str], classes: int) -> dict:
    """The arguments for some models and the first classes."""
    is_used = run["labels"] < classes
    logits = {key: run["logits"][key][is_used][:, :classes] for key in models}
    labels, numbers = run["labels"][is_used], np.flatnonzero(is_used)
    return run | {
        "results": results_of(logits, labels),
        "logits": logits,
        "labels": labels,
        "class_names": run["class_names"][:classes],
        "read_image": lambda number: run["read_image"](numbers[number]),
    }


def many_classes() -> dict:
    """1000 classes with three images each, and photographs of noise."""
    random, labels = np.random.default_rng(0), np.repeat(np.arange(1000), 3)
    logits = {key: random.normal(size=(3000, 1000)).astype(np.float32) for key in ("teacher", "baseline", "student")}
    for values in logits.values():
        values[np.arange(3000), labels] += 4
    noise = Image.effect_noise((500, 375), 60).convert("RGB")
    return {
        "results": results_of(logits, labels),
        "logits": logits,
        "labels": labels,
        "class_names": [f"class of birds {number // 2}" for number in range(1000)],
        "curves": {"distilled": [(0.5, 0.1)]},
        "read_image": lambda number: noise,
        "title": "Many classes",
    }


@pytest.fixture(scope="module")
def pages(digits, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "all": digits,
        "two": select(digits, ["baseline", "student"], 2) | {"class_names": HOSTILE[:2], "title": HOSTILE[0]},
        "four": select(digits, ["teacher", "student"], 4) | {"class_names": HOSTILE, "curves": {}},
        "alone": select(digits, ["student"], 10),
        "many": many_classes(),
    }
    for name, run in runs.items():
        write_html_report(folder / f"{name}.html", **run)
    return {name: folder / f"{name}.html" for name in runs}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def text(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def test_figures_on_the_page_are_those_of_the_results(browser, pages, digits):
    browser.get(pages["all"].as_uri())
    rows = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('.models tbody tr')].map("
        "row => [row.id, [...row.querySelectorAll('td')].map(cell => [cell.className, cell.textContent])]))"
    )
    models = digits["results"]["models"]
    assert [key for key, _ in rows["row-top1"]] == list(COSTS) == list(models)
    for name in ("top1", "top5", "balanced_accuracy", "ece"):
        shown = {key: round(float(value.rstrip("%")) / 100, 4) for key, value in rows[f"row-{name}"]}
        assert shown == {key: model[name] for key, model in models.items()}
    assert dict(rows["row-size_bytes"])["student_int8"] == "11.3 MB"
    assert dict(rows["row-p50"]) == {
        "teacher": "48.3 ms", "baseline": "12.6 ms", "student": "12.6 ms", "student_onnx": "8.31 ms", "student_int8": "2.41 ms"
    }  # fmt: skip
    student, baseline = models["student"]["top1"], models["baseline"]["top1"]
    assert student > baseline
    assert f"raised the student's accuracy by {100 * (student - baseline):.1f} points" in text(browser, ".headline")
    assert f"recognises {student:.2%} of 1,497 held-out images" in text(browser, "#verdict")
    assert "1.9 times smaller and 3.8 times faster" in text(browser, "#verdict")
    cells = browser.execute_script(
        "return [...document.querySelectorAll('.count')].map(cell => Number(cell.textContent))"
    )
    assert sum(cells) == len(digits["labels"])
    calibration = text(browser, "#calibration")
    assert "divides its logits by 0." in calibration
    sure, right = re.search(
        r"student is ([\d.]+)% sure of its answers, and ([\d.]+)% of them are right", calibration
    ).groups()
    assert float(right) == pytest.approx(100 * student, abs=0.01)
    assert float(sure) < float(right)
    suspects = re.findall(r"image (\d+)(?!\d)", text(browser, "#labels"))
    assert {str(number) for number in SWAPPED_LABELS} <= set(suspects)
    settings = text(browser, "#settings")
    assert "loss.namenkd" in settings
    assert "hf_aaa" not in settings
    assert "/home/me" not in settings


def test_pages_fit_a_phone_and_load_nothing(browser, pages):
    browser.get_log("browser")
    browser.get_log("performance")
    for width in (1280, 390):
        phone = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 1000}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        for name, page in pages.items():
            browser.get(page.as_uri())
            browser.execute_script("document.querySelectorAll('details').forEach(details => details.open = true)")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (name, width)
            # The policy admits the style sheet and the pictures.
            assert (
                browser.execute_script("return getComputedStyle(document.querySelector('.tile')).borderRadius")
                == "8px"
            )
            assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 0)")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri() for page in pages.values()}


def test_the_policy_forbids_scripts_and_requests(browser, pages):
    browser.get(pages["all"].as_uri())
    browser.execute_script(
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.org/x.png\" onerror=\"document.title = 1\">')"
    )
    blocked = [entry["message"] for entry in browser.get_log("browser")]
    assert any("Content Security Policy" in message and "img-src" in message for message in blocked)
    assert browser.title == "Distillation on digits"


def test_names_are_shown_as_they_are(browser, pages):
    for name in ("two", "four"):
        browser.get(pages[name].as_uri())
        assert browser.execute_script("return document.scripts.length") == 0
        table = browser.execute_script(
            "return [...document.querySelectorAll('#classes th[scope=row]')].map(e => e.textContent)"
        )
        assert set(HOSTILE[:2]) <= set(table)
    assert {HOSTILE[2], "nul ? line break"} <= set(table)
    browser.get(pages["two"].as_uri())
    assert browser.title == text(browser, "h1") == HOSTILE[0]
    assert "Where student and baseline disagree" in text(browser, "#disagreements")
    assert "top5" not in pages["two"].read_text()


def test_models_that_are_missing_have_no_cards(pages):
    ids = {name: set(re.findall(r'<section [^>]*id="(\w+)"', page.read_text())) for name, page in pages.items()}
    assert ids["all"] > ids["alone"]
    assert ids["all"] - ids["alone"] == {"latency", "size", "disagreements", "labels"}
    assert ids["all"] - ids["four"] == {"curves"}


def test_a_page_of_many_classes_is_bounded(pages):
    content = pages["many"].read_text()
    assert content.count("<img ") <= 24
    assert content.count('class="cell"') == 15 * 15
    assert content.count('class="change ') == 20
    assert "The worst 200 of 1000 classes" in content
    assert re.search(r"class of birds \d+ \(class \d+\)", content)
    assert len(content) < 600_000


def test_same_arguments_same_bytes(pages, digits, tmp_path):
    write_html_report(tmp_path / "report.html", **digits)
    assert (tmp_path / "report.html").read_bytes() == pages["all"].read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_figures_may_be_missing(digits, tmp_path):
    models = {key: {"top1": model["top1"]} for key, model in digits["results"]["models"].items()}
    models["student"]["latency_ms"] = None
    run = select(digits, ["student"], 10) | {"results": {"models": models}, "curves": {"distilled": []}}
    write_html_report(tmp_path / "report.html", **run)
    content = (tmp_path / "report.html").read_text()
    assert set(re.findall(r'id="row-(\w+)"', content)) == {"top1"}
    assert 'class="student_int8">' in content


def test_the_verdict_says_why_there_is_no_onnx_file_and_that_a_student_answers_one_class(digits, tmp_path):
    run = select(digits, ["teacher", "student"], 3)
    write_html_report(
        tmp_path / "report.html", **run | {"results": run["results"] | {"onnx": {"reason": "no <disk>"}}}
    )
    verdict = re.search(r'id="verdict">(.*?)</section>', (tmp_path / "report.html").read_text())[1]
    assert "It has no ONNX version: no &lt;disk&gt;." in verdict
    assert "learned nothing" not in verdict
    run["logits"]["student"] = np.tile([0, 0, 1], (len(run["labels"]), 1))
    write_html_report(tmp_path / "report.html", **run)
    verdict = re.search(r'id="verdict">(.*?)</section>', (tmp_path / "report.html").read_text())[1]
    assert "The student has learned nothing" in verdict
    assert "Every answer is two: train it longer" in verdict
    assert "no ONNX version" not in verdict


def test_wrong_arguments_are_named(digits, tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match=r"results\[\"models\"\] must have an entry 'student', got \['teacher'\]"):
        write_html_report(path, **digits | {"results": {"models": {"teacher": {}}}})
    with pytest.raises(ValueError, match="logits must have an entry 'student'"):
        write_html_report(path, **digits | {"logits": {}})
    with pytest.raises(ValueError, match=r"logits\['teacher'\] must be an array \[1497, 9\].*got \[1497, 10\]"):
        write_html_report(path, **digits | {"class_names": digits["class_names"][:9]})
    assert not path.exists()


def test_numbers():
    assert [short_number(n) for n in (0, 21.4, 999, 999.6, 11_689_512, None)] == [
        "0", "21.4", "999", "1.00 k", "11.7 M", "\N{EN DASH}"
    ]  # fmt: skip
    assert [file_size(n) for n in (512, 44_700_000, 1.2e9)] == ["512 B", "44.7 MB", "1.20 GB"]
    assert [milliseconds(t) for t in (0.4127, 2.412, 48.3, 151.2, 1500)] == [
        "0.413 ms", "2.41 ms", "48.3 ms", "151 ms", "1.50 s"
    ]  # fmt: skip
    assert [points(d) for d in (0.014, -0.014, -0.0001)] == ["+1.4", "\N{MINUS SIGN}1.4", "0.0"]
    assert [compare(1, other, "slower", "faster") for other in (4.14, 1, 0.5)] == [
        "4.1 times faster",
        None,
        "2.0 times slower",
    ]
