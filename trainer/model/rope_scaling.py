"""Give a model other rotary positions than its configuration has, for longer contexts.

In: a configuration and `model.rope_scaling`, as configurations write it: `rope_scaling` of
transformers 4 or `rope_parameters` of 5. Out: the same configuration with it, which exports hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.rotary import rope_types
from packhorse.trainer.utils.text import one_line


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
    kept = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
    given = {key: value for key, value in scaling.items() if key != "type"}
    made = {**kept, **given, "rope_type": kind}
    text.rope_parameters = {**rope, "full_attention": made} if by_layer else made
    try:
        text.standardize_rope_params()
        text.validate_rope()
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"model.rope_scaling: {one_line(error, 300)}") from None


def rope_kind(scaling: Mapping[str, Any]) -> str:
    """Return the kind of a scaling, by the newer or the older name of its key."""
    return str(scaling.get("rope_type", scaling.get("type")))


def require_rope(model: Any, kind: str) -> None:
    """Require that the model's own code computes rotary tables of a kind.

    Raises:
        BadInput: no module of it does, so that the scaling would change nothing.
    """
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
