"""Manifests for Kubernetes: the cluster knows every field, and launchers in the pods can meet."""

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from kubeflow_trainer_api import models

from packhorse.launch.cluster_env import ClusterEnv, read_cluster_env
from packhorse.launch.kubernetes.render import CLUSTER, merge_overlay, run_name
from packhorse.trainer.cli import main
from packhorse.trainer.config.recipe import load_recipe, parse_recipe
from packhorse.trainer.datatypes import BAD_INPUT, DONE, FAILED, SAVED_RUN_AGAIN, BadInput
from tests.pods import KINDS, job_spec, manifests, pods, what_becomes_of
from tests.ranks import ROOT

VERSIONS = (
    "1.29",
    "1.34",
    "1.37",
)  # the first with all fields on by itself, the first where all are stable, a new one
MODELS: dict[str, Any] = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}


@pytest.fixture(autouse=True, scope="module")
def _schemas_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kubernetes_validate.utils,
            "schema_contents",
            functools.cache(kubernetes_validate.utils.schema_contents),
        )
        yield


def refused(manifest: dict[str, Any], version: str = VERSIONS[-1]) -> str | None:
    """Return why a cluster would refuse it, as for an unknown field or value; None if not."""
    try:
        if manifest["kind"] in MODELS:
            model = MODELS[manifest["kind"]]
            return (
                None if model.from_dict(manifest).to_dict() == manifest else "a field is unknown"
            )  # they are dropped
        kubernetes_validate.validate(manifest, version, strict=True)
        if manifest["kind"] == "Job":  # these schemas know no enumerations, the models do
            models.IoK8sApiBatchV1JobSpec.from_dict(manifest["spec"])
    except (ValueError, kubernetes_validate.ValidationError) as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------------ schemas


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_fits_its_schema(kind, version):
    made = manifests(kind)
    assert {name: refused(manifest, version) for name, manifest in made.items()} == dict.fromkeys(
        made
    )


@pytest.mark.parametrize("runtime", [None, "torch-distributed"])
def test_a_trainjob_fits_the_schema_that_kubeflow_installs_in_a_cluster(runtime):
    crd = json.loads((ROOT / "tests/trainjob_crd.json").read_text())
    made = manifests("trainjob", runtime=runtime)["TrainJob"]
    faults = [error.json_path for error in Draft202012Validator(crd).iter_errors(made)]
    assert not faults
    made["spec"]["trainer"]["numNodes"] = "two"
    made["spec"]["runtimeRef"]["kinds"] = made["spec"]["runtimeRef"].pop("kind")
    faults = [error.json_path for error in Draft202012Validator(crd).iter_errors(made)]
    assert sorted(faults) == ["$.spec.runtimeRef", "$.spec.trainer.numNodes"]


def test_the_claim_fits_its_schema():
    (claim,) = yaml.safe_load_all((CLUSTER.parent / "claim.yaml").read_text())
    assert refused(claim) is None
    (volume,) = [
        v
        for v in job_spec(manifests())["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in v
    ]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


NAMES_OF_ONES_OWN = {
    "data",
    "labels",
    "annotations",
    "matchLabels",
    "selector",
    "limits",
    "requests",
}


def mappings(tree: Any, free: bool = False) -> Iterator[dict[str, Any]]:
    """Return all mappings whose keys belong to the API."""
    if isinstance(tree, dict):
        if not free:
            yield tree
        for key, value in tree.items():
            yield from mappings(value, free=key in NAMES_OF_ONES_OWN)
    elif isinstance(tree, list):
        for value in tree:
            yield from mappings(value)


def unseen(
    manifest: dict[str, Any], key_of: Callable[[str], bool], spoil: Callable[[dict, str], None]
) -> list[str]:
    """Return the keys that could be misspelt, one at a time, without being refused."""
    keys = []
    for number, mapping in enumerate(mappings(manifest)):
        for key in filter(key_of, mapping):
            spoilt = copy.deepcopy(manifest)
            spoil(list(mappings(spoilt))[number], key)
            if refused(spoilt) is None:
                keys.append(key)
    return keys


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("job", "ConfigMap"),
        ("job", "Service"),
        ("job", "Job"),
        ("job", "NetworkPolicy"),
        ("jobset", "JobSet"),
        ("trainjob", "TrainingRuntime"),
        ("trainjob", "TrainJob"),
    ],
)
def test_any_misspelt_field_is_found(kind, name):
    def misspell(mapping, key):
        mapping[f"{key}s"] = mapping.pop(key)

    assert not unseen(
        manifests(kind)[name], lambda key: key not in ("apiVersion", "kind"), misspell
    )


@pytest.mark.parametrize(
    ("kind", "name"), [("job", "Job"), ("jobset", "JobSet"), ("trainjob", "TrainingRuntime")]
)
def test_any_misspelt_value_of_an_enumeration_is_found(kind, name):
    enumerations = {"completionMode", "podReplacementPolicy", "action", "operator", "restartPolicy"}
    enumerations |= {"fsGroupChangePolicy", "whenUnsatisfiable"}

    def misspell(mapping, key):
        mapping[key] = mapping[key].lower()

    manifest = manifests(kind)[name]
    assert enumerations <= {key for mapping in mappings(manifest) for key in mapping}
    assert not unseen(manifest, enumerations.__contains__, misspell)


def test_the_examples_in_the_packaged_cluster_file_are_right_too(tmp_path):
    lines = CLUSTER.read_text().splitlines()
    shown = [re.sub(r"^( +)#(?=\S|  )", r"\1", line) for line in lines]
    assert shown != lines
    (tmp_path / "all.yaml").write_text("\n".join(shown))
    made = manifests(cluster=tmp_path / "all.yaml")
    assert {name: refused(manifest) for name, manifest in made.items()} == dict.fromkeys(made)
    spec = job_spec(made)["template"]["spec"]
    (container,) = spec["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0][
        "labelSelector"
    ] == {"matchLabels": {"app.kubernetes.io/instance": "sft"}}


# ------------------------------------------------------------------------- a runtime of the cluster


def test_under_a_runtime_of_the_cluster_the_pods_are_the_runs_own_as_far_as_it_allows():
    made = manifests("trainjob", runtime="torch-distributed")
    assert {name: refused(manifest) for name, manifest in made.items()} == dict.fromkeys(
        ("ConfigMap", "TrainJob")
    )
    spec, whole = made["TrainJob"]["spec"], job_spec(manifests("trainjob"))["template"]["spec"]
    assert (spec["runtimeRef"]["kind"], spec["runtimeRef"]["name"]) == (
        "ClusterTrainingRuntime",
        "torch-distributed",
    )
    (own,), trainer = whole["containers"], spec["trainer"]
    assert [trainer[key] for key in ("image", "args", "env", "numNodes")] == [
        *(own[key] for key in ("image", "args", "env")),
        2,
    ]
    assert trainer["resourcesPerNode"] == own["resources"]
    assert trainer["command"] == ["tini", "--", "env", "--chdir=/work", "packhorse"]
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    for key in ("volumes", "securityContext", "terminationGracePeriodSeconds"):
        assert pod[key] == whole[key]
    (container,) = pod["containers"]
    assert container["volumeMounts"] == own["volumeMounts"]
    assert "env" not in container, "the trainer refuses a patch of the environment of `node`"


def test_any_misspelt_field_of_a_patch_is_found():
    def misspell(mapping, key):
        mapping[f"{key}s"] = mapping.pop(key)

    made = manifests("trainjob", runtime="torch-distributed")["TrainJob"]
    assert not unseen(made, lambda key: key not in ("apiVersion", "kind"), misspell)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("spec: {template: {spec: {hostNetwork: true}}}", "hostNetwork"),
        ("spec: {template: {spec: {containers: [{name: node, envFrom: []}]}}}", "envFrom"),
        ("spec: {template: {spec: {containers: [{name: side, image: x}]}}}", "side"),
        ("spec: {activeDeadlineSeconds: 9}", "activeDeadlineSeconds"),
    ],
)
def test_what_a_runtime_of_the_cluster_would_lose_is_refused(tmp_path, text, named):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(BadInput, match=f"a TrainJob cannot give {named} to the runtime theirs"):
        manifests("trainjob", cluster=tmp_path / "my.yaml", runtime="theirs")


# ------------------------------------------------------------------------------------- in a cluster


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("job", "sft-0.sft:29400"),
        ("jobset", "sft-node-0-0.sft:29400"),
        ("trainjob", "sft-node-0-0.sft:29500"),
    ],
)
def test_launchers_find_each_other_by_the_first_pods_name(kind, first):
    two = pods(manifests(kind))
    assert f"{two[0].hostname}.{two[0].subdomain}" == first.partition(":")[0]
    run_id = None if kind == "trainjob" else "sft"
    for pod, is_host in zip(two, (True, False)):
        assert read_cluster_env(pod.env) == ClusterEnv(
            "2", None, first, run_id, is_host, join_s=86_400
        )


def test_the_service_is_the_pods_own_subdomain():
    made = manifests()
    spec = job_spec(made)["template"]
    assert spec["spec"]["subdomain"] == made["Service"]["metadata"]["name"]
    assert made["Service"]["spec"]["selector"].items() <= spec["metadata"]["labels"].items()
    assert made["Service"]["spec"]["clusterIP"] == "None"
    assert made["Service"]["spec"]["publishNotReadyAddresses"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_only_pods_of_the_run_reach_its_pods(kind):
    made = manifests(kind)
    policy = made["NetworkPolicy"]["spec"]
    (rule,) = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress"]
    assert rule == {"from": [{"podSelector": policy["podSelector"]}]}, "on all ports"
    wanted = policy["podSelector"]["matchLabels"]
    assert wanted == {"app.kubernetes.io/instance": "sft"}
    assert wanted.items() <= job_spec(made)["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("kind", KINDS)
def test_exit_codes_mean_to_the_job_what_they_mean_to_us(kind):
    made = manifests(kind)
    assert what_becomes_of(made, SAVED_RUN_AGAIN) == "Ignore"
    assert what_becomes_of(made, BAD_INPUT) == "FailJob"
    assert what_becomes_of(made, FAILED) == what_becomes_of(made, 137) == "Count"
    assert what_becomes_of(made, 137, disrupted=True) == "Ignore"
    spec = job_spec(made)
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert {
        rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"][:2]
    } == {container["name"] for container in spec["template"]["spec"]["containers"]}


@pytest.mark.parametrize("kind", KINDS)
def test_pods_keep_the_restricted_security_standard(kind):
    spec = job_spec(manifests(kind))["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert not any("hostPath" in volume for volume in spec["volumes"])
    assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))


def test_what_pods_write_to_is_mounted():
    pod = pods(manifests())[0]
    writable = {"/work": "persistentVolumeClaim", "/tmp": "emptyDir", "/dev/shm": "emptyDir"}
    assert {path: set(pod.volumes[path]) - {"name"} for path in writable} == {
        p: {kind} for p, kind in writable.items()
    }
    assert pod.volumes["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    recipe = parse_recipe(yaml.safe_load(manifests()["ConfigMap"]["data"]["recipe.yaml"]))
    written = (
        pod.env["HOME"],
        pod.env["HF_HOME"],
        recipe.data.cache,
        f"{pod.workdir}/{recipe.run.dir}",
    )
    assert all(any(Path(path).is_relative_to(root) for root in writable) for path in written)


# --------------------------------------------------------------------------------------- the recipe


def test_pods_read_the_recipe_as_it_was_with_the_overrides():
    given = load_recipe(ROOT / "recipes/debug.yaml", ["optim.lr=0.5"])
    config_map = manifests("job", "optim.lr=0.5")["ConfigMap"]
    theirs = parse_recipe(yaml.safe_load(config_map["data"]["recipe.yaml"]))
    assert theirs.fixed() == given.fixed()
    assert theirs.run == given.run
    assert theirs.parallel.deepspeed == "/etc/packhorse/deepspeed.json"
    assert config_map["data"]["deepspeed.json"] == (ROOT / "ds_configs/zero3.json").read_text()
    assert config_map["immutable"] is True


def test_the_cache_lies_on_the_volume_unless_the_recipe_says_where():
    def cache(*overrides: str) -> str:
        return yaml.safe_load(manifests("job", *overrides)["ConfigMap"]["data"]["recipe.yaml"])[
            "data"
        ]["cache"]

    assert cache() == "/work/.cache/packhorse"
    assert cache("data.cache=/scratch") == "/scratch"


@pytest.mark.parametrize(
    ("folder", "name"), [("runs/sft", "sft"), ("/work/runs/SFT_8b.1/", "sft-8b-1"), ("a/-b-", "b")]
)
def test_a_run_is_called_after_its_folder(folder, name):
    assert run_name(folder) == name


# ------------------------------------------------------------------------------------- cluster.yaml


def test_mappings_are_merge_overlay_each_other_and_named_things_by_name():
    base = {
        "a": {"b": 1, "c": [1, 2]},
        "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}],
        "d": 3,
    }
    over = {
        "a": {"c": [3]},
        "env": [{"name": "Y", "value": "5"}, {"name": "Z", "value": "6"}],
        "d": None,
        "e": 4,
    }
    assert merge_overlay(base, over) == {
        "a": {"b": 1, "c": [3]},
        "env": [
            {"name": "X", "value": "1"},
            {"name": "Y", "value": "5"},
            {"name": "Z", "value": "6"},
        ],
        "e": 4,
    }


def test_one_cluster_file_serves_all_kinds(tmp_path):
    (tmp_path / "my.yaml").write_text(
        """
metadata: {namespace: team, labels: {kueue.x-k8s.io/queue-name: gpus}}
spec:
  template:
    spec:
      securityContext: {runAsUser: null}
      tolerations: [{key: nvidia.com/gpu, operator: Exists}]
      volumes: [{name: work, persistentVolumeClaim: null, nfs: {server: nas, path: /share}}]
      containers: [{name: node, resources: {limits: {nvidia.com/gpu: 4}}}]
"""
    )
    specs = []
    for kind in KINDS:
        made = manifests(kind, cluster=tmp_path / "my.yaml")
        assert {name: refused(manifest) for name, manifest in made.items()} == dict.fromkeys(made)
        assert {manifest["metadata"]["namespace"] for manifest in made.values()} == {"team"}
        assert all(
            "kueue.x-k8s.io/queue-name" in manifest["metadata"]["labels"]
            for manifest in made.values()
        )
        specs.append(job_spec(made))
    for spec in specs:
        pod = spec["template"]["spec"]
        assert "runAsUser" not in pod["securityContext"]
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
        assert {"name": "work", "nfs": {"server": "nas", "path": "/share"}} in pod["volumes"]
        pod["containers"][0]["env"] = []  # where they meet differs
    assert specs[0] == specs[1] == specs[2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("spec: {template: {spec: {containers: [{name: [1]}]}}}", "each item must have a `name`"),
        ("spec: {template: {spec: {containers: [{name: node, workingDir: 5}]}}}", "are paths"),
        (
            "spec: {template: {spec: {containers: "
            "[{name: node, volumeMounts: [{name: work, mountPath: []}]}]}}}",
            "are paths",
        ),
    ],
)
def test_a_cluster_file_of_other_types_is_refused(tmp_path, text, sentence):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(BadInput, match=sentence):
        manifests(cluster=tmp_path / "my.yaml")


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Run `packhorse launch kubernetes` on the debug recipe: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    (tmp_path / "debug.yaml").write_text((ROOT / "recipes/debug.yaml").read_text())

    def run(*arguments: str, recipe: str = "debug.yaml") -> tuple[int, str, str]:
        given = ["--nodes", "2", "--image", "registry/packhorse:1", *arguments]
        monkeypatch.setattr(sys, "argv", ["packhorse", "launch", "kubernetes", recipe, *given])
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int | None)
        return ended.value.code or 0, out, err

    return run


def test_the_default_cluster_is_found_by_its_name_in_every_folder(launch, tmp_path):
    given = ("--out", "out", "--cluster", "launch/kubernetes/cluster.yaml")
    assert launch(*given)[0] == 0
    assert (tmp_path / "out/cluster.yaml").read_text().startswith(CLUSTER.read_text())
    assert "cannot be read" in launch("--cluster", "launch/other.yaml")[2]


def test_the_packaged_recipe_is_refused_as_pods_do_not_have_its_files(launch):
    code, out, err = launch(recipe="debug")
    assert (code, out) == (BAD_INPUT, "")
    assert "give a recipe file whose data and model lie on the volume" in err


def test_it_writes_into_the_run_folder_and_says_what(launch):
    code, out, err = launch("--kind", "jobset")
    assert (code, err) == (DONE, "")
    assert out.splitlines() == [
        "runs/debug/kubernetes/jobset.yaml",
        "runs/debug/kubernetes/cluster.yaml",
        "apply it with: kubectl apply --validate=strict -f runs/debug/kubernetes/jobset.yaml",
    ]
    assert [m["kind"] for m in yaml.safe_load_all(Path(out.split()[0]).read_text())] == [
        "ConfigMap",
        "JobSet",
        "NetworkPolicy",
    ]
    assert Path(out.split()[1]).read_text().startswith(CLUSTER.read_text())


def test_the_cluster_file_that_it_wrote_can_be_changed_and_given_back(launch):
    _, out, _ = launch()
    kept = Path(out.split()[1])
    kept.write_text(kept.read_text().replace("namespace: default", "namespace: team"))
    code, out, err = launch("--cluster", str(kept), "--name", "other", "--out", "elsewhere")
    assert code == DONE, err
    made = list(yaml.safe_load_all(Path("elsewhere/job.yaml").read_text()))
    assert {(m["metadata"]["name"], m["metadata"]["namespace"]) for m in made} == {
        ("other", "team")
    }
    assert launch("--cluster", str(kept))[0] == DONE
    assert "namespace: team" in kept.read_text()


def test_what_the_user_edited_is_not_replaced(launch):
    _, out, _ = launch()
    manifests, kept = (Path(name) for name in out.split()[:2])
    assert launch("--nodes", "4")[0] == DONE, "what nobody edited is replaced"
    before = manifests.read_text()
    kept.write_text(kept.read_text().replace("namespace: default", "namespace: team"))
    code, _, err = launch()
    assert code == BAD_INPUT
    assert "cluster.yaml: exists, and is not as packhorse wrote it; give it as --cluster" in err
    assert ("namespace: team" in kept.read_text(), manifests.read_text()) == (True, before)
    manifests.write_text(before + "# mine\n")
    code, _, err = launch("--cluster", str(kept))
    assert (code, manifests.read_text()) == (BAD_INPUT, before + "# mine\n"), err


def test_nothing_that_is_given_breaks_out_of_its_field(launch):
    hostile = 'x"\n  hostNetwork: true #$NAME'
    code, out, err = launch("--image", hostile)
    assert code == DONE, err
    made = {m["kind"]: m for m in yaml.safe_load_all(Path(out.split()[0]).read_text())}
    (container,) = job_spec(made)["template"]["spec"]["containers"]
    assert container["image"] == hostile


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--name", "Sft"], "'Sft' cannot name a run in a cluster"),
        (["--name", "a" * 41], "at most 40"),
        (["run.dir=runs/8b"], "'8b' cannot name a run in a cluster: give another --name"),
        (
            ["run.dir=/elsewhere/sft"],
            "run.dir: /elsewhere/sft would be lost with its pod; put it below /work",
        ),
        (["run.dir=../sft"], "run.dir: /sft would be lost with its pod"),
        (["parallel.deepspeed=nowhere.json"], "parallel.deepspeed: there is no file nowhere.json"),
        (["optim.lrr=1"], "did you mean `optim.lr`?"),
        (["--cluster", "nowhere.yaml"], "nowhere.yaml: the file cannot be read"),
        (["--cluster", "broken.yaml"], "broken.yaml: not valid YAML"),
        (
            ["--cluster", "pod.yaml"],
            "pod.yaml: it must be a part of a Job, with `metadata` and `spec`",
        ),
        (["--cluster", "flat.yaml"], "flat.yaml: spec.template.spec.containers: must be a list"),
        (["--cluster", "none.yaml"], "none.yaml: it removes the container `node`"),
        (["--cluster", "bare.yaml"], "bare.yaml: it removes the container `node`"),
        (
            ["--cluster", "unnamed.yaml"],
            "unnamed.yaml: spec.template.spec.volumes: each item must have a `name`",
        ),
        (["--cluster", "twice.yaml"], "the key `spec` is given twice"),
        (
            ["--cluster", "image.yaml"],
            "image.yaml: the image and the number of pods are given as --image and --nodes",
        ),
        (
            ["--cluster", "pods.yaml"],
            "pods.yaml: the image and the number of pods are given as --image and --nodes",
        ),
        (
            ["--cluster", "name.yaml"],
            "name.yaml: metadata: it may have `namespace`, `labels` and `annotations`",
        ),
        (["--cluster", "lost.yaml"], "would be lost with its pod; mount a persistent volume"),
        (["--kind", "job", "--runtime", "x"], "--runtime x: only a trainjob uses a runtime"),
        (["--out", "debug.yaml"], "debug.yaml/cluster.yaml: cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(launch, arguments, sentence):
    wrong = {
        "broken": "spec: [",
        "twice": "spec: {}\nspec: {}",
        "pod": "template: {}",
        "name": "metadata: {name: other}",
        "pods": "spec: {parallelism: 3}",
        "bare": "spec: {template: null}",
        "flat": "spec: {template: {spec: {containers: {name: node}}}}",
        "none": "spec: {template: {spec: {containers: null}}}",
        "image": "spec: {template: {spec: {containers: [{name: node, image: other}]}}}",
        "unnamed": "spec: {template: {spec: {volumes: [{emptyDir: {}}]}}}",
        "lost": "spec: {template: {spec: {volumes: [{name: work, persistentVolumeClaim: null, "
        "emptyDir: {}}]}}}",
    }
    for name, text in wrong.items():
        Path(f"{name}.yaml").write_text(text)
    code, _, err = launch(*arguments)
    assert (code, err.count("\n")) == (BAD_INPUT, 1)
    assert sentence in err


def kubectl(monkeypatch, tmp_path: Path, says: str, code: int, *, answers: bool = False) -> Path:
    """Make a kubectl that records its arguments, in place of the real one.

    Args:
        answers: the cluster does, to `kubectl version`.
    """
    noted = tmp_path / "arguments"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/kubectl"
    program.write_text(
        f'#!/bin/sh\n[ "$1 {answers}" = "version True" ] && exit 0\n'
        f'for argument; do echo "$argument"; done >{noted}\necho "{says}"\nexit {code}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return noted


@pytest.mark.parametrize(
    ("says", "code", "ends"),
    [
        ("job.batch/debug created", 0, DONE),
        ("job.batch/debug unchanged", 0, FAILED),  # a job that has ended is not started again
        ("", 1, FAILED),
    ],
)
def test_submit_hands_the_file_to_kubectl(launch, monkeypatch, tmp_path, says, code, ends):
    noted = kubectl(monkeypatch, tmp_path, says, code, answers=True)
    ended, out, err = launch("--submit")
    assert ended == ends
    assert says in out
    assert noted.read_text().split() == [
        "apply",
        "--validate=strict",
        "-f",
        "runs/debug/kubernetes/job.yaml",
    ]
    assert ("kubectl delete -f" in err) == says.endswith("unchanged")


def test_without_a_cluster_that_answers_submit_says_so(launch, monkeypatch, tmp_path):
    noted = kubectl(monkeypatch, tmp_path, "", 1)
    program = tmp_path / "bin/kubectl"
    program.write_text(program.read_text().replace("exit 1", "echo nobody listens >&2; exit 1"))
    code, _, err = launch("--submit")
    assert code == BAD_INPUT
    assert "no cluster answers kubectl (nobody listens)" in err
    assert "kubectl apply --validate=strict -f runs/debug/kubernetes/job.yaml" in err
    assert noted.read_text().split() == ["version", "--request-timeout=10s"]


def test_without_kubectl_submit_says_so(launch, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = launch("--submit")
    assert code == BAD_INPUT
    assert "there is no kubectl on this machine" in err


def test_an_installed_packhorse_has_the_templates(tmp_path):
    source = tmp_path / "source"
    for package in ("packhorse", "launch", "trainer"):
        shutil.copytree(
            ROOT / package,
            source / package,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*wheel, str(source)], check=True)
    (built,) = tmp_path.glob("*.whl")
    packed = {
        Path(name).name
        for name in zipfile.ZipFile(built).namelist()
        if name.startswith("packhorse/launch/kubernetes/")
    }
    assert packed >= {path.name for path in CLUSTER.parent.glob("*.yaml")}
