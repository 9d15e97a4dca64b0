"""The image's files, as far as no build is needed; tests/cluster/test_container.py builds it."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("flavour", "wheel", "code", "fetched"),
    [
        ("cuda", "none", 0, False),
        ("cuda", "4", 0, False),
        ("cpu", "4", 2, False),
        ("cuda", "https://example.org/a.whl", 2, False),
        ("cuda", "https://example.org/a.whl#sha256=00", 0, True),
        ("cpu", "https://example.org/a.whl#sha256=00", 2, False),
    ],
)
def test_a_wheel_of_flash_attn_needs_its_hash(tmp_path, flavour, wheel, code, fetched):
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    step = text.split("RUN mkdir /wheels ")[1].split("\n\n")[0]
    (tmp_path / "pip").write_text('#!/bin/sh\necho "pip $*"')
    (tmp_path / "pip").chmod(0o755)
    environ = {"FLAVOUR": flavour, "FLASH_ATTN": wheel, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", f"true {step}"], env=environ, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert (f"pip download --no-deps -d /wheels {wheel}" in done.stdout) == fetched
    assert ("put #sha256=HASH" in done.stdout) == (code == 2 and flavour == "cuda")


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
