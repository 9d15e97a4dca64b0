"""DeepSpeed, and everything that has to be known about it. No other file imports it.

In: a DeepSpeed template and the recipe's sections, a model, micro-batches. Out: applied steps, evaluated
losses, files of a checkpoint. What this file repairs or hides is said where it happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import dist
from trainer.config import ModelSection, OptimSection, ParallelSection
from trainer.flow import BadInput, Batch, StepResult
from trainer.metrics import Clock

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.WARNING)
# DeepSpeed calls collectives by names that torch 2.13 deprecates, once for each layer and step
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
# An all-reduce for inference, which DeepSpeed would compile at every machine's first start, and say so on stdout.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# The recipe owns these; a template that sets one of them would be a second owner.
_OWNED_BY_RECIPE = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "data_types": "parallel.grad_dtype",
    "communication_data_type": "parallel.grad_dtype",
    "elasticity": "batch",
}

# ----------------------------------------------------------------------------------------------- configuration


def deepspeed_config(
    parallel: ParallelSection, model: ModelSection, optim: OptimSection, hidden_size: int, run_dir: Path
) -> dict[str, Any]:
    """The template with what the recipe owns filled in, and a folder on the NVMe for this run alone.

    `"auto"` of three sizes follows the model's hidden size H, as DeepSpeed's own guide has it: buckets of
    H^2, prefetch of 0.9 H^2, parameters below 10 H kept whole.

    Raises:
        BadInput: the template is missing, not JSON, sets what the recipe owns, or cannot train these types.
    """
    config = _read_template(Path(parallel.deepspeed))
    for key, owner in _OWNED_BY_RECIPE.items():
        if key in config:
            raise BadInput(f"{parallel.deepspeed}: `{key}` belongs to the recipe's `{owner}`; take it out there")
    zero = config.setdefault("zero_optimization", {"stage": 0})
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, size in sizes.items():
        if zero.get(key) == "auto":
            zero[key] = size
    for offload in _nvme_offloads(config):
        offload["nvme_path"] = str(Path(offload["nvme_path"]) / f"packhorse-{_short_digest(str(run_dir.resolve()))}")
    bf16 = model.dtype == "bfloat16"
    if bf16 and stage(config) == 0:
        raise BadInput(
            f"{parallel.deepspeed}: ZeRO stage 0 keeps no fp32 master weights for bfloat16; "
            "use ds_configs/zero1.json, or model.dtype=float32"
        )
    grad_dtype = "fp32" if parallel.grad_dtype == "float32" or not bf16 else "bf16"
    config |= {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches are cut by the plan; DeepSpeed counts none of them
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": bf16},
        # DeepSpeed's own default in bf16 is bf16, which makes the batch's cutting change what is learned
        "data_types": {"grad_accum_dtype": grad_dtype},
        "communication_data_type": grad_dtype,
        "zero_force_ds_cpu_optimizer": True,
        "steps_per_print": 10**12,
    }
    if stage(config) > 0:
        config["gradient_clipping"] = optim.clip
    return config


def _read_template(path: Path) -> dict[str, Any]:
    if not path.is_file():
        packaged = Path(__file__).resolve().parent.parent / path
        if not packaged.is_file():
            raise BadInput(f"parallel.deepspeed: there is no file {path}; take one of ds_configs/")
        path = packaged
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path}: a DeepSpeed template is a JSON object")
    return config


def stage(config: Mapping[str, Any]) -> int:
    return int(config["zero_optimization"].get("stage", 0))


def _offload_device(config: Mapping[str, Any], what: str) -> str:
    return config["zero_optimization"].get(f"offload_{what}", {}).get("device", "none")


def _nvme_offloads(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = (config["zero_optimization"].get(f"offload_{what}", {}) for what in ("optimizer", "param"))
    return [part for part in parts if part.get("device") == "nvme"]


def _short_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def clear_nvme(config: Mapping[str, Any]) -> None:
    """Empty this run's folder on the NVMe: DeepSpeed would take what a killed start left there for its own.

    Raises:
        BadInput: it cannot be written.
    """
    folders = {offload["nvme_path"] for offload in _nvme_offloads(config)}
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


# ----------------------------------------------------------------------------------------------- parameters


@contextmanager
def sharded_init(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers builds and loads a model in shards where the stage is 3."""
    if stage(config) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(dict(config))  # transformers holds it weakly
    yield
    del keep_alive


def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> AbstractContextManager:
    """The whole of these parameters inside; with `write`, what rank 0 made of them goes back to all shards."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None)


def _optimizer(groups: list[dict[str, Any]], optim: OptimSection, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if _offload_device(config, "optimizer") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


# ----------------------------------------------------------------------------------------------- the engine


class Engine:
    """A model under DeepSpeed. `model(batch)` returns this rank's share of the step's loss (C2)."""

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], optim: OptimSection, config: dict[str, Any]
    ) -> None:
        self._clip = optim.clip
        self.stage = stage(config)
        self._on_nvme = bool(_nvme_offloads(config))
        if self._on_nvme:
            dist.log.warning("offload to NVMe: this run can be exported from its checkpoints, but not resumed")
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=_optimizer(groups, optim, config), config=config, dist_init_required=False
        )
        self._world = dist.world_size()
        self._without_gradient = _GradientWatch(model) if self.stage == 3 else None

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def step(self, batches: list[Batch], lr: float, clock: Clock) -> StepResult:
        """Accumulate the gradients of this rank's micro-batches and apply one update with learning rate `lr`.

        DeepSpeed divides gradients by the data-parallel size; the loss is multiplied by it here, and nothing
        else knows (C2). Micro-batches are not counted by DeepSpeed: the last one is the boundary.
        """
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=dist.device())
        for i, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            with clock.part("forward"):
                loss = self._engine(batch.to(dist.device()))
            with clock.part("backward"):
                self._engine.backward(loss * self._world)
                if self._without_gradient:
                    self._without_gradient.check()
            loss_sum += loss.detach()
        with clock.part("optimizer"):
            return self._apply(loss_sum)

    def _apply(self, loss: torch.Tensor) -> StepResult:
        """Apply the update or say why not, alike at every stage (C12)."""
        if self.stage == 0:  # DeepSpeed keeps no norm here, and would apply a NaN
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters]  # as ZeRO sums them
            total = torch.linalg.vector_norm(torch.stack(norms))
            norm = float(total)
            applied = norm < float("inf")
            if applied:
                nn.utils.clip_grads_with_norm_(parameters, self._clip, total)
                self._engine.step()
            else:
                self._engine.zero_grad()
        else:
            self._engine.step()
            applied = self._engine.was_step_applied()
            # stage 3 leaves the last step's norm standing when it skips
            norm = float(self._engine.get_global_grad_norm() or 0.0) if applied else float("nan")
        return StepResult(loss, norm, None if applied else "the gradient norm is not finite")

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The batch's weighted loss, without noise, dropout or gradients. () float32."""
        self._engine.eval()
        return self._engine(batch.to(dist.device()))

    def state_bytes(self) -> int:
        """What all ranks together write in `save`: weights, and master weights with two moments in fp32."""
        return sum(getattr(p, "ds_numel", p.numel()) * (p.element_size() + 12) for p in self.module.parameters())

    def save(self, folder: Path) -> None:
        """Write this rank's files under `folder`. Every rank calls it."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        if self._on_nvme:  # its master weights lie in raw files that `read_state` cannot tell apart
            weights = self._engine._zero3_consolidated_16bit_state_dict()
            if dist.is_main():
                torch.save(weights, folder / _TAG / _WHOLE_WEIGHTS)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote at the same world size and stage. Every rank calls it.

        Raises:
            BadInput: the optimizer is on the NVMe. DeepSpeed 0.19.8 reads its master weights back from there and
                loses its moments (seen: the next losses differ by a tenth).
        """
        if self._on_nvme:
            raise BadInput(
                "a run with NVMe offload cannot be resumed, since DeepSpeed loses the optimizer's moments on the way; "
                "give another run.dir, or use ds_configs/zero3_offload_all.json from the start"
            )
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no state to load")


class _GradientWatch:
    """At ZeRO-3 a parameter that gets no gradient in a micro-batch keeps the last step's in its buffer, and
    that one is applied again. Experts that no token chose are such parameters. Seen here, and refused."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._waiting = set(self._names)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._seen, name))

    def _seen(self, name: str, gradient: torch.Tensor) -> None:
        self._waiting.discard(name)

    def check(self) -> None:
        """After a backward: raises BadInput where a parameter was not reached; then waits for the next one."""
        if self._waiting:
            raise BadInput(
                f"`{min(self._waiting)}` and {len(self._waiting) - 1} other parameters got no gradient in a "
                "micro-batch, where ZeRO-3 would apply the last step's again; use ds_configs/zero2.json"
            )
        self._waiting.update(self._names)


_TAG = "state"
_WHOLE_WEIGHTS = "weights.pt"


def read_state(folder: Path) -> Mapping[str, Any]:
    """Weights of a checkpoint by name, without ranks or a GPU; `.contiguous()` on a value reads it, in fp32
    where master weights were kept. Shards stay memory-mapped: the model is never whole in memory."""
    state_folder = folder / _TAG
    if (state_folder / _WHOLE_WEIGHTS).is_file():
        return torch.load(state_folder / _WHOLE_WEIGHTS, map_location="cpu", mmap=True, weights_only=True)
    if any(state_folder.glob("*_optim_states.pt")):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it is talkative
            weights: Any = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG, lazy_mode=True)
        return weights
    # stage 0: one file of this run's own, in DeepSpeed's format, which holds more than tensors
    saved = torch.load(state_folder / "mp_rank_00_model_states.pt", map_location="cpu", mmap=True, weights_only=False)
    return saved["module"]
