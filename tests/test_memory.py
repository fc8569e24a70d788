"""How much memory this process can have, by hand-made trees of /proc and /sys/fs/cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.logits import cgroup, memory

CACHED = "anon 5\ninactive_file 30\nactive_file 20\nfile 1000\n"
CACHED_V1 = "inactive_file 1\nactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20\n"


def v2(limit: object, used: int, stat: str = "") -> dict[str, str]:
    """The files of a group in version 2."""
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def v1(limit: int, used: int, stat: str = "") -> dict[str, str]:
    """The same in version 1."""
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


TREES: dict[str, tuple[str, dict[str, dict[str, str]], int | None]] = {
    "a container": ("0::/", {"": v2(1000, 400)}, 600),
    "no limit": ("0::/", {"": v2("max", 400)}, None),
    "no files, as at the root of a machine": ("0::/", {}, None),
    "no groups at all": ("", {"": v2(1000, 400)}, None),
    "the group's own limit": ("0::/a/b", {"a/b": v2(500, 100), "a": v2(2000, 1500)}, 400),
    "the limit of a group around it": ("0::/a/b", {"a/b": v2("max", 100), "a": v2(2000, 1700), "": v2(5000, 1)}, 300),
    "another group's limit": ("0::/a/b", {"a/c": v2(5, 1), "a/b": v2(500, 100)}, 400),
    "a path that the container does not see": ("0::/docker/x", {"": v2(1000, 400)}, 600),
    "a path outside of what the container sees": ("0::/../x", {"x": v2(900, 400), "": v2(1000, 400)}, 500),
    "cached files": ("0::/a", {"a": v2(1000, 400, CACHED)}, 650),
    "more than the limit": ("0::/", {"": v2(1000, 1200)}, 0),
    "version 1": ("7:cpu,cpuacct:/a\n4:memory:/a", {"memory/a": v1(1000, 400, CACHED_V1), "memory": v1(2**63, 1)}, 650),
    "version 1, from within": ("4:memory:/docker/x", {"memory": v1(1000, 300)}, 700),
    "other controllers of version 1": ("4:cpu:/a", {"memory/a": v1(1000, 400)}, None),
    "both": (
        "4:memory:/a\n0::/b:c",
        {"memory/a": v1(1000, 400), "memory": v1(2**63, 1), "unified/b:c": v2(100, 40)},
        60,
    ),
}


@pytest.mark.parametrize(("own", "groups", "wanted"), TREES.values(), ids=TREES)
def test_the_narrowest_limit_counts(
    tmp_path: Path, own: str, groups: dict[str, dict[str, str]], wanted: int | None
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    for group, files in groups.items():
        folder = tmp_path / "mount" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    assert cgroup.free(tmp_path / "own", tmp_path / "mount") == wanted


def test_a_system_without_groups(tmp_path: Path) -> None:
    assert cgroup.free(tmp_path / "own", tmp_path) is None


@pytest.mark.parametrize(
    ("machine", "groups", "wanted"),
    [(None, None, None), (1000, None, 1024000), (None, 500, 500), (1000, 500, 500), (1000, 2**40, 1024000)],
)
def test_machine_and_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: int | None, groups: int | None, wanted: int | None
) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(cgroup, "free", lambda: groups)
    if machine is not None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 9000000 kB\nMemAvailable:    {machine} kB\n")
    assert memory.available() == wanted
    if wanted is None:
        memory.check("it", 10**15, 1, 0)
        return
    with pytest.raises(ConversionError, match=r"it needs about 4\.6 GB \(1,000,000,000 parameters .* are free here"):
        memory.check("it", 10**9, 1, 0)


def test_what_fits_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * (1000 + 6 * 10) + 2 * 600 * 10**6
    monkeypatch.setattr(memory, "available", lambda: needed)
    memory.check("it", 1000, 2, 10)
    with pytest.raises(ConversionError, match="in 2 processes"):
        memory.check("it", 1001, 2, 10)
