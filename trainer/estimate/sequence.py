"""Plan sequence parallelism (C13): what ranks exchange, and the longest sequence that fits.

In: a model's sizes, its activations for some tokens, a cluster. Out: bytes and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import slice_borders
from packhorse.trainer.estimate.memory import Cluster, StepStats
from packhorse.trainer.estimate.model import Activations, ModelSizes
from packhorse.trainer.estimate.traffic import Traffic, step_traffic

STEP_TOKENS = 1024  # of a rank, to which the longest sequence is searched
MOST_TOKENS = 2**24  # of a rank, at which the search ends


def exchanged_elements(
    layers: Sequence[tuple[int, int, int, int]],
    borders: Sequence[int],
    index: int,
    kind: str | None,
) -> int:
    """Return the elements that a rank sends in one forward, what it keeps left out.

    The backward sends back as many as come in.

    Args:
        layers: query heads, key heads, head size, and that of values, of each layer that attends.
        borders: of the ranks' slices.
        index: the rank's number among them.
        kind: parallel.sequence_kind.
    """
    ranks = len(borders) - 1
    lengths = [stop - start for start, stop in pairwise(borders)]
    own, others = lengths[index], borders[-1] - lengths[index]
    sent = 0
    for heads, key_heads, size, value_size in layers:
        if kind == "gather" or heads % ranks:
            sent += (ranks - 1) * own * key_heads * (size + value_size)
            continue
        repeated = math.lcm(key_heads, ranks) // ranks  # key heads of a rank
        each = heads // ranks * size + repeated * (size + value_size)
        sent += (ranks - 1) * own * each + others * heads // ranks * value_size
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
    borders = slice_borders([stats.fullest_tokens], stats.sequence)
    one_way = exchanged_elements(model.attention, borders, 0, parallel.sequence_kind)
    # forward, backward, and the forward once more where layers are recomputed
    sent = micro_batches * one_way * model.element * (2 + (mode != "none"))
    where = "in_group" if stats.sequence <= cluster.per_node else "between_gpus"
    return replace(traffic, **{where: getattr(traffic, where) + sent})


def longest_slice(
    fits: Callable[[Activations, int], bool], activations: Activations, tokens: int
) -> int:
    """Return the most tokens of a rank that fit, in steps of STEP_TOKENS; 0 if none do.

    Args:
        fits: of activations and trained tokens; the more, the less it fits.
        activations: those of `tokens` tokens. They grow as the tokens do.
    """

    def tokens_fit(wanted: int) -> bool:
        times = Fraction(wanted, tokens)
        scaled = Activations(int(activations.kept * times), int(activations.layer * times))
        return fits(scaled, wanted)

    low, high = 0, MOST_TOKENS // STEP_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens_fit(middle * STEP_TOKENS) else (low, middle - 1)
    return low * STEP_TOKENS
