"""The rules of `eval` over its metrics: which evaluated step is the best, and when to end early."""

from __future__ import annotations

import operator
import re
from typing import Any, NamedTuple

from pydantic import Field, field_validator

from packhorse.trainer.config.base import Section

EVAL_LOSS = "eval_loss"  # the held-out loss in a rule; the other names in rules are scorers'


class Condition(NamedTuple):
    """A bound on a metric, as `>= 0.98`."""

    sign: str
    bound: float

    @classmethod
    def parse(cls, text: Any) -> Condition:
        """Parse a sign and a number. Raises ValueError if the text is anything else."""
        found = re.fullmatch(
            r"\s*(>=|<=|>|<)\s*([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*", str(text)
        )
        if found is None:
            raise ValueError(
                f'`{text}` is no condition: write one of >=, <=, >, < and a number, as ">= 0.98"'
            )
        return cls(found[1], float(found[2]))

    def holds(self, value: float) -> bool:
        signs = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
        return signs[self.sign](value, self.bound)


class BestSection(Section):
    """Which evaluated step is the best. Its checkpoint is kept for `packhorse export RUN --best`.
    Names are those of scorers, or eval_loss. Of equal steps the earliest is the best."""

    metric: str
    """What decides: eval_loss, of which the lowest value wins, or a scorer, of which the highest
    does."""
    subject_to: dict[str, str] = Field(default_factory=dict)
    """Conditions that the best step must meet, as `{format_accuracy: ">= 0.98"}`."""
    tie: str | None = None
    """Decides between equal values: the lower eval_loss, or the higher score."""

    @field_validator("subject_to", mode="before")
    @classmethod
    def _conditions_parse(cls, given: Any) -> Any:
        for text in given.values() if isinstance(given, dict) else ():
            Condition.parse(text)
        return given

    def check(self) -> None:
        for name, condition in self.conditions.items():
            if name != EVAL_LOSS and not 0 <= condition.bound <= 1:
                raise ValueError(
                    f"`subject_to.{name}`: scores go from 0 to 1, and `{self.subject_to[name]}` "
                    f"is outside"
                )

    @property
    def conditions(self) -> dict[str, Condition]:
        return {name: Condition.parse(text) for name, text in self.subject_to.items()}

    @property
    def places(self) -> dict[str, str]:
        """Every metric of the rule, by the key that names it."""
        conditions = {f"subject_to.{name}": name for name in self.subject_to}
        return {"metric": self.metric, **conditions, **({"tie": self.tie} if self.tie else {})}

    def __str__(self) -> str:
        """Return the rule as a phrase."""
        conditions = " and ".join(f"{name} {text}" for name, text in self.subject_to.items())
        return (
            f"the {'lowest' if self.metric == EVAL_LOSS else 'highest'} {self.metric}"
            + (f" with {conditions}" if conditions else "")
            + (f", ties by {self.tie}" if self.tie else "")
        )


class EarlyStoppingSection(Section):
    """End the run where evaluations no longer improve. It is done then, as after its last step."""

    metric: str
    """As in `best`, which says what is better."""
    patience: int = Field(ge=1)
    """Evaluations in a row that are no better than the best before them."""
