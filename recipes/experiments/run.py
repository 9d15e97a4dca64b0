"""Run the experiments: train what is not trained yet, run after run, and write the tables.

usage: python recipes/experiments/run.py [--only 1,4] [--commands]
       python recipes/experiments/run.py --recipe full.yaml --out runs/experiments-full

On Ctrl-C or SIGTERM it saves the current run and exits with 75; the same command resumes. A
finished run is not repeated: delete its folder to repeat it. Its checkpoints (2 GB each) are
deleted. If a run fails, the next start tries it again, the other runs follow, and the exit code is
1. The tables of base.yaml go to docs/experiments.md, those of another recipe to OUT/experiments.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "quickstart"), str(ROOT / "benchmarks")]

import make_data  # noqa: E402
import tables  # noqa: E402
from catalogue import EXPERIMENTS, Run, arms, overrides, runs  # noqa: E402
from common import machine  # noqa: E402 - the benchmarks'
from demo import MODEL_CACHE, link  # noqa: E402 - the quickstart's
from get_smollm2 import get  # noqa: E402

from packhorse.trainer.config.packaged import MAIN  # noqa: E402
from packhorse.trainer.config.recipe import Recipe, load_recipe  # noqa: E402
from packhorse.trainer.datatypes import BAD_INPUT, DONE, FAILED, SAVED_RUN_AGAIN, BadInput  # noqa: E402
from packhorse.trainer.utils.files import replace_file  # noqa: E402
from packhorse.trainer.utils.json_lines import read_json_lines  # noqa: E402

BASE = "recipes/experiments/base.yaml"
PAGE = ROOT / "docs" / "experiments.md"
LOG = "log.jsonl"  # a line for each start of a run: its name, exit code, seconds, commit
VERSIONS = ("torch", "transformers", "deepspeed")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(map(str, EXPERIMENTS)), help="numbers of the experiments, as 1,4"
    )
    parser.add_argument("--recipe", default=BASE, help="base recipe of every run")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/experiments"), help="folder of the run folders"
    )
    parser.add_argument("--page", type=Path, default=None, help="file to write the tables to")
    parser.add_argument(
        "--commands", action="store_true", help="print the runs' commands and run nothing"
    )
    asked = parser.parse_args()
    is_base = Path(asked.recipe).resolve() == ROOT / BASE
    page = asked.page or (PAGE if is_base else asked.out / PAGE.name)
    try:
        wanted = runs(parse_numbers(asked.only))
        base = load_recipe(asked.recipe)
        if asked.commands:
            for run in wanted:
                changes = overrides(run, base, asked.out)
                print(shlex.join(["packhorse", "train", asked.recipe, *changes]))
            return DONE
        if is_base:
            get(MODEL_CACHE)
            link(Path(base.model.name), MODEL_CACHE)
            make_data.write(Path(base.data.train[0].path or "").parent, *make_data.word_problems())
        require_own_page(page)
        with locked(asked.out) as lock:
            return run_all(asked.recipe, base, wanted, asked.out, page, lock)
    except BadInput as error:
        print(f"experiments: error: {error}", file=sys.stderr)
        return BAD_INPUT


def parse_numbers(text: str) -> list[int]:
    """Return the numbers of `1,4`. Raises BadInput if there is no such experiment."""
    parts = [part.strip() for part in text.split(",")]
    known = {str(number) for number in EXPERIMENTS}
    if not set(parts) <= known:
        raise BadInput(f"--only {text}: give numbers from {min(known)} to {max(known)}, as 1,4")
    return sorted({int(part) for part in parts})


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Lock the folder and give the lock's file descriptor.

    Runs inherit the descriptor, so that an orphaned run still holds the lock.

    Raises:
        BadInput: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{out}: another process runs the experiments there; wait for its end"
            ) from None
        yield file.fileno()


def run_all(
    recipe_file: str, base: Recipe, wanted: list[Run], out: Path, page: Path, lock: int
) -> int:
    """Train the runs that are not done, and write the page after each. Returns the exit code."""
    # all recipes are read before the first run, so that a fault stops the whole at once
    recipes = {run: load_recipe(recipe_file, overrides(run, base, out)) for run in wanted}
    expected_s = {run: arms(base)[run.arm].expected_s for run in wanted}
    left = [run for run in wanted if not is_done(recipes[run], out / run.name)]
    pace = measure_pace(out, base)
    say(
        f"{len(wanted)} runs, {len(left)} of them to do, in "
        f"{about(sum(expected_s[r] for r in left), pace)}:"
    )
    for run in wanted:
        say(f"  {run.name:24}{about(expected_s[run], pace) if run in left else 'done'}")
    failed = []
    with Stop() as stop:
        while left and not stop.asked:
            run, number = left[0], len(wanted) - len(left) + 1
            to_go = about(sum(expected_s[r] for r in left), measure_pace(out, base))
            say(f"[{number}/{len(wanted)}] {run.name}; to go: {to_go}")
            began = time.monotonic()
            command = [sys.executable, MAIN, "train", recipe_file]
            process = subprocess.Popen([*command, *overrides(run, base, out)], pass_fds=[lock])
            code = stop.wait(process)
            seconds = round(time.monotonic() - began)
            line = {"run": run.name, "code": code, "seconds": seconds, "commit": commit()}
            with (out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if code == SAVED_RUN_AGAIN or (code and stop.asked):
                break
            left.pop(0)
            if code:
                failed.append(run.name)
                say(f"{run.name} failed with exit code {code}; its output is above")
                continue
            shutil.rmtree(out / run.name / "checkpoints", ignore_errors=True)
            write_page(page, out, base)
    if failed:
        say(f"failed: {', '.join(failed)}")
    if left:
        say(f"stopped with {len(left)} runs to do; run the same command to resume")
        return SAVED_RUN_AGAIN
    write_page(page, out, base)
    say(f"{len(wanted) - len(failed)} of {len(wanted)} runs are done: {page}")
    return FAILED if failed else DONE


def is_done(recipe: Recipe, folder: Path) -> bool:
    """Return whether the run is finished. Raises BadInput if it was trained by another recipe."""
    if not (folder / "summary.json").exists():
        return False
    before = load_recipe(folder / "recipe.yaml")
    if (before.fixed(), before.eval) != (recipe.fixed(), recipe.eval):
        raise BadInput(
            f"{folder} holds a finished run of another recipe: remove it, or give another --out"
        )
    return True


class Stop:
    """While open, SIGINT, SIGTERM and SIGHUP stop the current run, saved, and no other starts."""

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stop:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # a signal that is ignored (nohup ignores SIGHUP) stays ignored
        taken = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        self.asked = True
        if self._process and number != signal.SIGINT:  # the terminal sends Ctrl-C to the run itself
            self._process.send_signal(signal.SIGTERM)

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the process and return its exit code."""
        self._process = process
        if self.asked:  # the signal came before the process
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        self._process = None
        return code


# --------------------------------------------------------------------------------------------- time


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return a line for each start of a run so far."""
    return read_json_lines(out / LOG)


def measure_pace(out: Path, base: Recipe) -> float | None:
    """Return the time that the finished runs took, relative to the time expected.

    Returns None if nothing is known about this recipe yet.
    """
    took_s = expected_s = 0
    for line in read_log(out):
        if line["code"] == DONE:
            took_s += line["seconds"]
            expected_s += arms(base)[line["run"].rpartition("-seed")[0]].expected_s
    if expected_s:
        return took_s / expected_s
    return 1.0 if base.model.name == load_recipe(ROOT / BASE).model.name else None


def about(expected_s: float, pace: float | None) -> str:
    """Return a duration as text, as `about 1 h 05 min`."""
    if pace is None:
        return "a time that is known after the first run"
    minutes = round(expected_s * pace / 60)
    if minutes < 60:
        return f"about {max(minutes, 1)} min"
    return f"about {minutes // 60} h {minutes % 60:02} min"


# ----------------------------------------------------------------------------------------- the page


def require_own_page(page: Path) -> None:
    """Raise BadInput if there is another file than a copy of docs/experiments.md."""
    if page.exists() and "<!-- where -->" not in page.read_text(errors="replace"):
        raise BadInput(f"{page}: exists, and is no page of the experiments; give another --page")


def write_page(page: Path, out: Path, base: Recipe) -> None:
    """Write docs/experiments.md, or its copy, with the results so far."""
    blocks = {str(number): tables.block(number, out) for number in EXPERIMENTS}
    text = tables.fill(PAGE.read_text(encoding="utf-8"), {"where": where(out, base), **blocks})
    with replace_file(page) as file:
        file.write(text)


def where(out: Path, base: Recipe) -> str:
    """Return model, machine, versions, commit and time, as Markdown items."""
    lines = read_log(out)
    done = {line["run"] for line in lines if line["code"] == DONE}
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    seconds = sum(line["seconds"] for line in lines)
    return (
        f"- {Path(base.model.name).name}, {len(done)} runs in {seconds / 3600:.1f} hours, "
        f"evaluations among it\n"
        f"{machine(VERSIONS)}\n- packhorse at {commits}; seeds 0 and 1 where there are two, else 0"
    )


def commit() -> str:
    """Return the commit of the code, with a + if the code differs; `unknown` outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return "unknown"
    code = ["packhorse", "trainer", "launch", "recipes", "ds_configs"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode
    return found.stdout.strip() + "+" * bool(changed)


def say(text: str) -> None:
    print(f"experiments: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
