"""Runs that are killed at a named point: real ranks, of which one sends itself SIGKILL in the
middle of a call.

    python -m tests.runs.killed        # an order a line on stdin, its exit codes a line on stdout

Importing torch and DeepSpeed takes three times as long as a small run. So this process imports them
once, computes nothing, and forks the ranks of each order. It asserts that it has one thread, as a
fork of several could leave locks held.

The trainer knows nothing of this. A point is a call of a function that is patched in the rank that
dies. A pattern on the call's arguments tells it from the other calls. Before the rank dies it
records that it got there, and which files were in the run folder.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from packhorse.trainer.checkpoint import checkpoint
from tests.ranks import ROOT

SURVIVORS_S = 30.0  # for the other ranks to end once one has died: torch's agent kills them then
LIMIT_S = 400.0  # for all ranks of an order; what still runs then prints its stacks and is killed
STACKS_S = 10.0


@dataclass(frozen=True)
class Point:
    """The `call`-th call of `function` whose arguments, or whose outer call's, match `what`."""

    function: str  # a key of _functions()
    what: str = ""
    call: int = 1
    after: bool = False  # when it has returned
    meanwhile: bool = False  # and when a step that is trained meanwhile has been logged


@dataclass(frozen=True)
class Order:
    """A start of `world` ranks, with the recipe's overrides, and its end."""

    world: int
    overrides: Sequence[str]
    log: str  # a file, which ranks append to
    point: Point | None = None
    rank: int = 0  # that dies at the point
    stop: bool = False  # it does not die, but gets the signal to stop
    fill: bool = False  # likewise, but fills the disk of the run folder
    leave_kib: int = 0  # and leaves so much
    victims: Sequence[int] = field(default_factory=list)  # or: these ranks die
    after_s: float = 0.0  # so long after the start, or after this file has come
    after_file: str | None = None
    export: str | None = None  # what the ranks do: not train, but export the run to this folder


class ForkServer:
    """The process that forks ranks. Use it in `with`."""

    def __enter__(self) -> ForkServer:
        command = [sys.executable, "-m", "tests.runs.killed"]
        env = os.environ | {
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

    def run(self, order: Order) -> list[int]:
        """Return the ranks' exit codes, negative for the signal that killed one."""
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def reached_file(log: Path) -> Path:
    """Return where the rank that died wrote the run folder's files and sizes of that moment."""
    return log.with_suffix(".reached")


def ballast(run_dir: Path) -> Path:
    """Return the file that fills the disk."""
    return run_dir / "ballast"


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


def logged(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(NOT_EXACT)} for line in lines]


def assert_same(run_dir: Path, reference: Path) -> None:
    """Assert that two runs logged the same, and that their last checkpoints have the same bytes.

    `checkpoint.find` verifies every byte against the manifest.
    """
    assert logged(run_dir) == logged(reference)
    found, expected = checkpoint.find(run_dir), checkpoint.find(reference)
    assert found
    assert expected
    assert found[1] == expected[1]
    assert not list((run_dir / "checkpoints").glob(".*")), "what the kill left is still there"


# --------------------------------------------------------------------------------- the fork server


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout

    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import packhorse.trainer.train  # noqa: F401

    for line in sys.stdin:
        values = json.loads(line)
        order = Order(**{**values, "point": Point(**values["point"]) if values["point"] else None})
        answers.write(json.dumps(_live(order)) + "\n")
        answers.flush()


def _live(order: Order) -> list[int]:
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: it is not safe to fork"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = [_fork(order, rank, port) for rank in range(order.world)]
    if order.victims:
        while order.after_file and not Path(order.after_file).exists():
            time.sleep(0.01)
        time.sleep(order.after_s)
        for rank in order.victims:
            os.kill(pids[rank], signal.SIGKILL)
    return _codes(pids)


def _codes(pids: list[int]) -> list[int]:
    """Wait for the ranks as the launcher does: if one fails, stop the others, then kill them.

    Ranks that hang print their stacks first.
    """
    codes: dict[int, int] = {}
    deadline: float | None = None
    limit = time.monotonic() + LIMIT_S
    aborted = False
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
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
        if not pid:
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
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
    from packhorse.trainer.cli import main
    from packhorse.trainer.config.recipe import load_recipe
    from packhorse.trainer.data import tokenize
    from packhorse.trainer.utils import files, lease

    # nothing may depend on the global generator
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    # a dead process's lock is soon taken over, and this little data has points to continue from
    lease.BEAT_S, lease.STALE_S = 0.1, 1.0
    tokenize.CHUNK_ROWS, files.SAVE_EVERY_S = 16, 0.0
    recipe = load_recipe(ROOT / "recipes" / "debug.yaml", tuple(order.overrides))
    run_dir = Path(recipe.run.dir)
    if order.point and rank == order.rank:
        _Fault(order.point, order, run_dir).arm()

    def work(**_: Any) -> object:
        return export(run_dir, Path(order.export)) if order.export else train.train(recipe)

    with mock.patch.object(main, "app", side_effect=work):
        try:
            main.main()
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


# ---------------------------------------------------------------------------- in the rank that dies


def _functions() -> dict[str, tuple[Any, str, Any]]:
    """Return what can be patched: its owner, its name, and a call's arguments as text."""
    from packhorse.trainer import build_engine, metrics, train
    from packhorse.trainer.engine import sharded_state
    from packhorse.trainer.engine.engine import Engine
    from packhorse.trainer.engine.zero_state import TrainingState
    from packhorse.trainer.eval import evaluator, generate

    def opened(descriptor: int | None) -> str:
        return "" if descriptor is None else os.readlink(f"/proc/self/fd/{descriptor}")

    return {
        "fsync": (os, "fsync", opened),
        "rename": (Path, "rename", lambda path, target: str(target)),
        "replace": (Path, "replace", lambda path, target: str(target)),
        "unlink": (os, "unlink", lambda path, *, dir_fd=None: f"{opened(dir_fd)}/{path}"),
        "rmdir": (os, "rmdir", lambda path, *, dir_fd=None: str(path)),
        "write": (sharded_state, "write", lambda path, slices: str(path)),
        "digest": (sharded_state, "digest", lambda *_: "digest"),
        "checksum": (checkpoint, "checksum", str),
        "fill": (sharded_state.Shards, "fill", lambda files, piece: piece.name),
        "line": (metrics.Metrics, "step", lambda *_: "line"),
        "step": (Engine, "step", lambda *_: "step"),
        "restore": (TrainingState, "restore", lambda *_: "restore"),
        "evaluate": (Engine, "evaluate", lambda *_: "evaluate"),
        "evaluation": (train.Evaluation, "__call__", lambda _, step: f"evaluation {step}"),
        "answers": (generate, "_answers", lambda *_, **__: "answers"),
        "record": (evaluator, "write_evaluation", lambda _, step, *__: f"record {step}"),
        "load": (build_engine, "load_model", lambda *_, **__: "model"),
    }


# calls whose arguments do not tell what they work on
_OUTER = {"digest": "write", "evaluate": "evaluation", "answers": "evaluation"}


class _Fault:
    """Patches the function that a point names, for all threads."""

    def __init__(self, point: Point, order: Order, run_dir: Path) -> None:
        self._point, self._order, self._run_dir = point, order, run_dir
        self._functions = _functions()
        self._calls = 0
        self._inside = ""
        self._stepped = threading.Event()

    def arm(self) -> None:
        if self._point.function in _OUTER:
            self._patch(_OUTER[self._point.function], self._note)
        if self._point.meanwhile:
            self._patch("line", self._count_step)
        self._patch(self._point.function, self._perhaps_strike)

    def _patch(self, function: str, around: Any) -> None:
        owner, attribute, what = self._functions[function]
        original = getattr(owner, attribute)

        def patched(*args: Any, **kwargs: Any) -> Any:
            return around(what(*args, **kwargs), lambda: original(*args, **kwargs))

        mock.patch.object(owner, attribute, patched).start()

    def _note(self, what: str, call: Any) -> Any:
        self._inside = what
        try:
            return call()
        finally:
            self._inside = ""

    def _count_step(self, what: str, call: Any) -> Any:
        result = call()
        self._stepped.set()
        return result

    def _perhaps_strike(self, what: str, call: Any) -> Any:
        seen = re.search(self._point.what, f"{self._inside} {what}") is not None
        self._calls += seen
        due = seen and self._calls == self._point.call
        if due and not self._point.after:
            self._strike()
        result = call()
        if due and self._point.after:
            self._strike()
        return result

    def _strike(self) -> None:
        if self._order.stop:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._order.fill:
            fill(self._run_dir, self._order.leave_kib)
            return
        if self._point.meanwhile:
            self._stepped.clear()
            assert self._stepped.wait(30), "training did not go on"
        files = {
            str(path.relative_to(self._run_dir)): path.lstat().st_size
            for path in self._run_dir.rglob("*")
        }
        reached_file(Path(self._order.log)).write_text(json.dumps(files))
        os.kill(os.getpid(), signal.SIGKILL)


def fill(run_dir: Path, leave_kib: int) -> None:
    free = shutil.disk_usage(run_dir).free - leave_kib * 1024
    with ballast(run_dir).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free)


if __name__ == "__main__":
    main()
