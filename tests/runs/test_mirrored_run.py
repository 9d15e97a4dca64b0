"""A run whose machine is lost while it copies a checkpoint goes on elsewhere, from the mirror."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.killed import KILLED, ForkServer, Run, assert_same
from tests.s3 import SECRET, s3, s3_server

pytestmark = pytest.mark.runs


class Slow:
    """Holds up the upload of one checkpoint's weights, and tells by a file that it has begun."""

    def __init__(self, begun: Path) -> None:
        self.begun, self.released = begun, threading.Event()

    def __call__(self, method: str, path: str) -> None:
        if method == "PUT" and "/step-000004/rank" in path and not self.released.is_set():
            self.begun.touch()
            self.released.wait(300)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Slow:
    return Slow(tmp_path_factory.mktemp("slow") / "begun")


@pytest.fixture(scope="module")
def mirror(slow: Slow) -> Iterator[str]:
    with s3_server("mirror", slow) as bucket:
        yield f"{bucket}/runs/one"


def test_killed_in_an_upload_and_resumed_on_a_fresh_machine(
    slow: Slow, mirror: str, whole: dict[int, Path], cache: Path, tmp_path: Path
) -> None:
    with ForkServer() as server:  # of its own: it has the S3 server in its environment
        lost, fresh, third = (Run(server, tmp_path / name, cache) for name in ("a", "b", "c"))
        for run in (lost, fresh, third):
            run.folder.parent.mkdir()
            run.overrides += (f"checkpoint.mirror={mirror}",)
        codes = lost.start(1, victims=[0], after_file=str(slow.begun))
        assert codes == [KILLED], lost.log_tail
        slow.released.set()
        assert s3().exists(f"{mirror}/step-000002/manifest.json")
        assert not s3().exists(f"{mirror}/step-000004/manifest.json")

        fresh.finish(1)
        said = fresh.log_tail
        assert f"mirror: step 2 comes from {mirror}, every byte checked" in said
        assert "resuming from" in said
        assert_same(fresh.folder, whole[1])  # as if never stopped

        third.finish(1)  # a run that is done comes whole, and there is nothing left to do
        assert "all 6 steps are done" in third.log_tail
        assert_same(third.folder, fresh.folder)
        for name in ("summary.json", "evaluations.jsonl"):
            assert (third.folder / name).read_bytes() == (fresh.folder / name).read_bytes()
        evaluations = [(run / "evaluations.jsonl").read_bytes() for run in (fresh.folder, whole[1])]
        assert evaluations[0] == evaluations[1]
        assert not any(SECRET in run.log_tail for run in (lost, fresh, third))
        names = sorted(name.rsplit("/", 1)[-1] for name in s3().ls(mirror))
        assert names == ["best", "recipe.yaml", "step-000006"]
