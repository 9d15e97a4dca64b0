"""What every section of the recipe is made of."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_function(name: str | None) -> None:
    """Raises ValueError where a function is not named as `module:function`."""
    module, colon, function = (name or "module:function").partition(":")
    if (
        not colon
        or not function.isidentifier()
        or not all(part.isidentifier() for part in module.split("."))
    ):
        raise ValueError(f"a function is named as `module:function`, not `{name}`")


# ------------------------------------------------------------------------------------ types of keys


def sections_of(annotation: Any) -> list[type[Section]]:
    """The section that a value of this type is, or those of a union; none where it is a collection
    or a plain value.
    """
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [section for inner in get_args(annotation) for section in sections_of(inner)]
    is_section = (
        get_origin(annotation) is None
        and isinstance(annotation, type)
        and issubclass(annotation, Section)
    )
    return [annotation] if is_section else []


def items_of(annotation: Any) -> Any:
    """The type of what a list or mapping of this type holds; None where it is neither."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (tuple, dict):
        return arguments[-1] if get_origin(annotation) is dict else arguments[0]
    return next(filter(None, map(items_of, arguments)), None)


def kind_of(section: type[Section]) -> str | None:
    """What tells the sections of a union apart: the only value of the key `kind`."""
    field = section.model_fields.get("kind")
    return field and field.default
