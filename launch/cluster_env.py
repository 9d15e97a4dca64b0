"""Read from the environment which nodes a run has and where they meet.

In: environment variables. Out: a `ClusterEnv`. Two kinds of variables are known:

- torchrun's, as PET_NNODES: Kubernetes manifests and Kubeflow's trainer set them.
- Slurm's, in a step that srun started with one task for each node.

Without either there is one node, and nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from packhorse.trainer.datatypes import BadInput

_PORT = 29400  # torchrun's
# Jobs that share a node need ports of their own: _PORT plus up to this, below the ephemeral ports.
_SLURM_PORTS = 3000


@dataclass(frozen=True)
class ClusterEnv:
    """The nodes of a run, and this one's place among them."""

    nodes: str = "1"  # N or MIN:MAX
    nproc: int | None = None  # processes on this node; None: one for each GPU
    endpoint: str | None = None  # host:port of the rendezvous; None: there is one node
    run_id: str | None = None
    is_host: bool | None = None  # this node is the rendezvous host; None: torch finds out by name
    join_s: int | None = None  # seconds to wait for the other nodes; None: the launcher's default


def read_cluster_env(environ: Mapping[str, str]) -> ClusterEnv:
    """Return what the scheduler's variables say.

    Raises:
        BadInput: srun started more than one task on a node, or none of several nodes; or torchrun's
            variables set what this launcher does not have.
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
        join_s=int(join_timeout[1]) if join_timeout else None,
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
    nodes, tasks = environ["SLURM_STEP_NUM_NODES"], environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != nodes:
        raise BadInput(
            f"srun started {tasks} tasks on {nodes} nodes, but packhorse starts the processes of a "
            f"node itself: give srun --ntasks-per-node=1"
        )
    if nodes == "1":
        return ClusterEnv(run_id=job)
    endpoint = f"{first_host(environ['SLURM_STEP_NODELIST'])}:{_PORT + int(job) % _SLURM_PORTS}"
    return ClusterEnv(nodes, None, endpoint, job, is_host=environ["SLURM_NODEID"] == "0")


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's list: `gpu003` of `gpu[003-004,7],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first, nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
