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
    """Held-out prompts answered greedily, before and after training, and scored."""

    rows: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    batch: int = Field(default=32, ge=1, description="Prompts that one rank runs at once.")
    scorers: dict[str, Scorer] = Field(default_factory=dict)


class EvalSection(Section):
    every_steps: int | None = Field(
        default=None, ge=1, description="Between evaluations; always before and after training."
    )
    generate: GenerateSection | None = None
