"""Data, recipes and model folders from an object store: a real S3 server."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from packhorse.trainer.config.recipe import load_recipe, parse_recipe
from packhorse.trainer.data.source import read_rows
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.load import load_config, load_tokenizer
from packhorse.trainer.utils import download as downloads
from packhorse.trainer.utils import lease
from packhorse.trainer.utils.download import download
from tests.ranks import ROOT
from tests.s3 import SECRET, s3, s3_server

DEBUG = ROOT / "recipes" / "debug"


class Asked:
    """The GET requests of the server, and what to do at one of them."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.act: Any = None

    def __call__(self, method: str, path: str) -> None:
        if method == "GET":
            self.paths.append(path)
            if self.act:
                self.act(path)


asked = Asked()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("box", asked) as url:
        yield url


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACKHORSE_CACHE", str(tmp_path / "cache"))
    anew()
    return tmp_path / "cache"


def anew() -> None:
    """Forget what this process has downloaded, as a new start does."""
    download.cache_clear()
    asked.paths.clear()
    asked.act = None


def test_a_file_is_downloaded_once_and_again_when_it_changes(bucket):
    s3().pipe_file(f"{bucket}/rows.jsonl", b'{"text": "one"}\n')
    url = f"{bucket}/rows.jsonl"
    first = download(url)
    assert (first.name, first.read_bytes()) == ("rows.jsonl", b'{"text": "one"}\n')
    anew()
    assert download(url) == first
    assert "/box/rows.jsonl" not in asked.paths, "it was asked for its version only"
    s3().pipe_file(url, b'{"text": "two"}\n')
    anew()
    second = download(url)
    assert second.read_bytes() == b'{"text": "two"}\n'
    assert first.read_bytes() == b'{"text": "one"}\n', "a run that reads it is not disturbed"


def test_a_killed_download_goes_on_where_it_was(bucket, caplog, monkeypatch):
    content = os.urandom(1 << 20)
    s3().pipe_file(f"{bucket}/big/a.bin", content)
    s3().pipe_file(f"{bucket}/big/b.bin", content[::-1])
    program = (
        "from packhorse.trainer.utils import download; download.BLOCK_BYTES = 1 << 16; "
        f"download.download({bucket + '/big'!r})"
    )
    process: Any = None

    def kill(path: str) -> None:
        if asked.paths.count("/box/big/b.bin") == 5:
            process.kill()

    asked.act = kill
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    assert process.wait(120) < 0
    anew()
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    with caplog.at_level(logging.INFO, "packhorse"):
        folder = download(f"{bucket}/big")
    assert (folder / "a.bin").read_bytes() == content
    assert (folder / "b.bin").read_bytes() == content[::-1]
    assert "box/big/b.bin: going on after" in caplog.text
    assert "/box/big/a.bin" not in asked.paths, "it was whole"
    assert not list(folder.parent.glob("*.build-*"))
    assert SECRET not in caplog.text


def test_a_line_that_breaks_is_tried_again_and_then_said(bucket, monkeypatch):
    s3().pipe_file(f"{bucket}/x.jsonl", b"0123456789")
    fs, root = downloads.open_filesystem(f"{bucket}/x.jsonl")
    opened, failures = fs.open, [ConnectionError("cut"), ConnectionError("cut")]

    def fails(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return opened(*arguments, **options)

    monkeypatch.setattr(fs, "open", fails)
    monkeypatch.setattr(downloads, "open_filesystem", lambda url: (fs, root))
    assert download(f"{bucket}/x.jsonl").read_bytes() == b"0123456789"
    s3().pipe_file(f"{bucket}/x.jsonl", b"9876543210")
    anew()
    failures.extend([ConnectionError("cut")] * 3)
    with pytest.raises(BadInput, match=r"x\.jsonl: cannot be read.*ConnectionError: cut.*goes on"):
        download(f"{bucket}/x.jsonl")


@pytest.mark.parametrize("place", ["none.jsonl", "none/"])
def test_what_is_not_there_is_said(bucket, place):
    with pytest.raises(BadInput, match="there is no such file or folder"):
        download(f"{bucket}/{place}")
    with pytest.raises(BadInput, match=r"s3://gone/x: (cannot be read|there is no such)"):
        download("s3://gone/x")


def test_urls_in_a_recipe_hold_no_secret_and_do_not_grow():
    tree = {"model": {"name": "m"}, "run": {"dir": "r"}, "train": {"steps": 1}}

    def data(**source: Any) -> Any:
        return parse_recipe({**tree, "data": {"train": [source]}})

    data(path="s3://box/rows.jsonl")
    with pytest.raises(BadInput, match="may hold no credentials"):
        data(path="s3://id:key@box/rows.jsonl")
    with pytest.raises(BadInput, match="must be on a disk"):
        data(path="s3://box/rows", streaming=True)
    with pytest.raises(BadInput, match=r"`model`: a URL in a recipe may hold no credentials"):
        parse_recipe(
            {**tree, "model": {"name": "az://b/m?sig=x"}, "data": {"train": [{"path": "x"}]}}
        )


def test_recipe_data_and_model_come_from_the_store(bucket, tmp_path):
    fs = s3()
    fs.put(str(DEBUG / "model"), f"{bucket}/model", recursive=True)
    fs.pipe_file(f"{bucket}/model/model.safetensors", b"weights that nobody needs for a tokenizer")
    for name in ("train", "eval"):
        fs.put_file(str(DEBUG / f"{name}.jsonl"), f"{bucket}/data/{name}.jsonl")
    tree = yaml.safe_load((ROOT / "recipes" / "debug.yaml").read_text())
    tree["model"]["name"] = f"{bucket}/model"
    tree["data"] = {
        "train": [{"path": f"{bucket}/data/train.jsonl"}],
        "eval": [{"path": f"{bucket}/data", "split": "test"}],
        "cache": str(tmp_path / "documents"),
    }
    fs.pipe_file(f"{bucket}/debug.yaml", yaml.safe_dump(tree).encode())

    recipe = load_recipe(f"{bucket}/debug.yaml", [f"run.dir={tmp_path / 'run'}"])
    assert recipe.model.name == f"{bucket}/model", "it names the place, not the copy"
    local = load_recipe(ROOT / "recipes" / "debug.yaml")
    assert load_tokenizer(recipe.model).get_vocab() == load_tokenizer(local.model).get_vocab()
    assert load_config(recipe.model).hidden_size == load_config(local.model).hidden_size
    assert "/box/model/model.safetensors" not in asked.paths
    rows = [json.loads(line) for line in (DEBUG / "eval.jsonl").read_text().splitlines()]
    assert [row.fields for row in read_rows(recipe.data.eval[0])] == rows

    command = [sys.executable, "-m", "packhorse", "prepare", f"{bucket}/debug.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
