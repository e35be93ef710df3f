"""The model card: what it claims, that the Hub can read it, and what is never in it."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from hub_card import card_errors
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image
from tiny import accuracy, digits, make_trainer, native_resnet, native_vit, timm_cnn, timm_deit
from torch import nn
from transformers import TrainerState, ViTImageProcessor

from nkd_hf import (
    DataArguments,
    DistillationLoss,
    DistillationTrainingArguments,
    NKDLoss,
    Recipe,
    RecipeArguments,
    USKDLoss,
    ViTKDLoss,
    create_student,
    parse_args,
)
from nkd_hf.hub.model_card.card import create_card, is_generated, with_repo_id, write_card
from nkd_hf.hub.model_card.curves import OTHER_DATASET, plot_curves, read_accuracies
from nkd_hf.hub.model_card.facts import CardInfo, describe_teacher
from nkd_hf.hub.model_card.text import hub_id, plain, plain_name
from nkd_hf.models.saving import save_student
from nkd_hf.models.teacher_loading import load_teacher
from nkd_hf.recipe.launch_line import launch_line
from nkd_hf.recipe.report import make_card_info

TOKEN = "hf_" + "abcDEF12" * 4
# What the Hub takes for each key, as far as it is documented.
STRINGS = {"library_name", "license", "pipeline_tag", "base_model_relation"}
LISTS = {"datasets", "metrics", "tags"}
HEADINGS = ["Results", "How to use", "Training", "Limitations", "Citation"]
HOSTILE = "a'b\"c `d` | e\n---\n# {{ f }} {% g %} <h> --> ![i](j) [k](l) *m* \\"


def training_log(steps: int = 3, evaluated: bool = True) -> list[dict]:
    log = []
    for step in range(1, steps + 1):
        log.append(
            {"step": step, "epoch": float(step), "loss": 3.0 / step, "task": 2.0 / step, "nkd_target": 1.0 / step}
        )
        if evaluated:
            log.append(evaluation(step, 0.2 * step))
    return log


def evaluation(step: int, top1: float, top5: float | None = 0.95) -> dict:
    entry = {"step": step, "epoch": float(step), "eval_loss": 1.0, "eval_accuracy": top1, "eval_runtime": 0.1}
    return entry if top5 is None else entry | {"eval_top5_accuracy": top5}


def trained(log: list[dict], step: int | None = None, **kwargs) -> TrainerState:
    step = max((entry["step"] for entry in log), default=0) if step is None else step
    return TrainerState(log_history=log, global_step=step, epoch=float(step), train_batch_size=16, **kwargs)


def make_args(folder, **kwargs) -> DistillationTrainingArguments:
    defaults = {"report_to": "none", "use_cpu": True, "hub_token": TOKEN, "num_train_epochs": 3}
    return DistillationTrainingArguments(str(folder), **(defaults | kwargs))


def make_card(folder, student=None, log=None, state=None, args=None, name="net", **kwargs) -> str:
    state = trained(training_log() if log is None else log) if state is None else state
    card = create_card(
        timm_cnn() if student is None else student,
        name=name,
        args=make_args(folder) if args is None else args,
        state=state,
        **kwargs,
    )
    return check_card(str(card), folder)


def check_card(text: str, folder) -> str:
    """What holds for each card: the Hub reads it, its structure is whole, and it tells nothing of this machine."""
    assert text.startswith("---\n")
    assert card_errors(text) == []
    front_matter = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    metadata = yaml.safe_load(front_matter[1])
    for key, value in metadata.items():
        if key in STRINGS:
            assert isinstance(value, str)
            assert value
        elif key in LISTS:
            assert isinstance(value, list)
            assert all(isinstance(item, str) and item for item in value)
            assert len(set(value)) == len(value)
        else:
            assert key in ("base_model", "model-index", "language")
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["library_name"] in ("timm", "transformers")
    assert {"license", "tags"} <= set(metadata)
    assert metadata.get("base_model_relation", "finetune") in ("adapter", "finetune", "merge", "quantized")
    json.dumps(metadata, allow_nan=False)
    for model in metadata.get("model-index", []):
        assert isinstance(model["name"], str)
        for result in model["results"]:
            assert result["task"]["type"] == "image-classification"
            assert all(isinstance(result["dataset"][key], str) for key in ("name", "type"))
            for metric in result["metrics"]:
                assert isinstance(metric["type"], str)
                assert 0 <= metric["value"] <= 1
    card = ModelCard(text)
    assert str(card) == text
    assert len(card.data.eval_results or []) == sum(
        len(result["metrics"]) for model in metadata.get("model-index", []) for result in model["results"]
    )
    assert is_generated(text)

    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    headings = [(tokens[i].tag, tokens[i + 1].content) for i in range(len(tokens)) if tokens[i].type == "heading_open"]
    assert [tag for tag, _ in headings] == ["h1"] + ["h2"] * (len(headings) - 1)
    assert [name for _, name in headings[1:]] in (HEADINGS, HEADINGS[:-1])
    assert [token.content.startswith("<!-- Written by nkd_hf") for token in tokens if token.type == "html_block"] == [
        True
    ]
    inline = [child for token in tokens for child in token.children or []]
    assert not [child for child in inline if child.type == "html_inline"]
    assert {child.attrs["src"] for child in inline if child.type == "image"} <= {"training_curves.png"}
    links = {child.attrs["href"] for child in inline if child.type == "link_open"}
    assert all(re.match(r"https://(huggingface\.co|arxiv\.org)/[\w./-]+$", link) for link in links)
    cells = [sum(t.type in ("td_open", "th_open") for t in row) for row in rows_of(tokens)]
    assert set(cells) <= {3}

    for secret in (str(folder), TOKEN[:12], "/tmp", "/home", " /", "=/", "/secret"):
        assert secret not in text
    return text


def rows_of(tokens) -> list[list]:
    rows = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if rows:
            rows[-1].append(token)
    return rows


def metadata_of(text: str) -> dict:
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


def table_of(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in rows[1:]}


def test_card_of_nkd(tmp_path):
    teacher = load_teacher(timm_cnn(1))
    teacher.name = "timm/resnet34.tv_in1k"
    info = CardInfo(
        dataset="uoft-cs/cifar100",
        dataset_config="default",
        dataset_split="test",
        num_train_images=1000,
        num_eval_images=500,
        teacher={"accuracy": 0.9, "top5_accuracy": 0.99},
        baseline={"accuracy": 0.5},
        augmentation="random_resized_crop=[0.08, 1.0]",
        launch="accelerate launch recipes/distill_cnn.py --learning_rate 0.1",
        license="apache-2.0",
        tags=["mine", "timm"],
    )
    args = make_args(
        tmp_path,
        learning_rate=0.1,
        base_batch_size=16,
        gradient_accumulation_steps=2,
        optim="sgd",
        optim_args="momentum=0.9",
        lr_scheduler_type="multistep",
        lr_scheduler_kwargs={"milestones": [1, 2], "gamma": 0.2},
        ema_decay=0.99,
        label_smoothing_factor=0.1,
        bf16=True,
        seed=7,
    )
    text = make_card(
        tmp_path,
        args=args,
        name="resnet18-nkd",
        repo_id="me/resnet18-nkd",
        teacher=teacher,
        losses={"nkd": NKDLoss(gamma=1.25, temperature=2.0)},
        info=info,
        curves="training_curves.png",
    )
    metadata = metadata_of(text)
    assert metadata["library_name"] == "timm"
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["uoft-cs/cifar100"]
    assert metadata["base_model"] == "timm/resnet34.tv_in1k"
    # No relation of the Hub's is a teacher's.
    assert "base_model_relation" not in metadata
    assert {"timm", "transformers", "knowledge-distillation", "nkd", "mine"} <= set(metadata["tags"])
    [result] = metadata["model-index"][0]["results"]
    assert metadata["model-index"][0]["name"] == "resnet18-nkd"
    assert result["dataset"] == {
        "name": "uoft-cs/cifar100",
        "type": "uoft-cs/cifar100",
        "config": "default",
        "split": "test",
        "args": {"num_images": 500},
    }
    assert result["metrics"] == [
        {"type": "accuracy", "value": 0.6, "name": "Top-1 accuracy"},
        {"type": "top5_accuracy", "value": 0.95, "name": "Top-5 accuracy"},
    ]
    assert list(table_of(text).values()) == [["90.00", "99.00"], ["50.00", ""], ["60.00", "95.00"]]
    assert "60.00 %; 50.00 % without distillation (+10.00 points)" in text
    for fact in (
        "Accuracy in % on 500 held-out images, [`uoft-cs/cifar100`](https://huggingface.co/datasets/uoft-cs/cifar100), "
        "split `test`:",
        "[`timm/resnet34.tv_in1k`](https://huggingface.co/timm/resnet34.tv_in1k)",
        "[NKD](https://arxiv.org/abs/2303.13005) (`gamma=1.25, temperature=2.0`)",
        "3 of 3 epochs, 3 optimiser steps",
        "cross-entropy (label smoothing 0.1)",
        "global batch: 32 = 16 x 2 accumulated x 1 processes",
        "`sgd` (`momentum=0.9`), learning rate 0.2",
        '`multistep` (`{"milestones": [1, 2], "gamma": 0.2}`)',
        "mixed precision: bf16",
        "data: [`uoft-cs/cifar100`](https://huggingface.co/datasets/uoft-cs/cifar100), 1000 images",
        "decay 0.99",
        "seed: 7",
        "`random_resized_crop=[0.08, 1.0]`",
        "```bash\naccelerate launch recipes/distill_cnn.py --learning_rate 0.1\n```",
        "](training_curves.png)",
        'pipeline("image-classification", model="me/resnet18-nkd")',
        'timm.create_model("hf-hub:me/resnet18-nkd", pretrained=True)',
        "@inproceedings{yang2023from",
        "transformers 5.",
    ):
        assert fact in text, fact
    assert "licence" not in text


def test_card_without_teacher_or_evaluation(tmp_path):
    text = make_card(tmp_path, log=training_log(evaluated=False), losses={"distillation": USKDLoss(64, 10)})
    metadata = metadata_of(text)
    assert not {"model-index", "base_model", "datasets", "metrics", "base_model_relation"} & set(metadata)
    assert {"self-distillation", "uskd"} <= set(metadata["tags"])
    assert metadata["license"] == "unknown"
    assert "No licence was set" in text
    assert "**Not evaluated**" in text
    assert "[USKD](https://arxiv.org/abs/2303.13005) (`alpha=1.0, beta=0.1, mu=0.005`)" in text
    assert not re.search(r"[Tt]op-1|teacher's|!\[|^\|", text, re.MULTILINE)
    # From a notebook, there is no launch line.
    assert "```bash" not in text
    assert 'timm.create_model("local-dir:net"' in text


def test_card_of_two_losses_and_of_a_loss_of_the_user(tmp_path):
    class OwnLoss(nn.Module):
        def extra_repr(self):
            return "weight=2"

    losses = {"nkd": NKDLoss(), "vitkd": ViTKDLoss(32, 48), "own": OwnLoss()}
    text = make_card(tmp_path, student=timm_deit(), teacher=load_teacher(timm_deit(1, width=48)), losses=losses)
    assert "ViTKD](https://arxiv.org/abs/2209.02432) (`alpha=3e-05, beta=3e-06, mask_ratio=0.5`)" in text
    assert "`OwnLoss` (`weight=2`)" in text
    assert "distilled from `deit_tiny_patch16_224` (" in text
    assert text.count("@inproceedings{yang2023from") == text.count("@article{yang2022vitkd") == 1
    assert {"nkd", "vitkd"} <= set(metadata_of(text)["tags"])
    # Neither a baseline nor the teacher was measured.
    assert len(table_of(text)) == 1
    assert "without distillation" not in text


def test_card_cites_what_a_loss_of_the_user_says_of_itself(tmp_path):
    class OwnLoss(DistillationLoss):
        name = "Own-1"
        paper = "https://arxiv.org/abs/1312.6184"
        citation = "@misc{own2026,\n  title = {Own}\n}"

    class HalvedLoss(NKDLoss):
        pass

    class OddLoss(nn.Module):
        name, paper, citation = "a](b) <c>\n# d", "https://arxiv.org/) [e](f", 7

    losses = {"own": OwnLoss(), "again": OwnLoss(), "halved": HalvedLoss(), "odd": OddLoss()}
    text = make_card(tmp_path, teacher=load_teacher(timm_cnn(1)), losses=losses)
    assert text.count("[Own-1](https://arxiv.org/abs/1312.6184)") == 4
    assert "```bibtex\n@misc{own2026,\n  title = {Own}\n}\n```" in text
    # Another method than NKD, which is not claimed.
    assert "`HalvedLoss` (`gamma=1.5, temperature=1.0`)" in text
    assert "2303.13005" not in text
    assert "`a](b) <c> # d`" in text
    assert {"own-1", "a](b) <c> # d"} <= set(metadata_of(text)["tags"])


def test_card_of_a_baseline(tmp_path):
    text = make_card(tmp_path, info=CardInfo(baseline={"accuracy": 0.4}))
    assert "trained with the cross-entropy alone" in text
    assert "## Citation" not in text
    assert not re.search("distillation|nkd$", " ".join(set(metadata_of(text)["tags"]) - {"nkd_hf"}))
    assert len(table_of(text)) == 1


def test_native_student_and_student_with_code_of_its_own(tmp_path):
    metadata = metadata_of(text := make_card(tmp_path, student=native_vit()))
    assert metadata["library_name"] == "transformers"
    assert not {"timm", "custom_code"} & set(metadata["tags"])
    assert "trust_remote_code" not in text
    assert "import timm" not in text
    metadata = metadata_of(text := make_card(tmp_path, student=create_student("resnet18_cifar", num_labels=10)))
    assert metadata["library_name"] == "transformers"
    assert "custom_code" in metadata["tags"]
    assert 'AutoModelForImageClassification.from_pretrained("net", trust_remote_code=True)' in text
    assert 'pipeline("image-classification", model="net", trust_remote_code=True)' in text
    assert "import timm" not in text


def test_student_that_was_opened_is_a_base_model(tmp_path):
    teacher = load_teacher(timm_cnn(1))
    teacher.name = "owner/teacher"
    student = timm_cnn()
    student.name_or_path = "owner/start"
    text = make_card(tmp_path, student=student, teacher=teacher, losses={"nkd": NKDLoss()})
    assert metadata_of(text)["base_model"] == ["owner/start", "owner/teacher"]
    assert metadata_of(text)["base_model_relation"] == "finetune"
    assert "started from [`owner/start`](https://huggingface.co/owner/start)" in text
    # Folders are none.
    save_student(timm_cnn(), str(tmp_path / "start"))
    folder = str(tmp_path / "start")
    student = create_student(folder, num_labels=10)
    teacher = load_teacher(folder)
    text = make_card(tmp_path, student=student, teacher=teacher, losses={"nkd": NKDLoss()})
    assert "base_model" not in metadata_of(text)
    assert "started from `start`" in text
    assert "distilled from `start` (" in text


def test_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for name in ("owner/name", "digits", None, "", "/data/x", "a/b/c", "a b/c", "./x", "data/*.parquet", "a/b..c"):
        assert hub_id(name) is None


@pytest.mark.parametrize(
    ("dataset", "listed", "kind", "words"),
    [
        ("digits", None, "sklearn-digits", "scikit-learn's digits"),
        ("/data/photos/flowers", None, "local", "`flowers`"),
        (["owner/one", "my photos", "owner/two"], ["owner/one", "owner/two"], "owner/one", "`my photos`"),
        (None, None, "unknown", "on held-out images:"),
    ],
)
def test_datasets(tmp_path, dataset, listed, kind, words):
    text = make_card(tmp_path, info=CardInfo(dataset=dataset))
    assert metadata_of(text).get("datasets") == listed
    assert metadata_of(text)["model-index"][0]["results"][0]["dataset"]["type"] == kind
    assert words in text


def test_several_evaluation_datasets_and_top1_alone(tmp_path):
    log = [
        {
            "step": 3,
            "epoch": 3.0,
            "eval_photos_accuracy": 0.5,
            "eval_photos_top5_accuracy": 0.9,
            "eval_photos_loss": 1.0,
        },
        {"step": 3, "epoch": 3.0, "eval_sketches_accuracy": 0.25, "eval_sketches_loss": 1.0},
    ]
    text = make_card(tmp_path, log=log, info=CardInfo(dataset="owner/images"))
    results = metadata_of(text)["model-index"][0]["results"]
    assert [result["dataset"]["name"] for result in results] == ["owner/images, photos", "owner/images, sketches"]
    assert [[metric["value"] for metric in result["metrics"]] for result in results] == [[0.5, 0.9], [0.25]]
    assert list(table_of(text).values()) == [["50.00", "90.00"], ["25.00", ""]]


class TestOnlyWhatWasMeasured:
    """The figures are those of the weights that are saved, or there are none."""

    def value(self, tmp_path, state, **kwargs):
        text = make_card(tmp_path, state=state, args=make_args(tmp_path, **kwargs))
        index = metadata_of(text).get("model-index")
        assert (index is None) == ("**Not evaluated**" in text)
        return index and index[0]["results"][0]["metrics"][0]["value"]

    def test_last_step(self, tmp_path):
        assert self.value(tmp_path, trained(training_log())) == 0.6

    def test_an_earlier_step_alone(self, tmp_path):
        state = trained([*training_log(), {"step": 4, "epoch": 4.0, "loss": 0.5}])
        assert self.value(tmp_path, state) is None
        text = make_card(tmp_path, state=state)
        assert "The last evaluation was at step 3 (top-1 60.00 %), and these are the weights of step 4" in text

    def test_best_step(self, tmp_path):
        log = [evaluation(1, 0.7), evaluation(2, 0.5)]
        best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
        # Before the end of training, the weights are the last step's.
        assert self.value(tmp_path, trained(log, best_global_step=1), **best) == 0.5
        end = {"step": 2, "epoch": 2.0, "train_runtime": 1.0}
        assert self.value(tmp_path, trained([*log, end], best_global_step=1), **best) == 0.7
        assert self.value(tmp_path, trained([*log, end], best_global_step=1)) == 0.5
        after = evaluation(2, 0.71)
        assert self.value(tmp_path, trained([*log, end, after], best_global_step=1), **best) == 0.71

    def test_other_metrics_and_nan_are_no_accuracy(self, tmp_path):
        assert self.value(tmp_path, trained([{"step": 1, "epoch": 1.0, "eval_loss": 1.0}])) is None
        assert self.value(tmp_path, trained([{"step": 1, "epoch": 1.0, "test_accuracy": 1.0}])) is None
        assert self.value(tmp_path, trained([evaluation(1, math.nan)])) is None

    def test_untrained(self, tmp_path):
        assert self.value(tmp_path, TrainerState()) is None

    def test_figures_must_be_fractions(self):
        with pytest.raises(ValueError, match=r"fractions from 0 to 1, got .*74\.4"):
            CardInfo(baseline={"accuracy": 74.4})
        with pytest.raises(ValueError, match="teacher must hold accuracy"):
            CardInfo(teacher={"top5_accuracy": 0.9})


def test_hostile_names(tmp_path):
    teacher = load_teacher(timm_cnn(1))
    teacher.name = HOSTILE
    student = timm_cnn()
    student.name_or_path = f"/secret/{HOSTILE}"
    secret = f"{HOSTILE} /secret/folder {TOKEN} file:///secret/x C:\\secret\\y"
    info = CardInfo(
        dataset=secret,
        dataset_config=secret,
        dataset_split=secret,
        teacher={"accuracy": 0.5},
        augmentation=secret,
        launch=f"python x.py --token {secret} ```\n# a",
        language=[secret],
        finetuned_from=secret,
        tags=[secret],
    )

    class OwnLoss(nn.Module):
        def extra_repr(self):
            return secret

    log = [{"step": 3, "epoch": 3.0, f"eval_{secret}_accuracy": 0.5}]
    kwargs = {"teacher": teacher, "losses": {"own": OwnLoss()}, "info": info, "curves": "training_curves.png"}
    args = make_args(tmp_path / "secret", optim_args=secret, run_name=secret)
    text = make_card(tmp_path, student, log, args=args, name=secret, repo_id=secret, **kwargs)
    assert "{{ f }}" in text
    assert "secret\\" not in text
    # Class names are not in the card at all, only their number.
    student.config.id2label = dict.fromkeys(range(10), HOSTILE)
    assert make_card(tmp_path, student, log, args=args, name=secret, repo_id=secret, **kwargs) == text


def test_plain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, expected in [
        (f"{tmp_path}/runs/x", "runs/x"),
        ("--output_dir=/home/me/runs/x/", "--output_dir=x"),
        ("a:/data/x", "a:x"),
        ('{"root": "/data/x"}', '{"root": "x"}'),
        ("//server/share", "share"),
        ("file:///data/x", "x"),
        ("C:\\Users\\me\\x", "x"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("../runs/x a/b 1/2 ~/x", "../runs/x a/b 1/2 ~/x"),
        (f"x{TOKEN} {TOKEN}", f"x{TOKEN} <TOKEN>"),
        ("a\x00b\u2028c\udc80", "a b c?"),
    ]:
        assert plain(text) == expected


def test_a_name_with_spaces_is_a_path_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, expected in [
        ("/secret/john doe/flowers", "flowers"),
        ("/secret/john doe/my flowers/", "my flowers"),
        (f"{tmp_path}/my runs/x", "my runs/x"),
        ("--output_dir=/secret/john doe/x", "--output_dir=x"),
        ("--x=~/john doe/x", "--x=x"),
        ("~/john doe/x", "x"),
        ("local-dir:/secret/john doe/x", "local-dir:x"),
        ("file:///secret/john doe/x", "x"),
        ("--x=C:\\Users\\john doe\\x", "--x=x"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("a=1, b=/secret/x", "a=1, b=x"),
        ("owner/flowers", "owner/flowers"),
    ]:
        assert plain_name(text) == expected
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
    argv = ["/secret/john doe/train.py", "--dataset_name", "/secret/john doe/flowers", "--x=/secret/john doe/a b"]
    assert launch_line(argv) == "python train.py --dataset_name flowers '--x=a b'"
    teacher = load_teacher(timm_cnn(1))
    teacher.name = "/secret/john doe/teacher"
    info = CardInfo(dataset="/secret/john doe/flowers", finetuned_from="/secret/john doe/start")
    kwargs = {"teacher": teacher, "losses": {"nkd": NKDLoss()}, "info": info}
    assert "john" not in (text := make_card(tmp_path, name="/secret/john doe/net", **kwargs))
    assert "doe" not in text


def test_evaluations_of_other_data_are_not_held_out(tmp_path):
    log = [*training_log(), {"train_runtime": 1.0, "step": 3, "epoch": 3.0}]
    by_hand = evaluation(3, 0.99) | {OTHER_DATASET: True}
    assert make_card(tmp_path, log=[*log, by_hand]) == make_card(tmp_path, log=log)
    plot_curves([*training_log(), evaluation(4, 0.7) | {OTHER_DATASET: True}], tmp_path / "a.png")
    plot_curves(training_log(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("several", [False, True])
def test_trainer_marks_evaluations_of_other_data(tmp_path, several):
    own = {"a": digits(0, 8), "b": digits(8, 24)} if several else digits(0, 8)
    trainer = make_trainer(
        tmp_path,
        timm_cnn(),
        digits(24, 40),
        own,
        compute_metrics=accuracy,
        distillation_loss=USKDLoss(32, 10),
    )
    names = ["eval_a", "eval_b"] if several else ["eval"]
    trainer.evaluate()
    trainer.evaluate(own)
    held_out = trainer.state.log_history[:]
    assert all(f"{name}_accuracy" in entry for name, entry in zip(names * 2, held_out, strict=True))
    assert not any(OTHER_DATASET in entry for entry in held_out)
    trainer.evaluate(trainer.train_dataset)
    trainer.evaluate({"train": trainer.train_dataset})
    others = trainer.state.log_history[len(held_out) :]
    assert [entry[OTHER_DATASET] for entry in others] == [True, True]
    # The log is what a checkpoint keeps.
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "state.json")).log_history == trainer.state.log_history


def test_percentages_are_left_out(tmp_path, caplog):
    # The first is a fraction by its value alone.
    log = [evaluation(1, 0.9, 0.95), evaluation(2, 74.4, 0.96)]
    text = make_card(tmp_path, log=log)
    assert "eval_accuracy, which was logged as 74.4: compute_metrics must return fractions from 0 to 1" in caplog.text
    assert "model-index" not in metadata_of(text)
    assert "**Not evaluated**" in text
    text = make_card(tmp_path, log=[evaluation(3, 0.5, 95.0)])
    assert "| 50.00 |  |" in text


@pytest.mark.parametrize(
    ("license", "message"),
    [
        ("Apache 2.0", "got 'Apache 2.0': write apache-2.0"),
        ("MIT", "got 'MIT': write mit"),
        ("apache2", "is apache-2.0 meant"),
        ("my own terms entirely", "write other"),
    ],
)
def test_license_must_be_known_to_the_hub(license, message):
    with pytest.raises(ValueError, match=message):
        CardInfo(license=license)
    with pytest.raises(ValueError, match=message):
        CardInfo().updated(license=license)
    for known in (None, "other", "cc-by-nc-4.0"):
        assert CardInfo(license=known).license == known


def test_teacher_that_was_opened_is_a_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm_cnn(1)
    model.config.name_or_path = "timm/resnet34.tv_in1k"
    card = {"losses": {"nkd": NKDLoss()}}
    assert (
        metadata_of(make_card(tmp_path, teacher=load_teacher(model), **card))["base_model"] == "timm/resnet34.tv_in1k"
    )
    for folder in ("runs/teacher", str(tmp_path / "runs")):
        (tmp_path / "runs" / "teacher").mkdir(parents=True, exist_ok=True)
        model.config.name_or_path = folder
        assert "base_model" not in metadata_of(make_card(tmp_path, teacher=load_teacher(model), **card))


def test_launch_line(tmp_path, monkeypatch):
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    argv = ["/somewhere/recipes/distill_deit.py", "--config", f"{tmp_path}/my configs/a.yaml", "--hub_token", TOKEN]
    argv += [f"--hub_token={TOKEN}", "--loss_args", '{"gamma": 1.0}', "--include_num_input_tokens_seen", "true"]
    rest = "recipes/distill_deit.py --config 'my configs/a.yaml' --loss_args '{\"gamma\": 1.0}' "
    rest += "--include_num_input_tokens_seen true"
    # A recipe is launched by accelerate, however it was this time.
    assert launch_line(argv) == f"accelerate launch {rest}"
    config = "accelerate launch --config_file recipes/accelerate/"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("WORLD_SIZE", "8")
    bf16 = f"--num_processes 8 --mixed_precision bf16 {rest}"
    assert launch_line(argv) == f"{config}eight_gpus.yaml {bf16}"
    assert launch_line([*argv, "--use_cpu", "true"]) == f"{config}cpu.yaml {bf16} --use_cpu true"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launch_line(argv) == f"{config}fsdp2.yaml {bf16}"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    machines = "--num_machines 2 --main_process_ip IP --machine_rank 0"
    assert launch_line(argv) == f"{config}two_machines.yaml --num_processes 8 {machines} --mixed_precision bf16 {rest}"
    own = ["/somewhere/train.py"]
    assert launch_line(own) == (
        f"accelerate launch --multi_gpu --num_processes 8 {machines} --mixed_precision bf16 train.py"
    )
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert launch_line(own) == "torchrun --nnodes 2 --nproc_per_node 4 train.py"
    monkeypatch.delenv("WORLD_SIZE")
    # A script elsewhere goes by its name; what is no script of the user's goes by none.
    assert launch_line(["/somewhere/train.py"]) == "python train.py"
    assert launch_line([str(tmp_path / "examples" / "train.py")]) == "python examples/train.py"
    assert launch_line(["", "-f", "kernel.json"]) is launch_line(["/x/pytest/__main__.py"]) is None
    assert launch_line() is None


class TestCurves:
    def test_same_log_same_bytes(self, tmp_path):
        assert plot_curves(training_log(), tmp_path / "a.png", levels={"baseline": 0.5})
        assert plot_curves(training_log(), tmp_path / "b.png", levels={"baseline": 0.5})
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.size[0] >= 1600
            assert not {"Software", "Creation Time"} & set(picture.info)
        plot_curves(training_log(), tmp_path / "b.png")
        assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()

    def test_never_evaluated(self, tmp_path):
        path = tmp_path / "curves.png"
        path.write_text("of an earlier run")
        assert not plot_curves(training_log(evaluated=False), path)
        assert not path.exists()
        assert not plot_curves([], path)

    def test_odd_logs(self, tmp_path):
        path = tmp_path / "curves.png"
        assert plot_curves([evaluation(1, 0.5)], path, x_axis="step")
        log = [{"step": 1, "epoch": 1.0, "loss": math.nan}, {"step": 2, "epoch": 2.0, "loss": math.inf, "note": "a"}]
        assert plot_curves([*log, evaluation(2, 0.5, None)], path)
        log = [{"step": 1, "epoch": 1.0, "loss": 1.0, "task": 1.0, "_$a$": 0.5}]
        assert plot_curves([*log, {"step": 1, "epoch": 1.0, "eval_$_\nx_accuracy": 0.5}], path)

    def test_nothing_hides_a_curve(self, tmp_path, monkeypatch):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
        components = {f"{loss}_{part}": 1.0 for loss in ("nkd", "uskd", "vitkd") for part in ("target", "other")}
        levels = {"teacher": 0.9, "baseline": 0.5}
        for log in (training_log(1), [evaluation(1, 0.5), {"step": 1, "epoch": 1.0, "loss": 3.0, **components}]):
            plot_curves(log, tmp_path / "curves.png", levels=levels)
        for figure in figures:
            figure.draw_without_rendering()
            for panel in figure.axes:
                legend = panel.get_legend().get_window_extent()
                assert legend.y1 < panel.get_window_extent().y0
                assert legend.y0 > 0
                # Of one evaluation, too, the steps are whole.
                assert all(tick == int(tick) for tick in panel.get_xticks())
        colours = [line.get_color() for line in figures[1].axes[1].get_lines()]
        assert len(set(colours)) == len(colours) == 7


class TestEditedByAPerson:
    def test_hash(self, tmp_path):
        text = make_card(tmp_path)
        assert is_generated(text.replace("\n", "\r\n"))
        assert is_generated(text.replace("\n", "\r"))
        assert is_generated("\ufeff" + text + "\n\n")
        assert is_generated(text.rstrip())
        assert not is_generated(text.replace("license: unknown", "license: mit"))
        assert not is_generated(text + "A word of my own.\n")
        assert not is_generated(text.rpartition("<!--")[0])
        assert not is_generated(text.replace("## Limitations", "## Limits"))
        assert not is_generated("")

    def test_with_repo_id(self, tmp_path):
        for name in ("net", HOSTILE):
            for student in (timm_cnn(), create_student("resnet18_cifar")):
                text = with_repo_id(make_card(tmp_path, student, name=name), "me/net")
                assert is_generated(text)
                assert text.count('"me/net"') == 3
                assert text.count('"hf-hub:me/net"') == (student.config.model_type == "timm_wrapper")
                assert with_repo_id(text.replace("\n", "\r\n"), "me/net") == text
        expected = make_card(tmp_path, repo_id="me/net")
        assert with_repo_id(make_card(tmp_path), "me/net") == expected
        assert with_repo_id(expected + "Mine.", "me/other") == expected + "Mine."
        assert with_repo_id(with_repo_id(expected, "me/net", "v2"), "me/net", "main") == expected

    def test_write_card(self, tmp_path, caplog):
        path, state = tmp_path / "README.md", trained(training_log())

        def write():
            return write_card(tmp_path, timm_cnn(), name="net", args=make_args(tmp_path), state=state)

        assert write()
        first = path.read_text()
        assert "](training_curves.png)" in check_card(first, tmp_path)
        state.log_history = training_log(evaluated=False)
        assert write()
        assert path.read_text() != first
        assert "](training_curves.png)" not in check_card(path.read_text(), tmp_path)
        assert not (tmp_path / "training_curves.png").exists()
        path.write_text("# Mine")
        assert not write()
        assert path.read_text() == "# Mine"
        assert "is kept, since a person" in caplog.text


def test_the_arguments_of_create_model_card():
    info = CardInfo(dataset="owner/a", license="mit", tags=["a"])
    assert info.updated() == info
    assert info.updated(
        language="en",
        license="apache-2.0",
        tags="b",
        finetuned_from="owner/start",
        tasks=["c"],
        dataset_tags=["owner/b"],
        dataset=["B"],
        dataset_args="plain",
    ) == CardInfo(
        dataset=["owner/b"],
        dataset_config="plain",
        license="apache-2.0",
        language="en",
        finetuned_from="owner/start",
        tags=["a", "b", "c"],
    )
    assert info.tags == ["a"]


def test_card_of_a_trainer(tmp_path):
    folder = tmp_path / "deit-nkd"
    trainer = make_trainer(
        folder,
        timm_deit(),
        digits(0, 32),
        digits(32, 64),
        teacher=timm_cnn(1),
        distillation_loss={"nkd": NKDLoss(gamma=1.0)},
        card_info=CardInfo(dataset="digits", license="mit"),
        compute_metrics=accuracy,
        hub_token=TOKEN,
        hub_model_id="me/deit-nkd",
        max_steps=2,
        warmup_steps=0.1,
    )
    trainer.train()
    trainer.create_model_card()
    text = check_card((folder / "README.md").read_text(), tmp_path)
    assert "**Not evaluated**" in text
    assert not (folder / "training_curves.png").exists()
    top1 = trainer.evaluate()["eval_accuracy"]
    trainer.create_model_card("en", tags="mine", dataset_tags="owner/digits", dataset="Digits", license="apache-2.0")
    text = check_card((folder / "README.md").read_text(), tmp_path)
    metadata = metadata_of(text)
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == round(top1, 5)
    assert metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en"]
    assert metadata["datasets"] == ["owner/digits"]
    assert "mine" in metadata["tags"]
    assert "distilled from `resnet18` (" in text
    assert "- length: 2 optimiser steps\n" in text
    assert "- schedule: `linear`, warm-up 10 %\n" in text
    assert 'model="me/deit-nkd"' in text
    with Image.open(folder / "training_curves.png") as picture:
        assert picture.size[0] >= 1600
    # The trainer's own is as it was.
    assert trainer.card_info == CardInfo(dataset="digits", license="mit")


def test_card_info_of_a_recipe(tmp_path):
    classes = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    config = str(Path(__file__).parents[2] / "recipes" / "configs" / "digits_distill_cnn.yaml")
    options = ["--config", config, "--output_dir", str(tmp_path), "--license", "mit", "--max_eval_samples", "40"]
    recipe = Recipe(*parse_args(classes, args=options))
    recipe.accuracies = {"baseline": {"accuracy": 0.5, "top5_accuracy": 0.75}}
    info = make_card_info(recipe.args, recipe.data_args, recipe.data, recipe.accuracies)
    assert (info.dataset, info.dataset_split, info.license) == ("digits", None, "mit")
    assert (info.num_train_images, info.num_eval_images) == (1437, 40)
    assert (info.teacher, info.baseline) == (None, {"accuracy": 0.5, "top5_accuracy": 0.75})
    assert info.augmentation.startswith("random_")
    # pytest is no launch line.
    assert info.launch is None


@pytest.mark.parametrize("make_student", [timm_cnn, native_resnet])
def test_the_code_of_the_card_runs(tmp_path, monkeypatch, capsys, make_student):
    monkeypatch.chdir(tmp_path)
    student = make_student()
    save_student(student, "net")
    if make_student is native_resnet:
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("net")
    Image.new("RGB", (48, 40), "red").save("image.png")
    blocks = re.findall(r"```python\n(.*?)\n```", make_card(tmp_path, student=student), re.DOTALL)
    assert len(blocks) == (3 if make_student is timm_cnn else 2)
    logits = []
    for block in blocks:
        names = {}
        exec(block, names)
        logits.append(names.get("logits"))
    assert {"score", "label"} <= set(re.findall(r"\w+", capsys.readouterr().out))
    assert logits[1].shape == (1, 10)
    if make_student is timm_cnn:
        assert (logits[1] - logits[2]).abs().max() < 1e-5


def test_balanced_accuracy_is_no_accuracy_on_a_dataset_of_that_name():
    balanced = {"eval_balanced_accuracy": 0.5}
    assert read_accuracies({"eval_accuracy": 0.75, "eval_loss": 1.0} | balanced) == {"": {"accuracy": 0.75}}
    assert read_accuracies(balanced) == {"balanced": {"accuracy": 0.5}}
    photos = {"eval_photos_accuracy": 0.75, "eval_photos_balanced_accuracy": 0.5}
    assert read_accuracies(photos) == {"photos": {"accuracy": 0.75}}


def test_card_of_an_ensemble(tmp_path):
    first, second = timm_cnn(1), timm_cnn(2)
    first.config.name_or_path = "timm/resnet34.tv_in1k"
    own = load_teacher(second)
    own.name = str(tmp_path / "teachers" / "mine")
    info = CardInfo(teacher={"accuracy": 0.9}, teacher_on_student_pixels={"accuracy": 0.8})
    teacher = load_teacher([first, own], weights=[3, 1])
    text = make_card(tmp_path, teacher=teacher, losses={"nkd": NKDLoss()}, info=info)
    link = "[`timm/resnet34.tv_in1k`](https://huggingface.co/timm/resnet34.tv_in1k)"
    assert (
        f"distilled from an ensemble of {link} (190 k parameters, weight 0.75) and `mine` (190 k parameters, weight 0.25) with"
        in text
    )
    assert metadata_of(text)["base_model"] == "timm/resnet34.tv_in1k"
    assert list(table_of(text).values())[:2] == [["90.00", ""], ["80.00", ""]]
    assert "the teachers together, `resnet18` + `resnet18`, on the student's pixels" in text
    # A store of their logits has the same text.
    described = describe_teacher(teacher, ["timm/resnet34.tv_in1k", "mine"])
    assert make_card(tmp_path, teacher=described, losses={"nkd": NKDLoss()}, info=info) == text


@pytest.mark.parametrize("is_here", [True, False])
def test_a_card_in_a_folder_opens_that_folder(tmp_path, monkeypatch, is_here):
    """As a recipe does, whose student lies in its run's folder; the card does not show other folders of this machine."""
    monkeypatch.chdir(tmp_path if is_here else "/")
    folder = tmp_path / "out" / "student"
    folder.mkdir(parents=True)
    state = trained(training_log())
    assert write_card(folder, timm_cnn(), name="out", args=make_args(folder), state=state)
    text = (folder / "README.md").read_text()
    source = "out/student" if is_here else "path/to/student"
    assert f'pipeline("image-classification", model="{source}")' in text
    assert f'timm.create_model("local-dir:{source}"' in text
    assert text.count("# out") == 1
    monkeypatch.chdir(folder)
    assert write_card(folder, timm_cnn(), name="out", args=make_args(folder), state=state)
    assert 'pipeline("image-classification", model=".")' in (folder / "README.md").read_text()
