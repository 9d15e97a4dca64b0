"""Show a person how far a run is, on rank 0 only: log lines, and a bar below them in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import cache
from typing import Any, TypeVar

from packhorse.trainer import dist

LINE_EVERY_S = 10.0  # between the lines of WorkProgress

Item = TypeVar("Item")


class Progress:
    """Progress and time to go over `steps` steps, of which `first` were done by earlier starts."""

    def __init__(self, steps: int, first: int) -> None:
        self._steps, self._first = steps, first
        self._started = time.monotonic()
        self._bar, self._task = _start_bar(steps, first, "steps")

    def step(self, done: int, line: dict[str, float] | None) -> None:
        """Show that `done` steps are applied.

        Args:
            line: the metrics of the last one, if they are to be logged.
        """
        if line is not None:
            per_step_s = (time.monotonic() - self._started) / (done - self._first)
            to_go = _clock(per_step_s * (self._steps - done))
            dist.log.info("step %d/%d  %s  %s to go", done, self._steps, _summarize(line), to_go)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class WorkProgress:
    """How much is done, how much a second, and the time to go, of work of which `done` was done
    before.

    Without a terminal, a line is logged every LINE_EVERY_S seconds.

    Args:
        what: the work, as "preparing data.train".
        total: of the `unit`s in all; None if that is not known.
    """

    def __init__(self, what: str, done: int, total: int | None, unit: str = "rows") -> None:
        self._what, self._unit, self._first, self._total = what, unit, done, total
        self._started = self._logged = time.monotonic()
        self._bar, self._task = _start_bar(total, done, what, transient=True)

    def show(self, done: int, more: str = "") -> None:
        """Show that so much is done.

        Args:
            more: is added to the line that is logged.
        """
        now = time.monotonic()
        new, spent_s = done - self._first, now - self._started
        rate = f"{new / spent_s:,.{0 if new > 10 * spent_s else 1}f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=rate)
        elif now - self._logged > LINE_EVERY_S:
            self._logged = now
            of, to_go = "", ""
            if self._total and new:
                seconds = max(spent_s / new * (self._total - done), 0)
                of, to_go = f" of {self._total:,}", f", {seconds:.0f} s to go"
            text = f"{self._what}: {done:,}{of} {self._unit}, {rate}"
            dist.log.info("%s%s%s", text, to_go, more)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def track(items: Iterable[Item], what: str, total: int | None, unit: str) -> Iterator[Item]:
    """Yield the items, `total` in number, and show with WorkProgress how many are done."""
    with closing(WorkProgress(what, 0, total, unit)) as progress:
        for done, item in enumerate(items, start=1):
            yield item
            progress.show(done)


def show_bars_of_transformers() -> None:
    """Let transformers show the weights that it loads and the files that it writes by `track`."""
    from transformers.utils import logging

    def show(make_bar: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
        what = str(options.get("desc"))
        if what not in ("Loading weights", "Writing model shards"):
            return make_bar(*args, **options)
        return track(args[0], what.lower(), len(args[0]), what.split()[-1])

    logging.set_tqdm_hook(show)


def _start_bar(
    total: int | None, done: int, label: str, *, transient: bool = False
) -> tuple[Any, Any]:
    """Start a bar on rank 0's terminal: (bar, task); (None, None) if there is none to show.

    What is written to sys.stderr meanwhile appears above it.

    Args:
        transient: the bar goes away when it ends.
    """
    if not (dist.is_main() and sys.stderr.isatty()):
        return None, None
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn(label),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=_console(),
        transient=transient,
    )
    bar.start()
    return bar, bar.add_task("", total=total, completed=done)


@cache
def _console() -> Any:
    # one for all: a bar that starts while another is shown appears below that one
    from rich.console import Console

    return Console(stderr=True)


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
