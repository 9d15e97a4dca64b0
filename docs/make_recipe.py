"""Writes docs/recipe.md, the reference of all keys, from the recipe's own types: python
docs/make_recipe.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import JsonValue
from pydantic_core import PydanticUndefined

from trainer.config.base import Section, kind_of
from trainer.config.recipe import Recipe

PAGE = Path(__file__).parent / "recipe.md"


def reference() -> str:
    """The page: a table of keys for each section, in the order of config.py."""
    parts = [
        "# The recipe\n\nWritten by `python docs/make_recipe.py` from `trainer/config/recipe.py`. "
        "On the command line: `packhorse train RECIPE optim.lr=1e-5 data.train.0.path=x.jsonl`.\n"
    ]
    for name, field in Recipe.model_fields.items():
        parts.append(_table(name, _sections(field.annotation)[0]))
    return "\n".join(parts)


def _table(name: str, section: type[Section]) -> str:
    kind = kind_of(section)
    heading = f"{name}, `kind: {kind}`" if kind else name
    lines = [
        f"## {heading}",
        "",
        _first_line(section),
        "",
        "| key | value | default | |",
        "|---|---|---|---|",
    ]
    nested = []
    for key, field in section.model_fields.items():
        if key == "kind":
            continue
        default = field.get_default(call_default_factory=True)
        shown = "" if default is PydanticUndefined else f"`{_plain(default)}`"
        lines.append(
            f"| `{key}` | {_type(field.annotation)} | {shown} | {field.description or ''} |"
        )
        nested += [
            _table(f"{name}.{key}", inner) for inner in _sections(field.annotation) if key != "eval"
        ]
    return "\n".join([*lines, "", *nested])


def _first_line(section: type[Section]) -> str:
    text = section.__doc__ if section.__doc__ != Section.__doc__ else None
    return " ".join((text or "").split())


def _plain(value: Any) -> str:
    if isinstance(value, Section):
        return "see below"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return list(
        dict.fromkeys(section for inner in get_args(annotation) for section in _sections(inner))
    )


def _type(annotation: Any) -> str:
    """As a user would write it: `a`, `b` for choices, `number`, `list of ...`."""
    arguments = [a for a in get_args(annotation) if a not in (type(None), Ellipsis)]
    if annotation in _NAMES:
        return _NAMES[annotation]
    if get_origin(annotation) is tuple:
        return f"list of {_type(arguments[0])}"
    if get_origin(annotation) is dict:
        return f"names to {_type(arguments[1])}"
    if _sections(annotation):
        return "section"
    if all(isinstance(a, str | int) and not isinstance(a, type) for a in arguments):
        return ", ".join(f"`{a}`" for a in arguments)
    return _type(arguments[0])


_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true`, `false`",
    JsonValue: "value",
}

if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
