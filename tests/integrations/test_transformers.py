"""Refined attention inside Hugging Face transformers: what refined models compute, how they train, are saved and loaded."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, LlamaForCausalLM

from awrsr_kernels import refined_attention
from awrsr_kernels.integrations.transformers import load, refine

from ..conftest import DEVICE
from .decoders import (
    ARCHITECTURES,
    COMMON,
    TABLES,
    WIDTHS,
    WINDOW,
    check_padding,
    close,
    gpt2,
    llama,
    padded,
    qwen2_with_a_sliding_layer,
    tokens,
    trained,
)


@pytest.mark.parametrize("make", [llama, gpt2, qwen2_with_a_sliding_layer])
def test_conversion_changes_nothing_until_it_is_trained(make: Any) -> None:
    layers = [1] if make is qwen2_with_a_sliding_layer else None
    given = padded([9, 4, 1], "right")
    original, model = make(), refine(make(), layers=layers)
    real = given["attention_mask"].bool()
    close(model(**given).logits[real], original(**given).logits[real])
    assert (trained(make(), layers=layers)(**given).logits - original(**given).logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["mistral", "qwen3_moe", "phi3", "gemma", "olmo2", "opt", "gpt_neox", "deepseek_v3"])
def test_other_decoders_convert_and_generate(kind: str) -> None:
    torch.manual_seed(3)
    changes = {
        "mistral": {"sliding_window": None},
        "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
    }
    config = AutoConfig.for_model(kind, **(COMMON | WIDTHS | {"max_position_embeddings": 64} | changes.get(kind, {})))
    original, given = AutoModelForCausalLM.from_config(config).to(DEVICE).eval(), padded([9, 4, 6], "left")
    del given["position_ids"]
    real = given["attention_mask"].bool()
    close(refine(copy.deepcopy(original))(**given).logits[real], original(**given).logits[real])
    model = trained(copy.deepcopy(original))
    cached, recomputed = (model.generate(**given, use_cache=use, max_new_tokens=5) for use in (True, False))
    assert cached.equal(recomputed) and (model(**given).logits - original(**given).logits)[real].abs().max() > 0.1


def test_layers_that_are_not_chosen_stay_plain() -> None:
    model, given = trained(llama(), layers=[1]), padded([9, 4, 1], "right")
    assert [hasattr(layer.self_attn, "refined") for layer in model.model.layers] == [False, True]
    plain, refined = (m(**given, output_hidden_states=True).hidden_states for m in (llama(), model))
    real = given["attention_mask"].bool()
    close(refined[1][real], plain[1][real])
    assert (refined[2] - plain[2])[real].abs().max() > 0.1


@TABLES
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("refinement", ["simple", "value", "additive"])
def test_a_layer_computes_the_definition(refinement: str, per_head: bool, tables: str) -> None:
    model = trained(gpt2(), refinement=refinement, tables=tables, per_head=per_head, rank=5)
    attention, seen = model.transformer.h[1].attn, {}
    attention.c_attn.register_forward_hook(lambda _, args, out: seen.update(hidden=args[0], qkv=out))
    attention.c_proj.register_forward_pre_hook(lambda _, args: seen.update(merged=args[0]))
    model(tokens(2, WINDOW))
    q, k, v = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in seen["qkv"].chunk(3, -1))
    learned = attention.refined
    heads = [learned.w_q, learned.w_k] if per_head else [w.expand(4, -1, -1) for w in (learned.w_q, learned.w_k)]
    w_q, w_k = (torch.einsum("ble,hre->bhlr", seen["hidden"], w) if tables == "content" else w[:, :WINDOW] for w in heads)
    gate = learned.gate if refinement == "additive" else None
    expected = refined_attention(q, k, v, w_q, w_k, refinement=refinement, gate=gate, backend="reference")
    close(seen["merged"], expected.transpose(1, 2).flatten(2))


def test_grouped_query_heads_equal_repeated_ones() -> None:
    grouped, repeated = trained(llama()), trained(llama(num_key_value_heads=4))
    weights = grouped.state_dict()
    for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
        weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    ids = tokens(2, WINDOW)
    close(grouped(ids).logits, repeated(ids).logits)


@ARCHITECTURES
@TABLES
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_rows_equal_unpadded_ones(make: Any, tables: str, side: str, use_cache: bool) -> None:
    check_padding(trained(make(), tables=tables), padded([9, 4, 1, 6], side), use_cache)


@ARCHITECTURES
@TABLES
def test_saved_models_come_back(make: Any, tables: str, tmp_path: Path) -> None:
    model, ids = trained(make(), layers=[1], tables=tables, rank=5), tokens(2, WINDOW)
    model.save_pretrained(tmp_path)
    restored = load(str(tmp_path))
    assert type(restored) is type(model) and restored.config.refined_attention == model.config.refined_attention
    assert restored.to(DEVICE)(ids).logits.equal(model(ids).logits)
    other = refine(make(), layers=[1], tables=tables, rank=5)
    other.load_state_dict(model.state_dict())
    assert other(ids).logits.equal(model(ids).logits)


def test_loading_takes_what_from_pretrained_takes(tmp_path: Path) -> None:
    model = trained(llama())
    model.save_pretrained(tmp_path)
    options: dict[str, Any] = {"attention_dropout": 0.25, "dtype": torch.float64, "local_files_only": True}
    restored, report = load(str(tmp_path), output_loading_info=True, **options)
    assert not report["missing_keys"] and restored.config.attention_dropout == 0.25 and restored.dtype == torch.float64
    assert restored.model.layers[0].self_attn.attention_dropout == 0.25
    assert load(str(tmp_path), config=str(tmp_path)).config.refined_attention == model.config.refined_attention
    config = AutoConfig.from_pretrained(tmp_path, attention_dropout=0.5)
    assert load(str(tmp_path), config=config).config.attention_dropout == 0.5


def test_the_base_model_loads_from_a_whole_one(tmp_path: Path) -> None:
    model, ids = trained(llama()), tokens(2, WINDOW)
    model.save_pretrained(tmp_path)
    base = load(str(tmp_path), model_class=transformers.LlamaModel, dtype=torch.float64).to(DEVICE)
    found = base(ids, output_hidden_states=True).hidden_states
    assert base.layers[0].self_attn.refined.w_q.dtype == torch.float64 and len(found) == 3
    close(found[-1].float(), model.model(ids).last_hidden_state)


def test_a_copy_is_a_model_of_its_own() -> None:
    model, ids = trained(llama()), tokens(2, WINDOW)
    before = model(ids).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.refined.gate.zero_()
    assert model(ids).logits.equal(before) and not other(ids).logits.equal(before)


@pytest.mark.parametrize("make", [lambda: llama(attention_dropout=0.2), gpt2], ids=["llama", "gpt2"])
def test_checkpointing_keeps_the_gradients(make: Any) -> None:
    """Dropout included, whose mask is drawn again."""
    given, found = padded([9, 4, 6], "right"), []
    for checkpointing in (False, True):
        model = trained(make()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = model(**given, labels=given["input_ids"]).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for plain, checkpointed in zip(*found, strict=True):
        close(checkpointed, plain)
    eval_loss = trained(make())(**given, labels=given["input_ids"]).loss
    assert abs(eval_loss - found[0][0]) > 1e-3  # dropout was there


def test_a_layer_uses_the_tables_that_it_has() -> None:
    model, other, ids = trained(llama()), trained(llama()), tokens(2, WINDOW)
    for layer, its in zip(model.model.layers, other.model.layers, strict=True):
        layer.self_attn.refined = its.self_attn.refined
    assert model(ids).logits.equal(other(ids).logits)


def test_a_pickled_model_runs_in_another_process(tmp_path: Path) -> None:
    model, ids = trained(llama()), tokens(2, WINDOW)
    torch.save({"model": model, "ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "model.pt")
    code = "import sys, torch; x = torch.load(sys.argv[1], weights_only=False); assert x['model'](x['ids'])[0].equal(x['logits'])"
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, timeout=300, cwd=root)


@TABLES
def test_tables_may_be_wider_than_the_model(tables: str) -> None:
    """A model in bfloat16 whose tables are trained in float32."""
    model, ids = trained(llama(), tables=tables).bfloat16(), tokens(2, WINDOW)
    narrow = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.refined.float()
    found = model(ids, labels=ids)
    torch.testing.assert_close(found.logits, narrow, rtol=0.05, atol=0.05 * narrow.abs().max().item())
    found.loss.backward()
    assert model.model.layers[0].self_attn.refined.w_q.grad.dtype == torch.float32
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (2, WINDOW + 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_against_position_tables(side: str) -> None:
    model, given = trained(llama(), tables="position", max_positions=6), padded([6, 4, 1], side)
    for use_cache in (True, False):
        check_padding(model, given, use_cache)
    with pytest.raises(ValueError, match="max_positions is 6; it must be at least the 7 positions"):
        model(**padded([7, 1], side), use_cache=False)


def test_attention_functions_return_contiguous_outputs() -> None:
    model, shapes = trained(llama()), []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: shapes.append(args[0].is_contiguous()))
    model(tokens(2, WINDOW), use_cache=False)
    with torch.no_grad():
        cache = model(tokens(2, WINDOW)).cache
        model(tokens(2, 2), cache=cache)
    assert shapes == [True] * 3


def test_training_under_autocast() -> None:
    model, ids = trained(llama()), tokens(2, WINDOW)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = model(ids, labels=ids)
    found.loss.backward()
    torch.testing.assert_close(found.logits.float(), model(ids).logits, rtol=0.1, atol=0.2)
    learned = model.model.layers[0].self_attn.refined
    for weight in (learned.w_q, learned.w_k, learned.gate):
        assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all() and weight.grad.any()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (2, WINDOW + 3)


@ARCHITECTURES
def test_a_model_learns_to_recall(make: Any) -> None:
    """Random tokens, twice: the second time can be foretold from the first."""
    torch.manual_seed(0)
    model = refine(make(initializer_range=0.05)).train()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if ".refined." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(150):
        once = tokens(16, 8)
        ids = torch.cat([once, once], 1)
        loss = model(ids, labels=torch.cat([torch.full_like(once, -100), once], 1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    for name, weight in model.named_parameters():
        if name in before:
            assert weight.grad.isfinite().all() and weight.grad.any() and not weight.equal(before[name]), name


def test_compiled_layers_have_no_graph_break() -> None:
    model, given = trained(llama(num_hidden_layers=1)), padded([9, 4, 6], "left")
    expected = model(**given, use_cache=False).logits
    token = {"input_ids": tokens(3, 1), "attention_mask": torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)}
    with torch.no_grad():
        one_more = model(**token, cache=model(**given).cache).logits
    model.model.layers[0].compile(fullgraph=True, backend="eager")
    close(model(**given, use_cache=False).logits, expected)
    with torch.no_grad():
        close(model(**token, cache=model(**given).cache).logits, one_more)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_model_of_windows_alone_says_how_to_refine_it(kind: str, tmp_path: Path) -> None:
    """As the message says, it is refined and computes what it did, for inputs within the window."""
    windows = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}
    config = AutoConfig.for_model(kind, **(COMMON | WIDTHS | {"head_dim": 8, "max_position_embeddings": 64} | windows))
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=f"none of this model has: for inputs of up to sliding_window = {WINDOW} tokens") as error:
        refine(model)
    model.save_pretrained(tmp_path)
    advice = re.search(r"from_pretrained\(\.\.\., (\w+)=(.*)\), which", str(error.value))
    assert advice
    full = AutoModelForCausalLM.from_pretrained(tmp_path, **{advice[1]: eval(advice[2])}).eval()
    given = tokens(2, WINDOW).cpu()
    close(refine(full)(given).logits, model(given).logits)


def test_what_cannot_be_refined_is_refused() -> None:
    with pytest.raises(ValueError, match="model is BertModel; it must be a decoder"):
        refine(BertModel(BertConfig(**(COMMON | WIDTHS))))
    with pytest.raises(ValueError, match="model is GPT2LMHeadModel, which is not causal or has cross-attention"):
        refine(gpt2(add_cross_attention=True))
    with pytest.raises(ValueError, match=r'layers is None, .* layer 0 has "sliding_attention"; .*: pass layers=\[1\]'):
        refine(qwen2_with_a_sliding_layer())
    for kind, changes in {"gemma2": {"attn_logit_softcapping": 50.0}, "gpt_oss": {"num_local_experts": 2}}.items():
        config = AutoConfig.for_model(kind, **(COMMON | WIDTHS | {"head_dim": 8, "max_position_embeddings": 64} | changes))
        with pytest.raises(ValueError, match="whose attention has (attn_logit_softcapping|sinks)"):
            refine(AutoModelForCausalLM.from_config(config))
    small = COMMON | WIDTHS | {"num_hidden_layers": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    shared = {"global_head_dim": 8, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    with pytest.raises(ValueError, match="whose layers share keys and values; each must have its own"):
        refine(AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **(small | shared))), layers=[1])
    sparse = qwen2_with_a_sliding_layer()
    sparse.config.layer_types = ["indexed_attention", "full_attention"]
    with pytest.raises(ValueError, match='model has layers of "indexed_attention"; all layers, including plain ones, must be of'):
        refine(sparse, layers=[1])
    model = refine(llama())
    with pytest.raises(ValueError, match="model is already refined; refine a model only once"):
        refine(model)
    with pytest.raises(ValueError, match="one made from a refined model's config is refined"):
        refine(LlamaForCausalLM(model.config))
    original = llama()
    another = LlamaForCausalLM(original.config)
    refine(original)
    with pytest.raises(ValueError, match="it must have a config of its own"):
        refine(another)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='implementation is "sdpa"; it must stay "refined_attention"'):
        model(tokens(1, 4))


@pytest.mark.parametrize("options, message", [
    ({"refinement": "none"}, r'refinement is \'none\'; it must be one of "simple", "value", "additive"'),
    ({"tables": "both"}, "tables is 'both'; it must be one of"),
    ({"layers": [0, 2]}, r"layers is \[0, 2\]; it must be indices in 0..1"),
    ({"layers": [1, 1]}, r"layers is \[1, 1\]; it must name at least one layer, and each only once"),
    ({"layers": []}, r"layers is \[\]; it must name at least one layer"),
    ({"layers": ["0"]}, r"layers is \['0'\]; it must be None or a list of ints"),
    ({"rank": 257}, r"rank is 257; it must be in 1..256"),
    ({"rank": 8.0}, "rank is float; it must be an int"),
    ({"tables": "position", "max_positions": 0}, "max_positions is 0; it must be 1 or more"),
    ({"gate": 1}, "gate is 1; it must be True or False"),
    ({"per_head": None}, "per_head is None; it must be True or False"),
], ids=str)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        refine(llama(), **options)


def test_what_was_not_saved_refined_does_not_load(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="whose config has no refined_attention"):
        load(str(tmp_path / "plain"))
    model = refine(llama(), layers=[0])
    weights = {name: weight for name, weight in model.state_dict().items() if not name.endswith(".w_k")}
    model.save_pretrained(tmp_path / "partial", state_dict=weights)
    with pytest.raises(ValueError, match=r"which lacks model.layers.0.self_attn.refined.w_k; it must hold every table"):
        load(str(tmp_path / "partial"))


def test_the_package_imports_without_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; import awrsr_kernels, awrsr_kernels.integrations"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
