"""Write docs/recipe.md, the reference of all keys, from the recipe's own types.

usage: python docs/make_recipe.py
"""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import JsonValue
from pydantic_core import PydanticUndefined

from packhorse.trainer.config.base import Section, kind_of
from packhorse.trainer.config.recipe import Recipe

PAGE = Path(__file__).parent / "recipe.md"
HEAD = """# The recipe

A reference of every key. `python docs/make_recipe.py` writes it from `trainer/config/`. Keys are
set in the recipe's YAML, or on the command line:
`packhorse train RECIPE optim.lr=1e-5 data.train.0.path=x.jsonl`.
"""


def reference() -> str:
    """Return the page: a table of keys for each section, in the order of `Recipe`."""
    tables = (
        _table(name, _sections(field.annotation)[0]) for name, field in Recipe.model_fields.items()
    )
    return "\n".join([HEAD, *tables])


def _table(name: str, section: type[Section]) -> str:
    """Return a section's heading, its table and the tables of the sections inside it."""
    kind = kind_of(section)
    about = section.__doc__ if section.__doc__ != Section.__doc__ else None
    lines = [
        f"## {name}, `kind: {kind}`" if kind else f"## {name}",
        "",
        " ".join((about or "").split()),
        "",
        "| key | value | default | |",
        "|---|---|---|---|",
    ]
    nested, texts = [], descriptions(section)
    for key, field in section.model_fields.items():
        if key == "kind":
            continue
        default = field.get_default(call_default_factory=True)
        shown = "" if default is PydanticUndefined else f"`{_plain(default)}`"
        lines.append(f"| `{key}` | {_type(field.annotation)} | {shown} | {texts.get(key, '')} |")
        if key != "eval":  # its sources have the keys of `train`
            nested += [_table(f"{name}.{key}", inner) for inner in _sections(field.annotation)]
    return "\n".join([*lines, "", *nested])


def descriptions(section: type[Section]) -> dict[str, str]:
    """Return the text below each key of a section, on one line.

    Read from the source: pydantic would do it at every start of a command, which takes 0.1 s.
    """
    found = {}
    for each in reversed(section.__mro__):
        if issubclass(each, Section):
            (tree,) = ast.parse(inspect.getsource(each)).body
            assert isinstance(tree, ast.ClassDef)
            for field, text in pairwise(tree.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    words = ast.literal_eval(text.value).split()
                    found[ast.unparse(field.target)] = " ".join(words)
    return found


def _plain(value: Any) -> str:
    """Return a value as YAML writes it."""
    if isinstance(value, Section):
        return "see below"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)


def _sections(annotation: Any) -> list[type[Section]]:
    """Return the sections in a type, those of a collection's items included, each once."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    inner = (section for part in get_args(annotation) for section in _sections(part))
    return list(dict.fromkeys(inner))


_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true`, `false`",
    JsonValue: "value",
}


def _type(annotation: Any) -> str:
    """Return a type as a user would name it: `a`, `b` for choices, `number`, `list of ...`."""
    arguments = [a for a in get_args(annotation) if a not in (type(None), Ellipsis)]
    if get_origin(annotation) is Annotated:
        return _type(arguments[0])
    if annotation in _NAMES:
        return _NAMES[annotation]
    if get_origin(annotation) is tuple:
        return f"list of {_type(arguments[0])}"
    if get_origin(annotation) is dict:
        return f"names to {_type(arguments[1])}"
    if _sections(annotation):
        return "section"
    if all(isinstance(a, str | int) and not isinstance(a, type) for a in arguments):
        return ", ".join(f"`{_plain(a)}`" for a in arguments)
    return ", ".join(dict.fromkeys(map(_type, arguments)))


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
