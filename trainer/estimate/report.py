"""`packhorse plan`: what a recipe needs on a cluster, for every template of ds_configs/ and the
recipe's own.

Joins the planner's arithmetic with the templates as engine.py fills them and, on request, with the
data's real steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import dist
from trainer.config.recipe import Recipe
from trainer.data.batch_plan import MUCH_FILLER, Plan, filler_share, good_worlds
from trainer.datatypes import BadInput
from trainer.engine.ds_config import deepspeed_config
from trainer.estimate.memory import (
    GIB,
    Activations,
    Cluster,
    Disk,
    Memory,
    Model,
    StepStats,
    describe,
    disk_needed,
    empty_model,
    peak_memory,
    step_seconds,
    trace,
    work_of,
    worlds,
)
from trainer.model.loss import choose_kernel

if TYPE_CHECKING:
    from rich.console import RenderableType

ROOT = Path(__file__).resolve().parents[2]
MOST_GPUS = 4096  # at which the search for the smallest number that fits ends

GPU_PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "gathered",
    "communication",
    "activations",
    "loss",
    "reserve",
)


@dataclass(frozen=True)
class Candidate:
    """A template on the cluster asked for."""

    memory: Memory
    lacks: list[str]  # of the cluster, nothing where it fits
    smallest: int | None  # GPUs from which on it fits, such nodes given; None: none tried


@dataclass(frozen=True)
class Report:
    """Everything that the tables say."""

    model: Model
    work: StepStats
    cluster: Cluster
    activation_checkpointing: str
    activations: dict[
        str, Activations
    ]  # by the values of model.activation_checkpointing that the model supports
    candidates: dict[str, Candidate]  # by template
    refused: dict[str, str]  # templates that cannot train this recipe, and why
    disk: Disk


def _checkpoints_kept(recipe: Recipe) -> int:
    """The best one is not among checkpoint.keep."""
    return recipe.checkpoint.keep + (recipe.eval.best is not None)


def look(recipe: Recipe, tokens: int) -> tuple[Model, dict[str, Activations]]:
    """Return the recipe's model, and its activations for `tokens` tokens by activation
    checkpointing.
    """
    empty = empty_model(recipe.model, recipe.adapter)
    model, activations = describe(empty, recipe.optim, recipe.adapter), trace(empty, tokens)
    if recipe.model.activation_checkpointing not in activations:
        raise BadInput(
            f"{model.name} does not support activation checkpointing; set "
            f"model.activation_checkpointing=none"
        )
    return model, activations


def build_report(
    recipe: Recipe,
    cluster: Cluster,
    work: StepStats | None = None,
    looked: tuple[Model, dict[str, Activations]] | None = None,
) -> Report:
    """Plan a recipe; without `work`, that of full rows. `looked` is what `look` found, if it was
    called before.

    Raises:
        BadInput: the model cannot be planned, or there are more GPUs than micro-batches in a step.
    """
    work = work or work_of(recipe)
    fewest = int(work.micro_batches.min())
    if cluster.gpus > fewest and not recipe.parallel.allow_idle_ranks:
        raise BadInput(
            f"{cluster.gpus} GPUs, but a step has only {fewest} micro-batches: plan for "
            f"{', '.join(map(str, good_worlds(work.micro_batches, cluster.gpus)))}, raise "
            f"batch.global_batch_size, "
            "or lower batch.micro_batch_size"
        )
    model, activations = looked or look(recipe, work.fullest_tokens)
    disk = disk_needed(model, _checkpoints_kept(recipe))
    kernel = (
        "liger" if recipe.loss.kernel == "auto" else recipe.loss.kernel
    )  # the image has it, and a GPU takes it
    candidates, refused = {}, {}
    for template in templates(recipe):
        try:
            config = filled(recipe, template, model.hidden)
            needs = partial(
                peak_memory,
                model,
                config,
                per_node=cluster.per_node,
                trained=work.fullest_trained,
                kernel=kernel,
                activations=activations[recipe.model.activation_checkpointing],
            )
            memory = needs(cluster.gpus)
        except BadInput as error:
            refused[template] = str(error)
            continue
        sizes = worlds(min(MOST_GPUS, max(fewest, cluster.gpus)), cluster.per_node)
        smallest = next((world for world in sizes if not cluster.lacks(needs(world), disk)), None)
        candidates[template] = Candidate(memory, cluster.lacks(memory, disk), smallest)
    return Report(
        model,
        work,
        cluster,
        recipe.model.activation_checkpointing,
        activations,
        candidates,
        refused,
        disk,
    )


def templates(recipe: Recipe) -> list[str]:
    """The recipe's own template and those of ds_configs/."""
    shipped = [f"ds_configs/{path.name}" for path in sorted((ROOT / "ds_configs").glob("*.json"))]
    return list(dict.fromkeys([*shipped, recipe.parallel.deepspeed]))


def filled(recipe: Recipe, template: str, hidden: int) -> dict[str, Any]:
    parallel = recipe.parallel.model_copy(update={"deepspeed": template})
    return deepspeed_config(parallel, recipe.model, recipe.optim, hidden, Path(recipe.run.dir))


def work_of_data(plan: Plan) -> StepStats:
    """The real steps of prepared data; what is averaged, over the first epoch."""
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


def predicted(recipe: Recipe, tokens: int, trained: int) -> int | None:
    """Bytes that torch holds on this rank's GPU at the peak of a step; None where the run cannot be
    planned.
    """
    try:
        model, activations = look(recipe, tokens)
        config = filled(recipe, recipe.parallel.deepspeed, model.hidden)
        kernel = choose_kernel(recipe.loss.kernel, dist.device())
        worlds = dist.world_size(), dist.local_world_size()
        memory = peak_memory(
            model,
            config,
            *worlds,
            trained,
            kernel,
            activations[recipe.model.activation_checkpointing],
        )
    except BadInput as error:
        dist.log.info("memory is not predicted: %s", error)
        return None
    return memory.gpu_total - memory.gpu["reserve"]


# ------------------------------------------------------------------------------------- what is said


def sentences(report: Report, recipe: Recipe, flops: float, mfu: float) -> list[str]:
    """What is so whatever the template."""
    model, work, cluster, disk = report.model, report.work, report.cluster, report.disk
    share = filler_share(work.micro_batches, cluster.gpus)
    worlds = ", ".join(map(str, good_worlds(work.micro_batches, cluster.gpus)))
    seconds = step_seconds(model, work, cluster.gpus, flops * mfu)
    kept = [
        f"{_gib(a.kept + a.layer)} GiB with activation_checkpointing: {mode}"
        for mode, a in sorted(report.activations.items())
    ]
    trained = (
        f", {model.trained / 1e6:.3g} million of them trained"
        if model.trained < model.parameters
        else ""
    )
    run = f"; {work.steps:,} steps: {_time(seconds * work.steps)}" if work.steps else ""
    return [
        f"{model.name}: {model.parameters / 1e9:.3g} billion parameters{trained}, "
        f"{recipe.model.dtype}; "
        f"{cluster.gpus} GPUs of {_gib(cluster.gpu)} GiB, {min(cluster.per_node, cluster.gpus)} a "
        f"node",
        f"a step: {work.tokens:,.0f} tokens in {work.micro_batches.mean():,.4g} micro-batches, of "
        f"which the fullest "
        f"has {work.fullest_tokens:,} tokens, {work.fullest_trained:,} of them trained",
        f"fillers: {share:.1%} of the micro-batches of {cluster.gpus} GPUs; good numbers of GPUs: "
        f"{worlds}" + (" (this one idles much)" if share > MUCH_FILLER else ""),
        f"activations of a micro-batch: {', '.join(kept)}",
        f"time, at {mfu:.0%} of {flops / 1e12:,.0f} TFLOP/s a GPU: {seconds:.3g} s a step, "
        f"{work.tokens / seconds:,.0f} tokens/s{run}",
        f"disk: a checkpoint {_gib(disk.checkpoint)} GiB, {_checkpoints_kept(recipe)} kept and one "
        f"being written "
        f"{_gib(disk.checkpoints)} GiB; the universal form {_gib(disk.universal)} GiB; an export "
        f"{_gib(disk.export)} GiB while it is made",
    ]


def rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """The table: a heading of templates, and a row for each part; GiB."""
    found = report.candidates
    heading = ["GiB", *(Path(template).stem.replace("_", " ") for template in found)]
    body = [[part, *(_gib(one.memory.gpu[part]) for one in found.values())] for part in GPU_PARTS]
    for label, value in (
        ("a GPU", "gpu_total"),
        ("a host", "host_total"),
        ("a node's NVMe", "nvme"),
    ):
        body.append([label, *(_gib(getattr(one.memory, value)) for one in found.values())])
    body.append(
        ["fits", *("no: " + ", ".join(one.lacks) if one.lacks else "yes" for one in found.values())]
    )
    body.append(["from GPUs", *(str(one.smallest or "-") for one in found.values())])
    return heading, body


def table(report: Report) -> RenderableType:
    from rich.table import Table

    heading, body = rows(report)
    made = Table(title="memory at the peak of a step")
    for i, name in enumerate(heading):
        made.add_column(name, justify="right" if i else "left")
    for i, row in enumerate(body):
        made.add_row(*row, end_section=i in (len(GPU_PARTS) - 1, len(body) - 3))
    return made


def verdict(report: Report) -> str:
    """Which templates fit, or BadInput: none does, and what would."""
    found = report.candidates
    fitting = [template for template, one in found.items() if not one.lacks]
    smallest = min(
        ((one.smallest, template) for template, one in found.items() if one.smallest),
        default=(None, ""),
        key=_first,
    )
    fewest = f"the fewest GPUs: {smallest[0]}, with {smallest[1]}" if smallest[0] else ""
    if fitting:
        return f"fits: {', '.join(fitting)}; {fewest or 'fewer GPUs were not tried'}"
    else_ = fewest or (
        "nor does any number of GPUs that a step has micro-batches for: set "
        "model.activation_checkpointing=full, lower "
        "batch.seq_len or batch.micro_batch_size, raise batch.global_batch_size, or give what is "
        "lacking"
    )
    raise BadInput(
        f"no template fits {report.cluster.gpus} GPUs of {_gib(report.cluster.gpu)} GiB; {else_}"
    )


def _first(pair: tuple[int | None, str]) -> int:
    return pair[0] or 0


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:,.0f}" if gib >= 100 else f"{gib:.1f}" if gib >= 0.05 or not gib else "<0.1"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:,.3g} h"
