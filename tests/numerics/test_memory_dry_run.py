"""The dry run of the fullest micro-batches changes nothing, at the start or after a resume."""

from __future__ import annotations

from typing import Any

import pytest

from tests.numerics.compare import BF16, STAGES, Run, case, difference, is_same, run_cases

pytestmark = pytest.mark.runs

HERE = tuple(stage for stage in STAGES if stage != "zero3_nvme")
DONE = {"changes": ["dry_run_first"]}
IN_BF16 = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Run four steps on two ranks; after a dry run, the gradients that it leaves are checked."""
    root = tmp_path_factory.mktemp("dry-run")

    def pair(name: str, stage: str, *overrides: str) -> list[dict[str, Any]]:
        four = (*overrides, "train.steps=4")
        dry_runs = [
            case(root, f"{name}-dry-run", stage, *four, **DONE, **stop)
            for stop in ({"stop_after": 2}, {})
        ]
        return [case(root, name, stage, *four), *dry_runs]

    cases = [one for stage in HERE for one in pair(stage, stage)]
    cases += [one for stage in IN_BF16 for one in pair(f"bf16-{stage}", stage, BF16[0])]
    cases += [case(root, "control", "zero0", "train.steps=4", changes=["dry_run_that_learns"])]
    return run_cases({2: cases})


@pytest.mark.parametrize("name", [*HERE, *(f"bf16-{stage}" for stage in IN_BF16)])
def test_a_dry_run_leaves_no_trace(runs: dict[str, Run], name: str) -> None:
    """Bit by bit, at every stage, with offload, started and resumed."""
    assert is_same(runs[name], runs[f"{name}-dry-run"])


def test_a_dry_run_that_learned_would_be_noticed(runs: dict[str, Run]) -> None:
    assert difference(runs["zero0"], runs["control"]).is_caught
