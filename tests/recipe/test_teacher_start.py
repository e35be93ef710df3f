"""How a pretrained teacher starts: as it is, by the names of its classes, or fine-tuned with a new head."""

from pathlib import Path

import pytest
import timm
import torch
from recipe_runs import run
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tiny import digit_folder
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from nkd_hf import cli, create_student, load_teacher
from nkd_hf.cli.teacher_logits import write_store
from nkd_hf.models.saving import save_student
from nkd_hf.recipe import time_budget
from nkd_hf.recipe.recipe import Recipe

pytestmark = pytest.mark.usefixtures("no_curves")
CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
NAMES = ["one", "three", "two", "zero"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """A folder of four classes with names, 24 training images and 8 to evaluate on."""
    return digit_folder(tmp_path_factory.mktemp("images"), ["zero", "one", "two", "three"], train=6, validation=2)


def teacher(folder: Path, names: list[str]) -> str:
    torch.manual_seed(0)
    save_student(
        create_student("resnet18", id2label=names, image_size=40, model_args={"channels": [4, 4, 8, 8]}), str(folder)
    )
    return str(folder)


def start(tmp_path: Path, images: str, names: list[str], *arguments: str) -> Recipe:
    return run(
        "distill_cnn", "--output_dir", str(tmp_path / "run"), "--dataset_name", images, "--compare_with_baseline", "false",
        "--teacher", teacher(tmp_path / "teacher", names), "--num_train_epochs", "1", "--per_device_train_batch_size", "8",
        *arguments,
    )  # fmt: skip


@pytest.mark.runs
def test_a_teacher_of_other_classes_is_fine_tuned_with_a_new_head(tmp_path, images, capsys):
    arguments = ["--finetune_teacher", "auto", "--teacher_epochs", "2", "--teacher_learning_rate", "0.02"]
    recipe = start(tmp_path, images, ["cat", "dog", "owl"], *arguments)
    saved = load_teacher(str(tmp_path / "run" / "teacher"))
    assert list(saved.id2label.values()) == NAMES
    assert saved.preprocessing.size == (40, 40)  # its own, not the student's 32
    assert "Training the teacher" in capsys.readouterr().out
    history = recipe.curves["teacher"]
    assert [epoch for epoch, _ in history][-1] == 2
    before = load_teacher(str(tmp_path / "teacher")).model.state_dict()
    moved = [
        name for name, value in saved.model.state_dict().items() if not torch.equal(value, before.get(name, value))
    ]
    assert any("conv1" in name for name in moved)
    assert recipe.results["teacher"] is not None
    assert recipe.results["distilled"] is not None
    # The same command continues the run: the teacher is not trained again.
    (tmp_path / "run" / "student" / "trainer_state.json").unlink()
    again = start(tmp_path, images, ["cat", "dog", "owl"], *arguments)
    assert "is trained already" in capsys.readouterr().out
    assert again.results == recipe.results


def test_a_teacher_that_has_more_classes_selects_those_of_the_data(tmp_path, images):
    names = ["two", "cat", "zero", "three", "dog", "one"]
    recipe = start(tmp_path, images, names)
    assert recipe.stages == ["student"]
    own = load_teacher(str(tmp_path / "teacher"))
    pixels = torch.randn(3, 3, 40, 40)
    expected = own(pixels)[:, [names.index(name) for name in NAMES]]
    prepared = recipe.teacher.copy().align(own.preprocessing, recipe.id2label)
    torch.testing.assert_close(prepared(pixels), expected)


@pytest.mark.runs
def test_always_fine_tunes_a_teacher_of_the_same_classes(tmp_path, images):
    assert start(tmp_path, images, NAMES, "--finetune_teacher", "always").stages == ["teacher", "student"]


@pytest.mark.parametrize("arguments", [[], ["--finetune_teacher", "never"]])
def test_a_mismatch_names_finetune_teacher(tmp_path, images, arguments):
    with pytest.raises(ValueError, match=r"has 3 classes.*set finetune_teacher to auto") as error:
        start(tmp_path, images, ["cat", "dog", "owl"], *arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "student").exists()


def backbone(folder: Path, library: str) -> str:
    """A folder of a pretrained model without a classifier, for images of 32 pixels."""
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model("resnet18", channels=(4, 4, 8, 8), num_classes=0)
        model.pretrained_cfg |= {"input_size": (3, 32, 32), "test_input_size": None}
        save_for_hf(model, str(folder), model_args={"channels": [4, 4, 8, 8]}, safe_serialization=True)
        return str(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.runs
@pytest.mark.parametrize(("library", "finetune"), [("transformers", "auto"), ("timm", "auto"), ("timm", "always")])
def test_a_teacher_without_a_classifier_gets_one_and_is_trained(
    tmp_path, images, library, finetune, capsys, monkeypatch
):
    classes = []

    def measure(trainer, name):
        classes.append((name, trainer.student.config.num_labels))
        return time_budget.Speed(name, 1, 0.1, 3, 0.0)

    monkeypatch.setattr(time_budget, "measure_speed", measure)
    folder = backbone(tmp_path / "backbone", library)
    # The last --teacher counts. An epoch of each of the two trainings takes 0.3 s.
    more = ["--teacher", folder, "--finetune_teacher", finetune, "--time_budget", "1s"]
    recipe = start(tmp_path, images, NAMES, *more)
    assert classes == [("teacher", 4), ("student", 4)]
    assert recipe.stages == ["teacher", "student"]
    said = capsys.readouterr().out
    assert "parameters, pretrained, without a classifier" in said
    assert "pretrained, new head of 4 classes" in said
    saved = load_teacher(str(tmp_path / "run" / "teacher"))
    assert list(saved.id2label.values()) == NAMES
    assert [epoch for epoch, _ in recipe.curves["teacher"]][-1] == 1
    # The same command continues the run: the teacher is not trained again.
    (tmp_path / "run" / "student" / "trainer_state.json").unlink()
    again = start(tmp_path, images, NAMES, *more)
    assert "The teacher in" in (said := capsys.readouterr().out)
    assert "is trained already" in said
    assert again.results == recipe.results


@pytest.mark.parametrize("arguments", [[], ["--finetune_teacher", "never"]])
def test_a_teacher_without_a_classifier_is_refused_where_it_is_not_trained(tmp_path, images, arguments):
    folder = backbone(tmp_path / "backbone", "transformers")
    expected = f"finetune_teacher must be auto or always for the teacher '{folder}', which has no classifier, got never. Set it"
    with pytest.raises(ValueError, match=expected) as error:
        start(tmp_path, images, NAMES, "--teacher", folder, *arguments)
    assert "\n" not in str(error.value)
    other = teacher(tmp_path / "other", NAMES)
    with pytest.raises(ValueError, match=r"is not opened: .* Or fine-tune it on the classes of the data first, alone"):
        start(tmp_path, images, NAMES, "--teacher", other, folder, "--finetune_teacher", "auto")


@pytest.mark.parametrize(
    ("names", "finetune", "expected"),
    [
        (["cat", "dog", "owl"], "auto", r"^the teacher \S+ must have a classifier of the data's classes for a store"),
        (None, "auto", r"^the teacher \S+ must have a classifier of the data's classes for a store"),
        (NAMES, "always", "^finetune_teacher must not be always for a store of logits"),
    ],
)
def test_a_store_of_logits_trains_no_pretrained_teacher(tmp_path, images, names, finetune, expected):
    """`never` is no way out where the classes differ, and is not named."""
    folder = teacher(tmp_path / "own", names) if names else backbone(tmp_path / "backbone", "transformers")
    arguments = ["--config", str(CONFIGS / "digits_distill_cnn.yaml"), "--dataset_name", images, "--use_cpu", "true"]
    arguments += ["--teacher", folder, "--teacher_args", "{}", "--finetune_teacher", finetune, "--epochs", "1"]
    with pytest.raises(ValueError, match=expected + r".*ine-tune the teacher first with nkd-hf distill") as error:
        write_store([*arguments, "--output", str(tmp_path / "store")])
    assert "never" not in str(error.value)
    assert not (tmp_path / "store" / "epoch-0").exists()


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ("encoder.layer.1.output.dense.bias", r"got 3 missing keys of 40, vit\.\S*1\S*bias first"),
        (None, "it has no image processor"),
    ],
)
def test_a_teacher_that_lacks_more_than_a_classifier_is_refused(tmp_path, images, lost, expected):
    folder = backbone(tmp_path / "backbone", "transformers")
    if lost is None:
        (Path(folder) / "preprocessor_config.json").unlink()
    else:
        file = Path(folder) / "model.safetensors"
        weights = load_file(file)
        del weights[lost]
        save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=expected):
        start(tmp_path, images, NAMES, "--teacher", folder, "--finetune_teacher", "auto")


@pytest.mark.parametrize("library", ["transformers", "timm", "tag"])
def test_the_plan_of_a_teacher_without_a_classifier(tmp_path, library, capsys):
    name = "timm/vit_small_patch14_dinov2.lvd142m" if library == "tag" else backbone(tmp_path / "backbone", library)
    arguments = [
        "plan",
        "--student",
        "resnet18",
        "--image_size",
        "32",
        "--num_classes",
        "2",
        "--num_train_images",
        "100",
    ]
    arguments += ["--num_processes", "1", "--teacher", name]
    cli.main([*arguments, "--finetune_teacher", "auto"])
    said = capsys.readouterr().out
    assert "trains          the teacher, then the student" in said
    assert "Note: the teacher gets a new head of 2 classes, and is fine-tuned on the data first" in said
    cli.main(arguments)
    assert "has no classifier: the run stops. Set finetune_teacher to auto." in capsys.readouterr().out


def test_a_bare_name_is_random_and_an_id_is_pretrained(capsys):
    from nkd_hf import RecipeArguments

    def name(teacher: str, init: str | None) -> str:
        return RecipeArguments(student="resnet18", teacher=teacher, teacher_init=init).teacher

    assert (
        name("resnet34", None) == name("resnet34", "random") == name("timm/resnet34.a1_in1k", "random") == "resnet34"
    )
    assert name("resnet34", "pretrained") == name("timm/resnet34.a1_in1k", None) == "timm/resnet34.a1_in1k"
    with pytest.raises(ValueError, match="teacher_init is random: random weights need the name of an architecture"):
        name("microsoft/resnet-18", "random")
    with pytest.raises(
        ValueError, match="teacher_init is pretrained: there are no pretrained weights of 'resnet18_cifar'"
    ):
        name("resnet18_cifar", "pretrained")
