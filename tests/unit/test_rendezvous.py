"""Launchers meet, and nobody without the run's secret gets a word in, or code run."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore

from packhorse.launch import rendezvous, signed_store
from packhorse.launch.signed_store import SECRET, Forged, SignedStore, read_secret
from packhorse.trainer.datatypes import BadInput
from tests.file_lease import leased
from tests.ranks import ROOT
from tests.sockets import listening

LAUNCHER = """
import sys
from pathlib import Path
from packhorse.launch.local import launch
from packhorse.trainer.datatypes import BadInput
try:
    sys.exit(launch(sys.argv[4:], Path(sys.argv[1]), nproc=int(sys.argv[2]), **eval(sys.argv[3])))
except BadInput as error:
    sys.exit(f"bad input: {error}")
"""
# Another process, which knows the port and the name of the run, and writes what torch unpickles.
# It goes on until it is killed, as there is no moment at which the launcher would not read.
ATTACK = """
import base64, os, pickle, sys, time
from datetime import timedelta
from torch.distributed import TCPStore
class Evil:
    def __reduce__(self):
        return os.system, (f"touch {sys.argv[3]}",)
value = base64.b64encode(pickle.dumps(Evil())).decode()
while True:
    try:
        timeout = timedelta(seconds=1)
        store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=timeout)
        for _ in range(1000):
            store.set("torch.rendezvous." + sys.argv[2], value)
            print("wrote", flush=True)
            time.sleep(0.02)
    except Exception:
        time.sleep(0.05)
"""
WAITS = """
import sys, time
from pathlib import Path
Path(sys.argv[1], "ready").touch()
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.05)
"""
RANK = """
import json, os, sys, time
from pathlib import Path
from packhorse.trainer import dist
with dist.process_group():
    group = dist.new_group()
    assert dist.gather(dist.rank()) == list(range(dist.world_size()))
    if dist.is_main():
        names = ("MASTER_PORT", "NCCL_SOCKET_IFNAME")
        where = {name: os.environ.get(name) for name in names}
        Path(sys.argv[1], "where").write_text(json.dumps(where))
    Path(sys.argv[1], f"ready{dist.rank()}").touch()
    while not Path(sys.argv[1], "go").exists():
        time.sleep(0.05)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(run_dir: Path, nproc: int, *worker: str, **options: Any) -> subprocess.Popen:
    command = [sys.executable, "-c", LAUNCHER, str(run_dir), str(nproc), repr(options), *worker]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_until(done: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not done():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("nodes", [(1, 1), (2, 2)])
def test_what_a_stranger_writes_to_the_port_is_not_run(tmp_path, nodes):
    port, hit = free_port(), tmp_path / "hit"
    attack = subprocess.Popen(
        [sys.executable, "-c", ATTACK, str(port), "x", str(hit)], stdout=subprocess.PIPE, text=True
    )
    options = {"endpoint": f"127.0.0.1:{port}", "nodes": nodes, "run_id": "x"}
    launcher = start(tmp_path, 1, "-c", WAITS, str(tmp_path), **options)
    assert attack.stdout
    try:
        attack.stdout.readline()  # it has written
        if nodes == (1, 1):
            wait_until((tmp_path / "ready").exists, launcher)
            time.sleep(2)  # the launcher looks at the rendezvous ten times a second
            (tmp_path / "go").touch()
            _, err = launcher.communicate(timeout=120)
            assert launcher.returncode == 0, err
        else:
            _, err = launcher.communicate(timeout=120)
            assert "bad input" in err
            assert "not signed with the" in err
        assert not hit.exists()
    finally:
        attack.kill()
        launcher.kill()


def test_on_one_machine_everything_listens_on_the_loopback_alone(tmp_path):
    launcher = start(tmp_path, 2, "-c", RANK, str(tmp_path))
    wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)), launcher)
    found = listening(launcher.pid)
    (tmp_path / "go").touch()
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert found, "the ranks meet somewhere"
    assert {address for address, _ in found} == {"127.0.0.1"}
    where = json.loads((tmp_path / "where").read_text())
    assert ("127.0.0.1", int(where["MASTER_PORT"])) in found, "the store of the ranks"
    assert where["NCCL_SOCKET_IFNAME"] == "lo"


def test_one_rank_listens_on_the_loopback_alone(tmp_path):
    environ = {key: value for key, value in os.environ.items() if "RANK" not in key}
    alone = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)], cwd=ROOT, env=environ)
    wait_until((tmp_path / "ready0").exists, alone)
    assert {address for address, _ in listening(alone.pid)} <= {"127.0.0.1"}
    (tmp_path / "go").touch()
    assert alone.wait(timeout=60) == 0


def test_nodes_without_the_same_folder_both_end_and_say_why(tmp_path):
    endpoint = f"127.0.0.1:{free_port()}"
    options = {"endpoint": endpoint, "nodes": (2, 2), "run_id": "x"}
    both = [start(tmp_path / name, 1, "-c", "", **options) for name in ("a", "b")]
    for launcher in both:
        _, err = launcher.communicate(timeout=120)
        assert launcher.returncode == 1, err
        assert "run.dir is not the same folder on all nodes" in err


# ------------------------------------------------------------------------------------------- store


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    monkeypatch.setattr(signed_store, "_READ_S", 0)  # nobody else reads
    store = HashStore()
    store.set_timeout(timedelta(seconds=1))
    return store


def test_what_is_signed_is_read_by_all_who_have_the_secret(plain):
    one, other = (SignedStore(plain, b"secret").under("round") for _ in range(2))
    one.set("a", "text of two words")
    one.multi_set(["b", "c"], [b"bytes", "\u00e9"])
    assert other.get("a") == b"text of two words"
    assert other.multi_get(["b", "c"]) == [b"bytes", "\u00e9".encode()]
    assert one.compare_set("d", "", "first") == other.compare_set("d", "", "second") == b"first"
    assert other.compare_set("d", "first", "third") == one.get("d") == b"third"
    assert one.add("n", 2) == 2
    assert other.check(["a", "n"])
    other.wait(["a"])
    other.wait(["a"], timedelta(seconds=1))


def tampered(plain: Any, how: str) -> None:
    ours = SignedStore(plain, b"secret")
    if how == "no signature":
        plain.set("a", "value")
    elif how == "no text":
        plain.set("a", b"\xff\xfe \xff")
    elif how == "empty":
        plain.set("a", "")
    elif how == "another secret":
        SignedStore(plain, b"other").set("a", "value")
    elif how == "another name":
        ours.set("b", "value")
        plain.set("a", plain.get("b"))
    elif how == "another round":
        ours.under("1").set("a", "value")
        plain.set("a", plain.get("1/a"))
    elif how == "shifted":  # the end of the name as the beginning of the value
        ours.set("a x", "value")
        plain.set("a", plain.get("a x").replace(b" value", b" x value"))
    else:
        ours.set("a", "value")
        plain.set("a", plain.get("a")[:-1] + b"E")


@pytest.mark.parametrize(
    "how",
    [
        *("no signature", "no text", "empty", "another secret", "another name", "another round"),
        *("shifted", "changed"),
    ],
)
def test_what_is_not_signed_by_us_for_this_name_is_not_read(plain, how):
    ours = SignedStore(plain, b"secret")
    ways: list[Callable[[], Any]] = [
        lambda: ours.get("a"),
        lambda: ours.multi_get(["a"]),
        lambda: ours.compare_set("a", "before", "after"),
    ]
    for read in ways:
        tampered(plain, how)
        with pytest.raises(Forged, match="not signed with the"):
            read()


def test_one_that_takes_the_connection_and_never_answers_is_no_host(tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "_STORE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BadInput, match="nobody answers at"):
            rendezvous.meet(endpoint, (2, 2), False, "x", 1, tmp_path, print)


def test_an_answer_that_no_memory_holds_is_not_read():
    real = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def answer() -> None:
        connection = listener.accept()[0]
        with connection, socket.create_connection(("127.0.0.1", real.port)) as server:
            server.sendall(connection.recv(64))
            connection.sendall(server.recv(4))  # the number that a store sends back
            while connection.recv(4096):
                connection.sendall((1 << 44).to_bytes(8, "little"))  # the length of a value

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        port, limit = listener.getsockname()[1], timedelta(seconds=30)
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        with pytest.raises(Forged, match="longer than memory allows"):
            SignedStore(store, b"secret").compare_set("a", "", "value")
        del store


# ------------------------------------------------------------------------------------------ secret


HOST = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


def test_a_host_that_is_frozen_is_not_waited_for_and_signals_are_served(monkeypatch):
    monkeypatch.setattr(signed_store, "_ANSWER_S", 2.0)
    command = [sys.executable, "-c", HOST]
    served: list[float] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: served.append(time.monotonic()))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as host:
        try:
            assert host.stdout is not None
            port, limit = int(host.stdout.readline()), timedelta(seconds=1)
            connected = TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
            store = SignedStore(connected, b"s" * 64)
            store.set("name", "value")
            assert store.get("name") == b"value"
            host.send_signal(signal.SIGSTOP)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(RuntimeError, match="the rendezvous host has not answered for 3 s"):
                store.get("name")
            assert time.monotonic() - served[0] > 1, "it was served while the store was asked"
        finally:
            signal.signal(signal.SIGUSR1, before)
            host.kill()


def test_all_nodes_get_the_secret_that_one_of_them_made(tmp_path):
    found: list[bytes] = []
    run_dir = tmp_path / "run"
    threads = [
        threading.Thread(target=lambda: found.append(read_secret(run_dir))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len(set(found)) == 1
    assert len(found[0]) == 64
    assert [path.name for path in run_dir.iterdir()] == [SECRET]
    assert stat.S_IMODE((run_dir / SECRET).stat().st_mode) == 0o600
    assert read_secret(tmp_path / "other") != found[0]


def test_a_secret_that_others_may_read_or_that_stays_torn_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(signed_store, "_WHOLE_S", 0.2)
    text = read_secret(tmp_path)
    (tmp_path / SECRET).chmod(0o640)
    with pytest.raises(BadInput, match="mode 0600, not 0640"):
        read_secret(tmp_path)
    (tmp_path / SECRET).chmod(0o600)
    (tmp_path / SECRET).write_bytes(text[:-1])
    with pytest.raises(BadInput, match="must be whole"):
        read_secret(tmp_path)


@pytest.mark.parametrize("what", ["a pipe", "a device", "bytes that are no text", "a folder"])
def test_what_is_no_secret_is_refused_and_not_waited_for(tmp_path, monkeypatch, what):
    monkeypatch.setattr(signed_store, "_WHOLE_S", 0.2)
    path = tmp_path / SECRET
    if what == "a pipe":
        os.mkfifo(path, 0o600)
    elif what == "a device":
        path.symlink_to("/dev/zero")
    elif what == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff" * 99)
        path.chmod(0o600)
    with pytest.raises(BadInput, match="must be whole"):
        read_secret(tmp_path)


def test_a_secret_that_a_file_server_holds_is_waited_for(tmp_path):
    text = read_secret(tmp_path)
    with leased(tmp_path / SECRET):
        assert read_secret(tmp_path) == text


def test_a_secret_that_is_being_written_is_waited_for(tmp_path):
    text = read_secret(tmp_path / "other")
    descriptor = os.open(tmp_path / SECRET, os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(descriptor, text[:20])
    threading.Timer(0.3, lambda: os.write(descriptor, text[20:])).start()
    assert read_secret(tmp_path) == text
    os.close(descriptor)


# ------------------------------------------------------------------------------------------ address


def test_the_store_listens_on_the_named_address_alone():
    store = rendezvous._serve("127.0.0.2", 0)
    assert ("127.0.0.2", store.port) in listening(os.getpid())
    assert not [
        address
        for address, port in listening(os.getpid())
        if port == store.port and address != "127.0.0.2"
    ]


def test_a_name_that_others_resolve_otherwise_listens_everywhere_and_says_so(monkeypatch):
    real = socket.getaddrinfo

    def resolve(host: str, *arguments: Any, **options: Any) -> Any:
        return real(
            {"node0": "127.0.1.1", "public": "203.0.113.7"}.get(host, host), *arguments, **options
        )

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name, word in (("node0", "node0 is 127.0.1.1"), ("public", "no address of this node")):
        said: list[str] = []
        with pytest.raises(Exception, match=r"node0|public"):  # torch's client resolves by itself
            rendezvous._serve(name, 0, timedelta(seconds=1), said.append)
        assert word in said[0]
