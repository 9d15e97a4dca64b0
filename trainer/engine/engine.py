"""Run a model under DeepSpeed, and work around what DeepSpeed does wrong.

In: DeepSpeed's configuration, the recipe's optimizer section, a model, micro-batches. Out: applied
steps, evaluated losses, the training state as slices of parameters. Only this package imports
DeepSpeed.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import OptimSection
from packhorse.trainer.datatypes import Batch, StepResult
from packhorse.trainer.engine import compile_ops, zero_state
from packhorse.trainer.engine.clipping import StepNumbers, replace_gradient_norm, step_clipped
from packhorse.trainer.engine.ds_config import for_deepspeed, nvme_offloads, stage_of
from packhorse.trainer.engine.missing_gradients import (
    GradientWatch,
    gather_whole,
    reduce_in_order,
    reduces_by_hooks,
    require_all_gradients,
)
from packhorse.trainer.engine.moments import moment_bytes
from packhorse.trainer.engine.optim import (
    reduce_leaves_once,
    set_learning_rates,
    shorten_gradient_sums,
)
from packhorse.trainer.engine.optimizers import PIECEWISE, Lion, build_optimizer
from packhorse.trainer.engine.streamed_adamw import StreamedAdamW
from packhorse.trainer.metrics import Clock
from packhorse.trainer.model.lora import borrowed_weights
from packhorse.trainer.model.quantisation import numel
from packhorse.trainer.utils.lean_import import lean_import, replaced

dist.choose_accelerator()
if not torch.cuda.is_available():
    # Else DeepSpeed starts `numactl` to count devices, once for each gradient that ZeRO-3 reduces:
    # a tenth of a small model's step.
    os.environ.setdefault("LOCAL_SIZE", str(dist.local_world_size()))

# What is installed and not needed here takes most of the time of these imports: DeepSpeed imports
# mlflow for a tuner, and Muon, compiled by torch, with every optimizer; no recipe can choose Muon.
# Transformers imports scipy for object detection.
with lean_import("mlflow"):
    import deepspeed
    import transformers.utils
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import logger as deepspeed_logger

    with replaced(compiler, "compile", lambda: compiler.dummy_decorator):
        import deepspeed.runtime.zero.muon.muon_optimizer
    with replaced(transformers.utils, "is_scipy_available", lambda: False):
        import transformers.modeling_utils

compile_ops.set_build_folder_and_flags()
deepspeed_logger.setLevel(logging.WARNING)
# tests/numerics/test_optimizers.py tests them; DeepSpeed warns of others than it has tried
ZERO_SUPPORTED_OPTIMIZERS += [Lion, StreamedAdamW, torch.optim.SGD, *PIECEWISE.values()]
# DeepSpeed calls collectives by names that torch 2.13 deprecates, once for each layer and step
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
# An all-reduce for inference. DeepSpeed would compile it at each machine's first start, and write
# to stdout while it does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Share of the free memory that weights gathered for generation may take. The rest is for
# activations and caches.
GATHER_SHARE = 0.5

# ------------------------------------------------------------------------------------ ZeRO-3 shards


@contextmanager
def sharded_init(config: Mapping[str, Any]) -> Iterator[None]:
    """Make transformers build and load a model in shards inside the block, if the stage is 3."""
    if stage_of(config) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # it keeps the groups of ranks that a model of before was shared by (hpZ), and makes them once
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    # before DeepSpeed compiles them by itself: without our lock, and otherwise than we do
    compile_ops.build_ops(compile_ops.needed_ops(config, trains=False))
    # transformers holds a weak reference to it
    keep_alive = HfDeepSpeedConfig(for_deepspeed(config))
    yield
    del keep_alive


def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> AbstractContextManager:
    """Hold these parameters whole on every rank inside the block. Every rank enters it.

    Args:
        write: rank 0's changes go back to the shards of all ranks.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None)


@contextmanager
def reads_gathered(module: nn.Module) -> Iterator[None]:
    """Find weights that a module reads without calling their owner, as a state-space layer its
    convolution's, and let ZeRO-3 gather them with the reader, in the block and from then on.

    ZeRO-3 gathers a module's weights when that module is called. A weight that is read elsewhere
    would be an empty tensor. DeepSpeed's own table of parameters notices such a read and registers
    it with the running module, but 0.19.8 never switches that on.
    """
    tables: list[Any] = [part._parameters for part in module.modules()]
    watching = [table for table in tables if hasattr(table, "_in_forward")]
    for table in watching:
        table._in_forward = True
    try:
        yield
    finally:
        for table in watching:
            table._in_forward = False


@contextmanager
def _without_hooks(module: nn.Module, handles: Iterable[Any]) -> Iterator[None]:
    """Take these hooks off the module's parts inside the block, and put all back in order after."""
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


# --------------------------------------------------------------------------------------- the engine


class Engine:
    """A model under DeepSpeed. `module(batch)` returns this rank's share of the step's loss (C2).

    Attributes:
        module: the model with its loss, as it was given.
        state: what a checkpoint holds of it.
        stage: the ZeRO stage.
        swaps: whether anything is offloaded to NVMe.

    Args:
        groups: parameter groups (optim.parameter_groups). None builds no optimizer: the model can
            be evaluated only.
        partly_called: blocks that call a part of their modules for a token (partly_called.py).
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]] | None,
        optim: OptimSection,
        config: dict[str, Any],
        partly_called: Sequence[nn.Module] = (),
    ) -> None:
        self.stage = stage_of(config)
        self.swaps = bool(nvme_offloads(config))
        self.module: Any = module
        self._max_grad_norm, self._ema_decay = optim.max_grad_norm, optim.ema_decay
        self._engine: Any
        compile_ops.build_ops(compile_ops.needed_ops(config, trains=groups is not None))
        if self.stage == 3:
            gather_whole(module.model, partly_called)
        if groups is None:
            self._engine = _evaluation_engine(module, config)
            return
        # DeepSpeed casts all parameters at stages 1 and 2
        moments = moment_bytes(groups)  # DeepSpeed empties the groups
        frozen = [(p, p.data) for p in module.parameters() if not p.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(groups, optim, config),
            config=for_deepspeed(config),
            dist_init_required=False,
        )
        for parameter, data in frozen if self.stage < 3 else ():
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        del frozen
        self._optimizer: Any = self._engine.optimizer
        zero_state.stream_state(self._optimizer)
        replace_gradient_norm(self._optimizer)
        shorten_gradient_sums(self._engine)
        self.state = zero_state.TrainingState(
            *(self.module.model, self._optimizer, self.stage, moments),
            averages=optim.ema_decay is not None,
            gathered=gathered,
        )
        zero_state.show_pieces(self._optimizer, self.state.names(), self.module.seed)
        by_hooks = reduces_by_hooks(self._optimizer) and dist.world_size() > 1
        if by_hooks and partly_called:
            reduce_in_order(self._optimizer)
        self._needs_all_gradients = by_hooks and not partly_called
        self._gradient_watch = None
        if self.stage == 3:
            self._gradient_watch = GradientWatch(module)
            reduce_leaves_once(self._engine)
            # DeepSpeed gathers a module's own weights before its forward, and those registered
            for borrower, weight in borrowed_weights(module):
                deepspeed.zero.register_external_parameter(borrower, weight)

    def step(
        self,
        batches: list[Batch],
        lr: float,
        clock: Clock,
        check_loss: Callable[[float], str | None] | None = None,
    ) -> StepResult:
        """Accumulate the gradients of this rank's micro-batches and apply one update.

        Args:
            lr: the schedule's learning rate, which each group scales by its own `lr_scale`.
            check_loss: gets the loss of the whole step and returns why it must not be applied, or
                None.
        """
        self._engine.train()
        set_learning_rates(self._optimizer, lr)
        loss_sum = torch.zeros((), device=dist.device())
        router = self.module.router
        before = router and router.sums
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with clock.part("forward"):
                loss = self._forward(batch, is_last)
            loss_sum += loss.detach()
            with clock.part("backward"):
                self._backward(loss)
        numbers = StepNumbers(loss_sum, check_loss)
        with clock.part("optimizer"):
            parameters, limit = self.module.parameters(), self._max_grad_norm
            norm, applied = step_clipped(self._engine, parameters, limit, self.stage, numbers)
        if applied and self._ema_decay is not None:
            self.state.update_averages(self._ema_decay)
        skipped = None if applied else numbers.refused or "the gradient norm is not finite"
        if router and before and skipped:
            router.sums = before
        return StepResult(loss_sum, norm, skipped)

    def memory_dry_run(self, batches: Sequence[Batch]) -> None:
        """Run micro-batches forward and backward as a step does, with loss weights of zero.

        The memory of a step is then taken, the optimizer's moments included, so that a device
        without room for it fails now. Weights, gradients and random numbers stay as they were.
        """
        zero_state.make_moments(self._optimizer)
        self._engine.train()
        generators = [dist.device()] if dist.device().type == "cuda" else []
        with torch.random.fork_rng(generators):
            for i, batch in enumerate(batches):
                self._backward(self._forward(_weightless(batch), i == len(batches) - 1))
        zero_state.forget_gradients(self._optimizer)

    def _forward(self, batch: Batch, is_last: bool) -> torch.Tensor:
        # DeepSpeed is configured for one micro-batch a step and would reduce after each of them
        self._engine.set_gradient_accumulation_boundary(is_last)
        return self._engine(batch.to(dist.device()))

    def _backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed divides gradients by the data-parallel size, but the loss is this rank's share
        # of a sum. Here and nowhere else the division is undone (C2).
        self._engine.backward(loss * dist.world_size())
        if self._gradient_watch:
            self._gradient_watch.check()
        elif self._needs_all_gradients:
            require_all_gradients(self._optimizer)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Return the batch's weighted loss without noise, dropout or gradients, () float32."""
        self._engine.eval()
        return self._engine(batch.to(dist.device()))

    @contextmanager
    def gather_for_generation(self) -> Iterator[bool]:
        """Let the model run many forwards without gradients inside the block. Every rank enters it.

        Yields True if each rank holds the weights whole and may run as many forwards as it likes.
        At stage 3 that is so where they take at most GATHER_SHARE of every rank's free memory.
        Otherwise it yields False: each forward gathers layer by layer, and all ranks must run
        equally many.
        """
        if self.stage < 3:
            yield True
            return
        if not self._fits_whole():
            yield False
            return
        # parameters fetched ahead would be taken for gathered ones
        self._engine.empty_partition_cache()
        # an engine without an optimizer has the offload object in the optimizer's place
        offload = getattr(self._engine.optimizer, "parameter_offload", self._engine.optimizer)
        # DeepSpeed's forward hooks would cut each layer into shards again after its use
        hooks = [*offload.forward_hooks, *offload.backward_hooks]
        with gathered(self.module.parameters()), _without_hooks(self.module, hooks):
            yield True

    def _fits_whole(self) -> bool:
        """Return whether the gathered weights fit into the free memory of all ranks."""
        needed = sum(numel(p) * p.element_size() for p in self.module.model.parameters())
        if dist.device().type == "cuda":
            # what torch's allocator holds in reserve is free as well
            reserve = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            mine = torch.cuda.mem_get_info()[0] + reserve
        else:
            mine = psutil.virtual_memory().available // dist.local_world_size()
        free = min(dist.gather(mine))
        # gathering from NVMe has not been tested
        fits = needed <= GATHER_SHARE * free and not self.swaps
        how = "gathered once" if fits else "gathered layer by layer for each token, which is slow"
        dist.log.info(
            "generation: %.2f GiB of weights, %.2f GiB free: %s", needed / 2**30, free / 2**30, how
        )
        return fits

    def wait_for_prefetch(self) -> None:
        """Make the parameters ready to be gathered after a step or an evaluation.

        Every rank calls it.
        """
        optimizer = self._engine.optimizer
        # stage 3 may have fetched some for a forward that does not come
        if zero_state.is_stage_3(optimizer):
            optimizer.checkpoint_event_prologue()
            optimizer.checkpoint_event_epilogue()

    def hyperparameters(self) -> list[dict[str, Any]]:
        """Return the hyperparameters of each parameter group, as the last step used them."""
        names = ("lr", "betas", "eps", "weight_decay")
        return [
            {name: group[name] for name in names if name in group}
            for group in self._optimizer.param_groups
        ]


def _evaluation_engine(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Return the model ready for forwards: under DeepSpeed at stage 3, which gathers its shards."""
    if stage_of(config) < 3:
        return model.to(dist.device())
    sharding = dict(config["zero_optimization"])
    sharding.pop("offload_optimizer", None)
    config = for_deepspeed(config) | {"zero_optimization": sharding}
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    return engine


def _weightless(batch: Batch) -> Batch:
    return replace(batch, weights=torch.zeros_like(batch.weights))
