"""Refined attention inside Hugging Face transformers: packed rows, each sequence of which gets what it gets alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from ..conftest import DEVICE
from .decoders import TABLES, close, gpt2, llama, qwen2_with_a_sliding_layer, tokens, trained

LENGTHS = [5, 3, 1, 4]
TOTAL = sum(LENGTHS)
COLLATED = [
    {},
    {"return_flash_attn_kwargs": True},
    {"return_flash_attn_kwargs": True, "return_position_ids": False},
    {"return_seq_idx": True, "return_position_ids": False},
]


def alone(model: Any, sequences: list[Tensor]) -> Tensor:
    return torch.cat([model(ids[None], use_cache=False).logits[0] for ids in sequences])


def packed_positions(rows: int = 1) -> Tensor:
    return torch.cat([torch.arange(n, device=DEVICE) for n in LENGTHS]).repeat(rows, 1)


@pytest.mark.parametrize("collated", COLLATED, ids=lambda options: "-".join(options) or "position_ids")
@pytest.mark.parametrize("make, layers, tables", [
    (llama, None, "content"), (gpt2, [1], "position"), (qwen2_with_a_sliding_layer, [1], "content"),
])  # fmt: skip
@torch.no_grad()
def test_what_the_flattening_collator_packs_stays_apart(make: Any, layers: Any, tables: str, collated: dict[str, bool]) -> None:
    """In refined layers and in plain ones, with and without a mask that hides nothing, with use_cache at its default."""
    model, sequences = trained(make(), layers=layers, tables=tables), [tokens(n) for n in LENGTHS]
    batch = DataCollatorWithFlattening(**collated)([{"input_ids": ids.tolist()} for ids in sequences])
    given = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in batch.items() if name != "labels"}
    expected = alone(model, sequences)
    found = model(**given)
    close(found.logits[0], expected)
    assert found.cache is None
    close(model(**given, attention_mask=torch.ones_like(given["input_ids"])).logits[0], expected)
    assert (model(given["input_ids"]).logits[0] - expected).abs().max() > 0.1  # one sequence is something else


@TABLES
def test_packed_rows_have_the_gradients_of_their_sequences(tables: str) -> None:
    """Also two rows that are packed alike, and with checkpointing."""
    model, sequences = trained(llama(), layers=[1], tables=tables).train(), [tokens(n) for n in LENGTHS]
    ids = torch.cat(sequences).repeat(2, 1)
    weights = list(model.parameters())
    expected = torch.autograd.grad(2 * alone(model, sequences).pow(2).sum(), weights)
    for _ in range(2):
        found = torch.autograd.grad(model(ids, position_ids=packed_positions()).logits.pow(2).sum(), weights)
        for mine, its in zip(found, expected, strict=True):
            close(mine, its)
        model.gradient_checkpointing_enable()


@torch.no_grad()
def test_packed_rows_may_have_padding_and_begin_anywhere() -> None:
    model, sequences = trained(llama(), layers=[1]), [tokens(n) for n in LENGTHS]
    expected = alone(model, sequences)
    ids = torch.nn.functional.pad(torch.cat(sequences)[None], (0, 3), value=0)
    mask = (torch.arange(TOTAL + 3, device=DEVICE) < TOTAL).long()[None]
    for rest in ([0, 0, 0], [4, 5, 6], [1, 1, 1]):
        positions = torch.cat([packed_positions(), torch.tensor([rest], device=DEVICE)], 1)
        close(model(ids, attention_mask=mask, position_ids=positions).logits[0, :TOTAL], expected)
    positions = torch.cat([packed_positions()[:, :0], torch.tensor([[-3, -2, -1]], device=DEVICE), packed_positions()], 1)
    close(model(ids.roll(3, 1), attention_mask=mask.roll(3, 1), position_ids=positions).logits[0, 3:], expected)
    close(model(ids[:, :TOTAL], None, packed_positions() + 7).logits[0], expected)
    both = torch.cat([ids[:, :TOTAL], ids[:, :TOTAL].flip(1)])
    positions = torch.cat([packed_positions(), torch.arange(TOTAL, device=DEVICE)[None]])
    close(model(both, position_ids=positions).logits, torch.stack([expected, model(both[1:]).logits[0]]))


def test_the_trainer_trains_on_packed_rows(tmp_path: Any) -> None:
    """The loss of one step is that of the same sequences in a padded batch."""
    losses = []
    data = [{"input_ids": [3 + (7 * i + j) % 30 for j in range(n)]} for i, n in enumerate(LENGTHS)]
    for collator in (DataCollatorWithFlattening(return_flash_attn_kwargs=True), _pad):
        arguments: Any = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 2, "report_to": "none"}
        arguments |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": DEVICE == "cpu"}
        trainer = Trainer(trained(llama(), layers=[1]), TrainingArguments(**arguments), collator, data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    close(torch.tensor(losses[0]), torch.tensor(losses[1]))


def _pad(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(x["input_ids"]) for x in examples], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.where(ids > 0, ids, -100)}


def test_packed_rows_that_cannot_be_are_refused() -> None:
    model, ids = trained(llama()), tokens(1, TOTAL)

    def refused(message: str, model: Any = model, **given: Any) -> None:
        with pytest.raises(ValueError, match=message):
            model(ids, **given)

    def ends(*bounds: int) -> Tensor:
        return torch.tensor(bounds, device=DEVICE)

    with torch.no_grad():
        going_on = model(ids).cache
    for cache in (DynamicCache(), going_on):
        refused("cache is given; it must be None for packed rows", position_ids=packed_positions(), cache=cache)
    refused("cache is given; it must be None for packed rows", cu_seq_lens_q=ends(0, 5, TOTAL), cache=going_on)
    refused("use_cache is True; it must be False or left out for packed rows", position_ids=packed_positions(), use_cache=True)
    jump = torch.arange(TOTAL, device=DEVICE)[None] + 3 * (torch.arange(TOTAL, device=DEVICE) > 4)
    refused("position_ids is 4, then 8 in row 0; it must be rising by 1 .* or pass cu_seq_lens_q", position_ids=jump)
    square = torch.ones(1, 1, TOTAL, TOTAL, device=DEVICE)
    refused("attention_mask is of more than two dimensions", position_ids=packed_positions(), attention_mask=square)
    refused(r"cu_seq_lens_q is from \[0\] to \[5\]; it must be from 0 to 13", cu_seq_lens_q=ends(0, 5))
    refused(r"cu_seq_lens_q is \[0, 5, 3, 13\]; it must be nowhere falling", cu_seq_lens_q=ends(0, 5, 3, TOTAL))
    refused("cu_seq_lens_q is list; it must be", cu_seq_lens_q=[0, TOTAL])
    different = {"cu_seq_lens_q": ends(0, 5, TOTAL), "cu_seq_lens_k": ends(0, 6, TOTAL)}
    refused("cu_seq_lens_k is another tensor than cu_seq_lens_q", **different)
    refused("max_length_q is 3; it must be at least 8", cu_seq_lens_q=ends(0, 5, TOTAL), max_length_q=3)
    with pytest.raises(ValueError, match="a boundary at every multiple of 13, where a row begins"):
        model(ids.repeat(2, 1), cu_seq_lens_q=ends(0, 5, 2 * TOTAL))
    small = trained(llama(), tables="position", max_positions=4)
    refused("max_positions is 4; it must be at least the 5 positions", small, position_ids=packed_positions())
