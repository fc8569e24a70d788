"""Access to the Hugging Face Hub: its library, imported when it is used, names of models, and its errors in one sentence.

HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN are heeded by huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, one_line

_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"({_NAME}/)?{_NAME}(@[\w./-]+)?", re.ASCII)

#: Characters that the Hub allows in `owner/name`.
_LONGEST = 96


class Model(NamedTuple):
    """Model on the Hub; `revision` is a branch, tag or commit, None for the main branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_hub_id(text: str) -> bool:
    """Whether a text can name a model on the Hub: `owner/name`, also `owner/name@revision`, or the `name` of an old model."""
    return _HUB_ID.fullmatch(text) is not None and len(text.partition("@")[0]) <= _LONGEST


def library() -> Any:
    """The module huggingface_hub, with its submodules `constants`, `errors` and `utils`."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ConversionError(
            f"models of the Hub need the package {error.name}; run pip install huggingface_hub, or give a local folder"
        ) from error
    return huggingface_hub


def address(hub: Any) -> str:
    """The Hub that is asked, as messages name it."""
    return f"the Hub at {hub.constants.ENDPOINT}"


def reason(error: BaseException) -> str:
    """An error of huggingface_hub on one line."""
    return one_line(" ".join(f"{type(error).__name__}: {error}".split()))


@contextmanager
def in_one_sentence(hub: Any, sentence: Callable[[BaseException], str]) -> Iterator[None]:
    """Turn errors of huggingface_hub into `ConversionError`, with the sentence for the error that began it."""
    try:
        yield
    except ConversionError:
        raise
    except (hub.errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        # Threads that send files wrap what failed in a RuntimeError; hf_xet raises some errors as one.
        began = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        raise ConversionError(sentence(began)) from error
