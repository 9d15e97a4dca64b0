"""Two pods of the manifests, each on a host with the pod's name, address, environment and files.

There is no Kubernetes here: the test plays the kubelet that starts pods, and the Job that restarts
them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.datatypes import DONE, SAVED_RUN_AGAIN
from packhorse.trainer.utils.json_lines import read_json_lines
from tests.cluster.hosts import Hosts, hosts
from tests.cluster.test_elastic_hosts import wait_for_step
from tests.pods import KINDS, Pod, manifests, pods, what_becomes_of
from tests.ranks import ROOT

pytestmark = pytest.mark.cluster

NO_EVAL = (
    "data.eval=[]",
    "eval.every_steps=null",
    "eval.generate=null",
    "checkpoint.every_steps=10",
)


class Cluster:
    """A volume claim, and the hosts that mount it."""

    def __init__(self, folder: Path, made_hosts: Hosts) -> None:
        self.claim = folder / "claim"
        shutil.copytree(ROOT / "recipes/debug", self.claim / "recipes/debug")
        self._folder, self._hosts = folder, made_hosts

    def start(self, made: dict[str, Any]) -> list[subprocess.Popen]:
        """Start all pods, each with only what the manifests and the image give it."""
        return [self._start(pod, made["ConfigMap"]) for pod in pods(made)]

    def _start(self, pod: Pod, config_map: dict[str, Any]) -> subprocess.Popen:
        places = {
            path: self._folder_of(pod, path, volume, config_map)
            for path, volume in pod.volumes.items()
        }

        def inside(text: str) -> str:
            """Return where a path of the pod is on this machine."""
            found = [path for path in places if text == path or text.startswith(f"{path}/")]
            return f"{places[found[0]]}{text.removeprefix(found[0])}" if found else text

        image = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "USER": "packhorse"}
        env = image | {name: inside(value) for name, value in pod.env.items()}
        entrypoint = [sys.executable, "-m", "packhorse"]
        command = [*entrypoint, *(inside(argument) for argument in pod.args)]
        name = f"{pod.hostname}.{pod.subdomain}"
        return self._hosts.start(name, command, env=env, cwd=Path(inside(pod.workdir)))

    def _folder_of(
        self, pod: Pod, path: str, volume: dict[str, Any], config_map: dict[str, Any]
    ) -> Path:
        if "persistentVolumeClaim" in volume:
            return self.claim
        if path == "/dev/shm":  # the machine's own
            return Path(path)
        # what a ConfigMap holds lies in the same place in all pods, and the recipe names it
        folder = (
            self._folder / ("config" if "configMap" in volume else pod.hostname) / path.strip("/")
        )
        folder.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            for name, text in config_map["data"].items():
                # what lies elsewhere in a pod lies elsewhere here, too
                (folder / name).write_text(
                    text.replace("/work/", f"{self.claim}/").replace(path, str(folder))
                )
        return folder

    def signal(self, pod: subprocess.Popen, number: int) -> None:
        self._hosts.signal(pod, number)


@contextmanager
def cluster(folder: Path, names: Sequence[str]) -> Iterator[Cluster]:
    with hosts(folder, names, tag="pod", net="10.83.0") as made:
        yield Cluster(folder, made)


def ended(started: list[subprocess.Popen]) -> list[int]:
    """Return the exit codes; show the pods' last output if one is unexpected."""
    for pod in started:
        print(pod.communicate(timeout=600)[1])
    return [pod.returncode for pod in started]


@pytest.mark.parametrize("kind", KINDS)
def test_two_pods_meet_and_train_to_the_end(tmp_path, kind):
    made = manifests(kind, *NO_EVAL, "train.steps=6")
    with cluster(tmp_path, [f"{pod.hostname}.{pod.subdomain}" for pod in pods(made)]) as two:
        assert ended(two.start(made)) == [DONE, DONE]
        run = two.claim / "runs/debug"
        assert json.loads((run / "environment.json").read_text())["world_size"] == 2
        assert [line["step"] for line in read_json_lines(run / "metrics.jsonl")] == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]


def test_an_evicted_pod_stops_all_and_the_run_goes_on_with_another_number_of_pods(tmp_path):
    steps = 20
    made = manifests("job", *NO_EVAL, f"train.steps={steps}")
    with cluster(tmp_path, [f"{pod.hostname}.{pod.subdomain}" for pod in pods(made)]) as two:
        run = two.claim / "runs/debug"
        started = two.start(made)
        wait_for_step(run, 2, world_size=2)
        two.signal(started[1], signal.SIGTERM)
        codes = ended(started)
        assert codes == [SAVED_RUN_AGAIN, SAVED_RUN_AGAIN]
        assert [what_becomes_of(made, code) for code in codes] == ["Ignore", "Ignore"]
        stopped_at = json.loads((run / "stop.json").read_text())["step"]
        assert stopped_at < steps, "the signal came too late to show anything"

        fewer = manifests("job", *NO_EVAL, f"train.steps={steps}", nodes=1)
        assert ended(two.start(fewer)) == [DONE]
        assert json.loads((run / "environment.json").read_text())["world_size"] == 1
        assert [line["step"] for line in read_json_lines(run / "metrics.jsonl")] == list(
            range(1, steps + 1)
        )
