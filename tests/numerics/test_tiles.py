"""Feed-forward blocks in tiles learn what plain ones do, at every ZeRO stage and in an adapter.

Whole runs of recipes/debug.yaml in fp32 on two ranks, with the bounds of test_same_run.py.
"""

from __future__ import annotations

import json

import pytest

from tests.numerics.compare import Run, case, difference, report, run_cases

pytestmark = pytest.mark.runs

FULL, OFFLOAD = (f"model.activation_checkpointing={mode}" for mode in ("full", "offload"))
LORA, NARROW = (
    f"adapter={{rank: 4, alpha: 8, target_modules: {targets}}}"
    for targets in ("all-linear", "[down_proj]")
)
SINGLE = "batch.global_batch_size=1"
TILES, LARGE = ["in_tiles"], ["in_tiles_of_large_layers"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("tiles")
    steps = "train.steps=3"
    found = run_cases(
        {
            2: [
                case(root, "plain", "zero2", FULL, steps),
                case(root, "plain-lora", "zero2", FULL, LORA, steps),
                case(root, "plain-narrow", "zero2", FULL, NARROW, steps),
                case(root, "zero1", "zero1", FULL, steps, changes=TILES),
                case(root, "zero3", "zero3", FULL, steps, changes=TILES),
                case(root, "large", "zero3", FULL, steps, changes=LARGE),
                case(root, "offload", "zero3_offload_all", OFFLOAD, steps, changes=LARGE),
                case(root, "lora", "zero3", FULL, LORA, steps, changes=LARGE),
                case(root, "narrow", "zero3", FULL, NARROW, steps, changes=LARGE),
                # the two ranks would be too many for a sequence each
                case(root, "auto", "zero1", FULL, steps, SINGLE, "parallel.sequence=auto"),
            ]
        }
    )
    environment = json.loads((root / "auto" / "environment.json").read_text())
    assert environment["ranks_a_sequence"] == 2
    return found


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        *(("plain", other) for other in ("zero1", "zero3", "large", "offload")),
        ("plain-lora", "lora"),
        ("plain-narrow", "narrow"),
    ],
)
def test_tiles_learn_what_plain_blocks_do(runs: dict[str, Run], plain: str, other: str) -> None:
    seen = difference(runs[plain], runs[other])
    report(f"{plain} against {other}", seen)
    assert seen.agrees
