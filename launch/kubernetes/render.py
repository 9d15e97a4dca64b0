"""Render the manifests of a run for `kubectl apply`: a pod for each node.

In: a recipe, and the user's cluster.yaml. Out: YAML of a Job, a JobSet, or a TrainJob of Kubeflow.
The templates beside this file are plain YAML with three placeholders, $NAME, $NODES and $IMAGE. All
three kinds contain the Job of job.yaml, onto which cluster.yaml is merged, but a TrainJob that is
given a runtime of the cluster (runtime.py) has only what it may give to it. A ConfigMap holds the
resolved recipe and its DeepSpeed template, so that later changes to those files do not matter.
"""

from __future__ import annotations

import posixpath
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from packhorse.launch.kubernetes.runtime import train_job_spec
from packhorse.trainer.config.packaged import map_texts, read_template, require_own_recipe
from packhorse.trainer.config.parsing import read_yaml
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import DONE, FAILED, BadInput

Kind = Literal["job", "jobset", "trainjob"]
Tree = dict[str, Any]

CLUSTER = Path(__file__).with_name("cluster.yaml")
RECIPE_DIR = "/etc/packhorse"  # as in job.yaml
_DEEPSPEED = "deepspeed.json"
_PORT = 29400  # torchrun's; each pod has an address of its own
_CONTAINER = "node"
_ANSWER_S = 10  # for a cluster to answer kubectl
_LONGEST_NAME = 40  # a JobSet's pods are called NAME-node-0-12-abcde, in at most 63 characters
_NOT_PERSISTENT = {"emptyDir", "ephemeral", "configMap", "secret", "projected", "downwardAPI"}


def find_cluster(path: Path | None) -> Path:
    """Return the path of a cluster.yaml: the packaged one, by the name that --help gives it too, as
    for a DeepSpeed template, or the user's."""
    default = Path("launch/kubernetes/cluster.yaml")
    return CLUSTER if path is None or (path == default and not path.exists()) else path


def run_name(run_dir: str) -> str:
    """Return a run's name in the cluster, from its folder: `runs/SFT_8b.1` -> `sft-8b-1`."""
    return re.sub(r"[^a-z0-9]+", "-", PurePosixPath(run_dir).name.lower()).strip("-")


def render(
    recipe_file: Path,
    overrides: Sequence[str],
    kind: Kind,
    *,
    nodes: int,
    image: str,
    name: str,
    cluster: Path,
    runtime: str | None = None,
) -> str:
    """Return all manifests of a run, as one text for `kubectl apply -f`.

    Args:
        runtime: of a trainjob: the cluster's ClusterTrainingRuntime. None: a runtime of its own.
        name: of everything that is created, and the id of the rendezvous.
        cluster: a cluster.yaml.

    Raises:
        BadInput: the recipe, the name or the cluster.yaml cannot be used.
    """
    if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{_LONGEST_NAME - 2}}}[a-z0-9])?", name):
        raise BadInput(
            f"{name!r} cannot name a run in a cluster: give another --name, of at most "
            f"{_LONGEST_NAME} small letters, digits and dashes, the first of them a letter"
        )
    require_own_recipe(recipe_file, "pods do", "on the volume")
    overlay = _read_overlay(cluster)
    service, job = _read_templates("job.yaml")
    job["spec"] = merge_overlay(job["spec"], overlay.get("spec", {}), f"{cluster}: spec")
    pod, container = _find_container(job["spec"], cluster)
    container["env"] = merge_overlay(
        container.get("env", []), _rendezvous_variables(name, nodes, kind)
    )
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "immutable": True,  # all pods of a run read the same, from the first to the last
        "data": _recipe_files(recipe_file, overrides, pod, container),
    }
    if runtime:
        own = _read_templates("job.yaml")[1]["spec"]
        (_, train_job) = _read_templates("trainjob.yaml")
        train_job["spec"] = train_job_spec(runtime, job["spec"], own, str(cluster))
        workload = [train_job]
    else:
        workload = [service, job] if kind == "job" else _wrap_job(kind, job)
        workload += _read_templates("network.yaml")  # not of a runtime: it labels its pods itself
    values = {"$NODES": nodes, "$IMAGE": image}
    workload = map_texts(workload, lambda text: values.get(text, text.replace("$NAME", name)))
    made = [
        merge_overlay(manifest, {"metadata": overlay.get("metadata", {})})
        for manifest in (config_map, *workload)
    ]
    head = f"# By `packhorse launch kubernetes`, for {nodes} nodes. Render again after a change.\n"
    return head + yaml.dump_all(made, Dumper=_Readable, sort_keys=False, width=120)


def _find_container(spec: Tree, cluster: Path) -> tuple[Tree, Tree]:
    """Return the pod's spec and the container that trains, which cluster.yaml must leave there."""
    pod = spec.get("template", {}).get("spec", {})
    container = next((one for one in pod.get("containers", ()) if one["name"] == _CONTAINER), None)
    if container is None:
        raise BadInput(f"{cluster}: it removes the container `{_CONTAINER}`, which trains")
    counts = spec.get("completions"), spec.get("parallelism")
    if (container.get("image"), *counts) != ("$IMAGE", "$NODES", "$NODES"):
        raise BadInput(
            f"{cluster}: the image and the number of pods are given as --image and --nodes; leave "
            f"them out"
        )
    mounts = container.get("volumeMounts", ())
    folders = [container.get("workingDir", "/"), *(mount.get("mountPath", "/") for mount in mounts)]
    if not all(isinstance(folder, str) for folder in folders):
        raise BadInput(f"{cluster}: workingDir and mountPath of `{_CONTAINER}` are paths")
    return pod, container


def _wrap_job(kind: Literal["jobset", "trainjob"], job: Tree) -> list[Tree]:
    """Return a JobSet that contains the Job, or a TrainingRuntime that does and its TrainJob."""
    made = _read_templates(f"{kind}.yaml")
    spec = made[0]["spec"] if kind == "jobset" else made[0]["spec"]["template"]["spec"]
    spec["replicatedJobs"][0]["template"]["spec"] = job["spec"]
    return made


def _rendezvous_variables(name: str, nodes: int, kind: Kind) -> list[Tree]:
    """Return the variables by which launchers meet (launch/cluster_env.py)."""
    if kind == "trainjob":  # Kubeflow's trainer sets its own
        return []
    host = {"job": f"{name}-0", "jobset": f"{name}-node-0-0"}[kind]
    variables = {
        "PET_NNODES": str(nodes),
        "PET_RDZV_ENDPOINT": f"{host}.{name}:{_PORT}",
        "PET_RDZV_ID": name,
    }
    return [{"name": variable, "value": value} for variable, value in variables.items()]


# --------------------------------------------------------------------------------------- the recipe


def _recipe_files(
    recipe_file: Path, overrides: Sequence[str], pod: Tree, container: Tree
) -> dict[str, str]:
    """Return the files in RECIPE_DIR: the resolved recipe, and its DeepSpeed template."""
    recipe = load_recipe(recipe_file, list(overrides))
    template = read_template(recipe.parallel.deepspeed)
    workdir = container.get("workingDir", "/")
    run_dir = posixpath.normpath(posixpath.join(workdir, recipe.run.dir))
    folders = _persistent_folders(pod, container)
    if not any(PurePosixPath(run_dir).is_relative_to(folder) for folder in folders):
        advice = f"put it below {' or '.join(folders)}" if folders else "mount a persistent volume"
        raise BadInput(f"run.dir: {run_dir} would be lost with its pod; {advice}")
    changed = [f"parallel.deepspeed={RECIPE_DIR}/{_DEEPSPEED}"]
    if "cache" not in recipe.data.model_fields_set:
        # on the volume, so that one pod prepares the data for all, and for the next start
        changed.append(f"data.cache={posixpath.join(workdir, '.cache/packhorse')}")
    final = load_recipe(recipe_file, [*overrides, *changed])
    return {"recipe.yaml": final.to_yaml(), _DEEPSPEED: template}


def _persistent_folders(pod: Tree, container: Tree) -> list[str]:
    """Return where volumes are mounted that outlive a pod."""
    volumes = pod.get("volumes", ())
    kept = {volume["name"] for volume in volumes if not _NOT_PERSISTENT & volume.keys()}
    mounts = container.get("volumeMounts", ())
    return [
        mount["mountPath"] for mount in mounts if mount["name"] in kept and "mountPath" in mount
    ]


# ------------------------------------------------------------------------------------------ kubectl


def apply_command(manifests: Path) -> list[str]:
    """Return the command that submits; the cluster checks every field against its schemas."""
    return ["kubectl", "apply", "--validate=strict", "-f", str(manifests)]


def submit_file(manifests: Path) -> int:
    """Run `kubectl apply`; return 0, or 1 if the cluster refused the manifests or had them already.

    Raises:
        BadInput: there is no kubectl, or no cluster answers it.
    """
    command = apply_command(manifests)
    try:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise BadInput(
            f"--submit: there is no kubectl on this machine; apply {manifests} where there is one"
        ) from None
    print(done.stdout, end="")
    if done.returncode:
        _require_cluster(command)
        return FAILED
    if all(line.endswith(" unchanged") for line in done.stdout.splitlines()):
        print(
            f"packhorse: the run already exists and was not started again; first: kubectl delete "
            f"-f {manifests}",
            file=sys.stderr,
        )
        return FAILED
    return DONE


def _require_cluster(command: Sequence[str]) -> None:
    # the words of a failed apply differ from version to version
    asked = subprocess.run(
        ["kubectl", "version", f"--request-timeout={_ANSWER_S}s"],
        check=False,
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise BadInput(
            f"--submit: no cluster answers kubectl ({why}); `kubectl config get-contexts` lists "
            f"those that it knows; where one answers: {shlex.join(command)}"
        )


# ------------------------------------------------------------------------------------ trees of YAML


def merge_overlay(base: Any, overlay: Any, place: str = "") -> Any:
    """Return `base` with the changes of `overlay`.

    Mappings are merged key by key, lists of named items by their names; other lists and values are
    replaced. None removes a key. These are kustomize's rules, except for the few lists that
    kustomize merges by another key.

    Raises:
        BadInput: something else would replace a mapping or list, or a list of named items would
            get one without a name.
    """
    if isinstance(base, dict) and isinstance(overlay, dict):
        merged = {
            key: merge_overlay(base[key], value, f"{place}.{key}")
            if key in base and value is not None
            else value
            for key, value in overlay.items()
        }
        return {key: value for key, value in {**base, **merged}.items() if value is not None}
    if isinstance(base, dict | list) and type(base) is not type(overlay):
        raise BadInput(f"{place}: must be {'a mapping' if isinstance(base, dict) else 'a list'}")
    if isinstance(base, list) and base and _are_named(base):
        if not _are_named(overlay):
            raise BadInput(f"{place}: each item must have a `name`")
        named = {item["name"]: item for item in base}
        for item in overlay:
            name = item["name"]
            known = name in named
            named[name] = merge_overlay(named[name], item, f"{place}.{name}") if known else item
        return list(named.values())
    return overlay


def _are_named(items: list[Any]) -> bool:
    return all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items)


def _read_templates(file: str) -> list[Tree]:
    return list(yaml.safe_load_all(Path(__file__).with_name(file).read_text(encoding="utf-8")))


def _read_overlay(path: Path) -> Tree:
    overlay = read_yaml(path)
    if not isinstance(overlay, dict) or not overlay.keys() <= {"metadata", "spec"}:
        raise BadInput(
            f"{path}: it must be a part of a Job, with `metadata` and `spec`; start from {CLUSTER}"
        )
    metadata = overlay.get("metadata", {})
    if not isinstance(metadata, dict) or metadata.keys() - {"namespace", "labels", "annotations"}:
        raise BadInput(
            f"{path}: metadata: it may have `namespace`, `labels` and `annotations`; the name is "
            f"--name"
        )
    return overlay


class _Readable(yaml.SafeDumper):
    """A dumper that writes texts of several lines as blocks, and repeats values without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _represent_text)
