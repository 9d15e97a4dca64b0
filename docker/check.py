"""What there is to train with: versions, GPUs, kernels, limits, as a table. `python docker/check.py
[--gpus N]`

Exit code 0: everything that this image, or this installation, is made for is there and loads. 1:
something is not, and the last lines say what, and what to do.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import resource
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

GIB = 2**30
SHARED_MEMORY = "/dev/shm"  # noqa: S108
SHARED_MEMORY_GIB = 1  # that NCCL and several ranks of a node can do with; Docker's default is 1/16
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets")
OPS = {
    "cpu_adam": "CPUAdamBuilder",
    "async_io": "AsyncIOBuilder",
}  # of DeepSpeed, that trainer/engine/engine.py may use


class Row(NamedTuple):
    """A line of the table; `fault` says what is wrong with it, and what to do."""

    what: str
    found: str
    fault: str | None = None


def versions() -> list[Row]:
    from trainer import __version__

    packages = [Row(name, version(name)) for name in PACKAGES]
    return [Row("packhorse", __version__), Row("python", platform.python_version()), *packages]


def gpus(asked: int | None) -> list[Row]:
    """
    Args:
        asked: so many there should be; None: one or more where torch is built for CUDA.
    """
    built_for, count = torch.version.cuda, torch.cuda.device_count()
    fault = None
    if asked is not None and count != asked:
        fault = f"{asked} GPUs are asked for, and torch sees {count}"
    elif asked is None and built_for and count == 0:
        fault = "torch sees no GPU: start the container with --gpus all, on a host with NVIDIA's container toolkit"
    rows = [
        Row("torch is built for", f"CUDA {built_for}" if built_for else "CPU"),
        Row("GPUs", str(count), fault),
    ]
    for i in range(count):
        gpu = torch.cuda.get_device_properties(i)
        rows.append(
            Row(
                f"GPU {i}",
                f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, capability {gpu.major}.{gpu.minor}",
            )
        )
    if built_for:
        from torch.cuda import nccl

        rows.append(Row("NCCL", ".".join(map(str, nccl.version()))))
    return rows


def kernels() -> list[Row]:
    """What attention and the loss run through here, as the trainer itself chooses, and flash-attn
    if it is in.
    """
    from trainer.model.attention import choose
    from trainer.model.loss import choose_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention, why = choose("auto", device, torch.bfloat16)
    rows = [
        flash_attn(),
        Row("attention in bfloat16", f"{attention} ({why})"),
        Row("loss", choose_kernel("auto", device)),
    ]
    if torch.version.cuda:
        compiler = shutil.which("gcc") or shutil.which("clang")
        fault = (
            None
            if compiler
            else "Triton, and with it Liger, needs a C compiler: apt-get install gcc libc6-dev"
        )
        rows.append(Row("Triton's C compiler", compiler or "none", fault))
    return rows


def flash_attn() -> Row:
    if importlib.util.find_spec("flash_attn") is None:
        return Row("flash-attn", "not in")
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        fault = f"flash-attn is in, and does not load ({error}): it was built for another torch, or another CUDA"
        return Row("flash-attn", "broken", fault)
    return Row("flash-attn", version("flash-attn"))


def deepspeed_ops() -> list[Row]:
    """Whether they are compiled already, and load."""
    os.environ.setdefault(
        "DS_ACCELERATOR", "cuda" if torch.version.cuda else "cpu"
    )  # also where no GPU is seen
    importlib.import_module("trainer.engine.engine")  # sets up DeepSpeed as for training
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    accelerator: Any = get_accelerator()
    compiler = shutil.which("c++")
    rows = []
    for name, builder_name in OPS.items():
        builder = accelerator.create_op_builder(builder_name)
        if not installed_ops.get(name):
            fault = (
                None
                if compiler
                else f"{name} is not compiled, and there is no compiler: apt-get install g++"
            )
            rows.append(Row(name, "compiled at its first use" if compiler else "missing", fault))
        elif torch.version.cuda and not torch.cuda.is_available():
            there = importlib.util.find_spec(builder.absolute_name())
            fault = None if there else f"{name} is said to be compiled, and its file is not there"
            rows.append(
                Row(
                    name,
                    "compiled; loads where there is a GPU's driver" if there else "missing",
                    fault,
                )
            )
        else:
            try:
                builder.load()
                rows.append(Row(name, "compiled"))
            except (ImportError, OSError, RuntimeError) as error:
                rows.append(Row(name, "broken", f"{name} is compiled, and does not load ({error})"))
    return rows


def limits() -> list[Row]:
    """Of the container: what is known to make runs fail where it is small."""
    disk = os.statvfs(SHARED_MEMORY)
    shared_gib = disk.f_blocks * disk.f_frsize / GIB
    fault = None
    if torch.cuda.device_count() > 1 and shared_gib < SHARED_MEMORY_GIB:
        fault = f"NCCL needs more shared memory than {shared_gib:.2f} GiB: docker run --ipc=host, or --shm-size=16g"
    rows = [
        Row("cores", str(len(os.sched_getaffinity(0)))),
        Row(SHARED_MEMORY, f"{shared_gib:.2f} GiB", fault),
    ]
    for name in ("memlock", "nofile", "stack"):
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))
        unlimited = soft == resource.RLIM_INFINITY
        fault = None
        if name == "memlock" and not unlimited and Path("/dev/infiniband").exists():
            fault = "RDMA needs to lock memory: docker run --ulimit memlock=-1"
        shown = f"{soft:,}" if name == "nofile" else f"{soft / 2**20:,.0f} MiB"
        rows.append(Row(f"ulimit {name}", "unlimited" if unlimited else shown, fault))
    return rows


def folders() -> list[Row]:
    """Where a run writes to; the root may well be read-only."""
    rows = [Row("user", f"{os.getuid()}:{os.getgid()}"), _folder("cache (HOME)", Path.home())]
    try:
        rows.append(_folder("temporary files", Path(tempfile.gettempdir())))
    except FileNotFoundError:
        rows.append(
            Row(
                "temporary files",
                "no folder",
                "there is nowhere to write temporary files: --tmpfs /tmp",
            )
        )
    if (runs := Path("/runs")).exists():  # as in the image
        rows.append(_folder("runs", runs))
    return rows


def _folder(what: str, path: Path) -> Row:
    if os.access(path, os.W_OK):
        return Row(what, f"{path}, {shutil.disk_usage(path).free / GIB:.0f} GiB free")
    fault = f"{path} cannot be written: mount a folder there that user {os.getuid()} may write to"
    return Row(what, f"{path}, not writable", fault)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--gpus", type=int, help="so many there must be; default: one or more, in a CUDA image"
    )
    asked = parser.parse_args().gpus
    sections = [versions(), gpus(asked), kernels(), deepspeed_ops(), limits(), folders()]
    table = Table("", "found")
    for rows in sections:
        for row in rows:
            table.add_row(row.what, row.found, style="red" if row.fault else None)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    faults = [row.fault for rows in sections for row in rows if row.fault]
    for fault in faults:
        print(f"check: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
