"""Find what the package brings along: DeepSpeed templates, and the debug recipe with its files.

A name is that of a packaged file, in every folder; a path is the user's own file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import packhorse
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.remote import is_url

PACKAGE = Path(packhorse.__file__).resolve().parent
RECIPES = PACKAGE / "recipes"
# The script that a process of ours runs: with `-m packhorse` Python would look for packhorse in the
# current folder first.
MAIN = str(PACKAGE / "__main__.py")


def template_names() -> list[str]:
    """Return the names of the DeepSpeed templates: zero0, zero1 and so on."""
    return sorted(path.stem for path in (PACKAGE / "ds_configs").glob("*.json"))


def find_template(name: str) -> Path:
    """Return the DeepSpeed template that `parallel.deepspeed` names. Raises BadInput without one.

    Args:
        name: of a packaged template, as `zero3`, or the path of a file. `ds_configs/zero3.json` is
            the packaged one if the current folder has no such file.
    """
    names = template_names()
    if name in names:
        return PACKAGE / "ds_configs" / f"{name}.json"
    for path in (Path(name), PACKAGE / name):
        if path.is_file():
            return path
    raise BadInput(
        f"parallel.deepspeed: there is no file {name}; give a path, or one of {', '.join(names)}"
    )


def read_template(name: str) -> str:
    """Return the text of the template that `find_template` finds. Raises BadInput, too, if it is
    not text."""
    path = find_template(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"parallel.deepspeed: {path} is no text in UTF-8 ({error})") from None


def find_recipe(name: str | Path) -> Path:
    """Return the recipe's file. Raises BadInput if there is none.

    Args:
        name: a path or a URL, which is downloaded; without a suffix and without such a file the
            name of a packaged recipe.
    """
    if is_url(str(name)):
        from packhorse.trainer.utils.download import download

        return download(str(name))
    path, packaged = Path(name), RECIPES / f"{name}.yaml"
    if not path.suffix and not path.is_file() and packaged.is_file():
        return packaged
    if not path.exists():
        names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise BadInput(f"{path}: there is no such file; packaged recipes: {names}")
    return path


def require_own_recipe(file: Path, where: str, instead: str) -> None:
    """Raise BadInput if `file` names a packaged recipe, whose files are not where the run is."""
    if find_recipe(file) != file:
        raise BadInput(
            f"{file}: the recipe of this machine's package names files that {where} not have; "
            f"give a recipe file whose data and model lie {instead}"
        )


def locate_files(tree: Any) -> Any:
    """Return a packaged recipe's tree with absolute paths of the files that are packaged, too."""
    return map_texts(tree, lambda text: str(PACKAGE / text) if text[:8] == "recipes/" else text)


def map_texts(tree: Any, change: Callable[[str], Any]) -> Any:
    """Return a tree of mappings and lists with each text in it changed; keys stay."""
    if isinstance(tree, dict):
        return {key: map_texts(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_texts(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
