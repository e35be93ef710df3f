"""The teacher: its pixels, its label order, how it is opened."""

import json
import logging

import pytest
import timm.data
import torch
import torch.nn.functional as F
from tiny import DIGITS, digits, make_trainer, native_resnet, native_vit, timm_cnn
from torch import nn
from transformers import AutoModelForImageClassification, ViTImageProcessor

from nkd_hf import NKDLoss, SRRLLoss, create_student, load_teacher
from nkd_hf.data.labels import describe_synsets
from nkd_hf.models.labels import match_labels
from nkd_hf.models.preprocessing import Preprocessing, read_preprocessing
from nkd_hf.models.teacher import Teacher


def test_pixels_are_renormalised_and_resized_for_the_teacher():
    teacher = timm_cnn(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    teacher.config.pretrained_cfg["input_size"] = [3, 48, 48]
    student = timm_cnn(image_mean=[0.4] * 3, image_std=[0.3] * 3)
    raw = torch.rand(2, 3, 32, 32)
    aligned = load_teacher(teacher).align(read_preprocessing(student), student.config.id2label)
    got = aligned((raw - 0.4) / 0.3)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    with torch.no_grad():
        resized = F.interpolate(raw, (48, 48), mode="bilinear", antialias=True)
        expected = teacher.eval()((resized - mean) / std).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not got.requires_grad


def test_a_second_align_takes_the_place_of_the_first():
    teacher = load_teacher(timm_cnn(image_mean=[0.1, 0.2, 0.3]))
    first, second = (read_preprocessing(timm_cnn(image_mean=[mean] * 3)) for mean in (0.4, 0.6))
    pixels = torch.rand(2, 3, 32, 32)
    alone = load_teacher(timm_cnn(image_mean=[0.1, 0.2, 0.3])).align(second, DIGITS)(pixels)
    assert torch.equal(teacher.align(first, {i: str(9 - i) for i in range(10)}).align(second, DIGITS)(pixels), alone)
    # Its own pixels and order again.
    again = teacher.align(teacher.preprocessing, DIGITS)
    assert again.scale is None
    assert again.order is None


def test_larger_pixels_are_resized_down_without_aliasing():
    """One line in four is white. Without antialias all of them would be lost between the points that are read."""
    teacher = load_teacher(timm_cnn())
    seen = []
    teacher.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    lines = torch.arange(128).remainder(4).eq(0).float().expand(1, 3, 128, 128)
    teacher.align(read_preprocessing(timm_cnn()), DIGITS)(lines)
    assert seen[0].shape == (1, 3, 32, 32)
    torch.testing.assert_close(seen[0][..., 2:-2], torch.full((1, 3, 32, 28), 0.25), rtol=0, atol=0.02)


def test_equal_preprocessing_leaves_the_pixels_alone():
    teacher = timm_cnn()
    seen = []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.rand(2, 3, 32, 32)
    load_teacher(teacher).align(read_preprocessing(timm_cnn()), DIGITS)(pixels)
    assert seen[0] is pixels


def test_preprocessing_of_a_native_processor():
    processor = ViTImageProcessor(size={"height": 48, "width": 40}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    assert read_preprocessing(native_vit(), processor) == Preprocessing((0.4,) * 3, (0.2,) * 3, (48, 40), "bilinear")
    unscaled = ViTImageProcessor(do_rescale=False, image_mean=[127.5] * 3, image_std=[51.0] * 3)
    mean, std = read_preprocessing(native_vit(), unscaled)[:2]
    assert (*mean, *std) == pytest.approx((0.5, 0.5, 0.5, 0.2, 0.2, 0.2))
    assert read_preprocessing(native_vit()) is None
    assert read_preprocessing(timm_cnn().timm_model) is not None


def test_logits_are_permuted_to_the_students_order(tmp_path):
    teacher = timm_cnn(seed=1)
    student = timm_cnn()
    names = [str(9 - i) for i in range(10)]
    student.config.id2label = dict(enumerate(names))
    trainer = make_trainer(tmp_path, student, digits(0, 32), teacher=teacher, distillation_loss=NKDLoss())
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = teacher.eval()(pixels).logits
    torch.testing.assert_close(trainer.teacher(pixels), expected.flip(1))


def test_text_keys_permute_nothing(tmp_path):
    names = {i: f"class {i}" for i in range(12)}
    as_text = json.loads(json.dumps(names))

    def model(**labels):
        return create_student("resnet18", image_size=32, model_args={"channels": [8, 16, 32, 64]}, **labels)

    by_hand, teacher_by_hand = model(num_labels=12), model(num_labels=12)
    by_hand.config.id2label = teacher_by_hand.config.id2label = as_text
    for student in (model(id2label=as_text), by_hand):
        for teacher in (model(id2label=names), teacher_by_hand, Teacher(model(num_labels=12), id2label=as_text)):
            trainer = make_trainer(tmp_path, student, digits(0, 32), teacher=teacher, distillation_loss=NKDLoss())
            assert trainer.teacher.order is None
    odd = Teacher(model(num_labels=12), id2label={i + 1: "" for i in names}, name="odd")
    with pytest.raises(ValueError, match="odd's id2label must number its 12 classes from 0 to 11, got the number 12"):
        make_trainer(tmp_path, by_hand, digits(0, 32), teacher=odd, distillation_loss=NKDLoss())


def test_label_spaces(caplog):
    imagenet = {0: "crane", 1: "tench", 2: "crane"}
    assert match_labels(imagenet, dict(imagenet)) is None
    assert match_labels({0: "a", 1: "b", 2: "c"}, {0: "c", 1: "a", 2: "b"}) == [1, 2, 0]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert match_labels({0: "LABEL_0", 1: "LABEL_1"}, {0: "cat", 1: "dog"}) is None
    assert "the student's class names are generic" in caplog.text
    with pytest.raises(ValueError, match=r"class 1 is 'tench' for the student and 'crane' for the teacher"):
        match_labels(imagenet, {0: "crane", 1: "crane", 2: "tench"})
    for others in ("crane2", "crane, bird", "crane_2"):
        assert match_labels(imagenet, imagenet | {2: others}) is match_labels(imagenet | {0: others}, imagenet) is None
    # A name that repeats stands for no name that has nothing to do with it.
    for others in (["x", "tench", "y"], ["crane", "tench", "ostrich"], ["crane", "tench", "craned"]):
        for student, teacher in ((list(imagenet.values()), others), (others, list(imagenet.values()))):
            with pytest.raises(ValueError, match="name their classes differently: class"):
                match_labels(student, teacher)
    with pytest.raises(ValueError, match=r"class 1 is 'dog' for the student and 'cow' for the teacher"):
        match_labels({0: "cat", 1: "dog"}, {0: "cat", 1: "cow"})
    with pytest.raises(ValueError, match=r"has 3 classes and the student 2.*'cow' \(teacher\).*teacher of 2 classes"):
        match_labels({0: "cat", 1: "dog"}, {0: "cat", 1: "dog", 2: "cow"})


def test_teacher_from_a_folder(tmp_path):
    teacher = native_vit(seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 32), teacher=str(tmp_path / "teacher"), distillation_loss=NKDLoss()
    )
    assert trainer.teacher.preprocessing.mean == (0.5, 0.5, 0.5)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = teacher.eval()((pixels - 0.5) / 0.5).logits
    got = trainer.teacher((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_teacher_that_cannot_be_opened_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"could not be opened: give the id of an image classifier"):
        load_teacher(str(tmp_path))


def test_bare_timm_module_is_a_teacher(tmp_path):
    teacher = create_student(
        "resnet18", num_labels=10, image_size=32, model_args={"channels": [8, 16, 32, 64]}
    ).timm_model
    trainer = make_trainer(tmp_path, timm_cnn(), digits(0, 32), teacher=teacher, distillation_loss=NKDLoss())
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.compile,
        lambda module: torch.compile(nn.DataParallel(module)),
        lambda module: nn.DataParallel(torch.compile(load_teacher(module))),
    ],
)
def test_a_wrapped_teacher_keeps_its_names_and_preprocessing(wrap, one_process):
    plain = timm_cnn(seed=1)
    wrapped = wrap(plain)
    teacher = load_teacher(wrapped)
    assert teacher.id2label == DIGITS
    assert teacher.preprocessing == read_preprocessing(plain)
    teacher.align(teacher.preprocessing, list(reversed(DIGITS.values())))
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels), plain.eval()(pixels).logits.flip(1))


def test_native_module_is_normalised_as_the_folder_that_it_came_from(tmp_path):
    native_vit(seed=1).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    module = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert load_teacher(module).preprocessing == load_teacher(str(tmp_path)).preprocessing
    assert load_teacher(module).preprocessing.mean == (0.5, 0.5, 0.5)


def test_unknown_preprocessing_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        load_teacher(native_vit()).align(read_preprocessing(timm_cnn()), None)
    assert "The teacher's preprocessing is not known" in caplog.text
    assert "Pass the teacher as load_teacher(model, processing_class=its_image_processor)" in caplog.text


def test_half_precision_teacher(tmp_path):
    student = timm_cnn()
    teacher = native_resnet(seed=1).to(torch.bfloat16)
    trainer = make_trainer(tmp_path, student, digits(0, 32), teacher=teacher, distillation_loss=NKDLoss())
    assert trainer.teacher(torch.rand(2, 3, 32, 32)).isfinite().all()
    teacher.save_pretrained(tmp_path / "teacher")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "teacher")
    assert load_teacher(str(tmp_path / "teacher"))(torch.rand(2, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize("build", [timm_cnn, native_resnet, native_vit])
def test_settings_change_rounding_alone_and_not_the_module_that_was_handed_in(build):
    model, pixels = build(seed=1), torch.rand(4, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = load_teacher(model)(pixels)
    got = load_teacher(model).for_inference(channels_last=True)(pixels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for dtype, kind in (("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        teacher = load_teacher(model).for_inference(dtype)
        got = teacher(pixels)
        assert got.dtype == kind
        assert {parameter.dtype for parameter in teacher.parameters()} == {kind}
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item())
        # Its precision is its own, whatever the student trains in.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(teacher(pixels), got)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert load_teacher(model)(pixels).dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match="the teacher's dtype must be float32, bf16, fp16, got 'half'"):
        load_teacher(model).for_inference("half")


def test_the_trainers_arguments_set_the_teacher(tmp_path, monkeypatch):
    # The same graphs without their C++, which takes half a minute.
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend="aot_eager"))
    pixels, handed = torch.rand(2, 3, 32, 32), timm_cnn(seed=1)
    logits, losses = [], []
    for arguments in ({}, {"teacher_channels_last": True, "teacher_compile": True}, {"teacher_dtype": "bf16"}):
        trainer = make_trainer(
            tmp_path, timm_cnn(), digits(0, 32), teacher=handed, max_steps=2, **arguments,
            distillation_loss={"nkd": NKDLoss(), "srrl": SRRLLoss(64, 64)},
        )  # fmt: skip
        weights = (next(model.parameters()) for model in (trainer.teacher.model, handed))
        assert (len({weight.data_ptr() for weight in weights}) == 1) == (arguments == {})
        logits.append(trainer.teacher(pixels).float())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history[:2]])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits[2], logits[0], rtol=0, atol=0.03 * logits[0].abs().max().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.03)
    with pytest.raises(ValueError, match="teacher_dtype must be float32, bf16, fp16, got 'bfloat16'"):
        make_trainer(tmp_path, timm_cnn(), teacher_dtype="bfloat16")
    with pytest.raises(
        ValueError, match="teacher_dtype, teacher_compile set how a teacher computes, and there is none"
    ):
        make_trainer(tmp_path, timm_cnn(), teacher_dtype="bf16", teacher_compile=True)


def test_imagenet_matches_whichever_way_it_is_named():
    info = timm.data.ImageNetInfo()
    descriptions = info.label_descriptions(as_dict=True)
    synsets = info.label_names()
    timms = dict(enumerate(descriptions[synset] for synset in synsets))
    assert timms[134] == timms[517] == "crane"
    # The Hub's imagenet-1k (classes.py of huggingface/datasets) tells the two apart, since a ClassLabel must.
    hubs = timms | {517: "crane2"}
    assert match_labels(hubs, timms) is None
    assert match_labels(timms, hubs) is None
    # A folder of ImageNet is named by synsets, which the recipes describe.
    assert describe_synsets(synsets) == list(timms.values())
    with pytest.raises(ValueError, match="class 0 is 'Tench'"):
        match_labels(timms | {0: "Tench"}, timms)


def test_what_is_missing_beside_a_teacher_is_said(tmp_path):
    native_vit().save_pretrained(tmp_path / "run" / "teacher")
    with pytest.raises(
        ValueError, match=r"it has no image processor \(preprocessor_config.json\). Save the model's beside it"
    ):
        load_teacher(str(tmp_path / "run" / "teacher"))
    with pytest.raises(ValueError, match=r"but folders of models. Name one of them: .*/run/teacher"):
        load_teacher(str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"\(there is no folder 'run/studnt' here\)"):
        load_teacher("run/studnt")
    with pytest.raises(ValueError, match="teacher must be a Hub id, a folder or a module, got a dict"):
        load_teacher({})
