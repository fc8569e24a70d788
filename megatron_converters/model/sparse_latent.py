"""Record of sparse attention, which is multi-latent attention to the positions of an indexer; field names as in `layers.py`."""

from __future__ import annotations

from dataclasses import dataclass

from ..basics.errors import ConversionError
from .checks import check_sizes, check_switches
from .layers import Latent


@dataclass(frozen=True, kw_only=True)
class SparseLatent(Latent):
    """Multi-latent attention to `dsa_indexer_topk` positions alone, those that the layer's indexer scores highest (DSA).

    With a `shared_indexer` they are those of the last layer before that has an indexer of its own. The first rows of an indexer's
    heads rotate, as many as the attention's; the two of a pair are neighbours (`dsa_indexer_rope_interleaved`) or half of these
    rows apart.
    """

    dsa_indexer_n_heads: int
    dsa_indexer_head_dim: int
    dsa_indexer_topk: int
    dsa_indexer_rope_interleaved: bool = False
    shared_indexer: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        super().__post_init__()
        check_sizes(self, ("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk"))
        check_switches(self, ("dsa_indexer_rope_interleaved", "shared_indexer"))
        if self.dsa_indexer_head_dim < self.qk_pos_emb_head_dim:
            raise ConversionError(
                f"dsa_indexer_head_dim is {self.dsa_indexer_head_dim}, fewer than the {self.qk_pos_emb_head_dim} rows that rotate "
                "(qk_pos_emb_head_dim)"
            )
