"""Pushes to a Hub that judges no cards, pull requests, and addresses of pages in the place of repository ids."""

import json

import pytest
from hub_server import OTHERS_TOKEN, TOKEN, Failure
from huggingface_hub import snapshot_download
from tiny import timm_cnn

from nkd_hf import DataArguments, DistillationTrainingArguments, RecipeArguments, create_student, load_teacher
from nkd_hf.cli import main
from nkd_hf.cli.teacher_logits import write_store
from nkd_hf.errors import PushError
from nkd_hf.hub.push import PushApi, create_repo, push_student
from nkd_hf.hub.teacher_logits import find_store
from nkd_hf.models.loading import open_classifier
from nkd_hf.models.repo_ids import read_repo_id
from nkd_hf.models.saving import save_student


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "student"
    save_student(timm_cnn(), str(folder))
    return folder


@pytest.mark.parametrize("kind", [401, 404, 500, "html", "drop"])
def test_a_push_goes_on_where_the_card_gets_no_verdict(hub, student, caplog, kind):
    hub.fail = Failure("validate", kind)
    push_student(student, "me/student")
    assert {"README.md", "model.safetensors"} < set(hub.repos["models/me/student"].files())
    said = [record.message for record in caplog.records if "unchecked" in record.message]
    assert len(said) == 1
    assert said[0].startswith(
        f"The model card is pushed unchecked, since {hub.endpoint}/api/validate-yaml gave no verdict"
    )


def test_a_store_s_card_needs_no_verdict_either(hub, tmp_path, caplog):
    hub.fail = Failure("validate", 404)
    (tmp_path / "README.md").write_text("---\ntags: [a]\n---\n")
    hub.create("me/store", kind="datasets")
    PushApi().upload_folder(folder_path=tmp_path, repo_id="me/store", repo_type="dataset")
    assert "README.md" in hub.repos["datasets/me/store"].files()
    assert caplog.text.count("unchecked") == 1


def test_the_card_is_judged_where_and_as_the_push_goes(hub, student, monkeypatch, caplog):
    monkeypatch.delenv("HF_TOKEN")
    push_student(student, "other/student", token=OTHERS_TOKEN)
    (request,) = [request for request in hub.requests if request.path == "/api/validate-yaml"]
    assert request.token == OTHERS_TOKEN
    assert json.loads(request.body)["repoType"] == "model"
    assert "unchecked" not in caplog.text


def test_a_pull_request(hub, student, capsys):
    repo = hub.create("other/student")
    with pytest.raises(PushError, match="the token may not write there"):
        push_student(student, "other/student")
    main(["push", str(student), "other/student", "--create_pr"])
    assert capsys.readouterr().out == f"{student} is proposed on the Hub: {hub.endpoint}/other/student/discussions/1\n"
    assert set(repo.files("main")) == {".gitattributes"}
    assert set(repo.files("refs/pr/1")) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    hub.fail = Failure("commit", 500)
    with pytest.raises(PushError, match=r"nkd-hf push \S+ other/student --create_pr$"):
        push_student(student, "other/student", create_pr=True)
    with pytest.raises(ValueError, match=r"^revision must be main with create_pr, got 'v2'\."):
        push_student(student, "other/student", create_pr=True, revision="v2")


@pytest.mark.parametrize(
    ("address", "repo_type"),
    [
        ("https://huggingface.co/me/student", "model"),
        ("https://huggingface.co/me/student/tree/main", "model"),
        ("https://hf.co/me/student/?library=timm#results", "model"),
        ("hf://me/student", "model"),
        ("{endpoint}/me/student/tree/main", "model"),
        ("{endpoint}/datasets/me/student", "dataset"),
        ("me/student", "model"),
    ],
)
def test_ids_of_addresses(hub, address, repo_type):
    assert read_repo_id(address.format(endpoint=hub.endpoint), "teacher", repo_type) == "me/student"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "https://huggingface.co/datasets/me/student",
            r"which is a dataset\. Write owner/name or http.*/owner/name\.$",
        ),
        ("https://huggingface.co/me/student/tree/v2", r"which is its branch v2\. Write me/student, which is its main"),
        ("https://huggingface.co/me/student/blob/main/config.json", r"file or folder in it\. Write me/student\.$"),
        ("https://huggingface.co/me", r"'https://huggingface.co/me'\. Write owner/name or"),
        ("https://example.org/me/student", r"'https://example.org/me/student'\. Write owner/name or"),
    ],
)
def test_other_addresses_are_refused(address, message):
    with pytest.raises(
        ValueError, match=r"^teacher must be the id of a model or the address of its page, got.*" + message
    ):
        read_repo_id(address, "teacher")
    with pytest.raises(ValueError, match=message):
        RecipeArguments(student="resnet18", teacher=address)


def test_an_address_does_wherever_an_id_does(hub, student, tmp_path):
    page, data = f"{hub.endpoint}/me/student", f"{hub.endpoint}/datasets/me/store"
    assert create_repo(page) == "me/student"
    main(["push", str(student), f"{page}/tree/main"])
    assert set(hub.repos) == {"models/me/student"}
    assert load_teacher(page).name == "me/student"
    assert create_student(page).name_or_path == open_classifier(page).name_or_path == "me/student"
    args = RecipeArguments(student=page, teacher=page, teacher_logits=data)
    assert (args.student, args.teacher, args.teacher_logits) == ("me/student", "me/student", "me/store")
    training = DistillationTrainingArguments(str(tmp_path), hub_model_id=page, hub_token=TOKEN)
    assert training.hub_model_id == "me/student"
    assert DataArguments(dataset_name=data).dataset_name == "me/store"
    hub.create("me/store", {"store.json": "{}"}, kind="datasets")
    assert find_store(data, 1) == find_store("me/store", 1)
    files = "hf://datasets/me/store/*.parquet"
    assert DataArguments(dataset_name=files).dataset_name == files
    # Before hours of the teacher's work.
    with pytest.raises(ValueError, match=r"^--push_to_hub must be the id of a dataset .* which is a model\."):
        write_store(["--output", str(tmp_path / "new"), "--epochs", "1", "--push_to_hub", page])
    assert snapshot_download("me/student", allow_patterns="config.json")
