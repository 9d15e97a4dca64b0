"""Raw rows become conversations: formats, the user's function, and nothing lost since the file."""

import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from packhorse.trainer.config.data import Source
from packhorse.trainer.data.chat_template import Template
from packhorse.trainer.data.rows import RowReader
from packhorse.trainer.data.source import read_rows
from packhorse.trainer.datatypes import BadInput, Conversation, Filtered, Message, RowError

ASKED, ANSWERED = Message("user", "2+2?"), Message("assistant", "4")
MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def a_source(path, rows=None, **fields) -> Source:
    if rows is not None:
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        )
    return Source.model_validate({"path": str(path), **fields})


def conversations(source: Source) -> list[Conversation | str]:
    """What became of each row; a reason where it is left out."""
    reader, results = pickle.loads(pickle.dumps(RowReader.of(source))), []
    for row in read_rows(source):
        try:
            results.append(reader.conversation(row.fields))
        except RowError as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def test_the_first_row_that_is_not_broken_tells_the_format(tmp_path):
    source = a_source(tmp_path / "a.jsonl", ["{", "[1]", {"question": "2+2?", "answer": "4"}])
    assert conversations(source) == [
        "RowError: broken JSON: Expecting property name enclosed in double quotes",
        "RowError: the row is a list, not an object",
        Conversation((ASKED, ANSWERED)),
    ]


def test_a_file_of_something_else_is_refused_with_its_first_fault(tmp_path):
    with pytest.raises(
        BadInput, match=r"a\.jsonl: none of its first rows can be read \(row 1: broken JSON: Exp"
    ):
        RowReader.of(a_source(tmp_path / "a.jsonl", ["question,answer"] * 200))


def test_a_source_has_one_format_and_a_run_as_many_as_it_has_sources(tmp_path):
    rows = [{"question": "2+2?", "answer": "4"}, {"messages": MESSAGES}]
    first = a_source(tmp_path / "a.jsonl", rows)
    second = a_source(tmp_path / "b.jsonl", rows[::-1])
    assert conversations(first) == [Conversation((ASKED, ANSWERED)), "RowError: no question"]
    assert conversations(second) == [Conversation((ASKED, ANSWERED)), "RowError: no messages"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def written(body: str) -> str:
        name = f"reads_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(f"def read(row):\n    {body}\n")
        return f"{name}:read"

    return written


LISTED = (
    "return [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': row['a']}]"
)


def test_a_function_of_the_users_own_reads_the_row(tmp_path, own):
    rows = [{"q": "2+2?", "a": "4"}]
    assert conversations(a_source(tmp_path / "a.jsonl", rows, function=own(LISTED))) == [
        Conversation((ASKED, ANSWERED))
    ]
    with_tools = own(
        LISTED.replace("return ", "return {'tools': [{'name': 'f'}], 'messages': ") + "}"
    )
    assert conversations(a_source(tmp_path / "a.jsonl", function=with_tools)) == [
        Conversation((ASKED, ANSWERED), tools=({"type": "function", "function": {"name": "f"}},))
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (LISTED, "KeyError: 'q'"),
        ("raise ValueError('too\\nodd' * 99)", "ValueError: too oddtoo"),
        ("raise SystemExit(0)", "SystemExit: 0"),  # else the run would seem to be done
        ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
        ("raise type('Odd', (Exception,), {'__str__': lambda _: 1 / 0})", "Odd"),
        ("return None", r"it must give a list of messages, or \{messages, tools\}, not NoneType"),
        ("return {'text': 'a'}", "it must give a list of messages"),
        ("return []", "messages are not a list of messages"),
        ("return [{'role': 'narrator', 'content': 'a'}]", "unknown role 'narrator'"),
    ],
)
def test_a_fault_of_the_function_is_a_reject_that_can_be_counted(tmp_path, own, body, reason):
    source = a_source(tmp_path / "a.jsonl", [{"other": 1}], function=own(body))
    with pytest.raises(RowError, match=reason) as error:
        RowReader.of(source).conversation({"other": 1})
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def test_a_function_that_is_not_there_is_refused_before_a_row_is_read(tmp_path):
    with pytest.raises(BadInput, match="cannot be imported"):
        RowReader.of(a_source(tmp_path / "a.jsonl", [{}], function="nowhere_at_all:read"))


def test_filters_see_the_row_and_what_was_made_of_it(tmp_path, own):
    rows = [{"q": "2+2?", "a": "4", "best": "4"}, {"q": "2+2?", "a": "5", "best": 4}]
    filters = {"math_answer": "best"}
    kept, wrong = conversations(
        a_source(tmp_path / "a.jsonl", rows, function=own(LISTED), filters=filters)
    )
    assert kept == Conversation((ASKED, ANSWERED))
    assert wrong == f"{Filtered.__name__}: math_answer: not the reference's value"


TOOLS = [
    [{"type": "function", "function": {"name": "f", "parameters": {"city": {"type": "string"}}}}],
    [
        {
            "type": "function",
            "function": {"name": "g", "parameters": {"day": {"type": "integer", "minimum": 1}}},
        }
    ],
]


def test_the_template_renders_what_the_row_says_however_it_is_stored(tmp_path, shared):
    """Arrow fills every tool schema with the nulls of all others: none may come back."""
    import datasets

    template = Template(AutoTokenizer.from_pretrained(shared / "tokenizers/qwen3"))
    rows = []
    for number, tools in enumerate(TOOLS):
        function = {
            "name": tools[0]["function"]["name"],
            "arguments": {"city": "Ulm"} if not number else {"day": 3},
        }
        calls = [{"id": "call00001", "type": "function", "function": function}]
        turns = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": calls}]
        turns += [{"role": "tool", "content": "4", "tool_call_id": "call00001"}, MESSAGES[1]]
        rows.append({"messages": turns, "tools": tools})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    sources = [
        a_source(tmp_path / "a.jsonl", rows),
        *(a_source(tmp_path / n) for n in ("a.json", "a.parquet", "saved")),
    ]
    plain, *others = [conversations(source) for source in sources]
    for row, conversation in zip(rows, plain, strict=True):
        assert isinstance(conversation, Conversation)
        text = template.follow(conversation).text
        assert json.dumps(row["tools"][0]) in text
        assert json.dumps(row["messages"][1]["tool_calls"][0]["function"]["arguments"]) in text
        assert "null" not in text
    assert all(other == plain for other in others)


def test_all_real_rows_are_read(shared):
    for path in sorted((shared / "data").glob("*.jsonl")):
        assert all(isinstance(result, Conversation) for result in conversations(a_source(path))), (
            path.name
        )
