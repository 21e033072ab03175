"""A Hub on this machine for tests: real HTTP on 127.0.0.1, repositories in memory, faults on request.

    from tests.hub_server import hub  # noqa: F401  (a fixture: in the conftest.py of the folder that needs it)

    def test_x(hub):
        hub.server.fail("/commit/", status=429, times=2, headers={"Retry-After": "0"})
        push_artifact(folder, "user/name", token=hub.token, endpoint=hub.endpoint)

It answers what huggingface_hub 2.4 asks for uploads of regular files, snapshots and cards. The fixture also switches
the client in this process to it (`PeftModel.from_pretrained("user/name")` works); `hub.environ` does so for another.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants


OWNER, READER = "hf_owner", "hf_reader"
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = re.compile(
    rf"/api/models/{_REPO}(?:/(?P<verb>preupload|commit|tree|revision|branch)/(?P<rest>.+)|/(?P<page>discussions))?"
)
_RESOLVE = re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    files: dict[str, bytes]
    message: str
    parent: str | None


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    # What a GET sends in place of the file that the listing declares.
    lies: dict[str, bytes] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        parent = self.branches.get(branch)
        seed = json.dumps([branch, parent, message, sorted(map(git_oid, files.values())), len(self.commits)])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid] = Commit(files, message, parent)
        self.branches[branch] = oid
        return oid

    def open_pull_request(self) -> int:
        number = 1 + sum(name.startswith("refs/pr/") for name in self.branches)
        self.branches[f"refs/pr/{number}"] = self.branches["main"]
        return number

    def at(self, revision: str) -> tuple[str, Commit] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class Fault:
    match: str
    status: int | None
    times: int
    headers: dict[str, str]
    drop: bool | str
    method: str | None


class HubServer:
    """The server, its repositories, and the list of requests it got: `(method, path)`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {OWNER: ("user", True), READER: ("reader", False)}
        self.requests: list[tuple[str, str]] = []
        self.agents: list[str] = []
        self.faults: list[Fault] = []
        self._lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(
        self,
        match: str,
        status: int | None = None,
        times: int = 1,
        headers: dict[str, str] | None = None,
        drop: bool | str = False,
        method: str | None = None,
    ) -> None:
        """Spoil the next `times` requests whose path holds `match`.

        `drop=True` hangs up in the middle of the body, the request's where it has one, else the answer's.
        `drop="after"` does what was asked and hangs up without an answer.
        """
        self.faults.append(Fault(match, status, times, headers or {}, drop, method))

    def put(self, repo_id: str, files: dict[str, bytes], branch: str = "main", private: bool = False) -> str:
        """Commit files from behind, as someone else would; the repository is made if needed."""
        with self._lock:
            repo = self.repos.setdefault(repo_id, Repo(private=private))
            old = repo.at(branch)
            return repo.add(branch, {**(old[1].files if old else {}), **files}, "from behind")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return dict(self.repos[repo_id].at(revision)[1].files)

    def head(self, repo_id: str, revision: str = "main") -> Commit:
        return self.repos[repo_id].at(revision)[1]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.match in path and fault.method in (None, method):
                    fault.times -= 1
                    return fault
        return None


class _HangUp(Exception):
    pass


class _Answer(Exception):
    def __init__(self, status: int, body: object = None, headers: dict[str, str] | None = None):
        self.status, self.headers = status, headers or {}
        self.body = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()


def _error(status: int, code: str, message: str) -> _Answer:
    return _Answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # Head and body in one packet; else each answer waits 40 ms for a delayed acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.hub.agents.append(self.headers.get("User-Agent", ""))
        fault = self.hub.take_fault(self.command, path)
        length = int(self.headers.get("Content-Length", 0))
        try:
            if fault and fault.drop is True and length:
                self.rfile.read(length // 2)
                raise _HangUp
            body = self.rfile.read(length)
            if fault and fault.status:
                raise _Answer(fault.status, {"error": "injected"}, fault.headers)
            with self.hub._lock:
                self._route(urlsplit(self.path).path, body)
            raise _error(404, "", f"no such page: {path}")
        except _HangUp:
            self.close_connection = True
        except _Answer as answer:
            if fault and fault.drop == "after":
                self.close_connection = True
            else:
                self._send(answer, cut=bool(fault and fault.drop))

    do_HEAD = do_POST = do_GET

    def _send(self, answer: _Answer, cut: bool) -> None:
        body = answer.body
        chunked = answer.headers.get("Transfer-Encoding") == "chunked"
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json", **answer.headers}
        if not chunked:
            headers["Content-Length"] = str(len(body))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            if self.command == "HEAD":
                return
            if chunked:
                body = b"".join(
                    b"%x\r\n%s\r\n" % (len(body[i : i + 65536]), body[i : i + 65536])
                    for i in range(0, len(body), 65536)
                )
                body += b"0\r\n\r\n"
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.wfile.flush()
        except OSError:
            cut = True
        self.close_connection = self.close_connection or cut

    def _user(self, needed: bool = False) -> tuple[str, bool] | None:
        header = self.headers.get("Authorization", "")
        if header:
            user = self.hub.tokens.get(header.removeprefix("Bearer "))
            if user is None:
                raise _error(401, "", "Invalid credentials in Authorization header")
            return user
        if needed:
            raise _error(401, "", "Invalid username or password.")
        return None

    def _route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            raise _Answer(200, {"name": self._user(needed=True)[0], "type": "user"})
        if path == "/api/repos/create":
            self._create(json.loads(body))
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        if found := _API.fullmatch(path):
            repo = self._repo(found["repo"], write=found["verb"] in ("commit", "branch", "preupload"))
            verb = found["verb"] or found["page"] or "revision"
            getattr(self, f"_{verb}")(found["repo"], repo, unquote(found["rest"] or "main"), body)
        if found := _RESOLVE.fullmatch(path):
            self._resolve(self._repo(found["repo"]), unquote(found["revision"]), unquote(found["path"]))

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user, repo = self._user(needed=write), self.hub.repos.get(repo_id)
        owns = user is not None and user[0] == repo_id.split("/")[0]
        if repo is None or (repo.private and not owns):
            raise _error(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (owns and user[1]) and "create_pr=1" not in self.path:
            raise _error(403, "", "Forbidden: you need write access to this repository")
        return repo

    def _at(self, repo: Repo, revision: str) -> tuple[str, Commit]:
        found = repo.at(revision)
        if found is None:
            raise _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _create(self, data: dict) -> None:
        name, can_write = self._user(needed=True)
        owner = data.get("organization") or name
        if owner != name or not can_write:
            raise _error(403, "", "You don't have the rights to create a model under this namespace")
        repo_id = f"{owner}/{data['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            raise _Answer(409, {**answer, "error": "You already created this model repo"})
        repo = self.hub.repos[repo_id] = Repo(
            private=data.get("visibility") == "private" or data.get("private", False)
        )
        repo.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        raise _Answer(200, answer)

    def _validate(self, content: str) -> None:
        try:
            head = content.split("---\n")[1]
            wrong = None if isinstance(yaml.safe_load(head), dict) else "metadata is not a mapping"
        except (IndexError, yaml.YAMLError) as error:
            wrong = str(error)
        raise _Answer(400 if wrong else 200, {"errors": [{"message": wrong}] if wrong else [], "warnings": []})

    def _preupload(self, repo_id: str, repo: Repo, revision: str, body: bytes) -> None:
        files = self._at(repo, revision)[1].files
        raise _Answer(
            200,
            {
                "files": [
                    {
                        "path": item["path"],
                        "uploadMode": "regular",
                        "shouldIgnore": False,
                        "oid": git_oid(files[item["path"]]) if item["path"] in files else None,
                    }
                    for item in json.loads(body)["files"]
                ]
            },
        )

    def _commit(self, repo_id: str, repo: Repo, revision: str, body: bytes) -> None:
        head, commit = self._at(repo, revision)
        files, header = dict(commit.files), {}
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                header = item["value"]
            elif item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "deletedFile":
                files.pop(item["value"]["path"], None)
        pull_request = "create_pr=1" in self.path
        if not pull_request and header.get("parentCommit") not in (None, head):
            raise _error(412, "", "A commit has happened since. Please refresh and try again.")
        answer = {}
        if pull_request:
            number = repo.open_pull_request()
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        oid = repo.add(revision, files, header.get("summary", ""))
        raise _Answer(200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", **answer})

    def _branch(self, repo_id: str, repo: Repo, branch: str, body: bytes) -> None:
        start = json.loads(body or b"{}").get("startingPoint", "main")
        if branch in repo.branches:
            raise _error(409, "", "Reference already exists")
        repo.branches[branch] = self._at(repo, start)[0]
        raise _Answer(200)

    def _discussions(self, repo_id: str, repo: Repo, rest: str, body: bytes) -> None:
        self._user(needed=True)
        raise _Answer(200, {"num": repo.open_pull_request()})

    def _tree(self, repo_id: str, repo: Repo, revision: str, body: bytes) -> None:
        _, commit = self._at(repo, revision)
        folders = {str(parent) for path in commit.files for parent in Path(path).parents} - {".", "/"}
        listing = [{"type": "directory", "path": path, "oid": git_oid(path.encode())} for path in sorted(folders)]
        for path, data in commit.files.items():
            listing.append({"type": "file", "path": path, "size": len(data), "oid": git_oid(data)})
        raise _Answer(200, listing)

    def _revision(self, repo_id: str, repo: Repo, revision: str, body: bytes) -> None:
        oid, commit = self._at(repo, revision)
        card = {}
        if b"---\n" in (text := commit.files.get("README.md", b"")):
            card = yaml.safe_load(text.decode().split("---\n")[1])
        raise _Answer(
            200,
            {
                "id": repo_id,
                "sha": oid,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags", []),
                "cardData": card,
                "siblings": [{"rfilename": path} for path in commit.files],
            },
        )

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        oid, commit = self._at(repo, revision)
        if path not in commit.files:
            answer = _error(404, "EntryNotFound", "Entry not found")
            answer.headers["X-Repo-Commit"] = oid
            raise answer
        data = commit.files[path]
        headers = {
            "X-Repo-Commit": oid,
            "ETag": f'"{git_oid(data)}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if self.command == "GET" and path in repo.lies:
            raise _Answer(200, repo.lies[path], {**headers, "Transfer-Encoding": "chunked"})
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and self.command == "GET":
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            raise _Answer(206, data[first:], headers)
        raise _Answer(200, data, headers)


@dataclass
class LocalHub:
    """What a test needs of the server.

    Args:
        server (`HubServer`): Repositories, faults, requests.
        endpoint (`str`): Its address.
        token (`str`): Of `user`, who may write.
        cache (`Path`): The client's cache in this process, empty at first.
        waits (`list[float]`): Every pause the client or hf_ext made between tries; none took any time.
        environ (`dict[str, str]`): Environment of another Python that talks to this server.
    """

    server: HubServer
    endpoint: str
    token: str
    cache: Path
    waits: list[float]
    environ: dict[str, str]


@pytest.fixture
def hub(monkeypatch, tmp_path_factory) -> Iterator[LocalHub]:
    """A fresh Hub, with the huggingface_hub of this process switched to it and out of offline mode."""
    from huggingface_hub import file_download, hf_api
    from huggingface_hub.utils import _http

    from hf_ext.hub_tools import client

    server = HubServer()
    home = tmp_path_factory.mktemp("hf_home")
    cache, waits = home / "hub", []
    clock = SimpleNamespace(sleep=waits.append, time=time.time, monotonic=time.monotonic)
    for module in (_http, file_download, client):
        monkeypatch.setattr(module, "time", clock)
    settings = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    # Module functions such as huggingface_hub.file_exists belong to this object.
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    environ = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": OWNER,
    }
    # The client keeps its connections.
    huggingface_hub.close_session()
    yield LocalHub(server, server.url, OWNER, cache, waits, environ)
    huggingface_hub.close_session()
    server.stop()
