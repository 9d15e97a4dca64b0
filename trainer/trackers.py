"""Send metrics to experiment trackers by accelerate.tracking: W&B, MLflow, Trackio, Comet.

In: the recipe and lines of metrics. Out: a run in each tracker that `run.trackers` names. Its id is
kept in trackers.json of the run folder, so that a later start goes on in the same one. TensorBoard
is written by metrics.py. Only rank 0 has trackers.

A tracker must not disturb training: each works in a thread of its own, so that a slow server holds
nothing up, and one that fails is reported once and gets nothing more.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime  # before Python 3.11 a class of its own
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.files import read_json_file, write_json
from packhorse.trainer.utils.text import one_line

IDS = "trackers.json"  # in the run folder: the id of the tracked run, by tracker
START_S = 180.0  # for a tracker to start: W&B itself waits for 90 s
PATIENCE_S = 60.0  # at the end, for a tracker to take what it was given
TENSORBOARD = "tensorboard"
_PACKAGES = {"mlflow": "mlflow-skinny"}  # to install, where it is not called as the tracker is
# What follows the name of a secret, and a user with a password in a URL.
_SECRETS = re.compile(
    r"(?i)((?:api[-_]?key|access[-_]?key|token|secret|password)[\"']?[=:,\s]+[\"']?)[^\s\"',\]]+"
    r"|(://)[^/@\s\"']+(?=@)"
)


@contextmanager
def open_trackers(recipe: Recipe, run_dir: Path) -> Iterator[Trackers]:
    """Start the recipe's trackers on rank 0, and finish their runs when the block has ended well.

    Raises:
        BadInput: a tracker is not installed, or does not start.
    """
    ids_file = run_dir / IDS
    names = [name for name in recipe.run.trackers if name != TENSORBOARD] if dist.is_main() else []
    ids = read_json_file(ids_file)
    opened = []
    for name in names:
        tracker = _Tracker(name, recipe, run_dir, ids.get(name))
        opened.append(tracker)
        if name not in ids:
            ids[name] = tracker.run_id
            write_json(ids_file, ids)
    trackers = Trackers(opened)
    yield trackers
    # not after an error: the tracked run would be shown as finished
    trackers.finish()


class Trackers:
    """The trackers of a run; none on ranks other than 0."""

    def __init__(self, opened: list[_Tracker]) -> None:
        self._opened = opened

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over metrics after `step` steps. Returns at once."""
        for tracker in self._opened:
            tracker.log(step, dict(values))

    def finish(self) -> None:
        for tracker in self._opened:
            tracker.finish()


class _Tracker:
    """One of accelerate's trackers in a thread of its own, where all of its calls are made: MLflow
    keeps the current run by thread.

    Args:
        run_id: of the tracked run to go on in; None starts a new one.
    """

    def __init__(self, name: str, recipe: Recipe, run_dir: Path, run_id: str | None) -> None:
        if importlib.util.find_spec(name) is None:
            package = _PACKAGES.get(name, name)
            raise BadInput(f"run.trackers: {name} is not installed; `pip install {package}`")
        self._name = name
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._start = lambda: _start(name, recipe, run_dir, run_id)
        self._started: Future[str] = Future()
        # a daemon, so that a tracker that hangs does not keep the process alive
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        try:
            self.run_id = self._started.result(START_S)
        except NotInTime:
            raise BadInput(
                f"run.trackers: {name} has not started within {START_S:.0f} s; look whether its "
                "server answers, or take it out of run.trackers"
            ) from None
        except Exception as error:
            raise BadInput(
                f"run.trackers: {name} does not start ({one_line(error, 300)}); mend it, or take "
                "it out of run.trackers"
            ) from None

    def log(self, step: int, values: dict[str, float]) -> None:
        self._jobs.put(lambda: self._tracker.log(values, step=step))

    def finish(self) -> None:
        """End the tracked run, after waiting at most PATIENCE_S for what is still to be sent."""
        self._jobs.put(lambda: self._tracker.finish())
        self._jobs.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            dist.log.warning(
                "run.trackers: %s has not taken all metrics within %.0f s; metrics.jsonl has them",
                *(self._name, PATIENCE_S),
            )

    def _work(self) -> None:
        try:
            self._tracker, found_id = self._start()
        except BaseException as error:  # a tracker may also raise SystemExit
            self._started.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
            return
        self._started.set_result(found_id)
        while job := self._jobs.get():
            try:
                job()
            except Exception as error:
                dist.log.warning(
                    "run.trackers: %s has failed, and gets nothing more from this start; training "
                    "goes on (%s)",
                    *(self._name, one_line(error, 300)),
                )
                return


def _start(name: str, recipe: Recipe, run_dir: Path, run_id: str | None) -> tuple[Any, str]:
    """Start a tracker and hand it the recipe; return it and the id of its run."""
    from accelerate import tracking

    # Accelerate's own logger needs accelerate's state of the process, which would take part in
    # setting up devices.
    tracking.logger = logging.getLogger(tracking.__name__)  # type: ignore[assignment]
    # MLflow would try for four minutes before it says that a server is down
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    run = recipe.run
    arguments, get_id = _KINDS[name]
    run_name = run.name or run_dir.resolve().name
    tracker = tracking.LOGGER_TYPE_TO_CLASS[name](
        run.project, **arguments(recipe, run_dir, run_name, run_id)
    )
    tracker.main_process_only = False  # it runs on rank 0 anyway, and need not ask the state
    tracker.start()
    if run_id is None:  # a resumed run's is known, and MLflow refuses other values for it
        tracker.store_init_configuration(flat_recipe(recipe))
    return tracker, get_id(tracker.tracker)


def flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as flat keys, `optim.lr` -> 2e-05, with `***` for what looks like
    a secret.
    """

    def flatten(tree: Any, place: str) -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                yield from flatten(value, f"{place}.{key}" if place else key)
        else:
            text = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)
            is_text = isinstance(tree, str | list | dict)
            yield place, _SECRETS.sub(r"\1\2***", text) if is_text else tree

    return dict(flatten(recipe.model_dump(mode="json"), ""))


# --------------------------------------------------------------------------------- kinds of tracker


def _wandb(recipe: Recipe, run_dir: Path, name: str, run_id: str | None) -> dict[str, Any]:
    run = recipe.run
    return {
        **{"name": name, "tags": list(run.tags), "group": run.group, "dir": str(run_dir)},
        **{"id": run_id, "resume": "allow"},
        "settings": {"console": "off"},  # logs/rank00000.log has it, and bars stay where they are
    }


def _mlflow(recipe: Recipe, run_dir: Path, name: str, run_id: str | None) -> dict[str, Any]:
    tags = dict.fromkeys(recipe.run.tags, "")
    if recipe.run.group is not None:
        tags["group"] = recipe.run.group
    return {"run_name": name, "run_id": run_id, "tags": tags}


def _trackio(recipe: Recipe, run_dir: Path, name: str, run_id: str | None) -> dict[str, Any]:
    # it knows runs by their names, and no tags
    resume = "never" if run_id is None else "must"
    return {"name": run_id or name, "group": recipe.run.group, "resume": resume, "embed": False}


def _comet_ml(recipe: Recipe, run_dir: Path, name: str, run_id: str | None) -> dict[str, Any]:
    from comet_ml import ExperimentConfig

    group = [recipe.run.group] if recipe.run.group is not None else []
    # by default it sends source files, the working tree's changes and everything that is printed
    quiet: dict[str, Any] = dict.fromkeys(("log_code", "log_git_patch", "parse_args"), False)
    config = ExperimentConfig(
        name=name, tags=[*recipe.run.tags, *group], auto_output_logging="", **quiet
    )
    return {"experiment_key": run_id, "experiment_config": config}


# By name: the arguments of accelerate's tracker, and how to get the id from the tracker's own run.
_KINDS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[Any], str]]] = {
    "wandb": (_wandb, lambda run: run.id),
    "mlflow": (_mlflow, lambda run: run.info.run_id),
    "trackio": (_trackio, lambda run: run.name),
    "comet_ml": (_comet_ml, lambda experiment: experiment.get_key()),
}
