"""A hanging rank ends the run with an error that names the rank."""

import os
import signal
import subprocess
import time

import pytest

from tests.slowed import start, wait_for

pytestmark = pytest.mark.runs

SMALL = (
    "guard.hang_timeout_s=6",
    "data.eval=[]",
    "eval.every_steps=null",
    "eval.generate=null",
)


def ended(process: subprocess.Popen) -> str:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    return err


def test_a_stopped_process_is_named_by_the_running_ranks(tmp_path):
    runs = {}
    for rank in (0, 1):  # both at once: most of the time is waiting
        run_dir = tmp_path / f"stopped-{rank}" / "run"
        shared = f"parallel.sequence={rank + 1}"  # by one run, also where ranks share sequences
        runs[rank] = start("training", "01", 0.1, run_dir, "train.epochs=1000", shared, *SMALL)
    for rank in runs:
        run_dir = tmp_path / f"stopped-{rank}" / "run"
        wait_for(run_dir / "at-1")
        time.sleep(2)  # a few steps
        os.kill(int(wait_for(run_dir / f"pid-{rank}")), signal.SIGSTOP)
    for rank, process in runs.items():
        err = ended(process)
        assert f"hang: nothing moved for 6 s; no report from rank {rank}" in err
        (report,) = (tmp_path / f"stopped-{rank}" / "run" / "logs").glob("hang-*/rank*.txt")
        assert report.stem == f"rank{1 - rank:05d}"
        assert "Thread 0x" in report.read_text()


def test_a_rank_that_is_stuck_is_named_with_its_place(tmp_path):
    run_dir = tmp_path / "run"
    process = start("reading", "1", 1000, run_dir, *SMALL)
    wait_for(run_dir / "at-1")
    err = ended(process)
    assert "held up by rank 1, at step 1 > data" in err
    reports = sorted((run_dir / "logs").glob("hang-*/rank*.txt"))
    assert len(reports) == 2
    assert "in slowed" in reports[1].read_text(), "the stack shows where"
    assert "in slowed" not in reports[0].read_text()


def test_a_save_may_take_longer_than_a_hang(tmp_path):
    process = start("saving", "1", 9, tmp_path / "run", "train.steps=2", *SMALL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
