"""Predict a step's memory for a run, and choose how many ranks share a packed sequence (C13).

In: a recipe, the fullest micro-batch, a cluster. Out: bytes by activation checkpointing; the recipe
with a number for `parallel.sequence: auto`. The choice changes no number that is learned, so that a
run makes it anew each time it starts.
"""

from __future__ import annotations

import math

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.estimate.memory import GIB, Cluster, Memory, peak_memory
from packhorse.trainer.estimate.model import build_empty_model, trace_activations
from packhorse.trainer.estimate.report import checkpointing_modes, fill_template, inspect_model
from packhorse.trainer.model.loss import choose_kernel

# For `batch.micro_batch_size: auto`. Most of a GPU's memory is the training state's, and more
# sequences are not worth any recomputation: activations may take this share of it.
ACTIVATION_SHARE = 0.25
MOST_TOKENS = 65_536  # of a micro-batch, by which products are large enough for any GPU


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
    model, activations, _ = inspect_model(recipe, tokens)
    config = fill_template(recipe, recipe.parallel.deepspeed, model.hidden)
    given = (model, config, cluster.gpus, cluster.per_node, min(trained, tokens), kernel)
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


def largest_micro_batch(recipe: Recipe, card: int) -> int:
    """Return the largest power of two of packed sequences whose activations, with nothing
    recomputed, fit ACTIVATION_SHARE of a GPU of `card` bytes.

    It depends on neither the number of GPUs nor ZeRO's stage. It is 1 for a model that cannot be
    planned.
    """
    batch = recipe.batch
    try:
        model = build_empty_model(recipe.model, recipe.adapter)
        one = trace_activations(model, batch.seq_len, modes=("none",))["none"].kept
    except BadInput as error:
        dist.log.info("memory is not predicted: %s", error)
        return 1
    most = min(
        int(ACTIVATION_SHARE * card / one), MOST_TOKENS // batch.seq_len, batch.global_batch_size
    )
    return 2 ** (max(most, 1).bit_length() - 1)
