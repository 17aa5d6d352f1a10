"""RecTools 0.19: refined attention in its transformer models.

SASRecModel(session_max_len=50, transformer_layers_type=RefinedTransformerLayers, transformer_layers_kwargs={"max_len": 50})
"""

from typing import Any

import torch
from rectools.models.nn.transformers.ligr import LiGRLayers
from rectools.models.nn.transformers.net_blocks import PreLNTransformerLayers, TransformerLayersBase
from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers
from torch import Tensor, nn

from .. import checks
from .packed import PackedAttention, pack, unpack

__all__ = ["RefinedLiGRLayers", "RefinedPreLNTransformerLayers", "RefinedTransformerLayers"]

DRAWN_ANEW = ("w_q", "w_k", "to_tables", "scale", "lags")  # parameters of two dimensions or more, which have starts of their own


class _FlatAttention(PackedAttention):
    """PackedAttention whose tables, scale and lags are vectors in `parameters()`; as attributes and in `state_dict` they keep their
    shape.

    RecTools draws every parameter of two dimensions or more anew as training starts.
    """

    shapes: dict[str, torch.Size] = {}  # empty until the tables are flat

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        tables = {name: table for name, table in self._parameters.items() if table is not None and name in DRAWN_ANEW}
        self.shapes = {name: table.shape for name, table in tables.items()}
        for name, table in tables.items():
            setattr(self, name, nn.Parameter(table.detach().flatten()))

    def __getattr__(self, name: str) -> Any:
        attribute: Any = super().__getattr__(name)
        return attribute.view(self.shapes[name]) if name in self.shapes else attribute

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, shape in self.shapes.items():
            destination[prefix + name] = destination[prefix + name].view(shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, shape in self.shapes.items():
            table = state_dict.get(prefix + name)
            if table is not None and table.shape == shape:
                state_dict[prefix + name] = table.flatten()
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Refined(TransformerLayersBase):
    """Mixin that refines the blocks of layers; these take the options named in `own_options`."""

    own_options: tuple[str, ...] = ()
    transformer_blocks: nn.ModuleList

    def __init__(self, n_blocks: int, n_factors: int, n_heads: int, dropout_rate: float, *rest: Any, **options: Any) -> None:
        own = {name: options.pop(name) for name in self.own_options if name in options}
        super().__init__(n_blocks, n_factors, n_heads, dropout_rate, *rest, **own)  # type: ignore[call-arg]
        self.causal = options.get("causal", True)
        block: Any
        for block in self.transformer_blocks:
            block.multi_head_attn = _FlatAttention.from_multihead(block.multi_head_attn, **{"refinement": "additive"} | options)

    def forward(
        self, seqs: Tensor, timeline_mask: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """seqs (B, L, E), timeline_mask (B, L, 1), bool or numbers, True at items -> (B, L, E), 0 at padding.

        Of the other masks, only whether attn_mask is None is read: attention is causal or bidirectional, and padding is never
        attended, whatever the model's use_key_padding_mask.

        Raises:
            ValueError: the model's use_causal_attn is not this layer's `causal`, or a history is longer than `max_len`.
        """
        causal = attn_mask is not None
        if causal != self.causal:
            checks.refuse("use_causal_attn", str(causal), f"{self.causal}, as causal is in transformer_layers_kwargs")
        real = timeline_mask.squeeze(-1).bool()
        rows, where = pack(seqs, real)
        return unpack(super().forward(rows, real.new_ones(1), where, None, **kwargs), real)


class RefinedTransformerLayers(_Refined, SASRecTransformerLayers):
    """The blocks of RecTools' SASRecModel with refined attention, for its `transformer_layers_type`.

    Args:
        n_blocks, n_factors, n_heads, dropout_rate: given by the model.
        options: in `transformer_layers_kwargs`: arguments of `RefinedMultiheadAttention`. Position tables need max_len, the model's
            session_max_len.

    Raises:
        ValueError, TypeError: an option does not fit; the message names it.
    """


class RefinedPreLNTransformerLayers(_Refined, PreLNTransformerLayers):
    """The same for blocks that normalise first, as in BERT4RecModel. That model needs the option causal=False."""

    own_options = ("ff_factors_multiplier",)


class RefinedLiGRLayers(_Refined, LiGRLayers):
    """The same for gated blocks, as in RecTools' LiGRLayers."""

    own_options = ("ff_factors_multiplier", "ff_activation", "bias_in_ff")
