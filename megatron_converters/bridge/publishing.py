"""Publication of models on the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ..basics.errors import UsageError
from ..formats.hub_upload import upload
from ..live.model import process_heartbeat
from .pretrained import Pretrained
from .weights import save

_URL = "url of the commit"


class Publishing:
    """Methods of `AutoBridge` that write to the Hub."""

    hf_pretrained: Pretrained

    def push_to_hub(
        self,
        model: Any,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        show_progress: bool = True,
        weight_dtype: Any = None,
        max_shard_size: int | None = None,
    ) -> str:
        """Publish a live model, or a folder that `save_hf_pretrained` wrote, as one commit; returns its URL.

        All processes of a live model call this; the first saves it in a temporary folder (`TMPDIR`) and uploads that. Of a folder,
        one process does. A repository that does not exist is made, `private` if so asked. Raises `ConversionError`, in all
        processes, and the Hub then has what it had before.
        """
        options: dict[str, Any] = dict(private=private, token=token, commit_message=commit_message, revision=revision)
        saving = {"weight_dtype": weight_dtype, "max_shard_size": max_shard_size}
        chosen: dict[str, Any] = {name: value for name, value in saving.items() if value is not None}
        if isinstance(model, (str, os.PathLike)):
            if chosen:
                raise UsageError(
                    f"{', '.join(chosen)}: a folder is published as it is; leave it out, or give a live model"
                )
            return upload(Path(model), repo_id, **options)
        with tempfile.TemporaryDirectory(prefix="megatron_converters_") as folder:
            path = Path(folder) / "model"
            save(self.hf_pretrained, model, path, show_progress=show_progress, **chosen)
            with process_heartbeat() as heartbeat:
                if heartbeat is None:
                    return upload(path, repo_id, **options)
                if heartbeat.rank == 0:
                    heartbeat.put(_URL, upload(path, repo_id, **options).encode())
                heartbeat.meet("published")
                return heartbeat.wait_for(_URL).decode()
