"""Runs that are killed at a named point: real ranks, of which one sends itself SIGKILL in the
middle of a call.

    python -m tests.runs.killed        # an order a line on stdin, its exit codes a line on stdout

Importing torch and DeepSpeed takes three times as long as a small run. So this process imports them
once, computes nothing, and forks the ranks of each order. It asserts that it has one thread, as a
fork of several could leave locks held.

The ranks have tests/faults.cpp loaded, which does nothing unless an order's environment asks it.

The trainer knows nothing of this: tests/runs/points.py patches a function in the rank that dies.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from packhorse.trainer.checkpoint import checkpoint
from tests.ranks import ROOT
from tests.runs.points import Fault, Order, Point, ballast, fill, reached_file

__all__ = ["KILLED", "ForkServer", "Order", "Point", "Run", "assert_same", "ballast", "fill"]

SURVIVORS_S = 30.0  # for the other ranks to end once one has died: torch's agent kills them then
LIMIT_S = 400.0  # for all ranks of an order; what still runs then prints its stacks and is killed
STACKS_S = 10.0
THAW_S = 3.0  # by then another start has taken over


class ForkServer:
    """The process that forks ranks. Use it in `with`."""

    hits = 0  # victims of the last order
    cpu_s = 0.0  # that a rank of it computed

    def __enter__(self) -> ForkServer:
        self._folder = tempfile.TemporaryDirectory()
        faults = compile_faults(Path(self._folder.name))
        command = [sys.executable, "-m", "tests.runs.killed"]
        env = os.environ | {
            "LD_PRELOAD": str(faults),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONFAULTHANDLER": "1",  # SIGABRT makes a rank print its stacks
        }
        pipe = subprocess.PIPE
        self._process: Any = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._folder.cleanup()

    def run(self, order: Order) -> list[int]:
        """Return the ranks' exit codes, negative for the signal that killed one."""
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        codes, self.hits, self.cpu_s = json.loads(self._process.stdout.readline())
        return codes


def compile_faults(folder: Path) -> Path:
    """Compile tests/faults.cpp; return the library."""
    library = folder / "faults.so"
    options = ["-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests" / "faults.cpp", "-ldl"]
    subprocess.run(["c++", *options], check=True)
    return library


# -------------------------------------------------------------------------------------------- a run

OVERRIDES = (
    "optim.eps=1e-3",  # as X4's bounds ask for
    "train.steps=6",
    "checkpoint.every_steps=2",
    "checkpoint.keep=1",
    "checkpoint.asynchronous=true",
    "eval.every_steps=3",
    "eval.generate=null",
)
KILLED = -signal.SIGKILL
NOT_EXACT = ("perf/", "mem/")  # keys of the log that differ from start to start


class Run:
    """A run folder, and the command that is started in it again and again."""

    def __init__(self, fork_server: ForkServer, folder: Path, cache: Path) -> None:
        self._fork_server = fork_server
        self.folder, self.log = folder / "run", folder / "log"
        self.overrides: tuple[str, ...] = (
            *OVERRIDES,
            f"run.dir={self.folder}",
            f"data.cache={cache}",
        )

    def start(self, world: int, point: Point | None = None, **order: Any) -> list[int]:
        return self._fork_server.run(Order(world, self.overrides, str(self.log), point, **order))

    def die(self, world: int, point: Point, rank: int = 0) -> dict[str, int]:
        """Start, be killed at a point, and return the run folder's files and sizes of that moment.

        Raises:
            AssertionError: the point was not reached, or a surviving rank exited with 0.
        """
        codes = self.start(world, point, rank=rank)
        assert codes[rank] == KILLED, f"the point was not reached\n{self.log_tail}"
        assert all(codes), f"a rank took its own end for the run's\n{self.log_tail}"
        return json.loads(reached_file(self.log).read_text())

    def finish(self, world: int) -> None:
        codes = self.start(world)
        assert not any(codes), f"{codes}\n{self.log_tail}"

    @property
    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def logged(run_dir: Path, besides: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    left_out = NOT_EXACT + besides
    return [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in lines]


def assert_same(run_dir: Path, reference: Path, besides: tuple[str, ...] = ()) -> None:
    """Assert that two runs logged the same, and that their last checkpoints have the same bytes and
    stand alone.

    `checkpoint.find` verifies every byte against the manifest.

    Args:
        besides: beginnings of the log's keys that may differ.
    """
    assert logged(run_dir, besides) == logged(reference, besides)
    found, expected = checkpoint.find(run_dir), checkpoint.find(reference)
    assert found
    assert expected
    assert found[1] == expected[1]
    names = {path.name for path in found[0].parent.iterdir()} - {"best"}
    assert names <= {"latest", found[0].name}, "what the kill left is still there"
    if "latest" in names:  # not in a copy of a run's mirror
        assert found[0].with_name("latest").read_text() == found[0].name


# --------------------------------------------------------------------------------- the fork server


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout

    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import packhorse.trainer.checkpoint.universal
    import packhorse.trainer.cli.main
    import packhorse.trainer.train  # noqa: F401
    from packhorse.trainer.eval import generate

    generate.tokens_at_once = lambda recipe: 1  # a batch has one prompt
    gc.freeze()  # what is imported is shared by all ranks, and garbage of none
    for line in sys.stdin:
        values = json.loads(line)
        order = Order(**{**values, "point": Point(**values["point"]) if values["point"] else None})
        answers.write(json.dumps(_live(order)) + "\n")
        answers.flush()


def _live(order: Order) -> tuple[list[int], int, float]:
    """Start ranks; return their exit codes, how many victims there were, and the CPU seconds of a
    rank with its children."""
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: it is not safe to fork"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    pids = [_fork(order, rank, port) for rank in range(order.world)]
    hits = 0
    if order.victims:
        while order.after_file and not Path(order.after_file).exists():
            time.sleep(0.01)
        _wait(pids[order.victims[0]], order)
        hits = sum(_strike(pids[rank], order) for rank in order.victims)
    if order.freeze and hits:
        _orphans.extend(pids)
        thaw = ["sh", "-c", f"sleep {THAW_S}; kill -CONT {' '.join(map(str, pids))}"]
        subprocess.Popen(thaw)
        return [-signal.SIGSTOP] * order.world, hits, 0.0
    codes = _codes(pids)
    if _orphans:
        _codes(_orphans)  # what they still do, they do before the run is looked at
        _orphans.clear()
    cpu_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before_s
    return codes, hits, cpu_s / order.world


_orphans: list[int] = []  # frozen ranks of earlier orders


def _wait(pid: int, order: Order) -> None:
    """Wait for the moment of the strike, or until the rank has ended."""
    process, limit = psutil.Process(pid), time.monotonic() + LIMIT_S
    while sum(process.cpu_times()[:2]) < order.after_cpu_s and time.monotonic() < limit:
        if _has_ended(pid):
            return
        time.sleep(0.005)
    if not order.children:
        time.sleep(order.after_s)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _strike(pid: int, order: Order) -> bool:
    """Kill or freeze a rank, or kill one of the processes that it has started, if there is any."""
    if order.children:
        return _kill_child(pid, order.after_s)
    if _has_ended(pid):
        return False
    os.kill(pid, signal.SIGSTOP if order.freeze else signal.SIGKILL)
    return True


def _kill_child(pid: int, most_s: float) -> bool:
    """Kill one of the processes that a rank has started, at a random moment of their first seconds,
    at most `most_s`; return False if the rank has ended before."""
    while not _has_ended(pid):
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(pid).children(recursive=True)
            if found:
                time.sleep(random.uniform(0.0, most_s))
                victim = random.choice(found)
                if victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
                    victim.kill()
                    return True
        time.sleep(0.01)
    return False


def _codes(pids: list[int]) -> list[int]:
    """Wait for the ranks as the launcher does: if one fails, stop the others, then kill them.

    Ranks that hang print their stacks first.
    """
    codes: dict[int, int] = {}
    deadline: float | None = None
    limit = time.monotonic() + LIMIT_S
    aborted = False
    while len(codes) < len(pids):
        for each in pids:
            pid, status = (0, 0) if each in codes else os.waitpid(each, os.WNOHANG)
            if pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
        left = [each for each in pids if each not in codes]
        if deadline is None and any(codes.values()):
            deadline = time.monotonic() + SURVIVORS_S
            for each in left:
                os.kill(each, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            for each in left:
                os.kill(each, signal.SIGKILL)
        if time.monotonic() > limit:
            for each in left:
                os.kill(each, signal.SIGKILL if aborted else signal.SIGABRT)
            aborted, limit = True, time.monotonic() + STACKS_S
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _fork(order: Order, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        names = {
            "WORLD_SIZE": order.world,
            "LOCAL_WORLD_SIZE": order.world,
            "RANK": rank,
            "LOCAL_RANK": rank,
        }
        os.environ.update({name: str(number) for name, number in names.items()})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | order.environ
        code = _rank(order, rank)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(order: Order, rank: int) -> int:
    """Run what `packhorse train` runs in a worker; return the command's exit code."""
    import torch

    from packhorse.trainer import train
    from packhorse.trainer.checkpoint.hf_export import export
    from packhorse.trainer.checkpoint.universal import export_universal
    from packhorse.trainer.cli import main
    from packhorse.trainer.config.recipe import load_recipe
    from packhorse.trainer.data import tokenize
    from packhorse.trainer.utils import lease, staged_build

    # nothing may depend on the global generator
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    # a dead process's lock is soon taken over, and this little data has points to continue from
    lease.BEAT_S, lease.STALE_S = 0.1, 1.0
    tokenize.CHUNK_ROWS, tokenize.SLOW_CHUNK_ROWS, staged_build.SAVE_EVERY_S = 16, 16, 0.0
    recipe = load_recipe(ROOT / "recipes" / "debug.yaml", tuple(order.overrides))
    run_dir = Path(recipe.run.dir)
    if order.point and rank == order.rank:
        Fault(order.point, order, run_dir).arm()

    def work(**_: Any) -> object:
        if order.export:
            return (export_universal if order.universal else export)(run_dir, Path(order.export))
        return train.train(recipe)

    with mock.patch.object(main, "app", side_effect=work):
        try:
            main.main()
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    main()
