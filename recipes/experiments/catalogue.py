"""Define the experiments: the arms that each compares, and what an arm changes in the base recipe.

In: a recipe (base.yaml, or one of another size). Out: runs, named by arm and seed, so that a run is
trained once even if several experiments use it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from packhorse.trainer.config.recipe import Recipe


@dataclass(frozen=True)
class Experiment:
    """A question, and the arms that answer it."""

    title: str
    arms: tuple[str, ...]  # the others are compared with the first
    seeds: tuple[int, ...]  # values of train.seed


EXPERIMENTS = {
    1: Experiment("Loss weighting", ("sheets-token", "sheets-example", "sheets-constant"), (0, 1)),
    2: Experiment("Prompt masked or learned", ("baseline", "prompt-learned"), (0, 1)),
    3: Experiment("Filtered traces", ("traces-all", "traces-filtered", "baseline"), (0, 1)),
    4: Experiment("NEFTune", ("baseline", "neftune"), (0,)),
    5: Experiment("Packing", ("packed-float32", "alone-float32", "packed", "alone"), (0,)),
    6: Experiment("Full, LoRA, QLoRA", ("baseline", "lora-r8", "lora-r64", "qlora-r64"), (0, 1)),
    7: Experiment("Checkpoint by loss or by metric", ("few-rows", "fewer-rows"), (0,)),
}


class Run(NamedTuple):
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.arm}-seed{self.seed}"


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    changes: dict[str, Any]  # keys of the recipe, dotted
    expected_s: int  # seconds of a run of base.yaml on two cores, evaluations included


# Learning rate of an adapter over that of the full model. About ten times is best at alpha 32,
# whatever the rank.
ADAPTER_LR = 10


def arms(base: Recipe) -> dict[str, Arm]:
    """Return all arms for a base recipe, by name. Lengths and learning rates come from it."""
    folder = Path(base.data.train[0].path or "").parent
    sheets = {
        "data.train.0.path": str(folder / "sheets.jsonl"),
        "data.max_length": base.batch.seq_len,
    }
    traces = {"data.train.0.path": str(folder / "traces.jsonl")}
    math = {"data.train.0.filters": {"math_answer": "solution"}}
    # Every step holds all rows, so that packing cannot change which rows a step holds.
    rows = 40
    same_steps = {
        "data.train.0.rows": rows,
        "batch.global_batch_size": rows,
        "batch.micro_batch_size": 1,
        "train.steps": 6,
        "eval.generate": None,
    }
    float32 = {"model.dtype": "float32", "model.attention": "reference"}
    alone = {"data.packing": "none", "batch.seq_len": base.max_length}
    adapter = {"optim.lr": ADAPTER_LR * base.optim.lr, "adapter.alpha": 32}
    return {
        "baseline": Arm({}, 185),
        "sheets-token": Arm(sheets, 200),
        "sheets-example": Arm({**sheets, "loss.weighting": "example"}, 200),
        "sheets-constant": Arm({**sheets, "loss.weighting": 50}, 200),
        "prompt-learned": Arm({"data.train_on": "all"}, 210),
        "traces-all": Arm(traces, 185),
        "traces-filtered": Arm({**traces, **math}, 185),
        "neftune": Arm({"loss.neftune_alpha": 5}, 180),
        "packed-float32": Arm({**same_steps, **float32}, 135),
        "alone-float32": Arm({**same_steps, **float32, **alone}, 195),
        "packed": Arm(same_steps, 60),
        "alone": Arm({**same_steps, **alone}, 100),
        "lora-r8": Arm({**adapter, "adapter.rank": 8}, 175),
        "lora-r64": Arm({**adapter, "adapter.rank": 64}, 190),
        "qlora-r64": Arm({**adapter, "adapter.rank": 64, "adapter.base": "nf4"}, 210),
        "few-rows": Arm({"data.train.0.rows": 125, "train.steps": 40, "eval.every_steps": 5}, 300),
        "fewer-rows": Arm({"data.train.0.rows": 60, "train.steps": 60, "eval.every_steps": 5}, 450),
    }


def runs(numbers: Iterable[int]) -> list[Run]:
    """Return the runs of these experiments, each once."""
    experiments = [EXPERIMENTS[number] for number in numbers]
    every = (Run(arm, seed) for one in experiments for seed in one.seeds for arm in one.arms)
    return list(dict.fromkeys(every))


def overrides(run: Run, base: Recipe, folder: Path) -> list[str]:
    """Return the run as `key=value` arguments of `packhorse train`, with its folder in `folder`."""
    changes = {**arms(base)[run.arm].changes, "train.seed": run.seed}
    values = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in changes.items()
    }
    return [*(f"{key}={value}" for key, value in values.items()), f"run.dir={folder / run.name}"]
