"""Folders, tables and compressed files: `path`, `name` and datasets.load_dataset read the same."""

import bz2
import csv
import gzip
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from packhorse.trainer.config.data import DataSection, Source
from packhorse.trainer.config.recipe import parse_recipe
from packhorse.trainer.data.source import read_rows, say_once, source_digest, source_files
from packhorse.trainer.data.split import SplitRows
from packhorse.trainer.datatypes import BadInput, RowError

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True),
}
ROWS = [{"text": "one"}, {"text": 'zwei,"drei"\nvier'}, {"text": "4\u2028五"}, {"text": "7"}]


def a_source(**fields) -> Source:
    return Source.model_validate(fields)


def encoded(kind: str, rows=ROWS) -> bytes:
    if kind == "jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if kind == "json":
        return json.dumps(rows).encode()
    import io

    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def write(path: Path, rows=ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, *packing = path.name.split(".")[1:]
    raw = encoded(kind, rows)
    path.write_bytes(COMPRESS[packing[0]](raw) if packing else raw)
    return path


@pytest.mark.parametrize("packing", ["", *COMPRESS])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_every_kind_of_text_file_compressed_or_not_gives_the_same_rows(tmp_path, kind, packing):
    path = write(tmp_path / ".".join(filter(None, ["a", kind, packing])))
    rows = list(read_rows(a_source(path=str(path))))
    assert [row.fields for row in rows] == ROWS
    assert [(row.number, row.file) for row in rows] == [(n, path.name) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("packing", COMPRESS)
def test_a_compressed_file_that_breaks_off_or_is_damaged_is_named(tmp_path, packing):
    path = write(tmp_path / f"a.jsonl.{packing}", ROWS * 500)
    whole = path.read_bytes()
    for bad in (whole[:-5], b"not compressed at all"):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match=rf"a\.jsonl\.{packing}: the compressed file"):
            list(read_rows(a_source(path=str(path))))


def test_faulty_rows_of_a_table_keep_their_number_and_the_next_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfq,a\r\n1,"x\ny"\r\n\r\n2\r\n3,\xff\r\n,last\r\n')
    first, short, broken, last = read_rows(a_source(path=str(path)))
    assert first.fields == {"q": "1", "a": "x\ny"}
    assert (short.number, str(short.fields)) == (2, "1 cells under 2 columns")
    assert (broken.number, str(broken.fields)) == (3, "not valid UTF-8")
    assert isinstance(short.fields, RowError)
    assert (last.number, last.fields) == (4, {"q": None, "a": "last"})


def test_the_digest_tells_a_table_with_commas_from_one_with_tabs(tmp_path):
    raw = gzip.compress(b"a\n1\n")
    digests = set()
    for kind in ("csv", "tsv"):
        (tmp_path / f"a.{kind}.gz").write_bytes(raw)
        source = a_source(path=str(tmp_path / f"a.{kind}.gz"))
        digests.add(source_digest(source, tmp_path / "digests"))
    assert len(digests) == 2


# ------------------------------------------------------------------------------------------ folders

FOLDERS = {
    "no split in the names": ["b.jsonl", "a.jsonl.gz", "more/c.jsonl"],
    "splits in the names": ["train-b.jsonl", "train-a.jsonl", "test.jsonl", "more/train.jsonl"],
    "splits as folders": ["train/b.csv", "train/a.csv", "test/a.csv"],
    "sharded": ["data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl"],
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("names", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_is_read_as_load_dataset_reads_it(tmp_path, monkeypatch, names, split):
    import datasets
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    for name in names:
        write(folder / name, [{"text": f"{name} {n}"} for n in range(2)])
    if split == "test" and not any(split in name for name in names):
        with pytest.raises(BadInput, match="have no split `test`, only train; give `split`"):
            source_files(a_source(path=str(folder), split=split))
        with pytest.raises(BadInput, match=r"split `test`.*cannot be loaded"):
            list(read_rows(a_source(name=str(folder), split=split)))
        return
    loaded: Any = datasets.load_dataset(str(folder), split=split)
    theirs = [row["text"] for row in loaded]
    assert theirs
    for key in ("path", "name"):
        rows = list(read_rows(a_source(**{key: str(folder), "split": split})))
        assert [row.fields for row in rows] == [{"text": text} for text in theirs], key
        assert [f"{row.file} {row.number - 1}" for row in rows] == theirs


@pytest.mark.parametrize("key", ["path", "name"])
def test_what_a_folder_holds_besides_is_named_and_data_is_refused(tmp_path, caplog, key):
    for name in ("train.jsonl", "test.jsonl", ".hidden/train.jsonl"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("hello")
    say_once.cache_clear()
    with caplog.at_level(logging.INFO, "packhorse"):
        assert list(source_files(a_source(**{key: str(tmp_path)})) or ()) == ["train.jsonl"]
    assert "split `train` is train.jsonl; not notes.txt, test.jsonl" in caplog.text
    for other in ("extra.jsonl", "train.csv"):
        write(tmp_path / other)
        with pytest.raises(BadInput, match=f"load_dataset does not read {other}"):
            source_files(a_source(**{key: str(tmp_path)}))
        chosen = a_source(**{key: str(tmp_path), "data_files": other})
        assert list(source_files(chosen) or ()) == [other]
        (tmp_path / other).unlink()
    write(tmp_path / "train.csv")
    both = a_source(**{key: str(tmp_path), "data_files": ["train.csv", "t*.jsonl"]})
    assert list(source_files(both) or ()) == ["train.csv", "test.jsonl", "train.jsonl"]


def test_config_data_files_and_revision_are_those_of_load_dataset(tmp_path, monkeypatch):
    import datasets
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    for name in ("easy/a.jsonl", "hard/a.jsonl", "hard/held.jsonl"):
        write(folder / name, [{"text": name}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- {config_name: easy, data_files: easy/*.jsonl}\n- config_name: hard\n"
        "  data_files:\n  - {split: train, path: hard/a.jsonl}\n"
        "  - {split: test, path: hard/held.jsonl}\n---\n"
    )
    for chosen, name in (
        ({"config": "easy"}, "easy/a.jsonl"),
        ({"config": "hard"}, "hard/a.jsonl"),
        ({"config": "hard", "split": "test"}, "hard/held.jsonl"),
        ({"data_files": ["hard/held.jsonl"]}, "hard/held.jsonl"),
    ):
        for key in ("path", "name"):
            (row,) = read_rows(a_source(**{key: str(folder)}, **chosen))
            assert (row.file, row.fields) == (name, {"text": name})
    # what load_dataset itself is asked for
    asked = {"data_files": {"train": [str(folder / "hard/a.jsonl")]}, "split": "train"}
    loaded: Any = datasets.load_dataset("json", **asked)
    assert loaded[0]["text"] == "hard/a.jsonl"
    packaged = a_source(name="json", data_files=[str(folder / "hard/a.jsonl")], split="train[:1]")
    assert [row.fields for row in read_rows(packaged)] == [{"text": "hard/a.jsonl"}]
    with pytest.raises(BadInput, match="config `middle`"):
        list(read_rows(a_source(path=str(folder), config="middle")))
    given = {}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: given.update(kwargs, args=args)
    )
    with pytest.raises(AttributeError):
        list(read_rows(a_source(name="org/data", config="hard", revision="v2")))
    assert (given["args"], given["revision"]) == (("org/data", "hard"), "v2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "{}/a.jsonl", "split": "test"}, "a file has no `split`"),
        ({"path": "{}/a.jsonl", "config": "x"}, "a file has no `config`"),
        ({"path": "{}/a.jsonl", "data_files": ["x"]}, "a file has no `data_files`"),
        ({"name": "{}", "revision": "v1"}, "a folder has no `revision`"),
    ],
)
def test_a_key_that_chooses_nothing_is_refused(tmp_path, fields, message):
    write(tmp_path / "a.jsonl")
    fields = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in fields.items()}
    with pytest.raises(BadInput, match=message):
        source_files(a_source(**fields))


def test_keys_that_do_not_belong_together_are_refused():
    def data(**source):
        tree = {"model": {"name": "m"}, "run": {"dir": "r"}, "train": {"steps": 1}}
        return parse_recipe({**tree, "data": {"train": [source]}})

    with pytest.raises(BadInput, match="`revision` belongs to `name`"):
        data(path="x", revision="v1")
    with pytest.raises(BadInput, match="all files of a folder that is streamed are used"):
        data(path="x", streaming=True, split="test")


def test_files_of_the_same_name_in_two_folders_are_told_apart(tmp_path):
    for name in ("x/a.jsonl", "y/a.jsonl"):
        write(tmp_path / name, [{"text": name}])
    section = DataSection.model_validate({"train": [{"path": str(tmp_path)}]})
    rows = SplitRows(section, "train")
    found = [(rows.files[row.file], row.fields["text"]) for row in rows.rows()]
    assert found == [(str(tmp_path / name), name) for name in ("x/a.jsonl", "y/a.jsonl")]
