"""The command: quick to answer, exact about bad input, and nothing of its own beyond that."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEBUG = "recipes/debug.yaml"


def packhorse(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainer.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)


def test_help_within_a_second():
    times = []
    for _ in range(3):  # the quickest counts: this machine may be busy
        began = time.perf_counter()
        done = packhorse("--help")
        times.append(time.perf_counter() - began)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "preview", "prepare", "export"))
    assert min(times) < 1, times


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "nowhere.yaml"], [DEBUG]])
def test_answers_and_bad_recipes_import_nothing_heavy(arguments):
    program = (
        "import sys; sys.argv[0] = 'packhorse'\n"
        "from trainer.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'deepspeed', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: the recipe cannot be read"),
        (["train", DEBUG, "optim.lrr=1"], "did you mean `optim.lr`?"),
        (["train", DEBUG, "batch.rows_per_step=0"], "`batch.rows_per_step`"),
        (["prepare", DEBUG, "data.train.0.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["preview", DEBUG, "model.name=nowhere"], "nowhere"),
        (["export", "nowhere", "--out", "never"], "nowhere: not a run folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, sentence):
    done = packhorse(*arguments)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("packhorse: error: ")]
    assert sentence in line
    assert "Traceback" not in done.stderr


def test_a_worker_of_torchrun_finds_bad_input_itself():
    worker = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    done = packhorse("train", DEBUG, "data.train.0.path=nowhere.jsonl", "run.dir=/proc/nowhere", **worker)
    assert done.returncode == 2
    assert "process with OMP_NUM_THREADS" not in done.stderr, "it launched workers of its own"
    assert done.stderr.count("packhorse: error: ") == 1


def test_another_failure_is_a_traceback_and_exit_code_1():
    program = (
        "import sys; sys.argv = ['packhorse', 'train', 'r.yaml']\n"
        "import trainer.config\n"
        "def broken(*_): raise RuntimeError('a defect of ours')\n"
        "trainer.config.load = broken\n"
        "from trainer.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a defect of ours" in done.stderr


def test_prepare_shows_what_there_is_to_train(tmp_path):
    done = packhorse("prepare", DEBUG, f"data.cache={tmp_path}", COLUMNS="120")
    assert done.returncode == 0, done.stderr
    rows = len((ROOT / "recipes/debug/train.jsonl").read_text().splitlines())
    assert f" {rows} " in done.stdout
    assert "rejected" in done.stdout
    assert "steps" in done.stdout


def test_prepare_counts_rejects_by_reason(tmp_path):
    rows = (ROOT / "recipes/debug/train.jsonl").read_text().splitlines()
    rows[3] = json.dumps({"question": "What now?", "answer": ""})
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    source = f"data.train.0.path={tmp_path / 'rows.jsonl'}"
    done = packhorse("prepare", DEBUG, source, f"data.cache={tmp_path}", "data.max_rejects=0.5", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "rejected: " in done.stdout


def test_preview_on_the_terminal_and_as_a_page(tmp_path):
    done = packhorse("preview", DEBUG, "--rows", "2", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "train.jsonl:1" in done.stdout
    assert "train.jsonl:3" not in done.stdout
    page = tmp_path / "page.html"
    done = packhorse("preview", DEBUG, "--split", "eval", "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert "eval.jsonl:1" in page.read_text()
