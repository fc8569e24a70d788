"""Methods of Megatron-Bridge for what is not built here: adapters and quantised weights."""

from __future__ import annotations

from typing import Any, NoReturn


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what} is not supported; merge or dequantise the weights, and export them with export_hf_weights"
    )


class Unsupported:
    """Methods that raise `NotImplementedError`."""

    def export_adapter_weights(self, *args: Any, **options: Any) -> NoReturn:
        """Export of adapters, which is not supported."""
        _refuse("export of adapters (LoRA, DoRA)")

    def save_hf_adapter(self, *args: Any, **options: Any) -> NoReturn:
        """Saving of adapters, which is not supported."""
        _refuse("saving of adapters (LoRA, DoRA)")

    def export_adapter_ckpt(self, *args: Any, **options: Any) -> NoReturn:
        """Export of a checkpoint's adapters, which is not supported."""
        _refuse("export of a checkpoint's adapters (LoRA, DoRA)")

    def export_hf_weights_quant(self, *args: Any, **options: Any) -> NoReturn:
        """Export of quantised weights, which is not supported."""
        _refuse("quantised export")

    def export_hf_weights_modelopt(self, *args: Any, **options: Any) -> NoReturn:
        """Export of weights quantised by ModelOpt, which is not supported."""
        _refuse("quantised export for ModelOpt")
