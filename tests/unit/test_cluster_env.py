"""Nodes and rendezvous, from the variables that Slurm, Kubernetes and Kubeflow set."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from packhorse.launch.cluster_env import ClusterEnv, first_host, read_cluster_env, refuse_tasks
from packhorse.trainer.datatypes import BadInput
from tests.ranks import ROOT

# what srun 22.05 gives to each task of `srun --nodes=2 --ntasks-per-node=1`
SRUN = {
    "SLURM_JOB_ID": "4007",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}


def test_without_a_scheduler_there_is_one_node():
    assert read_cluster_env({}) == ClusterEnv()


def test_the_tasks_of_srun_meet_at_the_first_node_on_a_port_of_their_job():
    assert read_cluster_env(SRUN) == ClusterEnv("2", None, "node1:30407", "4007", is_host=False)
    assert read_cluster_env(SRUN | {"SLURM_NODEID": "0"}).is_host


def test_a_job_of_one_node_meets_nobody():
    one = {"SLURM_JOB_ID": "4007", "SLURM_JOB_NUM_NODES": "1"}
    assert (
        read_cluster_env(one)
        == read_cluster_env(one | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"})
        == ClusterEnv(run_id="4007")
    )


def test_a_batch_script_of_several_nodes_without_srun_is_refused():
    with pytest.raises(BadInput, match="start it with srun --ntasks-per-node=1"):
        read_cluster_env({"SLURM_JOB_ID": "4007", "SLURM_JOB_NUM_NODES": "2"})


# what mpirun gives to a task on two nodes of eight GPUs
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
MPICH = {"PMI_SIZE": "16", "MPI_LOCALNRANKS": "8"}


@pytest.mark.parametrize("nodes_given", [False, True])
@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (SRUN | {"SLURM_STEP_NUM_TASKS": "16"}, "16 tasks on 2 nodes.* --ntasks-per-node=1"),
        (OPEN_MPI, "8 tasks on this node.* ppr:1:node"),
        (MPICH, "8 tasks on this node.* -ppn 1"),
        ({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "16"}, "LOCAL_RANK=3.* deepspeed launcher"),
    ],
)
def test_a_task_for_each_gpu_is_refused(task, sentence, nodes_given):
    with pytest.raises(BadInput, match=sentence):
        refuse_tasks(task, nodes_given=nodes_given)


@pytest.mark.parametrize(
    "tasks",
    [
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"},
    ],
)
def test_a_task_of_mpirun_for_each_node_must_be_told_of_the_others(tasks):
    with pytest.raises(BadInput, match="--nnodes 2 --rdzv-endpoint HOST:29400"):
        refuse_tasks(tasks, nodes_given=False)
    refuse_tasks(tasks, nodes_given=True)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SRUN,
        SRUN | {"PMI_SIZE": "2"},  # srun --mpi=pmi2
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "sft-master-0"},  # a pod of PyTorchJob
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8"},  # no task of srun
    ],
)
def test_the_only_launcher_of_a_node_may_start_it(environ):
    refuse_tasks(environ, nodes_given=False)


@pytest.mark.parametrize(
    ("options", "command"),
    [([], ["train", "debug"]), (["--no_local_rank"], ["eval", "model", "debug"])],
)
def test_the_deepspeed_launcher_is_answered_by_one_sentence(tmp_path, options, command):
    """DeepSpeed's own launcher of a node, for two GPUs."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    launcher = ["deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0"]
    where = ["--master_addr=127.0.0.1", "--master_port=29999", "--no_python"]
    # `no_python` runs a command, to which the launcher gives --local_rank before the rest
    packhorse = [sys.executable, ROOT / "packhorse" / "__main__.py"]
    program = tmp_path / "packhorse"
    program.write_text(f'#!/bin/sh\nexec {packhorse[0]} {packhorse[1]} "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *where, *options, program, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    faults = [line for line in done.stderr.splitlines() if line.startswith("packhorse: error")]
    assert faults, done.stderr
    assert all("as the deepspeed launcher does" in fault for fault in faults)
    assert not list(Path(tmp_path).glob("runs*"))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-004,7],login1", "gpu003"),
        ("a[1-2]-ib,b1", "a1-ib"),
    ],
)
def test_the_first_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


def test_an_indexed_job_tells_its_pods_by_the_index():
    pod = {
        "PET_NNODES": "2",
        "PET_RDZV_ENDPOINT": "sft-0.sft:29400",
        "PET_RDZV_ID": "sft",
        "JOB_COMPLETION_INDEX": "0",
    }
    assert read_cluster_env(pod) == ClusterEnv("2", None, "sft-0.sft:29400", "sft", is_host=True)


def test_pods_may_be_told_how_long_to_wait_for_each_other():
    pod = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "sft-0.sft:29400"}
    assert read_cluster_env(pod).join_s == 600
    assert read_cluster_env(pod | {"PET_RDZV_CONF": "join_timeout=86400"}).join_s == 86_400
    with pytest.raises(BadInput, match="give join_timeout alone"):
        read_cluster_env(pod | {"PET_RDZV_CONF": "join_timeout=86400,is_host=1"})


def test_kubeflows_trainer_gives_an_address_and_a_number_of_processes():
    node = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "sft-node-0-0.sft",
        "PET_MASTER_PORT": "29500",
    }
    assert read_cluster_env(node) == ClusterEnv(
        "2", 8, "sft-node-0-0.sft:29500", None, is_host=False
    )
    assert read_cluster_env(node | {"PET_NPROC_PER_NODE": "auto"}).nproc is None
