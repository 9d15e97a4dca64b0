"""A frozen weight in 4 or 8 bits is not held from forward to backward, and acts as it did."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.checks import failures_explained
from packhorse.trainer.model.lora import add_adapter
from packhorse.trainer.model.quantisation import quantise
from tests.model_helpers import tiny_llama

EVEN = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}


def gather(weights: list[Any], whole: list[np.ndarray[Any, Any]]) -> list[Any]:
    """Give each weight a storage of its own, as ZeRO-3 gathers it; return references to them."""
    held = [values.copy() for values in whole]
    for weight, values in zip(weights, held, strict=True):
        weight.data = torch.from_numpy(values)  # which holds the array as long as it lives
    return [weakref.ref(values) for values in held]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("base", ["nf4", "nf4_double_quant", "int8"])
def test_what_was_gathered_is_free_between_forward_and_backward(
    base: str, checkpointing: str
) -> None:
    model = tiny_llama(**EVEN)
    section = {"rank": 4, "alpha": 8, "base": base}
    add_adapter(model, AdapterSection.model_validate(section), 0)
    set_checkpointing(model, checkpointing)
    model.set_attn_implementation("sdpa")
    model.train()
    weights = [p for p in model.parameters() if hasattr(p, "quant_state")]
    whole = [weight.data.numpy().copy() for weight in weights]
    trained = [p for p in model.parameters() if p.requires_grad]
    seen = []
    for frees in (False, True):
        gathered = gather(weights, whole)
        assert all(reference() is not None for reference in gathered)
        loss = model(torch.arange(10, 30)[None]).logits.square().mean()
        if frees:
            for weight in weights:
                weight.data = torch.empty(0, dtype=weight.dtype)
            assert not any(reference() is not None for reference in gathered)
            gather(weights, whole)
        seen.append(torch.autograd.grad(loss, trained))
    assert all(map(torch.equal, *seen))
    assert any(gradient.any() for gradient in seen[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["nf4", "nf4_double_quant"])
def test_products_in_4_bits_are_bitsandbytes_own_by_the_bit(base: str, dtype: torch.dtype) -> None:
    from bitsandbytes import matmul_4bit

    torch.manual_seed(0)
    for bias, tokens in ((True, 7), (False, 1), (True, 0)):
        model = nn.ModuleDict({"q": nn.Linear(64, 40, bias=bias, dtype=dtype)})
        quantise(model, ["q"], base, lambda _: torch.no_grad())
        module: Any = model["q"]
        x = torch.randn(2, tokens, 64, dtype=dtype, requires_grad=True)
        ours, weight = module(x), module.weight
        exact = matmul_4bit(x, weight, bias=module.bias, quant_state=weight.quant_state)
        assert torch.equal(ours, exact)
        with torch.no_grad():
            assert torch.equal(module(x), exact)
        gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (ours, exact)]
        assert torch.equal(*gradients)
        if bias:
            of_bias = torch.autograd.grad(module(x).sum(), module.bias)[0]
            assert torch.equal(of_bias, torch.full((40,), 2.0 * tokens, dtype=dtype))


def test_a_model_that_reads_a_packed_weight_elsewhere_is_told_of_adapter_base() -> None:
    """As Jamba's mixer does with the weight of its dt_proj."""
    model: Any = nn.Linear(2, 2)
    model.weight.quant_state = None
    said = "in 4 or 8 bits: Linear fails .*; take adapter.base out"
    with pytest.raises(BadInput, match=said), failures_explained(model):
        raise RuntimeError("size mismatch")
