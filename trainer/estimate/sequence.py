"""Plan sequence parallelism (C13): what ranks exchange, and the longest sequence that fits.

In: a model's sizes, its activations for some tokens, a cluster. Out: bytes and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from fractions import Fraction
from typing import Any

import numpy as np

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import slice_pieces
from packhorse.trainer.estimate.memory import Cluster, StepStats
from packhorse.trainer.estimate.model import Activations, AttentionShape, ModelSizes
from packhorse.trainer.estimate.traffic import Traffic, step_traffic
from packhorse.trainer.model.feed_forward_tiles import FEWEST_TILES, tile_tokens
from packhorse.trainer.model.ring_attention import seen_in_ring
from packhorse.trainer.model.sequence_exchange import (
    goes_round,
    seen_keys,
    shared_parts,
    takes_heads,
)

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
    more, passing = [], [0]
    for heads, key_heads, size, value_size, window, *_ in layers:
        own, width = key_heads * tokens, (size + value_size) * element
        if goes_round(kind, [ranks * tokens], window):
            passing.append(3 * own * width)  # its own beside each other, a step's and the next's
            continue
        if takes_heads(kind, heads, ranks, window, ranks * tokens):
            held = math.lcm(key_heads, ranks) * tokens
        else:  # the last slice sees most, and a ring's has two pieces
            before = (1 + (kind == "ring")) * ((window or math.inf) - 1)
            held = key_heads * min(ranks * tokens, tokens + before)
        more.append(int(held - own) * width)
    # held by all layers at once, or by the one that is recomputed
    return {
        mode: replace(a, kept=a.kept + sum(more), layer=a.layer + max(passing))
        if mode == "none"
        else replace(a, layer=a.layer + max(more + passing))
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

    The backward sends back as many as come in. In a ring it sends these once more, too.

    Args:
        lengths: of the sequence's documents.
        index: the rank's number among those that share the sequence.
        kind: parallel.sequence_kind.
    """
    pieces, total, sent = slice_pieces(lengths, ranks, kind == "ring"), sum(lengths), 0
    own = sum(stop - start for start, stop in pieces[index])
    others = [rank for rank in range(ranks) if rank != index]
    for heads, key_heads, size, value_size, window, *_ in layers:
        if goes_round(kind, lengths, window):
            seen = seen_in_ring(tuple(lengths), pieces)
            wanted = sum(seen[rank][index].tokens for rank in others)
            sent += wanted * key_heads * (size + value_size)
        elif takes_heads(kind, heads, ranks, window, total):
            repeated = math.lcm(key_heads, ranks) // ranks  # key heads of a rank
            each = heads // ranks * size + repeated * (size + value_size)
            sent += (ranks - 1) * own * each + (total - own) * heads // ranks * value_size
        else:
            ranges = [seen_keys(lengths, pieces[rank], window) for rank in others]
            parts = [shared_parts(pieces[index], of_rank) for of_rank in ranges]
            wanted = sum(part.tokens for of_rank in parts for part in of_rank)
            sent += wanted * key_heads * (size + value_size)
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
    lengths, size, kind = [stats.fullest_tokens], stats.sequence, parallel.sequence_kind
    # of the rank that sends most: in a ring the last, else the first
    index = size - 1 if kind == "ring" else 0
    one_way = exchanged_elements(model.attention, lengths, size, index, kind)
    # forward, backward, and the forward once more where layers are recomputed
    times = 2 + (mode != "none") + (kind == "ring")
    sent = micro_batches * one_way * model.element * times
    where = "in_group" if stats.sequence <= cluster.per_node else "between_gpus"
    return replace(traffic, **{where: getattr(traffic, where) + sent})


def longest_slice(
    fits: Callable[[Activations, int], bool], trace: Callable[[int], Activations], hidden: int
) -> int:
    """Return the most tokens of a rank that fit, in steps of STEP_TOKENS; 0 if none do.

    Args:
        fits: of activations and trained tokens; the more, the less it fits.
        trace: returns the activations of some tokens. It takes long, and is called thrice: with
            few tokens feed-forward blocks run whole, and activations grow in proportion; with more
            they run in tiles, and activations grow by a line.
        hidden: size of the model.
    """
    few = FEWEST_TILES * tile_tokens(hidden)
    whole = few - STEP_TOKENS
    below, start, end = (astuple(trace(tokens)) for tokens in (whole, few, 2 * few))

    def tokens_fit(wanted: int) -> bool:
        if wanted < few:
            grown = (a * Fraction(wanted, whole) for a in below)
        else:
            grown = (a + (b - a) * Fraction(wanted - few, few) for a, b in zip(start, end))
        return fits(Activations(*map(int, grown)), wanted)

    # two searches, as a little below `few` more is needed than at it
    first = -(-few // STEP_TOKENS)
    tiled = tokens_fit(first * STEP_TOKENS)
    low, high = (first, MOST_TOKENS // STEP_TOKENS) if tiled else (0, first - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens_fit(middle * STEP_TOKENS) else (low, middle - 1)
    return low * STEP_TOKENS
