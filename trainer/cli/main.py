"""Define the command `packhorse`: read the arguments, call the code that does the work.

Each command imports what takes seconds to import itself, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

import packhorse
from packhorse.launch.cluster_env import ClusterEnv, parse_nodes, read_cluster_env, refuse_tasks
from packhorse.trainer.cli.arguments import (
    Best,
    Ema,
    Endpoint,
    Extend,
    Nodes,
    NumProcesses,
    Overrides,
    Port,
    RecipeFile,
    Restarts,
    RunId,
    Step,
    TrustRun,
    read_recipe,
)
from packhorse.trainer.cli.chat import chat
from packhorse.trainer.cli.convert import convert
from packhorse.trainer.cli.data import plan, prepare, preview
from packhorse.trainer.cli.eval import compare, evaluate, resolve_step
from packhorse.trainer.cli.init import init
from packhorse.trainer.cli.launch import launch_app
from packhorse.trainer.cli.runs import report, runs
from packhorse.trainer.cli.worker import (
    exit_on_early_signals,
    exit_with_launcher,
    exit_worker,
    is_worker,
)
from packhorse.trainer.datatypes import BAD_INPUT, DONE, FAILED, BadInput
from packhorse.trainer.dist import escape_controls
from packhorse.trainer.utils.lean_import import lean_import

if TYPE_CHECKING:
    from packhorse.trainer.config.recipe import Recipe

app = typer.Typer(
    help="Fine-tune language models on DeepSpeed. A run is a function of its recipe.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"packhorse {packhorse.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check and prepare everything, show the plan, and start nothing."
    ),
]


@app.command()
def train(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    nproc: NumProcesses = None,
    port: Port = 0,
    nnodes: Nodes = None,
    rdzv_endpoint: Endpoint = None,
    rdzv_id: RunId = None,
    max_restarts: Restarts = 0,
    extend: Extend = False,
    dry_run: DryRun = False,
) -> None:
    """Train a model, or resume from the last checkpoint in the run folder.

    [bold]packhorse train recipe.yaml --nproc 2[/bold]
    [bold]packhorse train debug optim.lr=1e-3 run.dir=runs/other[/bold]
    [bold]packhorse train my.yaml --nnodes 1:2 --rdzv-endpoint node0:29400 --max-restarts 3[/bold]
    [bold]packhorse train debug train.epochs=4 --extend[/bold]

    SIGTERM, SIGUSR1 and Ctrl-C make the run save and stop. Exit code 0: done; 2: bad input; 75:
    saved, run the same command again; 1: any other failure. A process that torchrun started is one
    of its workers.
    """
    recipe = read_recipe(recipe_file, overrides)
    if is_worker():
        if dry_run:
            raise BadInput("--dry-run starts no ranks: run it once, without torchrun")
        _train_rank(recipe, extend=extend)
    refuse_tasks(os.environ, nodes_given=nnodes is not None or "PET_NNODES" in os.environ)
    exit_on_early_signals()
    cluster = _choose_cluster(nnodes, rdzv_endpoint)
    least, most = parse_nodes(cluster.nodes)
    nproc = nproc or cluster.nproc
    if dry_run:
        from packhorse.trainer.cli.dry_run import dry_run as run_dry

        run_dry(recipe, nproc and nproc * most, extend=extend)
        return
    with lean_import():
        from packhorse.launch.local import launch
    from packhorse.trainer.config.packaged import MAIN

    arguments = [*(["--extend"] if extend else []), "--", str(recipe_file), *(overrides or ())]
    code = launch(
        [MAIN, "train", *arguments],
        Path(recipe.run.dir),
        nproc=nproc,
        endpoint=cluster.endpoint if cluster.endpoint and most > 1 else f"localhost:{port}",
        nodes=(least, most),
        is_host=cluster.is_host,
        restarts=max_restarts,
        run_id=rdzv_id or cluster.run_id or os.environ.get("SLURM_JOB_ID"),
        join_s=cluster.join_s,
        recipe=recipe,
    )
    raise typer.Exit(code)


def _train_rank(recipe: Recipe, *, extend: bool) -> NoReturn:
    exit_with_launcher()
    with lean_import():
        from packhorse.trainer.train import train

    train(recipe, extend=extend)
    exit_worker()


def _choose_cluster(nnodes: str | None, endpoint: str | None) -> ClusterEnv:
    """Return the nodes that the options name, or those of the environment."""
    cluster = read_cluster_env(os.environ) if nnodes is None else ClusterEnv(nnodes)
    if endpoint:
        cluster = replace(cluster, endpoint=endpoint, is_host=None)
    if parse_nodes(cluster.nodes)[1] > 1 and cluster.endpoint is None:
        raise BadInput(
            f"{cluster.nodes} nodes: name the rendezvous host, the same on each node, as "
            f"--rdzv-endpoint node0:29400"
        )
    return cluster


app.command()(init)
app.command()(convert)
app.command()(preview)
app.command()(prepare)
app.command()(plan)


Push = Annotated[
    str | None,
    typer.Option(
        metavar="ORG/NAME",
        help="Upload it to this repository on the Hugging Face hub, too; a new one is private.",
        show_default=False,
    ),
]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    best: Best = False,
    step: Step = None,
    universal: Annotated[
        bool,
        typer.Option(
            "--universal",
            help="Write DeepSpeed's universal checkpoint (the training state) instead.",
        ),
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into its base, to a whole model.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier export, once the new one is whole."),
    ] = False,
    push: Push = None,
    ema: Ema = False,
    trust_run: TrustRun = False,
) -> None:
    """Export a checkpoint as a Hugging Face model folder, or an adapter for peft.

    The export is loaded again and compared with the trained model.

    [bold]packhorse export runs/quickstart --out models/word-problems[/bold]
    [bold]packhorse export runs/quickstart --out models/best --best --push me/best[/bold]
    [bold]packhorse export runs/lora_8b --out models/lora-merged --merge[/bold]
    [bold]packhorse export runs/quickstart --out /scratch/universal --universal[/bold]
    """
    for option, given in {"--push": push, "--ema": ema, "--merge": merge}.items():
        if universal and given:
            raise BadInput(f"{option}: a universal checkpoint is the training state, not a model")
    from packhorse.trainer import dist
    from packhorse.trainer.checkpoint.export_folder import require_own_place
    from packhorse.trainer.config.code_keys import require_trust

    dist.start_logging()
    require_own_place(run, out)
    if not universal:  # which loads no model
        require_trust(run, trusted=trust_run)
    chosen = resolve_step(run, step, best)
    if push:
        from packhorse.trainer.checkpoint.hub import check_push

        check_push(push)
    if universal:
        from packhorse.trainer.checkpoint.universal import export_universal

        print(export_universal(run, out, chosen, overwrite=overwrite))
    else:
        from packhorse.trainer.checkpoint.hf_export import export

        print(export(run, out, chosen, merge=merge, overwrite=overwrite, ema=ema))
    if push:
        from packhorse.trainer.checkpoint.hub import push as push_to_hub

        print(push_to_hub(out, push))


app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(chat)
app.command()(runs)
app.command()(report)
app.add_typer(launch_app, name="launch")


@app.command()
def verify_resume(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    worlds: Annotated[
        str, typer.Option(help="World sizes, in the order in which they take over the run.")
    ] = "2,1,3",
    sequence: Annotated[
        str | None, typer.Option(help="parallel.sequence of each of the world sizes, as 2,1,3.")
    ] = None,
    at: Annotated[
        int, typer.Option(min=1, help="Steps of each world size, except the last one.")
    ] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Steps of the whole run.")] = 10,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Data type of the weights.")
    ] = "float32",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Use a tiny random model and its data: seconds.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the run folders.")] = False,
) -> None:
    """Verify that a run resumed at other world sizes learns the same.

    [bold]packhorse verify-resume debug[/bold]
    [bold]packhorse verify-resume recipe.yaml --worlds 2,1 --at 2 --steps 4[/bold]
    [bold]packhorse verify-resume my.yaml --tiny parallel.deepspeed=zero2[/bold]
    [bold]packhorse verify-resume my.yaml --tiny --worlds 2,1,4 --sequence 2,1,4[/bold]

    Exit code 0: it learns the same, and a control with a deliberate defect was detected; 1: not
    so.
    """
    from packhorse.trainer import dist
    from packhorse.trainer.checkpoint.verify_resume import verify_resume

    for option, numbers in {"--worlds": worlds, "--sequence": sequence}.items():
        if numbers and not all(n.isdigit() and int(n) > 0 for n in numbers.split(",")):
            raise BadInput(f"{option} {numbers}: give numbers of processes, as 2,1,3")
    dist.start_logging()
    dist.log.setLevel("WARNING")
    is_same = verify_resume(
        recipe_file,
        overrides or (),
        worlds=[int(world) for world in worlds.split(",")],
        sequences=[int(size) for size in sequence.split(",")] if sequence else None,
        at=at,
        steps=steps,
        dtype=dtype,
        tiny=tiny,
        keep=keep,
    )
    raise typer.Exit(DONE if is_same else FAILED)


def _unwrap(text: str) -> str:
    """Join the lines of each paragraph, which typer would keep apart, but for the examples'."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(each if "[bold]" in each else " ".join(each.split()) for each in paragraphs)


for _command in (*app.registered_commands, *launch_app.registered_commands):
    _command.help = _unwrap(_command.callback.__doc__ or "")


def main() -> None:
    """Run the command. Bad input is a line a fault and exit code 2, all else a traceback and 1."""
    try:
        if sys.argv[1:] and sys.argv[1].startswith("--local_rank"):  # DeepSpeed's launcher adds it
            refuse_tasks(os.environ, nodes_given=True)
        app(prog_name="packhorse")
    except BadInput as error:
        # a recipe's faults have a line each; what libraries say is brought to one
        lines = (" ".join(line.split()) for line in str(error).split("\n  "))
        _exit_bad_input("\n  ".join(lines))
    except Exception as error:
        if advice := _advice(error):
            _exit_bad_input(f"{' '.join(str(error).split())}; {advice}")
        raise


def _advice(error: Exception) -> str | None:
    """Return what to do about an error of the system, or None if it is another."""
    number = getattr(error, "errno", None)
    # tokenizers and safetensors are written in Rust, and raise errors of their own
    if of_rust := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(of_rust[1])
    if "Symlink loop" in str(error):  # a RuntimeError of Path.resolve, before Python 3.13
        number = errno.ELOOP
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "make room where run.dir and data.cache lie, and run the same command again"
    if number in (errno.EMFILE, errno.ENFILE):
        return "raise the limit, as by `ulimit -n 4096`"
    if number in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EISDIR):
        return "give another path"
    return None


def _exit_bad_input(sentence: str) -> NoReturn:
    """Print the sentence and exit with 2, even if stderr is a file on a full disk."""
    try:
        print(f"packhorse: error: {escape_controls(sentence)}", file=sys.stderr, flush=True)
    except OSError:  # at its very end Python would try again, and make the exit code 120
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if is_worker():
        # At once: the launcher must see this exit code before the other ranks fail with another.
        os._exit(BAD_INPUT)
    sys.exit(BAD_INPUT)
