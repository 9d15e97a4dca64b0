"""Write the table of longest sequences in docs/long_context.md, as `packhorse plan` computes them.

python docs/make_long_context.py
"""

from __future__ import annotations

import json
import runpy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.estimate.memory import (
    GIB,
    Cluster,
    attention_share,
    full_step_stats,
    step_seconds,
)
from packhorse.trainer.estimate.report import Report, build_report

DOCS = Path(__file__).parent
PAGE = DOCS / "long_context.md"
BEGIN, END = "<!-- docs/make_long_context.py -->\n", "<!-- end -->\n"
FLOPS, MFU = 989e12, 0.4
LORA = {"rank": 64, "alpha": 128}


class Row(NamedTuple):
    """A line of the table. `sequence` GPUs share each sequence."""

    model: str
    gpus: int
    gpu_gib: int
    sequence: int
    template: str
    checkpointing: str
    host_gib: int | None = None
    adapter: bool = False


FULL = (
    ("8B", 8, 80, 8),
    ("8B", 8, 141, 8),
    ("8B", 32, 80, 8),
    ("8B", 32, 80, 32),
    ("70B", 64, 80, 8),
    ("70B", 64, 80, 64),
)
ROWS = (
    *(
        Row("8B", 1, 141, 1, "zero3_nvme", mode, host)
        for mode, host in (("full", 128), ("offload", 128))
    ),
    Row("8B", 1, 141, 1, "zero3_offload_all", "full", 1900),
    Row("8B", 1, 141, 1, "zero3_offload_all", "offload", 1900),
    *(
        Row("8B", 1, 141, 1, "zero3", mode, host, adapter=True)
        for mode, host in (("full", 128), ("offload", 128), ("offload", 1900))
    ),
    *(Row(*one, "zero3", mode) for one in FULL for mode in ("full", "offload")),
)


def table(rows: Sequence[Row] = ROWS) -> str:
    head = (
        "| model | GPUs | share a sequence | template, recomputation | longest | minutes a step |"
    )
    lines = [head, "|---|---|---:|---|---:|---:|"]
    shapes = runpy.run_path(str(DOCS / "make_scale.py"))
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            config = {**shapes["COMMON"], **shapes["SHAPES"][row.model]}
            (Path(folder) / "config.json").write_text(json.dumps(config))
            lines.append(_line(row, Path(folder)))
    return "\n".join(lines) + "\n"


def _line(row: Row, folder: Path) -> str:
    report = _plan(row, folder, 8192 * row.sequence)
    longest = report.candidates[row.template].longest
    host = "" if row.host_gib is None else f", host of {row.host_gib:,} GiB"
    what = f"{row.model}, LoRA" if row.adapter else row.model
    cells = [what, f"{row.gpus} x {row.gpu_gib} GiB{host}", str(row.sequence)]
    cells += [f"`{row.template}`, `{row.checkpointing}`"]
    if not longest:
        return f"| {' | '.join([*cells, 'does not fit', ''])} |"
    stats = full_step_stats(_recipe(row, folder, longest))
    seconds = step_seconds(report.model, stats, row.gpus, FLOPS * MFU)
    share = attention_share(report.model, stats)
    cells += [f"{longest:,}", f"{seconds / 60:,.1f}, {share:.0%} attention"]
    return f"| {' | '.join(cells)} |"


def _plan(row: Row, folder: Path, seq_len: int) -> Report:
    host = None if row.host_gib is None else row.host_gib * GIB
    cluster = Cluster(row.gpus, 8, row.gpu_gib * GIB, host)
    return build_report(_recipe(row, folder, seq_len), cluster)


def _recipe(row: Row, folder: Path, seq_len: int) -> Recipe:
    groups = row.gpus // row.sequence  # each has one sequence a step
    return Recipe.model_validate(
        {
            "model": {"name": str(folder), "activation_checkpointing": row.checkpointing},
            "adapter": LORA if row.adapter else None,
            "data": {"train": [{"path": "train.jsonl"}]},
            "batch": {"seq_len": seq_len, "global_batch_size": groups},
            "loss": {"kernel": "liger"},
            "parallel": {"deepspeed": row.template, "sequence": row.sequence},
            "run": {"dir": "runs/long"},
        }
    )


def page() -> str:
    """Return the page with the table made anew."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
