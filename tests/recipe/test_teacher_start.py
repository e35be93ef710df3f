"""How a pretrained teacher starts: as it is, by the names of its classes, or fine-tuned with a new head."""

from pathlib import Path

import pytest
import torch
from recipe_runs import run
from tiny import digit_folder

from nkd_hf import create_student, load_teacher
from nkd_hf.models.saving import save_student
from nkd_hf.recipe.recipe import Recipe

pytestmark = pytest.mark.usefixtures("no_curves")
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


def test_always_fine_tunes_a_teacher_of_the_same_classes(tmp_path, images):
    assert start(tmp_path, images, NAMES, "--finetune_teacher", "always").stages == ["teacher", "student"]


@pytest.mark.parametrize("arguments", [[], ["--finetune_teacher", "never"]])
def test_a_mismatch_names_finetune_teacher(tmp_path, images, arguments):
    with pytest.raises(ValueError, match=r"has 3 classes.*set finetune_teacher to auto") as error:
        start(tmp_path, images, ["cat", "dog", "owl"], *arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "student").exists()


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
