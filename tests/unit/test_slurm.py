"""Batch scripts for Slurm hold what was given, and the shell interprets none of it."""

import os
import runpy
import subprocess
from pathlib import Path

import pytest

from packhorse.launch.slurm import render, submit
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from tests.ranks import ROOT

# srun and scontrol as a batch script sees them: srun starts the command by itself
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$OUT/srun"
exit "${CODE:-0}"
"""


def run(folder: Path, text: str, *arguments: str, **env: str) -> tuple[int, list[str], str]:
    """Run the script with stand-ins for Slurm: exit code, srun's arguments, output."""
    for name, program in {"srun": SRUN, "scontrol": '#!/bin/sh\necho "scontrol $*"\n'}.items():
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
    script = folder / "script.sh"
    script.write_text(text)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "OUT": str(folder),
    }
    done = subprocess.run(
        ["bash", str(script), *arguments],
        env=os.environ | job | {"PATH": f"{folder}:{os.environ['PATH']}"} | env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, (folder / "srun").read_text().splitlines(), done.stdout + done.stderr


def rendered(**changes) -> str:
    return render(
        **{"options": {"nodes": "2"}, "recipe": "recipe.yaml", "packhorse": "packhorse", **changes}
    )


def test_the_scripts_of_the_folder_are_the_templates() -> None:
    """`python slurm/make_scripts.py` updates them."""
    scripts = runpy.run_path(str(ROOT / "slurm" / "make_scripts.py"))["scripts"]()
    assert {path.name for path in scripts} == {path.name for path in (ROOT / "slurm").glob("*.sh")}
    for path, text in scripts.items():
        assert path.read_text(encoding="utf-8") == text
        assert load_recipe(ROOT / "recipes" / f"{path.stem}.yaml").run.dir == f"runs/{path.stem}"


def test_one_launcher_a_node_gets_the_recipe_the_overrides_and_the_scripts_arguments(tmp_path):
    text = rendered(overrides=["optim.lr=1e-5", "run.dir=/a b/$(touch x)'"])
    code, words, said = run(tmp_path, text, "train.seed=1")
    assert code == 0, said
    launcher = [
        "packhorse",
        "train",
        "recipe.yaml",
        "optim.lr=1e-5",
        "run.dir=/a b/$(touch x)'",
        "train.seed=1",
    ]
    assert words[-6:] == launcher
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0"} <= set(
        words[:-6]
    )
    assert "start 1 on 2 nodes: n[1-2]" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("ended", "queued"), [("75", True), ("0", False), ("1", False), ("2", False), ("137", False)]
)
def test_exit_code_75_alone_queues_the_job_again(tmp_path, ended, queued):
    code, _, said = run(tmp_path, rendered(), CODE=ended, SLURM_RESTART_COUNT="2")
    assert code == int(ended)
    assert ("scontrol requeue 7" in said) == queued
    assert "start 3 on 2 nodes" in said


def test_later_starts_train_what_the_recipe_said_at_the_first(tmp_path):
    recipe, kept = tmp_path / "recipe.yaml", tmp_path / "slurm-7.yaml"
    recipe.write_text("first")
    for start in ("0", "1"):
        code, words, said = run(tmp_path, rendered(), SLURM_RESTART_COUNT=start)
        assert (code, words[-1], kept.read_text()) == (0, str(kept), "first"), said
        recipe.write_text("an edit")
    code, _, said = run(tmp_path, rendered(), SLURM_RESTART_COUNT="0")
    assert (code, kept.read_text()) == (2, "first")
    assert f"{kept} exists, and is not of this job" in said
    assert run(tmp_path, rendered(is_copy=True))[1][-1] == "recipe.yaml"
    assert run(tmp_path, rendered(recipe="debug"))[1][-1] == "debug", "a packaged one"


def test_a_sif_file_runs_in_apptainer(tmp_path):
    _, words, _ = run(tmp_path, rendered(container="/images/a b.sif", mounts=["/work", "/data"]))
    inside = [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        "/work,/data",
        "--pwd",
        str(tmp_path),
        "/images/a b.sif",
    ]
    assert words[-len(inside) - 3 :] == [*inside, "packhorse", "train", "recipe.yaml"]


def test_another_image_runs_in_pyxis(tmp_path):
    _, words, _ = run(tmp_path, rendered(container="ghcr.io#a/b:1", mounts=["/work", "/data"]))
    assert words[-3:] == ["packhorse", "train", "recipe.yaml"]
    of_pyxis = {"--container-image=ghcr.io#a/b:1", f"--container-workdir={tmp_path}"}
    assert of_pyxis | {"--container-mounts=/work:/work,/data:/data"} <= set(words)


def test_a_line_of_sbatch_holds_no_second_line():
    with pytest.raises(BadInput, match="--partition"):
        rendered(options={"partition": "a\n#SBATCH --uid=0"})
    with pytest.raises(BadInput, match="--container"):
        rendered(container="a\nmounts=b")


def test_any_further_line_of_sbatch_is_added_or_replaces_the_scripts_own(tmp_path):
    further = ["--reservation=a b; touch x", "--signal=B:USR1@1200", "--qos=high", "--overcommit"]
    text = rendered(further=further)
    lines = text.splitlines()
    given = "#SBATCH --reservation='a b; touch x'"
    assert {given, "#SBATCH --signal=B:USR1@1200", "#SBATCH --qos=high"} <= set(lines)
    assert "#SBATCH --overcommit" in lines
    names = [line.split("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert len(set(names)) == len(names), "sbatch would take one of two"
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last < lines.index("set -euo pipefail"), "sbatch reads no line after the first command"
    assert run(tmp_path, text)[0] == 0
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("reservation=x", "give one long option of sbatch"),
        ("-N 2", "give one long option of sbatch"),
        ("--reservation x", "give one long option of sbatch"),
        ("--comment=a\n#SBATCH --uid=0", "holds printable text only"),
        ("--nodes=3", "launch slurm sets --nodes itself"),
        ("--ntasks-per-node=8", "the script starts one launcher on each node"),
        ("--array=0-3", "a job is one run"),
    ],
)
def test_a_further_line_that_would_break_the_script_is_refused(line, sentence):
    with pytest.raises(BadInput, match=sentence):
        rendered(further=[line])


def test_a_script_that_begins_with_a_dash_is_no_option_of_sbatch(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "Submitted %s" "$*"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert submit(Path("-x.sh")) == f"Submitted {tmp_path}/-x.sh"


def test_without_sbatch_nothing_can_be_submitted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="no sbatch on this machine"):
        submit(tmp_path / "slurm.sh")
