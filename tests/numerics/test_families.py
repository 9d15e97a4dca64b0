"""Experts, a hybrid and a model with towers learn the same with each optimizer (X2, X3, X4, X7).

One rank at stage 0 with larger micro-batches equals two at stage 3, and two that hand over to one
at stage 2; with AdamW also two at stage 1. Tiny models, four steps. X1 is in test_x1_packed.py;
AdamW on every architecture, in tests/models.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from packhorse.trainer.checkpoint.checkpoint import open_checkpoint
from packhorse.trainer.checkpoint.hf_export import export
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.model.load import load_model, load_tokenizer, model_class
from packhorse.trainer.model.lora import merged_weights
from tests.model_helpers import relative
from tests.models import listed_experts
from tests.models.shrunk import config_of
from tests.numerics.compare import (
    BF16_CHANGE_BOUND,
    Run,
    case,
    difference,
    is_same,
    report,
    run_cases,
)
from tests.numerics.test_optimizers import CHOSEN, agrees
from tests.ranks import ROOT
from tests.runs.test_export_kinds import make_gemma

pytestmark = pytest.mark.runs

COMMON = ("train.steps=4", "batch.seq_len=128", "model.init=pretrained", "optim.weight_decay=0.5")
FAMILIES = {
    "experts": ("gpt_oss", {}),
    "sparse": ("gpt_oss", {"num_local_experts": 32}),  # a step's tokens leave some of them idle
    "hybrid": ("lfm2", {}),
    "towers": ("gemma3", {}),
    "mixture": ("qwen3_moe", {"moe_intermediate_size": 64}),  # rows of whole blocks
    "listed": ("listed_experts", {}),  # by code beside its weights; it calls some experts only
}
# Adapters on experts, and experts in 4 and 8 bits: gpt-oss's have biases, and inputs first. With
# the stages at which two ranks run them.
_ALL = "target_modules: [q_proj], target_parameters: all-experts"
ADAPTERS = {
    "adapter": ("experts", f"{_ALL}, trainable_token_indices: [4, 223]", ("zero1", "zero2")),
    "nf4": ("experts", f"{_ALL}, base: nf4_double_quant", ("zero1", "zero3")),
    "frozen-nf4": ("mixture", "target_modules: [q_proj], base: nf4", ("zero2", "zero3")),
    "int8": (
        "mixture",
        "target_modules: [q_proj], target_parameters: [experts.down_proj], base: int8",
        ("zero3",),
    ),
    # no input of the first layer's experts needs a gradient
    "list": ("listed", "target_modules: [down_proj]", ("zero2", "zero3")),
    "list-nf4": ("listed", "target_modules: all-linear, base: nf4", ("zero3",)),
}
RESUMED = {"nf4": "selective", "list": "full", "list-nf4": "full"}  # and how they recompute
KINDS = {"adamw": (), **CHOSEN}


def stages_of(kind: str) -> tuple[str, ...]:
    """Return the stages of two ranks; stage 1 shares its code with 2, which goes on for 3."""
    return ("zero1", "zero3") if kind == "adamw" else ("zero3",)


CASES = [
    *((family, kind) for family in ("experts", "hybrid", "towers") for kind in KINDS),
    *(("sparse", kind) for kind in ("adamw", "lion")),
    *(("listed", kind) for kind in ("adamw", "lion")),
]
CONTROLS = [
    *(
        (family, control, kind)
        for family, control in (
            *(("sparse", "stale_expert_gradients"), ("experts", "router_bias_decayed")),
            ("towers", "towers_trained"),
        )
        for kind in ("adamw", "lion")
    ),
    *(("listed", "idle_lists_get_the_last_gradient", kind) for kind in ("adamw", "lion")),
]


def make(folder: Path, model_type: str, sizes: dict[str, Any]) -> None:
    shutil.copytree(ROOT / "recipes" / "debug" / "model", folder)
    torch.manual_seed(0)
    if model_type == "gemma3":
        make_gemma(folder)
    elif model_type == "listed_experts":
        make_listed(folder)
    else:
        config = config_of(model_type)
        config.update(sizes)
        model_class(config).from_config(config, dtype=torch.float32).save_pretrained(folder)


def make_listed(folder: Path) -> None:
    """Save a model with its code, as the hub has it."""
    config = LlamaConfig.from_pretrained(folder)
    model = listed_experts.ListedForCausalLM(
        listed_experts.ListedConfig(**{**config.to_dict(), "initializer_range": 0.1})
    )
    model.save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "auto_map": listed_experts.PLACES}))
    shutil.copy(listed_experts.__file__, folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family, (model_type, sizes) in FAMILIES.items():
        make(root / "models" / family, model_type, sizes)
    return root


def keys_of(root: Path, family: str, kind: str) -> list[str]:
    chosen = [key for key in KINDS[kind] if "optim.groups" not in key]
    own_code = ["model.trust_remote_code=true", "batch.global_batch_size=2"]
    more = own_code if family == "listed" else []
    if kind == "lion":  # its updates are told from the momenta of all steps
        more = [*more, "checkpoint.every_steps=1"]
    return [*COMMON, f"model.name={root / 'models' / family}", *chosen, *more]


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Run]:
    one: list[dict[str, Any]] = []
    two: list[dict[str, Any]] = []
    for family, kind in CASES:
        keys = keys_of(root, family, kind)
        cut = (*keys, "batch.micro_batch_size=2")
        one.append(case(root, f"{family}-{kind}-1", "zero0", *cut))
        two += [case(root, f"{family}-{kind}-{s}", s, *keys) for s in stages_of(kind)]
        resumed = case(root, f"{family}-{kind}-resumed", "zero3", *keys)
        moved = case(root, f"{family}-{kind}-moved", "zero3", *keys)
        two += [{**resumed, "stop_after": 2}, resumed, {**moved, "stop_after": 2}]
        one.append(case(root, f"{family}-{kind}-moved", "zero2", *keys))
    bf16 = [*keys_of(root, "listed", "adamw"), "model.dtype=bfloat16", "batch.global_batch_size=4"]
    two += [case(root, f"listed-bf16-{s}", s, *bf16) for s in ("zero1", "zero2", "zero3")]
    for family, control, kind in CONTROLS:
        keys = keys_of(root, family, kind)
        # stage 2 has a gradient of zero, and decay, where stage 0 has none
        stage = "zero2" if family == "towers" else "zero0"
        one.append(case(root, f"{family}-{kind}-{control}", stage, *keys, changes=[control]))
    for name, (family, adapter, stages) in ADAPTERS.items():
        keys = [*keys_of(root, family, "adamw"), f"adapter={{rank: 4, {adapter}}}"]
        one.append(case(root, f"{name}-1", "zero0", *keys))
        two += [case(root, f"{name}-{stage}", stage, *keys) for stage in stages]
        moved = case(root, f"{name}-moved", "zero3", *keys)
        two.append({**moved, "stop_after": 2})
        one.append(case(root, f"{name}-moved", "zero2", *keys))
        if name in RESUMED:
            resumed = case(root, f"{name}-resumed", "zero3", *keys)
            two += [{**resumed, "stop_after": 2}, resumed]
            recomputed = (*keys, f"model.activation_checkpointing={RESUMED[name]}")
            two.append(case(root, f"{name}-recomputed", "zero3", *recomputed))
        if name == "nf4":
            one.append(case(root, "nf4-unpacked", "zero0", *keys, changes=["experts_unpacked"]))
    return run_cases({2: two}, {1: one}, timeout_s=1500)


def told_apart(kind: str, a: Run, b: Run) -> tuple[Run, Run]:
    """Return two runs; with Lion without the elements whose update's sign no sum of floats tells.

    Lion moves a weight by a whole step however small its momentum is. Of `listed` one element's
    cancels to 1e-8 of its tensor's, which worlds round to either side of zero, and the next step
    has no token for its expert. An element that differs with a larger momentum stays in.
    """
    if kind != "lion":
        return a, b
    left_out = total = 0
    changes = [dict(a.changes), dict(b.changes)]
    moments = [[momenta(run, step) for step in range(5)] for run in (a, b)]
    for name in moments[0][4]:
        unknown = torch.zeros(a.changes[name].shape, dtype=torch.bool)
        for step in range(1, 5):
            # from m' = 0.95 m + 0.05 g, the update is the sign of 0.9 m + 0.1 g
            updates = [2 * m[step][name] - m[step - 1][name] for m in moments]
            least = 1e-6 * max(m[step][name].square().mean().sqrt() for m in moments)
            unknown |= (updates[0].sign() != updates[1].sign()) & (
                torch.stack(updates).abs().amax(0) <= least
            )
        left_out, total = left_out + int(unknown.sum()), total + unknown.numel()
        for kept, run in zip(changes, (a, b), strict=True):
            kept[name] = run.changes[name].masked_fill(unknown, 0)
    print(f"\n  Lion: {left_out} of {total} elements have no sign", end="")
    assert left_out <= 1e-5 * total
    return replace(a, changes=changes[0]), replace(b, changes=changes[1])


def momenta(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Return Lion's momenta after a step, in float64; zeros after none."""
    saved, manifest = open_checkpoint(run.folder, step or 1)
    return {n: saved.whole(n, "exp_avg").double() * bool(step) for n in manifest.trained}


@pytest.mark.parametrize(
    ("family", "kind", "other"),
    [(family, kind, other) for family, kind in CASES for other in (*stages_of(kind), "moved")],
)
def test_worlds_cuts_stages_and_resumes_change_nothing(
    runs: dict[str, Run], family: str, kind: str, other: str
) -> None:
    """X2, X4, X7."""
    seen = difference(
        *told_apart(kind, runs[f"{family}-{kind}-1"], runs[f"{family}-{kind}-{other}"])
    )
    report(f"{family}, {kind}, {other}", seen)
    assert agrees(kind, seen)


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_ranks_clip_and_sum_gradients_that_only_some_of_them_have(
    runs: dict[str, Run], stage: str
) -> None:
    """In bf16 stage 1 is a class of its own in DeepSpeed; two micro-batches a rank."""
    seen = difference(runs["listed-bf16-zero3"], runs[f"listed-bf16-{stage}"])
    report(f"listed in bf16, {stage}", seen)
    assert seen.change <= BF16_CHANGE_BOUND


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_x3_a_resumed_run_is_one_never_stopped(
    runs: dict[str, Run], family: str, kind: str
) -> None:
    assert is_same(runs[f"{family}-{kind}-zero3"], runs[f"{family}-{kind}-resumed"])


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_an_export_acts_as_what_was_trained(
    runs: dict[str, Run], root: Path, family: str, kind: str
) -> None:
    """In plain transformers; what a text does not train is bit by bit the source's."""
    source, run = root / "models" / family, runs[f"{family}-{kind}-moved"].folder
    saved, manifest = open_checkpoint(run)
    trusted = {"trust_remote_code": family == "listed"}
    trained, exported = (
        model_class(AutoConfig.from_pretrained(f, **trusted)).from_pretrained(f, **trusted)
        for f in (source, export(run, root / "exports" / f"{family}-{kind}"))
    )
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    trained.load_state_dict({name: saved.whole(name) for name in saved.names}, strict=False)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        logits = [m.eval()(input_ids=ids, use_cache=False).logits for m in (trained, exported)]
    assert torch.equal(*logits)
    frozen = {n for n, p in exported.named_parameters() if torch.equal(p, before[n])}
    assert frozen == before.keys() - manifest.trained


@pytest.mark.parametrize(("family", "control", "kind"), CONTROLS)
def test_controls_are_caught(runs: dict[str, Run], family: str, control: str, kind: str) -> None:
    plain, changed = runs[f"{family}-{kind}-1"], runs[f"{family}-{kind}-{control}"]
    if control == "towers_trained":
        assert not any("vision" in name for name in plain.changes)
        assert any("vision" in n and c.norm() > 0 for n, c in changed.changes.items())
        return
    seen = difference(*told_apart(kind, plain, changed))
    report(f"{family}, {kind}, control {control}", seen)
    assert seen.is_caught


@pytest.mark.parametrize(
    ("name", "other"),
    [(name, other) for name in ADAPTERS for other in (*ADAPTERS[name][2], "moved")]
    + [(name, "recomputed") for name in RESUMED],
)
def test_an_adapter_of_experts_learns_the_same_everywhere(
    runs: dict[str, Run], name: str, other: str
) -> None:
    seen = difference(runs[f"{name}-1"], runs[f"{name}-{other}"])
    report(f"adapter of experts, {name}, {other}", seen)
    assert seen.agrees
    adapted = re.compile(r"experts\.(\d+\.\w+\.)?lora_B")
    experts = [part for part in runs[f"{name}-1"].changes if adapted.search(part)]
    assert bool(experts) == (name != "frozen-nf4")


@pytest.mark.parametrize("name", RESUMED)
def test_x3_an_adapter_of_experts_resumes_bit_by_bit(runs: dict[str, Run], name: str) -> None:
    assert is_same(runs[f"{name}-zero3"], runs[f"{name}-resumed"])


def test_control_experts_that_are_not_packed_are_caught(runs: dict[str, Run]) -> None:
    seen = difference(runs["nf4-1"], runs["nf4-unpacked"])
    report("control, experts not packed", seen)
    assert seen.is_caught


@pytest.mark.parametrize("name", ["adapter", "nf4", "int8", "list", "list-nf4"])
def test_an_adapter_of_experts_is_exported(runs: dict[str, Run], root: Path, name: str) -> None:
    """Merged, and alone: on the base that it was trained on, peft's own code gives its logits."""
    run = runs[f"{name}-moved"].folder
    # the export itself compares the logits of what it wrote
    merged, alone = (export(run, root / f"{name}-{m}", merge=m) for m in (True, False))
    if name == "adapter":
        before, after = (
            load_file(folder / "model.safetensors") for folder in (root / "models/experts", merged)
        )
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {re.sub(r"^model\.(layers\.\d+\.)?", "", name) for name in moved} == {
            *("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"),
            "embed_tokens.weight",
        }
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.adapter
    model = load_model(recipe.model, load_tokenizer(recipe.model), seed=0, adapter=recipe.adapter)
    base, whole = (
        AutoModelForCausalLM.from_pretrained(f, trust_remote_code=recipe.model.trust_remote_code)
        for f in (recipe.model.name, merged)
    )
    base.load_state_dict(dict(merged_weights(model)))  # B is zero
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        expected, found = (
            m.eval()(input_ids=ids, use_cache=False).logits
            for m in (whole, PeftModel.from_pretrained(base, str(alone)))
        )
    assert relative(found, expected) < 1e-5
