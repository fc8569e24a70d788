"""The distribution: its files, its metadata, the wheel in an environment that has numpy and no torch; and the container file."""

from __future__ import annotations

import ast
import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import megatron_converters
from tests.helpers import ROOT
from tests.small_hf import PARAMETERS, small_llama

VERSION = megatron_converters.__version__
WHEEL, SDIST = f"megatron_converters-{VERSION}-py3-none-any.whl", f"megatron_converters-{VERSION}.tar.gz"
HOME = "https://example.org/megatron-converters"
#: What the bare environment has beside the wheel.
BARE = ("numpy", "numpy.libs", "tqdm", "yaml")
#: Names of a checkout that no build reads.
NOT_COPIED = ("tests", "build", "dist", "*.egg-info", "__pycache__")


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
    )


def done(*command: object, **env: str) -> str:
    finished = run(*command, **env)
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the sdist, and of the wheel that is built from it, with the setuptools that is installed."""
    root = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".*", *NOT_COPIED)
    shutil.copytree(ROOT, root / "checkout", ignore=ignored)
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", root / "dist", root / "checkout")
    done(*command, MEGATRON_CONVERTERS_URL=HOME)
    return root / "dist"


@pytest.fixture(scope="module")
def bare(built: Path) -> Path:
    """Programs of an environment with the wheel, and of its dependencies numpy and two small ones alone; no torch."""
    where = built.parent / "bare"
    venv.create(where, with_pip=False, symlinks=True)
    python = where / "bin/python"
    install = ("install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", built / WHEEL)
    done(sys.executable, "-m", "pip", "--python", python, *install)
    (site,) = where.glob("lib/python*/site-packages")
    for name in BARE:
        spec = importlib.util.find_spec(name.partition(".")[0])
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).parent.with_name(name)
        if source.exists():
            (site / name).symlink_to(source)
    assert run(python, "-c", "import torch").returncode == 1
    return where / "bin"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("made") / "hf")


def metadata(built: Path) -> Message:
    with zipfile.ZipFile(built / WHEEL) as wheel:
        return email.message_from_bytes(wheel.read(f"megatron_converters-{VERSION}.dist-info/METADATA"))


@pytest.mark.slow
def test_the_distributions_pass_the_index(built: Path) -> None:
    assert sorted(path.name for path in built.iterdir()) == [WHEEL, SDIST]
    assert "PASSED" in done(sys.executable, "-m", "twine", "check", "--strict", built / WHEEL, built / SDIST)
    found = metadata(built)
    assert found["Version"] == VERSION and found["License"] == "Apache-2.0" and found["License-File"] == "LICENSE"
    assert found["Requires-Python"] == ">=3.10" and "Typing :: Typed" in found.get_all("Classifier", [])
    assert f"Homepage, {HOME}" in found.get_all("Project-URL", [])
    assert "# megatron-converters" in str(found.get_payload())
    needed = {re.split(r"[<>=; ]", line)[0] for line in found.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert needed == {"numpy", "torch", "safetensors", "tqdm", "isal", "PyYAML", "huggingface_hub"}


@pytest.mark.slow
def test_the_distributions_have_their_files(built: Path) -> None:
    with zipfile.ZipFile(built / WHEEL) as wheel:
        names = set(wheel.namelist())
    tops = {name.partition("/")[0] for name in names}
    packages = {"megatron_converters", "megatron_layers", "model_converter_tool"}
    assert tops == {*packages, f"megatron_converters-{VERSION}.dist-info"}
    modules = {path.relative_to(ROOT).as_posix() for package in packages for path in (ROOT / package).rglob("*.py")}
    beside = {
        "py.typed",
        "cli/reports.schema.json",
        "inspection/shard_map/page.html",
        "loaders/loader_core.py",
        "savers/saver_mcore.py",
    }
    assert modules | {f"megatron_converters/{name}" for name in beside} <= names
    with tarfile.open(built / SDIST) as sdist:
        listed = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "convert.py",
        "docs/python-api.md",
        "requirements-test.txt",
    } <= listed


@pytest.mark.slow
def test_the_wheel_in_a_bare_environment(bare: Path, model: Path, tmp_path: Path) -> None:
    program = bare / "megatron-converters"
    assert "usage: megatron-converters [-h]" in done(program, "--help")
    assert f"llama, {PARAMETERS:,} parameters" in done(program, "inspect", model)
    assert "2 files" in done(program, "plan", model, tmp_path / "out", "--tp", 2)
    done(program, "convert", model, tmp_path / "out", "--tp", 2, "--quiet")
    # a name of the Hub needs huggingface_hub, which says so in one sentence
    named = run(program, "inspect", "acme/there")
    assert named.returncode == 2 and named.stderr.count("\n") == 1 and "pip install huggingface_hub" in named.stderr


@pytest.mark.slow
def test_each_command_calls_itself_by_its_name(bare: Path) -> None:
    wrong = run(bare / "megatron-convert-mlm-to-hf")
    assert wrong.returncode == 2 and wrong.stderr.startswith("usage: megatron-convert-mlm-to-hf "), wrong
    failed = run(bare / "megatron-convert", "--loader", "absent", "--load-dir", "a", "--save-dir", "b")
    assert failed.stderr.startswith("megatron-convert: error: there is no loader 'absent'")


def test_the_version_is_said_once_and_in_the_changelog() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    (heading,) = re.findall(rf"^## \[{re.escape(VERSION)}\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", heading)


# --- the container file ---

#: Instructions that an image of a command needs; ADD and SHELL, among others, are not among them.
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Instructions of the container file with their arguments, without comments and with continued lines joined."""
    lines = (ROOT / "Containerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    return [
        (word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def test_the_container_file() -> None:
    found = instructions()
    assert {word for word, _ in found} <= INSTRUCTIONS
    last = dict(found)
    assert last["USER"] not in ("root", "0")
    assert [word for word, _ in found].index("USER") > max(n for n, (word, _) in enumerate(found) if word == "RUN")
    assert f"useradd --create-home {last['USER']}" in last["RUN"]
    images = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+", image) for image in images), images
    (program,) = ast.literal_eval(last["ENTRYPOINT"])
    assert f'"{program} = ' in (ROOT / "setup.py").read_text()
    assert ast.literal_eval(last["CMD"]) == ["--help"]
    stages = {rest.split()[2] for word, rest in found if word == "FROM" and len(rest.split()) == 3}
    assert set(re.findall(r"from=(\w+)", " ".join(rest for _, rest in found))) <= stages
    for word, rest in found:
        if word == "COPY":
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), rest
        if word == "RUN":
            assert "sudo" not in rest and "curl" not in rest and "apt-get" not in rest
            assert all("--no-cache-dir" in call for call in re.findall(r"pip (?:install|wheel).*", rest))


def test_what_the_image_is_built_from_is_not_ignored() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")]
    assert ".git" in ignored and ".venv*" in ignored
    for name in ("README.md", "LICENSE", "setup.py", "pyproject.toml", "requirements.txt", "requirements-test.txt"):
        assert (ROOT / name).is_file() and not any(Path(name).match(pattern) for pattern in ignored)


def test_the_image_is_built_where_there_is_a_builder(tmp_path: Path) -> None:
    script, calls = ROOT / "scripts/build_container.sh", tmp_path / "calls"
    for name in ("bash", "dirname"):
        program = shutil.which(name)
        assert program is not None
        (tmp_path / name).symlink_to(program)
    assert "the image is not built" in done(script, PATH=str(tmp_path))
    docker = tmp_path / "docker"
    docker.write_text(f"#!{shutil.which('bash')}\nexit 1\n")  # a client without its daemon
    docker.chmod(0o755)
    assert "the image is not built" in done(script, PATH=str(tmp_path))
    docker.write_text(f'#!{shutil.which("bash")}\necho "$*" >> "{calls}"\n')
    done(script, PATH=str(tmp_path))
    _, build, version = calls.read_text().splitlines()
    assert build == "build --file Containerfile --tag megatron-converters ."
    assert version == "run --rm megatron-converters --version"
