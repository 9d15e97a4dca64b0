"""Compare the planner's bytes with those that DeepSpeed holds, for a real model on several ranks.

    python benchmarks/planner.py [--model DIR] [--ranks 2] [--dtype bfloat16]

Each packaged template (but NVMe's, whose states are files) trains one step; weights,
gradients, fp32 weights and moments are the buffers of the fullest rank. Writes
benchmarks/results/planner_<device>.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import machine, table  # noqa: E402

from tests.ranks import run_ranks  # noqa: E402

MODEL = Path("~/.cache/packhorse/models/smollm2-135m-instruct")
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "masters": "fp32 weights",
    "moments": "moments",
}
ROW_TOKENS = 1024


def main() -> None:
    options = parse()
    if options.rank_out:
        measure(options)
        return
    with tempfile.TemporaryDirectory(prefix="planner.") as folder:
        out = Path(folder) / "found.json"
        run_ranks(options.ranks, [__file__, *sys.argv[1:], "--rank-out", str(out)], timeout_s=1800)
        found = json.loads(out.read_text())
    text = report(options, found)
    path = Path(__file__).parent / "results" / f"planner_{found['device']}.md"
    path.write_text(text)
    print(f"{text}\nwritten to {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a model folder")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model.expanduser().resolve()
    return options


def measure(options: argparse.Namespace) -> None:
    """Build an engine of every template on each rank, and run one micro-batch and one step."""
    import torch

    from packhorse.trainer import dist
    from packhorse.trainer.build_engine import build_engine
    from packhorse.trainer.config.recipe import parse_recipe
    from packhorse.trainer.data.loader import filler_batch
    from packhorse.trainer.datatypes import BadInput
    from packhorse.trainer.estimate.model import build_empty_model, measure_model
    from packhorse.trainer.estimate.report import fill_template
    from packhorse.trainer.estimate.state import count_state_bytes
    from packhorse.trainer.model.load import load_tokenizer
    from tests.numerics.buffers import held

    found: dict[str, Any] = {}
    with dist.process_group():
        for path in sorted((ROOT / "ds_configs").glob("*.json")):
            if "nvme" in path.name:
                continue
            recipe = parse_recipe(
                {
                    "model": {
                        "name": str(options.model),
                        "dtype": options.dtype,
                        "activation_checkpointing": "none",
                    },
                    "data": {"train": [{"path": "unused"}]},
                    "batch": {"seq_len": ROW_TOKENS},
                    "parallel": {"deepspeed": path.stem},
                    "run": {"dir": str(options.rank_out.parent)},
                }
            )
            try:
                engine = build_engine(recipe, options.rank_out.parent, load_tokenizer(recipe.model))
                model = measure_model(build_empty_model(recipe.model), recipe.optim)
                state = count_state_bytes(
                    model,
                    fill_template(recipe, recipe.parallel.deepspeed, model.hidden),
                    dist.world_size(),
                )
            except BadInput as error:
                found[path.stem] = str(error)
                continue
            planned = {part: getattr(state, part) for part in PARTS} | {
                "weights": state.weights + state.persistent
            }
            of_ranks = dist.gather(held(engine, filler_batch()))
            found[path.stem] = {
                part: [planned[part], max(one[part] for one in of_ranks)] for part in PARTS
            }
            del engine
            gc.collect()
        if dist.is_main():
            content = {"device": dist.device().type, "templates": found, "torch": torch.__version__}
            options.rank_out.write_text(json.dumps(content))
    sys.stdout.flush()
    os._exit(0)  # as the trainer does: DeepSpeed leaves threads behind


def report(options: argparse.Namespace, found: dict[str, Any]) -> str:
    head = ["template", *(label for label in PARTS.values()), "planned - held"]
    rows, refused = [], []
    for template, parts in found["templates"].items():
        if isinstance(parts, str):
            refused.append(f"- {template}: {parts}")
            continue
        off = sum(planned - held for planned, held in parts.values())
        rows.append(
            [template, *(f"{held / 2**20:,.1f}" for _, held in parts.values()), f"{off:,} bytes"]
        )
    command = shlex.join(["python", "benchmarks/planner.py", *sys.argv[1:]])
    parts = [
        "# The planner beside DeepSpeed's own buffers",
        f"`{command}`",
        machine(("torch", "deepspeed", "transformers")),
        f"{options.model.name}, {options.dtype}, {options.ranks} ranks: MiB that the fullest rank "
        f"holds after a step, "
        "and by how many bytes the plan is above it, over the four parts.",
        table(head, rows),
        *(["Left out:", "\n".join(refused)] if refused else []),
        "Activations are compared with what a forward saves in tests/unit/test_memory.py. On a GPU "
        "a run itself logs, "
        "after its first steps, the peak that was predicted beside the one that torch's allocator "
        "counted.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
