"""Held-out loss with the training loss's own code, and answers by generation with their scores.

In: the engine, held-out batches, prompts. Out: `eval/...` numbers, and samples. Every rank takes part in all of
it and runs as many forwards as the others, fillers among them, so that no collective hangs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from trainer import dist, served
from trainer.config import Recipe
from trainer.config_eval import GenerateSection
from trainer.data.loader import Loader, Prepared, eval_plan, held_out_prompts
from trainer.data.mask import Masker
from trainer.endpoint import Unreachable
from trainer.engine import Engine
from trainer.flow import BadInput, Batch, Prompt
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
    ) -> None:
        self._engine, self._tokenizer, self._metrics = engine, masker.tokenizer, metrics
        self._stop, self._watch = stop, watch
        self._recipe, self._run_dir = recipe, run_dir
        self._generate = recipe.eval.generate
        self._samples = run_dir / "samples.jsonl"
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
        if self._generate and self._prompts:
            try:
                answers = self._answers(self._generate, step)
            except Unreachable as error:
                if step == 0:  # nothing is lost by saying so at once
                    raise BadInput(f"eval.generator: {error}") from None
                dist.log.warning("after %d steps there are no answers: %s", step, error)
                answers = []
            if answers is None:
                return False
            samples = [
                sample(prompt, answer, self._generate.scorers)
                for prompt, answer in zip(self._prompts, answers, strict=bool(answers))
            ]
            line |= accuracies(samples)
            if dist.is_main():
                write_samples(self._samples, step, samples)
        self._metrics.write(step, line)
        dist.log.info("after %d steps: %s", step, "  ".join(f"{key} {value:.4f}" for key, value in line.items()))
        return True

    def _answers(self, section: GenerateSection, step: int) -> list[str] | None:
        """From the engine, or from a server that is handed its weights; None where the stop flag went up."""
        if self._recipe.eval.generator == "engine":
            return generate(self._engine, self._prompts, section, self._tokenizer, self._stop, self._watch)
        return served.generate(self._engine, self._recipe, self._run_dir, step, self._prompts, self._stop, self._watch)
