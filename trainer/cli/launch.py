"""Define `packhorse launch`: write the files that start a run on a cluster, and submit them."""

from __future__ import annotations

import shlex
import sysconfig
from pathlib import Path
from typing import Annotated, Literal

import typer

from packhorse.launch import slurm as batch
from packhorse.trainer.cli.arguments import Overrides, RecipeFile, read_recipe
from packhorse.trainer.utils.own_output import write_own_text

launch_app = typer.Typer(
    help="Write the files that start a run on Slurm or Kubernetes, and submit them.",
    no_args_is_help=True,
)


@launch_app.command()
def kubernetes(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the run, one pod each.")],
    image: Annotated[
        str, typer.Option(help="Container image as the cluster pulls it. A digest pins it.")
    ],
    kind: Annotated[
        Literal["job", "jobset", "trainjob"],
        typer.Option(
            help="Resource that starts the pods. jobset and trainjob need their operators."
        ),
    ] = "job",
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="Settings of your cluster (YAML). Default: launch/kubernetes/cluster.yaml, to "
            "start from."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the run in the cluster. Default: the name of run.dir."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: kubernetes/ in run.dir.")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit the manifests with kubectl apply.")
    ] = False,
) -> None:
    """Write the Kubernetes manifests of a run.

    [bold]packhorse launch kubernetes my.yaml --nodes 2 --image registry/packhorse:1[/bold]
    [bold]packhorse launch kubernetes my.yaml --nodes 2 --image registry/packhorse:1 --submit[/bold]
    """
    from packhorse.launch.kubernetes.render import CLUSTER, render, run_name, submit_file

    run_dir = read_recipe(recipe_file, overrides).run.dir
    cluster, name = cluster or CLUSTER, name or run_name(run_dir)
    text = render(
        recipe_file, overrides or (), kind, nodes=nodes, image=image, name=name, cluster=cluster
    )
    folder = out or Path(run_dir) / "kubernetes"
    manifests, kept = folder / f"{kind}.yaml", folder / "cluster.yaml"
    instead = "give another --out, or move it away"
    if not kept.exists() or not kept.samefile(cluster):
        settings = cluster.read_text(encoding="utf-8")
        write_own_text(kept, settings, "# {}", f"give it as --cluster to use it, or {instead}")
    write_own_text(manifests, text, "# {}", instead)
    print(manifests, kept, sep="\n")
    if submit:
        raise typer.Exit(submit_file(manifests))


@launch_app.command()
def slurm(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[
        str, typer.Option(metavar="N|MIN-MAX", help="Nodes. MIN-MAX: as many as Slurm can give.")
    ] = "1",
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node.")] = 8,
    time: Annotated[
        str, typer.Option(help="Time limit. The run saves before it and is queued again.")
    ] = "24:00:00",
    partition: Annotated[
        str | None, typer.Option(help="Partition. Default: the cluster's default.")
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="Account to charge. Default: the user's default.")
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(
            help="Image to run in: a .sif file in Apptainer, any other image in Pyxis. Default: "
            "none."
        ),
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder to mount in the container, besides the current one. May be repeated."
        ),
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit the script with sbatch.")
    ] = False,
) -> None:
    """Write a Slurm batch script into the run folder.

    [bold]packhorse launch slurm recipes/sft_70b.yaml --nodes 8 --gpus-per-node 8[/bold]
    [bold]packhorse launch slurm my.yaml --nodes 4-8 --container packhorse.sif --submit[/bold]
    """
    here, run_dir = str(Path.cwd()), Path(read_recipe(recipe_file, overrides).run.dir).absolute()
    options = {
        "job-name": run_dir.name,
        "nodes": nodes,
        "gpus-per-node": str(gpus_per_node),
        "time": time,
        "partition": partition,
        "account": account,
        "chdir": here,
        "output": str(run_dir).replace("%", "%%") + "/slurm-%j.log",
    }
    text = batch.render(
        options={name: value for name, value in options.items() if value is not None},
        recipe=shlex.quote(str(recipe_file)),
        overrides=overrides or (),
        packhorse="packhorse" if container else f"{sysconfig.get_path('scripts')}/packhorse",
        container=container or "",
        mounts=[here, *(mount or ())],
    )
    script = _write_executable(run_dir / "slurm.sh", text)
    print(script)
    print(batch.submit(script) if submit else f"submit it with: sbatch {shlex.quote(str(script))}")


def _write_executable(script: Path, text: str) -> Path:
    """Write the script, unless the user has changed it, for all who may read it to run."""
    write_own_text(script, text, "# {}", "submit it as it is, or move it away")
    mode = script.stat().st_mode
    script.chmod(mode | (mode & 0o444) >> 2)
    return script
