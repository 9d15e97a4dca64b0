"""Describe an exported step in a model card, from the run's own files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from packhorse import __version__
from packhorse.trainer.checkpoint import best
from packhorse.trainer.config.recipe import Recipe


def model_card(run_dir: Path, recipe: Recipe, step: int, is_adapter: bool) -> str:
    """Return a model card with the run's own facts as of this step."""
    lines = best.evaluations(run_dir)
    before, after = (best.numbers(lines[at]) if at in lines else {} for at in (0, step))
    rows = "\n".join(
        f"| {name} | {_format(before.get(name))} | {_format(value)} |"
        for name, value in after.items()
    )
    table = (
        f"\n| held out | before | after {step} steps |\n|---|---|---|\n{rows}\n" if after else ""
    )
    rule, chosen = recipe.eval.best, ""
    found: dict[str, Any] = best.choose(rule, lines) if rule else {"step": None}
    if found["step"] == step:
        chosen = f" Step {step} is the best of {len(found['candidates'])} evaluated ones: {rule}."
    options = recipe.data.chat_template_kwargs.items()
    given = ", ".join(f"{name}={value!r}" for name, value in options)
    if given:
        given = f"\nIts chat template was given `{given}`: give apply_chat_template the same.\n"
    if is_adapter and recipe.model.rope_scaling:  # a whole model's configuration has it
        given += (
            f"\nIts base had `rope_parameters: {recipe.model.rope_scaling}`: give it the same.\n"
        )
    name = recipe.model.name
    # the hub refuses a card whose base is a folder
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).expanduser().is_dir()
    base = f"base_model: {name}\n" if on_hub else ""
    return f"""---
{base}library_name: {"peft" if is_adapter else "transformers"}
pipeline_tag: text-generation
tags: [packhorse, sft]
---
# {run_dir.name}

{recipe.model.name}, fine-tuned by packhorse {__version__} for {step} steps.{chosen}
{given}{table}
The run is a function of this recipe:

```yaml
{recipe.to_yaml()}```
"""


def _format(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4f}"
