"""RecBole 1.2: SASRec with refined attention, a model class for its configuration and trainer.

config = Config(model=RefinedSASRec, dataset="ml-100k", config_dict={"refined": {"refinement": "additive", "rank": 16}})
"""

from pathlib import Path
from typing import Any

import recbole
from recbole.model.layers import MultiHeadAttention, TransformerEncoder
from recbole.model.sequential_recommender.sasrec import SASRec
from torch import Tensor, nn

from .packed import Packed, PackedAttention, pack, unpack

__all__ = ["DEFAULTS", "RefinedSASRec"]

ENCODER_OPTIONS = (
    "n_layers", "n_heads", "hidden_size", "inner_size", "hidden_dropout_prob", "attn_dropout_prob", "hidden_act", "layer_norm_eps",
)  # fmt: skip
DEFAULTS = str(Path(recbole.__file__).parent / "properties/model/SASRec.yaml")
"""RecBole's own file of settings for SASRec, which RecBole reads only for its own classes."""


class RefinedSASRec(SASRec):
    """RecBole's SASRec with refined attention.

    `refined` in the configuration holds arguments of `RefinedMultiheadAttention`; max_len is MAX_ITEM_LIST_LENGTH. RecBole pads
    on the right; tables count from the last item all the same.

    Args:
        config, dataset: RecBole's.

    Raises:
        ValueError, TypeError: an option does not fit; the message names it.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        own = {name: getattr(self, name) for name in ENCODER_OPTIONS}
        self.trm_encoder = _RefinedEncoder({"max_len": self.max_seq_length} | (config["refined"] or {}), **own)
        self.trm_encoder.apply(self._init_weights)

    def get_attention_mask(self, item_seq: Tensor, bidirectional: bool = False) -> Tensor:
        """(B, L) bool, True at items. This is all that the encoder needs, so nothing of size L x L is built."""
        return item_seq != 0


class _RefinedEncoder(TransformerEncoder):
    def __init__(self, options: dict[str, Any], **own: Any) -> None:
        super().__init__(**own)
        for layer in self.layer:
            layer.multi_head_attention = _RefinedAttention(layer.multi_head_attention, options)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, output_all_encoded_layers: bool = True) -> list[Tensor]:
        rows, where = pack(hidden_states, attention_mask)
        return [unpack(out, attention_mask) for out in super().forward(rows, where, output_all_encoded_layers)]


class _RefinedAttention(nn.Module):
    """Replaces RecBole's MultiHeadAttention, which also adds the residual and normalises."""

    def __init__(self, own: MultiHeadAttention, options: dict[str, Any]) -> None:
        super().__init__()
        self.attention = PackedAttention(own.all_head_size, own.num_attention_heads, dropout=own.attn_dropout.p, **options)
        self.out_dropout, self.LayerNorm = own.out_dropout, own.LayerNorm

    def forward(self, rows: Tensor, where: Packed) -> Tensor:
        attended, _ = self.attention(rows, rows, rows, attn_mask=where)
        return self.LayerNorm(self.out_dropout(attended) + rows)
