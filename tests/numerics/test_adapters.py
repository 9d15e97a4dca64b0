"""World size, stage, activation checkpointing and resumes do not change what LoRA and QLoRA learn.

The bounds are those of test_same_run.py and test_x4_any_world.py. Adapters have rank 4 beside every
linear module, dropout, and a head that is trained whole. The base is frozen, and its digests are
checked at every resume.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.trainer.checkpoint import checkpoint
from tests.numerics.compare import (
    BF16,
    BF16_CHANGE_BOUND,
    Run,
    case,
    difference,
    is_same,
    report,
    run_cases,
)
from tests.ranks import ROOT

pytestmark = pytest.mark.runs

LORA = "adapter={rank: 4, alpha: 16, dropout: 0.1, modules_to_save: [lm_head]}"
DORA = "adapter={rank: 4, alpha: 16, variants: [dora], dropout: 0.1}"
INT8 = "adapter={rank: 4, alpha: 16, base: int8}"
NF4 = "adapter={rank: 4, alpha: 16, base: nf4_double_quant}"
ROWS = "adapter={rank: 4, alpha: 16, trainable_token_indices: [4, 223]}"
STAGES = ("zero0", "zero2", "zero3", "zero3_offload_optimizer")


def tied_model(folder: Path) -> Path:
    """Write a small model whose head shares the embeddings."""
    shutil.copytree(ROOT / "recipes" / "debug" / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def all_cases(
    root: Path,
) -> tuple[dict[int, list[dict[str, Any]]], dict[int, list[dict[str, Any]]]]:
    """Return the cases of each world size, and those that resume them at another."""
    recompute, selective = (f"model.activation_checkpointing={m}" for m in ("full", "selective"))

    rows = (ROWS, f"model.name={tied_model(root / 'tied')}")

    def moved(name: str, stage: str, *overrides: str, **extra: Any) -> dict[str, Any]:
        return case(root, name, stage, *overrides, "parallel.allow_idle_ranks=true", **extra)

    first = {
        1: [
            case(root, "1-zero0", "zero0", LORA),
            case(root, "1-zero3", "zero3", LORA),
            case(root, "1-rows-zero0", "zero0", *rows),
            case(root, "1-dora-zero0", "zero0", DORA),
            case(root, "1-nf4-zero0", "zero0", NF4),
            case(root, "1-int8-zero0", "zero0", INT8),
            case(root, "1-bf16", "zero3", LORA, *BF16),
            moved("1-to-3", "zero3", LORA, stop_after=3),
        ],
        2: [
            *(case(root, f"2-{stage}", stage, LORA) for stage in STAGES),
            case(root, "2-recompute", "zero3", LORA, recompute),
            case(root, "2-resumed", "zero3", LORA, stop_after=3),
            case(root, "2-resumed", "zero3", LORA),
            case(root, "2-other-alpha", "zero2", LORA.replace("16", "17")),
            *(case(root, f"2-rows-{stage}", stage, *rows) for stage in ("zero2", "zero3")),
            case(root, "2-dora-zero2", "zero2", DORA),
            case(root, "2-dora-zero3", "zero3", DORA),
            case(root, "2-dora-recompute", "zero3", DORA, selective),
            case(root, "2-nf4-zero2", "zero2", NF4),
            case(root, "2-nf4-recompute", "zero2", NF4, recompute),
            case(root, "2-int8-zero2", "zero2", INT8, recompute),
            case(root, "2-int8-zero3", "zero3", INT8),
            *(case(root, f"2-nf4-{stage}", stage, NF4) for stage in ("zero3", "zero3_offload_all")),
            case(root, "2-bf16", "zero3", LORA, *BF16),
            moved("bf16-2-to-1", "zero3", LORA, *BF16, stop_after=3),
            moved("2-to-1", "zero3", LORA, stop_after=3),
            moved("zero3-to-zero1", "zero3", LORA, stop_after=3),
            moved("moment-zeroed", "zero3", LORA, stop_after=3),
            moved("nf4-2-to-1", "zero3", NF4, stop_after=3),
        ],
    }
    then = {
        1: [
            moved("2-to-1", "zero3", LORA),
            moved("bf16-2-to-1", "zero3", LORA, *BF16),
            moved("moment-zeroed", "zero3", LORA, changes=["moment_zeroed"]),
            moved("nf4-2-to-1", "zero1", NF4),
        ],
        3: [
            case(root, "3-zero3", "zero3", LORA),
            moved("1-to-3", "zero3", LORA),
            moved("zero3-to-zero1", "zero1", LORA),
        ],
    }
    return first, then


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Run]:
    return run_cases(*all_cases(root))


def require_agreement(runs: dict[str, Run], one: str, other: str) -> None:
    seen = difference(runs[one], runs[other])
    report(f"{one} against {other}", seen)
    assert seen.agrees


@pytest.mark.parametrize("other", ["1-zero3", *(f"2-{stage}" for stage in STAGES), "3-zero3"])
def test_lora_is_the_same_in_every_world_and_stage(runs: dict[str, Run], other: str) -> None:
    require_agreement(runs, "1-zero0", other)


def test_lora_is_the_same_with_activation_checkpointing(runs: dict[str, Run]) -> None:
    require_agreement(runs, "1-zero0", "2-recompute")


@pytest.mark.parametrize("other", ["2-rows-zero2", "2-rows-zero3"])
def test_token_rows_of_a_tied_head_are_the_same_in_every_world_and_stage(
    runs: dict[str, Run], other: str
) -> None:
    require_agreement(runs, "1-rows-zero0", other)


@pytest.mark.parametrize("other", ["2-dora-zero2", "2-dora-zero3", "2-dora-recompute"])
def test_dora_is_the_same_in_every_world_and_stage(runs: dict[str, Run], other: str) -> None:
    require_agreement(runs, "1-dora-zero0", other)


@pytest.mark.parametrize("other", ["zero2", "recompute", "zero3", "zero3_offload_all"])
def test_qlora_is_the_same_in_every_world_and_stage(runs: dict[str, Run], other: str) -> None:
    require_agreement(runs, "1-nf4-zero0", f"2-nf4-{other}")


@pytest.mark.parametrize("other", ["2-bf16", "bf16-2-to-1"])
def test_bf16_with_fp32_master_weights_stays_within_the_tolerance(
    runs: dict[str, Run], other: str
) -> None:
    """This is X8, and X4 once."""
    seen = difference(runs["1-bf16"], runs[other])
    report(f"1-bf16 against {other}", seen)
    assert seen.change <= BF16_CHANGE_BOUND


def test_x3_a_resumed_run_is_one_never_stopped(runs: dict[str, Run]) -> None:
    """They are equal bit by bit, at the same world size."""
    assert is_same(runs["2-zero3"], runs["2-resumed"])


@pytest.mark.parametrize("moved", ["2-to-1", "1-to-3", "zero3-to-zero1"])
def test_x4_a_run_resumed_by_another_world_or_stage_is_one_never_stopped(
    runs: dict[str, Run], moved: str
) -> None:
    require_agreement(runs, "2-zero3", moved)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_base_of_8_bits_learns_the_same(runs: dict[str, Run], stage: str) -> None:
    require_agreement(runs, "1-int8-zero0", f"2-int8-{stage}")


def test_x4_holds_for_qlora(runs: dict[str, Run]) -> None:
    """Shards of packed bytes and whole ones have one digest."""
    require_agreement(runs, "2-nf4-zero2", "nf4-2-to-1")


@pytest.mark.parametrize(
    "defect", ["2-other-alpha", "moment-zeroed", "2-dora-zero2", "2-nf4-zero2"]
)
def test_control_another_adapter_or_a_lost_moment_is_caught(
    runs: dict[str, Run], defect: str
) -> None:
    a, b = runs["2-zero3"], runs[defect]
    shared = a.changes.keys() & b.changes.keys()
    alike = [
        Run(r.losses, r.norms, r.eval_losses, {name: r.changes[name] for name in shared})
        for r in (a, b)
    ]
    seen = difference(*alike)
    report(f"control {defect}", seen)
    assert seen.is_caught


@pytest.mark.parametrize("name", ["1-zero0", "1-dora-zero0", "1-nf4-zero0"])
def test_every_trained_weight_changes_and_the_loss_falls(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert all(change.any() for change in run.changes.values())
    assert run.eval_losses[-1] < run.eval_losses[0]


def test_a_checkpoint_holds_the_adapter_and_the_bases_digests(
    runs: dict[str, Run], root: Path
) -> None:
    saved, manifest = checkpoint.open_checkpoint(root / "2-nf4-zero2")
    assert all(".lora_" in name for name in saved.names)
    assert all(saved.whole(name).any() for name in saved.names), "an adapter is empty"
    size = sum(file.bytes for file in manifest.files.values())
    state = 12 * sum(torch.Size(shape).numel() for shape in manifest.shapes.values())
    assert state < size < 1.5 * state + 100_000
    frozen = {name for name, state in manifest.digests if state == "frozen"}
    quantised = "model.layers.0.mlp.up_proj.base_layer.weight"
    assert {
        quantised,
        f"{quantised}.absmax",
        f"{quantised}.nested_absmax",
        "lm_head.weight",
    } <= frozen
