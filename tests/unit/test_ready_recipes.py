"""Ready recipes are planned from their models' configurations, and fit the GPUs that they name.

tests/configs/ holds the shapes that the makers published. Their counts of parameters show that no
number was mistyped.
"""

import subprocess
import sys
from typing import NamedTuple

import pytest

from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.estimate.memory import GIB, Cluster
from packhorse.trainer.estimate.report import build_report
from tests.ranks import ROOT

CONFIGS = ROOT / "tests" / "configs"


class Ready(NamedTuple):
    config: str
    parameters: int  # of the model, as its maker's files have them
    gpus: int  # that the recipe's first lines name
    gib: int = 80


READY = {
    "sft_8b": Ready("llama31_8b", 8_030_261_248, 8),
    "sft_70b": Ready("llama33_70b", 70_553_706_496, 64),
    "lora_8b": Ready("llama31_8b", 8_030_261_248, 8),
    "qlora_8b": Ready("llama31_8b", 8_030_261_248, 1, 24),
    "qwen3_8b": Ready("qwen3_8b", 8_190_735_360, 8),
    "qwen3_30b_a3b": Ready("qwen3_30b_a3b", 30_532_122_624, 16),
    "gemma3_1b": Ready("gemma3_1b", 999_885_952, 1),
    "smollm3_3b": Ready("smollm3_3b", 3_075_098_624, 8),
    "mistral_nemo_12b": Ready("mistral_nemo_12b", 12_247_782_400, 8),
    "granite33_8b": Ready("granite33_8b", 8_170_864_640, 8),
}
WITHOUT_HUB = {"debug", "quickstart"}  # `make demo` and the tests run them whole
NOT_SUPPORTED = {"gpt_oss_20b"}


def test_every_recipe_and_every_configuration_is_used() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == READY.keys() | WITHOUT_HUB
    used = {ready.config for ready in READY.values()}
    assert {path.name for path in CONFIGS.iterdir()} == used | NOT_SUPPORTED


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


def test_gpt_oss_is_refused_as_its_weights_are_quantised() -> None:
    """docs/models.md says so, and why there is no recipe."""
    changes = [f"model.name={CONFIGS / 'gpt_oss_20b'}"]
    recipe = load_recipe(ROOT / "recipes" / "sft_8b.yaml", changes)
    with pytest.raises(BadInput, match="are quantised; give a bfloat16 or float32 model"):
        build_report(recipe, Cluster(8, 8, 80 * GIB))
