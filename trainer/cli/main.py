"""The command `packhorse`: reads its arguments and calls the rest.

Whatever takes seconds to import is imported by the command that needs it, so that `--help` is at
once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from trainer.cli.arguments import Overrides, RecipeFile
from trainer.cli.eval import chosen_step, compare, evaluate
from trainer.cli.launch import launch_app
from trainer.cli.worker import end_with_the_launcher, end_worker, is_worker, stop_while_starting
from trainer.datatypes import BAD_INPUT, DONE, FAILED, BadInput, Example, RowError
from trainer.utils.text import one_line

if TYPE_CHECKING:
    from trainer.config.recipe import Recipe
    from trainer.data.preview import Row

app = typer.Typer(
    help="Supervised fine-tuning where the run is a function of the recipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on this machine. Default: one for each GPU, or one.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where the processes meet; 0 takes a free port.")
    ] = 0,
    nnodes: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN:MAX",
            help="Machines, each of which runs this command. Default: those of Slurm or "
            "Kubernetes, or 1.",
            show_default=False,
        ),
    ] = None,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where several machines meet: at one of them.",
            show_default=False,
        ),
    ] = None,
    rdzv_id: Annotated[
        str | None,
        typer.Option(
            help="Names the run there. Default: Slurm's job, or the name of run.dir.",
            show_default=False,
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0, help="Starts after a failure, from the last checkpoint, with the machines left."
        ),
    ] = 0,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Train the run on: train.epochs or train.steps may be more than they were.",
        ),
    ] = False,
) -> None:
    """Train, or go on where the run folder's last checkpoint is.

    [bold]packhorse train recipes/quickstart.yaml --nproc 2[/bold]
    [bold]packhorse train recipes/debug.yaml optim.lr=1e-3 run.dir=runs/other[/bold]
    [bold]packhorse train recipes/quickstart.yaml --nnodes 1:2 --rdzv-endpoint node0:29400
    --max-restarts 3[/bold] [bold]packhorse train recipes/debug.yaml train.epochs=4 --extend[/bold]

    SIGTERM, SIGUSR1 or Ctrl-C: the run saves and stops. Exit code 0: done; 2: the input is at
    fault; 75: saved, run the same command again; 1: anything else. Inside torchrun this is one of
    its workers.
    """
    from trainer.config.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or ())
    if is_worker():
        end_with_the_launcher()
        from trainer.train import train

        train(recipe, extend=extend)
        end_worker()
    stop_while_starting()
    from launch.cluster_env import Where, find
    from launch.local import launch, parse_nodes

    where = find(os.environ) if nnodes is None else Where(nnodes)
    nodes = parse_nodes(where.nodes)
    endpoint = rdzv_endpoint or where.endpoint
    if nodes[1] > 1 and endpoint is None:
        raise BadInput(
            f"{where.nodes} nodes: say where they meet, the same on each, as --rdzv-endpoint "
            f"node0:29400"
        )
    code = launch(
        [
            "-m",
            "trainer.cli.main",
            "train",
            str(recipe_file),
            *(overrides or ()),
            *(["--extend"] if extend else []),
        ],
        Path(recipe.run.dir),
        nproc=nproc or where.nproc,
        endpoint=endpoint if endpoint and nodes[1] > 1 else f"localhost:{port}",
        nodes=nodes,
        is_host=None if rdzv_endpoint else where.is_host,
        restarts=max_restarts,
        run_id=rdzv_id or where.run_id or os.environ.get("SLURM_JOB_ID"),
        join_s=where.join_s,
        recipe=recipe,
    )
    raise typer.Exit(code)


@app.command()
def preview(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Of each source.")] = 3,
    split: Annotated[
        Literal["train", "eval"], typer.Option(help="Which of the recipe's sources.")
    ] = "train",
    html: Annotated[
        Path | None, typer.Option(help="Write a page instead of the terminal.", show_default=False)
    ] = None,
) -> None:
    """Show rows as the model will see them: trained, context and special tokens in colours.

    [bold]packhorse preview recipes/debug.yaml --rows 2[/bold]
    [bold]packhorse preview recipes/quickstart.yaml --split eval --html preview.html[/bold]
    """
    from trainer.config.recipe import load_recipe
    from trainer.data.preview import as_html, as_text
    from trainer.model.load import load_tokenizer

    recipe = load_recipe(recipe_file, overrides or ())
    tokenizer = load_tokenizer(recipe.model)
    shown = list(_first_rows(recipe, tokenizer, split, rows))
    if html is None:
        from rich.console import Console

        Console().print(as_text(shown, tokenizer))
    else:
        html.write_text(as_html(shown, tokenizer), encoding="utf-8")
        print(html)


def _first_rows(
    recipe: Recipe, tokenizer: Any, split: Literal["train", "eval"], count: int
) -> Iterator[Row]:
    """The first rows of each source, or why they are left out, cut as for training."""
    from itertools import islice

    import numpy as np

    from trainer.data.prepare import length_policy, masker_of, rows_of
    from trainer.data.preview import Row, role_starts
    from trainer.data.rows import RowReader
    from trainer.data.split import parts_of
    from trainer.data.tokenize import fit

    masker = masker_of(recipe.data, tokenizer)
    for part in parts_of(recipe.data, split):
        reader = RowReader.of(part.source)
        for row in islice(rows_of(recipe.data, part), count):
            title = f"{row.file or part.source.name}:{row.number}"
            try:
                conversation = reader.conversation(row.fields)
                example = masker.example(conversation)
                roles = role_starts(conversation, example, masker.template)
                positions = Example(
                    np.arange(len(example.input_ids), dtype=np.int32), example.trained
                )
                for document in fit(
                    positions, length_policy(recipe)
                ):  # cut as the tokens are: roles are found again
                    places = document.input_ids
                    shown = {
                        place: roles[p] for place, p in enumerate(places.tolist()) if p in roles
                    }
                    yield Row(title, Example(example.input_ids[places], document.trained), shown)
            except RowError as error:
                yield Row(title, error)


@app.command()
def prepare(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder to write data.json and data.png to.", show_default=False),
    ] = None,
) -> None:
    """Tokenize and pack the data into the cache, and show what there is to train.

    [bold]packhorse prepare recipes/quickstart.yaml[/bold]
    [bold]packhorse prepare recipes/quickstart.yaml --out data-report[/bold]
    """
    from rich.console import Console

    from trainer import dist
    from trainer.config.recipe import load_recipe
    from trainer.data.leakage import check_leakage
    from trainer.data.prepare import prepare, train_plan
    from trainer.data.summary import tables, write
    from trainer.model.load import load_tokenizer

    dist.start_logging()
    recipe = load_recipe(recipe_file, overrides or ())
    tokenizer = load_tokenizer(recipe.model)
    if recipe.streaming:
        _prepare_shards(recipe, tokenizer)
        return
    train = prepare(recipe, tokenizer, "train")
    held_out = prepare(recipe, tokenizer, "eval") if recipe.has_eval else None
    if held_out:
        held_out = check_leakage(recipe, tokenizer, train, held_out)
    plan = train_plan(recipe, train)
    Console().print(*tables(recipe, train, plan, held_out))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write(out, train, plan, held_out)
        except OSError as error:
            raise BadInput(f"--out {out}: cannot be written ({error})") from None
        print(out / "data.json", out / "data.png", sep="\n")


def _prepare_shards(recipe: Recipe, tokenizer: Any) -> None:
    """`prepare` for a source that grows: there is no plan before its run, which logs its shards as
    it uses them.
    """
    from rich.console import Console
    from rich.table import Table

    from trainer.data.streaming import prepare_now

    counted = ("rows", "rejected", "filtered", "documents", "tokens", "trained_tokens")
    table = Table(
        "shard",
        *(name.replace("_", " ") for name in counted),
        title="train, the shards there are now",
    )
    shards = prepare_now(recipe, tokenizer)
    for shard in shards:
        table.add_row(Path(shard.files[0]).name, *(f"{shard.report[name]:,}" for name in counted))
    Console().print(table)
    print(
        f"data.train grows: {len(shards)} shards are there now; a run of {recipe.train.steps} "
        f"steps packs each by "
        "itself, and logs it in shards.jsonl when it is first used"
    )


@app.command()
def plan(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks, one a GPU.")] = 8,
    gpu_gib: Annotated[float, typer.Option(min=1, help="Memory of a GPU.")] = 80,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Machines. Default: as many as take 8 GPUs each.", show_default=False
        ),
    ] = None,
    host_gib: Annotated[
        float | None,
        typer.Option(min=1, help="Memory of a machine. Default: not asked.", show_default=False),
    ] = None,
    disk_gib: Annotated[
        float | None,
        typer.Option(
            min=1, help="Free where run.dir lies. Default: not asked.", show_default=False
        ),
    ] = None,
    nvme_gib: Annotated[
        float | None,
        typer.Option(
            min=1, help="Free on a machine's NVMe. Default: not asked.", show_default=False
        ),
    ] = None,
    gpu_tflops: Annotated[
        float, typer.Option(min=1, help="A GPU's dense bf16 peak, as its maker states it.")
    ] = 989,
    mfu: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Share of that peak that the model's FLOPs reach."),
    ] = 0.4,
    data: Annotated[
        bool,
        typer.Option(
            "--data", help="Prepare the data, or find it prepared, and plan its real steps."
        ),
    ] = False,
) -> None:
    """Say what a run needs, from the model's configuration alone: memory, disk and time, and which
    template fits.

    [bold]packhorse plan recipes/quickstart.yaml[/bold]
    [bold]packhorse plan my.yaml --gpus 64 --nodes 8 --gpu-gib 80 --host-gib 1024 --disk-gib
    20000[/bold] [bold]packhorse plan my.yaml model.activation_checkpointing=none batch.seq_len=4096
    --gpus 8 --data[/bold]

    Without --data rows are taken as full, all their tokens as trained. Exit code 0: a template
    fits; 2: none does.
    """
    from rich.console import Console

    from trainer import dist
    from trainer.config.recipe import load_recipe
    from trainer.estimate.memory import GIB, Cluster
    from trainer.estimate.report import build_report, sentences, table, verdict

    dist.start_logging()
    recipe = load_recipe(recipe_file, overrides or ())
    if nodes and gpus % nodes:
        raise BadInput(
            f"--gpus {gpus} --nodes {nodes}: every machine must have as many GPUs as the others"
        )
    sizes = [None if gib is None else gib * GIB for gib in (host_gib, disk_gib, nvme_gib)]
    cluster = Cluster(gpus, gpus // nodes if nodes else 8, gpu_gib * GIB, *sizes)
    report = build_report(recipe, cluster, _work_of_data(recipe) if data else None)
    print(*sentences(report, recipe, gpu_tflops * 1e12, mfu), sep="\n")
    Console().print(table(report))
    for template, why in report.refused.items():
        print(f"{template} is left out: {why}")
    print(verdict(report))


def _work_of_data(recipe: Recipe) -> Any:
    """The real steps that `plan` counts."""
    from trainer.data.prepare import prepare, train_plan
    from trainer.estimate.report import work_of_data
    from trainer.model.load import load_tokenizer

    if recipe.streaming:
        raise BadInput("--data: data.train grows, so that its steps are not known; plan without it")
    return work_of_data(train_plan(recipe, prepare(recipe, load_tokenizer(recipe.model), "train")))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    best: Annotated[
        bool, typer.Option("--best", help="The best evaluated step, by the recipe's eval.best.")
    ] = False,
    step: Annotated[
        int | None, typer.Option(min=1, help="Default: the last checkpoint.", show_default=False)
    ] = None,
    universal: Annotated[
        bool,
        typer.Option(
            "--universal", help="DeepSpeed's universal checkpoint, for other programs on DeepSpeed."
        ),
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="An adapter becomes part of its base: a whole model.")
    ] = False,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder, or its adapter as peft's; load it again
    and compare.

    [bold]packhorse export runs/quickstart --out models/word-problems[/bold]
    [bold]packhorse export runs/quickstart --out models/word-problems --best[/bold]
    [bold]packhorse export runs/lora_8b --out models/lora-merged --merge[/bold]
    [bold]packhorse export runs/quickstart --out /scratch/universal --universal[/bold]
    """
    if universal and merge:
        raise BadInput(
            "--merge: a universal checkpoint is the training state, which nothing is merged into; "
            "leave it out"
        )
    if universal:
        from trainer.checkpoint.universal import export_universal

        print(export_universal(run, out, chosen_step(run, step, best)))
    else:
        from trainer.checkpoint.hf_export import export

        print(export(run, out, chosen_step(run, step, best), merge=merge))


app.command(name="eval")(evaluate)
app.command()(compare)
app.add_typer(launch_app, name="launch")


@app.command()
def verify_resume(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    worlds: Annotated[
        str, typer.Option(help="Numbers of processes that the run is handed to.")
    ] = "2,1,3",
    at: Annotated[int, typer.Option(min=1, help="Steps of each of them, but the last.")] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Of the whole run.")] = 10,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")
    ] = "float32",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A tiny random model and its data, in seconds.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the run folders for a look.")] = False,
) -> None:
    """Prove that a run which is stopped and resumed by other numbers of processes learns the same.

    [bold]packhorse verify-resume recipes/debug.yaml[/bold]
    [bold]packhorse verify-resume recipes/quickstart.yaml --worlds 2,1 --at 2 --steps 4[/bold]
    [bold]packhorse verify-resume my.yaml --tiny parallel.deepspeed=ds_configs/zero2.json[/bold]

    Exit code 0: it learns the same, and a control with a defect was noticed; 1: not so.
    """
    from trainer import dist
    from trainer.checkpoint.verify_resume import verify_resume

    if not all(world.isdigit() and int(world) > 0 for world in worlds.split(",")):
        raise BadInput(f"--worlds {worlds}: give numbers of processes, as 2,1,3")
    dist.start_logging()
    dist.log.setLevel("WARNING")
    proved = verify_resume(
        recipe_file,
        overrides or (),
        worlds=[int(world) for world in worlds.split(",")],
        at=at,
        steps=steps,
        dtype=dtype,
        tiny=tiny,
        keep=keep,
    )
    raise typer.Exit(DONE if proved else FAILED)


def main() -> None:
    """The command. Bad input is one line and exit code 2; any other failure is a traceback and 1."""
    try:
        app()
    except BadInput as error:
        _refuse(one_line(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = "make room where run.dir and data.cache lie, and run the same command again"
        _refuse(f"a disk cannot be written to: {error}; {where}")


def _refuse(sentence: str) -> NoReturn:
    """Say it and end with 2, even where stderr is a file on the disk that is full."""
    try:
        print(f"packhorse: error: {sentence}", file=sys.stderr, flush=True)
    except OSError:  # Python would try again at its very end, and make the exit code 120
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if is_worker():
        os._exit(BAD_INPUT)  # at once: the launcher must see this code before the other ranks fall
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
