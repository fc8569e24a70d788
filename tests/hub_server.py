"""Hub on loopback: the endpoints that huggingface_hub calls to download a model, serving folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

#: Seconds after which a held file is given all the same.
_LONGEST = 60.0
_API = re.compile(r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?$")
_FILE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")


@dataclass
class Hub:
    """Models by name, each a folder; gated ones give no file. `downloaded` are the files that were asked for.

    Files whose names are in `held` are given once `released` is set.
    """

    models: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    downloaded: list[str] = field(default_factory=list)
    endpoint: str = ""
    held: set[str] = field(default_factory=set)
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that uses this Hub, with a cache of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


def commit(name: str) -> str:
    """The one commit of a model."""
    return hashlib.sha1(name.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = _FILE.match(path) or _API.match(path)
        name = asked["id"] if asked else ""
        if asked is None or name not in self.hub.models:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if asked["revision"] not in (None, "main", commit(name)):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        folder = self.hub.models[name]
        if asked.re is _FILE:
            return self._send_file(name, folder / asked["file"], body)
        listed = [path.relative_to(folder).as_posix() for path in _files(folder)]
        answer: Any = {"id": name, "sha": commit(name), "siblings": [{"rfilename": file} for file in listed]}
        if asked["what"] == "tree":
            answer = [
                {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": commit(file)}
                for file in listed
            ]
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def _send_file(self, name: str, path: Path, body: bool) -> None:
        if name in self.hub.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        data = path.read_bytes()
        if body:
            self.hub.downloaded.append(f"{name}/{path.relative_to(self.hub.models[name]).as_posix()}")
            if path.name in self.hub.held:
                self.hub.reached.set()
                self.hub.released.wait(_LONGEST)
        etag = hashlib.sha1(data).hexdigest()
        return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit(name)}, body)

    def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        with suppress(OSError):  # the process that asked may have been killed
            self.end_headers()
            if body:
                self.wfile.write(data)


@contextmanager
def serving(**models: Path) -> Iterator[Hub]:
    """Hub that serves while the context lasts; names of `models` have two underscores for the slash."""
    hub = Hub({name.replace("__", "/"): folder for name, folder in models.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def unreachable(home: Path) -> dict[str, str]:
    """Environment of a process whose Hub does not answer."""
    return {**Hub(endpoint="http://127.0.0.1:9").environment(home), "HF_HUB_ETAG_TIMEOUT": "1"}


def offline(home: Path) -> dict[str, str]:
    """Environment of a process that may use the cache alone."""
    return {**unreachable(home), "HF_HUB_OFFLINE": "1"}


def without_hub_variables() -> dict[str, str]:
    """This process's environment, without what says where the Hub and its cache are."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
