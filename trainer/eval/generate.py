"""Generate answers to held-out prompts, and measure the likelihood of given ones, by the model that
is trained, at any ZeRO stage.

The engine and prompts enter; one answer a prompt, or one number for each of its choices, leaves, on
every rank and in the prompts' order. Each rank works on a share of the prompts. Batches hold
prompts of similar lengths, padded on the left.

Shapes: B prompts of a batch, L tokens of its longest one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.config.eval import GenerateSection
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import BadInput, Prompt
from packhorse.trainer.engine.engine import Engine
from packhorse.trainer.hang_watchdog import Watch
from packhorse.trainer.model.attention import other_attention
from packhorse.trainer.stop_flag import StopFlag
from packhorse.trainer.utils.progress import track
from packhorse.trainer.utils.staged_build import Stopped

FEWEST_TOKENS = 16_384  # that a rank runs at once, though a micro-batch of training may have fewer
PAD = 0  # any token will do: the attention mask hides it


def require_room(model: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Raise BadInput if a prompt and its answer may need more positions than the model has."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
    if positions and longest + max_new_tokens > positions:
        raise BadInput(
            f"eval.generate: a held-out prompt of {longest} tokens and "
            f"max_new_tokens={max_new_tokens} do not fit into the model's {positions} positions; "
            f"lower max_new_tokens, or remove the longest prompts from data.eval"
        )


def tokens_at_once(recipe: Recipe) -> int:
    """Return how many tokens of prompts and answers a rank runs at once: those of a micro-batch,
    which it has room for in training."""
    micro_batch = recipe.batch.micro * recipe.batch.seq_len // recipe.parallel.ranks_a_sequence
    return max(micro_batch, FEWEST_TOKENS)


def stop_tokens(model: Any, trained: Sequence[int]) -> list[int]:
    """Return the ids of the stop tokens: the trained ones, plus those of the model's generation
    configuration (as the end of a tool call)."""
    return sorted({*trained, *_as_list(model.generation_config.eos_token_id)})


@torch.no_grad()
def answer_ids(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    section: GenerateSection,
    at_once: int,
    stop: StopFlag,
    watch: Watch,
    *,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Return the tokens of the answers to prompts of tokens, up to the first stop token of the
    model's generation configuration. Raises Stopped if the stop flag is raised.

    Args:
        at_once: tokens that one rank runs at once.
        seeds: one a prompt. What is sampled follows from it alone: neither the number of ranks nor
            the batch changes it. Greedy answers need none.
    """
    model: Any = engine.module.model
    lengths = [len(prompt) + section.max_new_tokens for prompt in prompts]
    mine: dict[int, list[int]] = {}
    with _evaluating(model), engine.gather_for_generation() as independent:
        for numbers in _rounds(lengths, at_once, "generation", stop, watch):
            # a rank without a prompt runs the shortest one: the collectives need every rank
            batch = numbers or [lengths.index(min(lengths))]
            given = [prompts[i] for i in batch]
            drawn_by = [seeds[i] for i in batch] if section.temperature else []
            answers = _answers(model, given, section, drawn_by, synced=not independent)
            mine |= dict(zip(numbers, answers, strict=False))
    shares = dist.gather(list(mine.items()))
    found = {number: answer for share in shares for number, answer in share}
    return [found[number] for number in range(len(prompts))]


def _answers(
    model: Any,
    prompts: list[Sequence[int]],
    section: GenerateSection,
    seeds: list[int],
    synced: bool,
) -> list[list[int]]:
    """Answer one batch.

    Args:
        synced: the other ranks need this one's forwards until the last of them has finished, as the
            layers' weights are gathered forward by forward.
    """
    from transformers import GenerationConfig

    stops = _as_list(model.generation_config.eos_token_id)
    ids, mask = _padded(prompts)
    sampler = SeededSampler(section.temperature, section.top_p, seeds)
    # The model's own configuration may hold settings for its users, as a penalty for repetition.
    # That counts the padding as well, so an answer would depend on its batch.
    plain = GenerationConfig(
        max_new_tokens=section.max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=PAD,
        do_sample=False,
    )
    before, model.generation_config = model.generation_config, plain
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            logits_processor=[sampler] if section.temperature else [],
            synced_gpus=synced,
        )
    finally:
        model.generation_config = before
    return [_until_stop(row, stops) for row in out[:, ids.shape[1] :].tolist()]


class SeededSampler:
    """A logits processor that samples each row's next token: it leaves that token alone possible.

    A row needs one uniform number a token. It comes from the row's own seed, by a generator on the
    CPU, so that it is the same in any batch and on any rank or device.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Map (B, V) logits to (B, V): 0 at the sampled token, -inf elsewhere."""
        uniform = torch.cat(
            [torch.rand(1, 1, generator=g, dtype=torch.float64) for g in self._generators]
        )
        chosen = sample_tokens(scores, self._temperature, self._top_p, uniform.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def sample_tokens(
    scores: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor
) -> torch.Tensor:
    """Sample a token from each row of logits by inversion: the first token whose cumulative
    probability exceeds the row's uniform number.

    Args:
        scores: (B, V) logits.
        top_p: only the most likely tokens with this share of the probability can be sampled.
        uniform: (B, 1) float64 numbers in [0, 1).

    Returns:
        (B, 1) token ids.
    """
    probabilities = torch.softmax(scores.double() / temperature, dim=-1)
    if top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True)
        left_out = falling.cumsum(-1) - falling >= top_p
        probabilities = probabilities.masked_fill(
            torch.zeros_like(left_out).scatter_(1, order, left_out), 0.0
        )
    # summed in the order of the vocabulary: rounding changes the order of close probabilities, and
    # with it which token a number falls on
    cumulative = probabilities.cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


# -------------------------------------------------------------------------------------- likelihoods


@torch.no_grad()
def choice_logprobs(
    engine: Engine,
    prompts: Sequence[Prompt],
    choices: Sequence[str],
    at_once: int,
    tokenizer: Any,
    stop: StopFlag,
    watch: Watch,
) -> list[list[float]]:
    """Return for each prompt the natural log-probability of each choice's tokens after it. Raises
    Stopped if the stop flag is raised.

    Args:
        choices: short texts, as "A" to "D".
        at_once: tokens that one rank runs at once.
    """
    # Choices that differ in their last token alone share a sequence: its logits hold them all.
    # The prompt's number comes first in the key, as two prompts may be equal.
    wanted: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = {}
    for number, prompt in enumerate(prompts):
        for k, choice in enumerate(choices):
            tokens = tokens_after(tokenizer, prompt, choice)
            key = (number, *prompt.input_ids, *tokens[:-1])
            wanted.setdefault(key, []).append((number, k, tokens))
    sequences = list(wanted)
    model: Any = engine.module.model
    mine: dict[tuple[int, int], float] = {}
    with _evaluating(model):
        for numbers in _rounds(list(map(len, sequences)), at_once, "likelihoods", stop, watch):
            given = [sequences[i] for i in numbers or [0]]
            last = max(len(tokens) for sequence in given for *_, tokens in wanted[sequence])
            logprobs = _last_logprobs(model, [sequence[1:] for sequence in given], last).cpu()
            for i, row in zip(numbers, logprobs, strict=False):
                for number, k, tokens in wanted[sequences[i]]:
                    places = torch.arange(last - len(tokens), last)
                    mine[number, k] = float(row[places, torch.tensor(tokens)].double().sum())
    shares = dist.gather(list(mine.items()))
    found = {tuple(key): value for share in shares for key, value in share}
    return [[found[number, k] for k in range(len(choices))] for number in range(len(prompts))]


def tokens_after(tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
    """Return the tokens of a text that follows a prompt, as the model was trained on them: a
    tokenizer may split a text otherwise when it stands alone."""
    whole = tokenizer(prompt.text + text, add_special_tokens=False)["input_ids"]
    start = len(prompt.input_ids)
    if whole[:start] == prompt.input_ids and len(whole) > start:
        return whole[start:]
    # the text's start has merged with the prompt's end
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _last_logprobs(model: Any, sequences: list[tuple[int, ...]], last: int) -> torch.Tensor:
    """Return (B, last, V) float32 log-probabilities of what follows each of the last tokens."""
    ids, mask = _padded(sequences)
    # from the first real token: learned positions would count the padding otherwise
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    keep = {"logits_to_keep": last} if model._supports_logits_to_keep() else {}
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **keep)
    return torch.log_softmax(out.logits[:, -last:].float(), dim=-1)


# ------------------------------------------------------------------------------------------ batches


def _rounds(
    lengths: Sequence[int], at_once: int, what: str, stop: StopFlag, watch: Watch
) -> Iterator[list[int]]:
    """Yield the numbers of this rank's prompts batch by batch, and show how many are done: as many
    batches on every rank, some of them empty.

    Prompts of similar lengths run together, on all ranks at the same time. The longest come first,
    so that a device without memory for them fails at once. A batch has up to `at_once` tokens, or
    one prompt.
    """
    world, count, size = dist.world_size(), len(lengths), max(1, at_once // max(lengths, default=1))
    order = sorted(range(count), key=lambda i: (-lengths[i], i))
    batches = -(-count // (world * size)) * world
    for i in track(range(dist.rank(), batches, world), what, batches // world, "batches"):
        watch.beat(what)
        if stop.poll():
            raise Stopped(f"stopped during {what}")
        yield order[i * count // batches : (i + 1) * count // batches]


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, L) tokens, padded on the left, and (B, L) 1 where a token is real."""
    width = max(map(len, rows))
    ids = [[PAD] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=dist.device()), torch.tensor(mask, device=dist.device())


def _until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Prepare the model for padded batches inside; give a GPU's memory back afterwards."""
    model.eval()
    # training's attention takes packed sequences and knows no padding mask
    with other_attention(model, "sdpa"):
        yield
    if dist.device().type == "cuda":
        torch.cuda.empty_cache()
