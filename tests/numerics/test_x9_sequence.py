"""A packed sequence on several ranks is learned as on one: X9 of docs/design.md.

Whole runs of recipes/debug.yaml in fp32, as in test_same_run.py, with its bounds and controls.
Packing is `wrapped` into sequences of 251 tokens, a prime, so that slices are uneven and cut
documents wherever they fall. A step has five sequences, so that of two groups one ends on a filler.
The model has four query heads and two key heads: four ranks repeat the keys, three gather them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.checkpoint.hf_export import export
from packhorse.trainer.utils.json_lines import read_json_lines
from tests.numerics.compare import Run, case, difference, report, run_cases
from tests.numerics.sequence_defects import DEFECTS
from tests.ranks import ROOT, run_ranks

UNEVEN = ("train.steps=5", "batch.seq_len=251", "data.packing=wrapped", "batch.global_batch_size=5")
APART = ("data.packing=none", "loss.weighting=example")
ANSWERS = (
    "eval.generate={num_prompts: 2, max_new_tokens: 6, scorers: {right: {kind: exact}}}",
    "run.trace=true",
)
LORA = ("adapter={rank: 4, alpha: 8}", "optim.lr=1e-2")
DORA = ("adapter={rank: 4, alpha: 8, variants: [dora]}", "optim.lr=1e-2")
NF4 = ("adapter={rank: 4, alpha: 8, base: nf4}", "optim.lr=1e-2")
SKIP, NAN = ("guard.non_finite=skip",), ["nan_in_the_third_step"]
PROFILE = "run.profile_steps=[2, 2]"


def other_model(root: Path, kind: str, architecture: str, **changes: Any) -> tuple[str, ...]:
    """Return overrides for a model of another kind and the same sizes."""
    folder = root / kind
    if not folder.exists():
        shutil.copytree(ROOT / "recipes" / "debug" / "model", folder)
        config = json.loads((folder / "config.json").read_text())
        changes |= {"model_type": kind, "architectures": [architecture]}
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return (f"model.name={folder}",)


def all_waves(root: Path) -> list[dict[int, list[dict[str, Any]]]]:
    """Return the cases by world size; later waves resume runs of the waves before."""

    def shared(name: str, sequence: int, stage: str, *more: str, **extra: Any) -> dict[str, Any]:
        overrides = (*UNEVEN, f"parallel.sequence={sequence}", "parallel.allow_idle_ranks=true")
        return case(root, name, stage, *overrides, *more, **extra)

    gather, ring = (f"parallel.sequence_kind={kind}" for kind in ("gather", "ring"))
    window = other_model(root, "mistral", "MistralForCausalLM", sliding_window=40)
    # soft caps, and a window in every second layer
    caps = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16, "sliding_window": 40}
    capped = other_model(root, "gemma2", "Gemma2ForCausalLM", **caps)
    full = "model.activation_checkpointing="
    first = {
        1: [
            shared("1", 1, "zero3", *ANSWERS),
            shared("1-window", 1, "zero3", *window),
            shared("1-lora", 1, "zero2", *LORA),
            shared("1-nf4", 1, "zero2", *NF4),
            shared("1-dora", 1, "zero2", *DORA),
            shared("1-skip", 1, "zero2", *SKIP, changes=NAN),
            shared("1-capped", 1, "zero2", *capped),
            shared("1-apart", 1, "zero2", *APART),
        ],
        2: [
            shared("2-zero1", 2, "zero1", full + "full"),
            shared("2-zero3", 2, "zero3", full + "selective"),
            shared("2-gather", 2, "zero3", gather),
            shared("2-ring", 2, "zero2", ring, PROFILE, changes=["short_zigzag"]),
            shared("2-window", 2, "zero3", "parallel.sequence_kind=ulysses", *window),
            shared("2-window-gather", 2, "zero1", gather, *window),
            shared("2-lora", 2, "zero3", *LORA),
            shared("2-nf4", 2, "zero2", *NF4),
            shared("2-dora", 2, "zero2", *DORA, ring),
            shared("2-skip", 2, "zero2", *SKIP, changes=NAN),
            shared("2-offload", 2, "zero3_offload_all"),
            shared("2-capped", 2, "zero3_offload_optimizer", *capped),
            shared("2-capped-ring", 2, "zero2", ring, *capped, changes=["short_zigzag"]),
            shared("resumed", 2, "zero3", stop_after=2),
            *(shared(f"2-{name}", 2, "zero3", changes=[name]) for name in DEFECTS),
            shared("2-mean_of_means", 2, "zero3", changes=["mean_of_means"]),
        ],
        3: [
            shared("3-zero3", 3, "zero3"),
            shared("3-ring", 3, "zero3", ring, full + "selective", changes=["short_zigzag"]),
        ],
        4: [
            shared("4-zero3", 4, "zero3"),
            shared("4-apart", 4, "zero2", *APART),
            shared("2x2-zero3", 2, "zero3", *ANSWERS),
        ],
    }
    return [
        first,
        {4: [shared("resumed", 4, "zero1", stop_after=2)]},
        {1: [shared("resumed", 1, "zero3")]},
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("runs")
    found = run_cases(*all_waves(root))
    files = [read_files(root / name) for name in ("1", "2x2-zero3")]
    assert files[0] == files[1], "rows are counted or named otherwise, or answers differ"
    skipped = [(root / name / "skipped_steps.jsonl").read_text() for name in ("1-skip", "2-skip")]
    assert skipped[0] == skipped[1], "the rows of a step that is not applied are named otherwise"
    assert list((root / "2-ring" / "profile").iterdir()), "no trace"
    # which compares what it has written with the checkpoint
    assert export(root / "2-lora", root / "exported", merge=True).exists()
    return found


def read_files(run_dir: Path) -> list[Any]:
    """Return what a run counted in each step, its documents, and its answers."""
    lines = read_json_lines(run_dir / "metrics.jsonl")
    keys = ("train/trained_tokens", "pack/fill")
    counted = [[round(line[key], 9) for key in keys] for line in lines if keys[0] in line]
    documents = [line["documents"] for line in read_json_lines(run_dir / "trace.jsonl")]
    answers = [line["answer"] for line in read_json_lines(run_dir / "samples.jsonl")]
    assert counted
    assert all(documents)
    assert any(answers)
    return [counted, documents, answers]


SAME = {
    "1": ["2-zero1", "2-zero3", "2-gather", "3-zero3", "4-zero3"],
    "1-window": ["2-window", "2-window-gather"],
    "1-lora": ["2-lora"],
    "1-nf4": ["2-nf4"],
    "1-dora": ["2-dora"],
    "1-skip": ["2-skip"],
    "1-capped": ["2-capped", "2-capped-ring"],
    "1-apart": ["4-apart"],
}
SAME["1"] += ["2-ring", "2-offload", "3-ring", "2x2-zero3", "resumed"]


@pytest.mark.parametrize(("alone", "other"), [(one, o) for one in SAME for o in SAME[one]])
def test_x9_ranks_that_share_a_sequence_learn_the_same(
    runs: dict[str, Run], alone: str, other: str
) -> None:
    seen = difference(runs[alone], runs[other])
    report(f"{alone} against {other}", seen)
    assert seen.agrees


@pytest.mark.parametrize("defect", [*DEFECTS, "mean_of_means"])
def test_x9_control_is_caught(runs: dict[str, Run], defect: str) -> None:
    seen = difference(runs["1"], runs[f"2-{defect}"])
    report(f"control {defect}", seen)
    assert seen.is_caught


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_exchange_is_attention_on_one_rank(world: int) -> None:
    """By each kind, with windows, soft caps, sinks and random lengths; see exchange.py."""
    ranks = [
        json.loads(output.splitlines()[-1])
        for output in run_ranks(world, ["-m", "tests.numerics.exchange"])
    ]
    # the last rank sees the most keys, and the planner counts those; what a ring gives is kept
    # once, and the planner counts a copy, too
    saved = [max(of_kind) for of_kind in zip(*(seen.pop("saved") for seen in ranks), strict=True)]
    assert saved == pytest.approx([1, 1, 0.95], rel=0.01), "not what is planned"
    for seen in ranks:
        assert seen.pop("cases") >= 50
        said = seen.pop("said")
        assert all("gives other states where a sequence is cut" in why for why in said), said
        assert "layer 0 (LlamaDecoderLayer)" in said[0]
        assert max(seen.values()) < 1e-6, seen
