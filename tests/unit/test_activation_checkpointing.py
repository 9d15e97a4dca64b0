"""What the backward recomputes: as much as `model.activation_checkpointing` says, bit for bit."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from packhorse.trainer.build_engine import least_checkpointing
from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import activation_checkpointing
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.lora import add_adapter
from tests.model_helpers import SIZES, WIDE, documents, loss_and_gradients, pack, sft, tiny

# the proportions of Llama 3.1 8B: a quarter as many key heads, 3.5 times as wide inside
LLAMA = transformers.LlamaConfig(
    **{**SIZES, "hidden_size": 64, "intermediate_size": 224, "num_key_value_heads": 1}
)
FAMILIES = {
    "llama": LLAMA,
    "gemma 3, with a window": transformers.Gemma3TextConfig(
        **WIDE, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "experts": transformers.Qwen3MoeConfig(
        **WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "one product for gate and up": transformers.Phi3Config(**SIZES, pad_token_id=0),
    "not gated": transformers.GPTNeoXConfig(**{**SIZES, "intermediate_size": 128}),
}


def train_once(config: Any, mode: str, **adapter: Any) -> tuple[float, dict[str, Any], float]:
    """Return the loss, the gradients, and the FLOPs of a step by those of its forward."""
    model = tiny(config)
    if adapter:
        add_adapter(model, AdapterSection(**adapter), seed=0)
    set_checkpointing(model, mode)
    ids = documents((90, 40, 7))
    batch = pack(ids, [range(len(document) - 1) for document in ids], [0.02] * 3)
    made = sft(model)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        made.train()(batch)
    with FlopCounterMode(display=False) as step:
        loss, gradients = loss_and_gradients(made, batch)
    return loss, gradients, step.get_total_flops() / forward.get_total_flops()


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_do_not_change_by_a_bit(name: str, mode: str) -> None:
    loss, gradients, _ = train_once(FAMILIES[name], "none")
    again_loss, again, _ = train_once(FAMILIES[name], mode)
    assert again_loss == loss
    assert again.keys() == gradients.keys()
    assert all(torch.equal(again[key], gradients[key]) for key in gradients)


@pytest.mark.parametrize("variants", [[], ["dora"]])
def test_nor_do_those_of_an_adapter(variants: list[str]) -> None:
    adapter = {"rank": 4, "variants": variants, "modules_to_save": ["lm_head"]}
    _, gradients, _ = train_once(LLAMA, "none", **adapter)
    _, again, _ = train_once(LLAMA, "selective", **adapter)
    assert gradients
    assert all(torch.equal(again[key], gradients[key]) for key in gradients)


def repeated(mode: str) -> float:
    """Return the FLOPs that a step repeats, by those of its forward."""
    return train_once(LLAMA, mode)[2] - train_once(LLAMA, "none")[2]


def test_selective_repeats_a_quarter_of_a_forward_at_most() -> None:
    selective, full = repeated("selective"), repeated("full")
    print(f"repeated: selective {selective:.3f}, full {full:.3f} forwards")
    assert selective <= 0.25
    assert full >= 0.6


def test_control_without_the_feed_forward_more_is_repeated() -> None:
    with mock.patch.object(activation_checkpointing, "WIDENING", set()):
        assert repeated("selective") > 0.4


def test_a_model_without_it_is_refused() -> None:
    model = tiny(LLAMA)
    model.supports_gradient_checkpointing = False
    set_checkpointing(model, "none")
    with pytest.raises(BadInput, match=r"set model.activation_checkpointing=none"):
        set_checkpointing(model, "selective")


@pytest.mark.parametrize(
    ("room", "chosen"), [(100, "none"), (79, "selective"), (40, "full"), (5, "full")]
)
def test_auto_takes_the_least_that_fits(room: int, chosen: str) -> None:
    predicted: Any = {
        mode: mock.Mock(gpu_total=size)
        for mode, size in {"none": 80, "selective": 50, "full": 20}.items()
    }
    assert least_checkpointing(predicted, room) == chosen
