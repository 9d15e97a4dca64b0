"""`import packhorse` calls the command, and gives back values and errors of Python.

The command is a stand-in here; docs/python.ipynb runs the real one (tests/runs/test_notebook.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import packhorse
from packhorse.trainer.config import packaged
from packhorse.trainer.datatypes import LAUNCHER
from tests.ranks import ROOT


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Let a program be the command. It runs in the current folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "program.py"
    monkeypatch.setattr(packaged, "MAIN", str(program))
    return lambda text: program.write_text(f"import json, os, sys\n{text}")


ARGUMENTS = "open('arguments.json', 'w').write(json.dumps(sys.argv[1:]))\n"
A_RUN = """
os.makedirs("runs/debug")
with open("runs/debug/metrics.jsonl", "w") as file:
    for step, loss in ((1, 9.0), (2, 5.0), (2, 4.0)):
        print(json.dumps({"step": step, "train/loss": loss}), file=file)
    print(json.dumps({"step": 2, "eval/loss": 3.0}), file=file)
    for damaged in ({"train/loss": 1.0}, {"step": 3, "train/loss": [1]}, {"step": "x"}):
        print(json.dumps(damaged), file=file)
metrics = {"exact": {"value": 0.5, "count": 2}, "judge": {"value": None, "count": 0}}
line = {"step": 2, "eval_loss": 3.0, "metrics": metrics}
open("runs/debug/evaluations.jsonl", "w").write(json.dumps(line) + "\\n")
"""


def test_import_takes_neither_torch_nor_what_reads_recipes() -> None:
    program = (
        "import sys, packhorse\n"
        "heavy = {'torch', 'pydantic', 'yaml', 'numpy', 'typer'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_changes_are_given_as_values() -> None:
    changes = {"optim.lr": 1e-5, "data.cache": Path("é: x"), "eval.generate": None}
    recipe = packhorse.load_recipe("debug", {**changes, "adapter": {"rank": 4}})
    assert (recipe.optim.lr, recipe.data.cache, recipe.eval.generate) == (1e-5, "é: x", None)
    assert recipe.adapter == packhorse.load_recipe("debug", {"adapter.rank": 4}).adapter
    with pytest.raises(packhorse.BadInput, match=r"did you mean `optim\.lr`"):
        packhorse.load_recipe("debug", {"optim.lrr": 1})
    with pytest.raises(packhorse.BadInput, match=r"run\.tags: a set is no value of a recipe"):
        packhorse.load_recipe("debug", {"run.tags": {"a"}})


@pytest.mark.parametrize(("code", "done"), [(0, True), (75, False)])
def test_a_run_gives_what_its_folder_holds(
    command: Callable[[str], int], code: int, done: bool
) -> None:
    command(ARGUMENTS + A_RUN + f"sys.exit({code})")
    result = packhorse.train("debug", {"optim.lr": 0.5}, nproc=2)
    assert json.loads(Path("arguments.json").read_text()) == [
        *("train", "--nproc=2", "--", "debug", "optim.lr=0.5"),
    ]
    assert (result.run_dir, result.done) == (Path("runs/debug"), done)
    assert result.losses == {1: 9.0, 2: 4.0}
    assert result.evaluations == {2: {"eval_loss": 3.0, "exact": 0.5, "judge": None}}
    assert result.checkpoint is None


def test_a_path_that_begins_with_a_dash_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(packhorse.BadInput, match="-x: not a run folder"):
        packhorse.export("-x", "-out")


def test_bad_input_is_raised_with_the_commands_sentence(
    command: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    command("sys.exit(print('a line\\npackhorse: error: data: no rows', file=sys.stderr) or 2)")
    with pytest.raises(packhorse.BadInput, match=r"^data: no rows$"):
        packhorse.prepare("debug")
    assert "a line\n" in capfd.readouterr().err


def test_a_failed_run_is_raised_with_its_output_and_its_logs(
    command: Callable[[str], int],
) -> None:
    command("os.makedirs('runs/debug/logs'); sys.exit('rank 1 failed')")
    with pytest.raises(
        packhorse.RunFailed, match=r"exit code 1; .* in runs/debug/logs\n(.*\n)*rank 1 failed$"
    ):
        packhorse.train("debug")


def test_a_stopped_evaluation_has_no_result(command: Callable[[str], int]) -> None:
    command("sys.exit(75)")
    with pytest.raises(packhorse.RunFailed, match="exit code 75"):
        packhorse.evaluate("runs/debug", "debug")


OF_A_WORKER = (LAUNCHER, "RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT")

# A launcher that saves when it is asked to, and says how often it was asked.
SAVES = """
import signal, time
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
open("ready", "w")
if {"RANK", "TORCHELASTIC_RUN_ID", "MASTER_PORT"} & set(os.environ):
    sys.exit("it would be a rank of the caller's run")
while not asked:
    time.sleep(0.01)
time.sleep(0.2)
open("saved", "w").write(" ".join(asked))
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_saves_when_its_caller_is_interrupted_or_killed(
    command: Callable[[str], int], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    command(SAVES)
    for name in OF_A_WORKER:  # the caller is one, of another run
        monkeypatch.setenv(name, "1")
    caller = (
        "import sys, packhorse; from packhorse.trainer.config import packaged\n"
        "packaged.MAIN = sys.argv[1]\n"
        "try:\n"
        "    packhorse.train('debug')\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', open('saved').read())"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", caller, packaged.MAIN], env=env, stdout=subprocess.PIPE, text=True
    )
    _wait_for(Path("ready"))
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    _wait_for(Path("saved"))
    assert out == ("interrupted SIGTERM\n" if number == signal.SIGINT else "")


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)
