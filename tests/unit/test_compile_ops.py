"""DeepSpeed's ops are compiled once, and a process that is killed meanwhile blocks nobody.

torch's own lock is real here; what is compiled is a file that takes a moment to write.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine import compile_ops, ds_config
from tests.ranks import ROOT

# Run as a script: `FOLDER SECONDS HOW`, where HOW is `alone` for a process that knows no lock but
# torch's. Loads as torch does: under its lock file, compiles where the library is missing.
PROCESS = """
import os, sys, time
from pathlib import Path
from torch.utils.file_baton import FileBaton
from packhorse.trainer.engine import compile_ops

folder, seconds, how = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
compile_ops.QUIET_S = 0.5

def load():
    baton = FileBaton(str(folder / "lock"))
    if not baton.try_acquire():
        baton.wait()
        return
    if not (folder / "op.so").exists():
        print("compiling", flush=True)
        time.sleep(seconds)
        (folder / "op.so").touch()
    baton.release()

load() if how == "alone" else compile_ops.compile_once(folder, load)
print("loaded", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "op").mkdir()
    return tmp_path / "op"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logging.getLogger("packhorse"), "propagate", True)
    caplog.set_level(logging.INFO, "packhorse")
    return caplog


@pytest.fixture
def start(folder: Path) -> Iterator[Any]:
    processes = []

    def started(seconds: float, how: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROCESS, str(folder), str(seconds), how]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.wait()


def age(folder: Path) -> None:
    """Make everything in the folder an hour old."""
    past = time.time() - 3600
    for path in (*folder.iterdir(), folder):
        os.utime(path, times=(past, past))


@pytest.mark.timeout(120)
def test_a_lock_whose_owner_was_killed_is_taken_over(folder, start, log, monkeypatch) -> None:
    killed = start(1000)
    assert killed.stdout.readline() == "compiling\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (folder / "lock").exists(), "the test has no stale lock"
    monkeypatch.setattr(compile_ops, "QUIET_S", 0.5)
    compile_ops.compile_once(folder, lambda: (folder / "op.so").touch())
    assert (folder / "op.so").exists()
    assert not (folder / "lock").exists()
    assert "the process that compiled DeepSpeed's op was killed; compiling anew" in log.text


@pytest.mark.timeout(120)
def test_two_processes_at_once_compile_once(start) -> None:
    outputs = [process.communicate()[0] for process in [start(1), start(1)]]
    assert sorted(outputs) == ["compiling\nloaded\n", "loaded\n"]


@pytest.mark.timeout(120)
def test_an_owner_that_is_alive_is_waited_for(folder, start, log, monkeypatch) -> None:
    """Also one that compiles by DeepSpeed alone, and has written nothing for an hour."""
    owner = start(2, "alone")
    assert owner.stdout.readline() == "compiling\n"
    age(folder)
    compile_ops.compile_once(folder, lambda: None)
    assert (folder / "op.so").exists()
    assert "waiting until it ends" in log.text
    assert "removed" not in log.text


@pytest.mark.timeout(120)
def test_compilers_that_outlived_their_parent_are_waited_for(folder, start, monkeypatch) -> None:
    """ninja runs in the build folder, and is not killed with the process that started it."""
    (folder / "lock").touch()
    age(folder)
    monkeypatch.setattr(compile_ops, "QUIET_S", 0.5)
    with subprocess.Popen(["sleep", "1000"], cwd=folder) as compiler:
        waiting = start(0)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(8)
        compiler.kill()
    assert waiting.communicate()[0] == "compiling\nloaded\n"


def test_a_folder_that_changed_lately_may_be_another_machines(folder: Path) -> None:
    (folder / "lock").touch()
    assert not compile_ops._is_quiet(folder)
    age(folder)
    assert compile_ops._is_quiet(folder)
    (folder / "op.o").touch()
    assert not compile_ops._is_quiet(folder)


@pytest.mark.timeout(120)
def test_long_compiling_is_shown(folder: Path, log, monkeypatch) -> None:
    monkeypatch.setattr(compile_ops, "SHOW_AFTER_S", 0.05)

    (folder / "build.ninja").write_text("build a.o: compile a.cpp\nbuild b.o: compile b.cpp\n")
    (folder / "a.o").touch()

    def load() -> None:
        while "compiling DeepSpeed's op" not in log.text or "1 of 2 files" not in log.text:
            time.sleep(0.01)

    compile_ops.compile_once(folder, load)


@pytest.mark.parametrize(
    ("template", "trains", "ops"),
    [
        ("zero3", True, []),
        ("zero3_offload_optimizer", True, ["cpu_adam"]),
        ("zero3_offload_optimizer", False, []),
        ("zero3_offload_all", True, ["cpu_adam"]),
        ("zero3_nvme", True, ["cpu_adam", "pin_memory", "async_io"]),
        ("zero3_nvme", False, ["pin_memory", "async_io"]),
    ],
)
def test_only_the_ops_that_are_used_are_compiled(
    template: str, trains: bool, ops: list[str]
) -> None:
    config = ds_config._read_template(template)
    assert compile_ops.needed_ops(config, trains) == ops


def test_nvme_offload_without_libaio_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops import op_builder

    builders: Any = op_builder  # which fills itself when it is imported
    monkeypatch.setattr(builders.AsyncIOBuilder, "is_compatible", lambda *_: False)
    monkeypatch.setattr(compile_ops, "_is_prebuilt", lambda _: False)
    with pytest.raises(BadInput, match="apt-get install libaio-dev"):
        compile_ops.build_ops(["async_io"])


def test_deepspeed_itself_compiles_only_what_the_ops_need() -> None:
    """It loads async_io before `build_ops` does, where a model is built in shards on an NVMe."""
    from deepspeed.ops import op_builder

    import packhorse.trainer.engine.engine  # noqa: F401

    builders: Any = op_builder
    for name in compile_ops.OPS.values():
        flags = getattr(builders, name)().cxx_args()
        assert "-g" not in flags
        assert "-DTORCH_INDUCTOR_CPP_WRAPPER" in flags
    assert "torch_extensions" in os.environ["TORCH_EXTENSIONS_DIR"]


def test_the_environments_own_ninja_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another version would compile every file again, and the next start once more."""
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    compile_ops.set_build_folder_and_flags()
    assert shutil.which("ninja") == str(Path(sysconfig.get_path("scripts")) / "ninja")
