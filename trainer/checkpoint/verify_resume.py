"""The same run twice, once without a break and once handed from world to world, compared:
`packhorse verify-resume`.

    without a break   worlds[0] ------------------------------------> steps
    handed on         worlds[0] --> at, worlds[1] --> 2 at, ... ----> steps
    control           as handed on, but with the first moments lost at the first break: it must not agree

Each part is an ordinary `packhorse train` of the recipe, whose trace.jsonl says what every step was
made of.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from trainer.checkpoint import checkpoint
from trainer.config.recipe import load_recipe
from trainer.datatypes import DONE, SAVED_RUN_AGAIN, BadInput
from trainer.engine import sharded_state
from trainer.engine.sharded_state import EXP_AVG, EXP_AVG_SQ, WEIGHT, Shards, Slice, add_digests
from trainer.model.load import load_model, load_tokenizer
from trainer.utils.files import read_json_lines

SCALAR_BOUND = 1e-6  # relative, of a step's loss and gradient norm
CHANGE_BOUND = 1e-4  # ||Da - Db|| / ||Da|| of the worst tensor, D its change since the start
CONTROL_FACTOR = 10  # the control must go beyond a bound by as much
# A large rate shows defects that hide under a small one; a large eps keeps rounding from becoming
# whole steps.
LOUD = ("optim.lr=1e-2", "optim.eps=1e-3", "optim.lr_schedule=constant", "optim.warmup_ratio=0")
_DEBUG = Path(__file__).resolve().parents[2] / "recipes" / "debug"
TINY = (
    f"model.name={_DEBUG / 'model'}",
    "model.init=random",
    "model.revision=null",
    "model.add_tokens=[]",
    "model.chat_template=null",
    f"data.train=[{{path: {_DEBUG / 'train.jsonl'}}}]",
    "batch.seq_len=256",
    "batch.global_batch_size=4",
)
QUIET = (
    "data.eval=[]",
    "data.eval_fraction=0",
    "data.group_by=null",
    "eval.generate=null",
    "eval.best=null",
    "checkpoint.every_steps=null",
    "profile=null",
    "run.trace=true",
    "guard.non_finite=stop",
)


@dataclass(frozen=True)
class Differences:
    """Of two runs, the largest of each kind."""

    rows: int  # steps whose rows differ
    groups: int  # steps whose optimizer groups have other hyperparameters
    loss: float
    norm: float
    change: float

    @property
    def agree(self) -> bool:
        return not self.rows and not self.groups and self._worst <= 1

    @property
    def are_seen(self) -> bool:
        """Beyond a bound by CONTROL_FACTOR."""
        return self._worst > CONTROL_FACTOR

    @property
    def _worst(self) -> float:
        """In bounds; a NaN counts as beyond all of them."""
        parts = (self.loss / SCALAR_BOUND, self.norm / SCALAR_BOUND, self.change / CHANGE_BOUND)
        return max(part if part == part else float("inf") for part in parts)


def verify_resume(
    recipe_file: Path,
    overrides: list[str] | tuple[str, ...],
    *,
    worlds: Sequence[int],
    at: int,
    steps: int,
    dtype: str,
    tiny: bool,
    keep: bool,
) -> bool:
    """Run it, print the table, and say whether resuming changes nothing and the control was
    noticed.

    Args:
        worlds: numbers of processes that the run is handed to, every `at` steps.

    Raises:
        BadInput: the recipe cannot be used, or `steps` do not reach the last of the worlds.
    """
    if len(worlds) < 2 or at * (len(worlds) - 1) >= steps:
        raise BadInput(
            f"--worlds {','.join(map(str, worlds))} --at {at}: give two worlds or more, and more "
            f"--steps"
        )
    common = (
        *(TINY if tiny else ()),
        f"model.dtype={dtype}",
        f"train.steps={steps}",
        *LOUD,
        *QUIET,
        "guard.non_finite=stop",
    )
    parent = Path(load_recipe(recipe_file, overrides).run.dir).parent
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="verify-resume.", dir=parent))

    def train(name: str, world: int, until: int) -> None:
        stop = [] if until == steps else [f"run.stop_after={until}"]
        changes = [
            *common,
            *overrides,
            *stop,
            "parallel.allow_idle_ranks=true",
            f"run.dir={work / name}",
        ]
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        _train(
            recipe_file, changes, world, f"{name}: {ranks} to step {until}", work / f"{name}.log"
        )

    train("without-a-break", worlds[0], steps)
    train("handed-on", worlds[0], at)
    shutil.copytree(work / "handed-on", work / "control")
    lose_first_moments(work / "control")
    for name in ("handed-on", "control"):
        for number, world in enumerate(worlds[1:], 2):
            train(name, world, steps if number == len(worlds) else number * at)

    recipe = load_recipe(work / "without-a-break" / "recipe.yaml", ["model.dtype=float32"])
    tokenizer, seed = load_tokenizer(recipe.model), recipe.train.seed
    model: Any = load_model(recipe.model, tokenizer, seed=seed, adapter=recipe.adapter)
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    seen = {
        name: compare(work / "without-a-break", work / name, start)
        for name in ("handed-on", "control")
    }
    Console().print(_table(seen["handed-on"], seen["control"], worlds, at, steps))
    print("resuming changes nothing" if seen["handed-on"].agree else "RESUMING CHANGES THE RUN")
    noticed = "was noticed" if seen["control"].are_seen else "was NOT noticed, so nothing is proved"
    print(f"the control, whose first moments were lost at the first break, {noticed}")
    if keep:
        print(f"kept: {work}")
    else:
        shutil.rmtree(work)
    return seen["handed-on"].agree and seen["control"].are_seen


def _train(recipe_file: Path, changes: list[str], world: int, what: str, log: Path) -> None:
    started = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "trainer.cli.main",
        "train",
        str(recipe_file),
        *changes,
        "--nproc",
        str(world),
    ]
    with log.open("ab") as out:
        code = subprocess.run(command, stdout=out, stderr=out, check=False).returncode
    if code not in (DONE, SAVED_RUN_AGAIN):
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BadInput(f"{what} ended with exit code {code}; the end of {log}:\n{end}")
    print(f"{what}: {time.monotonic() - started:.0f} s", file=sys.stderr)


def lose_first_moments(run_dir: Path) -> None:
    """Rewrite a run's checkpoint with zeros for the first moments, and a manifest that agrees with
    it.
    """
    found = checkpoint.find(run_dir)
    assert found
    folder, manifest = found
    files, digests = (
        {},
        {key: value for key, value in manifest.digests.items() if key[1] == sharded_state.FROZEN},
    )
    for name, file in manifest.files.items():
        tensors = load_file(folder / name)
        slices = []
        for parameter, start, stop in file.slices:
            keys = {
                state: sharded_state.key_of(parameter, start, stop, state)
                for state in (WEIGHT, EXP_AVG, EXP_AVG_SQ)
            }
            states = {state: tensors[key] for state, key in keys.items() if key in tensors}
            if EXP_AVG in states:
                states[EXP_AVG] = torch.zeros_like(states[EXP_AVG])
            slices.append(Slice(parameter, start, states))
        (folder / name).unlink()  # and not written over: the tensors are still mapped to it
        files[name], found_digests = sharded_state.write(folder / name, slices)
        add_digests(digests, found_digests)
    checkpoint.write_manifest(folder, replace(manifest, files=files, digests=digests))


# ---------------------------------------------------------------------------------------- comparing


def compare(a: Path, b: Path, start: dict[str, torch.Tensor]) -> Differences:
    """Two run folders of one recipe, by their traces and their last checkpoints; `start` holds the
    first weights.
    """
    left, right = read_json_lines(a / "trace.jsonl"), read_json_lines(b / "trace.jsonl")
    if [line["step"] for line in left] != [line["step"] for line in right]:
        raise RuntimeError(f"{a} has {len(left)} steps in its trace, {b} has {len(right)}")
    pairs = list(zip(left, right, strict=True))
    (saved_a, _), (saved_b, _) = checkpoint.open_newest(a), checkpoint.open_newest(b)

    def largest(key: str) -> float:
        return max(abs(x[key] - y[key]) / abs(x[key]) for x, y in pairs)

    return Differences(
        rows=sum(x["documents"] != y["documents"] for x, y in pairs),
        groups=sum(x["groups"] != y["groups"] for x, y in pairs),
        loss=largest("train/loss"),
        norm=largest("train/grad_norm"),
        change=max(_change(saved_a, saved_b, name, first) for name, first in start.items()),
    )


def _change(a: Shards, b: Shards, name: str, start: torch.Tensor) -> float:
    if name not in a.names:  # not trained
        return 0.0
    left, right = a.whole(name).double() - start, b.whole(name).double() - start
    return float((left - right).norm() / left.norm())


def _table(
    seen: Differences, control: Differences, worlds: Sequence[int], at: int, steps: int
) -> Table:
    handed = " -> ".join(map(str, worlds))
    table = Table(
        "",
        "largest difference",
        "bound",
        "control",
        title=f"{steps} steps, ranks {handed} every {at}, against {worlds[0]}",
    )
    lines: list[tuple[str, float, float, float]] = [
        ("steps with other rows", seen.rows, 0, control.rows),
        ("steps with other hyperparameters", seen.groups, 0, control.groups),
        ("loss, relative", seen.loss, SCALAR_BOUND, control.loss),
        ("gradient norm, relative", seen.norm, SCALAR_BOUND, control.norm),
        ("weights' change, worst tensor", seen.change, CHANGE_BOUND, control.change),
    ]
    for label, *numbers in lines:
        table.add_row(label, *(f"{number:.1e}" if number else "0" for number in numbers))
    return table
