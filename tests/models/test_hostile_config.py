"""Configurations that are hostile or odd: a ValueError within seconds, in bounded memory, with nothing built before."""

import itertools
import json
import multiprocessing
import re
import resource
import shutil
import signal
import time

import pytest
from tiny import native_resnet, native_vit, timm_cnn, timm_deit
from transformers import BitImageProcessor, PreTrainedConfig

from nkd_hf import create_student, load_image_processor, load_teacher
from nkd_hf.models.loading import open_classifier
from nkd_hf.models.saving import save_student

SECONDS, MEMORY = 60, 3 * 2**30
NAN = float("nan")
VIT, RESNET, CNN, DEIT = "vit", "resnet", "cnn", "deit"
MODELS = {VIT: native_vit, RESNET: native_resnet, CNN: timm_cnn, DEIT: timm_deit}
# By name: the model, and what its config.json gets: settings, a function that makes them, or a whole text. And what the
# refusal says.
CASES = {
    "a billion classes": (CNN, {"num_classes": 10**9, "label_names": None}, "num_classes must be at most"),
    "a billion labels": (VIT, {"num_labels": 10**9, "id2label": None}, "num_labels must be at most"),
    "a million classes": (CNN, {"num_classes": 10**6, "label_names": None}, "weights"),
    "a million labels": (VIT, {"num_labels": 10**6, "id2label": None, "label2id": None}, "weights"),
    "a million blocks": (RESNET, {"depths": [1, 1, 1, 10**6]}, "far more tensors than"),
    "a million layers": (VIT, {"num_hidden_layers": 10**6}, "far more tensors than"),
    "a billion layers": (VIT, {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most"),
    "many times a million blocks": (RESNET, {"depths": [2**20] * 1000}, "depths must be at most"),
    "a million blocks of timm": (DEIT, {"model_args": {"depth": 10**6}}, "far more (tensors|parameters) than"),
    "a million channels": (RESNET, {"hidden_sizes": [8, 16, 32, 10**6]}, "far more parameters than"),
    "a million wide": (VIT, {"hidden_size": 10**6, "intermediate_size": 10**6}, "far more parameters than"),
    "a million wide in timm": (DEIT, {"model_args": {"embed_dim": 10**6}}, "far more parameters than"),
    "a billion pixels": (VIT, {"image_size": 10**9}, "image_size must be from 1 to"),
    "a billion pixels in timm": (DEIT, {"model_args": {"img_size": 10**9}}, "img_size must be from 1 to"),
    "many patches": (VIT, {"image_size": 2**14, "patch_size": 1}, "far more parameters than"),
    "no pixels": (VIT, {"image_size": 0}, "image_size must be from 1 to"),
    "negative pixels": (VIT, {"image_size": -32}, "image_size must be from 1 to"),
    "negative width": (VIT, {"hidden_size": -32}, "hidden|dimension|negative"),
    "a size as text": (VIT, {"image_size": "32"}, "image_size must be from 1 to"),
    "a width as text": (VIT, {"hidden_size": "32"}, "hidden_size"),
    "classes as text": (CNN, {"num_classes": "10"}, "num_classes must be a number of classes, got '10'"),
    "fewer classes than none": (CNN, {"num_classes": -1}, "num_classes must be a number of classes, got -1"),
    "one channel": (RESNET, {"num_channels": 1}, "num_channels must be 3"),
    "one channel in timm": (CNN, {"model_args": {"in_chans": 1}}, "in_chans must be 3"),
    "a list as pretrained_cfg": (CNN, {"pretrained_cfg": [1, 2]}, "pretrained_cfg must be a mapping, got list"),
    "a text as pretrained_cfg": (CNN, {"pretrained_cfg": "resnet18"}, "pretrained_cfg must be a mapping, got str"),
    "a list as model_args": (CNN, {"model_args": ["depth"]}, "model_args must be a mapping, got list"),
    "a mapping as architecture": (CNN, {"architecture": {"name": 1}}, "architecture"),
    "a number as id2label": (VIT, {"id2label": 10}, "id2label must be a mapping or a list, got int"),
    "no deviation": (CNN, {"pretrained_cfg": {"std": [0, 1, 1], "input_size": [3, 32, 32]}}, "above 0"),
    "a negative size": (CNN, {"pretrained_cfg": {"input_size": [3, -32, 32]}}, "must have pixels as input_size"),
    "a huge size": (CNN, {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}}, "must have pixels as input_size"),
    "sizes as text": (CNN, {"pretrained_cfg": {"input_size": "3x32x32"}}, "must have pixels as input_size"),
    "a mean as text": (CNN, {"pretrained_cfg": {"mean": ["0.5", 0.5, 0.5]}}, "must have numbers as mean"),
    "no crop": (CNN, {"pretrained_cfg": {"crop_pct": 0}}, "above 0 as crop_pct"),
    "NaN": (VIT, {"layer_norm_eps": NAN}, "must hold finite numbers, got nan as layer_norm_eps"),
    "infinity": (VIT, {"initializer_range": float("inf")}, "must hold finite numbers, got inf"),
    "1e400": (VIT, '{"model_type": "vit", "layer_norm_eps": 1e400}', "must hold finite numbers, got inf"),
    "deep nesting": (VIT, "[" * 10**5 + "]" * 10**5, "config.json is not a valid JSON file"),
    "nesting": (
        VIT,
        '{"model_type": "vit", "id2label": ' + '{"0": ' * 100 + "1" + "}" * 100 + "}",
        "nested more than",
    ),
    "no JSON": (VIT, "{", "config.json is not a valid JSON file"),
    "no text": (VIT, b"\xff\xfe\x00", "config.json is not a valid JSON file"),
    "no mapping": (VIT, "[]", "config.json is no mapping"),
    "three million names": (
        VIT,
        lambda: {"id2label": {str(i): f"n{i}" for i in range(3 * 10**6)}},
        "config.json has .* MiB",
    ),
    "two million names": (CNN, {"label_names": ["n"] * (2 * 10**6)}, "at most 1048576 names"),
    "other configurations": (VIT, {"configuration_files": ["config.4.0.0.json"]}, "names other configurations"),
    "other weights": (VIT, {"transformers_weights": "../model.safetensors"}, "transformers_weights must be the name"),
}
PROCESSORS = {
    "no deviation of pixels": ({"image_std": [0.5, 0, 0.5]}, "above 0"),
    "a deviation as text": ({"image_std": "0.5"}, "must have numbers above 0"),
    "a huge crop": ({"crop_size": {"height": 10**9, "width": 10**9}}, "must have pixels as crop_size"),
    "a negative size of pixels": ({"size": {"shortest_edge": -1}}, "must have pixels as size"),
}

# All of them open models by open_pretrained, and image processors by open_image_processor.
OPENERS = [
    load_teacher,
    lambda folder: load_image_processor(create_student(folder)),
    lambda folder: load_image_processor(open_classifier(folder)),
]


def save_models(root):
    """One folder for each model, of which the cases are copies."""
    for name, make in MODELS.items():
        save_student(make(), str(root / name))
        BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(root / name)


def change(file, settings):
    if isinstance(settings, bytes):
        file.write_bytes(settings)
    else:
        text = settings if isinstance(settings, str) else json.dumps(json.loads(file.read_text()) | settings)
        file.write_text(text)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each case ended in, by its name."""
    root, models = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("models")
    save_models(models)
    # Opened here first: each process would import what they need.
    for name, open_ in itertools.product(MODELS, OPENERS):
        open_(str(models / name))
    for name, (model, settings, _) in CASES.items():
        shutil.copytree(models / model, root / name)
        change(root / name / "config.json", settings() if callable(settings) else settings)
    for name, (settings, _) in PROCESSORS.items():
        shutil.copytree(models / RESNET, root / name)
        change(root / name / "preprocessor_config.json", settings)
    return open_in_processes(root)


@pytest.mark.runs
@pytest.mark.parametrize("name", [*CASES, *PROCESSORS])
def test_refused_within_seconds(results, name):
    message = CASES[name][-1] if name in CASES else PROCESSORS[name][-1]
    error, text, seconds = results[name]
    assert error in ("ValueError", "RefusedError"), (error, text)
    assert re.search(message, text), text
    assert seconds < SECONDS


def attempt(connection, open_, folder):
    # PreTrainedConfig.from_dict formats the configuration for a log line at any level: 20 seconds for a million labels.
    PreTrainedConfig.__repr__ = object.__repr__
    resource.setrlimit(resource.RLIMIT_AS, (used() + MEMORY, -1))
    signal.alarm(SECONDS)
    start = time.monotonic()
    try:
        open_(folder)
        error = ("nothing", "")
    except BaseException as raised:
        error = (type(raised).__name__, str(raised)[:1000])
    connection.send((*error, time.monotonic() - start))


def used() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def open_in_processes(root):
    """Opens each folder in a process of its own, with a limit of memory and time."""
    openers = itertools.cycle(OPENERS)
    fork, results = multiprocessing.get_context("fork"), {}
    for folder in sorted(root.iterdir()):
        receive, send = fork.Pipe(duplex=False)
        process = fork.Process(target=attempt, args=(send, next(openers), str(folder)))
        process.start()
        send.close()
        try:
            results[folder.name] = receive.recv()
        except EOFError:
            process.join()
            results[folder.name] = (f"the process ended with {process.exitcode}", "", 0.0)
        process.join()
    return results
