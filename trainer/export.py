"""A checkpoint becomes a Hugging Face folder: weights, configuration, tokenizer, a model card.

In: a run folder. Out: a folder that `from_pretrained` loads, and that was loaded and compared before it was
published by a rename. Weights pass through memory-mapped files: neither a device nor the host holds the model
whole while it is written.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from trainer import __version__, best, checkpoint, dist
from trainer.config import Recipe, load
from trainer.flow import BadInput
from trainer.model.load import load_tokenizer
from trainer.shards import Shards

MODEL_FOLDER = "model"  # of a run: configuration, generation configuration and tokenizer, without weights


def save_description(model: Any, tokenizer: Any, run_dir: Path) -> None:
    """Put what an export needs beside the weights into the run folder, so that it needs the source no more."""
    folder = run_dir / MODEL_FOLDER
    model.config.save_pretrained(folder)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export(run_dir: Path, out: Path, step: int | None = None) -> Path:
    """Write the run's newest whole checkpoint, or that of a step, to `out`, in the recipe's dtype.

    Raises:
        BadInput: the run has no such checkpoint, or `out` exists and is not an export.
        RuntimeError: what was written does not load as what was saved.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise BadInput(f"{run_dir}: not a run folder (it has no recipe.yaml)")
    if out.exists() and not (out / "config.json").is_file():
        raise BadInput(f"{out}: exists and is not a model folder; give another --out")
    recipe = load(run_dir / "recipe.yaml")
    saved, manifest = checkpoint.open_newest(run_dir) if step is None else checkpoint.open_step(run_dir, step)

    staged = out.with_name(f".{out.name}.saving")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    mapped = _mapped_weights(saved, staged / "weights", getattr(torch, recipe.model.dtype))
    write_folder(run_dir, recipe, staged / "model", mapped)
    _compare(staged / "model", mapped, recipe)
    (staged / "model" / "README.md").write_text(_model_card(run_dir, recipe, manifest.state.step), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    (staged / "model").rename(out)
    shutil.rmtree(staged)
    dist.log.info("exported step %d to %s, loaded it back and found every weight the same", manifest.state.step, out)
    return out


def _mapped_weights(saved: Shards, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's weights by name, in `dtype`, each backed by a file of its own."""
    folder.mkdir()
    weights = {}
    for number, name in enumerate(saved.names):
        value = saved.whole(name)
        if value.is_floating_point():
            value = value.to(dtype)
        path = str(folder / str(number))
        target = torch.from_file(path, shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        weights[name] = target.copy_(value)
    return weights


def write_folder(run_dir: Path, recipe: Recipe, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """A Hugging Face folder of these weights, with what `save_description` put into the run folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    source = run_dir / MODEL_FOLDER
    trust = recipe.model.trust_remote_code
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, recipe.model.dtype), trust_remote_code=trust
        )
    model.generation_config = GenerationConfig.from_pretrained(source)
    model.save_pretrained(folder, state_dict=dict(weights), max_shard_size="5GB")
    as_trained = recipe.model.model_copy(update={"name": str(source), "chat_template": None, "add_tokens": ()})
    load_tokenizer(as_trained).save_pretrained(folder)


def _compare(folder: Path, weights: dict[str, torch.Tensor], recipe: Recipe) -> None:
    """Load the folder as a user would and compare every weight bit by bit."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, recipe.model.dtype),
        trust_remote_code=recipe.model.trust_remote_code,
        output_loading_info=True,
    )
    model, info = loaded
    if info["missing_keys"]:
        raise RuntimeError(f"{folder}: the export lacks weights: {', '.join(sorted(info['missing_keys'])[:5])}")
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter.detach(), weights[name]):
            raise RuntimeError(f"{folder}: `{name}` loads with other values than were trained")


def _model_card(run_dir: Path, recipe: Recipe, step: int) -> str:
    """A model card of the run's own facts: of this step, and not of one that was trained on from it."""
    lines = best.evaluations(run_dir)
    before, after = (best.numbers(lines[at]) if at in lines else {} for at in (0, step))
    rows = "\n".join(f"| {name} | {_shown(before.get(name))} | {_shown(value)} |" for name, value in after.items())
    rule = recipe.eval.best
    found: dict[str, Any] = best.choose(rule, lines) if rule else {"step": None}
    chosen = ""
    if found["step"] == step:
        chosen = f" Step {step} is the best of {len(found['candidates'])} evaluated ones: {rule}."
    given = ", ".join(f"{name}={value!r}" for name, value in recipe.data.chat_template_kwargs.items())
    given = f"\nIts chat template was given `{given}`: give apply_chat_template the same.\n" if given else ""
    table = f"\n| held out | before | after {step} steps |\n|---|---|---|\n{rows}\n" if after else ""
    return f"""---
base_model: {recipe.model.name}
library_name: transformers
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


def _shown(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4f}"
