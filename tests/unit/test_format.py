"""Rows of every format as conversations, and nothing but a RowError from any row."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packhorse.trainer.config.data import Source
from packhorse.trainer.data.format import OF_ALL, OPTIONAL, REQUIRED, detect_format, to_conversation
from packhorse.trainer.datatypes import BadInput, Conversation, Message, RowError

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
        (["id", "conversations"], "sharegpt"),
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
        (
            a_source(path="a.jsonl"),
            r"a\.jsonl: the rows have the columns foo, bar, .*question\+answer.*columns: \{",
        ),
        (a_source(path="a.jsonl", format="text"), "none of these sets of columns is there: text"),
        (
            a_source(path="a.jsonl", columns={"question": "Q", "answer": "bar"}),
            "names `Q`, but the rows have",
        ),
        (a_source(path="a.jsonl", columns={"ask": "foo"}), "unknown name `ask`; known: messages, "),
    ],
)
def test_unknown_columns_say_what_is_known(source, message):
    with pytest.raises(BadInput, match=message):
        detect_format(["foo", "bar"], source)


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "2+2?"},
                    {"role": "assistant", "content": "4"},
                ]
            },
            "messages",
        ),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            "sharegpt",
        ),
        (
            {
                "conversations": [
                    {"from": "user", "value": "2+2?"},
                    {"from": "chatgpt", "value": "4"},
                ]
            },
            "sharegpt",
        ),
        (
            {"conversations": [{"role": "user", "content": "2+2?"}, {"from": "gpt", "value": "4"}]},
            "sharegpt",
        ),
        ({"prompt": "2+2?", "completion": "4"}, "prompt_completion"),
        ({"prompt": [{"role": "user", "content": "2+2?"}], "completion": "4"}, "prompt_completion"),
        (
            {"prompt": "2+2?", "completion": [{"role": "assistant", "content": "4"}]},
            "prompt_completion",
        ),
        ({"instruction": "2+2?", "input": "", "output": "4"}, "instruction"),
        ({"instruction": "2+2?", "input": None, "output": "4"}, "instruction"),
        (
            {
                "instruction": "2+2?",
                "input": "<noinput>",
                "output": "4",
                "system": "",
                "history": [],
            },
            "instruction",
        ),
        ({"question": "2+2?", "answer": "4", "choices": []}, "question_answer"),
    ],
)
def test_every_format_gives_the_same_conversation(fields, format):
    assert read(fields, format) == Conversation((ASKED, ANSWERED))


def test_an_instruction_and_its_input_are_parted_by_a_blank_line():
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert read(row, "instruction").messages[0].content == "Add.\n\n2 and 2"


@pytest.mark.parametrize("format", [name for name in REQUIRED if name != "text"])
def test_every_format_may_have_a_system_column(format):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    row = dict.fromkeys(REQUIRED[format], turns if format in ("messages", "sharegpt") else "4")
    assert read({**row, "prompted": "Be brief."}, format, system="prompted").messages[0] == Message(
        "system", "Be brief."
    )
    for none in (None, "", " "):
        assert read({**row, "system": none}, format) == read(row, format)
    with pytest.raises(RowError, match="system is not a string"):
        read({**row, "system": 3}, format)


def test_a_system_column_and_a_system_message_must_agree():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert len(read({"messages": turns, "system": "s"}, "messages").messages) == 3
    with pytest.raises(RowError, match="beside another system message"):
        read({"messages": turns, "system": "other"}, "messages")


def test_alpaca_rows_may_have_turns_before():
    row = {"instruction": "2+2?", "output": "4", "history": [["Hi", "Hello"]]}
    assert read(row, "instruction").messages == (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        ASKED,
        ANSWERED,
    )
    for history in ("Hi", [["Hi"]], [["Hi", None]], [{"Hi": "Hello"}]):
        with pytest.raises(RowError):
            read({**row, "history": history}, "instruction")


def test_sharegpt_has_calls_their_results_tools_and_weights():
    row = {
        "conversations": [
            {"from": "human", "value": "2+?", "weight": None},
            {
                "from": "function_call",
                "value": '{"name": "add", "arguments": {"a": 2}}',
                "weight": 0,
            },
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4", "reasoning_content": "Hm."},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "add"}]',
    }
    assert read(row, "sharegpt") == Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "2+?"),
            Message(
                "assistant",
                "",
                tool_calls=({"function": {"name": "add", "arguments": {"a": 2}}},),
                weight=0,
            ),
            Message("tool", "4"),
            Message("assistant", "4", "Hm."),
        ),
        tools=({"type": "function", "function": {"name": "add"}},),
    )


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"from": "narrator", "value": "a"}], "unknown role 'narrator'"),
        ([{"from": None, "value": "a"}], "a message has no role"),
        ([{"from": ["gpt"], "value": "a"}], "a message has no role"),
        ([{"value": "a"}], "a message has no role"),
        ([{"from": "gpt", "value": None}], "content is not text"),
        ([{"from": "gpt", "value": "a"}], "an answer comes before any question"),
        ([{"from": "human", "value": "a"}], "no answer"),
        (
            [{"from": "function_call", "value": "add(2)"}],
            "function_call: broken JSON: Expecting value",
        ),
        ([{"from": "function_call", "value": "[1]"}], "a tool call names no function"),
        (["a"], "a message is not an object"),
        ("a", "conversations are not a list of turns"),
    ],
)
def test_a_bad_sharegpt_row_is_rejected_with_a_reason(turns, reason):
    with pytest.raises(RowError) as error:
        read({"conversations": turns}, "sharegpt")
    assert str(error.value) == reason


TRAINED = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ({}, 1),
        *(
            ({name: value}, weight)
            for name in ("weight", "train", "training", "trainable")
            for value, weight in ((True, 1), (1, 1), (False, 0), (0, 0), (None, 1))
        ),
        ({"loss": False}, 0),
        ({"loss_mask": 1}, 1),
        ({"loss_mask": 0}, 0),
        ({"masked": True}, 0),
        ({"masked": 0}, 1),
        ({"train": True, "masked": False}, 1),
        ({"loss": False, "weight": 0.0}, 0),
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_turn_says_by_many_names_whether_it_is_trained(column, flags, weight):
    turns = [{"role": "user", "content": "2+2?"}, {**TRAINED, **flags}]
    format = "sharegpt" if column == "conversations" else "messages"
    assert read({column: turns}, format).messages[1] == Message("assistant", "4", weight=weight)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"train": "yes"}, "a message's train is not 0 or 1"),
        ({"masked": 0.5}, "a message's masked is not 0 or 1"),
        ({"loss": [1, 0]}, "a message's loss is not 0 or 1"),
        ({"train": True, "masked": True}, "a message's masked and train disagree"),
    ],
)
def test_a_flag_that_is_not_clear_is_rejected(flags, reason):
    with pytest.raises(RowError, match=f"^{reason}$"):
        read({"messages": [{"role": "user", "content": "a"}, {**TRAINED, **flags}]}, "messages")


@pytest.mark.parametrize(
    "key", ["train_detail", "no_loss", "is_masked", "compute_loss", "Supervised", "learn"]
)
def test_a_flag_in_words_that_are_not_known_stops_the_run(key):
    row = {"messages": [{"role": "user", "content": "2+2?"}, {**TRAINED, key: False}]}
    with pytest.raises(BadInput, match=rf"key `{key}`.*weight: 0.*data.ignore_columns=\[{key}\]"):
        read(row, "messages")
    assert to_conversation(row, "messages", {}, (key,)) == Conversation((ASKED, ANSWERED))
    with pytest.raises(BadInput, match="a row has the column `loss_mask`"):
        read({"question": "2+2?", "answer": "4", "loss_mask": [0, 1]}, "question_answer")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_many_names(key):
    turns = [{"role": "user", "content": "2+2?"}, {**TRAINED, key: "Hm."}]
    assert read({"messages": turns}, "messages").messages[1].reasoning_content == "Hm."
    turns[1] |= {"reasoning": "Hm.", "thinking": "Well."}
    with pytest.raises(RowError, match=r"reasoning.* and .* differ"):
        read({"messages": turns}, "messages")


def test_an_answer_may_be_reasoning_alone():
    for content in (None, "", " "):
        turns = [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": content, "reasoning": "Hm."},
        ]
        (_, answer) = read({"messages": turns}, "messages").messages
        assert (answer.content.strip(), answer.reasoning_content) == ("", "Hm.")


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
        {"tool_calls": [{"name": "add", "arguments": {"a": 2}}]},
        {"tool_call": {"name": "add", "arguments": '{"a": 2}'}},
        {"function_calls": [{"name": "add", "arguments": {"a": 2}}]},
        {"function_call": {"name": "add", "arguments": '{"a": 2}'}, "tool_calls": None},
    ],
)
def test_calls_have_many_names(call):
    turns = [
        {"role": "human", "content": "2+?"},
        {"role": "model", "content": None, **call},
        {"role": "function", "content": "4", "name": "add"},
        TRAINED,
    ]
    assert read({"messages": turns}, "messages") == Conversation(
        (
            Message("user", "2+?"),
            Message(
                "assistant",
                "",
                tool_calls=({"function": {"name": "add", "arguments": {"a": 2}}},),
            ),
            Message("tool", "4", name="add"),
            ANSWERED,
        )
    )


@pytest.mark.parametrize("column", ["tools", "functions", "tool_defs", "tool_definitions"])
def test_tools_have_many_names_and_one_form(column):
    function = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    for tool in (function, {"function": function}, {"type": "function", "function": function}):
        row = {"question": "2+2?", "answer": "4", column: [tool]}
        assert read(row, "question_answer").tools == ({"type": "function", "function": function},)


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_has_many_names(column):
    row = {"question": "2+2?", "answer": "4", column: "Be brief."}
    assert read(row, "question_answer").messages[0] == Message("system", "Be brief.")
    with pytest.raises(RowError, match="differ"):
        read({**row, "system": "a", "system_prompt": "b"}, "question_answer")


def test_a_question_is_read_with_its_context_and_its_choices():
    row = {"context": "A shop.", "question": "Which?", "choices": ["x", "y"], "answer": "B"}
    expected = (Message("user", "A shop.\n\nWhich?\n\nA. x\nB. y"), Message("assistant", "B"))
    assert read(row, "question_answer").messages == expected
    assert read({**row, "answer": 1}, "question_answer").messages == expected
    assert (
        read({**row, "choices": None, "options": ["x", "y"]}, "question_answer").messages
        == expected
    )
    without = to_conversation(row, "question_answer", {}, ("context", "choices"))
    assert without.messages[0] == Message("user", "Which?")
    for choices in ("xy", [1, 2], {"text": ["x"]}, ["x"] * 27):
        with pytest.raises(RowError, match="choice"):
            read({**row, "choices": choices}, "question_answer")
    dolly = {"instruction": "Add.", "context": "2 and 2", "output": "4"}
    assert read(dolly, "instruction").messages[0].content == "Add.\n\n2 and 2"


def test_what_no_format_reads_is_named():
    turns = [
        {"role": "user", "content": "2+2?", "id": 7, "refusal": None},
        {"role": "assistant", "content": "4", "id": 8, "model": "m", "annotations": []},
    ]
    row = {"messages": turns, "source": "web", "score": 0, "note": "", "split": None}
    assert read(row, "messages").unread == ("source", "score", "messages.id", "messages.model")
    assert to_conversation(row, "messages", {}, ("source", "id")).unread == (
        "score",
        "messages.model",
    )
    assert read({"text": "a", "tools": [1]}, "text").unread == ("tools",)


def test_a_row_of_another_format_than_the_first_is_rejected():
    with pytest.raises(RowError, match=r"^no question$"):
        read({"text": "To be or not to be"}, "question_answer")


def test_text_stays_text_and_columns_are_mapped():
    assert read({"body": " a\n"}, "text", text="body") == Conversation(text=" a\n")


def test_parts_weights_reasoning_and_tool_calls():
    import json

    as_text = {**CALL, "function": {"name": "add", "arguments": json.dumps({"a": 2})}}
    row = {
        "messages": [
            {
                "role": "system",
                "content": [
                    {"type": "text", "text": "Be brief."},
                    {"type": "text", "text": "Add."},
                ],
            },
            {"role": "user", "content": "2+?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [as_text],
                "weight": 0,
                "reasoning_content": "Hm.",
            },
            {"role": "tool", "content": "4", "tool_call_id": "call00001", "name": None},
            {"role": "assistant", "content": "4", "tool_calls": None, "weight": 1.0},
        ],
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
    }
    assert read(row, "messages") == Conversation(
        (
            Message("system", "Be brief.\nAdd."),
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


JSON_FAULT = "tool-call arguments: broken JSON: Expecting property name enclosed in double quotes"
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
        (chat(("narrator", "a"), ("assistant", "b")), "unknown role 'narrator'"),
        (
            chat(("user", "a"), ("tool", "b"), ("assistant", "c")),
            "a tool result without a tool call",
        ),
        (chat(("user", 3), ("assistant", "b")), "content is not text"),
        (chat(("user", None), ("assistant", "b")), "content is not text"),
        (
            chat(("user", [{"type": "image"}]), ("assistant", "b")),
            "content has parts that are not text",
        ),
        (chat(("user", "\ud800"), ("assistant", "b")), "half a surrogate pair in the text"),
        (
            chat(("user", "a"), ("assistant", "b"), tools="{"),
            "tools: broken JSON: Expecting property name enclosed in double quotes",
        ),
        (
            chat(("user", "a"), ("assistant", "b"), tools=[{"type": "function"}]),
            "a tool names no function",
        ),
        (
            chat(("user", "a"), ("assistant", "b"), tools=[{"name": "f", "x": DEEP}]),
            "nested too deeply",
        ),
        (
            chat(("user", "a"), ("assistant", "b"), tools=[{"name": "f", "x": b"1"}]),
            "a value that JSON does not have",
        ),
        ({"messages": []}, "messages are not a list of messages"),
        ({"messages": "hello"}, "messages are not a list of messages"),
        ({"messages": ["hello"]}, "a message is not an object"),
        ({"messages": None}, "no messages"),
        ({}, "no messages"),
        ({"messages": [{"content": "a"}]}, "a message has no role"),
        (calling({"name": "f", "arguments": "{'a': 1}"}), JSON_FAULT),
        (
            calling({"name": "f", "arguments": '{"a": 1, "a": 2}'}),
            "tool-call arguments: a key stands twice in an object",
        ),
        (
            calling({"name": "f", "arguments": '{"a": NaN}'}),
            "tool-call arguments: a value that JSON does not have",
        ),
        (calling({"name": "f", "arguments": "[1]"}), "tool-call arguments are not an object"),
        (
            calling({"name": "f", "arguments": "1" * 5000}),
            "tool-call arguments: a number of too many digits",
        ),
        (calling({"name": ""}), "a tool call names no function"),
        (calling({"name": "f"}, weight=2), "a message's weight is not 0 or 1"),
        (calling({"name": "f"}, weight=float("nan")), "a message's weight is not 0 or 1"),
        (calling({"name": "f"}, reasoning_content=3), "reasoning_content is not a string"),
        (
            calling({"name": "f"}, function_call={"name": "f"}),
            "tool_calls and function_call differ",
        ),
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


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
)
keys = st.sampled_from(
    [
        "role",
        "from",
        "value",
        "content",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "type",
        "text",
        "weight",
    ]
)
junk = st.recursive(
    scalars | st.sampled_from(["user", "assistant", "tool", "function_call", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(REQUIRED)), st.data())
def test_nothing_but_a_row_error_comes_of_a_malformed_row(format, data):
    optional = OPTIONAL.get(format, OF_ALL)
    row = {name: data.draw(junk, label=name) for name in (*REQUIRED[format], *optional)}
    try:
        conversation = read(row, format)
    except RowError:
        return
    assert conversation.text or any(
        message.role == "assistant" for message in conversation.messages
    )
