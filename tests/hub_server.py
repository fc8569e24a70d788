"""Hub on loopback: the endpoints that huggingface_hub calls to download a model and to upload one (`hub_repos`)."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.hub_repos import READER, WRITER, Answer, Repositories, Repository, as_json, commit, refusal

#: Seconds after which a held file is given all the same.
_LONGEST = 60.0
#: Seconds between two looks whether the Hub is to stop.
_POLL = 0.02
_API = re.compile(r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?$")
_FILE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")


@dataclass
class Hub:
    """Models that are served; gated ones give no file. `downloaded` are the files that were asked for.

    `answers` has the status of HTTP that every question for a model gets, by its name, where that is not what is asked for.
    Files whose names are in `held` are given once `released` is set.
    """

    repositories: Repositories
    gated: set[str] = field(default_factory=set)
    answers: dict[str, int] = field(default_factory=dict)
    downloaded: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def models(self) -> dict[str, Path]:
        """Folders of the models, by name, as they are on the main branch."""
        return {name: repository.folder() for name, repository in self.repositories.by_name.items()}

    @property
    def endpoint(self) -> str:
        """Address of the Hub."""
        return self.repositories.endpoint

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that uses this Hub, with a cache of its own."""
        return _environment(self.endpoint, home)


def _environment(endpoint: str, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # its storage is no part of this Hub; huggingface_hub then uses LFS
        "NO_PROXY": "127.0.0.1",
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the body follows the headers at once

    def do_GET(self) -> None:
        self._send(self._written() or self._read(body=True), body=True)

    def do_HEAD(self) -> None:
        self._send(self._read(body=False), body=False)

    def do_POST(self) -> None:
        self._send(self._written() or refusal(404, "no such endpoint"), body=True)

    do_PUT = do_POST

    def log_message(self, *args: Any) -> None:
        pass

    @property
    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _written(self) -> Answer | None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.hub.repositories.answer(self.command, self._path, body, self._token)

    def _read(self, body: bool) -> Answer:
        asked = _FILE.match(self._path) or _API.match(self._path)
        name = asked["id"] if asked else ""
        repository = self.hub.repositories.by_name.get(name)
        if asked is None or repository is None:
            return Answer(404, headers={"X-Error-Code": "RepoNotFound"})
        if name in self.hub.answers:
            return refusal(self.hub.answers[name], "Invalid credentials in Authorization header")
        if repository.private and self._token not in (WRITER, READER):
            return Answer(401, headers={"X-Error-Code": "RepoNotFound"})
        sha = repository.at(asked["revision"])
        if sha is None:
            return Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        folder = repository.commits[sha]
        if asked.re is _FILE:
            return self._file(name, sha, folder, asked["file"], body)
        listed = [path.relative_to(folder).as_posix() for path in _files(folder)]
        if asked["what"] == "tree":
            sizes = {file: (folder / file).stat().st_size for file in listed}
            return as_json(
                [{"type": "file", "path": file, "size": size, "oid": commit(file)} for file, size in sizes.items()]
            )
        siblings = [{"rfilename": file} for file in listed]
        return as_json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def _file(self, name: str, sha: str, folder: Path, file: str, body: bool) -> Answer:
        path = folder / file
        if name in self.hub.gated:
            return Answer(403, headers={"X-Error-Code": "GatedRepo"})
        if not path.is_file():
            return Answer(404, headers={"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        if body:
            self.hub.downloaded.append(f"{name}/{file}")
            if path.name in self.hub.held:
                self.hub.reached.set()
                self.hub.released.wait(_LONGEST)
        return Answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha})

    def _send(self, answer: Answer, body: bool) -> None:
        self.send_response(answer.code)
        for key, value in {**answer.headers, "Content-Length": str(len(answer.data))}.items():
            self.send_header(key, value)
        with suppress(OSError):  # the process that asked may have been killed
            self.end_headers()
            if body:
                self.wfile.write(answer.data)


@contextmanager
def serving(**models: Path) -> Iterator[Hub]:
    """Hub that serves while the context lasts; names of `models` have two underscores for the slash."""
    folders = {name.replace("__", "/"): folder for name, folder in models.items()}
    with tempfile.TemporaryDirectory() as store:
        repositories = Repositories(
            Path(store),
            by_name={
                name: Repository({commit(name): folder}, {"main": commit(name)}) for name, folder in folders.items()
            },
        )
        hub = Hub(repositories)
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        repositories.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(_POLL,), daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()


def use(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = None) -> None:
    """Have huggingface_hub, in this process, use this Hub with a cache of its own, and with a token."""
    from huggingface_hub import close_session, constants

    close_session()  # which has read the environment for proxies
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    values = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)


def unreachable(home: Path) -> dict[str, str]:
    """Environment of a process whose Hub does not answer."""
    return {**_environment("http://127.0.0.1:9", home), "HF_HUB_ETAG_TIMEOUT": "1"}


def offline(home: Path) -> dict[str, str]:
    """Environment of a process that may use the cache alone."""
    return {**unreachable(home), "HF_HUB_OFFLINE": "1"}


def without_hub_variables() -> dict[str, str]:
    """This process's environment, without what says where the Hub and its cache are."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
