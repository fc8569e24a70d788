"""Source for models that a loader sends as Megatron-LM's messages: this project's loader or a stock one."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ... import __version__
from ...assets.origin import Origin
from ...basics.dtypes import BY_NAME, DType
from ...basics.errors import ConversionError, raise_all
from ...basics.handover import receive_own_types
from ...conversion.composing import Piece, Sources, StoredName, TensorData
from ...families.config_json import infer_family
from ...families.registry import FAMILIES, Packed
from ...model.layers import LAYER_NORM, RMS_NORM
from ...model.layouts import RowMap, interned, row_maps
from ...model.slots import Ref
from ...model.spec import ModelSpec
from ...sharding.ranks import Parallel
from ...storage.tensor import MemoryTensor
from .channel import DONE, check_parent, receive
from .handles import StackedHandle, TensorHandle
from .messages import ENTRIES, message_name, received

#: Function from Megatron-LM's `args` to the `ModelSpec` fields that they decide: all but family, dtype and vocab_size.
FieldsOf = Callable[[argparse.Namespace], dict[str, Any]]


class QueueSource:
    """Reader of messages in the order of the protocol, one at a time."""

    def __init__(self, queue: Any, fields_of: FieldsOf, *, checking: bool = True) -> None:
        receive_own_types()
        self._queue = queue
        self._checking = checking
        self._ended = False
        metadata = receive(queue)
        self._message: dict[str, Any] = {}
        self._used: set[str] = set()
        ours = getattr(metadata, "megatron_converters", None)
        if ours is not None:
            if ours["version"] != __version__:
                raise ConversionError(
                    f"the loader is version {ours['version']}, this saver {__version__}; use the same version for both"
                )
            self.spec = ModelSpec.from_dict(ours["spec"])
            _check_family(self.spec.family, ours["families"])
            self.origin: Origin = ours["origin"]
            self._dtypes: dict[str, str] | None = ours["dtypes"]
        else:
            self._dtypes = None
            _check_metadata(metadata)
            self._next_message("embeddings")
            embeddings = _memory_tensor(self._peek("word embeddings"), "the word embeddings")
            self.spec = _stock_spec(metadata, embeddings, fields_of)
            self.origin = _stock_origin(metadata)

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref as the loader announced it; a stock loader sends every tensor in one dtype."""
        return self.spec.dtype if self._dtypes is None else BY_NAME[self._dtypes[str(ref)]]

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref from its message: the current one, or the next."""
        name = message_name(ref)
        if self._message.get("name") != name:
            self._finish_message()
            self._next_message(name)
        layout, keys = received(ref, self.spec, self._message)
        shape = ref.shape(self.spec)
        pieces: list[Piece] = []
        for key, rows in zip(keys, row_maps(layout, ref.slot, self.spec, ref.kind(self.spec)), strict=True):
            where, value = StoredName(f"message {name!r}", key), self._take(key, name)
            if ENTRIES[ref.slot.name].stacked:
                value = _one_expert(where, value, ref.expert or 0, self.spec.num_experts)
            pieces += self._pieces(where, value, rows, (rows.size, *shape[1:]), ref)
        return Sources(tuple(pieces))

    def close(self) -> None:
        """Raise unless the messages end here and the loader is still alive."""
        self._finish_message()
        check_parent()
        last = receive(self._queue)
        self._ended = True
        if last != DONE:
            held = last.get("name") if isinstance(last, dict) else last
            raise ConversionError(f"the loader sent {held!r} after the last tensor of the model; expected {DONE!r}")

    def drain(self) -> None:
        """Receive and drop all further messages, since the loader takes a saver that ends earlier for one that failed."""
        while not self._ended:
            self._ended = receive(self._queue) == DONE

    def _pieces(self, where: StoredName, value: Any, rows: RowMap, shape: tuple[int, ...], ref: Ref) -> list[Piece]:
        if isinstance(value, TensorHandle):
            if value.shape != shape:
                raise ConversionError(f"{where} has shape {list(value.shape)}, expected {list(shape)} for {ref}")
            return [_piece_of_slot(piece, rows) for piece in value.pieces]
        data = _memory_tensor(value, where)
        trimmed = ref.slot.vocab and data.shape[0] > shape[0] and data.shape[1:] == shape[1:]
        if data.shape != shape and not trimmed:
            raise ConversionError(f"{where} has shape {list(data.shape)}, expected {list(shape)} for {ref}")
        if data.dtype != self.dtype_of(ref):
            raise ConversionError(
                f"{where} has dtype {data.dtype}, but the loader's metadata have {self.dtype_of(ref)}"
            )
        padding = np.full(data.shape[0] - rows.size, -1, np.int64)
        padded = interned(np.concatenate([rows, padding])) if trimmed else rows
        return [Piece(data, padded, 0, where)]

    def _next_message(self, name: str) -> None:
        message = receive(self._queue)
        if not isinstance(message, dict):
            raise ConversionError(f"the loader sent {message!r}; expected message {name!r}")
        if self._checking and message.get("name") != name:
            raise ConversionError(f"the loader sent message {message.get('name')!r}; expected {name!r}")
        self._message = {**message, "name": name}
        self._used = {"name"}

    def _finish_message(self) -> None:
        unused = sorted(self._message.keys() - self._used)
        if self._checking:
            name = self._message.get("name")
            raise_all(f"message {name!r} has keys that this model does not have:", map(repr, unused))
        self._message = {}
        self._used = set()

    def _peek(self, key: str) -> Any:
        if key not in self._message:
            raise ConversionError(f"message {self._message['name']!r} has no {key!r}; it has {sorted(self._message)}")
        return self._message[key]

    def _take(self, key: str, name: str) -> Any:
        value = self._peek(key)
        self._used.add(key)
        return value


def _check_family(name: str, families: Packed) -> None:
    """Raise unless this process knows the family of the loader's model, by itself or from what the loader has registered."""
    if name not in FAMILIES:
        FAMILIES.unpack(families)
    if name not in FAMILIES:
        raise ConversionError(
            f"the loader sends a model of the family {name}, which is not known in the saver's process; give convert.py the "
            "loader's --family-file, or install its plug-in here"
        )


def _one_expert(where: StoredName, stack: Any, expert: int, experts: int) -> Any:
    """One expert's tensor, from the stack that holds those of all experts."""
    if isinstance(stack, StackedHandle):
        stack, shape = stack.handles, (len(stack.handles), 0, 0)
    else:
        shape = tuple(getattr(stack, "shape", ()))
    if len(shape) != 3 or shape[0] != experts:
        raise ConversionError(f"{where} has shape {list(shape)}; expected one matrix for each of {experts} experts")
    return stack[expert]


def _piece_of_slot(piece: Piece, rows: RowMap) -> Piece:
    """Piece of a slot from a piece of one of its parts; `rows` has the slot's row of each row of the part."""
    return dataclasses.replace(piece, rows=interned(np.where(piece.rows >= 0, rows[piece.rows], -1)))


def _memory_tensor(value: Any, where: StoredName | str) -> TensorData:
    name = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if name not in BY_NAME:
        raise ConversionError(f"{where} is a {type(value).__name__}, not a tensor of a supported dtype")
    import torch

    dtype = BY_NAME[name]
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    values = value.detach().cpu().contiguous().view(signed).numpy().view(dtype.carrier)
    return MemoryTensor(dtype, tuple(value.shape), values)


#: Attributes of a stock loader's metadata that describe the model.
_METADATA_ATTRIBUTES = (
    "model_type num_layers hidden_size num_attention_heads max_position_embeddings position_embedding_type swiglu "
    "linear_bias norm_has_bias output_layer true_vocab_size make_vocab_size_divisible_by iteration checkpoint_args"
).split()


def _check_metadata(metadata: Any) -> None:
    if isinstance(metadata, (str, dict)):
        raise ConversionError("the loader sent a message of weights; expected the model's metadata")
    missing = [name for name in _METADATA_ATTRIBUTES if not hasattr(metadata, name)]
    if missing:
        raise ConversionError(f"the loader's metadata lack {', '.join(missing)}, which Megatron-LM's own loaders send")


def _stock_spec(metadata: Any, embeddings: TensorData, fields_of: FieldsOf) -> ModelSpec:
    """Spec of a model from a stock loader, by its metadata and the source's arguments."""
    if metadata.model_type != "GPT":
        raise ConversionError(f"the loader sends a {metadata.model_type} model; only GPT is supported")
    args = argparse.Namespace(**vars(metadata.checkpoint_args))
    args.num_experts = getattr(metadata, "num_experts", None)
    for name in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
        "position_embedding_type",
        "swiglu",
    ):
        setattr(args, name, getattr(metadata, name))
    args.add_bias_linear = metadata.linear_bias
    args.add_qkv_bias = getattr(metadata, "qkv_bias", False)
    args.untie_embeddings_and_output_weights = metadata.output_layer
    if metadata.norm_has_bias != (getattr(args, "normalization", RMS_NORM) == LAYER_NORM):
        raise ConversionError(
            f"the loader sends norms {'with' if metadata.norm_has_bias else 'without'} a bias, but its args have normalization="
            f"{getattr(args, 'normalization', None)!r}; they must agree"
        )
    dtype = embeddings.dtype
    vocab = metadata.true_vocab_size or embeddings.shape[0]
    return infer_family({**fields_of(args), "vocab_size": vocab, "dtype": dtype})


def _stock_origin(metadata: Any) -> Origin:
    args = argparse.Namespace(**vars(metadata.checkpoint_args))
    args.make_vocab_size_divisible_by = metadata.make_vocab_size_divisible_by
    # Loaders of Hugging Face models leave argparse's defaults here, which do not come from a training run.
    args.hidden_dropout = args.moe_token_dispatcher_type = None
    for name, value in vars(args).items():
        dtype = str(value).removeprefix("torch.")
        if type(value).__module__ == "torch" and dtype in BY_NAME:
            setattr(args, name, BY_NAME[dtype])
    return Origin(
        described="the loader",
        tokenizer=getattr(args, "tokenizer_model", None),
        margs=args,
        iteration=metadata.iteration,
        parallel=_previous_parallel(metadata),
    )


def _previous_parallel(metadata: Any) -> Parallel:
    """Parallel sizes of the source, as far as the loader sends them; only Habana's sends those of experts."""
    kinds = ("tensor", "pipeline", "expert_model", "expert_tensor")
    tp, pp, ep, etp = (getattr(metadata, f"previous_{kind}_parallel_size", None) for kind in kinds)
    return Parallel(int(tp or 1), (0,) * int(pp or 1), ep=int(ep or 1), etp=int(etp or tp or 1))
