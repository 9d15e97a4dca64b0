"""FLOPs by hand, the clock, and a log that reads as if the run had never been stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.trainer.datatypes import StepPlan, StepResult
from packhorse.trainer.metrics import EVALUATIONS, Clock, Metrics, ModelFlops, model_flops
from packhorse.trainer.trackers import Trackers
from packhorse.trainer.utils.json_lines import read_json_lines
from packhorse.trainer.utils.progress import _clock
from tests.model_helpers import pack

REST: dict[str, dict[str, Any]] = {  # what a line has beside its step
    "samples.jsonl": {"prompt": "", "answer": "", "reference": "", "scores": {}},
    EVALUATIONS: {"eval_loss": 1.5, "metrics": {}},
}
H, LAYERS, HEADS, GROUPS, INNER, VOCABULARY = 16, 3, 4, 2, 40, 50


@pytest.fixture
def flops() -> ModelFlops:
    config = LlamaConfig(
        hidden_size=H,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
    )
    return model_flops(LlamaForCausalLM(config))


def test_weights_and_channels_are_counted_as_by_hand(flops: ModelFlops) -> None:
    attention = 2 * H * H + 2 * H * (H * GROUPS // HEADS)
    norms = LAYERS * 2 * H + H
    assert flops.body_weights == LAYERS * (attention + 3 * H * INNER) + norms
    assert flops.head_weights == H * VOCABULARY
    assert flops.attention_channels == LAYERS * H


def test_attention_counts_pairs_inside_documents_only(flops: ModelFlops) -> None:
    """Forward 2 x 2 products over half of L^2 pairs, backward twice that: 6 L^2 a channel."""
    batch = pack([torch.arange(5), torch.arange(7)], [[0, 1], [3]], [1.0, 1.0])
    expected = 6 * (
        flops.body_weights * 12 + flops.head_weights * 3 + flops.attention_channels * (25 + 49)
    )
    assert flops.of(batch) == expected


def test_the_clock_adds_up_parts_and_starts_anew() -> None:
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock.part("forward"):
            pass
    assert clock.read()["forward"] > 0
    assert clock.read() == {}


def log(
    run_dir: Path, flops: ModelFlops, resumed_at: int, last: int, steps: int = 4
) -> list[dict[str, Any]]:
    """Run the log from step `resumed_at` to `last`, with the evaluations that a run makes."""
    metrics = Metrics(
        run_dir,
        log_every=1,
        seq_len=16,
        flops=flops,
        resumed_at=resumed_at,
        beat=lambda part: None,
        trackers=Trackers([]),
    )
    if resumed_at == 0:
        metrics.write(0, {"eval/loss": 9.0})
    batch = pack([torch.arange(5), torch.arange(7)], [[0, 1], [3]], [1.0, 1.0])
    for step in range(resumed_at, last):
        metrics.begin_step()
        result = StepResult(torch.tensor(float(step)), grad_norm=1.0)
        metrics.step(StepPlan(step, 0, ((0,),), 3, 2), result, [batch], 1e-3)
    if last == steps:
        metrics.write(steps, {"eval/loss": 1.0})
    metrics.close()
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_the_names_that_the_design_promises(tmp_path: Path, flops: ModelFlops) -> None:
    line = log(tmp_path, flops, 0, 1)[1]
    promised = {
        "step",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/trained_tokens",
        "perf/tokens_per_s",
    }
    promised |= {
        "perf/trained_tokens_per_s",
        "perf/filler_share",
        "perf/step_s",
        "perf/data_s",
        "perf/forward_s",
    }
    assert (
        promised | {"perf/backward_s", "perf/optimizer_s", "perf/checkpoint_s", "pack/fill"}
        <= line.keys()
    )
    assert line["step"] == 1
    assert line["train/trained_tokens"] == 3
    assert line["pack/fill"] == 12 / 16
    assert (tmp_path / "tensorboard").is_dir()


@pytest.mark.parametrize(
    ("saved_at", "killed_at"), [(0, 1), (0, 4), (1, 1), (1, 3), (3, 3), (3, 4)]
)
def test_a_killed_run_that_goes_on_leaves_one_line_a_step(
    tmp_path: Path, flops: ModelFlops, killed_at: int, saved_at: int
) -> None:
    log(tmp_path, flops, 0, killed_at)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')  # half a line
    lines = log(tmp_path, flops, saved_at, 4)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    "damaged", [b"{", b"\xff\xfe\x00", b"null", b'{"loss": 1}', b'{"step": "2"}', b"[" * 100_000]
)
def test_a_damaged_line_costs_no_other_line_and_is_set_aside(
    tmp_path: Path, flops: ModelFlops, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    log(tmp_path, flops, 0, 4)
    names = ("metrics.jsonl", "trace.jsonl", "samples.jsonl", EVALUATIONS)
    for name in names:
        lines = [json.dumps({"step": n, **REST.get(name, {})}).encode() for n in (1, 2, 9)]
        lines[1:1] = [damaged]
        (tmp_path / name).write_bytes(b"\n".join([*lines, b'{"step": 2, "to']))
    with caplog.at_level("WARNING", "packhorse"):
        log(tmp_path, flops, 4, 4)
    for name in names:
        kept = [line["step"] for line in read_json_lines(tmp_path / name)]
        assert kept[:2] == [1, 2]
        assert 9 not in kept
        assert (tmp_path / f"{name}.damaged").read_bytes() == damaged + b"\n"
        assert f"{name}: 1 damaged lines are set aside in {name}.damaged" in caplog.text


def test_an_answer_with_a_line_separator_in_it_is_one_line(
    tmp_path: Path, flops: ModelFlops
) -> None:
    line = {"step": 1, **REST["samples.jsonl"], "answer": "a\u2028b"}
    text = json.dumps(line, ensure_ascii=False) + "\n"
    (tmp_path / "samples.jsonl").write_text(text, encoding="utf-8")
    log(tmp_path, flops, 2, 3)
    assert read_json_lines(tmp_path / "samples.jsonl") == [line]


@pytest.mark.parametrize(
    ("recorded", "left"), [([0, 2], [0, 2, 2]), ([0], [0, 2]), ([0, 2, 4], [0, 2, 2])]
)
def test_an_evaluation_that_did_not_end_leaves_nothing(
    tmp_path: Path, flops: ModelFlops, recorded: list[int], left: list[int]
) -> None:
    """One that ended stays, unless its step is trained again."""
    samples = [{"step": step, **REST["samples.jsonl"]} for step in (0, 2)]
    logged = [
        {"step": 0, "eval/loss": 9.0},
        {"step": 2, "train/loss": 5.0},
        {"step": 2, "eval/loss": 4.0},
    ]
    for name, lines in {
        "samples.jsonl": samples,
        "metrics.jsonl": logged,
        EVALUATIONS: [{"step": step, **REST[EVALUATIONS]} for step in recorded],
    }.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    log(tmp_path, flops, 2, 2)
    assert [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == left
    assert [line["step"] for line in read_json_lines(tmp_path / "samples.jsonl")] == sorted(
        set(recorded) & {0, 2}
    )
    assert [line["step"] for line in read_json_lines(tmp_path / EVALUATIONS)] == sorted(
        set(recorded) & {0, 2}
    )


def test_time_to_go_is_a_clock() -> None:
    assert [_clock(s) for s in (5, 65, 3700)] == ["0:00:05", "0:01:05", "1:01:40"]
