"""List the TCP sockets on which a process and its children listen, from /proc."""

from __future__ import annotations

import ipaddress
import os
import struct
from pathlib import Path


def listening(pid: int) -> set[tuple[str, int]]:
    """Return address and port of each listening socket of the process and all that it started."""
    own = {inode for process in _family(pid) for inode in _inodes(process)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:  # LISTEN
                address, port = fields[1].split(":")
                words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
                raw = struct.pack(f"={len(words)}I", *words)
                found.add((str(ipaddress.ip_address(raw)), int(port, 16)))
    return found


def _family(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid, *(found for child in children for found in _family(child))]


def _inodes(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found
