"""RWKV's weights stay as they are in evaluation, where transformers halves later layers'."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.trainer.config.recipe import AdapterSection, ModelSection
from packhorse.trainer.model.load import load_model, load_tokenizer
from tests.model_helpers import relative
from tests.models.shrunk import config_of
from tests.ranks import ROOT
from tests.unit.test_linear_modules import logits, model_of
from tests.unit.test_lora import stir


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model_of("rwkv").save_pretrained(tmp_path)
    for path in (ROOT / "recipes" / "debug" / "model").glob("token*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def loaded(folder: Path, **adapter: Any) -> Any:
    section = ModelSection.model_validate({"name": str(folder), "dtype": "float32"})
    made = AdapterSection.model_validate({"rank": 4, "alpha": 8, **adapter})
    return load_model(section, load_tokenizer(section), seed=0, adapter=made)


@pytest.mark.parametrize("base", [None, "int8"])
def test_an_adapter_acts_alike_in_training_and_in_evaluation(
    folder: Path, base: str | None
) -> None:
    model = stir(loaded(folder, base=base))
    trained = logits(model.train())
    assert torch.equal(logits(model.eval()), trained)
    assert relative(trained, logits(model_of("rwkv"))) > 1e-2


def test_the_configuration_keeps_its_value(folder: Path) -> None:
    assert loaded(folder).config.rescale_every == config_of("rwkv").rescale_every == 6


def test_the_start_says_what_peft_would_make_of_the_adapter(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded(folder)
    assert "it can be exported with --merge only, as RwkvForCausalLM" in caplog.text
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rescale_every": 6', '"rescale_every": 0'))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded(folder)
    assert "--merge" not in caplog.text
