"""Check what this machine has for training: versions, GPUs, kernels, limits, as a table.

usage: python docker/check.py [--gpus N]

Exit code 0: everything that this image, or this installation, was built for exists and loads. 1:
something does not; the last lines say what, and what to do.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

GIB = 2**30
SHARED_MEMORY = "/dev/shm"  # noqa: S108
SHARED_MEMORY_GIB = 1  # enough for NCCL between the ranks of a node; Docker's default is 1/16
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets")


class Row(NamedTuple):
    """A line of the table. `fault` says what is wrong, and what to do."""

    what: str
    found: str
    fault: str | None = None


def versions() -> list[Row]:
    from packhorse import __version__

    packages = [Row(name, version(name)) for name in PACKAGES]
    return [Row("packhorse", __version__), Row("python", platform.python_version()), *packages]


def gpus(required: int | None) -> list[Row]:
    """Return rows about CUDA, the GPUs and NCCL.

    Args:
        required: the number of GPUs. None: one or more if torch is built for CUDA.
    """
    built_for, count = torch.version.cuda, torch.cuda.device_count()
    fault = None
    if required is not None and count != required:
        fault = f"{required} GPUs are required, but torch sees {count}"
    elif required is None and built_for and count == 0:
        fault = (
            "torch sees no GPU: start the container with --gpus all, on a host with NVIDIA's "
            "container toolkit"
        )
    rows = [
        Row("torch is built for", f"CUDA {built_for}" if built_for else "CPU"),
        Row("GPUs", str(count), fault),
    ]
    for i in range(count):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / GIB:.0f} GiB"
        rows.append(Row(f"GPU {i}", f"{gpu.name}, {memory}, capability {gpu.major}.{gpu.minor}"))
    if built_for:
        from torch.cuda import nccl

        rows.append(Row("NCCL", ".".join(map(str, nccl.version()))))
    return rows


def kernels() -> list[Row]:
    """Return the kernels of attention and loss that the trainer would choose on this machine."""
    from packhorse.trainer.model.attention import choose
    from packhorse.trainer.model.loss import choose_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention, why = choose("auto", device, torch.bfloat16)
    rows = [
        flash_attn(),
        Row("attention in bfloat16", f"{attention} ({why})"),
        Row("loss", choose_kernel("auto", device)),
    ]
    if torch.version.cuda:
        compiler = shutil.which("gcc") or shutil.which("clang")
        fault = "Triton and Liger need a C compiler: apt-get install gcc libc6-dev"
        rows.append(Row("Triton's C compiler", compiler or "none", None if compiler else fault))
    return rows


def flash_attn() -> Row:
    """Return which versions of flash-attn are installed, after their import."""
    from packhorse.trainer.model.flash_versions import MODULES

    found = []
    for number, module in MODULES.items():
        name = "flash-attn" if number == 2 else f"flash-attn-{number}"
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # a kernel for another CUDA fails in ways of its own
            fault = (
                f"{name} is installed, but does not load ({error}): it was built for another torch "
                f"or another CUDA"
            )
            return Row("flash-attn", "broken", fault)
        found.append(f"{name} {installed}")
    return Row("flash-attn", ", ".join(found) or "not installed")


def deepspeed_ops() -> list[Row]:
    """Return whether DeepSpeed's ops are compiled, and load."""
    # without a visible GPU DeepSpeed would choose the CPU, and its ops
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.version.cuda else "cpu")
    importlib.import_module("packhorse.trainer.engine.engine")  # sets up DeepSpeed as for training
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    from packhorse.trainer.engine.compile_ops import OPS

    accelerator: Any = get_accelerator()
    compiler = shutil.which("c++")
    rows = []
    for name, builder_name in OPS.items():
        builder = accelerator.create_op_builder(builder_name)
        if not installed_ops.get(name):
            fault = f"{name} is not compiled, and there is no compiler: apt-get install g++"
            found = "compiled at its first use" if compiler else "missing"
            rows.append(Row(name, found, None if compiler else fault))
        elif torch.version.cuda and not torch.cuda.is_available():
            # loading it needs the GPU's driver, which is not in the image
            spec = importlib.util.find_spec(builder.absolute_name())
            fault = f"DeepSpeed lists {name} as compiled, but its file is missing"
            found = "compiled; loads where there is a GPU's driver" if spec else "missing"
            rows.append(Row(name, found, None if spec else fault))
        else:
            try:
                builder.load()
                rows.append(Row(name, "compiled"))
            except (ImportError, OSError, RuntimeError) as error:
                rows.append(Row(name, "broken", f"{name} is compiled, but does not load ({error})"))
    return rows


def limits() -> list[Row]:
    """Return the limits of the container that make runs fail if they are too small."""
    disk = os.statvfs(SHARED_MEMORY)
    shared_gib = disk.f_blocks * disk.f_frsize / GIB
    fault = None
    if torch.cuda.device_count() > 1 and shared_gib < SHARED_MEMORY_GIB:
        fault = (
            f"NCCL needs more shared memory than {shared_gib:.2f} GiB: docker run --ipc=host, or "
            f"--shm-size=16g"
        )
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
    """Return the folders that a run writes to. The rest of the image may be read-only."""
    rows = [Row("user", f"{os.getuid()}:{os.getgid()}"), _folder("cache (HOME)", Path.home())]
    try:
        rows.append(_folder("temporary files", Path(tempfile.gettempdir())))
    except FileNotFoundError:
        fault = "there is no folder for temporary files: docker run --tmpfs /tmp"
        rows.append(Row("temporary files", "no folder", fault))
    if (runs := Path("/runs")).exists():  # as in the image
        rows.append(_folder("runs", runs))
    return rows


def _folder(what: str, path: Path) -> Row:
    if os.access(path, os.W_OK):
        return Row(what, f"{path}, {shutil.disk_usage(path).free / GIB:.0f} GiB free")
    fault = f"{path} cannot be written: mount a folder there that user {os.getuid()} can write to"
    return Row(what, f"{path}, not writable", fault)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--gpus", type=int, help="required number; default: one or more in a CUDA image"
    )
    required = parser.parse_args().gpus
    sections = [versions(), gpus(required), kernels(), deepspeed_ops(), limits(), folders()]
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
