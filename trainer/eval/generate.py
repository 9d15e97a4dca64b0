"""Answers to held-out prompts, and the likelihood of given ones, from the model that is trained, at
any ZeRO stage.

In: the engine and prompts. Out: one answer a prompt, or one number for each of its choices, on
    every rank and in the
prompts' order. Each rank works on a share of them. Batches hold prompts of like lengths, padded on
the left.

Shapes: B prompts of a batch, L tokens of its longest one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trainer import dist
from trainer.config.eval import GenerateSection
from trainer.datatypes import BadInput, Prompt
from trainer.engine.engine import Engine
from trainer.hang_watchdog import Watch
from trainer.model.attention import other_attention

PAD = 0  # nothing sees it, so any token will do


def require_room(model: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Raises BadInput where a prompt and its answer may take more positions than the model has."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
    if positions and longest + max_new_tokens > positions:
        raise BadInput(
            f"eval.generate: a held-out prompt of {longest} tokens and "
            f"max_new_tokens={max_new_tokens} do not fit into "
            f"the model's {positions} positions; lower max_new_tokens, or take the longest prompts "
            f"out of data.eval"
        )


def stop_tokens(model: Any, learned: Sequence[int]) -> list[int]:
    """What ends an answer: what was learned to, and what the model's makers named beside it, as a
    tool call's end.
    """
    return sorted({*learned, *_as_list(model.generation_config.eos_token_id)})


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    section: GenerateSection,
    tokenizer: Any,
    stop: dist.StopFlag,
    watch: Watch,
    *,
    seeds: Sequence[int],
) -> list[str] | None:
    """The text of the answers, of which the special tokens are no part; None where the stop flag
    went up meanwhile.

    Args:
        seeds: what is drawn for each prompt follows from its own one: neither the number of ranks
            nor the batch that it falls into changes it. Greedy answers need none.
    """
    ids = answer_ids(
        engine, [prompt.input_ids for prompt in prompts], section, stop, watch, seeds=seeds
    )
    return None if ids is None else tokenizer.batch_decode(ids, skip_special_tokens=True)


@torch.no_grad()
def answer_ids(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    section: GenerateSection,
    stop: dist.StopFlag,
    watch: Watch,
    *,
    seeds: Sequence[int],
) -> list[list[int]] | None:
    """The tokens of the answers to prompts of tokens, up to the first stop token of the generation
    configuration.
    """
    model: Any = engine.module.model
    lengths = [len(prompt) for prompt in prompts]
    mine: dict[int, list[int]] = {}
    with _evaluating(model), engine.gather_for_generation() as independent:
        for numbers in _rounds(lengths, section.batch):
            watch.beat("generation")
            if stop.poll():
                return None
            batch = numbers or [
                lengths.index(min(lengths))
            ]  # without a prompt it runs along for the collectives
            answers = _answers(
                model,
                [prompts[i] for i in batch],
                section,
                [seeds[i] for i in batch] if section.temperature else [],
                synced=not independent,
            )
            mine |= dict(zip(numbers, answers, strict=False))
    return _in_order(mine, len(prompts))


def _answers(
    model: Any,
    prompts: list[Sequence[int]],
    section: GenerateSection,
    seeds: list[int],
    synced: bool,
) -> list[list[int]]:
    """One batch.

    Args:
        synced: the other ranks run a batch, too, and need this one's forwards until the last of
            them has ended.
    """
    from transformers import GenerationConfig

    stops = _as_list(model.generation_config.eos_token_id)
    ids, mask = _padded(prompts)
    width = ids.shape[1]
    plain = GenerationConfig(
        max_new_tokens=section.max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=PAD,
        do_sample=False,
    )
    with _configuration(model, plain):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            logits_processor=[SeededSampler(section.temperature, section.top_p, seeds)]
            if section.temperature
            else [],
            synced_gpus=synced,
        )
    return [_until_stop(row, stops) for row in out[:, width:].tolist()]


class SeededSampler:
    """Draws each row's next token, as a logits processor: what it returns leaves that one token
    possible.

    A row needs one uniform number a token. It comes from the row's own seed, on the CPU, so that it
    is the same whatever batch, rank or device a prompt falls on.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, tokens until now), (B, V) logits -> (B, V): 0 at the drawn token, -inf elsewhere."""
        uniform = torch.cat(
            [torch.rand(1, 1, generator=g, dtype=torch.float64) for g in self._generators]
        )
        chosen = draw(scores, self._temperature, self._top_p, uniform.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def draw(
    scores: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor
) -> torch.Tensor:
    """(B, 1): of (B, V) logits the token at which the cumulative probability passes (B, 1) numbers
    from [0, 1).

    With `top_p` the least likely tokens are left out, as long as the others have that share. The
    order of the sum is the vocabulary's and not that of the probabilities, which rounding would
    change.
    """
    probabilities = torch.softmax(scores.double() / temperature, dim=-1)
    if top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True)
        left_out = falling.cumsum(-1) - falling >= top_p
        probabilities = probabilities.masked_fill(
            torch.zeros_like(left_out).scatter_(1, order, left_out), 0.0
        )
    cumulative = probabilities.cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


# -------------------------------------------------------------------------------------- likelihoods


@torch.no_grad()
def choice_logprobs(
    engine: Engine,
    prompts: Sequence[Prompt],
    choices: Sequence[str],
    batch: int,
    tokenizer: Any,
    stop: dist.StopFlag,
    watch: Watch,
) -> list[list[float]] | None:
    """For each prompt the log-probability (natural) of each choice's tokens at the start of its
    answer.

    The head sees the positions before these tokens alone. Choices that differ in their last token
    share a row.

    Args:
        choices: short texts, as "A" to "D".
        batch: rows that one rank runs at once.

    Returns:
        One list a prompt, one number a choice; None where the stop flag went up meanwhile.
    """
    wanted: dict[
        tuple[int, ...], list[tuple[int, int, list[int]]]
    ] = {}  # a row -> prompt, choice and its tokens
    for number, prompt in enumerate(prompts):
        for k, choice in enumerate(choices):
            tokens = tokens_after(tokenizer, prompt, choice)
            row = (number, *prompt.input_ids, *tokens[:-1])  # the number: two prompts may be alike
            wanted.setdefault(row, []).append((number, k, tokens))
    rows = list(wanted)
    model: Any = engine.module.model
    mine: dict[tuple[int, int], float] = {}
    with _evaluating(model):
        for numbers in _rounds([len(row) for row in rows], batch):
            watch.beat("likelihoods")
            if stop.poll():
                return None
            given = [rows[i] for i in numbers or [0]]
            last = max(len(tokens) for row in given for *_, tokens in wanted[row])
            logprobs = _last_logprobs(model, [row[1:] for row in given], last).cpu()
            for i, of_row in zip(numbers, logprobs, strict=False):
                for number, k, tokens in wanted[rows[i]]:
                    places = torch.arange(last - len(tokens), last)
                    mine[number, k] = float(of_row[places, torch.tensor(tokens)].double().sum())
    found = {key: value for share in dist.gather(mine) for key, value in share.items()}
    return [[found[number, k] for k in range(len(choices))] for number in range(len(prompts))]


def tokens_after(tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
    """The tokens of a text that follows a prompt, as they were learned: a tokenizer may write a
    text otherwise where it stands alone."""
    whole = tokenizer(prompt.text + text, add_special_tokens=False)["input_ids"]
    start = len(prompt.input_ids)
    if whole[:start] == prompt.input_ids and len(whole) > start:
        return whole[start:]
    return tokenizer(text, add_special_tokens=False)[
        "input_ids"
    ]  # its start has grown together with the prompt's end


def _last_logprobs(model: Any, rows: list[tuple[int, ...]], last: int) -> torch.Tensor:
    """(B, last, V) float32 log-probabilities of what follows each of a row's last tokens."""
    ids, mask = _padded(rows)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    keep = {"logits_to_keep": last} if model._supports_logits_to_keep() else {}
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **keep)
    return torch.log_softmax(out.logits[:, -last:].float(), dim=-1)


# ------------------------------------------------------------------------------------------ batches


def _rounds(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """The numbers of this rank's prompts, a batch at a time: as many batches on every rank, some of
    them empty.

    Prompts of like lengths run together, on all ranks at the same time, the longest first: a device
    that has no room for them says so at once.
    """
    world, count = dist.world_size(), len(lengths)
    order = sorted(range(count), key=lambda i: (-lengths[i], i))
    batches = -(-count // (world * size)) * world
    for i in range(dist.rank(), batches, world):
        yield order[i * count // batches : (i + 1) * count // batches]


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) tokens with the padding on the left, and (B, L) 1 where a token is real."""
    width = max(map(len, rows))
    ids = torch.tensor(
        [[PAD] * (width - len(row)) + list(row) for row in rows], device=dist.device()
    )
    mask = torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=dist.device()
    )
    return ids, mask


def _until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _in_order(mine: dict[int, list[int]], count: int) -> list[list[int]]:
    """What all ranks have, by number."""
    found = {number: answer for share in dist.gather(mine) for number, answer in share.items()}
    return [found[number] for number in range(count)]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Inside, the model answers padded batches; afterwards a GPU has its memory back."""
    model.eval()
    with other_attention(model, "sdpa"):
        yield
    if dist.device().type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _configuration(model: Any, plain: Any) -> Iterator[None]:
    """Inside, the model has no generation configuration but this one. What its makers set for its
    users, as a penalty for repetition, counts the padding, too, so that an answer would depend on
    its batch."""
    before, model.generation_config = model.generation_config, plain
    try:
        yield
    finally:
        model.generation_config = before
