"""Write the table of docs/models_sweep.md from the results of sweep.py.

python -m tests.models.table RESULTS.json docs/models_sweep.md
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.models.sweep import BOUNDS

INTRO = """# Every architecture, tried

`make models` builds each causal architecture of transformers {version}, and a few with towers, as a
tiny random model, loads and proves it as a run does, trains three steps at ZeRO 0 and 3 and
compares with plain PyTorch, which runs each document alone; the export is loaded into transformers.
This page is written by it. The [families that people train](models.md) have a page of their own.

- *packed*: losses, weights and the export's logits are plain PyTorch's.
- *by document*: the same, but a packed sequence runs document by document through the whole model.
- *refused*: by one sentence.
- *not tried*: for the reason given.
- *not built*: transformers' default configuration could not be shrunk.
- *not run*: the sweep ended before it came to this one.

{counts}

| `model_type` | works | loss | weights | logits | what is missing, or runs by document |
|---|---|---|---|---|---|
"""


def page(results: dict[str, Any], version: str) -> str:
    """Return the page: counts, and a row for each model type."""
    counts = Counter(works(seen) for seen in results.values())
    said = ", ".join(f"{number} {what}" for what, number in counts.most_common())
    rows = [row(name, seen) for name, seen in sorted(results.items())]
    return INTRO.format(version=version, counts=f"**{said}**.") + "\n".join(rows) + "\n"


def works(seen: dict[str, Any]) -> str:
    """Return how a model works, in the words of the page."""
    if seen["works"] in ("packed", "by document") and any(over(seen)):
        return "differs"
    return seen["works"]


def over(seen: dict[str, Any]) -> list[str]:
    """Return which differences exceed their bounds, at any stage."""
    stages = [seen[stage] for stage in ("zero0", "zero3") if stage in seen]
    return [what for what in BOUNDS if any(not stage[what] <= BOUNDS[what] for stage in stages)]


def row(name: str, seen: dict[str, Any]) -> str:
    """Return a model's row, with the larger difference of the two stages."""
    stages = [seen[stage] for stage in ("zero0", "zero3") if stage in seen]
    largest = [f"{max(stage[what] for stage in stages):.0e}" if stages else "" for what in BOUNDS]
    why = seen.get("crash") or seen.get("why", "")
    cells = [f"`{name}`", works(seen), *largest, why.replace("|", "/")[:160]]
    return f"| {' | '.join(cells)} |"


def main(results: str, out: str) -> None:
    import transformers

    text = page(json.loads(Path(results).read_text()), transformers.__version__)
    Path(out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
