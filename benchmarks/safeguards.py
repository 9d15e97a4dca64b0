"""What the safeguards of data and run folders cost: checks, the lease, bounded rendering.

    python benchmarks/safeguards.py [--rows 20000]

Rows as those of recipes/debug.yaml are prepared by one process, and the cache is opened again. Each
safeguard's calls in it are counted, and timed by themselves; all times are of the processor.
Writes benchmarks/results/safeguards_cpu.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import ROOT, machine, table, write_result

from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.data import documents, filters, template_call
from packhorse.trainer.data.digest import require_intact
from packhorse.trainer.data.prepare import prepare
from packhorse.trainer.model.load import load_tokenizer
from packhorse.trainer.utils import lease, time_limit
from packhorse.trainer.utils.json_lines import append_json_lines

CALLS = 20_000  # of each safeguard by itself


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "safeguards_cpu.md"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_result(asked.out, report(Path(folder), asked.rows))


def report(folder: Path, rows: int) -> str:
    """Prepare rows in a folder; return what each safeguard took of that."""
    recipe = make_recipe(folder, rows)
    tokenizer = load_tokenizer(recipe.model)
    with counted() as calls:
        whole_s = seconds(lambda: prepare(recipe, tokenizer, "train"))
    with mock.patch.object(documents, "require_intact") as check:
        found = prepare(recipe, tokenizer, "train").documents
    check_s = of_each(lambda: require_intact(*check.call_args.args), 50)
    every = np.arange(len(found.lengths))
    document_s = of_each(lambda: found.require_unchanged(every), 1) / len(every)
    with time_limit.many_interruptions():  # as there is one for each chunk of rows
        render_s = of_each(bounded_nothing)
    with lease.owned(folder / "run"):
        beats_s = of_each(lambda: lease.require_owned(folder / "run" / "x"))
        line_s = of_each(lambda: append_json_lines(folder / "run" / "x", [{"step": 1}]), 2000)
    shares = [
        ("the cache's check, when it is opened", 1, check_s),
        ("bounded rendering and patterns", calls["bounded"], calls["bounded"] * render_s),
        ("the lease: asking whether it is ours", calls["lease"], calls["lease"] * beats_s),
    ]
    lines = [
        [name, f"{number:,}", f"{took_s * 1e3:.1f} ms", f"{took_s / whole_s:.2%}"]
        for name, number, took_s in shares
    ]
    total = sum(took_s for _, _, took_s in shares) / whole_s
    return "\n".join(
        [
            "# What the safeguards cost\n\n`python benchmarks/safeguards.py`\n",
            machine(("transformers", "tokenizers")),
            f"\n{rows:,} rows are prepared by one process in {whole_s:.1f} s.\n",
            table(["safeguard", "calls", "in all", "of the preparation"], lines),
            f"\n- aim: under 1% of the preparation in all: {total:.2%}, "
            f"{'met' if total < 0.01 else 'missed'}",
            f"- in a step of training: one question to the lease for each line of a log, "
            f"{beats_s * 1e6:.0f} of its {line_s * 1e6:.0f} microseconds; in the background thread "
            f"{document_s * 1e6:.1f} microseconds for each document that it reads\n",
        ]
    )


def make_recipe(folder: Path, rows: int) -> Recipe:
    """Return the debug recipe with so many rows, no two of which are equal."""
    debug = (ROOT / "recipes" / "debug" / "train.jsonl").read_text().splitlines()
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(rows):
            row = json.loads(debug[number % len(debug)])
            row["question"] = f"{number}. {row['question']}"
            file.write(json.dumps(row) + "\n")
    source = json.dumps([{"path": str(folder / "rows.jsonl"), "filters": {"pattern": "answer"}}])
    changes = (f"data.train={source}", f"data.cache={folder / 'cache'}", "data.workers=1")
    return load_recipe(ROOT / "recipes" / "debug.yaml", changes)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls of safeguards inside the block."""
    calls: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    with ExitStack() as stack:
        bounded = counting("bounded", time_limit.interrupted_after)
        for module in (template_call, filters):
            stack.enter_context(mock.patch.object(module, "interrupted_after", bounded))
        asked = counting("lease", lease.Lease.is_ours)
        stack.enter_context(mock.patch.object(lease.Lease, "is_ours", asked))
        yield calls


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def of_each(work: Callable[[], object], calls: int = CALLS) -> float:
    """Return the seconds of one of many calls, in the quickest of five rounds."""
    return min(seconds(lambda: [work() for _ in range(calls)]) for _ in range(5)) / calls


def bounded_nothing() -> None:
    with time_limit.interrupted_after(1.0):
        pass


if __name__ == "__main__":
    main()
