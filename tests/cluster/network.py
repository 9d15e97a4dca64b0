"""Make network namespaces as stand-ins for hosts, linked by a bridge. Needs root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping

# A process in a network space, with a name, processes and mounts of its own, all of which end with
# it: as on a host.
OWN = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def link(bridge: str, spaces: Mapping[str, str]) -> None:
    """Make a bridge and, on it, network namespaces with addresses, as 10.79.0.10/24."""
    ip("link", "add", bridge, "type", "bridge")
    ip("link", "set", bridge, "up")
    for space, address in spaces.items():
        ip("netns", "add", space)
        ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", space, "master", bridge, "up")
        ip("-n", space, "addr", "add", address, "dev", "eth0")
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", space, "link", "set", "eth0", "up")


def unlink(bridge: str, spaces: Iterable[str]) -> None:
    """Remove them if they exist."""
    both = [(kind, space) for space in spaces for kind in ("link", "netns")]
    for kind, name in [*both, ("link", bridge)]:
        subprocess.run(["ip", kind, "del", name], check=False, capture_output=True)


def enter(space: str) -> list[str]:
    """Return the beginning of a command that runs in that network namespace."""
    return ["nsenter", f"--net=/run/netns/{space}", *OWN]


def inside(process: subprocess.Popen) -> list[str]:
    """Return the id of the first process inside, once it exists.

    Signals go to it directly, because the processes around it do not pass them on.
    """
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return file.read().split()
