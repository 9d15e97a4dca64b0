"""What a recipe may add to training is the same in every world, cut and stage, and is resumed.

Rates and frozen parameters by pattern, a moving average, an adapter that starts from another one,
rows of the embeddings, an early end. One rank at stage 0 with larger micro-batches equals two at
stages 1 to 3; two at stage 3 hand over to one at stage 2, and one at stage 1 to two at stage 3.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from packhorse.trainer.checkpoint.checkpoint import open_checkpoint
from packhorse.trainer.checkpoint.hf_export import export
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.model.load import load_model, load_tokenizer
from tests.numerics.compare import Run, case, difference, report, run_cases, start_weights
from tests.numerics.test_adapters import ROWS, tied_model
from tests.ranks import ROOT

pytestmark = pytest.mark.runs

STAGES = ("zero1", "zero2", "zero3")
OTHERS = (*STAGES, "shrunk", "grown")
BASE = ("model.name=BASE", "model.init=pretrained")
WITHOUT = {"plain": (), "adapter": ("adapter={rank: 4, alpha: 8}", *BASE)}
OPTIONS = {
    "groups": (r"optim.groups=[{match: lm_head, lr: 1e-3}, {match: layers\.0\., lr: 2e-2}]",),
    "freeze": (r"model.freeze=[embed_tokens, layers\.0\.]",),
    "average": ("optim.ema_decay=0.7",),
    "init_from": ("adapter={rank: 4, alpha: 8, init_from: EARLIER}", *BASE),
    "rows": (ROWS, *BASE),
    "tied rows": (ROWS, "model.name=TIED"),
}
# no answer of a random model is right, so that the first evaluation stays the best
EARLY = (
    *("eval.every_steps=1", "eval.early_stopping={metric: right, patience: 2}"),
    "eval.generate={num_prompts: 2, max_new_tokens: 2, scorers: {right: {kind: exact}}}",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model, one with a tied head, and an adapter of the first."""
    root = tmp_path_factory.mktemp("options")
    tied_model(root / "tied")
    section = load_recipe(ROOT / "recipes" / "debug.yaml", []).model
    tokenizer = load_tokenizer(section)
    model = load_model(section, tokenizer, seed=3)
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    learned = get_peft_model(model, config)
    for name, parameter in learned.named_parameters():
        if "lora_B" in name:  # as small as after some steps: rounding grows with the model's change
            parameter.data.mul_(0.1)
    learned.save_pretrained(str(root / "earlier"))
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Run]:
    one: list[dict[str, Any]] = []
    two: list[dict[str, Any]] = []
    then_one: list[dict[str, Any]] = []
    then_two: list[dict[str, Any]] = []

    def move(name: str, *keys: str, changes: tuple[str, ...] = ()) -> None:
        """Two ranks at stage 3 hand over to one at stage 2."""
        two.append({**case(root, name, "zero3", *keys), "stop_after": 3})
        then_one.append({**case(root, name, "zero2", *keys), "changes": list(changes)})

    for name, option in (WITHOUT | OPTIONS).items():
        keys = keys_of(root, option)
        one.append(case(root, f"{name}-1", "zero0", *keys, "batch.micro_batch_size=2"))
        if name in WITHOUT:
            continue
        two += [case(root, f"{name}-{stage}", stage, *keys) for stage in STAGES]
        move(f"{name}-shrunk", *keys)
        one.append({**case(root, f"{name}-grown", "zero1", *keys), "stop_after": 3})
        then_two.append(case(root, f"{name}-grown", "zero3", *keys))
    move("average-forgotten", *OPTIONS["average"], changes=("average_forgotten",))
    two.append(case(root, "early-3", "zero3", *EARLY))
    # stopped after the second evaluation of three
    move("early-shrunk", *EARLY)
    two[-1]["stop_after"] = 2
    return run_cases({1: one, 2: two}, {1: then_one, 2: then_two})


def keys_of(root: Path, option: tuple[str, ...]) -> list[str]:
    folders = {"BASE": "base", "TIED": "tied", "EARLIER": "earlier"}
    for word, folder in folders.items():
        option = tuple(key.replace(word, str(root / folder)) for key in option)
    return list(option)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_worlds_cuts_stages_and_resumes_change_nothing(
    runs: dict[str, Run], name: str, other: str
) -> None:
    """X2, X4, X7."""
    seen = difference(runs[f"{name}-1"], runs[f"{name}-{other}"])
    report(f"{name}, {other}", seen)
    assert seen.agrees


@pytest.mark.parametrize(
    ("without", "name"),
    [("plain", "groups"), ("plain", "freeze"), ("adapter", "init_from"), ("adapter", "rows")],
)
def test_each_of_them_acts(runs: dict[str, Run], without: str, name: str) -> None:
    """Control: a run that lost it on the way would be noticed."""
    a, b = runs[f"{without}-1"], runs[f"{name}-1"]
    shared = a.changes.keys() & b.changes.keys()
    seen = difference(*(replace(r, changes={n: r.changes[n] for n in shared}) for r in (a, b)))
    report(f"control, {name} against {without}", seen)
    assert seen.is_caught


def average_of(run: Run) -> Run:
    """Return the run with the average's change since the start in place of the weights'."""
    start, (saved, manifest) = start_weights(run.folder, {}), open_checkpoint(run.folder)
    changes = {name: saved.whole(name, "ema").double() - start[name] for name in manifest.trained}
    return replace(run, changes=changes)


@pytest.mark.parametrize("other", [*OTHERS, "forgotten"])
def test_an_average_is_the_same_everywhere_and_a_forgotten_one_is_caught(
    runs: dict[str, Run], other: str
) -> None:
    seen = difference(average_of(runs["average-1"]), average_of(runs[f"average-{other}"]))
    report(f"average, {other}", seen)
    assert seen.is_caught if other == "forgotten" else seen.agrees


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_frozen_is_exported_as_it_was(
    runs: dict[str, Run], tmp_path: Path, other: str
) -> None:
    run = runs[f"freeze-{other}"]
    recipe = load_recipe(run.folder / "recipe.yaml")
    model = load_model(recipe.model, load_tokenizer(recipe.model), seed=recipe.train.seed)
    exported = load_file(export(run.folder, tmp_path / "out") / "model.safetensors")
    same = {name for name, p in model.named_parameters() if torch.equal(exported[name], p)}
    assert same == {n for n in exported if "embed_tokens" in n or "layers.0." in n}
    assert same == exported.keys() - run.changes.keys()


def test_an_early_end_comes_at_the_same_step_after_a_move(runs: dict[str, Run]) -> None:
    whole, moved = runs["early-3"], runs["early-shrunk"]
    for run in (whole, moved):
        assert len(run.losses) == 3
        assert json.loads((run.folder / "summary.json").read_text())["steps"] == 3
    assert difference(whole, moved).agrees
