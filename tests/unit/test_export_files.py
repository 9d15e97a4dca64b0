"""What an export has beside the trained weights: the source's other tensors, and configurations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Gemma4TextConfig,
    LlamaForCausalLM,
    Olmo3Config,
    Qwen3MoeConfig,
)

from packhorse.trainer.checkpoint.export_files import (
    CARRIED,
    carry_over,
    clean_tokenizer,
    copy_files,
    keep_files,
    suit_transformers_4,
)
from packhorse.trainer.config.recipe import AdapterSection, ModelSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.lora import add_adapter
from tests.model_helpers import SIZES, tiny_llama


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model's folder whose weights hold a layer for a further token, and a rotary table."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    more = {
        "mtp.layers.0.proj.weight": torch.ones(2, 3).bfloat16(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": torch.zeros(SIZES["vocab_size"], SIZES["hidden_size"]),  # tied, and stale
    }
    save_file(load_file(path) | more, path, metadata={"format": "pt"})
    return path.parent


def test_tensors_that_the_model_has_no_place_for_are_carried_over_as_they_are(
    source: Path, tmp_path: Path
) -> None:
    model, out = tiny_llama(tie_word_embeddings=True), tmp_path / "out"
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(out)
    section, kept = ModelSection(name=str(source)), tmp_path / "kept"
    kept.mkdir()
    keep_files(section, model, kept)
    assert json.loads((kept / CARRIED).read_text()) == ["mtp.layers.0.proj.weight"]
    carry_over(section, kept, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    (carried,) = (k for k, file in index["weight_map"].items() if "carried" in file)
    assert carried == "mtp.layers.0.proj.weight"
    assert load_file(out / index["weight_map"][carried])[carried].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    loaded = LlamaForCausalLM.from_pretrained(out)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name

    add_adapter(model, AdapterSection(rank=2), 0)
    keep_files(section, model, kept)
    assert json.loads((kept / CARRIED).read_text()) == [carried], "an adapter changes nothing"
    (source / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"has `mtp.layers.0.proj.weight` no more"):
        carry_over(section, kept, out)


def test_layers_that_are_not_there_are_not_named(source: Path, tmp_path: Path) -> None:
    model, kept = tiny_llama(), tmp_path / "kept"
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(tmp_path / "out")
    kept.mkdir()
    section = ModelSection(name=str(source), init="random")
    keep_files(section, model, kept)
    shutil.rmtree(source)  # which is not needed for it
    carry_over(section, kept, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0


def test_the_processors_files_are_kept_and_code_only_if_it_is_trusted(
    source: Path, tmp_path: Path
) -> None:
    for name in ("processor_config.json", "modeling_own.py"):
        (source / name).write_text("{}")
    for trusted in (False, True):
        kept, out = tmp_path / f"kept-{trusted}", tmp_path / f"out-{trusted}"
        for folder in (kept, out):
            folder.mkdir()
        section = ModelSection(name=str(source), trust_remote_code=trusted)
        keep_files(section, tiny_llama(), kept)
        copy_files(kept, out, with_code=trusted)
        expected = {"processor_config.json"} | ({"modeling_own.py"} if trusted else set())
        assert {path.name for path in out.iterdir()} == expected


def test_a_configuration_has_the_keys_of_transformers_4_too(tmp_path: Path) -> None:
    config: Any = Qwen3MoeConfig(
        **SIZES, num_experts=4, rope_parameters={"rope_type": "linear", "factor": 2.0}
    )
    config.rope_parameters["rope_theta"] = 5e5
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    suit_transformers_4(tmp_path, False)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["num_experts"], written["rope_theta"]) == (4, 5e5)
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "written"),
    [(Gemma4TextConfig(), {}), (Olmo3Config(), {"rope_theta": 500_000.0})],
)
def test_bases_of_layers_with_and_without_windows_are_those_of_transformers_4(
    tmp_path: Path, config: Any, written: dict[str, float]
) -> None:
    """It does not know Gemma 4, and has one base for OLMo 3."""
    config.save_pretrained(tmp_path)
    suit_transformers_4(tmp_path, False)
    found = json.loads((tmp_path / "config.json").read_text())
    keys = {key for key in found if key.startswith("rope")} - {"rope_parameters"}
    assert {key: found[key] for key in keys} == written
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_a_tokenizer_names_no_place_and_the_code_beside_it(tmp_path: Path) -> None:
    saved = {
        **{"is_local": True, "local_files_only": False, "backend": "tokenizers"},
        **{"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]},
        "auto_map": {"AutoTokenizer": ["org/x--tokenization_own.Own", None], "Other": "org/x--y.Z"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved))
    (tmp_path / "tokenization_own.py").write_text("")
    clean_tokenizer(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None], "Other": "org/x--y.Z"},
    }
