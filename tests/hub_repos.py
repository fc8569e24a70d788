"""Models of the Hub on loopback: branches of commits, each a folder, and what huggingface_hub calls to make a commit.

Shapes of questions and answers are those of the Hub's API and of Git LFS (`docs/api/batch.md`, `basic-transfers.md`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

#: Tokens that the Hub knows: one may write to the models of `OWNER`, the other may only read.
WRITER, READER = "hf_writer", "hf_reader"
OWNER = "acme"
#: Names of files that the Hub stores by LFS whatever their size, and the size from which it does so with any.
_LFS = ("*.safetensors", "*.bin")
_LFS_BYTES = 10_000_000


def commit(name: str) -> str:
    """The first commit of a model."""
    return hashlib.sha1(name.encode()).hexdigest()


def git_blob(data: bytes) -> str:
    """Number that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Model: its commits, each a folder, and the branches that name them."""

    commits: dict[str, Path]
    branches: dict[str, str]
    private: bool = False

    def at(self, revision: str | None) -> str | None:
        """Commit of a branch, of a commit's own name, or of the main branch; None where there is none."""
        name = "main" if revision is None else revision
        return self.branches.get(name, name if name in self.commits else None)

    def folder(self, revision: str | None = None) -> Path:
        """Folder of a commit that is there."""
        return self.commits[str(self.at(revision))]


class Answer(NamedTuple):
    """Answer of HTTP."""

    code: int
    data: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


def as_json(value: Any, code: int = 200) -> Answer:
    """Answer with a value, or with an error's text."""
    return Answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refusal(code: int, message: str, error_code: str = "") -> Answer:
    """Answer with an error, as the Hub gives it."""
    headers = {"X-Error-Message": message, **({"X-Error-Code": error_code} if error_code else {})}
    return Answer(code, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **headers})


class Request(NamedTuple):
    """Request of HTTP: parts of its path, its body, and the token with which it came."""

    parts: dict[str, str]
    body: bytes
    token: str | None

    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)


@dataclass
class Repositories:
    """All models, by name. `failing` has the status that an endpoint answers, by its name in `ROUTES`; `asked` what was called.

    `before` has what happens before an endpoint answers.
    """

    store: Path
    endpoint: str = ""
    by_name: dict[str, Repository] = field(default_factory=dict)
    failing: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    before: dict[str, Callable[[], object]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Answer | None:
        """Answer of an endpoint that writes; None where there is none of the path."""
        for name, (verb, pattern, called) in ROUTES.items():
            found = re.fullmatch(pattern, path)
            if verb != method or found is None:
                continue
            self.asked.append(name)
            self.before.get(name, lambda: None)()
            if name in self.failing:
                return refusal(self.failing[name], "told to fail")
            request = Request(found.groupdict(), body, token)
            if name != "content" and token not in (WRITER, READER):  # content goes to an address that is signed
                return refusal(401, "Invalid credentials in Authorization header")
            with self._lock:
                return called(self, request)
        return None

    def lfs_file(self, digest: str) -> Path:
        """Where LFS has the content of this SHA-256."""
        return self.store / "lfs" / digest

    def new_folder(self) -> Path:
        """Folder for another commit."""
        folder = self.store / f"commit-{sum(len(repo.commits) for repo in self.by_name.values())}"
        folder.mkdir(parents=True)
        return folder


def _denied(repos: Repositories, request: Request) -> Answer | None:
    """Refusal of what is written to a model, if its name, the token or the branch do not allow it."""
    name, revision = request.parts["id"], request.parts.get("revision")
    if name not in repos.by_name:
        return refusal(404, "Repository not found", "RepoNotFound")
    if request.token != WRITER or not name.startswith(f"{OWNER}/"):
        return refusal(403, "Forbidden: pass a token with write access")
    if revision is not None and revision not in repos.by_name[name].branches:
        return refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return None


def _whoami(repos: Repositories, request: Request) -> Answer:
    return as_json({"type": "user", "name": OWNER, "orgs": []})


def _validate_yaml(repos: Repositories, request: Request) -> Answer:
    return as_json({"errors": [], "warnings": []})


def _create(repos: Repositories, request: Request) -> Answer:
    asked = request.json()
    owner = asked.get("organization") or OWNER
    name = f"{owner}/{asked['name']}"
    where = {"url": f"{repos.endpoint}/{name}", "name": name}
    if request.token != WRITER or owner != OWNER:
        return refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    if name in repos.by_name:
        return as_json({"error": "You already created this model repo", **where}, 409)
    folder = repos.new_folder()
    (folder / ".gitattributes").write_text("".join(f"{pattern} filter=lfs\n" for pattern in _LFS))
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repos.by_name[name] = Repository({commit(name): folder}, {"main": commit(name)}, private)
    return as_json(where)


def _preupload(repos: Repositories, request: Request) -> Answer:
    if denied := _denied(repos, request):
        return denied
    asked = request.json()
    folder = repos.by_name[request.parts["id"]].folder(request.parts["revision"])
    rules = folder / ".gitignore"
    ignored = asked.get("gitIgnore", rules.read_text() if rules.is_file() else "").split()
    files = []
    for file in asked["files"]:
        name, there = file["path"], folder / file["path"]
        lfs = file["size"] >= _LFS_BYTES or any(fnmatchcase(name, pattern) for pattern in _LFS)
        entry = {"path": name, "uploadMode": "lfs" if lfs else "regular"}
        entry["shouldIgnore"] = any(fnmatchcase(name, pattern) for pattern in ignored)
        if there.is_file():
            data = there.read_bytes()
            entry["oid"] = hashlib.sha256(data).hexdigest() if lfs else git_blob(data)
        files.append(entry)
    return as_json({"files": files})


def _batch(repos: Repositories, request: Request) -> Answer:
    if denied := _denied(repos, request):
        return denied
    asked = request.json()
    objects: list[dict[str, Any]] = []
    for wanted in asked["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if not repos.lfs_file(wanted["oid"]).exists():
            upload = {"href": f"{repos.endpoint}/lfs/{wanted['oid']}/{wanted['size']}"}
            verify = {"href": f"{repos.endpoint}/{request.parts['id']}.git/info/lfs/verify"}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    return Answer(
        200,
        json.dumps({"transfer": "basic", "objects": objects}).encode(),
        {"Content-Type": "application/vnd.git-lfs+json"},
    )


def _content(repos: Repositories, request: Request) -> Answer:
    digest, size = request.parts["oid"], int(request.parts["size"])
    if len(request.body) != size or hashlib.sha256(request.body).hexdigest() != digest:
        return refusal(400, f"the content of {digest} is another one")
    repos.lfs_file(digest).parent.mkdir(parents=True, exist_ok=True)
    repos.lfs_file(digest).write_bytes(request.body)
    return Answer(200)


def _verify(repos: Repositories, request: Request) -> Answer:
    asked = request.json()
    there = repos.lfs_file(asked["oid"])
    right = there.is_file() and there.stat().st_size == asked["size"]
    return as_json({}) if right else refusal(404, f"{asked['oid']} is not here")


def _commit(repos: Repositories, request: Request) -> Answer:
    if denied := _denied(repos, request):
        return denied
    name, branch = request.parts["id"], request.parts["revision"]
    repository = repos.by_name[name]
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    parent = header["value"].get("parentCommit")
    if parent is not None and parent != repository.branches[branch]:
        return refusal(412, "A commit has happened since. Please refresh and try again.")
    folder = repos.new_folder()
    shutil.copytree(repository.folder(branch), folder, dirs_exist_ok=True)
    for operation in operations:
        if missing := _apply(repos, folder, operation["key"], operation["value"]):
            shutil.rmtree(folder)
            return refusal(400, missing)
    number = hashlib.sha1(folder.name.encode() + request.body).hexdigest()
    repository.commits[number] = folder
    repository.branches[branch] = number
    repos.messages.append(header["value"]["summary"])
    return as_json({"success": True, "commitOid": number, "commitUrl": f"{repos.endpoint}/{name}/commit/{number}"})


def _apply(repos: Repositories, folder: Path, key: str, value: dict[str, Any]) -> str | None:
    """Do one operation of a commit in its folder; returns why it cannot be done."""
    there = folder / value["path"]
    if key == "deletedFile":
        if not there.is_file():
            return f"A file with this name doesn't exist: {value['path']}"
        there.unlink()
        return None
    there.parent.mkdir(parents=True, exist_ok=True)
    if key == "file":
        there.write_bytes(base64.b64decode(value["content"], validate=True))
        return None
    if key != "lfsFile" or value["algo"] != "sha256":
        return f"unknown operation {key}"
    content = repos.lfs_file(value["oid"])
    if not content.is_file() or content.stat().st_size != value["size"]:
        return f"LFS pointer pointed to a file that does not exist: {value['path']}"
    shutil.copyfile(content, there)
    return None


_ID = r"(?P<id>[^/]+/[^/]+?)"
ROUTES: dict[str, tuple[str, str, Callable[[Repositories, Request], Answer]]] = {
    "whoami": ("GET", "/api/whoami-v2", _whoami),
    "validate-yaml": ("POST", "/api/validate-yaml", _validate_yaml),
    "create": ("POST", "/api/repos/create", _create),
    "preupload": ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>.+)", _preupload),
    "batch": ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _batch),
    "verify": ("POST", rf"/{_ID}\.git/info/lfs/verify", _verify),
    "content": ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<size>\d+)", _content),
    "commit": ("POST", rf"/api/models/{_ID}/commit/(?P<revision>.+)", _commit),
}
