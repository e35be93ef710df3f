import contextlib
import json
import math
import os
import re
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import yaml
from timm.optim import param_groups_weight_decay
from tiny import digits, make_trainer, native_resnet, timm_cnn, timm_deit

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, RecipeArguments, USKDLoss
from nkd_hf.cli import main
from nkd_hf.cli.plan_text import format_plan
from nkd_hf.recipe.plan_costs import count_activation_bytes

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
# A small student on 37 images.
TINY = {
    "student": "resnet18",
    "student_args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]},
    "num_classes": 10,
    "image_size": 32,
    "distillation_loss": "uskd",
    "num_processes": 1,
    "num_train_images": 37,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def nothing_written(tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not list(folder.iterdir())


@pytest.fixture
def plan(tmp_path, capsys):
    """The plan of a row, or of `TINY`, with other settings; None takes one away."""

    def run(row=None, **settings):
        settings = TINY | settings if row is None else {"base": str(CONFIGS / f"{row}.yaml")} | settings
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
        capsys.readouterr()
        main(["plan", "--config", str(config), "--json"])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def error(plan, capsys):
    def run(*args, **settings):
        with pytest.raises(SystemExit) as exit_info:
            plan(*args, **settings)
        output = capsys.readouterr()
        assert exit_info.value.code == 2
        assert output.out == ""
        assert len(output.err.splitlines()) == 1
        return output.err

    return run


def multistep(milestones, start, gamma):
    return lambda epoch: start * gamma ** sum(epoch >= milestone for milestone in milestones)


def shufflenet(epoch):
    step = 1252 * epoch
    return 0.05 if step < 5000 else 0.5 * (1 - (step - 5000) / (300 * 1252 - 5000))


def regnet(epoch):
    return 0.08 + 0.18 * epoch if epoch < 5 else 0.8 * (1 + math.cos(math.pi * (epoch - 5) / 95)) / 2


def transformer(epoch):
    if epoch < 20:
        return 1e-6 + (1e-3 - 1e-6) * 1252 * epoch / (20 * 1252 - 1)
    return 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * (epoch - 20) / 280)) / 2


IMAGENET_LR = multistep([30, 60, 90], 0.1, 0.1)
CIFAR_LR = multistep([60, 120, 160], 0.1, 0.2)
ROWS = [
    # row, parameters of student and teacher, tap, batch, steps an epoch, epochs, rates, parameters of the head
    ("nkd_resnet34_resnet18", 11_689_512, 21_797_672, None, 256, 5005, 100, IMAGENET_LR, 0),
    ("nkd_resnet50_mobilenet", 4_231_976, 25_557_032, None, 256, 5005, 100, IMAGENET_LR, 0),
    ("nkd_deit3-small_deit-tiny", 5_717_416, 22_059_496, None, 1024, 1252, 300, transformer, 0),
    ("nkd_cifar100_resnet34_resnet18", 11_220_132, 21_328_292, None, 128, 391, 200, CIFAR_LR, 0),
    ("uskd_resnet18", 11_689_512, None, ("timm_model.layer3", 256), 256, 5005, 100, IMAGENET_LR, 257_000),
    ("uskd_mobilenetv2", 3_504_872, None, ("timm_model.blocks.6", 320), 256, 5005, 300, None, 321_000),
    ("uskd_shufflenetv2", 2_278_604, None, ("shufflenet.stage4", 464), 1024, 1252, 300, shufflenet, 465_000),
    ("uskd_regnetx-1.6gf", 9_190_136, None, ("timm_model.s3", 408), 1024, 1252, 100, regnet, 409_000),
    ("uskd_swin-tiny", 28_288_354, None, ("timm_model.layers.2", 384), 1024, 1252, 300, transformer, 385_768),
    ("uskd_deit-tiny", 5_717_416, None, ("timm_model.blocks.5", 192), 1024, 1252, 300, transformer, 193_000),
]


@pytest.mark.parametrize(("row", "student", "teacher", "tap", "batch", "steps", "epochs", "lr", "head"), ROWS)
def test_rows(plan, row, student, teacher, tap, batch, steps, epochs, lr, head):
    figures = plan(row)
    assert figures["student"]["parameters"] == student
    assert (figures["teacher"] and figures["teacher"]["parameters"]) == teacher
    assert (figures["tap"] and (figures["tap"]["module"], figures["tap"]["channels"])) == tap
    assert figures["global_batch_size"] == batch
    assert figures["steps_per_epoch"] == steps
    assert figures["num_steps"] == steps * epochs
    lr = lr or (lambda epoch: 0.045 * 0.98**epoch)
    assert figures["lr_by_epoch"] == pytest.approx([lr(epoch) for epoch in range(epochs)])
    assert figures["loss_parameters"] == head
    assert figures["decayed_parameters"] + figures["undecayed_parameters"] == student + head
    assert figures["notes"] == []


@pytest.mark.slow
@pytest.mark.parametrize("row", [path.stem for path in CONFIGS.glob("*.yaml") if "digits" not in path.stem])
def test_every_row(plan, row):
    figures = plan(row)
    assert len(figures["lr_by_epoch"]) == figures["epochs"]
    assert figures["notes"] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    # timm says 1.82 and 0.58: it counts normalisation and activation as well.
    [("resnet18", 1.814), ("mobilenetv1_100", 0.569)],
)
def test_gmacs(plan, name, expected):
    student = plan(student=name, student_args=None, num_classes=1000, image_size=224)["student"]
    assert student["gmacs"] == pytest.approx(expected, abs=1e-3)


def test_gmacs_of_attention(plan):
    args = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    gmacs = plan(student="deit_tiny_patch16_224", student_args=args)["student"]["gmacs"]
    tokens, width = 17, 32
    block = tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width
    assert gmacs * 1e9 == 16 * (8 * 8 * 3) * width + 4 * block + width * 10


@pytest.mark.parametrize(
    ("no_weight_decay", "undecayed", "tensors"),
    # ResNet-18 has 20 BatchNorms with 4800 channels in all, and 1000 biases in its head.
    [([], 0, 0), (["norm"], 9_600, 40), (["norm", "bias"], 10_600, 41), (None, 5_800, 21)],
)
def test_groups_of_a_cnn(plan, no_weight_decay, undecayed, tensors):
    overrides = {"student_args": None, "num_classes": 1000, "distillation_loss": "none", "weight_decay": 1e-4}
    figures = plan(no_weight_decay=no_weight_decay, **overrides)
    assert figures["undecayed_parameters"] == undecayed
    assert figures["decayed_parameters"] == 11_689_512 - undecayed
    decay, no_decay = figures["optimizer_groups"]
    assert decay["weight_decay"] == 1e-4
    assert no_decay == {"weight_decay": 0.0, "tensors": tensors, "parameters": undecayed, "loss_parameters": 0}
    assert decay["tensors"] + tensors == 62


@pytest.mark.parametrize(
    ("row", "name"), [("uskd_deit-tiny", "deit_tiny_patch16_224"), ("uskd_swin-tiny", "swin_tiny_patch4_window7_224")]
)
def test_groups_of_a_transformer(plan, row, name):
    with torch.device("meta"):
        model = timm.create_model(name)
    names = model.no_weight_decay()
    if "swin" in name:
        names = {name for name, _ in model.named_parameters() if "relative_position_bias_table" in name}
    for ours, timms in zip(
        plan(row)["optimizer_groups"],
        sorted(
            param_groups_weight_decay(model, 0.05, no_weight_decay_list=names),
            key=lambda group: -group["weight_decay"],
        ),
        strict=True,
    ):
        assert ours["weight_decay"] == timms["weight_decay"]
        assert ours["parameters"] - ours["loss_parameters"] == sum(p.numel() for p in timms["params"])


@pytest.mark.parametrize(
    ("overrides", "steps_per_epoch", "num_steps", "rates"),
    [
        ({}, 10, 30, 3),
        ({"num_processes": 3}, 4, 12, 3),
        ({"num_processes": 3, "gradient_accumulation_steps": 3}, 2, 6, 3),
        ({"num_processes": 4, "dataloader_drop_last": True}, 2, 6, 3),
        ({"num_processes": 2, "accelerator_config": {"split_batches": True}}, 10, 30, 3),
        ({"num_train_epochs": 2.55}, 10, 26, 3),
        ({"max_steps": 12}, 10, 12, 2),
        ({"max_train_samples": 8}, 2, 6, 3),
        ({"streaming": True}, 28 / 3, 28, 3),
        ({"streaming": True, "max_steps": 12}, 28 / 3, 12, 2),
    ],
)
def test_steps(plan, overrides, steps_per_epoch, num_steps, rates):
    figures = plan(lr_scheduler_type="exponential_by_epoch", lr_scheduler_kwargs={"gamma": 0.5}, **overrides)
    assert figures["steps_per_epoch"] == pytest.approx(steps_per_epoch)
    assert figures["num_steps"] == num_steps
    assert figures["epochs"] == pytest.approx(
        num_steps / steps_per_epoch if "max_steps" in overrides else overrides.get("num_train_epochs", 3)
    )
    assert len(figures["lr_by_epoch"]) == rates


def test_an_epoch_begins_with_the_same_step_whatever_floats_say(plan):
    # 21 steps / 1.4 epochs is 15.000000000000002.
    figures = plan(
        streaming=True, num_train_images=60, num_train_epochs=1.4, learning_rate=0.21, lr_scheduler_type="linear"
    )
    assert figures["num_steps"] == 21
    assert figures["lr_by_epoch"] == pytest.approx([0.21, 0.06])


def test_as_the_trainer_does(plan, tmp_path):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 0.01,
        "base_batch_size": 16,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 0.001},
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "ema_decay": 0.9,
    }
    figures = plan(num_train_images=38, student_args={"channels": [8, 16, 32, 64]}, **settings)
    loss = USKDLoss(figures["tap"]["channels"], 10)
    trainer = make_trainer(
        tmp_path / "run", timm_cnn(), digits(0, 38), distillation_loss=loss, max_steps=-1, **settings
    )
    trainer.train()

    assert trainer.state.max_steps == figures["num_steps"] == 15
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert figures["lr_by_epoch"] == pytest.approx([rates[0], rates[5], rates[10]])
    assert "scaled to 0.005" in figures["notes"][0]
    for group, expected in zip(figures["optimizer_groups"], trainer.optimizer.param_groups, strict=True):
        assert group["weight_decay"] == expected["weight_decay"]
        assert group["tensors"] == len(expected["params"])
        assert group["parameters"] == sum(parameter.numel() for parameter in expected["params"])
    checkpoint = tmp_path / "run" / "checkpoint-15"
    files = [*checkpoint.glob("*.safetensors"), checkpoint / "optimizer.pt"]
    written = sum(file.stat().st_size for file in files)
    assert figures["disk"]["checkpoint"] <= written < 1.2 * figures["disk"]["checkpoint"]
    assert figures["disk"]["num_checkpoints"] == 2


@pytest.mark.parametrize("scheduler", ["linear", "constant", "cosine", "inverse_sqrt", "constant_with_warmup"])
def test_schedules_of_transformers(plan, scheduler):
    rates = plan(lr_scheduler_type=scheduler, learning_rate=0.1)["lr_by_epoch"]
    assert rates[0] == 0.1
    assert len(rates) == 3
    if scheduler == "linear":
        assert rates == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_a_schedule_that_follows_the_evaluations(plan):
    figures = plan(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    assert figures["lr_by_epoch"] is None
    assert "cannot be planned" in figures["notes"][0]


@pytest.mark.parametrize(
    ("num_classes", "multiplier", "noted"), [(10, 100, True), (10, 10, False), (1000, 100, False)]
)
def test_a_loss_whose_settings_do_not_suit_the_classes(plan, num_classes, multiplier, noted):
    figures = plan(distillation_loss="tfkd", loss_args={"multiplier": multiplier}, num_classes=num_classes)
    assert any("Set loss_args multiplier to the number of classes, 10" in note for note in figures["notes"]) == noted


def test_disk_and_memory(plan):
    parameters, head = 11_689_512, 257_000
    student = 4 * (parameters + 2 * 4800) + 20 * 8  # with BatchNorm's running statistics and counters
    figures = plan("uskd_resnet18")
    checkpoint = student + 4 * head + 4 * (parameters + head)  # SGD with momentum
    disk = {
        "checkpoint": checkpoint,
        "num_checkpoints": 3,
        "checkpoints": 3 * checkpoint,
        "models": student,
        "teacher": 0,
    }
    assert figures["disk"] == disk | {"total": 3 * checkpoint + student}
    memory = figures["memory"]
    assert memory["weights"] == student + 4 * head
    assert memory["gradients"] == memory["optimizer_state"] == 4 * (parameters + head)
    assert memory["pixels"] == 4 * 32 * 3 * 224 * 224
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")

    overrides = {
        "optim": "adamw_torch",
        "optim_args": "",
        "ema_decay": 0.99,
        "compare_with_baseline": True,
        "save_total_limit": 1,
    }
    figures = plan("uskd_resnet18", **overrides)
    assert figures["runs"] == ["baseline", "student"]
    assert figures["memory"]["moving_average"] == student
    assert figures["memory"]["optimizer_state"] == pytest.approx(8 * (parameters + head), rel=1e-4)
    baseline, distilled = 2 * student + 8 * parameters, 2 * student + 4 * head + 8 * (parameters + head)
    # One of each is kept, and one of the students is being written.
    assert figures["disk"]["checkpoints"] == pytest.approx(baseline + 2 * distilled, rel=1e-4)
    assert figures["disk"]["models"] == 2 * student

    figures = plan("uskd_resnet18", **overrides, save_only_model=True)
    assert figures["disk"]["checkpoint"] == pytest.approx(2 * student + 4 * head, rel=1e-4)

    assert plan("uskd_resnet18", save_strategy="no")["disk"]["checkpoints"] == 0
    assert plan("uskd_resnet18", activation_checkpointing=True)["memory"]["activations"] is None


@pytest.mark.parametrize("create", [timm_cnn, timm_deit, native_resnet])
@pytest.mark.parametrize("half", [False, True])
def test_activations_are_a_lower_bound(create, half):
    with torch.device("meta"):
        planned = count_activation_bytes(create(), torch.empty(4, 3, 32, 32), 2 if half else 4)
    student, pixel_values = create().train(), torch.randn(4, 3, 32, 32)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        logits = student(pixel_values).logits
    for tensor in (*student.parameters(), *student.buffers(), pixel_values):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert logits.requires_grad
    assert 0 < planned <= sum(kept.values())
    if not half and create is not timm_deit:  # whose attention is counted with what all kernels keep
        assert planned == sum(kept.values())


def test_settings_of_other_machines(plan, monkeypatch):
    expected = plan()
    launcher = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    launcher |= {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": "fp8",
        "ACCELERATE_USE_FSDP": "true",
    }
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    assert plan() == expected
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized()

    figures = plan(
        bf16=True,
        tf32=True,
        torch_compile=True,
        optim="adamw_torch_fused",
        report_to=["wandb"],
        fsdp="full_shard",
    )
    assert figures["precision"] == "bf16"
    assert figures["memory"]["optimizer_state"] == pytest.approx(2 * figures["memory"]["gradients"], rel=0.01)
    assert len(figures["notes"]) == 2
    assert plan(optim="adamw_8bit")["memory"]["optimizer_state"] is None


def test_teachers(plan, tmp_path):
    def teacher(name, **overrides):
        figures = plan(distillation_loss="nkd", teacher=str(name), **overrides)
        return figures["teacher"], figures

    deit = timm_deit()
    deit.save_pretrained(tmp_path / "deit")
    found, figures = teacher(tmp_path / "deit")
    assert found["parameters"] == sum(p.numel() for p in deit.parameters())
    assert found["image_size"] == [32, 32]
    assert figures["notes"] == []
    _, figures = teacher(tmp_path / "deit", num_classes=12)
    assert "has 10 classes and the student is planned with 12" in figures["notes"][0]

    resnet = native_resnet()
    resnet.save_pretrained(tmp_path / "resnet")  # without a processor it gets the student's pixels
    found, figures = teacher(tmp_path / "resnet")
    assert found["parameters"] == sum(p.numel() for p in resnet.parameters())

    found, figures = teacher("resnet34", teacher_args=TINY["student_args"])
    assert figures["runs"] == ["teacher", "student"]
    assert figures["disk"]["teacher"] == 0
    assert found["num_classes"] == 10

    found, figures = teacher("timm/resnet34.tv_in1k")
    assert found["parameters"] == 21_797_672
    assert found["image_size"] == [224, 224]
    assert "has 1000 classes and the student is planned with 10" in figures["notes"][0]

    for name in ("nobody/nothing", "timm/resnet34.nothing", tmp_path / "nothing"):
        found, figures = teacher(name)
        assert found == {"name": str(name)} | dict.fromkeys(("parameters", "gmacs", "image_size", "num_classes"))
        assert "is not on this machine" in figures["notes"][0]
    (tmp_path / "deit").rename(tmp_path / "deit-nkd")
    _, figures = teacher(tmp_path / "deit-kd")
    assert figures["notes"][0].endswith(f"did you mean '{tmp_path / 'deit-nkd'}'?")


def test_vitkd(plan, error, tmp_path):
    timm_deit().save_pretrained(tmp_path / "deit")
    args = {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    student = {"student": "deit_tiny_patch16_224", "student_args": args, "distillation_loss": "nkd+vitkd"}
    figures = plan(teacher=str(tmp_path / "deit"), **student)
    assert figures["tap"] is None
    assert figures["taps"]["student_high"] == {
        "module": "timm_model.norm", "channels": 16, "reads": "patch tokens after the final norm",
    }  # fmt: skip
    assert figures["loss_parameters"] > 0
    assert "nkd+vitkd's parameters depend on the teacher" in error(teacher="nobody/nothing", **student)


def test_tap_of_a_vit_without_a_class_token(plan):
    figures = plan(student="vit_base_patch16_siglip_224", student_args={"depth": 4}, distillation_loss="uskd")
    assert figures["tap"] == {"module": "timm_model.blocks.1", "channels": 768, "reads": "mean of the patch tokens"}
    assert "timm_model.blocks.1: 768 channels, mean of the patch tokens\n" in format_plan(figures)


def test_comparators_of_maps_and_the_teachers_precision(plan, error):
    small = {"student": "resnet18", "student_args": {"channels": [4, 8, 8, 12]}, "teacher": "resnet34"}
    small |= {"teacher_args": {"channels": [4, 8, 8, 16]}, "distillation_loss": "kd+mgd+srrl"}
    figures = plan(**small)
    assert figures["taps"] == {"student_map": {"module": "timm_model.layer4", "channels": 12, "reads": "feature map"}}
    # MGD's aligner and generator, SRRL's connector and its BatchNorm.
    assert figures["loss_parameters"] == (12 * 16 + 16) + 2 * (9 * 16 * 16 + 16) + (12 * 16 + 2 * 16)
    half = plan(**small, teacher_dtype="bf16")
    assert half["memory"]["teacher"] == figures["memory"]["teacher"] // 2
    assert half["disk"] == figures["disk"]
    assert "teacher, in bf16" in format_plan(half)
    assert re.search(
        r"^tap, map +timm_model.layer4: 12 channels, feature map$", format_plan(figures), flags=re.MULTILINE
    )
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    wrong = error(**small | {"teacher": "deit_tiny_patch16_224", "teacher_args": vit, "distillation_loss": "mgd"})
    assert "MGD's student map is 1x1, the teacher's 4x4" in wrong


def test_students_with_weights_of_their_own(plan, error, tmp_path):
    resnet = native_resnet()
    resnet.save_pretrained(tmp_path / "resnet")
    message = error(student=str(tmp_path / "resnet"), student_args=None)
    assert "is no architecture, and cannot be read without a network" in message
    assert "image processor" in message
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}})
    )
    figures = plan(student=str(tmp_path / "resnet"), student_args=None, num_classes=None)
    assert figures["student"]["parameters"] == sum(p.numel() for p in resnet.parameters())
    assert figures["tap"] == {
        "module": "resnet.encoder.stages.2", "channels": 32, "reads": "average over the places",
    }  # fmt: skip
    assert "student 'nobody/nothing' is no architecture" in error(student="nobody/nothing")


def test_errors(error):
    assert "the plan needs num_processes, got None: set it in the config" in error(num_processes=None)
    assert "the plan needs num_train_images, got None" in error(num_train_images=None)
    assert "num_train_epochs must be positive" in error(num_train_epochs=0)
    assert "unknown key 'num_procesess'" in error(num_procesess=3)
    assert "'resnet81' is neither a timm architecture (near: " in error(student="resnet81")
    assert "feature_layer 'layer9' is not a submodule" in error(feature_layer="layer9")
    assert "lr_scheduler_kwargs" in error(lr_scheduler_type="cosine", lr_scheduler_kwargs={"x": 1})


@pytest.mark.parametrize("row", ["nkd_cifar100_resnet34_resnet18", "uskd_cifar100_resnet18"])
def test_text(row, capsys):
    main(["plan", "--config", str(CONFIGS / f"{row}.yaml"), "--num_processes", "4"])
    text = capsys.readouterr().out
    assert "student         resnet18_cifar: 11.22 M parameters, 0.56 GMACs at 32x32, 100 classes\n" in text
    assert ("tap             resnet.layer3: 256 channels, average over the places\n" in text) == (
        row.startswith("uskd")
    )
    assert "global batch    64 images: 4 GPUs x 16 x accumulation 1\n" in text
    assert "steps           156,400, 782 an epoch, 200 epochs of 50,000 images\n" in text
    assert "                epoch 60 to 119   0.01\n" in text
    assert (
        "\nNote: learning_rate 0.1 is meant for a global batch of 128 (base_batch_size), and this run's is 64" in text
    )
    assert max(map(len, text.splitlines())) < 150


IMAGENET = "nkd_resnet34_resnet18"  # 100 epochs of 1,281,167 images


def test_the_input_of_a_training(plan, capsys):
    one, four = plan(IMAGENET), plan(IMAGENET, crops_per_image=4)
    assert one["input"]["samples"] == one["input"]["decoded_images"] == four["input"]["samples"] == 128_116_700
    assert four["input"]["decoded_images"] == 32_029_200
    # The rates are those of benchmarks/README.md: 277 samples a second and core, and 515 with four crops.
    for figures, rate in ((one, 277), (four, 515)):
        assert figures["input"]["core_hours"] == pytest.approx(128_116_700 / rate / 3600, rel=0.05)
    augmented = plan(IMAGENET, crops_per_image=4, auto_augment="rand-m9-n2-mstd0.5-inc1")
    assert augmented["input"]["core_hours"] == pytest.approx(128_116_700 / 234 / 3600, rel=0.05)
    text = format_plan(four)
    assert "of 1,281,167 images, 320,292 of them decoded\n" in text
    assert "128,116,700 samples of 32,029,200 decoded images: 66.7 core-hours for JPEGs of 500 x 375\n" in text


def test_a_store_of_the_teachers_logits(plan, error):
    assert plan(IMAGENET)["store"] is None
    stores = {
        "all": {"top_k": "all"},
        "100": {"top_k": "100"},
        "at 4": {"top_k": "100", "distillation_loss": "kd", "loss_args": {}},
        "standardised": {"top_k": "100", "distillation_loss": "kd", "loss_args": {"standardize": True}},
        "cycle": {"top_k": "100", "cycle": 50},
    }
    plans = {name: plan(IMAGENET, num_train_epochs=300, **settings) for name, settings in stores.items()}
    # docs/teacher-logits.md has these sizes.
    sizes = {"all": 4002, "100": 418, "at 4": 422, "standardised": 430, "cycle": 418}
    assert {name: figures["store"]["bytes_per_sample"] for name, figures in plans.items()} == sizes
    gigabytes = {name: round(figures["store"]["bytes"] / 1e9) for name, figures in plans.items()}
    assert gigabytes == {"all": 1538, "100": 161, "at 4": 162, "standardised": 165, "cycle": 27}
    text = format_plan(plans["cycle"])
    assert (
        "\nstored logits   26.8 GB: 50 epochs of 1,281,167 images, which training repeats, the 100 largest logits, "
        "418 bytes each\n"
    ) in text
    assert ", all logits, 4002 bytes each\n" in format_plan(plans["all"])
    more = plan(
        num_classes=5, distillation_loss="nkd", teacher="resnet34", teacher_args=TINY["student_args"], top_k="100"
    )
    assert more["store"]["top_k"] == 4
    assert "--top_k must be a positive integer or all, got '0'" in error(IMAGENET, top_k="0")
    assert "cycle must be a multiple of 4, the crops_per_image, got 50" in error(IMAGENET, cycle=50, crops_per_image=4)
    assert "cycle must be from 1 to 100, the epochs, got 101" in error(IMAGENET, cycle=101)
    assert "the recipe has no teacher" in error(top_k="all")


def test_num_classes_is_that_of_the_dataset(tmp_path):
    training = DistillationTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    recipe = RecipeArguments(student="resnet18", distillation_loss="uskd")
    with pytest.raises(ValueError, match="num_classes is 100, but 'digits' has 10 classes"):
        Recipe(recipe, DataArguments(num_classes=100), training)
