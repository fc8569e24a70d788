"""Target for savers: a model sent as Megatron-LM's messages, with tensors as handles."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Sequence
from typing import Any

from ... import __version__
from ...assets.origin import Origin
from ...basics.dtypes import DType
from ...basics.errors import raise_all
from ...conversion.accounting import Coverage
from ...conversion.composing import Sources
from ...conversion.copying import Executor, Sink
from ...conversion.endpoint import Source, main_dtype, wanted_dtype
from ...conversion.outline import Fill
from ...families import FAMILIES
from ...families.config_json import wrapper_in
from ...model.layers import LAYER_NORM
from ...model.layouts import row_maps
from ...model.slots import Ref, refs
from ...model.spec import ModelSpec
from .channel import DONE, send
from .handles import StackedHandle, TensorHandle, part_of
from .messages import ENTRIES, message_name, sent

#: Function to Megatron-LM's `args`, as a mapping, from a spec and the source's own args, if it has any.
ArgsOf = Callable[[ModelSpec, argparse.Namespace | None], dict[str, Any]]
#: Longest sequence length sent to a stock saver, which expects one although no model decides it.
_MAX_SEQ_LENGTH = 4096


class QueueTarget:
    """Sender of metadata, then of each message once its tensors are complete, then of "done"."""

    def __init__(
        self,
        queue: Any,
        args_of: ArgsOf,
        *,
        model_type: str,
        divisor: int | None,
    ) -> None:
        self._queue = queue
        self._args_of = args_of
        self._model_type = model_type
        self._divisor = divisor
        self._message: dict[str, Any] = {}

    def begin(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> None:
        """Send the metadata."""
        self._spec, self._dtype_of = spec, dtype_of
        send(self._queue, self._metadata(origin))

    def fills(self, ref: Ref) -> list[Fill]:
        """Fills of a ref, one per part: `file` is the name of the message, `name` the key."""
        (layout, keys), dtype = sent(ref, self._spec), self._dtype_of(ref)
        _, *rest = ref.shape(self._spec)
        maps = row_maps(layout, ref.slot, self._spec, ref.kind(self._spec))
        return [
            Fill(message_name(ref), key, dtype, (rows.size, *rest), rows, 0)
            for key, rows in zip(keys, maps, strict=True)
        ]

    def write(self, ref: Ref, sources: Sources, fills: Sequence[Fill]) -> None:
        """Add a ref to its message, which is sent when the next message begins."""
        rows, _ = ref.matrix(self._spec)
        for fill in fills:
            if self._message.get("name", fill.file) != fill.file:
                self._flush()
            self._message["name"] = fill.file
            handle = TensorHandle(fill.shape, fill.dtype, part_of(sources.pieces, fill.rows, rows, fill.value))
            if ENTRIES[ref.slot.name].stacked:
                self._message.setdefault(fill.name, StackedHandle()).handles.append(handle)
            else:
                self._message[fill.name] = handle

    def end(self) -> None:
        """Send the last message and "done"."""
        self._flush()
        send(self._queue, DONE)

    def _flush(self) -> None:
        if self._message:
            send(self._queue, self._message)
        self._message = {}

    def _metadata(self, origin: Origin) -> types.SimpleNamespace:
        spec = self._spec
        dtype = main_dtype(spec, self._dtype_of)
        args = self._args_of(spec, origin.margs)
        divisor = self._divisor or args.get("make_vocab_size_divisible_by")
        checkpoint_args = argparse.Namespace(**{**args, "sequence_parallel": False, "params_dtype": dtype})
        return types.SimpleNamespace(
            model_type=self._model_type,
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            seq_length=args.get("seq_length") or min(_MAX_SEQ_LENGTH, spec.max_position_embeddings),
            num_attention_heads=args["num_attention_heads"],
            max_position_embeddings=spec.max_position_embeddings,
            tokenizer_type="HuggingFaceTokenizer",
            iteration=origin.iteration or 1,
            params_dtype=dtype,
            bert_binary_head=True,
            output_layer=not spec.tied,
            position_embedding_type=args["position_embedding_type"],
            linear_bias=args["add_bias_linear"],
            qkv_bias=args["add_qkv_bias"],
            norm_has_bias=spec.norm.normalization == LAYER_NORM,
            swiglu=args["swiglu"],
            previous_tensor_parallel_size=origin.parallel.tp if origin.parallel else 1,
            previous_pipeline_parallel_size=origin.parallel.pp if origin.parallel else 1,
            true_vocab_size=spec.vocab_size,
            make_vocab_size_divisible_by=divisor,
            checkpoint_args=checkpoint_args,
            consumed_train_samples=0,
            consumed_valid_samples=0,
            megatron_converters=self._private_metadata(origin),
            **({"num_experts": spec.num_experts} if spec.num_experts else {}),
        )

    def _private_metadata(self, origin: Origin) -> dict[str, Any]:
        """Metadata for this project's saver, beyond the protocol: exact spec, every dtype, and the origin."""
        return {
            "version": __version__,
            "spec": self._spec.to_dict(),
            "dtypes": {str(ref): self._dtype_of(ref).name for ref in refs(self._spec)},
            "origin": origin,
            "families": FAMILIES.pack(),
        }


def _refuse_carried(origin: Origin) -> None:
    """Raise for what lies beside a text part: Megatron-LM's own saver would leave it out, and nothing tells whose it is."""
    if wrapper_in(origin.hf_config) is not None:
        from ...assets.side_file import refuse_carried

        where = "the queue between loaders and savers"
        refuse_carried(origin, where, "use megatron-converters convert, or pass --text-only to leave it out")


def stream(source: Source, target: QueueTarget, override: DType | None) -> None:
    """Send every ref of `source` as messages."""
    _refuse_carried(source.origin)
    executor, coverage = Executor[Sink](), Coverage(source.spec)
    try:
        target.begin(source.spec, source.origin, wanted_dtype(source, override))
        for ref in refs(source.spec):
            sources = source.read(ref)
            executor.check(ref, source.spec, sources)
            fills = target.fills(ref)
            raise_all(
                "the messages would not hold the model; this is a fault of this program, please report it:",
                coverage.faults(ref, fills),
            )
            target.write(ref, sources, fills)
        executor.finish()
    except BaseException:
        executor.cancel()
        raise
    source.close()
    target.end()
