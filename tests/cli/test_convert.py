"""Official checkpoints become folders with the official logits, and nothing that a file asks for is run.

`data/mmcls_keys.json` and `data/mmcls_logits.safetensors` were written by the official code (github.com/yzd-v/cls_KD,
branch 1.0) on the CPU in float32; see `official.py` for the weights and images.
"""

import collections
import contextlib
import os
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import timm
import torch
from official import DATA, official_images, official_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from nkd_hf import create_student
from nkd_hf.cli.convert import main as convert
from nkd_hf.models.mmcls import OFFICIAL_ARCHITECTURES, convert_state_dict, create_official_student
from nkd_hf.models.mmcls_checkpoint import read_mmcls_checkpoint

LOGITS = load_file(DATA / "mmcls_logits.safetensors")


def save(checkpoint, path, legacy=False) -> str:
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def training_checkpoint(student: dict) -> dict:
    """What mmengine writes for the distiller, of which the student alone is of use."""
    weights = {f"student.{key}": value for key, value in student.items()}
    weights |= {"teacher.backbone.conv1.weight": torch.ones(2), "distill_losses.loss_uskd.fc.bias": torch.ones(2)}
    weights |= {"data_preprocessor.mean": torch.ones(3, 1, 1), "student.data_preprocessor.std": torch.ones(3, 1, 1)}
    return {"meta": {"epoch": 300, "cfg": "model = dict()"}, "state_dict": weights, "optimizer": {"state": {}}}


@pytest.mark.parametrize("architecture", LOGITS)
def test_converted_folder_gives_the_official_logits(tmp_path, architecture):
    file = save(training_checkpoint(official_state_dict(architecture)), tmp_path / "epoch_300.pth")
    folder = str(tmp_path / "student")
    convert(["--mmcls", file, "--architecture", architecture, "--output", folder])

    cifar = architecture.endswith("cifar100")
    images = official_images(2, 32 if cifar else 224)
    if architecture == "regnetx-1.6gf":
        images = images.flip(1)  # the official model sees BGR
    student = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(images).logits, LOGITS[architecture], rtol=1e-4, atol=1e-4)
    assert len(student.config.id2label) == (100 if cifar else 1000)
    assert student.config.id2label[0] == ("LABEL_0" if cifar else "tench, Tinca tinca")

    # The row's preprocessing, in the folder itself.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    settings = student.config.pretrained_cfg
    assert pixels.shape == (1, *settings["input_size"]) == (1, *images.shape[1:])
    assert settings["crop_pct"] == (1.0 if cifar else 0.875)
    assert settings["interpolation"] == ("bicubic" if architecture in ("deit-tiny", "swin-tiny") else "bilinear")
    mean = [value / 255 for value in (129.304, 124.070, 112.434)] if cifar else [0.485, 0.456, 0.406]
    assert settings["mean"] == pytest.approx(mean)
    if architecture in ("mobilenet", "shufflenetv2", "resnet18-cifar100"):
        answer = pipeline("image-classification", model=folder, device="cpu")(image, top_k=1)
        with torch.no_grad():
            best = student(pixels).logits.softmax(-1).max()
        assert answer[0]["score"] == pytest.approx(best.item(), rel=1e-4)


def test_timm_opens_a_converted_folder(tmp_path):
    weights = official_state_dict("mobilenet")
    convert(["--mmcls", save(weights, tmp_path / "a.pth", legacy=True), "--architecture", "mobilenet",
             "--output", str(tmp_path / "student")])  # fmt: skip
    model = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(official_images(2)), LOGITS["mobilenet"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "sister"),
    [
        ("resnet34", "resnet34"),
        ("resnet34-cifar100", "resnet34"),
        ("resnet101", "resnet50"),
        ("deit-small", "deit-tiny"),
        ("deit-base", "deit-tiny"),
    ],
)
def test_architectures_without_logits_have_the_names_of_their_sisters(architecture, sister):
    target = OFFICIAL_ARCHITECTURES[architecture]
    with torch.device("meta"):
        student = create_student(target.student, **target.arguments).state_dict()
    converted = convert_state_dict(official_state_dict(sister), architecture)
    deeper = {key for key in student if key not in converted}
    assert set(converted) <= set(student)
    assert all(key.startswith("timm_model.layer3.") for key in deeper)
    assert bool(deeper) == (architecture == "resnet101")


def test_labels_of_a_file(tmp_path):
    weights = official_state_dict("resnet18-cifar100")
    weights["head.fc.weight"], weights["head.fc.bias"] = weights["head.fc.weight"][:3], weights["head.fc.bias"][:3]
    # As an editor of Windows writes it: a byte-order mark, and a blank line at the end.
    (tmp_path / "names.txt").write_bytes("cat\r\ndog\r\ncow\r\n\r\n".encode("utf-8-sig"))
    args = ["--mmcls", save({"state_dict": weights}, tmp_path / "a.pth"), "--architecture", "resnet18-cifar100"]
    with pytest.raises(ValueError, match=r"with 100 classes: 2 of another shape: head.fc.weight \[3, 512\] instead"):
        convert([*args, "--output", str(tmp_path / "student")])
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "names.txt"]
    convert([*args, "--output", str(tmp_path / "student"), "--labels", str(tmp_path / "names.txt")])
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert student.config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    (tmp_path / "names.txt").write_bytes(b"cat\n\ncow\n")
    with pytest.raises(ValueError, match="must hold a class name in each line, got a blank line 2"):
        convert([*args, "--output", str(tmp_path / "other"), "--labels", str(tmp_path / "names.txt")])
    assert not (tmp_path / "other").exists()


def test_faults_are_listed_and_nothing_is_written(tmp_path):
    weights = official_state_dict("resnet18")
    del weights["backbone.bn1.bias"]
    weights["backbone.bn1.weight"] = torch.ones(3)
    weights["neck.fc.weight"] = weights["backbone.fc.weight"] = torch.ones(3)
    weights |= {f"backbone.layer5.{i}.conv1.weight": torch.ones(1) for i in range(20)}
    with pytest.raises(ValueError, match="weights of resnet18") as error:
        convert(["--mmcls", save(weights, tmp_path / "a.pth"), "--architecture", "resnet18",
                 "--output", str(tmp_path / "student")])  # fmt: skip
    assert "1 missing: timm_model.bn1.bias;" in str(error.value)
    assert "22 unknown: neck.fc.weight, backbone.fc.weight, backbone.layer5.0.conv1.weight" in str(error.value)
    assert "layer5.7.conv1" in str(error.value)
    assert "layer5.8.conv1" not in str(error.value)
    assert "1 of another shape: backbone.bn1.weight [3] instead of [64]" in str(error.value)
    assert os.listdir(tmp_path) == ["a.pth"]
    with pytest.raises(ValueError, match=r"weights of resnet34 .* missing: timm_model.layer1.2"):
        create_official_student(official_state_dict("resnet18"), "resnet34")
    with pytest.raises(ValueError, match=r"architecture must be one of resnet18, .* got 'vgg'"):
        convert_state_dict({}, "vgg")


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning"
)  # of the archive made here
def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.pth").write_text("not found")
    (tmp_path / "empty.pth").touch()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "script.pth")
    save({"state_dict": {}, "meta": 1}, tmp_path / "bare.pth")
    save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("text.pth", "not opened, since it is no plain checkpoint"),
        ("empty.pth", "is no checkpoint that torch can read"),
        ("script.pth", "TorchScript archives"),
        ("bare.pth", "holds no weights: expected state_dict, or tensors by their names, got state_dict, meta"),
        ("list.pth", "holds no weights.* got list"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read_mmcls_checkpoint(str(tmp_path / name))
        assert "arbitrary" not in str(error.value)
    for name in ("missing.pth", ""):
        with pytest.raises(OSError, match=r"No such file|Is a directory"):
            read_mmcls_checkpoint(str(tmp_path / name))


# --- what mmengine pickles beside the weights ---


@pytest.fixture
def mmengine(monkeypatch):
    """A module with classes such as mmengine pickles; gone once the test calls it."""
    source = """
import collections
import numpy as np

class HistoryBuffer:
    def __init__(self):
        self._log_history = np.arange(5.0)
        self._count_history = np.arange(5)
        self._statistics_methods = {"min": HistoryBuffer.min}
    def min(self):
        return self._log_history.min()

class ConfigDict(dict):
    pass

class Hooks(list):
    pass

class Slotted:
    __slots__ = ("value",)

class Reduced:
    def __reduce__(self):
        return make_reduced, (1, {"a": np.float64(2.0)}), (3, [4])
    def __setstate__(self, state):
        pass

def make_reduced(*args):
    return Reduced()
"""
    names = ["mmengine", "mmengine.logging", "mmengine.logging.message_hub"]
    module = types.ModuleType(names[-1])
    for name in names:
        monkeypatch.setitem(sys.modules, name, module if name == names[-1] else types.ModuleType(name))
    module.__dict__["__name__"] = names[-1]
    exec(source, module.__dict__)
    module.forget = lambda: [monkeypatch.delitem(sys.modules, name) for name in names]
    return module


@pytest.mark.parametrize("legacy", [False, True])
def test_raw_mmengine_checkpoint_opens_without_mmengine(tmp_path, mmengine, legacy):
    weights = {"backbone.conv1.weight": torch.randn(2, 3), "head.fc.bias": torch.nn.Parameter(torch.ones(4))}
    slotted, config = mmengine.Slotted(), mmengine.ConfigDict(a={"b": [1, 2]})
    slotted.value, config.filename = 3, "config.py"
    hub = {
        "log_scalars": collections.OrderedDict({"train/loss": mmengine.HistoryBuffer()}),
        "runtime_info": collections.defaultdict(list, cfg=config, hooks=mmengine.Hooks([1, 2]), slotted=slotted),
        "best": np.float64(71.5),
        "reduced": mmengine.Reduced(),
        "kinds": (mmengine.HistoryBuffer, np.dtype("int64"), {1, 2}, b"bytes", 10**400),
    }
    raw = {key: torch.zeros_like(value) for key, value in weights.items()}
    checkpoint = training_checkpoint(weights) | {"message_hub": hub, "ema_state_dict": {"module.student": raw}}
    checkpoint["state_dict"] = collections.OrderedDict(checkpoint["state_dict"])
    checkpoint["state_dict"]._metadata = {"": {"version": 1}}
    file = save(checkpoint, tmp_path / "epoch_1.pth", legacy)
    mmengine.forget()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    before = set(torch.serialization.get_safe_globals())
    read = read_mmcls_checkpoint(file)
    assert set(torch.serialization.get_safe_globals()) == before
    assert not any(name.startswith("mmengine") for name in sys.modules)
    read.pop("data_preprocessor.std")
    torch.testing.assert_close(read, weights)  # the average, which mmengine has put into state_dict


class Call:
    """Pickles as a call: whoever unpickles it without care makes the call."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __call__(self):
        """Only callables may be pickled as a function."""

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


# By what touches the file: whether the weights are still read, or the file is refused.
ATTACKS = {
    "os.system": (lambda file: Call(os.system, f"touch {file}"), "unsupported GLOBAL posix.system"),
    "subprocess": (lambda file: Call(subprocess.check_call, ["touch", file]), None),
    "exec": (lambda file: Call(exec, f"open({file!r}, 'w')"), None),
    "eval": (lambda file: Call(eval, f"open({file!r}, 'w')"), None),
    "open": (lambda file: Call(open, file, "w"), None),
    "chain": (
        lambda file: Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {file}"),
        "not callable",
    ),
    "nested": (lambda file: [{"a": (Call(dict, {"b": Call(exec, f"open({file!r}, 'w')")}),)}], None),
    "key": (lambda file: {Call(open, file, "w"): 1}, "unhashable"),
    "map": (lambda file: Call(list, Call(map, Call(getattr, Call(__import__, "os"), "mkdir"), [file])), None),
    "storage": (
        lambda file: Call(torch._utils._rebuild_tensor_v2, Call(open, file, "w"), 0, (1,), (1,), False, {}),
        "no attribute",
    ),
    "subclass": (
        lambda file: Call(torch._tensor._rebuild_from_type_v2, Call(open, file, "w"), list, (file,), {}),
        "not callable",
    ),
    "state": (lambda file: Call(collections.OrderedDict, state={"items": Call(open, file, "w")}), None),
    "parameter": (lambda file: Call(torch.nn.Parameter, Call(open, file, "w")), "StandIn"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_the_file_is_run(tmp_path, attack, legacy):
    make, refused = ATTACKS[attack]
    touched = tmp_path / "touched"
    weights = {"backbone.conv1.weight": torch.randn(2, 3)}
    file = save({"state_dict": dict(weights), "meta": make(str(touched))}, tmp_path / "evil.pth", legacy)
    if refused is None:
        torch.testing.assert_close(read_mmcls_checkpoint(file), weights)
    else:
        with pytest.raises(ValueError, match=refused):
            read_mmcls_checkpoint(file)
    assert not touched.exists()
    # The attack is one.
    with contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    assert touched.exists()


def test_state_is_not_set_on_functions_that_torch_allows(tmp_path):
    save({"state_dict": {}}, tmp_path / "plain.pth")
    build = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "evil.pth", "w") as evil:
        for name in plain.namelist():
            evil.writestr(name, build if name.endswith("data.pkl") else plain.read(name))
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(ValueError, match="Can only build Tensor"):
        read_mmcls_checkpoint(str(tmp_path / "evil.pth"))
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
