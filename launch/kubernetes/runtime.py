"""Train under a runtime that the cluster's administrators have made, with a TrainJob of Kubeflow.

In: the Job of a run, cluster.yaml merged into it. Out: the TrainJob's spec. A TrainJob gives the
image, the arguments and the environment, and patches some fields of the pods: what the rest of the
Job says, such as when pods are started again, is the runtime's to say.
"""

from __future__ import annotations

from typing import Any

from packhorse.trainer.datatypes import BadInput

Tree = dict[str, Any]

# What a TrainJob may patch (PodSpecPatch and ContainerPatch of trainer.kubeflow.org/v1alpha1)
_POD = {
    *("affinity", "containers", "imagePullSecrets", "initContainers", "nodeSelector"),
    *("schedulingGates", "securityContext", "serviceAccountName", "terminationGracePeriodSeconds"),
    *("tolerations", "volumes"),
}
_CONTAINER = {"name", "securityContext", "volumeMounts"}
# What becomes the TrainJob's section `trainer`, or part of its command
_TRAINER = {"image", "args", "env", "resources", "workingDir"}


def train_job_spec(runtime: str, job: Tree, own: Tree, where: str) -> Tree:
    """Return the spec of a TrainJob that runs the Job's pods under a ClusterTrainingRuntime.

    Args:
        runtime: its name in the cluster.
        job: the Job's spec, cluster.yaml merged into it.
        own: the Job's spec before that. Its fields that a TrainJob cannot give are left out.
        where: the cluster.yaml, for messages.

    Raises:
        BadInput: cluster.yaml sets what a TrainJob cannot give.
    """
    (own_container,) = own["template"]["spec"]["containers"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    extra = [*(one["name"] for one in pod["containers"][1:])]
    extra += sorted(job.keys() - own.keys())
    extra += sorted(pod.keys() - own["template"]["spec"].keys() - _POD)
    extra += sorted(container.keys() - own_container.keys() - _CONTAINER - _TRAINER)
    if extra:
        raise BadInput(
            f"{where}: a TrainJob cannot give {', '.join(extra)} to the runtime {runtime}; leave "
            "it out, and have the runtime set it, or leave --runtime out"
        )
    patch = {key: value for key, value in pod.items() if key in _POD}
    patch["containers"] = [{key: value for key, value in container.items() if key in _CONTAINER}]
    replicated = {"name": "node", "template": {"spec": {"template": {"spec": patch}}}}
    return {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "ClusterTrainingRuntime",
            "name": runtime,
        },
        "trainer": {
            "image": container["image"],
            # a TrainJob has no field for the working directory
            "command": ["tini", "--", "env", f"--chdir={container['workingDir']}", "packhorse"],
            "args": container["args"],
            "env": container["env"],
            "resourcesPerNode": container.get("resources", {}),
            "numNodes": job["completions"],
        },
        "runtimePatches": [
            {
                "manager": "packhorse/launch",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
            }
        ],
    }
