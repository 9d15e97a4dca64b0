"""Read from the environment which nodes a run has and where they meet.

In: environment variables. Out: a `ClusterEnv`. Two kinds of variables are known:

- torchrun's, as PET_NNODES: Kubernetes manifests and Kubeflow's trainer set them.
- Slurm's, in a step that srun started with one task for each node.

Without either there is one node, and nothing is guessed. A task for each GPU, of srun, mpirun or
the deepspeed launcher, is refused: each would start a process for every GPU itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from packhorse.trainer.datatypes import BadInput

_PORT = 29400  # torchrun's
JOIN_S = 600  # to wait for the other nodes, unless given
# Jobs that share a node need ports of their own: _PORT plus up to this, below the ephemeral ports.
_SLURM_PORTS = 3000
# How many tasks there are in all, and on this node: Open MPI; MPICH and Intel MPI; MVAPICH2
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


@dataclass(frozen=True)
class ClusterEnv:
    """The nodes of a run, and this one's place among them."""

    nodes: str = "1"  # N or MIN:MAX
    nproc: int | None = None  # processes on this node; None: one for each GPU
    endpoint: str | None = None  # host:port of the rendezvous; None: there is one node
    run_id: str | None = None
    is_host: bool | None = None  # this node is the rendezvous host; None: torch finds out by name
    join_s: int = JOIN_S  # seconds to wait for the other nodes


def refuse_tasks(environ: Mapping[str, str], *, nodes_given: bool) -> None:
    """Refuse to be one of several launchers that would do the same work on the same GPUs.

    They are not taken as ranks: the launcher is what turns a saved run into exit code 75, and
    notices a lost node.

    Args:
        nodes_given: the user says how many nodes there are, and where they meet.
    """
    advice = "packhorse starts the processes of a node itself"
    # all three: Kubeflow's PyTorchJob gives pods the first two, and means nodes
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environ.keys():
        raise BadInput(
            f"RANK={environ['RANK']}, LOCAL_RANK={environ['LOCAL_RANK']} and "
            f"WORLD_SIZE={environ['WORLD_SIZE']} are set, as the deepspeed launcher does for each "
            f"GPU, but {advice}: run `packhorse train` without it, on each node, or use torchrun"
        )
    tasks, nodes = (environ.get(f"SLURM_STEP_NUM_{what}", "1") for what in ("TASKS", "NODES"))
    if tasks != nodes:
        raise BadInput(
            f"srun started {tasks} tasks on {nodes} nodes, but {advice}: give srun "
            f"--ntasks-per-node=1"
        )
    for everywhere, here in _MPI:
        if _number(environ, here, "1") > 1:
            raise BadInput(
                f"mpirun started {environ[here]} tasks on this node, but {advice}: start one for "
                f"each node (Open MPI: --map-by ppr:1:node, Intel MPI and MPICH: -ppn 1), or use "
                f"no mpirun"
            )
        if here in environ and _number(environ, everywhere, "1") > 1 and not nodes_given:
            raise BadInput(
                f"mpirun started {environ[everywhere]} tasks, one for each node: say so as "
                f"--nnodes {environ[everywhere]} --rdzv-endpoint HOST:{_PORT}, where HOST is one "
                f"of the nodes"
            )


def read_cluster_env(environ: Mapping[str, str]) -> ClusterEnv:
    """Return what the scheduler's variables say.

    Raises:
        BadInput: srun started nothing, though there are several nodes; or torchrun's variables set
            what this launcher does not have.
    """
    if "PET_NNODES" in environ:
        return _read_torchrun(environ)
    if "SLURM_JOB_ID" in environ:
        return _read_slurm(environ)
    return ClusterEnv()


def _read_torchrun(environ: Mapping[str, str]) -> ClusterEnv:
    nproc = environ.get("PET_NPROC_PER_NODE", "auto")
    rank = environ.get("PET_NODE_RANK") or environ.get("JOB_COMPLETION_INDEX")
    endpoint = environ.get("PET_RDZV_ENDPOINT")
    if endpoint is None and "PET_MASTER_ADDR" in environ:
        endpoint = f"{environ['PET_MASTER_ADDR']}:{environ.get('PET_MASTER_PORT', _PORT)}"
    conf = environ.get("PET_RDZV_CONF", "")
    join_timeout = re.fullmatch(r"join_timeout=(\d+)", conf)
    if conf and not join_timeout:
        raise BadInput(
            f"PET_RDZV_CONF is {conf!r}: give join_timeout alone, in seconds, as join_timeout=600"
        )
    return ClusterEnv(
        nodes=environ["PET_NNODES"],
        nproc=int(nproc) if nproc.isdigit() else None,
        endpoint=endpoint,
        run_id=environ.get("PET_RDZV_ID"),
        is_host=rank == "0" if rank is not None else None,
        join_s=int(join_timeout[1]) if join_timeout else JOIN_S,
    )


def _read_slurm(environ: Mapping[str, str]) -> ClusterEnv:
    job = environ["SLURM_JOB_ID"]
    if "SLURM_STEP_NUM_NODES" not in environ:  # not started by srun
        if environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
            raise BadInput(
                f"Slurm job {job} has {environ['SLURM_JOB_NUM_NODES']} nodes, but packhorse runs "
                f"on one of them only: start it with srun --ntasks-per-node=1, as "
                f"slurm/sft_70b.sh does"
            )
        return ClusterEnv(run_id=job)
    nodes = environ["SLURM_STEP_NUM_NODES"]
    if nodes == "1":
        return ClusterEnv(run_id=job)
    port = _PORT + _number(environ, "SLURM_JOB_ID") % _SLURM_PORTS
    endpoint = f"{first_host(environ.get('SLURM_STEP_NODELIST', ''))}:{port}"
    return ClusterEnv(nodes, None, endpoint, job, is_host=_number(environ, "SLURM_NODEID") == 0)


def parse_nodes(text: str) -> tuple[int, int]:
    """Return the least and most number of nodes of `2` or `1:4`. Raises BadInput for other text."""
    numbers = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    least, most = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
    if not 1 <= least <= most:
        raise BadInput(f"--nnodes {text}: give a number, or MIN:MAX, as 2 or 1:4")
    return least, most


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name, default)
    if not re.fullmatch("[0-9]{1,18}", text):
        raise BadInput(f"the environment variable {name} is {text!r}, not a number")
    return int(text)


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's list: `gpu003` of `gpu[003-004,7],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise BadInput(f"the environment variable SLURM_STEP_NODELIST is {nodes!r}, no list")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
