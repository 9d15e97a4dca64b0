"""The run is a function of the recipe: X2, X3, X7 and X8 of docs/design.md.

Every case is a whole run of recipes/debug.yaml through trainer/train.py: packing, uneven masks,
NEFTune noise, three or four micro-batches a step, weight decay, clipping. Of three ranks, one ends
some steps on a filler.

Losses and gradient norms agree to 1e-6 relative. Weights agree by their change D since the start:
||Da - Db|| <= 1e-4 ||Da|| for each tensor. The learning rate is 1e-2, as a small one would hide a
defect below the bound. Adam's eps is 1e-3, as 1e-8 would turn rounding noise into full steps. Every
bound has controls, defects put in on purpose, that must exceed it by ten times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.numerics.cases import DEFECTS
from tests.numerics.compare import (
    BF16,
    BF16_CHANGE_BOUND,
    CONTROL_FACTOR,
    STAGES,
    Run,
    case,
    difference,
    is_same,
    report,
    run_cases,
    wide,
)


def all_cases(root: Path) -> dict[int, list[dict[str, Any]]]:
    """Return the cases by world size. A resumed run is two: one stops, the other continues it."""

    def resumed(world: int, stage: str) -> list[dict[str, Any]]:
        name = f"{world}-{stage}-resumed"
        return [case(root, name, stage, stop_after=3), case(root, name, stage)]

    return {
        1: [
            *(case(root, f"1-{stage}", stage) for stage in STAGES),
            case(root, "1-wide", "zero0", *wide(root)),
            case(root, "1-micro4", "zero2", "batch.micro_batch_size=4"),
            case(root, "1-micro2", "zero2", "batch.micro_batch_size=2"),
            *resumed(1, "zero2"),
            *resumed(1, "zero3"),
            case(root, "1-bf16", "zero3", *BF16),
            *(
                case(root, f"1-fp8-{s}", s, *FP8, changes=["fp8_on_cpu"])
                for s in ("zero1", "zero3")
            ),
        ],
        2: [
            *(case(root, f"2-{stage}", stage) for stage in STAGES),
            case(root, "2-wide", "zero0", *wide(root)),
            *(case(root, f"2-zero3-{m}", "zero3", RECOMPUTED + m) for m in ("selective", "full")),
            *(part for stage in STAGES for part in resumed(2, stage)),
            *(
                case(root, f"2-{name}", "zero3", changes=[name])
                for name in DEFECTS
                if name != "bf16_accumulation"
            ),
            *(case(root, f"2-{w}", "zero2", f"loss.weighting={w}") for w in WEIGHTINGS),
        ],
        3: [
            case(root, "3-zero2", "zero2"),
            case(root, "3-zero3", "zero3"),
            *(case(root, f"3-{w}", "zero3", f"loss.weighting={w}") for w in WEIGHTINGS),
        ],
        4: [
            case(root, "4-bf16", "zero3", *BF16),
            case(root, "4-fp8", "zero3", *FP8, changes=["fp8_on_cpu"]),
            case(root, "4-bf16-accumulated-in-bf16", "zero3", *BF16, changes=["bf16_accumulation"]),
            # last, as DeepSpeed keeps the groups of two ranks that hpZ makes
            case(root, "4-bf16-zero3_prefetch", "zero3_prefetch", *BF16),
            case(root, "4-bf16-zero3_hpz", "zero3_hpz", *BF16, stop_after=3),
            case(root, "4-bf16-zero3_hpz", "zero3_hpz", *BF16),
        ],
    }


FP8 = (*BF16, "model.matmul=fp8_rowwise")
RECOMPUTED = "model.activation_checkpointing="
WEIGHTINGS = ("example", "20")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return run_cases(all_cases(tmp_path_factory.mktemp("runs")))


# ----------------------------------------------------------------------------------------------- X2


@pytest.mark.parametrize("other", ["2-zero3", "3-zero3", "3-zero2", "1-micro2", "1-micro4"])
def test_x2_world_size_and_micro_batches_change_nothing(runs: dict[str, Run], other: str) -> None:
    """1 rank x 4 micro-batches = 2 x 2 = 4 rows at once = 3 ranks with fillers."""
    seen = difference(runs["1-zero3"], runs[other])
    report(f"1 rank x 4 against {other}", seen)
    assert seen.agrees


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_x2_holds_for_every_weighting(runs: dict[str, Run], weighting: str) -> None:
    seen = difference(runs[f"2-{weighting}"], runs[f"3-{weighting}"])
    report(f"{weighting}, 2 ranks against 3", seen)
    assert seen.agrees
    assert difference(runs["2-zero2"], runs[f"2-{weighting}"]).is_caught, (
        "the weighting has no effect"
    )


@pytest.mark.parametrize("defect", [name for name in DEFECTS if name != "bf16_accumulation"])
def test_x2_control_is_caught(runs: dict[str, Run], defect: str) -> None:
    seen = difference(runs["1-zero3"], runs[f"2-{defect}"])
    report(f"control {defect}", seen)
    assert seen.is_caught


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(runs: dict[str, Run], mode: str) -> None:
    assert is_same(runs["2-zero3"], runs[f"2-zero3-{mode}"])


# ----------------------------------------------------------------------------------------------- X3


@pytest.mark.parametrize("name", ["1-zero2", "1-zero3", *(f"2-{stage}" for stage in STAGES)])
def test_x3_a_resumed_run_is_one_never_stopped(runs: dict[str, Run], name: str) -> None:
    """They are equal bit by bit, at the same world size."""
    assert is_same(runs[name], runs[f"{name}-resumed"])


def test_x3_control_a_single_bit_is_caught(runs: dict[str, Run]) -> None:
    run = runs["2-zero3"]
    name, change = next(iter(run.changes.items()))
    moved = change.clone()
    moved.view(-1)[0] = torch.nextafter(moved.view(-1)[0], torch.tensor(1.0, dtype=torch.float64))
    assert not is_same(
        run, Run(run.losses, run.norms, run.eval_losses, {**run.changes, name: moved})
    )


# ----------------------------------------------------------------------------------------------- X7


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("world", [1, 2])
def test_x7_every_stage_and_offload_equals_stage_0(
    runs: dict[str, Run], world: int, stage: str
) -> None:
    base = f"{world}-wide" if stage == "zero3_nvme" else f"{world}-zero0"
    seen = difference(runs[base], runs[f"{world}-{stage}"])
    report(f"{world} ranks, stage 0 against {stage}", seen)
    assert seen.agrees


@pytest.mark.parametrize("template", ["zero3_hpz", "zero3_prefetch"])
def test_where_weights_are_gathered_from_changes_no_bit(
    runs: dict[str, Run], template: str
) -> None:
    """Groups of two of four ranks share the weights, and the run is stopped and resumed."""
    assert is_same(runs["4-bf16"], runs[f"4-bf16-{template}"])


# ----------------------------------------------------------------------------------------------- X8


def test_x8_in_bf16_world_size_and_micro_batches_stay_within_the_tolerance(
    runs: dict[str, Run],
) -> None:
    """Weights are bf16, master weights and accumulation fp32: 1 rank x 16 against 4 x 4."""
    seen = difference(runs["1-bf16"], runs["4-bf16"])
    report("bf16, 1 x 16 against 4 x 4", seen)
    control = difference(runs["1-bf16"], runs["4-bf16-accumulated-in-bf16"])
    report("control, gradients accumulated in bf16", control)
    assert seen.change <= BF16_CHANGE_BOUND
    assert control.change > CONTROL_FACTOR * BF16_CHANGE_BOUND


def test_x8_in_fp8_a_packed_sequence_gives_the_same_gradient_wherever_it_lies(
    runs: dict[str, Run],
) -> None:
    """Each is a micro-batch of its own, so that all are rounded alike: 1 rank x 16 against 4 x 4,
    and ZeRO-1, which never frees a weight, against ZeRO-3.
    """
    seen = difference(runs["1-fp8-zero3"], runs["4-fp8"])
    report("fp8, 1 x 16 against 4 x 4", seen)
    assert seen.change <= BF16_CHANGE_BOUND
    stages = difference(runs["1-fp8-zero1"], runs["1-fp8-zero3"])
    report("fp8, ZeRO-1 against ZeRO-3", stages)
    assert stages.change <= BF16_CHANGE_BOUND
    assert difference(runs["1-bf16"], runs["1-fp8-zero3"]).is_caught, "products were in fp8"
