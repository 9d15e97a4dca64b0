"""Plan a held-out evaluation: one step a source, so that each source has a loss of its own.

Prepared -> Plan, names of its steps
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from packhorse.trainer.config.data import DataSection
from packhorse.trainer.config.recipe import LossSection, Recipe, TrainSection
from packhorse.trainer.data.batch_plan import Corpus, Epochs, Plan
from packhorse.trainer.data.prepare import Prepared, packer
from packhorse.trainer.data.source import shown
from packhorse.trainer.data.split import parts_of


@dataclass(frozen=True)
class EvalPlan:
    """Step s of `plan` is all held-out rows of the source that is called `sources[s]`, weighted by
    token: its loss is the mean over its trained tokens. The run's own seed and weighting do not
    change it.
    """

    plan: Plan
    sources: tuple[str, ...]

    @property
    def trained_tokens(self) -> list[int]:
        """The trained tokens of each source."""
        return [self.plan.step(step).trained_tokens for step in range(self.plan.steps)]


def eval_plan(recipe: Recipe, prepared: Prepared) -> EvalPlan:
    """Plan all held-out rows. A source of which no row is left has no step."""
    corpus = prepared.epochs
    rows = np.bincount(corpus.sources, minlength=len(corpus.weights))
    left = [s for s, weight in enumerate(corpus.weights) if round(weight * rows[s])]
    # a plan of all sources says what is wrong where no row is left
    numbers = tuple(left or range(len(corpus.weights)))
    plan = Plan(
        _OneSourceAnEpoch(corpus, numbers),
        packer(recipe),
        recipe.batch.model_copy(update={"global_batch_size": sys.maxsize}),
        TrainSection.model_validate({"epochs": len(numbers)}),
        LossSection.model_validate({}),
    )
    names = source_names(recipe.data)
    return EvalPlan(plan, tuple(names[number] for number in numbers))


@dataclass(frozen=True)
class _OneSourceAnEpoch(Epochs):
    """Epochs of a Plan: epoch e is the documents of source numbers[e]."""

    whole: Corpus
    numbers: tuple[int, ...]

    def corpus(self, epoch: int) -> Corpus:
        weights = [0.0] * len(self.whole.weights)
        weights[self.numbers[epoch]] = self.whole.weights[self.numbers[epoch]]
        return replace(self.whole, weights=tuple(weights))


def source_names(data: DataSection) -> list[str]:
    """Return a short name for each held-out source, as a part of metrics' names: the last part of
    its path without endings, as far as that tells it from the others; else the whole, or with a
    number.
    """
    whole = [shown(part.source) for part in parts_of(data, "eval")]
    short = [text.rstrip("/").rsplit("/", 1)[-1].split(".")[0] or text for text in whole]
    names, used = [], Counter[str]()
    for text, last in zip(whole, short, strict=True):
        # MLflow refuses other signs in a metric's name
        name = re.sub(r"[^\w. -]", "_", last if Counter(short)[last] == 1 else text)
        used[name] += 1
        names.append(name if used[name] == 1 else f"{name}-{used[name]}")
    return names
