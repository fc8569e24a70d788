"""Free memory within this process's control groups, the limits that a container or a batch system sets.

Control groups are nested and each has a limit of its own, so that of every group around the process applies.
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
    """Version of control groups: its mount points below `/sys/fs/cgroup`, and its file names."""

    mounts: tuple[str, ...]
    limit: str
    used: str
    #: Entries of memory.stat that count cached pages of files, which the kernel drops when a process needs memory.
    files: tuple[str, ...]


#: systemd mounts it at `unified` where version 1 is in use, too.
_V2 = _Version(("", "unified"), "memory.max", "memory.current", ("active_file", "inactive_file"))
#: The entries of memory.stat without `total_` leave out nested groups. The value for no limit is a number above 2**62.
_V1 = _Version(
    ("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)


def free(own: Path = _OWN, mount: Path = _MOUNT) -> int | None:
    """Bytes left within the tightest limit; None if no limit is set.

    Cached pages of files count as free, as in the kernel's MemAvailable: copying a checkpoint fills a group with them.
    """
    left = (
        _bytes_left(folder, version)
        for version, group in _groups(own)
        for mount_point in version.mounts
        for folder in _group_and_parents(mount / mount_point, group)
    )
    return min((number for number in left if number is not None), default=None)


def _groups(own: Path) -> Iterator[tuple[_Version, str]]:
    """Groups of this process: each line has a number, controllers and a path. Version 2 has one group, without controllers."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, group in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            yield _V2, group
        elif "memory" in controllers.split(","):
            yield _V1, group


def _group_and_parents(mount: Path, group: str) -> Iterator[Path]:
    """Folders of a group and of all groups around it. In a container, part of the path may not exist."""
    inside = posixpath.normpath("/" + group).strip("/")
    folder = mount / inside
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder


def _bytes_left(folder: Path, version: _Version) -> int | None:
    limit, used = (_number(folder / name) for name in (version.limit, version.used))
    if limit is None or used is None:
        return None
    return max(limit - used + _cached_bytes(folder, version), 0)


def _number(path: Path) -> int | None:
    """Number in a file; None if the file does not exist or contains `max`."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cached_bytes(folder: Path, version: _Version) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(number) for name, _, number in (line.partition(" ") for line in lines) if name in version.files)
