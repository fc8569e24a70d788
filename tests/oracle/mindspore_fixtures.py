"""The checkpoints that `scripts/make_mindspore_fixtures.py` writes with the real mindspore, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .mindspore_models import MODELS, Layout, Model, Weights, mindspore_weights

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "mindspore"
#: What a training run saves beside the weights.
RUN_STATE: dict[str, int | float] = {
    "epoch_num": 1,
    "step_num": 4,
    "global_step": 4,
    "loss_scale": 1.0,
    "global_batch_size": 8,
}

_SINCE_1_7 = Layout()


@dataclass(frozen=True)
class Cut:
    """Sizes of a distributed run. Experts are cut by expert over the tensor-parallel ranks, as with `expert_parallel: tp`."""

    dp: int = 1
    tp: int = 2
    pp: int = 1
    #: MindSpore's parallel optimizer: the rows of each weight are also cut over the ranks that else hold the same ones.
    optimizer_shard: bool = False

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp


@dataclass(frozen=True)
class Fixture:
    """One checkpoint: a file, several with a map of names, or the ranks of a distributed run and their union."""

    model_type: str
    dtype: str = "bfloat16"
    layout: Layout = _SINCE_1_7
    prefix: str = ""
    format: str = "safetensors"
    optimizer: str = ""  # class of mindspore.nn, over the norms alone, which keeps the file small
    #: mindspore's checksum, in the header's metadata or at the end of a .ckpt; it fails at bfloat16 in safetensors.
    crc: bool = False
    parts: int = 1
    cut: Cut | None = None
    committed: bool = False

    @property
    def model(self) -> Model:
        return MODELS[self.model_type]

    def weights(self) -> Weights:
        """Float32 values of the weights before they are cast, by MindSpore's names."""
        return mindspore_weights(self.model, self.layout, self.prefix)

    def dtype_of(self, name: str) -> str:
        """Dtype of a weight in the file: the router's bias stays float32."""
        return "float32" if name.endswith("expert_bias") else self.dtype

    def state_names(self) -> set[str]:
        """Names of all that is not a weight."""
        names = set(RUN_STATE) if self.optimizer or self.cut else set()
        return names | {name for start in _STATES.get(self.optimizer, ()) for name in self._states(start)}

    def _states(self, start: str) -> list[str]:
        if not start.endswith("."):
            return [start]
        return [start + name for name in self.weights() if "norm" in name]


#: Names, and beginnings of names, that an optimizer of mindspore.nn adds to those of the weights.
_STATES = {
    "Adam": ("learning_rate", "beta1_power", "beta2_power", "moment1.", "moment2."),
    "AdamWeightDecay": ("learning_rate", "adam_m.", "adam_v."),
}
_CONTIGUOUS = Layout(mlp="contiguous")
FIXTURES = {
    "qwen3-float32": Fixture("qwen3", dtype="float32", optimizer="Adam", committed=True),
    "llama-contiguous": Fixture("llama", layout=_CONTIGUOUS, prefix="model.", committed=True),
    "llama-ckpt": Fixture("llama", format="ckpt", optimizer="AdamWeightDecay", committed=True),
    "qwen2-parts": Fixture("qwen2", parts=2, committed=True),
    "glm4_moe-tp2": Fixture("glm4_moe", cut=Cut(), committed=True),
    "llama": Fixture("llama", dtype="float32"),
    "llama-model-ckpt": Fixture(
        "llama", dtype="float32", format="ckpt", prefix="model.", optimizer="AdamWeightDecay", crc=True
    ),
    "qwen2-all-contiguous": Fixture("qwen2", layout=Layout("contiguous", "contiguous")),
    "qwen3_moe-adam": Fixture("qwen3_moe", optimizer="AdamWeightDecay"),
    "glm4_moe": Fixture("glm4_moe", dtype="float32", layout=_CONTIGUOUS, crc=True),
    "deepseek_v3": Fixture("deepseek_v3", prefix="model."),
    "deepseek_v3-joined": Fixture("deepseek_v3", dtype="float32", layout=Layout(latent="joined")),
    "llama-tp2-pp2": Fixture("llama", cut=Cut(pp=2)),
    "qwen3_moe-dp2-tp2-sharded-optimizer": Fixture("qwen3_moe", cut=Cut(dp=2, optimizer_shard=True)),
}
