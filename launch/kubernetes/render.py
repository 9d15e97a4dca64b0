"""A recipe -> what `kubectl apply` takes: one pod for each node, by a Job, a JobSet or Kubeflow's
trainer.

The templates beside this file are plain YAML with three places to fill in, $NAME, $NODES and
$IMAGE. All three kinds are made of the Job of job.yaml, over which the user's cluster.yaml is laid.
The recipe goes along in a ConfigMap, resolved, with the DeepSpeed template it names: what is run is
what was rendered, whatever becomes of the files.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from trainer.config.recipe import UniqueKeys, load_recipe
from trainer.datatypes import DONE, FAILED, BadInput

Kind = Literal["job", "jobset", "trainjob"]
Tree = dict[str, Any]

CLUSTER = Path(__file__).with_name("cluster.yaml")
RECIPE_DIR = "/etc/packhorse"  # as in job.yaml
_DEEPSPEED = "deepspeed.json"
_PORT = 29400  # torchrun's; each pod has an address of its own
_CONTAINER = "node"
_LONGEST_NAME = 40  # a JobSet's pods are called NAME-node-0-12-abcde, in at most 63 characters


def run_name(run_dir: str) -> str:
    """What a run is called in a cluster, after its folder: `runs/SFT_8b.1` -> `sft-8b-1`."""
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
) -> str:
    """All manifests of a run, as one text for `kubectl apply -f`.

    Args:
        name: of everything that is made, and of the run where launchers meet.
        cluster: a cluster.yaml.

    Raises:
        BadInput: the recipe, the name or the cluster.yaml cannot be used.
    """
    if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{_LONGEST_NAME - 2}}}[a-z0-9])?", name):
        raise BadInput(
            f"{name!r} cannot name a run in a cluster: give another --name, of at most "
            f"{_LONGEST_NAME} small letters, "
            "digits and dashes, the first of them a letter"
        )
    overlay = _read_overlay(cluster)
    service, job = _templates("job.yaml")
    job["spec"] = laid_over(job["spec"], overlay.get("spec", {}), f"{cluster}: spec")
    pod = job["spec"].get("template", {}).get("spec", {})
    container = next((one for one in pod.get("containers", ()) if one["name"] == _CONTAINER), None)
    if container is None:
        raise BadInput(f"{cluster}: it takes out the container `{_CONTAINER}`, which trains")
    of_the_command = (
        container.get("image"),
        job["spec"].get("completions"),
        job["spec"].get("parallelism"),
    )
    if of_the_command != ("$IMAGE", "$NODES", "$NODES"):
        raise BadInput(
            f"{cluster}: the image and the number of pods are given as --image and --nodes; take "
            f"them out"
        )
    container["env"] = laid_over(container.get("env", []), _meeting(name, nodes, kind))
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "immutable": True,  # all pods of a run read the same, from the first to the last
        "data": _recipe(recipe_file, overrides, pod, container),
    }
    filled = _filled(
        [*([service] if kind == "job" else []), *_workload(kind, job)], name, nodes, image
    )
    made = [
        laid_over(manifest, {"metadata": overlay.get("metadata", {})})
        for manifest in (config_map, *filled)
    ]
    head = f"# By `packhorse launch kubernetes`, for {nodes} nodes. Change the recipe or cluster.yaml, and render again.\n"
    return head + yaml.dump_all(made, Dumper=_Readable, sort_keys=False, width=120)


def _workload(kind: Kind, job: Tree) -> list[Tree]:
    if kind == "job":
        return [job]
    made = _templates(f"{kind}.yaml")
    spec = made[0]["spec"] if kind == "jobset" else made[0]["spec"]["template"]["spec"]
    spec["replicatedJobs"][0]["template"]["spec"] = job["spec"]
    return made


def _meeting(name: str, nodes: int, kind: Kind) -> list[Tree]:
    """The variables by which launchers meet (launch/cluster_env.py). Kubeflow's trainer sets its
    own.
    """
    if kind == "trainjob":
        return []
    first = {"job": f"{name}-0", "jobset": f"{name}-node-0-0"}[kind]
    meeting = {
        "PET_NNODES": str(nodes),
        "PET_RDZV_ENDPOINT": f"{first}.{name}:{_PORT}",
        "PET_RDZV_ID": name,
    }
    return [{"name": variable, "value": value} for variable, value in meeting.items()]


# --------------------------------------------------------------------------------------- the recipe


def _recipe(
    recipe_file: Path, overrides: Sequence[str], pod: Tree, container: Tree
) -> dict[str, str]:
    """The files that the pods read at RECIPE_DIR: the resolved recipe, and its DeepSpeed template."""
    recipe = load_recipe(recipe_file, list(overrides))
    template = Path(recipe.parallel.deepspeed)
    if not template.is_file():
        raise BadInput(f"parallel.deepspeed: there is no file {template}; take one of ds_configs/")
    workdir = container.get("workingDir", "/")
    run_dir = posixpath.normpath(posixpath.join(workdir, recipe.run.dir))
    kept = _kept_folders(pod, container)
    if not any(PurePosixPath(run_dir).is_relative_to(folder) for folder in kept):
        where = f"put it below {' or '.join(kept)}" if kept else "mount a persistent volume"
        raise BadInput(f"run.dir: {run_dir} would be lost with its pod; {where}")
    changed = [f"parallel.deepspeed={RECIPE_DIR}/{_DEEPSPEED}"]
    if "cache" not in recipe.data.model_fields_set:
        changed.append(
            f"data.cache={posixpath.join(workdir, '.cache/packhorse')}"
        )  # made once for all pods, and kept
    final = load_recipe(recipe_file, [*overrides, *changed])
    return {"recipe.yaml": final.to_yaml(), _DEEPSPEED: template.read_text(encoding="utf-8")}


def _kept_folders(pod: Tree, container: Tree) -> list[str]:
    """Where volumes are mounted that outlive a pod."""
    lost = {"emptyDir", "ephemeral", "configMap", "secret", "projected", "downwardAPI"}
    kept = {volume["name"] for volume in pod.get("volumes", ()) if not lost & volume.keys()}
    mounts = container.get("volumeMounts", ())
    return [
        mount["mountPath"] for mount in mounts if mount["name"] in kept and "mountPath" in mount
    ]


# ------------------------------------------------------------------------------------------ kubectl


def submit_file(manifests: Path) -> int:
    """`kubectl apply`, which checks every field against the cluster's own schemas. Returns 0, or 1
    where it refused.

    Raises:
        BadInput: there is no kubectl.
    """
    command = ["kubectl", "apply", "--validate=strict", "-f", str(manifests)]
    try:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise BadInput(
            f"--submit: there is no kubectl here; apply {manifests} where there is one"
        ) from None
    print(done.stdout, end="")
    if done.returncode:
        return FAILED
    if all(line.endswith(" unchanged") for line in done.stdout.splitlines()):
        print(
            f"packhorse: it was there already, and is not started again: kubectl delete -f "
            f"{manifests} first",
            file=sys.stderr,
        )
        return FAILED
    return DONE


# ------------------------------------------------------------------------------------ trees of YAML


def laid_over(base: Any, overlay: Any, place: str = "") -> Any:
    """`base` with what `overlay` says: mappings key by key, lists of named things by their names,
    other lists and values whole. None takes a key out. These are kustomize's rules, but for the few
    lists that go by another key there.

    Raises:
        BadInput: a mapping or list is to be replaced by something else, or something without a name
            is in a list of named things.
    """
    if isinstance(base, dict) and isinstance(overlay, dict):
        merged = {
            key: laid_over(base[key], value, f"{place}.{key}")
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
            named[name] = laid_over(named[name], item, f"{place}.{name}") if name in named else item
        return list(named.values())
    return overlay


def _are_named(items: list[Any]) -> bool:
    return all(isinstance(item, dict) and "name" in item for item in items)


def _filled(tree: Any, name: str, nodes: int, image: str) -> Any:
    """`tree` with the places filled in."""
    if isinstance(tree, dict):
        return {key: _filled(value, name, nodes, image) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_filled(value, name, nodes, image) for value in tree]
    if isinstance(tree, str):
        return {"$NODES": nodes, "$IMAGE": image}.get(tree, tree.replace("$NAME", name))
    return tree


def _templates(file: str) -> list[Tree]:
    return list(yaml.safe_load_all(Path(__file__).with_name(file).read_text(encoding="utf-8")))


def _read_overlay(path: Path) -> Tree:
    try:
        overlay = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(overlay, dict) or not overlay.keys() <= {"metadata", "spec"}:
        raise BadInput(
            f"{path}: it must be a part of a Job, with `metadata` and `spec`; start from {CLUSTER}"
        )
    metadata = overlay.get("metadata", {})
    if not isinstance(metadata, dict) or not metadata.keys() <= {
        "namespace",
        "labels",
        "annotations",
    }:
        raise BadInput(
            f"{path}: metadata: it may have `namespace`, `labels` and `annotations`; the name is "
            f"--name"
        )
    return overlay


class _Readable(yaml.SafeDumper):
    """Texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Readable.add_representer(str, _text)
