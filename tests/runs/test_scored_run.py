"""A run on two ranks scores its answers by every scorer, one judge of which is down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.utils.json_lines import read_json_lines
from tests.judge_server import JudgeServer
from tests.ranks import ROOT

pytestmark = pytest.mark.runs

FUNCTION = """
def has_row(prompt, answer, reference, row):
    asked = row["letter"] in "AB" and prompt.endswith("assistant\\n")
    return (asked and row["answer"] == reference) / 2
"""
DOWN = "http://127.0.0.1:9/v1"  # the discard port, where nothing listens


def train(folder: Path, scorers: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    rows = [
        {"question": f"{n} + 1?", "answer": f"<answer>{n + 1}</answer>", "letter": "AB"[n % 2]}
        for n in range(5)
    ]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores_of_mine.py").write_text(FUNCTION)
    (folder / "schema.json").write_text('{"type": "object"}')
    overrides = {
        "run.dir": str(folder / "run"),
        "data.cache": str(folder / "cache"),
        "data.eval": [{"path": str(folder / "eval.jsonl")}],
        "train.steps": 2,
        "eval.generate": {"num_prompts": 5, "max_new_tokens": 4, "scorers": scorers},
    }
    command = [
        sys.executable,
        "-m",
        "packhorse",
        "train",
        "recipes/debug.yaml",
        "--nproc",
        "2",
    ]
    return subprocess.run(
        [*command, *(f"{key}={json.dumps(value)}" for key, value in overrides.items())],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def judge(url: str) -> dict[str, Any]:
    # only the time limit of a judge that is up must leave room for a busy machine
    server = {"url": url, "model": "m", "timeout_s": 0.4 if url == DOWN else 60}
    return {"kind": "judge", "rubric": "Right.", "against": "reference", **server}


def test_every_scorer_becomes_a_metric_except_a_judge_that_is_down(tmp_path: Path) -> None:
    with JudgeServer(lambda text: "Better: A") as server:
        scorers = {
            "shape": {"kind": "format", "pattern": ".*"},
            "same": {"kind": "exact", "extract": "<answer>(.*)</answer>"},
            "holds": {"kind": "contains"},
            "value": {"kind": "math"},
            "letter": {"kind": "choice", "letters": ["A", "B"], "column": "letter"},
            "json": {"kind": "json_schema", "file": str(tmp_path / "schema.json")},
            "polite": {"kind": "refusal", "expected": False},
            "mine": {"kind": "function", "function": "scores_of_mine:has_row"},
            "wins": judge(server.url),
            "lost": judge(DOWN),
        }
        done = train(tmp_path, scorers)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    evaluations = read_json_lines(run / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2]
    for line in evaluations:
        found = line["metrics"]
        assert list(found) == list(scorers)
        assert all(found[name]["count"] == 5 for name in scorers if name != "lost")
        assert [found[name]["value"] for name in ("shape", "json", "polite", "mine", "wins")] == [
            1,
            0,
            1,
            0.5,
            0.5,
        ]
        assert all(
            m["low"] <= m["value"] <= m["high"] for name, m in found.items() if name != "lost"
        )
        assert (found["lost"]["value"], found["lost"]["count"]) == (None, 0)
        assert f"the server at {DOWN} does not answer" in found["lost"]["missing"]
    assert done.stderr.count("lost (judge): 5 of 5 answers have no score") == 2, (
        "once an evaluation"
    )
    logged = [line for line in read_json_lines(run / "metrics.jsonl") if "eval/loss" in line]
    assert [set(line) & {"eval/wins", "eval/lost"} for line in logged] == [{"eval/wins"}] * 2
    samples = read_json_lines(run / "samples.jsonl")
    assert len(samples) == 10
    assert all(
        sample["scores"]["lost"] is None and "lost" in sample["unscored"] for sample in samples
    )
    assert texts(run) == 2


def texts(run: Path) -> int:
    """Return how often samples were written to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return len(events.Tensors("samples/text_summary"))


def test_a_scorer_that_can_score_nothing_is_refused_before_training(tmp_path: Path) -> None:
    done = train(tmp_path, {"value": {"kind": "math", "column": "solution"}})
    assert done.returncode == 2, done.stderr
    assert (
        "eval.generate.scorers.value (math): none of the 5 held-out prompts can be scored"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert read_json_lines(tmp_path / "run" / "metrics.jsonl") == []
