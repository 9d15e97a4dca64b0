"""Weights are renamed and converted into shards as into a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import deepspeed as zero3

from packhorse.trainer.model.conversions import alike_in_shards
from packhorse.trainer.model.load import model_class
from tests.models.shrunk import config_of


def converted(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what transformers gives a model in shards for a folder's weights."""
    mapping = get_model_conversion_mapping(model)
    # transformers before 5.20 returns all at once
    made: Any = zero3._apply_weight_conversions_to_state_dict(model, weights, mapping)
    parts = [made] if isinstance(made, dict) else list(made)
    return {name: tensor for part in parts for name, tensor in part.items()}


def empty_shards(model: Any) -> None:
    """Leave of each parameter what DeepSpeed leaves between uses: no data, and its shape."""
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)


@pytest.mark.parametrize(
    ("name", "transposed"),
    [("deepseek_v4", False), ("qwen3_vl_moe", False), ("qwen3_vl_moe", True)],
)
def test_a_folder_gives_shards_what_it_gives_the_whole(
    name: str, transposed: bool, tmp_path: Path
) -> None:
    config = config_of(name)
    config.get_text_config().moe_intermediate_size = 24  # so that no expert's matrix is square
    model: Any = model_class(config).from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if transposed:  # as the folders on the hub are
        experts = [key for key in weights if ".mlp.experts." in key]
        weights |= {key: weights[key].mT.contiguous() for key in experts}
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    empty_shards(model)
    with alike_in_shards():
        ours = converted(model, weights)
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[key], whole[key]) for key in whole)
