"""A linear module whose weight other code reads gets no adapter and stays whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.decoder import decoder_layers
from packhorse.trainer.model.linear_modules import linear_modules
from packhorse.trainer.model.lora import add_adapter
from tests.models.shrunk import config_of

READ = {"jamba": "mamba.dt_proj", "longcat_flash": "mlp.router.classifier"}


def model_of(model_type: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(model_type), dtype=torch.float32)
    model.set_attn_implementation("eager")
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(4, 40)[None], use_cache=False).logits


@pytest.mark.parametrize("model_type", READ)
def test_its_weight_is_not_packed_and_the_model_runs(model_type: str) -> None:
    model, plain = model_of(model_type), logits(model_of(model_type))
    section = {"rank": 4, "alpha": 8, "base": "int8", "target_parameters": "all-experts"}
    add_adapter(model, AdapterSection.model_validate(section), seed=0)
    packed = {name for name, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert any("o_proj" in name for name in packed)
    read = {name for name, _ in model.named_parameters() if READ[model_type] in name}
    assert read
    assert not read & packed
    assert not any(".lora_" in name for name in read)
    assert (logits(model) - plain).norm() < 0.5 * plain.norm()


def test_where_kernels_of_a_gpu_read_it_a_cpu_leaves_it_out_too() -> None:
    names = {name.rpartition(".")[2] for name in linear_modules(model_of("nemotron_h"))}
    assert "in_proj" in names
    assert "out_proj" not in names
    names = {name.rpartition(".")[2] for name in linear_modules(model_of("bloom"))}
    assert "dense" in names, "BLOOM reads slices of it where it simulates other ranks alone"


def test_an_adapter_that_nothing_would_see_is_refused() -> None:
    section = AdapterSection.model_validate({"rank": 4, "target_modules": ["dt_proj"]})
    with pytest.raises(BadInput, match=r"JambaMambaMixer reads the weight of .*dt_proj` itself"):
        add_adapter(model_of("jamba"), section, seed=0)


def test_a_list_inside_a_layer_is_not_the_stack_of_layers() -> None:
    """Each of LongCat-Flash's has two of everything, and the model has two layers."""
    kinds = {type(layer).__name__ for layer in decoder_layers(model_of("longcat_flash"))}
    assert kinds == {"LongcatFlashDecoderLayer"}


def test_a_class_whose_source_is_not_there_is_named() -> None:
    names: dict[str, Any] = {"__name__": "vendored"}
    exec("from torch import nn\nclass Mixer(nn.Linear): pass", names)
    model = model_of("jamba")
    model.model.layers[0].mixer = names["Mixer"](4, 4)
    with pytest.raises(BadInput, match=r"adapter: `vendored\.Mixer` has no source file"):
        linear_modules(model)
