"""Deal a step's micro-batches to ranks, and count the fillers that this makes (C1)."""

from __future__ import annotations

import numpy as np

from packhorse.trainer.datatypes import BadInput, StepPlan

MUCH_FILLER = 0.10  # share of idle micro-batches above which the user is warned


def count_groups(world: int, sequence: int) -> int:
    """Return how many groups of `sequence` ranks, which share their micro-batches, `world` makes.

    Raises:
        BadInput: the ranks do not divide into such groups.
    """
    if world % sequence:
        raise BadInput(
            f"parallel.sequence: {sequence} ranks share a packed sequence, and their number in all "
            f"({world}) does not divide into such groups; start a multiple, or set another number"
        )
    return world // sequence


def filler_share(counts: np.ndarray, world: int) -> float:
    """Return the share of all ranks' micro-batches that are fillers.

    `counts` (steps,) is the number of real micro-batches of each step.
    """
    return float(1 - counts.sum() / (-(-counts // world) * world).sum())


def good_worlds(counts: np.ndarray, world: int) -> list[int]:
    """Return up to three numbers of ranks, near to `world`, that keep (nearly) all ranks busy."""
    most = min(int(counts.min()), 2 * world)
    shares = {candidate: filler_share(counts, candidate) for candidate in range(1, most + 1)}
    good = [candidate for candidate, share in shares.items() if share <= MUCH_FILLER / 4]
    return sorted(sorted(good, key=lambda candidate: (abs(candidate - world), candidate))[:3])


def micro_batches_of(step: StepPlan, rank: int, world: int) -> list[tuple[int, ...] | None]:
    """Return the sequences of each micro-batch that `rank` of `world` runs; None for a filler.

    All ranks get the same number, at least one, as every micro-batch has collectives (C1).
    """
    turns = max(1, -(-len(step.micro_batches) // world))
    taken = range(rank, turns * world, world)
    return [step.micro_batches[i] if i < len(step.micro_batches) else None for i in taken]
