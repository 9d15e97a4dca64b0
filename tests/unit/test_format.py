"""Rows of every format as conversations, and nothing but a RowError from any row."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import Source
from trainer.data.format import REQUIRED, detect_format, to_conversation
from trainer.flow import BadInput, Conversation, Message, RowError

ASKED, ANSWERED = Message("user", "2+2?"), Message("assistant", "4")
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def a_source(**fields) -> Source:
    return Source.model_validate(fields)


def read(fields, format, **columns):
    return to_conversation(fields, format, columns)


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        (["messages", "tools", "id"], "messages"),
        (["prompt", "completion"], "prompt_completion"),
        (["instruction", "input", "output"], "instruction"),
        (["instruction", "output"], "instruction"),
        (["question", "answer"], "question_answer"),
        (["text"], "text"),
        (["text", "messages"], "messages"),
    ],
)
def test_the_format_is_known_by_its_columns(columns, format):
    assert detect_format(columns, a_source(path="a.jsonl")) == format


def test_columns_can_be_mapped_and_formats_named():
    mapped = a_source(path="a.jsonl", columns={"question": "Problem", "answer": "Solution"})
    assert detect_format(["Problem", "Solution"], mapped) == "question_answer"
    assert detect_format(["messages", "text"], a_source(path="a.jsonl", format="text")) == "text"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (a_source(path="a.jsonl"), r"a\.jsonl: the rows have the columns foo, bar, .*question\+answer.*columns: \{"),
        (a_source(path="a.jsonl", format="text"), "none of these sets of columns is there: text"),
        (a_source(path="a.jsonl", columns={"question": "Q", "answer": "bar"}), "names `Q`, but the rows have"),
        (a_source(path="a.jsonl", columns={"ask": "foo"}), "unknown name `ask`; known: messages, "),
    ],
)
def test_unknown_columns_say_what_is_known(source, message):
    with pytest.raises(BadInput, match=message):
        detect_format(["foo", "bar"], source)


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}, "messages"),
        ({"prompt": "2+2?", "completion": "4"}, "prompt_completion"),
        ({"prompt": [{"role": "user", "content": "2+2?"}], "completion": "4"}, "prompt_completion"),
        ({"prompt": "2+2?", "completion": [{"role": "assistant", "content": "4"}]}, "prompt_completion"),
        ({"instruction": "2+2?", "input": "", "output": "4"}, "instruction"),
        ({"instruction": "2+2?", "input": None, "output": "4"}, "instruction"),
        ({"question": "2+2?", "answer": "4", "choices": [1]}, "question_answer"),
    ],
)
def test_every_format_gives_the_same_conversation(fields, format):
    assert read(fields, format) == Conversation((ASKED, ANSWERED))


def test_an_instruction_and_its_input_are_parted_by_a_blank_line():
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert read(row, "instruction").messages[0].content == "Add.\n\n2 and 2"


def test_text_stays_text_and_columns_are_mapped():
    assert read({"body": " a\n"}, "text", text="body") == Conversation(text=" a\n")


def test_parts_weights_reasoning_and_tool_calls():
    import json

    as_text = {**CALL, "function": {"name": "add", "arguments": json.dumps({"a": 2})}}
    row = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "2+?"},
            {"role": "assistant", "content": None, "tool_calls": [as_text], "weight": 0, "reasoning_content": "Hm."},
            {"role": "tool", "content": "4", "tool_call_id": "call00001", "name": None},
            {"role": "assistant", "content": "4", "tool_calls": None, "weight": 1.0},
        ],
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
    }
    assert read(row, "messages") == Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "2+?"),
            Message("assistant", "", "Hm.", (CALL,), weight=0),
            Message("tool", "4", tool_call_id="call00001"),
            ANSWERED,
        ),
        tools=({"type": "function", "function": {"name": "add"}},),
    )


def chat(*messages, **more):
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


def calling(function, **more):
    return {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}], **more},
        ]
    }


DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(("user", "a")), "no answer"),
        (chat(("user", "a"), ("assistant", " \n")), "no answer"),
        (chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")), "no answer"),
        (chat(("assistant", "a")), "an answer comes before any question"),
        (chat(("system", "s"), ("assistant", "a")), "an answer comes before any question"),
        (chat(("human", "a"), ("assistant", "b")), "unknown role 'human'"),
        (chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "a tool result without a tool call"),
        (chat(("user", 3), ("assistant", "b")), "content is not text"),
        (chat(("user", None), ("assistant", "b")), "content is not text"),
        (chat(("user", [{"type": "image"}]), ("assistant", "b")), "content has parts that are not text"),
        (chat(("user", "\ud800"), ("assistant", "b")), "half a surrogate pair in the text"),
        (chat(("user", "a"), ("assistant", "b"), tools="{"), "tools are not JSON"),
        (chat(("user", "a"), ("assistant", "b"), tools=[{"type": "function"}]), "a tool names no function"),
        (chat(("user", "a"), ("assistant", "b"), tools=[{"name": "f", "x": DEEP}]), "nested too deeply"),
        (chat(("user", "a"), ("assistant", "b"), tools=[{"name": "f", "x": b"1"}]), "a value that JSON does not have"),
        ({"messages": []}, "messages are not a list of messages"),
        ({"messages": "hello"}, "messages are not a list of messages"),
        ({"messages": ["hello"]}, "a message is not an object"),
        ({"messages": None}, "no messages"),
        ({}, "no messages"),
        ({"messages": [{"content": "a"}]}, "a message has no role"),
        (calling({"name": "f", "arguments": "{"}), "tool-call arguments are not JSON"),
        (calling({"name": "f", "arguments": "[1]"}), "tool-call arguments are not an object"),
        (calling({"name": "f", "arguments": "1" * 5000}), "tool-call arguments are not JSON"),
        (calling({"name": ""}), "a tool call names no function"),
        (calling({"name": "f"}, weight=2), "a message's weight is not 0 or 1"),
        (calling({"name": "f"}, weight=float("nan")), "a message's weight is not 0 or 1"),
        (calling({"name": "f"}, reasoning_content=3), "reasoning_content is not a string"),
        (calling({"name": "f"}, function_call={"name": "f"}), "a message uses function_call; write tool_calls"),
    ],
)
def test_a_bad_row_is_rejected_with_a_reason(row, reason):
    with pytest.raises(RowError) as error:
        read(row, "messages")
    assert str(error.value) == reason


@pytest.mark.parametrize("format", ["prompt_completion", "instruction", "question_answer", "text"])
def test_a_missing_empty_or_wrong_column_is_rejected(format):
    row = dict.fromkeys(REQUIRED[format], "a")
    for name in row:
        for value in (None, "", " ", 3, {}):
            with pytest.raises(RowError):
                read({**row, name: value}, format)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
keys = st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "type", "text", "weight"])
junk = st.recursive(
    scalars | st.sampled_from(["user", "assistant", "tool", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(REQUIRED)), st.data())
def test_nothing_but_a_row_error_comes_of_a_malformed_row(format, data):
    row = {name: data.draw(junk, label=name) for name in (*REQUIRED[format], "input", "tools")}
    try:
        conversation = read(row, format)
    except RowError:
        return
    assert conversation.text or any(message.role == "assistant" for message in conversation.messages)


def test_all_real_rows_are_read(shared):
    from trainer.data.source import read_rows

    for path in sorted((shared / "data").glob("*.jsonl")):
        source = a_source(path=str(path))
        rows = list(read_rows(source))
        format = detect_format(rows[0].fields, source)
        assert all(to_conversation(row.fields, format, {}) for row in rows), path.name
