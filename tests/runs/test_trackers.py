"""A run is tracked by a real MLflow server, W&B, Comet and Trackio, over a stop and a resume."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from packhorse.trainer import dist, trackers
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.trackers import IDS, flat_recipe, open_trackers
from tests.ranks import ROOT

pytestmark = pytest.mark.runs

STEPS = 4


class MlflowServer:
    """A real server on loopback, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        store = f"sqlite:///{folder / 'mlflow.db'}"
        self._process = subprocess.Popen(
            [sys.executable, *command, "--workers", "1", "--backend-store-uri", store],
            cwd=folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=(folder / "server.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health").status_code == 200
        except httpx2.HTTPError:
            return False

    def ask(self, path: str, **query: Any) -> dict[str, Any]:
        answer = httpx2.get(f"{self.url}/api/2.0/mlflow/{path}", params=query)
        return answer.raise_for_status().json()

    def only_run(self, project: str) -> dict[str, Any]:
        """Return the run of an experiment that has one run."""
        found = self.ask("experiments/get-by-name", experiment_name=project)["experiment"]
        asked = {"experiment_ids": [found["experiment_id"]]}
        answer = httpx2.post(f"{self.url}/api/2.0/mlflow/runs/search", json=asked)
        (run,) = answer.raise_for_status().json()["runs"]
        return run

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    opened = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield opened
    opened.kill()


def train(run_dir: Path, url: str, *more: str) -> subprocess.CompletedProcess[str]:
    overrides = {
        "run.dir": str(run_dir),
        "run.trackers": ["tensorboard", "wandb", "mlflow", "trackio"],
        "run.project": "tracked",
        "run.name": "first",
        "run.tags": ["small"],
        "run.group": "g1",
        "data.cache": str(run_dir.parent / "cache"),
        "train.steps": STEPS,
        "eval.generate": None,
    }
    environ = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": url,
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(run_dir.parent / "trackio"),
    }
    return subprocess.run(
        [sys.executable, "-m", "packhorse", "train", "debug", "--nproc", "2"]
        + [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        + list(more),
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


def wandb_records(folder: Path) -> Iterator[Any]:
    """Yield the records of W&B's file of an offline run.

    It is LevelDB's log format after a header of seven bytes: blocks of 32 KiB with pieces, each of
    which has a checksum (4 bytes), a length (2) and a kind (1, of which 1 and 4 end a record).
    """
    wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("*.wandb")
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = -place % 2**15
        if 0 < left < 7:  # no piece begins there
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_a_resumed_run_goes_on_in_the_same_tracked_runs(
    tmp_path: Path, server: MlflowServer
) -> None:
    run_dir = tmp_path / "run"
    stopped = train(run_dir, server.url, "run.stop_after=2")
    assert stopped.returncode == 75, stopped.stderr
    ids = json.loads((run_dir / IDS).read_text())
    done = train(run_dir, server.url)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / IDS).read_text()) == ids

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(losses) == [1, 2, 3, 4]
    run = server.only_run("tracked")
    assert run["info"]["run_id"] == ids["mlflow"]
    assert run["info"]["run_name"] == "first"
    assert run["info"]["status"] == "FINISHED"
    assert {"key": "optim.lr", "value": "0.01"} in run["data"]["params"]
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert (tags["group"], tags["small"]) == ("g1", "")
    history = server.ask("metrics/get-history", run_id=ids["mlflow"], metric_key="train/loss")
    assert {point["step"]: point["value"] for point in history["metrics"]} == losses
    assert len(history["metrics"]) == STEPS

    seen: dict[int, float] = {}
    folders = sorted(run_dir.glob("wandb/offline-run-*"))
    assert [folder.name.rpartition("-")[2] for folder in folders] == [ids["wandb"]] * 2
    for folder in folders:
        for record in wandb_records(folder):
            if record.HasField("run"):
                told = record.run
                assert (told.project, told.display_name, told.run_group, list(told.tags)) == (
                    *("tracked", "first", "g1"),
                    ["small"],
                )
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: i for i in record.history.item}
                if "train/loss" in items:
                    seen[record.history.step.num] = json.loads(items["train/loss"].value_json)
    assert seen == losses
    check_trackio(tmp_path / "trackio", losses)
    assert "run.trackers:" not in stopped.stderr + done.stderr, "nothing failed"


def check_trackio(folder: Path, losses: dict[int, float]) -> None:
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as s; "
        "(name,) = s.get_runs('tracked'); logs = s.get_logs('tracked', name); "
        "print(json.dumps([(l['step'], l['train/loss']) for l in logs if 'train/loss' in l]))"
    )
    environ = os.environ | {"TRACKIO_DIR": str(folder)}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert dict(json.loads(said.stdout.splitlines()[-1])) == losses


COMET = """
import json, sys
from pathlib import Path
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.trackers import open_trackers
run_dir = Path(sys.argv[1])
changes = {"dir": str(run_dir), "trackers": ["comet_ml"], "project": "p", "group": "g"}
changes["tags"] = ["a"]
recipe = load_recipe("debug", [f"run.{key}={json.dumps(value)}" for key, value in changes.items()])
with open_trackers(recipe, run_dir) as opened:
    opened.log(int(sys.argv[2]), {"train/loss": 0.5})
"""


def test_comet_goes_on_in_the_same_experiment_and_gets_no_source_files(tmp_path: Path) -> None:
    offline = {"COMET_START_ONLINE": "0", "COMET_OFFLINE_DIRECTORY": str(tmp_path)}
    environ = os.environ | offline | {"COMET_API_KEY": "x", "PYTHONPATH": str(ROOT)}
    for step in ("1", "2"):
        (tmp_path / "run").mkdir(exist_ok=True)
        command = [sys.executable, "-c", COMET, str(tmp_path / "run"), step]
        subprocess.run(command, env=environ, cwd=tmp_path, check=True, timeout=120)
    ids = json.loads((tmp_path / "run" / IDS).read_text())
    steps, kinds = [], set()
    for path in tmp_path.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            told = json.loads(archive.read("experiment.json"))
            records = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        assert (told["offline_id"], told["project_name"]) == (ids["comet_ml"], "p")
        assert sorted(told["tags"]) == ["a", "g"]
        for record in records:
            kinds.add(record["type"])
            metric = record["payload"].get("metric") or {}
            if metric.get("metricName") == "train/loss":
                steps.append((metric["step"], metric["metricValue"]))
    assert sorted(steps) == [(1, 0.5), (2, 0.5)]
    assert not {kind for kind in kinds if "file" in kind or "stdout" in kind}, (
        "no source, no output"
    )


def test_a_tracker_that_does_not_start_is_refused(tmp_path: Path) -> None:
    # the discard port, where nothing listens
    done = train(tmp_path / "run", "http://me:hunter2@127.0.0.1:9")
    assert done.returncode == 2
    assert "run.trackers: mlflow does not start (" in done.stderr
    logs = [path.read_text() for path in (tmp_path / "run" / "logs").iterdir()]
    assert "hunter2" not in "".join([done.stdout, done.stderr, *logs])


def test_a_tracker_whose_server_never_answers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()
    monkeypatch.setattr(trackers, "START_S", 0.2)
    monkeypatch.setattr(trackers, "_start", lambda *_: started.wait())
    recipe = load_recipe(ROOT / "recipes/debug.yaml", ["run.trackers=[mlflow]"])
    with (
        pytest.raises(BadInput, match="mlflow has not started within"),
        trackers.open_trackers(recipe, tmp_path),
    ):
        pass
    started.set()


def test_a_tracker_that_fails_later_is_reported_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "mlflow"
    folder.mkdir()
    dying = MlflowServer(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dying.url)
    recipe = load_recipe("debug", [f"run.dir={tmp_path}", "run.trackers=[mlflow]"])
    dist.start_logging()
    try:
        with open_trackers(recipe, tmp_path) as opened:
            opened.log(1, {"train/loss": 2.0})
            while not dying.only_run("packhorse")["data"].get("metrics"):
                time.sleep(0.1)
            dying.kill()
            opened.log(2, {"train/loss": 1.0})
            opened.log(3, {"train/loss": 0.5})
    finally:
        dying.kill()
        dist.log.propagate = True
    assert capsys.readouterr().err.count("run.trackers: mlflow has failed, and gets nothing") == 1


def test_what_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("debug", [f"run.dir={tmp_path}", "run.trackers=[mlflow]"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(trackers.BadInput, match="not installed; `pip install mlflow-skinny`"):
        open_trackers(recipe, tmp_path).__enter__()


def test_secrets_stay_here() -> None:
    given = [
        "model.chat_template='--api-key hunter2'",
        "model.add_tokens=['API_KEY=hunter2', 'https://me:hunter2@host/x']",
    ]
    sent = json.dumps(flat_recipe(load_recipe("debug", given)))
    assert "hunter2" not in sent
    assert "https://***@host/x" in sent
    assert flat_recipe(load_recipe("debug"))["optim.lr"] == 0.01
