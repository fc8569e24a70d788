"""Arguments of sparse attention: multi-latent attention to the positions that an indexer chooses (DSA).

Names: Megatron-LM core_v0.16.0 to core_v0.19.0, core/transformer/transformer_config.py, whose fields are flags. Releases before
0.18 refuse to build such a model. 0.18 gives its indexers the latents of queries before their norm and rotates the last rows of
their heads, which is another model than those that are published. 0.19 computes these (core/models/gpt,
experimental_attention_variant_module_specs.py, and core/transformer/experimental_attention_variant/dsa.py).
"""

from __future__ import annotations

from ...basics.errors import ConversionError
from ...model.checks import is_whole
from ...model.layers import LATENT_EPSILON
from ...model.sparse_latent import SparseLatent
from ...model.spec import ModelSpec, PerLayer
from ...sharding.ranks import Parallel
from .argument import Args, Argument, Build, Properties, flag, is_latent, off_switch, only, switch
from .rows_positions import YARN, scaling_of

#: Value of `experimental_attention_variant`, and the first release that computes it as models have it.
DSA, SINCE = "dsa", "0.19"
#: Attribute that args of 0.19 and later have, whatever its value.
_TELLING = "dsa_indexer_rope_interleaved"
_FREQ, _OFFSET = "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset"


def is_sparse(spec: ModelSpec) -> bool:
    """Whether attention is sparse."""
    return any(isinstance(kind.mixer, SparseLatent) for kind in spec.used)


def read_sparse(args: Args) -> Properties:
    """Kind of the layers' attention; raises `ConversionError` for what 0.18 would compute."""
    if not args.get("multi_latent_attention"):
        raise ConversionError(
            f"the checkpoint's args have experimental_attention_variant={DSA!r} without multi_latent_attention; Megatron-LM has no "
            "such model"
        )
    if _TELLING not in args:
        raise ConversionError(
            f"the checkpoint's args have experimental_attention_variant={DSA!r} and no {_TELLING}, as before Megatron-LM {SINCE}: "
            "its indexers read latents before their norm, and no model of Hugging Face's is computed so"
        )
    return {"mixer": "sparse latent"}


def _of_sparse(args: Args) -> bool:
    return args.get("experimental_attention_variant") == DSA


def _size(name: str) -> Argument:
    """Size of an indexer, which only such models have."""
    return Argument(
        name,
        lambda context: context.value(name),
        lambda args: {name: args.get(name)} if _of_sparse(args) else {},
        written=is_sparse,
        flag=flag("--" + name.replace("_", "-"), lost=True, since="0.16"),
        build=Build.REFUSED,
    )


# -- layers that share an indexer


def shared(layers: int, freq: int, offset: int) -> list[bool]:
    """Layers without an indexer of their own: those beyond the first `offset` but every `freq`-th (`is_dsa_skip_topk_layer`)."""
    return [max(number - max(offset, 1), 0) % freq != 0 for number in range(1, layers + 1)]


def _rhythm(spec: ModelSpec) -> tuple[int, int]:
    """Values of the two arguments of sharing; those of the rhythm that begins as the model's where they cannot say it."""
    found = [bool(each) for each in spec.in_layers("shared_indexer")]
    if True not in found:
        return 1, 0
    offset = found.index(True)
    freq = [*found, False].index(False, offset) - offset + 1
    return freq, offset


def _rhythm_limit(spec: ModelSpec) -> str:
    found = [bool(each) for each in spec.in_layers("shared_indexer")]
    if found == shared(spec.num_layers, *_rhythm(spec)):
        return ""
    own = ", ".join(str(layer) for layer, each in enumerate(found) if not each)
    return f"indexers in layers {own} alone: in Megatron-LM, after the first ones, every N-th layer has one"


def _read_rhythm(args: Args) -> Properties:
    if not _of_sparse(args):
        return {}
    freq, offset, layers = args.get(_FREQ, 1), args.get(_OFFSET, 0), args["num_layers"]
    if not (is_whole(freq) and is_whole(offset)) or freq < 1 or offset < 0:
        raise ConversionError(
            f"the checkpoint's args have {_FREQ}={freq!r} and {_OFFSET}={offset!r}; they must be whole numbers, the first above 0"
        )
    return {"shared_indexer": PerLayer(shared(layers, freq, offset))}


def stage_warnings(spec: ModelSpec, parallel: Parallel) -> list[str]:
    """Warning of pipeline stages that begin with a layer whose indexer is in another stage, which Megatron-LM refuses to build."""
    found = [bool(each) for each in spec.in_layers("shared_indexer")]
    starts = [sum(parallel.stages[:stage]) for stage in range(len(parallel.stages))]
    wrong = [start for start in starts if start < len(found) and found[start]]
    if not wrong:
        return []
    own = ", ".join(str(layer) for layer, each in enumerate(found) if not each)
    return [
        f"warning: the first layers of pipeline stages ({', '.join(map(str, wrong))}) share the indexer of a layer before them: "
        f"Megatron-LM builds no such stage; let stages begin with some of the layers {own}"
    ]


def _rotates_apart(spec: ModelSpec) -> bool:
    """Whether the fused kernel, which is on by default, cannot rotate the model's latent attention: it knows YaRN alone."""
    return is_latent(spec) and (is_sparse(spec) or scaling_of(spec, YARN) is None)


SPARSE = (
    *map(_size, ("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk")),
    Argument(
        _TELLING,
        lambda context: context.value(_TELLING),
        lambda args: {_TELLING: bool(args.get(_TELLING))} if _of_sparse(args) else {},
        written=is_sparse,
        absent=False,
        flag=flag("--dsa-indexer-rope-interleaved", switch, lost=True, since=SINCE),
        build=Build.REFUSED,
    ),
    Argument(
        _FREQ,
        lambda context: _rhythm(context.spec)[0],
        _read_rhythm,
        optional=True,
        absent=1,
        limit=_rhythm_limit,
        flag=flag("--dsa-indexer-topk-freq", lost=True, since=SINCE),
        build=Build.REFUSED,
    ),
    Argument(
        _OFFSET,
        lambda context: _rhythm(context.spec)[1],
        optional=True,
        absent=0,
        flag=flag("--dsa-indexer-skip-topk-offset", lost=True, since=SINCE),
        build=Build.REFUSED,
    ),
    # Megatron-LM has the epsilon of all norms without it, and the classes of Hugging Face this one whatever theirs is.
    Argument(
        "dsa_indexer_k_norm_epsilon",
        lambda _: LATENT_EPSILON,
        written=is_sparse,
        flag=flag("--dsa-indexer-k-norm-epsilon", lost=True, since=SINCE),
        build=Build.REFUSED,
    ),
    only("dsa_indexer_scoring_relu", True, "indexers whose scores may be negative", optional=True),
    Argument(
        "apply_rope_fusion",
        lambda _: False,
        written=_rotates_apart,
        flag=flag("--no-rope-fusion", off_switch, lost=True),
    ),
)
