"""Start ranks for tests: processes with torchrun's environment, over gloo on this machine.

    python -m tests.ranks      # orders on stdin, what became of their ranks on stdout, a line each

Importing torch, transformers and DeepSpeed takes longer than most of what ranks do in tests. So one
process imports them, computes nothing, and forks all ranks that a process of pytest starts. It
asserts that it has one thread, as a fork of several could leave locks held.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        "LOCAL_SIZE": str(world),  # as trainer/engine/engine.py sets it when it is imported
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(world)]
        order = {
            "command": list(command),
            "environ": environ,
            "logs": [str(log) for log in logs],
            "limits_s": (timeout_s, SURVIVORS_S),
        }
        hung, failed = _ask(order)
        outputs = [log.read_text(errors="replace") for log in logs]
    ends = "\n".join(f"--- rank {rank}\n{output[-6000:]}" for rank, output in enumerate(outputs))
    assert not hung, f"ranks {hung} of {world} did not end in time, ranks {failed} failed:\n{ends}"
    assert not failed, f"ranks {failed} of {world} failed:\n{ends}"
    return outputs


@functools.cache
def _fork_server() -> Any:
    """Start the process that forks ranks. It ends when the pipe to it is closed, at the latest when
    this process ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ranks"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _ask(order: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the ranks that hung and those that failed."""
    server = _fork_server()
    try:
        print(json.dumps(order), file=server.stdin, flush=True)
        return tuple(json.loads(server.stdout.readline()))
    except BaseException:  # as a test's time limit, too: no rank outlives the call
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        _fork_server.cache_clear()
        raise


# --------------------------------------------------------------------------------- the fork server


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout

    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import packhorse.trainer.train  # noqa: F401

    gc.freeze()  # what is imported is shared by all ranks, and garbage of none
    for line in sys.stdin:
        order = json.loads(line)
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads: it is not safe to fork"
        pids = [_fork(order, rank) for rank in range(len(order["logs"]))]
        print(json.dumps(_wait(pids, *order["limits_s"])), file=answers, flush=True)


def _fork(order: dict[str, Any], rank: int) -> int:
    """Return the process id of a rank that runs the order's command."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(order["logs"][rank], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(order["environ"], RANK=str(rank), LOCAL_RANK=str(rank))
        option, program, *sys.argv[1:] = order["command"]
        if option == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(program, {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: Sequence[int], timeout_s: float, survivors_s: float) -> tuple[list[int], list[int]]:
    """Wait until all ranks have ended; make those that do not end print their stacks.

    Returns:
        The ranks that did not end in time, or not soon after another one had failed; and the ranks
        that failed.
    """
    codes: dict[int, int] = {}
    _reap(codes, len(pids), timeout_s, survivors_s)
    hung = [rank for rank, pid in enumerate(pids) if pid not in codes]
    failed = [rank for rank, pid in enumerate(pids) if codes.get(pid)]
    for number, limit_s in ((signal.SIGABRT, STACKS_S), (signal.SIGKILL, float("inf"))):
        for pid in set(pids) - codes.keys():
            os.kill(pid, number)
        _reap(codes, len(pids), limit_s)
    return hung, failed


def _reap(codes: dict[int, int], world: int, limit_s: float, survivors_s: float = 1e9) -> None:
    """Add the exit codes of ranks as they end, until all have or the time is over."""
    deadline = time.monotonic() + limit_s
    while len(codes) < world and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.02)
            continue
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            deadline = min(deadline, time.monotonic() + survivors_s)


if __name__ == "__main__":
    main()
