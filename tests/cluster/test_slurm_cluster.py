"""Jobs of two nodes on a real Slurm: trained, stopped before the time limit, requeued, a node less.

If selected, these tests run: without root or Slurm they fail.
"""

import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from packhorse.trainer.utils.json_lines import read_json_lines
from tests.cluster.slurm import Slurm, slurm
from tests.ranks import ROOT

pytestmark = pytest.mark.cluster

# lr: steady; eps: with less, what rounding leaves of a gradient becomes a full step
SETTINGS = (
    "train.epochs=4", "optim.lr=1e-3", "optim.eps=1e-3", "checkpoint.every_steps=5",
    "data.eval=[]", "eval.every_steps=null", "eval.generate=null",
)  # fmt: skip
STEPS = 36


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cluster: Slurm, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run on two nodes."""
    run_dir = tmp_path_factory.mktemp("whole")
    job = cluster.wait(sbatch(cluster, run_dir, cache), "COMPLETED")
    assert job["ExitCode"] == "0:0"
    return run_dir


def recipe(run_dir: Path, cache: Path, *overrides: str) -> list[str]:
    return [f"run.dir={run_dir}", f"data.cache={cache}", *SETTINGS, *overrides]


def sbatch(
    cluster: Slurm, run_dir: Path, cache: Path, *overrides: str, options: tuple[str, ...] = ()
) -> str:
    """Submit the many-node script with the debug recipe on two nodes; it logs to job.log."""
    mine = run_dir / "mine.yaml"
    mine.write_text((ROOT / "recipes/debug.yaml").read_text())
    own = ["--nodes=2", f"--output={run_dir}/job.log", *options]
    words = ["sbatch", *own, "slurm/sft_70b.sh", *recipe(run_dir, cache, *overrides)]
    return cluster.submit(*words, RECIPE=str(mine))


def losses(run_dir: Path) -> list[float]:
    """Return the losses of all steps, and assert that each step occurs once."""
    lines = read_json_lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["train/loss"] for line in lines]


def wait_for_step(cluster: Slurm, number: str, run_dir: Path, step: int) -> None:
    end = time.monotonic() + 600
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert cluster.job(number)["JobState"] in ("PENDING", "RUNNING"), (
            run_dir / "job.log"
        ).read_text()
        assert time.monotonic() < end, f"step {step} did not come"
        time.sleep(0.1)


def test_the_script_trains_on_both_nodes(cluster, whole):
    assert len(losses(whole)) == STEPS
    said = (whole / "job.log").read_text()
    assert "start 1 on 2 nodes: cn[1-2]" in said
    assert f"preflight: 2 nodes agree and share {whole}" in said
    assert "all-reduce" in said
    assert f"steps 1 to {STEPS}" in said


def test_a_signal_saves_and_queues_again_and_the_second_start_goes_on(
    cluster, cache, whole, tmp_path
):
    number = sbatch(cluster, tmp_path, cache)
    wait_for_step(cluster, number, tmp_path, 4)
    assert (tmp_path / f"slurm-{number}.yaml").exists(), "beside the log"
    (tmp_path / "mine.yaml").write_text("an edit, which the second start does not read\n")
    cluster.run(
        "scancel", "--batch", "--signal=USR1", number
    )  # to the script alone, as --signal=B:USR1@600 does
    cluster.wait(number, "PENDING", restarts=1, reason="BeginTime")  # the script has asked for it
    cluster.start_now(number)
    job = cluster.wait(number, "COMPLETED", restarts=1)
    assert job["ExitCode"] == "0:0"
    said = (tmp_path / "job.log").read_text()
    assert "start 1 on 2 nodes" in said
    assert "start 2 on 2 nodes" in said
    assert "resuming from" in said
    assert losses(tmp_path) == losses(whole)


def test_near_its_time_limit_a_job_saves_and_queues_itself_again(cluster, cache, tmp_path):
    # the signal comes in the third minute: a busy machine needs one to begin, and one to save
    options = ("--time=5", "--signal=B:USR1@120")
    number = sbatch(cluster, tmp_path, cache, "train.epochs=1000", options=options)
    cluster.wait(number, "PENDING", restarts=1)
    cluster.run("scancel", number)
    said = (tmp_path / "job.log").read_text()
    assert "USR1: the run saves and stops" in said
    assert "exit code 75" in said
    assert (tmp_path / "stop.json").exists()


def test_the_job_of_a_node_that_died_comes_back_on_the_one_that_is_left(
    cluster, cache, whole, tmp_path
):
    run_dir = tmp_path / "it's a run"
    cluster.wait_idle()  # or it would begin on one
    mine = tmp_path / "mine.yaml"
    mine.write_text((ROOT / "recipes/debug.yaml").read_text())
    command = [
        sys.executable,
        "-m",
        "packhorse",
        "launch",
        "slurm",
        str(mine),
        *recipe(run_dir, cache),
    ]
    further = ("--sbatch", "--comment=it's mine")
    number = cluster.submit(*command, "--nodes", "1-2", *further, "--submit")
    mine.write_text("an edit, which concerns neither start\n")
    assert cluster.job(number)["Comment"] == "it's"  # `job` reads up to the space
    wait_for_step(cluster, number, run_dir, 8)
    cluster.fail("cn2")
    try:
        cluster.wait(number, "PENDING", restarts=1)
        cluster.start_now(number)
        cluster.wait(number, "COMPLETED", restarts=1)
    finally:
        cluster.revive("cn2")
    said = (run_dir / f"slurm-{number}.log").read_text()
    assert "start 1 on 2 nodes" in said
    assert "start 2 on 1 nodes: cn1" in said
    assert "written by 2 ranks" in said
    assert losses(run_dir) == pytest.approx(losses(whole), rel=1e-5)


def test_a_run_folder_that_is_not_shared_is_refused_and_the_node_is_named(cluster, cache, tmp_path):
    run_dir = tmp_path / "run"  # the log, and beside it the copy of the recipe, are shared
    run_dir.mkdir()
    cluster.hide("cn2", run_dir)
    try:
        number = sbatch(cluster, tmp_path, cache, f"run.dir={run_dir}")
        job = cluster.wait(number, "FAILED")
    finally:
        cluster.show("cn2", run_dir)
    assert job["ExitCode"] == "2:0"
    assert job["Restarts"] == "0"
    said = (tmp_path / "job.log").read_text()
    # each sees the secret that it made itself: the one that reads the other's word says so
    assert re.search(r"is not signed with the \S+ that cn[12] sees, and is not read", said)
    assert "run.dir is not the same folder on all nodes" in said
    assert not (run_dir / "recipe.yaml").exists(), "no worker has started"


@pytest.mark.parametrize("options", [[], ["--nnodes=1"]])
def test_a_task_for_each_gpu_is_refused_and_starts_no_launcher(cluster, tmp_path, options):
    cluster.wait_idle()
    tasks = ["srun", "--nodes=1", "--ntasks=2", "--cpu-bind=none"]
    words = ["train", "recipes/debug.yaml", f"run.dir={tmp_path / 'run'}", *options]
    refused = cluster.run(*tasks, sys.executable, "-m", "packhorse", *words)
    assert refused.returncode == 2, refused.stderr
    assert "srun started 2 tasks on 1 nodes" in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [("--partition=nowhere", "invalid partition"), ("--nods=2", "unrecognized option")],
)
def test_sbatch_refuses_what_the_cluster_does_not_have(cluster, tmp_path, option, sentence):
    refused = cluster.run("sbatch", option, "slurm/sft_70b.sh")
    assert refused.returncode != 0
    assert sentence in refused.stderr


def test_what_sbatch_refuses_is_bad_input(cluster, cache, tmp_path):
    words = [
        "launch",
        "slurm",
        str(ROOT / "recipes/debug.yaml"),
        *recipe(tmp_path, cache),
        "--partition",
        "nowhere",
    ]
    refused = cluster.run(sys.executable, "-m", "packhorse", *words, "--submit")
    assert refused.returncode == 2
    assert "invalid partition" in refused.stderr
    assert shlex.quote(str(tmp_path / "slurm.sh")) in refused.stdout


def test_a_cancelled_job_stays_cancelled_though_it_has_saved(cluster, tmp_path):
    saves = tmp_path / "saves"
    saves.write_text(
        '#!/bin/sh\ntrap "exit 75" TERM\ntouch "$(dirname "$0")/runs"\nwhile :; do sleep 0.1; '
        "done\n"
    )
    saves.chmod(0o755)
    words = ["sbatch", "--nodes=2", f"--output={tmp_path}/job.log", "slurm/sft_70b.sh"]
    number = cluster.submit(*words, PACKHORSE=str(saves))
    end = time.monotonic() + 60
    while not (tmp_path / "runs").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    cluster.run("scancel", number)
    job = cluster.wait(number, "CANCELLED", "PENDING")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
