"""Stand-ins for hosts on this machine: each has its own network and name, linked by a bridge. Needs root.

A link can be cut, which resets no connection: to the others it is as if the host had died.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.ranks import ROOT

BRIDGE, NET = "phbridge", "10.79.0"


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


class Hosts:
    """Hosts `host0` to `hostN`, and their links."""

    def __init__(self, folder: Path, count: int) -> None:
        self._table = folder / "hosts"
        self._names = [f"host{i}" for i in range(count)]
        self._started: list[subprocess.Popen] = []

    def up(self) -> None:
        lines = [f"{NET}.{10 + i} {name}" for i, name in enumerate(self._names)]
        self._table.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "link", "set", BRIDGE, "up")
        for line in lines:
            address, name = line.split()
            _run("ip", "netns", "add", f"ph-{name}")
            _run("ip", "link", "add", f"ph-{name}", "type", "veth", "peer", "name", "eth0", "netns", f"ph-{name}")
            _run("ip", "link", "set", f"ph-{name}", "master", BRIDGE, "up")
            _run("ip", "-n", f"ph-{name}", "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", f"ph-{name}", "link", "set", "lo", "up")
            _run("ip", "-n", f"ph-{name}", "link", "set", "eth0", "up")

    def down(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        things = [("link", BRIDGE), *((kind, f"ph-{name}") for name in self._names for kind in ("link", "netns"))]
        for kind, name in things:
            subprocess.run(["ip", kind, "del", name], check=False, capture_output=True)

    def cut(self, name: str) -> None:
        _run("ip", "link", "set", f"ph-{name}", "down")

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen:
        """A process on a host; its end ends all that it started there."""
        inside = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        where = ["nsenter", f"--net=/run/netns/ph-{name}", *own]
        process = subprocess.Popen(
            [*where, "bash", "-c", inside, "_", name, str(self._table), *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def signal(self, process: subprocess.Popen, number: int) -> None:
        """To the command that was started; what is around it would not pass it on."""
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), number)


@contextmanager
def hosts(folder: Path, count: int) -> Iterator[Hosts]:
    made = Hosts(folder, count)
    made.down()  # what a killed test left
    made.up()
    try:
        yield made
    finally:
        made.down()
