"""Samples, metrics and a table are made from prompts, answers and scorers; what cannot be scored is
refused before training."""

from __future__ import annotations

import asyncio
import html
import logging
import re
from typing import Any

import pytest
from pydantic import TypeAdapter

from packhorse.trainer import dist
from packhorse.trainer.config.eval import Scorer
from packhorse.trainer.datatypes import BadInput, Conversation, Message, Prompt
from packhorse.trainer.eval import metrics as eval_metrics
from packhorse.trainer.eval import scorers
from packhorse.trainer.eval.confidence import interval, wilson
from packhorse.trainer.eval.metrics import (
    Metric,
    Sample,
    as_table,
    check_scorers,
    score_samples,
    summarize,
)
from packhorse.trainer.utils import math_answers
from packhorse.trainer.utils.time_limit import Killed, bounded

RULES: TypeAdapter[Any] = TypeAdapter(Scorer)


def rule(kind: str, **fields: Any) -> Any:
    return RULES.validate_python({"kind": kind, **fields})


def prompt(reference: str = "", **row: Any) -> Prompt:
    return Prompt(
        [1],
        "?",
        reference,
        Conversation((Message("user", "?"), Message("assistant", reference))),
        row,
    )


@pytest.fixture
def logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """Return the records of the log."""
    monkeypatch.setattr(dist.log, "propagate", True)
    caplog.set_level(logging.INFO, logger="packhorse")
    return caplog


def words_of_answer(text: str, answer: str, reference: str, row: dict) -> float | None:
    return None if not answer else min(1.0, len(answer.split()) / 4)


# ------------------------------------------------------------------------------ samples and metrics


def test_each_answer_has_each_score_and_each_scorer_is_a_metric() -> None:
    prompts = [prompt("Paris"), prompt("Rome"), prompt("Bern")]
    rules = {
        "right": rule("exact"),
        "said": rule("contains", ignore=["case"]),
        "length": rule("function", function="test_eval_metrics:words_of_answer"),
    }
    made = score_samples(prompts, ["Paris", "rome, I think", "no"], rules)
    assert made[1] == Sample(
        "?", "rome, I think", "Rome", {"right": 0.0, "said": 1.0, "length": 0.75}
    )
    assert [sample.scores["right"] for sample in made] == [1, 0, 0]
    found = summarize(made)
    assert found["right"] == Metric(1 / 3, 3, *wilson(1, 3))
    assert found["said"] == Metric(2 / 3, 3, *wilson(2, 3))
    assert found["length"] == Metric((0.25 + 0.75 + 0.25) / 3, 3, *interval([0.25, 0.75, 0.25]))


def test_without_samples_or_scorers_there_are_no_metrics() -> None:
    assert summarize([]) == {}
    assert summarize(score_samples([prompt("a")], ["a"], {})) == {}


def test_an_answer_without_a_score_is_neither_right_nor_wrong_and_said_in_one_line(
    logged: Any,
) -> None:
    rules = {
        "right": rule("math", column="solution"),
        "length": rule("function", function="test_eval_metrics:words_of_answer"),
    }
    prompts = [prompt("x", solution=1), prompt("x"), prompt("x", solution=2)]
    made = score_samples(prompts, ["so 1", "so 1", ""], rules)
    assert [sample.scores["right"] for sample in made] == [1, None, 0]
    assert made[1].unscored == {"right": "the row has no `solution`"}
    assert summarize(made)["right"] == Metric(0.5, 2, *wilson(1, 2))
    assert [record.message for record in logged.records] == [
        "right (math): 1 of 3 answers have no score: the row has no `solution`",
        "length (function): 1 of 3 answers have no score: test_eval_metrics:words_of_answer: None",
    ]


def test_an_answer_whose_process_is_killed_is_the_only_one_without_a_score(
    logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_at_one(*call: Any, **more: Any) -> Any:
        if "2 + 1" in str(call):
            raise Killed
        return bounded(*call, **more)

    for module in (scorers, math_answers):
        monkeypatch.setattr(module, "bounded", killed_at_one)
    rules = {"form": rule("format", pattern="[0-9 +]+"), "right": rule("math", column="solution")}
    prompts = [prompt("x", solution=3)] * 3
    made = score_samples(prompts, ["3", "2 + 1", "4"], rules)
    assert [sample.scores for sample in made] == [
        {"form": 1, "right": 1},
        {"form": None, "right": None},
        {"form": 1, "right": 0},
    ]
    assert "the helper process was killed twice" in made[1].unscored["right"]
    assert logged.records[0].message.startswith("form (format): 1 of 3 answers have no score")


def leaves(*_: object) -> float:
    raise SystemExit("enough")


class Odd(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def fails_oddly(*_: object) -> float:
    raise Odd


def is_cancelled(*_: object) -> float:
    raise asyncio.CancelledError


@pytest.mark.parametrize("name", ["leaves", "fails_oddly", "is_cancelled"])
def test_whatever_a_scorer_does_the_others_have_their_metrics(name: str) -> None:
    rules = {
        "odd": rule("function", function=f"test_eval_metrics:{name}"),
        "right": rule("math", column="solution"),
    }
    found = summarize(score_samples([prompt("x", solution=1)], ["so 1"], rules))
    assert found["odd"].value is None
    assert found["odd"].missing
    assert found["right"].value == 1


def test_a_metric_without_any_score_is_missing_and_says_why() -> None:
    made = score_samples(
        [prompt("x")],
        [""],
        {"length": rule("function", function="test_eval_metrics:words_of_answer")},
    )
    assert summarize(made) == {
        "length": Metric(None, 0, None, None, "test_eval_metrics:words_of_answer: None")
    }
    assert (
        summarize(made)["length"].as_json()["missing"] == "test_eval_metrics:words_of_answer: None"
    )
    assert "missing" not in Metric(0.5, 2, 0.1, 0.9).as_json()


def test_a_choice_is_scored_by_its_likeliest_letter_and_not_by_what_was_generated() -> None:
    rules = {"mmlu": rule("choice", column="answer"), "said": rule("contains")}
    made = score_samples(
        [prompt("B", answer=1), prompt("B", answer=1)], ["B", "C"], rules, {"mmlu": ["C", "B"]}
    )
    assert [sample.scores for sample in made] == [{"mmlu": 0, "said": 1}, {"mmlu": 1, "said": 0}]


def test_a_scorer_that_is_slow_at_answer_after_answer_is_given_up(
    monkeypatch: pytest.MonkeyPatch, logged: Any
) -> None:
    """So that an evaluation ends, however many rows it has."""
    monkeypatch.setattr(scorers, "PATTERN_S", 0.2)
    monkeypatch.setattr(eval_metrics, "SLOW_S", 0.5)
    answers = ["fine", *["a" * 64] * 1000]
    made = score_samples(
        [prompt()] * 1001, answers, {"shape": rule("format", pattern="(a+)+b|fine")}
    )
    reason = "given up: the pattern: not finished within 0.2 s of computing, at 3 answers"
    assert summarize(made) == {"shape": Metric(None, 0, None, None, reason)}
    assert reason in logged.text


# ---------------------------------------------------------------------------------- before training


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (rule("math", column="solution"), "the row has no `solution`"),
        (rule("choice", column="letter"), "the row has no `letter`"),
        (rule("choice"), "the row's right answer is none of A, B, C, D"),
        (rule("refusal", expected="unsafe"), "the row has no `unsafe`"),
        (rule("json_schema", column="schema"), "the row has no `schema`"),
        (rule("tool_call"), "the row has no tools"),
        (rule("json_schema", file="nowhere.json"), "nowhere.json: there is no such file"),
        (
            rule("exact", extract="<answer>(.*)</answer>"),
            "`extract` finds nothing in the reference",
        ),
        (
            rule("function", function="nowhere:mine"),
            "function `nowhere:mine`: the module cannot be imported",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_a_scorer_that_can_score_no_prompt_is_bad_input(scorer: Any, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)) as refused:
        check_scorers({"mine": scorer}, [prompt("Paris"), prompt("Rome")])
    if "`" in message and "function" not in message:
        assert str(refused.value).startswith(
            f"eval.generate.scorers.mine ({scorer.kind}): none of the 2 held-out prompts"
        )


@pytest.mark.parametrize("kind", ["exact", "contains", "math"])
def test_so_is_one_that_needs_references_where_there_are_none(kind: str) -> None:
    with pytest.raises(BadInput, match="the row has no reference answer"):
        check_scorers({"mine": rule(kind)}, [prompt(""), prompt(" ")])


def test_one_that_can_score_some_says_how_many_are_left_out(logged: Any) -> None:
    check_scorers(
        {"mine": rule("math", column="solution")},
        [prompt("x", solution=3), prompt("x"), prompt("x")],
    )
    assert logged.messages == [
        "eval.generate.scorers.mine (math): 2 of 3 prompts are left out: the row has no `solution`"
    ]


def test_one_that_can_score_all_says_nothing(logged: Any) -> None:
    check_scorers({"mine": rule("math"), "shape": rule("format", pattern=".*")}, [prompt("12")])
    assert logged.messages == []


def test_a_pattern_that_does_not_end_at_a_reference_is_bad_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorers, "PATTERN_S", 0.2)
    with pytest.raises(
        BadInput,
        match=r"mine \(exact\): `extract`: not finished within 0.2 s of computing, at a reference",
    ):
        check_scorers({"mine": rule("exact", extract="^((a+)+)b")}, [prompt("a" * 64)])


def test_without_the_library_of_a_scorer_the_command_to_install_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"mine \(math\) needs the library math-verify: pip install"):
        check_scorers({"mine": rule("math")}, [prompt("12")])


# ---------------------------------------------------------------------------------------- the table


def test_the_table_shows_texts_as_they_are_whatever_they_mean_in_markdown() -> None:
    """As TensorBoard renders it."""
    from tensorboard.plugin_util import markdown_to_safe_html

    texts = [
        "a | b || c",
        "```\nfence\n```",
        "<b>bold</b> & <script>alert(1)</script>",
        "**x** _y_ [z](http://z) ![i](http://i)",
        "<think>3 * 4</think>\n\n# 12\r\n| --- |",
        "&amp; \\| `|` é 中",
        "",
    ]
    made = [Sample(text, text, text, {"a": 1.0, "b": None}) for text in texts]
    page = markdown_to_safe_html(as_table(made))
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)[1:]
    cells = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in rows]
    assert [html.unescape(cell[0]) for cell in cells] == [
        text.replace("\r\n", "\n").replace("\n", "<br>") for text in texts
    ]
    assert all(cell[1:] == [cell[0], cell[0], "1", ""] for cell in cells)
    assert not re.findall(r"<(?!/?(?:table|thead|tbody|tr|th|td|br)\b)", page)


def test_the_table_shows_a_few_samples_and_the_ends_of_long_prompts() -> None:
    made = [Sample(f"{n}" * 9 + "?", "x" * 9, "r", {}) for n in range(9)]
    lines = as_table(made, rows=3, characters=4).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2] == "| 000&#63; | xxxx | r |"
