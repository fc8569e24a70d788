"""Megatron-LM's loader/saver contract: one process loads, another saves, and a queue connects them.

It accepts the options and the plugins of stock tools/checkpoint/convert.py. Unlike stock, it notices within seconds when
either process dies, and exits with 0 only if the output is complete.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import queue as queues
import sys
import types
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..basics.errors import ConversionError, UsageError
from ..basics.exit_codes import EXIT_CODES
from ..formats.queue.channel import DONE, check_exit
from .console import exit_on_error, prepare_process, program
from .numpy_threads import import_numpy
from .options.spellings import did_you_mean
from .parser import Parser

#: Name of the command where the package is installed.
_COMMAND = "megatron-convert"
#: Names that stock and Habana's tools use for the same plugins.
_ALIASES = {
    "loader": {"mcore": "core", "megatron": "core"},
    "saver": {"core": "mcore", "megatron": "mcore", "mindspore": "mf"},
}
_OURS = {"loader": ("llama_mistral", "mixtral_hf", "hf", "core", "core_mf"), "saver": ("mcore", "hf", "mf")}
_PROG = "convert.py"
#: Plugins that are taken where none is named.
_LOADER, _SAVER = "llama_mistral", "mcore"
#: Seconds to wait for messages that the saver left unread.
_UNREAD_TIMEOUT = 0.05
#: Seconds that the saver has to clean up after the loader failed, before it is terminated, and then killed.
_GRACE = 5.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run a conversion; exits with a code of its row in `EXIT_CODES`, 0 only if the saver has completed its output."""
    prepare_process()
    with exit_on_error(program("convert", _COMMAND), EXIT_CODES["convert.py"]):
        _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> None:
    # The options depend on the plugins, so the first pass reads only their names and ignores --help and missing options.
    names = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_plugin_names(names)
    known, _ = names.parse_known_args(argv)
    loader, saver = load_plugin("loader", known.loader), load_plugin("saver", known.saver)
    args = parser(loader, saver).parse_args(argv)
    import_numpy()  # before a process is forked, which would import all of it again
    importlib.import_module(f"{__package__}.transfer")
    context = multiprocessing.get_context(args.start_method)
    queue = make_queue(context, args.max_queue_size)
    process = context.Process(target=saver.save_checkpoint, args=(queue, args), name="saver")
    process.start()
    try:
        loader.load_checkpoint(queue, args)
        process.join()
    except BaseException:
        _stop(process)
        raise
    finally:
        queue.cancel_join_thread()  # the saver has ended, so nothing will read what is still buffered
    if process.exitcode == 0 and _unread(queue):
        raise ConversionError("the saver ended with exit code 0 before it had received the whole model")
    check_exit(process)


def make_queue(context: Any, size: int) -> Any:
    """Queue of at most `size` messages; raises `ConversionError` if the system cannot make its locks."""
    try:
        return context.Queue(maxsize=size)
    except OSError as error:  # its locks are semaphores, stored as files in /dev/shm
        raise ConversionError(
            f"cannot make the queue between loader and saver: {error.strerror}; make /dev/shm writable, or use "
            "`megatron-converters convert`, which needs no queue"
        ) from error


def _unread(queue: Any) -> bool:
    """Whether messages are left, other than a second "done", which some stock loaders send."""
    with suppress(queues.Empty):
        while queue.get(timeout=_UNREAD_TIMEOUT) == DONE:
            pass
        return True
    return False


def parser(loader: types.ModuleType | None = None, saver: types.ModuleType | None = None) -> Parser:
    """Parser with the options of a loader and a saver, by default those that are taken where none is named."""
    script = _base_parser()
    for plugin in (loader or load_plugin("loader", _LOADER), saver or load_plugin("saver", _SAVER)):
        plugin.add_arguments(script)
    return script


def _base_parser() -> Parser:
    name = program(_PROG, _COMMAND)
    parser = Parser(
        prog=name,
        usage=f"{name} [--loader NAME] [--saver NAME] --load-dir DIR --save-dir DIR [options]",
        description="Convert a model between Hugging Face and Megatron-LM: a loader reads it, a saver writes it.",
        epilog="Options of a loader and a saver are shown with --help and --loader NAME --saver NAME. "
        f"{EXIT_CODES[_PROG]}",
        conflict_handler="resolve",
        examples=(
            f"python {_PROG} --loader llama_mistral --saver mcore --load-dir llama-hf --save-dir llama-megatron "
            "--target-tensor-parallel-size 2",
            f"python {_PROG} --loader core --saver hf --load-dir llama-megatron --save-dir llama-back",
        ),
    )
    parser.add_argument(
        "--model-type", choices=["GPT", "BERT"], default="GPT", help="GPT; BERT is accepted by stock plugins only."
    )
    _add_plugin_names(parser)
    parser.add_argument("--load-dir", metavar="DIR", required=True, help="Folder of the model or checkpoint to read.")
    parser.add_argument("--save-dir", metavar="DIR", required=True, help="Folder to write to.")
    parser.add_argument(
        "--max-queue-size",
        metavar="N",
        type=int,
        default=50,
        help="Messages that may wait in the queue between loader and saver.",
    )
    parser.add_argument(
        "--no-checking",
        action="store_false",
        dest="checking",
        help="Do not check the names and contents of messages.",
    )
    parser.add_argument(
        "--start-method",
        choices=multiprocessing.get_all_start_methods(),
        default=None,
        help="How to start the saver's process.",
    )
    return parser


def _add_plugin_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loader", metavar="NAME", default=_LOADER, help="llama_mistral, core, or the name of another plugin."
    )
    parser.add_argument(
        "--saver",
        metavar="NAME",
        default=_SAVER,
        help="mcore, hf, mf (MindSpore Transformers), or the name of another plugin.",
    )


def load_plugin(kind: str, name: str) -> types.ModuleType:
    """Import a plugin: ours from a checkout or installed, else any module `loader_NAME`, `saver_NAME` or `NAME` on the path."""
    name = _ALIASES[kind].get(name, name)
    candidates = (f"{kind}s.{kind}_{name}", f"megatron_converters.{kind}s.{kind}_{name}", f"{kind}_{name}", name)
    for candidate in candidates:
        if _exists(candidate):
            plugin = importlib.import_module(candidate)
            if not hasattr(plugin, "add_arguments"):
                raise UsageError(f"module {candidate} is not a {kind} plugin: it has no add_arguments")
            return plugin
    hint = did_you_mean(name, (*_OURS[kind], *_ALIASES[kind]))
    raise UsageError(
        f"there is no {kind} {name!r}; ours are {', '.join(_OURS[kind])}, others must be on PYTHONPATH as "
        f"{kind}_{name}.py{hint}"
    )


def _exists(module: str) -> bool:
    """Whether a module can be found, without running it: an error inside must not look as if it were missing."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _stop(process: Any) -> None:
    process.join(_GRACE)
    if process.is_alive():
        process.terminate()
        process.join(_GRACE)
        process.kill()
        process.join()


if __name__ == "__main__":
    main()
