"""Know the keys of other trainers: TRL (with transformers and peft), Axolotl, LLaMA-Factory and
torchtitan.

A key of theirs enters; a sentence with ours leaves. The messages about unknown keys and `packhorse
convert` read the same tables, and a test holds them against docs/migration.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Their key -> ours, which takes the same value. `[]` stands for an item of a list. A key with a dot
# is answered in that section alone.
SAME_VALUE = {
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "model_name": "model.name",
    "model_id": "model.name",
    "model.hf_assets_path": "model.name",
    "model_revision": "model.revision",
    "chat_template_path": "model.chat_template",
    "chat_template_jinja": "model.chat_template",
    "tokens": "model.add_tokens",
    "add_special_tokens": "model.add_tokens",
    "train_dataset": "data.train",
    "test_datasets": "data.eval",
    "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
    "file_name": "data.train[].path",
    "hf_hub_url": "data.train[].name",
    "max_samples": "data.train[].rows",
    "dataset_num_proc": "data.workers",
    "preprocessing_num_workers": "data.workers",
    "dataset_prepared_path": "data.cache",
    "tokenized_path": "data.cache",
    "sequence_len": "batch.seq_len",
    "cutoff_len": "batch.seq_len",
    "max_seq_length": "batch.seq_len",
    "max_seq_len": "batch.seq_len",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "local_batch_size": "batch.micro_batch_size",
    "train_batch_size": "batch.global_batch_size",
    "context_parallel_size": "parallel.sequence",
    "context_parallel_degree": "parallel.sequence",
    "neftune_noise_alpha": "loss.neftune_alpha",
    "moe_aux_loss_coef": "loss.router_aux",
    "learning_rate": "optim.lr",
    "adam_epsilon": "optim.eps",
    "cosine_min_lr_ratio": "optim.min_lr_ratio",
    "min_lr_factor": "optim.min_lr_ratio",
    "gradient_clipping": "optim.max_grad_norm",
    "max_norm": "optim.max_grad_norm",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "data_seed": "train.seed",
    "full_determinism": "train.deterministic",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_modules_to_save": "adapter.modules_to_save",
    "lora_target_parameters": "adapter.target_parameters",
    "peft_trainable_token_indices": "adapter.trainable_token_indices",
    "additional_target": "adapter.modules_to_save",
    "eval_steps": "eval.every_steps",
    "validation.freq": "eval.every_steps",
    "save_steps": "checkpoint.every_steps",
    "checkpoint.interval": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "keep_latest_k": "checkpoint.keep",
    "output_dir": "run.dir",
    "dump_folder": "run.dir",
    "logging_steps": "run.log_every",
    "metrics.log_freq": "run.log_every",
    "train_timeout_seconds": "guard.hang_timeout_s",
}

_DTYPES = {name: name for name in ("bfloat16", "float32")} | {"bf16": "bfloat16", "fp32": "float32"}
_KERNELS = {
    "auto": "auto",
    "flash_attention_2": "flash_attn",
    "fa2": "flash_attn",
    "sdpa": "torch_varlen",
    "eager": "reference",
    "disabled": "reference",
}
_SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}

# Their key -> ours, and what their values are called here.
OTHER_VALUES: dict[str, tuple[str, dict[Any, Any]]] = {
    "train_from_scratch": ("model.init", {True: "random", False: "pretrained"}),
    "initial_load_in_hf": ("model.init", {False: "random", True: "pretrained"}),
    "bf16": (
        "model.dtype",
        {True: "bfloat16", "auto": "bfloat16", "full": "bfloat16", False: "float32"},
    ),
    "torch_dtype": ("model.dtype", {**_DTYPES, "auto": "bfloat16"}),
    "dtype": ("model.dtype", {**_DTYPES, "auto": "bfloat16"}),
    "mixed_precision_param": ("model.dtype", _DTYPES),
    "mixed_precision_reduce": ("parallel.grad_dtype", _DTYPES),
    "attn_implementation": ("model.attention", _KERNELS),
    "flash_attn": ("model.attention", _KERNELS),
    "flash_attention": ("model.attention", {True: "flash_attn", False: "auto"}),
    "use_liger_kernel": ("model.layer_kernels", {True: "liger", False: "torch"}),
    "enable_liger_kernel": ("model.layer_kernels", {True: "liger", False: "torch"}),
    "gradient_checkpointing": (
        "model.activation_checkpointing",
        {True: "full", False: "none", "true": "full", "unsloth": "full"},
    ),
    "disable_gradient_checkpointing": (
        "model.activation_checkpointing",
        {True: "none", False: "full"},
    ),
    "activation_checkpoint.mode": (
        "model.activation_checkpointing",
        {"full": "full", "selective": "selective", "none": "none"},
    ),
    "dataset_exact_deduplication": ("data.duplicates", {True: "drop", False: "keep"}),
    "excess_length_strategy": ("data.too_long", {"drop": "reject", "truncate": "truncate"}),
    "truncation_mode": ("data.too_long", {"keep_start": "truncate"}),
    "packing_strategy": ("data.packing", {name: name for name in ("bfd", "bfd_split", "wrapped")}),
    "sample_packing": ("data.packing", {True: "bfd", False: "none"}),
    "neat_packing": ("data.packing", {True: "bfd", False: "none"}),
    "sample_packing_sequentially": ("data.packing", {True: "greedy"}),
    "assistant_only_loss": ("data.train_on", {True: "assistant", False: "all"}),
    "completion_only_loss": ("data.train_on", {True: "completion", False: "all"}),
    "train_on_inputs": ("data.train_on", {False: "assistant", True: "all"}),
    "train_on_prompt": ("data.train_on", {False: "assistant", True: "all"}),
    "mask_history": ("data.train_on", {True: "completion", False: "assistant"}),
    "train_on_eos": ("data.train_on_eot", {"turn": True, "all": True, "none": False}),
    "lr_scheduler_type": ("optim.lr_schedule", _SCHEDULES),
    "lr_scheduler": ("optim.lr_schedule", _SCHEDULES),
    "lr_scheduler.decay_type": ("optim.lr_schedule", _SCHEDULES),
    "use_muon": ("optim.kind", {True: "muon"}),
    "lora_target_modules": ("adapter.target_modules", {"all-linear": "all-linear"}),
    "lora_target": ("adapter.target_modules", {"all": "all-linear"}),
    "lora_target_linear": ("adapter.target_modules", {True: "all-linear"}),
    "load_in_4bit": ("adapter.base", {True: "nf4"}),
    "quantization_bit": ("adapter.base", {4: "nf4"}),
    "double_quantization": ("adapter.base", {True: "nf4_double_quant"}),
    "use_bnb_nested_quant": ("adapter.base", {True: "nf4_double_quant"}),
    "use_rslora": ("adapter.variants", {True: ["rslora"], False: []}),
    "peft_use_rslora": ("adapter.variants", {True: ["rslora"], False: []}),
    "use_dora": ("adapter.variants", {True: ["dora"], False: []}),
    "peft_use_dora": ("adapter.variants", {True: ["dora"], False: []}),
    "async_mode": ("checkpoint.asynchronous", {"async": True, "disabled": False}),
}

_BETAS = "an item of `optim.betas: [beta1, beta2]`"
_SOURCE = "an item of `data.train`: `path: FILE_OR_FOLDER`, or `name: HUB_NAME`"
_EVAL_SOURCE = "an item of `data.eval`: `path: FILE_OR_FOLDER`, or `name: HUB_NAME`"
_COLUMNS = "a name in `data.train[].columns`"
_WARMUP = "`optim.warmup_ratio`, a share of all steps"
_PROFILE = "`run.profile_steps: [first, last]`"
_TEMPLATE = "a DeepSpeed template: `parallel.deepspeed: zero3`, or `zero3_offload_all`"
_ADAPTER = "the section `adapter`, with `adapter.rank`; without it all weights are trained"
_TRACKER = "`run.trackers`, with `run.project`, `run.name`, `run.group` and `run.tags`"
_HUB = "`run.push_to_hub: ORG/NAME`, which pushes the model when the run is done"

# What follows "`KEY` is " where the value must be thought about.
SENTENCES = {
    "max_length": "`batch.seq_len`, the length of a packed sequence, or `data.max_length`, that of "
    "an example",
    "batch_size": "`batch.global_batch_size`, over all GPUs, or `batch.micro_batch_size`, on one",
    "gradient_accumulation_steps": "left out: it follows from `batch.global_batch_size`, the "
    "packed sequences of a step over all GPUs",
    "per_device_eval_batch_size": "left out: evaluation uses `batch.micro_batch_size`",
    "auto_find_batch_size": "left out: `packhorse plan` says which `batch.micro_batch_size` fits",
    "packing": "`data.packing: bfd`; `none` for one example a sequence",
    "padding_free": "always on: nothing is ever padded; leave it out",
    "pad_to_sequence_len": "left out: nothing is ever padded",
    "group_by_length": "left out: packing (`data.packing`) takes its place",
    "model_init_kwargs": "`model.revision` and `model.attention`",
    "template": "`model.chat_template`: a Jinja file; the tokenizer's own by default",
    "enable_thinking": "a variable: `data.chat_template_kwargs: {enable_thinking: false}`",
    "model.flavor": "a part of `model.name`: a Hugging Face folder or hub name",
    "fp16": "not supported: `model.dtype: bfloat16`, or `float32`",
    "load_in_8bit": "`adapter.base: int8`",
    "adapter_name_or_path": "`adapter.init_from`: the folder of an adapter",
    "lora_model_dir": "`adapter.init_from`: the folder of an adapter",
    "finetuning_type": _ADAPTER,
    "use_peft": _ADAPTER,
    **dict.fromkeys(("lora", "peft", "peft_config", "lora_config"), _ADAPTER),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "dataset_path"), _SOURCE),
    **dict.fromkeys(("data_path", "train_file", "data_files"), _SOURCE),
    **dict.fromkeys(("eval_dataset", "validation_file", "validation.dataset_path"), _EVAL_SOURCE),
    "dataset_text_field": "a name in `data.train[].columns: {text: COLUMN}`",
    "field_messages": "a name in `data.train[].columns: {messages: COLUMN}`",
    "field_instruction": _COLUMNS,
    "type": "`data.train[].format`, or a `data.train[].function` of yours",
    "formatting": "`data.train[].format`: `alpaca` is `instruction`",
    "interleave_probs": "`data.train[].weight`, passes over a source in an epoch",
    "message_field_training": "`weight: 0` on a message, in the data",
    **dict.fromkeys(
        ("eos_token", "eot_tokens"), "`data.stop_token`, where the chat template writes none"
    ),
    "roles_to_train": "`data.train_on`: assistant, completion, last_turn or all",
    "optimizer": "`optim.kind`: adamw, adamw_8bit, muon, lion, adafactor or sgd",
    "optim": "`optim.kind`: adamw, adamw_8bit, muon, lion, adafactor or sgd",
    **dict.fromkeys(("adam_beta1", "adam_beta2", "beta1", "beta2"), _BETAS),
    "embedding_lr": "`optim.groups: [{match: embed_tokens, lr: RATE}]`",
    "unfrozen_parameters": "the reverse of `model.freeze`, which names what is not trained",
    "warmup_steps": _WARMUP,
    "lr_scheduler_kwargs": "`optim.min_lr_ratio`, the last learning rate as a share of `optim.lr`",
    "min_lr": "`optim.min_lr_ratio`, the last learning rate as a share of `optim.lr`",
    "decay_ratio": "`optim.wsd_decay`, with `optim.lr_schedule: wsd`",
    "data_parallel_shard_degree": "left out: ZeRO-3 shards over all ranks (`parallel.deepspeed`)",
    **dict.fromkeys(("fsdp", "fsdp_config", "enable_cpu_offload", "zero_stage"), _TEMPLATE),
    "eval_strategy": "`eval.every_steps`; null: only at the start and the end",
    "evaluation_strategy": "`eval.every_steps`; null: only at the start and the end",
    "evals_per_epoch": "`eval.every_steps`, in steps",
    "save_strategy": "`checkpoint.every_steps`; null: only the last step saves",
    "saves_per_epoch": "`checkpoint.every_steps`, in steps",
    "resume_from_checkpoint": "left out: the same command resumes from the last checkpoint",
    "load_best_model_at_end": "`eval.best`, and `packhorse export --best`",
    "metric_for_best_model": "`eval.best.metric`",
    "early_stopping_patience": "`eval.early_stopping: {metric: eval_loss, patience: N}`",
    "generate_samples": "`eval.generate`, whose answers are scored",
    "loss_watchdog_threshold": "`guard.spike_factor`, relative to recent losses",
    **dict.fromkeys(("profiler_steps", "profiler_steps_start"), _PROFILE),
    **dict.fromkeys(("profile_freq", "profiler_active"), _PROFILE),
    "overwrite_output_dir": "left out: nothing is overwritten; give another `run.dir`",
    **dict.fromkeys(
        ("report_to", "wandb_project", "wandb_name", "wandb_run_id", "run_name"), _TRACKER
    ),
    **dict.fromkeys(("push_to_hub", "hub_model_id"), _HUB),
    **dict.fromkeys(("torch_compile", "compile.enable"), "`model.compile: layers`"),
}


def answer(names: Iterable[str]) -> str | None:
    """Return a sentence about a key of another trainer, or None if no table has it.

    Args:
        names: the parts of the dotted key as it stands in the recipe, without numbers of items.
    """
    dotted = ".".join(names)
    for key in (dotted, dotted.rpartition(".")[2]):
        if key in SENTENCES:
            return f"`{dotted}` is {SENTENCES[key]}"
        if key in SAME_VALUE:
            return f"`{dotted}` is `{SAME_VALUE[key]}` here"
        if key in OTHER_VALUES:
            ours, values = OTHER_VALUES[key]
            words = ", ".join(dict.fromkeys(map(_word, values.values())))
            return f"`{dotted}` is `{ours}` here ({words})"
    return None


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")
