"""What an evaluation leaves in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

from packhorse.trainer.eval.evaluator import write_samples
from packhorse.trainer.eval.metrics import Sample


def test_samples_are_lines(tmp_path: Path) -> None:
    samples = [Sample("q", "a", "r", {"format": passes, "exact": 0.0}) for passes in (1.0, 0.0)]
    write_samples(tmp_path / "samples.jsonl", 7, samples)
    write_samples(
        tmp_path / "samples.jsonl",
        9,
        [Sample("q", "é", "r", {"format": None}, {"format": "too long"})],
    )
    lines = [
        json.loads(line)
        for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert lines == [
        {
            "step": 7,
            "prompt": "q",
            "answer": "a",
            "reference": "r",
            "scores": {"format": 1.0, "exact": 0.0},
        },
        {
            "step": 7,
            "prompt": "q",
            "answer": "a",
            "reference": "r",
            "scores": {"format": 0.0, "exact": 0.0},
        },
        {
            "step": 9,
            "prompt": "q",
            "answer": "é",
            "reference": "r",
            "scores": {"format": None},
            "unscored": {"format": "too long"},
        },
    ]
