"""Tables fit the terminal, and a path keeps its right end."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from packhorse.trainer.utils.tables import ShortPath, shorten_path

PATH = "/data/projects/word-problems/train-00001.jsonl"


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (len(PATH), PATH),
        (40, "…/word-problems/train-00001.jsonl"),
        (30, "…/train-00001.jsonl"),
        (22, "…/train-00001.jsonl"),
        (12, "…00001.jsonl"),
        (1, "…"),
    ],
)
def test_a_path_is_shortened_from_the_left_to_whole_names_if_possible(width, shown):
    assert shorten_path(PATH, width) == shown
    assert len(shown) <= width


@pytest.mark.parametrize("width", [100, 50, 34])
def test_a_cell_shows_the_end_of_a_path_in_the_width_that_there_is(width):
    table = Table("source", "rows")
    table.add_row(ShortPath(PATH), "1,000")
    table.add_row(ShortPath("[/b]other.jsonl"), "1")
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert (PATH in shown) == (width == 100)
    assert "0001.jsonl " in shown
    assert "[/b]other.jsonl" in shown
    assert max(map(len, shown.splitlines())) <= width
