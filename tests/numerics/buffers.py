"""DeepSpeed's own buffers, found in its optimizers: what the planner counts and a dry run must
leave empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from packhorse.trainer import dist
from packhorse.trainer.datatypes import Batch
from packhorse.trainer.engine import zero_state
from packhorse.trainer.engine.engine import Engine
from packhorse.trainer.metrics import Clock
from packhorse.trainer.model.int8_linear import RowScales


def weights(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters in the model's type: whole, or this rank's pieces, and those that stage 3
    keeps whole beside.
    """
    for parameter in module.parameters():
        yield from _tensors(parameter.detach(), getattr(parameter, "ds_tensor", None))
        state = getattr(parameter, "quant_state", None)
        if isinstance(state, RowScales):
            yield state.scales
        elif state is not None:  # of a weight in 4 bits, which has its scales on every rank
            nested = (state.state2.absmax, state.state2.code) if state.state2 else ()
            yield from _tensors(state.absmax, state.code, state.offset, *nested)


def gradients(module: nn.Module, optimizer: Any) -> Iterator[torch.Tensor]:
    """After a backward: gradients of the parameters, and what they are summed in."""
    for parameter in module.parameters():
        yield from _tensors(parameter.grad, getattr(parameter, "grad_accum", None))
    if hasattr(optimizer, "bf16_groups"):  # stage 1 in bf16, in DeepSpeed's class for that
        yield from optimizer.fp32_groups_gradients_flat
    elif hasattr(optimizer, "bit16_groups"):  # stages 1 and 2
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            yield from _tensors(*(gradient for group in kept.values() for gradient in group or ()))
        yield from _tensors(*(master.grad for master in optimizer.single_partition_of_fp32_groups))
    elif hasattr(optimizer, "fp16_partitioned_groups_flat"):  # stage 3
        yield optimizer.grad_partitions_flat_buffer
        yield from _tensors(*(master.grad for master in optimizer.fp32_partitioned_groups_flat))


def masters(optimizer: Any) -> Iterator[torch.Tensor]:
    """The fp32 weights that the optimizer changes, where they are not the model's own."""
    for name in (
        "fp32_groups_flat_partition",
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
    ):
        for master in getattr(optimizer, name, ()):
            yield getattr(master, "host", master)  # of a streamed one


def moments(optimizer: Any, averages: Iterable[torch.Tensor] = ()) -> Iterator[torch.Tensor]:
    yield from averages
    base = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    for state in base.state.values():
        yield from (moment for name, moment in state.items() if name != "step")


def held(engine: Engine, batch: Batch) -> dict[str, int]:
    """Bytes of this rank's buffers by part: gradients after a backward of the batch, the rest after
    a step of it.
    """
    optimizer: Any = engine._engine.optimizer
    found: dict[str, int] = {}

    def look(optimizer: Any) -> None:
        found["gradients"] = size(gradients(engine.module, optimizer))
        found["shared"] = size(
            _tensors(*(getattr(p, "ds_secondary_tensor", None) for p in engine.module.parameters()))
        )

    forget, zero_state.forget_gradients = zero_state.forget_gradients, look
    engine.memory_dry_run([batch])
    zero_state.forget_gradients = forget
    forget(optimizer)
    engine.step([batch], 1e-3, Clock(dist.device()))
    return found | {
        "weights": size(weights(engine.module)),
        "masters": size(masters(optimizer)),
        "moments": size(moments(optimizer, engine.state._averages.values())),
    }


# their results, or the sizes of those, depend on what a tensor holds
_READS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_consecutive", "repeat_interleave"),
    "lift_fresh",  # of a list or number of the host: its copy to a GPU is waited for
}


# what copies a whole tensor to the host: on a CPU no operation shows it
_COPIES = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}


class _Copies(TorchFunctionMode):
    """Call `seen` with each tensor that the block copies to the host, and give the copy to `made`.

    A copy is another tensor, as it would be of a GPU's.
    """

    def __init__(self, seen: Callable[[torch.Tensor], None], made: Callable[[Any], None]) -> None:
        super().__init__()
        self._seen, self._made = seen, made

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COPIES:
            self._seen(args[0])
            if isinstance(out, torch.Tensor):
                out = out.clone()
                self._made(out)
        return out


class Counted(TorchDispatchMode):
    """Count what torch does in the block, views and such apart.

    Attributes:
        total: bytes that operations read and write.
        waits: times that the host would wait for a GPU, to read a number or a size. A number that
            it has read, and what follows from such numbers alone, is the host's: no more waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.operations = self.waits = 0
        self._of_host: dict[int, torch.Tensor] = {}
        self._copies = _Copies(self._read, self._give_to_host)

    def __enter__(self) -> Counted:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def _read(self, tensor: torch.Tensor) -> None:
        self.waits += id(tensor) not in self._of_host

    def _give_to_host(self, tensor: torch.Tensor) -> None:
        self._of_host[id(tensor)] = tensor  # which keeps its id from being another's

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if not (func.is_view or name in ("detach", "empty", "empty_like", "_unsafe_view")):
            self.total += sum(tensor.nbytes for tensor in tensors)
            self.operations += 1
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype is torch.bool for index in indices)
        sized = "output_size" in (kwargs or {})  # of repeat_interleave
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if read and all(id(tensor) in self._of_host for tensor in read):
            for tensor in tree_leaves(out):
                self._give_to_host(tensor)
        else:
            self.waits += by_mask or (name in _READS and not sized)
        return out


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def _tensors(*candidates: Any) -> Iterator[torch.Tensor]:
    yield from (one for one in candidates if isinstance(one, torch.Tensor))
