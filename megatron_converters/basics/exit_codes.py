"""Exit codes of every command, in one table: commands end by it, and their --help prints it."""

from __future__ import annotations

from typing import NamedTuple

#: Done, or equal; failed, or different; not run, as argparse ends; and stopped by Ctrl-C, as shells say it (128 + SIGINT).
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class ExitCodes(NamedTuple):
    """Meanings of one command's exit codes 0, 1 and 2. An error that is no wrong usage ends with `failure`."""

    done: str
    failed: str
    usage: str = "wrong usage"
    failure: int = FAILED

    def of_error(self, code: int) -> int:
        """Exit code for an error whose own code is `code`."""
        return self.failure if code == FAILED else code

    def __str__(self) -> str:
        meanings = {DONE: self.done, FAILED: self.failed, USAGE: self.usage, INTERRUPTED: "interrupted"}
        return f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in meanings.items())}."


_CONVERSION = ExitCodes("complete", "could not convert", "options contradict each other or the model")
#: As of cmp and diff.
_COMPARISON = ExitCodes("equal", "different", "could not compare", failure=USAGE)
_READING, _ACTION = ExitCodes("done", "could not be read"), ExitCodes("done", "failed")

#: By command: verbs of `megatron-converters`, scripts, and commands of `modelconvert`.
EXIT_CODES = {
    "convert": _CONVERSION,
    "plan": ExitCodes("possible", "not possible", "options contradict each other or the model"),
    "verify": _COMPARISON,
    "diff": _COMPARISON,
    "inspect": _READING,
    "args": _READING._replace(failed="could not be read, or Megatron-LM's arguments cannot express it"),
    "families": _READING._replace(failed="a family file or plug-in could not be read"),
    "completion": _ACTION,
    "help": _ACTION,
    "convert.py": _CONVERSION,
    "convert_mlm_to_hf_checkpoint.py": _CONVERSION,
    "python -m megatron_converters.tp_pp_converter": _CONVERSION,
    "ckpt_to_hf_minicpm_with_tp_pp.py": _CONVERSION,
    "modelconvert convert": _CONVERSION,
    "modelconvert batch": ExitCodes("all done", "some could not be converted"),
    "modelconvert inspect": _READING,
    "modelconvert check": ExitCodes("whole, and as it was written", "not so, or could not be read"),
    "modelconvert history": _ACTION,
    "modelconvert config": _ACTION,
    "modelconvert": _ACTION,
}
#: For a command line that names no verb.
ANY = ExitCodes(
    "done or equal", "failed, or different (verify, diff)", "wrong usage, or could not compare (verify, diff)"
)
