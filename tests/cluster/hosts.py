"""Make stand-ins for hosts on this machine, each with its own network and name. Needs root.

A bridge links them. A link can be cut, which resets no connection: to the others it is as if the
host had died.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import network
from tests.ranks import ROOT


class Hosts:
    """Hosts by name, and their links. The host `a.b` calls itself `a`; others know both."""

    def __init__(self, folder: Path, names: Sequence[str], tag: str, net: str) -> None:
        self._table, self._sources = folder / "hosts", folder / "nsswitch.conf"
        self._bridge, self._net = f"{tag}bridge", net
        self._spaces = {name: f"{tag}-{i}" for i, name in enumerate(names)}
        self._started: list[subprocess.Popen] = []

    def up(self) -> None:
        addresses = {name: f"{self._net}.{10 + i}" for i, name in enumerate(self._spaces)}
        lines = [
            f"{address} {name} {name.partition('.')[0]}" for name, address in addresses.items()
        ]
        self._table.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self._sources.write_text(
            "hosts: files\n"
        )  # no name server answers there, and each question takes 20 s
        network.link(
            self._bridge, {space: f"{addresses[name]}/24" for name, space in self._spaces.items()}
        )

    def down(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        network.unlink(self._bridge, self._spaces.values())

    def cut(self, name: str) -> None:
        network.ip("link", "set", self._spaces[name], "down")

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] = os.environ,
        cwd: Path = ROOT,
    ) -> subprocess.Popen:
        """Start a process on a host. When it ends, everything that it started there ends."""
        mounts = 'mount --bind "$2" /etc/hosts; mount --bind "$3" /etc/nsswitch.conf'
        inside = f'hostname "$1"; {mounts}; shift 3; exec "$@"'
        where = network.enter(self._spaces[name])
        process = subprocess.Popen(
            [
                *where,
                "bash",
                "-c",
                inside,
                "_",
                name.partition(".")[0],
                str(self._table),
                str(self._sources),
                *command,
            ],
            cwd=cwd,
            env={**env, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def signal(self, process: subprocess.Popen, number: int) -> None:
        """Send a signal to the command that was started."""
        (child,) = network.inside(process)
        os.kill(int(child), number)


@contextmanager
def hosts(
    folder: Path, names: Sequence[str], tag: str = "ph", net: str = "10.79.0"
) -> Iterator[Hosts]:
    """Make the hosts and remove them at the end.

    Args:
        tag: prefix of the names on this machine, at most nine letters.
        net: the first three numbers of the hosts' addresses.
    """
    made = Hosts(folder, names, tag, net)
    made.down()  # what a killed test left
    made.up()
    try:
        yield made
    finally:
        made.down()
