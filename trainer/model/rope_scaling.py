"""Give a model other rotary positions than its configuration has, for longer contexts.

In: a configuration and `model.rope_scaling`, as configurations write it: `rope_scaling` of
transformers 4 or `rope_parameters` of 5. Out: the same configuration with it, which exports hold.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.rotary import rope_types
from packhorse.trainer.utils.text import one_line

# Keys that only the table of one kind reads; a scaling of another kind leaves them out.
_OF_A_KIND = {
    *("rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor"),
    *("high_freq_factor", "truncate"),
}


def scale_rope(config: Any, scaling: Mapping[str, Any]) -> None:
    """Put the scaling into a model's configuration; the base of the angles stays.

    Of a model whose layers have several kinds of positions, those of full attention get it.

    Raises:
        BadInput: the model has no rotary positions, there is no such kind, or it lacks a value.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text, kind = config.get_text_config(), rope_kind(scaling)
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        kinds = ", ".join(sorted(["default", *ROPE_INIT_FUNCTIONS]))
        raise BadInput(f"model.rope_scaling: there is no kind `{kind}`; transformers has {kinds}")
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        raise BadInput(
            f"model.rope_scaling: {text.model_type} has no rotary positions; take it out"
        )
    by_layer = any(isinstance(part, dict) for part in rope.values())
    if by_layer and not isinstance(rope.get("full_attention"), dict):
        raise BadInput(
            f"model.rope_scaling: {text.model_type} has rotary positions of its own for "
            f"{', '.join(rope)}, and none for full_attention; take it out"
        )
    before = rope["full_attention"] if by_layer else rope
    given = {**scaling, "rope_type": kind}
    given.pop("type", None)
    _require_numbers(given)
    kept = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
    made = {**kept, **given}
    text.rope_parameters = {**rope, "full_attention": made} if by_layer else made
    try:
        text.standardize_rope_params()
        made = text.rope_parameters["full_attention"] if by_layer else text.rope_parameters
        if kind == "yarn":  # transformers 4 takes their quotient for the factor
            original = made["original_max_position_embeddings"]
            text.max_position_embeddings = round(made["factor"] * original)
        faults = _warnings_of(text.validate_rope)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"model.rope_scaling: {one_line(error, 300)}") from None
    faults += [
        f"{text.model_type} has {key} = {made.get(key)} in any case"
        for key, value in given.items()
        if made.get(key) != value or (key == "partial_rotary_factor" and before.get(key) != value)
    ]
    if faults:
        raise BadInput(f"model.rope_scaling: {one_line(faults[0], 300)}")
    # what the model's code reads beside its table, as a section of it for images
    made |= {key: before[key] for key in before.keys() - made.keys() - _OF_A_KIND}


def _require_numbers(given: Mapping[str, Any]) -> None:
    """Raise BadInput if a value is no number above 0, but for the kind and switches."""
    for key, value in given.items():
        for number in value if isinstance(value, list) else [value]:
            is_switch = isinstance(number, bool) and key != "factor"
            is_number = type(number) in (int, float) and 0 < number < math.inf
            if not (is_number or is_switch or key == "rope_type"):
                raise BadInput(f"model.rope_scaling: {key} is {number!r}, and no number above 0")


def _warnings_of(call: Callable[[], None]) -> list[str]:
    """Return what transformers would only log about the values."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_rope_utils")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(listener)
    try:
        call()
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate
    return said


def rope_kind(scaling: Mapping[str, Any]) -> str:
    """Return the kind of a scaling, by the newer or the older name of its key."""
    return str(scaling.get("rope_type", scaling.get("type")))


def require_rope(model: Any, kind: str) -> None:
    """Raise BadInput if no module of the model makes rotary tables of this kind: the scaling would
    change nothing."""
    kinds: set[Any] = set()
    for module in model.modules():
        own = getattr(module, "rope_type", None)  # by kinds of layers where these have their own
        kinds |= set(own.values()) if isinstance(own, dict) else {own}
    if kind not in kinds:
        found = ", ".join(sorted(rope_types(model.config.get_text_config())))
        raise BadInput(
            f"model.rope_scaling: {type(model).__name__} makes no rotary table of the kind "
            f"`{kind}` (its configuration says {found}); take it out"
        )
