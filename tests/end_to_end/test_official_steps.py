"""One step of the trainer, through a row's own configuration, gives the official distiller's components and gradient norms.

`fixtures/mmcls_steps.json` was written by the official code (github.com/yzd-v/cls_KD, branch 1.0) on the CPU in float32, for
weights that are made from their official names and four random images; student and teacher were in eval mode there.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from official import DATA, official_images, official_state_dict, official_tensor
from transformers import TrainerCallback

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    RecipeArguments,
    create_student,
    load_image_processor,
    parse_args,
)
from nkd_hf.models.mmcls import convert_state_dict
from nkd_hf.recipe.loss_shapes import loss_shapes

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
STEPS = json.loads((DATA / "mmcls_steps.json").read_text())
# The official name of each student and teacher of the rows' configurations.
OFFICIAL = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "mobilenetv1_100": "mobilenet",
    "mobilenetv2_100": "mobilenetv2",
    "shufflenet_v2_x1_0": "shufflenetv2",
    "regnetx_016": "regnetx-1.6gf",
    "swin_tiny_patch4_window7_224": "swin-tiny",
    "deit_tiny_patch16_224": "deit-tiny",
    "timm/resnet34.tv_in1k": "resnet34",
    "timm/resnet50.tv_in1k": "resnet50",
}


class GradientNorms(TrainerCallback):
    def __init__(self, in_student: list[torch.nn.Parameter]):
        self.in_student = in_student

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        def norm(parameters):
            return math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in parameters))

        theirs = [id(p) for p in self.in_student]
        self.student = norm([*model.student.parameters(), *self.in_student])
        self.auxiliary = norm([p for p in model.losses.parameters() if id(p) not in theirs])


@pytest.mark.parametrize("row", STEPS)
def test_one_step_is_the_official_one(tmp_path, row):
    expected = STEPS[row]
    recipe, _, args = parse_args(
        (RecipeArguments, DataArguments, DistillationTrainingArguments),
        # No clipping, since the norms are measured after it; labels are whole here, as in the official figures.
        args=["--config", str(CONFIGS / f"{row}.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true",
              "--per_device_train_batch_size", "4", "--max_steps", "1", "--learning_rate", "0", "--max_grad_norm", "0",
              "--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", "1", "--report_to", "none",
              "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false", "--disable_tqdm", "true"],
    )  # fmt: skip
    architecture = OFFICIAL[recipe.student]
    student = create_student(recipe.student, model_args=recipe.student_args)
    weights = official_state_dict(architecture)
    student.load_state_dict(convert_state_dict(weights, architecture))
    student.eval().train = lambda mode=True: student  # running statistics and no drop path
    teacher = None
    if recipe.teacher is not None:
        teacher = create_student(recipe.teacher.removeprefix("timm/").partition(".")[0])
        official = OFFICIAL[recipe.teacher]
        teacher.load_state_dict(convert_state_dict(official_state_dict(official, "teacher."), official))

    loss = recipe.build_loss(**loss_shapes(recipe.losses.values(), student, (224, 224)))
    auxiliary = {key.removeprefix("loss_uskd."): shape for key, shape in expected["auxiliary_keys"].items()}
    in_student = []
    if auxiliary:
        assert {key: list(value.shape) for key, value in loss.head.named_parameters(prefix="fc")} == auxiliary
        for key, tensor in loss.head.named_parameters():
            tensor.data = official_tensor(f"loss.loss_uskd.fc.{key}", tensor.data)
        if loss.feature_norm is not None:  # It is part of the official Swin.
            in_student = list(loss.feature_norm.parameters())
            loss.feature_norm.load_state_dict({key: weights[f"backbone.norm2.{key}"] for key in ("weight", "bias")})

    images = official_images(4)
    if architecture.startswith("regnet"):
        images = images.flip(1)  # BGR there, RGB here
    samples = [
        {"pixel_values": image, "labels": label} for image, label in zip(images, [3, 141, 592, 653], strict=True)
    ]
    norms = GradientNorms(in_student)
    trainer = DistillationTrainer(
        model=student, teacher=teacher, distillation_loss=loss, args=args, train_dataset=samples, callbacks=[norms],
        processing_class=load_image_processor(student),
    )  # fmt: skip
    trainer.train()

    logged = trainer.state.log_history[0]
    distillation = sum(value for name, value in logged.items() if name.startswith(("nkd_", "uskd_")))
    name = "loss_nkd" if teacher is not None else "loss_uskd"
    assert logged["task"] == pytest.approx(expected["ori_loss"], rel=1e-4)
    assert distillation == pytest.approx(expected[name], rel=1e-4)
    assert norms.student == pytest.approx(expected["grad_norm_student"], rel=1e-4)
    assert norms.auxiliary == pytest.approx(expected["grad_norm_auxiliary"], rel=1e-4)
