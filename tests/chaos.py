"""Kill runs at random moments, break their disks and clocks, and compare each with a whole one.

    python -m tests.chaos [--kills 30] [--seed 0] [--out build/chaos.jsonl] [--only WORD]

A trial is a run folder of its own: up to eight starts, each of which meets a fault at a random
moment, then a start that is left alone. The last checkpoint must have the same bytes, the log the
same lines, and an export the same files as those of a run that met none. The trials are appended to
the file, and a table of all of them is printed; exit code 1 if one differs, whose folder is kept
beside the file. A campaign that was stopped goes on after the last trial of its seed.
tests/runs/test_kills.py kills at named points instead.

Moments are drawn in seconds that the process has computed, not in those of a clock: on a machine
with other work a start would else be over, or hardly begun. A short random time follows, so that
waits are met, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from packhorse.trainer.utils.json_lines import read_json_lines
from tests.cluster.hosts import Hosts, hosts
from tests.power_cut import drop_unsynced, sizes
from tests.ranks import ROOT
from tests.runs.killed import KILLED, ForkServer, Run, assert_same
from tests.unit.test_vllm_server import STAND_IN

MOST_FAULTS = 8  # of one run
MOST_CHILDREN = 3  # of one start, that are killed
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
EXPORTS = (EXPORT, UNIVERSAL)
OTHERS = (WORKER, SERVER, *EXPORTS, LAUNCHER, HOST)  # than runs of recipes/debug.yaml by fork
KINDS = (*FORKED, LAUNCHER, HOST)
# starts by the launcher take long
IN_TURN = (RANK, RANKS, *FORKED, LAUNCHER, RANK, RANKS, *FORKED, HOST)


class Whole(NamedTuple):
    """A run that met no fault."""

    run: Run
    wall_s: float  # that it, or its export, took
    cpu_s: float  # of a rank; or of launchers, with all their processes


class Campaign:
    """Trials in one folder, and the whole runs that they are compared with."""

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._runs = 0
        self._whole: dict[tuple[str, int], Whole] = {}
        self._draw, self._name = random.Random(), ""

    def _run(self, kind: str) -> Run:
        self._runs += 1
        place = self._folder / str(self._runs)
        place.mkdir()
        run = Run(self._server, place, place / "run-cache")
        run.overrides += overrides(kind, self._folder)
        return run

    def _export(self, kind: str, name: str) -> dict[str, Any]:
        return {"export": str(self._folder / f"export-{name}"), "universal": kind == UNIVERSAL}

    def _hosts(self) -> AbstractContextManager[Hosts]:
        seed = self._name.partition("-")[0]
        return hosts(self._folder, ["host0", "host1"], f"chaos{seed}", "10.83.0")

    def whole(self, kind: str, world: int) -> Whole:
        key = (kind if kind in OTHERS else RANK, world)
        if key not in self._whole:
            run = self.whole(RANK, 1).run if kind in EXPORTS else self._run(kind)
            began = time.monotonic()
            cpu_s = self._leave_alone(kind, run, world, kind)
            self._whole[key] = Whole(run, time.monotonic() - began, cpu_s)
        return self._whole[key]

    def _leave_alone(self, kind: str, run: Run, world: int, name: str) -> float:
        """Start a run or an export that meets no fault; return its Whole.cpu_s.

        Raises:
            AssertionError: it does not end well.
        """
        before_s = children_s()
        if kind == HOST:
            with self._hosts() as two:
                codes, said = ended(launch_hosts(two, run), 300)
            assert codes == [0, 0], f"{codes}\n{said}"
        elif kind == LAUNCHER:
            assert launch(run, world).wait(300) == 0, run.log_tail
        elif kind in EXPORTS:
            assert run.start(1, **self._export(kind, name)) == [0], run.log_tail
        else:
            run.finish(world)
        return self._server.cpu_s if kind in FORKED else children_s() - before_s

    def trial(self, kind: str, name: str, most: int = MOST_FAULTS) -> dict[str, Any]:
        """Return how many starts a run had, how many were killed and how many met other faults, the
        seconds that it took longer than a whole one, and how it differs from that at its end, which
        is None if it does not.

        Args:
            name: seeds the random numbers.
            most: faults of the run, which is deleted unless it differs.
        """
        self._draw, self._name = random.Random(name), name
        world = self._draw.choice((1, 2))
        world = {WORKER: 1, SERVER: 1, EXPORT: 1, UNIVERSAL: 1, HOST: 2}.get(kind, world)
        whole = self.whole(kind, world)
        run = whole.run if kind in EXPORTS else self._run(kind)
        done = {"kills": 0, "faults": 0, "starts": 1}
        began, difference = time.monotonic(), None
        try:
            for number in range(self._draw.randint(1, most)):
                # one that goes on from a checkpoint has less to do
                cpu_s = whole.cpu_s * (1.0 if number == 0 or kind in EXPORTS else 0.75)
                found = self._start(kind, run, world, cpu_s)
                done = {key: done[key] + found.get(key, 0) for key in done}
                if "kills" not in found and "faults" not in found:
                    break
            self._finish(kind, run, world, whole.run)
            if kind not in EXPORTS:
                shutil.rmtree(run.folder.parent)
        except (AssertionError, subprocess.TimeoutExpired):
            difference = f"{run.folder}\n{traceback.format_exc()[-3000:]}"
        lost_s = time.monotonic() - began - whole.wall_s
        return {**done, "lost_s": lost_s, "difference": difference}

    def _start(self, kind: str, run: Run, world: int, cpu_s: float) -> dict[str, int]:
        """Start a run that meets a fault; return the number of starts, and of kills or faults."""
        moment_s = self._draw.uniform(0.0, 0.25 * cpu_s if kind == PREPARING else cpu_s)
        if kind == LAUNCHER:
            return {"starts": 1, **self._start_launcher(run, world, moment_s)}
        if kind == HOST:
            # not before they have met: one that is alone waits for others for ten minutes
            return {"starts": 1, **self._start_hosts(run, (cpu_s + moment_s) / 4)}
        order = self._order(kind, run, world, moment_s)
        before, done = sizes(run.folder), steps(run)
        codes, hits = run.start(world, **order), self._server.hits
        if kind == POWER and KILLED in codes:
            drop_unsynced(run.folder, before, Path(order["environ"]["FAULT_SYNCED"]))
        if kind == SERVER:
            # before the first step of a start nothing is lost by an error
            assert codes == [0] or (codes == [2] and steps(run) == done), run.log_tail
        # the other rank may fail for want of the one that says it; the launcher then reports 2
        assert kind != FULL or 2 in codes or not any(codes), f"{codes}\n{run.log_tail}"
        if kind in (FULL, FAILING):
            return {"starts": 1, "faults": 1} if any(codes) else {"starts": 1}
        if not hits:
            assert not any(codes), f"it failed by itself: {codes}\n{run.log_tail}"
            return {"starts": 1}
        if order.get("children"):
            return {"starts": 1, "kills": hits}
        if kind == FROZEN:
            return {"starts": 1, "faults": 1}
        return {"starts": 1, "kills": 1} if KILLED in codes else {"starts": 1}

    def _order(self, kind: str, run: Run, world: int, moment_s: float) -> dict[str, Any]:
        """Return what becomes of the ranks of a start, as tests.runs.points.Order has it."""
        wait_s = self._draw.uniform(0.0, 3.0 if kind == HANGING else 0.1)
        order: dict[str, Any] = {"victims": list(range(world)), "after_s": wait_s}
        order["after_cpu_s"] = moment_s
        environ = {"FAULT_FOLDER": str(run.folder)}  # and its cache
        if kind == RANK:
            order["victims"] = [self._draw.randrange(world)]
        elif kind in (FULL, FAILING):
            order["victims"] = []
        elif kind in (WORKER, SERVER):
            victims = [0] * self._draw.randint(1, MOST_CHILDREN)
            order = {"children": True, "victims": victims, "after_s": self._draw.uniform(0.1, 2.0)}
        elif kind in EXPORTS:
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

    def _start_launcher(self, run: Run, world: int, moment_s: float) -> dict[str, int]:
        process = launch(run, world)
        if not has_computed(process, moment_s):
            assert process.returncode == 0, run.log_tail
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

    def _start_hosts(self, run: Run, moment_s: float) -> dict[str, int]:
        """Train on two hosts, one of which loses its launcher and all else there, or its link."""
        number, dies = self._draw.randrange(2), self._draw.random() < 0.5
        with self._hosts() as two:
            launchers = launch_hosts(two, run)
            struck = has_computed(launchers[number], moment_s)
            if struck and dies:
                launchers[number].kill()
            elif struck:
                two.cut(f"host{number}")
            codes, said = ended(launchers, 200)
        # it may have just been done
        assert struck or not any(codes), f"it failed by itself: {codes}\n{said}"
        assert all(codes) or not any(codes), f"{codes}\n{said}"
        return ({"kills": 1} if dies else {"faults": 1}) if any(codes) else {}

    def _finish(self, kind: str, run: Run, world: int, whole: Run) -> None:
        """Start once more, and compare.

        Raises:
            AssertionError: it does not end well, or differs.
        """
        if kind in EXPORTS:
            out = self._folder / f"export-{self._name}"
            if not out.exists():  # else its folder was published before the kill
                self._leave_alone(kind, run, world, self._name)
            assert contents(out) == contents(self._folder / f"export-{kind}")
            assert not list(self._folder.glob(f".{out.name}*")), "leftovers"
            shutil.rmtree(out)
            return
        self._leave_alone(kind, run, world, self._name)
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


def has_computed(process: subprocess.Popen[Any], cpu_s: float) -> bool:
    """Wait until a process with all that it has started has computed for so long; return False if
    it ends before."""
    while process.poll() is None:
        found = 0.0
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(process.pid)
            for each in (own, *own.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    found += sum(each.cpu_times()[:4])
        if found >= cpu_s:
            return True
        time.sleep(0.1)
    return False


def children_s() -> float:
    """Return the CPU seconds of this process's children that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def steps(run: Run) -> int:
    """Return the number of steps that the run has logged."""
    lines = read_json_lines(run.folder / "metrics.jsonl", skip_damaged=True)
    return sum("train/loss" in line for line in lines)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def campaign(
    server: ForkServer, kills: int, seed: int, out: Path, kinds: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Make trials of each kind in turn until so many starts were killed or met a fault; append them
    to `out`, after those of the same seed that it has."""
    out.parent.mkdir(exist_ok=True)
    trials = [each for each in read_json_lines(out) if each["seed"] == seed]
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=out.parent))
    made = Campaign(server, folder)
    made.whole(WORKER, 1)  # the first run is slower, and times of it would mislead
    while sum(each["kills"] + each["faults"] for each in trials) < kills:
        kind, number = kinds[len(trials) % len(kinds)], len(trials)
        found = made.trial(kind, f"{seed}-{number}")
        trials.append({"seed": seed, "number": number, "killed": kind, **found})
        with out.open("a") as file:
            file.write(json.dumps(trials[-1]) + "\n")
    if not any(each["difference"] for each in trials):
        shutil.rmtree(folder)
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
