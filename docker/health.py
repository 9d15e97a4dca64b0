"""Check that packhorse runs in this container, and that none of its processes is stopped or dead.

A HEALTHCHECK must be cheap: this reads /proc, and imports nothing that takes time. Whether the run
makes progress is watched by every rank from inside: a hang ends the run with exit code 1
(guard.hang_timeout_s).
"""

import sys
from pathlib import Path

_STATES = {"T": "stopped", "t": "stopped", "Z": "dead", "X": "dead"}


def processes(proc: Path) -> dict[int, str]:
    """Return the state of each process of packhorse, launcher and workers, by its id."""
    found = {}
    for folder in proc.glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            command = (folder / "cmdline").read_bytes().split(b"\0")
            parent = (folder.parent / stat.rpartition(")")[2].split()[1] / "cmdline").read_bytes()
        except OSError:  # it has ended since the folder was listed
            continue
        state = stat.rpartition(")")[2].split()[0]
        # a dead process has no command line: it is ours if its parent is
        if _is_ours(command) or (state in "ZX" and _is_ours(parent.split(b"\0"))):
            found[int(folder.name)] = state
    return found


def _is_ours(command: list[bytes]) -> bool:
    # launcher: python /opt/venv/bin/packhorse ...; worker: python .../packhorse/__main__.py ...
    own = (b"/packhorse", b"/packhorse/__main__.py")
    return any(word == b"packhorse" or word.endswith(own) for word in command[1:3])


def main() -> int:
    states = processes(Path("/proc"))
    bad = [
        f"process {pid} is {_STATES[state]}"
        for pid, state in sorted(states.items())
        if state in _STATES
    ]
    print(
        "; ".join(bad) or (f"{len(states)} processes run" if states else "no packhorse runs here")
    )
    return 1 if bad or not states else 0


if __name__ == "__main__":
    sys.exit(main())
