"""Schedules, weight decay groups, linear scaling, moving average and BatchNorm's statistics, through the trainer."""

import copy
import logging
import math

import pytest
import timm
import torch
from accelerate.data_loader import prepare_data_loader
from timm.optim import param_groups_weight_decay
from tiny import digits, make_trainer, native_vit, timm_cnn, timm_deit
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    DeiTConfig,
    Dinov2Config,
    LevitConfig,
    SchedulerType,
    SiglipConfig,
    Swinv2Config,
    TrainerCallback,
)

from nkd_hf import DistillationTrainer, DistillationTrainingArguments, NKDLoss, USKDLoss
from nkd_hf.trainer.batch_norm import estimate_batch_norm, smallest_batch
from nkd_hf.trainer.optimization import NO_DECAY_KINDS, decayed_parameters, lr_factor

IMAGENET = 1281167


def rates(name, steps_per_epoch, num_epochs, learning_rate, **arguments):
    factor = lr_factor(name, steps_per_epoch * num_epochs, num_epochs, learning_rate, arguments)
    return lambda epoch, step=0: learning_rate * factor(epoch * steps_per_epoch + step)


def test_multistep():
    rate = rates("multistep", 5005, 100, 0.1, milestones=[30, 60, 90])
    assert [rate(0), rate(29, 5004), rate(30), rate(59), rate(60), rate(90), rate(99)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.0001, 0.0001]
    )


def test_exponential_by_epoch():
    rate = rates("exponential_by_epoch", 5005, 300, 0.045, gamma=0.98)
    assert [rate(0), rate(0, 5004), rate(1), rate(299)] == pytest.approx(
        [0.045, 0.045, 0.0441, 0.045 * 0.98**299], rel=1e-12
    )


def test_constant_then_linear():
    rate = rates("constant_then_linear", 1252, 300, 0.5, constant_steps=5000, constant_factor=0.1)
    assert rate(0) == rate(0, 4999) == pytest.approx(0.05)
    assert rate(0, 5000) == 0.5
    # Half of the 375,600 - 5,000 steps later half of the rate is left.
    assert rate(0, 5000 + 185_300) == pytest.approx(0.25)
    assert 0 < rate(299, 1251) < 0.5 / 370_000
    assert rate(300) == 0


def test_cosine_by_epoch_with_a_warm_up_by_step_and_a_floor():
    rate = rates("cosine_by_epoch", 1252, 300, 1e-3, warmup_epochs=20, warmup_factor=1e-3, min_lr=1e-5)
    assert rate(0) == pytest.approx(1e-6)
    assert rate(0, 1) - rate(0) == pytest.approx((1e-3 - 1e-6) / (20 * 1252 - 1))
    assert rate(19, 1251) == rate(20) == rate(20, 1251) == pytest.approx(1e-3)
    assert rate(160) == pytest.approx((1e-3 + 1e-5) / 2)
    assert (
        rate(299)
        == rate(299, 1251)
        == pytest.approx(1e-5 + 0.99e-3 * (1 + math.cos(math.pi * 279 / 280)) / 2, rel=1e-12)
    )


def test_epochs_and_warm_ups_are_whole_steps_however_the_division_rounds():
    halved = {"name": "exponential_by_epoch", "learning_rate": 1.0, "arguments": {"gamma": 0.5}}
    # 21 / 1.4 is above 15, and 33 / 2.2 is below it.
    factor = lr_factor(num_steps=21, num_epochs=1.4, max_steps=21, **halved)
    assert [factor(14), factor(15)] == [1, 0.5]
    factor = lr_factor(num_steps=33, num_epochs=2.2, **halved)
    assert [factor(14), factor(15), factor(29), factor(30)] == [1, 0.5, 0.5, 0.25]
    # 2.2 * 25 is above 55, and step 54, the fifty-fifth, is the last of the warm-up.
    rate = rates("cosine_by_epoch", 25, 4, 1.0, warmup_epochs=2.2, warmup_factor=0.5)
    assert [rate(2, 4), rate(2, 3)] == pytest.approx([1, 0.5 + 0.5 * 53 / 54])


def test_cosine_by_epoch_with_a_warm_up_by_epoch():
    rate = rates("cosine_by_epoch", 1252, 100, 0.8, warmup_epochs=5, warmup_factor=0.1, warmup_by="epoch")
    assert [rate(epoch, 700) for epoch in range(6)] == pytest.approx([0.08, 0.26, 0.44, 0.62, 0.80, 0.80])
    assert rate(99) == pytest.approx(0.4 * (1 + math.cos(math.pi * 94 / 95)))


def test_a_milestone_acts_within_an_epoch():
    factor = lr_factor("multistep", 300, 3, 0.1, {"milestones": [1.5, 2.25]})
    assert [factor(step) for step in (0, 149, 150, 224, 225)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    # The first step that is not before it.
    factor = lr_factor("multistep", 9, 3, 0.1, {"milestones": [1.5]})
    assert [factor(step) for step in (4, 5)] == pytest.approx([1, 0.1])


def test_epochs_begin_where_the_datas_do_in_a_run_of_two_and_a_half():
    # Three steps in an epoch: the Trainer runs 3 + 3 + 2.
    factor = lr_factor("multistep", 8, 2.5, 0.1, {"milestones": [1, 2]})
    assert [factor(step) for step in range(8)] == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 2)
    # Steps that are set are divided evenly among the epochs: 3.2 each.
    factor = lr_factor("multistep", 8, 2.5, 0.1, {"milestones": [1, 2]}, max_steps=8)
    assert [factor(step) for step in range(8)] == pytest.approx([1] * 4 + [0.1] * 3 + [0.01])


def test_a_warm_up_that_ends_within_an_epoch():
    rate = rates("cosine_by_epoch", 10, 4, 1.0, warmup_epochs=1.5, warmup_factor=0.5, warmup_by="epoch")
    assert [rate(0), rate(0, 9), rate(1), rate(1, 9)] == pytest.approx([0.5, 0.5, 1.0, 1.0])
    assert rate(2) == pytest.approx((1 + math.cos(math.pi * 0.5 / 2.5)) / 2)
    rate = rates("cosine_by_epoch", 10, 4, 1.0, warmup_epochs=0.5, warmup_factor=0.5, warmup_by="epoch")
    assert [rate(0, 4), rate(0, 5), rate(0, 9)] == pytest.approx([0.5, 1.0, 1.0])


def test_one_epoch_of_warm_up_by_epoch_is_trained():
    rate = rates("cosine_by_epoch", 10, 4, 1.0, warmup_epochs=1, warmup_factor=0.1, warmup_by="epoch")
    assert [rate(0), rate(0, 9), rate(1)] == pytest.approx([0.1, 0.1, 1.0])


@pytest.mark.parametrize(
    ("num_steps", "num_epochs"), [(3, 300), (1, 100), (500456, 100), (30, 2.5), (25040, 20), (7, 0.5)]
)
def test_schedules_of_odd_runs_stay_in_range(num_steps, num_epochs):
    for name, arguments in {
        "multistep": {"milestones": [30, 60, 90]},
        "exponential_by_epoch": {"gamma": 0.98},
        "constant_then_linear": {"constant_steps": 5000},
        "cosine_by_epoch": {"warmup_epochs": 20, "warmup_factor": 1e-3, "min_lr": 1e-5},
    }.items():
        factor = lr_factor(name, num_steps, num_epochs, 1e-3, arguments)
        assert all(0 <= factor(step) <= 1 for step in {0, 1, num_steps // 2, num_steps - 1, num_steps, num_steps + 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scheduler_type": "multistep"}, "these must be set: milestones; got none"),
        ({"lr_scheduler_type": "multistep", "lr_scheduler_kwargs": {"milestones": 30}}, "must be a list of epochs"),
        ({"lr_scheduler_type": "multistep", "lr_scheduler_kwargs": {"milestone": [30]}}, "milestones, gamma"),
        ({"lr_scheduler_type": "exponential_by_epoch", "lr_scheduler_kwargs": {"gamma": -1}}, "a finite number >= 0"),
        ({"lr_scheduler_type": "cosine_by_epoch", "lr_scheduler_kwargs": {"warmup_by": "day"}}, "step or epoch"),
        ({"lr_scheduler_type": "cosine_by_epoch", "warmup_steps": 5}, "does not read warmup_steps=5"),
        ({"lr_scheduler_type": "multi_step"}, "is not a valid SchedulerType"),
        ({"lr_scheduler_type": "cosine_by_epoch", "lr_scheduler_kwargs": {"min_lr": 1.0}}, "set min_lr too"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"milestones": [3]}}, "milestones are not read by"),
        (
            {"lr_scheduler_type": "exponential_by_epoch", "lr_scheduler_kwargs": {"gamma": True}},
            "a finite number >= 0",
        ),
        ({"lr_scheduler_kwargs": "milestones=1"}, "must be a mapping in JSON"),
        (
            {
                "lr_scheduler_type": "cosine_by_epoch",
                "lr_scheduler_kwargs": {"warmup_epochs": 1, "warmup_by": "epoch"},
            },
            "warmup_factor must be above 0 with warmup_by=epoch, got 0.0",
        ),
        (
            {"lr_scheduler_type": "constant_then_linear", "lr_scheduler_kwargs": {"constant_steps": 0.1}},
            "constant_steps must be a whole number, got 0.1",
        ),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"last_epoch": 3}}, "It reads none"),
        ({"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"num_warmup_steps": 3}}, "reads none"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_training_steps": 3}}, "It reads last_epoch"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "do not fit lr_scheduler_type=cosine_with_min_lr, got {}: One of",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1.0}}, "set min_lr too"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "lr_scheduler_kwargs": {"gamma": 0.1},
                "eval_strategy": "epoch",
            },
            "gamma are not read by lr_scheduler_type=reduce_lr_on_plateau. It reads mode, factor, patience",
        ),
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "lr_scheduler_kwargs": {"mode": "up"},
                "eval_strategy": "epoch",
            },
            "mode up is unknown",
        ),
        (
            {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"min_lr": ["0"]}, "eval_strategy": "epoch"},
            "min_lr must be a finite number",
        ),
        ({"lr_scheduler_kwargs": "[1]"}, "must be a mapping such as"),
        ({"optim": "adamw_torch", "optim_args": "momentum=0.9"}, "optim=adamw_torch does not read optim_args"),
        ({"no_weight_decay": "norm"}, "must be a list, got 'norm'"),
        ({"no_weight_decay": ["norms"]}, "no_weight_decay must be some of norm, bias, embedding, got 'norms'"),
        ({"base_batch_size": 0}, "base_batch_size must be positive, got 0"),
        ({"save_on_each_node": True}, "save_on_each_node must be false, got True"),
        (
            {"accelerator_config": {"even_batches": False}},
            "even_batches of accelerator_config must be true, got False",
        ),
        ({"precise_bn_images": -1}, "precise_bn_images must be positive, got -1"),
        ({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1, got 1.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationTrainingArguments("unused", use_cpu=True, report_to="none", **arguments)


class Rates(TrainerCallback):
    """The learning rate that each optimiser step used."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (3, 3)])
def test_the_trainer_follows_the_schedule_whatever_the_batch(tmp_path, batch, accumulation):
    data, seen = digits(0, 48), Rates()
    trainer = make_trainer(
        tmp_path, timm_cnn(), data, callbacks=[seen], per_device_train_batch_size=batch, num_train_epochs=4, max_steps=-1,
        gradient_accumulation_steps=accumulation, learning_rate=0.1, lr_scheduler_type="multistep",
        lr_scheduler_kwargs={"milestones": [1, 3], "gamma": 0.1}, optim="sgd", optim_args="momentum=0.9",
    )  # fmt: skip
    trainer.train()
    steps = math.ceil(math.ceil(48 / batch) / accumulation)
    assert seen.rates == pytest.approx([0.1] * steps + [0.01] * 2 * steps + [0.001] * steps)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "expected"),
    [
        ("reduce_lr_on_plateau", {"threshold": 9.0, "threshold_mode": "abs"}, [1, 1, 0.5, 0.25]),
        ("greedy", {"min_lr": 0, "threshold": 9.0}, [1, 2, 1, 0.5]),  # the first one is better than none
    ],
)
def test_schedules_that_follow_the_evaluations_read_their_arguments(tmp_path, scheduler, arguments, expected):
    # No evaluation is better than the one before by 9, so that the rate is halved at each but the first.
    seen = Rates()
    make_trainer(
        tmp_path, timm_cnn(), digits(0, 64), digits(64, 80), callbacks=[seen], max_steps=4, learning_rate=0.01,
        eval_strategy="steps", eval_steps=1, lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=arguments | {"factor": 0.5, "patience": 0},
    ).train()  # fmt: skip
    assert seen.rates == pytest.approx([0.01 * factor for factor in expected])


@pytest.mark.parametrize("scheduler", list(SchedulerType))
def test_every_schedule_of_transformers_takes_what_it_reads(scheduler):
    arguments = {
        "cosine_with_restarts": {"num_cycles": 2},
        "polynomial": {"lr_end": 1e-6, "power": 2.0},
        "inverse_sqrt": {"timescale": 10},
        "cosine_with_min_lr": {"min_lr": 1e-5},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 3, "decay_type": "linear"},
        "reduce_lr_on_plateau": {"factor": 0.5, "patience": 2, "min_lr": [0.0, 1e-6]},
        "greedy": {"smooth": True, "window_size": 5, "min_lr": 0},
    }.get(scheduler.value, {})
    args = DistillationTrainingArguments(
        "unused", use_cpu=True, report_to="none", eval_strategy="epoch", lr_scheduler_type=scheduler.value,
        lr_scheduler_kwargs=arguments,
    )  # fmt: skip
    assert args.lr_scheduler_type == scheduler
    assert (args.lr_scheduler_kwargs or {}) == arguments


def test_a_resumed_run_follows_the_schedule_and_the_average_bit_for_bit(tmp_path):
    def run(folder, resume=None, **kwargs):
        seen = Rates()
        trainer = make_trainer(
            folder, timm_deit(drop_path=0.1), digits(0, 64), digits(64, 96), callbacks=[seen], max_steps=-1,
            num_train_epochs=3, distillation_loss=USKDLoss(32, 10), lr_scheduler_type="cosine_by_epoch",
            lr_scheduler_kwargs={"warmup_epochs": 1, "warmup_factor": 1e-3, "min_lr": 1e-5}, ema_decay=0.9, **kwargs,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen.rates

    whole, rates = run(tmp_path / "whole", save_strategy="steps", save_steps=5)
    resumed, last_rates = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-5"))
    assert last_rates == rates[5:]
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="was saved with ema_decay"):
        make_trainer(tmp_path / "other", timm_deit(), digits(0, 64), distillation_loss=USKDLoss(32, 10)).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5")
        )


class Weights(TrainerCallback):
    def __init__(self):
        self.history = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.history.append(copy.deepcopy(model.student.state_dict()))


def test_the_average_is_evaluated_and_saved(tmp_path):
    seen, evaluation = Weights(), digits(64, 96)
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 64), evaluation, callbacks=[seen], max_steps=5, learning_rate=0.05, ema_decay=0.6,
        distillation_loss=USKDLoss(32, 10), save_strategy="steps", save_steps=5,
    )  # fmt: skip
    trainer.train()
    expected = seen.history[0]
    for weights in seen.history[1:]:
        for name, value in weights.items():
            parameter = value.is_floating_point() and "running" not in name
            expected[name] = 0.6 * expected[name] + 0.4 * value if parameter else value
    state = trainer.student.state_dict()
    assert not torch.equal(state["timm_model.fc.weight"], trainer.model.student.state_dict()["timm_model.fc.weight"])
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=name)

    trainer.save_model(tmp_path / "student")
    reopened = [
        AutoModelForImageClassification.from_pretrained(tmp_path / folder).eval()
        for folder in ("student", "checkpoint-5")
    ]
    pixels = torch.stack([sample["pixel_values"] for sample in evaluation])
    with torch.no_grad():
        logits = trainer.student.eval()(pixels).logits
        for student in reopened:
            torch.testing.assert_close(student(pixels).logits, logits)
    labels = torch.tensor([sample["labels"] for sample in evaluation])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )
    # The unaveraged weights and the head are for going on from the checkpoint; the student is alone.
    assert (tmp_path / "checkpoint-5" / "unaveraged_student.safetensors").is_file()
    assert not list((tmp_path / "student").glob("*unaveraged*"))


def test_batch_norm_is_estimated_on_training_images_before_an_evaluation(tmp_path):
    train = digits(0, 64)
    trainer = make_trainer(
        tmp_path, timm_cnn(), train, digits(64, 96), max_steps=3, eval_strategy="steps", eval_steps=3,
        precise_bn_images=64, per_device_train_batch_size=64, distillation_loss=NKDLoss(), teacher=timm_cnn(seed=1),
    )  # fmt: skip
    trainer.train()
    network = trainer.student.timm_model
    # The first norm sees the first convolution's output alone: its statistics can be computed from all images at once.
    with torch.no_grad():
        outputs = network.conv1(torch.stack([sample["pixel_values"] for sample in train]))
    torch.testing.assert_close(network.bn1.running_mean, outputs.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.bn1.running_var, outputs.var(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert network.bn1.momentum == 0.1


def test_the_best_model_keeps_the_statistics_that_it_was_evaluated_with(tmp_path):
    def trainer():
        # The worst for the best: an earlier step than the last.
        return make_trainer(
            tmp_path / "run", timm_cnn(), digits(0, 64), digits(64, 96), max_steps=4, eval_strategy="steps", eval_steps=1,
            save_strategy="steps", save_steps=1, per_device_train_batch_size=32, precise_bn_images=32,
            load_best_model_at_end=True, greater_is_better=True, learning_rate=0.5, optim="sgd",
        )  # fmt: skip

    first, second = trainer(), trainer()
    first.train()
    best = max((e for e in first.state.log_history if "eval_loss" in e), key=lambda entry: entry["eval_loss"])
    assert best["step"] < 4
    assert first.evaluate()["eval_loss"] == best["eval_loss"]
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert second.evaluate()["eval_loss"] == best["eval_loss"]
    states = zip(first.student.state_dict().values(), second.student.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in states)


def test_estimating_batch_norm_changes_nothing_else(tmp_path):
    model, accelerator = timm_cnn(), make_trainer(tmp_path, timm_cnn()).accelerator
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.eval()
    collate = torch.utils.data.default_collate
    for _ in range(2):
        estimate_batch_norm(
            model, digits(0, 40), 40, accelerator, key=(0, 1), batch_size=8, collate_fn=collate, num_workers=0
        )
        first = copy.deepcopy(model.state_dict())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("running" in name or "num_batches" in name for name in changed)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    without = timm_deit()
    before = copy.deepcopy(without.state_dict())
    estimate_batch_norm(without, digits(0, 8), 8, accelerator, key=(0, 1), batch_size=8, collate_fn=collate)
    assert all(torch.equal(value, before[name]) for name, value in without.state_dict().items())


def groups(trainer):
    trainer.create_optimizer()
    return {group["weight_decay"]: len(group["params"]) for group in trainer.optimizer.param_groups}


@pytest.mark.parametrize("student", [timm_deit, native_vit])
def test_weight_decay_spares_norms_biases_tokens_and_positions(tmp_path, student):
    model = student()
    trainer = make_trainer(
        tmp_path, model, weight_decay=0.05, no_weight_decay=["norm", "bias", "embedding"],
        distillation_loss=USKDLoss(32, 10),
    )  # fmt: skip
    decayed = trainer.get_decay_parameter_names(trainer.model)
    # What is left are the matrices: patches, attention, MLP, and both heads.
    assert {name for name in decayed if name.startswith("losses")} == {"losses.distillation.head.weight"}
    assert {name.removeprefix("student.") for name in decayed if name.startswith("student")} == {
        name
        for name, p in model.named_parameters()
        if p.ndim > 1 and not name.endswith(("cls_token", "pos_embed", "position_embeddings"))
    }
    assert groups(trainer) == {0.05: len(decayed), 0.0: len(list(trainer.model.parameters())) - len(decayed)}


def test_weight_decay_of_swin_spares_what_timm_names():
    network = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1,) * 4)
    expected = param_groups_weight_decay(network, 0.05, no_weight_decay_list=network.no_weight_decay())
    decayed = decayed_parameters(network, ["norm", "bias", "embedding"])
    parameters = dict(network.named_parameters())
    assert {id(parameters[name]) for name in decayed} == {id(p) for p in expected[1]["params"]}


# Names in models of timm.
EMBEDDINGS = {
    "crossvit_tiny_240": ["cls_token_0", "pos_embed_1"],
    "tnt_s_patch16_224": ["cls_token", "patch_pos", "pixel_pos"],
    "visformer_tiny": ["pos_embed1", "pos_embed2", "pos_embed3"],
    "coat_tiny": ["cls_token1", "cls_token4"],
    "levit_128s": ["stages.0.blocks.0.attn.attention_biases"],
    "tiny_vit_5m_224": ["stages.1.blocks.0.attn.attention_biases"],
    "samvit_base_patch16_224": ["blocks.0.attn.rel_pos_h", "blocks.0.attn.rel_pos_w"],
    "sequencer2d_s": [
        "stages.0.blocks.0.rnn_tokens.rnn_v.bias_hh_l0",
        "stages.0.blocks.0.rnn_tokens.rnn_v.bias_ih_l0_reverse",
    ],
    "botnet26t_256": ["stages.2.1.self_attn.pos_embed.height_rel"],
    "vit_base_patch16_siglip_224": ["pos_embed", "attn_pool.latent"],
    "vit_relpos_small_patch16_224": ["blocks.0.attn.rel_pos.mlp.fc1.bias", "blocks.0.ls1.gamma"],
    "swinv2_tiny_window8_256": ["layers.0.blocks.0.attn.logit_scale", "layers.0.blocks.0.attn.cpb_mlp.0.weight"],
    "cait_xxs24_224": ["cls_token", "pos_embed", "blocks.0.gamma_1"],
    "resmlp_12_224": ["blocks.0.norm1.alpha", "blocks.0.ls1"],
    "convnextv2_atto": ["stages.0.blocks.0.mlp.grn.weight"],
    "beit_base_patch16_224": ["cls_token", "blocks.0.attn.q_bias", "blocks.0.attn.relative_position_bias_table"],
    "twins_svt_small": ["pos_block.0.proj.0.weight"],
}
# What a model keeps from decay, and which of its parameters are matrices all the same.
KEPT_MATRICES = ("cpb_mlp", "pos_block")


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_weight_decay_spares_what_timms_models_learn_beside_matrices(name):
    with torch.device("meta"):
        network = timm.create_model(name)
    parameters = dict(network.named_parameters())
    decayed = set(decayed_parameters(network, ["norm", "bias", "embedding"]))
    assert set(EMBEDDINGS[name]) <= parameters.keys() - decayed
    matrices = (torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.LSTM)
    expected = {
        f"{module_name}.{leaf}"
        for module_name, module in network.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if isinstance(module, matrices)
        and "bias" not in leaf
        and not any(kept in module_name for kept in KEPT_MATRICES)
    }
    assert decayed == expected


TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("config", "spared"),
    [
        (CLIPConfig(vision_config=TINY), ["class_embedding", "position_embedding.weight"]),
        (SiglipConfig(vision_config=TINY), ["position_embedding.weight", "probe"]),
        (Dinov2Config(**TINY), ["cls_token", "mask_token", "position_embeddings", "layer_scale1.lambda1"]),
        (
            DeiTConfig(**TINY, architectures=["DeiTForImageClassificationWithTeacher"]),
            ["cls_token", "distillation_token", "position_embeddings"],
        ),
        (
            LevitConfig(hidden_sizes=[16, 32, 64], architectures=["LevitForImageClassification"]),
            ["attention_biases"],
        ),
        (Swinv2Config(embed_dim=16, depths=[1, 1], num_heads=[2, 2]), ["logit_scale"]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_weight_decay_spares_what_transformers_models_learn_beside_matrices(config, spared):
    network = AutoModelForImageClassification.from_config(config)
    decayed = decayed_parameters(network, ["norm", "bias", "embedding"])
    for ending in spared:
        names = [name for name, _ in network.named_parameters() if name.endswith(ending)]
        assert names
        assert not set(names) & set(decayed), ending
    parameters = dict(network.named_parameters())
    assert {parameters[name].ndim for name in decayed} <= {2, 4}
    assert sum(parameters[name].numel() for name in decayed) > 0.5 * sum(p.numel() for p in parameters.values())


def test_weight_decay_of_one_kind_spares_no_other():
    with torch.device("meta"):
        network = timm.create_model("cait_xxs24_224")
    parameters = dict(network.named_parameters())
    spared = {kind: parameters.keys() - set(decayed_parameters(network, [kind])) for kind in NO_DECAY_KINDS}
    assert spared["embedding"] == {"cls_token", "pos_embed"}
    assert all(name.endswith("bias") for name in spared["bias"])
    assert {name.rpartition(".")[2] for name in spared["norm"]} == {"weight", "bias", "gamma_1", "gamma_2"}
    assert spared["norm"] & spared["bias"] == {name for name in spared["bias"] if "norm" in name}


def test_weight_decay_of_norms_alone_and_of_everything(tmp_path):
    model = timm_cnn()
    num_norms = sum(2 for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    num_parameters = len(list(model.parameters()))
    trainer = make_trainer(tmp_path, model, weight_decay=4e-5, no_weight_decay=["norm"])
    assert groups(trainer) == {4e-5: num_parameters - num_norms, 0.0: num_norms}
    assert "student.timm_model.fc.bias" in trainer.get_decay_parameter_names(trainer.model)
    assert groups(make_trainer(tmp_path, timm_cnn(), weight_decay=1e-4, no_weight_decay=[])) == {
        1e-4: num_parameters,
        0.0: 0,
    }


@pytest.mark.parametrize(("split", "process", "globally"), [(False, 16, 16 * 4 * 3), (True, 4, 16 * 3)])
def test_the_global_batch_counts_a_batch_that_processes_split_once(tmp_path, split, process, globally):
    args = DistillationTrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, gradient_accumulation_steps=3, use_cpu=True, report_to="none",
        accelerator_config={"split_batches": split},
    )  # fmt: skip
    assert (args.process_batch_size(num_processes=4), args.global_batch_size(num_processes=4)) == (process, globally)
    assert args.global_batch_size(8, num_processes=4) == globally // 2  # auto_find_batch_size halves it


def test_the_learning_rate_is_scaled_to_the_global_batch_and_said(tmp_path, caplog):
    seen = Rates()
    arguments = {
        "learning_rate": 0.1,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
    }
    with caplog.at_level(logging.WARNING, logger="nkd_hf.trainer.learning_rate"):
        trainer = make_trainer(tmp_path, timm_cnn(), digits(0, 64), callbacks=[seen], base_batch_size=256, **arguments)
        trainer.train()
    assert seen.rates == pytest.approx([0.1 * 32 / 256])
    assert trainer.args.learning_rate == 0.1
    assert "global batch of 256 (base_batch_size), and this run's is 32: it is scaled to 0.0125" in caplog.text
    caplog.clear()
    trainer = make_trainer(tmp_path, timm_cnn(), digits(0, 64), callbacks=[seen], base_batch_size=32, **arguments)
    trainer.train()
    assert seen.rates[1:] == [0.1]
    assert "scaled" not in caplog.text


def test_training_again_starts_at_the_full_rate(tmp_path):
    seen = Rates()
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 64), callbacks=[seen], max_steps=-1, num_train_epochs=4, learning_rate=1e-3,
        lr_scheduler_type="cosine_by_epoch", lr_scheduler_kwargs={"min_lr": 1e-5}, base_batch_size=32,
    )  # fmt: skip
    trainer.train()
    first, seen.rates = seen.rates, []
    trainer.train()
    assert seen.rates == first
    assert first[0] == pytest.approx(5e-4)
    assert first[-1] < 1e-4


def test_a_batch_that_is_found_scales_the_rate(tmp_path, monkeypatch, caplog):
    seen = Rates()
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 64), callbacks=[seen], per_device_train_batch_size=32, auto_find_batch_size=True,
        base_batch_size=32, learning_rate=0.1, max_steps=2, lr_scheduler_type="constant",
    )  # fmt: skip
    compute_loss = trainer.compute_loss

    def of_small_batches(model, inputs, *args, **kwargs):
        if len(inputs["labels"]) > 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", of_small_batches)
    with caplog.at_level(logging.WARNING, logger="nkd_hf.trainer.learning_rate"):
        trainer.train()
    assert trainer._train_batch_size < 32
    assert seen.rates == pytest.approx([0.1 * trainer._train_batch_size / 32] * 2)
    assert f"this run's is {trainer._train_batch_size}" in caplog.text


def test_the_floor_is_scaled_with_the_rate(tmp_path):
    seen = Rates()
    make_trainer(
        tmp_path, timm_cnn(), digits(0, 64), callbacks=[seen], max_steps=-1, num_train_epochs=10, learning_rate=1e-3,
        lr_scheduler_type="cosine_by_epoch", lr_scheduler_kwargs={"min_lr": 1e-4}, base_batch_size=1600,
    ).train()  # fmt: skip
    assert seen.rates == sorted(seen.rates, reverse=True)
    assert seen.rates[0] == pytest.approx(1e-5)
    assert 1e-6 < seen.rates[-1] < 2e-6


def by_hand(parameters):
    return torch.optim.SGD(parameters, lr=1e-2)


def test_an_optimizer_without_the_layers_of_the_loss_is_refused(tmp_path):
    student, loss = timm_cnn(), USKDLoss(32, 10)
    args = make_trainer(tmp_path, timm_cnn()).args
    kwargs = {"distillation_loss": loss, "args": args, "train_dataset": digits(0, 32)}
    message = (
        r"must train the loss's own layers, got one without losses.distillation.head.weight, losses.distillation.head"
    )
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(student, optimizers=(by_hand(student.parameters()), None), **kwargs)
    with pytest.raises(ValueError, match="must train the student, got one with parameters of another model"):
        DistillationTrainer(
            student, optimizers=(by_hand([*timm_cnn().parameters(), *loss.parameters()]), None), **kwargs
        )

    whole = [*student.parameters(), *loss.parameters()]
    scheduler = torch.optim.lr_scheduler.StepLR(by_hand(whole), 1)
    with pytest.raises(ValueError, match="scheduler must be one of the optimizer that trains"):
        DistillationTrainer(student, optimizers=(by_hand(whole), scheduler), **kwargs)
    with pytest.raises(ValueError, match="scheduler must be one of the optimizer that trains"):
        DistillationTrainer(student, optimizers=(None, scheduler), **kwargs).train()

    class Own(DistillationTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = by_hand(self.student.parameters())
            return self.optimizer

    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=message):
        Own(student, **kwargs).train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_an_optimizer_by_hand_that_has_all_trains_all(tmp_path):
    student, loss = timm_cnn(), USKDLoss(32, 10)
    for parameter in student.timm_model.conv1.parameters():
        parameter.requires_grad_(False)
    frozen, head = student.timm_model.conv1.weight.clone(), loss.head.weight.clone()
    last = student.timm_model.fc.weight.clone()
    args = make_trainer(tmp_path, timm_cnn()).args
    kwargs = {"distillation_loss": loss, "args": args, "train_dataset": digits(0, 64)}
    # A layer that a user left out is frozen, as by requires_grad.
    parameters = [*student.timm_model.fc.parameters(), *loss.parameters()]
    optimizer = by_hand(parameters)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    DistillationTrainer(student, optimizers=(optimizer, scheduler), **kwargs).train()
    assert optimizer.param_groups[0]["lr"] < 1e-5
    assert not torch.equal(loss.head.weight, head)
    assert not torch.equal(student.timm_model.fc.weight, last)
    head = loss.head.weight.clone()
    DistillationTrainer(student, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}), **kwargs).train()
    assert not torch.equal(loss.head.weight, head)
    assert torch.equal(student.timm_model.conv1.weight, frozen)


def test_a_last_batch_of_one_image_is_refused_before_training(tmp_path):
    student = timm_cnn()
    before = copy.deepcopy(student.state_dict())
    message = (
        "last batch of an epoch must have at least 2 images, got 1: 33 images in batches of 16.*dataloader_drop_last"
    )
    trainer = make_trainer(tmp_path, student, digits(0, 33))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    with pytest.raises(ValueError, match="per_device_train_batch_size must be at least 2 for this model, got 1"):
        make_trainer(tmp_path, timm_cnn(), digits(0, 32), per_device_train_batch_size=1).train()
    # Of the loss, not of the student.
    loss = USKDLoss(32, 10, feature_norm=torch.nn.BatchNorm1d(32))
    trainer = make_trainer(tmp_path, timm_deit(), digits(0, 33), distillation_loss=loss)
    with pytest.raises(ValueError, match="33 images in batches of 16"):
        trainer.train()


@pytest.mark.parametrize(
    ("student", "samples", "arguments"),
    [
        (timm_cnn, 33, {"dataloader_drop_last": True}),
        (timm_cnn, 33, {"max_steps": 2}),  # the last batch isn't reached
        (timm_cnn, 34, {}),
        (timm_deit, 33, {}),
        (timm_deit, 32, {"per_device_train_batch_size": 1}),
    ],
)
def test_batches_that_can_be_trained_on_are_trained_on(tmp_path, student, samples, arguments):
    trainer = make_trainer(tmp_path, student(), digits(0, samples), **arguments)
    trainer.train()
    assert trainer.state.global_step == arguments.get("max_steps", 4)


def test_one_image_whose_maps_have_more_pixels_is_trained_on_as_if_nothing_had_been_tried(tmp_path):
    """BatchNorm has statistics of one image where the maps are larger than one pixel."""

    def run(monkeypatched=False):
        images = [
            sample | {"pixel_values": torch.nn.functional.interpolate(sample["pixel_values"][None], 64)[0]}
            for sample in digits(0, 17)
        ]
        trainer = make_trainer(tmp_path, timm_cnn(), images, max_steps=4)
        if monkeypatched:
            trainer.check_batches = lambda *args: None
        trainer.train()
        return trainer

    trained, untried = run(), run(monkeypatched=True)
    assert trained.state.log_history[0]["loss"] == untried.state.log_history[0]["loss"]
    for name, value in untried.model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("num_images", "processes", "arguments", "num_devices", "expected"),
    [
        (33, 1, {}, 1, 1),
        (33, 1, {"drop_last": True}, 1, 16),
        (32, 1, {}, 1, 16),
        (5, 1, {}, 1, 5),
        (33, 2, {}, 1, 16),  # filled up with the first images
        (33, 2, {"even_batches": False}, 1, 1),
        (33, 2, {"split_batches": True}, 1, 8),
        (41, 2, {"even_batches": False, "split_batches": True}, 1, 1),
        (32 + 5, 1, {}, 4, 1),  # DataParallel: 2, 2, 1
        (32 + 8, 1, {}, 4, 2),
    ],
)
def test_the_smallest_batch_is_that_of_the_loader(num_images, processes, arguments, num_devices, expected):
    drop_last = arguments.pop("drop_last", False) if (arguments := dict(arguments)) else False
    loader = torch.utils.data.DataLoader(range(num_images), 16, drop_last=drop_last)
    loaders = [
        prepare_data_loader(loader, num_processes=processes, process_index=rank, **arguments)
        for rank in range(processes)
    ]
    assert {smallest_batch(loader, num_devices) for loader in loaders} == {expected}
    batches = [chunk for loader in loaders for batch in loader for chunk in batch.chunk(num_devices)]
    assert min(map(len, batches)) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("multistep", {"milestones": [2, 4]}, "milestones=[2, 4] is not reached in a run of 4 epochs"),
        ("cosine_by_epoch", {"warmup_epochs": 9}, "warmup_epochs=9 is not reached in a run of 4 epochs"),
        ("constant_then_linear", {"constant_steps": 40}, "constant_steps=40 is not reached in a run of 40 steps"),
        ("multistep", {"milestones": [2, 3]}, None),
    ],
)
def test_a_schedule_that_is_longer_than_the_run_is_said(caplog, name, arguments, said):
    lr_factor(name, 40, 4, 0.1, arguments)
    assert caplog.messages == ([] if said is None else [f"lr_scheduler_kwargs: {said}."])
