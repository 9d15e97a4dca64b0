"""A packed document has the rotary table that it has alone, whatever the longest one's is."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf

from packhorse.trainer.config.recipe import LossSection
from packhorse.trainer.model import packing_check, rotary, sft
from packhorse.trainer.model.sft import SftModel
from tests.model_helpers import CPU, SIZES, WIDE, documents, pack, tiny

torch.set_num_threads(1)

CONTEXT = 40  # the length at which the tables change
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": CONTEXT,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LAYERED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": DYNAMIC,
}
SHORT_CONTEXT = {**WIDE, "max_position_embeddings": CONTEXT}
CHANGING = {
    "phi 3, longrope": tf.Phi3Config(
        **SIZES, pad_token_id=0, rope_parameters=LONGROPE, original_max_position_embeddings=CONTEXT
    ),
    "phi-moe, longrope": tf.PhimoeConfig(
        **SIZES,
        num_local_experts=4,
        rope_parameters={**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
    ),
    "llama, dynamic": tf.LlamaConfig(**SHORT_CONTEXT, rope_parameters=DYNAMIC),
    "gemma 3, dynamic in some layers": tf.Gemma3TextConfig(
        **SHORT_CONTEXT,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=LAYERED,
    ),
}


def hidden(module: SftModel, lengths: list[int]) -> list[torch.Tensor]:
    """The states of documents that are packed in this order."""
    ids = documents(lengths)
    with torch.no_grad():
        batch = pack(ids, [[0]] * len(ids), [1.0] * len(ids))
        return list(module.eval().hidden_states(batch).split(lengths))


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize(
    "lengths", [[24, 70, 17], [70, 24], [24, 17], [70, 90, 40, 41, 39]], ids=str
)
def test_packed_equals_a_new_model_with_the_document_alone(name: str, lengths: list[int]) -> None:
    packed = hidden(SftModel(tiny(CHANGING[name]), LossSection(), 0, CPU), lengths)
    for ids, ours in zip(documents(lengths), packed, strict=True):
        model = tiny(CHANGING[name])  # a new one, whose table no other document has stretched
        model.set_attn_implementation("eager")
        with torch.no_grad():
            alone = model.eval().get_decoder()(input_ids=ids.unsqueeze(0), use_cache=False)
        torch.testing.assert_close(ours, alone.last_hidden_state[0], rtol=1e-4, atol=1e-5)


def prove(config: Any) -> packing_check.Proof:
    module = SftModel(tiny(config), LossSection(), 0, CPU)
    return packing_check.prove_packing(module, seq_len=128, one_document=False, seed=0)


@pytest.mark.parametrize("name", CHANGING)
def test_the_check_crosses_the_length_and_would_see_the_packed_rows_table(name: str) -> None:
    seen = prove(CHANGING[name])
    assert max(seen.lengths) > CONTEXT
    assert not seen.by_itself
    with mock.patch.object(sft, "make_tables_by_document"):
        assert "from the same document alone" in prove(CHANGING[name]).by_itself


def test_other_tables_are_left_alone() -> None:
    model = tiny(tf.LlamaConfig(**SIZES))
    rotary.make_tables_by_document(model)
    assert all("forward" not in vars(module) for module in model.modules())
