"""LoRA on the matrices of experts: which parameters, what is said, and what merges."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from packhorse.trainer.checkpoint import hf_export
from packhorse.trainer.config.recipe import AdapterSection, OptimSection, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.optim import parameter_groups
from packhorse.trainer.model.adapter_start import start_adapter
from packhorse.trainer.model.expert_lora import expert_parameters, plain_name
from packhorse.trainer.model.linear_modules import linear_modules
from packhorse.trainer.model.lora import add_adapter, in_peft_form, merged_weights
from packhorse.trainer.model.peft_names import why_merged_only
from tests.model_helpers import tiny_llama
from tests.models.shrunk import config_of
from tests.ranks import ROOT


def model_of(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(model_type), dtype=torch.float32)


def section(**fields: Any) -> AdapterSection:
    return AdapterSection.model_validate({"rank": 4, "alpha": 8, **fields})


def adapted(model: Any, **fields: Any) -> Any:
    add_adapter(model, section(**fields), seed=0)
    return model


def values(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.detach() for n, t in chain(model.named_parameters(), model.named_buffers())}


def logits(model: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    return model.eval()(input_ids=torch.arange(4, 40)[None], use_cache=False).logits


# gpt-oss has (E, I, O), and AFMoE a router that is a linear module
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "afmoe"])
def test_experts_merge_into_the_model_that_acts_alike(model_type: str) -> None:
    model = adapted(model_of(model_type), target_parameters="all-experts")
    plain = model_of(model_type)
    assert torch.allclose(logits(model), logits(plain), atol=1e-6), "B is zero at first"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    merged = {name: weight.clone() for name, weight in merged_weights(model)}
    for name, parameter in plain.named_parameters():
        assert torch.equal(merged[name], parameter) == (name not in expert_parameters(plain)) or (
            "_proj" in name or "router.gate" in name
        )
    plain.load_state_dict(merged, strict=False)
    found, expected = logits(plain), logits(model)
    assert (found - expected).norm() < 1e-5 * expected.norm()


# A shared expert or a dense layer has the names that experts had in transformers 4.
SHARED = ("afmoe", "deepseek_v3", "qwen2_moe", "glm4_moe", "longcat_flash")


@pytest.mark.parametrize("model_type", SHARED)
def test_shared_experts_are_adapted_and_experts_only_if_they_are_named(
    model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "packhorse")
    model = model_of(model_type)
    linear = linear_modules(model)
    adapted(model)
    beside = {
        plain_name(n).partition(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n
    }
    assert beside == set(linear)
    assert any(name.endswith("gate_proj") for name in beside)
    assert f"rank 4 beside {len(linear)} modules;" in caplog.text
    assert "experts are not adapted" in caplog.text
    assert {p.shape[0] for n, p in model.named_parameters() if ".lora_A." in n} == {4}


@pytest.mark.parametrize(
    "fields", [{}, {"target_parameters": "all-experts"}, {"dropout": 0.1}], ids=str
)
@pytest.mark.parametrize("model_type", SHARED)
def test_peft_loads_such_an_adapter_as_it_was_trained(
    tmp_path: Path, model_type: str, fields: dict[str, Any]
) -> None:
    model = adapted(model_of(model_type), **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    expected = logits(model)
    config, tensors = in_peft_form(model, section(**fields), values(model), "base", None)
    config.save_pretrained(str(tmp_path))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    again = adapted(model_of(model_type), **fields)
    start_adapter(again, section(**fields, init_from=str(tmp_path)))
    assert torch.equal(logits(again), expected)
    found = logits(PeftModel.from_pretrained(model_of(model_type), str(tmp_path)))
    assert (found - logits(model_of(model_type))).norm() > 1e-2 * expected.norm()
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama"])
def test_the_start_says_which_adapter_peft_could_not_load(
    model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = adapted(model_of(model_type), variants=["dora"])
    said = "it can be exported with --merge only, as peft takes" in caplog.text
    assert said == bool(why_merged_only(model)) == (model_type == "deepseek_v3")


def test_what_peft_cannot_load_is_not_exported_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(model_of("deepseek_v3"), variants=["dora"])
    monkeypatch.setattr(hf_export, "_load_trained", lambda *_: model)
    changes = ["adapter={rank: 4, variants: [dora]}"]
    recipe = load_recipe(ROOT / "recipes" / "debug.yaml", changes)
    nothing: Any = None
    with pytest.raises(BadInput, match="exported with --merge only, as peft takes"):
        hf_export._write_adapter(tmp_path, recipe, nothing, nothing, tmp_path)


def test_peft_loads_a_module_in_full_with_its_buffers(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"modules_to_save": ["gate"]}  # with e_score_correction_bias
    model = adapted(model_of("deepseek_v3"), **fields)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.arange(4.0))
        model.model.layers[1].mlp.gate.weight += 0.1
    config, tensors = in_peft_form(model, section(**fields), values(model), "base", None)
    config.save_pretrained(str(tmp_path))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    expected = logits(model)
    assert torch.equal(
        logits(PeftModel.from_pretrained(model_of("deepseek_v3"), str(tmp_path))), expected
    )
    later, fields = model_of("deepseek_v3"), {**fields, "init_from": str(tmp_path)}
    start_adapter(adapted(later, **fields), section(**fields))
    assert torch.equal(logits(later), expected)


@pytest.mark.parametrize("model_type", ["llama4_text", "phimoe"])
@pytest.mark.parametrize("base", [None, "int8"])
def test_a_router_that_is_a_kind_of_linear_module_stays_as_it_is(
    model_type: str, base: str | None
) -> None:
    """Its forward returns a choice of experts, to which nothing can be added."""
    model = adapted(model_of(model_type), target_parameters="all-experts", base=base)
    routers = {n for n, m in model.named_modules() if "Router" in type(m).__name__}
    assert routers
    assert not [n for n, _ in model.named_parameters() if "router" in n and ".lora_" in n]
    assert logits(model).isfinite().all()


def test_every_expert_has_an_adapter_of_its_own() -> None:
    model = adapted(model_of("qwen3_moe"), target_parameters=["experts.down_proj"])
    (a,) = {p.shape for n, p in model.named_parameters() if "experts.lora_A" in n}
    experts = model.config.num_experts
    assert a == (4 * experts, model.config.moe_intermediate_size)
    held = expert_parameters(model)
    assert {plain_name(name).rpartition(".")[2] for name in held} == {"down_proj", "gate_up_proj"}


def test_the_log_says_what_is_not_reached(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "packhorse")
    adapted(model_of("qwen3_moe"), target_parameters=["experts.down_proj"])
    (said,) = [r.getMessage() for r in caplog.records if "not adapted" in r.getMessage()]
    assert "gate_up_proj` and 1 parameters like it" in said
    assert "adapter.target_parameters=all-experts" in said
    caplog.clear()
    adapted(model_of("qwen3_moe"), target_parameters="all-experts")
    assert "not adapted" not in caplog.text
    assert "and 4 parameters of experts" in caplog.text


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(BadInput, match="holds no experts in one parameter"):
        adapted(tiny_llama(), target_parameters="all-experts")
    with pytest.raises(BadInput, match=r"called `experts.q`; `model.layers.0.mlp.experts"):
        adapted(model_of("qwen3_moe"), target_parameters=["experts.q"])
    for fields in ({"dropout": 0.1}, {"variants": ["dora"]}):
        with pytest.raises(ValueError, match="neither `dropout` nor `dora`"):
            AdapterSection.model_validate({"target_parameters": "all-experts", **fields})
    with pytest.raises(ValueError, match="`all-experts`, or a list"):
        AdapterSection.model_validate({"target_parameters": "experts"})


def test_what_is_trained_in_full_has_no_adapter_beside_it() -> None:
    full = {"modules_to_save": ["layers.0.mlp.experts"]}
    model = adapted(model_of("qwen3_moe"), target_parameters="all-experts", **full)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    of_experts = {name for name in trained if ".mlp.experts" in name}
    assert {name for name in of_experts if "layers.0." in name} == {
        f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")
    }
    assert sum(".lora_" in name for name in of_experts) == 4, "those of layer 1"
    with pytest.raises(BadInput, match=r"experts\.down_proj` is trained in full"):
        adapted(model_of("qwen3_moe"), target_parameters=["experts.down_proj"], **full)


@pytest.mark.parametrize("kind", ["muon", "adafactor", "adamw_8bit"])
def test_matrices_of_all_experts_in_one_are_no_matrix_to_an_optimizer(kind: str) -> None:
    model = adapted(model_of("qwen3_moe"), target_parameters="all-experts")
    kinds = {
        id(parameter): group["kind"]
        for group in parameter_groups(model, OptimSection.model_validate({"kind": kind}))
        for parameter in group["params"]
    }
    found = {name: kinds[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    stacked = {does for name, does in found.items() if ".experts." in name}
    assert stacked == {kind if kind == "adamw_8bit" else "adamw"}
    assert {does for name, does in found.items() if ".self_attn." in name} == {kind}


def test_a_plan_has_the_adapters_of_experts() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe"))
        adapted(model, target_parameters="all-experts")
    assert all(p.is_meta for p in model.parameters())
