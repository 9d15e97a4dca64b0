"""Define `packhorse runs` and `packhorse report`: look at run folders, finished or not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.text import show_controls

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from packhorse.trainer.report.runs import Run

_STYLES = {"running": "cyan", "stopped": "yellow", "done": "green", "failed": "red"}
_COLUMNS = ("run", "state", "step", "loss", "eval loss", "tokens/s", "last change")
# Those that may take more than one line. A terminal for less than these loses columns at the right.
_LEAST_WIDTH = {"run": 8, "loss": 7, "eval loss": 7, "last change": 6}
_NAMED = 5  # foreign folders that are named one by one


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to look for runs, at any depth.")
    ] = Path("runs"),
) -> None:
    """List the runs below a folder, with their states, losses and speeds.

    [bold]packhorse runs runs[/bold]
    [bold]packhorse runs /shared/experiments[/bold]

    A run is running, stopped (on request, and saved), done, or failed (its process has ended
    otherwise). Losses are the first and the last that were logged.
    """
    from rich.console import Console

    from packhorse.trainer.report.runs import find_folders, read_run

    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder; give the folder that the runs lie in")
    found, faults = [], []
    folders, foreign = find_folders(folder)
    for place in folders:
        try:
            found.append(read_run(place))
        except BadInput as error:
            faults.append(" ".join(str(error).split()))
    console = Console(highlight=False)
    lines = []
    if found:
        _print_table([_cells(run, folder) for run in found], console)
    elif not faults:
        lines.append(f"no runs in {folder}")
    lines += faults
    if foreign:
        names = ", ".join(path.name for path in foreign[:_NAMED])
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        lines.append(f"no runs below: {names}{more}")
    for line in lines:  # whose folders may be other people's, with any name
        console.print(show_controls(line), soft_wrap=True, markup=False)


def _print_table(rows: list[dict[str, Text]], console: Console) -> None:
    """Print the columns that fit, and name the others.

    In a narrow terminal names, pairs of losses and times take more lines; nothing is cut off.
    """
    from rich import box
    from rich.table import Table

    def least(name: str) -> int:
        cells = (row[name].cell_len for row in rows)
        return _LEAST_WIDTH.get(name) or max(len(name), *cells)

    columns = list(_COLUMNS)
    while len(columns) > 2 and sum(least(name) + 2 for name in columns) > console.width:
        columns.pop()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in ("run", "state", "last change") else "right",
            overflow="fold",
            no_wrap=name not in _LEAST_WIDTH,
            min_width=least(name),
        )
    for row in rows:
        table.add_row(*[row[name] for name in columns])
    console.print(table)
    if left_out := _COLUMNS[len(columns) :]:
        console.print(f"left out: {', '.join(left_out)}; they need a wider terminal")


def _cells(run: Run, root: Path) -> dict[str, Text]:
    """Return what the table says of a run, by column. Its name is its path below `root`."""
    from rich.text import Text

    speed = run.tokens_per_s
    cells = {
        "run": str(run.folder.relative_to(root) if run.folder != root else run.folder),
        "state": run.state,
        "step": f"{run.step}/{run.steps or '?'}",
        "loss": _first_and_last([value for _, value in run.values("train/loss")]),
        "eval loss": _first_and_last([line["eval_loss"] for line in run.evaluations.values()]),
        "tokens/s": "" if speed is None else f"{speed:,.0f}",
        "last change": time.strftime("%m-%d %H:%M", time.localtime(run.changed_at)),
    }
    styles = {"state": _STYLES[run.state]}
    return {name: Text(show_controls(cells[name]), styles.get(name, "")) for name in cells}


def _first_and_last(values: list[float]) -> str:
    ends = [values[0], values[-1]] if len(values) > 1 else values
    return " → ".join(f"{value:.3f}" for value in ends)


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run folders.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("report.html"),
) -> None:
    """Write a page that shows runs side by side: curves, scores, data, answers, recipes.

    [bold]packhorse report runs/quickstart[/bold]
    [bold]packhorse report runs/a runs/b --out a-and-b.html[/bold]

    The page is one file, which loads nothing and runs no script. An earlier report at --out is
    replaced, and no other file.
    """
    from packhorse.trainer.report.page import make_page
    from packhorse.trainer.report.runs import read_run
    from packhorse.trainer.utils.own_output import write_own_text

    places = {folder.resolve(): folder for folder in folders}
    if len(places) < len(folders):
        raise BadInput("a run folder is given twice; name each run once")
    page = make_page([read_run(folder) for folder in folders])
    write_own_text(out, page, "<!-- {} -->", "give another --out, or move it away")
    print(out)
