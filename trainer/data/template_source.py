"""Read the source of a chat template: its variables, and the strings that it compares texts with.

Jinja text enters; names, patterns and the source with a fixed clock leave.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

import jinja2
import jinja2.defaults
import jinja2.meta
from jinja2 import nodes

from packhorse.trainer.config.data import NO_KWARGS
from packhorse.trainer.datatypes import BadInput

# Templates that write the date get this one, so that tokenized data does not depend on the day it
# was made. The formats are those of strftime_now; llama3_2 takes `date_string`, which its authors
# fixed to the same day.
DATE_STRING = "26 Jul 2024"
DATE_PARTS = {
    "%d": "26",
    "%b": "Jul",
    "%B": "July",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
    "%a": "Fri",
}
FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{code}', '{value}')" for code, value in DATE_PARTS.items())
    + " }}{% endmacro +%}"
)
GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
TEMPLATE_FUNCTIONS = {"raise_exception", "strftime_now"}


def with_fixed_clock(source: str) -> str:
    """Return the source with a `strftime_now` of the fixed day, if it calls that."""
    return FIXED_CLOCK + source if "strftime_now" in source else source


@cache
def compared_strings(source: str) -> re.Pattern[str] | None:
    """Match the strings that a template compares texts with: operands of tests, arguments of calls
    and filters."""
    found = {text for text in _constants(parse(source)) if text.strip()}
    longest_first = sorted(found, key=lambda text: (-len(text), text))
    pattern = "|".join(map(re.escape, longest_first))
    return re.compile(f"({pattern})") if found else None


def check_kwargs(kwargs: Mapping[str, object], sources: list[str]) -> None:
    """Raise BadInput if none of the templates reads a variable of `kwargs`."""
    read = set().union(*(jinja2.meta.find_undeclared_variables(parse(text)) for text in sources))
    own = sorted(read - NO_KWARGS - set(jinja2.defaults.DEFAULT_NAMESPACE) - TEMPLATE_FUNCTIONS)
    for name in kwargs:
        if name not in read:
            raise BadInput(
                f"data.chat_template_kwargs: the chat template reads no `{name}`; it reads "
                f"{', '.join(own) or 'no variable but what it is given in any case'}"
            )


def parse(source: str) -> nodes.Template:
    """Return the syntax tree of a template.

    Raises:
        BadInput: it is not valid Jinja.
    """
    jinja = jinja2.Environment(autoescape=False, extensions=["jinja2.ext.loopcontrols"])  # noqa: S701
    try:
        return jinja.parse(GENERATION.sub("", source))
    except jinja2.TemplateSyntaxError as error:
        raise not_jinja(error) from None


def not_jinja(error: jinja2.TemplateSyntaxError) -> BadInput:
    """Return the error for a template that cannot be parsed."""
    return BadInput(f"the chat template is not valid Jinja (line {error.lineno}: {error.message})")


def _constants(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)):
        compared = (
            [node.expr, *(operand.expr for operand in node.ops)]
            if isinstance(node, nodes.Compare)
            else node.args
        )
        for operand in compared:
            if isinstance(operand, nodes.Const) and isinstance(operand.value, str):
                yield operand.value
