"""Ranks, the device, seeds, the process group, the stop flag and rank-0 logging."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def seed_from(*parts: int | str) -> int:
    """A seed in [0, 2^63) from what it belongs to, as `seed_from(seed, "noise", epoch, document)`.

    Unlike Python's own hash it is the same in every process, and neighbouring parts give unrelated
    seeds.
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


# ------------------------------------------------------------------------------------ process group


@contextmanager
def process_group() -> Iterator[None]:
    """NCCL between GPUs, gloo between CPU processes; taken down at the end, or ranks fail at exit
    now and then.

    Not after an error: the others would fall at once, and the launcher could see one of them fail
    first.
    """
    import torch
    import torch.distributed as td

    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("LOCAL_RANK", "0")
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    td.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30))
    yield
    td.destroy_process_group()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sums, in float64. Every rank calls it."""
    import torch
    import torch.distributed as td

    tensor = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        td.all_reduce(tensor)
    return tensor.tolist()


def sum_mod_2_64(values: list[int]) -> list[int]:
    """Element-wise sums of unsigned 64-bit numbers, which wrap around. Every rank calls it."""
    import torch
    import torch.distributed as td

    tensor = torch.tensor(
        [value - 2**64 if value >= 2**63 else value for value in values], dtype=torch.int64
    )
    if world_size() > 1:
        td.all_reduce(tensor)
    return [value % 2**64 for value in tensor.tolist()]


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    import torch.distributed as td

    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def run_on_rank0(
    work: Callable[[], object], explain: Callable[[OSError], str] = str, group: Any = None
) -> str | None:
    """Do it on rank 0. What went wrong, on every rank: one that leaves alone would let the others
    hang.
    """
    failure: str | None = None
    if is_main():
        try:
            work()
        except OSError as error:
            failure = explain(error)
    return gather(failure, group)[0]


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, on every rank, in the order of ranks."""
    import torch.distributed as td

    if world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * world_size()
    td.all_gather_object(boxes, value, group=group)
    return boxes


def new_group() -> Any:
    """A gloo group beside the main one, for another thread or while a GPU works. Every rank calls
    it.
    """
    import torch.distributed as td

    return td.new_group(backend="gloo", timeout=timedelta(days=1)) if world_size() > 1 else None


def barrier() -> None:
    import torch.distributed as td

    if world_size() > 1:
        td.barrier()


def all_reduce_speed() -> tuple[float, float]:
    """Size in MiB of an all-reduce over all ranks, and its speed in GB/s as NCCL's own tests count
    it: what each rank sends, 2 (n - 1) / n of the size, over the time. The median of five, after
    one that connects. Every rank calls it.
    """
    import torch
    import torch.distributed as td

    on_gpu = device().type == "cuda"
    mib = 256.0 if on_gpu else 4.0
    tensor = torch.zeros(int(mib * 2**20) // 4, dtype=torch.float32, device=device())
    times_s = []
    for _ in range(6):
        barrier()
        began = time.perf_counter()
        td.all_reduce(tensor)
        if on_gpu:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - began)
    sent = 2 * (world_size() - 1) / world_size() * mib * 2**20
    return mib, sent / sorted(times_s[1:])[2] / 1e9


# ----------------------------------------------------------------------------------------- stopping


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """SIGTERM or SIGUSR1 on any rank stops all of them at the same place (C9).

    Before there is a process group the ranks agree through the launcher's store: in preparation
    each asks `raised_early`, and `wait_for_ranks` lets all of them into the group or none. From
    then on `start` launches one small max-reduction on a gloo group kept beside NCCL, and `agreed`
    reads it: no GPU waits.
    """

    def __init__(self) -> None:
        self.raised = False
        self._group: Any = None
        self._pending: Any = None
        for signum in _STOP_SIGNALS:
            signal.signal(signum, self._raise)
        # the launcher starts workers with these held back, so that none is lost before there is a
        # handler
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        self._store = _launchers_store()

    def _raise(self, *_: object) -> None:
        self.raised = True

    def raise_at(self, time_s: float) -> None:
        """Raise the flag at this time, in seconds since 1970, as a signal would."""
        timer = threading.Timer(max(0.0, time_s - time.time()), self._raise)
        timer.daemon = True
        timer.start()

    def raised_early(self) -> bool:
        """Whether any rank has the flag up, before there is a process group. Waits for nobody."""
        if self._store is None:
            return self.raised
        if self.raised:
            self._store.compare_set(_START, "", _NEVER)
        return self._store.check([_START]) and self._store.get(_START) == _NEVER

    def wait_for_ranks(self) -> bool:
        """Wait until every rank is here, ready for the process group, whose own waiting nothing can
        interrupt. False on all ranks where one of them has the flag up first: the key `_START` is
        written once."""
        if self._store is None:
            return not self.raised
        if self._store.add("packhorse/ready", 1) == world_size():
            self._store.compare_set(_START, "", _NOW)
        while not self._store.check([_START]):
            if self.raised:
                self._store.compare_set(_START, "", _NEVER)
            time.sleep(_MEET_POLL_S)
        return self._store.get(_START) == _NOW

    def attach_group(self) -> None:
        """Make the group on which ranks agree. Every rank calls it, inside the process group."""
        self._group = new_group()

    def start(self) -> None:
        import torch
        import torch.distributed as td

        flag = torch.tensor([int(self.raised)], dtype=torch.int32)
        work = (
            td.all_reduce(flag, op=td.ReduceOp.MAX, group=self._group, async_op=True)
            if self._group
            else None
        )
        self._pending = (flag, work)

    def agreed(self) -> bool:
        """Whether any rank had the flag up when `start` was called: the same answer on all ranks."""
        flag, work = self._pending
        if work is not None:
            work.wait()
        return bool(flag.item())

    def poll(self) -> bool:
        """`start` and `agreed` at once, where waiting does no harm."""
        self.start()
        return self.agreed()


_START, _NOW, _NEVER = "packhorse/start", b"now", b"never"
_MEET_POLL_S = 0.1


def _launchers_store() -> Any:
    """The store that the launcher hosts for its workers; None for a single rank, or where there is
    no such launcher.
    """
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
