"""All experiments: trains what is not trained yet, one run after the other, and writes the tables.

usage: python recipes/experiments/run.py [--only 1,4] [--commands]
       python recipes/experiments/run.py --recipe recipes/experiments/full.yaml --out
       runs/experiments-full

Stopped (Ctrl-C, SIGTERM) it saves the run at hand and ends with 75; the same command goes on from
there. A finished run is not repeated: remove its folder to have it anew. Its checkpoints are
removed, 2 GB each. One that fails is left to the next start, and the others go on; the exit code is
then 1. docs/experiments.md gets the tables of the runs of base.yaml, OUT/experiments.md those of
another recipe.
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

from trainer.config.recipe import Recipe, load_recipe  # noqa: E402
from trainer.datatypes import BAD_INPUT, DONE, FAILED, SAVED_RUN_AGAIN, BadInput  # noqa: E402
from trainer.utils.files import read_json_lines  # noqa: E402

BASE = "recipes/experiments/base.yaml"
PAGE = ROOT / "docs" / "experiments.md"
LOG = "log.jsonl"  # a line for each start of a run: its name, exit code, seconds, commit
VERSIONS = ("torch", "transformers", "deepspeed")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(map(str, EXPERIMENTS)), help="numbers of experiments, as 1,4"
    )
    parser.add_argument("--recipe", default=BASE, help="what every run starts from")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/experiments"), help="the folder of run folders"
    )
    parser.add_argument("--page", type=Path, default=None, help="where the tables are written")
    parser.add_argument(
        "--commands", action="store_true", help="print the runs' commands, and run nothing"
    )
    asked = parser.parse_args()
    is_base = Path(asked.recipe).resolve() == ROOT / BASE
    page = asked.page or (PAGE if is_base else asked.out / PAGE.name)
    try:
        wanted = runs(numbers_of(asked.only))
        base = load_recipe(asked.recipe)
        if asked.commands:
            for run in wanted:
                print(
                    shlex.join(
                        ["packhorse", "train", asked.recipe, *overrides(run, base, asked.out)]
                    )
                )
            return DONE
        if is_base:
            get(MODEL_CACHE)
            link(Path(base.model.name), MODEL_CACHE)
            make_data.write(Path(base.data.train[0].path or "").parent, *make_data.word_problems())
        with alone_in(asked.out) as lock:
            return run_all(asked.recipe, base, wanted, asked.out, page, lock)
    except BadInput as error:
        print(f"experiments: error: {error}", file=sys.stderr)
        return BAD_INPUT


def numbers_of(text: str) -> list[int]:
    """`1,4` as numbers. Raises BadInput where there is no such experiment."""
    parts = [part.strip() for part in text.split(",")]
    known = {str(number) for number in EXPERIMENTS}
    if not set(parts) <= known:
        raise BadInput(f"--only {text}: give numbers from {min(known)} to {max(known)}, as 1,4")
    return sorted({int(part) for part in parts})


@contextmanager
def alone_in(out: Path) -> Iterator[int]:
    """Hold the folder. The runs hold it too, through this descriptor: one that is left over is not
    run beside another.

    Raises:
        BadInput: somebody else does.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{out}: another start of the experiments is at work there; wait for its end"
            ) from None
        yield file.fileno()


def run_all(
    recipe_file: str, base: Recipe, wanted: list[Run], out: Path, page: Path, lock: int
) -> int:
    """Train the wanted runs that are not done, and write the page after each. Returns the exit
    code.
    """
    recipes = {
        run: load_recipe(recipe_file, overrides(run, base, out)) for run in wanted
    }  # all of them, before any
    expected_s = {run: arms(base)[run.arm].expected_s for run in wanted}
    left = [run for run in wanted if not is_done(recipes[run], out / run.name)]
    pace = pace_of(out, base)
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
            to_go = about(sum(expected_s[r] for r in left), pace_of(out, base))
            say(f"[{number}/{len(wanted)}] {run.name}; to go: {to_go}")
            began = time.monotonic()
            command = [
                sys.executable,
                "-m",
                "trainer.cli.main",
                "train",
                recipe_file,
                *overrides(run, base, out),
            ]
            code = stop.wait(subprocess.Popen(command, pass_fds=[lock]))
            line = {
                "run": run.name,
                "code": code,
                "seconds": round(time.monotonic() - began),
                "commit": commit(),
            }
            with (out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if code == SAVED_RUN_AGAIN or (code and stop.asked):
                break
            left.pop(0)
            if code:
                failed.append(run.name)
                say(f"{run.name} failed with exit code {code}; what it said is above")
                continue
            shutil.rmtree(out / run.name / "checkpoints", ignore_errors=True)
            write_page(page, out, base)
    if failed:
        say(f"failed: {', '.join(failed)}")
    if left:
        say(f"stopped with {len(left)} runs to do; the same command goes on")
        return SAVED_RUN_AGAIN
    write_page(page, out, base)
    say(f"{len(wanted) - len(failed)} of {len(wanted)} runs are done: {page}")
    return FAILED if failed else DONE


def is_done(recipe: Recipe, folder: Path) -> bool:
    """Whether the run has ended. Raises BadInput where it was of another recipe."""
    if not (folder / "summary.json").exists():
        return False
    before = load_recipe(folder / "recipe.yaml")
    if (before.fixed(), before.eval) != (recipe.fixed(), recipe.eval):
        raise BadInput(
            f"{folder} holds a finished run of another recipe: remove it, or give another --out"
        )
    return True


class Stop:
    """Inside, SIGINT, SIGTERM and SIGHUP stop the run at hand, saved, and no other is started."""

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stop:
        taken = [
            n
            for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(n) != signal.SIG_IGN
        ]
        self._before = {
            number: signal.signal(number, self._ask) for number in taken
        }  # under nohup all but SIGHUP
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        self.asked = True
        if self._process and number != signal.SIGINT:  # Ctrl-C reaches the run by itself
            self._process.send_signal(signal.SIGTERM)

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit code of the process."""
        self._process = process
        if self.asked:  # before there was one to tell
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        self._process = None
        return code


# --------------------------------------------------------------------------------------------- time


def log_of(out: Path) -> list[dict[str, Any]]:
    """The starts of runs so far."""
    return read_json_lines(out / LOG)


def pace_of(out: Path, base: Recipe) -> float | None:
    """How many times as long as expected the finished runs took; None where nothing is known of
    this recipe.
    """
    took_s = expected_s = 0
    for line in log_of(out):
        if line["code"] == DONE:
            took_s += line["seconds"]
            expected_s += arms(base)[line["run"].rpartition("-seed")[0]].expected_s
    if expected_s:
        return took_s / expected_s
    return 1.0 if base.model.name == load_recipe(ROOT / BASE).model.name else None


def about(expected_s: float, pace: float | None) -> str:
    """`about 1 h 05 min`."""
    if pace is None:
        return "a time that is known after the first run"
    minutes = round(expected_s * pace / 60)
    return (
        f"about {minutes // 60} h {minutes % 60:02} min"
        if minutes >= 60
        else f"about {max(minutes, 1)} min"
    )


# ----------------------------------------------------------------------------------------- the page


def write_page(page: Path, out: Path, base: Recipe) -> None:
    """docs/experiments.md with the numbers there are."""
    blocks = {str(number): tables.block(number, out) for number in EXPERIMENTS}
    text = tables.fill(PAGE.read_text(encoding="utf-8"), {"where": where(out, base), **blocks})
    aside = page.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(page)


def where(out: Path, base: Recipe) -> str:
    """Model, machine, versions, commit and time, as Markdown items."""
    lines = log_of(out)
    done = {line["run"] for line in lines if line["code"] == DONE}
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    seconds = sum(line["seconds"] for line in lines)
    return (
        f"- {Path(base.model.name).name}, {len(done)} runs in {seconds / 3600:.1f} hours, "
        f"evaluations among it\n"
        f"{machine(VERSIONS)}\n- packhorse at {commits}; seeds 0 and 1 where there are two, else 0"
    )


def commit() -> str:
    """The commit of the code, with a + where the code differs from it; `unknown` outside a
    checkout.
    """
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    if found.returncode:
        return "unknown"
    code = ["trainer", "launch", "recipes", "ds_configs"]
    changed = subprocess.run(
        ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", *code]
    ).returncode
    return found.stdout.strip() + "+" * bool(changed)


def say(text: str) -> None:
    print(f"experiments: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
