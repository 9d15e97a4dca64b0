"""Read the rows of one file, one at a time: JSONL, JSON, CSV, TSV or Parquet, compressed or not.

A path enters; `RawRow`s leave: plain dicts as the file holds them. Files are streamed; only a
`.json` list is read whole, since nothing before its last bracket says that it is one.

A line that cannot be read is a row with a fault; data.broken_lines decides whether it stops the run
or is counted as a reject: large files that were scraped or cut off hold some. A fault of a whole
file (a list, a table or a compressed file that breaks off) is BadInput, as nothing says how many
rows are lost.

JSONL is read with json and not with Arrow, which gives every object of a column the union of their
keys, so that each tool schema is filled with the nulls of all others. Parquet and datasets are
stored that way already: nulls inside structs are removed again. A null that was meant is removed
with them, as nothing tells the two apart; it stays in a map, and in a column that is stored as JSON
(Arrow's `arrow.json`, which datasets writes for mixed objects).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from packhorse.trainer.datatypes import BadInput, RowError
from packhorse.trainer.utils.strict_json import parse
from packhorse.trainer.utils.text import one_line, printable

TEXTS = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXTS, ".parquet")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # one of these may follow a suffix of TEXTS
UNREADABLE = "packhorse: unreadable"  # the only key of a row of a stream's file: why it has none
OPEN = (b"{", b"[", b",", b":")  # how a line ends in the middle of a JSON value
# A column of a Parquet file is refused if it takes so much memory, and so many times its bytes.
BOMB_BYTES, BOMB_RATIO = 1 << 30, 500
BATCH_ROWS = 256  # rows of Arrow that are turned into Python values at once
MAX_CELL = 1 << 30  # characters; csv's own limit of 131,072 is less than a long conversation
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
        number: line of a JSONL file, else row of the file, from 1. A CSV's header has no number.
        fields: a RowError where the row cannot be read.
        file: the file's name, below the source's folder.
    """

    number: int
    fields: dict[str, Any] | RowError
    file: str = ""


def kind_of_file(path: Path) -> str:
    """Return the suffix that says how a file is read, as `.csv` of `rows.csv.gz`, or ""."""
    suffix = path.suffix
    if suffix in COMPRESSED:
        suffix = path.with_suffix("").suffix
        return suffix if suffix in TEXTS else ""
    return suffix if suffix in SUFFIXES else ""


def rows_of_file(path: Path, name: str) -> Iterator[RawRow]:
    """Yield the rows of a file.

    Args:
        name: of the file, for the rows.

    Raises:
        BadInput: the file cannot be read as what its suffix says.
    """
    kind = kind_of_file(path)
    if kind == ".parquet":
        return _parquet_rows(path, name)
    if kind in (".csv", ".tsv"):
        return _table_rows(path, name, "\t" if kind == ".tsv" else ",")
    return _json_rows(path, name)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file's bytes, which are decompressed on the way.

    Raises:
        BadInput: inside the block, the compressed bytes break off or are damaged.
    """
    if path.suffix not in COMPRESSED:
        with path.open("rb") as file:
            yield file
        return
    try:
        with _decompressed(path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise BadInput(
            f"{path}: the compressed file breaks off or is damaged ({one_line(error, 200)}); "
            "make or download it again"
        ) from None


def _decompressed(path: Path) -> Any:
    if path.suffix == ".zst":  # Python has no zstd before 3.14
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[path.suffix](path, "rb")


# --------------------------------------------------------------------------------------------- JSON


def _json_rows(path: Path, name: str) -> Iterator[RawRow]:
    """Read lines, or a `.json` file that holds a list; many `.json` files hold lines."""
    with _open(path) as file:
        is_list = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if is_list and kind_of_file(path) == ".json":
        yield from _json_list(path, name)
        return
    _require_lines(path)
    # as bytes, which split at \n alone: U+2028 may stand inside a JSON string
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield RawRow(number, _object(_parse_bytes(line.rstrip(b"\r\n"))), name)


def _require_lines(path: Path) -> None:
    """Refuse a file that is one JSON value which holds the rows, and say what it is."""
    value = _single_value(path)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        raise BadInput(
            f"{path}: the file holds one JSON list, not an object on each line; give it the suffix "
            ".json"
        )
    for key, rows in value.items() if isinstance(value, dict) else ():
        first = rows[0] if isinstance(rows, list) and rows else None
        # a column of messages is a list of objects, too
        if len(value) == 1 and isinstance(first, dict) and not {"role", "from"} & first.keys():
            raise BadInput(
                f"{path}: the file holds one object, whose key `{printable(key, 60)}` holds "
                f"{len(rows)} rows; write that list alone into a .json file"
            )


def _single_value(path: Path) -> Any:
    """Return the file's value if it is a single one on one line or many; else None or a RowError.

    By its first line most files are seen to be others, without being read whole.
    """
    with _open(path) as file:
        lines = (line.strip() for line in file if line.strip())
        first = next(lines, b"")
        value = _parse_bytes(first)
        if not isinstance(value, RowError):
            return None if any(lines) else value
        return _parse_bytes(b"\n".join([first, *lines])) if first.endswith(OPEN) else None


def _json_list(path: Path, name: str) -> Iterator[RawRow]:
    with _open(path) as file:
        rows = _parse_bytes(file.read())
    if isinstance(rows, RowError):
        raise BadInput(
            f"{path}: the list cannot be read: {rows}; mend it, or write one object a line"
        )
    for number, item in enumerate(rows, start=1):
        yield RawRow(number, _object(item), name)


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
    if isinstance(value, dict) and value.keys() == {UNREADABLE}:
        return RowError(str(value[UNREADABLE]))
    if isinstance(value, dict | RowError):
        return value
    return RowError(f"the row is {JSON_NAMES.get(type(value), 'null')}, not an object")


# ------------------------------------------------------------------------------------- CSV and TSV


def _table_rows(path: Path, name: str, delimiter: str) -> Iterator[RawRow]:
    """Read a table with a header. Values are texts; an empty cell is null, as datasets reads it."""
    csv.field_size_limit(MAX_CELL)
    number = 0
    with _open(path) as file:
        # bytes that are not UTF-8 become surrogates, so that only their row has a fault
        lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        table = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(table, [])
            if len(set(header)) < len(header) or "" in header:
                raise BadInput(
                    f"{path}: the first line must name each column, once ({', '.join(header)[:200]}"
                    "); add or mend it"
                )
            for cells in table:
                if cells:  # no empty line
                    number += 1
                    yield RawRow(number, _table_fields(header, cells), name)
        except csv.Error as error:
            raise BadInput(
                f"{path}: line {table.line_num} cannot be read, after row {number} ({error}); put "
                'a text with quotes, commas or line ends into quotes, and write "" for a quote '
                "inside"
            ) from None
        finally:
            lines.detach()  # `_open` closes the file


def _table_fields(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        return RowError(f"{len(cells)} cells under {len(header)} columns")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return RowError("not valid UTF-8")
    return {column: cell or None for column, cell in zip(header, cells, strict=True)}


# -------------------------------------------------------------------------------- Parquet and Arrow


def _parquet_rows(path: Path, name: str) -> Iterator[RawRow]:
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_no_bomb(path, file.metadata)
            yield from file.iter_batches(batch_size=BATCH_ROWS)

    return arrow_rows(batches(), name, f"{path}: not a readable Parquet file")


def _require_no_bomb(path: Path, metadata: Any) -> None:
    """Raise BadInput if a file of kilobytes says of itself that reading it takes gigabytes.

    Pages are decompressed whole, and a page may be all of a column in a row group. A text in a
    column's dictionary is repeated for each row of a batch, or item of a list; an item takes 8
    bytes, even if it is null and takes none in the file.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for number, column in enumerate(map(group.column, range(group.num_columns))):
            is_list = metadata.schema.column(number).max_repetition_level > 0
            is_repeated = any("DICTIONARY" in name for name in column.encodings)
            times = (column.num_values if is_list else min(BATCH_ROWS, group.num_rows)) or 1
            sizes = (column.total_uncompressed_size, times if is_repeated else 1)
            of_texts, of_items = sizes, (8 * column.num_values * is_list, 1)
            few = BOMB_RATIO * column.total_compressed_size
            needed = max((n * size for size, n in (of_texts, of_items) if size > few), default=0)
            if needed > BOMB_BYTES:
                raise BadInput(
                    f"{path}: reading column `{printable(column.path_in_schema, 60)}` would take "
                    f"{needed / 2**30:.1f} GiB, for {column.total_compressed_size:,} bytes in the "
                    "file; if that is meant, write it anew in row groups of fewer rows"
                )


def arrow_rows(batches: Iterable[Any], name: str, fault: str) -> Iterator[RawRow]:
    """Yield the rows of Arrow tables or batches. `fault` begins the error if they break off."""
    import pyarrow

    number = 0
    try:
        for number, fields in enumerate(fields_of_batches(batches), start=1):
            yield RawRow(number, fields, name)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadInput(f"{fault} after row {number} ({one_line(error, 200)})") from None


def fields_of_batches(batches: Iterable[Any]) -> Iterator[dict[str, Any] | RowError]:
    """Yield the fields of each row of Arrow tables or batches, without nested nulls.

    A column that is null in a row stays, as the format is detected by the columns.
    """
    held, known = None, None
    for batch in chain.from_iterable(map(_record_batches, batches)):
        # A stream's rows are slices of a batch, and each has all that lies below the batch's lists:
        # it is checked with the first of them. Of a single row, its own two offsets are left.
        places = [b and b.address for column in batch.columns for b in column.buffers()]
        is_known = len(batch) == 1 and places == known
        is_sound = _is_sound(batch, full=not is_known)
        held, known = batch, places if is_sound else None  # held: no other gets its addresses
        yield from _fields_of_batch(held, is_sound)


def _record_batches(batch: Any) -> list[Any]:
    return batch.to_batches() if hasattr(batch, "to_batches") else [batch]


def _fields_of_batch(batch: Any, is_sound: bool) -> Iterator[dict[str, Any] | RowError]:
    types = {field.name: field.type for field in batch.schema}
    rows = _python_rows(batch) if is_sound else None
    if rows is None:  # find those that cannot be read
        alone = (batch.slice(n, 1) for n in range(len(batch)))
        rows = [
            (_python_rows(one) or [None])[0] if is_sound or _is_sound(one, full=True) else None
            for one in alone
        ]
    for row in rows:
        try:
            if row is None:
                raise RowError("a value that cannot be read, as text that is not UTF-8")
            yield {name: _json_value(value, types[name]) for name, value in row.items()}
        except RowError as error:
            yield error


def _json_scalar(value: Any) -> Any:
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


def _python_rows(batch: Any) -> list[dict[str, Any] | None] | None:
    """Return the rows as Python values; None if one holds text that is not UTF-8, a date that
    Python does not have, or a number of no value in a dictionary."""
    try:
        return batch.to_pylist()
    except (ValueError, IndexError):
        return None


def _is_sound(batch: Any, *, full: bool) -> bool:
    """Return whether a batch's offsets stay within it: in a damaged file they may point anywhere in
    memory. Texts are taken for bytes, as one that is not UTF-8 is a fault of its row alone."""
    try:
        for column in batch.columns:
            as_bytes = _as_bytes(column.type)
            (column if as_bytes == column.type else column.view(as_bytes)).validate(full=full)
    except ValueError:
        return False
    return True


def _as_bytes(type: Any) -> Any:
    """Return the type of the same layout whose texts are bytes."""
    import pyarrow
    from pyarrow import types

    if isinstance(type, pyarrow.BaseExtensionType):
        return _as_bytes(type.storage_type)
    if types.is_string(type) or types.is_large_string(type):
        return pyarrow.binary() if types.is_string(type) else pyarrow.large_binary()
    if types.is_struct(type):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in type])
    if types.is_map(type):
        return pyarrow.map_(_as_bytes(type.key_type), _as_bytes(type.item_type))
    if types.is_list(type) or types.is_large_list(type):
        make = pyarrow.list_ if types.is_list(type) else pyarrow.large_list
        return make(type.value_field.with_type(_as_bytes(type.value_type)))
    return type


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
    return _json_scalar(value)
