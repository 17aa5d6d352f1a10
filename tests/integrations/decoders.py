"""What the tests of refined transformers models share: small decoders made from configs, padded batches and comparisons."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from awrsr_kernels.integrations.transformers import refine

from ..conftest import DEVICE

COMMON: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
WINDOW = 9


def llama(**changes: Any) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(**(COMMON | WIDTHS | {"max_position_embeddings": 64} | changes))
    return LlamaForCausalLM(config).to(DEVICE).eval()


def gpt2(**changes: Any) -> Any:
    torch.manual_seed(3)
    config = GPT2Config(**(COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | changes))
    return GPT2LMHeadModel(config).to(DEVICE).eval()


def qwen2_with_a_sliding_layer() -> Any:
    torch.manual_seed(3)
    kinds = ["sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 3, "layer_types": kinds, "max_position_embeddings": 64}
    return Qwen2ForCausalLM(Qwen2Config(**(COMMON | WIDTHS | window))).to(DEVICE).eval()


ARCHITECTURES = pytest.mark.parametrize("make", [llama, gpt2])
TABLES = pytest.mark.parametrize("tables", ["content", "position"])


def trained(model: Any, **options: Any) -> Any:
    """Refined, with gates as if they had been trained."""
    refine(model, **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".gate"):
                weight.copy_(1 + torch.rand_like(weight))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, COMMON["vocab_size"], shape, device=DEVICE)


def padded(lengths: list[int], side: str) -> dict[str, Tensor]:
    """Random tokens in a window, with positions that count real tokens."""
    at = torch.arange(WINDOW, device=DEVICE)
    n = torch.tensor(lengths, device=DEVICE)[:, None]
    mask = (at >= WINDOW - n if side == "left" else at < n).long()
    ids = torch.where(mask.bool(), tokens(len(lengths), WINDOW), 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@torch.no_grad()
def check_padding(model: Any, given: dict[str, Tensor], use_cache: bool) -> None:
    """Real tokens of padded rows get what they get in a batch of their own."""
    logits = model(**given, use_cache=use_cache).logits
    for ids, row, real in zip(given["input_ids"], logits, given["attention_mask"].bool(), strict=True):
        close(row[real], model(ids[real][None]).logits[0])
