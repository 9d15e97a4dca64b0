"""Show a person how far a run is: a bar in a terminal, plain lines elsewhere; on rank 0 only."""

from __future__ import annotations

import sys
import time
from typing import Any

from trainer import dist


class Progress:
    """Progress and time to go over `steps` steps, of which `first` were done by earlier starts."""

    def __init__(self, steps: int, first: int) -> None:
        self._steps, self._first = steps, first
        self._started = time.monotonic()
        self._bar: Any = None
        if dist.is_main() and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.description}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, completed=first)

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
