"""End a run that hangs, and name the rank that holds it up.

In: beats, wherever work moves on. Out, when none comes for far longer than usual: the stacks of
every rank in logs/hang-.../ of the run folder, a sentence that names the slowest rank, and exit
code 1.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections import deque
from pathlib import Path

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import GuardSection
from packhorse.trainer.datatypes import FAILED

_POLL_S = 1.0
_USUAL_BEATS = 64  # the longest of so many intervals is the usual one
_USUAL_FACTOR = 10  # a silence this many times the usual interval is a hang
_REPORTS_S = 5.0  # for the other ranks' reports to appear


class Watch:
    """A thread that waits for beats until the block ends. Every rank builds it, inside the process
    group.

    The thread needs Python's global lock. A rank that hangs while it holds that lock writes no
    report, and the others name it as one that is stopped or whose machine is gone.
    """

    def __init__(self, section: GuardSection, run_dir: Path) -> None:
        self._section = section
        # one folder for all ranks: its appearance also tells them that one of them saw a hang
        stamp = dist.broadcast(time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
        self._folder = run_dir / "logs" / f"hang-{stamp}"
        self._count = 0
        self._trail: deque[str] = deque(maxlen=3)
        self._intervals: deque[float] = deque(maxlen=_USUAL_BEATS)
        self._beat_at: float | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._wait, name="hang-watch", daemon=True).start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def beat(self, where: str) -> None:
        """Record that work has moved on to `where`, and expect the next beat.

        All ranks beat at the same places, so that their counts show who is behind.
        """
        now = time.monotonic()
        if self._beat_at is not None:
            self._intervals.append(now - self._beat_at)
        self._count += 1
        self._trail.append(where)
        self._beat_at = now

    def pause(self) -> None:
        """Expect no beat until the next one has come: what follows may take any time."""
        self._beat_at = None

    def _limit_s(self) -> float:
        # a copy, as the main thread appends meanwhile
        usual_s = max(self._intervals.copy(), default=0.0)
        return max(_USUAL_FACTOR * usual_s, self._section.hang_timeout_s)

    def _wait(self) -> None:
        while not self._ended.wait(_POLL_S):
            beat_at = self._beat_at
            late = beat_at is not None and time.monotonic() - beat_at > self._limit_s()
            if late or os.path.exists(self._folder):  # the folder: another rank was first
                self._end()

    def _end(self) -> None:
        """Report, wait for the other ranks' reports, log what they show, and end the process."""
        try:
            limit_s = self._limit_s()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"rank{dist.rank():05d}.txt"
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{self._count} {' > '.join(self._trail)}\n")
                file.flush()  # faulthandler writes to the descriptor, past Python's buffer
                faulthandler.dump_traceback(file, all_threads=True)
            # The launcher ends all ranks when the first one ends: rank 0 goes first, as its log
            # line is the one that a user sees.
            time.sleep(_REPORTS_S if dist.is_main() else 1.2 * _REPORTS_S)
            dist.log.error(
                "hang: nothing moved for %.0f s; %s; stacks are in %s",
                limit_s,
                name_slowest(self._folder, dist.world_size()),
                self._folder,
            )
        finally:
            # not sys.exit: the main thread hangs, often in C code; also if the disk takes no report
            os._exit(FAILED)


def name_slowest(folder: Path, world_size: int) -> str:
    """Return a phrase that names the ranks which hold the others up, by the ranks' reports."""
    reports = {
        int(path.stem.removeprefix("rank")): text.split("\n")[0]
        for path in folder.glob("rank*")
        if (text := path.read_text())  # a rank that is stopped may have opened its file only
    }
    missing = sorted(set(range(world_size)) - set(reports))
    if missing:
        return f"no report from {_name_ranks(missing)}: stopped, or the machine is gone"
    counts = {rank: int(first.split()[0]) for rank, first in reports.items()}
    behind = [rank for rank in sorted(counts) if counts[rank] == min(counts.values())]
    where = reports[behind[0]].partition(" ")[2]
    if len(behind) == world_size:
        return f"all ranks are at {where}"
    return f"held up by {_name_ranks(behind)}, at {where}"


def _name_ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
