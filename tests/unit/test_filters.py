"""Which rows the filters leave out, and why; a row that cannot be judged is rejected instead."""

import json
import re
from typing import Any, cast

import pytest

from packhorse.trainer.config.data import Filters, Source
from packhorse.trainer.data import filters as filters_module
from packhorse.trainer.data.filters import apply_filters, check_filters
from packhorse.trainer.data.prepare import RowTokenizer
from packhorse.trainer.data.rows import RowReader
from packhorse.trainer.data.source import read_rows
from packhorse.trainer.datatypes import BadInput, Conversation, Filtered, Message, Row, RowError
from packhorse.trainer.utils.time_limit import Killed


def left_out(answer: str, row=None, **filters) -> str | None:
    """Why a row with this answer is left out."""
    conversation = Conversation(
        (Message("user", "q"), Message("assistant", "first"), Message("assistant", answer))
    )
    try:
        apply_filters(Filters.model_validate(filters), row or {}, conversation)
    except Filtered as reason:
        return str(reason)
    return None


def test_without_filters_all_rows_are_wanted():
    assert left_out("") is None


def test_words_of_the_last_answer_are_bounded():
    assert left_out("one  two\nthree", answer_words=[3, 3]) is None
    assert left_out("one two", answer_words=[3, 5]) == "answer_words: fewer than 3"
    assert left_out("1 2 3 4 5 6", answer_words=[3, 5]) == "answer_words: more than 5"


def test_a_pattern_must_be_found_in_the_last_answer():
    assert left_out("so it is\n#### 4", pattern=r"(?m)^#### \d+$") is None
    assert left_out("four", pattern=r"\d") == "pattern: not found"


def test_the_pattern_of_the_reference_leaves_out_what_holds_a_text():
    without = r"(?s)\A(?!.*(?i:as an ai))"
    assert left_out("It is\n4.", pattern=without) is None
    assert left_out("Well.\nAs an AI, I", pattern=without) == "pattern: not found"


def test_a_pattern_that_does_not_end_rejects_the_row(monkeypatch):
    monkeypatch.setattr(filters_module, "PATTERN_S", 0.1)
    for pattern in ("^(a+)+$", r"(?:\w|\w\w)+!"):
        with pytest.raises(RowError, match=r"^pattern: not finished within 0\.1 s"):
            left_out("a" * 60 + "b", pattern=pattern)
    assert left_out("b", pattern="b") is None, "the next row has its own time"


def test_a_text_is_judged_whole():
    filters = Filters.model_validate({"answer_words": [2, 9]})
    apply_filters(filters, {}, Conversation(text="To be"))
    with pytest.raises(Filtered):
        apply_filters(filters, {}, Conversation(text="To"))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """`own("body")` is the name of a function of the user's own with this body."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(body: str) -> str:
        name = f"own_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(f"def keep(row, conversation):\n    {body}\n")
        return f"{name}:keep"

    return written


def test_a_function_of_the_users_own_sees_the_row_and_the_conversation(own):
    agrees = own("return conversation.messages[-1].content == row['best']")
    assert left_out("4", {"best": "4"}, function=agrees) is None
    assert left_out("5", {"best": "4"}, function=agrees) == f"{agrees}: False"
    says = own("return 'a very long story ' * 99")
    assert re.fullmatch(rf"{says}: a very long .{{,80}}", left_out("4", function=says) or "")


def test_a_fault_of_the_function_is_a_reject(own):
    for body, reason in (
        ("return row['best']", "KeyError: 'best'"),
        ("return 1", "it must give True, False or"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
    ):
        with pytest.raises(RowError, match=reason) as error:
            left_out("4", function=own(body))
        assert not isinstance(error.value, Filtered)


def test_a_function_cannot_change_the_row(own):
    row = {"best": "4"}
    left_out("4", row, function=own("row.clear(); return True"))
    assert row == {"best": "4"}


@pytest.mark.parametrize("reference", [None, "", True, ["18"], "#### "])
def test_a_row_without_a_reference_is_a_reject(reference):
    with pytest.raises(RowError, match=r"math_answer: .*(no reference|holds no value)") as error:
        left_out("#### 18", {"best": reference}, math_answer="best")
    assert not isinstance(error.value, Filtered)


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        ("too long", "math_answer: no verdict within 10 s of computing"),
        ("failed", "math_answer: math-verify failed at the answer"),
    ],
)
def test_an_answer_without_a_verdict_is_a_reject_and_not_a_wrong_one(monkeypatch, verdict, reason):
    monkeypatch.setattr(
        "packhorse.trainer.data.filters.math_verdict", lambda answer, reference: verdict
    )
    with pytest.raises(RowError, match=f"^{reason}$") as error:
        left_out("#### 18", {"best": "18"}, math_answer="best")
    assert not isinstance(error.value, Filtered)


def test_wrong_traces_are_left_out_and_right_ones_kept(shared, tmp_path):
    """Hand-made wrong traces among real ones: a wrong sum, the right value before the end only, no
    end, another form."""
    real = [
        json.loads(line)
        for line in (shared / "data" / "gsm8k_train.jsonl").read_text().splitlines()[:200]
    ]
    rows, wrong = [], []
    for number, row in enumerate(real):
        reasoning, _, final = row["answer"].rpartition("#### ")
        spoilt = {
            0: f"{reasoning}#### {final}1",
            1: f"It cannot be {final}.\n{reasoning}#### -{final}",
            2: "I would have to guess.",
            3: row["answer"].replace("#### ", "#### 2 * 7 + "),
        }
        good = [
            row["answer"],
            f"{reasoning}So it is \\boxed{{{final}}}.",
            f"{reasoning}#### {final}.00",
        ]
        rows.append(
            {"question": row["question"], "answer": good[number % 3], "reference": row["answer"]}
        )
        rows.append(
            {
                "question": row["question"],
                "answer": spoilt[number % 4],
                "reference": int(final.replace(",", "")),
            }
        )
        wrong.append(2 * number + 2)
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    filters = {"math_answer": "reference"}
    source = Source.model_validate({"path": str(path), "filters": filters})
    reader, found = RowReader.of(source), {}
    for row in read_rows(source):
        try:
            reader.conversation(row.fields)
        except Filtered as reason:
            found[row.number] = str(reason)
    assert found == dict.fromkeys(wrong, "math_answer: not the reference's value")


def test_a_row_whose_process_is_killed_is_named(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise Killed

    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "?", "answer": "#### 18", "best": "18"}\n')
    source = Source.model_validate({"path": str(path), "filters": {"math_answer": "best"}})
    (row,) = read_rows(source)
    work = RowTokenizer(cast(Any, None), (RowReader.of(source),), (str(path),))
    monkeypatch.setattr("packhorse.trainer.data.filters.math_verdict", killed)
    with pytest.raises(
        BadInput, match=r"rows\.jsonl:1: .* killed twice.*; set data\.workers lower"
    ):
        work([Row(0, 0, row.number, row.fields)])


def test_what_filters_need_is_asked_for_at_the_start(monkeypatch):
    with pytest.raises(BadInput, match="cannot be imported"):
        check_filters(Filters.model_validate({"function": "nowhere_at_all:keep"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install"):
        check_filters(Filters.model_validate({"math_answer": "best"}))
