"""The faults of disks and clocks that campaigns use (tests/faults.cpp) happen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.power_cut import drop_unsynced, sizes
from tests.runs.killed import compile_faults

PROGRAM = """
import os, sys, time
try:
    with open(sys.argv[1], "wb", buffering=0) as file:
        print(file.write(b"x" * 1000))
        os.fsync(file.fileno())
    os.rename(sys.argv[1], sys.argv[1] + ".renamed")
    with open(sys.argv[1], "wb", buffering=0) as file:
        file.write(b"x" * 50)
except OSError as error:
    print(error.strerror)
if "FAULT_CLOCK" in os.environ:
    first = time.time()
    while abs(time.time() - first) < 3000:
        time.sleep(0.1)
    print("jumped")
"""
UNHARMED = "1000\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_faults(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"FAULT_DISK": "full:1"}, "No space left on device\n"),
        ({"FAULT_DISK": "failing:2"}, f"{UNHARMED}Input/output error\n"),
        ({"FAULT_DISK": "short:0"}, "500\n"),
        ({"FAULT_CLOCK": "3600"}, f"{UNHARMED}jumped\n"),
    ],
    ids=str,
)
def test_a_fault_happens_in_its_folder_alone(library, tmp_path, fault, said):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    shim = {"LD_PRELOAD": str(library), "FAULT_FOLDER": str(tmp_path / "here")}
    for place, expected in (("here", said), ("elsewhere", UNHARMED)):
        program = [sys.executable, "-c", PROGRAM, tmp_path / place / "x"]
        environ = {**os.environ, **shim, **fault}
        found = subprocess.check_output(program, env=environ, text=True, timeout=100)
        assert found == (said if "FAULT_CLOCK" in fault else expected)


def test_what_was_not_fsynced_is_lost(library, tmp_path):
    run, journal = tmp_path / "run", tmp_path / "synced"
    run.mkdir()
    (run / "log").write_text("old\n")
    before = sizes(run)
    environ = {"LD_PRELOAD": str(library), "FAULT_FOLDER": str(run), "FAULT_SYNCED": str(journal)}
    program = [sys.executable, "-c", PROGRAM, run / "x"]
    subprocess.run(program, env={**os.environ, **environ}, check=True)
    with (run / "log").open("a") as file:
        file.write("new\n")
    drop_unsynced(run, before, journal)
    assert {path.name: path.stat().st_size for path in run.iterdir()} == {
        "x.renamed": 1000,
        "x": 0,
        "log": 4,
    }
