"""Read the rows of a source, one at a time.

A `Source` of the recipe enters (a file, a folder of files, a dataset of the hub); `RawRow`s leave:
plain dicts as the file holds them. Files are streamed; only a `.json` list is read whole, since
nothing before its last bracket says that it is one.

A line that cannot be read is a row with a fault; data.broken_lines decides whether it stops the run
or is counted as a reject: large files that were scraped or cut off hold some. A fault of a whole
file (a list or a Parquet file that breaks off) is BadInput, as nothing says how many rows are lost.

JSONL is read with json and not with Arrow, which gives every object of a column the union of their
keys, so that each tool schema is filled with the nulls of all others. Parquet and datasets are
stored that way already: nulls inside structs are removed again. A null that was meant is removed
with them, as nothing tells the two apart; it stays in a map, and in a column that is stored as JSON
(Arrow's `arrow.json`, which datasets writes for mixed objects).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import date, time
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from packhorse.trainer.config.data import Source
from packhorse.trainer.data.digest import file_digest
from packhorse.trainer.datatypes import BadInput, RowError
from packhorse.trainer.utils.strict_json import parse
from packhorse.trainer.utils.text import error_line, one_line

SUFFIXES = (".jsonl", ".json", ".parquet")
BATCH_ROWS = 256  # rows of Arrow that are turned into Python values at once
JSON_NAMES = {
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


class RawRow(NamedTuple):
    """A row as it was read.

    Attributes:
        number: line of a JSONL file, else row of the file, from 1.
        fields: a RowError where the row cannot be read.
        file: the file's name.
    """

    number: int
    fields: dict[str, Any] | RowError
    file: str = ""


def read_rows(source: Source) -> Iterator[RawRow]:
    """Yield the rows of `source` in file order, at most `source.rows`.

    Raises:
        BadInput: there is no file, or one is empty or cannot be read; it names the file.
    """
    if source.path is None:
        rows = _dataset_rows(_hub_dataset(source), str(source.name))
    elif is_saved_dataset(source.path):
        rows = _dataset_rows(_saved_dataset(source.path), Path(source.path).name)
    else:
        rows = _file_rows(source.path)
    return islice(rows, source.rows)


def source_digest(source: Source, memory: Path) -> str:
    """Return a digest of the source's files, wherever they lie, or the hub dataset's fingerprint.

    `source.rows` is not part of it.

    Args:
        memory: folder of remembered digests of files; see `file_digest`.
    """
    if source.path is None:
        return f"hub-{_hub_dataset(source)._fingerprint}"
    files = source_files(source.path)
    if is_saved_dataset(source.path):
        files = sorted(files[0].glob("*.arrow"))
    digests = [file_digest(path, memory) for path in files]
    if len(digests) == 1:
        return digests[0]
    return xxhash.xxh3_128_hexdigest("\n".join(digests).encode())


def source_files(place: str) -> list[Path]:
    """Return the files of a source's `path`: itself, or those in the folder, sorted by name.

    A dataset that the library datasets has saved counts as one file: its folder.

    Raises:
        BadInput: there is no such file.
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
            f"{place}: there is no such file or folder; check `path` (it is relative to the "
            f"current folder)"
        )
    if path.suffix not in SUFFIXES:
        raise BadInput(
            f"{place}: rows are read from {', '.join(SUFFIXES)}; convert or rename the file"
        )
    return [path]


def count_rows(source: Source) -> int | None:
    """Return how many rows the files have, roughly; None if that needs parsing them."""
    if not source.path:
        return None
    rows = 0
    for path in source_files(source.path):
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows += pyarrow.parquet.read_metadata(path).num_rows
        elif path.suffix == ".jsonl":
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    rows += block.count(b"\n")
        else:
            return None
    return min(rows, source.rows or rows)


def is_saved_dataset(place: str) -> bool:
    """Return whether the folder was written by datasets.Dataset.save_to_disk."""
    path = Path(place).expanduser()
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def without_nulls(value: Any, feature: Any = None) -> Any:
    """Remove every key whose value is null from nested objects; items of lists stay.

    Args:
        feature: the type that datasets gives the value, if it knows one. What it stores as JSON
            has no nulls but those that were meant, and stays as it is.
    """
    if type(feature).__name__ == "Json":
        return value
    if isinstance(value, dict):
        features = feature if isinstance(feature, dict) else {}
        return {
            key: without_nulls(item, features.get(key))
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        return [without_nulls(item, getattr(feature, "feature", None)) for item in value]
    return value


def json_scalar(value: Any) -> Any:
    """Return a date, a decimal or bytes as JSON has them: text, or a number.

    Anything else comes back unchanged, as do bytes that are not UTF-8; a format that reads such a
    column rejects the row.
    """
    try:
        if isinstance(value, date | time):  # a datetime is a date, too
            return value.isoformat()
        if isinstance(value, Decimal):
            return parse(str(value))
        if isinstance(value, bytes):
            return value.decode()
    except (RowError, UnicodeDecodeError):
        pass
    return value


# -------------------------------------------------------------------------------------------- files


def _file_rows(place: str) -> Iterator[RawRow]:
    for path in source_files(place):
        if not os.access(path, os.R_OK):
            raise BadInput(f"{path}: the file may not be read; check its permissions")
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
        first = next(rows, None)
        if first is None:
            raise BadInput(
                f"{path}: the file holds no rows; write at least one, or take the file out of the "
                f"recipe"
            )
        yield from chain([first], rows)


def _json_rows(path: Path) -> Iterator[RawRow]:
    """Read lines, or a `.json` file that holds a list; many `.json` files hold lines."""
    if path.suffix == ".json" and _is_list(path):
        yield from _json_list(path)
        return
    # as bytes, which split at \n alone: U+2028 may stand inside a JSON string
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield RawRow(number, _object(_parse_bytes(line.rstrip(b"\r\n"))), path.name)


def _json_list(path: Path) -> Iterator[RawRow]:
    rows = _parse_bytes(path.read_bytes())
    if isinstance(rows, RowError):
        raise BadInput(
            f"{path}: the list cannot be read: {rows}; mend it, or write one object a line"
        )
    for number, item in enumerate(rows, start=1):
        yield RawRow(number, _object(item), path.name)


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH_ROWS)

    return _arrow_rows(batches(), path.name, f"{path}: not a readable Parquet file")


def _arrow_rows(batches: Iterable[Any], name: str, fault: str) -> Iterator[RawRow]:
    """Yield the rows of Arrow tables or batches. `fault` begins the error if they break off."""
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for fields in _batch_fields(batch):
                number += 1
                yield RawRow(number, fields, name)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadInput(f"{fault} after row {number} ({one_line(error, 200)})") from None


def _batch_fields(batch: Any) -> Iterator[dict[str, Any] | RowError]:
    """Yield the fields of each row without nested nulls; a column that is null in a row stays, as
    the format is detected by the columns."""
    types = {field.name: field.type for field in batch.schema}
    rows = _python_rows(batch)
    if rows is None:  # find those that cannot be read
        one_by_one = (_python_rows(batch.slice(n, 1)) or [None] for n in range(len(batch)))
        rows = [row for found in one_by_one for row in found]
    for row in rows:
        try:
            if row is None:
                raise RowError("a value that cannot be read, as text that is not UTF-8")
            yield {name: _json_value(value, types[name]) for name, value in row.items()}
        except RowError as error:
            yield error


def _python_rows(batch: Any) -> list[dict[str, Any] | None] | None:
    """Return the rows as Python values; None if one holds text that is not UTF-8 or a date that
    Python does not have."""
    try:
        # first, as the offsets in a damaged file may point anywhere in memory
        batch.validate(full=True)
        return batch.to_pylist()
    except ValueError:
        return None


def _json_value(value: Any, type: Any) -> Any:
    """Return a value of an Arrow column of this type as JSON has it, without a struct's nulls."""
    import pyarrow

    if value is None:
        return None
    if isinstance(type, pyarrow.JsonType):
        return parse(value)
    if isinstance(type, pyarrow.StructType):
        return {
            key: _json_value(item, type.field(key).type)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(type, pyarrow.MapType):
        # pairs of a key and a value; only those that the row has, so that a null was meant
        return {key: _json_value(item, type.item_type) for key, item in value}
    if isinstance(value, list) and hasattr(type, "value_type"):
        return [_json_value(item, type.value_type) for item in value]
    return json_scalar(value)


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _parse_bytes(text: bytes) -> Any:
    """Return the value of a JSON text; a RowError if it has none."""
    try:
        # Editors on Windows begin a file with a byte order mark, which is no JSON.
        return parse(text.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError:
        return RowError("not valid UTF-8")
    except RowError as error:
        return error


def _object(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict | RowError):
        return value
    return RowError(f"the row is {JSON_NAMES.get(type(value), 'null')}, not an object")


# ----------------------------------------------------------------------------------------- datasets


def _dataset_rows(dataset: Any, name: str) -> Iterator[RawRow]:
    # As Arrow: the library's own decoding fills objects with nulls, and so hides which were meant.
    tables = dataset.with_format("arrow").iter(BATCH_ROWS)
    return _arrow_rows(tables, name, f"{name}: the dataset cannot be read")


def _saved_dataset(place: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(Path(place).expanduser()))
    except Exception as error:  # the library raises a dozen unrelated classes
        raise BadInput(
            f"{place}: the saved dataset cannot be loaded ({one_line(error, 200)}); save it again"
        ) from None


def open_stream(source: Source, state: dict[str, Any] | None) -> Any:
    """Open a streaming hub dataset (an IterableDataset) where its `state_dict` left off."""
    dataset = _hub_dataset(source)
    if state is not None:
        dataset.load_state_dict(state)
    return dataset


def _hub_dataset(source: Source) -> Any:
    """Load the dataset through the library's own cache, or open it if the source is streaming."""
    import datasets

    try:
        return datasets.load_dataset(
            str(source.name), split=source.split, streaming=source.streaming
        )
    except Exception as error:  # the library raises a dozen unrelated classes
        raise BadInput(
            f"the dataset `{source.name}` (split `{source.split}`) cannot be loaded "
            f"({error_line(error, 200)}); check its name, the network and the access token, or "
            f"download it and give its files as `path`"
        ) from None
