"""Rows of files: what is read, in which order, and what a bad file says."""

import json
import os
import time
from datetime import date, datetime, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from packhorse.trainer.config.data import Source
from packhorse.trainer.data import digest, row_files
from packhorse.trainer.data.row_files import fields_of_batches
from packhorse.trainer.data.source import read_rows, source_digest
from packhorse.trainer.data.streaming import _plain_rows
from packhorse.trainer.datatypes import BadInput, RowError

ROWS = [{"text": "one"}, {"text": "zwei\u2028drei"}, {"text": "四"}]


def a_source(**fields) -> Source:
    return Source.model_validate(fields)


def write(path: Path, rows=ROWS) -> Source:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return a_source(path=str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = list(read_rows(write(tmp_path / name)))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3]
    assert {row.file for row in rows} == {name}


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", [{"text": "second"}])
    write(tmp_path / "a.jsonl", [{"text": "first"}])
    (tmp_path / "notes.txt").write_text("not data")
    assert [row.fields for row in read_rows(a_source(path=str(tmp_path)))] == [
        {"text": "first"},
        {"text": "second"},
    ]


def test_rows_limits_and_nothing_after_them_is_read(tmp_path):
    source = write(tmp_path / "a.jsonl")
    Path(source.path or "").write_text('{"text": "one"}\nbroken')
    assert len(list(read_rows(source.model_copy(update={"rows": 1})))) == 1


def test_lines_under_the_name_json_a_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    rows = list(read_rows(a_source(path=str(path))))
    assert [(row.number, row.fields) for row in rows] == [
        (1, {"text": "one"}),
        (3, {"text": "two"}),
    ]


def test_tool_schemas_keep_their_own_keys(tmp_path):
    rows = [
        {"tools": [{"p": {"city": {"type": "string"}}}]},
        {"tools": [{"p": {"day": {"type": "integer"}}}]},
    ]
    for name in (
        "a.jsonl",
        "a.parquet",
    ):  # Parquet's schema is the union: both rows come back with both keys
        assert [row.fields for row in read_rows(write(tmp_path / name, rows))] == rows


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.jsonl", '[{"text": "a"}, {"text": "b"}]', "holds one JSON list.*suffix .json"),
        ("a.jsonl", '[\n  {"text": "a"}\n]', "holds one JSON list"),
        ("a.json", '{"data": [{"text": "a"}, {"text": "b"}]}', "key `data` holds 2 rows"),
        ("a.json", '{\n "rows": [\n  {"text": "a"}\n ]\n}', "key `rows` holds 1 rows"),
        ("a.jsonl", '{"examples": [{"question": "a"}]}', "key `examples` holds 1 rows"),
    ],
)
def test_a_file_that_is_one_json_value_says_what_it_holds(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=found):
        list(read_rows(a_source(path=str(tmp_path / name))))


def test_rows_of_one_column_or_of_lists_are_no_other_file(tmp_path):
    rows = [{"dialog": [{"role": "user", "content": "a"}]}, {"ids": [1, 2]}]
    assert [row.fields for row in read_rows(write(tmp_path / "a.jsonl", rows))] == rows
    (tmp_path / "b.jsonl").write_text("[1]\n[2]\n")
    faults = [str(row.fields) for row in read_rows(a_source(path=str(tmp_path / "b.jsonl")))]
    assert faults == ["the row is a list, not an object"] * 2


SCHEMAS = [
    {"text": "a", "tools": [{"name": "f", "p": {"city": {"type": "string"}}}]},
    {"text": "b", "tools": [{"name": "g", "p": {"day": {"type": "integer", "minimum": 1}}}]},
]
MIXED = [  # no Arrow type holds both, and a null is meant: datasets stores `p` as JSON
    {"text": "a", "tools": [{"name": "f", "p": {"city": {"enum": ["x", None], "default": None}}}]},
    {"text": "b", "tools": [{"name": "g", "p": [1]}]},
]


@pytest.mark.parametrize("rows", [SCHEMAS, MIXED], ids=["filled with nulls", "stored as JSON"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "hub", "saved"])
def test_rows_are_the_same_however_they_are_stored(tmp_path, monkeypatch, kind, rows):
    import datasets

    plain = write(tmp_path / f"a.{'json' if kind == 'json' else 'jsonl'}", rows)
    dataset = datasets.Dataset.from_json(str(plain.path), cache_dir=str(tmp_path / "cache"))
    assert isinstance(dataset, datasets.Dataset)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: dataset)
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "a.parquet")
        plain = a_source(path=str(tmp_path / "a.parquet"))
    elif kind == "saved":
        dataset.save_to_disk(tmp_path / "saved")
        plain = a_source(path=str(tmp_path / "saved"))
    elif kind == "hub":
        plain = a_source(name="org/data")
    assert [row.fields for row in read_rows(plain)] == rows
    assert [row.number for row in read_rows(plain)] == [1, 2]


ARGUMENTS = [  # nulls that were meant, in a call's arguments
    {"call": {"name": "f", "arguments": {"unit": None, "x": 1}}},
    {"call": {"name": "g", "arguments": {"y": [None, {"z": None}]}}},
]


@pytest.mark.parametrize("rows", [SCHEMAS, MIXED, ARGUMENTS])
def test_a_stream_gives_the_rows_of_the_files_with_the_nulls_that_were_meant(tmp_path, rows):
    import datasets

    plain = write(tmp_path / "a.jsonl", rows)
    dataset = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    assert (
        list(_plain_rows(dataset.with_format("arrow")))
        == rows
        == [row.fields for row in read_rows(plain)]
    )


def test_maps_dates_decimals_and_bytes_of_parquet_are_read_as_json(tmp_path):
    properties = pyarrow.map_(
        pyarrow.string(), pyarrow.struct([("type", pyarrow.string()), ("unit", pyarrow.string())])
    )
    table = pyarrow.table(
        {
            "tools": pyarrow.array(
                [[{"properties": [("city", {"type": "string", "unit": None})]}]],
                pyarrow.list_(pyarrow.struct([("properties", properties)])),
            ),
            "default": pyarrow.array(
                [[("limit", None)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())
            ),
            "day": [date(2024, 2, 29)],
            "at": [datetime(2024, 2, 29, 12, 30, tzinfo=timezone.utc)],
            "price": [Decimal("19.99")],
            "count": [Decimal("7")],
            "text": ["Größe".encode()],
            "image": [b"\xff\xd8"],  # no text: an error only where a format reads it
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = read_rows(a_source(path=str(tmp_path / "a.parquet")))
    assert row.fields == {
        "tools": [{"properties": {"city": {"type": "string"}}}],
        "default": {"limit": None},
        "day": "2024-02-29",
        "at": "2024-02-29T12:30:00+00:00",
        "price": 19.99,
        "count": 7,
        "text": "Größe",
        "image": b"\xff\xd8",
    }


def test_a_saved_dataset_is_a_source_and_its_digest_that_of_its_rows(tmp_path):
    import datasets

    for name, rows in (("a", SCHEMAS), ("b", SCHEMAS), ("c", SCHEMAS[:1])):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    a, b, c = (source_digest(a_source(path=str(tmp_path / name)), tmp_path) for name in "abc")
    assert a == b != c
    datasets.DatasetDict({"train": datasets.Dataset.from_list(SCHEMAS)}).save_to_disk(
        tmp_path / "splits"
    )
    with pytest.raises(BadInput, match=r"point `path` at one, as .*splits/train"):
        list(read_rows(a_source(path=str(tmp_path / "splits"))))
    assert len(list(read_rows(a_source(path=str(tmp_path / "splits" / "train"))))) == 2
    (tmp_path / "a" / "data-00000-of-00001.arrow").write_bytes(b"broken")
    with pytest.raises(BadInput, match="the saved dataset cannot be loaded"):
        list(read_rows(a_source(path=str(tmp_path / "a"))))


def test_a_null_column_stays_a_column(tmp_path):
    rows = [{"instruction": "a", "input": None}, {"instruction": "b", "input": "c"}]
    assert [row.fields for row in read_rows(write(tmp_path / "a.parquet", rows))] == rows


@pytest.mark.parametrize("content", [b"", b"\n\r\n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=r"bad\.jsonl: the file holds no rows"):
        list(read_rows(a_source(path=str(tmp_path / "bad.jsonl"))))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "broken JSON: Expecting value"),
        (b'{"text": "cut o', "broken JSON: Unterminated string starting at"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON: Extra data"),
        (b"[1]", "the row is a list, not an object"),
        (b"null", "the row is null, not an object"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b'{"n": ' + b"1" * 5000 + b"}", "a number of too many digits"),
        (b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"n": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"text": "a", "text": "b"}', "a key stands twice in an object"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_row_with_a_fault_and_the_next_is_read(
    tmp_path, line, reason
):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    first, faulty, last = read_rows(a_source(path=str(tmp_path / "a.jsonl")))
    assert (first.fields, last.fields, last.number) == ({"text": "a"}, {"text": "b"}, 4)
    assert isinstance(faulty.fields, RowError)
    assert (str(faulty.fields), faulty.number) == (reason, 3)


def test_many_brackets_side_by_side_are_not_deep(tmp_path):
    rows = [{"table": [[n] for n in range(1000)], "text": "{" * 100}]
    assert [row.fields for row in read_rows(write(tmp_path / "a.jsonl", rows))] == rows


def test_an_item_of_a_list_that_is_no_object_is_a_row_with_a_fault(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, 3]')
    _, faulty = read_rows(a_source(path=str(tmp_path / "a.json")))
    assert str(faulty.fields) == "the row is a number, not an object"


def test_a_parquet_row_that_cannot_be_read_is_a_row_with_a_fault(tmp_path):
    texts = pyarrow.array([b"one", b"\xff", b"three"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    first, faulty, last = read_rows(a_source(path=str(tmp_path / "a.parquet")))
    assert (first.fields, last.fields) == ({"text": "one"}, {"text": "three"})
    assert str(faulty.fields) == "a value that cannot be read, as text that is not UTF-8"


def lists_of(texts: list[bytes], offsets: list[int]) -> pyarrow.Table:
    """Return a table whose texts may be no UTF-8, and whose offsets may point anywhere."""
    values = pyarrow.array(texts).view(pyarrow.string())
    where = pyarrow.array(offsets, pyarrow.int32()).buffers()[1]
    kind, rows = pyarrow.list_(pyarrow.string()), len(offsets) - 1
    return pyarrow.table(
        {"texts": pyarrow.Array.from_buffers(kind, rows, [None, where], children=[values])}
    )


@pytest.mark.parametrize("by_row", [False, True], ids=["a file", "a stream"])
def test_a_text_in_a_list_that_is_no_utf_8_is_the_fault_of_its_row_alone(by_row):
    table = lists_of([b"one", b"\xff", b"three"], [0, 1, 2, 3])
    batches = [table.slice(n, 1) for n in range(3)] if by_row else [table]
    first, faulty, last = fields_of_batches(batches)
    assert (first, last) == ({"texts": ["one"]}, {"texts": ["three"]})
    assert isinstance(faulty, RowError)


@pytest.mark.parametrize("by_row", [False, True], ids=["a file", "a stream"])
def test_offsets_that_point_elsewhere_are_not_followed(by_row):
    table = lists_of([b"one", b"two", b"three"], [0, 1, 2**30, 3])
    batches = [table.slice(n, 1) for n in range(3)] if by_row else [table]
    first, *others = fields_of_batches(batches)
    assert first == {"texts": ["one"]}
    assert all(isinstance(fields, RowError) for fields in others)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.json", b"[]", "holds no rows"),
        ("bad.json", b'[{"text": "a"}', "the list cannot be read: broken JSON"),
        ("bad.json", b'[{"text": "\xff"}]', "the list cannot be read: not valid UTF-8"),
        ("bad.parquet", b"PAR0", "not a readable Parquet file"),
        ("bad.json.zip", b"a,b", r"rows are read from \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
        ("bad.parquet.gz", b"", r"rows are read from \.jsonl"),
        ("bad.csv", b"a,b", "holds no rows"),
        ("bad.csv", b"a,a\n1,2", r"must name each column, once \(a, a\)"),
        ("bad.csv", b'a,b\n1,2\n3,"4"x\n', r"line 3 cannot be read, after row 1"),
        ("bad.csv", b'a,b\n1,2\n3,"4\n', r"line 3 cannot be read, after row 1.*end of data"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(read_rows(a_source(path=str(tmp_path / name))))


def bombs() -> dict[str, tuple[pyarrow.Array, int]]:
    """Columns of files of less than 20 KB, and the limit in bytes beyond which they are bombs."""
    repeated = pyarrow.array(["x" * 6_000_000])
    nulls = pyarrow.nulls(2_000_000)
    return {
        "pages": (pyarrow.array(["x" * 10_000] * 5000), 1 << 20),
        "dictionary": (
            pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300), repeated),
            row_files.BOMB_BYTES,
        ),
        "list": (
            pyarrow.ListArray.from_arrays(pyarrow.array([0, 2_000_000], pyarrow.int32()), nulls),
            1 << 20,
        ),
    }


@pytest.mark.parametrize("kind", ["pages", "dictionary", "list"])
def test_a_parquet_file_that_unfolds_to_gigabytes_is_refused_unread(tmp_path, monkeypatch, kind):
    column, limit = bombs()[kind]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"question": column}),
        path,
        compression="zstd",
        use_dictionary=kind != "pages",
    )
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(row_files, "BOMB_BYTES", limit)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(BadInput, match=r"reading column `question.*would take .* GiB"):
        list(read_rows(a_source(path=str(path), format="instruction")))


def test_long_lists_of_few_texts_are_no_bomb(tmp_path):
    """As the roles of a million turns, and a column of empty tools."""
    rows, turns = 300_000, 600_000
    roles = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0, 1] * rows, pyarrow.int32()), pyarrow.array(["user", "assistant"])
    )
    ends = pyarrow.array(range(0, turns + 1, 2), pyarrow.int32())
    no_tools = pyarrow.nulls(turns, pyarrow.list_(pyarrow.string()))[:rows]
    columns = {
        "question": pyarrow.array(["x"] * rows),
        "roles": pyarrow.ListArray.from_arrays(ends, roles.dictionary_decode()),
        "tools": no_tools,
    }
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert len(list(read_rows(a_source(path=str(path), format="instruction", rows=10)))) == 10


def test_a_text_in_a_list_is_repeated_for_each_item(tmp_path, monkeypatch):
    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 1_000_000, pyarrow.int32()), pyarrow.array(["x" * 1_000_000])
    )
    ends = pyarrow.array([0, 1_000_000], pyarrow.int32())
    path = tmp_path / "a.parquet"
    column = pyarrow.ListArray.from_arrays(ends, text)
    pyarrow.parquet.write_table(pyarrow.table({"question": column}), path, compression="zstd")
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", None)
    with pytest.raises(BadInput, match=r"would take .* GiB"):
        list(read_rows(a_source(path=str(path), format="instruction")))


def test_a_column_of_one_value_is_no_bomb(tmp_path):
    rows = [{"split": "train", "question": "x" * 1000, "messages": [], "n": None}] * 50_000
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert len(list(read_rows(a_source(path=str(path), format="instruction", rows=10)))) == 10


def test_nothing_there(tmp_path):
    with pytest.raises(BadInput, match="no such file or folder"):
        list(read_rows(a_source(path=str(tmp_path / "gone.jsonl"))))
    with pytest.raises(BadInput, match="the folder holds no"):
        list(read_rows(a_source(path=str(tmp_path))))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(BadInput, match=r"a\.jsonl: the file may not be read"):
        list(read_rows(source))


def test_a_dataset_that_cannot_be_had_says_what_to_do(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        BadInput, match=r"`org/data`.*ConnectionError: no route to host.*give its files as `path`"
    ):
        list(read_rows(a_source(name="org/data")))


def test_a_dataset_of_the_hub_is_read_like_a_file(monkeypatch):
    import datasets

    rows = [{"messages": [{"role": "user", "name": None}]}]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *_, **__: datasets.Dataset.from_list(rows)
    )
    assert [row.fields for row in read_rows(a_source(name="org/data"))] == [
        {"messages": [{"role": "user"}]}
    ]
    assert source_digest(a_source(name="org/data"), Path("unused")).startswith("hub-")


def test_the_digest_is_of_the_content(tmp_path):
    (tmp_path / "x").mkdir()
    first, moved = write(tmp_path / "a.jsonl"), write(tmp_path / "x" / "other.jsonl")
    changed = write(tmp_path / "c.jsonl", [*ROWS[:-1], {"text": "五"}])
    of = partial(source_digest, memory=tmp_path / "digests")
    assert of(first) == of(moved)
    assert of(first) != of(changed)
    assert of(first) == of(first.model_copy(update={"rows": 1}))


@pytest.fixture
def settled(tmp_path):
    """A file that changed a while ago."""
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    while time.time_ns() - path.stat().st_ctime_ns <= digest.SETTLED_NS:
        time.sleep(0.1)
    return path


def test_a_file_that_has_not_changed_is_not_read_again(settled, tmp_path, monkeypatch):
    first = digest.file_digest(settled, tmp_path / "digests")
    monkeypatch.setattr(digest.xxhash, "xxh3_128", None)
    assert digest.file_digest(settled, tmp_path / "digests") == first


def test_a_changed_file_is_read_again_though_its_size_and_time_are_the_old_ones(settled, tmp_path):
    first, before = digest.file_digest(settled, tmp_path / "digests"), settled.stat()
    settled.write_text("two")
    os.utime(settled, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest.file_digest(settled, tmp_path / "digests") != first


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    digest.file_digest(path, tmp_path / "digests")
    assert not (tmp_path / "digests").exists()


def test_a_damaged_memory_is_made_anew(settled, tmp_path):
    first = digest.file_digest(settled, tmp_path / "digests")
    (record,) = (tmp_path / "digests").iterdir()
    record.write_text("{")
    assert digest.file_digest(settled, tmp_path / "digests") == first
    assert "identity" in record.read_text()


def test_real_files(shared):
    source = a_source(path=str(shared / "data" / "glaive_toolcall_en_300.jsonl"))
    rows = list(read_rows(source))
    assert len(rows) == 300
    assert all(isinstance(row.fields, dict) for row in rows)
