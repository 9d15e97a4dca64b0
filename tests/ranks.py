"""Start ranks for tests: processes with torchrun's environment, over gloo on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SURVIVORS_S = 60.0  # for the other ranks to end, once one has failed
STACKS_S = 10.0  # for a rank to write its stacks and end


def run_ranks(world: int, command: Sequence[str], timeout_s: float = 300.0) -> list[str]:
    """Run `python *command` on `world` ranks of one thread each; return what each rank printed.

    Raises:
        AssertionError: a rank failed or the time ran out. The message holds the end of each rank's
            output, and the stacks of the ranks that did not end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = os.environ | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONFAULTHANDLER": "1",  # SIGABRT makes a rank print the stacks of its threads
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(world)]
        processes = [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log.open("wb"),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            hung = _wait(processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        outputs = [log.read_text(errors="replace") for log in logs]
    ends = "\n".join(f"--- rank {rank}\n{output[-6000:]}" for rank, output in enumerate(outputs))
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    assert not hung, f"ranks {hung} of {world} did not end in time, ranks {failed} failed:\n{ends}"
    assert not failed, f"ranks {failed} of {world} failed:\n{ends}"
    return outputs


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Wait until all ranks have ended; make those that do not end print their stacks.

    Returns:
        The ranks that did not end in time, or not soon after another one had failed.
    """
    deadline = time.monotonic() + timeout_s
    while (codes := [process.poll() for process in processes]) and None in codes:
        if any(codes):
            deadline = min(deadline, time.monotonic() + SURVIVORS_S)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    hung = [rank for rank, code in enumerate(codes) if code is None]
    for rank in hung:
        processes[rank].send_signal(signal.SIGABRT)
    for rank in hung:
        try:
            processes[rank].wait(STACKS_S)
        except subprocess.TimeoutExpired:
            processes[rank].kill()
    return hung
