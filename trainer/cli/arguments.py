"""Define the arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="The recipe, a YAML file, or the name of a packaged one: debug.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Changes to the recipe, as optim.lr=1e-5.",
        show_default=False,
    ),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="Processes on this machine. Default: one for each GPU, or one without a GPU.",
        show_default=False,
    ),
]
