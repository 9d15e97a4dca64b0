"""An optimizer state on the host changes no bit: X2 to X4 and X7 of docs/design.md with it on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.numerics.compare import BF16, Run, case, difference, is_same, report, run_cases

pytestmark = pytest.mark.runs

STAGES = ("zero1", "zero2", "zero3")
STREAMED: dict[str, Any] = {"changes": ["small_chunks"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("streamed")
    two: list[dict[str, Any]] = []
    for stage in STAGES:
        for name, given in ((stage, {}), (f"{stage}_streamed", STREAMED)):
            two.append(case(root, f"{name}-2", name, **given))
            two.append(case(root, f"{name}-bf16", name, *BF16, "train.steps=2", **given))
    # a state on the host goes on there, moves to the device, and comes from it
    for name, first, then in (
        ("zero3-on-host", "zero3_streamed", "zero3_streamed"),
        ("zero1-on-host", "zero1_streamed", "zero1_streamed"),
        ("zero2-to-device", "zero2_streamed", "zero2"),
        ("zero2-to-host", "zero2", "zero2_streamed"),
    ):
        two += [case(root, name, first, stop_after=3, **STREAMED), case(root, name, then)]
    moves = {"zero3": "zero1_streamed", "zero1": "zero3"}
    two += [case(root, f"{name}-to-1", f"{name}_streamed", stop_after=3) for name in moves]
    one = [case(root, f"{name}-to-1", then, **STREAMED) for name, then in moves.items()]
    return run_cases({2: two}, {1: one})


@pytest.mark.parametrize("kind", ["2", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_state_on_the_host_changes_no_bit(runs: dict[str, Run], stage: str, kind: str) -> None:
    assert is_same(runs[f"{stage}-{kind}"], runs[f"{stage}_streamed-{kind}"])


@pytest.mark.parametrize(
    "name", ["zero3-on-host", "zero1-on-host", "zero2-to-device", "zero2-to-host"]
)
def test_a_resumed_run_is_one_never_stopped(runs: dict[str, Run], name: str) -> None:
    assert is_same(runs[f"{name.split('-')[0]}-2"], runs[name])


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_another_world_and_stage_resumes_it(runs: dict[str, Run], stage: str) -> None:
    seen = difference(runs[f"{stage}-2"], runs[f"{stage}-to-1"])
    report(f"{stage}, streamed by 2 ranks, to 1", seen)
    assert seen.agrees
