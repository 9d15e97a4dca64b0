"""Scores of generated answers, on cases checked by hand."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from pydantic import TypeAdapter

from packhorse.trainer.config.eval import Scorer
from packhorse.trainer.datatypes import BadInput, Conversation, Message, Prompt
from packhorse.trainer.eval.scorers import (
    PATTERN_S,
    TooSlow,
    Unscored,
    expected,
    likeliest,
    refuses,
    score,
)

RULES: TypeAdapter[Any] = TypeAdapter(Scorer)
THOUGHT = "<think>3 * 4 = 12.</think><answer>12</answer>"


def rule(kind: str, **fields: Any) -> Any:
    return RULES.validate_python({"kind": kind, **fields})


def prompt(reference: str = "", tools: tuple[Any, ...] = (), **row: Any) -> Prompt:
    turns = Message("user", "How many?"), Message("assistant", reference)
    return Prompt([1, 2], "How many?", reference, Conversation(turns, tools), row)


FORMAT = rule("format", pattern=r"<think>.+</think><answer>-?[0-9]+</answer>")
EXTRACT = rule("exact", extract=r"<answer>(-?[0-9]+)</answer>")


# ------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("<think>2 + 3 = 5.</think><answer>5</answer>", 1),
        ("  <think>two\nlines</think><answer>-5</answer>\n", 1),
        ("<think></think><answer>5</answer>", 0),
        ("<think>2 + 3 = 5.</think><answer>five</answer>", 0),
        ("<think>2 + 3 = 5.</think><answer>5</answer> and more", 0),
        ("<think>2</think><answer>5</answer><answer>5</answer>", 0),
        (
            "<think>2</think><answer>5</answer><think>2</think><answer>5</answer>",
            1,
        ),  # `.+` takes all but the end
        ("<think>2</think><answer>\N{ARABIC-INDIC DIGIT FIVE}</answer>", 0),
        ("", 0),
        ("<think>" + "x" * 5_000_000 + "</think><answer>5</answer>", 1),
    ],
)
def test_a_pattern_must_match_the_whole_answer(answer: str, passes: int) -> None:
    assert score(FORMAT, prompt(), answer) == passes


@pytest.mark.parametrize(("answer", "passes"), [("Rome, OF course.", 1), ("It is Paris.", 0)])
def test_a_pattern_finds_a_text_anywhere(answer: str, passes: int) -> None:
    assert score(rule("format", pattern="(?i).*of course.*"), prompt(), answer) == passes


def test_a_pattern_that_backtracks_for_ever_is_no_score_within_its_limit() -> None:
    with pytest.raises(TooSlow, match=rf"the pattern: not finished within {PATTERN_S:g} s"):
        score(rule("format", pattern=r"(a+)+b"), prompt(), "a" * 64)
    assert score(FORMAT, prompt(), THOUGHT) == 1


# -------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("no thoughts <answer>12</answer>", 1),
        ("<answer>1</answer>", 0),
        ("<answer>12", 0),
        ("12", 0),
        ("", 0),
        ("<answer>11</answer> no: <answer>12</answer>", 1),  # the last one counts
        ("<answer>12</answer> no: <answer>11</answer>", 0),
        ("<answer>012</answer>", 0),  # texts are compared, not values
        ("<answer>-12</answer>", 0),
    ],
)
def test_an_extracted_answer_must_equal_the_references(answer: str, right: int) -> None:
    assert score(EXTRACT, prompt(THOUGHT), answer) == right


@pytest.mark.parametrize(
    ("fields", "answer", "reference", "right"),
    [
        ({}, " Paris\n", "Paris", 1),
        ({}, "paris", "Paris", 0),
        ({}, "Paris.", "Paris", 0),
        ({}, "", "Paris", 0),
        ({}, unicodedata.normalize("NFD", "Orléans"), unicodedata.normalize("NFC", "Orléans"), 1),
        ({}, "x\N{SUPERSCRIPT TWO}", "x2", 0),
        ({"ignore": ["case"]}, "STRASSE", "Straße", 1),
        ({"ignore": ["case"]}, "New  York", "new york", 0),
        ({"ignore": ["space"]}, "New\n  York", "New York", 1),
        ({"ignore": ["space"]}, "NewYork", "New York", 0),
    ],
)
def test_a_whole_answer_must_equal_the_reference(
    fields: dict, answer: str, reference: str, right: int
) -> None:
    assert score(rule("exact", **fields), prompt(reference), answer) == right


def test_a_reference_in_which_nothing_is_found_gives_no_score() -> None:
    with pytest.raises(Unscored, match="`extract` finds nothing in the reference"):
        score(EXTRACT, prompt("twelve"), "<answer>12</answer>")


def test_a_group_that_takes_no_part_in_the_match_finds_nothing() -> None:
    assert score(rule("exact", extract="x(12)?"), prompt("x12"), "x") == 0


# ----------------------------------------------------------------------------------------- contains


@pytest.mark.parametrize(
    ("fields", "answer", "passes"),
    [
        ({}, "It is Paris, of course.", 1),
        ({}, "It is PARIS.", 0),
        ({"ignore": ["case"]}, "It is PARIS.", 1),
        ({"ignore": ["case", "space"]}, "It is PARIS.", 1),
        ({}, "", 0),
        ({}, "." * 5_000_000 + "Paris", 1),
    ],
)
def test_the_reference_must_stand_in_the_answer(fields: dict, answer: str, passes: int) -> None:
    assert score(rule("contains", **fields), prompt("Paris"), answer) == passes


def test_an_empty_reference_is_in_no_answer() -> None:
    with pytest.raises(Unscored, match="the row has no reference answer"):
        score(rule("contains"), prompt(" "), "anything")


# --------------------------------------------------------------------------------------------- math


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("so it is 12", "12", 1),
        ("12 at first, 13 in the end", "12", 0),
        ("\\boxed{12}", THOUGHT, 1),
        ("It is 12 dollars.", "So he has 3 * 4 = 12 dollars.", 1),
        ("It is 3 dollars.", "So he has 3 * 4 = 12 dollars.", 0),
        ("<answer>11</answer><answer>12</answer>", THOUGHT, 1),
        ("<answer>12</answer><answer>11</answer>", THOUGHT, 0),
        ("<answer>1,234,567</answer>", "1234567", 1),
        ("<answer>1234567</answer>", "1,234,567", 1),
        ("<answer>-0</answer>", "0", 1),
        ("<answer>-0.0</answer>", "0", 1),
        ("<answer>\N{MINUS SIGN}3</answer>", "-3", 1),
        ("<answer>50%</answer>", "50%", 1),
        ("<answer>50%</answer>", "1/2", 1),
        ("<answer>50%</answer>", "50", 1),  # math-verify takes either meaning
        ("<answer>50%</answer>", "5", 0),
        ("<answer>12 dollars</answer>", "12", 0),  # what is marked is read whole
        ("12 dollars", "12", 1),
        ("\\boxed{11} or \\boxed{12}", "12", 0),
        ("<answer>11 or 12</answer>", "12", 0),
        ("<answer>" + "9" * 10_000 + "</answer>", "12", 0),
        ("<answer>0.5</answer>", "1/2", 1),
        ("<answer>1e3</answer>", "1001", 0),
        ("<answer></answer>", "12", 0),
        ("", "12", 0),
        ("<think>12</think>", "12", 0),
        ("é" * 200_000, "12", 0),
    ],
)
def test_the_value_must_be_the_references(answer: str, reference: str, right: int) -> None:
    assert score(rule("math"), prompt(reference), answer) == right


def test_a_small_number_of_a_column_is_read_as_it_is() -> None:
    assert score(rule("math", column="solution"), prompt("x", solution=1e-05), "so 0.00001") == 1
    assert score(rule("math", column="solution"), prompt("x", solution=1e-05), "so 0.0001") == 0


@pytest.mark.parametrize("value", [12, 12.0, "12", "#### 12"])
def test_the_right_value_may_stand_in_a_column(value: Any) -> None:
    assert (
        score(rule("math", column="solution"), prompt("Twelve, I think.", solution=value), "so 12")
        == 1
    )


@pytest.mark.parametrize(
    ("reference", "row", "reason"),
    [
        ("none at all", {}, "the reference holds no value"),
        ("none at all", {"solution": "####"}, "the reference holds no value"),
        ("12", {}, "the row has no `solution`"),
        ("12", {"solution": None}, "the row has no `solution`"),
        ("12", {"solution": [12]}, "the reference is no value"),
        ("12", {"solution": True}, "the reference is no value"),
    ],
)
def test_a_row_without_a_value_is_named(reference: str, row: dict, reason: str) -> None:
    column = None if reference == "none at all" and not row else "solution"
    with pytest.raises(Unscored, match=reason):
        score(rule("math", column=column), prompt(reference, **row), "so 12")


# ------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("value", ["C", 2])
def test_the_likeliest_letter_must_be_the_rows(value: Any) -> None:
    choice = rule("choice", column="answer")
    assert (
        score(choice, prompt(answer=value), likeliest(choice.letters, [-3.0, -2.0, -1.0, -4.0]))
        == 1
    )
    assert (
        score(choice, prompt(answer=value), likeliest(choice.letters, [-1.0, -2.0, -3.0, -4.0]))
        == 0
    )


def test_the_right_letter_may_be_the_reference() -> None:
    assert score(rule("choice", letters=["Yes", "No"]), prompt("No\n"), "No") == 1


def test_of_equal_letters_the_first_is_the_likeliest() -> None:
    assert likeliest(("A", "B", "C"), [-2.0, -1.0, -1.0]) == "B"


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_log_probability_that_is_not_finite_is_no_choice(broken: float) -> None:
    assert likeliest(("A", "B"), [-1.0, broken]) == ""
    with pytest.raises(Unscored, match="not finite"):
        score(rule("choice"), prompt("A"), "")


@pytest.mark.parametrize("value", [None, "E", "a", 4, -1, True, 1.0, ["A"]])
def test_a_right_answer_that_is_no_letter_gives_no_score(value: Any) -> None:
    with pytest.raises(Unscored):
        expected(rule("choice", column="answer"), prompt("A", answer=value))


# -------------------------------------------------------------------------------------- json_schema

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ('{"name": "Ada", "age": 36}', 1),
        ('```json\n{"name": "Ada"}\n```', 1),
        ('```\n{"name": "a ``` b"}\n```', 1),
        ('<think>{"name": 1}</think>\n{"name": "\\u00e9"}', 1),
        ('{"name": "Ada", "age": -1}', 0),
        ('{"age": 36}', 0),
        ('{"name": "Ada", "born": 1815}', 0),
        ('Here it is: {"name": "Ada"}', 0),
        ('```json\n{"name": "Ada"}\n``` as you asked', 0),
        ("{'name': 'Ada'}", 0),
        ('{"name": "Ada",}', 0),
        ('{"name": "Ada", "name": "Eve"}', 0),
        ('{"name": "Ada", "age": NaN}', 0),
        ('{"name": "Ada"', 0),
        ("", 0),
        ("null", 0),
        ("[" * 100_000, 0),
        ('{"name": "' + "x" * 3_000_000 + '"}', 1),
    ],
)
def test_an_answer_must_be_json_that_the_schema_admits(
    tmp_path: Any, answer: str, passes: int
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    assert (
        score(rule("json_schema", file=str(tmp_path / "schema.json")), prompt(), answer) == passes
    )


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["object", "text"])
def test_each_row_may_have_its_own_schema(schema: Any) -> None:
    by_column = rule("json_schema", column="schema")
    assert score(by_column, prompt(schema=schema), '{"name": "Ada"}') == 1
    assert score(by_column, prompt(schema={**SCHEMA, "required": ["age"]}), '{"name": "Ada"}') == 0


@pytest.mark.parametrize("schema", [None, "{", [], "[]", {"type": "strin"}, {"minimum": "0"}])
def test_a_row_without_a_schema_gives_no_score(schema: Any) -> None:
    with pytest.raises(Unscored, match="`schema`"):
        score(rule("json_schema", column="schema"), prompt(schema=schema), "{}")


def test_a_pattern_of_the_schema_that_backtracks_for_ever_is_no_score() -> None:
    schema = {"type": "string", "pattern": "^(a+)+$"}
    with pytest.raises(TooSlow, match="the schema"):
        score(
            rule("json_schema", column="schema"), prompt(schema=schema), json.dumps("a" * 64 + "b")
        )


def test_a_schema_elsewhere_is_not_fetched() -> None:
    schema = {"$ref": "http://localhost:9/schema.json"}
    with pytest.raises(Unscored, match="Unresolvable"):
        score(rule("json_schema", column="schema"), prompt(schema=schema), "{}")


@pytest.mark.parametrize("text", [None, "{", '{"type": 3}'])
def test_a_file_that_is_no_schema_is_bad_input(tmp_path: Any, text: str | None) -> None:
    path = tmp_path / "schema.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=r"schema\.json"):
        expected(rule("json_schema", file=str(path)), prompt())


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/place"}},
            "required": ["place"],
            "$defs": {"place": {"type": "string"}},
        },
    },
}
CLOCK = {"name": "clock"}


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ('{"name": "weather", "arguments": {"place": "Rome"}}', 1),
        ('{"name": "weather", "parameters": {"place": "Rome"}}', 1),
        ('<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>', 1),
        (
            '<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n'
            '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>',
            1,
        ),
        ('[{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]', 1),
        ('{"name": "weather", "arguments": {"place": 3}}', 0),
        ('{"name": "weather", "arguments": {}}', 0),
        ('{"name": "weather", "arguments": "{\\"place\\": \\"Rome\\"}"}', 0),
        ('{"name": "wether", "arguments": {"place": "Rome"}}', 0),
        ('{"name": "weather"}', 0),
        ('<tool_call>{"name": "clock", "arguments": {}}</tool_call> Done.', 0),
        ('<tool_call>{"name": "clock"', 0),
        ("[]", 0),
        ("It is sunny.", 0),
        ("", 0),
    ],
)
def test_an_answer_must_be_a_call_of_the_rows_tools(answer: str, passes: int) -> None:
    assert score(rule("tool_call"), prompt(tools=(WEATHER, CLOCK)), answer) == passes


def test_a_row_without_tools_gives_no_score() -> None:
    with pytest.raises(Unscored, match="the row has no tools"):
        score(rule("tool_call"), prompt(), "{}")


# ------------------------------------------------------------------------------------------ refusal


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m really sorry, but no.",
        "I cannot assist with this request.",
        "Sorry, that is not something I do.",
        "Unfortunately, I am unable to say how.",
        "I must apologize: this would do harm.",
        "<think>They want a recipe. Sure, why not?</think>\n\nI won't help with that.",
        "I  CANNOT\nhelp.",
    ],
)
def test_a_phrase_of_refusal_at_the_beginning_refuses(answer: str) -> None:
    assert refuses(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure! First, take two eggs.",
        "As an engineer, I would begin with the load.",
        "<think>I cannot tell them, or can I?</think>Take two eggs.",
        "Take two eggs. " * 20 + "I cannot say more.",
        "The word sorry comes from Old English.",
        "Hawaii cannot be reached by train.",
    ],
)
def test_other_answers_do_not(answer: str) -> None:
    assert not refuses(answer)


def test_whether_an_answer_should_refuse_stands_in_the_recipe_or_in_the_row() -> None:
    refusal, help_ = "I cannot help.", "Take two eggs."
    assert [score(rule("refusal", expected=True), prompt(), text) for text in (refusal, help_)] == [
        1,
        0,
    ]
    assert [
        score(rule("refusal", expected=False), prompt(), text) for text in (refusal, help_)
    ] == [0, 1]
    by_column = rule("refusal", expected="unsafe")
    assert [score(by_column, prompt(unsafe=unsafe), refusal) for unsafe in (True, False)] == [1, 0]
    with pytest.raises(Unscored, match="neither true nor false"):
        score(by_column, prompt(unsafe="yes"), refusal)


# ----------------------------------------------------------------------------------------- function


def share_of_words(text: str, answer: str, reference: str, row: dict) -> Any:
    if "fault" in row:
        raise KeyError("x")
    return (
        row["says"]
        if "says" in row
        else len(set(answer.split()) & set(reference.split())) / len(reference.split())
    )


MINE = rule("function", function="test_scorers:share_of_words")


def test_a_function_of_the_users_own_is_given_prompt_answer_reference_and_row() -> None:
    assert score(MINE, prompt("a b c d"), "a b x") == 0.5
    assert score(MINE, prompt("a", says=True), "") == 1
    assert score(MINE, prompt("a", says=False), "") == 0


@pytest.mark.parametrize("returned", [None, "1", 1.5, -0.1, float("nan"), [1], 1j])
def test_what_it_returns_must_be_a_score(returned: Any) -> None:
    with pytest.raises(Unscored, match="test_scorers:share_of_words"):
        score(MINE, prompt("a", says=returned), "")


def test_where_it_fails_there_is_no_score() -> None:
    with pytest.raises(Unscored, match="KeyError: 'x'"):
        score(MINE, prompt("a", fault=True), "")
