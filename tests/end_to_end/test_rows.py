"""Each row of the paper's tables, through its own configuration: the real architecture, its tap, schedule and groups.

`make test-rows` also takes one training step of each at its real resolution, on two photographs.
"""

import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import datasets
import PIL.Image
import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from tiny import top1
from transformers import get_scheduler, pipeline, set_seed

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    create_student,
    load_image_processor,
    parse_args,
)
from nkd_hf.recipe import build as build_module
from nkd_hf.recipe.build import build_loss
from nkd_hf.trainer.optimization import lr_factor

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
ROWS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("digits"))

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "mobilenetv1_100": 4_231_976,
    "mobilenetv2_100": 3_504_872,
    "shufflenet_v2_x1_0": 2_278_604,
    "regnetx_016": 9_190_136,
    "swin_tiny_patch4_window7_224": 28_288_354,
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "resnet18_cifar": 11_220_132,
    "resnetv2_50x1_bit": 25_549_352,
}
CHANNELS = {
    "uskd_mobilenet": 512,
    "uskd_mobilenetv2": 320,
    "uskd_shufflenetv2": 464,
    "uskd_resnet18": 256,
    "uskd_resnet50": 1024,
    "uskd_resnet101": 1024,
    "uskd_regnetx-1.6gf": 408,
    "uskd_swin-tiny": 384,
    "uskd_deit-tiny": 192,
    "uskd_cifar100_resnet18": 256,
}


class Schedule(NamedTuple):
    """What a row's learning rate is at the first step of some epochs."""

    global_batch_size: int
    steps_per_epoch: int
    num_epochs: int
    rates: dict[int, float]


STEPS_X01 = Schedule(256, 5005, 100, {0: 0.1, 29: 0.1, 30: 0.01, 60: 0.001, 90: 1e-4, 99: 1e-4})
# (1e-3 + 1e-5) / 2 in the middle of the 280 epochs of cosine; half of the warm-up's 25,040 steps at epoch 10.
ADAMW = Schedule(
    1024, 1252, 300, {0: 1e-6, 10: 1e-6 + 0.999e-3 * 12520 / 25039, 20: 1e-3, 160: 5.05e-4, 299: 1.0031157e-5}
)
SCHEDULES = {
    "mobilenetv2_100": Schedule(256, 5005, 300, {0: 0.045, 1: 0.0441, 2: 0.043218, 299: 0.045 * 0.98**299}),
    "shufflenet_v2_x1_0": Schedule(
        1024, 1252, 300, {0: 0.05, 3: 0.05, 4: 0.5 * (1 - 8 / 370600), 299: 0.5 * 1252 / 370600}
    ),
    "regnetx_016": Schedule(
        1024, 1252, 100, {0: 0.08, 1: 0.26, 2: 0.44, 3: 0.62, 4: 0.80, 5: 0.80, 99: 0.4 * (1 - math.cos(math.pi / 95))}
    ),
    "resnet18_cifar": Schedule(128, 391, 200, {0: 0.1, 59: 0.1, 60: 0.02, 120: 0.004, 160: 8e-4, 199: 8e-4}),
    "sdnkd_resnet50_mobilenet": Schedule(512, 2503, 100, {0: 0.2, 29: 0.2, 30: 0.02, 60: 0.002, 90: 2e-4}),
    # Of 375,600 steps 5000 are the warm-up.
    "resnetv2_50x1_bit": Schedule(
        4096,
        313,
        1200,
        {0: 0.0, 8: 0.03 * 2504 / 5000, 600: 0.015 * (1 + math.cos(math.pi * (187800 - 5000) / 370600))},
    ),
    "deit_tiny_patch16_224": ADAMW,
    "deit_small_patch16_224": ADAMW,
    "deit_base_patch16_224": ADAMW,
    "swin_tiny_patch4_window7_224": ADAMW,
}
# Weight decay, and how many of the student's parameters have none: norms, biases (also the head's), tokens, positions.
DECAY = {
    "mobilenetv2_100": (4e-5, 0),
    # All of torchvision's BatchNorm: 24 in the stem, 778, 3016 and 3248 channels in the stages, 1024 in conv5.
    "shufflenet_v2_x1_0": (4e-5, 2 * (24 + 778 + 3016 + 3248 + 1024)),
    "regnetx_016": (5e-5, 0),
    "resnet18_cifar": (5e-4, 0),
    # 25 norms of 2 x width; 12 blocks with biases of 3 + 1 + 4 + 1 widths; patches, class token, 197 positions; head.
    "deit_tiny_patch16_224": (0.05, (25 * 2 + 12 * 9 + 1 + 1 + 197) * 192 + 1000),
    "deit_small_patch16_224": (0.05, (25 * 2 + 12 * 9 + 1 + 1 + 197) * 384 + 1000),
    "deit_base_patch16_224": (0.05, (25 * 2 + 12 * 9 + 1 + 1 + 197) * 768 + 1000),
    # Blocks of width 96, 192, 384 (6), 768: norms of 4 and biases of 9 widths, 169 positions a head; mergings; ends; head.
    "swin_tiny_patch4_window7_224": (
        0.05,
        4416 * 13 + 169 * (2 * 3 + 2 * 6 + 6 * 12 + 2 * 24) + 2 * (384 + 768 + 1536) + 2 * 96 + 96 + 2 * 768 + 1000,
    ),
}
# GroupNorm: the first of each block has its input's channels, the others 64, 128, 256 and 512; at the end 2048; the head's bias.
DECAY["resnetv2_50x1_bit"] = (
    0.01,
    2 * (64 + 2 * 256 + 256 + 3 * 512 + 512 + 5 * 1024 + 1024 + 2 * 2048)
    + 4 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512)
    + 2 * 2048
    + 1000,
)
# Of the loss: the head's bias, and Swin's norm; ViTKD's two convolutions' and three aligners' biases.
UNDECAYED_OF_LOSS = {"uskd_swin-tiny": 1000 + 2 * 384, "uskd_deit-tiny": 1000}
TEACHER_WIDTHS = {"small": 384, "base": 768, "large": 1024}


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Data sets of two real photographs, of 1000 and of 100 classes."""
    folders = {}
    for num_classes in (1000, 100):
        folder = tmp_path_factory.mktemp(f"classes-{num_classes}")
        features = datasets.Features(
            image=datasets.Image(decode=False),
            label=datasets.ClassLabel(names=[f"class {i}" for i in range(num_classes)]),
        )
        rows = {"image": [], "label": [3, 41]}
        for image in load_sample_images().images:
            buffer = io.BytesIO()
            PIL.Image.fromarray(image).save(buffer, format="JPEG")
            rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        for split in ("train", "validation"):
            datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
        folders[num_classes] = str(folder)
    return folders


def arguments_of(row, photographs, folder, *more):
    return parse_args(
        (RecipeArguments, DataArguments, DistillationTrainingArguments),
        args=[
            *("--config", str(CONFIGS / f"{row}.yaml"), "--output_dir", str(folder), "--use_cpu", "true"),
            *("--dataset_name", photographs[100 if "cifar" in row else 1000], "--report_to", "none"),
            *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"),
            *("--dataloader_pin_memory", "false", "--disable_tqdm", "true", *more),
        ],
    )


def untrained_teacher(name, **kwargs):
    """The teacher's architecture with random weights: no weights of the Hub are here."""
    architecture = name.removeprefix("timm/").partition(".")[0]
    set_seed(1)
    if architecture == "resnetv2_152x2_bit":
        architecture = "resnetv2_50x1_bit"  # the same layers, a tenth of the weights
    if not architecture.endswith("_cifar"):
        return create_student(architecture, **kwargs)
    return create_student(architecture, image_size=32, crop_pct=1.0, **kwargs)


@pytest.fixture
def row(request, photographs, tmp_path, monkeypatch):
    """The row's recipe, and a trainer of its student with its loss that has not begun."""
    open_teacher = build_module.load_teacher

    def load_teacher(teacher, **kwargs):
        if isinstance(teacher, str):
            # Its width and its patches are what matters here, and DeiT III-Large takes long to fill with random weights.
            shallow = {"model_args": {"depth": 2}} if "deit" in teacher else {}
            teacher = untrained_teacher(teacher, num_labels=100 if "cifar" in teacher else 1000, **shallow)
        return open_teacher(teacher)

    monkeypatch.setattr(build_module, "load_teacher", load_teacher)
    recipe = Recipe(*arguments_of(request.param, photographs, tmp_path))
    student = recipe.create(recipe.args.student, recipe.args.student_args)
    teacher = load_teacher(recipe.teacher or recipe.args.teacher) if recipe.args.needs_teacher else None
    loss = build_loss(recipe.args, recipe.training_args, student, teacher)
    train, validation = recipe.datasets(student)
    trainer = DistillationTrainer(
        model=student, teacher=teacher, distillation_loss=loss, args=recipe.training_args,
        train_dataset=train, eval_dataset=validation, processing_class=load_image_processor(student),
    )  # fmt: skip
    return request.param, recipe, trainer


@pytest.mark.runs
@pytest.mark.parametrize("row", ROWS, indirect=True)
def test_row(row):
    name, recipe, trainer = row
    student, args = recipe.args.student, recipe.training_args

    assert trainer.student.num_parameters() == PARAMETERS[student]
    assert recipe.args.distillation_loss == name.partition("_")[0].replace("-", "+")
    if name in CHANNELS:
        (loss,) = trainer.model.losses.values()
        assert loss.head.in_features == CHANNELS[name]

    expected = SCHEDULES.get(name, SCHEDULES.get(student, STEPS_X01))
    local = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert local * recipe.args.num_processes == args.base_batch_size == expected.global_batch_size
    images = recipe.data_args.num_train_images
    assert images == (50_000 if "cifar" in name else 1_281_167)
    assert math.ceil(images / expected.global_batch_size) == expected.steps_per_epoch
    assert args.num_train_epochs == expected.num_epochs
    # The rate in the row's own steps, scaled as a run with its global batch scales it.
    num_steps = expected.steps_per_epoch * expected.num_epochs
    if args.lr_scheduler_type == "cosine":  # transformers' own
        dummy = torch.optim.SGD([torch.zeros(1)], 1.0)
        (factor,) = get_scheduler("cosine", dummy, args.get_warmup_steps(num_steps), num_steps).lr_lambdas
    else:
        factor = lr_factor(
            args.lr_scheduler_type.value, num_steps, expected.num_epochs, args.learning_rate, args.lr_scheduler_kwargs
        )
    rate = args.scaled_learning_rate(expected.global_batch_size)
    for epoch, value in expected.rates.items():
        assert rate * factor(epoch * expected.steps_per_epoch) == pytest.approx(value, rel=1e-6)

    weight_decay, undecayed = DECAY.get(student, (1e-4, 0))
    if "vitkd" in name:
        width = TEACHER_WIDTHS[name.split("deit3-")[1].partition("_")[0]]
        undecayed += 5 * width
    undecayed += UNDECAYED_OF_LOSS.get(name, 0)
    # Here one process trains, with another global batch: the scaling is the trainer's, and said.
    trainer.create_optimizer_and_scheduler(num_training_steps=300)
    optimizer = trainer.optimizer
    groups = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    total = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert groups == {weight_decay: total - undecayed, 0.0: undecayed}
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(args.learning_rate * local / args.base_batch_size)
    if "deit" in name or "swin" in name or name == "kd_resnet152x2_resnet50":
        assert isinstance(optimizer, torch.optim.AdamW)
        assert optimizer.defaults["betas"] == (0.9, 0.999)
    else:
        assert isinstance(optimizer, torch.optim.SGD)
        assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, student == "regnetx_016")


SETTINGS = {
    "clip": {"sdnkd": 40.0, "kd_resnet152x2": 1.0, "nkd_resnet50_mobilenet": 5.0, "deit": 5.0, "swin": 5.0},
    "drop path": {"swin": 0.2, "deit-base": 0.1},
    "moving average": {"deit-base": 0.99996},
    "lighting": {"regnetx": 0.1},
    "batch norm": {"regnetx": 8192},
}


@pytest.mark.parametrize("name", ROWS)
def test_the_rest_of_the_row(name, photographs, tmp_path):
    recipe, data, training = arguments_of(name, photographs, tmp_path)

    def wanted(setting, default):
        found = [value for part, value in SETTINGS[setting].items() if part in name]
        return found[0] if found else default

    assert training.max_grad_norm == wanted("clip", 0.0)
    assert (recipe.student_args or {}).get("drop_path_rate") == wanted("drop path", None)
    assert training.ema_decay == wanted("moving average", None)
    assert data.pca_lighting == wanted("lighting", 0.0)
    assert training.precise_bn_images == wanted("batch norm", None)
    transformer = "deit" in name or "swin" in name
    assert training.label_smoothing_factor == (0.1 if transformer else 0.0)
    strong = ("rand-m9-n2-mstd0.5-inc1", 0.25, 0.8, 1.0)
    augmentation = (data.auto_augment, data.random_erasing, data.mixup_alpha, data.cutmix_alpha)
    plain = (None, 0.0, 1.0 if name == "kd_resnet152x2_resnet50" else 0.0, 0.0)
    assert augmentation == (strong if transformer else plain)
    assert data.random_resized_crop == ([0.05, 1.0] if name == "kd_resnet152x2_resnet50" else [0.08, 1.0])
    assert data.random_crop_padding == (4 if "cifar" in name else None)
    assert (recipe.image_size, recipe.crop_pct) == ((32, 1.0) if "cifar" in name else (224, 0.875))
    if "mobilenet" in name and "v2" not in name:
        assert recipe.student_args == {"act_layer": "relu"}
    losses = {
        "nkd": {"gamma": 3.5, "temperature": 3.0} if "cifar" in name
        else {"gamma": 1.0 if transformer else 1.5, "temperature": 1.0},
        "uskd": {"alpha": 0.1, "beta": 0.1, "mu": 0.1} if "cifar" in name
        else {"alpha": 1.0, "beta": 0.1, "mu": 0.005},
    }  # fmt: skip
    vitkd = {"alpha": 3e-5, "beta": 3e-6, "mask_ratio": 0.5}
    losses["nkd+vitkd"] = {"nkd": losses["nkd"], "vitkd": vitkd}
    losses["wttm+vitkd"] = {"wttm": {"exponent": 0.8, "beta": 1.6}, "vitkd": vitkd}
    losses["dist"] = {"beta": 2.0, "gamma": 2.0}
    losses["sdnkd"] = {"gamma": 2.0, "temperature": 1.0, "scales": [1, 2]}
    losses["kd"] = {"alpha": 1.0, "temperature": 1.0}
    assert recipe.loss_args == losses[recipe.distillation_loss]
    if recipe.teacher and recipe.teacher.startswith("timm/"):
        tagged = recipe.teacher.removeprefix("timm/")
        assert timm.get_pretrained_cfg(tagged).hf_hub_id == f"timm/{tagged}"
        assert timm.is_model_pretrained(tagged)


@pytest.mark.parametrize("name", ROWS)
def test_the_file_opens_as_a_record(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    for label in ("# paper ", "# student ", "# batch ", "# launch ", "# measured  here: not run"):
        assert label in header
    launch = next(line for line in lines if line.startswith("# launch"))
    assert f"--config recipes/configs/{name}.yaml" in launch
    script = "self_distill" if name.startswith("uskd") else "distill_deit" if "deit" in name else "distill_cnn"
    assert f"recipes/{script}.py" in launch


@pytest.mark.rows
@pytest.mark.parametrize("name", ROWS)
def test_one_training_step(name, photographs, tmp_path):
    more = ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2", "--max_steps", "1"]
    more += ["--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", "1"]
    recipe_args, _, _ = arguments_of(name, photographs, tmp_path)
    if recipe_args.teacher is not None and not recipe_args.teacher.endswith("_cifar"):
        # Any teacher can be a folder.
        folder = tmp_path / "teacher-weights"
        untrained_teacher(recipe_args.teacher, id2label={i: f"class {i}" for i in range(1000)}).save_pretrained(folder)
        more += ["--teacher", str(folder)]
    recipe = Recipe(*arguments_of(name, photographs, tmp_path / "run", *more))
    recipe.train_teacher()
    recipe.train_student()
    _, images = recipe.datasets(recipe.create(recipe_args.student, recipe_args.student_args))
    assert recipe.results["distilled"] == pytest.approx(top1(tmp_path / "run" / "student", images))
    state = json.loads((tmp_path / "run" / "student" / "trainer_state.json").read_text())
    log = state["log_history"][0]
    assert math.isfinite(log["loss"])
    assert math.isfinite(log["grad_norm"])
    print(
        f"\n{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in log.items() if key not in ("epoch", "step"))
    )
    classify = pipeline("image-classification", model=str(tmp_path / "run" / "student"), device="cpu")
    (image, _) = load_sample_images().images
    assert len(classify(PIL.Image.fromarray(image))) == 5
