"""Held-out loss with the training loss's own code, and answers by generation with their scores.

In: the engine, held-out batches, prompts. Out: `eval/...` numbers, samples, and a line of
    evaluations.jsonl. Every
rank takes part in all of it and runs as many forwards as the others, fillers among them, so that no
collective hangs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer import dist
from trainer.config.eval import Choice, GenerateSection, Judge
from trainer.config.recipe import Recipe
from trainer.data.loader import Loader
from trainer.data.mask import Masker
from trainer.data.prepare import Prepared, eval_plan, held_out_prompts
from trainer.datatypes import BadInput, Batch, Prompt
from trainer.engine.engine import Engine
from trainer.eval import vllm_server
from trainer.eval.generate import choice_logprobs, generate, require_room
from trainer.eval.metrics import Metric, Sample, as_table, check_scorers, metrics, samples
from trainer.eval.openai_client import Unreachable
from trainer.eval.scorers import likeliest
from trainer.hang_watchdog import Watch
from trainer.metrics import EVALUATIONS, Metrics
from trainer.utils.files import read_json_lines


def held_out_loss(
    engine: Engine, batches: Iterable[Batch], stop: dist.StopFlag, watch: Watch
) -> float | None:
    """The mean loss over all trained tokens of the held-out data; None where the stop flag went up
    meanwhile.
    """
    total = torch.zeros((), dtype=torch.float64, device=dist.device())
    for batch in batches:
        watch.beat("evaluation")
        if stop.poll():
            return None
        total += engine.evaluate(batch)
    return dist.sum_over_ranks([float(total)])[0]


def write_samples(path: Path, step: int, samples: Sequence[Sample]) -> None:
    """Append the samples of one evaluation, a JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": step, **sample.as_json()}, ensure_ascii=False) + "\n")


def write_evaluation(run_dir: Path, step: int, loss: float, measured: Mapping[str, Metric]) -> None:
    """Append an evaluation that has ended to evaluations.jsonl, which stands on the disk when this
    returns.
    """
    line = {
        "step": step,
        "eval_loss": loss,
        "metrics": {name: metric.as_json() for name, metric in measured.items()},
    }
    with (run_dir / EVALUATIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Evaluation:
    """Called with the number of applied steps: evaluates, logs, and says whether it ran to its end.

    A step is evaluated once: what evaluations.jsonl holds is not evaluated again. Build it after
    Metrics, which drops what a killed run left there of later steps.
    """

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
        afterwards: Callable[[], None] = lambda: None,
    ) -> None:
        self._afterwards = afterwards  # called on every rank once an evaluation's line is written
        self._engine, self._tokenizer, self._metrics = engine, masker.tokenizer, metrics
        self._stop, self._watch = stop, watch
        self._recipe, self._run_dir = recipe, run_dir
        self._generate = recipe.eval.generate
        lines = read_json_lines(run_dir / EVALUATIONS) if dist.is_main() else []
        self._evaluated: set[int] = dist.broadcast({line["step"] for line in lines})
        self._loader: Loader | None = None
        self._prompts: list[Prompt] = []
        if data is not None:
            self._loader = Loader(
                data, eval_plan(recipe, data), dist.rank(), dist.world_size(), pin=False
            )
            if self._generate:
                self._prompts = held_out_prompts(recipe, masker, self._generate.num_prompts)
                model: Any = engine.module.model
                require_room(model, self._prompts, self._generate.max_new_tokens)
                if dist.is_main():
                    check_scorers(self._generate.scorers, self._prompts)

    def __call__(self, step: int) -> bool:
        ended = (
            self._loader is None or step in self._evaluated or self._evaluate(self._loader, step)
        )
        self._watch.pause()
        return ended

    def _evaluate(self, loader: Loader, step: int) -> bool:
        loss = held_out_loss(self._engine, loader.stream(0), self._stop, self._watch)
        if loss is None:
            return False
        try:
            scored = self._scored(step)
        except Unreachable as error:
            if step == 0:  # nothing is lost by saying so at once
                raise BadInput(f"eval.generator: {error}") from None
            dist.log.warning("after %d steps there are no answers: %s", step, error)
            self._write(step, loss, [], missing=str(error))
        else:
            if scored is None:
                return False
            self._write(step, loss, scored)
        self._evaluated.add(step)
        self._afterwards()
        return True

    def _scored(self, step: int) -> list[Sample] | None:
        """Every prompt with its answer and scores, on all ranks; None where the stop flag went up
        meanwhile.
        """
        section = self._generate
        if section is None or not self._prompts:
            return []
        tools = self._tokenizer, self._stop, self._watch
        chosen: dict[str, list[str]] = {}  # by scorer: the likeliest letter of each prompt
        for name, rule in section.scorers.items():
            if isinstance(rule, Choice):
                logprobs = choice_logprobs(
                    self._engine, self._prompts, rule.letters, section.batch, *tools
                )
                if logprobs is None:
                    return None
                chosen[name] = [likeliest(rule.letters, row) for row in logprobs]
        if chosen and len(chosen) == len(section.scorers):  # nothing asks for more than likelihoods
            answers: Sequence[str] | None = next(iter(chosen.values()))
        else:
            answers = self._answers(section, step)
            if answers is None:
                return None
        score = partial(samples, self._prompts, answers, section.scorers, chosen)
        if any(isinstance(rule, Judge) for rule in section.scorers.values()):
            return vllm_server.in_background(score, self._stop, self._watch)
        self._watch.pause()  # a user's scorer takes what it takes
        return dist.broadcast(score() if dist.is_main() else None)

    def _answers(self, section: GenerateSection, step: int) -> list[str] | None:
        """From the engine, or from a server that is handed its weights; None where the stop flag
        went up.
        """
        recipe, prompts = self._recipe, self._prompts
        if recipe.eval.generator != "engine":
            return vllm_server.generate(
                self._engine, recipe, self._run_dir, step, prompts, self._stop, self._watch
            )
        seeds = [
            dist.seed_from(recipe.train.seed, "answer", step, number)
            for number in range(len(prompts))
        ]
        tools = self._tokenizer, self._stop, self._watch
        return generate(self._engine, prompts, section, *tools, seeds=seeds)

    def _write(
        self, step: int, loss: float, scored: Sequence[Sample], missing: str | None = None
    ) -> None:
        """The evaluation everywhere; in evaluations.jsonl last, which says that all of it is there.

        Args:
            missing: why there are no answers.
        """
        measured = metrics(scored)
        if missing is not None and self._generate:
            measured = {
                name: Metric(None, 0, None, None, missing) for name in self._generate.scorers
            }
        values = {
            f"eval/{name}": metric.value
            for name, metric in measured.items()
            if metric.value is not None
        }
        line = {"eval/loss": loss, **values}
        self._metrics.write(step, line)
        if dist.is_main():
            write_samples(self._run_dir / "samples.jsonl", step, scored)
            self._metrics.write_text("samples", as_table(scored), step)
            write_evaluation(self._run_dir, step, loss, measured)
        dist.log.info(
            "after %d steps: %s",
            step,
            "  ".join(f"{key} {value:.4f}" for key, value in line.items()),
        )
