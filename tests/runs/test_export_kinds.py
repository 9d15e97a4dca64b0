"""Exports of models with towers, experts and tensors that are not trained hold what was trained."""

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
    AutoModelForImageTextToText,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from packhorse.trainer.checkpoint.hf_export import export
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.runs

TEXT: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0},
    **{"eos_token_id": 2, "bos_token_id": None},
}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
# predicts one token further, in a layer that transformers does not build
FURTHER = {
    "model.layers.2.eh_proj.weight": torch.arange(64.0).view(32, 2).bfloat16(),
    "model.layers.2.mlp.gate.e_score_correction_bias": torch.ones(4),
}


def gemma_config() -> Gemma3Config:
    text = {
        **{**TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 32},
        **{"layer_types": ["sliding_attention", "full_attention"]},
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    }
    tokens: dict[str, Any] = {"image_token_index": 500, "boi_token_index": 501}
    return Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        eoi_token_index=502,
        **tokens,
    )


def make_gemma(folder: Path) -> None:
    Gemma3ForConditionalGeneration(gemma_config()).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')


def make_deepseek(folder: Path) -> None:
    config = DeepseekV3Config(
        **TEXT,
        **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        **{"v_head_dim": 8, "num_nextn_predict_layers": 1, "tie_word_embeddings": True},
    )
    model = DeepseekV3ForCausalLM(config).bfloat16()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.randn(4) / 100  # in fp32, as these models have it
    # a head of its own, although the configuration calls it tied
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.01)
    model.save_pretrained(folder)
    whole = load_file(folder / "model.safetensors") | FURTHER
    whole["lm_head.weight"] = model.lm_head.weight.detach()
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


CASES = {  # the run: its model, its overrides
    "towers, zero0": (make_gemma, ["model.dtype=float32", "parallel.deepspeed=zero0"]),
    "towers, zero3": (make_gemma, ["model.dtype=float32", "parallel.deepspeed=zero3"]),
    "towers, lora": (
        make_gemma,
        ["model.dtype=float32", "parallel.deepspeed=zero3", "adapter={rank: 4}"],
    ),
    "experts": (make_deepseek, ["model.dtype=bfloat16", "parallel.deepspeed=zero2"]),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three steps of each case with decay, in one process, and export it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("kinds")
    cases = []
    for name, (make, overrides) in CASES.items():
        folder = root / make.__name__
        if not folder.exists():
            shutil.copytree(ROOT / "recipes" / "debug" / "model", folder)
            make(folder)
        fixed = [
            *("train.steps=3", "eval.generate=null", "eval.every_steps=null", "optim.lr=1e-2"),
            *("optim.weight_decay=0.5", f"data.cache={root / 'cache'}", "model.init=pretrained"),
        ]
        cases.append(
            {
                "run": str(root / name),
                "recipe": str(ROOT / "recipes" / "debug.yaml"),
                "overrides": [*fixed, f"model.name={folder}", *overrides],
            }
        )
    (root / "cases.json").write_text(json.dumps(cases))
    run_ranks(1, ["-m", "tests.numerics.cases", str(root / "cases.json")])
    for name in CASES:
        export(root / name, root / f"{name}, out", merge="lora" in name)
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", ["towers, zero0", "towers, zero3", "towers, lora"])
def test_towers_keep_their_values_and_the_language_model_learns(root: Path, name: str) -> None:
    before, after = tensors(root / "make_gemma"), tensors(root / f"{name}, out")
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    towers = {key for key in before if "vision" in key or "projector" in key}
    assert towers
    assert not moved & towers
    matrices = {key for key in before if key.endswith("_proj.weight")} - towers
    assert matrices <= moved
    if "lora" not in name:
        assert moved == before.keys() - towers


def test_an_export_with_towers_has_its_class_and_its_processors_files(root: Path) -> None:
    out = root / "towers, zero3, out"
    assert type(AutoModelForImageTextToText.from_pretrained(out)) is Gemma3ForConditionalGeneration
    processor = "preprocessor_config.json"
    assert (out / processor).read_text() == (root / "make_gemma" / processor).read_text()


def test_tensors_keep_their_types_and_those_of_the_source_are_carried_over(root: Path) -> None:
    before, after = tensors(root / "make_deepseek"), tensors(root / "experts, out")
    assert {key: (t.dtype, t.shape) for key, t in before.items()} == {
        key: (t.dtype, t.shape) for key, t in after.items()
    }
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert before[bias].dtype == torch.float32
    for key in (bias, *FURTHER):
        assert torch.equal(before[key], after[key]), key
    index = json.loads((root / "experts, out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    config = json.loads((root / "experts, out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    assert config["tie_word_embeddings"] is False, "the head has weights of its own"
    loaded = DeepseekV3ForCausalLM.from_pretrained(root / "experts, out")
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_configurations_are_read_alike_by_transformers_4_and_5(root: Path) -> None:
    out = root / "towers, zero3, out"
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    of_5 = AutoConfig.from_pretrained(out).text_config.rope_parameters
    assert of_5 == AutoConfig.from_pretrained(root / "make_gemma").text_config.rope_parameters
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend", "extra_special_tokens"} & {*tokenizer}
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (out, root / "make_gemma"))
    assert ours("<|im_start|>user a 12").input_ids == theirs("<|im_start|>user a 12").input_ids
    assert ours.all_special_tokens == theirs.all_special_tokens
