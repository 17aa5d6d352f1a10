"""Refined attention in decoder models of Hugging Face transformers: training, padding, generation with a cache, saving.

B batch, H query heads, H_kv key and value heads, L positions, E hidden size, D head dim, R refinement rank, N table rows.

`refine` gives chosen attention modules a submodule `refined` with their tables, and the model an attention implementation that
uses them. A forward hook calls the submodule and hands what it returns, and the layer's cache, to that implementation through
keyword arguments, which every module of transformers' attention interface passes on; another hook finds packed rows. Nothing else
of the model changes. The mask function makes no mask: it keeps what the model says of padding, from which refined layers read
lengths; the other layers run as under "sdpa". The settings are in the config, and a model made from such a config is refined.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from .. import checks, habits
from ..api import refined_attention_varlen
from ._transformers import IMPLEMENTATION, SAVED_IMPLEMENTATION
from ._transformers.caches import Parts, RefinedCacheLayer, adopt_prefix, attend, cache_layer
from ._transformers.masks import LazyMask, lazy_mask, read_padding
from ._transformers.packing import Packing, unpack
from ._transformers.tables import RefinedTables, Tables

__all__ = ["RefinedTables", "load", "refine"]

MODULES = ("self_attn", "attn", "attention", "self_attention")  # what decoder layers call their attention
HEAD_DIMS = ("head_dim", "head_size", "qk_head_dim")  # what these call the width of a query head
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window")  # of some models' attention; None where unused
KINDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "moe", "hybrid", "hybrid_sliding")
WINDOWS = ("sliding_window", "attention_chunk_size")  # what configs call the width of attention that is not full
UNSUPPORTED_SETTINGS = ("attn_logit_softcapping", "sinks")  # the same, where they show before a call


class Refined(NamedTuple):
    """What a refined layer passes to the attention function. No module is in it, as in `Tables`."""

    tables: Tables
    cache: RefinedCacheLayer | None


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
    lags: int = 0,
    shift: bool = False,
    plain_heads: int = 0,
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
        lags: A in 0..7, how many earlier positions higher-order weights compare as well, by learned factors (`refined_attention`).
        shift, plain_heads: as in `refined_attention`. Heads that are shifted change the model at once.
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
        raise ValueError("model is already refined; refine a model only once (one made from a refined model's config is refined)")
    if getattr(model.config, IMPLEMENTATION, None) is not None:
        raise ValueError(
            "model is plain, but its config has settings of refined attention, as another model of the same config was refined; it "
            "must have a config of its own (copy it before)"
        )
    if any(hasattr(part, "_hf_hook") and weight.is_meta for part in attentions[0].modules() for weight in part.parameters()):
        checks.refuse("model", "offloaded by accelerate", "refined first and offloaded then: new tables need memory of their own")
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
    settings |= _following(settings, lags, shift, plain_heads, model.config.num_attention_heads)
    _install(model, attentions, settings)
    return model


def _following(settings: dict[str, Any], lags: int, shift: bool, plain_heads: int, heads: int) -> dict[str, Any]:
    """The settings of lags, shift and plain heads, checked; those that are off are left out, as in models saved earlier."""
    lags, refinement = checks.whole("lags", lags, 0, checks.MAX_LAGS), settings["refinement"]
    if (width := (lags + 1) * settings["rank"]) > checks.MAX_FEATURES:
        checks.refuse("lags", str(lags), f"so few that (lags + 1) * rank, now {width}, is at most {checks.MAX_FEATURES}")
    found = {"lags": lags, "shift": checks.shift(shift, refinement, True)}
    found["plain_heads"] = checks.plain_heads(plain_heads, refinement, heads)
    return {name: value for name, value in found.items() if value}


def load(path: str, *, model_class: type[PreTrainedModel] | None = None, **kwargs: Any) -> Any:
    """The refined model that `save_pretrained` wrote.

    Once this module is imported, transformers' own ways to load do the same: `AutoModelForCausalLM.from_pretrained(path)`,
    `LlamaForCausalLM.from_pretrained(path)`. Two things are added here: the class is the one that was saved, and a plain model or
    missing tables raise an error. Where this module is not imported, transformers refuses to load a refined model.

    Args:
        path: a folder, or a name on the Hugging Face Hub.
        model_class: class of the model, such as `transformers.LlamaModel`; by default the one that was saved.
        kwargs: arguments of `PreTrainedModel.from_pretrained`, such as dtype, device_map, config, or config settings to change.

    Returns:
        The model; with output_loading_info=True, also the report on what was loaded.

    Raises:
        ValueError: the model was not refined when it was saved, or its tables are missing.
    """
    if kwargs.get("attn_implementation") not in (None, IMPLEMENTATION):
        checks.refuse("attn_implementation", f'"{kwargs["attn_implementation"]}"', "left out for a refined model")
    places = {k: kwargs[k] for k in ("cache_dir", "local_files_only", "revision", "subfolder", "token") if k in kwargs}
    config, wants_report = kwargs.pop("config", None), kwargs.pop("output_loading_info", False)
    known = config if isinstance(config, PreTrainedConfig) else AutoConfig.from_pretrained(config or path, **places)
    if getattr(known, IMPLEMENTATION, None) is None:
        raise ValueError(f"path is {path}, whose config has no refined_attention; it must be a saved refined model")
    saved: Any = model_class or getattr(transformers, known.architectures[0])
    model, report = saved.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    if missing := sorted(key for key in report["missing_keys"] if ".refined." in key):
        raise ValueError(f"path is {path}, which lacks {', '.join(missing)}; it must hold every table of the refined layers")
    return (model, report) if wants_report else model


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float | None = None,
    dropout: float = 0.0, refined: Refined | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function as transformers calls it: query (B, H, L, D), key and value of H_kv heads; returns (B, L, H, D_v)."""
    if sparse := [name for name in ("indices", "block_indices") if kwargs.get(name) is not None]:
        raise ValueError(f"{sparse[0]} is used by {type(module).__name__}; it must be None in every layer of a refined model")
    packing = Packing.of(kwargs)
    if refined is None:  # a plain layer
        mask = attention_mask.dense(packing) if isinstance(attention_mask, LazyMask) else attention_mask
        plain: Any = AttentionInterface()["sdpa"]
        return plain(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if used := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
        raise ValueError(f"{used[0]} is used by {type(module).__name__}; it must be None in refined layers")
    (tables, cache), parts = refined, (query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing is not None:
        return _packed(parts, tables, packing, scale, dropout), None
    if cache is not None:
        out = cache.attend(parts, tables, attention_mask, scale, dropout)
    else:
        padding = read_padding(attention_mask, query.shape[2], started=False)
        assert padding is not None  # it is known when nothing precedes the window
        out = attend(parts, tables, padding.on(query.device), scale, dropout)
    return out.transpose(1, 2).contiguous(), None


def _packed(parts: Parts, tables: Tables, packing: Packing, scale: float, dropout: float) -> Tensor:
    """Attention of packed rows, (B, L, H, D_v)."""
    batch = parts[0].shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in parts)
    w_q, w_k = tables.packed(packing.longest)
    out = refined_attention_varlen(
        q, k, v, w_q, w_k, packing.bounds.to(q.device), packing.longest, align="left",
        refinement=tables.refinement, softmax_scale=scale, dropout_p=dropout, **tables.options,
    )  # fmt: skip
    return out.unflatten(0, (batch, -1)).contiguous()


def _by_index(model: PreTrainedModel) -> dict[int, Any]:
    attentions: dict[int, Any] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if name.rpartition(".")[2] in MODULES and isinstance(index, int) and _head_dim(module):
            attentions[index] = module
    return attentions


def _attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a decoder's layers, in order."""
    attentions = _by_index(model)
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
    if settings["layers"][-1] >= len(attentions):
        must = f"of refined layers among the {len(attentions)} of the model; make the model with more, or change its config"
        checks.refuse(f"config.{IMPLEMENTATION}", str(settings["layers"]), must)
    for index in settings["layers"]:
        attentions[index].refined = RefinedTables(attentions[index], settings, model.dtype)
        attentions[index].register_forward_pre_hook(_hand_over, with_kwargs=True)
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel) and attentions[0] in module.modules()]
    owners[-1].register_forward_pre_hook(unpack, with_kwargs=True)  # the innermost one
    for owner in owners:
        owner.register_forward_pre_hook(adopt_prefix, with_kwargs=True)
    model.set_attn_implementation(IMPLEMENTATION)
    setattr(model.config, IMPLEMENTATION, settings)
    model.config.attn_implementation = SAVED_IMPLEMENTATION  # so that transformers refuses the model where this is not imported


def _hand_over(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before an attention module runs, add what the attention function needs to its arguments.

    Pickled models refer to this function by name, which imports this file and so registers the rest.
    """
    if (used := attention.config._attn_implementation) != IMPLEMENTATION:
        raise ValueError(f'the attention implementation is "{used}"; it must stay "{IMPLEMENTATION}" in a refined model')
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    layer = None if cache is None else cache_layer(cache, attention)
    tables = attention.refined(args[0] if args else kwargs["hidden_states"])
    return args, kwargs | {"refined": Refined(tables, layer)}


def _post_init(model: PreTrainedModel) -> None:
    """At the end of a model's __init__: a config with settings of refined attention makes the model refined."""
    settings = getattr(model.config, IMPLEMENTATION, None)
    attentions = {} if settings is None else _by_index(model)
    if settings is not None and attentions and not any(hasattr(module, "refined") for module in attentions.values()):
        if (used := model.config._attn_implementation) not in (IMPLEMENTATION, SAVED_IMPLEMENTATION, "sdpa", None):
            checks.refuse("attn_implementation", f'"{used}"', "left out for a refined model")
        _install(model, _attention_modules(model), settings)
    elif attentions:  # inside, a decoder is refined already
        model.register_forward_pre_hook(adopt_prefix, with_kwargs=True)
    _transformers_post_init(model)


def _initialize_weights(model: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Draw the tables that a checkpoint lacks, about which transformers warns."""
    if isinstance(module, RefinedTables) and not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()
    _transformers_initialize_weights(model, module, *args, **kwargs)


for _name in (IMPLEMENTATION, SAVED_IMPLEMENTATION):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, lazy_mask)
_transformers_post_init, _transformers_initialize_weights = PreTrainedModel.post_init, PreTrainedModel._initialize_weights
PreTrainedModel.post_init = _post_init  # type: ignore[method-assign]
PreTrainedModel._initialize_weights = _initialize_weights  # type: ignore[method-assign]


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
