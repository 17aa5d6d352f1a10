"""Refined attention inside Hugging Face transformers: every way to load a refined model, offloaded weights, and PEFT's adapters."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from awrsr_kernels import RefinedMultiheadAttention
from awrsr_kernels.integrations.transformers import RefinedTables, load, refine

from ..conftest import DEVICE
from .decoders import ARCHITECTURES, WINDOW, close, gpt2, llama, qwen2_with_a_sliding_layer, tokens, trained

ROOT = str(Path(__file__).resolve().parents[2])


@ARCHITECTURES
def test_loading_takes_dtype_by_any_name(make: Any, tmp_path: Path) -> None:
    trained(make(), layers=[1]).bfloat16().save_pretrained(tmp_path)
    for given in ({"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": "bfloat16"}, {"dtype": torch.bfloat16}):
        model = load(str(tmp_path), **given)
        assert model.dtype == torch.bfloat16 and {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert load(str(tmp_path), dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("make", [llama, gpt2, qwen2_with_a_sliding_layer])
def test_the_loaders_of_transformers_give_the_refined_model(make: Any, tmp_path: Path) -> None:
    model, ids = trained(make(), layers=[1], rank=5), tokens(2, WINDOW)
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    for way in (AutoModelForCausalLM, type(model)):
        for options in ({}, {"config": AutoConfig.from_pretrained(tmp_path)}, {"device_map": {"": DEVICE}}):
            found = way.from_pretrained(tmp_path, **options).to(DEVICE)
            assert type(found) is type(model) and found(ids).logits.equal(expected)
    base, classifier = (way.from_pretrained(tmp_path) for way in (AutoModel, AutoModelForSequenceClassification))
    for other in (base, classifier, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))):
        assert [isinstance(module, RefinedTables) for module in other.modules()].count(True) == 1
    found.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").to(DEVICE)(ids).logits.equal(expected)


def test_a_plain_model_loads_plain(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    refine(llama())
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.config._attn_implementation == "sdpa" and set(found.state_dict()) == set(model.state_dict())


def test_missing_tables_are_drawn_and_reported(tmp_path: Path) -> None:
    """As transformers does with any weight that a checkpoint lacks; `load` raises."""
    model = trained(llama(), layers=[0])
    weights = {name: weight for name, weight in model.state_dict().items() if ".refined." not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    found, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    learned = found.model.layers[0].self_attn.refined
    assert len(report["missing_keys"]) == 3 and not learned.gate.any()
    assert 0.8 < learned.w_q.std() * 32**0.5 < 1.2 and 0.8 < learned.w_k.std() * 32**0.5 < 1.2


def test_a_model_with_fewer_layers_than_were_refined_is_refused(tmp_path: Path) -> None:
    trained(llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.refined_attention is \[0, 1\]; it must be of refined layers among the 1 of"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)


def test_another_attention_implementation_is_refused_at_loading(tmp_path: Path) -> None:
    trained(llama()).save_pretrained(tmp_path)
    for way in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match='attn_implementation is "eager"; it must be left out for a refined model'):
            way(str(tmp_path), attn_implementation="eager")


def test_without_the_integration_a_refined_model_does_not_load_as_a_plain_one(tmp_path: Path) -> None:
    trained(llama()).save_pretrained(tmp_path)
    code = """if True:
        import sys
        from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
        for way in (AutoModel, AutoModelForCausalLM, LlamaForCausalLM):
            try:
                way.from_pretrained(sys.argv[1])
            except ValueError as error:
                assert "which importing awrsr_kernels.integrations.transformers adds" in str(error), error
            else:
                raise AssertionError(way)
        import awrsr_kernels.integrations.transformers
        assert hasattr(AutoModel.from_pretrained(sys.argv[1]).layers[0].self_attn, "refined")
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300, cwd=ROOT)


def agree(offloaded: Any, model: Any) -> None:
    ids = tokens(2, WINDOW)
    with torch.no_grad():
        assert offloaded(ids).logits.equal(model(ids).logits)
    for beams in (1, 3):
        found, expected = (each.generate(ids, max_new_tokens=4, num_beams=beams) for each in (offloaded, model))
        assert found.equal(expected)


@pytest.mark.parametrize("make, tables", [(llama, "content"), (gpt2, "position")])
def test_offloaded_models_compute_the_same(make: Any, tables: str, tmp_path: Path) -> None:
    model = trained(make(), tables=tables)
    for offload in (accelerate.cpu_offload, lambda x, **where: accelerate.disk_offload(x, str(tmp_path / "disk"), **where)):
        offloaded: Any = offload(copy.deepcopy(model), execution_device=torch.device(DEVICE))
        assert all(weight.is_meta for weight in offloaded.parameters())
        agree(offloaded, model)
    model.save_pretrained(tmp_path / "saved")
    base, (layers, attention) = model.base_model_prefix, ("layers", "self_attn") if make is llama else ("h", "attn")
    here = {f"{base}.{name}": DEVICE for name, _ in model.base_model.named_children() if name != layers} | {"lm_head": DEVICE}
    here[f"{base}.{layers}.0"] = DEVICE
    places = here | {f"{base}.{layers}.1": "disk"}
    parts = [name for name, _ in getattr(model.base_model, layers)[1].named_children()]
    inner = here | {f"{base}.{layers}.1.{name}": "disk" if name == attention else DEVICE for name in parts}
    for device_map in ("auto", places, inner):
        for way in (load, AutoModelForCausalLM.from_pretrained):
            mapped: Any = way(str(tmp_path / "saved"), device_map=device_map, offload_folder=str(tmp_path / "weights"))
            agree(mapped, model)


def test_an_offloaded_model_is_refined_before() -> None:
    model = accelerate.cpu_offload(llama(), execution_device=torch.device(DEVICE))
    with pytest.raises(ValueError, match="model is offloaded by accelerate; it must be refined first and offloaded then"):
        refine(model)
    remove_hook_from_submodules(model)


@pytest.mark.parametrize("options", [
    {"max_len": 12, "align": "left"}, {"tables": "content", "learned_scale": True, "refinement": "simple"}, {"refinement": "none"},
], ids=str)  # fmt: skip
def test_an_offloaded_module_decodes(options: dict[str, Any], tmp_path: Path) -> None:
    """The module of the operator, outside of transformers: its calls besides `forward`."""
    module, x = RefinedMultiheadAttention(16, 2, **options).to(DEVICE).eval(), torch.randn(2, 6, 16, device=DEVICE)

    @torch.no_grad()
    def run(module: Any) -> torch.Tensor:
        cache = module.make_cache(2, 3)
        return torch.cat([module(x), module.prefill(x[:, :4], cache), *(module.step(x[:, i : i + 1], cache) for i in (4, 5))], 1)

    expected = run(module)
    for offload in (accelerate.cpu_offload, lambda x, **where: accelerate.disk_offload(x, str(tmp_path), **where)):
        offloaded: Any = offload(copy.deepcopy(module), execution_device=torch.device(DEVICE))
        assert run(offloaded).equal(expected)
        with torch.no_grad(), pytest.raises(ValueError, match="cache"):
            offloaded.prefill(x, module.make_cache(3, 3))
        assert all(weight.is_meta for weight in offloaded.parameters())  # what a call brought back is gone again


@pytest.mark.parametrize("parameters, modules, options", [
    (["refined.w_q"], [], {}),
    (["refined.w_q", "refined.w_k"], ["q_proj"], {"layers": [1]}),
    (["refined.w_k"], ["v_proj"], {"tables": "position", "per_head": False}),
], ids=str)  # fmt: skip
def test_lora_on_the_tables(parameters: list[str], modules: list[str], options: Any, tmp_path: Path) -> None:
    """The adapter acts, learns, is saved, and merges."""
    base, ids = trained(llama(), **options), tokens(2, WINDOW)
    config = peft.LoraConfig(r=2, target_parameters=parameters, target_modules=modules, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    expected = model(ids).logits
    assert (expected - base(ids).logits).abs().max() > 0.1
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad.any() for weight in model.parameters() if weight.requires_grad)
    model.save_pretrained(tmp_path)
    close(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))(ids).logits, expected)
    generated = model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3)
    merged: Any = model.merge_and_unload()
    close(merged(ids).logits, expected)
    assert merged.generate(ids, max_new_tokens=3, min_new_tokens=3).equal(generated)


def test_parametrized_tables_are_used() -> None:
    model, ids = trained(llama()), tokens(2, WINDOW)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        halved.model.layers[0].self_attn.refined.w_q.mul_(0.5)
    learned = model.model.layers[0].self_attn.refined
    torch.nn.utils.parametrize.register_parametrization(learned, "w_q", _Half())
    close(model(ids).logits, halved(ids).logits)


class _Half(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2
