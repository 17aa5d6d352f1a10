"""Refined self-attention as a module: linear maps around the operator and its learned tables.

B batch, L positions, T packed positions, E embed_dim, H heads, H_kv key and value heads, D head dim, R refinement rank, N max_len.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from . import checks, habits, jagged, multihead
from .api import attention_weights, refined_attention, refined_attention_varlen
from .cache import RefinedCache
from .decoding import refined_attention_prefill, refined_attention_step
from .tables import RefinedLayer
from .torch_state import autocast, readable


class _Alignment(NamedTuple):
    """Where the items of a padded batch are, and how to rotate its rows so that padding is on the side the operator expects."""

    lengths: Tensor | None  # (B,)
    turn: Tensor | None  # (B,): row i of the operator is row (i + turn) % L of the caller


class RefinedMultiheadAttention(multihead.TorchNames, RefinedLayer):
    """Multi-head self-attention with refined weights (AWRSR, RecSys 2024), batch first.

    Computes out(refined_attention(q, k, v, W_q, W_k)), with q, k and v from one linear map of x. The tables W_q and W_k span the
    correlation space. They are parameters with a row per position (tables "position"), or computed from x by a linear map (tables
    "content"), which does not limit the length. The learned gate of "additive" starts at 0, so a new module computes plain
    attention, and training opens the gate if that helps.

    Args:
        embed_dim: E, a multiple of num_heads.
        num_heads: H; D = E / H is at most 256.
        max_len: N, the number of rows of position tables; no sequence may be longer. Required with position tables, unused
            otherwise.
        refinement: "none", "simple", "value" or "additive".
        tables: "position" or "content".
        rank: R in 1..256; default D.
        per_head: whether each head has its own tables.
        gate: factor of the higher-order weights in "additive". True: learned, one number per head, starting from gate_init.
            False: fixed at 1. A number: fixed at this number.
        gate_init: initial value of a learned gate. With 0, tables get no gradient in the first step.
        dropout: dropout rate of attention weights in training mode, in [0, 1).
        bias: whether the linear maps have a bias.
        num_kv_heads: H_kv, a divisor of H (grouped-query attention); default H.
        causal: whether a position attends only to itself and earlier positions.
        batch_first: layout of the call module(x, x, x), which is that of torch.nn.MultiheadAttention: (B, L, E), or with False
            (L, B, E). The call module(x) is always batch first.
        align: which rows of position tables a sequence of n items uses, and where `lengths` expects padding. "right" (the
            default): the last n rows, so that a row stands for a distance from the end (recommenders; padding on the left).
            "left": the first n rows, so that a row stands for an absolute position (language models, decoding; padding on the
            right).
        padding_side: an alias of align by its opposite: padding_side="left" is align="right".
        table_std: initial root mean square of the entries of W, 0 or more; for content tables, if x has unit scale. By default
            sharpness decides for position tables, and content tables have 1.
        sharpness: instead of table_std, how sharp higher-order weights begin: the score refine_scale * table_std^2 * R, 0 or more,
            that two positions get before training if their first-order weights all lie on rows of W that match. It sets
            table_std, as the parameters keep that, and not refine_scale. By default 25 for position tables.
        table_init: initialisation of position tables, unused otherwise. "shifted" (default): W_k is W_q shifted by one position;
            items then attend to what followed the items that first-order weights point to, exactly so if R >= N, where rows are
            orthogonal. "normal": at random. "orthogonal": with orthogonal columns (rows, if R > N). "identity": W_q = W_k with a
            column for each position, or for each few positions if R < N; items then attend to items with similar first-order
            weights.
        refine_scale: factor of the correlations; default 1/sqrt(R).
        learned_scale: whether each head multiplies refine_scale by a learned number that starts at 1; unused with "none".
        lags: A in 0..7, how many earlier positions higher-order weights compare as well, by a learned factor per head and lag that
            starts at 1/2, 1/4, ...; (A + 1) R is at most 256. Unused with "none".
        shift: whether weights fall on what followed the positions that they are given to; for "none", "simple" and "additive".
            Needs causal. A new module then does not compute plain attention.
        plain_heads: number of heads, the first ones, with plain attention, neither refined nor shifted; for "none" and "additive".
        backend: backend of the operator. `state_dict` does not depend on it.

    Parameters in `state_dict`: qkv.weight (E + 2 H_kv D, E), out.weight (E, E), their biases, w_q and w_k (N, R) or (H, N, R), or
    to_tables (E, 2 R) or (E, 2 H R), gate (H,), scale (H, 1, 1) and lags (H, A).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    @habits.own_signature
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        max_len: int | None = None,
        refinement: str = "additive",
        tables: str = "position",
        rank: int | None = None,
        per_head: bool = False,
        gate: bool | float = True,
        gate_init: float = 0.0,
        dropout: float = 0.0,
        bias: bool = True,
        num_kv_heads: int | None = None,
        causal: bool = True,
        batch_first: bool = True,
        align: str | None = None,
        padding_side: str | None = None,
        table_std: float | None = None,
        sharpness: float | None = None,
        table_init: str = "shifted",
        refine_scale: float | None = None,
        learned_scale: bool = False,
        lags: int = 0,
        shift: bool = False,
        plain_heads: int = 0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            habits.refuse(RefinedMultiheadAttention.__init__, unknown)
        align = checks.side("align", align, "padding_side", padding_side, "right")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, number in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            checks.whole(name, number, 1)
        if embed_dim % num_heads or embed_dim > num_heads * checks.MAX_FEATURES:
            must = f"a multiple of num_heads = {num_heads}, {checks.MAX_FEATURES} times that at most"
            checks.refuse("embed_dim", str(embed_dim), must)
        checks.divisor("num_kv_heads", num_kv_heads, num_heads)
        head_dim = embed_dim // num_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim, num_heads, max_len=max_len, refinement=refinement, tables=tables, rank=head_dim if rank is None else rank,
            per_head=per_head, gate=gate, gate_init=gate_init, dropout=dropout, table_std=table_std, sharpness=sharpness,
            table_init=table_init, refine_scale=refine_scale, learned_scale=learned_scale, lags=lags, shift=shift,
            plain_heads=plain_heads, backend=backend, causal=causal, align=align, **factory,
        )  # fmt: skip
        self.embed_dim, self.num_kv_heads, self.head_dim = embed_dim, num_kv_heads, head_dim
        self.batch_first = checks.flag("batch_first", batch_first)
        self.qkv = nn.Linear(embed_dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias, **factory)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters: linear maps as in torch.nn.MultiheadAttention, tables with scale `table_std`."""
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.kaiming_uniform_(self.out.weight, a=5**0.5)
        for bias in (self.qkv.bias, self.out.bias):
            if bias is not None:
                bias.zero_()
        self.reset_refinement()

    @classmethod
    def from_multihead(
        cls, mha: nn.MultiheadAttention, *, max_len: int | None = None, refinement: str, tables: str = "position",
        rank: int | None = None, causal: bool = True, **options: Any,
    ) -> "RefinedMultiheadAttention":  # fmt: skip
        """A new module with a copy of the weights of a torch.nn.MultiheadAttention, which can stand in its place.

        With refinement "none", and with "additive" while its learned gate is 0, module(x, x, x) returns what mha(x, x, x) returns
        (with a causal mask, if causal). Other refinements, and shift, change the result at once.

        Args:
            mha: a module whose keys and values have the width of its queries, without bias_k, bias_v, add_zero_attn, forward hooks
                and a forward of its own. Weights that do not require a gradient stay so. A bias that only one of its linear maps
                has is zero in the other, without a gradient.
            options: further arguments of this class, except those that `mha` determines: bias, num_kv_heads, batch_first, device,
                dtype.

        Raises:
            ValueError: `mha` has a feature that this class lacks, or an option does not fit it; the message says which.
        """
        multihead.check_replaceable(mha)
        for name in ("bias", "num_kv_heads", "batch_first", "device", "dtype"):
            if name in options:
                checks.refuse(name, str(options[name]), "left out: it comes from mha")
        weight: Tensor = mha.in_proj_weight
        biased = mha.in_proj_bias is not None or mha.out_proj.bias is not None
        arguments: dict[str, Any] = {"max_len": max_len, "refinement": refinement, "tables": tables, "rank": rank, "causal": causal}
        arguments |= {"dropout": mha.dropout, "bias": biased, "device": weight.device, "dtype": weight.dtype}
        arguments["batch_first"] = mha.batch_first
        module = cls(mha.embed_dim, mha.num_heads, **arguments | options)
        multihead.copy_weights(mha, module.qkv, module.out)
        return module.train(mha.training)

    @habits.own_signature
    def forward(
        self,
        x: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool | None = None,
        is_causal: bool | None = None,
        *,
        query: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **unknown: NoReturn,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Attend among the positions of each sequence.

        The module can be called in two ways: module(x), and in place of torch.nn.MultiheadAttention as module(x, x, x), with the
        arguments and results of that class.

        Args:
            x: (B, L, E); packed (T, E) with cu_seqlens; or jagged (B, j, E), layout torch.jagged. In module(x, x, x): (B, L, E),
                without batch_first (L, B, E), or (L, E); it may be named query.
            key, value: x itself, in calls in place of torch.nn.MultiheadAttention.
            lengths: (B,) integers in 0..L, the number of real items per sequence. Padding is on the left if align is "right",
                otherwise on the right.
            key_padding_mask: (B, L) bool, True at padding, instead of lengths. Padding may be on either side, but the items of a
                sequence must be one run. A mask with holes raises an error where reading it costs nothing (CPU, not compiled).
            cu_seqlens: (B + 1,) integers from 0 to T: sequence b holds rows cu_seqlens[b] .. cu_seqlens[b+1] - 1.
            max_seqlen: only with cu_seqlens: length of the longest sequence, or an upper bound on it.
            attn_mask, is_causal: only in module(x, x, x), and as in torch. They must say what the module does: if it is causal, the
                causal mask (which is looked at where that costs nothing) or is_causal=True; otherwise nothing.
            need_weights, average_attn_weights: only in module(x, x, x), and as in torch: both are True unless you say otherwise.

        Returns:
            module(x): a tensor of x's form. Attention is 0 at padding, so the result there is the bias of the last linear map.
            module(x, x, x): a tensor of x's form, and the weights that multiply the values, without dropout, (B, L, L), each
            head's (B, H, L, L), or None.

        Raises:
            ValueError, TypeError: an argument does not fit, or a sequence is longer than max_len.
        """
        if unknown:
            habits.refuse(RefinedMultiheadAttention.forward, unknown)
        in_place: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        in_place |= {"attn_mask": attn_mask, "is_causal": is_causal}
        if key is not None or value is not None or query is not None:
            checks.absent("None beside key and value", lengths=lengths, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            if query is not None:
                checks.absent("None beside query, its other name", x=x)
            return self._in_place(x if query is None else query, key, value, key_padding_mask, **in_place)
        checks.absent("left out unless module(x, x, x) is called in place of torch.nn.MultiheadAttention", **in_place)
        if x is None:
            raise TypeError("RefinedMultiheadAttention.forward is missing its argument x")
        if jagged.is_nested(x):
            unused = {"lengths": lengths, "key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            checks.absent("None: x is jagged and knows its lengths", **unused)
            return self._jagged(x)
        if cu_seqlens is not None:
            checks.absent("None beside cu_seqlens", lengths=lengths, key_padding_mask=key_padding_mask)
            self._check(x, "(T, E)", 2)
            return self._packed(x, cu_seqlens, max_seqlen)
        checks.absent("None without cu_seqlens", max_seqlen=max_seqlen)
        self._check(x, "(B, L, E)", 3)
        return self._padded(x, self._alignment(x, lengths, key_padding_mask))

    def _in_place(
        self, x: Any, key: Any, value: Any, key_padding_mask: Tensor | None, need_weights: bool | None, attn_mask: Tensor | None,
        average_attn_weights: bool | None, is_causal: bool | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The call in place of torch.nn.MultiheadAttention."""
        multihead.check_self_attention(x, key, value)
        weighs = True if need_weights is None else checks.flag("need_weights", need_weights)
        if isinstance(x, Tensor) and x.is_nested:
            checks.absent("None: query is nested", key_padding_mask=key_padding_mask, attn_mask=attn_mask)
            if weighs:
                checks.refuse("need_weights", "True", "False: query is nested")
            multihead.check_visibility(None, is_causal, self.causal, self.num_heads, x)
            return (self._jagged if x.layout is torch.jagged else self._nested)(x), None
        alone, turned = (isinstance(x, Tensor) and x.dim() == dims for dims in (2, 3))
        turned = turned and not self.batch_first
        if alone:
            x, key_padding_mask = x[None], None if key_padding_mask is None else key_padding_mask[None]
        elif turned:
            x = x.transpose(0, 1)
        self._check(x, "(B, L, E)" if self.batch_first else "(L, B, E)", 3)
        multihead.check_visibility(attn_mask, is_causal, self.causal, self.num_heads, x)
        alignment = self._alignment(x, None, multihead.padding(key_padding_mask))
        out, weights = self._padded(x, alignment), None
        if weighs:
            rows = x if alignment.turn is None else multihead.turned(x, alignment.turn)
            weights = self.weights(rows, lengths=alignment.lengths)[1]
            weights = weights if alignment.turn is None else multihead.turned_weights(weights, -alignment.turn)
            averages = average_attn_weights is None or checks.flag("average_attn_weights", average_attn_weights)
            weights = weights.mean(1) if averages else weights
        if alone:
            return out[0], None if weights is None else weights[0]
        return out.transpose(0, 1) if turned else out, weights

    @habits.own_signature
    def weights(self, x: Tensor, *, lengths: Tensor | None = None, **unknown: NoReturn) -> tuple[Tensor, Tensor]:
        """First-order weights P and the weights M that multiply the values, (B, H, L, L) each, of x (B, L, E); O(L^2) memory."""
        if unknown:
            habits.refuse(RefinedMultiheadAttention.weights, unknown)
        self._check(x, "(B, L, E)", 3)
        q, k, _ = (a.transpose(1, 2) for a in self._split(self.qkv(x)))
        return attention_weights(q, k, lengths=lengths, **self._padded_options(x))

    @habits.own_signature
    def make_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None, **unknown: NoReturn) -> RefinedCache:
        """An empty cache for decoding `batch` sequences. It grows beyond `capacity` positions if the tables allow that.

        dtype: dtype of the linear maps' output; default that of their weights, or the dtype of autocast if it is on.

        Raises:
            ValueError: the module is not causal, or has position tables with align "right", where every new position shifts the
                rows.
        """
        if unknown:
            habits.refuse(RefinedMultiheadAttention.make_cache, unknown)
        if not self.causal:
            checks.refuse("causal", "False", "True for decoding")
        if self.max_len is not None and self.align == "right":
            checks.refuse("align", '"right"', '"left" for decoding with position tables, or tables="content"')
        weight, lags = self._weight(), self._weight_options()["lags"]
        return RefinedCache(
            batch, capacity, heads=self.num_heads, kv_heads=self.num_kv_heads, head_dim=self.head_dim, rank=self.rank,
            refinement=self.refinement, tables=self.tables, lags=0 if lags is None else lags.shape[1],
            dtype=dtype or autocast(weight[:0]).dtype, device=weight.device,
        )  # fmt: skip

    @habits.own_signature
    def prefill(
        self, x: Tensor, cache: RefinedCache, *, lengths: Tensor | None = None, padding_side: str | None = None,
        **unknown: NoReturn,
    ) -> Tensor:  # fmt: skip
        """Fill an empty cache with prompts x (B, L, E), and return what `forward` returns for them in evaluation mode.

        Not available while gradients are recorded. lengths: (B,) number of real items per prompt; the rest is padding on
        `padding_side`, by default the side that `forward` expects. It says nothing about rows of tables, unlike that of the class.
        """
        if unknown:
            habits.refuse(RefinedMultiheadAttention.prefill, unknown)
        self._check(x, "(B, L, E)", 3)
        padding_side = self._padding_side() if padding_side is None else padding_side
        return self._decode(refined_attention_prefill, x, cache, lengths=lengths, padding_side=padding_side)

    @habits.own_signature
    def step(self, x: Tensor, cache: RefinedCache, **unknown: NoReturn) -> Tensor:
        """Append one position per sequence, x (B, 1, E) -> (B, 1, E): the row that `forward` computes for it, in O(L) work."""
        if unknown:
            habits.refuse(RefinedMultiheadAttention.step, unknown)
        self._check(x, "(B, 1, E)", 3)
        return self._decode(refined_attention_step, x, cache)

    def _decode(self, call: Callable[..., Tensor], x: Tensor, cache: RefinedCache, **where: Any) -> Tensor:
        mine = self.refinement, "" if self.refinement == "none" else self.tables
        if isinstance(cache, RefinedCache) and (cache.refinement, "" if cache.refinement == "none" else cache.tables) != mine:
            must = f"for {self.refinement}, tables {self.tables}, as made by make_cache"
            checks.refuse("cache", f"for {cache.refinement}, tables {cache.tables}", must)
        with multihead.onloaded(self, x) as x:
            q, k, v = (a.transpose(1, 2) for a in self._split(self.qkv(x)))
            options = self._weight_options() | {"align": self.align, "backend": self.backend}
            options = {name: x for name, x in options.items() if name not in ("refinement", "causal")}  # the cache's, and True
            out = call(q, k, v, cache=cache, **self._cached_tables(x), **where, **options)
            return self.out(out.transpose(1, 2).flatten(-2))

    def _padded(self, x: Tensor, alignment: _Alignment) -> Tensor:
        rows = x if alignment.turn is None else multihead.turned(x, alignment.turn)
        q, k, v = (a.transpose(1, 2) for a in self._split(self.qkv(rows)))
        out = refined_attention(q, k, v, lengths=alignment.lengths, **self._padded_options(rows), **self._run_options())
        out = self.out(out.transpose(1, 2).flatten(-2))
        return out if alignment.turn is None else multihead.turned(out, -alignment.turn)

    def _nested(self, x: Tensor) -> Tensor:
        """Of nested tensors in the layout that torch's encoders make of padded ones, (B, j, E)."""
        sequences = x.unbind()
        counts = [len(sequence) for sequence in sequences]
        rows = torch.cat(sequences)
        self._check_width(rows)
        ends = torch.tensor([0, *counts], device=x.device).cumsum(0)
        return torch.nested.as_nested_tensor(list(self._packed(rows, ends, max(counts, default=0)).split(counts)))

    def _jagged(self, x: Tensor) -> Tensor:
        rows = jagged.rows("x", x, "x", x, ragged=1)
        self._check_width(rows)
        return jagged.unpacked(self._packed(rows, **jagged.bounds(x)), x)

    def _packed(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, projected: Tensor | None = None) -> Tensor:
        q, k, v = self._split(self.qkv(x) if projected is None else projected)
        out = refined_attention_varlen(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **self._packed_options(x))
        return self.out(out.flatten(-2))

    def _split(self, x: Tensor) -> list[Tensor]:
        """(..., (H + 2 H_kv) D) -> (..., H, D) and twice (..., H_kv, D)."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        return [a.unflatten(-1, (-1, self.head_dim)) for a in x.split([h * self.head_dim for h in heads], -1)]

    def _check(self, x: Tensor, form: str, dims: int) -> None:
        if not isinstance(x, Tensor) or x.is_nested:
            checks.refuse("x", "nested" if isinstance(x, Tensor) else type(x).__name__, f"a tensor {form}", TypeError)
        if x.dim() != dims or (dims == 3 and not x.shape[1]):
            checks.refuse("x", f"of shape {tuple(x.shape)}", f"{form} with E = {self.embed_dim}, one position at least")
        self._check_width(x)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.embed_dim:
            checks.refuse("x", f"of shape {tuple(x.shape)}", f"of width E = {self.embed_dim}")
        weight = self._weight()
        if autocast(weight[:0]).dtype == weight.dtype != x.dtype:
            checks.refuse("x", str(x.dtype), f"of the weights' dtype, {weight.dtype}", TypeError)

    def _weight(self) -> Tensor:
        """A weight with the module's dtype and device: that of a linear map or, if both were replaced (LoRA, quantized), any. Of
        one that accelerate has offloaded, an empty tensor where it will be used."""
        own = (getattr(part, "weight", None) for part in (self.qkv, self.out))
        weights = (x for x in (*own, *self.parameters()) if isinstance(x, Tensor) and x.is_floating_point() and x.dim())
        weight = next(weights, torch.empty(1))
        devices = (getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in (self, self.qkv, self.out))
        used_on = next((device for device in devices if device is not None), None)
        return weight if used_on is None or not weight.is_meta else torch.empty(1, dtype=weight.dtype, device=used_on)

    def _alignment(self, x: Tensor, lengths: Tensor | None, key_padding_mask: Tensor | None) -> _Alignment:
        if key_padding_mask is None:
            return _Alignment(lengths, None)
        checks.absent("None beside key_padding_mask", lengths=lengths)
        if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
            was = str(key_padding_mask.dtype) if isinstance(key_padding_mask, Tensor) else type(key_padding_mask).__name__
            checks.refuse("key_padding_mask", was, "a bool tensor, True at padding", TypeError)
        if key_padding_mask.device != x.device:
            checks.refuse("key_padding_mask", f"on {key_padding_mask.device}", f"on x's device, {x.device}")
        if key_padding_mask.shape != x.shape[:2]:
            checks.refuse("key_padding_mask", f"of shape {tuple(key_padding_mask.shape)}", f"(B, L) = {tuple(x.shape[:2])}")
        real, size = ~key_padding_mask, x.shape[1]
        lengths = real.sum(1)
        first = real.int().argmax(1)  # of the first item
        turn = first - (size - lengths if self.align == "right" else 0)
        if not readable(real):
            return _Alignment(lengths, turn)
        position = torch.arange(size, device=x.device) - first[:, None]
        if not torch.equal(real, (position >= 0) & (position < lengths[:, None])):
            checks.refuse("key_padding_mask", "with padding between items", "False in one run of items per sequence")
        return _Alignment(lengths, turn if (turn[lengths > 0] != 0).any() else None)

    def extra_repr(self) -> str:
        tables = "" if self.refinement == "none" else f", tables={self.tables!r}, rank={self.rank}, max_len={self.max_len}"
        way = f", causal={self.causal}, align={self.align!r}"
        lags = self._weight_options()["lags"]
        way += "" if lags is None else f", lags={lags.shape[1]}"
        way += ", shift=True" * self.shift + f", plain_heads={self.plain_heads}" * (self.plain_heads > 0)
        return f"{self.embed_dim}, {self.num_heads}, refinement={self.refinement!r}{tables}{way}"
