"""ViTKD: the golden vector of the official code, a literal reference, what is read of the models, and training with it."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from loss_checks import TOLERANCE, assert_close, assert_same_with_gradients
from losses_reference import vitkd_reference
from safetensors.torch import load_file
from tiny import DIGITS, digits, make_trainer, native_resnet, native_vit, timm_cnn, timm_deit
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassification

from nkd_hf import NKDLoss, USKDLoss, ViTKDLoss, load_teacher, token_shape
from nkd_hf.losses.vitkd import random_token_mask
from nkd_hf.models.features import FeatureTap, check_token_grids, feature_shape
from nkd_hf.trainer.distillation_model import DistillationModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
COMPONENTS = ("task", "nkd_target", "nkd_non_target", "vitkd_mimicking", "vitkd_generation")
# The official names of what the loss trains -> ours.
NAMES = {"align2.": "align_low.", "align.": "align_high.", "generation.": "generator."}


def native_deit(seed: int = 0):
    torch.manual_seed(seed)
    config = DeiTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
                        intermediate_size=64, id2label=DIGITS)  # fmt: skip
    return DeiTForImageClassification(config)


def make_tokens(batch_size=3, num_tokens=9, student_dim=6, teacher_dim=10, seed=0, dtype=torch.float64):
    """student_low, student_high, teacher_low, teacher_high"""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch_size, *layers, num_tokens, dim) for dim in (student_dim, teacher_dim) for layers in ((2,), ())]
    tokens = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(i < 2) for i, tensor in enumerate(tokens)]


# ---- the loss


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_golden(dtype, monkeypatch):
    params = json.loads((FIXTURES / "golden" / "index.json").read_text())["vitkd"]["params"]
    golden = load_file(FIXTURES / "golden" / "vitkd.safetensors")
    inputs = {name: golden[name].to(dtype) for name in ("student_low", "student_high", "teacher_low", "teacher_high")}
    student_low, student_high = (inputs[name].requires_grad_() for name in ("student_low", "student_high"))
    module = ViTKDLoss(student_low.shape[-1], inputs["teacher_low"].shape[-1], **params).to(dtype)
    state = {key.removeprefix("module."): value for key, value in golden.items() if key.startswith("module.")}
    for official, ours in NAMES.items():
        state = {key.replace(official, ours): value for key, value in state.items()}
    state["mask_token"] = state["mask_token"].flatten()
    module.load_state_dict(state)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: golden["noise"])

    loss = sum(module(**inputs).values())
    loss.backward()

    assert loss.dtype == dtype
    assert_close(loss, golden["loss"], TOLERANCE[dtype])
    assert_close(student_low.grad, golden["grad_student_low"], TOLERANCE[dtype])
    assert_close(student_high.grad, golden["grad_student_high"], TOLERANCE[dtype])


@pytest.mark.parametrize("student_dim", [6, 10])
@pytest.mark.parametrize(("num_tokens", "mask_ratio"), [(1, 0.5), (4, 0.3), (9, 0.5), (16, 1.0)])
def test_equals_reference(student_dim, num_tokens, mask_ratio, monkeypatch):
    torch.manual_seed(0)
    tokens = make_tokens(num_tokens=num_tokens, student_dim=student_dim)
    module = ViTKDLoss(student_dim, 10, alpha=0.3, beta=0.2, mask_ratio=mask_ratio).double()
    nn.init.normal_(module.mask_token)
    noise = torch.rand(3, num_tokens)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: noise)
    components = module(*tokens)
    assert list(components) == ["vitkd_mimicking", "vitkd_generation"]
    some_kept = int(num_tokens * (1 - mask_ratio)) > 0
    trained = [*tokens[:2], *module.parameters()] if some_kept else [tokens[0], *module.generator.parameters()]
    assert_same_with_gradients(components.values(), vitkd_reference(module, *tokens, noise), trained)


def test_equal_widths_have_no_aligners():
    # As in the official code.
    assert {name.partition(".")[0] for name, _ in ViTKDLoss(8, 8).named_parameters()} == {"mask_token", "generator"}


def test_mask_hides_the_tokens_of_largest_noise_and_is_drawn_anew():
    noise = torch.tensor([[0.4, 0.1, 0.9, 0.3], [0.0, 0.6, 0.2, 0.7]])
    assert random_token_mask(noise, 0.5).squeeze(-1).tolist() == [
        [True, False, True, False],
        [False, True, False, True],
    ]
    assert random_token_mask(noise, 0.7).sum() == 6  # int(4 * 0.3) is 1 that stays
    module, tokens = ViTKDLoss(6, 10), make_tokens(dtype=torch.float32)
    torch.manual_seed(0)
    first, second = (module(*tokens)["vitkd_generation"].item() for _ in range(2))
    torch.manual_seed(0)
    assert module(*tokens)["vitkd_generation"].item() == first != second


def test_nothing_but_masked_tokens_is_compared(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.arange(9.0).repeat(3, 1))
    module, tokens = ViTKDLoss(6, 10).double(), make_tokens()
    expected = module(*tokens)
    tokens[3] = tokens[3].clone()
    tokens[3][:, :4] = 100
    assert module(*tokens) == expected
    tokens[3][:, 4] = 100
    assert module(*tokens)["vitkd_generation"] > expected["vitkd_generation"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_and_autocast_are_computed_in_float32(dtype):
    module, tokens = ViTKDLoss(6, 10, alpha=1.0, beta=1.0), make_tokens(dtype=dtype)
    torch.manual_seed(0)
    expected = module(*(tensor.float() for tensor in tokens))
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = module(*tokens)
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert_close(value, expected[name], 1e-6)
    sum(actual.values()).backward()
    assert tokens[0].grad.dtype == tokens[1].grad.dtype == dtype


def test_teacher_gets_no_gradient():
    tokens = [tensor.detach().requires_grad_() for tensor in make_tokens()]
    sum(ViTKDLoss(6, 10).double()(*tokens).values()).backward()
    assert [tensor.grad is None for tensor in tokens] == [False, False, True, True]


def test_compiles_whole():
    module, tokens = ViTKDLoss(6, 10), make_tokens(dtype=torch.float32)
    torch.manual_seed(0)
    expected = module(*tokens)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*tokens), expected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"student_high": (3, 9)}, r"student_high must be \[B, P, 6\], got \[3, 9\]: pass the patch tokens"),
        (
            {"student_high": (3, 10, 6)},
            r"a square grid of patch tokens, got 10, which is no square: omit class tokens",
        ),
        ({"student_high": (3, 9, 7)}, r"student_high must be \[3, 9, 6\].*got \[3, 9, 7\]: .*student_dim=7"),
        ({"student_low": (3, 2, 9, 7)}, r"student_low must be \[3, 2, 9, 6\].*: make ViTKDLoss with student_dim=7"),
        ({"student_low": (3, 9, 6)}, r"student_low must be \[3, 2, 9, 6\] to fit .*got \[3, 9, 6\]"),
        ({"teacher_low": (3, 2, 16, 10)}, r"teacher_low must be \[3, 2, 9, 10\].*one patch size and one image size"),
        ({"teacher_high": (3, 16, 10)}, r"teacher_high must be \[3, 9, 10\].*one patch size and one image size"),
        ({"teacher_high": (3, 9, 12)}, r"teacher_high must be \[3, 9, 10\].*: make ViTKDLoss with teacher_dim=12"),
        ({"teacher_high": (4, 9, 10)}, r"teacher_high must be .*: pass the tokens of the same batch"),
    ],
)
def test_shape_errors(shapes, message):
    names = ("student_low", "student_high", "teacher_low", "teacher_high")
    tokens = dict(zip(names, make_tokens(), strict=True)) | {
        name: torch.zeros(shape) for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=message):
        ViTKDLoss(6, 10)(**tokens)


def test_other_errors():
    for arguments, message in (
        ({"student_dim": 0}, "student_dim must be at least 1, got 0"),
        ({"alpha": -1.0}, "alpha must be a finite number >= 0"),
        ({"beta": math.nan}, "beta must be a finite number >= 0"),
        ({"mask_ratio": 0.0}, "mask_ratio must be above 0 and at most 1, got 0.0: beta=0"),
        ({"mask_ratio": 1.5}, "mask_ratio must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ViTKDLoss(**{"student_dim": 6, "teacher_dim": 10} | arguments)
    tokens = make_tokens()
    with pytest.raises(ValueError, match=r"teacher_high must be of a float dtype, got torch.int64"):
        ViTKDLoss(6, 10).double()(*tokens[:3], tokens[3].long())


# ---- what is read


@pytest.mark.parametrize(
    ("build", "blocks", "norm", "num_prefix_tokens"),
    [
        (timm_deit, "timm_model.blocks", "timm_model.norm", 1),
        (lambda: timm_deit().timm_model, "blocks", "norm", 1),
        (
            lambda: timm.create_model("deit3_small_patch16_224", img_size=32, patch_size=8, depth=3),
            "blocks",
            "norm",
            1,
        ),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=3), "blocks", "norm", 2),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, reg_tokens=4), "blocks", "norm", 5),
        (lambda: timm.models.VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=2), "blocks", "norm", 1),
        (native_vit, "vit.layers", "vit.layernorm", 1),
        (native_deit, "deit.layers", "deit.layernorm", 2),
    ],
)
def test_patch_tokens_of_the_first_two_blocks_and_after_the_norm(build, blocks, norm, num_prefix_tokens):
    model = build().eval()
    outputs = {}
    for name in (f"{blocks}.0", f"{blocks}.1", norm):
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    low, high = FeatureTap(model, kind="low"), FeatureTap(model, kind="high")
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    first, second, last = (output[:, num_prefix_tokens:] for output in outputs.values())
    torch.testing.assert_close(low.take(), torch.stack([first, second], 1), rtol=0, atol=0)
    tokens = high.take()
    torch.testing.assert_close(tokens, last, rtol=0, atol=0)
    assert token_shape(model) == tokens.shape[1:]
    assert feature_shape(model, torch.zeros(1, 3, 32, 32), kind="high") == (1, *tokens.shape[1:])
    low.remove()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(RuntimeError, match=r"took no part in the forward pass"):
        low.take()


@pytest.mark.parametrize("build", [timm_cnn, native_resnet, lambda: timm_cnn().timm_model, lambda: nn.Linear(2, 2)])
def test_models_that_are_no_vit_are_errors(build):
    with pytest.raises(ValueError, match=r"tokens are known for \w+.*: ViTKD, which reads them, needs a ViT or DeiT"):
        token_shape(build())


def test_errors_at_construction(tmp_path):
    loss = ViTKDLoss(32, 48)
    with pytest.raises(ValueError, match=r"no low patch tokens are known for Timm.* \(resnet18\): ViTKD"):
        make_trainer(tmp_path, timm_cnn(), teacher=timm_deit(1), distillation_loss=loss)
    with pytest.raises(ValueError, match=r"no low patch tokens are known for Timm.* \(resnet18\): ViTKD"):
        make_trainer(tmp_path, timm_deit(), teacher=timm_cnn(1), distillation_loss=loss)
    with pytest.raises(ValueError, match=r"ViTKDLoss, which asks for a teacher"):
        make_trainer(tmp_path, timm_deit(), distillation_loss=loss)
    finer = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=10)
    with pytest.raises(
        ValueError, match=r"like the student's 4x4, got 8x8 from VisionTransformer \(deit_tiny_patch16_224\)"
    ):
        make_trainer(tmp_path, timm_deit(), teacher=finer, distillation_loss=loss)
    check_token_grids(timm_deit(), native_vit())


def test_teacher_taps_are_replaced_and_read_in_one_pass():
    model = timm_deit(width=48)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    teacher = load_teacher(model).tap(["teacher_low", "teacher_high"]).tap(["teacher_logits", "teacher_high"])
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    features = teacher.take_features()
    assert {name: tuple(tensor.shape) for name, tensor in features.items()} == {"teacher_high": (2, 16, 48)}
    assert not features["teacher_high"].requires_grad
    assert calls == [1]
    teacher.tap([])
    hooks = [module for name, module in model.named_modules() if name and module._forward_hooks]
    assert hooks == []


# ---- training


def build_trainer(folder, student, teacher, **kwargs):
    torch.manual_seed(3)
    dims = token_shape(student)[1], token_shape(teacher)[1]
    # Tiny models: the official weights would leave the loss too small to move anything in a few steps.
    loss = {"nkd": NKDLoss(gamma=1.0), "vitkd": ViTKDLoss(*dims, alpha=1e-3, beta=1e-3)}
    return make_trainer(
        folder, student, digits(0, 128), digits(128, 192), teacher=teacher, distillation_loss=loss, **kwargs
    )


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (timm_deit, lambda: timm_deit(1, width=48)),
        (native_vit, lambda: timm_deit(1, width=48).timm_model),
        (native_deit, lambda: native_vit(1)),
    ],
)
def test_everything_that_trains_moves_and_components_add_up(tmp_path, student, teacher):
    teacher = teacher()
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = build_trainer(tmp_path, student(), teacher, learning_rate=3e-3, max_steps=24)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert len(calls) == 24
    assert not [name for name, value in trainer.model.named_parameters() if torch.equal(before[name], value)]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in history:
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in COMPONENTS), rel=1e-5)
    for name in ("vitkd_mimicking", "vitkd_generation"):
        assert sum(entry[name] for entry in history[-4:]) < sum(entry[name] for entry in history[:4])
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(calls) == 24


def test_one_step_is_the_loss_of_the_models_tokens(tmp_path):
    student, teacher = timm_deit(), timm_deit(1, width=48)
    trainer = build_trainer(tmp_path, student, teacher)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}
    torch.manual_seed(0)
    _ = trainer.compute_loss(trainer.model, batch)
    logged = {name: value.item() for name, value in trainer.loss_log.sums.items()}
    tokens = []
    for model in (student, teacher):
        with torch.no_grad():
            blocks = model.timm_model
            x = blocks.patch_embed(batch["pixel_values"])
            x = blocks.norm_pre(blocks.patch_drop(blocks._pos_embed(x)))
            outputs = [x := block(x) for block in blocks.blocks]
        tokens += [torch.stack(outputs[:2], 1)[:, :, 1:], blocks.norm(outputs[-1])[:, 1:].detach()]
    torch.manual_seed(0)
    expected = trainer.model.losses["vitkd"](*tokens)
    assert {name: logged[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()})


def test_saved_and_resumed_bit_for_bit(tmp_path):
    def build(folder):
        return build_trainer(
            folder, timm_deit(drop_path=0.2), timm_deit(1, width=48), max_steps=12, save_strategy="steps", save_steps=5
        )

    whole = build(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    trained = safetensors.torch.load_file(checkpoint / "distillation_losses.safetensors")
    assert {".".join(name.split(".")[:2]) for name in trained} == {
        "vitkd.align_low", "vitkd.align_high", "vitkd.mask_token", "vitkd.generator",
    }  # fmt: skip
    whole.save_model(tmp_path / "student")
    saved = safetensors.torch.load_file(tmp_path / "student" / "model.safetensors")
    assert set(saved) == {key.removeprefix("timm_model.") for key in whole.student.state_dict()}

    resumed = build(tmp_path / "resumed")
    with torch.no_grad():  # what is not loaded would show
        for parameter in resumed.model.parameters():
            parameter.fill_(0.123)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    histories = [[e for e in run.state.log_history if "loss" in e] for run in (whole, resumed)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("student", [timm_deit, native_vit])
def test_gradient_checkpointing_changes_nothing(tmp_path, student):
    runs = []
    for checkpointing in (False, True):
        trainer = build_trainer(tmp_path, student(), timm_deit(1, width=48), gradient_checkpointing=checkpointing)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_bf16_and_a_loss_of_tokens_alone(tmp_path):
    trainer = make_trainer(tmp_path, timm_deit(), digits(0, 64), teacher=timm_deit(1, width=48), bf16=True,
                           distillation_loss=ViTKDLoss(32, 48))  # fmt: skip
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in ("task", *COMPONENTS[3:])), rel=1e-5)
    assert entry["vitkd_mimicking"] > 0


def test_beside_uskd_whose_feature_layer_is_its_own(tmp_path):
    loss = {"uskd": USKDLoss(32, 10), "vitkd": ViTKDLoss(32, 48)}
    trainer = make_trainer(tmp_path, timm_deit(), digits(0, 64), teacher=timm_deit(1, width=48), distillation_loss=loss,
                           feature_layer="timm_model.blocks.2")  # fmt: skip
    assert trainer.model.taps["mid_feature"].layer == "timm_model.blocks.2"
    assert trainer.model.taps["student_low"].layer == "timm_model.blocks.0, timm_model.blocks.1"
    trainer.train()
    assert {"uskd_weak", "vitkd_mimicking"} <= trainer.state.log_history[0].keys()


@pytest.mark.runs
def test_whole_model_compiles():
    model = DistillationModel(timm_deit(), {"vitkd": ViTKDLoss(32, 48)}).train()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    teacher = load_teacher(timm_deit(1, width=48)).tap(model.teacher_inputs)
    compiled_teacher = torch.compile(teacher, fullgraph=True, backend="aot_eager")
    runs = []
    for run, ask in ((model, teacher), (torch.compile(model, fullgraph=True, backend="aot_eager"), compiled_teacher)):
        ask(pixels)
        torch.manual_seed(0)
        runs.append(run(pixels, labels, ask.take_features())["losses"])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)
