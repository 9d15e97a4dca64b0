"""Read run folders, finished or not: what `packhorse runs` lists and `packhorse report` draws.

A folder enters; a `Run` leaves, or BadInput for a folder that holds none. Nothing is written. A run
that is still writing may leave half a line at the end of a file; that line is left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeGuard

from packhorse.trainer.checkpoint.best import evaluations, final_step
from packhorse.trainer.checkpoint.manifest import list_published
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import EVALUATED, STOP_FILE, BadInput
from packhorse.trainer.utils.files import read_json_file
from packhorse.trainer.utils.json_lines import read_json_lines
from packhorse.trainer.utils.lease import is_alive, last_sign
from packhorse.trainer.utils.log_lines import check_data, check_metrics
from packhorse.trainer.utils.text import one_line

State = Literal["running", "stopped", "done", "failed"]
"""stopped: on request, and saved. failed: its process has ended otherwise, or its machine has."""

_CHANGING = ("recipe.yaml", "metrics.jsonl", "evaluations.jsonl", "summary.json", STOP_FILE)

_LEFT_BY_A_RUN = {*_CHANGING[1:], "logs", "checkpoints", "data.json"}


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it."""

    folder: Path
    recipe: Recipe
    state: State
    step: int  # the last one that is known to be done
    steps: int | None  # of the whole run; None before the data is prepared
    lines: list[dict[str, Any]]  # of metrics.jsonl, those of training steps, in order
    evaluations: dict[int, dict[str, Any]]  # lines of evaluations.jsonl by step, in order
    data: dict[str, Any]  # data.json; empty before the data is prepared
    environment: dict[str, Any]  # environment.json; empty before the model is loaded
    changed_at: float  # seconds since 1970

    def values(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric at each logged step that has it as a finite number."""
        found = ((line["step"], line.get(name)) for line in self.lines)
        return [(step, float(value)) for step, value in found if is_finite(value)]

    @property
    def tokens_per_s(self) -> float | None:
        """The median over the logged steps: the first ones, which warm up, do not matter."""
        return median(v for _, v in speeds) if (speeds := self.values(TOKENS_PER_S)) else None


LOSS, TOKENS_PER_S = "train/loss", "perf/tokens_per_s"


def is_finite(value: Any) -> TypeGuard[float]:
    """Return whether a value can be drawn: a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        BadInput: it is none, or its files are damaged; the message says which.
    """
    names = os.listdir(folder) if folder.is_dir() else []
    # a pipe would be waited for without end
    if not _is_run(names) or not (folder / "recipe.yaml").is_file():
        why = "no run has begun there" if "recipe.yaml" in names else "it has no recipe.yaml"
        raise BadInput(f"{folder}: not a run folder ({why})")
    try:
        recipe = load_recipe(folder / "recipe.yaml")
        path = folder / "metrics.jsonl"
        logged = read_json_lines(path, skip_damaged=True, check=check_metrics)
        lines = [line for line in logged if LOSS in line]
        data = read_json_file(folder / "data.json")
        check_data(data)
        steps = recipe.train.steps or data.get("train", {}).get("steps")
        ended = read_json_file(folder / "summary.json").get("steps")
        stop = read_json_file(folder / STOP_FILE).get("step")
        saved = list_published(folder / "checkpoints")
        return Run(
            folder=folder,
            recipe=recipe,
            state=_state(folder, ended, stop, steps and final_step(recipe.eval, folder, steps)),
            step=max(*(line["step"] for line in lines[-1:]), *saved, ended or 0, stop or 0),
            steps=steps,
            lines=lines,
            evaluations=evaluations(folder),
            data=data,
            environment=read_json_file(folder / "environment.json"),
            changed_at=_changed_at(folder),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder}: its files are damaged ({one_line(error, 200)})") from None


def _state(folder: Path, ended: int | None, stop: int | None, steps: int | None) -> State:
    # In this order: a run that was extended or resumed still holds what its last start has left.
    if is_alive(folder):
        return "running"
    if ended is not None and ended == steps:
        return "done"
    return "failed" if stop is None else "stopped"


def _changed_at(folder: Path) -> float:
    paths = (folder / name for name in _CHANGING)
    return max(last_sign(folder), *(path.stat().st_mtime for path in paths if path.exists()))


def find_folders(root: Path) -> tuple[list[Path], list[Path]]:
    """Look for runs in a folder and below it, but not below a run or through symbolic links.

    Returns:
        Folders of runs, in order; and folders directly in `root` with none of them below.
    """
    runs = sorted(_runs_below(root))
    foreign = [
        child
        for child in sorted(root.iterdir())
        if child.is_dir()
        and not child.name.startswith(".")
        and not (child / EVALUATED).is_file()
        and not any(run.is_relative_to(child) for run in runs)
    ]
    return runs, [] if runs == [root] else foreign


def _is_run(names: Sequence[str]) -> bool:
    """Return whether a folder of these files holds a run, and not only init's recipe.yaml."""
    return "recipe.yaml" in names and not _LEFT_BY_A_RUN.isdisjoint(names)


def _runs_below(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if _is_run((*folders, *files)):
            folders.clear()
            if EVALUATED not in files:
                yield Path(place)
