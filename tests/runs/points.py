"""Where a rank of tests/runs/killed.py dies: the order that says so, and the patches in the rank.

A point is a call of a function that is patched in the rank that dies. A pattern on the call's
arguments tells it from the other calls. Before the rank dies it records that it got there, and
which files were in the run folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from packhorse.trainer.checkpoint import checkpoint


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
    after_s: float = 0.0  # so long after the start, or after this file has come,
    after_cpu_s: float = 0.0  # and after the first of them has computed for so long
    after_file: str | None = None
    # not the ranks die, but each time a process that the victim has started, within after_s
    children: bool = False
    freeze: bool = False  # they do not die, but stand still for THAW_S; the order ends
    environ: dict[str, str] = field(default_factory=dict)  # of the ranks, see tests/faults.cpp
    export: str | None = None  # what the ranks do: not train, but export the run to this folder
    universal: bool = False  # in DeepSpeed's form


def reached_file(log: Path) -> Path:
    """Return where the rank that died wrote the run folder's files and sizes of that moment."""
    return log.with_suffix(".reached")


def ballast(run_dir: Path) -> Path:
    """Return the file that fills the disk."""
    return run_dir / "ballast"


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


class Fault:
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
