"""What the data holds, for people: numbers for data.json, tables for the terminal, a picture.

Prepared documents and the plan made of them enter. Nothing here changes what is trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.recipe import Recipe
from trainer.data.batch_plan import Plan
from trainer.data.picture import Panel, draw
from trainer.data.prepare import Prepared
from trainer.utils.files import write_synced

if TYPE_CHECKING:
    from rich.table import Table

QUANTILES = {
    "min": 0.0,
    "p5": 0.05,
    "p25": 0.25,
    "median": 0.5,
    "p75": 0.75,
    "p95": 0.95,
    "max": 1.0,
}
LENGTH_BINS = 40
FILL_BINS = 50


def summary(prepared: Prepared, plan: Plan | None = None) -> dict[str, Any]:
    """The report of the preparation, with the documents' lengths; and, where the plan is given, its
    first epoch.
    """
    found = {
        **prepared.report,
        "fingerprint": prepared.fingerprint,
        "document_tokens": _quantiles(prepared.lengths),
        "document_trained_tokens": _quantiles(prepared.trained_counts),
    }
    if plan is not None:
        tokens, pieces = plan.sequence_sizes()
        found["first_epoch"] = {
            "rows": len(tokens),
            "seq_len": _quantiles(tokens),
            "documents_per_row": round(float(pieces.mean()), 3),
            "fill": round(plan.fill(), 5),
            "steps": plan.epoch_steps(),
        }
        found["steps"] = plan.steps
    return found


def write(folder: Path, train: Prepared, plan: Plan, held_out: Prepared | None) -> None:
    """data.json, and data.png: the documents' lengths with their trained share, and the rows' fill."""
    found = {"train": summary(train, plan), **of_eval(held_out)}
    write_synced(folder / "data.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    picture(train, plan).save(folder / "data.png", optimize=True)


def of_eval(held_out: Prepared | None) -> dict[str, Any]:
    """The held-out part of data.json."""
    return {"eval": summary(held_out)} if held_out else {}


def picture(prepared: Prepared, plan: Plan) -> Any:
    """A PIL image of the train documents and of the rows of the first epoch."""
    lengths, tokens, seq_len = prepared.lengths, plan.sequence_sizes()[0], plan.batch.seq_len
    edges = np.linspace(0, lengths.max() + 1, min(LENGTH_BINS, int(lengths.max()) + 1) + 1)
    counts, in_bin, trained = (
        np.histogram(lengths, edges, weights=weights)[0]
        for weights in (None, lengths, prepared.trained_counts)
    )
    report = prepared.report
    share = report["trained_tokens"] / report["tokens"]
    documents = Panel(
        title=f"{report['documents']:,} documents, {report['tokens']:,} tokens, {share:.1%} of "
        f"them trained (green)",
        label="tokens of a document",
        edges=edges,
        counts=counts,
        shares=trained / np.maximum(in_bin, 1),
    )
    fill = np.linspace(0, 100, FILL_BINS + 1)
    rows = Panel(
        title=f"{len(tokens):,} rows of {seq_len:,} tokens in the first epoch, {plan.fill():.1%} "
        f"filled",
        label="filled, % of a row",
        edges=fill,
        counts=np.histogram(100 * tokens / seq_len, fill)[0],
    )
    return draw([documents, rows])


def tables(recipe: Recipe, train: Prepared, plan: Plan, held_out: Prepared | None) -> list[Table]:
    """What `packhorse prepare` shows."""
    shown = [_rows_table("train", train)]
    if held_out:
        shown.append(_rows_table("eval", held_out))
    return [*shown, _lengths_table(train, held_out), _plan_table(recipe, summary(train, plan))]


def _rows_table(title: str, prepared: Prepared) -> Table:
    """Rows and tokens, and what became of the rows, source by source where there are several."""
    names = ("rows", "rejected", "filtered", "documents", "tokens")
    table = _table("", *names, "trained", title=title)
    report = prepared.report
    for part in [
        *(report["sources"] if len(report["sources"]) > 1 else []),
        {"name": "all", **report},
    ]:
        counts = (f"{part[key]:,}" for key in names)
        table.add_row(
            part["name"], *counts, f"{part['trained_tokens'] / max(part['tokens'], 1):.1%}"
        )
        for reason, count in part["reasons"].items():
            table.add_row(f"  rejected: {reason}", "", f"{count:,}")
        for reason, count in part["filter_reasons"].items():
            table.add_row(f"  filtered: {reason}", "", "", f"{count:,}")
        if part["cut"]:
            table.add_row(
                f"  cut, less {part['lost_trained_tokens']:,} trained tokens", f"{part['cut']:,}"
            )
        if part["duplicates"]:
            table.add_row("  duplicates", f"{part['duplicates']:,}")
    if "leakage" in report:
        leakage = report["leakage"]
        table.add_row("near-duplicates in train", f"{leakage['leaked_rows']:,}")
        table.caption = f"all pairs: {leakage['path']}" if leakage["pairs"] else None
    return table


def _lengths_table(train: Prepared, held_out: Prepared | None) -> Table:
    table = _table("tokens of a document", *QUANTILES, title="lengths")
    for name, prepared in {"train": train, "eval": held_out}.items():
        if prepared is not None:
            table.add_row(
                name, *(f"{value:,.0f}" for value in _quantiles(prepared.lengths).values())
            )
            table.add_row(
                "  trained",
                *(f"{value:,.0f}" for value in _quantiles(prepared.trained_counts).values()),
            )
    return table


def _plan_table(recipe: Recipe, found: dict[str, Any]) -> Table:
    epoch = found["first_epoch"]
    table = _table(
        "packing",
        "rows",
        "tokens of a row",
        "filled",
        "documents",
        "steps",
        "in all",
        title="first epoch",
    )
    table.add_row(
        recipe.data.packing,
        f"{epoch['rows']:,}",
        f"{recipe.batch.seq_len:,}",
        f"{epoch['fill']:.1%}",
        f"{epoch['documents_per_row']:.1f} a row",
        f"{epoch['steps']:,}",
        f"{found['steps']:,}",
    )
    return table


def _table(*columns: str, title: str) -> Table:
    from rich.table import Table

    table = Table(*columns, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """Quantiles of `values` (n,), each one of the values."""
    found = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return dict(zip(QUANTILES, map(int, found), strict=True))
