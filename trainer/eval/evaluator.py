"""Evaluate a model: the held-out loss, by the training loss's own code, and scored answers.

The engine, held-out batches and prompts enter. `eval/...` metrics, samples and a line of
evaluations.jsonl leave. Every rank takes part in all of it and runs as many forwards as the others,
some of them on filler, so that no collective waits for a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from packhorse.trainer import dist
from packhorse.trainer.config.eval import Choice, GenerateSection, Judge
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.digest import json_digest
from packhorse.trainer.data.eval_plan import EvalPlan, eval_plan
from packhorse.trainer.data.loader import Loader
from packhorse.trainer.data.mask import Masker
from packhorse.trainer.data.prepare import Prepared, held_out_prompts
from packhorse.trainer.datatypes import BadInput, Prompt
from packhorse.trainer.engine.engine import Engine
from packhorse.trainer.eval import generate, server_answers
from packhorse.trainer.eval.metrics import (
    Metric,
    Sample,
    as_table,
    check_scorers,
    score_samples,
    summarize,
)
from packhorse.trainer.eval.openai_client import Unreachable
from packhorse.trainer.eval.scorers import likeliest
from packhorse.trainer.hang_watchdog import Watch
from packhorse.trainer.metrics import EVALUATIONS, Metrics
from packhorse.trainer.stop_flag import StopFlag
from packhorse.trainer.utils.files import sync_file
from packhorse.trainer.utils.json_lines import append_json_lines, read_json_lines
from packhorse.trainer.utils.log_lines import LOGS
from packhorse.trainer.utils.progress import track
from packhorse.trainer.utils.staged_build import Stopped


class Losses(NamedTuple):
    """Mean losses over the trained tokens of all held-out rows, and of each source's if there are
    several sources."""

    whole: float
    by_source: Mapping[str, float]


def held_out_losses(engine: Engine, loader: Loader, stop: StopFlag, watch: Watch) -> list[float]:
    """Return the mean loss over all trained tokens of each step of the loader's plan. Raises
    Stopped if the stop flag is raised meanwhile."""
    steps = range(loader.plan.steps)
    # float64: the plan has divided each token's loss by their number, so the sum is of small parts
    totals = torch.zeros(len(steps), dtype=torch.float64, device=dist.device())
    batches = ((step, batch) for step in steps for batch in loader.stream(step))
    turns = int((-(-loader.plan.micro_batch_counts() // loader.groups)).sum())
    for step, batch in track(batches, "held-out loss", turns, "batches"):
        watch.beat("evaluation")
        if stop.poll():
            raise Stopped("stopped during the held-out loss")
        totals[step] += engine.evaluate(batch)
    return dist.sum_over_ranks(totals.tolist())


def mean_losses(of_sources: Sequence[float], plan: EvalPlan) -> Losses:
    """Join the sources' mean losses, in the order of plan.sources, to the mean over all tokens."""
    if len(of_sources) == 1:
        return Losses(of_sources[0], {})
    counts = plan.trained_tokens
    sums = [loss * count for loss, count in zip(of_sources, counts, strict=True)]
    return Losses(math.fsum(sums) / sum(counts), dict(zip(plan.sources, of_sources, strict=True)))


def write_samples(path: Path, step: int, samples: Sequence[Sample]) -> None:
    """Append the samples of one evaluation, a JSON object a line."""
    append_json_lines(path, ({"step": step, **sample.as_json()} for sample in samples))


def write_evaluation(
    run_dir: Path,
    step: int,
    losses: Losses,
    measured: Mapping[str, Metric],
    origin: Mapping[str, str],
) -> None:
    """Append a finished evaluation to evaluations.jsonl. It is on the disk when this returns.
    `origin` is that of `describe_origin`."""
    line = {
        "step": step,
        "eval_loss": losses.whole,
        **({"losses": losses.by_source} if losses.by_source else {}),
        "metrics": {name: metric.as_json() for name, metric in measured.items()},
        **origin,
    }
    # a line that a power cut takes back would be evaluated twice
    append_json_lines(run_dir / EVALUATIONS, [line], sync=True)


def describe_origin(data: Prepared, tokenizer: Any) -> dict[str, str]:
    """Return hashes by which `packhorse compare` sees whether two evaluations can be compared.

    `held_out` is of the held-out rows' tokens and of which count; `tokenizer` of the vocabulary and
    the chat template, to name the reason where `held_out` differs.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "held_out": data.fingerprint,
        "tokenizer": json_digest([vocabulary, tokenizer.chat_template]),
    }


class Evaluation:
    """Evaluate the model after a number of steps; the call returns False if it was stopped midway.

    A step is evaluated once: a step in evaluations.jsonl is skipped. Build it after Metrics, which
    drops the lines of later steps that a killed run has left there.

    Args:
        data: the held-out rows; None: there is nothing to evaluate.
        afterwards: called on every rank once an evaluation's line is written.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        engine: Engine,
        data: Prepared | None,
        masker: Masker,
        metrics: Metrics,
        stop: StopFlag,
        watch: Watch,
        afterwards: Callable[[], None] = lambda: None,
    ) -> None:
        self._recipe, self._run_dir, self._engine = recipe, run_dir, engine
        self._metrics, self._stop, self._watch = metrics, stop, watch
        self._tokenizer = masker.tokenizer
        self._afterwards = afterwards
        self._generate, self._at_once = recipe.eval.generate, generate.tokens_at_once(recipe)
        # rank 0 reads: other nodes may see an older state of a shared file system
        lines = read_json_lines(run_dir / EVALUATIONS) if dist.is_main() else []
        self._evaluated: set[int] = set(dist.broadcast([line["step"] for line in lines]))
        self._loader: Loader | None = None
        self._origin: dict[str, str] = {}
        self._prompts: list[Prompt] = []
        if data is None:
            return
        self._plan = eval_plan(recipe, data)
        if dist.is_main():
            self._origin = describe_origin(data, masker.tokenizer)
        place = (dist.rank(), dist.world_size())
        self._loader = Loader(data, self._plan.plan, *place, False, *recipe.parallel.cut)
        if self._generate:
            self._prompts = held_out_prompts(recipe, masker, self._generate.num_prompts)
            model: Any = engine.module.model
            generate.require_room(model, self._prompts, self._generate.max_new_tokens)
            if dist.is_main():
                check_scorers(self._generate.scorers, self._prompts)

    def __call__(self, step: int) -> bool:
        finished = True
        if self._loader is not None and step not in self._evaluated:
            with self._metrics.clock.part("evaluation", host=True):
                try:
                    self._evaluate(self._loader, step)
                except Stopped:
                    finished = False
        self._watch.pause()
        return finished

    def _evaluate(self, loader: Loader, step: int) -> None:
        found = held_out_losses(self._engine, loader, self._stop, self._watch)
        losses = mean_losses(found, self._plan)
        try:
            samples = self._scored_answers(step)
        except Unreachable as error:
            if step == 0:  # nothing is trained yet, so nothing is lost by ending the run
                raise BadInput(f"eval.generate: {error}") from None
            dist.log.warning("no answers after %d steps: %s", step, error)
            scorers = self._generate.scorers if self._generate else ()
            measured = {name: Metric(None, 0, None, None, str(error)) for name in scorers}
            self._write(step, losses, [], measured)
        else:
            self._write(step, losses, samples, summarize(samples))
        self._evaluated.add(step)
        self._afterwards()

    def _scored_answers(self, step: int) -> list[Sample]:
        """Return a sample for every prompt, on all ranks."""
        section = self._generate
        if section is None or not self._prompts:
            return []
        letters = self._likeliest_letters(section)
        # without another scorer nothing needs to be generated: the letters are the answers
        if letters and len(letters) == len(section.scorers):
            answers = next(iter(letters.values()))
        else:
            answers = self._answers(section, step)
        score = partial(score_samples, self._prompts, answers, section.scorers, letters)
        # in the background, as a judge may take minutes: ranks beat and poll for a stop meanwhile
        if any(isinstance(rule, Judge) for rule in section.scorers.values()):
            found: Any = server_answers.in_background(score, self._stop, self._watch)
        else:
            self._watch.pause()  # a user's scorer may take any time
            found = dist.broadcast(score() if dist.is_main() else None)
        return [Sample(*fields) for fields in found]

    def _likeliest_letters(self, section: GenerateSection) -> dict[str, list[str]]:
        """Return the likeliest letter after each prompt, by the name of the scorer that chooses."""
        chosen: dict[str, list[str]] = {}
        for name, rule in section.scorers.items():
            if isinstance(rule, Choice):
                logprobs = generate.choice_logprobs(
                    *(self._engine, self._prompts, rule.letters, self._at_once),
                    *(self._tokenizer, self._stop, self._watch),
                )
                chosen[name] = [likeliest(rule.letters, row) for row in logprobs]
        return chosen

    def _answers(self, section: GenerateSection, step: int) -> list[str]:
        """Generate answers by the engine or a server."""
        recipe, prompts = self._recipe, self._prompts
        if recipe.eval.by_server:
            return server_answers.generate(
                self._engine, recipe, self._run_dir, step, prompts, self._stop, self._watch
            )
        # by step and prompt, not by rank: another world size samples the same
        seeds = [
            dist.seed_from(recipe.train.seed, "answer", step, number)
            for number in range(len(prompts))
        ]
        asked = [prompt.input_ids for prompt in prompts]
        given = (self._engine, asked, section, self._at_once, self._stop, self._watch)
        ids = generate.answer_ids(*given, seeds=seeds)
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _write(
        self, step: int, losses: Losses, samples: Sequence[Sample], measured: Mapping[str, Metric]
    ) -> None:
        values = {name: metric.value for name, metric in measured.items()}
        line = {"eval/loss": losses.whole}
        line |= {f"eval/{name}/loss": loss for name, loss in losses.by_source.items()}
        line |= {f"eval/{name}": value for name, value in values.items() if value is not None}
        self._metrics.write(step, line)
        if dist.is_main():
            write_samples(self._run_dir / "samples.jsonl", step, samples)
            self._metrics.write_text("samples", as_table(samples), step)
            # last: this line says that all the others are written, after a power cut, too
            for name in LOGS:
                sync_file(self._run_dir / name)
            write_evaluation(self._run_dir, step, losses, measured, self._origin)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in line.items())
        dist.log.info("after %d steps: %s", step, shown)
