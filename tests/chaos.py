"""Kill runs at random moments, again and again, and compare each with one that was never killed.

    python -m tests.chaos [--kills 30] [--seed 0] [--out build/chaos.jsonl]

A trial is a run folder of its own: up to three starts, each of which loses a process by SIGKILL
after a random time, then a start that is left alone. The last checkpoint must have the same bytes,
the log the same lines, and an export the same files as those of a run that was never killed. The
trials are appended to the file, and a table of all of them is printed; exit code 1 if one differs.
tests/runs/test_kills.py kills at named points instead.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.ranks import ROOT
from tests.runs.killed import KILLED, ForkServer, Run, assert_same

MOST_KILLS = 3  # of one run
RANK, RANKS, PREPARING = "one rank", "every rank", "every rank, while the data is prepared"
EXPORT, LAUNCHER = "an export", "the launcher"
KINDS = (RANK, RANKS, PREPARING, EXPORT, LAUNCHER)
IN_TURN = (*KINDS[:-1] * 3, LAUNCHER)  # starts by the launcher take long


class Campaign:
    """Trials in one folder, and the whole runs that they are compared with."""

    def __init__(self, server: ForkServer, folder: Path, draw: random.Random) -> None:
        self._server, self._folder, self._draw = server, folder, draw
        self._trials = 0
        self._run().finish(1)  # the first is slower
        self._whole = {world: self._run() for world in (1, 2)}
        self._took_s = {}
        for world, run in self._whole.items():
            began = time.monotonic()
            run.finish(world)
            self._took_s[world] = time.monotonic() - began
        began = time.monotonic()
        assert self._whole[1].start(1, export=str(folder / "export")) == [0]
        self._export_s = time.monotonic() - began

    def _run(self) -> Run:
        self._trials += 1
        place = self._folder / str(self._trials)
        place.mkdir()
        return Run(self._server, place, place / "cache")

    def trial(self, kind: str) -> dict[str, Any]:
        """Return how many starts a run had and how many of them were killed, the seconds that it
        took longer than a whole one, and how it differs from that at its end, which is None if it
        does not."""
        world = self._draw.choice((1, 2))
        run = self._run()
        whole_s = self._export_s if kind == EXPORT else self._took_s[world]
        if kind == EXPORT:
            run, world = self._whole[1], 1
        kills, starts, began = 0, 1, time.monotonic()
        for _ in range(self._draw.randint(1, MOST_KILLS)):
            starts += 1
            until_s = 0.3 * whole_s if kind == PREPARING else whole_s
            code = self._start(kind, run, world, self._draw.uniform(0.0, until_s))
            kills += code != 0
            if code == 0:  # it was done before
                break
        difference = self._finish(kind, run, world)
        lost_s = time.monotonic() - began - whole_s
        return {"kills": kills, "starts": starts, "lost_s": lost_s, "difference": difference}

    def _out(self) -> Path:
        return self._folder / f"export-{self._trials}"

    def _start(self, kind: str, run: Run, world: int, after_s: float) -> int:
        """Start a run, kill it, and return an exit code of it that is not 0, or 0."""
        if kind == LAUNCHER:
            process = launch(run, world)
            try:
                # the imports of a real start come on top
                return process.wait(10 + after_s)
            except subprocess.TimeoutExpired:
                process.kill()  # its ranks go on for a moment, and the next start meets them
                return process.wait()
        victims = [self._draw.randrange(world)] if kind == RANK else list(range(world))
        order: dict[str, Any] = {"victims": victims, "after_s": after_s}
        if kind == EXPORT:
            order["export"] = str(self._out())
        codes = run.start(world, **order)
        return KILLED if KILLED in codes else 0

    def _finish(self, kind: str, run: Run, world: int) -> str | None:
        try:
            if kind == EXPORT:
                if not self._out().exists():  # else its folder was published before the kill
                    assert run.start(1, export=str(self._out())) == [0], run.log_tail
                assert contents(self._out()) == contents(self._folder / "export")
                assert not list(self._folder.glob(f".{self._out().name}*")), "leftovers"
            elif kind == LAUNCHER:
                assert launch(run, world).wait(300) == 0, run.log_tail
                assert_same(run.folder, self._whole[world].folder)
            else:
                run.finish(world)
                assert_same(run.folder, self._whole[world].folder)
        except AssertionError as error:
            return str(error)[-2000:]
        return None


def launch(run: Run, world: int) -> subprocess.Popen[bytes]:
    """Start the command itself, whose launcher starts the ranks."""
    command = [sys.executable, "-m", "packhorse", "train", "recipes/debug.yaml", *run.overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [*command, "--nproc", str(world)], cwd=ROOT, env=env, stdout=log, stderr=log
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def campaign(
    server: ForkServer, kills: int, seed: int, out: Path, kinds: tuple[str, ...] = IN_TURN
) -> list[dict[str, Any]]:
    """Make trials of each kind in turn until so many starts were killed; append them to `out`."""
    trials: list[dict[str, Any]] = []
    draw = random.Random(seed)
    out.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = Campaign(server, Path(folder), draw)
        while sum(trial["kills"] for trial in trials) < kills:
            kind = kinds[len(trials) % len(kinds)]
            trials.append({"seed": seed, "number": len(trials), "killed": kind, **made.trial(kind)})
            with out.open("a") as file:
                file.write(json.dumps(trials[-1]) + "\n")
    return trials


def table(trials: list[dict[str, Any]]) -> str:
    rows = [
        "| killed | kills | starts | differences | seconds lost a kill, at most |",
        "|" + "---|" * 5,
    ]
    for kind in (*KINDS, "all"):
        chosen = [trial for trial in trials if kind in (trial["killed"], "all")]
        kills, starts = (sum(trial[key] for trial in chosen) for key in ("kills", "starts"))
        differences = sum(trial["difference"] is not None for trial in chosen)
        lost_s = max((t["lost_s"] / t["kills"] for t in chosen if t["kills"]), default=0.0)
        rows.append(f"| {kind} | {kills} | {starts} | {differences} | {lost_s:.1f} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "chaos.jsonl")
    asked = parser.parse_args()
    with ForkServer() as server:
        trials = campaign(server, asked.kills, asked.seed, asked.out)
    print(table([json.loads(line) for line in asked.out.read_text().splitlines()]))
    return int(any(trial["difference"] for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
