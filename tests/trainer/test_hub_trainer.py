"""What the trainer and the recipes push, and when."""

import json
import os
import re
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from hub_server import TOKEN, Failure
from huggingface_hub import snapshot_download
from PIL import Image
from processes import in_processes
from recipe_runs import run as run_recipe
from tiny import accuracy, digits, make_trainer, native_vit, timm_cnn
from transformers import AutoModelForImageClassification, ViTImageProcessor

from nkd_hf import NKDLoss, USKDLoss
from nkd_hf.errors import PushError
from nkd_hf.trainer import pushing

STUDENT = {"config.json", "model.safetensors", "README.md", "training_curves.png", "training_args.yaml"}
DATA = {"train": digits(0, 64), "evaluation": digits(64, 96)}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """A picture is a file of its points: these tests look at names and changes, and drawing takes a third of their time."""

    def write_points(figure, path, **kwargs):
        lines = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
        Path(path).write_text(json.dumps(lines))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", write_points)


def trainer_of(folder, model=None, **kwargs):
    """A student with an auxiliary head, a token in its arguments, and checkpoints."""
    defaults = {
        "distillation_loss": USKDLoss(32, 10),
        "hub_token": TOKEN,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "compute_metrics": accuracy,
    }
    return make_trainer(str(folder), model or timm_cnn(), **DATA, **(defaults | kwargs))


def assert_nothing_secret(hub, folder):
    sent = hub.everything_received()
    for secret in (TOKEN, str(folder), os.getcwd() + "/", "training_args.bin"):
        assert secret.encode() not in sent, secret


def test_push_at_the_end_is_the_student_alone(hub, tmp_path):
    trainer = trainer_of(tmp_path / "student")
    trainer.train()
    trainer.evaluate()
    assert not hub.requests
    commit = trainer.push_to_hub()
    repo = hub.repos["models/me/student"]
    assert set(repo.files()) == {".gitattributes", *STUDENT}
    assert commit.oid == repo.branches["main"]
    assert repo.messages[-1] == "End of training"
    assert_nothing_secret(hub, tmp_path)
    settings = yaml.safe_load(repo.files()["training_args.yaml"])
    assert settings["output_dir"] == "student"
    assert settings["hub_token"] == "<HUB_TOKEN>"
    assert settings["learning_rate"] == 1e-3
    card = repo.files()["README.md"].decode()
    assert "](training_curves.png)" in card
    assert "me/student" in card
    opened = AutoModelForImageClassification.from_pretrained("me/student")
    pixels = torch.stack([row["pixel_values"] for row in DATA["evaluation"]])
    with torch.no_grad():
        assert (opened(pixels).logits - trainer.student.eval()(pixels).logits).abs().max() < 1e-5
    # A second push without a change is none; one with another card keeps what a person wrote.
    repo.add({"README.md": "written by hand\n"})
    trainer.args.learning_rate = 2e-3
    trainer.push_to_hub(commit_message="Again")
    assert repo.files()["README.md"] == b"written by hand\n"
    assert yaml.safe_load(repo.files()["training_args.yaml"])["learning_rate"] == 2e-3
    trainer.push_to_hub(overwrite_card=True, blocking=False).result()
    assert repo.files()["README.md"] != b"written by hand\n"


def test_the_card_of_a_branch_opens_the_branch(hub, tmp_path, monkeypatch, capsys):
    repo = hub.create("me/student")
    repo.branches["v2"] = repo.branches["main"]
    trainer = trainer_of(tmp_path / "student", hub_revision="v2")
    trainer.push_to_hub()
    # The main branch holds no student.
    assert set(repo.files()) == {".gitattributes"}
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 40), "red").save("image.png")
    blocks = re.findall(r"```python\n(.*?)\n```", repo.files("v2")["README.md"].decode(), re.DOTALL)
    assert len(blocks) == 3
    logits = []
    for block in blocks:
        names = {}
        exec(block, names)
        logits.append(names.get("logits"))
    assert (logits[1] - logits[2]).abs().max() < 1e-5
    assert "score" in capsys.readouterr().out
    trainer.push_to_hub(revision="main")
    card = repo.files()["README.md"].decode()
    assert 'model="me/student")' in card
    assert "revision" not in card
    assert "@v2" not in card


def test_native_student_from_a_folder_that_was_opened(hub, tmp_path):
    native_vit().save_pretrained(tmp_path / "start")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "start")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "start")
    trainer = trainer_of(tmp_path / "vit", model, distillation_loss=NKDLoss(), teacher=timm_cnn(1))
    trainer.processing_class = processor
    trainer.push_to_hub(private=True)
    repo = hub.repos["models/me/vit"]
    # Nothing was trained, so that there are no curves.
    assert set(repo.files()) == {".gitattributes", "preprocessor_config.json", *STUDENT} - {"training_curves.png"}
    assert repo.private
    assert_nothing_secret(hub, tmp_path)


@pytest.mark.runs
@pytest.mark.parametrize("strategy", ["end", "checkpoint", "all_checkpoints"])
def test_strategies(hub, tmp_path, strategy):
    trainer = trainer_of(tmp_path / "student", push_to_hub=True, hub_strategy=strategy, hub_always_push=True,
                         save_total_limit=1, hub_private_repo=True)  # fmt: skip
    repo = hub.repos["models/me/student"]
    assert repo.private
    trainer.train()
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "distillation_losses.safetensors",
             "checkpoint_files.json", "sums_since_log.json"}  # fmt: skip
    checkpoint = state | {"config.json", "model.safetensors", "training_args.yaml"}
    folders = {"end": [], "checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}
    folders = folders[strategy]
    student = set() if strategy == "end" else STUDENT
    wanted = {".gitattributes", *student, *(f"{folder}/{name}" for folder in folders for name in checkpoint)}
    assert set(repo.files()) == wanted
    messages = [f"Training in progress, step {step}{what}" for step in (2, 4) for what in ("", ", checkpoint")]
    assert repo.messages == ["initial commit", *([] if strategy == "end" else messages)]
    # The last save has pushed these weights already.
    trainer.save_model()
    assert repo.messages[-1] == ("Model save" if strategy == "end" else messages[-1])
    assert set(repo.files()) == wanted | STUDENT
    assert_nothing_secret(hub, tmp_path)
    assert [path.name for path in (tmp_path / "student").glob("_push-*")] == []
    if strategy == "checkpoint":
        pulled = snapshot_download("me/student", allow_patterns="last-checkpoint/*", local_dir=tmp_path / "pulled")
        resumed = []
        for checkpoint in (os.path.join(pulled, "last-checkpoint"), str(tmp_path / "student" / "checkpoint-4")):
            resumed.append(trainer_of(tmp_path / "resumed", max_steps=6, save_strategy="no", eval_strategy="no"))
            resumed[-1].train(resume_from_checkpoint=checkpoint)
            assert resumed[-1].state.global_step == 6
        torch.testing.assert_close(resumed[0].model.state_dict(), resumed[1].model.state_dict(), rtol=0, atol=0)


def test_a_push_that_is_not_done_is_not_overtaken(hub, tmp_path):
    trainer = trainer_of(tmp_path / "student", push_to_hub=True, hub_strategy="every_save")
    hub.fail = Failure("commit", "wait")  # until training is over
    trainer._finish_current_push = lambda: None
    trainer.train()
    assert not trainer.push_in_progress.is_done()
    hub.fail = None
    trainer.push_in_progress.wait_until_done()
    # The second save found the first one's push under way.
    repo = hub.repos["models/me/student"]
    assert repo.messages == ["initial commit", "Training in progress, step 2"]
    assert repo.files()["config.json"] == (tmp_path / "student" / "config.json").read_bytes()
    del trainer._finish_current_push
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=True)
    # every_save: the student alone.
    assert repo.messages[2:] == ["Training in progress, step 6"]
    assert set(repo.files()) == {".gitattributes", *STUDENT}


def test_failures_during_training_stop_nothing(hub, tmp_path, caplog):
    folder = tmp_path / "student"
    trainer = trainer_of(folder, push_to_hub=True, hub_strategy="checkpoint", hub_always_push=True)
    repo = hub.repos["models/me/student"]
    hub.fail = Failure("commit", 500)
    trainer.train()
    assert trainer.state.global_step == 4
    said = [record.message for record in caplog.records if record.name == "nkd_hf.trainer.pushing"]
    assert len(said) == 4
    assert said[0].startswith(f"the push of {folder} to me/student failed: server error of the Hub (500: ")
    assert (
        f"To push it again:\n    nkd-hf push {folder} me/student --commit_message 'Training in progress, step 2'\nTraining"
        in said[0]
    )
    assert said[1].startswith(f"the push of {folder / 'checkpoint-2'} to me/student failed: server error")
    again = (
        r"(?s)failed: server error .* is lost: .*\n    nkd-hf push .*student me/student --commit_message 'End of tr"
    )
    with pytest.raises(PushError, match=again):
        trainer.push_to_hub()
    # In the background, it is said as well.
    caplog.clear()
    job = trainer.push_to_hub(blocking=False)
    with pytest.raises(PushError, match=again):
        job.result()
    for _ in range(100):  # A future calls back after its result is there.
        said = [record.message for record in caplog.records if record.name == "nkd_hf.trainer.pushing"]
        if said:
            break
        time.sleep(0.01)
    assert said == [str(job.exception())]
    assert set(repo.files()) == {".gitattributes"}
    assert set(os.listdir(folder)) >= STUDENT
    hub.fail = None
    trainer.push_to_hub()
    assert set(repo.files()) == {".gitattributes", *STUDENT}


def test_the_student_is_saved_before_the_repo_is_made(hub, tmp_path):
    trainer = trainer_of(tmp_path / "student")
    hub.fail = Failure("create", 500)
    with pytest.raises(PushError, match=r"(?s)server error of the Hub .*nkd-hf push .*/student student"):
        trainer.push_to_hub()
    assert (tmp_path / "student" / "model.safetensors").exists()


def test_a_repo_that_cannot_be_made_is_said_before_training(hub, tmp_path, monkeypatch):
    with pytest.raises(
        PushError, match=r"^the repo them/student could not be made or reached on the Hub: the token may n"
    ):
        trainer_of(tmp_path, push_to_hub=True, hub_model_id="them/student")
    hub.create("me/student")
    with pytest.raises(PushError, match=r"^the repo me/student could not .*: there is no branch 'v2': make it"):
        trainer_of(tmp_path, push_to_hub=True, hub_model_id="me/student", hub_revision="v2")
    hub.create("me/open")
    with pytest.raises(PushError, match=r"me/open exists and is public: make it private in its settings first$"):
        trainer_of(tmp_path, push_to_hub=True, hub_model_id="me/open", hub_private_repo=True)


def push_in_two_processes(folder: Path) -> None:
    # Its sockets are the parent's too, and its thread is the parent's alone.
    huggingface_hub.close_session()
    pushing._background.__self__._thread_pool = None
    trainer = make_trainer(
        folder, timm_cnn(), digits(0, 64), max_steps=1, save_strategy="steps", save_steps=1, push_to_hub=True,
        hub_strategy="checkpoint", hub_token=TOKEN,
    )  # fmt: skip
    if not trainer.is_world_process_zero():
        save = trainer._save_rng_state

        def save_late(checkpoint: str) -> None:
            while not os.path.exists(os.path.join(checkpoint, "trainer_state.json")):  # the first has all of its own
                time.sleep(0.02)
            time.sleep(2)
            save(checkpoint)

        trainer._save_rng_state = save_late
    trainer.train()


@pytest.mark.runs
def test_a_checkpoint_is_pushed_when_all_processes_have_written_it(hub, tmp_path):
    log = tmp_path / "log"
    assert in_processes(2, lambda: push_in_two_processes(tmp_path / "student"), log) == [0, 0], log.read_text()[-3000:]
    files = hub.repos["models/me/student"].files()
    assert {"last-checkpoint/rng_state_0.pth", "last-checkpoint/rng_state_1.pth"} <= set(files)


def test_all_processes_have_written_before_the_first_looks(tmp_path):
    trainer = trainer_of(tmp_path / "student")
    waited = []
    trainer.accelerator.wait_for_everyone = lambda: waited.append(True)
    for strategy, first, wanted in (("end", True, 0), ("end", False, 0), ("checkpoint", False, 1)):
        trainer.args.hub_strategy = strategy
        trainer.is_world_process_zero = lambda first=first: first
        trainer._push_from_checkpoint("nowhere")
        assert len(waited) == wanted


PUSHED = [
    "--distillation_loss",
    "none",
    "--push_to_hub",
    "true",
    "--hub_model_id",
    "me/digits",
    "--save_strategy",
    "no",
]


@pytest.mark.runs
def test_recipe_writes_its_figures_before_it_pushes(hub, tmp_path, capsys):
    recipe = run_recipe("distill_cnn", "--output_dir", str(tmp_path), *PUSHED)
    repo = hub.repos["models/me/digits"]
    assert repo.messages == ["initial commit"]
    hub.fail = Failure("commit", 500)
    with pytest.raises(SystemExit, match=r"(?s)^error: the push of .*/baseline to me/digits failed: server error"):
        recipe.report()
    assert json.loads((tmp_path / "results.json").read_text())["baseline"] > 0
    assert (tmp_path / "accuracy.png").exists()
    hub.fail = None
    recipe.report()
    said = f"The student is on the Hub: {hub.endpoint}/me/digits/commit/{repo.branches['main']}"
    assert said in capsys.readouterr().out.splitlines()
    assert set(repo.files()) == {".gitattributes", *STUDENT}
    assert_nothing_secret(hub, tmp_path)


def test_recipe_looks_at_the_hub_before_it_trains(hub, tmp_path):
    hub.read_only = {TOKEN}
    with pytest.raises(
        SystemExit, match=r"(?s)^error: the repo me/digits could not be made .*\nNothing was trained yet"
    ):
        run_recipe("distill_cnn", "--output_dir", str(tmp_path / "run"), *PUSHED)
    assert not (tmp_path / "run").exists()
