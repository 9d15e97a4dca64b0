"""Fit tables to the terminal: its width is used, and paths are shortened from the left.

Rich cuts a long text at its right end, where a path differs from its neighbours.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from packhorse.trainer.utils.text import show_controls

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement

_LEAST = 16  # characters that a column of paths keeps


def shorten_path(path: str, width: int) -> str:
    """Return a path in at most `width` characters: `…` stands for what is left out at the left.

    It is cut at a `/` where one is near, so that whole names remain.
    """
    if len(path) <= width:
        return path
    kept = path[len(path) - max(width - 1, 0) :] if width > 1 else ""
    slash = kept.find("/")
    return "…" + (kept[slash:] if 0 < slash <= len(kept) // 2 else kept)


def terminal_width() -> int:
    """Return the columns of the terminal, or of COLUMNS; 80 where there is neither."""
    return shutil.get_terminal_size().columns


def plain_cell(text: str) -> str:
    """Return a text of a file for a cell of a table: it marks nothing up there, nor does it control
    the terminal."""
    from rich.markup import escape

    return escape(show_controls(text))


class ShortPath:
    """A path in a table's cell, which rich shows in the width that the column comes to have."""

    def __init__(self, path: str) -> None:
        self._path = show_controls(path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text  # no markup: a path may hold brackets

        yield Text(shorten_path(self._path, options.max_width), no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        length = len(self._path)
        return Measurement(min(length, _LEAST), min(length, options.max_width))
