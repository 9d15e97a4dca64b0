"""Export a checkpoint as a Hugging Face folder: weights, configuration, tokenizer and model card.

In: a run folder. Out: a folder that `from_pretrained` loads, or an adapter that peft loads. It was
loaded and compared with the checkpoint before it got its name. Weights pass through memory-mapped
files, so that neither a device nor the host holds the whole model while it is written. An adapter
is written, or merged, with its base loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.checkpoint import export_files, export_folder
from packhorse.trainer.checkpoint.export_folder import MODEL_FOLDER
from packhorse.trainer.checkpoint.manifest import Manifest
from packhorse.trainer.checkpoint.model_card import model_card
from packhorse.trainer.config.recipe import ModelSection, Recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.sharded_state import FROZEN, Shards, digest
from packhorse.trainer.model.attention import other_attention
from packhorse.trainer.model.load import (
    load_config,
    load_model,
    load_pretrained,
    load_tokenizer,
    model_class,
    persistent_buffers,
)
from packhorse.trainer.model.lora import (
    in_peft_form,
    is_of_adapter,
    merged_weights,
    why_merged_only,
)
from packhorse.trainer.model.quantisation import parts_of
from packhorse.trainer.utils import own_output
from packhorse.trainer.utils.files import apply_umask
from packhorse.trainer.utils.progress import show_bars_of_transformers, track


def save_description(model: Any, tokenizer: Any, section: ModelSection, run_dir: Path) -> None:
    """Write what an export needs beside the weights into the run folder, so that the model's source
    is not needed again.
    """
    folder = run_dir / MODEL_FOLDER
    # transformers 5 loads a head of its own whatever the configuration says, and ties by the outer
    # one of two configurations; 4.57 by the inner one
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = is_tied
    model.config.save_pretrained(folder)
    export_files.keep_files(section, model, folder)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export(
    run_dir: Path,
    out: Path,
    step: int | None = None,
    *,
    merge: bool = False,
    overwrite: bool = False,
    ema: bool = False,
) -> Path:
    """Write a checkpoint's model, or its adapter, to `out` in the recipe's dtype.

    Args:
        step: whose checkpoint to write; by default the newest whole one.
        merge: merge an adapter into its base, and write the whole model.
        overwrite: replace an earlier export at `out`.
        ema: write the moving averages of the trained weights.

    Raises:
        BadInput: there is no such checkpoint, no average, nothing to merge, or another base than
            the adapter's; or `out` may not be written (see own_output).
        RuntimeError: what was written does not load as what was saved.
    """
    recipe = export_folder.run_recipe(run_dir)
    if merge and not recipe.adapter:
        raise BadInput(
            f"--merge: {run_dir} has trained no adapter; leave it out to write the whole model"
        )
    if recipe.adapter and not merge and recipe.model.init == "random":
        raise BadInput(
            f"{run_dir}: the adapter's base has random weights, that no folder holds; add --merge"
        )
    show_bars_of_transformers()
    saved, manifest = export_folder.open_for_export(
        run_dir, recipe, out, step, overwrite=overwrite, ema=ema
    )
    export_folder.require_described(run_dir, recipe, manifest)
    step = manifest.state.step

    folder = own_output.stage(out)
    if recipe.adapter is None:
        weights = _trained_weights(recipe, saved, manifest)
        weights = track(weights, "reading the checkpoint", len(saved.names), "weights")
        # beside the export in its staging folder, which goes when the export is published
        mapped = _copy_to_files(weights, folder.with_name("weights"))
        write_folder(run_dir, recipe, folder, mapped)
        export_files.carry_over(recipe.model, run_dir / MODEL_FOLDER, folder)
        _load_and_compare(folder, mapped, recipe)
    elif merge:
        _write_merged(run_dir, recipe, saved, manifest, folder)
    else:
        _write_adapter(run_dir, recipe, saved, manifest, folder)
    is_adapter = recipe.adapter is not None and not merge
    card = model_card(run_dir, recipe, step, is_adapter)
    (folder / "README.md").write_text(card, encoding="utf-8")
    kind = ("adapter" if is_adapter else "model") + ", averaged (EMA)" * ema
    facts = {"kind": kind, "step": step, "run": run_dir.name}
    own_output.publish(out, facts, overwrite=overwrite)
    dist.log.info("exported step %d to %s", step, out)
    return out


def _trained_weights(
    recipe: Recipe, saved: Shards, manifest: Manifest
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights and buffers of a model that was trained whole, each in the type that it had
    in training. What was frozen comes from the base.
    """
    if frozen := {name for name, state in manifest.digests if state == FROZEN}:
        tokenizer = load_tokenizer(recipe.model)
        base = load_model(recipe.model, tokenizer, seed=recipe.train.seed)
        for name, parameter in base.named_parameters():
            if name in frozen:
                _require_as_trained(name, parameter, recipe, manifest)
                yield name, parameter.detach()
        del base
    trained = manifest.trained
    for name in saved.names:
        value = saved.whole(name)
        yield name, value.to(getattr(torch, recipe.model.dtype)) if name in trained else value


def _copy_to_files(
    weights: Iterable[tuple[str, torch.Tensor]], folder: Path
) -> dict[str, torch.Tensor]:
    """Return the weights by name, each in a file of its own."""
    folder.mkdir()
    return {
        name: copy_to_file(value, folder / str(number))
        for number, (name, value) in enumerate(weights)
    }


def copy_to_file(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """Return a copy of the tensor backed by the file `path`, which the host may page out."""
    flat = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return flat.view(tensor.shape).copy_(tensor.detach())


def write_folder(
    run_dir: Path, recipe: Recipe, folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    """Write a Hugging Face folder of these weights, described by the run's MODEL_FOLDER."""
    from transformers import AutoConfig, GenerationConfig

    source = run_dir / MODEL_FOLDER
    trust = recipe.model.trust_remote_code
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    # save_pretrained knows which weights are tied and how to shard the file; it needs a model for
    # that, but none with memory of its own
    with torch.device("meta"):
        model = model_class(config).from_config(
            config,
            dtype=getattr(torch, recipe.model.dtype),
            attn_implementation="eager",  # else the folder's own choice, which may be foreign code
            trust_remote_code=trust,
        )
    model.generation_config = GenerationConfig.from_pretrained(source)
    model.save_pretrained(folder, state_dict=dict(weights), max_shard_size="5GB")
    export_files.copy_files(source, folder, with_code=trust)
    export_files.suit_transformers_4(folder, trust)
    _write_tokenizer(source, recipe, folder)
    apply_umask(folder)


def _write_tokenizer(source: Path, recipe: Recipe, folder: Path) -> None:
    # the saved one has the recipe's template and added tokens already
    as_trained = recipe.model.model_copy(
        update={"name": str(source), "chat_template": None, "add_tokens": ()}
    )
    load_tokenizer(as_trained).save_pretrained(folder)
    export_files.clean_tokenizer(folder)


def _load_and_compare(folder: Path, weights: dict[str, torch.Tensor], recipe: Recipe) -> Any:
    """Load the folder as a user would, compare all weights and buffers bit by bit, and return the
    model.
    """
    from transformers import AutoConfig

    trust = recipe.model.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    loaded: Any = model_class(config).from_pretrained(
        folder,
        dtype=getattr(torch, recipe.model.dtype),
        trust_remote_code=trust,
        output_loading_info=True,
    )
    model, info = loaded
    if info["missing_keys"]:
        raise RuntimeError(
            f"{folder}: the export lacks weights: {', '.join(sorted(info['missing_keys'])[:5])}"
        )
    for name, tensor in chain(model.named_parameters(), persistent_buffers(model)):
        # a few that transformers computes with in fp32 were trained in the recipe's type
        if not torch.equal(tensor.detach(), weights[name].to(tensor.dtype)):
            raise RuntimeError(f"{folder}: `{name}` loads with other values than were trained")
    dist.log.info(
        "loaded it back and compared: all %d weights are bit by bit the trained ones in %s",
        len(weights),
        recipe.model.dtype,
    )
    return model


# ----------------------------------------------------------------------------------------- adapters

# The largest ||a - b|| / ||b|| of the logits of two models that must act alike. A forward in bf16
# is 0.016 off that of the same weights in fp32, and merged weights are rounded once more (0.03 in
# all on a tiny random model).
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}


def _write_merged(
    run_dir: Path, recipe: Recipe, saved: Shards, manifest: Manifest, folder: Path
) -> None:
    """Write the base with the adapter merged into it, load that and compare weights and logits."""
    model = _load_trained(recipe, saved, manifest)
    logits = _logits(model)
    parameters = {name for name, _ in model.named_parameters()}
    buffers = ((name, saved.whole(name)) for name in saved.names if name not in parameters)
    weights = track(chain(merged_weights(model), buffers), "merging the adapter", None, "weights")
    mapped = _copy_to_files(weights, folder.with_name("weights"))
    del model
    write_folder(run_dir, recipe, folder, mapped)
    export_files.carry_over(recipe.model, run_dir / MODEL_FOLDER, folder)
    loaded = _load_and_compare(folder, mapped, recipe)
    _require_alike(_logits(loaded.to(dist.device())), logits, recipe, folder)


def _write_adapter(
    run_dir: Path, recipe: Recipe, saved: Shards, manifest: Manifest, folder: Path
) -> None:
    """Write the adapter as peft does, load it onto its base and compare tensors and logits.

    The adapter's matrices are written as their fp32 master weights; modules that are trained whole
    are written in the model's dtype.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    assert recipe.adapter
    section, dtype = recipe.model, getattr(torch, recipe.model.dtype)
    model = _load_trained(recipe, saved, manifest)
    if why := why_merged_only(model):
        raise BadInput(f"adapter: it can be exported with --merge only, as {why}")
    logits = _logits(model)
    trained = {name: saved.whole(name) for name in saved.names}
    trained = {
        name: tensor.to(dtype) if name in manifest.trained and not is_of_adapter(name) else tensor
        for name, tensor in trained.items()
    }
    config, tensors = in_peft_form(model, recipe.adapter, trained, section.name, section.revision)
    del model
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(run_dir / MODEL_FOLDER, recipe, folder)
    apply_umask(folder)

    base_config = load_config(section)
    base = load_pretrained(
        model_class(base_config).from_pretrained, section, "model", config=base_config, dtype=dtype
    )
    loaded: Any = PeftModel.from_pretrained(base, str(folder))
    again = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    differ = [
        name
        for name in tensors
        if name not in again or not torch.equal(again[name].cpu(), tensors[name])
    ]
    if differ:
        raise RuntimeError(f"{folder}: `{differ[0]}` loads with other values than were trained")
    dist.log.info(
        "loaded it back and compared: all %d tensors of the adapter are bit by bit the trained "
        "ones",
        len(tensors),
    )
    # Trained on a 4-bit base it acts alike on that one, and on the base loaded here only nearly.
    if recipe.adapter.base is None:
        _require_alike(_logits(loaded.to(dist.device())), logits, recipe, folder)


@torch.no_grad()
def _load_trained(recipe: Recipe, saved: Shards, manifest: Manifest) -> Any:
    """Load the base with the trained adapter in it: the adapter in fp32, the rest in the model's
    dtype, as peft's users have them.

    Raises:
        BadInput: the base is not bit by bit the one that the adapter was trained on.
    """
    assert recipe.adapter
    tokenizer = load_tokenizer(recipe.model)
    adapter = recipe.adapter.model_copy(update={"init_from": None})  # it may be gone by now
    model = load_model(recipe.model, tokenizer, seed=recipe.train.seed, adapter=adapter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = saved.whole(name).to(parameter.device)
            parameter.data = value if is_of_adapter(name) else value.to(parameter.dtype)
            continue
        _require_as_trained(name, parameter, recipe, manifest)
    return model.eval()


def _require_as_trained(
    name: str, parameter: torch.nn.Parameter, recipe: Recipe, manifest: Manifest
) -> None:
    """Raise BadInput if a frozen parameter of the base is not bit by bit the run's."""
    for part, tensor in parts_of(name, parameter):
        if digest(tensor) != manifest.digests.get((part, FROZEN)):
            raise BadInput(
                f"model.name: `{part}` of {recipe.model.name} has other values here than the run "
                "was trained on; put the old model back, or export on the kind of device that "
                "trained it"
            )


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Return the logits of 32 tokens drawn at random, (32, V) float32."""
    vocabulary = model.config.get_text_config().vocab_size
    # drawn on the CPU, so that both models get the same tokens on any device
    ids = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))
    # plain attention: the training kernels need packed sequences, and this compares weights
    with other_attention(model, "eager"):
        return model.eval()(input_ids=ids.to(dist.device()), use_cache=False).logits[0].float()


def _require_alike(
    loaded: torch.Tensor, trained: torch.Tensor, recipe: Recipe, folder: Path
) -> None:
    difference = float((loaded - trained).norm() / trained.norm())
    dist.log.info(
        "logits of the loaded export differ from the trained model's by %.1e of their size",
        difference,
    )
    # written so that a NaN fails
    if not difference <= TOLERANCE[recipe.model.dtype]:
        raise RuntimeError(
            f"{folder}: its logits differ from the trained model's by {difference:.1e} of their "
            f"size; {TOLERANCE[recipe.model.dtype]:g} is allowed"
        )
