"""Ready recipes are planned from their models' configurations, and fit the GPUs that they name.

tests/configs/ holds the shapes that the makers published. Their counts of parameters show that no
number was mistyped.
"""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import save_file

from packhorse.trainer.config.recipe import ModelSection, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.estimate.memory import GIB, Cluster
from packhorse.trainer.estimate.model import build_empty_model, measure_model
from packhorse.trainer.estimate.report import build_report, fill_template, require_fit
from packhorse.trainer.estimate.state import count_state_bytes
from packhorse.trainer.model.load import load_model, load_tokenizer
from tests.model_helpers import tiny
from tests.ranks import ROOT

CONFIGS = ROOT / "tests" / "configs"


class Ready(NamedTuple):
    config: str
    parameters: int  # of the model, as its maker's files have them
    gpus: int  # that the recipe's first lines name
    gib: int = 80


READY = {
    "sft_8b": Ready("llama31_8b", 8_030_261_248, 8),
    "long_8b_128k": Ready("llama31_8b", 8_030_261_248, 8),
    "long_8b_1m": Ready("llama31_8b", 8_030_261_248, 8, 141),
    "sft_70b": Ready("llama33_70b", 70_553_706_496, 64),
    "lora_8b": Ready("llama31_8b", 8_030_261_248, 8),
    "qlora_8b": Ready("llama31_8b", 8_030_261_248, 1, 24),
    "qwen3_8b": Ready("qwen3_8b", 8_190_735_360, 8),
    "qwen3_30b_a3b": Ready("qwen3_30b_a3b", 30_532_122_624, 16),
    "gemma3_1b": Ready("gemma3_1b", 999_885_952, 1),
    "smollm3_3b": Ready("smollm3_3b", 3_075_098_624, 8),
    "mistral_nemo_12b": Ready("mistral_nemo_12b", 12_247_782_400, 8),
    "granite33_8b": Ready("granite33_8b", 8_170_864_640, 8),
    "gpt_oss_20b": Ready("gpt_oss_20b_bf16", 20_914_757_184, 8),
}
WITHOUT_HUB = {"debug", "quickstart"}  # `make demo` and the tests run them whole
AS_PUBLISHED = {"gpt_oss_20b"}  # in 4 bits


def test_every_recipe_and_every_configuration_is_used() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == READY.keys() | WITHOUT_HUB
    used = {ready.config for ready in READY.values()}
    assert {path.name for path in CONFIGS.iterdir()} == used | AS_PUBLISHED


@pytest.mark.parametrize("name", READY)
def test_a_ready_recipe_fits_the_gpus_that_it_names(name: str) -> None:
    ready, file = READY[name], ROOT / "recipes" / f"{name}.yaml"
    recipe = load_recipe(file, [f"model.name={CONFIGS / ready.config}"])
    cluster = Cluster(ready.gpus, min(ready.gpus, 8), ready.gib * GIB)
    report = build_report(recipe, cluster)
    own = report.model.parameters - (report.model.trained if recipe.adapter else 0)
    assert own == ready.parameters
    assert report.candidates[recipe.parallel.deepspeed].shortages == []
    assert recipe.run.dir == f"runs/{name}"


def test_a_recipe_is_planned_offline_from_a_folder_with_a_configuration_alone() -> None:
    words = ["plan", "recipes/qwen3_30b_a3b.yaml", f"model.name={CONFIGS / 'qwen3_30b_a3b'}"]
    done = subprocess.run(
        [sys.executable, "-m", "packhorse", *words, "--gpus", "16"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Qwen3MoeForCausalLM: 30.5 billion parameters" in done.stdout


def test_what_does_not_fit_says_what_experts_take_and_4_bits_hold_them() -> None:
    overrides = [f"model.name={CONFIGS / 'qwen3_30b_a3b'}"]
    for adapter in ([], ["adapter={target_parameters: all-experts, base: nf4_double_quant}"]):
        recipe = load_recipe(ROOT / "recipes" / "qwen3_30b_a3b.yaml", [*overrides, *adapter])
        empty = build_empty_model(recipe.model, recipe.adapter)
        model = measure_model(empty, recipe.optim, recipe.adapter)
        report: Any = SimpleNamespace(candidates={}, model=model, cluster=Cluster(1, 1, GIB))
        if not adapter:
            with pytest.raises(BadInput, match=r"Experts are 95% of the weights.*base=nf4"):
                require_fit(report)
    state = count_state_bytes(model, fill_template(recipe, "zero2", model.hidden), world=1)
    trained = model.element * model.trained
    assert 15e9 < state.weights - trained < 18e9, "half a byte a weight, and embeddings"


def test_gpt_oss_is_refused_as_its_weights_are_quantised() -> None:
    changes = [f"model.name={CONFIGS / 'gpt_oss_20b'}"]
    recipe = load_recipe(ROOT / "recipes" / "gpt_oss_20b.yaml", changes)
    with pytest.raises(
        BadInput, match=r"are quantised; .* \(docs/models\.md has the way for gpt-oss\)"
    ):
        build_report(recipe, Cluster(8, 8, 80 * GIB))


SIZES = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    **{"num_local_experts": 4, "num_experts_per_tok": 2},
}
# what the 4 bits mean: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, 2023)
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_gpt_oss_stored_in_bfloat16_as_the_docs_say_is_exact(tmp_path):
    tree = json.loads((CONFIGS / "gpt_oss_20b_bf16" / "config.json").read_text()) | SIZES
    config = transformers.AutoConfig.for_model(**tree)
    made = tiny(config, torch.bfloat16)
    tensors, experts = dict(made.state_dict()), {}
    torch.manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        count, inner, outer = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (count, outer, inner // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = FP4[torch.stack([blocks & 15, blocks >> 4], -1).long()].flatten(-2)
        values = values * 2.0 ** (scales.float() - 127).unsqueeze(-1)
        experts[name] = values.flatten(-2).transpose(1, 2)
    published, stored = tmp_path / "published", tmp_path / "stored"
    published.mkdir()
    save_file(tensors, published / "model.safetensors", {"format": "pt"})
    tree["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (published / "config.json").write_text(json.dumps(tree))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (published / name).write_bytes((ROOT / "recipes/debug/model" / name).read_bytes())

    code = (ROOT / "docs" / "models.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace(
        '"openai/gpt-oss-20b", "models/gpt-oss-20b-bf16"', f'"{published}", "{stored}"'
    )
    exec(code, {})
    section = ModelSection(name=str(stored), attention="reference")
    model = load_model(section, load_tokenizer(section), seed=0)
    state = model.state_dict()
    assert all(torch.equal(state[name].float(), value) for name, value in experts.items())
    assert len(experts) == 4
