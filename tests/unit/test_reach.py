"""What a text's loss does not depend on is frozen, and nothing else is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3Config

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import reach
from packhorse.trainer.model.lora import not_in_shards
from packhorse.trainer.model.probe_documents import longest_document
from packhorse.trainer.model.reach import freeze_named, freeze_unreached
from tests.model_helpers import WIDE, sft, tiny, tiny_llama

VISION = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}


def frozen_of(model: Any) -> set[str]:
    module = sft(model)
    forward = partial(
        module.hidden_states, longest_document(module.model.config.get_text_config(), 64, 0)
    )
    return set(freeze_unreached(model, forward, not_in_shards))


def test_towers_are_frozen_and_the_language_model_is_not() -> None:
    text = {**WIDE, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    tokens: dict[str, Any] = {"image_token_index": 150, "boi_token_index": 151}
    model = tiny(
        Gemma3Config(
            text_config=text,
            vision_config=VISION,
            mm_tokens_per_image=4,
            eoi_token_index=152,
            **tokens,
        )
    )
    frozen = frozen_of(model)
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if "vision" in name or "projector" in name
    }
    assert any("vision_tower" in name for name in frozen)
    assert not frozen_of(tiny_llama()), "a model without such parts is trained whole"


class Toy(nn.Module):
    """Two layers of experts, of which a text visits one a layer; `extra` predicts more tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in "ab")
        self.extra = nn.ModuleList([nn.Linear(4, 4)])
        self.router_bias = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(4, 8)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = int((torch.zeros(3) + self.router_bias).argmax())  # sorted by, not learned
        for layer in self.layers:
            x = layer[chosen](x)  # type: ignore[index]
        return x


def test_one_expert_of_a_list_speaks_for_those_that_no_token_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reach, "decoder_layers", lambda _: [])  # nothing is gathered by layers
    model = Toy()
    frozen = freeze_unreached(model, lambda: model(torch.ones(1, 4)), not_in_shards)
    assert set(frozen) == {"extra.0.weight", "extra.0.bias", "router_bias"}
    # what one layer never uses is frozen there, although another layer uses it
    model = Toy()
    forward = lambda: model.layers[0][0](torch.ones(1, 4))  # type: ignore[index,operator]  # noqa: E731
    frozen = freeze_unreached(model, forward, not_in_shards)
    assert {name for name in frozen if name.startswith("layers.")} == {
        f"layers.1.{expert}.{which}" for expert in range(3) for which in ("weight", "bias")
    }


def test_patterns_freeze_what_they_name() -> None:
    model = tiny_llama()
    freeze_named(model, [r"layers\.0\.", "^model.norm"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != ("layers.0." in name or name == "model.norm.weight"), name
    assert not frozen_of(model), "what is left depends on the text"
    for patterns, fault in (
        (["layer\\.0"], r"`layer\\.0` occurs in no parameter's name"),
        ([""], "nothing is left to be trained"),
    ):
        with pytest.raises(BadInput, match=fault):
            freeze_named(model, patterns)
