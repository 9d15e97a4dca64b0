"""Prove that resuming changes nothing: run a recipe twice and compare, `packhorse verify-resume`.

    without a break   worlds[0] ------------------------------------> steps
    handed on         worlds[0] --> at, worlds[1] --> 2 at, ... ----> steps
    control           as handed on, but with the first moments lost at the first break: the
                      comparison must notice it

In: a recipe and numbers of ranks. Out: a table of differences and a verdict. Each part is an
ordinary `packhorse train`, whose trace.jsonl records what every step was made of.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.config.packaged import MAIN, RECIPES
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import DONE, SAVED_RUN_AGAIN, BadInput
from packhorse.trainer.engine import sharded_state
from packhorse.trainer.engine.moments import MOMENTS
from packhorse.trainer.engine.sharded_state import Shards, Slice, add_digests
from packhorse.trainer.model.load import load_model, load_tokenizer
from packhorse.trainer.utils.json_lines import read_json_lines

SCALAR_BOUND = 1e-6  # relative, of a step's loss and gradient norm
CHANGE_BOUND = 1e-4  # ||Da - Db|| / ||Da|| of the worst tensor, D its change since the start
CONTROL_FACTOR = 10  # the control must exceed a bound by this factor
# A large rate shows defects that hide under a small one. A large eps keeps rounding from becoming
# whole steps where both moments are nearly 0.
LOUD = ("optim.lr=1e-2", "optim.eps=1e-3", "optim.lr_schedule=constant", "optim.warmup_ratio=0")
_DEBUG = RECIPES / "debug"
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
# What the comparison does not need is off; every step is traced.
QUIET = (
    "data.eval=[]",
    "data.eval_fraction=0",
    "eval.generate=null",
    "eval.best=null",
    "checkpoint.every_steps=null",
    "run.profile_steps=null",
    "run.trace=true",
    "guard.non_finite=stop",
)


@dataclass(frozen=True)
class Differences:
    """The largest differences between two runs, by kind."""

    rows: int  # steps whose rows differ
    groups: int  # steps whose optimizer groups have other hyperparameters
    loss: float  # relative
    norm: float  # relative
    change: float  # of the weights since the start, relative, of the worst tensor

    @property
    def agree(self) -> bool:
        return not self.rows and not self.groups and self._worst <= 1

    @property
    def are_seen(self) -> bool:
        """Whether a difference exceeds its bound by CONTROL_FACTOR."""
        return self._worst > CONTROL_FACTOR

    @property
    def _worst(self) -> float:
        """The largest difference in units of its bound; a NaN exceeds all bounds."""
        parts = (self.loss / SCALAR_BOUND, self.norm / SCALAR_BOUND, self.change / CHANGE_BOUND)
        return max(part if part == part else float("inf") for part in parts)


def verify_resume(
    recipe_file: Path,
    overrides: list[str] | tuple[str, ...],
    *,
    worlds: Sequence[int],
    sequences: Sequence[int] | None,
    at: int,
    steps: int,
    dtype: str,
    tiny: bool,
    keep: bool,
) -> bool:
    """Run all three, print the table, and return whether resuming changes nothing and the
    comparison noticed the control.

    Args:
        worlds: numbers of processes that the run is handed to, one after the other, every `at`
            steps.
        sequences: parallel.sequence of each of the worlds; None for the recipe's own.
        tiny: train the debug recipe's random model on its data, in place of the recipe's own.
        keep: leave the run folders.

    Raises:
        BadInput: the recipe cannot be used, or `steps` do not reach the last of the worlds.
    """
    if len(worlds) < 2 or at * (len(worlds) - 1) >= steps:
        raise BadInput(
            f"--worlds {','.join(map(str, worlds))} --at {at}: give two worlds or more, and more "
            "--steps"
        )
    hands = _hands(worlds, sequences)
    recipe = load_recipe(recipe_file, overrides)
    parent = Path(recipe.run.dir).parent
    parent.mkdir(parents=True, exist_ok=True)
    # not mkdtemp: a folder that is kept is for whom the umask says
    work = parent / f"verify-resume.{secrets.token_hex(4)}"
    work.mkdir()
    common = [*(TINY if tiny else ()), f"model.dtype={dtype}", f"train.steps={steps}"]
    # a group is refused where no rows are held out
    sources = range(0 if tiny else len(recipe.data.train))
    groups = [f"data.train.{number}.group_by=null" for number in sources]
    common += [*LOUD, *QUIET, *overrides, *groups, "parallel.allow_idle_ranks=true"]
    _train_all(recipe_file, common, hands, at, steps, work)
    start = _load_start(work / "without-a-break" / "recipe.yaml")
    resumed, control = (
        compare(work / "without-a-break", work / name, start) for name in ("handed-on", "control")
    )
    Console().print(_table(resumed, control, worlds, at, steps))
    print("resuming changes nothing" if resumed.agree else "RESUMING CHANGES THE RUN")
    noticed = "was noticed" if control.are_seen else "was NOT noticed, so nothing is proved"
    print(f"the control, whose first moments were lost at the first break, {noticed}")
    if keep:
        print(f"kept: {work}")
    else:
        shutil.rmtree(work)
    return resumed.agree and control.are_seen


def _hands(worlds: Sequence[int], sequences: Sequence[int] | None) -> list[tuple[int, list[str]]]:
    """Return each world size with its own overrides."""
    if sequences is None:
        return [(world, []) for world in worlds]
    if len(sequences) != len(worlds):
        raise BadInput("--sequence: give as many numbers as --worlds has")
    shares = [[f"parallel.sequence={size}"] for size in sequences]
    return list(zip(worlds, shares, strict=True))


def _train_all(
    recipe_file: Path,
    common: list[str],
    hands: Sequence[tuple[int, list[str]]],
    at: int,
    steps: int,
    work: Path,
) -> None:
    """Run the three into folders of `work`: without-a-break, handed-on and control."""

    def train(name: str, hand: tuple[int, list[str]], until: int) -> None:
        world, own = hand
        stop = [] if until == steps else [f"run.stop_after={until}"]
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        what = " ".join([f"{name}: {ranks}", *own, f"to step {until}"])
        changes = [*common, *own, *stop, f"run.dir={work / name}"]
        _train(recipe_file, changes, world, what, work / f"{name}.log")

    train("without-a-break", hands[0], steps)
    train("handed-on", hands[0], at)
    shutil.copytree(work / "handed-on", work / "control")
    lose_first_moments(work / "control")
    for name in ("handed-on", "control"):
        for number, hand in enumerate(hands[1:], 2):
            train(name, hand, steps if number == len(hands) else number * at)


def _train(recipe_file: Path, changes: list[str], world: int, what: str, log: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, MAIN, "train", "--nproc", str(world)]
    with log.open("ab") as out:
        code = subprocess.run(
            [*command, "--", str(recipe_file), *changes], stdout=out, stderr=out, check=False
        ).returncode
    if code not in (DONE, SAVED_RUN_AGAIN):
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BadInput(f"{what} ended with exit code {code}; the end of {log}:\n{end}")
    print(f"{what}: {time.monotonic() - started:.0f} s", file=sys.stderr)


def _load_start(recipe_file: Path) -> dict[str, torch.Tensor]:
    """Return the weights that training starts from, in float32, by name."""
    recipe = load_recipe(recipe_file, ["model.dtype=float32", "model.matmul=bf16"])
    tokenizer, seed = load_tokenizer(recipe.model), recipe.train.seed
    model: Any = load_model(recipe.model, tokenizer, seed=seed, adapter=recipe.adapter)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def lose_first_moments(run_dir: Path) -> None:
    """Rewrite a run's newest checkpoint with first moments of zero, and a manifest that agrees."""
    found = checkpoint.find(run_dir)
    assert found
    folder, manifest = found
    frozen = sharded_state.FROZEN
    digests = {key: value for key, value in manifest.digests.items() if key[1] == frozen}
    files = {}
    for name, file in manifest.files.items():
        tensors = load_file(folder / name)
        slices = []
        for parameter, start, stop in file.slices:
            prefix = sharded_state.key_of(parameter, start, stop, "")
            states = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            for first in {names[0] for names in MOMENTS.values()} & states.keys():
                states[first] = torch.zeros_like(states[first])
            slices.append(Slice(parameter, start, states))
        # Not overwritten: the tensors are memory-mapped from the old file.
        (folder / name).unlink()
        files[name], found_digests = sharded_state.write(folder / name, slices)
        add_digests(digests, found_digests)
    replace(manifest, files=files, digests=digests).write(folder)


# ---------------------------------------------------------------------------------------- comparing


def compare(a: Path, b: Path, start: dict[str, torch.Tensor]) -> Differences:
    """Compare two run folders of one recipe by their traces and their last checkpoints.

    Args:
        start: the weights that training started from, by name.
    """
    left, right = read_json_lines(a / "trace.jsonl"), read_json_lines(b / "trace.jsonl")
    if [line["step"] for line in left] != [line["step"] for line in right]:
        raise RuntimeError(f"{a} has {len(left)} steps in its trace, {b} has {len(right)}")
    pairs = list(zip(left, right, strict=True))
    (saved_a, _), (saved_b, _) = checkpoint.open_checkpoint(a), checkpoint.open_checkpoint(b)

    def largest(key: str) -> float:
        return max(abs(x[key] - y[key]) / abs(x[key]) for x, y in pairs)

    return Differences(
        rows=sum(x["documents"] != y["documents"] for x, y in pairs),
        groups=sum(x["groups"] != y["groups"] for x, y in pairs),
        loss=largest("train/loss"),
        norm=largest("train/grad_norm"),
        change=max(_compare_change(saved_a, saved_b, name, first) for name, first in start.items()),
    )


def _compare_change(a: Shards, b: Shards, name: str, start: torch.Tensor) -> float:
    """Return ||Da - Db|| / ||Da|| of a tensor's changes D since the start; 0 if it is not trained.

    Changes are compared, as the weights themselves would agree even if nothing was learned.
    """
    if name not in a.names:
        return 0.0
    left, right = a.whole(name).double() - start, b.whole(name).double() - start
    difference = (left - right).norm()
    # a tensor that no step has changed, in neither run, is equal
    return float(difference / left.norm()) if difference else 0.0


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
