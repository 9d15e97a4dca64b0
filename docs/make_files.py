"""Write what `packhorse prepare` makes of real files, for several tokenizers, into docs/data.md.

    python docs/make_files.py [FOLDER]

FOLDER (by default ../shared) holds `data/*.jsonl` and `tokenizers/NAME`. Nothing is left in the
user's cache.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from packhorse.trainer.config.data import Source
from packhorse.trainer.config.recipe import parse_recipe
from packhorse.trainer.data.prepare import prepare
from packhorse.trainer.data.rows import RowReader
from packhorse.trainer.data.source import read_rows
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.load import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "data.md"
ROWS = 300  # of each file
FAMILIES = {
    "smollm2": "SmolLM2 (ChatML)",
    "qwen3": "Qwen 3",
    "llama3_2": "Llama 3.2",
    "mistral_nemo": "Mistral Nemo",
}
BEGIN, END = "<!-- files: docs/make_files.py -->\n", "<!-- files end -->\n"


def main() -> None:
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT.parent / "shared"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(folder)}\n{END}{after}", encoding="utf-8")


def table(folder: Path) -> str:
    """Return a Markdown table: a line for each file."""
    head = ["file", "format", "columns read", "not read, rows", *FAMILIES.values()]
    lines = [head, ["---"] * len(head)]
    with tempfile.TemporaryDirectory() as cache:
        for path in sorted((folder / "data").glob("*.jsonl")):
            reports = [
                prepared(path, folder / "tokenizers" / family, Path(cache)) for family in FAMILIES
            ]
            lines.append(line_of(path, reports))
            print(*lines[-1], sep=" | ", flush=True)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def prepared(path: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    """Return the report of preparing a file's first rows; of one that is refused, `refused`."""
    data = {"train": [{"path": str(path), "rows": ROWS}], "cache": str(cache), "workers": 1}
    recipe = parse_recipe(
        {
            "model": {"name": str(tokenizer)},
            "data": {**data, "max_rejects": 1.0},
            "batch": {"seq_len": 8192},
            "run": {"dir": str(cache / "run")},
        }
    )
    try:
        return prepare(recipe, load_tokenizer(recipe.model), "train").report
    except BadInput as error:
        return {"refused": str(error).partition(": ")[2].partition("; see ")[0]}


def line_of(path: Path, reports: list[dict[str, Any]]) -> list[str]:
    unread = {name: rows for report in reports for name, rows in report.get("unread", {}).items()}
    return [path.name, *columns(path, unread), *map(outcome, reports)]


def columns(path: Path, unread: dict[str, int]) -> list[str]:
    """Return the format, the columns that are read, and those that are not."""
    source = Source(path=str(path), rows=ROWS)
    names = dict.fromkeys(name for row in read_rows(source) for name in row.fields)
    read = ", ".join(f"`{name}`" for name in names if name not in unread)
    left = ", ".join(f"`{name}` ({rows})" for name, rows in unread.items())
    return [RowReader.of(source).format, read, left or "none"]


def outcome(report: dict[str, Any]) -> str:
    """Return how many rows are trained, and why others are not."""
    if "refused" in report:
        return report["refused"]
    kept = f"{report['rows'] - report['rejected']} of {report['rows']}"
    if report["apart"]:
        kept += f", {report['apart']} turn by turn"
    return "; ".join([kept, *(f"{why} ({count})" for why, count in report["reasons"].items())])


if __name__ == "__main__":
    main()
