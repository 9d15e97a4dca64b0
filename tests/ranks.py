"""Ranks for tests: real processes with torchrun's environment, over gloo on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(world: int, command: Sequence[str], timeout_s: float = 300.0) -> list[str]:
    """Run `python *command` on `world` ranks of one thread each; what each of them printed.

    Raises:
        AssertionError: a rank failed or the time ran out; the message holds the ends of all
            outputs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + timeout_s
    try:
        outputs = [
            process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0]
            for process in processes
        ]
    except subprocess.TimeoutExpired:
        outputs = [f"still running after {timeout_s:.0f} s"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ends = "\n".join(f"--- rank {rank}\n{output[-3000:]}" for rank, output in enumerate(outputs))
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    assert not failed, f"ranks {failed} of {world} failed:\n{ends}"
    return outputs
