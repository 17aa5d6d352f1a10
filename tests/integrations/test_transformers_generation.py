"""Refined attention inside Hugging Face transformers: generation with a cache, and the masks and caches that are refused."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import Fp8QuantizedLayer
from transformers.masking_utils import sliding_window_causal_mask_function

from awrsr_kernels.integrations._transformers.masks import lazy_mask
from awrsr_kernels.integrations.transformers import refine

from ..conftest import DEVICE
from .decoders import (
    ARCHITECTURES,
    COMMON,
    WIDTHS,
    WINDOW,
    close,
    llama,
    padded,
    qwen2_with_a_sliding_layer,
    tokens,
    trained,
)


@ARCHITECTURES
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("options", [
    {"refinement": "additive"},
    {"refinement": "additive", "tables": "position", "per_head": False},
    {"refinement": "simple", "tables": "position"},
    {"refinement": "value", "layers": [1]},
    {"tables": "position", "lags": 2, "shift": True, "plain_heads": 1},
], ids=str)  # fmt: skip
def test_generation_with_the_cache_equals_generation_without(make: Any, beams: int, options: dict[str, Any]) -> None:
    model, given = trained(make(), **options), padded([9, 4, 6], "left")
    rules = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    del given["position_ids"]
    rows: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    cached, recomputed = (model.generate(**given, use_cache=use, **rules) for use in (True, False))
    assert rows == [WINDOW] + [1] * 7 + list(range(WINDOW, WINDOW + 8))
    assert cached.sequences.equal(recomputed.sequences)
    assert len({tuple(row) for row in cached.sequences[:, WINDOW:].tolist()}) > 1  # the model has something to say
    for with_cache, without in zip(cached.scores, recomputed.scores, strict=True):
        close(with_cache, without)
    layer = cached.cache.layers[1]
    assert layer.rows.k.shape[:2] == (3 * beams, layer.rows.heads // (2 if make is llama else 1)) and layer.keys is None


def test_a_sliding_layer_beside_a_refined_one_generates_as_before() -> None:
    given = padded([9, 4, 6], "left")
    del given["position_ids"]
    original, model = qwen2_with_a_sliding_layer(), refine(qwen2_with_a_sliding_layer(), layers=[1])
    assert model.generate(**given, max_new_tokens=6).equal(original.generate(**given, max_new_tokens=6))


@torch.no_grad()
def test_a_cache_goes_on_from_any_place() -> None:
    """Several tokens at once, after forgetting some, for some of the rows."""
    model, ids = trained(llama()), tokens(3, WINDOW)
    whole = model(ids).logits
    cache = DynamicCache()
    close(model(ids[:, :5], cache=cache).logits, whole[:, :5])
    close(model(ids[:, 5:], cache=cache).logits, whole[:, 5:])
    cache.crop(-3)
    assert cache.get_seq_length() == WINDOW - 3
    cache.batch_select_indices(torch.tensor([2, 0], device=DEVICE))
    close(model(ids[[2, 0], -3:], cache=cache).logits, whole[[2, 0], -3:])
    cache.batch_repeat_interleave(2)
    new = tokens(4, 1)
    close(model(new, cache=cache).logits[:, 0], model(torch.cat([ids[[2, 2, 0, 0]], new], 1)).logits[:, -1])
    cache.reset()
    close(model(ids, cache=cache).logits, whole)


def test_masks_that_are_no_padding_are_refused() -> None:
    model, ids = refine(llama()), tokens(2, 5)

    def refused(message: str, **given: Any) -> None:
        with pytest.raises(ValueError, match=message):
            model(ids, **given)

    row = [[1] * 5]
    refused("attention_mask is irregular; .* padded on one side", attention_mask=torch.tensor([[1, 0, 1, 1, 1], *row]))
    refused("attention_mask is irregular; .* padded on one side", attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]))
    refused(r"attention_mask is of shape \(2, 4\)", attention_mask=torch.ones(2, 4))
    refused(r"attention_mask is of shape \(2, 1, 5, 5\)", attention_mask=torch.ones(2, 1, 5, 5), use_cache=False)
    window = {"mask_function": sliding_window_causal_mask_function(3), "kv_offset": 0, "q_length": 5, "attention_mask": None}
    with pytest.raises(ValueError, match="attention_mask is not plainly causal"):
        lazy_mask(**window).padding(5, started=False)
    for index in (0, 1):  # refined layers and plain ones
        with pytest.raises(ValueError, match="block_indices is used by LlamaAttention; it must be None in every layer"):
            refine(llama(), layers=[index])(ids, block_indices=torch.zeros(1), use_cache=False)
    cut = model.model.layers[0].forward  # as models do whose layers slice the mask
    model.model.layers[0].forward = lambda x, attention_mask, **rest: cut(x, attention_mask=attention_mask[:, :, :4], **rest)
    refused("attention_mask is indexed by this model", use_cache=False)


def test_caches_that_cannot_serve_are_refused() -> None:
    model, ids = refine(llama()), tokens(2, 5)

    def refused(message: str, cache: Any, **given: Any) -> None:
        with pytest.raises(ValueError, match=message):
            model(ids[:, :1], cache=cache, **given)

    with torch.no_grad():
        refused("cache is DynamicCache of DynamicLayer, filled by a plain model", llama()(ids).cache)
        static = StaticCache(config=model.config, max_cache_len=8)
        llama()(ids, cache=static)
        refused("cache is StaticCache of StaticLayer, filled by a plain model", static)
        quantized = DynamicCache(config=model.config)
        quantized.layers = [Fp8QuantizedLayer() for _ in quantized.layers]
        refused("cache is DynamicCache of Fp8QuantizedLayer, of another kind", quantized)
    learning = model(ids).cache
    with torch.no_grad():
        refused("cache is empty, as its first pass recorded gradients or had dropout; .* model.eval", learning)
        cache = model(ids).cache
        if DEVICE == "cpu":  # values on a GPU are not read
            refused("attention_mask hides other positions", cache, attention_mask=torch.tensor([[1] * 6, [0] + [1] * 5]))
        right = model(ids, attention_mask=torch.tensor([[1] * 4 + [0], [1, 0, 0, 0, 0]], device=DEVICE)).cache
        refused("cache began with padding on the right", right)
        chunk = torch.tensor([[1] * 5, [0] * 5], device=DEVICE)
        refused("cache began with .* a row that is all padding", model(ids, attention_mask=chunk).cache)
        with pytest.raises(ValueError, match="cache is of a batch padded on the right"):
            right.crop(-1)
        with pytest.raises(ValueError, match="tokens_to_remove is 1; it must be 0 or negative"):
            cache.crop(1)
        dropping = trained(llama(attention_dropout=0.2))
        cache = dropping(ids).cache
        dropping.train()
        with pytest.raises(ValueError, match=r"dropout is 0.2 while tokens follow a cache; it must be 0, .* model.eval"):
            dropping(ids[:, :1], cache=cache)
        cache = dropping(ids).cache
        with pytest.raises(ValueError, match="cache is empty, as its first pass .* had dropout"):
            dropping.eval()(ids[:, :1], cache=cache)
        twice = AutoConfig.for_model("diffllama", **(COMMON | WIDTHS | {"max_position_embeddings": 64}))
        with pytest.raises(ValueError, match="attends more than once per layer"):
            refine(AutoModelForCausalLM.from_config(twice)).eval()(ids)
