"""Target for a whole model in one file: `model.pt`, as of `torch.save(model.state_dict())`, and `metadata.json`."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...assets.code_files import CODE_FOLDER
from ...basics.errors import UsageError
from ...basics.folders import remove
from ...basics.json_files import write_json
from ...basics.quantities import count
from ...conversion.journal import MANIFEST
from ...conversion.staging import Staging
from ...sharding.ranks import Parallel, Rank, parallel_for
from ...sharding.stages import EVEN
from ...storage import marks
from .flags import model_flags
from .flat_metadata import METADATA_FILE, complete, describe
from .locating import MODEL_FILE
from .options import MODEL_PT
from .rank_files_target import MegatronTarget
from .writing import FLAGS_FILE

#: What a finished output consists of; the first makes it a model, so it is removed first and moved last.
_NAMES = (METADATA_FILE, MODEL_FILE, FLAGS_FILE, MANIFEST, CODE_FOLDER)
_REMEDY = "leave it out, or write a file for each rank with --ckpt-format torch"


class FlatTarget(MegatronTarget):
    """Whole model in `save_dir` itself, as the rank file of TP1 and PP1 has it, without what that file has besides."""

    format = MODEL_PT
    default_impl = "local"

    @property
    def output(self) -> Path:
        """Folder of the model, which is `save_dir` itself."""
        return self.save_dir

    def shown(self) -> Path | None:
        """Return the folder if it has metadata that is not to be overwritten; else None."""
        there = (self.save_dir / METADATA_FILE).exists() and not self._options.overwrite
        return self.save_dir if there else None

    def refuse_existing(self) -> None:
        """Raise if the folder holds a model of this format, unless `overwrite` is set, or one of another format."""
        marks.refuse_others(self.save_dir, marks.HF, marks.META, marks.RANKS, marks.MINDSPORE)
        if not self._options.overwrite:
            marks.refuse_files(self.save_dir, [self.save_dir / name for name in _NAMES])

    def assets(self, folder: Path) -> None:
        """Write what training needs, the model's own code, and the metadata."""
        super().assets(folder)
        spec = dataclasses.replace(self._conventions.spec, dtype=self._spec.dtype)
        write_json(folder / METADATA_FILE, complete(describe(spec, self._padded), self._args, self._origin.code_files))

    def clear(self, staging: Staging) -> None:
        """Remove an older model, first what makes it one."""
        for name in _NAMES:
            remove(self.save_dir / name)

    def _place(self, staging: Staging) -> None:
        """Move the files into the folder, last those that make them a model."""
        staging.move_into(self.save_dir, (METADATA_FILE,))

    def _choose_name(self) -> str:
        if self._options.release:
            raise UsageError(f"--release: {MODEL_FILE} lies in no folder of an iteration; {_REMEDY}")
        return self.format

    def _choose_parallel(self) -> Parallel:
        options = self._options
        asked = {"tp": options.tp, "pp": options.pp, "ep": options.ep, "etp": options.etp}
        wrong = [f"--{name} {size}" for name, size in asked.items() if size not in (None, 1)]
        if wrong or options.split != EVEN:
            what = ", ".join(wrong) or "options of pipeline stages"
            raise UsageError(f"{what}: {MODEL_FILE} holds the whole model, cut in no way; {_REMEDY}")
        return parallel_for(self._spec, 1, 1)

    def _file_of(self, rank: Rank) -> str:
        return MODEL_FILE

    def _content(self, models: Mapping[str, OrderedDict[str, Any]]) -> Any:
        (model,) = models.values()
        return model

    def _model_flags(self) -> list[str]:
        return model_flags(self._args)

    def _summary(self) -> str:
        return f"{count(self._tensors, 'tensor')} as {MODEL_FILE}"
