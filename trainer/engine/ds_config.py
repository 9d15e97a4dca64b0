"""Fill a DeepSpeed template with the recipe's settings, so that each setting has one owner.

In: a packaged template or a user's own, and the recipe's sections. Out: a configuration for
`deepspeed.initialize`, and questions about it. DeepSpeed itself is not imported here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packhorse.trainer import dist
from packhorse.trainer.config.packaged import find_template
from packhorse.trainer.config.recipe import ModelSection, OptimSection, ParallelSection
from packhorse.trainer.datatypes import BadInput

# The recipe owns these; a template that sets one of them would be a second owner.
_OWNED_BY_RECIPE = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "parallel.grad_dtype",
    "communication_data_type": "parallel.grad_dtype",
    "elasticity": "batch",
}

# ZeRO++ rounds the weights that ranks gather or hold, and the gradients that they sum, in blocks
# that depend on the number of ranks; ZenFlow applies most gradients later.
_CHANGES_LEARNING = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "zenflow",
)

# A template's section for us: {"optimizer_state": "streamed"}.
OWN_SECTION = "packhorse"

# Gradients of a bucket, at least. Smaller buckets cost more calls, larger ones do not fit into a
# CPU's cache. Two cores, SmolLM2-135M, ZeRO-3: 250 tokens/s with 576^2, 300 with 2^22; ZeRO-2: 400
# with 576^2, 515 with 2^22, 450 with 5 x 10^7.
BUCKET = 2**22


def deepspeed_config(
    parallel: ParallelSection,
    model: ModelSection,
    optim: OptimSection,
    hidden_size: int,
    run_dir: Path,
    *,
    learns: bool = True,
) -> dict[str, Any]:
    """Return the template with the recipe's settings, and a folder on NVMe for this run alone.

    Args:
        learns: False passes over the optimizer, as none is built.

    Raises:
        BadInput: the template is missing, is not JSON, sets what the recipe owns, or cannot train
            the model in its type or on these ranks.
    """
    config = _read_template(parallel.deepspeed)
    _set_sizes(config.setdefault("zero_optimization", {"stage": 0}), hidden_size)
    require_whole_groups(config, dist.world_size(), dist.local_world_size())
    for offload in nvme_offloads(config):
        # two runs on one node must not write to each other's files
        digest = hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=6).hexdigest()
        offload["nvme_path"] = str(Path(offload["nvme_path"]) / f"packhorse-{digest}")
    if learns:
        _require_offload(parallel.deepspeed, config, optim)
        _require_streaming(parallel.deepspeed, config, optim)
    bf16 = model.dtype == "bfloat16"
    if bf16 and stage_of(config) == 0:
        raise BadInput(
            f"{parallel.deepspeed}: ZeRO stage 0 keeps no fp32 master weights for bfloat16; "
            "set parallel.deepspeed=zero1, or model.dtype=float32"
        )
    grad_dtype = "fp32" if parallel.grad_dtype == "float32" or not bf16 else "bf16"
    config |= {
        # the plan cuts micro-batches; engine.py tells DeepSpeed which one is a step's last
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # At stage 1 a gradient is added to the fp32 sum as soon as it is made, and freed: a third
        # less memory for gradients. The sums are the same, bit by bit.
        "bf16": {"enabled": bf16, "immediate_grad_update": True},
        # it would wait for the device before each forward and in each step
        "timers": {"throughput": {"enabled": False}},
        # DeepSpeed's default for bf16 is to sum in bf16; the result would then depend on how a
        # batch is cut into micro-batches and ranks
        "data_types": {"grad_accum_dtype": grad_dtype},
        "communication_data_type": grad_dtype,
        # DeepSpeed then refuses torch's optimizer where it is offloaded, which would be slow
        "zero_force_ds_cpu_optimizer": True,
        "steps_per_print": 10**12,
        # at stage 0 clipping.py clips; DeepSpeed's default would clip once more, to 1
        "gradient_clipping": optim.max_grad_norm if stage_of(config) > 0 else 0.0,
    }
    return config


def _set_sizes(zero: dict[str, Any], hidden_size: int) -> None:
    """Put numbers in place of `"auto"`, by the model's hidden size H, as in DeepSpeed's guide.

    Buckets are of H^2 (or BUCKET, if that is more), prefetch of 0.9 H^2, and parameters below 10 H
    kept whole. A prefetch of a `"layer"` is 13 H^2, the weights of a dense decoder layer.
    """
    sizes = {
        "reduce_bucket_size": max(hidden_size**2, BUCKET),
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero |= {key: size for key, size in sizes.items() if zero.get(key) == "auto"}
    if zero.get("stage3_prefetch_bucket_size") == "layer":
        zero["stage3_prefetch_bucket_size"] = 13 * hidden_size**2


def _require_offload(template: str, config: Mapping[str, Any], optim: OptimSection) -> None:
    """Refuse an offloaded optimizer that cannot work."""
    # the part on the GPU would get an optimizer of DeepSpeed's own, whose learning rate never moves
    # and whose moments no checkpoint finds
    if _offload(config, "optimizer").get("ratio", 1.0) != 1.0:
        raise BadInput(
            f"{template}: offload_optimizer.ratio: an optimizer must be offloaded whole; "
            "remove the key"
        )
    if offload_device(config, "optimizer") == "none":
        return
    if optim.rule != "adamw":
        raise BadInput(
            f"{template}: offload_optimizer: only AdamW has a kernel for the CPU; set "
            f"{_plain_adamw(optim)}, or a template that keeps {optim.rule}'s states on the GPU"
        )
    if optim.ema_decay is not None:
        raise BadInput(
            f"{template}: offload_optimizer: the average of the weights is not offloaded; remove "
            "optim.ema_decay, or take a template that keeps the optimizer on the GPU"
        )


def _require_streaming(template: str, config: Mapping[str, Any], optim: OptimSection) -> None:
    """Refuse an optimizer that cannot be streamed, or a section with something else in it."""
    if OWN_SECTION not in config:
        return
    if config[OWN_SECTION] != {"optimizer_state": "streamed"}:
        raise BadInput(
            f'{template}: {OWN_SECTION}: it may hold {{"optimizer_state": "streamed"}} alone'
        )
    reasons = {
        "at ZeRO stage 0 the weights are the master weights; set a stage from 1 to 3": (
            stage_of(config) == 0
        ),
        f"only AdamW updates by chunks, and this is {optim.rule}; set {_plain_adamw(optim)}": (
            optim.rule != "adamw"
        ),
        "the average of the weights is not streamed; remove optim.ema_decay": (
            optim.ema_decay is not None
        ),
        "it needs weights on the GPU; remove offload_optimizer and offload_param": any(
            offload_device(config, what) != "none" for what in ("optimizer", "param")
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise BadInput(f"{template}: {OWN_SECTION}.optimizer_state: {reason}")


def _plain_adamw(optim: OptimSection) -> str:
    """Return the override that makes the optimizer AdamW in fp32."""
    return "optim.kind=adamw" if optim.kind != "adamw" else "optim.state_dtype=fp32"


def _read_template(template: str) -> dict[str, Any]:
    path = find_template(template)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise BadInput(f"{path}: a template and its zero_optimization are JSON objects")
    for key, owner in _OWNED_BY_RECIPE.items():
        if key in config:
            raise BadInput(
                f"{template}: `{key}` belongs to the recipe's `{owner}`; remove it there"
            )
    for key in _CHANGES_LEARNING:
        if config.get("zero_optimization", {}).get(key):
            raise BadInput(
                f"{template}: zero_optimization.{key}: it rounds or delays weights or gradients, "
                "so that another template or number of GPUs would learn something else; remove it"
            )
    return config


def stage_of(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage, 0 to 3."""
    return int(config["zero_optimization"].get("stage", 0))


def streams_optimizer(config: Mapping[str, Any]) -> bool:
    """Return whether the optimizer's state lies on the host and is updated on the GPU."""
    return OWN_SECTION in config


def for_deepspeed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without the section that only we read."""
    return {key: value for key, value in config.items() if key != OWN_SECTION}


def count_sharing(config: Mapping[str, Any], world: int) -> int:
    """Return how many ranks share a second copy of the weights (hpZ), or 1."""
    return min(int(config["zero_optimization"].get("zero_hpz_partition_size", 1)), world)


def require_whole_groups(config: Mapping[str, Any], world: int, per_node: int) -> None:
    """Refuse groups of hpZ that are not all of one size, or that span nodes."""
    size = count_sharing(config, world)
    if world % size or min(per_node, world) % size:
        raise BadInput(
            f"zero_hpz_partition_size: groups of {size} ranks do not divide {world} ranks, "
            f"{per_node} a node; set it to the number of GPUs of a node in a template of yours"
        )


def offload_device(config: Mapping[str, Any], what: str) -> str:
    """Return where the `optimizer` or the `param` is offloaded to: `none`, `cpu` or `nvme`."""
    return _offload(config, what).get("device") or "none"


def _offload(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    return config["zero_optimization"].get(f"offload_{what}") or {}  # null means none to DeepSpeed


def nvme_offloads(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sections of the configuration that offload to NVMe."""
    parts = (_offload(config, what) for what in ("optimizer", "param"))
    return [part for part in parts if part.get("device") == "nvme"]


def clear_nvme(config: Mapping[str, Any]) -> None:
    """Empty this run's folder on NVMe, where DeepSpeed would read what a killed start has left.

    Every rank calls it.
    """
    folders = {offload["nvme_path"] for offload in nvme_offloads(config)}
    for folder in folders if dist.local_rank() == 0 else ():
        try:
            shutil.rmtree(folder, ignore_errors=True)
            Path(folder).mkdir(parents=True)
        except OSError as error:
            raise BadInput(
                f"nvme_path: {folder} cannot be written ({error}); set it in the DeepSpeed template"
            ) from None
    if folders:
        dist.barrier()
