"""Blocks that call a part of their modules are found, and a missing gradient is zero or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.missing_gradients import (
    fill_gradients,
    gather_whole,
    require_all_gradients,
)
from packhorse.trainer.model import decoder
from packhorse.trainer.model.feed_forward_tiles import require_gradient
from packhorse.trainer.model.lora import not_in_shards
from packhorse.trainer.model.partly_called import partly_called_blocks
from tests.model_helpers import SIZES, tiny_llama
from tests.models.listed_experts import ListedConfig, ListedForCausalLM


def listed() -> Any:
    torch.manual_seed(0)
    return ListedForCausalLM(ListedConfig(**SIZES))


def found_in(model: Any) -> list[nn.Module]:
    return partly_called_blocks(model, lambda: model(torch.tensor([[7]])), not_in_shards)


def test_a_list_of_experts_is_found_by_one_token() -> None:
    model = listed().train()
    assert found_in(model) == [layer.mlp for layer in model.model.layers]
    assert model.training
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_lists_that_are_called_whole_or_never_are_not_found() -> None:
    model = listed()
    for layer in model.model.layers:
        experts = layer.mlp.experts
        layer.mlp = nn.Sequential(nn.ModuleList(), experts[0])
        layer.mlp.forward = experts[0].forward
        layer.unused = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert found_in(model) == []
    assert found_in(tiny_llama()) == []


def test_a_missing_gradient_becomes_zero_and_others_stay() -> None:
    missing, there = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    there.grad = torch.full((2,), 3.0)
    fill_gradients([missing, there])
    assert missing.grad is not None
    assert (missing.grad.tolist(), there.grad.tolist()) == ([0, 0], [3, 3])


def test_ranks_do_not_mix_gradients_of_different_parameters() -> None:
    optimizer = SimpleNamespace(
        _grad_acc_hooks=[1, 2, 3], _hooks_fired_this_backward=3, dtype=torch.bfloat16
    )
    require_all_gradients(optimizer)
    optimizer._hooks_fired_this_backward = 2
    with pytest.raises(BadInput, match=r"1 trained parameters got no gradient.*deepspeed=zero1"):
        require_all_gradients(optimizer)


def test_zero_3_gathers_a_block_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves: list[nn.Module] = []
    monkeypatch.setattr("deepspeed.utils.set_z3_leaf_module", lambda part, _: leaves.append(part))
    model = listed()
    blocks = [layer.mlp for layer in model.model.layers]
    gather_whole(model, blocks)
    assert leaves == list(model.model.layers), "each holds its block"
    leaves.clear()
    monkeypatch.setattr(decoder, "WHOLE_LAYER", 1)
    gather_whole(model, blocks)
    assert leaves == blocks


def test_the_input_of_a_block_that_is_gathered_needs_a_gradient() -> None:
    """Without one ZeRO-3 would reduce the block before it has its own gradients."""
    block = nn.Bilinear(2, 2, 2)
    block.register_forward_pre_hook(require_gradient)
    seen: list[bool] = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[1].requires_grad))
    x, scale = torch.ones(1, 2), torch.ones(1, 2)

    def call(x: torch.Tensor, scale: torch.Tensor) -> bool:
        block(x, scale)
        return x.requires_grad or scale.requires_grad

    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    assert not call(x, scale), "the caller's tensors stay as they are"
    assert seen == [False, True], "one is enough"
    seen.clear()
    assert call(x, scale.clone().requires_grad_())
    assert seen == [True, False], "there is one already"
    seen.clear()
    with torch.no_grad():
        call(x, scale)
    block.requires_grad_(False)
    call(x, scale)
    assert seen == [False] * 4
    block.requires_grad_(True)
    with pytest.raises(BadInput, match=r"Bilinear gets its input by name.*deepspeed=zero2"):
        block(input1=x, input2=scale)
