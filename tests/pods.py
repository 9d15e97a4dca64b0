"""Make the pods of a manifest as a cluster would: names, environment, arguments and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from packhorse.launch.kubernetes.render import CLUSTER, Kind, render
from tests.ranks import ROOT

KINDS: tuple[Kind, ...] = ("job", "jobset", "trainjob")


def manifests(
    kind: Kind = "job",
    *overrides: str,
    nodes: int = 2,
    cluster: Path = CLUSTER,
    runtime: str | None = None,
) -> dict[str, Any]:
    """Return the debug recipe's manifests for a run called `sft`, by kind."""
    recipe = ROOT / "recipes/debug.yaml"
    found = ("parallel.deepspeed=zero3", *overrides)
    text = render(
        recipe,
        found,
        kind,
        nodes=nodes,
        image="registry/packhorse:1",
        name="sft",
        cluster=cluster,
        runtime=runtime,
    )
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}


def job_spec(made: dict[str, Any]) -> Any:
    """Return the Job's spec, wherever the kind holds it."""
    if "Job" in made:
        return made["Job"]["spec"]
    spec = (
        made["JobSet"]["spec"]
        if "JobSet" in made
        else made["TrainingRuntime"]["spec"]["template"]["spec"]
    )
    (job,) = spec["replicatedJobs"]
    return job["template"]["spec"]


@dataclass(frozen=True)
class Pod:
    """One pod, as its kubelet starts it."""

    hostname: str
    subdomain: str
    args: Sequence[str]
    env: dict[str, str]
    workdir: str
    volumes: dict[str, Any]  # where mounted -> the volume


def pods(made: dict[str, Any]) -> list[Pod]:
    """Return a pod for each completion index."""
    spec = job_spec(made)
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    # names: of a JobSet NAME the Job is NAME-node-0, and a pod of an Indexed Job is called by its
    # index
    job = "sft" if "Job" in made else "sft-node-0"
    return [
        Pod(
            hostname=f"{job}-{index}",
            subdomain=pod["subdomain"],
            args=container["args"],
            env={item["name"]: item["value"] for item in container["env"]}
            | {"JOB_COMPLETION_INDEX": str(index)}
            | (_of_kubeflow(made, index) if "TrainJob" in made else {}),
            workdir=container["workingDir"],
            volumes={
                mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]
            },
        )
        for index in range(spec["completions"])
    ]


def _of_kubeflow(made: dict[str, Any], index: int) -> dict[str, str]:
    """Return what the torch plugin of Kubeflow's trainer 2 sets in the container `node`.

    It sets it only if the TrainJob has a `trainer`.
    """
    return {
        "PET_NNODES": str(made["TrainJob"]["spec"]["trainer"]["numNodes"]),
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": str(index),
        "PET_MASTER_ADDR": "sft-node-0-0.sft",
        "PET_MASTER_PORT": "29500",
    }


def what_becomes_of(made: dict[str, Any], exit_code: int, *, disrupted: bool = False) -> str:
    """Return the action of the Job's podFailurePolicy for a pod that failed so."""
    for rule in job_spec(made)["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes and (exit_code in codes["values"]) == (codes["operator"] == "In"):
            return rule["action"]
        if disrupted and any(
            pattern["type"] == "DisruptionTarget" for pattern in rule.get("onPodConditions", ())
        ):
            return rule["action"]
    return "Count"
