"""Losses by name: what each needs, as its class says it, and a loss of one's own by its module and class."""

import sys

import pytest
import torch
from tiny import DIGITS, native_resnet, timm_cnn, timm_deit

from nkd_hf import DistillationLoss, RecipeArguments, create_student
from nkd_hf.losses.base import SHAPES, loss_inputs, teacher_inputs
from nkd_hf.losses.registry import LOSSES, find_losses
from nkd_hf.losses.top_k import TopKView
from nkd_hf.models.features import STUDENT_FEATURES, STUDENT_HEAD, TEACHER_FEATURES, TEACHER_HEAD
from nkd_hf.recipe.loss_shapes import loss_shapes
from nkd_hf.trainer.optimization import decayed_parameters

OWN = """
import torch
from nkd_hf import DistillationLoss, NKDLoss

class Mid(DistillationLoss):
    def __init__(self, in_features, num_classes, weight=1.0):
        super().__init__()
        self.in_features, self.num_classes, self.weight = in_features, num_classes, weight
        self.mask_token = torch.nn.Parameter(torch.zeros(3))

    def forward(self, mid_feature, labels):
        return {"mid": self.weight * mid_feature.mean()}

class OneMap(DistillationLoss):
    def __init__(self, student_channels):
        super().__init__()
        self.student_channels = student_channels

    def forward(self, student_map):
        return {"map": student_map.mean()}

class TwoMaps(DistillationLoss):
    def forward(self, student_map, teacher_map):
        return {"maps": (student_map.mean() - teacher_map.mean()).square()}

    @staticmethod
    def check_map_sizes(student_size, teacher_size):
        if teacher_size[0] < student_size[0]:
            raise ValueError("the teacher's map must not be the smaller one")

class Required(DistillationLoss):
    def __init__(self, weight, **other):
        super().__init__()

    def forward(self, student_logits):
        return {"own": student_logits.mean()}

class Warm(NKDLoss):
    def __init__(self):
        super().__init__(temperature=2.0)

class Mimic(DistillationLoss):
    def forward(self, student_logits, teacher_logits):
        return {"mimic": (student_logits - teacher_logits).square().mean()}

class Plain(torch.nn.Module):
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    (tmp_path / "broken_losses.py").write_text("import nothing_of_the_kind")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])


def test_what_the_losses_need():
    inputs = {"student_logits", "teacher_logits", "logit_moments", "labels", "label_smoothing", "token_grid"}
    inputs |= {*STUDENT_FEATURES, *STUDENT_HEAD, *TEACHER_FEATURES, *TEACHER_HEAD}
    for name, loss in LOSSES.items():
        assert issubclass(loss, DistillationLoss)
        assert set(loss_inputs(loss)) <= inputs
        assert loss_inputs(loss)
        arguments = RecipeArguments(
            "resnet18", teacher="resnet34" if teacher_inputs(loss) else None, distillation_loss=name
        )
        assert arguments.needs_teacher == (name not in ("uskd", "tfkd"))
        assert arguments.needs_teacher_layers == (name in ("vitkd", "mgd", "srrl", "sdnkd"))
        needs_all = [name for name, view in arguments.top_k_views.items() if view is None]
        assert needs_all == ([name] if name in ("vitkd", "mgd", "srrl", "sdnkd") else [])
        assert loss_inputs(arguments.build_loss(**dict.fromkeys(set(SHAPES) - {"feature_norm"}, 2))) == loss_inputs(
            loss
        )
    # What the class says to users is what the code takes.
    listed = DistillationLoss.__doc__
    assert all(f"`{name}`" in listed for name in inputs | set(SHAPES))


def test_what_the_losses_read_of_the_largest_logits():
    arguments = RecipeArguments(
        "resnet18", teacher="resnet34", distillation_loss="kd+nkd+uskd", loss_args={"nkd": {"temperature": 3}}
    )
    assert arguments.top_k_views == {"kd": TopKView(4.0), "nkd": TopKView(3.0, with_target=False)}
    for name, loss_args, view in (
        ("kd", {"temperature": 2, "standardize": True}, TopKView(2.0, standardized=True)),
        ("dkd", {"standardize": True}, TopKView(4.0, standardized=True)),
        ("wsld", {"temperature": 2.0}, TopKView(2.0)),
        ("rld", {"temperature": 4.0, "standardize": True}, TopKView(4.0, standardized=True)),
        ("dist", {}, TopKView(1.0)),
        ("wttm", {"exponent": 0.1}, TopKView(10.0)),
    ):
        arguments = RecipeArguments("a", teacher="b", distillation_loss=name, loss_args=loss_args)
        assert arguments.top_k_views == {name: view}


def test_no_loss():
    arguments = RecipeArguments("resnet18", distillation_loss="none")
    assert (arguments.losses, arguments.build_loss(), arguments.needs_teacher) == ({}, None, False)


def test_own_losses_read_their_shapes_from_the_models(own):
    arguments = RecipeArguments("resnet18", distillation_loss="own_losses.Mid", loss_args={"weight": 2.0})
    assert not arguments.needs_teacher
    loss = arguments.build_loss(**loss_shapes(arguments.losses.values(), timm_cnn(), (32, 32)))
    assert (loss.in_features, loss.num_classes, loss.weight) == (32, 10, 2.0)
    arguments = RecipeArguments("resnet18", distillation_loss="own_losses.OneMap")
    assert arguments.build_loss(**loss_shapes(arguments.losses.values(), timm_deit(), (32, 32))).student_channels == 32

    arguments = RecipeArguments(
        "a", teacher="b", distillation_loss="nkd+own_losses.TwoMaps", loss_args={"nkd": {"gamma": 1.0}}
    )
    assert arguments.needs_teacher_layers
    wide = create_student("resnet18", id2label=DIGITS, image_size=32)
    losses = arguments.build_loss(**loss_shapes(arguments.losses.values(), native_resnet(), (32, 32), wide))
    assert list(losses) == ["nkd", "own_losses_TwoMaps"]
    assert losses["nkd"].gamma == 1.0
    with pytest.raises(ValueError, match="must not be the smaller one"):
        loss_shapes(arguments.losses.values(), timm_deit(), (32, 32), wide)


def test_subclass_of_nkd_reads_a_store_as_nkd_does(own):
    arguments = RecipeArguments("a", teacher="b", distillation_loss="own_losses.Warm")
    assert arguments.top_k_views == {"own_losses.Warm": TopKView(2.0, with_target=False)}
    # A loss of one's own that says nothing needs all logits.
    arguments = RecipeArguments("a", teacher="b", distillation_loss="nkd+own_losses.Mimic")
    assert arguments.top_k_views["own_losses.Mimic"] is None


@pytest.mark.parametrize(
    ("loss", "loss_args", "message"),
    [
        ("own_losses.Gone", None, r"own_losses.Gone must be a subclass of nkd_hf.DistillationLoss, got None"),
        ("own_losses.Plain", None, r"own_losses.Plain must be a subclass of nkd_hf.DistillationLoss, got <class 'own_losses.P"),
        ("nkd+os.system", None, r"os.system must be a subclass of nkd_hf.DistillationLoss, got <built-in function system>"),
        ("gone_losses.Mid", None, r"got ModuleNotFoundError: No module named 'gone_losses'. Start .* folder of gone_losses"),
        ("broken_losses.Mid", None, r"got ModuleNotFoundError: No module named 'nothing_of_the_kind'. Correct broken_losses"),
        ("own_losses.Mid+own_losses.Mid", None, r"several of them joined by \+, or none, got 'own_losses.Mid\+own"),
        ("own losses.Mid", None, r"several of them joined by \+, or none, got 'own losses.Mid'. A loss of your own"),
        (".Mid", None, r"several of them joined by \+, or none, got '.Mid'"),
        ("mid", None, r"several of them joined by \+, or none, got 'mid'. A loss of your own is called by its module"),
        ("own_losses.Mid", {"mu": 1}, r"loss_args of distillation_loss=own_losses.Mid are weight, got mu"),
        ("own_losses.TwoMaps", {"mu": 1}, r"loss_args of distillation_loss=own_losses.TwoMaps are none, got mu"),
        ("own_losses.Required", None, r"loss_args of distillation_loss=own_losses.Required must hold weight, got {}"),
        ("nkd+own_losses.Mid", {"mid": {}}, r"by the names of the losses, such as {nkd: {...}}, got mid"),
    ],
)  # fmt: skip
def test_errors_are_one_line(own, loss, loss_args, message):
    teacher = "resnet34" if "nkd" in loss or "TwoMaps" in loss else None
    with pytest.raises(ValueError, match=message) as raised:
        RecipeArguments("resnet18", teacher=teacher, distillation_loss=loss, loss_args=loss_args)
    assert "\n" not in str(raised.value)


def test_weight_decay_of_tokens_is_said_by_the_loss(own):
    token = find_losses("own_losses.Mid")["own_losses.Mid"](3, 2)
    assert decayed_parameters(token, ["embedding"]) == []
    token.always_decays = ("mask_token",)
    assert decayed_parameters(token, ["embedding"]) == ["mask_token"]
    vitkd = LOSSES["vitkd"](4, 4)
    assert "mask_token" in decayed_parameters(vitkd, ["norm", "bias", "embedding"])


def test_a_plain_module_still_serves_the_trainer():
    class Plain(torch.nn.Module):
        def forward(self, student_logits, teacher_low=None):
            return {}

    assert loss_inputs(Plain()) == loss_inputs(Plain) == ["student_logits", "teacher_low"]
    assert teacher_inputs(Plain()) == ["teacher_low"]
