"""Held-out loss with the training loss's own code, and answers by generation with their scores.

In: the engine, held-out batches, prompts. Out: `eval/...` numbers, and samples. Every rank takes part in all of
it and runs as many forwards as the others, fillers among them, so that no collective hangs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from trainer import dist
from trainer.config import Recipe
from trainer.data.loader import Loader, Prepared, eval_plan, held_out_prompts
from trainer.data.mask import Masker
from trainer.engine import Engine
from trainer.flow import Batch, Prompt
from trainer.generate import generate
from trainer.metrics import Metrics
from trainer.score import Sample, accuracies, sample
from trainer.watch import Watch


def held_out_loss(engine: Engine, batches: Iterable[Batch], stop: dist.StopFlag, watch: Watch) -> float | None:
    """The mean loss over all trained tokens of the held-out data; None where the stop flag went up meanwhile."""
    total = torch.zeros((), dtype=torch.float64, device=dist.device())
    for batch in batches:
        watch.beat("evaluation")
        if stop.ask():
            return None
        total += engine.evaluate(batch)
    return dist.sum_over_ranks([float(total)])[0]


def write_samples(path: Path, step: int, samples: Sequence[Sample]) -> None:
    """Append the samples of one evaluation, a JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": step, **sample._asdict()}, ensure_ascii=False) + "\n")


class Evaluation:
    """Called with the number of applied steps: evaluates, logs, and says whether it ran to its end."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        engine: Engine,
        data: Prepared | None,
        masker: Masker,
        metrics: Metrics,
        stop: dist.StopFlag,
        watch: Watch,
        evaluated: Callable[[], None] = lambda: None,
    ) -> None:
        self._evaluated = evaluated  # called on every rank once an evaluation's line is written
        self._engine, self._tokenizer, self._metrics = engine, masker.tokenizer, metrics
        self._stop, self._watch = stop, watch
        self._generate = recipe.eval.generate
        self._samples, self._evaluations = run_dir / "samples.jsonl", run_dir / "evaluations.jsonl"
        self._loader: Loader | None = None
        self._prompts: list[Prompt] = []
        if data is not None:
            self._loader = Loader(data, eval_plan(recipe, data), dist.rank(), dist.world_size(), pin=False)
            if self._generate:
                self._prompts = held_out_prompts(recipe, masker, self._generate.rows)

    def __call__(self, step: int) -> bool:
        ended = self._loader is None or self._evaluate(self._loader, step)
        self._watch.rest()
        return ended

    def _evaluate(self, loader: Loader, step: int) -> bool:
        loss = held_out_loss(self._engine, loader.stream(0), self._stop, self._watch)
        if loss is None:
            return False
        line = {"eval/loss": loss}
        scored: dict[str, float] = {}
        if self._generate and self._prompts:
            answers = generate(self._engine, self._prompts, self._generate, self._tokenizer, self._stop, self._watch)
            if answers is None:
                return False
            samples = [
                sample(prompt, answer, self._generate.scorers)
                for prompt, answer in zip(self._prompts, answers, strict=True)
            ]
            scored = accuracies(samples)
            line |= scored
            if dist.is_main():
                write_samples(self._samples, step, samples)
        self._metrics.write(step, line)
        if dist.is_main():
            metrics = {
                name.removeprefix("eval/"): {"value": value, "count": len(self._prompts), "low": None, "high": None}
                for name, value in scored.items()
            }
            with self._evaluations.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "eval_loss": loss, "metrics": metrics}) + "\n")
        dist.log.info("after %d steps: %s", step, "  ".join(f"{key} {value:.4f}" for key, value in line.items()))
        self._evaluated()
        return True
