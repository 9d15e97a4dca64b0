"""Define `packhorse train --dry-run`: everything of a run before its process group, and no more.

A recipe enters; tables on the terminal leave. Nothing is written to run.dir; the data is prepared
in the cache, where the run finds it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packhorse.trainer.datatypes import BadInput

if TYPE_CHECKING:
    from packhorse.trainer.config.recipe import Recipe
    from packhorse.trainer.estimate.memory import Cluster

_GPU_GIB = 80.0  # assumed where there is no GPU


def dry_run(recipe: Recipe, ranks: int | None, *, extend: bool) -> None:
    """Check and prepare what a run needs, and print its data, its steps and its memory.

    Args:
        ranks: of the run, on all nodes. None: one for each GPU here, or one without a GPU.
    """
    import torch

    from packhorse.trainer import dist
    from packhorse.trainer.build_engine import resolve_micro_batch
    from packhorse.trainer.cli.data import choose_sequence, prepare_shards
    from packhorse.trainer.config.packaged import find_template
    from packhorse.trainer.data.leakage import prepare_compared
    from packhorse.trainer.data.prepare import train_plan
    from packhorse.trainer.data.summary import show
    from packhorse.trainer.estimate.report import measure_steps
    from packhorse.trainer.eval.server_answers import check_server
    from packhorse.trainer.model.load import load_tokenizer
    from packhorse.trainer.run_folder import require_same_run

    dist.start_logging()
    run_dir = Path(recipe.run.dir)
    require_same_run(recipe, run_dir, extend=extend)
    _require_writable(run_dir)
    recipe = resolve_micro_batch(recipe, run_dir)
    find_template(recipe.parallel.deepspeed)
    check_server(recipe)
    tokenizer = load_tokenizer(recipe.model)
    plan = None
    if recipe.streaming:
        prepare_shards(recipe, tokenizer)
    else:
        train, held_out = prepare_compared(recipe, tokenizer)
        plan = train_plan(recipe, train)
        show(recipe, train, plan, held_out)
    ranks = ranks or torch.cuda.device_count() or 1
    cluster = _cluster(ranks)
    stats = measure_steps(plan) if plan else None
    if plan:
        recipe = choose_sequence(recipe, cluster, stats)
        parallel = recipe.parallel
        given = (ranks, parallel.allow_idle_ranks, parallel.ranks_a_sequence)
        if warning := plan.check_world(*given):
            print(warning)
    _show_memory(recipe, cluster, stats)
    print(
        f"dry run: all of this can be used; {run_dir} was left as it is; the same command without "
        "--dry-run starts it"
    )


def _require_writable(run_dir: Path) -> None:
    """Raise BadInput if the run folder could not be made or written."""
    there = run_dir.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"run.dir: {run_dir} cannot be written ({there} does not allow it)")


def _cluster(ranks: int) -> Cluster:
    """Return `ranks` GPUs as this machine has them, or as are assumed where it has none."""
    import torch

    from packhorse.trainer.estimate.memory import GIB, Cluster

    gib = _GPU_GIB
    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / GIB
    return Cluster(ranks, torch.cuda.device_count() or 8, gib * GIB)


def _show_memory(recipe: Recipe, cluster: Cluster, stats: Any) -> None:
    """Print the table of `packhorse plan`, for the GPUs of this machine.

    Models that cannot be planned can be trained all the same.
    """
    import torch

    from packhorse.trainer.cli.data import show_report
    from packhorse.trainer.estimate import report

    if not torch.cuda.is_available():
        print(f"there is no GPU here: the table is for GPUs of {_GPU_GIB:.0f} GiB")
    try:
        found = report.build_report(recipe, cluster, stats)
    except BadInput as error:
        print(f"memory is not predicted: {error}")
        return
    show_report(found, recipe)
