"""`packhorse launch`: writes what starts a run on a cluster, and submits it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trainer.cli.arguments import Overrides, RecipeFile
from trainer.datatypes import BadInput

launch_app = typer.Typer(
    help="Write what starts a run on a cluster, and submit it.", no_args_is_help=True
)


@launch_app.command()
def kubernetes(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Pods, one for each node.", show_default=False)],
    image: Annotated[
        str,
        typer.Option(
            help="As the cluster pulls it; a digest keeps it the same.", show_default=False
        ),
    ],
    kind: Annotated[
        Literal["job", "jobset", "trainjob"],
        typer.Option(help="What starts the pods; jobset and trainjob need more."),
    ] = "job",
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="What your cluster decides; start from the one that is written.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="In the cluster. Default: the name of run.dir.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder to write. Default: kubernetes/ in run.dir.", show_default=False
        ),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it to kubectl apply.")] = False,
) -> None:
    """Write the manifests of a run for Kubernetes.

    [bold]packhorse launch kubernetes my_recipe.yaml --nodes 2 --image registry/packhorse:1[/bold]
    [bold]packhorse launch kubernetes my_recipe.yaml --nodes 2 --image registry/packhorse:1
    --submit[/bold]
    """
    from launch.kubernetes.render import CLUSTER, render, run_name, submit_file
    from trainer.config.recipe import load_recipe

    run_dir = load_recipe(recipe_file, overrides or ()).run.dir
    cluster = cluster or CLUSTER
    text = render(
        recipe_file,
        overrides or (),
        kind,
        nodes=nodes,
        image=image,
        name=name or run_name(run_dir),
        cluster=cluster,
    )
    folder = out or Path(run_dir) / "kubernetes"
    manifests, kept = folder / f"{kind}.yaml", folder / "cluster.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifests.write_text(text, encoding="utf-8")
        if not kept.exists() or not kept.samefile(cluster):
            kept.write_text(cluster.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"{folder}: cannot be written ({error}); give another folder as --out"
        ) from None
    print(manifests, kept, sep="\n")
    if submit:
        raise typer.Exit(submit_file(manifests))


@launch_app.command()
def slurm(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[
        str, typer.Option(metavar="N|MIN-MAX", help="Machines; MIN-MAX: as many as there are.")
    ] = "1",
    gpus_per_node: Annotated[int, typer.Option(min=0)] = 8,
    time: Annotated[
        str, typer.Option(help="Slurm's time limit; the run saves before it and is queued again.")
    ] = "24:00:00",
    partition: Annotated[
        str | None, typer.Option(help="Default: the cluster's.", show_default=False)
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="Default: the user's.", show_default=False)
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(
            help="A .sif file runs in Apptainer, any other image in Pyxis. Default: none.",
            show_default=False,
        ),
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder that the container sees, besides the current one.", show_default=False
        ),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it to sbatch.")] = False,
) -> None:
    """Write a batch script for Slurm into the run folder.

    [bold]packhorse launch slurm recipes/sft_70b.yaml --nodes 8 --gpus-per-node 8[/bold]
    [bold]packhorse launch slurm recipes/sft_70b.yaml --nodes 4-8 --container packhorse.sif
    --submit[/bold]
    """
    import shlex
    import sysconfig

    from launch import slurm
    from trainer.config.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides or ())
    run_dir = Path(recipe.run.dir).absolute()
    options = {
        "job-name": run_dir.name,
        "nodes": nodes,
        "gpus-per-node": str(gpus_per_node),
        "time": time,
        "partition": partition,
        "account": account,
        "chdir": str(Path.cwd()),
        "output": str(run_dir).replace("%", "%%") + "/slurm-%j.log",
    }
    text = slurm.render(
        options={name: value for name, value in options.items() if value is not None},
        recipe=shlex.quote(str(recipe_file)),
        overrides=overrides or (),
        packhorse="packhorse" if container else f"{sysconfig.get_path('scripts')}/packhorse",
        container=container or "",
        mounts=[str(Path.cwd()), *(mount or ())],
    )
    script = slurm.write(run_dir, text)
    print(script)
    print(slurm.submit(script) if submit else f"submit it with: sbatch {shlex.quote(str(script))}")
