"""The Space of recipes/space, in a browser: an image is dropped, and its answer is read."""

import ast
import base64
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from browsers import chromium
from huggingface_hub import RepoCard
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from sklearn.datasets import load_digits
from tiny import digits, native_resnet, native_vit, timm_cnn, timm_deit
from transformers import ViTImageProcessor, pipeline

from nkd_hf import create_student, load_image_processor
from nkd_hf.data import decoding as images

SPACE = Path(__file__).parents[2] / "recipes" / "space"
# gradio wants an older pillow than the other tests run with; `make test-runs` makes this environment.
PYTHON = Path(sys.prefix, "space", "bin", "python")
ROLES = ("student", "baseline", "teacher")

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}, with gradio: make .venv/installed-space")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models whose random heads are large enough for clear answers."""
    folder = tmp_path_factory.mktemp("models")
    images = torch.stack([sample["pixel_values"] for sample in digits(0, 8)])
    heads = {"student": "timm_model.fc", "baseline": "classifier.1", "teacher": "timm_model.head"}
    for role, model in zip(ROLES, (timm_cnn(0), native_resnet(1), timm_deit(2)), strict=True):
        with torch.no_grad():
            head = model.eval().get_submodule(heads[role])
            head.bias.zero_()
            head.weight.mul_(1.5 / model(images).logits.std())
        model.save_pretrained(folder / role)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "baseline")
    return folder


def environment(folder: Path, **variables: object) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key.lower() not in (*ROLES, "trust_remote_code")}
    return own | {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "OMP_NUM_THREADS": "1",
        **{key: str(value) for key, value in variables.items()},
    }


@contextlib.contextmanager
def served(folder: Path, **variables: object):
    """The address of the running app."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}/", folder / "app.log"
    with log.open("w") as file:
        app = subprocess.Popen(
            [PYTHON, SPACE / "app.py"],
            env=environment(folder, GRADIO_SERVER_PORT=port, **variables),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(url, timeout=10):
                    break
            except OSError:
                assert app.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
        yield url
        assert app.poll() is None, log.read_text()
    finally:
        app.terminate()
        app.wait(timeout=30)


def test_the_app_opens_the_formats_and_sizes_that_the_library_opens():
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((SPACE / "app.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id.isupper()
    }
    assert (values["FORMATS"], values["MAX_ASPECT_RATIO"]) == (images.FORMATS, images.MAX_ASPECT_RATIO)


@pytest.fixture
def browser(tmp_path):
    with chromium(tmp_path / "profile") as browser:
        yield browser


DROP = """
const transfer = new DataTransfer();
transfer.items.add(new File([Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0))], arguments[1], {type: "image/png"}));
const target = document.querySelector('#image [aria-dropeffect]');
for (const type of ["dragenter", "dragover", "drop"])
    target.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: transfer}));
"""


def drop(browser, name: str, content: bytes) -> None:
    """Drops a file onto the place for the image, which is cleared first where it is taken."""
    for button in browser.find_elements(By.CSS_SELECTOR, "#image [aria-label='Remove Image'], #image [title='Clear']"):
        button.click()
    # The last answer goes, so that the next one is not mistaken for it.
    places = [f"{role}-latency" for role in ROLES] + ["status"]
    wait(browser, lambda: not any(text(browser, place) for place in places))
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#image [aria-dropeffect]"))
    browser.execute_script(DROP, base64.b64encode(content).decode(), name)


def wait(browser, condition):
    return WebDriverWait(browser, 120).until(lambda _: condition())


def text(browser, identifier: str) -> str:
    return browser.find_element(By.ID, identifier).text


def shown(browser, role: str) -> list[tuple[str, str]]:
    """Labels and percentages of one column, from the top."""
    return [
        tuple(bar.find_element(By.TAG_NAME, tag).text for tag in ("dt", "dd"))
        for bar in browser.find_elements(By.CSS_SELECTOR, f"#{role}-labels .confidence-set")
    ]


def answered(browser) -> bool:
    return all(re.fullmatch(r"\d+\.\d ms", text(browser, f"{role}-latency")) for role in ROLES)


def digit(row: int, turned: bool = False) -> bytes:
    """A large PNG of a digit, lying on its side with an EXIF tag that says so if `turned`."""
    pixels = (load_digits().images[row] * 15.9).astype("uint8")
    image, exif = Image.fromarray(pixels).resize((160, 160)), Image.Exif()
    if turned:
        image = image.rotate(90)
        exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.runs
def test_dropped_images(browser, models, tmp_path):
    folders = {role.upper(): models / role for role in ROLES}
    folders["TEACHER"] = f"{models}{'/.' * 40}/teacher"  # more than a line
    with served(tmp_path, **folders) as url:
        browser.get(url)
        wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#image [aria-dropeffect]"))
        expected = {}
        for name, content in (("seven.png", digit(7)), ("turned.png", digit(6, turned=True))):
            drop(browser, name, content)
            wait(browser, lambda: answered(browser))
            (tmp_path / name).write_bytes(content)
            for role in ROLES:
                classifier = pipeline("image-classification", model=str(models / role), device="cpu")
                answer = classifier(str(tmp_path / name), top_k=5)
                expected[name, role] = [(entry["label"], f"{100 * entry['score']:.0f}%") for entry in answer]
                assert shown(browser, role) == expected[name, role], (name, role)
        # It means something only where the answers differ.
        assert len({tuple(answer) for answer in expected.values()}) == 6
        assert "on cpu (1 thread), median of 3" in text(browser, "notes")
        browser.save_screenshot(str(tmp_path / "desktop.png"))
        for part in ("labels", "latency"):
            places = [browser.find_element(By.ID, f"{role}-{part}").rect for role in ROLES]
            assert len({place["y"] for place in places}) == 1

        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        wait(browser, lambda: browser.execute_script("return document.documentElement.clientWidth") == 390)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        places = [browser.find_element(By.ID, f"{role}-labels").rect for role in ROLES]
        assert len({place["x"] for place in places}) == 1
        assert all(place["x"] + place["width"] <= 390 for place in places)
        browser.save_screenshot(str(tmp_path / "phone.png"))

        script = io.BytesIO()  # Pillow would give it to Ghostscript
        Image.open(io.BytesIO(digit(7))).convert("RGB").save(script, format="EPS")
        for name, content in (
            ("broken.png", b"no image"),
            ("cut.png", digit(7)[:200]),
            ("script.png", script.getvalue()),
        ):
            drop(browser, name, content)
            wait(browser, lambda: "cannot be read as an image" in text(browser, "status"))
            assert [shown(browser, role) for role in ROLES] == [[], [], []]
        strip = io.BytesIO()
        Image.new("RGB", (3000, 1)).save(strip, format="PNG")
        drop(browser, "strip.png", strip.getvalue())
        wait(browser, lambda: "too narrow an image" in text(browser, "status"))
        drop(browser, "seven.png", digit(7))
        wait(browser, lambda: answered(browser))
        assert text(browser, "status") == ""
        assert shown(browser, "student") == expected["seven.png", "student"]

        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert len(asked) > 5
        assert [other for other in asked if other.startswith("http") and not other.startswith(url)] == []


PAGES = """
import gc
gc.disable()  # a fifth of the time of the imports
import json, os, sys
sys.path.insert(0, sys.argv[1])
import app
for variables in json.loads(sys.argv[2]):
    os.environ.update({"STUDENT": "", "BASELINE": "", "TEACHER": "", "TRUST_REMOTE_CODE": ""} | variables)
    blocks = app.build().blocks.values()
    print("PAGE", json.dumps({b.elem_id: getattr(b, "value", None) for b in blocks if b.elem_id}))
names = [{"label": name, "score": score} for name, score in (("crane", 0.6), ("crane", 0.3))]
print("NAMES", json.dumps(app.classify({"student": lambda image, top_k: names}, None)["student"][0]))
"""


@pytest.mark.runs
def test_models_that_are_missing_or_not_to_be_trusted(models, tmp_path):
    pickled, custom = tmp_path / "pickled", tmp_path / "custom"
    pickled.mkdir()
    shutil.copy(models / "student" / "config.json", pickled)
    torch.save(timm_cnn(0).state_dict(), pickled / "pytorch_model.bin")
    student = create_student("resnet18_cifar", num_labels=10, model_args={"layers": [1, 1, 1, 1]})
    student.save_pretrained(custom)
    load_image_processor(student).save_pretrained(custom)
    adapter, headless = tmp_path / "adapter", tmp_path / "headless"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(models / "teacher")}))
    native_vit().vit.save_pretrained(headless)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(headless)
    cases = [
        {"TEACHER": str(models / "teacher")},
        {"STUDENT": str(pickled)},
        {"STUDENT": str(models / "student"), "TEACHER": str(custom)},
        {"STUDENT": str(models / "student"), "TEACHER": str(custom), "TRUST_REMOTE_CODE": "1"},
        {"STUDENT": str(models / "student"), "BASELINE": str(adapter), "TEACHER": str(headless)},
    ]
    done = subprocess.run(
        [PYTHON, "-c", PAGES, SPACE, json.dumps(cases)],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    pages = [json.loads(line.removeprefix("PAGE ")) for line in done.stdout.splitlines() if line.startswith("PAGE ")]
    assert list(pages[0]) == ["error"]
    assert "STUDENT is not set: give it a Hub id or a folder." in pages[0]["error"]
    assert list(pages[1]) == ["error"]
    assert re.search(r"STUDENT=.*pickled could not be opened: .*model\.safetensors", pages[1]["error"])
    assert "teacher-labels" not in pages[2]
    assert "The baseline is omitted. BASELINE is not set" in pages[2]["notes"]
    assert "If you trust that, set TRUST_REMOTE_CODE to 1." in pages[2]["notes"]
    assert {"student-labels", "teacher-labels"} <= set(pages[3])
    assert "teacher" not in pages[3]["notes"]
    assert {"student-labels"} == {key for key in pages[4] if key.endswith("-labels")}
    assert "it has an adapter_config.json: merge the adapter into its model" in pages[4]["notes"]
    assert "it is no whole image classifier: 2 weights are missing, classifier.bias first" in pages[4]["notes"]
    names = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("NAMES ")).removeprefix("NAMES ")
    )
    assert names == {"crane": 0.6, "crane ": 0.3}


def test_front_matter():
    card = RepoCard.load(SPACE / "README.md", repo_type="space")
    data = card.data.to_dict()
    assert {key: data[key] for key in ("sdk", "app_file", "license")} == {
        "sdk": "gradio",
        "app_file": "app.py",
        "license": "apache-2.0",
    }
    assert len(data["short_description"]) <= 60
    version = data["sdk_version"]
    assert f"gradio=={version}" in card.text
    installed = subprocess.run(
        [PYTHON, "-c", "import importlib.metadata as m; print(m.version('gradio'))"], capture_output=True, text=True
    )
    assert installed.stdout.strip() == version
