"""Popular families train packed on two ranks as plain PyTorch does alone, at ZeRO 0 and 3.

`make models` tries all architectures of transformers and writes docs/models_sweep.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models.sweep import BOUNDS
from tests.ranks import run_ranks

pytestmark = pytest.mark.runs

# One of each way to be special: experts, latent attention, sinks with windows, layers that share
# keys, a tower that text does not reach beside experts that are loaded by their shape, layers with
# a state (alternating, parallel, of another class, convolutions), a router that reads a linear
# module's weight, rules for new weights that ask for shapes, and an indexer that chooses the keys.
BY_DOCUMENT = "glm_moe_dsa"
POPULAR = (
    *("qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_text", "qwen3_vl_moe"),
    *("qwen3_next", "falcon_h1", "jamba", "lfm2", "zamba2", "longcat_flash", "rwkv", BY_DOCUMENT),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path: Path = tmp_path_factory.mktemp("models") / "results.json"
    # the second rank has fewer documents in each step, and so idle calls to make
    run_ranks(2, ["-m", "tests.models.sweep", str(path), *POPULAR], timeout_s=900)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", POPULAR)
def test_a_popular_family_is_right_packed(name: str, results: dict[str, Any]) -> None:
    seen = results[name]
    assert seen["works"] == ("by document" if name == BY_DOCUMENT else "packed"), seen
    for stage in ("zero0", "zero3"):
        over = {what: seen[stage][what] for what in BOUNDS if seen[stage][what] > BOUNDS[what]}
        assert not over, (stage, seen[stage])
