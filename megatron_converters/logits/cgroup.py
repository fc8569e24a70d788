"""The memory that control groups leave this process: what a container or a batch system lets it have.

Groups lie inside each other and each has a limit of its own, so a process is bound by that of its own group and of all around it.
Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, and `proc_pid_cgroup(5)`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_OWN = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups is mounted, and the names of its files."""

    mounts: tuple[str, ...]
    limit: str
    used: str
    #: Entries of memory.stat: pages of files, which are dropped when a process needs the room.
    files: tuple[str, ...]


#: `unified` is where systemd mounts it beside version 1.
_V2 = _Version(("", "unified"), "memory.max", "memory.current", ("active_file", "inactive_file"))
#: Here the entries of memory.stat without `total_` leave out the groups inside. No limit is a number above 2**62.
_V1 = _Version(
    ("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)


def free(own: Path = _OWN, mount: Path = _MOUNT) -> int | None:
    """Bytes that the narrowest of all limits leaves; None where none is set.

    What only caches files counts as free, as in the kernel's own MemAvailable: copying a checkpoint fills a group with it.
    """
    left = (
        _left(folder, version)
        for version, group in _groups(own)
        for at in version.mounts
        for folder in _upwards(mount / at, group)
    )
    return min((number for number in left if number is not None), default=None)


def _groups(own: Path) -> Iterator[tuple[_Version, str]]:
    """This process's groups: lines of a number, controllers and a path. In version 2 there is one, without controllers."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, group in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            yield _V2, group
        elif "memory" in controllers.split(","):
            yield _V1, group


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    """The folders of a group and of all around it. In a container some of the path may not be there."""
    inside = posixpath.normpath("/" + group).strip("/")
    folder = mount / inside
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder


def _left(folder: Path, version: _Version) -> int | None:
    limit, used = (_number(folder / name) for name in (version.limit, version.used))
    if limit is None or used is None:
        return None
    return max(limit - used + _cached(folder, version), 0)


def _number(path: Path) -> int | None:
    """A file's number; None where there is no such file, or it says `max`."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cached(folder: Path, version: _Version) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(number) for name, _, number in (line.partition(" ") for line in lines) if name in version.files)
