"""A batch script for Slurm: `slurm.sh` beside this file, with its settings filled in.

`slurm.sh` is a script that runs as it is; slurm/sft_8b.sh and slurm/sft_70b.sh are the same with
other settings.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.datatypes import BadInput

TEMPLATE = Path(__file__).with_name("slurm.sh")


def render(
    *,
    options: Mapping[str, str],
    recipe: str,
    overrides: Sequence[str] = (),
    packhorse: str | None = None,
    container: str | None = None,
    mounts: Sequence[str] = (),
) -> str:
    """The script's text. None: as the template has it, which lets the environment say.

    Args:
        options: of sbatch, without their dashes, as `{"nodes": "4-8"}`; the template has a line for
            each.
        recipe: a shell word, already quoted where it needs to be.
        packhorse: the command on all nodes.
        container: an image.
        mounts: folders that the container sees.

    Raises:
        BadInput: a line of #SBATCH cannot hold a value.
    """
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in options.items():
        if not value.isprintable():
            raise BadInput(
                f"--{name} {value!r}: a line of #SBATCH cannot hold it; take a name without such "
                f"characters"
            )
        text = _set(text, rf"#+SBATCH --{name}=", f"#SBATCH --{name}={shlex.quote(value)}")
    text = _set(text, "recipe=", f"recipe={recipe}")
    if overrides:
        text = _set(text, "overrides=", f"overrides=({shlex.join(overrides)})")
    for name, value in (
        ("packhorse", packhorse),
        ("container", container),
        ("mounts", ",".join(mounts) or None),
    ):
        if value is not None:
            text = _set(text, f"{name}=", f"{name}={shlex.quote(value)}")
    return text


def write(run_dir: Path, text: str) -> Path:
    """The script in the run folder.

    Raises:
        BadInput: it cannot be written.
    """
    script = run_dir / "slurm.sh"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        script.write_text(text, encoding="utf-8")
        script.chmod(0o755)
    except OSError as error:
        raise BadInput(f"run.dir: {run_dir} cannot be written ({error})") from None
    return script


def submit(script: Path) -> str:
    """sbatch's answer, as `Submitted batch job 7`.

    Raises:
        BadInput: there is no sbatch here, or it refuses the script.
    """
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise BadInput(
            "--submit: there is no sbatch on this machine; submit from a login node of the cluster"
        ) from None
    if done.returncode:
        raise BadInput(f"--submit: sbatch refuses {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def _set(text: str, start: str, line: str) -> str:
    """`text` with the one line that starts so replaced."""
    text, found = re.subn(rf"^{start}.*$", lambda _: line, text, flags=re.MULTILINE)
    assert found == 1, start
    return text
