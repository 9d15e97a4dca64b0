"""Scores of generated answers, on cases checked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config_eval import Scorer
from trainer.evaluate import write_samples
from trainer.score import Sample, accuracies, score

FORMAT = Scorer(pattern=r"<think>.+</think><answer>-?[0-9]+</answer>")
ANSWER = Scorer(extract=r"<answer>(-?[0-9]+)</answer>")


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("<think>2 + 3 = 5.</think><answer>5</answer>", True),
        ("  <think>two\nlines</think><answer>-5</answer>\n", True),
        ("<think></think><answer>5</answer>", False),
        ("<think>2 + 3 = 5.</think><answer>five</answer>", False),
        ("<think>2 + 3 = 5.</think><answer>5</answer> and more", False),
        ("", False),
    ],
)
def test_a_pattern_must_match_the_whole_answer(answer: str, is_right: bool) -> None:
    assert score(FORMAT, answer, "") is is_right


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("no thoughts <answer>12</answer>", True),
        ("<answer>1</answer>", False),
        ("<answer>12", False),
        ("12", False),
    ],
)
def test_an_extracted_answer_must_equal_the_references(answer: str, is_right: bool) -> None:
    assert score(ANSWER, answer, "<think>3 * 4 = 12.</think><answer>12</answer>") is is_right


def test_a_reference_without_an_answer_is_never_met() -> None:
    assert score(ANSWER, "<answer>12</answer>", "twelve") is False


def test_accuracies_are_shares_and_samples_are_lines(tmp_path: Path) -> None:
    samples = [Sample("q", "a", "r", {"format": passes, "exact": False}) for passes in (True, True, False, True)]
    assert accuracies(samples) == {"eval/format": 0.75, "eval/exact": 0.0}
    write_samples(tmp_path / "samples.jsonl", 7, samples)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[0] == {
        "step": 7,
        "prompt": "q",
        "answer": "a",
        "reference": "r",
        "scores": {"format": True, "exact": False},
    }
