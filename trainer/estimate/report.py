"""`packhorse plan`: report what a recipe needs on a cluster, with each packaged template.

In: a recipe, a cluster and, on request, the data's real steps. Out: a `Report`, as sentences and a
table. It joins the arithmetic of estimate/memory.py with the templates as the engine fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from packhorse.trainer.config.packaged import template_names
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.batch_plan import Plan
from packhorse.trainer.data.ranks import MUCH_FILLER, count_groups, filler_share, good_worlds
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.ds_config import deepspeed_config
from packhorse.trainer.estimate.memory import (
    GIB,
    Cluster,
    Disk,
    Memory,
    StepStats,
    attention_share,
    candidate_worlds,
    count_checkpoints,
    disk_needed,
    full_step_stats,
    peak_memory,
    step_seconds,
)
from packhorse.trainer.estimate.model import (
    MODES,
    Activations,
    ModelSizes,
    attention_shapes,
    build_empty_model,
    measure_model,
    trace_activations,
)
from packhorse.trainer.estimate.sequence import longest_slice, sequence_traffic, slice_activations
from packhorse.trainer.estimate.traffic import Traffic
from packhorse.trainer.model.fp8 import workspace_bytes

if TYPE_CHECKING:
    from rich.table import Table

TEMPLATES_ABREAST = 6  # in a terminal of 80 columns
FP8_SPEED = 1.4  # of a layer's products with their casts, over bfloat16's: assumed, not measured
MOST_GPUS = 4096  # where the search for the smallest number of GPUs ends
GPU_PARTS = (
    *("weights", "gradients", "optimizer", "gathered", "communication"),
    *("activations", "loss", "reserve"),
)


@dataclass(frozen=True)
class Candidate:
    """A template on the cluster."""

    memory: Memory
    checkpointing: str  # model.activation_checkpointing; of `auto`, what it takes
    shortages: list[str]  # what of the cluster is too small; empty if the recipe fits
    smallest: int | None  # the fewest GPUs that fit, with such nodes; None if none does
    traffic: Traffic
    longest: int  # batch.seq_len, if it recomputes as much as it may; 0 if none fits


@dataclass(frozen=True)
class Report:
    """Everything that the sentences and the table show."""

    model: ModelSizes
    stats: StepStats
    cluster: Cluster
    activations: dict[str, Activations]  # by model.activation_checkpointing, where supported
    candidates: dict[str, Candidate]  # by template
    refused: dict[str, str]  # templates that cannot train this recipe, and why
    disk: Disk


Inspected = tuple[ModelSizes, dict[str, Activations], Callable[[int], Activations]]


def inspect_model(recipe: Recipe, tokens: int) -> Inspected:
    """Return the sizes of the recipe's model, its activations for a rank's `tokens` tokens by the
    values of model.activation_checkpointing, and a function that returns those of other numbers of
    tokens with as much recomputation as the recipe allows.

    A model that cannot be planned is refused.
    """
    empty = build_empty_model(recipe.model, recipe.adapter)
    model = measure_model(empty, recipe.optim, recipe.adapter)
    size, kind = recipe.parallel.ranks_a_sequence, recipe.parallel.sequence_kind
    in_fp8 = recipe.model.matmul == "fp8_rowwise"
    if size > 1:
        model = replace(model, attention=attention_shapes(empty))
    if in_fp8:
        model = replace(model, product_speed=FP8_SPEED)

    def trace(tokens: int, modes: Collection[str] = MODES) -> dict[str, Activations]:
        tiles = recipe.model.compile is False
        found = trace_activations(empty, tokens, tiles=tiles, modes=modes)
        if size > 1:
            found = slice_activations(found, model.attention, tokens, size, kind, model.element)
        # the products' factors in fp8, while a layer runs
        factors = workspace_bytes(empty, tokens) if in_fp8 else 0
        return {mode: replace(a, layer=a.layer + factors) for mode, a in found.items()}

    activations = trace(tokens)
    if recipe.model.activation_checkpointing not in (*activations, "auto"):
        raise BadInput(
            f"{model.name} does not support activation checkpointing; set "
            "model.activation_checkpointing=none"
        )
    leanest = checkpointing_modes(recipe, activations)[-1]
    return model, activations, lambda tokens: trace(tokens, [leanest])[leanest]


def checkpointing_modes(recipe: Recipe, activations: Mapping[str, Activations]) -> list[str]:
    """Return the values of model.activation_checkpointing to try, the least recomputation first."""
    asked = recipe.model.activation_checkpointing
    if asked != "auto":
        return [asked]
    # a compiled layer is recomputed whole or not at all, and the host's memory is asked for by name
    others = {"offload", "selective"} if recipe.model.compile else {"offload"}
    return [mode for mode in activations if mode not in others]


def build_report(
    recipe: Recipe,
    cluster: Cluster,
    stats: StepStats | None = None,
    inspected: Inspected | None = None,
) -> Report:
    """Plan a recipe on a cluster.

    Args:
        stats: of the data's steps; without it, those of full sequences.
        inspected: what `inspect_model` returned, if it was called before.

    Raises:
        BadInput: the model cannot be planned, or there are more GPUs than micro-batches in a step.
    """
    size = recipe.parallel.ranks_a_sequence
    stats = replace(stats or full_step_stats(recipe), sequence=size)
    fewest = int(stats.micro_batches.min())
    if count_groups(cluster.gpus, size) > fewest and not recipe.parallel.allow_idle_ranks:
        good = " or ".join(_good_numbers(stats, cluster))
        each = f", for {size} GPUs each" if size > 1 else ""
        raise BadInput(
            f"{cluster.gpus} GPUs, but a step has only {fewest} micro-batches{each}: give --gpus "
            f"{good}, raise batch.global_batch_size, or lower batch.micro_batch_size"
        )
    model, activations, trace = inspected or inspect_model(recipe, stats.rank_tokens)
    disk = disk_needed(model, count_checkpoints(recipe))
    report, trace = Report(model, stats, cluster, activations, {}, {}, disk), cache(trace)
    for template in dict.fromkeys([*template_names(), recipe.parallel.deepspeed]):
        try:
            report.candidates[template] = _plan_template(template, recipe, report, trace)
        except BadInput as error:
            report.refused[template] = str(error)
    return report


def _plan_template(
    template: str, recipe: Recipe, report: Report, trace: Callable[[int], Activations]
) -> Candidate:
    model, stats, cluster = report.model, report.stats, report.cluster
    config = fill_template(recipe, template, model.hidden)
    modes = checkpointing_modes(recipe, report.activations)
    # the plan is for GPUs of the image, which has Liger's kernel
    kernel = "liger" if recipe.loss.kernel == "auto" else recipe.loss.kernel

    def need(world: int, of: Activations, trained: int = stats.rank_trained) -> Memory:
        return peak_memory(model, config, world, cluster.per_node, trained, kernel, of)

    def fits(world: int, *others: Any) -> bool:
        return not cluster.find_shortages(need(world, *others), report.disk)

    memory = {mode: need(cluster.gpus, report.activations[mode]) for mode in modes}
    shortages = {mode: cluster.find_shortages(memory[mode], report.disk) for mode in modes}
    mode = next((mode for mode in modes if not shortages[mode]), modes[-1])
    size = stats.sequence
    most = min(MOST_GPUS, max(int(stats.micro_batches.min()) * size, cluster.gpus))
    worlds = (world for world in candidate_worlds(most, cluster.per_node) if world % size == 0)
    leanest = report.activations[modes[-1]]
    longest = longest_slice(partial(fits, cluster.gpus), trace, model.hidden)
    return Candidate(
        *(memory[mode], mode, shortages[mode]),
        smallest=next((world for world in worlds if fits(world, leanest)), None),
        traffic=sequence_traffic(recipe, model, config, cluster, stats, mode),
        longest=longest * size // recipe.batch.micro,
    )


def _good_numbers(stats: StepStats, cluster: Cluster) -> list[str]:
    """Return numbers of GPUs near to the cluster's that keep nearly all of them busy."""
    good = good_worlds(stats.micro_batches, cluster.gpus // stats.sequence)
    return [str(groups * stats.sequence) for groups in good]


def fill_template(recipe: Recipe, template: str, hidden: int) -> dict[str, Any]:
    """Return a template's DeepSpeed configuration for the recipe."""
    parallel = recipe.parallel.model_copy(update={"deepspeed": template})
    return deepspeed_config(parallel, recipe.model, recipe.optim, hidden, Path(recipe.run.dir))


def measure_steps(plan: Plan) -> StepStats:
    """Return the stats of prepared data's steps; averages are over the first epoch."""
    steps = range(plan.epoch_steps())
    pieces = plan.pieces(0, range(len(plan.sequence_sizes()[0])))
    lengths = (pieces[:, 2] - pieces[:, 1]).astype(np.float64)
    sizes = [plan.size(*place) for place in plan.fullest()]
    return StepStats(
        micro_batches=plan.micro_batch_counts(),
        steps=plan.steps,
        tokens=float(lengths.sum()) / len(steps),
        trained=sum(plan.step(step).trained_tokens for step in steps) / len(steps),
        pairs=float((lengths**2).sum()) / len(steps),
        fullest_tokens=max(tokens for tokens, _ in sizes),
        fullest_trained=max(trained for _, trained in sizes),
    )


# ---------------------------------------------------------------------------------- what is printed


def describe_report(report: Report, recipe: Recipe, flops: float, mfu: float) -> list[str]:
    """Return sentences about what does not depend on the template.

    Args:
        flops: the peak FLOP/s of a GPU, of which the model's own FLOPs achieve the share `mfu`.
    """
    model, stats, cluster, disk = report.model, report.stats, report.cluster, report.disk
    share = filler_share(stats.micro_batches, cluster.gpus // stats.sequence)
    idle = " (this one idles much)" if share > MUCH_FILLER else ""
    on_each = f", on each of its {stats.sequence} GPUs" if stats.sequence > 1 else ""
    seconds = step_seconds(model, stats, cluster.gpus, flops * mfu)
    kept = ", ".join(
        f"{_gib(a.kept + a.layer)} GiB with activation_checkpointing: {mode}"
        for mode, a in sorted(report.activations.items())
    )
    trained = (
        f", {model.trained / 1e6:.3g} million of them trained"
        if model.trained < model.parameters
        else ""
    )
    fp8 = f", products in fp8 {x} times as fast" if (x := model.product_speed) > 1 else ""
    run = f"; {stats.steps:,} steps: {_time(seconds * stats.steps)}" if stats.steps else ""
    return [
        f"{model.name}: {model.parameters / 1e9:.3g} billion parameters{trained}, "
        f"{recipe.model.dtype}; {cluster.gpus} GPUs of {_gib(cluster.gpu)} GiB, "
        f"{min(cluster.per_node, cluster.gpus)} a node",
        f"a step: {stats.tokens:,.0f} tokens in {stats.micro_batches.mean():,.4g} micro-batches, "
        f"of which the fullest has {stats.fullest_tokens:,} tokens, {stats.fullest_trained:,} of "
        "them trained",
        f"fillers: {share:.1%} of the micro-batches of {cluster.gpus} GPUs; good numbers of GPUs: "
        f"{', '.join(_good_numbers(stats, cluster))}{idle}",
        f"activations of a micro-batch{on_each}: {kept}",
        f"time to compute if nothing is recomputed, predicted at {mfu:.0%} of "
        f"{flops / 1e12:,.0f} TFLOP/s a GPU{fp8}: {_seconds(seconds)} s a step "
        f"({attention_share(model, stats):.0%} attention), {stats.tokens / seconds:,.0f} "
        f"tokens/s{run}",
        f"disk: a checkpoint {_gib(disk.checkpoint)} GiB, {count_checkpoints(recipe)} kept and "
        f"one being written {_gib(disk.checkpoints)} GiB; the universal form "
        f"{_gib(disk.checkpoint)} GiB; an export {_gib(disk.export)} GiB while it is made",
    ]


def table_cells(report: Report, flops: float) -> tuple[list[str], list[list[str]]]:
    """Return the table's heading of templates, and a line of cells for each part, in GiB.

    Args:
        flops: FLOP/s that a GPU achieves.
    """
    found = report.candidates
    heading = ["GiB", *(Path(template).stem.replace("_", " ") for template in found)]
    body = [[part, *(_gib(one.memory.gpu[part]) for one in found.values())] for part in GPU_PARTS]
    totals = {"a GPU": "gpu_total", "a host": "host_total", "a node's NVMe": "nvme"}
    for label, value in totals.items():
        body.append([label, *(_gib(getattr(one.memory, value)) for one in found.values())])
    body.append(["recomputed", *(one.checkpointing for one in found.values())])
    fits = ["no: " + ", ".join(c.shortages) if c.shortages else "yes" for c in found.values()]
    body.append(["fits", *fits])
    body.append(["from GPUs", *(str(one.smallest or "-") for one in found.values())])
    most = [_most_seconds(report, one, flops) for one in found.values()]
    body.append(["s a step, at most", *map(_seconds, most)])
    return heading, body


def _most_seconds(report: Report, candidate: Candidate, flops: float) -> float:
    """Return the seconds of a step with its recomputation, if no communication is hidden."""
    given = (report.model, report.stats, report.cluster.gpus, flops, candidate.checkpointing)
    return step_seconds(*given) + candidate.traffic.seconds(report.cluster)


def build_tables(report: Report, flops: float) -> Iterator[Table]:
    """Yield tables of memory and time for a terminal, a few templates each; see `table_cells`."""
    from rich.table import Table

    heading, body = table_cells(report, flops)
    for first in range(1, len(heading), TEMPLATES_ABREAST):
        shown = slice(first, first + TEMPLATES_ABREAST)
        table = Table(title="predicted: memory at the peak of a step, and its time")
        table.add_column(heading[0], no_wrap=True)
        for name in heading[shown]:
            table.add_column(name, justify="right", overflow="fold")
        for i, cells in enumerate(body):
            end = i in (len(GPU_PARTS) - 1, len(body) - 5)
            table.add_row(cells[0], *cells[shown], end_section=end)
        yield table


def require_fit(report: Report) -> str:
    """Return a sentence with the templates that fit.

    Raises:
        BadInput: none fits; the message names what would.
    """
    found = report.candidates
    fitting = [template for template, one in found.items() if not one.shortages]
    sizes = [(one.smallest, template) for template, one in found.items() if one.smallest]
    smallest = min(sizes, key=lambda pair: pair[0], default=None)
    fewest = f"the fewest GPUs: {smallest[0]}, with {smallest[1]}" if smallest else None
    if fitting:
        return f"fits: {', '.join(fitting)}; {fewest or 'fewer GPUs were not tried'}"
    instead = fewest or (
        "nor does any number of GPUs that a step has micro-batches for: set "
        "model.activation_checkpointing=full, lower batch.seq_len or batch.micro_batch_size, raise "
        "batch.global_batch_size, or give more of what is too small"
    )
    if share := report.model.experts / report.model.parameters:
        instead += (
            f". Experts are {share:.0%} of the weights: there is no expert parallelism, so that "
            "ZeRO-3 gathers all of a layer's on each GPU; adapter.base=nf4 holds frozen ones in 4 "
            "bits"
        )
    cluster = report.cluster
    raise BadInput(f"no template fits {cluster.gpus} GPUs of {_gib(cluster.gpu)} GiB; {instead}")


def recommend(report: Report, recipe: Recipe, flops: float) -> str:
    """Return a sentence that recommends a template and says why.

    Of those that fit it is the one whose step takes least time, at most; where that is equal, the
    one that comes first by name, which is the lowest ZeRO stage.

    Args:
        flops: FLOP/s that a GPU achieves.
    """
    fitting = {name: one for name, one in report.candidates.items() if not one.shortages}
    most = {name: _most_seconds(report, one, flops) for name, one in fitting.items()}
    name = min(most, key=lambda name: most[name])
    best, seconds = fitting[name], _seconds(most.pop(name))
    others = ", ".join(f"{other} {_seconds(s)}" for other, s in most.items())
    than = f", the least of those that fit ({others})" if others else ", and it alone fits"
    todo = "" if name == recipe.parallel.deepspeed else f"; set parallel.deepspeed={name}"
    return (
        f"recommended: {name}: it needs {_gib(best.memory.gpu_total)} of "
        f"{_gib(report.cluster.gpu)} GiB a GPU, moves {_gb(best.traffic.total)} GB a GPU and step, "
        f"recomputes {best.checkpointing}, and takes {seconds} s a step at most{than}{todo}"
    )


def longest_sequence(report: Report) -> str:
    """Return a sentence with the longest sequence that fits, by template."""
    shared = f" on {n} GPUs each" if (n := report.stats.sequence) > 1 else ""
    lengths = [f"{name} {one.longest:,}" for name, one in report.candidates.items() if one.longest]
    return f"longest batch.seq_len that fits{shared}: {', '.join(lengths) or 'none'}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds >= 0.001 else "<0.001"


def _gb(size: float) -> str:
    if size < 1e6:
        return "<0.001"
    return f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:.3g}"


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:,.0f}" if gib >= 100 else f"{gib:.1f}" if gib >= 0.05 or not gib else "<0.1"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:,.3g} h"
