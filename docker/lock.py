"""Write docker/requirements/: the image's packages with the hashes of their files.

    make lock        # asks the package index, about half a minute

Each package has its version of constraints.txt. pip refuses a file with another hash, and a package
that is not listed (`--require-hashes --no-deps`). tests/unit/test_image_files.py compares the lists
with constraints.txt and pyproject.toml.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docker" / "requirements"
HEADER = "# Made by `make lock`.\n"
# What PyPI's torch, which is the CUDA build, brings besides what its CPU build needs.
CUDA = re.compile(r"torch$|triton$|nvidia-(?!ml-py$)|cuda-")
ELSEWHERE = ("colorama", "httpx2-jsfetch")  # Windows and Emscripten need them


def name_of(block: str) -> str:
    return block.partition("==")[0]


def resolve(*extras: str) -> list[str]:
    """Return the locked packages of packhorse with some extras: each its line and its hashes."""
    options = ["--universal", "--python-version=3.10"]
    options += [f"--no-emit-package={name}" for name in ELSEWHERE]
    options += [f"--extra={extra}" for extra in extras]
    text = compiled(*options, "pyproject.toml")
    return re.findall(r"^\S.*\n(?: .*\n)*", text, re.MULTILINE)


def source(name: str) -> str:
    """Return a package's line with the hash of its source, which is built against this torch."""
    return compiled("--no-deps", f"--no-binary={name}", "--no-build-isolation", "-", given=name)


def compiled(*options: str, given: str | None = None) -> str:
    command = [sys.executable, "-m", "uv", "pip", "compile", "--constraints=constraints.txt"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet", *options]
    return subprocess.check_output(command, cwd=ROOT, text=True, input=given)


def lists() -> dict[str, list[str]]:
    """Return the packages of each file."""
    everywhere = {name_of(block) for block in resolve("math")}
    gpu = {name_of(block) for block in resolve("math", "gpu", "qlora")}
    found: dict[str, list[str]] = {"common": [], "cuda": [], "deepspeed": [], "flash-attn": []}
    found["flash-attn-source"] = [source("flash-attn")]
    found["hybrid-source"] = [source("causal-conv1d")]
    found["hybrid"] = [b for b in resolve("gpu", "hybrid") if name_of(b) not in gpu]
    for block in resolve("math", "gpu", "qlora", "flash-attn"):
        name = name_of(block)
        if name == "deepspeed":  # compiled against torch, so after it
            found[name].append(block)
        elif name in everywhere and not CUDA.match(name):
            found["common"].append(block)
        elif name in gpu:
            found["cuda"].append(block)
        else:
            found["flash-attn"].append(block)
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, blocks in lists().items():
        (FOLDER / f"{file}.txt").write_text(HEADER + "".join(blocks), encoding="utf-8")
