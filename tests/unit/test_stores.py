"""gs://, az:// and hf:// by their own clients: Google's emulator, and stand-ins for Azure and hub.

tests/unit/test_download.py tries on S3 what is the same for all; test_mirror.py writes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest
from huggingface_hub import constants

from packhorse.trainer.config.data import Source
from packhorse.trainer.data.source import read_rows
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.download import download
from tests.azure import azure_server
from tests.gcs import gcs_server
from tests.hub import TOKEN, hub_server


class Store(NamedTuple):
    url: str  # of a folder
    put: Callable[[str, bytes], None]  # a file by its URL


def _write(url: str, content: bytes) -> None:
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    fs.pipe_file(path, content)


@pytest.fixture(params=["gs", "az", "hf"])
def store(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("PACKHORSE_CACHE", str(tmp_path / "cache"))
    download.cache_clear()
    if request.param != "hf":
        with {"gs": gcs_server, "az": azure_server}[request.param]("box") as url:
            yield Store(f"{url}/data", _write)
        return
    with hub_server() as hub:
        hub.add("me/rows", {})
        # as $HF_ENDPOINT sets them, before huggingface_hub is imported
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        base, files = "hf://datasets/me/rows", hub.repos["me/rows"]["files"]
        yield Store(base, lambda url, data: files.update({url.removeprefix(f"{base}/"): data}))


def test_rows_come_from_the_store_once_and_again_when_they_change(store: Store) -> None:
    url = f"{store.url}/train.jsonl"
    store.put(url, b'{"text": "one"}\n')
    store.put(f"{store.url}/more/b.bin", bytes(range(256)) * 4096)
    (row,) = read_rows(Source(path=url))
    assert row.fields == {"text": "one"}
    first, folder = download(url), download(store.url)
    assert (folder / "train.jsonl").read_bytes() == first.read_bytes()
    assert (folder / "more" / "b.bin").read_bytes() == bytes(range(256)) * 4096
    download.cache_clear()
    assert download(url) == first
    store.put(url, b'{"text": "two"}\n')
    download.cache_clear()
    assert download(url).read_bytes() == b'{"text": "two"}\n'
    assert first.read_bytes() == b'{"text": "one"}\n', "a run that reads it is not disturbed"


def test_what_is_not_there_is_said(store: Store) -> None:
    store.put(f"{store.url}/x", b"x")
    with pytest.raises(BadInput, match=r"there is no such file|cannot be read \(.*NotFound"):
        download(f"{store.url}/none.jsonl")
