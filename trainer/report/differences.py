"""Find the keys of recipes in which runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from packhorse.trainer.config.recipe import Recipe

ABSENT = "-"  # the key does not exist in this recipe, as adapter.rank without an adapter


def differing_keys(recipes: Sequence[Recipe]) -> dict[str, list[str]]:
    """Return each key whose value is not the same in all recipes, with the value in each one.

    run.dir is left out: it differs always.
    """
    flat = [dict(_flatten(recipe.model_dump(mode="json"), "")) for recipe in recipes]
    keys = dict.fromkeys(key for values in flat for key in values if key != "run.dir")
    rows = {key: [values.get(key, ABSENT) for values in flat] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _flatten(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text of the value); items of a list go by number, as in overrides."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in items:
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield key, text
