"""The order of saving and evaluating in the training loop."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest

from packhorse.trainer import loop
from packhorse.trainer.loop import TrainingRun, train_loop

PARTS = ("engine", "guard", "metrics", "profiler", "progress", "stop", "watch", "describe_rows")


def events(
    monkeypatch: pytest.MonkeyPatch,
    *,
    best: int | None = None,
    stopped_at: int | None = None,
    early: int | None = None,
    first_step: int = 0,
) -> list[str]:
    """Return what a loop of 6 steps does, saving every 4 steps and evaluating every 2."""
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.0)
    parts: Any = {name: MagicMock() for name in (*PARTS, "recipe", "loader")}
    parts["recipe"].checkpoint.every_steps, parts["recipe"].eval.every_steps = 4, 2
    parts["recipe"].run.stop_after = None
    parts["loader"].plan.steps = 6
    parts["stop"].agreed.return_value = False
    parts["guard"].skipped_steps = set(range(6))
    done = []

    def evaluate(step: int) -> bool:
        done.append(f"evaluate {step}")
        return step != stopped_at

    train_loop(
        TrainingRun(
            **parts,
            first_step=first_step,
            evaluate=evaluate,
            save=lambda step: done.append(f"save {step}"),
            is_best=lambda step: step == best,
            ends_early=lambda step: step == early,
            trace=None,
        )
    )
    return done


def test_a_step_is_saved_before_it_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert events(monkeypatch) == ["evaluate 2", "save 4", "evaluate 4", "save 6"]


def test_the_best_step_is_saved_once_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    found = events(monkeypatch, best=2)
    assert found == ["evaluate 2", "save 2", "save 4", "evaluate 4", "save 6"]


def test_a_stop_in_an_evaluation_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert events(monkeypatch, stopped_at=2) == ["evaluate 2", "save 2"]


def test_an_early_end_saves_what_was_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert events(monkeypatch, early=2) == ["evaluate 2", "save 2"]


def test_a_run_killed_at_its_early_end_trains_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    assert events(monkeypatch, early=2, first_step=2) == []
