"""Names that people bring from torch and flash-attention: every public call says what to write instead, and shows its own names."""

import inspect
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import awrsr_kernels
from awrsr_kernels import RefinedCache, RefinedMultiheadAttention, habits, refined_attention_varlen

CALLS = {name: getattr(awrsr_kernels, name) for name in awrsr_kernels.__all__ if "attention" in name}
METHODS = {RefinedMultiheadAttention: "forward weights make_cache prefill step", RefinedCache: "grow reorder crop"}
for kind, names in METHODS.items():
    CALLS |= {kind.__name__: kind.__init__} | {f"{kind.__name__}.{name}": getattr(kind, name) for name in names.split()}
if find_spec("transformers"):
    from awrsr_kernels.integrations.transformers import refine

    CALLS["refine"] = refine
NO_MASK, NO_BIAS = "masks of scores are not supported.* give causal", "nothing can be added to scores"
WEIGHTS, PACKED = r"\battention_weights\(", "packed sequences go to refined_attention_varlen"

OF_CALLS: dict[str, dict[str, str]] = {
    "refined_attention": {
        "is_causal": "it is called causal",
        "attn_mask": f"{NO_MASK}, lengths and padding_side",
        "key_padding_mask": r"as lengths, which are \(~mask\).sum\(1\)",
        "scale": "called softmax_scale",
        "enable_gqa": "need no flag",
        "need_weights": WEIGHTS,
        "average_attn_weights": WEIGHTS,
        "return_attn_probs": WEIGHTS,
        "window": "sliding windows are not supported",
        "window_size": "sliding windows are not supported",
        "bias": NO_BIAS,
        "alibi_slopes": NO_BIAS,
        "dropout": "it is called dropout_p",
        "deterministic": "bit for bit",
        "cu_seqlens_q": PACKED,
        "max_seqlen_q": PACKED,
        "batch_first": "the batch always comes first",
    },
    "refined_attention_varlen": {
        "cu_seqlens_q": "give their bounds once, as cu_seqlens",
        "max_seqlen_k": "give the longest once, as max_seqlen",
        "lengths": "packed sequences have no padding",
        "attn_mask": f"{NO_MASK} and cu_seqlens",
    },
    "attention_weights": {"dropout_p": "without dropout", "scale": "softmax_scale"},
    "stochastic_refined_attention": {"need_weights": "stochastic_attention_weights", "cu_seqlens": "stochastic_.*_varlen"},
    "refined_attention_prefill": {"causal": "always causal", "attn_mask": "give lengths and padding_side"},
    "refined_attention_step": {"is_causal": "always causal", "past_key_value": "called cache", "lengths": "the cache knows"},
    "RefinedMultiheadAttention": {
        "is_causal": "called causal",
        "dropout_p": "called dropout",
        "scale": r"1 / sqrt\(embed_dim / num_heads\)",
        "enable_gqa": "give num_kv_heads",
        "key_padding_mask": "when it is called",
        "max_seq_len": "called max_len",
        "alibi_slopes": NO_BIAS,
    },
    "RefinedMultiheadAttention.forward": {
        "return_attention": "its method weights",
        "src_mask": "give key_padding_mask, True at padding, or lengths",
        "bias": "bias is an argument of RefinedMultiheadAttention itself",
        "cu_seqlens_q": "as cu_seqlens",
        "backend": "is an argument of RefinedMultiheadAttention itself",
    },
    "RefinedMultiheadAttention.weights": {
        "key_padding_mask": r"as lengths, which are \(~mask\).sum\(1\)",
        "attn_mask": "not supported.* give lengths",
        "is_causal": "causal is an argument of RefinedMultiheadAttention itself",
        "average_attn_weights": "the weights of each head",
        "padding_side": "align is an argument of RefinedMultiheadAttention itself",
        "cu_seqlens": "go to the module itself",
    },
    "RefinedMultiheadAttention.make_cache": {
        "device": "on the device of the module",
        "num_heads": "takes it from the module",
        "max_length": "called capacity",
        "lengths": "arguments of the method prefill",
        "num_layers": "one for each layer",
    },
    "RefinedMultiheadAttention.prefill": {
        "key_padding_mask": r"as lengths, which are \(~mask\).sum\(1\).*padding_side",
        "past_key_value": "called cache",
        "is_causal": "always causal",
        "align": "align is an argument of RefinedMultiheadAttention itself",
        "dropout_p": "decoding has no dropout",
        "cu_seqlens": "go to the module itself",
    },
    "RefinedMultiheadAttention.step": {
        "lengths": "the cache knows",
        "past_key_values": "called cache",
        "causal": "always causal",
        "scale": r"1 / sqrt\(embed_dim / num_heads\)",
    },
    "RefinedCache": {
        "num_heads": "called heads",
        "num_kv_heads": "called kv_heads",
        "enable_gqa": "called kv_heads",
        "embed_dim": "give head_dim",
        "max_seqlen": "called capacity",
        "is_causal": "always causal",
        "scale": "softmax_scale is an argument of refined_attention_prefill and refined_attention_step",
        "align": "an argument of refined_attention_prefill and refined_attention_step",
        "padding_side": "arguments of refined_attention_prefill",
        "num_hidden_layers": "one for each layer",
    },
    "RefinedCache.crop": {"lenght": "did you mean length"},
    "refine": {
        "r": "called rank",
        "num_layers": "the indices of the layers",
        "max_position_embeddings": "called max_positions",
        "is_causal": "always causal",
        "gate_init": "starts at 0",
        "backend": "plain torch elsewhere",
    },
}


def refused(call: str, **unknown: Any) -> str:
    """What a call says that is given everything it needs, and more."""
    function = CALLS[call]
    needed = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    with pytest.raises(TypeError) as error:
        function(*(None for each in needed if each.kind is each.POSITIONAL_OR_KEYWORD), **unknown)
    return str(error.value)


@pytest.mark.parametrize("call, name", [(call, name) for call, names in OF_CALLS.items() if call in CALLS for name in names])
def test_a_name_from_elsewhere_is_told_what_to_write(call: str, name: str) -> None:
    said = refused(call, **{name: True})
    assert said.startswith(f"{call} has no argument {name}: ") and re.search(OF_CALLS[call][name], said), said


@pytest.mark.parametrize("name, instead", [("lenghts", "lengths"), ("refine_scales", "refine_scale"), ("refinment", "refinement")])
def test_a_slip_of_the_fingers_is_told_the_nearest_name(name: str, instead: str) -> None:
    assert refused("refined_attention", **{name: None}) == f"refined_attention has no argument {name}: did you mean {instead}?"


def test_a_name_like_no_other_is_told_all_of_them() -> None:
    assert refused("refined_attention_step", zzz=1).endswith(
        "zzz: its arguments are q, k, v, w_q, w_k, cache, align, gate, lags, shift, plain_heads, softmax_scale, refine_scale, "
        "backend"
    )


def test_packed_bounds_by_another_name_are_told_though_their_own_is_missing() -> None:
    x = torch.randn(5, 2, 4)
    with pytest.raises(TypeError, match="has no argument cu_seqlens_q: .*as cu_seqlens"):
        refined_attention_varlen(x, x, x, None, None, cu_seqlens_q=[0, 5], cu_seqlens_k=[0, 5])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cu_seqlens is NoneType; it must be a torch.Tensor"):
        refined_attention_varlen(x, x, x, None, None, refinement="none")


def test_sizes_of_a_cache_by_another_name_are_told_though_their_own_are_missing() -> None:
    with pytest.raises(TypeError, match="RefinedCache has no argument num_heads: it is called heads"):
        RefinedCache(2, 4, num_heads=2, head_dim=8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="heads is NoneType; it must be an int"):
        RefinedCache(2, 4, head_dim=8, refinement="none")
    cache = RefinedCache(2, 4, heads=2, head_dim=8, refinement="none")
    for call, needed in ((cache.grow, "capacity"), (cache.reorder, "index"), (cache.crop, "length")):
        with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{needed}'"):
            call(max_length=1)


def test_arguments_of_the_call_in_torchs_place_are_refused_in_the_call_of_x_alone() -> None:
    module, x = RefinedMultiheadAttention(8, 2, max_len=4), torch.randn(1, 4, 8)
    for name, value in (("need_weights", False), ("attn_mask", torch.zeros(4, 4)), ("is_causal", True)):
        with pytest.raises(ValueError, match=rf"{name} is given; it must be left out unless module\(x, x, x\) is called"):
            module(x, **{name: value})
    with pytest.raises(TypeError, match="missing its argument x"):
        module(lengths=torch.tensor([3]))


def test_options_of_from_multihead_are_told_too() -> None:
    mha = torch.nn.MultiheadAttention(8, 2)
    with pytest.raises(TypeError, match="RefinedMultiheadAttention has no argument kdim"):
        RefinedMultiheadAttention.from_multihead(mha, refinement="none", kdim=8)
    with pytest.raises(ValueError, match="batch_first is True; it must be left out: it comes from mha"):
        RefinedMultiheadAttention.from_multihead(mha, refinement="none", batch_first=True)


@pytest.mark.parametrize("call", CALLS)
def test_who_asks_for_arguments_sees_the_real_ones(call: str) -> None:
    kinds = {each.kind for each in inspect.signature(CALLS[call]).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert list(inspect.signature(RefinedMultiheadAttention).parameters)[:2] == ["embed_dim", "num_heads"]


def test_every_line_of_advice_is_said_by_some_call() -> None:
    own = [[name for name in inspect.signature(call).parameters if name != "self"] for call in CALLS.values()]
    for names, needs, sentence in habits.HABITS:
        for name in names.split():
            if any(name not in each and habits.advice(name, each) == sentence for each in own):
                break
        else:
            raise AssertionError(f"no call says {sentence!r}, which needs {needs!r}")


def test_a_graph_and_an_exported_program_see_no_unknown_arguments() -> None:
    module, x = RefinedMultiheadAttention(8, 2, max_len=4, backend="torch"), torch.randn(2, 4, 8)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))
    program = torch.export.export(module, (x,), {"lengths": torch.tensor([2, 4])}, strict=False)
    assert [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"] == ["x", "lengths"]


def test_compiled_methods_see_no_unknown_arguments() -> None:
    module, x = RefinedMultiheadAttention(8, 2, tables="content", backend="torch").eval(), torch.randn(2, 4, 8)
    compiled = {
        name: torch.compile(getattr(module, name), fullgraph=True, backend="eager") for name in ("weights", "prefill", "step")
    }
    with torch.no_grad():
        torch.testing.assert_close(compiled["weights"](x), module.weights(x))
        mine, its = module.make_cache(2, 8), module.make_cache(2, 8)
        torch.testing.assert_close(compiled["prefill"](x, mine), module.prefill(x, its))
        torch.testing.assert_close(compiled["step"](x[:, :1], mine), module.step(x[:, :1], its))
