"""Compile the C++ ops that a run uses before DeepSpeed loads them, one process at a time.

In: a DeepSpeed configuration. Out: the ops that it needs, compiled and loaded into this process.

DeepSpeed compiles an op at its first use, through torch, which guards the build folder by a file
named `lock`. A process that is killed while it compiles leaves that file behind, and every later
process waits for it without end and without a word. Here, processes compile under flock(2), which
the kernel releases when its owner dies. Whoever holds it removes a `lock` that nobody owns.

    python -m packhorse.trainer.engine.compile_ops    # all ops, as `make install` does
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.ds_config import offload_device

OPS = {
    "cpu_adam": "CPUAdamBuilder",
    "pin_memory": "PinMemoryBuilder",  # async_io links against it
    "async_io": "AsyncIOBuilder",
}
QUIET_S = 60.0  # a build folder in which nothing changed for so long is not in use elsewhere
POLL_S = 0.2
SHOW_AFTER_S = 5.0  # loading an op that is compiled already takes less
SHOW_EVERY_S = 20.0


def needed_ops(config: Mapping[str, Any], trains: bool) -> list[str]:
    """Return the names of the ops that DeepSpeed loads under this configuration.

    Args:
        trains: whether there is an optimizer; evaluation alone needs no op of it.
    """
    optimizer = offload_device(config, "optimizer") if trains else "none"
    ops = ["cpu_adam"] if optimizer != "none" else []
    if "nvme" in (optimizer, offload_device(config, "param")):
        ops += ["pin_memory", "async_io"]
    return ops


def build_ops(names: Sequence[str]) -> None:
    """Load these ops of DeepSpeed, and compile those that are not compiled yet.

    Raises:
        BadInput: libaio is missing, which offload to an NVMe needs.
        RuntimeError: the compiler failed; the message holds its output.
    """
    if not names:
        return
    import cpuinfo
    import deepspeed.ops.op_builder as builders
    from torch.utils.cpp_extension import _get_build_directory

    # DeepSpeed asks up to three times an op what the CPU is, and waits 1.3 s for each answer.
    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
    for name in names:
        builder = getattr(builders, OPS[name])()
        if _is_prebuilt(name):
            builder.load()
            continue
        if name == "async_io" and not builder.is_compatible():
            raise BadInput(
                "offload to an NVMe needs libaio and its headers: apt-get install libaio-dev"
            )
        compile_once(Path(_get_build_directory(name, False)), builder.load)


def set_build_folder_and_flags() -> None:
    """Choose where, how and by which ninja DeepSpeed compiles; engine.py calls this at import.

    DeepSpeed loads ops by itself, too, as soon as a model is built in shards on an NVMe. With other
    flags there the op would be compiled anew, for minutes, and by `build_ops` once more.
    """
    import deepspeed.ops.op_builder as builders

    _use_own_build_folder()
    # A ninja of another version, as a distribution's, starts its log anew and compiles every file
    # again. The one beside this Python comes first, also where no shell has activated it.
    own = sysconfig.get_path("scripts")
    if shutil.which("ninja", path=own):
        os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])
    for name in OPS.values():
        _compile_less(getattr(builders, name))


def _compile_less(builder: Any) -> None:
    """Compile without what the ops do not need, which takes half of the compiler's time.

    There is no later flag to undo -g: DeepSpeed's stand last in the compiler's command. By the
    macro torch/extension.h leaves torch/all.h out, as for what torch.compile writes.
    """
    arguments = builder.cxx_args
    builder.cxx_args = lambda self: [
        *(flag for flag in arguments(self) if flag != "-g"),
        "-DTORCH_INDUCTOR_CPP_WRAPPER",
    ]


def _is_prebuilt(name: str) -> bool:
    """Return whether DeepSpeed was installed with this op, as in the container's image."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops

    accelerator: Any = get_accelerator()
    return bool(installed_ops.get(name)) and accelerator_name == accelerator._name


def _use_own_build_folder() -> None:
    """Let torch compile into this virtual environment, in a folder of this kind of machine.

    Builds of two environments in torch's common folder would undo each other. DeepSpeed compiles
    with -march=native, so nodes that share the environment but not the CPU would crash on each
    other's instructions.
    """
    import torch

    if sys.prefix == sys.base_prefix or not os.access(sys.prefix, os.W_OK):
        return
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in cpu if line.startswith(("flags", "Features"))), "")
    machine = hashlib.blake2b(flags.encode(), digest_size=4).hexdigest()
    kind = f"{'cuda' if torch.cuda.is_available() else 'cpu'}-{machine}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions" / kind))


def compile_once(folder: Path, load: Callable[[], object]) -> None:
    """Call `load`, which compiles an op into `folder` where it is not there yet.

    Of several processes one compiles; the others wait, and then find the op compiled.
    """
    with _exclusive(folder):
        _remove_abandoned_lock(folder)
        with _progress(folder):
            load()


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a build folder, which no process keeps beyond its own end."""
    with folder.with_name(f"{folder.name}.flock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            dist.log.info("waiting for another process that compiles DeepSpeed's %s", folder.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some shared file systems have no locks. torch's own lock file still keeps processes
            # apart, and is removed only where nobody uses the folder.
            dist.log.warning(
                "%s has no file locks (%s); set TORCH_EXTENSIONS_DIR to a folder on this machine",
                *(folder.parent, error.strerror),
            )
        yield


def _remove_abandoned_lock(folder: Path) -> None:
    """Remove the lock file that a killed process left, but wait for a process that still compiles.

    The caller holds our own lock, so the owner is a killed process, or one that compiles by
    DeepSpeed alone.
    """
    lock = folder / "lock"
    waits = False
    while lock.exists():
        if _is_quiet(folder) and not _is_in_use(folder):
            lock.unlink(missing_ok=True)
            dist.log.warning(
                "removed %s: the process that compiled DeepSpeed's %s was killed; compiling anew",
                *(lock, folder.name),
            )
            return
        if not waits:
            waits = True
            dist.log.info(
                "%s: another process compiles DeepSpeed's %s, or was killed in it; waiting until "
                "it ends, or until nothing has changed for %.0f s",
                *(lock, folder.name, QUIET_S),
            )
        time.sleep(POLL_S)


def _is_quiet(folder: Path) -> bool:
    """Return whether nothing in the folder changed lately; /proc tells of this machine alone."""
    newest = 0.0
    for path in (folder, *folder.iterdir()):
        with suppress(FileNotFoundError):
            newest = max(newest, path.stat().st_mtime)
    return time.time() - newest > QUIET_S


def _is_in_use(folder: Path) -> bool:
    """Return whether a process of this machine compiles in the folder.

    torch keeps the lock file open while it compiles. ninja and the compilers run in the folder,
    and outlive a parent that is killed.
    """
    lock = str(folder / "lock")
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.cwd() == str(folder):
                return True
            if any(file.path == lock for file in process.open_files()):
                return True
    return False


@contextmanager
def _progress(folder: Path) -> Iterator[None]:
    """Say what is compiled where it takes long, and how far it is."""
    ended = threading.Event()
    began = time.monotonic()

    def show() -> None:
        pause_s = SHOW_AFTER_S
        while not ended.wait(pause_s):
            pause_s = SHOW_EVERY_S
            ninja = folder / "build.ninja"
            files = ninja.read_text().count(".o: compile ") if ninja.exists() else 0
            compiled, seconds = len(list(folder.glob("*.o"))), time.monotonic() - began
            dist.log.info(
                "compiling DeepSpeed's %s, once per machine and environment, a few minutes: "
                "%d of %d files after %.0f s",
                *(folder.name, compiled, files, seconds),
            )

    thread = threading.Thread(target=show, name="compile-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def main() -> None:
    """Compile all ops, without async_io where libaio is missing: only NVMe offload needs it."""
    dist.choose_accelerator()
    dist.start_logging()
    set_build_folder_and_flags()
    for name in OPS:
        try:
            build_ops([name])
        except BadInput as error:
            dist.log.warning("DeepSpeed's %s is not compiled: %s", name, error)


if __name__ == "__main__":
    main()
