"""The recipe's `eval`: what is asked of the model, how answers are scored, which checkpoint is the best."""

from __future__ import annotations

import difflib
import operator
import re
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from trainer.section import Section

EVAL_LOSS = "eval_loss"  # what a rule calls the held-out loss; its other names are scorers'


class Scorer(Section):
    """A generated answer's score: `pattern` must match all of it, or `extract`'s group must equal the reference's."""

    pattern: str | None = None
    extract: str | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Scorer:
        if (self.pattern is None) == (self.extract is None):
            raise ValueError("give exactly one of `pattern` and `extract`")
        return self


class GenerateSection(Section):
    """Held-out prompts answered by the model that is trained, at every evaluation, and scored."""

    rows: int = Field(default=64, ge=1, description="The first so many held-out prompts.")
    max_new_tokens: int = Field(default=64, ge=1, description="Where an answer is cut that has not ended by itself.")
    batch: int = Field(default=32, ge=1, description="Prompts that one rank runs at once.")
    temperature: float = Field(
        default=0.0, ge=0, description="0: greedy. Above, tokens are drawn; what is drawn follows from train.seed."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw from the most likely tokens that have this share of probability."
    )
    scorers: dict[str, Scorer] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _greedy_draws_nothing(self) -> GenerateSection:
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("`top_p` belongs to a `temperature` above 0: without one nothing is drawn")
        return self


class Condition(NamedTuple):
    """What a metric must be, as `>= 0.98`."""

    sign: str
    bound: float

    @classmethod
    def parse(cls, text: Any) -> Condition:
        """Raises ValueError where it is not a sign and a number."""
        found = re.fullmatch(r"\s*(>=|<=|>|<)\s*([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*", str(text))
        if found is None:
            raise ValueError(f'`{text}` is no condition: write one of >=, <=, >, < and a number, as ">= 0.98"')
        return cls(found[1], float(found[2]))

    def holds(self, value: float) -> bool:
        return _SIGNS[self.sign](value, self.bound)


_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class BestSection(Section):
    """Which evaluated step is the best one. Its checkpoint is kept apart, for `packhorse export RUN --best`. Names are
    those of scorers, or eval_loss. Of steps that are alike in all of it the earliest is taken."""

    maximize: str | None = Field(default=None, description="The metric that decides: the highest one wins.")
    minimize: str | None = Field(default=None, description="In place of `maximize`: the lowest one wins.")
    subject_to: dict[str, str] = Field(
        default_factory=dict,
        description='What a step must meet to be the best at all, as `{format_accuracy: ">= 0.98"}`.',
    )
    tie: str | None = Field(
        default=None, description="Decides where the metric is equal: the lower eval_loss, or the higher score."
    )

    @field_validator("subject_to", mode="before")
    @classmethod
    def _conditions(cls, given: Any) -> Any:
        for text in given.values() if isinstance(given, dict) else ():
            Condition.parse(text)
        return given

    @model_validator(mode="after")
    def _one_aim(self) -> BestSection:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("give exactly one of `maximize` and `minimize`")
        if self.maximize == EVAL_LOSS:
            raise ValueError(f"the lower {EVAL_LOSS} is, the better: `minimize` it")
        for name, condition in self.conditions.items():
            if name != EVAL_LOSS and not 0 <= condition.bound <= 1:
                raise ValueError(
                    f"`subject_to.{name}`: scores go from 0 to 1, and `{self.subject_to[name]}` is not there"
                )
        return self

    @property
    def metric(self) -> str:
        """The one that decides."""
        name = self.maximize or self.minimize
        assert name is not None, "`_one_aim` has looked"
        return name

    @property
    def conditions(self) -> dict[str, Condition]:
        return {name: Condition.parse(text) for name, text in self.subject_to.items()}

    @property
    def places(self) -> dict[str, str]:
        """Every name of the rule, by where it stands."""
        aim = "maximize" if self.maximize else "minimize"
        conditions = {f"subject_to.{name}": name for name in self.subject_to}
        return {aim: self.metric, **conditions, **({"tie": self.tie} if self.tie else {})}

    def __str__(self) -> str:
        """The rule as a phrase."""
        aim = f"the {'highest' if self.maximize else 'lowest'} {self.metric}"
        conditions = " and ".join(f"{name} {text}" for name, text in self.subject_to.items())
        return aim + (f" with {conditions}" if conditions else "") + (f", ties by {self.tie}" if self.tie else "")


class EvalSection(Section):
    every_steps: int | None = Field(
        default=None, ge=1, description="Between evaluations; always before and after training."
    )
    generate: GenerateSection | None = None
    best: BestSection | None = None
    lm_eval: tuple[str, ...] = Field(
        default=(),
        description="Tasks of lm-evaluation-harness, as `[gsm8k, mmlu]`, which `packhorse eval` runs: they take too "
        "long for a run in training. Needs the extra `lm-eval`.",
    )
    lm_eval_path: str | None = Field(
        default=None, description="A folder of task files of your own, found before the library's tasks."
    )
    lm_eval_chat: bool = Field(
        default=False,
        description="Ask its questions through the chat template; the library's own way, and most published numbers', "
        "is without.",
    )

    @model_validator(mode="after")
    def _best_is_evaluated(self) -> EvalSection:
        if self.best is None:
            return self
        names = [EVAL_LOSS, *(self.generate.scorers if self.generate else ())]
        for place, name in self.best.places.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                instead = f"did you mean `{near[0]}`?" if near else f"names here: {', '.join(names)}"
                raise ValueError(f"`best.{place}`: there is no scorer `{name}` in eval.generate.scorers; {instead}")
        if self.every_steps is None:
            raise ValueError("`best` needs `every_steps`: without it the last step alone is evaluated")
        return self
