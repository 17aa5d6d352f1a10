"""The parts of one refined layer of a transformers model: learned tables, knowledge of padding, and its own cache.

B batch, H query heads, H_kv key and value heads, L positions, E hidden size, D head dim, R refinement rank, N table rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import causal_mask_function

from .. import checks
from ..cache import RefinedCache
from ..decoding import refined_attention_prefill, refined_attention_step
from ..torch_state import readable

Parts = tuple[Tensor, Tensor, Tensor]  # query (B, H, L, D), key and value of H_kv heads
IMPLEMENTATION = "refined_attention"  # what transformers calls it, and the key of the settings in a model's config


class RefinedTables(nn.Module):
    """The learned part of one refined layer: tables W_q and W_k and, with a gate, one number per head.

    Parameters w_q and w_k: (H, R, E), or (1, R, E) shared by the heads, for "content"; (H, N, R) or (1, N, R) for "position". They
    are drawn so that rows have variance 1 (content: for inputs that have). Parameter gate: (H,), zero at first, or None.
    """

    def __init__(self, attention: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        config: Any = attention.config
        self.heads, self.refinement = config.num_attention_heads, settings["refinement"]
        self.content = settings["tables"] == "content"
        rank, count = settings["rank"], self.heads if settings["per_head"] else 1
        shape = (rank, config.hidden_size) if self.content else (settings["max_positions"], rank)
        factory: Any = {"device": next(attention.parameters()).device, "dtype": dtype}
        self.w_q, self.w_k = (nn.Parameter(torch.empty(count, *shape, **factory)) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(self.heads, **factory)) if settings["gate"] else None
        for w in (self.w_q, self.w_k):
            nn.init.normal_(w, std=config.hidden_size**-0.5 if self.content else 1.0)

    def rows(self, hidden: Tensor, padding: "Padding") -> tuple[Tensor, Tensor]:
        """W_q and W_k for the positions of a window.

        hidden: (B, L, E), the attention module's input. Returns (B, H, L, R); or from position tables without padding on the left,
        which is for all entries the same, (H, L, R) or (L, R).
        """
        w_q, w_k = self.cached(hidden)
        if self.content:
            return w_q, w_k
        length, limit = hidden.shape[1], self.w_q.shape[1]
        if padding.longest > limit:
            checks.refuse("max_positions", str(limit), f"at least the {padding.longest} positions of the input")
        if padding.first is None and length <= limit:
            return w_q[..., :length, :], w_k[..., :length, :]
        first = hidden.new_zeros(hidden.shape[0], dtype=torch.int64) if padding.first is None else padding.first
        item = (torch.arange(length, device=first.device) - first[:, None]).clamp(0, limit - 1)
        shape = (first.shape[0], self.heads, length, -1)
        return tuple(w[:, item].transpose(0, 1).expand(shape) for w in (self.w_q, self.w_k))  # type: ignore[return-value]

    def cached(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """W_q and W_k for a `RefinedCache`: for "content" (B, H, L, R), the rows of new positions; for "position" all of
        (H, N, R), or (N, R) shared by the heads."""
        if not self.content:
            return (self.w_q[0], self.w_k[0]) if self.w_q.shape[0] == 1 else (self.w_q, self.w_k)
        tables = (F.linear(hidden, w.flatten(0, 1).to(hidden.dtype)).unflatten(-1, w.shape[:2]) for w in (self.w_q, self.w_k))
        return tuple(x.transpose(1, 2).expand(-1, self.heads, -1, -1) for x in tables)  # type: ignore[return-value]


class Refined(NamedTuple):
    """What a refined layer passes to the attention function."""

    tables: RefinedTables
    hidden: Tensor  # (B, L, E), the layer's input
    cache: "RefinedCacheLayer | None"


class Padding(NamedTuple):
    """Where real tokens are in a batch of windows."""

    lengths: Tensor | None  # (B,) int64; None: everything is real
    side: str
    first: Tensor | None  # (B,) int64, position of the first real token; None: 0
    longest: int  # of lengths
    empty: bool = False  # whether a row has no real token


class LazyMask:
    """The visibility of positions in one pass of a model: where padding is, and a dense mask only if a plain layer needs one.

    transformers calls the class as its mask function.
    """

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.plain = arguments["mask_function"] is causal_mask_function and not arguments["kv_offset"]
        self._padding = _read_padding(arguments) if self.plain else None
        self._dense: tuple[Any] | None = None

    @property
    def padding(self) -> Padding | None:
        if not self.plain:
            raise ValueError(
                "attention_mask is not plainly causal (a sliding window, packed sequences, bidirectional or custom); "
                "refined layers must see all earlier tokens of one sequence"
            )
        return self._padding

    @property
    def ndim(self) -> int:
        """transformers reads this of a mask that is passed in; `generate` makes one in advance only for static caches."""
        checks.refuse("cache", "static", "a DynamicCache for refined layers")

    def __getitem__(self, _: Any) -> Any:
        raise ValueError("attention_mask is indexed by this model; refined layers need the whole mask")

    def dense(self) -> Any:
        if self._dense is None:
            self._dense = (AttentionMaskInterface()["sdpa"](**self.arguments),)
        return self._dense[0]


def _read_padding(arguments: dict[str, Any]) -> Padding | None:
    """The padding of the whole window. On a GPU this waits for the device; if a cache knows the padding, it is not read: None."""
    mask, window = arguments["attention_mask"], arguments["kv_length"]
    started = window > arguments["q_length"]
    if mask is None or not len(mask):
        return Padding(None, "right", None, window)
    if tuple(mask.shape) != (arguments["batch_size"], window):
        must = f"(B, L) with L = {window}, the positions of input and cache (a static cache counts its whole capacity)"
        checks.refuse("attention_mask", f"of shape {tuple(mask.shape)}", must)
    if started and mask.device.type != "cpu":
        return None
    lengths = mask.sum(1)
    first, last = mask.int().argmax(1), mask.flip(1).int().argmax(1)  # `last` counts from the end
    empty = lengths == 0
    runs = [lengths == window, empty | (first + lengths + last == window), first == 0, empty | (last == 0), ~empty]
    full, one_run, right, left, filled, longest = torch.stack([*torch.stack(runs).all(1).long(), lengths.amax()]).tolist()
    if full:
        return Padding(None, "right", None, window)
    if not one_run or not (left or (right and not started)):
        side = "on the left, as tokens follow" if started else "on one side of the batch"
        checks.refuse("attention_mask", "irregular", f"one run of real tokens per row for refined layers, padded {side}")
    first = window - lengths if left else None
    return Padding(lengths, "left" if left else "right", first, longest, not filled)


class RefinedCacheLayer(CacheLayerMixin):
    """One layer of a transformers cache: keys, values and what refinement adds to them, each once, in a `RefinedCache`."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    length: int  # positions seen, padding included
    rows: RefinedCache | None
    can_go_on: bool  # whether tokens may follow those of the first pass

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True  # the rest waits for the queries and tables

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new positions and return them; `start` and `go_on` store them."""
        self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def start(self, parts: Parts, tables: RefinedTables, hidden: Tensor, padding: Padding, scale: float) -> Tensor:
        """Attention of a prompt, after `update` has counted it."""
        q, k, v = parts
        if self.rows is not None and self.rows.end_bound:
            raise ValueError("model attends more than once per layer; with refined layers it cannot use a cache")
        self.can_go_on = padding.lengths is None or (padding.side == "left" and not padding.empty)
        w_q, w_k = tables.cached(hidden)
        self.rows = RefinedCache(
            q.shape[0], q.shape[2], heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[-1], value_dim=v.shape[-1],
            rank=w_q.shape[-1], refinement=tables.refinement, tables="content" if tables.content else "position",
            dtype=v.dtype, device=v.device,
        )  # fmt: skip
        return refined_attention_prefill(
            q, k, v, w_q, w_k, self.rows, gate=tables.gate, lengths=padding.lengths, padding_side=padding.side, softmax_scale=scale
        )

    def go_on(self, parts: Parts, tables: RefinedTables, hidden: Tensor, padding: Padding | None, scale: float) -> Tensor:
        """Attention of the next positions, one by one. padding: that of all positions, if it is known."""
        if self.rows is None:
            was = "empty, as its first pass recorded gradients or had dropout"
            checks.refuse("cache", was, "filled under no_grad, in eval mode: model.eval()")
        if not self.can_go_on:
            raise ValueError(
                "cache began with padding on the right, or with a row that is all padding; to add tokens, it must begin with "
                "padding on the left and a token in every row"
            )
        first = self.rows.first
        if padding is not None and readable(first) and not first.equal(first * 0 if padding.first is None else padding.first):
            raise ValueError("attention_mask hides other positions of the cache than before; it must hide the same ones")
        w_q, w_k = tables.cached(hidden)
        outs = []
        for at in range(parts[0].shape[2]):
            q, k, v = (x[:, :, at : at + 1] for x in parts)
            w_q_i, w_k_i = (w[:, :, at : at + 1] if tables.content else w for w in (w_q, w_k))
            outs.append(refined_attention_step(q, k, v, w_q_i, w_k_i, self.rows, gate=tables.gate, softmax_scale=scale))
        return torch.cat(outs, 2)

    def reset(self) -> None:
        self.length, self.rows, self.is_initialized, self.can_go_on = 0, None, False, True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.rows is not None:
            self.rows.reorder(beam_idx.to(self.rows.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.reorder_cache(torch.arange(self.rows.batch).repeat_interleave(repeats))

    batch_select_indices = reorder_cache

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` positions."""
        if tokens_to_remove > 0:
            checks.refuse("tokens_to_remove", str(tokens_to_remove), "0 or negative")
        if self.rows is not None:
            if self.rows.end_bound < self.length:
                checks.refuse("cache", "of a batch padded on the right", "padded on the left to be cropped")
            self.rows.crop(self.length + tokens_to_remove)
        self.length += tokens_to_remove


def cache_layer(cache: Cache, index: int) -> RefinedCacheLayer:
    """The cache's layer for a refined attention module, which replaces an empty dynamic one."""
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    if type(layer) is DynamicLayer and not layer.is_initialized and not cache.offloading:
        layer = cache.layers[index] = RefinedCacheLayer()
    if not isinstance(layer, RefinedCacheLayer):
        state = "offloaded" if cache.offloading else "filled by a plain model" if type(layer) is DynamicLayer else "of another kind"
        was = f"{type(cache).__name__} of {type(layer).__name__}, {state}"
        checks.refuse("cache", was, "a DynamicCache, empty at first and not offloaded")
    return layer
