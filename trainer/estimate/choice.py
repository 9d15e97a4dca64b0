"""Predict a step's memory for a run, and choose how many ranks share a packed sequence (C13) and
how many sequences a micro-batch has.

In: a recipe, the fullest micro-batch, a cluster. Out: bytes by activation checkpointing; the recipe
with a number for `parallel.sequence: auto` or for `batch.micro_batch_size: auto`. The first changes
no number that is learned, so that a run makes it anew each time it starts.
"""

from __future__ import annotations

import math

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.estimate.memory import GIB, Cluster, Memory, peak_memory
from packhorse.trainer.estimate.report import (
    Inspected,
    checkpointing_modes,
    fill_template,
    inspect_model,
)
from packhorse.trainer.model.loss import choose_kernel

# For `batch.micro_batch_size: auto`. Two or three percent of speed, which larger micro-batches
# gain, are not worth any recomputation, which costs 8% and more: activations may take this share of
# a GPU's memory, as most of the rest is the training state's.
ACTIVATION_SHARE = 0.25
MOST_TOKENS = 65_536  # of a micro-batch, by which products are large enough for any GPU
WORLDS = tuple(2**n for n in range(11))  # numbers of GPUs on which that must hold


def memory_by_mode(
    recipe: Recipe, cluster: Cluster, tokens: int, trained: int, kernel: str
) -> dict[str, Memory]:
    """Return the memory of a step by the values of model.activation_checkpointing to try, the least
    recomputation first.

    Args:
        tokens: of the fullest micro-batch.
        trained: trained tokens of the fullest micro-batch.
        kernel: of the loss.

    Raises:
        BadInput: the model or the template cannot be planned.
    """
    # a rank's share, if several have a slice of it
    tokens = -(-tokens // recipe.parallel.ranks_a_sequence)
    inspected = inspect_model(recipe, tokens)
    return _memory_by_mode(recipe, inspected, cluster, min(trained, tokens), kernel)


def _memory_by_mode(
    recipe: Recipe, inspected: Inspected, cluster: Cluster, trained: int, kernel: str
) -> dict[str, Memory]:
    model, activations, _ = inspected
    config = fill_template(recipe, recipe.parallel.deepspeed, model.hidden)
    given = (model, config, cluster.gpus, cluster.per_node, trained, kernel)
    modes = checkpointing_modes(recipe, activations)
    return {mode: peak_memory(*given, activations[mode]) for mode in modes}


def predict_memory(recipe: Recipe, tokens: int, trained: int) -> dict[str, Memory]:
    """Return `memory_by_mode` of this run; {} if it cannot be planned."""
    cluster = Cluster(dist.world_size(), dist.local_world_size(), math.inf)
    kernel = choose_kernel(recipe.loss.kernel, dist.device())
    try:
        return memory_by_mode(recipe, cluster, tokens, trained, kernel)
    except BadInput as error:
        dist.log.info("memory is not predicted: %s", error)
        return {}


def choose_sequence(
    recipe: Recipe, cluster: Cluster, tokens: int, trained: int, fewest: int, kernel: str = "liger"
) -> tuple[Recipe, str]:
    """Choose the fewest ranks that share a sequence, so that a step fits and no group idles.

    Args:
        cluster: with `gpu` infinite, as on a CPU, everything fits.
        fewest: micro-batches of a step. The others are those of `memory_by_mode`.

    Returns:
        The recipe with that number in place of `auto`, and the reason as a sentence.

    Raises:
        BadInput: no number fits, or the model cannot be planned.
    """
    world, idle = cluster.gpus, recipe.parallel.allow_idle_ranks
    dividing = [size for size in range(1, world + 1) if world % size == 0]
    sizes = [size for size in dividing if idle or world // size <= fewest]
    needed = 0
    for size in sizes:
        parallel = recipe.parallel.model_copy(update={"sequence": size})
        made = recipe.model_copy(update={"parallel": parallel})
        share = f"{size} of {world} ranks share each packed sequence, the fewest"
        if math.isinf(cluster.gpu):
            return made, f"{share} that leave no group without a micro-batch"
        try:
            predicted = memory_by_mode(made, cluster, tokens, trained, kernel)
        except BadInput as error:
            advice = "or set parallel.sequence to a number"
            raise BadInput(f"parallel.sequence: auto: {error}; {advice}") from error
        needed = min(memory.gpu_total for memory in predicted.values())
        if needed <= cluster.gpu:
            fits = f"{needed / GIB:.1f} of {cluster.gpu / GIB:.1f} GiB"
            return made, f"{share} with which a step of {tokens:,} tokens fits: {fits}"
    raise BadInput(
        f"parallel.sequence: auto: a micro-batch of {tokens:,} tokens needs {needed / GIB:,.1f} "
        f"GiB on each of {world} GPUs of {cluster.gpu / GIB:.1f} GiB, even if all of them share "
        "it: use more GPUs or a template that offloads more, set "
        "model.activation_checkpointing=offload, or lower batch.seq_len or batch.micro_batch_size"
    )


def largest_micro_batch(recipe: Recipe, card: float, kernel: str = "liger") -> int:
    """Return the largest power of two of packed sequences whose activations, with nothing
    recomputed, fit ACTIVATION_SHARE of a GPU of `card` bytes, and with which none of WORLDS
    recomputes more than with one sequence.

    It does not depend on the number of GPUs. It is 1 for a model that cannot be planned.
    """
    batch = recipe.batch
    try:
        one = _inspect(recipe, 1)
        kept = one[1]["none"].kept
        most = min(
            int(ACTIVATION_SHARE * card / kept),
            MOST_TOKENS // batch.seq_len,
            batch.global_batch_size,
        )
        size = 2 ** (max(most, 1).bit_length() - 1)
        wanted = _recomputed(recipe, one, 1, card, kernel) if size > 1 else []
        while (
            size > 1 and _recomputed(recipe, _inspect(recipe, size), size, card, kernel) != wanted
        ):
            size //= 2
    except BadInput as error:
        dist.log.info("memory is not predicted: %s", error)
        return 1
    return size


def _inspect(recipe: Recipe, sequences: int) -> Inspected:
    return inspect_model(recipe, sequences * _rank_tokens(recipe))


def _rank_tokens(recipe: Recipe) -> int:
    """Return a rank's tokens of a full packed sequence."""
    return -(-recipe.batch.seq_len // recipe.parallel.ranks_a_sequence)


def _recomputed(
    recipe: Recipe, inspected: Inspected, sequences: int, card: float, kernel: str
) -> list[str | None]:
    """Return the least recomputation that fits each of WORLDS; None where none does."""
    found: list[str | None] = []
    for groups in WORLDS:
        gpus = groups * recipe.parallel.ranks_a_sequence
        trained = sequences * _rank_tokens(recipe)  # at most
        try:
            predicted = _memory_by_mode(recipe, inspected, Cluster(gpus, 8, card), trained, kernel)
        except BadInput:  # groups of hpZ that do not divide the GPUs
            found.append(None)
            continue
        fitting = (mode for mode, memory in predicted.items() if memory.gpu_total <= card)
        found.append(next(fitting, None))
    return found
