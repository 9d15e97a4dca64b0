"""Ends a run that hangs, and says which rank holds it up.

In: beats, where work moves on. Out, when none comes for far longer than usual: the stacks of every
    rank in
`logs/hang-.../` of the run folder, one sentence that names the slowest rank, and exit code 1.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections import deque
from pathlib import Path

from trainer import dist
from trainer.config.recipe import GuardSection
from trainer.datatypes import FAILED

_POLL_S = 1.0
_USUAL_BEATS = 64  # the longest of so many intervals is what is usual
_USUAL_FACTOR = 10  # a silence this many times the usual interval is a hang
_REPORTS_S = 5.0  # for the other ranks' reports to appear


class Watch:
    """A thread that waits for beats. Every rank builds it, inside the process group.

    It needs Python's global lock: a rank that hangs while it holds that is named by the others, as
    one that is stopped or whose machine is gone.
    """

    def __init__(self, section: GuardSection, run_dir: Path) -> None:
        self._section = section
        stamp = dist.broadcast(time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
        self._folder = run_dir / "logs" / f"hang-{stamp}"
        self._count = 0
        self._trail: deque[str] = deque(maxlen=3)
        self._intervals: deque[float] = deque(maxlen=_USUAL_BEATS)
        self._beat_at: float | None = None
        threading.Thread(target=self._wait, name="hang-watch", daemon=True).start()

    def beat(self, where: str) -> None:
        """Work has moved on, and the next beat is due. All ranks beat alike: the counts tell who is
        behind.
        """
        now = time.monotonic()
        if self._beat_at is not None:
            self._intervals.append(now - self._beat_at)
        self._count += 1
        self._trail.append(where)
        self._beat_at = now

    def pause(self) -> None:
        """What follows may take as long as it likes, up to the next beat."""
        self._beat_at = None

    def _limit_s(self) -> float:
        usual_s = max(self._intervals.copy(), default=0.0)
        return max(_USUAL_FACTOR * usual_s, self._section.hang_timeout_s)

    def _wait(self) -> None:
        while True:
            time.sleep(_POLL_S)
            beat_at = self._beat_at
            late = beat_at is not None and time.monotonic() - beat_at > self._limit_s()
            if late or os.path.exists(self._folder):  # the folder: another rank was first
                self._end()

    def _end(self) -> None:
        """Report, wait for the other reports, say what they show, and end the process."""
        try:
            limit_s = self._limit_s()
            self._report()
            time.sleep(
                _REPORTS_S if dist.is_main() else 1.2 * _REPORTS_S
            )  # the first to end takes the others down
            held_up_by = slowest(self._folder, dist.world_size())
            dist.log.error(
                "hang: nothing moved for %.0f s; %s; stacks are in %s",
                limit_s,
                held_up_by,
                self._folder,
            )
        finally:
            os._exit(FAILED)  # also where the disk takes no report

    def _report(self) -> None:
        """This rank's place and the stacks of its threads."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank{dist.rank():05d}.txt").open("w", encoding="utf-8") as file:
            file.write(f"{self._count} {' > '.join(self._trail)}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def slowest(folder: Path, world_size: int) -> str:
    """Which rank holds the others up, by their reports."""
    reports = {
        int(path.stem.removeprefix("rank")): path.read_text().split("\n")[0]
        for path in folder.glob("rank*")
    }
    missing = sorted(set(range(world_size)) - set(reports))
    if missing:
        return f"no report from {_ranks(missing)}: stopped, or the machine is gone"
    counts = {rank: int(first.split()[0]) for rank, first in reports.items()}
    behind = [rank for rank in sorted(counts) if counts[rank] == min(counts.values())]
    where = reports[behind[0]].partition(" ")[2]
    if len(behind) == world_size:
        return f"all ranks are at {where}"
    return f"held up by {_ranks(behind)}, at {where}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
