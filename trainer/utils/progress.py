"""What a person sees while a run goes: a bar in a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import sys
import time
from typing import Any

from trainer import dist


class Progress:
    """Progress with time to go, over `steps` steps of which `first` are done already."""

    def __init__(self, steps: int, first: int) -> None:
        self._steps, self._first = steps, first
        self._started = time.monotonic()
        self._bar: Any = None
        if dist.is_main() and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, *times, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, completed=first)

    def step(self, done: int, line: dict[str, float] | None) -> None:
        """Show that `done` steps are applied; `line` is what was logged of the last one, if it was."""
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, **({"description": _short(line)} if line else {})
            )
        elif line is not None:
            seconds_left = (
                (time.monotonic() - self._started) / (done - self._first) * (self._steps - done)
            )
            dist.log.info(
                "step %d/%d  %s  %s to go", done, self._steps, _short(line), _clock(seconds_left)
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _short(line: dict[str, float]) -> str:
    mfu = f"  mfu {line['perf/mfu']:.1%}" if "perf/mfu" in line else ""
    return (
        f"loss {line['train/loss']:.4f}  norm {line['train/grad_norm']:.2f}  lr "
        f"{line['train/lr']:.2e}  "
        f"{line['perf/tokens_per_s']:,.0f} tokens/s{mfu}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
