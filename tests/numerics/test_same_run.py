"""The promise: the run is a function of the recipe. X2, X3, X7 and X8 of the table of exactness.

Every case is a whole run of recipes/debug.yaml through trainer/train.py: packing, uneven masks, NEFTune noise,
three or four micro-batches a step, weight decay, clipping. Three ranks end a step on fillers.

Losses and gradient norms agree to 1e-6 relative, weights by their change D since the start:
||Da - Db|| <= 1e-4 ||Da|| for each tensor. lr is 1e-2 and Adam's eps 1e-3: a small lr would hide a defect under the
bound, and 1e-8 would make full steps of rounding noise. Every bound has controls, real defects put in on
purpose, that must exceed it by ten times.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.numerics.cases import SABOTAGES
from tests.ranks import ROOT, run_ranks
from trainer import checkpoint
from trainer.config import load
from trainer.engine import read_state
from trainer.model.load import load_model, load_tokenizer

SCALAR_BOUND = 1e-6  # relative, of losses and norms
CHANGE_BOUND = 1e-4  # ||Da - Db|| / ||Da||, the worst tensor
CONTROL_FACTOR = 10
BF16_CHANGE_BOUND = 1e-4  # measured: 9e-10, where every row makes a micro-batch of its own at both worlds
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload_optimizer", "zero3_offload_all", "zero3_nvme")
RESUMABLE = STAGES[:-1]  # on the NVMe DeepSpeed loses the moments: refused, see test_resume.py
COMMON = ("optim.eps=1e-3", "train.steps=6", "eval.generate=null", "eval.every_steps=null", "checkpoint.keep=9")
BF16 = ("model.dtype=bfloat16", "batch.rows_per_step=16", "data.train.0.weight=3", "batch.row_tokens=128")


@dataclass(frozen=True)
class Run:
    """What a case left in its run folder."""

    losses: list[float]
    norms: list[float]
    eval_losses: list[float]
    changes: dict[str, torch.Tensor]  # of each weight since the start, float64


@dataclass(frozen=True)
class Difference:
    """The largest differences between two runs."""

    loss: float
    norm: float
    change: float

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, norm {self.norm:.1e}, weights' change {self.change:.1e}"

    @property
    def agrees(self) -> bool:
        return self.loss <= SCALAR_BOUND and self.norm <= SCALAR_BOUND and self.change <= CHANGE_BOUND

    @property
    def is_caught(self) -> bool:
        """Beyond ten times some bound."""
        scalars = max(self.loss, self.norm) > CONTROL_FACTOR * SCALAR_BOUND
        return scalars or self.change > CONTROL_FACTOR * CHANGE_BOUND


def case(root: Path, name: str, stage: str, *overrides: str, **extra: Any) -> dict[str, Any]:
    template = ROOT / "ds_configs" / f"{stage}.json"
    if stage == "zero3_nvme":  # the same template, swapping into this test's folder, and a model worth swapping
        overrides = (f"model.name={wide_model(root)}", *overrides)
        template = root / "zero3_nvme.json"
        text = (ROOT / "ds_configs" / "zero3_nvme.json").read_text()
        template.write_text(text.replace("/local_nvme", str(root / "nvme")))
    cache = f"data.cache={root / 'cache'}"
    return {
        "run": str(root / name),
        "recipe": str(ROOT / "recipes" / "debug.yaml"),
        "overrides": [*COMMON, f"parallel.deepspeed={template}", cache, *overrides],
        **extra,
    }


def wide_model(root: Path) -> Path:
    """The debug model, wide enough that DeepSpeed moves its optimizer states to the NVMe (from 1 MiB a rank on)."""
    folder = root / "wide"
    if not folder.exists():
        shutil.copytree(ROOT / "recipes" / "debug" / "model", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 256, "intermediate_size": 512}))
    return folder


def all_cases(root: Path) -> dict[int, list[dict[str, Any]]]:
    """The matrix of runs, by world size. A resumed run is two cases: one that is stopped, one that goes on."""

    def resumed(world: int, stage: str) -> list[dict[str, Any]]:
        name = f"{world}-{stage}-resumed"
        return [case(root, name, stage, stop_after=3), case(root, name, stage)]

    wide = f"model.name={wide_model(root)}"
    return {
        1: [
            *(case(root, f"1-{stage}", stage) for stage in STAGES),
            case(root, "1-wide", "zero0", wide),
            case(root, "1-micro4", "zero2", "batch.rows_per_micro=4"),
            case(root, "1-micro2", "zero2", "batch.rows_per_micro=2"),
            *resumed(1, "zero3"),
            case(root, "1-bf16", "zero3", *BF16),
        ],
        2: [
            *(case(root, f"2-{stage}", stage) for stage in STAGES),
            case(root, "2-wide", "zero0", wide),
            *(part for stage in RESUMABLE for part in resumed(2, stage)),
            *(case(root, f"2-{name}", "zero3", sabotage=name) for name in SABOTAGES if name != "bf16_accumulation"),
            *(case(root, f"2-{w}", "zero2", f"loss.weighting={w}", *k) for w, *k in WEIGHTINGS),
        ],
        3: [
            case(root, "3-zero2", "zero2"),
            case(root, "3-zero3", "zero3"),
            *(case(root, f"3-{w}", "zero3", f"loss.weighting={w}", *k) for w, *k in WEIGHTINGS),
        ],
        4: [
            case(root, "4-bf16", "zero3", *BF16),
            case(root, "4-bf16-accumulated-in-bf16", "zero3", *BF16, sabotage="bf16_accumulation"),
        ],
    }


WEIGHTINGS = (("example",), ("constant", "loss.constant_tokens=20"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("runs")
    for world, cases in all_cases(root).items():
        path = root / f"cases-{world}.json"
        path.write_text(json.dumps(cases))
        run_ranks(world, ["-m", "tests.numerics.cases", str(path)], timeout_s=600)
    folders = {Path(c["run"]) for cs in all_cases(root).values() for c in cs}
    starts: dict[str, dict[str, torch.Tensor]] = {}
    return {folder.name: read_run(folder, starts) for folder in folders}


def start_weights(run_dir: Path, starts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The weights that a run started from, float64: its recipe makes them anew. Kept by the model's name."""
    recipe = load(run_dir / "recipe.yaml", ["model.dtype=float32"])
    if recipe.model.name not in starts:
        model = load_model(recipe.model, load_tokenizer(recipe.model), seed=recipe.train.seed)
        starts[recipe.model.name] = {f"model.{name}": p.detach().double() for name, p in model.named_parameters()}
    return starts[recipe.model.name]


def read_run(run_dir: Path, starts: dict[str, dict[str, torch.Tensor]]) -> Run:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    found = checkpoint.find(run_dir)
    assert found
    assert [line["step"] for line in steps] == list(range(1, found[1].step + 1)), "a step is missing or counted twice"
    weights = {name: value.contiguous().detach().double() for name, value in read_state(found[0]).items()}
    changes = {name: weights[name] - start for name, start in start_weights(run_dir, starts).items()}
    return Run(
        [line["train/loss"] for line in steps],
        [line["train/grad_norm"] for line in steps],
        [line["eval/loss"] for line in lines if "eval/loss" in line],
        changes,
    )


def difference(a: Run, b: Run) -> Difference:
    def worst(left: list[float], right: list[float]) -> float:
        assert len(left) == len(right)
        return max(abs(x - y) / abs(x) for x, y in zip(left, right, strict=True))

    change = max(float((a.changes[k] - b.changes[k]).norm() / a.changes[k].norm()) for k in a.changes)
    return Difference(worst(a.losses + a.eval_losses, b.losses + b.eval_losses), worst(a.norms, b.norms), change)


def report(name: str, seen: Difference) -> None:
    print(f"\n  {name}: {seen}", end="")


def is_same(a: Run, b: Run) -> bool:
    scalars = (a.losses, a.norms, a.eval_losses) == (b.losses, b.norms, b.eval_losses)
    return scalars and all(torch.equal(a.changes[k], b.changes[k]) for k in a.changes)


# ----------------------------------------------------------------------------------------------- X2


@pytest.mark.parametrize("other", ["2-zero3", "3-zero3", "3-zero2", "1-micro2", "1-micro4"])
def test_x2_the_cutting_of_the_batch_changes_nothing(runs: dict[str, Run], other: str) -> None:
    """1 rank x 4 micro-batches = 2 x 2 = 4 rows at once = 3 ranks with fillers."""
    seen = difference(runs["1-zero3"], runs[other])
    report(f"1 rank x 4 against {other}", seen)
    assert seen.agrees


@pytest.mark.parametrize("weighting", [w for w, *_ in WEIGHTINGS])
def test_x2_holds_for_every_weighting(runs: dict[str, Run], weighting: str) -> None:
    seen = difference(runs[f"2-{weighting}"], runs[f"3-{weighting}"])
    report(f"{weighting}, 2 ranks against 3", seen)
    assert seen.agrees
    assert difference(runs["2-zero2"], runs[f"2-{weighting}"]).is_caught, "the weighting has no effect"


@pytest.mark.parametrize("defect", [name for name in SABOTAGES if name != "bf16_accumulation"])
def test_x2_notices(runs: dict[str, Run], defect: str) -> None:
    seen = difference(runs["1-zero3"], runs[f"2-{defect}"])
    report(f"control {defect}", seen)
    assert seen.is_caught


# ----------------------------------------------------------------------------------------------- X3


@pytest.mark.parametrize("name", ["1-zero3", *(f"2-{stage}" for stage in RESUMABLE)])
def test_x3_stopped_and_resumed_is_never_stopped(runs: dict[str, Run], name: str) -> None:
    """Bit by bit, at the same world size."""
    assert is_same(runs[name], runs[f"{name}-resumed"])


def test_x3_notices_a_single_bit(runs: dict[str, Run]) -> None:
    run = runs["2-zero3"]
    name, change = next(iter(run.changes.items()))
    moved = change.clone()
    moved.view(-1)[0] = torch.nextafter(moved.view(-1)[0], torch.tensor(1.0, dtype=torch.float64))
    assert not is_same(run, Run(run.losses, run.norms, run.eval_losses, {**run.changes, name: moved}))


# ----------------------------------------------------------------------------------------------- X7


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("world", [1, 2])
def test_x7_every_stage_and_offload_is_stage_0(runs: dict[str, Run], world: int, stage: str) -> None:
    base = f"{world}-wide" if stage == "zero3_nvme" else f"{world}-zero0"
    seen = difference(runs[base], runs[f"{world}-{stage}"])
    report(f"{world} ranks, stage 0 against {stage}", seen)
    assert seen.agrees


# ----------------------------------------------------------------------------------------------- X8


def test_x8_in_bf16_the_cutting_stays_within_the_measured_tolerance(runs: dict[str, Run]) -> None:
    """bf16 weights, fp32 master weights and accumulation: 1 rank x 16 against 4 x 4."""
    seen = difference(runs["1-bf16"], runs["4-bf16"])
    report("bf16, 1 x 16 against 4 x 4", seen)
    control = difference(runs["1-bf16"], runs["4-bf16-accumulated-in-bf16"])
    report("control, gradients accumulated in bf16", control)
    assert seen.change <= BF16_CHANGE_BOUND
    assert control.change > CONTROL_FACTOR * BF16_CHANGE_BOUND
