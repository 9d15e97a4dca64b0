"""Kill runs at random moments, break their disks and clocks, and compare each with a whole one.

    python -m tests.chaos [--kills 30] [--seed 0] [--out build/chaos.jsonl] [--only WORD]

A trial is a run folder of its own: up to three starts, each of which meets a fault at a random
moment, then a start that is left alone. The last checkpoint must have the same bytes, the log the
same lines, and an export the same files as those of a run that met none. The trials are appended to
the file, and a table of all of them is printed; exit code 1 if one differs. A campaign that was
stopped goes on after the last trial of its seed. tests/runs/test_kills.py kills at named points
instead.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from packhorse.trainer.utils.files import read_json_lines
from tests.cluster.hosts import Hosts, hosts
from tests.ranks import ROOT
from tests.runs.killed import KILLED, ForkServer, Run, assert_same
from tests.unit.test_vllm_server import STAND_IN

MOST_FAULTS = 3  # of one run
DISK_CALLS = 250  # about as many writes and fsyncs has a run

RANK, RANKS, PREPARING = "one rank", "every rank", "every rank, while the data is prepared"
WORKER, SERVER = "a tokenizing worker, its helper or server", "an evaluation's server"
EXPORT, UNIVERSAL = "an export", "a conversion to DeepSpeed's universal form"
FROZEN = "every rank frozen, and another start meanwhile"
CLOCK = "every rank, with a clock that jumps by an hour each second"
POWER = "every rank, and what was not fsynced is lost"
SLOW, SHORT = "every rank, on a slow disk", "every rank, on a disk that writes in halves"
HANGING = "every rank, in a folder that hangs for seconds"
FULL, FAILING = "a full disk", "a disk that fails once"
LAUNCHER, HOST = "the launcher, or frozen", "another host's launcher, or its network"
# see tests/faults.cpp
DISK = {SLOW: "slow", SHORT: "short", HANGING: "hang", FULL: "full", FAILING: "failing"}
FORKED = (RANK, RANKS, PREPARING, WORKER, SERVER, EXPORT, UNIVERSAL, FROZEN, CLOCK, POWER, *DISK)
KINDS = (*FORKED, LAUNCHER, HOST)
IN_TURN = (*FORKED * 2, LAUNCHER, *FORKED * 2, HOST)  # starts by the launcher take long


class Campaign:
    """Trials in one folder, and the whole runs that they are compared with."""

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._runs = 0
        self._whole: dict[tuple[str, int], tuple[Run, float]] = {}
        self._draw = random.Random()

    def _run(self, kind: str) -> Run:
        self._runs += 1
        place = self._folder / str(self._runs)
        place.mkdir()
        run = Run(self._server, place, place / "run-cache")
        run.overrides += overrides(kind, self._folder)
        return run

    def _export(self, kind: str, name: str) -> dict[str, Any]:
        return {"export": str(self._folder / f"export-{name}"), "universal": kind == UNIVERSAL}

    def whole(self, kind: str, world: int) -> tuple[Run, float]:
        """Return a run that met no fault, and the seconds that it, or its export, took."""
        key = (kind if kind in (WORKER, SERVER, EXPORT, UNIVERSAL) else RANK, world)
        if key not in self._whole:
            run = self.whole(RANK, 1)[0] if kind in (EXPORT, UNIVERSAL) else self._run(kind)
            began = time.monotonic()
            if kind in (EXPORT, UNIVERSAL):
                assert run.start(1, **self._export(kind, kind)) == [0], run.log_tail
            else:
                run.finish(world)
            self._whole[key] = run, time.monotonic() - began
        return self._whole[key]

    def trial(self, kind: str, name: str, most: int = MOST_FAULTS) -> dict[str, Any]:
        """Return how many starts a run had, how many were killed and how many met other faults, the
        seconds that it took longer than a whole one, and how it differs from that at its end, which
        is None if it does not.

        Args:
            name: seeds the random numbers.
            most: faults of the run.
        """
        self._draw, self._name = random.Random(name), name
        world = self._draw.choice((1, 2))
        world = {WORKER: 1, SERVER: 1, EXPORT: 1, UNIVERSAL: 1, HOST: 2}.get(kind, world)
        whole, whole_s = self.whole(kind, world)
        run = whole if kind in (EXPORT, UNIVERSAL) else self._run(kind)
        done = {"kills": 0, "faults": 0, "starts": 1}
        began, difference = time.monotonic(), None
        try:
            for _ in range(self._draw.randint(1, most)):
                found = self._start(kind, run, world, whole_s)
                done = {key: done[key] + found.get(key, 0) for key in done}
                if "kills" not in found and "faults" not in found:
                    break
            self._finish(kind, run, world, whole)
        except (AssertionError, subprocess.TimeoutExpired):
            difference = traceback.format_exc()[-3000:]
        lost_s = time.monotonic() - began - whole_s
        return {**done, "lost_s": lost_s, "difference": difference}

    def _start(self, kind: str, run: Run, world: int, whole_s: float) -> dict[str, int]:
        """Start a run that meets a fault; return the number of starts, and of kills or faults."""
        after_s = self._draw.uniform(0.0, 0.3 * whole_s if kind == PREPARING else whole_s)
        # the imports of a real start come on top
        if kind == LAUNCHER:
            return {"starts": 1, **self._start_launcher(run, world, 10 + after_s)}
        if kind == HOST:
            return {"starts": 1, **self._start_hosts(run, 15 + after_s)}
        order = self._order(kind, run, world, after_s)
        before, done = sizes(run.folder), steps(run)
        codes = run.start(world, **order)
        if kind == POWER and KILLED in codes:
            drop_unsynced(run.folder, before, Path(order["environ"]["FAULT_SYNCED"]))
        if kind == SERVER:
            # before the first step of a start nothing is lost by an error
            assert codes == [0] or (codes == [2] and steps(run) == done), run.log_tail
        if order.get("children"):
            return {"starts": 1, "kills": self._server.hits} if self._server.hits else {"starts": 1}
        if kind in (FROZEN, FULL, FAILING):
            assert kind != FULL or set(codes) <= {0, 2}, f"{codes}\n{run.log_tail}"
            return {"starts": 1, "faults": 1} if any(codes) else {"starts": 1}
        return {"starts": 1, "kills": 1} if KILLED in codes else {"starts": 1}

    def _order(self, kind: str, run: Run, world: int, after_s: float) -> dict[str, Any]:
        """Return what becomes of the ranks of a start, as tests.runs.points.Order has it."""
        order: dict[str, Any] = {"victims": list(range(world)), "after_s": after_s}
        environ = {"FAULT_FOLDER": str(run.folder)}  # and its cache
        if kind == RANK:
            order["victims"] = [self._draw.randrange(world)]
        elif kind in (FULL, FAILING):
            order["victims"] = []
        elif kind in (WORKER, SERVER):
            faults = self._draw.randint(1, MOST_FAULTS)
            order |= {"children": True, "victims": [0] * faults, "after_s": after_s / faults}
        elif kind in (EXPORT, UNIVERSAL):
            order |= self._export(kind, self._name)
        elif kind == FROZEN:
            order["freeze"] = True
        elif kind == CLOCK:
            environ["FAULT_CLOCK"] = "3600"
        elif kind == POWER:
            environ["FAULT_SYNCED"] = str(run.folder.with_name("synced"))
        if kind in DISK:
            number = 3000 if kind == SLOW else self._draw.randint(1, DISK_CALLS)
            environ["FAULT_DISK"] = f"{DISK[kind]}:{number}"
        return {**order, "environ": environ}

    def _start_launcher(self, run: Run, world: int, after_s: float) -> dict[str, int]:
        process = launch(run, world)
        with suppress(subprocess.TimeoutExpired):
            process.wait(after_s)
            return {}
        if self._draw.random() < 0.5:
            process.kill()  # its ranks go on for a moment, and the next start meets them
            process.wait()
            return {"kills": 1}
        process.send_signal(signal.SIGSTOP)
        time.sleep(10)
        process.send_signal(signal.SIGCONT)
        assert process.wait(300) == 0, run.log_tail
        return {"faults": 1}

    def _start_hosts(self, run: Run, after_s: float) -> dict[str, int]:
        """Train on two hosts, one of which loses its launcher and all else there, or its link."""
        with hosts(self._folder, ["host0", "host1"], "chaos", "10.83.0") as two:
            launchers = launch_hosts(two, run)
            with suppress(subprocess.TimeoutExpired):
                launchers[0].wait(after_s)
                return {}
            number, dies = self._draw.randrange(2), self._draw.random() < 0.5
            if dies:
                launchers[number].kill()
            else:
                two.cut(f"host{number}")
            codes, said = ended(launchers, 120)
            assert all(codes) or not any(codes), f"{codes}\n{said}"  # it may have just been done
            return {"kills": 1} if dies else {"faults": 1}

    def _finish(self, kind: str, run: Run, world: int, whole: Run) -> None:
        """Start once more, and compare.

        Raises:
            AssertionError: it does not end well, or differs.
        """
        if kind in (EXPORT, UNIVERSAL):
            out = self._folder / f"export-{self._name}"
            if not out.exists():  # else its folder was published before the kill
                assert run.start(1, **self._export(kind, self._name)) == [0], run.log_tail
            assert contents(out) == contents(self._folder / f"export-{kind}")
            assert not list(self._folder.glob(f".{out.name}*")), "leftovers"
            return
        if kind == LAUNCHER:
            assert launch(run, world).wait(300) == 0, run.log_tail
        elif kind == HOST:
            with hosts(self._folder, ["host0", "host1"], "chaos", "10.83.0") as two:
                codes, said = ended(launch_hosts(two, run), 300)
            assert codes == [0, 0], f"{codes}\n{said}"
        else:
            run.finish(world)
        assert_same(run.folder, whole.folder, ("eval/hm",) if kind == SERVER else ())


def overrides(kind: str, folder: Path) -> tuple[str, ...]:
    """Return the recipe's overrides of a kind, whose files are written to `folder`."""
    if kind == WORKER:  # rows that the library for math verifies, in helpers of the workers
        rows = (
            {"question": "Half?", "answer": f"#### {n}/2", "best": f"{n}/2"} for n in range(200)
        )
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"path": str(path), "filters": {"math_answer": "best"}}
        return (f"data.train={json.dumps([source])}", "data.workers=2")
    if kind == SERVER:
        program = folder / "site" / "vllm" / "entrypoints" / "openai" / "api_server.py"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(textwrap.dedent(STAND_IN))
        python, given = folder / "vllm_python", f"VLLM_STAND_IN={folder / 'started.json'}"
        site = f"PYTHONPATH={folder / 'site'}"
        python.write_text(f'#!/bin/sh\n{given} {site} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        generate = "eval.generate={num_prompts: 2, scorers: {hm: {kind: exact}}}"
        return (generate, f"eval.vllm_python={python}")
    return ()


def launch(run: Run, world: int) -> subprocess.Popen[bytes]:
    """Start the command itself, whose launcher starts the ranks."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [*command(run), "--nproc", str(world)], cwd=ROOT, env=env, stdout=log, stderr=log
        )


def command(run: Run) -> list[str]:
    return [sys.executable, "-m", "packhorse", "train", "recipes/debug.yaml", *run.overrides]


def launch_hosts(two: Hosts, run: Run) -> list[subprocess.Popen[str]]:
    meeting = ["--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", "host0:29400"]
    return [two.start(name, [*command(run), *meeting]) for name in ("host0", "host1")]


def ended(launchers: list[subprocess.Popen[str]], limit_s: float) -> tuple[list[int], str]:
    """Return the exit codes of launchers, and what they wrote."""
    said = [process.communicate(timeout=limit_s)[1] for process in launchers]
    return [process.returncode for process in launchers], "\n".join(said)[-3000:]


def steps(run: Run) -> int:
    """Return the number of steps that the run has logged."""
    lines = read_json_lines(run.folder / "metrics.jsonl", skip_damaged=True)
    return sum("train/loss" in line for line in lines)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def sizes(run_dir: Path) -> dict[str, int]:
    """Return the size of each file of a run and its cache."""
    folders = run_dir.parent.glob(f"{run_dir.name}*")
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path): path.stat().st_size for path in files}


def drop_unsynced(run_dir: Path, before: dict[str, int], journal: Path) -> None:
    """Cut each file to what was on the disk at the start, or fsynced since: what a power cut may
    leave, as renames are kept.

    Args:
        before: the sizes at the start.
        journal: see tests/faults.cpp. It is removed.
    """
    synced = dict(before)
    for line in journal.read_text().splitlines() if journal.exists() else ():
        first, *rest = line.split("\t")
        if first == "rename":
            source, target = rest
            moved = {path: size for path, size in synced.items() if is_in(path, source)}
            kept = {p: size for p, size in synced.items() if not is_in(p, source, target)}
            synced = kept | {target + p.removeprefix(source): size for p, size in moved.items()}
        else:
            synced[rest[0]] = int(first)
    for path, size in sizes(run_dir).items():
        if size > synced.get(path, 0):
            os.truncate(path, synced.get(path, 0))
    journal.unlink(missing_ok=True)


def is_in(path: str, *places: str) -> bool:
    return any(f"{path}/".startswith(f"{place}/") for place in places)


def campaign(
    server: ForkServer, kills: int, seed: int, out: Path, kinds: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Make trials of each kind in turn until so many starts were killed or met a fault; append them
    to `out`, after those of the same seed that it has."""
    out.parent.mkdir(exist_ok=True)
    trials = [each for each in read_json_lines(out) if each["seed"] == seed]
    with tempfile.TemporaryDirectory() as folder:
        made = Campaign(server, Path(folder))
        made.whole(WORKER, 1)  # the first run is slower, and times of it would mislead
        while sum(each["kills"] + each["faults"] for each in trials) < kills:
            kind, number = kinds[len(trials) % len(kinds)], len(trials)
            found = made.trial(kind, f"{seed}-{number}")
            trials.append({"seed": seed, "number": number, "killed": kind, **found})
            with out.open("a") as file:
                file.write(json.dumps(trials[-1]) + "\n")
    return trials


def table(trials: list[dict[str, Any]]) -> str:
    counts = ("kills", "faults", "starts")
    head = "| met by | kills | other faults | starts | differences | seconds lost a fault |"
    rows = [head, "|" + "---|" * 6]
    for kind in (*KINDS, "all"):
        chosen = [trial for trial in trials if kind in (trial["killed"], "all")]
        numbers = [sum(trial[key] for trial in chosen) for key in counts]
        differences = sum(trial["difference"] is not None for trial in chosen)
        hits = [(t["lost_s"], t["kills"] + t["faults"]) for t in chosen]
        lost_s = max(
            (lost_s / number for lost_s, number in hits if number and lost_s > 0), default=0.0
        )
        rows.append(f"| {kind} | {' | '.join(map(str, numbers))} | {differences} | {lost_s:.1f} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "chaos.jsonl")
    parser.add_argument("--only", default="", help="kinds that have this word")
    asked = parser.parse_args()
    # hosts are network namespaces
    kinds = tuple(
        kind for kind in IN_TURN if asked.only in kind and (kind != HOST or not os.getuid())
    )
    with ForkServer() as server:
        trials = campaign(server, asked.kills, asked.seed, asked.out, kinds)
    print(table(read_json_lines(asked.out)))
    return int(any(trial["difference"] for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
