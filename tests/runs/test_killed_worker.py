"""A worker that the kernel kills ends `packhorse prepare`; its rows are named, nothing is left."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = 20_000


@pytest.mark.runs
def test_a_worker_killed_in_a_filter_ends_the_preparation(tmp_path: Path) -> None:
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    with path.open("w") as file:
        for number in range(ROWS):  # fractions, for which the library must work
            row = {"question": "Half?", "answer": f"#### {number}/2", "best": f"{2 * number}/4"}
            file.write(json.dumps(row) + "\n")
    source = json.dumps([{"path": str(path), "filters": {"math_answer": "best"}}])
    changes = [f"data.train={source}", f"data.cache={cache}", "data.workers=2", "data.eval=[]"]
    process = subprocess.Popen(
        [sys.executable, "-m", "packhorse", "prepare", "recipes/debug.yaml", *changes, "eval={}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started: set[int] = set()
    try:
        worker = wait_for_worker(process, started)
        assert list(cache.glob("*.lock-*")), "the preparation holds the cache's lock"
        worker.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, said
    first, last = map(int, re.findall(r"at the rows from \S+:(\d+) to \S+:(\d+)", said)[0])
    assert 1 <= first < last <= ROWS
    assert "killed by signal 9" in said
    assert not list(cache.glob("*.lock-*")), "the next start need not wait for this one"
    assert not wait_until_gone(started)


def wait_for_worker(process: subprocess.Popen[str], started: set[int]) -> psutil.Process:
    """Return a worker that has a helper, so that it verifies answers; note all processes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        started |= {one.pid for one in family}
        for helper in family:
            with suppress(psutil.NoSuchProcess):
                worker = helper.parent()
                above = worker.parent() if worker else None
                # command - fork server - worker - helper
                if worker and above and above.ppid() == process.pid:
                    return worker
        time.sleep(0.05)
    pytest.fail(f"no worker verifies answers; it ended with {process.poll()}")


def wait_until_gone(pids: set[int]) -> list[int]:
    """Return those processes that are still there after some seconds."""
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
