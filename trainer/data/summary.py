"""Describe the data for people: numbers for data.json, tables for the terminal, data.png.

Prepared documents and their plan enter. Nothing here changes what is trained. matplotlib is
imported only when something is drawn, as that takes a second. It keeps a list of the machine's
fonts below HOME, or in a temporary folder where HOME cannot be written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.batch_plan import Plan
from packhorse.trainer.data.prepare import Prepared
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.files import replace_file, write_json
from packhorse.trainer.utils.plain_figures import plain_figures
from packhorse.trainer.utils.tables import ShortPath, plain_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

QUANTILES = {"min": 0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1}
LENGTH_BINS = 40
FILL_BINS = 50
PANEL_INCHES = (10.0, 3.3)
COUNT_COLOUR, SHARE_COLOUR = "#9db4cc", "#2e9e4f"


@dataclass(frozen=True)
class Histogram:
    """`counts` (b,) between `edges` (b + 1,); `shares` (b,), from 0 to 1, colours part of a bar."""

    title: str
    x_label: str
    edges: np.ndarray
    counts: np.ndarray
    shares: np.ndarray | None = None

    def as_json(self) -> dict[str, list[float]]:
        """Return the numbers, for data.json: edges to four digits, as no eye sees more."""
        return {
            "edges": [float(f"{edge:.4g}") for edge in self.edges],
            "counts": [int(count) for count in self.counts],
        }


def summary(prepared: Prepared, plan: Plan | None = None) -> dict[str, Any]:
    """Return the preparation's report with the lengths of documents, in tokens.

    With a plan, it also has the packing of the first epoch, the number of steps, and the histograms
    that `picture` draws.
    """
    found = {
        **prepared.report,
        "fingerprint": prepared.fingerprint,
        "document_tokens": _quantiles(prepared.documents.lengths),
        "document_trained_tokens": _quantiles(prepared.documents.trained_counts),
    }
    if plan is not None:
        tokens, pieces = plan.sequence_sizes()
        found["first_epoch"] = {
            "sequences": len(tokens),
            "sequence_tokens": _quantiles(tokens),
            "documents_per_sequence": round(float(pieces.mean()), 3),
            "fill": round(plan.fill(), 5),
            "steps": plan.epoch_steps(),
        }
        found["steps"] = plan.steps
        drawn = zip(("document_tokens", "sequence_fill"), histograms(prepared, plan), strict=True)
        found["histograms"] = {name: histogram.as_json() for name, histogram in drawn}
    return found


def write(folder: Path, train: Prepared, plan: Plan, held_out: Prepared | None) -> None:
    """Write data.json (see `summary`) and data.png (see `picture`) into `folder`."""
    found = {"train": summary(train, plan), **of_eval(held_out)}
    write_json(folder / "data.json", found)
    with replace_file(folder / "data.png", "wb") as file, plain_figures():
        picture(train, plan).savefig(file, format="png")


def require_own(folder: Path) -> None:
    """Check that `write` would replace nothing in `folder` but what an earlier `write` left there.

    Raises:
        BadInput: another data.json or data.png is there.
    """
    numbers, drawn = folder / "data.json", folder / "data.png"
    try:
        found = json.loads(numbers.read_text(encoding="utf-8"))
        is_own = "fingerprint" in found["train"]
    except (OSError, ValueError, LookupError, TypeError):
        is_own = False
    there = next((path for path in (numbers, drawn) if path.exists()), None)
    if there is not None and not is_own:
        raise BadInput(
            f"{there}: exists, and packhorse did not write it; give another folder, or move it away"
        )


def of_eval(held_out: Prepared | None) -> dict[str, Any]:
    """Return the held-out part of data.json; an empty one if there is no held-out data."""
    return {"eval": summary(held_out)} if held_out else {}


def histograms(prepared: Prepared, plan: Plan) -> tuple[Histogram, Histogram]:
    """Count the lengths of the train documents, and how full the first epoch's sequences are."""
    lengths, seq_len = prepared.documents.lengths, plan.batch.seq_len
    tokens, _ = plan.sequence_sizes()
    edges = np.linspace(0, lengths.max() + 1, min(LENGTH_BINS, int(lengths.max()) + 1) + 1)
    counts, in_bin, trained = (
        np.histogram(lengths, edges, weights=weights)[0]
        for weights in (None, lengths, prepared.documents.trained_counts)
    )
    report = prepared.report
    share = report["trained_tokens"] / report["tokens"]
    fill = np.linspace(0, 100, FILL_BINS + 1)
    return (
        Histogram(
            title=f"{report['documents']:,} documents, {report['tokens']:,} tokens, "
            f"{share:.1%} of them trained (green)",
            x_label="tokens of a document",
            edges=edges,
            counts=counts,
            shares=trained / np.maximum(in_bin, 1),
        ),
        Histogram(
            title=f"{len(tokens):,} packed sequences of up to {seq_len:,} tokens in the first "
            f"epoch, {plan.fill():.1%} filled",
            x_label="filled, % of a sequence",
            edges=fill,
            counts=np.histogram(100 * tokens / seq_len, fill)[0],
        ),
    )


def picture(prepared: Prepared, plan: Plan) -> Figure:
    """Draw the lengths of the train documents and the fill of the first epoch's sequences."""
    return draw(histograms(prepared, plan))


def draw(histograms: Sequence[Histogram]) -> Figure:
    """Draw each histogram in a panel of its own, the first on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    width, height = PANEL_INCHES
    figure = Figure(figsize=(width, height * len(histograms)), layout="constrained")
    # The Agg canvas needs no display. pyplot would look for one, and keep the figure in memory.
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(histograms), squeeze=False)[:, 0]
    for axes, histogram in zip(panels, histograms, strict=True):
        left, widths = histogram.edges[:-1], np.diff(histogram.edges)
        axes.bar(left, histogram.counts, widths, align="edge", color=COUNT_COLOUR)
        if histogram.shares is not None:
            trained = histogram.counts * histogram.shares
            axes.bar(left, trained, widths, align="edge", color=SHARE_COLOUR)
        axes.set_title(histogram.title, loc="left")
        axes.set_xlabel(histogram.x_label)
        axes.set_xlim(0, histogram.edges[-1])
        axes.set_ylim(0, max(1.05 * float(histogram.counts.max()), 1))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


# ------------------------------------------------------------------------------------------ tables


def tables(recipe: Recipe, train: Prepared, plan: Plan, held_out: Prepared | None) -> list[Table]:
    """Build the tables that `packhorse prepare` shows."""
    shown = [_rows_table("train", train)]
    if held_out:
        shown.append(_rows_table("eval", held_out))
    return [*shown, _lengths_table(train, held_out), _plan_table(recipe, summary(train, plan))]


def show(recipe: Recipe, train: Prepared, plan: Plan, held_out: Prepared | None) -> None:
    """Print the tables of `packhorse prepare`, and where the near-duplicates are listed."""
    from rich.console import Console

    Console().print(*tables(recipe, train, plan, held_out))
    leakage = held_out.leakage if held_out else None
    for kind, found in {"rows": leakage, "prompts": leakage["prompts"]}.items() if leakage else ():
        if found["pairs"]:
            print(f"all pairs of {kind} that are alike: {found['path']}")  # whole, to be copied


def _rows_table(title: str, prepared: Prepared) -> Table:
    """Count rows and tokens, and the rows left out, for each source if there are several."""

    names = ("rows", "rejected", "filtered", "documents", "tokens")
    table = _table("", *names, "trained", title=title)
    report = prepared.report
    sources = report["sources"] if len(report["sources"]) > 1 else []
    for part in [*sources, {"name": "all", **report}]:
        counts = (f"{part[key]:,}" for key in names)
        share = part["trained_tokens"] / max(part["tokens"], 1)
        table.add_row(ShortPath(part["name"]), *counts, f"{share:.1%}")
        for reason, count in part["reasons"].items():
            table.add_row(plain_cell(f"  rejected: {reason}"), "", f"{count:,}")
        if part["longest_reject"]:
            table.add_row(f"  longest reject: {part['longest_reject']:,} tokens")
        for reason, count in part["filter_reasons"].items():
            table.add_row(plain_cell(f"  filtered: {reason}"), "", "", f"{count:,}")
        for name, count in part["unread"].items():
            table.add_row(plain_cell(f"  not read: {name}"), f"{count:,}")
        if part["cut"]:
            lost = f"  cut, less {part['lost_trained_tokens']:,} trained tokens"
            table.add_row(lost, f"{part['cut']:,}")
        if part["apart"]:
            apart = f"  a document an answer, {part['repeated_tokens']:,} tokens repeated"
            table.add_row(apart, f"{part['apart']:,}")
        if part["duplicates"]:
            table.add_row("  duplicates", f"{part['duplicates']:,}")
        if part.get("leaked"):  # where data.max_leakage: drop has left rows out
            table.add_row("  leaked, left out", f"{part['leaked']:,}")
    if "leakage" in report:
        rows, prompts = report["leakage"], report["leakage"]["prompts"]
        table.add_row("near-duplicates in train", f"{rows['leaked_rows']:,}")
        table.add_row("prompts that train has", f"{prompts['exact_rows']:,}")
        near = prompts["leaked_rows"] - prompts["exact_rows"]
        table.add_row("prompts similar to one there", f"{near:,}")
    return table


def _lengths_table(train: Prepared, held_out: Prepared | None) -> Table:
    table = _table("tokens of a document", *QUANTILES, title="lengths")
    for name, prepared in {"train": train, "eval": held_out}.items():
        if prepared is not None:
            for label, values in (
                (name, prepared.documents.lengths),
                ("  trained", prepared.documents.trained_counts),
            ):
                table.add_row(label, *(f"{value:,.0f}" for value in _quantiles(values).values()))
    return table


def _plan_table(recipe: Recipe, found: dict[str, Any]) -> Table:
    epoch = found["first_epoch"]
    cells = {
        "packing": recipe.data.packing,
        "sequences": f"{epoch['sequences']:,}",
        "sequence length": f"{recipe.batch.seq_len:,}",
        "filled": f"{epoch['fill']:.1%}",
        "documents a sequence": f"{epoch['documents_per_sequence']:.1f}",
        "steps": f"{epoch['steps']:,}",
        "steps of the run": f"{found['steps']:,}",
    }
    table = _table(*cells, title="first epoch")
    table.add_row(*cells.values())
    return table


def _table(*columns: str, title: str) -> Table:
    from rich.table import Table

    table = Table(*columns, title=title)
    for column in table.columns:
        column.overflow = "fold"  # of a number no digit may go
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """Return quantiles of `values` (n,), each one of the values."""
    found = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return dict(zip(QUANTILES, map(int, found), strict=True))
