"""Define what all sections of the recipe share: their base class, their checks, their types.

Checks raise ValueError with a sentence; pydantic adds the place in the recipe. Keys are named in
the sentence by the recipe's own words.
"""

from __future__ import annotations

import re
import types
from contextlib import suppress
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

LARGEST = 2**31 - 1  # whole number of a recipe; a seed has 64 bits


class Section(BaseModel):
    """A part of the recipe. It is frozen and refuses unknown keys.

    The text below a key describes it to users: docs/recipe.md is made of these texts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def check(self) -> None:
        """Raise ValueError if the keys do not fit each other."""

    @model_validator(mode="after")
    def _check(self) -> Section:
        for name, value in self:
            for each in value if isinstance(value, tuple) else (value,):
                # a size or count above it is a slip, and no library takes it
                if type(each) is int and abs(each) > LARGEST and name != "seed":
                    raise ValueError(f"`{name}`: whole numbers go up to {LARGEST:,}")
        self.check()
        return self


# ------------------------------------------------------------------------------------------- checks


def _check_function(name: str) -> str:
    module, colon, function = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (function, *module.split("."))):
        raise ValueError(f"a function is named as `module:function`, not `{name}`")
    return name


def check_pattern(pattern: str) -> str:
    """Return the text, if it is a regular expression. Raises ValueError if it is not."""
    try:
        re.compile(pattern)
    # a number of repetitions that is too large, or too many brackets
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"`{pattern[:200]}` is not a regular expression: {error}") from None
    return pattern


FunctionName = Annotated[str, AfterValidator(_check_function)]
Pattern = Annotated[str, AfterValidator(check_pattern)]


def number_or(*words: str) -> BeforeValidator:
    """Return a check of a key of the type `int | Literal[words]`.

    pydantic would name each part of the union as a fault of its own.
    """

    def check(value: Any) -> Any:
        if value not in words and (type(value) is not int or value < 1):
            known = ", ".join(f"`{word}`" for word in words)
            raise ValueError(f"it is {known} or a whole number above 0")
        return value

    return BeforeValidator(check)


def share_or(word: str) -> BeforeValidator:
    """Return a check of a key of the type `float | Literal[word]`; see `number_or`."""

    def check(value: Any) -> Any:
        with suppress(TypeError, ValueError):  # YAML takes 1e-3 for a text, which float reads
            if value == word or 0 <= float(value) <= 1:
                return value
        raise ValueError(f"it is `{word}` or a share from 0 to 1")

    return BeforeValidator(check)


def check_one_given(**given: Any) -> None:
    """Raise ValueError unless exactly one of the keys has a value."""
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"give exactly one of {' and '.join(f'`{key}`' for key in given)}")


def check_belongs(key: str, given: bool, to: str, chosen: bool) -> None:
    """Raise ValueError if `key` is given and the choice `to`, as `too_long: split`, is not made."""
    if given and not chosen:
        raise ValueError(f"`{key}` belongs to `{to}`")


# ------------------------------------------------------------------------------------ types of keys


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the section that a type stands for, or those of a union.

    The list is empty for a plain value and for a collection.
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
    """Return the type of the items of a list or mapping, or None if the type is neither."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (tuple, dict):
        return arguments[-1] if get_origin(annotation) is dict else arguments[0]
    return next(filter(None, map(items_of, arguments)), None)


def kind_of(section: type[Section]) -> str | None:
    """Return the only value of the key `kind`, which tells the sections of a union apart."""
    field = section.model_fields.get("kind")
    return field and field.default
