"""Hook of mkdocs, which reads some things otherwise than GitHub does.

Links from docs/ to other files of the repository, which are relative in the pages, lead to the repository's page, or are plain text
where it has none. A bar in code within a table needs no backslash.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CODE = re.compile(r"`[^`\n]*`")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Page as mkdocs reads it."""

    def replaced(link: re.Match[str]) -> str:
        text, path, part = link.groups()
        if not config.repo_url:
            return text
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{path}{part or ''})"

    lines = _OUTSIDE.sub(replaced, markdown).split("\n")
    return "\n".join(_CODE.sub(_without_backslashes, line) if line.startswith("|") else line for line in lines)


def _without_backslashes(code: re.Match[str]) -> str:
    return code[0].replace("\\|", "|")
