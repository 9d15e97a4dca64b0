"""Which nodes a run has, and where they meet, as the scheduler says it in the environment.

- torchrun's own variables, `PET_NNODES` and the like: Kubernetes manifests set them, Kubeflow's
  trainer does, too.
- Slurm's, of the step that srun started: one task on each node.

Otherwise there is one node, and nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.datatypes import BadInput

_PORT = 29400  # torchrun's
# jobs that share a node meet at ports of their own, from _PORT on; ephemeral ones begin above
_SLURM_PORTS = 3000


@dataclass(frozen=True)
class Where:
    """A node's place among those of its run."""

    nodes: str = "1"  # N or MIN:MAX
    nproc: int | None = None  # None: one process for each GPU
    endpoint: str | None = None  # host:port of the rendezvous; None where there is one node
    run_id: str | None = None
    is_host: bool | None = None  # of the rendezvous; None: found by the endpoint's name
    join_s: int | None = (
        None  # how long the others are waited for; None: the launcher's own patience
    )


def find(environ: Mapping[str, str]) -> Where:
    """
    Raises:
        BadInput: Slurm started this process in a way that one launcher a node cannot work with, or
            torchrun's variables ask for what this launcher does not have.
    """
    if "PET_NNODES" in environ:
        return _torchrun(environ)
    if "SLURM_JOB_ID" in environ:
        return _slurm(environ)
    return Where()


def _torchrun(environ: Mapping[str, str]) -> Where:
    nproc = environ.get("PET_NPROC_PER_NODE", "auto")
    rank = environ.get("PET_NODE_RANK") or environ.get("JOB_COMPLETION_INDEX")
    endpoint = environ.get("PET_RDZV_ENDPOINT")
    if endpoint is None and "PET_MASTER_ADDR" in environ:
        endpoint = f"{environ['PET_MASTER_ADDR']}:{environ.get('PET_MASTER_PORT', _PORT)}"
    return Where(
        nodes=environ["PET_NNODES"],
        nproc=int(nproc) if nproc.isdigit() else None,
        endpoint=endpoint,
        run_id=environ.get("PET_RDZV_ID"),
        is_host=rank == "0" if rank is not None else None,
        join_s=_join_s(environ.get("PET_RDZV_CONF", "")),
    )


def _join_s(conf: str) -> int | None:
    """Of torchrun's `join_timeout=600`; no other of its settings is known here."""
    if not conf:
        return None
    asked = re.fullmatch(r"join_timeout=(\d+)", conf)
    if asked is None:
        raise BadInput(
            f"PET_RDZV_CONF is {conf!r}: give join_timeout alone, in seconds, as join_timeout=600"
        )
    return int(asked[1])


def _slurm(environ: Mapping[str, str]) -> Where:
    job = environ["SLURM_JOB_ID"]
    if "SLURM_STEP_NUM_NODES" not in environ:  # not started by srun
        if environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
            raise BadInput(
                f"Slurm job {job} has {environ['SLURM_JOB_NUM_NODES']} nodes, and this is one "
                f"process on one of them: "
                "start it with srun --ntasks-per-node=1, as slurm/sft_70b.sh does"
            )
        return Where(run_id=job)
    nodes, tasks = environ["SLURM_STEP_NUM_NODES"], environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != nodes:
        raise BadInput(
            f"srun started {tasks} tasks on {nodes} nodes: packhorse starts the processes of a "
            f"node itself; "
            "give srun --ntasks-per-node=1"
        )
    if nodes == "1":
        return Where(run_id=job)
    endpoint = f"{first_host(environ['SLURM_STEP_NODELIST'])}:{_PORT + int(job) % _SLURM_PORTS}"
    return Where(nodes, None, endpoint, job, is_host=environ["SLURM_NODEID"] == "0")


def first_host(nodes: str) -> str:
    """`gpu[003-004,7],login1` begins with `gpu003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first, nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
