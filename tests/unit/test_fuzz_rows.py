"""100,000 broken and odd rows: each is parsed, or refused with a reason; none hangs or stops the
next."""

import json
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from packhorse.trainer.config.data import Source
from packhorse.trainer.data.format import REQUIRED
from packhorse.trainer.data.rows import RowReader
from packhorse.trainer.data.source import read_rows
from packhorse.trainer.datatypes import BadInput, Conversation, RowError

CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "n": 1.5}}}
]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "2+?"}], "name": "Ann"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL],
        "reasoning_content": "Hm.",
        "weight": 0,
    },
    {"role": "tool", "content": "4", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "Es ist 4. \u2028 四 \U0001f600", "weight": 1},
]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS, "tools": TOOLS, "id": 7},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "2+?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4", "weight": 1},
        ],
        "system": "Be brief.",
        "tools": json.dumps(TOOLS),
    },
    "prompt_completion": {"prompt": TURNS[:2], "completion": "4"},
    "instruction": {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "history": [["Hi", "Hello"]],
    },
    "question_answer": {"question": "2+2?", "answer": "4", "system": "Be brief."},
    "text": {"text": "To be or not to be", "meta": {"score": 0.5, "tags": ["a", None]}},
}


def deep(depth: int) -> Any:
    value: Any = "x"
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


JUNK: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        10**30,
        10**4000,
        1e308,
        float("nan"),
        float("inf"),
        -float("inf"),
    ),
    *(
        "",
        " ",
        "\n",
        "\x00",
        "\ud800",
        "\ufeff",
        "\u202e",
        "<|im_end|>",
        "{",
        "[]",
        "{}",
        "null",
        "NaN",
        "1" * 5000,
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [{}],
        {"": None},
        {"role": "user"},
        {"from": "gpt"},
        ["a", 1],
        deep(30),
        deep(70),
        deep(400),
    ),
    *(
        "system",
        "user",
        "assistant",
        "tool",
        "human",
        "gpt",
        "function_call",
        "[" * 300,
        '{"a": 1, "a": 2}',
    ),
]
BYTES = [
    *(
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xf0\x9f",
        b"\x00",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b"\r\n",
        b"\x1f",
        b'"',
    ),
    *(
        b"\\",
        b"\\u",
        b"\\ud800",
        b"\\u0000",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-",
    ),
    *(
        b'"text": "b", ',
        b'"role": "user", ',
        b"null",
        b"// c\n",
        b"'",
        b"\xc2\xa0",
        b"[" * 2000,
        b"9" * 5000,
        b"\x85",
    ),
]


def altered(value: Any, rng: random.Random) -> Any:
    """A copy with one thing in it replaced, left out, renamed or doubled, at a random depth."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.25:
        return rng.choice(JUNK)
    if isinstance(value, list):
        at, items = rng.randrange(len(value)), list(value)
        changes = (
            items[:at] + items[at + 1 :],
            [*items, items[at]],
            items[::-1],
            {str(number): item for number, item in enumerate(items)},
        )
        return (
            rng.choice(changes)
            if rng.random() < 0.2
            else [*items[:at], altered(items[at], rng), *items[at + 1 :]]
        )
    key = rng.choice(list(value))
    rest = {name: item for name, item in value.items() if name != key}
    if rng.random() < 0.2:
        return rng.choice(
            (rest, {**rest, key.upper(): value[key]}, {**value, "name": value[key]}, [value])
        )
    return {**rest, key: altered(value[key], rng)}


def altered_line(row: Any, rng: random.Random) -> bytes:
    """The row as JSON, after changes to its values and then to its bytes."""
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        row = altered(row, rng)
    return altered_bytes(
        json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"), rng
    )[:20_000]


def altered_bytes(text: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((0, 0, 1, 2, 8))):
        at = rng.randrange(len(text) + 1)
        inserted = text[:at] + rng.choice(BYTES) + text[at:]
        cut = text[:at] + text[at + rng.randrange(9) :]
        text = rng.choice((inserted, inserted, cut, text[:at], text[at:], text + text[:at]))
    return text


def outcomes(source: Source, format: str) -> Iterator[Conversation | str]:
    """Yield what each row becomes under a format: a conversation, or a reason that can be counted
    and written."""
    reader = RowReader(source, format)
    for row in read_rows(source):
        try:
            yield reader.conversation(
                pickle.loads(pickle.dumps(row.fields))
            )  # as on its way to another process
        except (RowError, BadInput) as error:
            reason = str(error)
            if isinstance(error, BadInput):  # a key that says what to train, but for a typing error
                assert "may say what not to train" in reason
                reason = "a key that stops the run"
            assert 3 < len(reason) < 200, reason
            assert reason.isprintable(), reason
            json.dumps(reason, ensure_ascii=False).encode()
            yield reason


@pytest.mark.parametrize("format", ROWS)
def test_every_line_is_parsed_or_refused_with_a_sentence(tmp_path, format):
    rng = random.Random(format)
    found: Counter[str] = Counter()
    for _ in range(12):
        content = rng.choice((b"\n", b"\r\n", b"\n\n")).join(
            altered_line(ROWS[format], rng) for _ in range(1400)
        )
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        source = Source.model_validate({"path": str(path)})
        results = list(outcomes(source, format))
        assert len(results) == sum(1 for line in content.split(b"\n") if line.strip()), (
            "a broken line took others along"
        )
        found.update(result if isinstance(result, str) else "parsed" for result in results)
        usable_or_refused(source)
    assert sum(found.values()) > 100_000 / len(ROWS)
    assert found["parsed"] > 1000, "most of what is tried is refused at once"
    assert len(found) > 10


def usable_or_refused(source: Source) -> None:
    """By its first rows: either a format is found, or the source is refused in one sentence."""
    try:
        RowReader.of(source)
    except BadInput as error:
        sentence = str(error)
    else:
        return
    assert 20 < len(sentence) < 3000


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".arrow"])
def test_every_file_is_read_or_refused_with_a_sentence(tmp_path, suffix):
    """The faults of a whole file are BadInput; those of its rows stay theirs."""
    import datasets

    rng = random.Random(suffix)
    rows = [ROWS["instruction"], {**ROWS["instruction"], "input": None}] * 3
    path = tmp_path / f"a{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path)
        (path,) = tmp_path.glob("*.arrow")
    source = Source.model_validate({"path": str(tmp_path if suffix == ".arrow" else path)})
    whole, results = path.read_bytes(), Counter()
    assert len(list(outcomes(source, "instruction"))) == len(rows)
    for _ in range(400):
        content = bytearray(altered_bytes(whole, rng))
        for _ in range(rng.choice((0, 1, 9))):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            results["rows"] += len(list(outcomes(source, "instruction")))
        except BadInput:
            results["refused"] += 1
        usable_or_refused(source)
    assert results["rows"] > 100
    assert results["refused"] > 30


@pytest.mark.parametrize("format", REQUIRED)
def test_texts_of_ten_megabytes_pass(tmp_path, format):
    """Work that is quadratic in a text's length would exceed the test's time limit."""
    rows = [
        ROWS[format],
        json.loads(json.dumps(ROWS[format]).replace("4", "4" * 10_000_000, 1)),
        ROWS[format],
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"text": "' + "x" * 10_000_000
    )
    *results, cut = outcomes(Source.model_validate({"path": str(path)}), format)
    assert [type(result) for result in results] == [Conversation] * 3
    assert cut == "broken JSON: Unterminated string starting at"
