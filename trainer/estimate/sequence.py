"""Plan sequence parallelism (C13): what ranks exchange, and the longest sequence that fits.

In: a model's sizes, its activations for some tokens, a cluster. Out: bytes and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import first_key, slice_borders
from packhorse.trainer.estimate.memory import Cluster, StepStats
from packhorse.trainer.estimate.model import Activations, AttentionShape, ModelSizes
from packhorse.trainer.estimate.traffic import Traffic, step_traffic
from packhorse.trainer.model.feed_forward_tiles import FEWEST_TILES, tile_tokens
from packhorse.trainer.model.sequence_exchange import takes_heads

STEP_TOKENS = 1024  # of a rank, to which the longest sequence is searched
MOST_TOKENS = 2**24  # of a rank, at which the search ends


def slice_activations(
    of_slice: Mapping[str, Activations],
    layers: Sequence[AttentionShape],
    tokens: int,
    ranks: int,
    kind: str | None,
    element: int,
) -> dict[str, Activations]:
    """Return a slice's activations, with the keys and values of other ranks that layers hold.

    Args:
        of_slice: those of as many tokens alone, by model.activation_checkpointing.
        tokens: of a slice.
        element: bytes of a number.
    """
    more = []
    for heads, key_heads, size, value_size, window, *_ in layers:
        if takes_heads(kind, heads, ranks, window, ranks * tokens):
            held = math.lcm(key_heads, ranks) * tokens
        else:  # the last slice sees most
            held = key_heads * min(ranks * tokens, tokens + (window or math.inf) - 1)
        more.append(int(held - key_heads * tokens) * (size + value_size) * element)
    # held by all layers at once, or by the one that is recomputed
    return {
        mode: replace(a, kept=a.kept + sum(more))
        if mode == "none"
        else replace(a, layer=a.layer + max(more, default=0))
        for mode, a in of_slice.items()
    }


def exchanged_elements(
    layers: Sequence[AttentionShape],
    lengths: Sequence[int],
    ranks: int,
    index: int,
    kind: str | None,
) -> int:
    """Return the elements that a rank sends in one forward, what it keeps left out.

    The backward sends back as many as come in.

    Args:
        lengths: of the sequence's documents.
        index: the rank's number among those that share the sequence.
        kind: parallel.sequence_kind.
    """
    slices = list(pairwise(slice_borders(lengths, ranks)))
    (start, stop), total = slices[index], sum(lengths)
    own, sent = stop - start, 0
    for heads, key_heads, size, value_size, window, *_ in layers:
        if not takes_heads(kind, heads, ranks, window, total):
            firsts = [first_key(lengths, begin, window) for begin, _ in slices[index + 1 :]]
            wanted = sum(max(0, stop - max(start, first)) for first in firsts)
            sent += wanted * key_heads * (size + value_size)
            continue
        repeated = math.lcm(key_heads, ranks) // ranks  # key heads of a rank
        each = heads // ranks * size + repeated * (size + value_size)
        sent += (ranks - 1) * own * each + (total - own) * heads // ranks * value_size
    return sent


def sequence_traffic(
    recipe: Recipe,
    model: ModelSizes,
    config: dict[str, Any],
    cluster: Cluster,
    stats: StepStats,
    mode: str,
) -> Traffic:
    """Return what a step moves under a template, with what ranks that share a sequence exchange."""
    parallel, groups = recipe.parallel, cluster.gpus // stats.sequence
    micro_batches = float(np.ceil(stats.micro_batches / groups).mean())
    traffic = step_traffic(model, config, cluster.gpus, micro_batches)
    if stats.sequence == 1:
        return traffic
    given = ([stats.fullest_tokens], stats.sequence, 0, parallel.sequence_kind)
    one_way = exchanged_elements(model.attention, *given)
    # forward, backward, and the forward once more where layers are recomputed
    sent = micro_batches * one_way * model.element * (2 + (mode != "none"))
    where = "in_group" if stats.sequence <= cluster.per_node else "between_gpus"
    return replace(traffic, **{where: getattr(traffic, where) + sent})


def longest_slice(
    fits: Callable[[Activations, int], bool], trace: Callable[[int], Activations], hidden: int
) -> int:
    """Return the most tokens of a rank that fit, in steps of STEP_TOKENS; 0 if none do.

    Args:
        fits: of activations and trained tokens; the more, the less it fits.
        trace: returns the activations of some tokens. It takes long, and is called twice: beyond
            the length from which feed-forward blocks run in tiles they grow in proportion.
        hidden: size of the model.
    """
    few = FEWEST_TILES * tile_tokens(hidden)
    start, end = (astuple(trace(tokens)) for tokens in (few, 2 * few))

    def tokens_fit(wanted: int) -> bool:
        times = Fraction(wanted, few)
        grown = (a + (b - a) * (times - 1) if times > 1 else a * times for a, b in zip(start, end))
        return fits(Activations(*map(int, grown)), wanted)

    low, high = 0, MOST_TOKENS // STEP_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens_fit(middle * STEP_TOKENS) else (low, middle - 1)
    return low * STEP_TOKENS
