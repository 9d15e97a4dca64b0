"""Define `packhorse convert`: a recipe from a configuration of another trainer."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from packhorse.trainer.datatypes import BadInput


def convert(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file of Axolotl, LLaMA-Factory or TRL.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="File to write instead of stdout.")] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="GPUs that it was made for: its global batch follows them.")
    ] = 1,
) -> None:
    """Translate a configuration of Axolotl, LLaMA-Factory or TRL into a recipe.

    [bold]packhorse convert axolotl.yml --gpus 8 --out recipe.yaml[/bold]
    [bold]packhorse convert llamafactory.yaml[/bold]

    What has no place in a recipe, or means something else there, is listed with its value on
    stderr, and in comments of the recipe.
    """
    import yaml

    from packhorse.trainer.config.convert import convert, recognise
    from packhorse.trainer.config.parsing import read_yaml
    from packhorse.trainer.config.recipe import Recipe, parse_recipe
    from packhorse.trainer.utils.own_output import write_own_text
    from packhorse.trainer.utils.text import one_line, show_controls

    tree = read_yaml(config)
    try:
        trainer = recognise(tree)
        recipe, notes = convert(tree, trainer, gpus)
    except BadInput as error:
        raise BadInput(f"{config}: {error}") from None
    parse_recipe(recipe, where=f"{config}, as a recipe")
    comments = [f"From {config.name}, of {trainer}. What is not as it was there:", *notes]
    lines = [show_controls(one_line(line)) for line in comments]
    text = "".join(f"# {line}\n" for line in lines)
    ordered = {name: recipe[name] for name in Recipe.model_fields if name in recipe}
    dumped = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)
    if dumped != show_controls(dumped):  # as what turns the direction of the text around it
        dumped = yaml.safe_dump(ordered, sort_keys=False)
    text += dumped
    print(*lines, sep="\n  ", file=sys.stderr)
    if out is None:
        print(text, end="")
    else:
        write_own_text(out, text, "# {}")
        print(out)
        print(f"look at what is trained: packhorse preview {shlex.quote(str(out))}")
