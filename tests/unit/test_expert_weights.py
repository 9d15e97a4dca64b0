"""Experts in 4 and 8 bits, and those with an adapter, act as plain ones of the same weights."""

from __future__ import annotations

import logging
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import AutoModelForCausalLM

from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import expert_weights, quantisation
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.compiled_layers import compile_layers
from packhorse.trainer.model.expert_lora import expert_parameters, wraps_parameter
from packhorse.trainer.model.lora import add_adapter, merged_weights
from packhorse.trainer.model.quantisation import dequantise, quantise
from tests.models.shrunk import config_of


def model_of(model_type: str, *, kind: str = "grouped_mm", dtype: Any = torch.float32) -> Any:
    """Return a small mixture whose experts' rows are whole blocks of 64 weights."""
    config = config_of(model_type)
    config.moe_intermediate_size = 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    model.set_experts_implementation(kind)
    return model.train()


def adapted(model: Any, **fields: Any) -> Any:
    """Return the model with an adapter whose B is not zero."""
    section = AdapterSection.model_validate({"rank": 4, "alpha": 8, **fields})
    add_adapter(model, section, seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and not parameter.is_meta:
            nn.init.normal_(parameter, 0, 0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(4, 60)[None], use_cache=False).logits


def gradients(model: Any) -> tuple[torch.Tensor, ...]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(logits(model).float().square().mean(), trained)


def is_packed(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "quant_state")


def as_peft_has_it(model: Any) -> Any:
    """Make the experts plain parameters of the same weights, which peft's code runs."""
    for name, parameter in expert_parameters(model).items():
        owner, _, last = name.rpartition(".")
        plain = nn.Parameter(dequantise(parameter), requires_grad=False)
        setattr(model.get_submodule(owner), last, plain)
    for module in model.modules():
        vars(module).pop("forward", None)
    return model


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        *(("nf4", targets) for targets in ((), "all-experts", ["down_proj"])),
        *((base, "all-experts") for base in ("nf4_double_quant", "int8", None)),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])  # gpt-oss has (E, I, O), biases
def test_packed_experts_act_as_plain_ones_of_their_weights(
    model_type: str, targets: Any, base: str | None
) -> None:
    """Bit by bit, by grouped products and expert by expert, in fp32 and bf16."""
    for kind, dtype in (
        ("grouped_mm", torch.float32),
        ("grouped_mm", torch.bfloat16),
        ("eager", torch.float32),
    ):
        model = model_of(model_type, kind=kind, dtype=dtype)
        model = adapted(model, base=base, target_parameters=targets)
        assert all(is_packed(p) == bool(base) for p in expert_parameters(model).values())
        seen = [logits(model), *gradients(model)]
        plain = as_peft_has_it(model)
        for ours, theirs in zip(seen, [logits(plain), *gradients(plain)], strict=True):
            assert torch.equal(ours, theirs)
            assert ours.any()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", [(), "all-experts"])
@pytest.mark.parametrize("kind", ["grouped_mm", "eager"])
def test_made_weights_are_not_kept(
    kind: str, targets: Any, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    def seen(function: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            values = function(*args, **kwargs).detach().numpy().copy()
            made.append(weakref.ref(values))
            return torch.from_numpy(values)  # which holds the array as long as it lives

        return make

    model = adapted(model_of("gpt_oss", kind=kind), base="nf4", target_parameters=targets)
    set_checkpointing(model, checkpointing)
    exact = gradients(model)
    monkeypatch.setattr(expert_weights, "_expand", seen(expert_weights._expand))
    loss = logits(model).square().mean()
    assert len(made) == 4
    assert not any(reference() is not None for reference in made)
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert len(made) > 4
    assert not any(reference() is not None for reference in made)
    assert all(map(torch.equal, found, exact))
    # control: what the backward expands is what the parameter holds by then
    loss = logits(model).square().mean()
    for parameter in expert_parameters(model).values():
        parameter.data = torch.zeros_like(parameter.data)
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert not all(map(torch.equal, found, exact))


def test_an_adapters_weights_are_made_anew_for_the_backward() -> None:
    """As they are counted by what autograd saves: nothing of the size of all experts."""
    model = adapted(model_of("qwen3_moe"), target_parameters="all-experts")
    whole = min(parameter.numel() for parameter in expert_parameters(model).values())
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits(model)
    assert saved
    assert all(tensor.numel() < whole for tensor in saved if not tensor.is_leaf)
    plain, saved[:] = as_peft_has_it(model), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits(plain)
    assert any(tensor.numel() >= whole for tensor in saved if not tensor.is_leaf), "the control"


def test_experts_whose_blocks_would_cross_rows_stay_and_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "packhorse")

    def narrow() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_of("qwen3_moe"))  # 32 inputs to down_proj

    model = adapted(narrow(), base="nf4")
    packed = {n.rpartition(".")[2] for n, p in expert_parameters(model).items() if is_packed(p)}
    assert packed == {"gate_up_proj"}
    (said,) = [r.getMessage() for r in caplog.records if "experts stay" in r.getMessage()]
    assert "`model.layers.0.mlp.experts.down_proj` and 1 parameters like it" in said
    assert "no multiple of 64 weights; int8 takes them" in said
    caplog.clear()
    model = adapted(narrow(), base="int8")
    assert all(is_packed(p) for p in expert_parameters(model).values())
    assert "experts stay" not in caplog.text
    # control: such blocks are not read back
    model = narrow()
    names = [name for name in expert_parameters(model) if "down_proj" in name]
    with pytest.raises(BadInput, match=r"down_proj` \(4 x 64 x 32\) back from its 4 bits"):
        quantise(model, names, "nf4", lambda _: torch.no_grad())


def test_each_weight_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3_moe")
    names = [*expert_parameters(model), "model.layers.0.self_attn.q_proj"]
    weights = [weakref.ref(w) for w in expert_parameters(model).values()]
    left, pack = [], quantisation._pack

    def counted(*args: Any) -> Any:
        left.append(sum(weight() is not None for weight in weights))
        return pack(*args)

    monkeypatch.setattr(quantisation, "_pack", counted)
    quantise(model, names, "int8", lambda _: nullcontext())
    assert left == list(range(len(weights), -1, -1))


def test_memory_that_does_not_suffice_leaves_no_made_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("qwen3_moe")
    model.requires_grad_(False)
    quantise(model, list(expert_parameters(model)), "int8", lambda _: nullcontext())
    expert_weights.make_where_they_run(model)
    expand, calls = expert_weights._expand, []

    def second_fails(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return expand(*args)

    monkeypatch.setattr(expert_weights, "_expand", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        logits(model)
    assert not [name for module in model.modules() for name in vars(module) if "_proj" in name]


def test_what_is_trained_in_full_is_not_packed() -> None:
    model = adapted(model_of("qwen3_moe"), base="nf4", modules_to_save=["layers.0.mlp.experts"])
    for name, parameter in expert_parameters(model).items():
        assert is_packed(parameter) == ("layers.1." in name) != parameter.requires_grad


@pytest.mark.parametrize("targets", [(), "all-experts"])
def test_packed_experts_merge_into_the_model_that_acts_alike(targets: Any) -> None:
    model = adapted(model_of("gpt_oss"), base="nf4", target_parameters=targets)
    plain = model_of("gpt_oss")
    assert any(wraps_parameter(module) for module in model.modules()) == bool(targets)
    plain.load_state_dict({name: weight.clone() for name, weight in merged_weights(model)})
    found, expected = logits(plain), logits(model)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_compiled_layers_run_packed_experts_and_are_compiled_once() -> None:
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = adapted(model_of("qwen3_moe"), base="nf4", target_parameters="all-experts")
    exact = gradients(model)
    compile_layers(model, checkpointing=True, backend=count)
    assert all(map(torch.equal, gradients(model), exact))
    compiled = len(graphs)
    assert compiled > 0
    assert all(map(torch.equal, gradients(model), exact))
    assert len(graphs) == compiled
    torch._dynamo.reset()
