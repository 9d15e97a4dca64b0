"""List the keys of a recipe that run code, and find those that a recipe uses.

A recipe that the user names is the user's word. The recipe that lies in a run folder may be
somebody else's: `packhorse export`, `eval` and `chat` run nothing by it without --trust-run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput

_SCORERS = "eval.generate.scorers"  # a mapping, whose keys are names of the user's
CODE_KEYS = {
    "model.trust_remote_code": "Python files of the model's folder or repository",
    "data.train[].function": "a Python function, for each row",
    "data.train[].filters.function": "a Python function, for each row",
    "data.eval[].function": "a Python function, for each row",
    "data.eval[].filters.function": "a Python function, for each row",
    f"{_SCORERS}.*.function": "a Python function, for each answer",
    "eval.vllm_python": "a program, which is started",
    "eval.vllm_args": "arguments of vLLM, some of which name plug-ins",
    "eval.lm_eval": "Python functions that the files of a task name",
}


def used_code_keys(recipe: Recipe) -> list[str]:
    """Return the keys of the recipe that run code, with their values: `eval.vllm_python=/x`."""
    return list(_find(recipe.model_dump(mode="json"), "", ""))


def _find(value: Any, place: str, key: str) -> list[str]:
    """Return what is found below a place, as `data.eval.0`, whose key is `data.eval[]`."""
    if key in CODE_KEYS:
        return [f"{place}={value}"] if value else []
    found = []
    if isinstance(value, dict):
        for name, inner in value.items():
            below = f"{key}.{'*' if key == _SCORERS else name}".lstrip(".")
            found += _find(inner, f"{place}.{name}".lstrip("."), below)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            found += _find(inner, f"{place}.{number}", f"{key}[]")
    return found


def require_trust(
    run: Path, *, trusted: bool, recipe: Recipe | None = None, recipe_file: Path | None = None
) -> None:
    """Check that nothing in a run folder has code run that the user did not consent to.

    Args:
        trusted: the user gave --trust-run.
        recipe: that the user named, as `recipe_file`. All its keys count if the file lies in the
            run folder; of the run's own recipe those count by which its model is exported.

    Raises:
        BadInput: code would run; with all the keys.
    """
    if trusted:
        return
    found = [key for key in used_code_keys(load_recipe(run / "recipe.yaml")) if key[:6] == "model."]
    if recipe and recipe_file and recipe_file.resolve().is_relative_to(run.resolve()):
        found = list(dict.fromkeys([*found, *used_code_keys(recipe)]))
    if found:
        raise BadInput(
            f"{run}: its recipe has code run by {', '.join(found)}; read that code, and give "
            "--trust-run if you trust it"
        )
