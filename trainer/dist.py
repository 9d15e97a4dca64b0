"""What ranks share: the process group, collectives, seeds, rank-0 logging and the stop flag.

In: the launcher's environment variables (RANK, WORLD_SIZE ...), signals. Out: values that all ranks
agree on. With one rank every collective returns its own value, without a process group.

torch is imported inside functions: commands that need no torch start faster.
"""

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
    """Return this rank's GPU, or the CPU if there is none."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def seed_from(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) for a purpose, as `seed_from(seed, "noise", epoch, document)`.

    Unlike Python's own hash it is the same in every process. Neighbouring parts give unrelated
    seeds.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def start_logging() -> None:
    """Log to stderr: everything from rank 0, warnings and errors from the others."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if is_main() else f"[rank {rank()}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    log.propagate = False


# ------------------------------------------------------------------------------------ process group


@contextmanager
def process_group() -> Iterator[None]:
    """Hold a process group: NCCL between GPUs, gloo between CPU processes."""
    import torch
    import torch.distributed as td

    single = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**single, "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    td.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30))
    yield
    # Without this, ranks fail at exit now and then. Not in a `finally`: after an error the others
    # would fail at once in their collectives, and the launcher might report one of them instead.
    td.destroy_process_group()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Return element-wise sums over ranks, in float64. Every rank calls it."""
    import torch
    import torch.distributed as td

    tensor = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        td.all_reduce(tensor)
    return tensor.tolist()


def sum_mod_2_64(values: list[int]) -> list[int]:
    """Return element-wise sums over ranks of unsigned 64-bit numbers, mod 2^64.

    Every rank calls it.
    """
    import torch
    import torch.distributed as td

    # as signed numbers, which torch can reduce: they wrap around to the same bits
    signed = [value - 2**64 if value >= 2**63 else value for value in values]
    tensor = torch.tensor(signed, dtype=torch.int64)
    if world_size() > 1:
        td.all_reduce(tensor)
    return [value % 2**64 for value in tensor.tolist()]


def broadcast(value: Any) -> Any:
    """Return rank 0's value. Every rank calls it."""
    import torch.distributed as td

    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def run_on_rank0(
    work: Callable[[], object], explain: Callable[[OSError], str] = str, group: Any = None
) -> str | None:
    """Call `work` on rank 0; return on every rank what an OSError there says, or None.

    A rank that raised alone would leave the others hanging in their next collective.
    """
    failure: str | None = None
    if is_main():
        try:
            work()
        except OSError as error:
            failure = explain(error)
    return gather(failure, group)[0]


def gather(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's value, in the order of ranks. Every rank calls it."""
    import torch.distributed as td

    if world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * world_size()
    td.all_gather_object(boxes, value, group=group)
    return boxes


def new_group() -> Any:
    """Return a gloo group beside the main one, for another thread or while a GPU works.

    None for a single rank. Every rank calls it.
    """
    import torch.distributed as td

    # a rank may come to it late, as after a slow write; hang_watchdog.py ends what hangs
    return td.new_group(backend="gloo", timeout=timedelta(days=1)) if world_size() > 1 else None


def barrier() -> None:
    import torch.distributed as td

    if world_size() > 1:
        td.barrier()


def all_reduce_speed() -> tuple[float, float]:
    """Return the size in MiB of an all-reduce over all ranks, and its speed in GB/s.

    The speed is nccl-tests' bus bandwidth: 2 (n - 1) / n of the size, which each rank sends, over
    the time. It is the median of five, after a first one that connects. Every rank calls it.
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
    """Stops all ranks at the same step when SIGTERM or SIGUSR1 reaches any of them (C9).

    Before there is a process group, ranks agree through the launcher's store: during preparation
    each asks `raised_early`, and `wait_for_ranks` lets all of them into the group or none. From
    then on `start` launches a max-reduction of one number on a gloo group of its own, and `agreed`
    reads it later, so that no GPU waits for it.
    """

    def __init__(self) -> None:
        self.raised = False
        self._group: Any = None
        self._pending: Any = None
        for signum in _STOP_SIGNALS:
            signal.signal(signum, self._raise)
        # The launcher starts workers with these blocked, so that no signal is lost before there is
        # a handler.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        self._store = _launchers_store()

    def _raise(self, *_: object) -> None:
        self.raised = True

    def raise_at(self, time_s: float) -> None:
        """Raise the flag at `time_s`, in seconds since 1970, as a signal would."""
        timer = threading.Timer(max(0.0, time_s - time.time()), self._raise)
        timer.daemon = True
        timer.start()

    def raised_early(self) -> bool:
        """Return whether any rank has raised the flag, before there is a process group.

        Waits for nobody.
        """
        if self._store is None:
            return self.raised
        if self.raised:
            self._store.compare_set(_START, "", _NEVER)
        return self._store.check([_START]) and self._store.get(_START) == _NEVER

    def wait_for_ranks(self) -> bool:
        """Return True when every rank is ready for the process group, or False, on all ranks alike,
        if one of them raised the flag first.

        Waiting inside init_process_group could not be interrupted by a signal.
        """
        if self._store is None:
            return not self.raised
        # `_START` is written once, with compare_set, so that all ranks read one decision
        if self._store.add("packhorse/ready", 1) == world_size():
            self._store.compare_set(_START, "", _NOW)
        while not self._store.check([_START]):
            if self.raised:
                self._store.compare_set(_START, "", _NEVER)
            time.sleep(_WAIT_POLL_S)
        return self._store.get(_START) == _NOW

    def attach_group(self) -> None:
        """Make the group on which ranks agree. Every rank calls it, inside the process group."""
        self._group = new_group()

    def start(self) -> None:
        """Start the ranks' vote on stopping; `agreed` returns it. Every rank calls it."""
        import torch
        import torch.distributed as td

        flag = torch.tensor([int(self.raised)], dtype=torch.int32)
        work: Any = None
        if self._group:
            work = td.all_reduce(flag, op=td.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (flag, work)

    def agreed(self) -> bool:
        """Return whether any rank had the flag up at `start`: the same answer on all ranks."""
        flag, work = self._pending
        if work is not None:
            work.wait()
        return bool(flag.item())

    def poll(self) -> bool:
        """Vote and return the answer, where waiting does no harm. Every rank calls it."""
        self.start()
        return self.agreed()


_START, _NOW, _NEVER = "packhorse/start", b"now", b"never"
_WAIT_POLL_S = 0.1


def _launchers_store() -> Any:
    """Connect to the store that torchrun's agent hosts for its workers.

    None for a single rank, or if another launcher started this one.
    """
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
