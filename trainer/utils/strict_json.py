"""Parse JSON of data rows; every fault is a RowError whose reason can be counted.

Stricter than `json` in two things: a key that stands twice in an object is refused, since nothing
shows which value was meant, and so is nesting that pickling or templates could not follow later.
NaN and Infinity pass, since columns that nobody reads are full of them; format.py refuses them
where they would be rendered.
"""

from __future__ import annotations

import json
from typing import Any

from packhorse.trainer.datatypes import RowError

MAX_DEPTH = 64  # of nested values: far above any schema, far below Python's recursion limit


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        RowError: the text is not JSON, nested too deeply, or has a key twice or a huge number.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON: {error.msg}") from None
    except RecursionError:
        raise RowError("nested too deeply") from None
    except ValueError:  # Python converts integers up to a limit of digits only
        raise RowError("a number of too many digits") from None
    # counting brackets is much faster than walking the value, and rules out most of them
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deep(value):
        raise RowError("nested too deeply")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RowError("a key stands twice in an object")
    return found


def _is_deep(value: Any) -> bool:
    # level by level, as recursion would fail on what this looks for
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = (
            item.values() if isinstance(item, dict) else item
            for item in level
            if isinstance(item, dict | list)
        )
        level = [inner for items in nested for inner in items]
        if not level:
            return False
    return True
