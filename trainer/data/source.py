"""Rows of a source, one at a time.

A `config.Source` enters (a file, a folder of files, a dataset of the hub); `RawRow`s leave: plain dicts as they
stand in the file. Formats are known elsewhere (format.py). Files are streamed; only a `.json` list is read whole,
since nothing before its last bracket says that it is one.

JSONL is read with json and not with Arrow, which gives every object of a column the union of their keys, so that
each tool schema is filled with the nulls of all others. Parquet is written that way already: nulls inside nested
values are taken out again (`without_nulls`). A null that was meant goes with them: nothing tells the two apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from trainer.config import Source
from trainer.flow import BadInput

SUFFIXES = (".jsonl", ".json", ".parquet")
CHUNK_BYTES = 1 << 22


class RawRow(NamedTuple):
    """`number` is the 1-based line of a JSONL file, else the 1-based row of the file; `file` its name."""

    number: int
    fields: dict[str, Any]
    file: str = ""


def read_rows(source: Source) -> Iterator[RawRow]:
    """The rows of `source` in file order, at most `source.rows`.

    Raises:
        BadInput: nothing is there, a file is empty, or a line cannot be read; it names the file and the line.
    """
    rows = _hub_rows(source) if source.path is None else _file_rows(source.path)
    return islice(rows, source.rows)


def source_digest(source: Source) -> str:
    """What the source holds, wherever it lies: xxh3-128 over the files' bytes, or the hub dataset's fingerprint.

    `source.rows` is not part of it.
    """
    if source.path is None:
        return f"hub-{_hub_dataset(source)._fingerprint}"
    digest = xxhash.xxh3_128()
    for path in source_files(source.path):
        digest.update(f"{path.suffix} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def source_files(place: str) -> list[Path]:
    """The files behind `path`: itself, or the readable ones in the folder, by name. Raises BadInput where none is."""
    path = Path(place).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise BadInput(f"{place}: the folder holds no {', '.join(SUFFIXES)} file; point `path` at one that does")
        return files
    if not path.is_file():
        raise BadInput(f"{place}: there is no such file or folder; check `path` (it is taken from the current folder)")
    if path.suffix not in SUFFIXES:
        raise BadInput(f"{place}: rows are read from {', '.join(SUFFIXES)}; convert or rename the file")
    return [path]


def without_nulls(value: Any) -> Any:
    """`value` with every null key taken out of nested objects (list items stay)."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


# ----------------------------------------------------------------------------------------------- files


def _file_rows(place: str) -> Iterator[RawRow]:
    for path in source_files(place):
        if not os.access(path, os.R_OK):
            raise BadInput(f"{path}: the file may not be read; check its permissions")
        read = _parquet_rows if path.suffix == ".parquet" else _json_rows
        found = False
        for row in read(path):
            found = True
            yield row
        if not found:
            raise BadInput(f"{path}: the file holds no rows; write at least one, or take the file out of the recipe")


def _json_rows(path: Path) -> Iterator[RawRow]:
    """JSONL, or a `.json` file: a list of objects, or (as many are) lines under the wrong name."""
    if path.suffix == ".json" and _first_byte(path) == b"[":
        yield from _json_list(path)
        return
    with path.open("rb") as file:  # bytes split at \n alone: U+2028 may stand inside a JSON string
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield RawRow(number, _object(_decode(line, f"{path}:{number}"), f"{path}:{number}"), path.name)


def _json_list(path: Path) -> Iterator[RawRow]:
    rows = _parse(_decode(path.read_bytes(), str(path)), str(path))
    for number, fields in enumerate(rows, start=1):
        if not isinstance(fields, dict):
            raise BadInput(f"{path}: item {number} of the list is {_kind(fields)}; every row must be an object")
        yield RawRow(number, fields, path.name)


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRow(number, _row_without_nulls(fields), path.name)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not a readable Parquet file after row {number} ({_one_line(error)})") from None


def _row_without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """Nested nulls go; a column that is null in this row stays, as the columns tell the format."""
    return {name: without_nulls(value) for name, value in fields.items()}


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not valid UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers too long for an int
        raise BadInput(f"{where}: broken JSON ({_one_line(error)}); mend or delete it") from None


def _object(text: str, where: str) -> dict[str, Any]:
    fields = _parse(text, where)
    if not isinstance(fields, dict):
        raise BadInput(f'{where}: the line is {_kind(fields)}; every line must be an object such as {{"text": "..."}}')
    return fields


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# ----------------------------------------------------------------------------------------------- the hub


def _hub_rows(source: Source) -> Iterator[RawRow]:
    for number, fields in enumerate(_hub_dataset(source), start=1):
        yield RawRow(number, _row_without_nulls(dict(fields)), source.name or "")


def open_stream(source: Source, state: dict[str, Any] | None) -> Any:
    """A growing hub dataset, an IterableDataset, from where its `state_dict` once stood."""
    dataset = _hub_dataset(source)
    if state is not None:
        dataset.load_state_dict(state)
    return dataset


def _hub_dataset(source: Source) -> Any:
    """The dataset, downloaded by the library's own cache; read as it comes where the source grows. Every failure
    there is about the name or the network."""
    import datasets

    try:
        return datasets.load_dataset(str(source.name), split=source.split, streaming=source.grows)
    except Exception as error:  # the library raises a dozen unrelated classes
        raise BadInput(
            f"the dataset `{source.name}` (split `{source.split}`) cannot be loaded "
            f"({type(error).__name__}: {_one_line(error)}); check its name, the network and the access token, "
            "or download it and give its files as `path`"
        ) from None
