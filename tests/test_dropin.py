"""scripts/install_dropin.sh in a stand-in for a tree of Megatron-LM, and there the commands of the documentation."""

from __future__ import annotations

import shlex
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_blocks import blocks, lines_of
from tests.conversions import hf_to_megatron
from tests.forked import forked_script
from tests.helpers import ROOT, Run, file_bytes, hf_tensors, rank_content, refused, same_tensors, succeeded, verb
from tests.oracle.by_hand_mindspore import write_by_hand
from tests.served_python import ServedPython
from tests.test_docs import TOKENIZER
from tests.test_stock_protocol import CONVERT

HFModel = Callable[..., Path]
INSTALL = ROOT / "scripts/install_dropin.sh"
#: Files of a tree's tools/checkpoint whose names ours would take.
THEIRS = ("loader_core.py", "saver_core.py", "loader_llama_mistral.py", "convert_mlm_to_hf_checkpoint.py")


def make_tree(folder: Path) -> Path:
    tools = folder / "tools" / "checkpoint"
    tools.mkdir(parents=True)
    (tools / "convert.py").write_text(CONVERT)
    for name in THEIRS:
        (tools / name).write_text(f"MINE = {name!r}\n")
    (tools / "requirements.txt").write_text("torch\nhuggingface_hub==1.0\n")
    return folder


def check(words: list[str]) -> None:
    """scripts/check_dropin.py, with a tree's convert.py in forked processes."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import check_dropin

    def run(convert: str, *options: str | Path) -> None:
        succeeded(forked_script(Path(convert), "--model-type", "GPT", *options))

    check_dropin.run = run
    check_dropin.main(*words[1:])


def fail(words: list[str]) -> None:
    sys.exit(f"error: {words[1]} changed lm_head.weight")


def install(tree: Path, *options: str, checking: Callable[[list[str]], None] = check) -> Run:
    """Run the script; its check is served, unless `options` say --no-check."""
    place = tree.parent / f"python-{len(list(tree.parent.iterdir()))}"
    return ServedPython(place, checking).run(["bash", INSTALL, tree, *options], {})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture(scope="module")
def as_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree whose own names are ours."""
    made = make_tree(tmp_path_factory.mktemp("dropin") / "tree")
    done = succeeded(install(made, "--as-core"))
    assert "checked: 21 tensors" in done.out and "--loader llama_mistral --saver mcore" in done.out
    return made


def tools_of(tree: Path) -> Path:
    return tree / "tools" / "checkpoint"


def test_no_file_of_the_tree_is_replaced_unasked(tree: Path) -> None:
    before = file_bytes(tree)
    done = succeeded(install(tree, "--no-check"))
    after = file_bytes(tree)
    assert "saver_core.py is the tree's own" in done.out
    assert "--saver megatron_converters.savers.saver_mcore" in done.out
    requirements = "tools/checkpoint/requirements.txt"
    assert {name: after[name] for name in before if name != requirements} == {
        name: data for name, data in before.items() if name != requirements
    }
    assert after[requirements].startswith(before[requirements])
    added = after[requirements][len(before[requirements]) :].decode().splitlines()[1:-1]
    assert "safetensors" in added and not any(line.startswith(("torch", "huggingface_hub")) for line in added)
    names = {path.name for path in tools_of(tree).iterdir()}
    assert {"loader_hf.py", "loader_core_mf.py", "loader_mixtral_hf.py", "saver_hf.py", "megatron_converters"} <= names
    succeeded(install(tree, "--no-check"))  # the second run replaces the first
    assert file_bytes(tree) == after
    succeeded(install(tree, "--uninstall"))
    assert file_bytes(tree) == before
    refused(install(tree, "--uninstall"), "nothing is installed")


def test_as_core_keeps_what_it_replaces(as_core: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(as_core, tmp_path / "tree")
    for name in THEIRS:
        assert (tools_of(tree) / name.replace(".py", "_stock.py")).read_text() == f"MINE = {name!r}\n"
    script = tools_of(tree) / "other.py"  # of the tree, which imports what it replaces
    script.write_text("from saver_core import MINE, save_checkpoint\nprint(MINE, save_checkpoint.__module__)\n")
    assert succeeded(forked_script(script)).out == "saver_core.py megatron_converters.savers.saver_mcore\n"
    script.unlink()
    succeeded(install(tree, "--uninstall"))
    assert file_bytes(tree) == file_bytes(make_tree(tmp_path / "new"))


def test_what_was_changed_is_not_removed(as_core: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(as_core, tmp_path / "tree")
    changed = tools_of(tree) / "saver_hf.py"
    changed.write_text("mine\n")
    before = file_bytes(tree)
    refused(install(tree, "--uninstall"), "saver_hf.py", "--force")
    refused(install(tree, "--as-core", "--no-check"), "saver_hf.py")
    assert file_bytes(tree) == before
    succeeded(install(tree, "--uninstall", "--force"))
    assert not changed.exists()


def test_a_failed_installation_leaves_the_tree_as_it_was(tree: Path) -> None:
    before = file_bytes(tree)
    refused(install(tree, "--as-core", checking=fail), "changed lm_head.weight", "is as it was")
    assert file_bytes(tree) == before
    (tools_of(tree) / "saver_core_stock.py").write_text("of somebody else\n")
    before = file_bytes(tree)
    refused(install(tree, "--as-core"), "saver_core_stock.py exists", "is as it was")
    assert file_bytes(tree) == before
    (tools_of(tree) / "megatron_converters").mkdir()
    refused(install(tree), "megatron_converters exists")
    assert (tools_of(tree) / "megatron_converters").is_dir()


@pytest.mark.parametrize("options", [("nowhere",), (), ("a", "b"), ("a", "--what")])
def test_wrong_usage(options: tuple[str, ...], tmp_path: Path) -> None:
    run = ServedPython(tmp_path / "bin", fail).run(["bash", INSTALL, *options], {})
    assert run.code == 2 and ("usage: " in run.err or "no tree of Megatron-LM" in run.err)


# --- the commands of the documentation, in a tree


def commands(page: str, start: str) -> list[list[str]]:
    """Commands of a page's blocks that begin with `start`, without it, as words."""
    text = (ROOT / page).read_text()
    lines = [line for language in ("text", "bash") for block in blocks(text, language) for line in lines_of(block)]
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]


def in_tree(tree: Path, words: list[str], places: dict[str, Path], **variables: object) -> Run:
    """Run a command of a page: its first word is the program, its paths are replaced."""
    variables = {**variables, **places}
    filled = [string.Template(str(places.get(word, word))).safe_substitute(variables) for word in words]
    return succeeded(forked_script(tools_of(tree) / filled[0], *filled[1:], cwd=tree))


def with_tokenizer(folder: Path, target: Path) -> Path:
    copied = shutil.copytree(folder, target)
    for name, content in TOKENIZER.items():
        (copied / name).write_bytes(content)
    return copied


@pytest.mark.parametrize(
    ("family", "which", "sizes"), [("llama3.1", 1, dict(TP=2, PP=2)), ("mixtral", 2, dict(TP=2, PP=1, EP=2))]
)
def test_habana_s_commands(
    family: str, which: int, sizes: dict[str, int], hf_model: HFModel, as_core: Path, tmp_path: Path
) -> None:
    back, *there = commands("docs/habana.md", "python $MEGATRON_LM_ROOT/tools/checkpoint/")
    assert [words[0] for words in there] == ["convert.py"] * 3 and there[0][1:] == ["--help"]
    source = with_tokenizer(hf_model(family, dtype="bfloat16"), tmp_path / "source")
    checkpoint = hf_to_megatron(source, tmp_path / "mlm", tp=2, pp=1)
    (checkpoint / "iter_0000001").rename(checkpoint / "iter_0000004")
    places = {"/path/to/mlm_checkpoints/": checkpoint, "/path/to/save/hf_checkpoints/": tmp_path / "hf"}
    back[back.index("--source-model-type") + 1] = family
    in_tree(as_core, back, places)
    same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(source))
    places = {"/path/to/hf/checkpoints": tmp_path / "hf", "/path/to/save/mlm/checkpoint": tmp_path / "saved"}
    places |= {"/path/to/hf/checkpoints/source_megatron_args.json": tmp_path / "hf/source_megatron_args.json"}
    in_tree(as_core, there[which], {**places, "/path/to/tokenizer/model": tmp_path / "source"}, **sizes)
    succeeded(verb("verify", source, tmp_path / "saved"))
    if family == "llama3.1":
        in_tree(as_core, [*there[0], "--model-type", "GPT", *there[1][3:]], places, **sizes)


def test_mindspore_s_command(hf_model: HFModel, as_core: Path, tmp_path: Path) -> None:
    """In bfloat16, as the documentation says."""
    source = hf_model("llama2", dtype="bfloat16")
    (words,) = commands("docs/mindspore.md", "python convert.py")
    places = {"MS": write_by_hand(source, tmp_path / "ms", mlp="contiguous"), "OUT": tmp_path / "out"}
    in_tree(as_core, ["convert.py", *words], places)
    assert (tmp_path / "out/iter_0000001/mp_rank_01_001").is_dir()
    assert rank_content(tmp_path / "out", "mp_rank_00_000")["args"].bf16
    succeeded(verb("verify", source, tmp_path / "out"))


def test_the_long_names_work_wherever_the_library_can_be_imported(
    hf_model: HFModel, as_core: Path, tmp_path: Path
) -> None:
    """As where it was installed by pip: stock convert.py takes the name of a plugin for all of a module's name, too."""
    source = hf_model("llama2")
    names = ("--loader", "megatron_converters.loaders.loader_hf", "--saver", "megatron_converters.savers.saver_mcore")
    folders = ("--load-dir", source, "--save-dir", tmp_path / "out")
    script = tools_of(as_core) / "convert.py"
    succeeded(forked_script(script, "--model-type", "GPT", *names, *folders))
    succeeded(verb("verify", source, tmp_path / "out"))
