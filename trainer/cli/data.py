"""Define `packhorse preview`, `prepare` and `plan`: inspect data and costs before a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from packhorse.trainer.cli.arguments import Overrides, RecipeFile, read_recipe
from packhorse.trainer.datatypes import BadInput, Example, RowError

if TYPE_CHECKING:
    from packhorse.trainer.config.recipe import Recipe
    from packhorse.trainer.data.preview import ShownRow
    from packhorse.trainer.estimate.memory import Cluster
    from packhorse.trainer.estimate.report import Report

GPU_TFLOPS, MFU = 989.0, 0.4  # of an H100, and what a large model reaches there


def preview(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show of each source.")] = 3,
    split: Annotated[
        Literal["train", "eval"], typer.Option(help="Training or held-out rows.")
    ] = "train",
    html: Annotated[
        Path | None, typer.Option(help="Write an HTML page instead of using the terminal.")
    ] = None,
) -> None:
    """Show rows as the model sees them, with trained and special tokens in colours.

    In a pipe, or without colours, what is trained stands in ⟦ ⟧.

    [bold]packhorse preview debug --rows 2[/bold]
    [bold]packhorse preview recipe.yaml --split eval --html preview.html[/bold]
    """
    from packhorse.trainer.data.preview import as_html, as_text
    from packhorse.trainer.model.load import load_tokenizer

    recipe = read_recipe(recipe_file, overrides)
    tokenizer = load_tokenizer(recipe.model)
    shown = list(_first_rows(recipe, tokenizer, split, rows))
    if html is None:
        from rich.console import Console

        console = Console()
        console.print(as_text(shown, tokenizer, brackets=console.color_system is None))
    else:
        from packhorse.trainer.utils.own_output import write_own_text

        write_own_text(html, as_html(shown, tokenizer), "<!-- {} -->")
        print(html)


def _first_rows(
    recipe: Recipe, tokenizer: Any, split: Literal["train", "eval"], count: int
) -> Iterator[ShownRow]:
    """Yield the first rows of each source, cut as for training, or why a row is left out."""
    from itertools import islice

    import numpy as np

    from packhorse.trainer.data.prepare import length_policy, masker_of
    from packhorse.trainer.data.preview import ShownRow, role_starts
    from packhorse.trainer.data.rows import RowReader
    from packhorse.trainer.data.split import parts_of, rows_of
    from packhorse.trainer.data.tokenize import fit

    masker = masker_of(recipe.data, tokenizer)
    for part in parts_of(recipe.data, split):
        reader = RowReader.of(part.source, recipe.data.ignore_columns)
        for row in islice(rows_of(recipe.data, part), count):
            title = f"{row.file or part.source.name}:{row.number}"
            try:
                conversation = reader.conversation(row.fields, title)
                for shown, example in masker.rendered(conversation):
                    roles = role_starts(shown, example, masker)
                    # Positions are cut in place of tokens, so that the roles are found again.
                    positions = np.arange(len(example.input_ids), dtype=np.int32)
                    for document in fit(Example(positions, example.trained), length_policy(recipe)):
                        places = document.input_ids
                        starts = {i: roles[p] for i, p in enumerate(places.tolist()) if p in roles}
                        ids = example.input_ids[places]
                        cut = Example(ids, document.trained, conversation.unread)
                        yield ShownRow(title, cut, starts)
            except RowError as error:
                yield ShownRow(title, error)


def prepare(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write data.json and data.png to.")
    ] = None,
) -> None:
    """Tokenize and pack the data into the cache, and print its statistics.

    [bold]packhorse prepare recipe.yaml[/bold]
    [bold]packhorse prepare recipe.yaml --out data-report[/bold]
    """
    from packhorse.trainer import dist
    from packhorse.trainer.data.leakage import prepare_compared
    from packhorse.trainer.data.prepare import train_plan
    from packhorse.trainer.data.summary import require_own, show, write
    from packhorse.trainer.model.load import load_tokenizer

    dist.start_logging()
    recipe = read_recipe(recipe_file, overrides)
    if out is not None:
        require_own(out)
    tokenizer = load_tokenizer(recipe.model)
    if recipe.streaming:
        prepare_shards(recipe, tokenizer)
        return
    train, held_out = prepare_compared(recipe, tokenizer)
    plan = train_plan(recipe, train)
    show(recipe, train, plan, held_out)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write(out, train, plan, held_out)
        except OSError as error:
            raise BadInput(f"--out {out}: cannot be written ({error})") from None
        print(out / "data.json", out / "data.png", sep="\n")


def prepare_shards(recipe: Recipe, tokenizer: Any) -> None:
    """Prepare the shards of a streamed source that exist, and print their counts.

    There is no plan before the run, which logs its shards when it uses them.
    """
    from rich.console import Console
    from rich.table import Table

    from packhorse.trainer.data.streaming import prepare_now
    from packhorse.trainer.utils.tables import ShortPath

    counted = ("rows", "rejected", "filtered", "documents", "tokens", "trained_tokens")
    heads = (name.replace("_", " ") for name in counted)
    table = Table("shard", *heads, title="train, the shards that exist now")
    shards = prepare_now(recipe, tokenizer)
    for shard in shards:
        table.add_row(ShortPath(shard.files[0]), *(f"{shard.report[name]:,}" for name in counted))
    Console().print(table)
    print(
        f"data.train is streamed: {len(shards)} shards exist now; a run of {recipe.train.steps} "
        f"steps packs each shard by itself, and logs it in shards.jsonl at its first use"
    )


HostGib = Annotated[
    float | None, typer.Option(min=1, help="CPU memory of a node, in GiB. Default: not checked.")
]
DiskGib = Annotated[
    float | None,
    typer.Option(min=1, help="Free disk space at run.dir, in GiB. Default: not checked."),
]
NvmeGib = Annotated[
    float | None,
    typer.Option(min=1, help="Free NVMe space of a node, in GiB. Default: not checked."),
]


def plan(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs of all nodes; one rank for each. Default: 8, or fewer if a step has fewer "
            "micro-batches.",
        ),
    ] = None,
    gpu_gib: Annotated[float, typer.Option(min=1, help="Memory of a GPU, in GiB.")] = 80,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes. Default: as many as hold 8 GPUs each.")
    ] = None,
    host_gib: HostGib = None,
    disk_gib: DiskGib = None,
    nvme_gib: NvmeGib = None,
    gpu_tflops: Annotated[
        float, typer.Option(min=1, help="Dense bf16 peak of a GPU, from its data sheet.")
    ] = GPU_TFLOPS,
    mfu: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Model FLOPs utilization: the share of that peak."),
    ] = MFU,
    data: Annotated[
        bool,
        typer.Option("--data", help="Prepare the data (or find it in the cache) and count steps."),
    ] = False,
) -> None:
    """Estimate memory, disk space and time of a run, and which templates fit.

    [bold]packhorse plan recipe.yaml[/bold]
    [bold]packhorse plan my.yaml --gpus 64 --nodes 8 --host-gib 1024 --disk-gib 20000[/bold]
    [bold]packhorse plan my.yaml batch.seq_len=4096 --gpus 8 --data[/bold]

    Only the model's configuration is read. Without --data packed sequences count as full, and all
    their tokens as trained. Exit code 0: a template fits; 2: none does.
    """
    from packhorse.trainer import dist
    from packhorse.trainer.estimate import memory, report

    dist.start_logging()
    recipe = _choose_micro_batch(read_recipe(recipe_file, overrides), gpu_gib)
    stats = _count_real_steps(recipe) if data else report.full_step_stats(recipe)
    gpus = gpus or _default_gpus(recipe, int(stats.micro_batches.min()))
    if nodes and gpus % nodes:
        raise BadInput(
            f"--gpus {gpus} --nodes {nodes}: all nodes must have the same number of GPUs"
        )
    sizes = [None if gib is None else gib * memory.GIB for gib in (host_gib, disk_gib, nvme_gib)]
    cluster = memory.Cluster(gpus, gpus // nodes if nodes else 8, gpu_gib * memory.GIB, *sizes)
    recipe = choose_sequence(recipe, cluster, stats)
    found = report.build_report(recipe, cluster, stats)
    show_report(found, recipe, gpu_tflops, mfu)
    print(report.require_fit(found))
    print(report.longest_sequence(found))
    print(report.recommend(found, recipe, gpu_tflops * 1e12 * mfu))


def _default_gpus(recipe: Recipe, fewest_micro_batches: int) -> int:
    """Return the GPUs of a node of 8 that a step can use."""
    if recipe.parallel.sequence == "auto":
        return 8
    size = recipe.parallel.ranks_a_sequence
    most = max(8 // size, 1)
    return size * (most if recipe.parallel.allow_idle_ranks else min(most, fewest_micro_batches))


def _choose_micro_batch(recipe: Recipe, gpu_gib: float) -> Recipe:
    """Return the recipe with what `batch.micro_batch_size: auto` becomes, which is printed."""
    from packhorse.trainer.estimate import choice, memory

    if recipe.batch.micro_batch_size != "auto":
        return recipe
    size = choice.largest_micro_batch(recipe, gpu_gib * memory.GIB)
    print(f"batch.micro_batch_size: {size}, for a GPU of {gpu_gib:g} GiB")
    batch = recipe.batch.model_copy(update={"micro_batch_size": size})
    return recipe.model_copy(update={"batch": batch})


def choose_sequence(recipe: Recipe, cluster: Cluster, stats: Any) -> Recipe:
    """Return the recipe with what `parallel.sequence: auto` becomes, which is printed."""
    from packhorse.trainer.estimate import choice

    if recipe.parallel.sequence != "auto":
        return recipe
    fullest = (stats.fullest_tokens, stats.fullest_trained, int(stats.micro_batches.min()))
    recipe, why = choice.choose_sequence(recipe, cluster, *fullest)
    print(f"parallel.sequence: {why}")
    return recipe


def show_report(
    found: Report, recipe: Recipe, gpu_tflops: float = GPU_TFLOPS, mfu: float = MFU
) -> None:
    """Print what a run needs: sentences, and a table of memory and time by template."""
    import torch
    from rich.console import Console

    from packhorse.trainer.estimate import report, traffic

    print(*report.describe_report(found, recipe, gpu_tflops * 1e12, mfu), sep="\n")
    for table in report.build_tables(found, gpu_tflops * 1e12 * mfu):
        Console().print(table)
    print(traffic.SECONDS)
    if not torch.cuda.is_available():
        print(
            "this machine has no GPU: how fast yours compute and communicate, what their memory "
            "really holds, and how long a CPU would take, cannot be known here"
        )
    for template, why in found.refused.items():
        print(f"{template} is left out: {why}")


def _count_real_steps(recipe: Recipe) -> Any:
    """Return the statistics of the steps that the data gives."""
    from packhorse.trainer.data.leakage import prepare_compared
    from packhorse.trainer.data.prepare import train_plan
    from packhorse.trainer.estimate.report import measure_steps
    from packhorse.trainer.model.load import load_tokenizer

    if recipe.streaming:
        raise BadInput(
            "--data: data.train is streamed, so that its steps are not known; leave --data out"
        )
    train, _ = prepare_compared(recipe, load_tokenizer(recipe.model))
    return measure_steps(train_plan(recipe, train))
