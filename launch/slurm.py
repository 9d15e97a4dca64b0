"""Write a batch script for Slurm: `slurm.sh` beside this file, with its settings filled in.

`slurm.sh` also runs as it is; slurm/sft_8b.sh and slurm/sft_70b.sh are copies with other settings.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from packhorse.trainer.datatypes import BadInput

TEMPLATE = Path(__file__).with_name("slurm.sh")
# The script starts one launcher a node, and an array would train in one run folder several times.
_NEVER = {"array", "ntasks", "ntasks-per-node", "wrap"}


def render(
    *,
    options: Mapping[str, str],
    further: Sequence[str] = (),
    recipe: str,
    is_copy: bool = False,
    overrides: Sequence[str] = (),
    packhorse: str | None = None,
    container: str | None = None,
    mounts: Sequence[str] = (),
) -> str:
    """Return the text of the script. What is not given stays as in the template.

    Args:
        options: of sbatch, without their dashes, as `{"nodes": "4-8"}`. The template has a line for
            each.
        further: lines of #SBATCH, as `--reservation=x`. Each replaces the template's line of that
            option, or is added.
        recipe: a shell word, already quoted if necessary.
        is_copy: nobody edits the recipe, so that the job makes no copy of it.
        packhorse: path of the command, the same on all nodes.
        mounts: folders to mount in the container.

    Raises:
        BadInput: a line of #SBATCH cannot hold a value, or a further line would undo another.
    """
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in options.items():
        text = _set_option(text, name, value)
    for line in further:
        name, value = _parse_option(line)
        if name in options:
            raise BadInput(f"--sbatch {line}: launch slurm sets --{name} itself; change it there")
        text = _set_option(text, name, value)
    text = _set_line(text, "recipe=", f"recipe={recipe}")
    if is_copy:
        text = _set_line(text, "keep=", "keep=")
    if overrides:
        text = _set_line(text, "overrides=", f"overrides=({shlex.join(overrides)})")
    settings = {"packhorse": packhorse, "container": container, "mounts": ",".join(mounts) or None}
    for name, value in settings.items():
        if value is not None:
            if not value.isprintable():
                raise BadInput(
                    f"--{name} {value!r}: a line of the script holds printable text only"
                )
            text = _set_line(text, f"{name}=", f"{name}={shlex.quote(value)}")
    return text


def submit(script: Path) -> str:
    """Submit the script and return sbatch's answer, as `Submitted batch job 7`.

    Raises:
        BadInput: there is no sbatch on this machine, or it refuses the script.
    """
    try:
        done = subprocess.run(["sbatch", str(script.absolute())], capture_output=True, text=True)
    except FileNotFoundError:
        raise BadInput(
            "--submit: there is no sbatch on this machine; submit from a login node of the cluster"
        ) from None
    if done.returncode:
        raise BadInput(f"--submit: sbatch refuses {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def _parse_option(line: str) -> tuple[str, str | None]:
    """Return the name and the value of `--name=value`; None for an option without a value."""
    found = re.fullmatch(r"--([a-z][a-z-]*[a-z])(?:=(.+))?", line.strip(), re.DOTALL)
    if not found:
        raise BadInput(
            f"--sbatch {line!r}: give one long option of sbatch, as --sbatch --reservation=night"
        )
    name, value = found[1], found[2]
    if name in _NEVER:
        raise BadInput(
            f"--sbatch {line}: the script starts one launcher on each node, and a job is one run; "
            "leave it out"
        )
    return name, value


def _set_option(text: str, name: str, value: str | None) -> str:
    """Set the template's line of this option, which may be a comment, or add one to the others."""
    if value is not None and not value.isprintable():
        raise BadInput(f"--{name} {value!r}: a line of #SBATCH holds printable text only")
    line = f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(value)}")
    start = rf"#+SBATCH --{name}(?==|$)"
    if re.search(rf"^{start}", text, re.MULTILINE):
        return _set_line(text, start, line)
    return text.replace("#SBATCH --output=", f"{line}\n#SBATCH --output=", 1)


def _set_line(text: str, start: str, line: str) -> str:
    """Replace the only line of `text` that begins with the pattern `start`."""
    text, found = re.subn(rf"^{start}.*$", lambda _: line, text, flags=re.MULTILINE)
    assert found == 1, start
    return text
