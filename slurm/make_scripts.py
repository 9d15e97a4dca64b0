"""Write slurm/sft_8b.sh and slurm/sft_70b.sh from launch/slurm.sh.

usage: python slurm/make_scripts.py
"""

from __future__ import annotations

from pathlib import Path

from packhorse.launch.slurm import render

NODES = {"sft_8b": "1", "sft_70b": "8"}


def scripts() -> dict[Path, str]:
    """Return the scripts' texts. RECIPE in the environment replaces a script's own recipe."""
    return {
        Path(__file__).with_name(f"{name}.sh"): render(
            options={"job-name": name, "nodes": nodes}, recipe=f"${{RECIPE:-recipes/{name}.yaml}}"
        )
        for name, nodes in NODES.items()
    }


if __name__ == "__main__":
    for path, text in scripts().items():
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
