"""RefinedMultiheadAttention: what it computes, in which forms it takes a batch, what it keeps of torch's own module."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awrsr_kernels import RefinedMultiheadAttention, attention_weights, refined_attention

from ..conftest import DEVICE, ENGINES, cumulative

B, L, E, H = 3, 7, 12, 3
LENGTHS = [7, 2, 4]
KINDS = [("none", "position"), ("simple", "position"), ("value", "content"), ("additive", "position"), ("additive", "content")]


def make(refinement: str = "additive", tables: str = "position", **options: Any) -> RefinedMultiheadAttention:
    """In float64, with every parameter away from where it starts."""
    usual = {"max_len": 9, "rank": 5, "dtype": torch.float64, "device": DEVICE}
    module = RefinedMultiheadAttention(E, H, **usual | {"refinement": refinement, "tables": tables} | options)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return module


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def padded(x: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) masks, True at padding and at items, of LENGTHS."""
    lengths, place = torch.tensor(LENGTHS, device=DEVICE)[:, None], torch.arange(L, device=DEVICE)
    real = place >= L - lengths if side == "left" else place < lengths
    return ~real, real


def test_computes_the_operator_between_linear_maps() -> None:
    module, x = make(per_head=True), draw(B, L, E)
    q, k, v = (a.unflatten(-1, (H, -1)).transpose(1, 2) for a in module.qkv(x).chunk(3, -1))
    assert module.w_q is not None and module.w_k is not None
    out = refined_attention(q, k, v, module.w_q[:, -L:], module.w_k[:, -L:], refinement="additive", gate=module.gate)
    torch.testing.assert_close(module(x), module.out(out.transpose(1, 2).flatten(-2)))
    first, refined = attention_weights(q, k, module.w_q[:, -L:], module.w_k[:, -L:], refinement="additive", gate=module.gate)
    torch.testing.assert_close(module.weights(x), (first, refined))


@pytest.mark.parametrize("align", ["left", "right"])
def test_weights_know_padding(align: str) -> None:
    module, x = make(align=align), draw(B, L, E)
    _, real = padded(x, "left" if align == "right" else "right")
    found = module.weights(x, lengths=torch.tensor(LENGTHS, device=DEVICE))
    for b in range(B):
        alone = module.weights(x[b : b + 1, real[b]])
        for whole, part in zip(found, alone, strict=True):
            torch.testing.assert_close(whole[b][:, real[b]][:, :, real[b]], part[0])
            assert not whole[b][:, ~real[b]].any()


@pytest.mark.parametrize("call", ["padded", "packed", "decoded"])
def test_the_refine_scale_is_passed_on(call: str) -> None:
    found = []
    for scale in (0.3, 3.0):
        torch.manual_seed(1)
        module, x = make(align="left", refine_scale=scale, gate=False).eval(), draw(1, L, E)
        with torch.no_grad():
            cache = module.make_cache(1, L)
            padded_out = module(x)
            outs = {"padded": padded_out, "packed": module(x[0], cu_seqlens=cumulative([L]))[None]}
            if call == "decoded":
                outs[call] = torch.cat([module.prefill(x[:, :-1], cache), module.step(x[:, -1:], cache)], 1)
        torch.testing.assert_close(outs[call], padded_out)
        found.append(padded_out)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padded_packed_and_jagged_batches_agree(kind: tuple[str, str], per_head: bool, align: str) -> None:
    more = {"lags": 2, "shift": True, "plain_heads": 1} if kind[0] == "additive" and per_head else {}
    module = make(*kind, per_head=per_head, learned_scale=not per_head, align=align, num_kv_heads=1, **more)
    side = "left" if align == "right" else "right"
    x, lengths = draw(B, L, E), torch.tensor(LENGTHS, device=DEVICE)
    _, real = padded(x, side)
    expected = torch.cat([module(x[b : b + 1, real[b]])[0] for b in range(B)])  # each sequence alone
    torch.testing.assert_close(module(x, lengths=lengths)[real], expected)
    packed = x[real]
    torch.testing.assert_close(module(packed, cu_seqlens=cumulative(LENGTHS)), expected)
    jagged = torch.nested.nested_tensor_from_jagged(packed, cumulative(LENGTHS).long())
    out = module(jagged)
    torch.testing.assert_close(out.values(), expected)
    assert (jagged + out).shape == jagged.shape  # one ragged structure: a residual is legal


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("align", ["left", "right"])
def test_a_mask_may_pad_on_either_side(side: str, align: str) -> None:
    module, x = make(align=align), draw(B, L, E)
    mask, real = padded(x, side)
    expected = torch.cat([module(x[b : b + 1, real[b]])[0] for b in range(B)])
    x[mask] = torch.nan  # nobody looks
    torch.testing.assert_close(module(x, key_padding_mask=mask)[real], expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")  # cannot read the mask
    torch.testing.assert_close(compiled(x, key_padding_mask=mask)[real], expected)


@pytest.mark.parametrize("align", ["left", "right"])
def test_masks_of_any_size_share_a_graph_and_a_program(align: str) -> None:
    torch._dynamo.reset()
    module, graphs = RefinedMultiheadAttention(E, H, max_len=40, align=align, device=DEVICE).eval(), []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def given(batch: int, length: int) -> tuple[Tensor, dict[str, Tensor]]:
        mask = torch.zeros(batch, length, dtype=torch.bool, device=DEVICE)
        mask[0, :2] = True
        return torch.randn(batch, length, E, device=DEVICE), {"key_padding_mask": mask}

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=count)
    longest = 40 if DEVICE == "cpu" else 32  # the kernels have a graph for short sequences and one for long ones
    batch, length = torch.export.Dim("B"), torch.export.Dim("L", min=3, max=longest)
    x, where = given(3, 9)
    sizes = {0: batch, 1: length}
    with torch.no_grad():
        dynamic = {"x": sizes, "key_padding_mask": sizes}
        program = torch.export.export(module, (x,), kwargs=where, dynamic_shapes=dynamic).module()
        for size in ((2, 9), (5, 14), (3, 17)):
            x, where = given(*size)
            torch.testing.assert_close(compiled(x, **where), module(x, **where))
            torch.testing.assert_close(program(x, **where), module(x, **where))
    assert len(graphs) == 1


class Wrapped(nn.Module):
    """As adapters of weights wrap a linear map: no `weight`."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_linear_maps_may_be_replaced() -> None:
    module, x = make(align="left").eval(), draw(B, L, E)
    expected = module(x)
    module.qkv = Wrapped(module.qkv)
    assert module(x).equal(expected)
    with torch.no_grad():
        torch.testing.assert_close(module.prefill(x, module.make_cache(B, L)), expected)


@pytest.mark.parametrize("refine_scale", [0.0, -1.3])
def test_prompts_take_scales_of_any_sign(refine_scale: float) -> None:
    """With as many columns as features, where torch's own attention may serve."""
    module, x = make(align="left", refinement="simple", rank=E // H, refine_scale=refine_scale).eval(), draw(B, L, E)
    with torch.no_grad():
        torch.testing.assert_close(module.prefill(x, module.make_cache(B, L)), module(x))


@pytest.mark.skipif(DEVICE != "cpu", reason="such linear maps are a CPU's")
@pytest.mark.parametrize("refinement", ["none", "additive"])
def test_quantized_linear_maps_serve(refinement: str) -> None:
    module, x = make(align="left", refinement=refinement, table_std=1.0, dtype=torch.float32).eval(), draw(B, L, E).float()
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    torch.testing.assert_close(quantized(x), module(x), rtol=0, atol=0.3)
    with torch.no_grad():
        torch.testing.assert_close(quantized.prefill(x, quantized.make_cache(B, L)), quantized(x))


def test_a_bound_that_is_too_small_is_named() -> None:
    if DEVICE != "cpu":
        pytest.skip("lengths are read on the CPU only")
    with pytest.raises(ValueError, match=r"\bmax_seqlen\b is 2; it must be at least the longest sequence"):
        make()(draw(L, E), cu_seqlens=cumulative([L]), max_seqlen=2)


@pytest.mark.skipif(DEVICE != "cpu", reason="lengths are read on the CPU alone")
def test_more_items_than_max_len_name_it() -> None:
    module = make(align="left", max_len=L)
    with pytest.raises(ValueError, match=rf"\bw_q\b is of {L} rows; .*max_len of RefinedMultiheadAttention"):
        module(draw(L + 1, E), cu_seqlens=cumulative([L + 1]))
    cache = module.make_cache(1, L)
    with torch.no_grad():
        module.prefill(draw(1, L, E), cache)
        with pytest.raises(ValueError, match=rf"\bw_q\b is of {L} rows; .*max_len of RefinedMultiheadAttention"):
            module.step(draw(1, 1, E), cache)


def test_a_wholly_padded_sequence_gives_the_bias() -> None:
    module, x = make(), draw(2, L, E)
    out = module(x, key_padding_mask=torch.tensor([[True] * L, [False] * L], device=DEVICE))
    torch.testing.assert_close(out[0], module.out.bias.expand(L, E))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_decoding_gives_the_rows_of_the_full_call(kind: tuple[str, str], side: str) -> None:
    more = {"lags": 2, "shift": True, "plain_heads": 1} if kind[0] == "additive" and side == "left" else {}
    module = make(*kind, align="left", num_kv_heads=1, dropout=0.5, learned_scale=side == "left", **more).eval()
    x = draw(B, L, E)
    mask, real = padded(x, side)
    new = draw(B, 2, E)
    with torch.no_grad():
        cache = module.make_cache(B, 8)
        out = module.prefill(x, cache, lengths=torch.tensor(LENGTHS, device=DEVICE), padding_side=side)
        torch.testing.assert_close(out, module(x, key_padding_mask=mask))
        rows = torch.cat([module.step(new[:, i : i + 1], cache) for i in range(2)], 1)
        for b in range(B):
            alone = torch.cat([x[b, real[b]], new[b]])[None]
            torch.testing.assert_close(rows[b], module(alone)[0, -2:])


def test_prompts_are_padded_where_the_module_expects_it() -> None:
    module, x, lengths = make(tables="content", align="right"), draw(B, L, E), torch.tensor(LENGTHS, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(module.prefill(x, module.make_cache(B, L), lengths=lengths), module(x, lengths=lengths))


@pytest.mark.parametrize("other", [{"refinement": "simple"}, {"tables": "content"}], ids=str)
def test_the_cache_of_another_module_is_refused(other: dict) -> None:
    cache = make(align="left", **other).make_cache(B, L)
    with pytest.raises(ValueError, match=r"\bcache\b is for .*must be for additive, tables position"), torch.no_grad():
        make(align="left").prefill(draw(B, L, E), cache)


def test_decodes_under_autocast() -> None:
    module = RefinedMultiheadAttention(E, H, max_len=L, align="left", device=DEVICE).eval()
    x = torch.randn(B, L, E, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        cache = module.make_cache(B, L)
        rows = torch.cat([module.prefill(x[:, :-1], cache), module.step(x[:, -1:], cache)], 1)
        assert cache.dtype == rows.dtype == torch.bfloat16
        torch.testing.assert_close(rows, module(x), rtol=2e-2, atol=2e-2)


def test_lags_shift_and_plain_heads_are_those_of_the_operator() -> None:
    module, x = make(lags=2, shift=True, plain_heads=1), draw(B, L, E)
    assert module.lags is not None and module.lags.shape == (H, 2) and "lags" in module.state_dict()
    assert RefinedMultiheadAttention(E, H, max_len=L, lags=2).lags.tolist() == [[0.5, 0.25]] * H
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), module(x))
    older = RefinedMultiheadAttention(E, H, max_len=L, device=DEVICE)
    del older.__dict__["lags"], older.__dict__["shift"], older.__dict__["plain_heads"]  # as pickled before there were any
    assert older(draw(1, L, E).float()).shape == (1, L, E)
    q, k, v = (a.unflatten(-1, (H, -1)).transpose(1, 2) for a in module.qkv(x).chunk(3, -1))
    options = {"gate": module.gate, "lags": module.lags, "shift": True, "plain_heads": 1, "refinement": "additive"}
    out = refined_attention(q, k, v, module.w_q[-L:], module.w_k[-L:], **options)
    torch.testing.assert_close(module(x), module.out(out.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("options,name", [({"align": "right"}, "align"), ({"align": "left", "causal": False}, "causal")])
def test_what_cannot_decode_says_so(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b is .*must be .*for decoding"):
        make(**options).make_cache(B, L)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("refinement,tables", [("none", "position"), ("additive", "position"), ("additive", "content")])
def test_from_multihead_reproduces_it(refinement: str, tables: str, causal: bool, bias: bool) -> None:
    mha = nn.MultiheadAttention(E, H, batch_first=True, bias=bias, dropout=0.2, device=DEVICE).eval()
    before, x = copy.deepcopy(mha.state_dict()), torch.randn(B, L, E, device=DEVICE)
    module = RefinedMultiheadAttention.from_multihead(mha, max_len=L, refinement=refinement, tables=tables, causal=causal)
    mask, real = padded(x, "right")
    future = torch.ones(L, L, dtype=torch.bool, device=DEVICE).triu(1) if causal else None
    expected, _ = mha(x, x, x, key_padding_mask=mask, attn_mask=future)
    torch.testing.assert_close(module(x, key_padding_mask=mask)[real], expected[real])
    assert not module.training and module.dropout == 0.2
    assert RefinedMultiheadAttention.from_multihead(mha.train(), max_len=L, refinement=refinement).training
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(1)
    for name, value in before.items():
        assert torch.equal(value, mha.state_dict()[name])  # nothing is shared


def test_what_is_frozen_stays_so() -> None:
    mha = nn.MultiheadAttention(E, H).requires_grad_(False)
    module = RefinedMultiheadAttention.from_multihead(mha, max_len=L, refinement="additive")
    assert {name for name, x in module.named_parameters() if x.requires_grad} == {"w_q", "w_k", "gate"}


def test_refinement_grows_from_nothing() -> None:
    module = RefinedMultiheadAttention(E, H, max_len=L, device=DEVICE)
    x, target = torch.randn(B, L, E, device=DEVICE), torch.randn(B, L, E, device=DEVICE)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert isinstance(module.gate, nn.Parameter) and module.w_q is not None and not module.gate.any()
    first = module.w_q.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        optimizer.step()
        assert module.gate.all() and torch.equal(first, module.w_q) == (step == 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_state_does_not_depend_on_the_backend(engine: str, choose: Callable[[str], str]) -> None:
    if engine != "torch" and DEVICE != "cpu":
        pytest.skip("needs the interpreter: the kernels have no float64 on a GPU")
    module, x = make(backend="reference"), draw(B, L, E)
    other = make(backend=choose(engine))
    assert set(module.state_dict()) == {"qkv.weight", "qkv.bias", "out.weight", "out.bias", "w_q", "w_k", "gate"}
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), module(x))


def test_dropout_falls_while_training_alone() -> None:
    module, x = make(dropout=0.5), draw(B, L, E)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_gate_may_be_fixed() -> None:
    x = draw(B, L, E)
    one, half = make(gate=False), make(gate=0.5)
    assert "gate" not in one.state_dict() and half.gate == 0.5
    half.load_state_dict(one.state_dict())
    first, refined = one.weights(x)
    torch.testing.assert_close(half.weights(x)[1], (first + refined) / 2)


@pytest.mark.parametrize(
    "change,name,error",
    [
        ({"embed_dim": 13}, "embed_dim", ValueError),
        ({"num_heads": 0}, "num_heads", ValueError),
        ({"num_kv_heads": 2}, "num_kv_heads", ValueError),
        ({"num_kv_heads": 1.0}, "num_kv_heads", TypeError),
        ({"max_len": None}, "max_len", ValueError),
        ({"max_len": 0}, "max_len", ValueError),
        ({"rank": 257}, "rank", ValueError),
        ({"refinement": "stochastic"}, "refinement", ValueError),
        ({"tables": "learned"}, "tables", ValueError),
        ({"align": "top"}, "align", ValueError),
        ({"dropout": 1.0}, "dropout", ValueError),
        ({"causal": None}, "causal", TypeError),
        ({"gate": "open"}, "gate", TypeError),
        ({"gate": 0.5, "refinement": "simple"}, "gate", ValueError),
        ({"gate_init": 1.0, "refinement": "none"}, "gate_init", ValueError),
        ({"gate_init": float("nan")}, "gate_init", ValueError),
        ({"gate_init": None}, "gate_init", TypeError),
        ({"gate_init": 0.5, "gate": False}, "gate_init", ValueError),
        ({"gate": None}, "gate", TypeError),
        ({"table_std": -1.0}, "table_std", ValueError),
        ({"table_std": "1"}, "table_std", TypeError),
        ({"lags": 8}, "lags", ValueError),
        ({"lags": 1, "rank": 200}, "lags", ValueError),
        ({"shift": True, "causal": False}, "shift", ValueError),
        ({"plain_heads": H}, "plain_heads", ValueError),
        ({"table_init": "zeros"}, "table_init", ValueError),
        ({"learned_scale": 1}, "learned_scale", TypeError),
        ({"refine_scale": "1"}, "refine_scale", TypeError),
        ({"backend": "cuda"}, "backend", ValueError),
        ({"embed_dim": 1024}, "embed_dim", ValueError),
    ],
)
def test_a_wrong_option_is_named(change: dict, name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"\b{name}\b is .*must be"):
        RefinedMultiheadAttention(**{"embed_dim": E, "num_heads": H, "max_len": L} | change)


def test_content_tables_limit_no_length() -> None:
    assert make(tables="content", max_len=None)(draw(1, 40, E)).shape == (1, 40, E)


HOLES = torch.tensor([[False, True, False, False, False, False, False]] * B)


@pytest.mark.parametrize(
    "x,where,name,error",
    [
        ((B, L, E + 1), {}, "x", ValueError),
        ((B, 10, E), {}, "x", ValueError),
        ((L, E), {}, "x", ValueError),
        ((B, L, E), {"cu_seqlens": [L] * B}, "x", ValueError),
        ((B * L, E), {"cu_seqlens": [L] * B, "lengths": LENGTHS}, "lengths", ValueError),
        ((B, L, E), {"lengths": [L + 1] * B}, "lengths", ValueError),
        ((B, L, E), {"lengths": LENGTHS, "key_padding_mask": ~HOLES}, "lengths", ValueError),
        ((B, L, E), {"key_padding_mask": HOLES}, "key_padding_mask", ValueError),
        ((B, L, E), {"key_padding_mask": HOLES[:1]}, "key_padding_mask", ValueError),
        ((B, L, E), {"key_padding_mask": HOLES.float()}, "key_padding_mask", TypeError),
        ((B, L, E), {"key_padding_mask": [False]}, "key_padding_mask", TypeError),
        ((B, 0, E), {}, "x", ValueError),
        ((B, L, E), {"max_seqlen": 2}, "max_seqlen", ValueError),
        ("float32", {}, "x", TypeError),
        ("jagged", {"lengths": LENGTHS}, "lengths", ValueError),
        ("jagged", {"max_seqlen": 3}, "max_seqlen", ValueError),
        ("wide", {}, "x", ValueError),
        ("strided", {}, "x", TypeError),
    ],
)
def test_a_wrong_input_is_named(x: Any, where: dict, name: str, error: type[Exception]) -> None:
    if DEVICE != "cpu" and (where.get("key_padding_mask") is HOLES or where == {"lengths": [L + 1] * B}):
        pytest.skip("values are read on the CPU only")
    nested = torch.nested.nested_tensor
    special = {
        "float32": lambda: draw(B, L, E).float(),
        "jagged": lambda: nested([draw(2, E), draw(3, E)], layout=torch.jagged),
        "wide": lambda: nested([draw(2, E + 1), draw(3, E + 1)], layout=torch.jagged),
        "strided": lambda: nested([draw(2, E), draw(3, E)], layout=torch.strided),
    }
    given = special[x]() if isinstance(x, str) else draw(*x)
    lists = {"cu_seqlens": cumulative, "lengths": lambda n: torch.tensor(n, device=DEVICE)}
    where = {key: lists[key](value) if isinstance(value, list) and key in lists else value for key, value in where.items()}
    where = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in where.items()}
    with pytest.raises(error, match=rf"\b{name}\b is .*must be"):
        make()(given, **where)


@pytest.mark.parametrize("options", [{"kdim": 5}, {"vdim": 5}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_a_multihead_attention_that_cannot_be_taken_over_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"\bmha\b is with .*must be without"):
        RefinedMultiheadAttention.from_multihead(nn.MultiheadAttention(E, H, **options), max_len=L, refinement="none")
    with pytest.raises(ValueError, match=r"\bnum_kv_heads\b is 1; it must be left out"):
        RefinedMultiheadAttention.from_multihead(nn.MultiheadAttention(E, H), max_len=L, refinement="none", num_kv_heads=1)
    with pytest.raises(TypeError, match=r"\bmha\b is Linear"):
        RefinedMultiheadAttention.from_multihead(nn.Linear(E, E), max_len=L, refinement="none")  # type: ignore[arg-type]


def test_an_exported_module_takes_other_batches_and_lengths() -> None:
    module, x = make().eval(), draw(5, L, E)
    open_sizes = {"x": {0: torch.export.Dim("B"), 1: torch.export.Dim("L", min=2, max=9)}}
    with torch.no_grad():
        program = torch.export.export(module, (x[:3, :5].contiguous(),), dynamic_shapes=open_sizes).module()
        torch.testing.assert_close(program(x), module(x))
