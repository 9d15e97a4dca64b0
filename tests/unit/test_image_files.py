"""The image's files, as far as no build is needed; tests/cluster/test_container.py builds it."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_the_check_claims_no_kernel_that_does_not_load(tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
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
