"""Refined attention inside Hugging Face transformers: static and offloaded caches, prefixes of keys and values, and compilation."""

from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

from awrsr_kernels.integrations.transformers import refine

from ..conftest import DEVICE
from .decoders import TABLES, WINDOW, close, gpt2, llama, padded, qwen2_with_a_sliding_layer, tokens, trained


def named(parameter: Any) -> str:
    """The same in every process, unlike the str of a function."""
    return getattr(parameter, "__name__", str(parameter))


KINDS = pytest.mark.parametrize("make, options", [
    (llama, {}), (llama, {"layers": [1], "refinement": "value"}), (gpt2, {"tables": "position", "per_head": False}),
    (qwen2_with_a_sliding_layer, {"layers": [1]}),
], ids=named)  # fmt: skip


def left_padded() -> dict[str, Tensor]:
    given = padded([9, 4, 6], "left")
    del given["position_ids"]
    return given


@KINDS
@pytest.mark.parametrize("beams", [1, 3])
def test_a_static_cache_gives_the_tokens_of_a_growing_one(make: Any, options: dict[str, Any], beams: int) -> None:
    """Prompts padded on the left, and one without a mask; also where a longer cache is kept from the call before."""
    model = trained(make(), **options)
    rules = {"num_beams": beams, "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    for given in (left_padded(), {"input_ids": tokens(1, WINDOW - 2)}):
        expected = model.generate(**given, **rules)
        found = model.generate(**given, **rules, cache_implementation="static", return_dict_in_generate=True)
        assert found.sequences.equal(expected) and isinstance(found.cache, StaticCache)
        assert found.cache.layers[1].rows.capacity == found.cache.get_max_length()


@torch.no_grad()
@TABLES
def test_a_static_cache_goes_on_from_any_place(tables: str) -> None:
    model, ids = trained(llama(), tables=tables, max_positions=WINDOW if tables == "position" else None), tokens(2, WINDOW)
    whole, cache = model(ids).logits, StaticCache(config=model.config, max_cache_len=WINDOW + 3)
    close(model(ids[:, :4], cache=cache).logits, whole[:, :4])
    close(model(ids[:, 4:6], cache=cache).logits, whole[:, 4:6])
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
    close(model(ids.flip(0)[:, 4:], cache=cache).logits, whole.flip(0)[:, 4:])
    if tables == "position" and DEVICE == "cpu":  # values on a GPU are not read
        with pytest.raises(ValueError, match="max_positions is 9; it must be at least the 10 positions"):
            model(ids[:, :1], cache=cache)
    cache.reset()
    close(model(ids, cache=cache).logits, whole)
    small = StaticCache(config=model.config, max_cache_len=5)
    with pytest.raises(ValueError, match="cache is static with max_cache_len = 5; it must be made with 9"):
        model(ids, cache=small)


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
def test_generation_compiles_into_one_graph_with_a_static_cache(layers: Any) -> None:
    """The prompt runs as it is; the step has one graph, for all lengths."""
    model, given = trained(llama(), layers=layers), left_padded()
    torch._dynamo.reset()
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    rules = {"min_new_tokens": 7, "max_new_tokens": 7}
    expected = model.generate(**given, **rules)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert model.generate(**given, **rules, cache_implementation="static", compile_config=compiled).equal(expected)


@torch.no_grad()
def test_a_compiled_model_goes_on_with_a_growing_cache() -> None:
    """Its numbers change at every step, from the third on as symbols."""
    model, ids = trained(llama()), tokens(2, WINDOW)  # of two layers, whose numbers must agree
    torch._dynamo.reset()
    compiled, whole = torch.compile(model), model(ids).logits  # other backends take a graph whose symbols nobody defines
    cache = DynamicCache()
    for first, last in [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]:
        found = compiled(ids[:, first:last], past_key_values=cache, use_cache=True)
        close(found.logits, whole[:, first:last])
        cache = found.past_key_values


def test_a_compiled_model_needs_no_mask() -> None:
    """transformers prepares for packed rows then."""
    model, ids = trained(llama()), tokens(2, WINDOW)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    close(compiled(ids, use_cache=False).logits, model(ids).logits)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]], device=DEVICE)
    close(compiled(ids, position_ids=packed).logits, model(ids, position_ids=packed).logits)


class _Stream(nullcontext[None]):
    def wait_stream(self, other: Any) -> None:
        """As of a device that works in order."""


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_an_offloaded_cache_gives_the_tokens_of_one_that_stays(implementation: str, beams: int, monkeypatch: Any) -> None:
    """Without a GPU, the streams do nothing and rows move within the CPU; what is checked is who asks for moves, and when."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch, "Stream", _Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: _Stream())
    model, given = trained(llama(), layers=[1]), left_padded()
    rules = {"num_beams": beams, "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    expected = model.generate(**given, **rules)
    found = model.generate(**given, **rules, cache_implementation=implementation, return_dict_in_generate=True)
    assert found.sequences.equal(expected)
    layer = found.cache.layers[1]
    assert layer.offloads and not layer.is_compileable and layer.rows.device.type == "cpu"


def prefix(model: Any, batch: int, scale: float = 1.0) -> tuple[list[Tensor], DynamicCache]:
    """Keys and values of three virtual tokens for each layer, and a cache that begins with them, as PEFT makes it."""
    heads, width = getattr(model.config, "num_key_value_heads", 4), 8
    torch.manual_seed(7)
    learned = [(scale * torch.randn(2, 1, heads, 3, width, device=DEVICE)).requires_grad_() for _ in range(2)]
    return learned, DynamicCache([tuple(x.expand(-1, batch, -1, -1, -1)) for x in learned])


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prefix_is_what_it_is_in_a_plain_model(make: Any, side: str) -> None:
    """While the gates are zero; its gradients too. PEFT puts ones before the mask, so padding may lie between prefix and tokens."""
    given, plain = padded([9, 4, 6], side), make()
    model, real = refine(make()), given["attention_mask"].bool()
    given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (3, 0), value=1)
    outcomes = []
    for each in (plain, model):
        learned, cache = prefix(each, 3)
        logits = each(**given, cache=cache).logits[real]
        outcomes.append([logits, *torch.autograd.grad(logits.pow(2).sum(), learned)])
    for found, expected in zip(outcomes[1], outcomes[0], strict=True):
        close(found, expected)


@TABLES
@pytest.mark.parametrize("refinement", ["simple", "value", "additive"])
@torch.no_grad()
def test_a_prefix_leads_rows_padded_on_the_left(tables: str, refinement: str) -> None:
    """Each row gets what it gets alone, and tokens that follow the cache get what they get at once."""
    model, given = trained(llama(), tables=tables, refinement=refinement).requires_grad_(False), padded([9, 4, 6], "left")
    ids, real, positions = given["input_ids"], given["attention_mask"], given["position_ids"]
    mask = torch.nn.functional.pad(real, (3, 0), value=1)
    logits = model(ids, attention_mask=mask, position_ids=positions, cache=prefix(model, 3)[1]).logits
    for row in range(3):
        own = real[row].bool()
        alone = model(ids[row : row + 1, own], position_ids=positions[row : row + 1, own], cache=prefix(model, 1)[1]).logits[0]
        close(logits[row, own], alone)
        assert (alone - model(ids[row : row + 1, own]).logits[0]).abs().max() > 0.1
    cache = prefix(model, 3)[1]
    close(model(ids[:, :6], attention_mask=mask[:, :9], position_ids=positions[:, :6], cache=cache).logits[0], logits[0, :6])
    assert cache.get_seq_length() == 9
    for at in (6, 7, 8):
        cache.reorder_cache(torch.tensor([0, 0, 0], device=DEVICE))  # the other rows began with padding alone
        step = model(ids[:1, at : at + 1].expand(3, 1), position_ids=positions[:1, at : at + 1].expand(3, 1), cache=cache)
        close(step.logits[:, 0], logits[:1, at].expand(3, -1))


def test_peft_tunes_a_prefix_of_a_refined_model() -> None:
    model = peft.get_peft_model(
        trained(llama()), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=2, token_dim=16)
    )
    given, losses = left_padded(), []
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(8):
        losses.append(model(**given, labels=torch.where(given["attention_mask"] > 0, given["input_ids"], -100)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
    for implementation in ("static", "offloaded"):
        with pytest.raises(ValueError, match="cache_implementation is that of .*; it must be left out where"):
            model.eval().generate(**given, max_new_tokens=2, cache_implementation=implementation)


@pytest.mark.parametrize("make, options", [
    (llama, {}), (llama, {"layers": [1], "refinement": "value"}), (llama, {"tables": "position", "per_head": False}),
    (gpt2, {"tables": "position", "refinement": "simple"}),
], ids=named)  # fmt: skip
@pytest.mark.parametrize("beams", [1, 3])
def test_a_refined_model_generates_from_the_prefix_of_peft(make: Any, options: dict[str, Any], beams: int) -> None:
    """Rows padded on the left get the tokens that they get alone, which are those of passes without a cache."""
    sizes = {"num_attention_heads": 2, "token_dim": 16} if make is llama else {}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes)
    base = trained(make(), **options)
    model, given = peft.get_peft_model(base, config).eval(), left_padded()
    rules = {"num_beams": beams, "do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    found = model.generate(**given, **rules)[:, WINDOW:]
    for row, (ids, real) in enumerate(zip(given["input_ids"], given["attention_mask"].bool(), strict=True)):
        assert model.generate(input_ids=ids[real][None], **rules)[0, -5:].equal(found[row])
    if beams > 1:
        return
    ids = given["input_ids"][:1]
    with torch.no_grad():
        for token in found[0]:
            positions = 3 + torch.arange(ids.shape[1], device=DEVICE)[None]
            logits = base(ids, position_ids=positions, cache=model.get_prompt(1)).logits[0, -1]
            assert logits.max() - logits[token] < 1e-4
            ids = torch.cat([ids, token[None, None]], 1)
    assert not ids.equal(base.generate(given["input_ids"][:1], min_new_tokens=5, max_new_tokens=5))
