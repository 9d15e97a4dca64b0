"""Ranks, the device, seeds, the process group, the stop flag and rank-0 logging."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger("packhorse")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def seed_from(*parts: int | str) -> int:
    """A seed in [0, 2^63) from what it belongs to, as `seed_from(seed, "noise", epoch, document)`.

    Unlike Python's own hash it is the same in every process, and neighbouring parts give unrelated seeds.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def start_logging() -> None:
    """Lines on stderr from rank 0; warnings and worse from the others."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if is_main() else f"[rank {rank()}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    log.propagate = False


# ----------------------------------------------------------------------------------------------- process group


@contextmanager
def process_group() -> Iterator[None]:
    """NCCL between GPUs, gloo between CPU processes; taken down at the end, or ranks fail at exit now and then."""
    import torch
    import torch.distributed as td

    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("LOCAL_RANK", "0")
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    td.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30))
    try:
        yield
    finally:
        td.destroy_process_group()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sums, in float64. Every rank calls it."""
    import torch
    import torch.distributed as td

    tensor = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        td.all_reduce(tensor)
    return tensor.tolist()


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    import torch.distributed as td

    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in the order of ranks."""
    import torch.distributed as td

    if world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * world_size()
    td.all_gather_object(boxes, value)
    return boxes


def barrier() -> None:
    import torch.distributed as td

    if world_size() > 1:
        td.barrier()


# ----------------------------------------------------------------------------------------------- stopping


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """SIGTERM or SIGUSR1 on any rank stops all of them after the same step (C9).

    `start` launches one small max-reduction on a gloo group kept beside NCCL, `agreed` reads it: no GPU waits.
    """

    def __init__(self) -> None:
        self.raised = False
        self._group: Any = None
        self._pending: Any = None
        for signum in _STOP_SIGNALS:
            signal.signal(signum, self._raise)
        # the launcher starts workers with these held back, so that none is lost before there is a handler
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        # the launcher starts workers with both held back, so that none is lost before this moment
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))

    def _raise(self, signum: int, frame: Any) -> None:
        self.raised = True

    def join(self) -> None:
        """Make the group on which ranks agree. Every rank calls it, inside the process group."""
        import torch.distributed as td

        self._group = td.new_group(backend="gloo") if world_size() > 1 else None

    def start(self) -> None:
        import torch
        import torch.distributed as td

        flag = torch.tensor([int(self.raised)], dtype=torch.int32)
        work = td.all_reduce(flag, op=td.ReduceOp.MAX, group=self._group, async_op=True) if self._group else None
        self._pending = (flag, work)

    def agreed(self) -> bool:
        """Whether any rank had the flag up when `start` was called: the same answer on all ranks."""
        flag, work = self._pending
        if work is not None:
            work.wait()
        return bool(flag.item())

    def ask(self) -> bool:
        """`start` and `agreed` at once, where waiting does no harm."""
        self.start()
        return self.agreed()
