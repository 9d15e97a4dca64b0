"""Turn rows of Arrow into plain dicts of JSON values.

Tables or batches of a Parquet file, a saved dataset or a stream enter; the fields of each row
leave, or why they cannot be read.

Arrow gives every object of a column the union of their keys, so that each tool schema is filled
with the nulls of all others: nulls inside structs are removed again. A null that was meant is
removed with them, as nothing tells the two apart; it stays in a map, and in a column that is stored
as JSON (Arrow's `arrow.json`, which datasets writes for mixed objects).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date, time
from decimal import Decimal
from itertools import chain
from typing import Any

from packhorse.trainer.datatypes import RowError
from packhorse.trainer.utils.strict_json import parse


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
