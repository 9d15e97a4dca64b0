"""Two trainings in one run folder: the second is refused; one that was frozen gives way (C7)."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.utils.lease import is_alive
from tests.ranks import ROOT
from tests.slowed import start, wait_for

pytestmark = pytest.mark.runs

QUICK = ("data.eval=[]", "eval.every_steps=null", "eval.generate=null", "run.trace=true")


def content(run_dir: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a run but its log, to which a frozen one adds its end."""
    paths = (path for path in run_dir.rglob("*") if path.is_file())
    found = {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in paths}
    return {name: text for name, text in found.items() if not name.startswith("logs/")}


def test_the_second_is_refused_and_a_frozen_one_writes_nothing(tmp_path):
    run_dir = tmp_path / "run"
    first = start("training", "01", 30.0, run_dir, *QUICK)
    wait_for(run_dir / "at-1")
    recipe = ["recipes/debug.yaml", f"run.dir={run_dir}", f"data.cache={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "packhorse", "train", *recipe, *QUICK]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2, second.stderr
    assert "is training in" in second.stderr
    assert "give another run.dir" in second.stderr

    ranks = [int((run_dir / f"pid-{rank}").read_text()) for rank in range(2)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert third.returncode == 0, third.stderr
    assert "waiting for a sign of life" in third.stderr
    assert not is_alive(run_dir)
    before = content(run_dir)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    _, said = first.communicate(timeout=100)
    assert first.returncode == 2, said
    assert "another one has taken over" in said
    assert content(run_dir) == before
    found = checkpoint.find(run_dir)
    assert found is not None
    assert found[1].state.step == 18
