"""Answers to held-out prompts, from the model that is trained, at any ZeRO stage.

In: the engine and prompts. Out: one answer a prompt, on every rank. Each rank answers a share of them, and runs as
many forwards as the others, so that no collective hangs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainer import dist
from trainer.config_eval import GenerateSection
from trainer.engine import Engine
from trainer.flow import Prompt
from trainer.model.attention import other_attention
from trainer.watch import Watch


@torch.no_grad()
def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    section: GenerateSection,
    tokenizer: Any,
    stop: dist.StopFlag,
    watch: Watch,
) -> list[str] | None:
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
    return [by_rank[i % world][i // world] for i in range(len(prompts))]


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
