"""Any world size resumes any checkpoint, and the run equals one that was never stopped (X4).

`pytest -s` prints the differences. Each bound has controls that must exceed it by ten times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.numerics.cases import DEFECTIVE_RESUMES
from tests.numerics.compare import BF16, BF16_CHANGE_BOUND, Run, case, difference, report, run_cases

pytestmark = pytest.mark.runs

# the worlds that X4 saves and resumes at, by stage: each stage both shrinks and grows
MOVES = {
    "zero1": ((2, 1), (2, 4)),
    "zero2": ((1, 2), (4, 3)),
    "zero3": ((2, 1), (1, 2), (2, 4), (4, 3)),
    "zero3_offload_optimizer": ((2, 1), (1, 2)),
}
STAGE_MOVES = (
    ("zero1", "zero3"),
    ("zero3", "zero2"),
    ("zero2", "zero0"),
    ("zero3", "zero3_offload_all"),
)


def moved_cases(
    root: Path,
) -> tuple[dict[int, list[dict[str, Any]]], dict[int, list[dict[str, Any]]]]:
    """Return the cases that stop after step 3 at one world size, and those that resume them."""
    before: dict[int, list[dict[str, Any]]] = {world: [] for world in (1, 2, 4)}
    after: dict[int, list[dict[str, Any]]] = {world: [] for world in (1, 2, 3, 4)}

    def move(
        name: str, worlds: tuple[int, int], stages: tuple[str, str], *overrides: str, **then: Any
    ) -> None:
        model = {"changes": [name]} if name == "frozen_and_buffers" else {}
        # some steps have three micro-batches, so one rank of four idles
        overrides = ("parallel.allow_idle_ranks=true", *overrides)
        before[worlds[0]].append(case(root, name, stages[0], *overrides, stop_after=3, **model))
        after[worlds[1]].append(case(root, name, stages[1], *overrides, **(then or model)))

    never_stopped = [case(root, f"2-{stage}", stage) for stage in (*MOVES, "zero3_nvme")]
    never_stopped += [case(root, "2-frozen_and_buffers", "zero3", changes=["frozen_and_buffers"])]
    before[2] += [*never_stopped, case(root, "2-bf16", "zero3", *BF16)]
    for stage, moves in MOVES.items():
        for saved, resumed in moves:
            move(f"{stage}-{saved}-to-{resumed}", (saved, resumed), (stage, stage))
    for first, then in STAGE_MOVES:
        move(f"{first}-to-{then}", (2, 3), (first, then), "checkpoint.asynchronous=false")
    move("bf16-2-to-1", (2, 1), ("zero3", "zero1"), *BF16)
    move("nvme-2-to-3", (2, 3), ("zero3_nvme", "zero3_nvme"))
    move("frozen_and_buffers", (2, 3), ("zero3", "zero3"))
    for defect in DEFECTIVE_RESUMES:
        move(defect, (2, 1), ("zero3", "zero3"), changes=[defect])
    return before, after


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return run_cases(*moved_cases(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize(
    ("stage", "saved", "resumed"),
    [(stage, *worlds) for stage, moves in MOVES.items() for worlds in moves],
)
def test_x4_a_run_resumed_by_another_world_is_one_never_stopped(
    runs: dict[str, Run], stage: str, saved: int, resumed: int
) -> None:
    name = f"{stage}-{saved}-to-{resumed}"
    seen = difference(runs[f"2-{stage}"], runs[name])
    report(name, seen)
    assert seen.agrees


@pytest.mark.parametrize("stages", STAGE_MOVES, ids="-to-".join)
def test_x4_the_stage_may_change_with_the_world(
    runs: dict[str, Run], stages: tuple[str, str]
) -> None:
    seen = difference(runs["2-zero3"], runs["-to-".join(stages)])
    report(f"{' to '.join(stages)}, 2 ranks to 3", seen)
    assert seen.agrees


def test_x4_holds_with_nvme_offload(runs: dict[str, Run]) -> None:
    seen = difference(runs["2-zero3_nvme"], runs["nvme-2-to-3"])
    report("NVMe, 2 ranks to 3", seen)
    assert seen.agrees


def test_x4_holds_with_frozen_parameters_and_persistent_buffers(runs: dict[str, Run]) -> None:
    base, resumed = runs["2-frozen_and_buffers"], runs["frozen_and_buffers"]
    assert float(resumed.changes["steps_seen"]) == 6
    assert "model.embed_tokens.weight" not in resumed.changes, "it is not trained, and was saved"
    seen = difference(base, resumed)
    report("frozen parameters and buffers, 2 ranks to 3", seen)
    assert seen.agrees


def test_x4_in_bf16_stays_within_the_measured_tolerance(runs: dict[str, Run]) -> None:
    seen = difference(runs["2-bf16"], runs["bf16-2-to-1"])
    report("bf16, 2 ranks to 1, ZeRO 3 to 1", seen)
    assert seen.change <= BF16_CHANGE_BOUND


@pytest.mark.parametrize("defect", DEFECTIVE_RESUMES)
def test_x4_control_is_caught(runs: dict[str, Run], defect: str) -> None:
    seen = difference(runs["2-zero3"], runs[defect])
    report(f"control {defect}", seen)
    assert seen.is_caught
