"""A run that skips a step, with or without a rollback, is the run that never took it (C12)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.utils.json_lines import read_json_lines
from tests.numerics.compare import case
from tests.ranks import run_ranks

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload_optimizer")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every ZeRO stage on two ranks: with a NaN on one rank in step 3, and without, where
    step 3 is skipped from the start, and with a loss spike.
    """
    root = tmp_path_factory.mktemp("guard")
    nan, spike = {"changes": ["nan_in_the_third_step"]}, {"changes": ["spike_in_the_third_step"]}
    cases: list[dict[str, Any]] = []
    for stage in STAGES:
        cases.append(case(root, f"{stage}-without", stage, skips=3))
        cases.append(case(root, f"{stage}-skip", stage, "guard.non_finite=skip", **nan))
        cases.append(
            case(
                root,
                f"{stage}-rollback",
                stage,
                "guard.non_finite=rollback",
                "checkpoint.every_steps=2",
                **nan,
            )
        )
        looking = ("guard.spike=skip", "guard.spike_factor=5")
        cases.append(case(root, f"{stage}-spike", stage, *looking, **spike))
    cases += [
        case(root, "zero3-skip-resumed", "zero3", "guard.non_finite=skip", **nan, stop_after=4)
    ]
    cases += [case(root, "zero3-skip-resumed", "zero3", "guard.non_finite=skip", **nan)]
    path = root / "cases.json"
    path.write_text(json.dumps(cases))
    run_ranks(2, ["-m", "tests.numerics.cases", str(path)])
    return root


def seen(run_dir: Path) -> dict[str, Any]:
    """Return losses and norms by step, and the last weights."""
    steps = [line for line in read_json_lines(run_dir / "metrics.jsonl") if "train/loss" in line]
    saved, manifest = checkpoint.open_checkpoint(run_dir)
    return {
        "steps": [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in steps],
        "weights": {name: saved.whole(name) for name in saved.names},
        "state": (manifest.state.step, manifest.state.updates),
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["steps"] == b["steps"]
    assert a["state"] == b["state"] == (6, 5)
    assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rule", ["skip", "rollback"])
def test_a_step_that_was_not_finite_is_as_if_never_taken(root: Path, stage: str, rule: str) -> None:
    run = seen(root / f"{stage}-{rule}")
    assert [step for step, *_ in run["steps"]] == [1, 2, 4, 5, 6]
    assert_same(run, seen(root / f"{stage}-without"))


def test_a_resume_remembers_the_skipped_step(root: Path) -> None:
    assert_same(seen(root / "zero3-skip-resumed"), seen(root / "zero3-without"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_spike_is_as_if_never_taken(root: Path, stage: str) -> None:
    assert_same(seen(root / f"{stage}-spike"), seen(root / f"{stage}-without"))


@pytest.mark.parametrize(
    ("name", "reason"), [("zero3-skip", "not finite"), ("zero3-spike", "times the usual")]
)
def test_the_rows_are_named(root: Path, name: str, reason: str) -> None:
    (line,) = read_json_lines(root / name / "skipped_steps.jsonl")
    assert line["step"] == 3
    assert reason in line["reason"]
    assert "train.jsonl:" in line["rows"]
