"""Run cases of the debug recipe, and measure how much two runs differ."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.model.load import load_model, load_tokenizer
from packhorse.trainer.utils.json_lines import read_json_lines
from tests.ranks import ROOT, run_ranks

SCALAR_BOUND = 1e-6  # relative, of losses and norms
CHANGE_BOUND = 1e-4  # ||Da - Db|| / ||Da||, the worst tensor
CONTROL_FACTOR = 10
# measured: 9e-10, where every packed sequence is a micro-batch of its own at both world sizes
BF16_CHANGE_BOUND = 1e-4
STAGES = (
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero3_offload_optimizer",
    "zero3_offload_all",
    "zero3_nvme",
)
COMMON = (
    "optim.eps=1e-3",
    "train.steps=6",
    "eval.generate=null",
    "eval.every_steps=null",
    "checkpoint.keep=9",
)
BF16 = (
    "model.dtype=bfloat16",
    "batch.global_batch_size=16",
    "data.train.0.weight=3",
    "batch.seq_len=128",
)


@dataclass(frozen=True)
class Run:
    """The losses, norms and weights that a case left in its run folder."""

    losses: list[float]
    norms: list[float]
    eval_losses: list[float]
    changes: dict[str, torch.Tensor]  # of each weight since the start, float64
    folder: Path = Path()


@dataclass(frozen=True)
class Difference:
    """The largest relative differences between two runs."""

    loss: float
    norm: float
    change: float

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, norm {self.norm:.1e}, weights' change {self.change:.1e}"

    @property
    def agrees(self) -> bool:
        return (
            self.loss <= SCALAR_BOUND and self.norm <= SCALAR_BOUND and self.change <= CHANGE_BOUND
        )

    @property
    def is_caught(self) -> bool:
        """Whether a difference exceeds its bound by ten times, as a control's must."""
        scalars = max(self.loss, self.norm) > CONTROL_FACTOR * SCALAR_BOUND
        return scalars or self.change > CONTROL_FACTOR * CHANGE_BOUND


def case(root: Path, name: str, stage: str, *overrides: str, **extra: Any) -> dict[str, Any]:
    """Return a case with a stage's template, in buckets so small that gradients fill several."""
    template = root / f"{stage}.json"
    text = (ROOT / "ds_configs" / f"{stage.removesuffix('_streamed')}.json").read_text()
    text = text.replace('"zero_hpz_partition_size": 8', '"zero_hpz_partition_size": 2')
    template.write_text(text.replace('"reduce_bucket_size": "auto"', '"reduce_bucket_size": 4096'))
    if stage.endswith("_streamed"):
        section = {"packhorse": {"optimizer_state": "streamed"}}
        template.write_text(json.dumps(json.loads(template.read_text()) | section))
    if stage == "zero3_nvme":  # swapping into this test's folder, and a model worth swapping
        overrides = (*wide(root), *overrides)
        config = json.loads(template.read_text())
        for part in ("offload_optimizer", "offload_param"):
            config["zero_optimization"][part]["nvme_path"] = str(root / "nvme")
        # DeepSpeed's own size makes 2 GB of buffers, and a quarter of a second each time
        config["zero_optimization"]["offload_param"]["buffer_size"] = 1_000_000
        template.write_text(json.dumps(config))
    cache = f"data.cache={root / 'cache'}"
    return {
        "run": str(root / name),
        "recipe": str(ROOT / "recipes" / "debug.yaml"),
        "overrides": [*COMMON, f"parallel.deepspeed={template}", cache, *overrides],
        **extra,
    }


def wide(root: Path) -> tuple[str, str]:
    """Return overrides for a model so wide that DeepSpeed moves its optimizer states to the NVMe.

    DeepSpeed does so from 1 MiB a rank on. The learning rate is smaller than the others', at which
    the third step overshoots sixfold and amplifies rounding.
    """
    folder = root / "wide"
    if not folder.exists():
        shutil.copytree(ROOT / "recipes" / "debug" / "model", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "hidden_size": 256, "intermediate_size": 512})
        )
    return f"model.name={folder}", "optim.lr=3e-3"


def run_cases(*waves: dict[int, list[dict[str, Any]]], timeout_s: float = 600) -> dict[str, Run]:
    """Run each world size's cases, one wave after the other; return the runs by folder name."""
    folders = set()
    for wave in waves:
        for world, cases in wave.items():
            path = Path(cases[0]["run"]).parent / "cases.json"
            path.write_text(json.dumps(cases))
            run_ranks(world, ["-m", "tests.numerics.cases", str(path)], timeout_s=timeout_s)
            folders |= {Path(case["run"]) for case in cases}
    starts: dict[str, dict[str, torch.Tensor]] = {}
    return {folder.name: read_run(folder, starts) for folder in folders}


def start_weights(
    run_dir: Path, starts: dict[str, dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return the weights that a run started from, in float64, made anew from its recipe.

    `starts` caches them by model and adapter.
    """
    recipe = load_recipe(run_dir / "recipe.yaml", ["model.dtype=float32", "model.matmul=bf16"])
    made_of = f"{recipe.model.name} {recipe.adapter}"
    if made_of not in starts:
        tokenizer, seed = load_tokenizer(recipe.model), recipe.train.seed
        model = load_model(recipe.model, tokenizer, seed=seed, adapter=recipe.adapter)
        starts[made_of] = {
            name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad
        }
    return starts[made_of]


def read_run(run_dir: Path, starts: dict[str, dict[str, torch.Tensor]]) -> Run:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    shards, manifest = checkpoint.open_checkpoint(run_dir)
    last = manifest.state.step
    skipped = {line["step"] for line in read_json_lines(run_dir / "skipped_steps.jsonl")}
    wanted = [step for step in range(1, last + 1) if step not in skipped]
    assert [line["step"] for line in steps] == wanted, "a step is missing or counted twice"
    weights = {name: shards.whole(name).double() for name in shards.names}
    start = start_weights(run_dir, starts)
    # a buffer starts at zero
    changes = {name: weight - start.get(name, 0.0) for name, weight in weights.items()}
    return Run(
        [line["train/loss"] for line in steps],
        [line["train/grad_norm"] for line in steps],
        [line["eval/loss"] for line in lines if "eval/loss" in line],
        changes,
        run_dir,
    )


def difference(a: Run, b: Run) -> Difference:
    def worst(left: list[float], right: list[float]) -> float:
        assert len(left) == len(right)
        return max(abs(x - y) / abs(x) for x, y in zip(left, right, strict=True))

    change = max(
        float((a.changes[k] - b.changes[k]).norm() / a.changes[k].norm()) for k in a.changes
    )
    return Difference(
        worst(a.losses + a.eval_losses, b.losses + b.eval_losses), worst(a.norms, b.norms), change
    )


def report(name: str, seen: Difference) -> None:
    print(f"\n  {name}: {seen}", end="")


def is_same(a: Run, b: Run) -> bool:
    scalars = (a.losses, a.norms, a.eval_losses) == (b.losses, b.norms, b.eval_losses)
    return scalars and all(torch.equal(a.changes[k], b.changes[k]) for k in a.changes)
