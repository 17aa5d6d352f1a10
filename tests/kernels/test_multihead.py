"""RefinedMultiheadAttention in the place of torch.nn.MultiheadAttention: the self-attention cases of torch's own tests, and what
cannot be taken over."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from awrsr_kernels import RefinedMultiheadAttention

from ..conftest import DEVICE

E, H, B, L = 16, 4, 3, 7


def multihead(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    mha = nn.MultiheadAttention(E, H, **options).to(DEVICE)
    for bias in (mha.in_proj_bias, mha.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)  # torch begins with zeros, which would hide a bias that is lost
    return mha


def replaced(mha: nn.MultiheadAttention, **options: Any) -> RefinedMultiheadAttention:
    return RefinedMultiheadAttention.from_multihead(mha, **{"refinement": "additive", "max_len": 9} | options)


def causal_mask(dtype: torch.dtype = torch.float32) -> Tensor:
    if dtype == torch.bool:
        return torch.ones(L, L, dtype=torch.bool, device=DEVICE).triu(1)
    return nn.Transformer.generate_square_subsequent_mask(L, device=DEVICE, dtype=dtype)


def close(found: Any, wanted: Any, where: Any = ...) -> None:
    assert (found is None) == (wanted is None)
    if wanted is not None:
        assert found.shape == wanted.shape
        torch.testing.assert_close(found[where], wanted[where], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", ["first", "second", "none"])
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"need_weights": True, "average_attn_weights": False}], ids=str)
def test_outputs_weights_and_gradients_are_torchs(weights: dict[str, Any], batch: str, causal: bool) -> None:
    mha = multihead(batch_first=batch == "first")
    module = replaced(mha, causal=causal)
    x = torch.randn(*{"first": (B, L), "second": (L, B), "none": (L,)}[batch], E, device=DEVICE, requires_grad=True)
    given = weights | ({"attn_mask": causal_mask()} if causal else {})
    (found, found_weights), (wanted, wanted_weights) = (each(x, x, x, **given) for each in (module, mha))
    close(found, wanted)
    close(found_weights, wanted_weights)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, wanted)]
    close(*grads)


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_padding_on_either_side_in_bools_or_floats(kind: torch.dtype, side: str, align: str) -> None:
    mha = multihead(batch_first=True)
    module, x = replaced(mha, align=align), torch.randn(B, L, E, device=DEVICE)
    count = torch.tensor([L, 3, 5], device=DEVICE)[:, None]
    at = torch.arange(L, device=DEVICE)
    hidden = at >= count if side == "right" else at < L - count
    mask = hidden if kind == torch.bool else torch.zeros(B, L, device=DEVICE).masked_fill(hidden, -torch.inf)
    given: dict[str, Any] = {"key_padding_mask": mask, "attn_mask": causal_mask(kind), "average_attn_weights": False}
    (found, found_weights), (wanted, wanted_weights) = (each(x, x, x, **given) for each in (module, mha))
    close(found, wanted, ~hidden)
    close(found_weights.transpose(1, 2), wanted_weights.transpose(1, 2), ~hidden)
    alone, _ = module(x[0], x[0], x[0], key_padding_mask=mask[0], attn_mask=causal_mask(kind))
    close(alone, found[0])


def test_masks_are_taken_by_look_and_by_hint() -> None:
    module, x = replaced(multihead(batch_first=True)), torch.randn(B, L, E, device=DEVICE)
    wanted = module(x)
    per_head = causal_mask(torch.bool).expand(B * H, L, L)
    hint: dict[str, Any] = {"is_causal": True}
    for given in (hint, {"attn_mask": causal_mask()} | hint, {"attn_mask": per_head}, {"attn_mask": causal_mask(torch.bool)}):
        if DEVICE == "cpu" or "is_causal" in given:
            assert torch.equal(module(x, x, x, need_weights=False, **given)[0], wanted)
    lowest = torch.full((L, L), torch.finfo(torch.float32).min, device=DEVICE).triu(1)
    if DEVICE == "cpu":
        assert torch.equal(module(x, x, x, attn_mask=lowest, need_weights=False)[0], wanted)
    assert torch.equal(module(query=x, key=x, value=x, is_causal=True)[0], wanted)
    both_ways = replaced(multihead(batch_first=True), causal=False)
    nothing = torch.zeros(L, L, device=DEVICE)
    if DEVICE == "cpu":
        assert torch.equal(both_ways(x, x, x, attn_mask=nothing)[0], both_ways(x))


def test_what_is_not_this_modules_self_attention_is_refused() -> None:
    module, x = replaced(multihead(batch_first=True)), torch.randn(B, L, E, device=DEVICE)
    both_ways, window = replaced(multihead(batch_first=True), causal=False), causal_mask(torch.bool)
    window[5, 0] = True

    def refused(message: str, call: Any, *args: Any, **given: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            call(*args, **given)

    refused("key is another tensor than query; it must be query itself: .* self-attention only", module, x, x.clone(), x)
    leaf = x.clone().requires_grad_()
    refused("key is another tensor than query", module, leaf, leaf.detach(), leaf)
    refused("value is None; it must be query itself", module, x, x)
    refused(r"attn_mask is None; it must be the causal mask, .* \(causal=True\)", module, x, x, x)
    refused(r"is_causal is True; it must be False .* \(causal=False\)", both_ways, x, x, x, is_causal=True)
    refused(r"attn_mask is of shape \(5, 5\); it must be \(L, L\)", module, x, x, x, attn_mask=causal_mask()[:5, :5])
    refused("lengths is given; it must be None beside key and value", module, x, x, x, lengths=torch.tensor([7, 7, 7]))
    refused("need_weights is 1; it must be True or False", module, x, x, x, is_causal=True, need_weights=1)
    if DEVICE == "cpu":
        refused("attn_mask is another mask; it must be the causal mask", module, x, x, x, attn_mask=window)
        refused("attn_mask is another mask", module, x, x, x, attn_mask=0.5 * torch.ones(L, L))
        refused("attn_mask is another mask; it must be None, or hide nothing", both_ways, x, x, x, attn_mask=causal_mask())
        refused("attn_mask is of torch.int64; it must be of bools or floats", module, x, x, x, attn_mask=torch.zeros(L, L).long())
        half = torch.zeros(B, L).fill_(0.5)
        refused("key_padding_mask is with other numbers", module, x, x, x, is_causal=True, key_padding_mask=half)
        holes = torch.tensor([[False, True] * 3 + [False]] * B)
        refused("key_padding_mask is with padding between items", module, x, x, x, is_causal=True, key_padding_mask=holes)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_an_encoder_keeps_its_results_when_its_attention_is_replaced(
    padded: bool, causal: bool, training: bool, batch_first: bool
) -> None:
    """In a layer that becomes an encoder, and in the layers of one that exists, for which torch may have planned nested tensors."""
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=batch_first, device=DEVICE)
    plain = nn.TransformerEncoder(layer, 2).train(training)
    replaced_later = copy.deepcopy(plain)
    for each in replaced_later.layers:
        each.self_attn = replaced(each.self_attn, causal=causal)  # type: ignore[union-attr]
    layer.self_attn = replaced(layer.self_attn, causal=causal)  # type: ignore[assignment]
    before = nn.TransformerEncoder(layer, 2).train(training)
    x = torch.randn(B, L, E, device=DEVICE)
    x = x if batch_first else x.transpose(0, 1)
    given: dict[str, Any] = {"mask": causal_mask(), "is_causal": True} if causal else {}
    hidden = torch.arange(L, device=DEVICE) >= torch.tensor([L, 3, 5], device=DEVICE)[:, None]
    given |= {"src_key_padding_mask": hidden} if padded else {}
    real = ~(hidden if batch_first else hidden.T) if padded else ...
    for record in (True, False):
        with torch.set_grad_enabled(record):
            wanted = plain(x, **given)
            close(replaced_later(x, **given), wanted, real)
            close(before(x, **given), wanted, real)
    single = before.layers[0]
    if causal and DEVICE == "cpu":  # found by look
        layer_given = {"src_mask": causal_mask(torch.bool), "src_key_padding_mask": given.get("src_key_padding_mask")}
        close(single(x, **layer_given), plain.layers[0](x, **layer_given), real)


def test_an_encoder_of_refined_layers_compiles_and_learns() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, device=DEVICE)
    layer.self_attn = RefinedMultiheadAttention(E, H, max_len=9, dropout=0.1, gate_init=0.5, device=DEVICE)  # type: ignore[assignment]
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, L, E, device=DEVICE)
    close(compiled(x, mask=causal_mask(), is_causal=True), model(x, mask=causal_mask(), is_causal=True))
    model.train()(x, mask=causal_mask(), is_causal=True).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_decoders_own_attention_can_be_replaced() -> None:
    torch.manual_seed(2)
    layer = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True, device=DEVICE)
    refined = copy.deepcopy(layer)
    refined.self_attn = replaced(layer.self_attn)  # type: ignore[assignment]
    x, memory = torch.randn(B, L, E, device=DEVICE), torch.randn(B, 5, E, device=DEVICE)
    close(*(each(x, memory, tgt_mask=causal_mask(), tgt_is_causal=True) for each in (refined, layer)))


@pytest.mark.parametrize("missing", ["in_proj_bias", "out_proj.bias", "both", "none"])
def test_biases_are_taken_over_where_they_are(missing: str) -> None:
    mha = multihead(batch_first=True, bias=missing != "both")
    if missing == "in_proj_bias":
        mha.in_proj_bias = None  # type: ignore[assignment]
    if missing == "out_proj.bias":
        mha.out_proj.bias = None  # type: ignore[assignment]
    module, x = replaced(mha, causal=False), torch.randn(B, L, E, device=DEVICE)
    close(module(x), mha(x, x, x)[0])
    module(x).square().sum().backward()
    learned = {name for name, p in module.named_parameters() if p.requires_grad}
    assert ("qkv.bias" in learned) == (missing in ("none", "out_proj.bias"))
    assert ("out.bias" in learned) == (missing in ("none", "in_proj_bias"))
    fresh = RefinedMultiheadAttention(E, H, max_len=9, causal=False, bias=missing != "both", device=DEVICE)
    fresh.load_state_dict(module.state_dict())
    close(fresh(x), module(x))


class Scaled(nn.MultiheadAttention):
    """Another forward on the same weights."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(2 * query, *args, **kwargs)


class Called(nn.MultiheadAttention):
    """Another call around the same forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Named(nn.MultiheadAttention):
    """A name of its own, nothing else."""


def broken(kind: str) -> Any:
    mha: Any = multihead()
    if kind == "quantizable":
        return torch.ao.nn.quantizable.MultiheadAttention(E, H)
    if kind == "subclass":
        return Scaled(E, H)
    if kind == "call":
        return Called(E, H)
    if kind == "no weight":
        mha.out_proj = nn.Sequential(mha.out_proj)
    if kind == "two dtypes":
        mha.out_proj.double()
    if kind == "replaced forward":
        forward = mha.forward
        mha.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    if kind == "hook":
        mha.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))
    if kind == "pruned":
        torch.nn.utils.prune.l1_unstructured(mha.out_proj, "weight", 0.5)
    if kind == "further parameter":
        mha.scale = nn.Parameter(torch.ones(()))
    if kind == "bias_v":
        mha.bias_v = nn.Parameter(torch.ones(1, 1, E))
    if kind == "quantized":
        mha = torch.ao.quantization.quantize_dynamic(mha, {nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Linear})
        mha.out_proj = torch.ao.nn.quantized.dynamic.Linear(E, E)
    return mha


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind,message", [
    ("quantizable", "with a forward of its own; it must be a torch.nn.MultiheadAttention with torch's own forward"),
    ("subclass", "mha is Scaled, with a forward of its own"),
    ("replaced forward", "mha is MultiheadAttention, with a forward of its own"),
    ("hook", "mha is with forward hooks"),
    ("pruned", "mha.out_proj is with forward hooks"),
    ("further parameter", "mha is with the parameter scale; it must be with no others than"),
    ("bias_v", "mha is with bias_v; it must be without it"),
    ("quantized", "mha is with weights that are quantized, no tensors"),
    ("call", "mha is Called, with a forward of its own"),
    ("no weight", "no tensors"),
    ("two dtypes", "of two dtypes"),
])  # fmt: skip
def test_what_would_be_lost_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replaced(broken(kind))


def test_subclasses_and_parametrised_weights_that_compute_the_same_are_taken() -> None:
    x = torch.randn(L, B, E)
    named, normed = Named(E, H), multihead()
    nn.utils.parametrizations.weight_norm(normed, "in_proj_weight")
    nn.utils.parametrizations.spectral_norm(normed.out_proj.eval(), "weight")
    for mha in (named, normed):
        close(replaced(mha, causal=False)(x, x, x)[0], mha(x, x, x)[0])
