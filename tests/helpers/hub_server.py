"""A Hub on loopback: enough of the protocol that the real `huggingface_hub` client pushes to it and pulls from it.

hub = HubServer()                   # hub.endpoint is HF_ENDPOINT, hub.users maps tokens to users
hub.fail = Failure("commit", 500)   # every request of that step is answered with 500, until it is taken back
hub.requests                        # what came, with bodies
hub.repos["models/me/student"].files("main")
"""

import base64
import hashlib
import json
import re
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_card import card_errors

# Of the user `me`, and of `other`.
TOKEN, OTHERS_TOKEN = "hf_" + "a1B2" * 8, "hf_" + "c3D4" * 8
# As in the Hub's default .gitattributes; everything larger than 10 MB goes there too.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".png", ".jpg", ".onnx")


@dataclass
class Failure:
    """What goes wrong.

    Attributes:
        step: `create`, `card` (its reading), `validate` (its check), `preupload`, `batch`, `put`, `commit`, `info` or `resolve`.
        kind: an HTTP status, `html` (a page with status 200), `hang` (no answer while the failure stands), `wait` (the answer comes when it is taken
            back), or `drop` (the connection ends in the middle).
    """

    step: str
    kind: int | str


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    # sha -> path -> content; branch -> sha.
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, files: dict[str, bytes], message: str = "commit", branch: str = "main") -> str:
        sha = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def add(self, files: dict[str, bytes | str], branch: str = "main") -> str:
        """A commit that somebody makes on the website."""
        new = {path: text if isinstance(text, bytes) else text.encode() for path, text in files.items()}
        return self.commit(self.files(branch) | new, branch=branch)


@dataclass
class Request:
    method: str
    path: str
    token: str | None
    body: bytes


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > 10_000_000


class HubServer:
    def __init__(self):
        self.users: dict[str, str] = {}
        self.read_only: set[str] = set()
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.fail: Failure | None = None
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.fail = None
        self.server.shutdown()
        self.server.server_close()

    def create(
        self,
        repo_id: str,
        files: dict[str, bytes | str] | None = None,
        *,
        kind: str = "models",
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        repo = self.repos[f"{kind}/{repo_id}"] = Repo(kind, repo_id, private, gated)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        if files:
            repo.add(files)
        return repo

    def paths(self, method: str) -> list[str]:
        with self.lock:
            return [request.path for request in self.requests if request.method == method]

    def everything_received(self) -> bytes:
        """The bodies of all requests, those of commits decoded."""
        parts = []
        for request in self.requests:
            parts += [request.path.encode(), request.body]
            if "/commit/" in request.path:
                for line in request.body.splitlines():
                    value = json.loads(line)["value"]
                    parts.append(base64.b64decode(value["content"]) if "content" in value else b"")
        return b"\n".join(parts)


class _Stop(Exception):
    """The request was answered."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body of each answer waits 40 ms for the client to acknowledge the headers
    server_state: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        hub = self.server_state
        parts = urlsplit(self.path)
        self.url, self.query = unquote(parts.path), parse_qs(parts.query)
        authorization = self.headers.get("authorization", "")
        self.token = authorization.removeprefix("Bearer ") or None
        # A PUT goes to the object store, which knows no users; its body is read where it is dropped.
        dropped = hub.fail is not None and hub.fail.kind == "drop" and hub.fail.step == self._step()
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length // 2 if dropped else length)
        with hub.lock:
            hub.requests.append(Request(self.command, self.url, self.token, body))
        try:
            self._fail()
            with hub.lock:
                self._route(body)
            self._answer(404, {"error": f"the test's Hub has no {self.command} {self.url}"})
        except (_Stop, BrokenPipeError, ConnectionResetError):
            pass

    def _step(self) -> str | None:
        steps = {
            "create": r"^/api/repos/create$",
            "card": r"/resolve/.+/README.md$",
            "validate": r"^/api/validate-yaml$",
            "preupload": r"/preupload/",
            "batch": r"/info/lfs/objects/batch$",
            "put": r"^/_store/",
            "commit": r"/commit/",
            "info": r"^/api/(models|datasets)/[^/]+/[^/]+(/revision/.+)?$",
            "resolve": r"/resolve/",
        }
        return next((step for step, pattern in steps.items() if re.search(pattern, self.url)), None)

    def _fail(self) -> None:
        hub, fail = self.server_state, self.server_state.fail
        if fail is None or fail.step != self._step():
            return
        if fail.kind == "drop":
            self.close_connection = True
            self.connection.close()
            raise _Stop
        if fail.kind in ("hang", "wait"):
            while hub.fail is fail:
                time.sleep(0.02)
            if fail.kind == "wait":
                return
            self.close_connection = True
            raise _Stop
        if fail.kind == "html":
            self._answer(200, b"<!doctype html><title>A mirror</title>", {"Content-Type": "text/html"})
        error = {403: "you are not allowed to write here", 500: "Internal Error - We're working hard to fix this"}
        self._answer(fail.kind, {"error": error.get(fail.kind, "failed")})

    def _answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        if isinstance(value, dict) and "error" in value:
            headers.setdefault("X-Error-Message", value["error"])
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        raise _Stop

    def _user(self) -> str | None:
        if self.token is None:
            return None
        if self.token not in self.server_state.users:
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        return self.server_state.users[self.token]

    def _writer(self, owner: str) -> None:
        user = self._user()
        if user is None:
            self._answer(401, {"error": "Invalid username or password."})
        if user != owner or self.token in self.server_state.read_only:
            self._answer(403, {"error": f"You don't have the rights to write to {owner}"})

    def _repo(self, kind: str, repo_id: str) -> Repo:
        repo, user = self.server_state.repos.get(f"{kind}/{repo_id}"), self._user()
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            # Without a token the Hub does not say whether the repo exists.
            status = 401 if user is None else 404
            error = "Invalid username or password." if user is None else "Repository not found"
            self._answer(status, {"error": error}, {"X-Error-Code": "RepoNotFound", "X-Error-Message": error})
        return repo

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            error = f"Invalid rev id: {revision}"
            self._answer(404, {"error": error}, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": error})
        return sha

    def _check_gate(self, repo: Repo) -> None:
        if not repo.gated or (self._user() == repo.id.split("/")[0]):
            return
        page = f"{self.server_state.endpoint}/{'datasets/' if repo.kind == 'datasets' else ''}{repo.id}"
        if self.token is None:
            error = (
                f"Access to {repo.kind[:-1]} {repo.id} is restricted. You must have access to it and be authenticated."
            )
            self._answer(401, {"error": error}, {"X-Error-Code": "GatedRepo", "X-Error-Message": error})
        error = f"Access to {repo.kind[:-1]} {repo.id} is restricted: visit {page} to ask for access."
        self._answer(403, {"error": error}, {"X-Error-Code": "GatedRepo", "X-Error-Message": error})

    def _route(self, body: bytes) -> None:
        hub, url, method = self.server_state, self.url, self.command
        if url == "/api/whoami-v2":
            if self._user() is None:
                self._answer(401, {"error": "Invalid username or password."})
            self._answer(200, {"type": "user", "name": self._user(), "orgs": [], "auth": {"type": "access_token"}})
        if url == "/api/validate-yaml":
            if self._user() is None:
                self._answer(401, {"error": "Invalid username or password."})
            self._check_card(json.loads(body)["content"])
            self._answer(200, {"warnings": [], "errors": []})
        if url == "/api/repos/create":
            self._create(json.loads(body))
        if match := re.fullmatch(r"/_store/([0-9a-f]{64})", url):
            if hashlib.sha256(body).hexdigest() != match[1]:
                self._answer(400, {"error": "wrong hash"})
            hub.blobs[match[1]] = body
            self._answer(200, b"")
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", url):
            self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", url):
            repo = self._repo(match[1], match[2])
            self._api(repo, match[3] or "", body)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+|refs/[^/]+/[^/]+)/(.+)", url):
            self._resolve(self._repo("datasets" if match[1] else "models", match[2]), match[3], match[4])
        if method == "HEAD":
            self._answer(404, b"")

    def _check_card(self, text: str) -> None:
        if errors := card_errors(text):
            self._answer(400, {"warnings": [], "errors": [{"message": error} for error in errors]})

    def _create(self, request: dict) -> None:
        hub = self.server_state
        user = self._user()
        if user is None:
            self._answer(401, {"error": "Invalid username or password."})
        owner = request.get("organization") or user
        repo_id = f"{owner}/{request['name']}"
        key = f"{request.get('type') or 'model'}s/{repo_id}"
        # The Hub looks at the permission first.
        self._writer(owner)
        answer = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if key in hub.repos:
            self._answer(409, answer | {"error": "You already created this model repo"})
        private = request.get("visibility") == "private" or bool(request.get("private"))
        hub.create(repo_id, kind=key.split("/")[0], private=private)
        self._answer(200, answer)

    def _batch(self, request: dict) -> None:
        # Who may not write to the repo may send files for a pull request.
        if self._user() is None:
            self._answer(401, {"error": "Invalid username or password."})
        objects = []
        for item in request["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server_state.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server_state.endpoint}/_store/{item['oid']}"}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _api(self, repo: Repo, rest: str, body: bytes) -> None:
        action, _, argument = rest.partition("/")
        creates_pr = "create_pr" in self.query and self._user() is not None
        if action in ("preupload", "commit") and not creates_pr:
            self._writer(repo.id.split("/")[0])
        if action == "preupload":
            held = repo.files(self._sha(repo, argument))
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    **self._oid(held, file["path"]),
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        if action == "commit":
            self._commit(repo, argument, body, creates_pr)
        if action in ("", "revision"):
            sha = self._sha(repo, argument or "main")
            info = {
                "_id": "0" * 24,
                "id": repo.id,
                "modelId": repo.id,
                "author": repo.id.split("/")[0],
                "sha": sha,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "pipeline_tag": "image-classification",
                "lastModified": "2024-01-01T00:00:00.000Z",
                "createdAt": "2024-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in repo.files(sha)],
            }
            self._answer(200, info)
        if action == "tree":
            self._check_gate(repo)
            revision, _, folder = argument.partition("/")
            self._tree(repo, self._sha(repo, revision), folder, "recursive" in self.query)
        if action == "paths-info":
            self._check_gate(repo)
            fields = parse_qs(body.decode()) if not body.startswith(b"{") else json.loads(body)
            files = repo.files(self._sha(repo, argument))
            paths = fields.get("paths", [])
            self._answer(200, [self._entry(repo, path, files[path]) for path in paths if path in files])
        if action == "refs":
            self._answer(200, {"branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha}
                                            for n, sha in repo.branches.items()], "converts": [], "tags": []})  # fmt: skip
        if action == "commits":
            sha = self._sha(repo, argument)
            self._answer(200, [{"id": sha, "title": "commit", "message": "", "date": "2024-01-01T00:00:00.000Z", "authors": []}])  # fmt: skip

    @staticmethod
    def _oid(held: dict[str, bytes], path: str) -> dict[str, str]:
        if path not in held:
            return {}
        content = held[path]
        return {"oid": hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else blob_id(content)}

    def _commit(self, repo: Repo, revision: str, body: bytes, creates_pr: bool) -> None:
        hub = self.server_state
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        head = self._sha(repo, revision)
        if header.get("parentCommit") not in (None, head):
            self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repo.files(head))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    self._answer(400, {"error": f"LFS pointer pointed to a file that does not exist: {value['path']}"})
                files[value["path"]] = hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    self._answer(
                        404, {"error": "A file with this name doesn't exist"}, {"X-Error-Code": "EntryNotFound"}
                    )
            else:
                self._answer(400, {"error": f"unknown operation {line['key']}"})
        self._check_card(files.get("README.md", b"").decode())
        page, answer = f"{hub.endpoint}/{repo.id}", {"success": True, "hookOutput": ""}
        if creates_pr:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
            revision, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{page}/discussions/{number}"
        sha = repo.commit(files, header["summary"], revision)
        self._answer(200, answer | {"commitOid": sha, "commitUrl": f"{page}/commit/{sha}"})

    @staticmethod
    def _entry(repo: Repo, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if is_lfs(path, len(content)):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        commit = {"id": repo.branches["main"], "title": "commit", "date": "2024-01-01T00:00:00.000Z"}
        return entry | {"lastCommit": commit}

    def _tree(self, repo: Repo, sha: str, folder: str, recursive: bool) -> None:
        files = repo.files(sha)
        prefix = f"{folder}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not inside:
            error = f"{folder} does not exist on {sha}"
            self._answer(404, {"error": error}, {"X-Error-Code": "EntryNotFound", "X-Error-Message": error})
        entries, folders = [], set()
        for path, content in inside.items():
            names = path.removeprefix(prefix).split("/")
            folders |= {prefix + "/".join(names[: i + 1]) for i in range(len(names) - 1 if recursive else min(1, len(names) - 1))}  # fmt: skip
            if recursive or len(names) == 1:
                entries.append(self._entry(repo, path, content))
        entries += [{"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0} for path in folders]
        self._answer(200, entries)

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        sha = self._sha(repo, revision)
        self._check_gate(repo)
        headers = {"X-Repo-Commit": sha}
        content = repo.files(sha).get(path)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        lfs = is_lfs(path, len(content))
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest() if lfs else blob_id(content)}"'
        if lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
            self._answer(206, content[start:stop], headers)
        self._answer(200, content, headers)
