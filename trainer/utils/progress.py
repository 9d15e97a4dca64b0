"""Show a person how far a run is: a bar in a terminal, plain lines elsewhere; on rank 0 only."""

from __future__ import annotations

import sys
import time
from typing import Any

from packhorse.trainer import dist

LINE_EVERY_S = 10.0  # between the lines of RowProgress


class Progress:
    """Progress and time to go over `steps` steps, of which `first` were done by earlier starts."""

    def __init__(self, steps: int, first: int) -> None:
        self._steps, self._first = steps, first
        self._started = time.monotonic()
        self._bar, self._task = _start_bar(steps, first)

    def step(self, done: int, line: dict[str, float] | None) -> None:
        """Show that `done` steps are applied.

        Args:
            line: the metrics of the last one, if they were logged.
        """
        if self._bar is not None:
            description = {"description": _summarize(line)} if line else {}
            self._bar.update(self._task, completed=done, **description)
        elif line is not None:
            per_step_s = (time.monotonic() - self._started) / (done - self._first)
            to_go = _clock(per_step_s * (self._steps - done))
            dist.log.info("step %d/%d  %s  %s to go", done, self._steps, _summarize(line), to_go)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class RowProgress:
    """Rows done, rows per second and time to go, over rows of which `rows` were done before.

    Without a terminal, a line is logged every LINE_EVERY_S seconds.
    """

    def __init__(self, what: str, rows: int, total: int | None) -> None:
        self._what, self._first, self._total = what, rows, total
        self._started = self._logged = time.monotonic()
        self._bar, self._task = _start_bar(total, rows, label=what)

    def show(self, rows: int, more: str = "") -> None:
        now = time.monotonic()
        rate = f"{(rows - self._first) / (now - self._started):,.0f} rows/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=rows, description=rate)
        elif now - self._logged > LINE_EVERY_S:
            self._logged = now
            of, to_go = "", ""
            if self._total:
                seconds = (now - self._started) / (rows - self._first) * (self._total - rows)
                of, to_go = f" of {self._total:,}", f", {max(seconds, 0):.0f} s to go"
            dist.log.info("%s: %s%s rows%s, %s%s", self._what, f"{rows:,}", of, more, rate, to_go)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _start_bar(total: int | None, done: int, label: str = "") -> tuple[Any, Any]:
    """Start a bar on rank 0's terminal: (bar, task); (None, None) if there is none to show.

    A bar with a label shows no elapsed time, and goes away when it ends.
    """
    if not (dist.is_main() and sys.stderr.isatty()):
        return None, None
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        *([progress.TextColumn(label)] if label else []),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}"),
        *([] if label else [progress.TimeElapsedColumn()]),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=bool(label),
    )
    bar.start()
    return bar, bar.add_task("", total=total, completed=done)


def _summarize(line: dict[str, float]) -> str:
    mfu = f"  mfu {line['perf/mfu']:.1%}" if "perf/mfu" in line else ""
    return (
        f"loss {line['train/loss']:.4f}  norm {line['train/grad_norm']:.2f}  "
        f"lr {line['train/lr']:.2e}  {line['perf/tokens_per_s']:,.0f} tokens/s{mfu}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
