"""The recipe's `eval`: what is asked of the model, how answers are scored, which checkpoint is the best."""

from __future__ import annotations

from pydantic import Field, model_validator

from trainer.section import Section


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


class EvalSection(Section):
    every_steps: int | None = Field(
        default=None, ge=1, description="Between evaluations; always before and after training."
    )
    generate: GenerateSection | None = None
