"""Read the rows of one file, one at a time: JSONL, JSON, CSV, TSV or Parquet, compressed or not.

A path enters; `RawRow`s leave: plain dicts as the file holds them. Files are streamed; only a
`.json` list is read whole, since nothing before its last bracket says that it is one.

A line that cannot be read is a row with a fault; data.broken_lines decides whether it stops the run
or is counted as a reject: large files that were scraped or cut off hold some. A fault of a whole
file (a list, a table or a compressed file that breaks off) is BadInput, as nothing says how many
rows are lost.

JSONL is read with json and not with Arrow, which gives every object of a column the union of their
keys, so that each tool schema is filled with the nulls of all others. Parquet and datasets are
stored that way already (arrow_fields.py).
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
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from packhorse.trainer.data.arrow_fields import fields_of_batches
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
