"""Define the arguments that several commands share, and those of the rendezvous.

Nothing heavy is imported before a recipe is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from packhorse.trainer.config.recipe import Recipe


def _download_recipe(file: Path) -> Path:
    """Return the path of the recipe; one that is given by a URL is downloaded."""
    # as a path, s3://bucket/recipe.yaml has lost a slash
    url = re.sub(r"^([a-z][a-z0-9+.-]+):/", r"\1://", str(file)).replace("file://", "file:///")
    from packhorse.trainer.config.packaged import find_recipe, is_url

    return find_recipe(url) if is_url(url) else file


RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="The recipe, a YAML file or its URL, or the name of a packaged one: debug.",
        callback=_download_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, as optim.lr=1e-5."),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="Processes on this machine. Default: one for each GPU, or one without a GPU.",
    ),
]
Port = Annotated[
    int,
    typer.Option(
        "--port",
        min=0,
        max=65535,
        help="Port of the rendezvous on a single machine; 0: a free one.",
    ),
]
Nodes = Annotated[
    str | None,
    typer.Option(
        "--nnodes",
        metavar="N|MIN:MAX",
        help="Nodes, each of which runs this command. Default: those of Slurm or Kubernetes, or 1.",
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="Rendezvous host and port, the same on all nodes. The host is one of the nodes.",
    ),
]
RunId = Annotated[
    str | None,
    typer.Option(
        "--rdzv-id",
        help="Name of the run at the rendezvous. Default: Slurm's job id, or the name of run.dir.",
    ),
]
Restarts = Annotated[
    int,
    typer.Option(
        "--max-restarts",
        min=0,
        help="Restarts after a failure, from the last checkpoint on the nodes left.",
    ),
]
Extend = Annotated[
    bool,
    typer.Option("--extend", help="Train a run longer: train.epochs or train.steps may be raised."),
]
Best = Annotated[bool, typer.Option("--best", help="Best step of a run, by its own eval.best.")]
Step = Annotated[
    int | None,
    typer.Option(min=0, help="Step of a run. Default: its last checkpoint.", show_default=False),
]

Ema = Annotated[
    bool,
    typer.Option("--ema", help="Take the moving average of the weights (`optim.ema_decay`)."),
]
TrustRun = Annotated[
    bool,
    typer.Option(
        "--trust-run",
        help="Let the recipe in the run folder run code, as model.trust_remote_code does. If it is "
        "not your run, read that code first.",
    ),
]


def read_recipe(file: Path, overrides: list[str] | None) -> Recipe:
    """Read the recipe that a command is given; see `load_recipe`."""
    # here, as pydantic and yaml take longer to import than `--help` may take
    from packhorse.trainer.config.recipe import load_recipe

    return load_recipe(file, overrides or ())
