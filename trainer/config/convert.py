"""Translate a configuration of TRL, Axolotl or LLaMA-Factory into a recipe.

A tree of theirs enters; a tree of ours leaves, with a note for each value that has no place in it
or that changed its meaning. Keys are looked up in foreign_keys.py; what needs more than one key is
here, and in convert_sources.py. Defaults of theirs that differ from ours are written down.
"""

from __future__ import annotations

import re
from typing import Any

from packhorse.trainer.config import foreign_keys
from packhorse.trainer.config.convert_sources import Draft, read_sources
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.text import error_line

# Keys that both have, by their places here.
_SAME_NAMES = {
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "warmup_ratio": "optim.warmup_ratio",
    "seed": "train.seed",
    "target_modules": "adapter.target_modules",
    "modules_to_save": "adapter.modules_to_save",
    "trust_remote_code": "model.trust_remote_code",
    "chat_template_kwargs": "data.chat_template_kwargs",
}
_HF = {  # of transformers' TrainingArguments, in TRL and LLaMA-Factory
    "batch.micro_batch_size": 8,
    "data.packing": "none",
    "data.too_long": "truncate",
    "optim.lr_schedule": "linear",
    "train.epochs": 3,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "TRL": {**_HF, "batch.seq_len": 1024, "data.train_on": "all", "optim.lr": 2e-5},
    "Axolotl": {"data.packing": "none", "optim.lr_schedule": "cosine"},
    "LLaMA-Factory": {**_HF, "batch.seq_len": 2048, "optim.lr": 5e-5},
}
_ALL = {
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.0,
    "optim.warmup_ratio": 0.0,
    "optim.min_lr_ratio": 0.0,
    "train.seed": 42,
}
_ADAPTERS = {  # rank, alpha, dropout
    "TRL": {"rank": 16, "alpha": 32, "dropout": 0.05},
    "Axolotl": {},
    "LLaMA-Factory": {"rank": 8},
}


def recognise(tree: Any) -> str:
    """Return whose configuration it is: TRL, Axolotl or LLaMA-Factory.

    Raises:
        BadInput: it is none of them.
    """
    keys = set(tree) if isinstance(tree, dict) else set()
    if "base_model" in keys:
        return "Axolotl"
    if "model_name_or_path" in keys:
        is_factory = keys & {"stage", "finetuning_type", "template", "cutoff_len", "dataset"}
        return "LLaMA-Factory" if is_factory else "TRL"
    raise BadInput(
        "it is no configuration of Axolotl (base_model), LLaMA-Factory (model_name_or_path, stage) "
        "or TRL (model_name_or_path)"
    )


def convert(tree: dict[str, Any], trainer: str, gpus: int) -> tuple[dict[str, Any], list[str]]:
    """Return the tree of a recipe, and notes on what it does not hold or holds otherwise.

    Args:
        trainer: as `recognise` returned it.
        gpus: that the configuration was made for; the global batch depends on them there.

    Raises:
        BadInput: a value is of another type than the trainer documents.
    """
    draft = Draft(tree, trainer)
    steps = (_adapter, _batch, _packing, _optimizer, _duration, _evaluation, _templates, _by_tables)
    try:
        for step in (read_sources, *steps):
            step(draft)
        _fill_defaults(draft, gpus)
    except BadInput:
        raise
    except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as error:
        raise BadInput(
            f"a value is not of the type that {trainer} gives it ({error_line(error, 200)})"
        ) from error
    for key, value in draft.left.items():
        if value not in (None, False, "", [], {}):
            said = foreign_keys.answer([key]) or ""
            draft.note(key, value, said.removeprefix(f"`{key}` is "))
    return draft.recipe, draft.notes


def _by_tables(draft: Draft) -> None:
    """Carry over every key that stands for one of ours."""
    tables = {**foreign_keys.SAME_VALUE, **_SAME_NAMES}
    # what is switched on comes last, and counts: several of their switches may share one key here
    for key in sorted(draft.left, key=lambda key: draft.left[key] is True):
        value = draft.left[key]
        ours, values = foreign_keys.OTHER_VALUES.get(key, (tables.get(key, "[]"), None))
        # a key of an adapter makes none where all weights are trained
        if "[]" in ours or (ours.startswith("adapter.") and "adapter" not in draft.recipe):
            continue
        if values is None and value is not None:
            draft.put(ours, _number(draft.take(key)))
        elif values and isinstance(value, str | int | bool) and value in values:
            draft.take(key)
            more = (draft.get(ours) or []) if ours == "adapter.variants" else None
            draft.put(ours, values[value] if more is None else [*more, *values[value]])


def _number(value: Any) -> Any:
    """Return the number that YAML reads as a text: 1e-4 has no dot."""
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_number else value


# ----------------------------------------------------------------------------------- several keys


def _adapter(draft: Draft) -> None:
    kind = draft.take("adapter", "finetuning_type")
    peft = draft.take("use_peft")
    if kind not in (None, "lora", "qlora", "full"):
        draft.note("finetuning_type", kind, "only LoRA, QLoRA and all weights are trained")
    if not (peft or kind in ("lora", "qlora")):
        for key in [*draft.left]:
            if key.startswith("lora_") or key in ("use_rslora", "use_dora"):
                draft.take(key)
        return
    draft.recipe["adapter"] = dict(_ADAPTERS[draft.trainer])
    if kind == "qlora":
        draft.put("adapter.base", "nf4")
    modules = draft.left.get("lora_target_modules", draft.left.get("lora_target"))
    if isinstance(modules, str) and modules not in ("all", "all-linear"):
        modules = [name.strip() for name in modules.split(",")]
    if isinstance(modules, list):
        draft.take("lora_target_modules", "lora_target")
        draft.put("adapter.target_modules", modules)
    additional = draft.take("additional_target")
    if additional:
        names = additional.split(",") if isinstance(additional, str) else additional
        draft.put("adapter.modules_to_save", names)
    draft.take("lora_task_type")


def _batch(draft: Draft) -> None:
    micro = draft.take("micro_batch_size", "per_device_train_batch_size")
    if micro is not None:
        draft.put("batch.micro_batch_size", micro)
    draft.put("batch.global_batch_size", draft.take("gradient_accumulation_steps") or 1)
    length = draft.take("max_length")
    if length is not None:
        draft.put("batch.seq_len", length)


def _packing(draft: Draft) -> None:
    packing = draft.take("packing")
    if packing is not None:
        draft.put("data.packing", "bfd" if packing is True else "none")
        if packing is not True:
            draft.take("packing_strategy")


_EIGHT_BITS = ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit")
_OPTIMIZERS = {
    **dict.fromkeys(_EIGHT_BITS, "adamw_8bit"),
    **dict.fromkeys(("lion", "lion_32bit", "lion_pytorch"), "lion"),
    **{name: name for name in ("adafactor", "sgd", "muon")},
}


def _optimizer(draft: Draft) -> None:
    name = draft.take("optimizer", "optim")
    if kind := _OPTIMIZERS.get(str(name)):
        draft.put("optim.kind", kind)
    elif name and not re.fullmatch(r"adamw(_torch(_fused)?|_hf|_apex_fused)?", str(name)):
        draft.note("optimizer", name, "it is AdamW here; see optim.kind for others")
    betas = [draft.take("adam_beta1"), draft.take("adam_beta2")]
    if betas != [None, None]:
        first, second = betas
        draft.put("optim.betas", [0.9 if first is None else first, second or 0.999])
    arguments = draft.take("lr_scheduler_kwargs")
    if isinstance(arguments, dict) and "min_lr_rate" in arguments:
        draft.put("optim.min_lr_ratio", arguments.pop("min_lr_rate"))
    if arguments:
        draft.note("lr_scheduler_kwargs", arguments)
    steps, most = draft.take("warmup_steps"), draft.left.get("max_steps")
    if steps:
        share = steps if steps < 1 else steps / most if most and most > 0 else None
        if share is None:
            draft.note("warmup_steps", steps, "give its share of all steps: optim.warmup_ratio")
        else:
            draft.put("optim.warmup_ratio", round(share, 6))


def _duration(draft: Draft) -> None:
    if (draft.left.get("max_steps") or 0) < 1:  # -1: by epochs
        draft.take("max_steps")
    epochs = draft.take("num_train_epochs", "num_epochs")
    if epochs is not None:
        whole = max(1, round(float(epochs)))
        draft.put("train.epochs", whole)
        if whole != float(epochs):
            draft.note("num_epochs", epochs, f"train.epochs is {whole}; give train.steps for parts")


def _evaluation(draft: Draft) -> None:
    for what, ours in (("eval", "eval.every_steps"), ("save", "checkpoint.every_steps")):
        strategy = draft.take(f"{what}_strategy", "evaluation_strategy" if what == "eval" else "")
        steps = draft.take(f"{what}_steps")
        if isinstance(steps, int) and strategy not in ("no", "epoch", False):
            draft.put(ours, steps)
        elif strategy == "epoch":
            draft.note(f"{what}_strategy", strategy, f"give the steps of an epoch in {ours}")
        elif steps is not None and strategy not in ("no", False):
            draft.note(f"{what}_steps", steps, f"{ours} is a number of steps")


def _templates(draft: Draft) -> None:
    template = draft.take("chat_template")
    if template == "chatml" or (isinstance(template, str) and template.endswith(".jinja")):
        draft.put("model.chat_template", template)
    elif template not in (None, "jinja", "tokenizer_default"):
        draft.note("chat_template", template, "the tokenizer's own is used")
    thinking = draft.take("enable_thinking")
    if thinking is not None:
        draft.put("data.chat_template_kwargs", {"enable_thinking": thinking})
    config = draft.take("deepspeed")
    stage = re.search(r"(?:zero|z|stage)_?-?([0-3])", str(config), re.IGNORECASE)
    if stage:
        offload = "offload" in str(config) or "cpu" in str(config)
        name = f"zero{stage[1]}" + ("_offload_all" if offload and stage[1] == "3" else "")
        draft.put("parallel.deepspeed", name)
        draft.note("deepspeed", config, f"a packaged template, {name}")
    elif config:
        draft.note("deepspeed", config, "zero3, or another packaged template")


# -------------------------------------------------------------------------------------- defaults


def _fill_defaults(draft: Draft, gpus: int) -> None:
    """Write down their defaults where ours differ, and what depends on several values."""
    for ours, value in {**_ALL, **_DEFAULTS[draft.trainer]}.items():
        if draft.get(ours) is None:
            draft.put(ours, value)
    micro, steps = draft.get("batch.micro_batch_size") or 1, draft.get("batch.global_batch_size")
    if not (isinstance(micro, int) and isinstance(steps, int)):  # a text would be repeated
        raise TypeError(f"sizes of batches are {micro!r} and {steps!r}")
    draft.put("batch.global_batch_size", micro * steps * gpus)
    draft.notes.insert(
        0,
        f"batch.global_batch_size is {micro} x {steps} accumulated x {gpus} GPUs "
        f"= {micro * steps * gpus}: give --gpus, or set it, if there were others",
    )
    if (adapter := draft.recipe.get("adapter")) is not None:
        adapter.setdefault("alpha", 2 * adapter.get("rank", 16))
        if draft.get("parallel.deepspeed") is None:
            draft.put("parallel.deepspeed", "zero2")
    model = draft.recipe.get("model", {}).get("name", "model")
    if draft.get("run.dir") is None:
        draft.put("run.dir", f"runs/{str(model).rstrip('/').rpartition('/')[2]}")
