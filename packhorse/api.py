"""Call packhorse from a script or a notebook. Everything here is `import packhorse`.

    result = packhorse.train("recipe.yaml", {"optim.lr": 1e-5})

A recipe and changes to it enter; what the command wrote leaves, as plain values. Each call runs the
command in a process of its own, so that this one keeps its memory, its signals and its GPUs. What
the command says is shown on stderr. Ctrl-C makes a run save and stop, as for the command, and is
then raised here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packhorse.trainer.datatypes import BAD_INPUT, DONE, SAVED_RUN_AGAIN, BadInput

if TYPE_CHECKING:
    from packhorse.trainer.config.recipe import Recipe

    PathLike = str | os.PathLike[str]

# What a launcher tells its workers; a caller that is one does not hand it on.
_OF_WORKERS = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
    r"|PACKHORSE_LAUNCHER)"
)
_SHOWN_LINES = 15  # of a failed command's output, in the error


class RunFailed(RuntimeError):
    """A command ended with another exit code than 0, 2 and 75. The message ends with its output."""


@dataclass(frozen=True)
class RunResult:
    """What a run has left in its folder, since its first start."""

    run_dir: Path
    done: bool  # False: it was asked to stop, and saved; the same call resumes it
    losses: dict[int, float]  # training loss by step, of the steps that were logged
    evaluations: dict[int, dict[str, float | None]]  # eval loss and scores by step
    checkpoint: Path | None  # the newest whole one


def load_recipe(recipe: PathLike, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, a YAML file or the name of a packaged one, with changes as `optim.lr`: 1e-5.

    Raises:
        BadInput: the recipe or a change cannot be used.
    """
    from packhorse.trainer.config.recipe import load_recipe

    return load_recipe(os.fspath(recipe), _overrides(changes))


def prepare(recipe: PathLike, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Tokenize and pack the data into the cache, and return its counts, as in a run's data.json.

    There are none for a streamed source.

    Raises:
        BadInput: the recipe or its data cannot be used.
        RunFailed: anything else went wrong.
    """
    with tempfile.TemporaryDirectory() as out:
        _run("prepare", [recipe, *_overrides(changes)], _options(out=out))
        report = Path(out) / "data.json"
        return json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}


def train(
    recipe: PathLike,
    changes: Mapping[str, Any] | None = None,
    *,
    nproc: int | None = None,
    extend: bool = False,
) -> RunResult:
    """Train on this machine, or resume from the last checkpoint in the run folder.

    Args:
        nproc: processes; by default one for each GPU, or one without a GPU.
        extend: train a run longer, whose train.epochs or train.steps were raised.

    Raises:
        BadInput: the recipe, its model or its data cannot be used.
        RunFailed: anything else ended the run. The logs of ranks other than 0 are in its folder.
    """
    run_dir = Path(load_recipe(recipe, changes).run.dir)
    options = _options(nproc=nproc, extend=extend)
    code = _run("train", [recipe, *_overrides(changes)], options, logs=run_dir / "logs")[0]

    from packhorse.trainer.checkpoint import best, checkpoint
    from packhorse.trainer.utils.json_lines import read_json_lines
    from packhorse.trainer.utils.log_lines import check_metrics

    lines = read_json_lines(run_dir / "metrics.jsonl", skip_damaged=True, check=check_metrics)
    saved = checkpoint.find(run_dir)
    return RunResult(
        run_dir,
        done=code == DONE,
        losses={line["step"]: line["train/loss"] for line in lines if "train/loss" in line},
        evaluations={step: best.numbers(line) for step, line in best.evaluations(run_dir).items()},
        checkpoint=saved[0] if saved else None,
    )


def evaluate(
    model: PathLike,
    recipe: PathLike,
    changes: Mapping[str, Any] | None = None,
    *,
    step: int | None = None,
    best: bool = False,
    out: PathLike | None = None,
    nproc: int | None = None,
    ema: bool = False,
    trust_run: bool = False,
) -> dict[str, float | None]:
    """Evaluate a checkpoint, an export or a hub model on the held-out rows.

    Args:
        model: a run folder, a model folder or a hub name.
        step: of a run; by default its last checkpoint.
        best: take a run's best step instead, by its own eval.best.
        out: folder to write; by default evals/ in the run's folder, or in the current one.
        nproc: processes; by default one for each GPU, or one without a GPU.
        ema: take the moving average of the weights (optim.ema_decay).
        trust_run: let the recipe in the run folder run code, as model.trust_remote_code does.

    Returns:
        The loss and the scores by their names; None for a score that is missing.

    Raises:
        BadInput: the model or the recipe cannot be used.
        RunFailed: anything else went wrong, or the evaluation was stopped.
    """
    options = _options(step=step, best=best, out=out, nproc=nproc, ema=ema)
    options += _options(trust_run=trust_run)
    written = _run("eval", [model, recipe, *_overrides(changes)], options)[1]

    from packhorse.trainer.checkpoint.best import numbers
    from packhorse.trainer.eval.compare import read_results

    results = read_results(written)
    return numbers({"eval_loss": results.eval_loss, "metrics": results.metrics})


def export(
    run_dir: PathLike,
    out: PathLike,
    *,
    step: int | None = None,
    best: bool = False,
    merge: bool = False,
    overwrite: bool = False,
    ema: bool = False,
    trust_run: bool = False,
) -> Path:
    """Export a checkpoint as a Hugging Face model folder, or an adapter for peft; return `out`.

    Args:
        step: by default that of the last checkpoint.
        best: take the best evaluated step instead, by the recipe's eval.best.
        merge: merge an adapter into its base, to a whole model.
        overwrite: replace an earlier export at `out`; anything else there is refused in any case.
        ema: write the moving average of the weights (optim.ema_decay).
        trust_run: let the recipe in the run folder run code, as model.trust_remote_code does.

    Raises:
        BadInput: there is no such checkpoint, or `out` exists or cannot be written.
        RunFailed: anything else went wrong.
    """
    options = _options(out=out, step=step, best=best, merge=merge, overwrite=overwrite, ema=ema)
    _run("export", [run_dir], options + _options(trust_run=trust_run))
    return Path(out)


# -------------------------------------------------------------------------------------- the command


def _overrides(changes: Mapping[str, Any] | None) -> list[str]:
    """Return changes as the command's `key=value`; JSON is YAML."""
    found = []
    for key, value in (changes or {}).items():
        try:
            found.append(f"{key}={json.dumps(value, ensure_ascii=False, default=os.fspath)}")
        except (TypeError, ValueError, RecursionError):
            raise BadInput(
                f"{key}: a {type(value).__name__} is no value of a recipe; give a text, a number, "
                "a list or a dict of them"
            ) from None
    return found


def _options(**given: Any) -> list[str]:
    """Return options of the command: `--step=5` for a value, `--best` for True."""
    return [
        f"--{name.replace('_', '-')}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value is not None and value is not False
    ]


def _run(
    command: str, arguments: list[PathLike], options: list[str], logs: Path | None = None
) -> tuple[int, str]:
    """Run the command, and show what it says. Returns its exit code, 0 or for `train` 75, and the
    last line that it printed.

    Raises:
        BadInput: with the command's sentence.
        RunFailed: with the end of its output, and the folder of the ranks' logs if there is one.
        KeyboardInterrupt: Ctrl-C came, and the command has ended.
    """
    from packhorse.trainer.cli.worker import exit_with
    from packhorse.trainer.config.packaged import MAIN

    # a path may begin with `-`
    words = [*options, "--", *(os.fspath(argument) for argument in arguments)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen(
            [sys.executable, MAIN, command, *words],
            env={k: value for k, value in os.environ.items() if not _OF_WORKERS.fullmatch(k)},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches it by `_show` alone
            preexec_fn=partial(exit_with, os.getpid()),  # it saves and stops if this process dies
        )
        try:
            said = _show(process)
        finally:
            process.terminate()  # it has ended, unless something could not be shown
        printed.seek(0)
        lines = printed.read().splitlines()
    if lines:
        print("\n".join(lines))
    if process.returncode == DONE or (process.returncode == SAVED_RUN_AGAIN and command == "train"):
        return process.returncode, lines[-1] if lines else ""
    end = "\n".join(said)
    if process.returncode == BAD_INPUT:
        sentences = re.findall(r"packhorse: error: (.*(?:\n  .*)*)", end)
        raise BadInput(sentences[-1] if sentences else end)
    where = f"; the logs of its ranks are in {logs}" if logs and logs.is_dir() else ""
    raise RunFailed(f"packhorse {command}: exit code {process.returncode}{where}\n{end}")


def _show(process: subprocess.Popen[str]) -> deque[str]:
    """Show the process's stderr until it ends; return the last lines. Ctrl-C asks it to stop."""
    assert process.stderr
    last: deque[str] = deque(maxlen=_SHOWN_LINES)
    interrupts = 0
    while process.returncode is None:
        try:
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                last.append(line.rstrip("\n"))
            process.wait()
        except KeyboardInterrupt:
            # the launcher understands SIGTERM from the first second on; three SIGINTs make it kill
            process.send_signal(signal.SIGINT if interrupts else signal.SIGTERM)
            interrupts += 1
    process.stderr.close()
    if interrupts:
        raise KeyboardInterrupt
    return last
