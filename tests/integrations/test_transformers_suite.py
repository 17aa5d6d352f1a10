"""What transformers' own suites ask of every decoder, asked of refined ones: generation, training, resizing and saving.

The ideas are those of `tests/generation/test_utils.py`, `tests/test_modeling_common.py` and `tests/trainer/` of transformers. What
other files here ask already (greedy and beam search with a cache, packing, loading, prefixes) is not asked again.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from awrsr_kernels.integrations.transformers import load, refine

from ..conftest import DEVICE
from .decoders import COMMON, WIDTHS, WINDOW, close, gpt2, llama, padded, tokens, trained


def qwen2(**changes: Any) -> Any:
    torch.manual_seed(3)
    return Qwen2ForCausalLM(Qwen2Config(**(COMMON | WIDTHS | {"max_position_embeddings": 64} | changes))).to(DEVICE).eval()


def mistral(**changes: Any) -> Any:
    torch.manual_seed(3)
    sizes = {"max_position_embeddings": 64, "sliding_window": None, "head_dim": 8}
    return MistralForCausalLM(MistralConfig(**(COMMON | WIDTHS | sizes | changes))).to(DEVICE).eval()


OPTIONS: dict[Any, dict[str, Any]] = {
    llama: {},
    qwen2: {"layers": [1], "refinement": "value"},
    mistral: {"refinement": "simple", "tables": "position", "per_head": False},
    gpt2: {"tables": "position"},
}
EVERY = pytest.mark.parametrize("make", list(OPTIONS))


def refined(make: Any, **changes: Any) -> Any:
    return trained(make(**changes), **OPTIONS[make])


def prompts() -> dict[str, Tensor]:
    given = padded([9, 4, 6], "left")
    del given["position_ids"]
    return given


@EVERY
def test_left_padding_changes_no_generated_token(make: Any) -> None:
    model, given = refined(make), prompts()
    rules = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**given, **rules)
    for row, (ids, real) in enumerate(zip(given["input_ids"], given["attention_mask"].bool(), strict=True)):
        alone = model.generate(ids[real][None], **rules)
        assert alone.sequences[0, -6:].equal(together.sequences[row, -6:])
        close(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0])


@EVERY
@pytest.mark.parametrize("rules", [
    {"do_sample": True, "top_k": 8, "temperature": 0.8}, {"do_sample": True, "num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
], ids=lambda rules: "-".join(rules))  # fmt: skip
def test_ways_to_search_do_not_depend_on_the_cache(make: Any, rules: dict[str, Any]) -> None:
    """No cache, a growing one and a static one."""
    model, given, found = refined(make), prompts(), []
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        found.append(model.generate(**given, **cache, **rules, min_new_tokens=5, max_new_tokens=5))
    assert found[1].equal(found[0]) and found[2].equal(found[0])


@EVERY
def test_assisted_generation_gives_the_tokens_of_greedy_search(make: Any) -> None:
    """Assistants: a plain model, which often errs, the model itself, which never does, and repetition in the prompt."""
    model, prompt = refined(make), tokens(1, 4).repeat(1, 2)
    rules: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
    rules["suppress_tokens"] = [COMMON["pad_token_id"]]  # assistants take it for padding
    expected = model.generate(prompt, **rules)
    for assistant in ({"assistant_model": make()}, {"assistant_model": refined(make)}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(prompt, **rules, **assistant).equal(expected)
    assert make().generate(prompt, **rules, assistant_model=model).equal(make().generate(prompt, **rules))


@EVERY
def test_generation_from_embeddings_and_from_an_earlier_cache(make: Any) -> None:
    model, ids = refined(make), tokens(2, 5)
    rules = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    expected = model.generate(ids, **rules)
    assert model.generate(inputs_embeds=model.get_input_embeddings()(ids), **rules).equal(expected[:, 5:])
    begun = model.generate(ids, **(rules | {"min_new_tokens": 3, "max_new_tokens": 3}), return_dict_in_generate=True)
    rest = rules | {"min_new_tokens": 3, "max_new_tokens": 3}
    assert model.generate(begun.sequences, cache=begun.cache, **rest).equal(expected)


@EVERY
def test_outputs_come_in_every_form(make: Any) -> None:
    model, given = refined(make), prompts()
    found = model(**given, output_hidden_states=True)
    in_a_tuple = model(**given, output_hidden_states=True, return_dict=False)
    assert in_a_tuple[0].equal(found.logits) and len(found.hidden_states) == len(in_a_tuple[2]) == 3
    embedded = {"inputs_embeds": model.get_input_embeddings()(given["input_ids"]), "attention_mask": given["attention_mask"]}
    close(model(**embedded).logits, found.logits)
    close(model(**given, logits_to_keep=2).logits, found.logits[:, -2:])


@EVERY
def test_token_embeddings_may_be_resized(make: Any, tmp_path: Path) -> None:
    model, ids = refined(make), tokens(2, WINDOW)
    before = model(ids).logits
    model.resize_token_embeddings(COMMON["vocab_size"] + 9)
    close(model(ids).logits[..., : COMMON["vocab_size"]], before)
    new = torch.full((2, 1), COMMON["vocab_size"] + 3, device=DEVICE)
    assert model(torch.cat([ids, new], 1)).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    found = load(str(tmp_path)).to(DEVICE)
    assert found.config.vocab_size == COMMON["vocab_size"] + 9 and found(ids).logits.equal(model(ids).logits)
    model.resize_token_embeddings(COMMON["vocab_size"] - 5)
    assert model(ids % 30).logits.shape[-1] == COMMON["vocab_size"] - 5


@EVERY
def test_a_classifier_on_a_refined_model_learns(make: Any, tmp_path: Path) -> None:
    refined(make).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2).to(DEVICE)
    given, labels = prompts(), torch.tensor([0, 1, 1], device=DEVICE)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(10):
        losses.append(model(**given, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("make", [qwen2, mistral])  # test_transformers.py has the others
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_either_kind_keeps_the_gradients(make: Any, use_reentrant: bool) -> None:
    given, found = prompts(), []
    for checkpointing in (False, True):
        model = refined(make, attention_dropout=0.2).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        found.append([loss, *(weight.grad for weight in model.parameters())])
    for plain, checkpointed in zip(*found, strict=True):
        close(checkpointed, plain)


def run(make: Any, folder: Path, steps: int, resume: bool = False, **changes: Any) -> Any:
    """The model that a Trainer leaves after some steps, from a converted model whose gates are zero."""
    data = [{"input_ids": (ids := [3 + (5 * i + j) % 30 for j in range(8)]), "labels": ids} for i in range(16)]
    arguments: dict[str, Any] = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": steps, "save_steps": 3}
    arguments |= {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": DEVICE == "cpu"}
    arguments |= {"lr_scheduler_type": "constant", "seed": 7} | changes
    model = refine(make(), **OPTIONS[make])
    trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=data, eval_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, losses, trainer.evaluate()["eval_loss"]


@EVERY
def test_the_trainer_saves_resumes_and_evaluates(make: Any, tmp_path: Path) -> None:
    """Interrupted after three steps, training ends with the weights that it ends with otherwise."""
    once, losses, eval_loss = run(make, tmp_path / "once", 6)
    run(make, tmp_path / "twice", 3)
    twice, _, _ = run(make, tmp_path / "twice", 6, resume=True)
    assert losses[-1] < losses[0] and eval_loss < losses[0]
    for (name, weight), its in zip(once.named_parameters(), twice.parameters(), strict=True):
        close(its, weight)
        if name.endswith("refined.gate"):
            assert weight.abs().min() > 0
    ids = tokens(2, WINDOW)
    for way in (load, AutoModelForCausalLM.from_pretrained):
        close(way(str(tmp_path / "once" / "final")).to(DEVICE)(ids).logits, once.eval()(ids).logits)


def test_the_trainer_accumulates_and_checkpoints(tmp_path: Path) -> None:
    """Two batches of two are a batch of four, with activations computed again."""
    whole, _, _ = run(llama, tmp_path / "whole", 3)
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    parts, _, _ = run(llama, tmp_path / "parts", 3, **changes)
    for its, weight in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(its, weight, rtol=1e-3, atol=1e-3)


def test_a_compiled_model_trains_as_it_does_otherwise() -> None:
    model, given = refined(gpt2, n_layer=1), prompts()
    torch._dynamo.reset()
    compiled, found = torch.compile(model, backend="eager"), []
    for each in (model, compiled):
        loss = each(**given, labels=given["input_ids"], use_cache=False).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for plain, its in zip(*found, strict=True):
        close(its, plain)
