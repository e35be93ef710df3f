"""The recipes as users start them, on few samples."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import in_a_process
from recipe_runs import FEW, IN_PROCESS, ROOT, run
from tiny import top1
from transformers import AutoModelForImageClassification, pipeline

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageDataset,
    RecipeArguments,
    create_student,
    load_image_dataset,
    load_image_processor,
    parse_args,
    processor_transform,
)
from nkd_hf.data.labels import label_names
from nkd_hf.models.saving import save_student
from nkd_hf.recipe.run_folder import collect_settings, read_history

pytestmark = pytest.mark.usefixtures("no_curves")


def launch(recipe: str, *arguments: str) -> subprocess.CompletedProcess:
    accelerate = Path(sys.executable).with_name("accelerate")
    done = subprocess.run(
        [accelerate, "launch", ROOT / "recipes" / f"{recipe}.py", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def run_script(recipe: str, log: Path, *arguments: str) -> str:
    """What the script of a recipe prints in a forked process, which spares the imports of `launch`."""
    script = str(ROOT / "recipes" / f"{recipe}.py")

    def work() -> None:
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")

    assert in_a_process(work, log) == 0, log.read_text()[-4000:]
    return log.read_text()


def evaluated(folder: Path, num_samples: int = 40) -> ImageDataset:
    """The digits on which the recipes measure the model in a folder."""
    data = load_image_dataset(DataArguments(max_eval_samples=num_samples), seed=0)["validation"]
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    return ImageDataset(data, processor_transform(load_image_processor(model)), training=False)


@pytest.fixture(scope="module")
def distilled_cnn(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a recipe with a teacher and a baseline, and what it printed."""
    folder = tmp_path_factory.mktemp("cnn")
    return folder, run_script("distill_cnn", folder / "log", *FEW, *IN_PROCESS, "--output_dir", str(folder))


@pytest.mark.runs
@pytest.mark.parametrize("recipe", ["distill_deit", "distill_cnn", "self_distill"])
def test_recipe_with_few_samples(tmp_path, recipe, request):
    folder, arguments = tmp_path, [*FEW, "--output_dir", str(tmp_path)]
    if recipe == "distill_deit":
        stdout = launch(recipe, *arguments).stdout
    elif recipe == "distill_cnn":
        folder, stdout = request.getfixturevalue("distilled_cnn")
    else:
        stdout = run_script(recipe, tmp_path / "log", *arguments, *IN_PROCESS)
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {"teacher", "teacher_on_student_pixels", "baseline", "distilled"}
    assert (results["teacher"] is None) == (recipe == "self_distill")
    for name in ("baseline", "distilled"):
        model = folder / ("student" if name == "distilled" else name)
        assert results[name] == pytest.approx(top1(model, evaluated(model)))
        assert f"{results[name]:.2%}" in stdout
    with Image.open(folder / "accuracy.png") as picture:
        assert min(picture.size) > 400
    # The last line is what the call above it answers.
    answer = pipeline("image-classification", model=str(folder / "student"), device="cpu")(
        str(folder / "example.png"), top_k=3
    )
    shown = stdout.strip().splitlines()[-4:]
    assert shown[1] == f'>>> classifier = pipeline("image-classification", model="{folder / "student"}")'
    assert shown[3] == str([{"label": e["label"], "score": round(e["score"], 4)} for e in answer])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["distill_deit", "distill_cnn", "self_distill"])
def test_figures_of_the_readme(tmp_path, recipe):
    row = next(
        line
        for line in (ROOT / "docs" / "quickstart.md").read_text().splitlines()
        if f"launch recipes/{recipe}.py` |" in line
    )
    launch(recipe, "--output_dir", str(tmp_path), "--disable_tqdm", "true")
    results = json.loads((tmp_path / "results.json").read_text())
    measured = [100 * value for value in results.values() if value is not None]
    # Another machine sums in another order, and 360 images are few; the same machine repeats them to the digit.
    assert measured == pytest.approx([float(figure) for figure in re.findall(r"\d+\.\d\d", row)], abs=3.0)


@pytest.mark.runs
def test_feature_layer_is_for_the_self_distilled_student_alone(tmp_path):
    recipe = run("self_distill", "--output_dir", str(tmp_path), "--feature_layer", "timm_model.layer2")
    assert set(recipe.curves) == {"baseline", "distilled"}


def test_own_images_with_a_broken_one_that_is_skipped(tmp_path, capsys, caplog):
    folder = tmp_path / "images"
    data = load_image_dataset(DataArguments())
    for split in ("train", "val"):
        for i in range(60):
            row = data["train"][i]
            path = folder / split / f"digit {row['label']}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"]["bytes"])
    first = sorted((folder / "val").rglob("*.png"))[0]
    first.write_bytes(first.read_bytes()[:60])
    recipe = run("distill_cnn", "--dataset_name", str(folder), "--output_dir", str(tmp_path / "run"), "--distillation_loss",
                 "none", "--on_bad_image", "skip", "--max_eval_samples", "60")  # fmt: skip
    recipe.report()
    said = capsys.readouterr().out
    assert "1 of 60 evaluation images were bad so far" in caplog.text
    assert "digit " in said.strip().splitlines()[-1]


def test_baseline_of_a_recipe_from_a_stream(tmp_path):
    stream = ["--streaming", "true", "--num_train_images", "96"]
    recipe = run("distill_cnn", "--output_dir", str(tmp_path), "--distillation_loss", "none", *stream)
    assert recipe.results["teacher"] is None
    assert recipe.results["distilled"] is None
    _, images = recipe.datasets(recipe.create(recipe.args.student, recipe.args.student_args))
    assert recipe.results["baseline"] == pytest.approx(top1(tmp_path / "baseline", list(images)))
    # 2 epochs of 96 images in batches of 64 are 3 steps; evaluation comes once an epoch, though a stream has none.
    assert recipe.training_args.max_steps == 3
    epochs = [x for x, _ in recipe.curves["baseline"]]
    assert len(epochs) >= 2
    assert (epochs[0], epochs[-1]) == pytest.approx((2 * 64 / 96, 3 * 64 / 96))
    # With --max_steps, the curve goes on to the epochs that these are, and counts steps where nobody has counted images.
    history = [{"epoch": 1.0, "step": 6, "eval_accuracy": 0.5, "eval_top5_accuracy": 0.9}]
    for num_train_images, end in ((96, 4.0), (None, 6)):
        recipe.data_args.num_train_images = num_train_images
        recipe._record("baseline", history)
        assert recipe.curves["baseline"] == [(end, 0.5)]


@pytest.mark.runs
def test_teacher_from_a_folder_is_measured_first(tmp_path, distilled_cnn):
    folder, _ = distilled_cnn
    first = json.loads((folder / "results.json").read_text())
    second = run(
        "distill_cnn", "--output_dir", str(tmp_path), "--teacher", str(folder / "teacher"), "--compare_with_baseline",
        "false",
    )  # fmt: skip
    assert second.results["teacher"] == pytest.approx(first["teacher"])
    assert second.results["baseline"] is None
    # The same teacher, the same seed: the same student.
    assert second.results["distilled"] == first["distilled"]


@pytest.mark.runs
def test_a_resumed_recipe_keeps_its_teacher(tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path / "run"), "--save_strategy", "epoch", "--compare_with_baseline", "false"]
    first = run("distill_cnn", *arguments)
    weights = tmp_path / "run" / "teacher" / "model.safetensors"
    teacher = weights.read_bytes()
    student = tmp_path / "run" / "student"
    for has_begun in (True, False):
        # As if it had been stopped before the student's first checkpoint, or before its training began.
        shutil.rmtree(student)
        if has_begun:
            student.mkdir()
        capsys.readouterr()
        second = run("distill_cnn", *arguments, "--resume_from_checkpoint", "true")
        assert weights.read_bytes() == teacher
        assert second.results == first.results
        said = capsys.readouterr().out
        missing = f"There is no checkpoint in {student}: this training starts from the beginning"
        assert (missing in said) == has_begun
        assert ("starts from the beginning" in said) == has_begun


@pytest.mark.runs
def test_a_teacher_of_other_names_is_taken_by_its_numbers(tmp_path, monkeypatch):
    teacher = create_student("resnet18", id2label={i: f"number {i}" for i in range(10)}, image_size=32)
    save_student(teacher, str(tmp_path / "teacher"))
    arguments = ["--output_dir", str(tmp_path / "run"), "--teacher", str(tmp_path / "teacher")]
    arguments += ["--compare_with_baseline", "false"]
    with pytest.raises(ValueError, match="--ignore_label_names true"):
        run("distill_cnn", *arguments)
    seen = {}
    compute_loss = DistillationTrainer.compute_loss

    def look(trainer, model, inputs, *args, **kwargs):
        if trainer.teacher is not None and inputs["labels"].ndim == 1:
            seen[trainer] = inputs["pixel_values"], trainer.teacher(inputs["pixel_values"])
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", look)
    recipe = run("distill_cnn", *arguments, "--ignore_label_names", "true")
    assert recipe.results["distilled"] == pytest.approx(
        top1(tmp_path / "run" / "student", evaluated(tmp_path / "run" / "student"))
    )
    pixels, logits = list(seen.values())[-1]
    with torch.no_grad():
        torch.testing.assert_close(logits, teacher.eval()(pixels).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.runs
def test_the_call_of_a_student_that_carries_its_code_says_so(tmp_path, capsys):
    recipe = run(
        "distill_cnn", "--output_dir", str(tmp_path), "--distillation_loss", "none", "--student", "resnet18_cifar",
        "--student_args", '{"layers": [1, 1, 1, 1]}',
    )  # fmt: skip
    recipe.report()
    assert f'model="{tmp_path / "baseline"}", trust_remote_code=True)' in capsys.readouterr().out


DEIT_TEACHER = [
    "--teacher",
    "deit3_small_patch16_224",
    "--teacher_args",
    '{"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}',
]
NKD_VITKD = ["--distillation_loss", "nkd+vitkd", "--loss_args", '{"nkd": {"gamma": 1.0}, "vitkd": {"alpha": 3.0e-4}}']


@pytest.mark.runs
def test_nkd_and_vitkd_from_a_teacher_that_is_trained_first_or_opened_from_a_folder(tmp_path, capsys, monkeypatch):
    first = run("distill_deit", "--output_dir", str(tmp_path / "first"), *DEIT_TEACHER, *NKD_VITKD)
    first.report()
    assert "distilled (NKD+ViTKD)" in capsys.readouterr().out
    assert not list((tmp_path / "first" / "student").glob("distillation_losses*"))

    opened = []
    from_pretrained = AutoModelForImageClassification.from_pretrained
    monkeypatch.setattr(
        AutoModelForImageClassification,
        "from_pretrained",
        lambda name, **kwargs: opened.append(name) or from_pretrained(name, **kwargs),
    )
    folder = str(tmp_path / "first" / "teacher")
    second = run("distill_deit", "--output_dir", str(tmp_path / "second"), *NKD_VITKD, "--teacher", folder,
                 "--compare_with_baseline", "false")  # fmt: skip
    assert opened == [folder]
    assert second.results["teacher"] == pytest.approx(first.results["teacher"])
    said = capsys.readouterr().out
    assert f"The teacher's top-1: {second.results['teacher']:.2%}" in said
    assert second.results["baseline"] is None


QUICK = [
    "--max_steps", "2", "--compare_with_baseline", "false", "--dataloader_num_workers", "0",
    "--dataloader_persistent_workers", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    """Untrained ones in folders, by what their last feature map is at 32 pixels."""
    id2label = dict(enumerate(label_names(load_image_dataset(DataArguments()))))
    folder = tmp_path_factory.mktemp("teachers")
    models = {
        "cnn, 1x1": ("resnet34", 32, {"channels": [8, 16, 32, 48]}),
        "cnn, 2x2": ("resnet34", 64, {"channels": [8, 16, 32, 48]}),
        "vit, 4x4": ("deit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}),
    }
    for name, (architecture, size, model_args) in models.items():
        model = create_student(architecture, id2label=id2label, image_size=size, model_args=model_args)
        save_student(model, str(folder / name))
    return {name: str(folder / name) for name in models}


@pytest.mark.runs
@pytest.mark.parametrize(
    ("recipe", "teacher", "loss", "loss_args"),
    [
        *[
            ("distill_cnn", "cnn, 1x1", loss, "{}")
            for loss in ("kd", "dkd", "wsld", "dist", "wttm", "rld", "mgd", "srrl")
        ],
        ("distill_deit", "cnn, 1x1", "dkd+wsld+dist+wttm", '{"dkd": {"beta": 2.0}, "wttm": {"exponent": 0.5}}'),
        ("distill_deit", "cnn, 1x1", "srrl", "{}"),
        ("distill_deit", "vit, 4x4", "mgd", "{}"),
        ("distill_cnn", "cnn, 1x1", "sdnkd", '{"scales": [1]}'),
        ("distill_cnn", "cnn, 1x1", "kd+srrl", '{"kd": {"alpha": 0.9}}'),
        ("distill_deit", "cnn, 2x2", "kd+srrl", '{"kd": {"alpha": 0.9}}'),
        ("distill_cnn", "cnn, 1x1", "nkd+mgd", '{"mgd": {"alpha": 1e-3}}'),
        ("distill_deit", "vit, 4x4", "nkd+mgd+vitkd", '{"nkd": {"gamma": 1.0}, "mgd": {"mask_ratio": 0.5}}'),
        ("distill_cnn", "cnn, 1x1", "uskd+mgd+srrl", "{}"),
    ],
)
def test_comparators_by_name_alone_and_added_with_mixup(tmp_path, teachers, recipe, teacher, loss, loss_args):
    done = run(recipe, *QUICK, "--output_dir", str(tmp_path), "--teacher", teachers[teacher], "--distillation_loss", loss,
               "--loss_args", loss_args, "--mixup_alpha", "0.8", "--logging_strategy", "steps",
               "--logging_steps", "1")  # fmt: skip
    student = tmp_path / "student"
    assert done.results["distilled"] == pytest.approx(top1(student, evaluated(student)))
    first = read_history(tmp_path / "student")[0]
    components = [name for name in first if name == "task" or name.startswith(tuple(loss.split("+")))]
    assert "task" in components
    assert len(components) > len(loss.split("+"))
    assert first["loss"] == pytest.approx(sum(first[name] for name in components), rel=1e-5)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert saved.num_parameters() == done.create(done.args.student, done.args.student_args).num_parameters()


@pytest.mark.parametrize(
    ("recipe", "teacher", "loss", "message"),
    [
        (
            "distill_cnn",
            "cnn, 2x2",
            "mgd",
            "MGD's student map is 1x1, the teacher's 2x2: it compares them place by place",
        ),
        ("distill_cnn", "cnn, 2x2", "sdnkd", r"student_map must have 4 places or more .* got 1x1: set smaller scales"),
        (
            "distill_deit",
            "cnn, 1x1",
            "sdnkd",
            r"no classifier of an averaged .* \(deit_tiny_patch16_224\).* as student",
        ),
        ("distill_deit", "cnn, 1x1", "nkd+mgd", "MGD's student map is 4x4, the teacher's 1x1"),
        (
            "distill_deit",
            "vit, 4x4",
            "kd+srrl",
            r"no classifier of an averaged feature map .* \(deit_tiny_patch16_224\)",
        ),
    ],
)
def test_maps_that_cannot_be_aligned_are_refused_before_training(tmp_path, teachers, recipe, teacher, loss, message):
    with pytest.raises(ValueError, match=message):
        run(recipe, *QUICK, "--output_dir", str(tmp_path), "--teacher", teachers[teacher], "--distillation_loss", loss,
            "--loss_args", "{}")  # fmt: skip
    assert not (tmp_path / "student").exists()


def test_maps_that_cannot_be_aligned_are_refused_before_the_teacher_is_trained(tmp_path):
    more = ["--output_dir", str(tmp_path), "--distillation_loss", "nkd+mgd", "--loss_args", "{}"]
    with pytest.raises(ValueError, match="MGD's student map is 4x4, the teacher's 1x1"):
        run("distill_deit", *QUICK, *more)
    assert not (tmp_path / "teacher").exists()


def test_where_a_store_lies_is_no_setting_but_whether_there_is_one_is():
    data, training = DataArguments(), DistillationTrainingArguments("x", report_to="none", use_cpu=True)
    here, there = (
        collect_settings(RecipeArguments("resnet18", teacher_logits=folder), data, training) for folder in ("a", "b/c")
    )
    assert here == there
    assert here != collect_settings(RecipeArguments("resnet18", teacher="resnet34"), data, training)
    live = collect_settings(RecipeArguments("resnet18", teacher="a"), data, training)
    assert {name for name in live if live[name] != here[name]} == {"teacher", "teacher_logits"}


def test_settings_of_a_teacher_are_for_a_loss_that_has_one(tmp_path):
    with pytest.raises(
        ValueError, match="teacher_dtype set how a teacher computes, and distillation_loss=uskd has none"
    ):
        run("self_distill", "--output_dir", str(tmp_path), "--teacher_dtype", "bf16")
    # The baseline has none either way.
    assert set(run("distill_cnn", "--output_dir", str(tmp_path), "--teacher_dtype", "bf16").curves) == {
        "teacher", "baseline", "distilled"
    }  # fmt: skip


def test_losses_that_have_a_teacher():
    for loss in ("nkd", "vitkd", "uskd+vitkd"):
        with pytest.raises(ValueError, match=f"distillation_loss={re.escape(loss)} needs a teacher: set teacher"):
            RecipeArguments("resnet18", distillation_loss=loss)
    losses = RecipeArguments(
        "resnet18", teacher="resnet34", distillation_loss="nkd+vitkd", loss_args={"nkd": {"gamma": 1.0}}
    )
    losses = losses.build_loss(student_dim=32, teacher_dim=48)
    assert list(losses) == ["nkd", "vitkd"]
    assert (losses["nkd"].gamma, losses["vitkd"].alpha, losses["vitkd"].teacher_dim) == (1.0, 3e-5, 48)


def test_vitkd_from_a_cnn_is_refused_before_the_teacher_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"known for Timm.* \(resnet18\): ViTKD"):
        run("distill_deit", "--output_dir", str(tmp_path), *NKD_VITKD)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gama", "1.0"], "unknown argument --gama"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--distillation_loss", "kt"], "mgd, srrl, several of them joined by +, or none, got 'kt'"),
        (["--distillation_loss", "nkd+nkd"], "several of them joined by +, or none, got 'nkd+nkd'"),
        (["--distillation_loss", "nkd+vitkd"], "are by the names of the losses, such as {nkd: {...}}, got gamma"),
        (
            ["--distillation_loss", "nkd+vitkd", "--loss_args", '{"vitkd": {"gamma": 1.0}}'],
            "loss_args of distillation_loss=vitkd are alpha, beta, mask_ratio, got gamma",
        ),
        (["--loss_args", '{"gama": 1.0}'], "loss_args of distillation_loss=nkd are gamma, temperature, got gama"),
        (["--loss_args", '{"gamma": -1.0}'], "gamma must be a finite number >= 0, got -1.0"),
        (["--teacher", "null", "--distillation_loss", "uskd"], "distillation_loss=uskd has no teacher"),
        (["--dataset_name", "me/mine"], "the following arguments are required: --student"),
    ],
)
def test_wrong_arguments_are_short_errors(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        parse_args(
            (RecipeArguments, DataArguments, DistillationTrainingArguments),
            default_config=ROOT / "recipes" / "configs" / "digits_distill_deit.yaml",
            args=arguments,
        )
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
