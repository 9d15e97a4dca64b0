"""DeepSpeed, and everything that has to be known about it. No other file imports it.

In: a DeepSpeed template and the recipe's sections, a model, micro-batches. Out: applied steps,
    evaluated
losses, files of a checkpoint. What this file repairs or hides is said where it happens.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import psutil
import torch
from torch import nn

from trainer import dist
from trainer.config.recipe import OptimSection
from trainer.datatypes import BadInput, Batch, StepResult
from trainer.engine import compile_ops, zero_state
from trainer.engine.ds_config import nvme_offloads, offload_device, stage
from trainer.engine.sharded_state import (
    FROZEN,
    WEIGHT,
    Digests,
    Shards,
    Slice,
    add_digests,
    digests_of,
)
from trainer.metrics import Clock
from trainer.model.lora import borrowed_weights, parts_of

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.WARNING)
# DeepSpeed calls collectives by names that torch 2.13 deprecates, once for each layer and step
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
# An all-reduce for inference, which DeepSpeed would compile at every machine's first start, and say
# so on stdout.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# --------------------------------------------------------------------------------------- parameters


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
    """The whole of these parameters inside; with `write`, what rank 0 made of them goes back to all
    shards.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None)


GATHER_SHARE = (
    0.5  # of the free memory, which gathered weights may take: activations and caches come on top
)


def free_memory() -> int:
    """Bytes that this rank can still take of its device; on CPU its share of the host's free
    memory.
    """
    if dist.device().type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return psutil.virtual_memory().available // dist.local_world_size()


@contextmanager
def _without_hooks(module: nn.Module, handles: Iterable[Any]) -> Iterator[None]:
    """Inside, these hooks of the module's parts are not called. Afterwards they stand where they
    stood.
    """
    ids = {handle.id for handle in handles}
    tables = [
        hooks
        for part in module.modules()
        for hooks in (part._forward_hooks, part._forward_pre_hooks)
    ]
    before = [dict(hooks) for hooks in tables]
    for hooks in tables:
        for hook in ids & hooks.keys():
            del hooks[hook]
    try:
        yield
    finally:
        for hooks, all_of_them in zip(tables, before, strict=True):
            hooks.clear()
            hooks.update(all_of_them)


def _optimizer(
    groups: list[dict[str, Any]], optim: OptimSection, config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if offload_device(config, "optimizer") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def _evaluator(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The model without an optimizer: DeepSpeed brings its shards together at stage 3, and has no
    work elsewhere.
    """
    if stage(config) < 3:
        return model.to(dist.device())
    sharding = {
        key: value
        for key, value in config["zero_optimization"].items()
        if key != "offload_optimizer"
    }
    engine, *_ = deepspeed.initialize(
        model=model, config={**config, "zero_optimization": sharding}, dist_init_required=False
    )
    return engine


# --------------------------------------------------------------------------------------- the engine


class Engine:
    """A model under DeepSpeed. `model(batch)` returns this rank's share of the step's loss (C2).

    Args:
        groups: of the optimizer; None: the model is only evaluated, in shards at stage 3, and whole
            elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]] | None,
        optim: OptimSection,
        config: dict[str, Any],
    ) -> None:
        self._clip = optim.max_grad_norm
        self.stage = stage(config)
        self.swaps = bool(nvme_offloads(config))
        self._model = model
        self._engine: Any
        compile_ops.build_ops(compile_ops.needed_ops(config, trains=groups is not None))
        if groups is None:
            self._engine = _evaluator(model, config)
            return
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(groups, optim, config),
            config=config,
            dist_init_required=False,
        )
        if hasattr(self._engine.optimizer, "get_grad_norm_direct"):  # stages 1 to 3
            self._engine.optimizer.get_grad_norm_direct = gradient_norm
        for borrower, weight in borrowed_weights(model) if self.stage == 3 else ():
            deepspeed.zero.register_external_parameter(
                borrower, weight
            )  # gathered where it runs, too
        self._world = dist.world_size()
        self._without_gradient = _GradientWatch(model) if self.stage == 3 else None

    @property
    def module(self) -> Any:
        return self._model

    def step(
        self,
        batches: list[Batch],
        lr: float,
        clock: Clock,
        check_loss: Callable[[float], str | None] | None = None,
    ) -> StepResult:
        """Accumulate the gradients of this rank's micro-batches and apply one update with learning
        rate `lr`.

        DeepSpeed divides gradients by the data-parallel size; the loss is multiplied by it here,
        and nothing else knows (C2). Micro-batches are not counted by DeepSpeed: the last one is the
        boundary.

        Args:
            check_loss: is asked, with the loss of the whole step, whether not to apply it, and why.
        """
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=dist.device())
        refused = None
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            with clock.part("forward"):
                loss = self._engine(batch.to(dist.device()))
            loss_sum += loss.detach()
            if is_last and check_loss:
                refused = check_loss(dist.sum_over_ranks([loss_sum.item()])[0])
                # a NaN takes the step the way of all that are not applied, which every stage knows
                if refused:
                    loss = loss * float("nan")
            with clock.part("backward"):
                self._engine.backward(loss * self._world)
                if self._without_gradient:
                    self._without_gradient.check()
        with clock.part("optimizer"):
            result = self._apply(loss_sum)
        return replace(result, skipped=refused) if refused else result

    def memory_dry_run(self, batches: Sequence[Batch]) -> None:
        """Run micro-batches forward and backward as a step does, but with weights of zero and no
        update.

        What it leaves is the memory that a step takes, AdamW's moments included, so that a device
        without room for it fails now. State, gradients and random numbers are as if it had not
        been.
        """
        zero_state.make_moments(self._engine.optimizer, self._names())
        self._engine.train()
        generators = [dist.device()] if dist.device().type == "cuda" else []
        with torch.random.fork_rng(generators):
            for i, batch in enumerate(batches):
                self._engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
                loss = self._engine(_weightless(batch).to(dist.device()))
                self._engine.backward(loss * self._world)
                if self._without_gradient:
                    self._without_gradient.check()
        zero_state.forget_gradients(self._engine.optimizer)

    def _apply(self, loss: torch.Tensor) -> StepResult:
        """Apply the update or say why not, alike at every stage (C12)."""
        if self.stage == 0:  # DeepSpeed keeps no norm here, and would apply a NaN
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            norms = [
                torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters
            ]  # as ZeRO sums them
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

    @contextmanager
    def gather_for_generation(self) -> Iterator[bool]:
        """Inside, the model runs many forwards without gradients, as generation does. Every rank
        calls it.

        Yields True where each rank has the weights whole and runs as many forwards as it likes.
        Stage 3 gathers them once for that, where they take at most GATHER_SHARE of every rank's
        free memory. Elsewhere it is False: each forward gathers them layer by layer, and all ranks
        must run equally many.
        """
        if self.stage < 3:
            yield True
            return
        if not self._whole_fits():
            yield False
            return
        self._engine.empty_partition_cache()  # what was fetched ahead would be taken for gathered
        optimizer = self._engine.optimizer
        offload = getattr(
            optimizer, "parameter_offload", optimizer
        )  # without an optimizer this stands in its place
        hooks = [
            *offload.forward_hooks,
            *offload.backward_hooks,
        ]  # the first would cut each layer again after its use
        with gathered(self.module.parameters()), _without_hooks(self.module, hooks):
            yield True

    def _whole_fits(self) -> bool:
        """Whether the gathered weights fit beside what else there is, on all ranks alike."""
        sizes = [
            (getattr(p, "ds_numel", p.numel()), p.element_size())
            for p in self._parameters().values()
        ]
        needed = sum(numel * size for numel, size in sizes)
        free = min(dist.gather(free_memory()))
        fits = needed <= GATHER_SHARE * free and not self.swaps  # from an NVMe it is not proved
        how = "gathered once" if fits else "gathered layer by layer for each token, which is slow"
        dist.log.info(
            "generation: %.2f GiB of weights, %.2f GiB free: %s", needed / 2**30, free / 2**30, how
        )
        return fits

    def wait_for_prefetch(self) -> None:
        """Make the parameters fit to be gathered after a step or an evaluation. Every rank calls
        it.
        """
        zero_state.wait_for_prefetch(self._engine.optimizer)

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Of the optimizer's groups."""
        names = ("lr", "betas", "eps", "weight_decay")
        return [
            {name: group[name] for name in names} for group in self._engine.optimizer.param_groups
        ]

    def state_bytes(self) -> int:
        """What all ranks together write of a checkpoint: fp32 weights and two moments, and the
        buffers.
        """
        trained = sum(
            getattr(p, "ds_numel", p.numel())
            for p in self._parameters().values()
            if p.requires_grad
        )
        return 12 * trained + sum(piece.bytes for piece in self._buffers())

    def state_shapes(self) -> dict[str, list[int]]:
        """Of the trained parameters and the buffers, by the names that the model's users know them
        by.
        """
        parameters = {name: p for name, p in self._parameters().items() if p.requires_grad}
        shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        return shapes | {name: list(tensor.shape) for name, tensor in self._named_buffers()}

    def state(self) -> Iterator[list[Slice]]:
        """This rank's share of the training state, a group at a time: views of it, valid until the
        next group.

        What every rank has is rank 0's to save.
        """
        if dist.is_main() and (buffers := self._buffers()):
            yield buffers
        if dist.is_main() or self.stage > 0:
            yield from zero_state.read(self._engine.optimizer, self._names())

    def restore(self, shards: Shards, updates: int) -> None:
        """Fill the training state from a checkpoint of any world size, stage and offload, after so
        many updates.

        Every rank calls it. Hyperparameters are the recipe's; what is frozen is the model folder's.
        """
        with torch.no_grad():
            for group in zero_state.write(self._engine.optimizer, self._names(), updates):
                for piece in group:
                    shards.fill(piece)
            for piece in self._buffers():
                shards.fill(piece)

    def state_digests(self) -> Digests:
        """This rank's share of the digests: of all that is trained, of the buffers, and of what is
        frozen.
        """
        found = self.frozen_digests()
        for group in self.state():
            add_digests(found, digests_of(group))
        return found

    def frozen_digests(self) -> Digests:
        """Of the parameters that are not trained, on rank 0. Every rank calls it."""
        return dict(self._frozen_digests)

    @cached_property
    def _frozen_digests(self) -> Digests:  # a run never changes them
        found: Digests = {}
        for name, parameter in self._parameters().items():
            if not parameter.requires_grad:
                with gathered([parameter]):
                    for part, tensor in parts_of(name, parameter) if dist.is_main() else ():
                        found |= digests_of([Slice(part, 0, {FROZEN: tensor.view(-1)})])
        return found

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Of the model inside the module that computes the loss."""
        model: Any = self.module.model
        return dict(model.named_parameters())

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self._parameters().items()}

    def _named_buffers(self) -> list[tuple[str, torch.Tensor]]:
        """The persistent ones: the others are made anew with the model."""
        model: Any = self.module.model
        persistent = model.state_dict(keep_vars=True).keys()
        return [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]

    def _buffers(self) -> list[Slice]:
        return [Slice(name, 0, {WEIGHT: tensor.view(-1)}) for name, tensor in self._named_buffers()]


_NORM_BLOCK = 256


def gradient_norm(gradients: Iterable[torch.Tensor], *_: Any) -> torch.Tensor:
    """The 2-norm of what all ranks hold together, in fp64. () float64; -1 where it is not finite.

    In place of DeepSpeed's own, which copies every gradient to fp64 first: 4% of a step on a CPU.
    Here fp32 norms of blocks are summed in fp64, which differs by 1e-9 of the norm.
    """
    total = torch.zeros((), dtype=torch.float64, device=dist.device())
    for gradient in gradients:
        flat = gradient.detach().view(-1)
        whole = flat.numel() // _NORM_BLOCK * _NORM_BLOCK
        blocks = torch.linalg.vector_norm(
            flat[:whole].view(-1, _NORM_BLOCK), dim=1, dtype=torch.float32
        )
        total += (blocks.double().square().sum() + flat[whole:].double().square().sum()).to(
            total.device
        )
    torch.distributed.all_reduce(total)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)


def _weightless(batch: Batch) -> Batch:
    """The same work, of which nothing is learned."""
    return replace(
        batch,
        weights=torch.zeros_like(batch.weights),
        uniform_weight=None
        if batch.uniform_weight is None
        else 0.0,  # None asks the loss for another pass
    )


class _GradientWatch:
    """At ZeRO-3 a parameter that gets no gradient in a micro-batch keeps the last step's in its
    buffer, and that one is applied again. Experts that no token chose are such parameters. Seen
    here, and refused."""

    def __init__(self, model: nn.Module) -> None:
        self._names = [
            name for name, parameter in model.named_parameters() if parameter.requires_grad
        ]
        self._waiting = set(self._names)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._seen, name))

    def _seen(self, name: str, gradient: torch.Tensor) -> None:
        self._waiting.discard(name)

    def check(self) -> None:
        """After a backward: raises BadInput where a parameter was not reached; then waits for the
        next one.
        """
        if self._waiting:
            raise BadInput(
                f"`{min(self._waiting)}` and {len(self._waiting) - 1} other parameters got no "
                f"gradient in a "
                "micro-batch, where ZeRO-3 would apply the last step's again; use "
                "ds_configs/zero2.json"
            )
        self._waiting.update(self._names)
