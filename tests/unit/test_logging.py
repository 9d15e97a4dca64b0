"""What rank 0 logs goes to stderr with the time of day, and into a file of the run folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from packhorse.trainer import dist

TIME = r"\d\d:\d\d:\d\d"


@pytest.fixture
def _logging() -> Iterator[None]:
    before = dist.log.handlers[:], dist.log.level, dist.log.propagate
    dist.start_logging()
    yield
    dist.log.handlers[:], dist.log.level, dist.log.propagate = before


@pytest.mark.usefixtures("_logging")
def test_the_file_grows_over_starts_and_ends_with_what_ended_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "logs" / "rank00000.log"
    with dist.saved_log(path):
        dist.log.info("first")
    with pytest.raises(ValueError, match="no such row"), dist.saved_log(path):
        raise ValueError("no such row")
    dist.log.info("later")
    saved = path.read_text()
    day = rf"20\d\d-\d\d-\d\d {TIME}"
    assert re.match(rf"{day} first\n{day} the run has failed\nTraceback", saved)
    assert saved.endswith("ValueError: no such row\n")
    assert re.fullmatch(rf"{TIME} first\n{TIME} later\n", capsys.readouterr().err)


@pytest.mark.usefixtures("_logging")
def test_other_ranks_warn_and_write_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    dist.start_logging()
    with dist.saved_log(tmp_path / "log"):
        dist.log.info("quiet")
        dist.log.warning("heard")
    assert not (tmp_path / "log").exists()
    assert re.fullmatch(rf"{TIME} \[rank 1\] heard\n", capsys.readouterr().err)


@pytest.mark.usefixtures("_logging")
def test_a_full_disk_under_the_log_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with dist.saved_log(Path("/dev/full")):
        dist.log.info("first")
        dist.log.info("second")
    err = capsys.readouterr().err
    assert err.count("/dev/full is not written any more: [Errno 28]") == 1
    assert "second" in err
