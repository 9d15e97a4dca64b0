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
from trainer.config import GenerateSection, Scorer
from trainer.engine import Engine
from trainer.flow import Batch, Prompt
from trainer.model.attention import other_attention


class Sample(NamedTuple):
    prompt: str
    answer: str
    reference: str
    scores: dict[str, bool]


def held_out_loss(engine: Engine, batches: Iterable[Batch], stop: dist.StopFlag) -> float | None:
    """The mean loss over all trained tokens of the held-out data; None where the stop flag went up meanwhile."""
    total = torch.zeros((), dtype=torch.float64, device=dist.device())
    for batch in batches:
        if stop.ask():
            return None
        total += engine.evaluate(batch)
    return dist.sum_over_ranks([float(total)])[0]


@torch.no_grad()
def generate(engine: Engine, prompts: Sequence[Prompt], section: GenerateSection, tokenizer: Any) -> list[Sample]:
    """Greedy answers to the prompts, split over the ranks; all of them on every rank, in order."""
    model: Any = engine.module.model
    model.eval()
    world = dist.world_size()
    share = list(prompts[dist.rank() :: world]) or list(prompts[:1])
    rounds = -(-len(prompts) // (world * section.batch))
    answers: list[str] = []
    with other_attention(model, "sdpa"):
        for start in range(0, rounds * section.batch, section.batch):
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
