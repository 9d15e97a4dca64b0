"""Nodes and rendezvous, from the variables that Slurm, Kubernetes and Kubeflow set."""

import pytest

from packhorse.launch.cluster_env import ClusterEnv, first_host, read_cluster_env
from packhorse.trainer.datatypes import BadInput

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


def test_a_task_for_each_gpu_is_refused():
    with pytest.raises(BadInput, match="16 tasks on 2 nodes"):
        read_cluster_env(SRUN | {"SLURM_STEP_NUM_TASKS": "16"})


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
    assert read_cluster_env(pod).join_s is None
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
