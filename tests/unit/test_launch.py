"""The launcher's promises (C9), with small stand-ins for the trainer as workers."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from packhorse.launch import local
from packhorse.launch.agent import Agent, RankLogs
from packhorse.launch.cluster_env import parse_nodes
from packhorse.launch.local import exit_code, launch
from packhorse.trainer.datatypes import BadInput

ROOT = Path(__file__).resolve().parents[2]

# A worker that behaves as the trainer does: it takes the signals when it is ready, saves, says so,
# leaves with 0.
SAVES = """
import os, pathlib, signal, sys, time
run, save_s = pathlib.Path(sys.argv[1]), float(sys.argv[2])
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
time.sleep(0.2)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
ready = run / f"ready{os.environ['RANK']}"
ready.with_suffix(".new").write_text(os.environ["GROUP_RANK"])
ready.with_suffix(".new").rename(ready)
while not asked:
    time.sleep(0.01)
end = time.monotonic() + save_s
while time.monotonic() < end:
    time.sleep(0.01)
(run / f"saved{os.environ['RANK']}").write_text(signal.Signals(asked[0]).name)
if os.environ["RANK"] == "0":
    (run / "stop.json").write_text("{}")
"""


def start(
    tmp_path: Path, code: str, *arguments: str, threads: str | None = None, **options: Any
) -> subprocess.Popen:
    """Start a launcher of workers that run `code`: two, unless `options` of `launch` differ."""
    script = tmp_path / "worker.py"
    script.write_text(code)
    worker = f"[{str(script)!r}, {str(tmp_path)!r}, *sys.argv[1:]]"
    call = f"launch({worker}, Path({str(tmp_path)!r}), **{ {'nproc': 2, **options} })"
    # the tests may run under nohup, or in the background of a shell: both ignore signals for all
    # that they start
    program = (
        "import signal, sys\n"
        "for number in (signal.SIGINT, signal.SIGHUP):\n"
        "    signal.signal(number, signal.SIG_DFL)\n"
        "from pathlib import Path\n"
        "from packhorse.launch.local import launch\n"
        f"sys.exit({call})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | ({"OMP_NUM_THREADS": threads} if threads else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"{paths} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("codes", "stopped", "expected"),
    [
        ([], False, 0),
        ([], True, 75),
        ([1], False, 1),
        ([-9, -15], False, 1),
        ([2], False, 2),
        ([-15, 2], True, 2),
        ([75], False, 75),
        ([1], True, 1),
    ],
)
def test_exit_codes(codes, stopped, expected):
    assert exit_code(codes, stopped) == expected


def test_success_rank_0_is_shown_and_the_others_write_files(tmp_path):
    worker = (
        "import os, sys; keys = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', "
        "'MASTER_ADDR', 'MASTER_PORT',"
        " 'TORCHELASTIC_RUN_ID', 'OMP_NUM_THREADS'); print({k: os.environ[k] for k in keys}, "
        "sys.argv[2:])"
    )
    code, out, err = finish(start(tmp_path, worker, "a=$$local_rank ${x}", threads="3"))
    assert code == 0, err
    assert out.count("'RANK': '0'") == 1
    assert "'RANK': '1'" not in out
    assert "'WORLD_SIZE': '2'" in out
    assert "'OMP_NUM_THREADS': '3'" in out, "the user's own number of threads stays"
    assert "['a=$$local_rank ${x}']" in out, "arguments arrive as they were given"
    assert "OMP_NUM_THREADS=3" in err
    (written,) = tmp_path.glob("logs/*/rank00001.out")
    assert "'RANK': '1'" in written.read_text()


@pytest.mark.parametrize(("gpus", "kept"), [(False, "0"), (True, None)])
def test_workers_keep_the_memory_they_free_and_on_a_gpu_its_segments_grow(monkeypatch, gpus, kept):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(local.torch.cuda, "is_available", lambda: gpus)
    local._set_environment(1)
    assert os.environ.get("MALLOC_MMAP_MAX_") == kept
    grows = "expandable_segments:True" if gpus else None
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == grows


def test_signals_reach_the_workers_and_their_save_is_waited_for(tmp_path):
    runs = {}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        folder = tmp_path / number.name
        folder.mkdir()
        runs[number] = start(folder, SAVES, "1.5")
    for number, process in runs.items():
        wait_for(tmp_path / number.name / "ready0", tmp_path / number.name / "ready1")
        process.send_signal(number)
        time.sleep(0.5)
        process.send_signal(number)  # a second one does no harm
    for number, process in runs.items():
        code, _, err = finish(process)
        assert code == 75, err
        seen = "SIGUSR1" if number == signal.SIGUSR1 else "SIGTERM"
        assert [(tmp_path / number.name / f"saved{rank}").read_text() for rank in (0, 1)] == [
            seen,
            seen,
        ]
        assert "run the same command to resume" in err


def test_a_signal_in_a_workers_first_moments_is_not_lost(tmp_path):
    process = start(
        tmp_path,
        "import pathlib, sys\npathlib.Path(sys.argv[1], 'begun').touch()\n" + SAVES,
        "0",
        nproc=1,
    )
    wait_for(tmp_path / "begun")  # its handlers are not set yet
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err


def test_the_third_ctrl_c_kills(tmp_path):
    process = start(tmp_path, SAVES, "1000")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    code, _, err = finish(process)
    assert code == 1
    assert "SIGKILL" in err
    assert not (tmp_path / "stop.json").exists()


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 6, "signal 40")]
)
def test_a_killed_worker_takes_the_others_down_and_is_named(tmp_path, number, name):
    worker = (
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    print('the last words', file=sys.stderr, flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        "time.sleep(1000)\n"
    )
    code, _, err = finish(start(tmp_path, worker))
    assert code == 1
    assert f"rank 1 failed (killed by {name})" in err
    assert err.count("the last words") == 1
    assert "Traceback" not in err
    assert "elastic" not in err


@pytest.mark.parametrize("ranks", ["01", "1"])
def test_bad_input_of_any_rank_is_exit_code_2_and_shown_once(tmp_path, ranks):
    worker = (
        "import os, sys\n"
        "if os.environ['RANK'] in sys.argv[2]:\n"
        "    print('packhorse: error: no such file', file=sys.stderr)\n"
        "    sys.exit(2)\n"
    )
    code, _, err = finish(start(tmp_path, worker, ranks))
    assert code == 2
    assert err.count("no such file") == 1


FAILS_ONCE = """
import os, pathlib, sys
run, code = pathlib.Path(sys.argv[1]), int(sys.argv[2])
print("start", os.environ["TORCHELASTIC_RESTART_COUNT"], (run / "stop.json").exists(), flush=True)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    (run / "stop.json").write_text("{}")  # as ranks leave that are ended when another one fails
    sys.exit(code)
"""


def test_failed_workers_start_again_and_the_last_rounds_stop_is_forgotten(tmp_path):
    code, out, err = finish(start(tmp_path, FAILS_ONCE, "1", nproc=1, restarts=1))
    assert code == 0, err
    assert out == "start 0 False\nstart 1 False\n"
    assert "rank 0 failed (exit code 1)" in err


def test_bad_input_is_not_started_again(tmp_path):
    code, out, err = finish(start(tmp_path, FAILS_ONCE, "2", nproc=1, restarts=3))
    assert code == 2, err
    assert out.count("start") == 1


def test_two_launchers_meet_and_both_say_that_the_run_is_saved(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    several = {"nproc": 2, "nodes": (2, 2), "endpoint": endpoint, "run_id": "x"}
    launchers = [start(tmp_path, SAVES, "0.5", **several) for _ in range(2)]
    ready = [tmp_path / f"ready{rank}" for rank in range(4)]
    wait_for(*ready)
    # a group of consecutive ranks, which share a sequence (C13), fills a node before the next
    assert len({path.read_text() for path in ready[:2]}) == 1
    assert len({path.read_text() for path in ready}) == 2
    for launcher in launchers:  # as Slurm does
        launcher.send_signal(signal.SIGUSR1)
    for launcher in launchers:
        code, _, err = finish(launcher)
        assert code == 75, err
    assert (tmp_path / "saved3").exists()


def test_a_node_drops_its_own_ranks_empty_files_and_no_other_nodes(tmp_path):
    ours, theirs = (RankLogs(tmp_path) for _ in range(2))
    for logs, ranks in ((ours, (0, 1)), (theirs, (2, 3))):
        logs.name = "round"
        logs.reify({local: {"RANK": str(rank)} for local, rank in enumerate(ranks)})
        for path in (
            logs.path(rank, stream) for rank in ranks if rank for stream in ("out", "err")
        ):
            path.touch()
    theirs.path(3, "out").write_text("a word")
    ours.drop_empty()
    assert len(list(tmp_path.glob("round/rank*"))) == 4  # rank 2 may say something yet
    theirs.drop_empty()
    assert [path.name for path in tmp_path.glob("round/*")] == ["rank00003.out"]
    ours.drop_empty()


@pytest.mark.parametrize(("text", "nodes"), [("2", (2, 2)), ("1:4", (1, 4))])
def test_the_number_of_nodes(text, nodes):
    assert parse_nodes(text) == nodes


@pytest.mark.parametrize("text", ["0", "2:1", "a", "1:", "1:2:3", "-1", ""])
def test_a_number_of_nodes_that_is_refused(text):
    with pytest.raises(BadInput, match="give a number, or MIN:MAX"):
        parse_nodes(text)


def test_a_joining_or_lost_node_asks_nothing_of_torch_that_2_11_lacks(monkeypatch):
    agent: Any = Agent.__new__(Agent)
    monkeypatch.setattr(LocalElasticAgent, "_shutdown", lambda self, death_sig=signal.SIGTERM: None)
    agent._pcontext = Mock(subprocess_handlers={})
    agent._stop_workers(SimpleNamespace(state=WorkerState.HEALTHY))
    (_, seconds), _ = agent._pcontext.close.call_args
    assert seconds >= 3600, "what the workers get to save"
    left = []
    monkeypatch.setattr(agent, "_exit", left.append)

    def lose_a_node(agent):
        vars(agent).pop("_in_exit_barrier", None)
        agent._end_round("host2")

    monkeypatch.setattr(LocalElasticAgent, "_exit_barrier", lose_a_node)
    agent._exit_barrier()
    agent._end_round("host2")
    assert left == ["its work was not done"], "only while this node waits for the others"


def test_a_port_in_use_is_bad_input(tmp_path):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"port {port} cannot be used"):
            launch(["-c", "0"], tmp_path, nproc=1, endpoint=f"localhost:{port}")


def test_a_node_waits_for_the_first_one_and_says_so_once(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    nodes = {"nodes": (2, 2), "endpoint": endpoint, "nproc": 1, "run_id": "waits"}
    second = start(tmp_path, "", **nodes, is_host=False)
    assert second.stderr is not None
    lines = [second.stderr.readline(), second.stderr.readline()]
    assert "waiting for the rendezvous host at 127.0.0.1" in lines[1], lines
    first = start(tmp_path, "", **nodes, is_host=True)
    for launcher in (first, second):
        _, err = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, err
        assert "waiting for" not in err
        assert "client socket" not in err, "torch's own complaints"
