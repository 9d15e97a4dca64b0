"""Rows of a source, one at a time.

A `config_data.Source` enters (a file, a folder of files, a dataset of the hub); `RawRow`s leave:
plain dicts as they stand in the file. Formats are known elsewhere (format.py). Files are streamed;
only a `.json` list is read whole, since nothing before its last bracket says that it is one.

A line that cannot be read is a row with a fault; data.broken_lines says whether that is the end, or
is counted with the other rejects: large files that were scraped or cut off hold some. What is wrong
with a whole file (a list or a Parquet file that breaks off) is BadInput, as nothing says how many
rows it would have had.

JSONL is read with json and not with Arrow, which gives every object of a column the union of their
keys, so that each tool schema is filled with the nulls of all others. Parquet and datasets are
stored that way already: nulls inside nested values are taken out again (`without_nulls`). A null
that was meant goes with them: nothing tells the two apart, but where the column is stored as JSON
(Arrow's `arrow.json`, which datasets writes for mixed objects) it stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from trainer.config.data import Source
from trainer.data.digest import file_digest
from trainer.datatypes import BadInput, RowError
from trainer.utils.strict_json import parse
from trainer.utils.text import one_line

SUFFIXES = (".jsonl", ".json", ".parquet")
BATCH_ROWS = 256  # of Arrow, turned into Python values at once
UNREADABLE = "a value that cannot be read, as text that is not UTF-8"


class RawRow(NamedTuple):
    """`number` is the 1-based line of a JSONL file, else the 1-based row of the file; `file` its
    name.

    `fields` is a RowError where the row cannot be read.
    """

    number: int
    fields: dict[str, Any] | RowError
    file: str = ""


def read_rows(source: Source) -> Iterator[RawRow]:
    """The rows of `source` in file order, at most `source.rows`.

    Raises:
        BadInput: nothing is there, or a file is empty or cannot be read; it names the file.
    """
    if source.path is None:
        rows = _dataset_rows(_hub_dataset(source), str(source.name))
    elif is_saved_dataset(source.path):
        rows = _dataset_rows(_saved_dataset(source.path), Path(source.path).name)
    else:
        rows = _file_rows(source.path)
    return islice(rows, source.rows)


def source_digest(source: Source, memory: Path) -> str:
    """What the source holds, wherever it lies: the digest of its files, or the hub dataset's
    fingerprint.

    `source.rows` is not part of it.

    Args:
        memory: a folder where digests of files are kept (digest.py).
    """
    if source.path is None:
        return f"hub-{_hub_dataset(source)._fingerprint}"
    saved = is_saved_dataset(source.path)
    files = (
        sorted(Path(source.path).expanduser().glob("*.arrow"))
        if saved
        else source_files(source.path)
    )
    digests = [file_digest(path, memory) for path in files]
    return (
        digests[0] if len(digests) == 1 else xxhash.xxh3_128_hexdigest("\n".join(digests).encode())
    )


def source_files(place: str) -> list[Path]:
    """The files behind `path`: itself, or the readable ones in the folder, by name. Raises BadInput
    where none is.

    A dataset that the library datasets has saved counts as one file: its folder.
    """
    path = Path(place).expanduser()
    if is_saved_dataset(place):
        return [path]
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise BadInput(
                f"{place}: the folder holds a dataset's splits; point `path` at one of them, as "
                f"{path}/train"
            )
        files = sorted(
            file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file()
        )
        if not files:
            raise BadInput(
                f"{place}: the folder holds no {', '.join(SUFFIXES)} file; point `path` at one "
                f"that does"
            )
        return files
    if not path.is_file():
        raise BadInput(
            f"{place}: there is no such file or folder; check `path` (it is taken from the current "
            f"folder)"
        )
    if path.suffix not in SUFFIXES:
        raise BadInput(
            f"{place}: rows are read from {', '.join(SUFFIXES)}; convert or rename the file"
        )
    return [path]


def is_saved_dataset(place: str) -> bool:
    """Whether the folder is what datasets.Dataset.save_to_disk writes."""
    path = Path(place).expanduser()
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def without_nulls(value: Any) -> Any:
    """`value` with every null key taken out of nested objects (list items stay)."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


# -------------------------------------------------------------------------------------------- files


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
            raise BadInput(
                f"{path}: the file holds no rows; write at least one, or take the file out of the "
                f"recipe"
            )


def _json_rows(path: Path) -> Iterator[RawRow]:
    """JSONL, or a `.json` file: a list of objects, or (as many are) lines under the wrong name."""
    if path.suffix == ".json" and _first_byte(path) == b"[":
        yield from _json_list(path)
        return
    with path.open("rb") as file:  # bytes split at \n alone: U+2028 may stand inside a JSON string
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield RawRow(number, _line(line), path.name)


def _line(line: bytes) -> dict[str, Any] | RowError:
    try:
        return _object(parse(_decoded(line.rstrip(b"\r\n"))))
    except RowError as error:
        return error


def _json_list(path: Path) -> Iterator[RawRow]:
    try:
        rows = parse(_decoded(path.read_bytes()))
    except RowError as error:
        raise BadInput(
            f"{path}: the list cannot be read: {error}; mend it, or write one object a line"
        ) from None
    for number, item in enumerate(rows, start=1):
        try:
            yield RawRow(number, _object(item), path.name)
        except RowError as error:
            yield RawRow(number, error, path.name)


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for fields in _arrow_rows(batch):
                    number += 1
                    yield RawRow(number, fields, path.name)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadInput(
            f"{path}: not a readable Parquet file after row {number} ({one_line(error, 200)})"
        ) from None


def _arrow_rows(batch: Any) -> Iterator[dict[str, Any] | RowError]:
    """The rows of an Arrow table or batch. Nested nulls go; a column that is null in a row stays,
    as the columns tell the format."""
    types = {field.name: field.type for field in batch.schema}
    rows = _python_rows(batch)
    if rows is None:  # find those that cannot be read
        rows = [
            row
            for number in range(len(batch))
            for row in _python_rows(batch.slice(number, 1)) or [RowError(UNREADABLE)]
        ]
    for row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            yield {
                name: _parsed_json(without_nulls(value), types[name]) for name, value in row.items()
            }
        except RowError as error:
            yield error


def _python_rows(batch: Any) -> list[dict[str, Any] | RowError] | None:
    """The rows as Python values; None where one holds what is not UTF-8, a date that Python does
    not have, or worse: a damaged file may point anywhere in memory, so it is looked at first."""
    try:
        batch.validate(full=True)
        return batch.to_pylist()
    except ValueError:
        return None


def _parsed_json(value: Any, type: Any) -> Any:
    """`value` with what is stored as JSON inside an Arrow column of this type parsed."""
    import pyarrow

    if value is None:
        return None
    if isinstance(type, pyarrow.JsonType):
        return parse(value)
    if isinstance(type, pyarrow.StructType):
        return {key: _parsed_json(item, type.field(key).type) for key, item in value.items()}
    if isinstance(value, list) and hasattr(type, "value_type"):
        return [_parsed_json(item, type.value_type) for item in value]
    return value


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise RowError("not valid UTF-8") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        kinds = {
            list: "a list",
            str: "a string",
            bool: "true or false",
            int: "a number",
            float: "a number",
        }
        raise RowError(f"the row is {kinds.get(type(value), 'null')}, not an object")
    return value


# ----------------------------------------------------------------------------------------- datasets


def _dataset_rows(dataset: Any, name: str) -> Iterator[RawRow]:
    """As Arrow and not as the library decodes it: it fills objects with nulls, and so hides which
    were meant.
    """
    import pyarrow

    number = 0
    try:
        for table in dataset.with_format("arrow").iter(BATCH_ROWS):
            for fields in _arrow_rows(table):
                number += 1
                yield RawRow(number, fields, name)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadInput(
            f"{name}: the dataset cannot be read after row {number} ({one_line(error, 200)})"
        ) from None


def _saved_dataset(place: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(Path(place).expanduser()))
    except Exception as error:  # the library raises a dozen unrelated classes
        raise BadInput(
            f"{place}: the saved dataset cannot be loaded ({one_line(error, 200)}); save it again"
        ) from None


def open_stream(source: Source, state: dict[str, Any] | None) -> Any:
    """A growing hub dataset, an IterableDataset, from where its `state_dict` once stood."""
    dataset = _hub_dataset(source)
    if state is not None:
        dataset.load_state_dict(state)
    return dataset


def _hub_dataset(source: Source) -> Any:
    """The dataset, downloaded by the library's own cache; read as it comes where the source grows.
    Every failure there is about the name or the network."""
    import datasets

    try:
        return datasets.load_dataset(
            str(source.name), split=source.split, streaming=source.streaming
        )
    except Exception as error:  # the library raises a dozen unrelated classes
        raise BadInput(
            f"the dataset `{source.name}` (split `{source.split}`) cannot be loaded "
            f"({type(error).__name__}: {one_line(error, 200)}); check its name, the network and the "
            f"access token, "
            "or download it and give its files as `path`"
        ) from None
