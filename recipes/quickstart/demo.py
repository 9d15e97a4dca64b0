"""Run the demo: get a model, make data, train with ZeRO-3 on two processes, show what changed.

usage: python recipes/quickstart/demo.py [--steps N]

Run it again after an interruption: finished parts are not repeated. The number of steps is the
recipe's, or as many as fit into TRAINING_S on this machine (or --steps).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from get_smollm2 import get
from make_problems import write
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from packhorse.trainer.config.packaged import MAIN
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.cpu_speed import bf16_slowdown
from packhorse.trainer.utils.json_lines import read_json_lines

RECIPE = "recipes/quickstart.yaml"
MODEL_CACHE = Path("~/.cache/packhorse/models/smollm2-135m-instruct").expanduser()
DATA = Path("data/quickstart")
TRAINING_S = 330  # for the training alone

console = Console(highlight=False)


def show_line(text: str) -> None:
    """Print a line unbroken, so that it can be copied as a whole."""
    console.print(text, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=None)
    asked = parser.parse_args().steps
    times = [time.monotonic()]
    get(MODEL_CACHE)
    recipe = load_recipe(RECIPE)
    link(Path(recipe.model.name), MODEL_CACHE)
    if not (DATA / "heldout.jsonl").exists():
        write(DATA)
    times.append(time.monotonic())
    run_dir = Path(recipe.run.dir)
    started = started_run(run_dir)
    dtype = started.model.dtype if started else faster_dtype()
    steps = (started and started.train.steps) or asked or steps_that_fit(recipe, dtype)
    times.append(time.monotonic())
    if not (run_dir / "summary.json").exists():
        train(f"train.steps={steps}", f"model.dtype={dtype}")
    times.append(time.monotonic())
    if not (run_dir / "export" / "config.json").exists():
        packhorse("export", str(run_dir), "--out", str(run_dir / "export"))
    times.append(time.monotonic())
    summary = json.loads((run_dir / "summary.json").read_text())
    show(summary, run_dir)
    show_times([stop - start for start, stop in pairwise(times)], run_dir)
    if summary["after"]["eval/loss"] >= summary["before"]["eval/loss"]:
        sys.exit("demo: error: the loss on held-out rows did not fall")


def link(name: Path, target: Path) -> None:
    """Link the recipe's model path to the cache."""
    if not name.exists():
        name.parent.mkdir(parents=True, exist_ok=True)
        name.unlink(missing_ok=True)  # a broken link
        name.symlink_to(target)


def started_run(run_dir: Path) -> Recipe | None:
    """Return the recipe of a run that was started before: it is resumed as it is."""
    saved = run_dir / "recipe.yaml"
    return load_recipe(saved) if saved.exists() else None


def faster_dtype() -> str:
    """Return the type that this machine trains faster in, timed by a matrix product."""
    if num_gpus():
        return "bfloat16"
    slowdown = bf16_slowdown()
    dtype = "float32" if slowdown > 1 else "bfloat16"
    show_line(
        f"A matrix product in bfloat16 takes {slowdown:.2f} times as long as in float32: training "
        f"in {dtype}."
    )
    return dtype


def steps_that_fit(recipe: Recipe, dtype: str) -> int:
    """Return the recipe's steps, or fewer if a short run shows that they take over TRAINING_S."""
    wanted = recipe.train.steps
    assert wanted, f"{RECIPE} gives train.steps"
    show_line("Measuring how fast this machine trains ...")
    runs = Path(recipe.run.dir).parent
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quickstart-speed.", dir=runs) as folder:
        train(
            f"run.dir={folder}",
            "train.steps=3",
            f"model.dtype={dtype}",
            "data.eval=[]",
            "eval.generate=null",
        )
        lines = read_json_lines(Path(folder) / "metrics.jsonl")
    # the first step is slower: it warms up
    step_s = statistics.mean(line["perf/step_s"] for line in lines[1:])
    steps = max(1, min(wanted, int(TRAINING_S / step_s)))
    show_line(f"{step_s:.1f} s a step: {wanted} steps take about {wanted * step_s:.0f} s")
    if steps < wanted:
        show_line(f"This machine is slow for the demo: it trains {steps} steps and learns less.")
    return steps


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def train(*overrides: str) -> None:
    packhorse("train", RECIPE, *overrides, "--nproc", str(min(num_gpus() or 2, 2)))


def packhorse(*arguments: str) -> None:
    """Run the command as a user would. Exits with its exit code unless that is 0."""
    show_line(f"[bold]packhorse {escape(' '.join(arguments))}[/bold]")
    code = subprocess.run([sys.executable, MAIN, *arguments]).returncode
    if code:
        sys.exit(code)


def show(summary: dict[str, Any], run_dir: Path) -> None:
    table = Table(title=f"SmolLM2-135M-Instruct on word problems, {summary['steps']} steps")
    for column in ("held out", "before", "after"):
        table.add_column(column, justify="left" if column == "held out" else "right")
    table.add_row("loss", *(f"{summary[at]['eval/loss']:.3f}" for at in ("before", "after")))
    for key in ("format_accuracy", "answer_accuracy"):
        table.add_row(
            key.replace("_", " "),
            *(f"{summary[at][f'eval/{key}']:.1%}" for at in ("before", "after")),
        )
    console.print(table)
    heldout = [
        json.loads(line)["question"] for line in (DATA / "heldout.jsonl").read_text().splitlines()
    ]
    question = next(question for question in heldout if question in summary["sample"]["prompt"])
    show_line(f"[bold]One answer[/bold]\n{escape(question)}\n{escape(summary['sample']['answer'])}")
    show_line(f"[bold]{summary['tokens_per_s']:,.0f} tokens per second[/bold] while training")
    command = Path(os.path.relpath(sys.executable)).with_name("packhorse")
    show_line(
        f"\nThe curves:     {command} report {run_dir}\n"
        'Talk to it:     echo "Ada has 4 boxes with 6 books each, and 5 loose books. How many '
        f'books does Ada have?" | {command} chat {run_dir / "export"}'
    )


def show_times(parts: list[float], run_dir: Path) -> None:
    """Show where the time of this start went. A part that was finished before takes none."""
    model_s, speed_s, run_s, export_s = parts
    lines = read_json_lines(run_dir / "metrics.jsonl")
    training_s = min(sum(line.get("perf/step_s", 0.0) for line in lines), run_s)
    show_line(
        f"\nTime: model and data {model_s:.0f} s, measuring speed {speed_s:.0f} s, training "
        f"{training_s:.0f} s, evaluation and the rest {run_s - training_s:.0f} s, export "
        f"{export_s:.0f} s; {sum(parts):.0f} s in total",
    )


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"demo: error: {error}")
