"""Held-out loss with the training loss's own code, and answers by generation with their scores.

In: the engine, held-out batches, prompts. Out: `eval/...` numbers, and samples. Every rank takes part in all of
it and runs as many forwards as the others, fillers among them, so that no collective hangs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer import dist
from trainer.config import GenerateSection, Recipe, Scorer
from trainer.data.loader import Loader, Prepared, eval_plan, held_out_prompts
from trainer.data.mask import Masker
from trainer.engine import Engine
from trainer.flow import Batch, Prompt
from trainer.metrics import Metrics
from trainer.model.attention import other_attention
from trainer.watch import Watch


class Sample(NamedTuple):
    prompt: str
    answer: str
    reference: str
    scores: dict[str, bool]


def held_out_loss(engine: Engine, batches: Iterable[Batch], stop: dist.StopFlag, watch: Watch) -> float | None:
    """The mean loss over all trained tokens of the held-out data; None where the stop flag went up meanwhile."""
    total = torch.zeros((), dtype=torch.float64, device=dist.device())
    for batch in batches:
        watch.beat("evaluation")
        if stop.ask():
            return None
        total += engine.evaluate(batch)
    return dist.sum_over_ranks([float(total)])[0]


@torch.no_grad()
def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    section: GenerateSection,
    tokenizer: Any,
    stop: dist.StopFlag,
    watch: Watch,
) -> list[Sample] | None:
    """Greedy answers to the prompts, split over the ranks; all of them on every rank, in order. None where the
    stop flag went up meanwhile."""
    model: Any = engine.module.model
    model.eval()
    world = dist.world_size()
    share = list(prompts[dist.rank() :: world]) or list(prompts[:1])
    rounds = -(-len(prompts) // (world * section.batch))
    answers: list[str] = []
    with other_attention(model, "sdpa"):
        for start in range(0, rounds * section.batch, section.batch):
            watch.beat("generation")
            if stop.ask():
                return None
            batch = share[start : start + section.batch] or share[:1]  # every rank runs every round
            answers += _answers(model, [p.input_ids for p in batch], section.max_new_tokens, tokenizer)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    by_rank = dist.gather(answers)
    samples = []
    for i, prompt in enumerate(prompts):
        answer = by_rank[i % world][i // world]
        scores = {name: score(rule, answer, prompt.reference) for name, rule in section.scorers.items()}
        samples.append(Sample(prompt.text, answer, prompt.reference, scores))
    return samples


def _answers(model: Any, prompts: list[list[int]], max_new_tokens: int, tokenizer: Any) -> list[str]:
    """One padded batch: padding on the left, the stop tokens of the generation configuration."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=dist.device())
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=dist.device())
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        synced_gpus=dist.world_size() > 1,
    )
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


def score(rule: Scorer, answer: str, reference: str) -> bool:
    """Whether an answer passes a scorer (see config.Scorer)."""
    if rule.pattern is not None:
        return re.fullmatch(rule.pattern, answer.strip(), re.DOTALL) is not None
    assert rule.extract is not None
    given, wanted = re.search(rule.extract, answer, re.DOTALL), re.search(rule.extract, reference, re.DOTALL)
    return given is not None and wanted is not None and given.group(1).strip() == wanted.group(1).strip()


def accuracies(samples: Sequence[Sample]) -> dict[str, float]:
    """`eval/<scorer>`: the share of samples that pass."""
    names = samples[0].scores if samples else {}
    return {f"eval/{name}": sum(s.scores[name] for s in samples) / len(samples) for name in names}


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
            samples = generate(self._engine, self._prompts, self._generate, self._tokenizer, self._stop, self._watch)
            if samples is None:
                return False
            line |= accuracies(samples)
            if dist.is_main():
                write_samples(self._samples, step, samples)
        self._metrics.write(step, line)
        dist.log.info("after %d steps: %s", step, "  ".join(f"{key} {value:.4f}" for key, value in line.items()))
        return True
