"""What every section of the recipe is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_function(name: str | None) -> None:
    """Raises ValueError where a function is not named as `module:function`."""
    module, colon, function = (name or "module:function").partition(":")
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"a function is named as `module:function`, not `{name}`")
