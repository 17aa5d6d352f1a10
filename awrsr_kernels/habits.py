"""What to write instead of an argument that a call does not have: the names by which torch, flash-attention and others know things.

A call that takes `**unknown` hands it to `refuse` where it is not empty; `own_signature` hides it from whoever asks for arguments.
"""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# Names that mean one thing elsewhere.
SCALES = "scale scaling sm_scale"
WEIGHTS = "need_weights average_attn_weights return_attn_probs return_attention output_attentions"
MASKS = "attn_mask attention_mask mask src_mask block_mask mask_mod"
PADDING_MASKS = "key_padding_mask src_key_padding_mask padding_mask"
BIASES = "bias attn_bias position_bias alibi_slopes score_mod"
DROPOUTS = "dropout dropout_p dropout_rate attn_dropout attention_dropout"
BOUNDS = "cu_seqlens cu_seqlens_q cu_seqlens_k cu_seqlens_kv cu_seq_lens cu_seq_lens_q cu_seq_lens_k"
LONGEST = "max_seqlen max_seqlen_q max_seqlen_k max_seqlen_kv max_length_q max_length_k"
CACHES = "cache past_key_value past_key_values kv_cache use_cache"

# Arguments by which a call is known.
VECTORS, GAUSSIANS, PADDED, PACKED, CACHED = "q", "q_mean", "lengths padding_side", "cu_seqlens align", "cache"
MODULE, FORWARD, ANY = "embed_dim", "x", ""  # to make a module, to call it or one of its methods on x
CACHE, MAKE_CACHE, REFINE = "capacity heads", "batch capacity", "max_positions"

OF_MODULE = "is an argument of RefinedMultiheadAttention itself"
OF_STEPS = "is an argument of refined_attention_prefill and refined_attention_step"
GIVE_LENGTHS = "give the numbers of real items as lengths, which are (~mask).sum(1) of a mask that is True at padding"
NO_MASKS = "masks of scores are not supported, as the kernels know only order and padding"

# Names, arguments that the call must have, what to write. The first line that fits is used.
HABITS = [
    ("is_causal causal_mask", "causal", "it is called causal, and is True unless you say otherwise"),
    ("is_causal causal", CACHED, "decoding is always causal"),
    ("is_causal causal", MAKE_CACHE, "decoding is always causal"),
    ("is_causal causal", REFINE, "the attention of a decoder is always causal"),
    ("is_causal causal", FORWARD, f"causal {OF_MODULE}, True unless you say otherwise"),
    ("num_heads n_heads num_attention_heads nhead", CACHE, "it is called heads"),
    ("num_kv_heads num_key_value_heads n_kv_heads num_heads_k enable_gqa", CACHE, "grouped-query heads are called kv_heads"),
    ("head_size dim_head d_head embed_dim hidden_size", CACHE, "give head_dim, which is embed_dim / num_heads"),
    ("v_head_dim head_dim_v value_head_dim", CACHE, "it is called value_dim"),
    ("num_layers num_hidden_layers n_layers layer_idx", MAKE_CACHE, "a cache belongs to one layer: make one for each layer"),
    (f"{SCALES} softmax_scale", CACHE, f"softmax_scale {OF_STEPS}"),
    ("refine_scale", CACHE, f"refine_scale {OF_STEPS}"),
    ("gate", CACHE, f"gate {OF_STEPS}"),
    ("align", CACHE, f"align {OF_STEPS}"),
    (f"{PADDING_MASKS} lengths padding_side", CACHE, "lengths and padding_side are arguments of refined_attention_prefill"),
    (f"{PADDING_MASKS} lengths padding_side", MAKE_CACHE, "lengths and padding_side are arguments of the method prefill"),
    ("device", MAKE_CACHE, "the cache is on the device of the module"),
    ("refinement tables rank heads kv_heads num_heads num_kv_heads head_dim", MAKE_CACHE, "the cache takes it from the module"),
    (f"{LONGEST} max_len max_length max_seq_len max_cache_len", MAKE_CACHE, "the number of positions is called capacity"),
    ("r lora_r table_rank", REFINE, "it is called rank"),
    ("layer_ids layer_indices layers_to_transform num_layers num_hidden_layers", REFINE, "give layers, the indices of the layers"),
    ("max_len max_length max_seq_len max_position_embeddings", REFINE, "it is called max_positions"),
    ("gate_init", REFINE, "a learned gate starts at 0; gate=False fixes it at 1"),
    ("backend", REFINE, "refined layers run the kernels on a GPU that has them, and plain torch elsewhere"),
    (SCALES, "softmax_scale", "the factor of scores is called softmax_scale"),
    (
        f"{SCALES} softmax_scale",
        ANY,
        "the module scales scores by 1 / sqrt(embed_dim / num_heads); the call refined_attention takes softmax_scale",
    ),
    ("enable_gqa", MODULE, "grouped-query heads need no flag: give num_kv_heads"),
    ("enable_gqa", FORWARD, f"grouped-query heads need no flag: num_kv_heads {OF_MODULE}"),
    ("enable_gqa", ANY, "grouped-query heads need no flag: keys and values may have fewer heads, a divisor of the queries' number"),
    (WEIGHTS, MODULE, "the module returns only its output; its method weights returns the weights of each head"),
    (WEIGHTS, FORWARD, "the module returns only its output; its method weights returns the weights of each head"),
    (WEIGHTS, GAUSSIANS, "only outputs are returned; stochastic_attention_weights(...) returns the weights of each head"),
    (WEIGHTS, ANY, "only the output is returned; attention_weights(...) returns the weights of each head"),
    (
        PADDING_MASKS,
        PADDED,
        f"{GIVE_LENGTHS}, and padding_side",
    ),
    (f"{PADDING_MASKS} lengths", PACKED, "packed sequences have no padding, and cu_seqlens says where they end"),
    (PADDING_MASKS, "key_padding_mask", "it is called key_padding_mask, True at padding"),
    (PADDING_MASKS, "x lengths", GIVE_LENGTHS),
    (f"{PADDING_MASKS} lengths", MODULE, "padding is an argument of the module when it is called: key_padding_mask or lengths"),
    (
        MASKS,
        "key_padding_mask",
        f"{NO_MASKS}: give key_padding_mask, True at padding, or lengths; causal {OF_MODULE}",
    ),
    (MASKS, f"{PADDED} causal", f"{NO_MASKS}: give causal, lengths and padding_side"),
    (MASKS, PADDED, f"{NO_MASKS}: give lengths and padding_side"),
    (MASKS, "x lengths", f"{NO_MASKS}: give lengths"),
    (MASKS, PACKED, f"{NO_MASKS}: give causal and cu_seqlens"),
    (MASKS, ANY, NO_MASKS),
    (
        "window window_size sliding_window local_window_size",
        ANY,
        "sliding windows are not supported, as every position attends to its whole sequence: cut sequences to their last items",
    ),
    ("bias", FORWARD, f"bias {OF_MODULE}"),
    (
        BIASES,
        ANY,
        "nothing can be added to scores, as the kernels compute them from queries and keys: positions enter through w_q and w_k",
    ),
    ("softcap logits_soft_cap", ANY, "scores cannot be capped"),
    (DROPOUTS, "dropout_p", "it is called dropout_p, and applies whenever it is not 0: give 0.0 in evaluation"),
    (DROPOUTS, MODULE, "it is called dropout, and applies in training only"),
    (f"{DROPOUTS} dropout_seed", CACHED, "decoding has no dropout"),
    (DROPOUTS, FORWARD, f"dropout {OF_MODULE}"),
    (f"{DROPOUTS} dropout_seed", "causal w_q", "the weights are those without dropout"),
    ("seed generator", "dropout_seed", "give dropout_seed, an int or a tensor; without it torch.manual_seed decides"),
    ("deterministic", ANY, "results always repeat bit for bit, so there is nothing to switch on"),
    (BOUNDS, "cu_seqlens", "queries and keys are of the same sequences: give their bounds once, as cu_seqlens"),
    (LONGEST, "max_seqlen", "queries and keys are of the same sequences: give the longest once, as max_seqlen"),
    (f"{BOUNDS} {LONGEST}", FORWARD, "packed sequences go to the module itself, not to its methods"),
    (f"{BOUNDS} {LONGEST}", f"{GAUSSIANS} {PADDED}", "packed sequences go to stochastic_refined_attention_varlen"),
    (f"{BOUNDS} {LONGEST}", f"causal {PADDED}", "packed sequences go to refined_attention_varlen"),
    ("seq_lens seqlens sequence_lengths valid_lens", "lengths", "the numbers of real items are called lengths"),
    (CACHES, MODULE, "the methods make_cache, prefill and step decode with a cache"),
    (CACHES, CACHED, "it is called cache, a RefinedCache"),
    (CACHES, FORWARD, "the methods make_cache, prefill and step decode with a cache"),
    (CACHES, "causal", "refined_attention_prefill and refined_attention_step decode with a cache"),
    (f"{PADDING_MASKS} lengths padding_side", CACHED, "the cache knows where the items of each entry lie"),
    ("align padding_side", FORWARD, f'align {OF_MODULE}: "right" expects padding on the left'),
    ("backend refinement rank gate refine_scale", FORWARD, f"it {OF_MODULE}"),
    ("batch_first", FORWARD, "x is of shape (B, L, E)"),
    ("batch_first", PACKED, "there is no batch dimension: queries are of shape (T, H, D)"),
    ("batch_first", ANY, "the batch always comes first: queries are of shape (B, H, L, D)"),
    ("kdim vdim add_bias_kv add_zero_attn", MODULE, "self-attention takes keys and values from x"),
    ("num_key_value_heads n_kv_heads kv_heads", MODULE, "it is called num_kv_heads"),
    (f"{LONGEST} maxlen max_length max_seq_len max_position_embeddings", MODULE, "it is called max_len"),
    ("qkv_bias use_bias", MODULE, "it is called bias"),
    ("rank", "w_q", "the rank is the number of columns of w_q and w_k"),
    ("impl implementation attn_implementation", "backend", "it is called backend"),
]


def own_signature(function: F) -> F:
    """The function itself, which says to whoever asks that it takes its named arguments and no others."""
    own = inspect.signature(function)
    named = [each for each in own.parameters.values() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    setattr(function, "__signature__", own.replace(parameters=named))  # noqa: B010  # a function has no such attribute for mypy
    return function


def refuse(function: Callable[..., Any], unknown: dict[str, Any]) -> NoReturn:
    """Raise TypeError for the first of these keywords, which a function with `own_signature` does not have."""
    own = [name for name in inspect.signature(function).parameters if name != "self"]
    name, called = next(iter(unknown)), function.__qualname__.removesuffix(".__init__")
    raise TypeError(f"{called} has no argument {name}: {advice(name, own)}")


def advice(name: str, own: list[str]) -> str:
    """What to write instead of `name` in a call with the arguments `own`."""
    for names, needs, sentence in HABITS:
        if name in names.split() and set(needs.split()) <= set(own):
            return sentence
    close = get_close_matches(name, own, 1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else f"its arguments are {', '.join(own)}"
