"""Rows of files: what is read, in which order, and what a bad file says."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trainer.config import Source
from trainer.data.source import read_rows, source_digest, without_nulls
from trainer.flow import BadInput

ROWS = [{"text": "one"}, {"text": "zwei\u2028drei"}, {"text": "四"}]


def a_source(**fields) -> Source:
    return Source.model_validate(fields)


def write(path: Path, rows=ROWS) -> Source:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return a_source(path=str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = list(read_rows(write(tmp_path / name)))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3]
    assert {row.file for row in rows} == {name}


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", [{"text": "second"}])
    write(tmp_path / "a.parquet", [{"text": "first"}])
    (tmp_path / "notes.txt").write_text("not data")
    assert [row.fields["text"] for row in read_rows(a_source(path=str(tmp_path)))] == ["first", "second"]


def test_rows_limits_and_nothing_after_them_is_read(tmp_path):
    source = write(tmp_path / "a.jsonl")
    Path(source.path or "").write_text('{"text": "one"}\nbroken')
    assert len(list(read_rows(source.model_copy(update={"rows": 1})))) == 1


def test_lines_under_the_name_json_a_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    rows = list(read_rows(a_source(path=str(path))))
    assert [(row.number, row.fields["text"]) for row in rows] == [(1, "one"), (3, "two")]


def test_tool_schemas_keep_their_own_keys(tmp_path):
    rows = [{"tools": [{"p": {"city": {"type": "string"}}}]}, {"tools": [{"p": {"day": {"type": "integer"}}}]}]
    for name in ("a.jsonl", "a.parquet"):  # Parquet's schema is the union: both rows come back with both keys
        assert [row.fields for row in read_rows(write(tmp_path / name, rows))] == rows
    assert without_nulls({"a": None, "b": [None, {"c": None}]}) == {"b": [None, {}]}


def test_a_null_column_stays_a_column(tmp_path):
    rows = [{"instruction": "a", "input": None}, {"instruction": "b", "input": "c"}]
    assert [row.fields for row in read_rows(write(tmp_path / "a.parquet", rows))] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.jsonl: the file holds no rows"),
        (b"\n\n", r"bad\.jsonl: the file holds no rows"),
        (b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: broken JSON"),
        (b'{"text": "a"}\n[1]\n', r"bad\.jsonl:2: the line is a list"),
        (b"null\n", r"bad\.jsonl:1: the line is null"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', r"bad\.jsonl:3: not valid UTF-8 at byte 11"),
        (b'{"n": ' + b"1" * 5000 + b"}", r"bad\.jsonl:1: broken JSON"),
        (b'{"n": ' + b"[" * 100_000, r"bad\.jsonl:1: broken JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(read_rows(a_source(path=str(tmp_path / "bad.jsonl"))))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.json", b"[]", "holds no rows"),
        ("bad.json", b'[{"text": "a"}, 3]', "item 2 of the list is a number"),
        ("bad.json", b'[{"text": "a"}', "broken JSON"),
        ("bad.parquet", b"PAR0", "not a readable Parquet file"),
        ("bad.csv", b"a,b", r"rows are read from \.jsonl, \.json, \.parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(read_rows(a_source(path=str(tmp_path / name))))


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
    with pytest.raises(BadInput, match=r"`org/data`.*ConnectionError: no route to host.*give its files as `path`"):
        list(read_rows(a_source(name="org/data")))


def test_a_dataset_of_the_hub_is_read_like_a_file(monkeypatch):
    import datasets

    rows = [{"messages": [{"role": "user", "name": None}]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: datasets.Dataset.from_list(rows))
    assert [row.fields for row in read_rows(a_source(name="org/data"))] == [{"messages": [{"role": "user"}]}]
    assert source_digest(a_source(name="org/data")).startswith("hub-")


def test_the_digest_is_of_the_content(tmp_path):
    (tmp_path / "x").mkdir()
    first, moved = write(tmp_path / "a.jsonl"), write(tmp_path / "x" / "other.jsonl")
    changed = write(tmp_path / "c.jsonl", [*ROWS[:-1], {"text": "五"}])
    assert source_digest(first) == source_digest(moved)
    assert source_digest(first) != source_digest(changed)
    assert source_digest(first) == source_digest(first.model_copy(update={"rows": 1}))


def test_real_files(shared):
    source = a_source(path=str(shared / "data" / "glaive_toolcall_en_300.jsonl"))
    rows = list(read_rows(source))
    assert len(rows) == 300
    assert rows[0].fields["messages"][0]["role"] == "user"
