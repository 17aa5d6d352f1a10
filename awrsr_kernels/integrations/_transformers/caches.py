"""Layers of transformers caches for refined attention: growing, static and offloaded ones, and prefixes of keys and values.

B batch, H query heads, H_kv key and value heads, L positions of a pass, N positions seen, n of them in a prefix, D head dim,
R refinement rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticLayer

from ... import checks
from ...api import refined_attention
from ...cache import RefinedCache
from ...decoding import refined_attention_prefill, refined_attention_step
from ...torch_state import readable
from .masks import Padding, read_padding
from .tables import Tables

Parts = tuple[Tensor, Tensor, Tensor]  # query (B, H, L, D), key and value of H_kv heads


class Prefix(NamedTuple):
    """Keys and values that precede the tokens of every row, (B, H_kv, n, D) each, as PEFT's prefix tuning learns them.

    Nobody computed queries or tables for them: their rows of W and of queries are zero.
    """

    key: Tensor
    value: Tensor

    @property
    def length(self) -> int:
        return self.key.shape[2]

    def join(self, parts: Parts, tables: Tables, padding: Padding) -> tuple[Parts, Tables, Padding]:
        """The first pass with the prefix before the first real token of each row; tables are content tables then."""
        (q, k, v), n = parts, self.length
        rows = [w.expand(*q.shape[:3], -1) for w in tables.padded(q, padding)]
        before = [q.new_zeros(*q.shape[:2], n, q.shape[3]), self.key.to(k), self.value.to(v)]
        before += [w.new_zeros(*w.shape[:2], n, w.shape[3]) for w in rows]
        joined = [torch.cat(pair, 2) for pair in zip(before, [q, k, v, *rows], strict=True)]
        if padding.first is not None:  # columns: padding, prefix, tokens
            at, first = torch.arange(n + q.shape[2], device=q.device), padding.first[:, None]
            source = torch.where(at < first, at + n, torch.where(at < first + n, at - first, at))
            joined = [x.gather(2, source[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])) for x in joined]
        lengths = None if padding.lengths is None else padding.lengths + n
        q, k, v, w_q, w_k = joined
        padding = padding._replace(lengths=lengths, longest=padding.longest + n)
        return (q, k, v), tables._replace(w_q=w_q, w_k=w_k, content=True), padding

    def cut(self, out: Tensor, padding: Padding) -> Tensor:
        """The result (B, H, L, D_v) of the pass's own tokens."""
        out = out[:, :, self.length :]
        if padding.first is None:
            return out
        empty = torch.arange(out.shape[2], device=out.device) < padding.first[:, None]
        return out.masked_fill(empty[:, None, :, None], 0)


class RefinedCacheLayer(CacheLayerMixin):
    """One layer of a transformers cache: keys, values and what refinement adds to them, each once, in a `RefinedCache`."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    length: int | Tensor  # positions seen, padding and prefix included
    rows: RefinedCache | None
    can_go_on: bool  # whether tokens may follow those of the first pass
    started: bool  # whether tokens were seen before the present pass

    def __init__(self, prefix: Prefix | None = None, offloads: bool = False) -> None:
        super().__init__()
        self.prefix, self.offloads = prefix, offloads
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized, self.device = True, key_states.device  # the rest waits for the queries and tables

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new positions and return them; `attend` stores them."""
        self.started = self.is_initialized
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.length) + query_length, 0

    def get_seq_length(self) -> Any:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def attend(self, parts: Parts, tables: Tables, mask: Any, scale: float, dropout: float) -> Tensor:
        """Attention of the pass that `update` has counted."""
        return self._attend(parts, tables, mask, scale, dropout, int(self.length))

    def _attend(self, parts: Parts, tables: Tables, mask: Any, scale: float, dropout: float, window: int | None) -> Tensor:
        prefix = self.prefix.length if self.prefix is not None else 0
        padding = read_padding(mask, window, self.started, prefix)
        padding = None if padding is None else padding.on(parts[0].device)
        if self.started:
            if dropout:
                checks.refuse("dropout", f"{dropout} while tokens follow a cache", "0, as in eval mode: model.eval()")
            out = self._go_on(parts, tables, padding, scale)
        else:
            assert padding is not None  # it is known when nothing precedes the window
            out = self._start(parts, tables, padding, scale, dropout)
        if self.offloads:
            self._move_rows(torch.device("cpu"))
        return out

    def _start(self, parts: Parts, tables: Tables, padding: Padding, scale: float, dropout: float) -> Tensor:
        """Attention of a prompt. Where it is learned from, nothing is stored."""
        if self.rows is not None and self.rows.end_bound:
            raise ValueError("model attends more than once per layer; with refined layers it cannot use a cache")
        seen, prefix = padding, self.prefix
        learning = torch.is_grad_enabled() and (tables.learn or any(x.requires_grad for x in (*parts, *(prefix or ()))))
        if prefix is not None:
            parts, tables, padding = prefix.join(parts, tables, padding)
        if learning or dropout:
            out = attend(parts, tables, padding, scale, dropout)
        else:
            self.can_go_on = padding.lengths is None or (padding.side == "left" and not padding.empty)
            out = self._store(parts, tables, padding, scale)
        return out if prefix is None else prefix.cut(out, seen)

    def _store(self, parts: Parts, tables: Tables, padding: Padding, scale: float) -> Tensor:
        (q, k, v), w_q = parts, tables.w_q
        kept = "content" if tables.content else "position"
        self.rows = self._new_rows(
            q.shape[0], q.shape[2], heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[-1], value_dim=v.shape[-1],
            rank=w_q.shape[-1], refinement=tables.refinement, tables=kept, dtype=v.dtype, device=v.device,
            lags=0 if tables.lags is None else tables.lags.shape[1],
        )  # fmt: skip
        w_q, w_k = (tables.w_q, tables.w_k) if tables.content else tables.whole()
        return refined_attention_prefill(
            q, k, v, w_q, w_k, self.rows, lengths=padding.lengths, padding_side=padding.side, softmax_scale=scale, **tables.options
        )

    def _new_rows(self, batch: int, length: int, **sizes: Any) -> RefinedCache:
        return RefinedCache(batch, length, **sizes)

    def _go_on(self, parts: Parts, tables: Tables, padding: Padding | None, scale: float) -> Tensor:
        """Attention of the next positions, one by one. padding: that of all positions, if it is known."""
        if self.rows is None:
            was = "empty, as its first pass recorded gradients or had dropout"
            checks.refuse("cache", was, "filled under no_grad, in eval mode: model.eval()")
        if not self.can_go_on:
            raise ValueError(
                "cache began with padding on the right, or with a row that is all padding; to add tokens, it must begin with "
                "padding on the left and a token in every row"
            )
        self._move_rows(parts[0].device)
        first = self.rows.first
        if padding is not None and readable(first) and not first.equal(first * 0 if padding.first is None else padding.first):
            raise ValueError("attention_mask hides other positions of the cache than before; it must hide the same ones")
        outs = []
        for at in range(parts[0].shape[2]):
            q, k, v = (x[:, :, at : at + 1] for x in parts)
            outs.append(self._step((q, k, v), *self._rows_of(tables, at, q.shape[1]), tables.options, scale))
        return torch.cat(outs, 2)

    def _rows_of(self, tables: Tables, at: int, heads: int) -> tuple[Tensor, Tensor]:
        """The tables for the step of the pass's position `at`: rows that the cache stores, or the whole position tables."""
        assert self.rows is not None
        if tables.content:
            return tables.w_q[:, :, at : at + 1], tables.w_k[:, :, at : at + 1]
        if self.rows.tables == "position":
            return tables.whole()
        items = self.rows.end - self.rows.first - (0 if self.prefix is None else self.prefix.length)
        if readable(items) and len(items) and (longest := int(items.max()) + 1) > (limit := tables.w_q.shape[1]):
            checks.refuse("max_positions", str(limit), f"at least the {longest} positions of the input")
        return tables.at(items[:, None], heads)

    def _step(self, parts: Parts, w_q: Tensor, w_k: Tensor, options: dict[str, Any], scale: float) -> Tensor:
        assert self.rows is not None
        q, k, v = parts
        return refined_attention_step(q, k, v, w_q, w_k, self.rows, softmax_scale=scale, **options)

    def reset(self) -> None:
        self.length = 0 if self.prefix is None else self.prefix.length
        self.rows, self.is_initialized, self.can_go_on, self.started = None, False, True, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.rows is not None:
            self.rows.reorder(beam_idx.to(self.rows.device))
        elif self.prefix is not None:
            self.prefix = Prefix(*(x.index_select(0, beam_idx.to(x.device)) for x in self.prefix))

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = self.rows.batch if self.rows is not None else len(self.prefix.key) if self.prefix is not None else 0
        self.reorder_cache(torch.arange(batch).repeat_interleave(repeats))

    batch_select_indices = reorder_cache

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` positions."""
        if tokens_to_remove > 0:
            checks.refuse("tokens_to_remove", str(tokens_to_remove), "0 or negative")
        if self.rows is not None:
            if self.rows.end_bound < self.length:
                checks.refuse("cache", "of a batch padded on the right", "padded on the left to be cropped")
            self.rows.crop(int(self.length) + tokens_to_remove)
        self.length += tokens_to_remove

    def offload(self) -> None:
        """transformers asks for it before the pass has attended; `attend` offloads after that."""

    def prefetch(self) -> None:
        if self.rows is not None:
            self._move_rows(self.device)

    def _move_rows(self, device: torch.device) -> None:
        if self.rows is not None and self.rows.device != device:
            with torch.inference_mode(False):  # as in RefinedCache
                for name in (*self.rows.rows(), "first", "end"):
                    setattr(self.rows, name, getattr(self.rows, name).to(device, non_blocking=True))


class StaticRefinedLayer(RefinedCacheLayer):
    """A layer of fixed capacity, all of whose state is in tensors, so that a compiled step stays the same."""

    is_compileable = True

    def __init__(self, max_cache_len: int, offloads: bool = False) -> None:
        self.max_cache_len, self.is_compileable = max_cache_len, not offloads
        super().__init__(offloads=offloads)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.length = torch.zeros((), dtype=torch.int64, device=self.device)
        _stay(self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def attend(self, parts: Parts, tables: Tables, mask: Any, scale: float, dropout: float) -> Tensor:
        length = parts[0].shape[2]
        known = length if not self.started else int(self.length) if readable(parts[0]) else None
        if known is not None and known > self.max_cache_len:
            was = f"static with max_cache_len = {self.max_cache_len}"
            checks.refuse("cache", was, f"made with {known}, the positions of input and cache, at least")
        return self._attend(parts, tables, mask, scale, dropout, known)

    def _store(self, parts: Parts, tables: Tables, padding: Padding, scale: float) -> Tensor:
        """The rows of position tables are stored as well, since the cache may have more room than the tables have rows."""
        if not tables.content:
            w_q, w_k = (w.expand(*parts[0].shape[:3], -1) for w in tables.padded(parts[0], padding))
            tables = tables._replace(w_q=w_q, w_k=w_k, content=True)
        out = super()._store(parts, tables, padding, scale)
        assert self.rows is not None
        self._fix()
        for x in (*self.rows.rows().values(), self.rows.first, self.rows.end):
            _stay(x)
        return out

    def _new_rows(self, batch: int, length: int, **sizes: Any) -> RefinedCache:
        return RefinedCache(batch, self.max_cache_len, **sizes)

    def _step(self, parts: Parts, w_q: Tensor, w_k: Tensor, options: dict[str, Any], scale: float) -> Tensor:
        out = super()._step(parts, w_q, w_k, options, scale)
        self._fix()
        return out

    def _fix(self) -> None:
        """Bounds that hold at every step: `first` and `end` alone say which rows are in use."""
        assert self.rows is not None
        self.rows.end_bound = self.rows.length_bound = self.rows.capacity - 1
        self.rows.ragged = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.rows is not None:
            self._fix()

    batch_select_indices = reorder_cache

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            checks.refuse("tokens_to_remove", str(tokens_to_remove), "0 or negative")
        if self.rows is not None and tokens_to_remove:
            if not self.can_go_on:
                checks.refuse("cache", "of a batch padded on the right", "padded on the left to be cropped")
            self.rows.end_bound = self.rows.length_bound = int(self.length)
            self.rows.crop(int(self.length) + tokens_to_remove)
            self._fix()
        self.length += tokens_to_remove


def _stay(x: Tensor) -> None:
    """CUDA graphs keep the address of x."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)


def attend(parts: Parts, tables: Tables, padding: Padding, scale: float, dropout: float) -> Tensor:
    """Attention of a whole window, without a cache."""
    (q, k, v), (w_q, w_k) = parts, tables.padded(parts[0], padding)
    return refined_attention(
        q, k, v, w_q, w_k, refinement=tables.refinement, lengths=padding.lengths, padding_side=padding.side,
        softmax_scale=scale, dropout_p=dropout, **tables.options,
    )  # fmt: skip


def cache_layer(cache: Cache, attention: Any) -> RefinedCacheLayer:
    """The cache's layer for a refined attention module, which replaces one that is empty or holds a prefix.

    Keys and values that are already there are a prefix if they learn or the module is frozen, as PEFT does it; those of another
    model's tokens look the same otherwise.
    """
    index = attention.layer_idx
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    if isinstance(layer, RefinedCacheLayer):
        return layer
    filled = layer.is_initialized and bool(layer.get_seq_length() > 0)
    new: RefinedCacheLayer | None = None
    if type(layer) is StaticLayer and not filled:
        new = StaticRefinedLayer(layer.max_cache_len, cache.offloading)
    elif type(layer) is DynamicLayer and not filled:
        new = RefinedCacheLayer(offloads=cache.offloading)
    elif type(layer) is DynamicLayer and not cache.offloading:
        if layer.keys.requires_grad or not any(weight.requires_grad for weight in attention.parameters()):
            new = RefinedCacheLayer(Prefix(layer.keys, layer.values))
    if new is None:
        known = type(layer) in (DynamicLayer, StaticLayer)
        was = f"{type(cache).__name__} of {type(layer).__name__}, {'filled by a plain model' if known else 'of another kind'}"
        must = "a DynamicCache or StaticCache, empty at first or with the prefix of PEFT's prefix tuning, which freezes the model"
        checks.refuse("cache", was, must)
    cache.layers[index] = new
    return new


def adopt_prefix(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a model runs: PEFT 0.21 hands `generate` its prefix at every step as `past_key_values`, which transformers 5.24 leaves
    out beside the `cache` of its own; so the first step puts the prefix into that cache."""
    cache, prefix = kwargs.get("cache"), kwargs.get("past_key_values")
    if not isinstance(cache, Cache) or not isinstance(prefix, DynamicCache):
        return None
    if cache.get_seq_length() == 0:
        if not isinstance(cache, DynamicCache) or cache.offloading:
            checks.refuse("cache_implementation", f"that of a {cache}", "left out where a prefix is tuned")
        for index, layer in enumerate(prefix.layers):
            cache.update(layer.keys, layer.values, index)
    return args, {name: value for name, value in kwargs.items() if name != "past_key_values"}
