"""A signal to any one process stops all ranks after the same step, and they save (C9)."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from packhorse.trainer.checkpoint import checkpoint
from tests.slowed import start, wait_for

pytestmark = pytest.mark.runs

EVALUATES_NEVER = ("data.eval=[]", "eval.every_steps=null", "eval.generate=null")


def signalled(
    place: str, ranks: str, seconds: float, run_dir: Path, asked: str, *overrides: str
) -> Callable[[], tuple[float, int]]:
    """Run to a place, signal the process `asked`, and return a function that waits for the end.

    The function returns the seconds since the signal and the step of the stop.
    """
    process = start(place, ranks, seconds, run_dir, *overrides)
    wait_for(run_dir / f"at-{ranks[-1]}")
    pid = process.pid if asked == "launcher" else int(wait_for(run_dir / f"pid-{asked}"))
    began = time.monotonic()
    os.kill(pid, signal.SIGUSR1)
    time.sleep(0.3)
    with suppress(ProcessLookupError):  # a waiting rank leaves at once
        os.kill(pid, signal.SIGTERM)  # a second one does no harm

    def ended() -> tuple[float, int]:
        _, err = process.communicate(timeout=200)
        took = time.monotonic() - began
        assert process.returncode == 75, err
        return took, json.loads((run_dir / "stop.json").read_text())["step"]

    return ended


@pytest.mark.parametrize(("place", "asked"), [("preparation", "1"), ("meeting", "1")])
def test_a_signal_before_the_process_group_stops_at_step_0(tmp_path, place, asked):
    _, step = signalled(place, "0", 2.0, tmp_path / "run", asked)()
    assert step == 0
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_signal_in_training_saves_the_step(tmp_path):
    _, step = signalled("training", "01", 1.0, tmp_path / "run", "1", *EVALUATES_NEVER)()
    found = checkpoint.find(tmp_path / "run")
    assert found is not None
    assert found[1].state.step == step
    assert step < 18


@pytest.mark.parametrize(("place", "asked"), [("held-out loss", "1"), ("generation", "0")])
def test_a_signal_in_an_evaluation_leaves_no_part_of_it(tmp_path, place, asked):
    _, step = signalled(place, "01", 1.0, tmp_path / "run", asked)()
    assert step == 0
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "half an evaluation is none"


def test_a_slow_save_is_not_cut_short(tmp_path):
    runs = {}
    for asynchronous in ("true", "false"):  # both at once: most of the time is waiting
        run_dir = tmp_path / asynchronous / "run"
        how = (
            "checkpoint.every_steps=1",
            f"checkpoint.asynchronous={asynchronous}",
            *EVALUATES_NEVER,
        )
        runs[run_dir] = signalled("saving", "1", 45.0, run_dir, "launcher", *how)
    for run_dir, ended in runs.items():
        took, step = ended()
        assert took > 45
        found = checkpoint.find(run_dir)
        assert found is not None
        assert found[1].state.step == step, "what was trained is saved"
        assert step in (2, 3), (
            "it stops in the step after the save that the signals fell into, or with the one begun"
        )
