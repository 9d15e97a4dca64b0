"""What ranks share: the process group, collectives, seeds and rank-0 logging.

In: the launcher's environment variables (RANK, WORLD_SIZE ...). Out: values that all ranks
agree on. With one rank every collective returns its own value, without a process group.

torch is imported inside functions: commands that need no torch start faster.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
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


def choose_accelerator() -> None:
    """Let DeepSpeed use the CPU where torch sees no GPU. Else it warns on stdout, where `export`
    and `chat` write what they have to say.

    Call it before anything imports DeepSpeed; transformers and peft do where it is installed.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def seed_from(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) for a purpose, as `seed_from(seed, "noise", epoch, document)`.

    Unlike Python's own hash it is the same in every process. Neighbouring parts give unrelated
    seeds.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def escape_controls(text: str) -> str:
    """Return a text with escapes for all but printable characters, new lines and tabs: no text of
    a row, a recipe or a server controls the terminal, or is read backwards there."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


class _StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is now: while a bar is shown (utils/progress.py), that is a
    stream which writes above it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _LogFile(logging.FileHandler):
    """Appends to a file. A file that cannot be written any more is given up, and that is said."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        log.removeHandler(self)
        log.warning("%s is not written any more: %s", self.baseFilename, sys.exc_info()[1])
        # what is left in the buffer would fail again whenever the file is closed
        stream: Any = self.stream
        self.stream = None  # type: ignore[assignment]
        with suppress(OSError):
            stream.close()


def start_logging() -> None:
    """Log to stderr with the time of day: everything from rank 0, warnings and errors from the
    others.
    """
    handler = _StderrHandler()
    prefix = "" if is_main() else f"[rank {rank()}] "
    handler.setFormatter(_Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if is_main() else logging.WARNING)
    log.propagate = False


@contextmanager
def saved_log(path: Path) -> Iterator[None]:
    """Append what rank 0 logs inside the block to a file, too, with the date, and the exception
    that ends the block.
    """
    if not is_main():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _LogFile(path, encoding="utf-8")
    file.setFormatter(_Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(file)
    try:
        yield
    except Exception:
        # to the file alone: whoever catches it shows it on the terminal
        if file in log.handlers:
            place = (log.name, logging.ERROR, __file__, 0)
            file.handle(logging.LogRecord(*place, "the run has failed", None, sys.exc_info()))
        raise
    finally:
        log.removeHandler(file)
        file.close()


# ------------------------------------------------------------------------------------ process group


@contextmanager
def process_group() -> Iterator[None]:
    """Hold a process group: NCCL between GPUs, gloo between CPU processes.

    On a single machine both listen at the loopback alone, unless the user names an interface: that
    of gloo is NCCL's, too.
    """
    import torch
    import torch.distributed as td

    # of a process that no launcher started; DeepSpeed wants all of them
    single = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**single, "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    if world_size() in (1, local_world_size()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        # not the other way round: NCCL also takes prefixes and exclusions, gloo takes names
        os.environ.setdefault("NCCL_SOCKET_IFNAME", chosen)
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    # by MASTER_ADDR torch would make a store that listens on all interfaces, for nobody
    alone: dict[str, Any] = {}
    if world_size() == 1:
        alone = {"store": td.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    td.init_process_group(backend, timeout=timedelta(minutes=30), **alone)
    yield
    # Without this, ranks fail at exit now and then. Not in a `finally`: after an error the others
    # would fail at once in their collectives, and the launcher might report one of them instead.
    td.destroy_process_group()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Return element-wise sums over ranks, in float64. Every rank calls it."""
    return _all_reduce(values, "float64")


def max_over_ranks(values: list[float]) -> list[float]:
    """Return element-wise maxima over ranks, NaN where a rank has one. Every rank calls it."""
    import torch

    return torch.tensor(gather(values), dtype=torch.float64).amax(0).tolist()


def sum_mod_2_64(values: list[int]) -> list[int]:
    """Return element-wise sums over ranks of unsigned 64-bit numbers, mod 2^64.

    Every rank calls it.
    """
    # as signed numbers, which torch can reduce: they wrap around to the same bits
    signed = [value - 2**64 if value >= 2**63 else value for value in values]
    return [value % 2**64 for value in _all_reduce(signed, "int64")]


def _all_reduce(values: list[Any], dtype: str) -> list[Any]:
    import torch
    import torch.distributed as td

    tensor = torch.tensor(values, dtype=getattr(torch, dtype))
    if world_size() > 1:
        td.all_reduce(tensor)
    return tensor.tolist()


# Values travel as JSON. torch's collectives of objects pickle, and who reaches gloo's ports would
# then run code in every rank. A single rank's values take the same way: what JSON changes, such as
# a tuple into a list, is seen in every test.


def _encoded(value: Any) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(text: torch.Tensor) -> Any:
    return json.loads(text.numpy().tobytes())


def broadcast(value: Any) -> Any:
    """Return rank 0's value, which JSON can hold. Every rank calls it."""
    import torch
    import torch.distributed as td

    text = _encoded(value if is_main() else None)
    if world_size() > 1:
        size = torch.tensor([len(text)])
        td.broadcast(size, src=0)
        if not is_main():
            text = torch.empty(int(size), dtype=torch.uint8)
        td.broadcast(text, src=0)
    return _decoded(text)


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
    """Return all ranks' values, which JSON can hold, in their order. Every rank calls it."""
    import torch
    import torch.distributed as td

    text = _encoded(value)
    if world_size() == 1:
        return [_decoded(text)]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    td.all_gather(sizes, torch.tensor([len(text)]), group=group)
    longest = max(map(int, sizes))
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    padded = torch.nn.functional.pad(text, (0, longest - len(text)))
    td.all_gather(texts, padded, group=group)
    return [_decoded(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]


def new_group() -> Any:
    """Return a gloo group beside the main one, for another thread or while a GPU works.

    None for a single rank. Every rank calls it.
    """
    import torch.distributed as td

    # a rank may come to it late, as after a slow write; hang_watchdog.py ends what hangs
    return td.new_group(backend="gloo", timeout=timedelta(days=1)) if world_size() > 1 else None


def close_group(group: Any) -> None:
    """End a group of `new_group`, whose threads wake 100 times a second also where none uses it."""
    import torch.distributed as td

    if group is not None:
        td.destroy_process_group(group)


def consecutive_group(size: int) -> Any:
    """Return the process group of `size` consecutive ranks that this rank is of. Every rank calls
    it, and `size` divides their number.
    """
    import torch.distributed as td

    return td.new_subgroups_by_enumeration(
        [list(range(first, first + size)) for first in range(0, world_size(), size)]
    )[0]


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
