"""Each optimizer is exact: X2, X3, X4 and X7 of docs/design.md, in two starts of ranks.

Lion has no epsilon: it takes a step of full size for a gradient of rounding noise. No weight of the
debug model has one. Its learning rate, and Muon's, are smaller, so that six steps do not overshoot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.checkpoint.hf_export import export
from packhorse.trainer.datatypes import BadInput
from tests.numerics.compare import (
    BF16,
    BF16_CHANGE_BOUND,
    Difference,
    Run,
    case,
    difference,
    is_same,
    report,
    run_cases,
    start_weights,
)

pytestmark = pytest.mark.runs

CHOSEN = {
    "lion": ("optim.kind=lion", "optim.lr=3e-4"),
    "sgd": ("optim.kind=sgd", "optim.lr=1e-1"),
    # the group with one matrix lets stages 1 and 2 cut matrices, and not between the two layers
    "muon": (
        *("optim.kind=muon", "optim.lr=3e-3"),
        "optim.groups=[{match: layers.0.self_attn.q_proj, lr: 3e-3}]",
    ),
    "adafactor": ("optim.kind=adafactor", "optim.lr=3e-3"),
    "adamw_8bit": ("optim.kind=adamw_8bit",),
    "adamw_bf16": ("optim.state_dtype=bf16",),
}
STAGES = ("zero0", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("optimizers")
    two: list[dict[str, Any]] = []
    one: list[dict[str, Any]] = []
    for kind, chosen in CHOSEN.items():
        two += [case(root, f"{kind}-2-{stage}", stage, *chosen) for stage in STAGES]
        for stage in ("zero2", "zero3"):
            resumed = case(root, f"{kind}-2-{stage}-resumed", stage, *chosen)
            two += [{**resumed, "stop_after": 3}, resumed]
        for stage, defects in (("zero3", []), ("zero1", ["moment_zeroed"])):
            moved = case(root, f"{kind}-{stage}-moved", stage, *chosen)
            two.append({**moved, "stop_after": 3})
            one.append(
                {**case(root, f"{kind}-{stage}-moved", "zero2", *chosen), "changes": defects}
            )
        one.append(case(root, f"{kind}-1", "zero0", *chosen, "batch.micro_batch_size=2"))
    average = ("optim.ema_decay=0.7", "checkpoint.every_steps=1")
    two.append(case(root, "ema", "zero3", *average, stop_after=3))
    one.append(case(root, "ema", "zero2", *average))
    muon = CHOSEN["muon"]
    two.append(case(root, "parts", "zero2", *muon, changes=["parts_orthogonalised"]))
    two.append(case(root, "muon-bf16", "zero1", *muon, *BF16, "train.steps=1"))
    two.append(case(root, "muon-bf16-3", "zero3", *muon, *BF16, "train.steps=1"))
    return run_cases({2: two}, {1: one})


def agrees(kind: str, seen: Difference) -> bool:
    """Return whether two runs agree; with small moments but for those that rounding flips.

    A gradient that differs by 1e-7 takes the next code now and then, a few percent off, or the next
    number in bf16, 1/256 off: seen were 4e-4 of a tensor's change. From the same gradients all
    worlds make the same codes (tests/unit/test_optimizers.py).
    """
    return seen.agrees or (
        kind in ("adamw_8bit", "adamw_bf16") and replace(seen, change=seen.change / 10).agrees
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", CHOSEN)
def test_every_stage_and_world_learns_the_same(runs: dict[str, Run], kind: str, stage: str) -> None:
    """One rank at stage 0 with larger micro-batches = two ranks at each stage (X2, X7)."""
    seen = difference(runs[f"{kind}-1"], runs[f"{kind}-2-{stage}"])
    report(f"{kind}, 1 rank against 2 at {stage}", seen)
    assert agrees(kind, seen)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("kind", CHOSEN)
def test_a_resumed_run_is_one_never_stopped(runs: dict[str, Run], kind: str, stage: str) -> None:
    assert is_same(runs[f"{kind}-2-{stage}"], runs[f"{kind}-2-{stage}-resumed"])


@pytest.mark.parametrize("kind", CHOSEN)
def test_another_world_and_stage_resume_it(runs: dict[str, Run], kind: str) -> None:
    """Two ranks at stage 3 hand over to one at stage 2; a lost moment is noticed."""
    seen = difference(runs[f"{kind}-2-zero3"], runs[f"{kind}-zero3-moved"])
    report(f"{kind}, resumed by one rank", seen)
    assert agrees(kind, seen)
    control = difference(runs[f"{kind}-2-zero1"], runs[f"{kind}-zero1-moved"])
    report(f"{kind}, control without the moment", control)
    assert control.is_caught


def test_parts_of_matrices_orthogonalised_alone_are_caught(runs: dict[str, Run]) -> None:
    seen = difference(runs["muon-1"], runs["parts"])
    report("muon, control of parts", seen)
    assert seen.is_caught


def test_muon_finds_its_matrices_in_bf16_too(runs: dict[str, Run]) -> None:
    """Stage 1 in bf16 is a class of its own in DeepSpeed. One step shows it: in more, Muon makes
    the rounding of a small gradient in bf16 as large as any other update.
    """
    seen = difference(runs["muon-bf16"], runs["muon-bf16-3"])
    report("muon in bf16, stage 1 against 3", seen)
    assert seen.change <= BF16_CHANGE_BOUND


def test_averages_follow_every_step_and_are_exported(
    runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two ranks at stage 3 average three steps, one at stage 2 the other three."""
    run_dir = runs["ema"].folder
    average = start_weights(run_dir, {})
    for step in range(1, 7):
        saved, manifest = checkpoint.open_checkpoint(run_dir, step)
        for name in manifest.trained:
            average[name] = 0.7 * average[name] + 0.3 * saved.whole(name).double()
            assert torch.allclose(saved.whole(name, "ema").double(), average[name], atol=1e-6)
    saved, manifest = checkpoint.open_checkpoint(run_dir)
    out = tmp_path_factory.mktemp("averaged") / "model"
    exported = load_file(export(run_dir, out, ema=True) / "model.safetensors")
    for name in manifest.trained & exported.keys():
        assert torch.equal(exported[name], saved.whole(name, "ema").to(exported[name].dtype))
        assert not torch.equal(exported[name], saved.whole(name).to(exported[name].dtype))
    with pytest.raises(BadInput, match="keeps no average"):
        export(runs["sgd-1"].folder, out.with_name("other"), ema=True)


def test_kinds_differ(runs: dict[str, Run]) -> None:
    assert difference(runs["lion-1"], runs["sgd-1"]).is_caught
