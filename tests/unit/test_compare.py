"""Two evaluations are compared, in hand-made folders."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval.compare import difference, read_results, table_of_one, table_of_two


def write(folder: Path, steps: dict[int, Sequence[float | None]], prefix: str = "What is") -> Path:
    """Write an evaluation for each step, with one prompt a score."""
    folder.mkdir()
    lines, samples = [], []
    for step, scores in steps.items():
        known = [score for score in scores if score is not None]
        right = {"value": sum(known) / len(known), "count": len(known), "low": 0.1, "high": 0.9}
        judged = {"value": None, "count": 0, "missing": "the judge did not answer"}
        lines.append(
            {
                "step": step,
                "eval_loss": 1.0 / (step + 1),
                "metrics": {"right": right, "judged": judged},
                "held_out": "rows",
                "tokenizer": "tokens",
            }
        )
        for number, score in enumerate(scores):
            scored = {"right": score, "judged": None}
            samples.append(
                {"step": step, "prompt": f"{prefix} {number}?", "answer": "", "scores": scored}
            )
    for name, written in (("evaluations", lines), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in written))
    return folder


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_samples_are_paired_by_their_prompts(tmp_path):
    """Five more are right in B, none fewer: McNemar's exact p is 2 / 2^5."""
    a = read_results(str(write(tmp_path / "a", {10: [1, 1, 0, 0, 0, 0, 0, 0]})))
    b = read_results(str(write(tmp_path / "b", {10: [1, 1, 1, 1, 1, 1, 1, 0]})))
    found = difference(a, b, "right")
    assert found
    test, prompts = found
    assert (test.value, prompts) == (5 / 8, 8)
    assert test.p == pytest.approx(2 / 2**5)
    assert test.low < test.value < test.high
    table = shown(table_of_two(a, b))
    assert "+0.625" in table
    assert "0.062" in table
    assert "missing: the judge did not answer" in table


def test_the_order_of_the_samples_does_not_matter(tmp_path):
    a = write(tmp_path / "a", {10: [1, 0, 1, 0]})
    b = write(tmp_path / "b", {10: [1, 0, 1, 0]})
    turned = (b / "samples.jsonl").read_text().splitlines()[::-1]
    (b / "samples.jsonl").write_text("\n".join(turned) + "\n")
    found = difference(read_results(str(a)), read_results(str(b)), "right")
    assert found
    assert (found[0].value, found[0].p) == (0, 1)


def test_prompts_that_are_alike_are_paired_one_by_one(tmp_path):
    folder = write(tmp_path / "a", {10: [1, 0, 1]})
    path = folder / "samples.jsonl"
    path.write_text(path.read_text().replace("What is 1?", "What is 0?"))
    results = read_results(str(folder))
    assert results.scores["right"] == {
        ("What is 0?", 0): 1,
        ("What is 0?", 1): 0,
        ("What is 2?", 0): 1,
    }


def test_a_score_that_is_missing_on_one_side_is_no_pair(tmp_path):
    a = read_results(str(write(tmp_path / "a", {10: [1] * 20})))
    b = read_results(str(write(tmp_path / "b", {10: [1] * 19 + [None]})))
    found = difference(a, b, "right")
    assert found
    assert found[1] == 19


def test_answers_to_other_questions_are_not_compared(tmp_path):
    a = read_results(str(write(tmp_path / "a", {10: [1, 0, 1]})))
    b = read_results(str(write(tmp_path / "b", {10: [1, 0, 1]}, prefix="Who is")))
    with pytest.raises(
        BadInput, match="have 0 prompts in common, of 3 and 3: they were asked other questions"
    ):
        table_of_two(a, b)


def test_a_metric_of_one_side_alone_is_shown_without_a_test(tmp_path):
    a = read_results(str(write(tmp_path / "a", {10: [1, 0, 1]})))
    folder = write(tmp_path / "b", {10: [1, 0, 1]})
    for path in folder.iterdir():
        path.write_text(path.read_text().replace('"right"', '"exact"'))
    table = shown(table_of_two(a, read_results(str(folder))))
    assert "not measured" in table


def test_a_step_is_named_after_the_folder_and_else_the_last_one(tmp_path):
    folder = write(tmp_path / "a", {0: [0, 0], 10: [1, 0], 20: [1, 1]})
    assert read_results(str(folder)).step == 20
    results = read_results(f"{folder}@10")
    assert (results.step, results.eval_loss) == (10, 1 / 11)
    assert list(results.scores["right"].values()) == [1, 0]
    assert "0.500" in shown(table_of_one(results))
    with_at = write(tmp_path / "b@1", {5: [1]})
    assert read_results(str(with_at)).step == 5


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("nowhere", "there is no such folder"),
        ("a@7", "step 7 was not evaluated; those that were: 10"),
        ("a@last", "after the @ comes a step, or best"),
        ("a@best", "not a run folder"),
        ("empty", "nothing was evaluated there"),
    ],
)
def test_a_missing_evaluation_is_named(tmp_path, place, sentence):
    write(tmp_path / "a", {10: [1]})
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput) as refused:
        read_results(str(tmp_path / place))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"held_out": "other"}, "their held-out rows differ"),
        ({"held_out": "other", "tokenizer": "other"}, "their tokenizers or chat templates differ"),
    ],
)
def test_other_rows_or_tokenizers_are_refused(tmp_path, changes, sentence):
    a = read_results(str(write(tmp_path / "a", {10: [1, 0]})))
    with pytest.raises(BadInput, match=sentence):
        table_of_two(a, a._replace(**changes))


def test_an_evaluation_of_an_earlier_version_is_named(tmp_path):
    path = write(tmp_path / "a", {10: [1]}) / "evaluations.jsonl"
    line = json.loads(path.read_text())
    del line["held_out"]
    path.write_text(json.dumps(line))
    with pytest.raises(BadInput, match="by an earlier version: run packhorse eval"):
        read_results(str(path.parent))


def test_a_tokenizer_that_gives_the_same_tokens_is_no_other(tmp_path):
    a = read_results(str(write(tmp_path / "a", {10: [1, 0]})))
    assert "right" in shown(table_of_two(a, a._replace(tokenizer="with an unused token more")))
