"""The image's files, as far as no build is needed; tests/cluster/test_container.py builds it."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.ranks import ROOT


def check(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "docker/check.py", *words]
    where = os.environ | {"PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True, check=False)


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_bases_are_pinned_by_digest() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    stages = re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE)
    for argument in {base.strip("${}") for base in bases} - set(stages):
        assert re.search(rf"^ARG {argument}=\S+@sha256:[0-9a-f]{{64}}$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("argument", "given", "flavour", "code", "said"),
    [
        ("FLASH_ATTN", "none", "cuda", 0, ""),
        ("FLASH_ATTN", "4", "cuda", 0, ""),
        ("FLASH_ATTN", "4", "cpu", 2, "needs FLAVOUR=cuda"),
        ("FLASH_ATTN", "https://a.org/a.whl", "cuda", 2, "put #sha256=HASH"),
        (
            *("FLASH_ATTN", "https://a.org/a.whl#sha256=00", "cuda", 0),
            "pip download --no-deps -d /wheels https://a.org/a.whl#sha256=00",
        ),
        ("FLASH_ATTN", "https://a.org/a.whl#sha256=00", "cpu", 2, "needs FLAVOUR=cuda"),
        ("FLASH_ATTN", "source", "cuda", 0, "requirements/flash-attn-source.txt"),
        ("HYBRID", "none", "cuda", 0, ""),
        ("HYBRID", "none", "cpu", 0, ""),
        ("HYBRID", "source", "cuda", 0, "requirements/hybrid-source.txt"),
        ("HYBRID", "source", "cpu", 2, "source with FLAVOUR=cuda"),
    ],
)
def test_kernels_are_taken_by_their_hash_and_for_cuda(
    tmp_path, argument, given, flavour, code, said
):
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    folder = {"FLASH_ATTN": "/wheels", "HYBRID": "/hybrid"}[argument]
    step = text.split(f"RUN mkdir {folder} ")[1].split("\n\n")[0]
    (tmp_path / "pip").write_text('#!/bin/sh\necho "pip $*"')
    (tmp_path / "pip").chmod(0o755)
    environ = {"FLAVOUR": flavour, argument: given, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", f"true {step}"], env=environ, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout if said else not done.stdout
    assert ("--require-hashes" in done.stdout) == (given == "source" and code == 0)


LISTS = sorted((ROOT / "docker" / "requirements").glob("*.txt"))


def pins(text: str, python: str) -> dict[str, str]:
    """Return the versions by name that a list of `name==version; marker` has for a Python."""
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    found = [Requirement(line) for line in re.findall(r"^[\w.-]+==[^\\\n]*", text, re.MULTILINE)]
    held = [one for one in found if one.marker is None or one.marker.evaluate(where)]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in held}


def needed_by(requirement: Requirement) -> set[str]:
    """Return the names of what an installed package and those below it require, and its own."""
    found, left = set(), [requirement]
    while left:
        one = left.pop()
        found.add(canonicalize_name(one.name))
        try:
            below = [Requirement(line) for line in requires(one.name) or ()]
        except PackageNotFoundError:  # as those of the GPU
            continue
        extras = one.extras or {""}
        left += [
            part
            for part in below
            if canonicalize_name(part.name) not in found
            and (not part.marker or any(part.marker.evaluate({"extra": each}) for each in extras))
        ]
    return found


def test_the_hashed_lists_agree_with_the_constraints_and_the_package():
    """`make lock` writes them anew."""
    text = "".join(path.read_text(encoding="utf-8") for path in LISTS)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for python in ("3.10", "3.11", "3.12"):
        assert pins(text, python).items() <= pins(constraints, python).items()
    for block in re.findall(r"^\w.*\n(?: .*\n)*", text, re.MULTILINE):
        assert re.search(r"^    --hash=sha256:[0-9a-f]{64}( |$)", block, re.MULTILINE), block
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    chosen = [project["dependencies"], *(extras[name] for name in ("math", "gpu", "qlora"))]
    wanted = [
        Requirement(line)
        for lines in [*chosen, extras["flash-attn"], extras["hybrid"]]
        for line in lines
    ]
    here = pins(text, f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert set().union(*map(needed_by, wanted)) <= here.keys()


def test_the_bill_of_materials_lists_what_is_installed():
    bills = [
        json.loads(subprocess.check_output([sys.executable, ROOT / "docker" / "sbom.py"]))
        for _ in range(2)
    ]
    assert bills[0] == bills[1]
    listed = {part["name"]: part for part in bills[0]["components"]}
    for name in ("torch", "deepspeed", "pyyaml"):
        assert listed[name]["version"] == version(name)
        assert listed[name]["purl"] == f"pkg:pypi/{name}@{version(name)}".replace("+", "%2B")
    assert listed["deepspeed"]["licenses"]


def test_the_check_claims_no_kernel_that_does_not_load(tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    installed = tmp_path / "flash_attn-2.8.3.dist-info" / "METADATA"
    installed.parent.mkdir()
    installed.write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    broken = check(PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert broken.returncode == 1
    assert "flash-attn is installed, but does not load (undefined symbol)" in broken.stderr


def test_the_check_misses_what_the_machine_lacks(tmp_path):
    bare = check("--gpus", "99", PATH="", HOME="/nowhere")
    assert bare.returncode == 1
    for missing in (
        "99 GPUs are required",
        "cpu_adam is not compiled, and there is no compiler",
        "/nowhere cannot be",
    ):
        assert missing in bare.stderr
