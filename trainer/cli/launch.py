"""Define `packhorse launch`: write the files that start a run on a cluster, and submit them."""

from __future__ import annotations

import hashlib
import shlex
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from packhorse.launch import slurm as batch
from packhorse.trainer.cli.arguments import Extend, Overrides, RecipeFile, read_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.own_output import write_own_text

if TYPE_CHECKING:
    from packhorse.trainer.config.recipe import Recipe

launch_app = typer.Typer(
    help="Write the files that start a run on Slurm or Kubernetes, and submit them.",
    no_args_is_help=True,
)


Submit = Annotated[
    bool, typer.Option("--submit", help="Submit what was written, by sbatch or kubectl apply.")
]


Kind = Annotated[
    Literal["job", "jobset", "trainjob"] | None,
    typer.Option(
        help="Resource that starts the pods. jobset and trainjob need their operators. Default: "
        "job.",
        show_default=False,
    ),
]


@launch_app.command()
def kubernetes(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the run, one pod each.")],
    image: Annotated[
        str, typer.Option(help="Container image as the cluster pulls it. A digest pins it.")
    ],
    kind: Kind = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="ClusterTrainingRuntime of the cluster to train under, in a trainjob. Default: "
            "none, all comes from the manifests."
        ),
    ] = None,
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
    submit: Submit = False,
) -> None:
    """Write the Kubernetes manifests of a run.

    [bold]packhorse launch kubernetes my.yaml --nodes 2 --image registry/packhorse:1[/bold]
    [bold]packhorse launch kubernetes my.yaml --nodes 2 --image registry/packhorse:1 --submit[/bold]
    [bold]packhorse launch kubernetes my.yaml --nodes 2 --image IMAGE --runtime RUNTIME[/bold]
    """
    from packhorse.launch.kubernetes import render as pods

    if runtime and kind not in (None, "trainjob"):
        raise BadInput(f"--runtime {runtime}: only a trainjob uses a runtime; leave --kind out")
    kind = kind or ("trainjob" if runtime else "job")
    run_dir = read_recipe(recipe_file, overrides).run.dir
    cluster = pods.find_cluster(cluster)
    text = pods.render(
        recipe_file,
        overrides or (),
        kind,
        nodes=nodes,
        image=image,
        name=name or pods.run_name(run_dir),
        cluster=cluster,
        runtime=runtime,
    )
    manifests = _write_manifests(out or Path(run_dir) / "kubernetes", f"{kind}.yaml", text, cluster)
    if submit:
        raise typer.Exit(pods.submit_file(manifests))
    print(f"apply it with: {shlex.join(pods.apply_command(manifests))}")


def _write_manifests(folder: Path, name: str, text: str, cluster: Path) -> Path:
    """Write the manifests, and the cluster.yaml that they follow beside them."""
    manifests, kept = folder / name, folder / "cluster.yaml"
    instead = "give another --out, or move it away"
    if not kept.exists() or not kept.samefile(cluster):
        settings = cluster.read_text(encoding="utf-8")
        write_own_text(kept, settings, "# {}", f"give it as --cluster to use it, or {instead}")
    write_own_text(manifests, text, "# {}", instead)
    print(manifests, kept, sep="\n")
    return manifests


Constraint = Annotated[str | None, typer.Option(help="Features that the nodes must have, as h100.")]
Sbatch = Annotated[
    list[str] | None,
    typer.Option(
        metavar="--OPTION=VALUE",
        help="Any further option of sbatch, as --sbatch --reservation=night. May be repeated.",
    ),
]
Container = Annotated[
    str | None,
    typer.Option(
        help="Image to run in: a .sif file in Apptainer, any other image in Pyxis. Default: none."
    ),
]
Mounts = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder to mount in the container, besides the current one. May be repeated."
    ),
]


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
    qos: Annotated[
        str | None, typer.Option(help="Quality of service. Default: the cluster's default.")
    ] = None,
    constraint: Constraint = None,
    sbatch: Sbatch = None,
    container: Container = None,
    mount: Mounts = None,
    extend: Extend = False,
    submit: Submit = False,
) -> None:
    """Write a Slurm batch script into the run folder, and the resolved recipe that it trains.

    An edit of the recipe changes nothing for a job that waits in the queue or is queued again.

    [bold]packhorse launch slurm my.yaml --nodes 8 --gpus-per-node 8[/bold]
    [bold]packhorse launch slurm my.yaml --nodes 4-8 --container packhorse.sif --submit[/bold]
    [bold]packhorse launch slurm my.yaml --qos high --sbatch --reservation=night[/bold]
    """
    recipe = read_recipe(recipe_file, overrides)
    here, run_dir = str(Path.cwd()), Path(recipe.run.dir).absolute()
    chosen = {"partition": partition, "account": account, "qos": qos, "constraint": constraint}
    options = {
        "job-name": run_dir.name,
        "nodes": nodes,
        "gpus-per-node": str(gpus_per_node),
        "time": time,
        **{name: value for name, value in chosen.items() if value is not None},
        "chdir": here,
        "output": str(run_dir).replace("%", "%%") + "/slurm-%j.log",
    }
    kept, files = _recipe_files(recipe_file, recipe, in_container=bool(container))
    text = batch.render(
        options=options,
        further=sbatch or (),
        recipe=shlex.quote(str(kept)),
        is_copy=True,
        overrides=["--extend"] if extend else (),
        packhorse="packhorse" if container else f"{sysconfig.get_path('scripts')}/packhorse",
        container=container or "",
        mounts=[here, *(mount or ())],
    )
    script = _write_job(recipe, files, text, extend=extend)
    print(batch.submit(script) if submit else f"submit it with: sbatch {shlex.quote(str(script))}")


def _recipe_files(
    recipe_file: Path, recipe: Recipe, *, in_container: bool
) -> tuple[Path, dict[Path, str]]:
    """Return the path and text of the resolved recipe that a job trains, and its own template's.

    Their names hold a digest of the text: each of several jobs in the queue keeps its own.
    """
    from packhorse.trainer.config.packaged import read_template, require_own_recipe, template_names

    if in_container:
        require_own_recipe(recipe_file, "the container does", "in a mounted folder")
    folder, files = Path(recipe.run.dir).absolute(), {}

    def keep(text: str, suffix: str) -> Path:
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        files[folder / f"slurm-{digest}{suffix}"] = text
        return folder / f"slurm-{digest}{suffix}"

    if recipe.parallel.deepspeed not in template_names():
        template = keep(read_template(recipe.parallel.deepspeed), ".json")
        parallel = recipe.parallel.model_copy(update={"deepspeed": str(template)})
        recipe = recipe.model_copy(update={"parallel": parallel})
    return keep(recipe.to_yaml(), ".yaml"), files


def _write_job(recipe: Recipe, files: dict[Path, str], text: str, *, extend: bool) -> Path:
    """Write the files that the script names, and the script, unless the user has changed it."""
    # here, as torch takes seconds to import
    from packhorse.trainer.run_folder import require_same_run

    script = Path(recipe.run.dir).absolute() / "slurm.sh"
    require_same_run(recipe, script.parent, extend=extend)
    for path, content in files.items():
        write_own_text(path, content, instead="move it away")
    write_own_text(script, text, "# {}", "submit it as it is, or move it away")
    mode = script.stat().st_mode
    script.chmod(mode | (mode & 0o444) >> 2)  # for all who may read it to run
    print(script)
    return script
