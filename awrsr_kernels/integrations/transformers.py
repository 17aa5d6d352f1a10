"""Refined attention in decoder models of Hugging Face transformers: training, padding, generation with a cache, saving.

B batch, H query heads, H_kv key and value heads, L positions, E hidden size, D head dim, R refinement rank, N table rows.

`refine` gives chosen attention modules a submodule `refined` with their tables, and the model an attention implementation that
uses them. A forward hook hands the module's input and cache to that implementation through keyword arguments, which every
module of transformers' attention interface passes on; nothing else of the model changes. Its mask function makes no mask: it
keeps what the model says of padding, from which refined layers read lengths; the other layers run as under "sdpa".
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from .. import checks, habits
from ..api import refined_attention
from ._transformers_layer import IMPLEMENTATION, LazyMask, Padding, Refined, RefinedTables, cache_layer

__all__ = ["RefinedTables", "load", "refine"]

MODULES = ("self_attn", "attn", "attention", "self_attention")  # what decoder layers call their attention
HEAD_DIMS = ("head_dim", "head_size", "qk_head_dim")  # what these call the width of a query head
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window")  # of some models' attention; None where unused
KINDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "moe", "hybrid", "hybrid_sliding")
WINDOWS = ("sliding_window", "attention_chunk_size")  # what configs call the width of attention that is not full
UNSUPPORTED_SETTINGS = ("attn_logit_softcapping", "sinks")  # the same, where they show before a call


@habits.own_signature
def refine(
    model: PreTrainedModel,
    *,
    layers: Sequence[int] | None = None,
    refinement: str = "additive",
    rank: int | None = None,
    tables: str = "content",
    per_head: bool = True,
    gate: bool = True,
    max_positions: int | None = None,
    **unknown: NoReturn,
) -> PreTrainedModel:
    """Refine the attention of a decoder model, in place.

    With "additive" and its gate, which starts at zero, the model computes what it did before, to rounding, until it is trained.
    "simple" and "value" replace the weights, so they change the model at once.

    Args:
        model: a causal decoder on transformers' attention interface (Llama, Qwen, GPT-2, ...), trained or made from a config.
        layers: indices of the layers to refine, in 0..number of layers - 1; default all. The others keep plain attention ("sdpa").
        refinement: "simple", "value" or "additive", as in `awrsr_kernels.refined_attention`.
        rank: columns R of the tables, 1..256; default the head dim.
        tables: "content" (a row is a learned linear map of the layer's input at that position: no limit on the length) or
            "position" (row j is learned for the j-th real token).
        per_head: whether each query head has tables of its own.
        gate: "additive" alone: whether each head learns a gate, from zero; otherwise it is 1.
        max_positions: rows N of position tables, default the config's `max_position_embeddings`.

    Returns:
        The model. New parameters are in `...<attention>.refined`, in the model's dtype and on its layer's device. The
        settings are in `model.config.refined_attention`, so that `load` restores what `model.save_pretrained` wrote.

    Raises:
        ValueError, TypeError: an argument does not fit, or the model is already refined, not a decoder or of an unknown kind.
    """
    if unknown:
        habits.refuse(refine, unknown)
    checks.choice("refinement", refinement, ("simple", "value", "additive"))
    checks.choice("tables", tables, ("content", "position"))
    attentions = _attention_modules(model)
    if any(hasattr(module, "refined") for module in attentions):
        raise ValueError("model is already refined; refine a model only once")
    if getattr(model.config, IMPLEMENTATION, None) is not None:
        raise ValueError(
            "model is plain, but its config has settings of refined attention; it must have a config of its own (copy it). "
            "If it was saved refined, load it with awrsr_kernels.integrations.transformers.load"
        )
    positions = None
    if tables == "position":
        last = model.config.max_position_embeddings if max_positions is None else max_positions
        positions = checks.whole("max_positions", last, 1)
    settings = {
        "layers": _chosen(layers, model.config, len(attentions)),
        "refinement": refinement,
        "rank": checks.whole("rank", _head_dim(attentions[0]) if rank is None else rank, 1, checks.MAX_FEATURES),
        "tables": tables,
        "per_head": checks.flag("per_head", per_head),
        "gate": checks.flag("gate", gate) and refinement == "additive",
        "max_positions": positions,
    }
    _install(model, attentions, settings)
    return model


def load(path: str, *, model_class: type[PreTrainedModel] | None = None, **kwargs: Any) -> Any:
    """The refined model that `save_pretrained` wrote.

    Other ways to load, such as `AutoModel...`, do not know the tables: they leave them out and warn about unexpected weights.

    Args:
        path: a folder, or a name on the Hugging Face Hub.
        model_class: class of the model, such as `transformers.LlamaModel`; by default the one that was saved.
        kwargs: arguments of `PreTrainedModel.from_pretrained`, such as dtype, device_map, config, or config settings to change.

    Returns:
        The model; with output_loading_info=True, also the report on what was loaded.

    Raises:
        ValueError: the model was not refined when it was saved, or its tables are missing.
    """
    places = {k: kwargs[k] for k in ("cache_dir", "local_files_only", "revision", "subfolder", "token") if k in kwargs}
    config, wants_report = kwargs.pop("config", None), kwargs.pop("output_loading_info", False)
    if not isinstance(config, PreTrainedConfig):
        config, kwargs = AutoConfig.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
    settings = getattr(config, IMPLEMENTATION, None)
    if settings is None:
        raise ValueError(f"path is {path}, whose config has no refined_attention; it must be a saved refined model")
    plain: Any = model_class or getattr(transformers, config.architectures[0])

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)
        _install(self, _attention_modules(self), settings)

    # Weights are loaded into what __init__ builds. The name stays: transformers keeps records by it.
    building: Any = type(plain.__name__, (plain,), {"__init__": __init__, "__module__": plain.__module__})
    model, report = building.from_pretrained(path, config=config, output_loading_info=True, **kwargs | places)
    if missing := sorted(key for key in report["missing_keys"] if ".refined." in key):
        raise ValueError(f"path is {path}, which lacks {', '.join(missing)}; it must hold every table of the refined layers")
    model.__class__ = plain
    return (model, report) if wants_report else model


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float | None = None,
    dropout: float = 0.0, refined: Refined | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function as transformers calls it: query (B, H, L, D), key and value of H_kv heads; returns (B, L, H, D_v)."""
    if sparse := [name for name in ("indices", "block_indices") if kwargs.get(name) is not None]:
        raise ValueError(f"{sparse[0]} is used by {type(module).__name__}; it must be None in every layer of a refined model")
    if refined is None:  # a plain layer
        mask = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
        plain: Any = AttentionInterface()["sdpa"]
        return plain(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if used := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
        raise ValueError(f"{used[0]} is used by {type(module).__name__}; it must be None in refined layers")
    tables, hidden, cache = refined
    parts, length = (query, key, value), query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache is not None and cache.length > length:
        if dropout:
            checks.refuse("dropout", f"{dropout} while tokens follow a cache", "0, as in eval mode: model.eval()")
        out = cache.go_on(parts, tables, hidden, _padding(attention_mask, cache.length), scale)
        return out.transpose(1, 2).contiguous(), None
    padding = _padding(attention_mask, length)
    assert padding is not None  # it is known when nothing precedes the window
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (*parts, hidden, *tables.parameters()))
    if cache is not None and not learning and not dropout:
        out = cache.start(parts, tables, hidden, padding, scale)
    else:
        out = refined_attention(
            *parts, *tables.rows(hidden, padding), refinement=tables.refinement, gate=tables.gate, lengths=padding.lengths,
            padding_side=padding.side, softmax_scale=scale, dropout_p=dropout,
        )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _padding(mask: Any, window: int) -> Padding | None:
    """The padding of the window as the mask gives it; None if only the cache knows it."""
    if mask is None:
        return Padding(None, "right", None, window)
    if not isinstance(mask, LazyMask):
        raise ValueError(f"attention_mask is of shape {tuple(mask.shape)}; it must be (B, L) for refined layers, or None")
    if (length := mask.arguments["kv_length"]) != window:
        raise ValueError(f"attention_mask has {length} positions; it must have {window}, those of the input and its cache")
    return mask.padding


def _attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a decoder's layers, in order."""
    attentions: dict[int, Any] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if name.rpartition(".")[2] in MODULES and isinstance(index, int) and _head_dim(module):
            attentions[index] = module
    if not attentions or sorted(attentions) != list(range(len(attentions))) or not model._can_set_attn_implementation():
        names = f"modules are named {', '.join(MODULES)} and know their layer_idx and {' or '.join(HEAD_DIMS)}"
        must = f"a decoder on transformers' attention interface, whose layers' attention {names}"
        checks.refuse("model", type(model).__name__, must)
    first = attentions[0]
    causal = getattr(first, "is_causal", True) and not getattr(model.config, "add_cross_attention", False)
    if not causal or model.config.is_encoder_decoder:
        raise ValueError(f"model is {type(model).__name__}, which is not causal or has cross-attention; it must be a decoder")
    if first.config is not model.config:
        raise ValueError(f"model is {type(model).__name__}, which has several parts; pass the language model inside it")
    for name in UNSUPPORTED_SETTINGS:
        if getattr(model.config, name, None) is not None or hasattr(first, name):
            raise ValueError(f"model is {type(model).__name__}, whose attention has {name}; it must be a plain softmax of scores")
    if getattr(model.config, "num_kv_shared_layers", None):
        raise ValueError(f"model is {type(model).__name__}, whose layers share keys and values; each must have its own")
    return [attentions[index] for index in sorted(attentions)]


def _head_dim(attention: Any) -> int:
    return next((getattr(attention, name) for name in HEAD_DIMS if hasattr(attention, name)), 0)


def _install(model: PreTrainedModel, attentions: list[Any], settings: dict[str, Any]) -> None:
    """Add tables to the layers in the settings, and set the attention implementation that reads them."""
    for index in settings["layers"]:
        attentions[index].refined = RefinedTables(attentions[index], settings, model.dtype)
        attentions[index].register_forward_pre_hook(_hand_over, with_kwargs=True)
    model.set_attn_implementation(IMPLEMENTATION)
    setattr(model.config, IMPLEMENTATION, settings)


def _hand_over(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before an attention module runs, add what the attention function needs to its arguments.

    Pickled models refer to this function by name, which imports this file and so registers the rest.
    """
    if (used := attention.config._attn_implementation) != IMPLEMENTATION:
        raise ValueError(f'the attention implementation is "{used}"; it must stay "{IMPLEMENTATION}" in a refined model')
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    layer = None if cache is None else cache_layer(cache, attention.layer_idx)
    return args, kwargs | {"refined": Refined(attention.refined, args[0] if args else kwargs["hidden_states"], layer)}


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, LazyMask)


def _chosen(layers: Sequence[int] | None, config: PreTrainedConfig, count: int) -> list[int]:
    every = layers is None
    layers = list(range(count)) if layers is None else list(layers)
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers is {layers!r}; it must be None or a list of ints")
        if not 0 <= index < count:
            raise ValueError(f"layers is {layers!r}; it must be indices in 0..{count - 1}")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers is {layers!r}; it must name at least one layer, and each only once")
    kinds = get_layer_types_and_kwargs(config)[0]
    if strange := [kind for kind in kinds if kind not in KINDS]:  # sparse ones depend on the name of the attention implementation
        raise ValueError(f'model has layers of "{strange[0]}"; all layers, including plain ones, must be of {", ".join(KINDS)}')
    if other := [index for index in layers if kinds[index] != "full_attention"]:
        raise ValueError(_without_full_attention("None, all of them" if every else str(layers), other[0], kinds, config))
    return sorted(layers)


def _without_full_attention(layers: str, index: int, kinds: list[str], config: PreTrainedConfig) -> str:
    """What is wrong with a layer that is to be refined, and what to do about it."""
    was = f'layers is {layers}, and layer {index} has "{kinds[index]}"; refined layers must have full attention'
    if full := [index for index, kind in enumerate(kinds) if kind == "full_attention"]:
        return f"{was}: pass layers={full}, which do"
    name = next((name for name in WINDOWS if getattr(config, name, None)), None)
    if name is None:
        return f"{was}, which none of this model has"
    setting = f'layer_types=["full_attention"] * {len(kinds)}' if getattr(config, "layer_types", None) else f"{name}=None"
    return (
        f"{was}, which none of this model has: for inputs of up to {name} = {getattr(config, name)} tokens, load it with "
        f"from_pretrained(..., {setting}), which computes the same for them"
    )
