"""JSON as data rows need it: every fault is a RowError with a reason that can be counted.

Stricter than json in two things. A key that stands twice in an object is refused, since nothing
says which value was meant; so is nesting that later stages (pickling, templates) could not follow.
NaN and Infinity pass, as columns that nobody reads are full of them; where such a value would be
rendered, it is refused (format.py).
"""

from __future__ import annotations

import json
from typing import Any

from trainer.datatypes import RowError

MAX_DEPTH = 64  # of nested values: far above any schema, far below Python's limit


def parse(text: str) -> Any:
    """The value that `text` is. Raises RowError."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON: {error.msg}") from None
    except RecursionError:
        raise RowError("nested too deeply") from None
    except ValueError:  # Python reads integers of so many digits and no more
        raise RowError("a number of too many digits") from None
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deep(value):
        raise RowError("nested too deeply")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RowError("a key stands twice in an object")
    return found


def _is_deep(value: Any) -> bool:
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
