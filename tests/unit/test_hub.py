"""Exports that are pushed to the hub: the real client, and a stand-in for the server."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from packhorse.trainer.checkpoint.hub import PUSHED, check_push, push, push_run
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils import own_output
from packhorse.trainer.utils.own_output import MARKER
from tests.hub import TOKEN, Hub, hub_server
from tests.ranks import ROOT


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as opened:
        # as $HF_ENDPOINT sets them, before huggingface_hub is imported
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, opened.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", opened.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield opened


def an_export(out: Path, *names: str, step: int = 3) -> Path:
    folder = own_output.stage(out)
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f"{name} of step {step}")
    own_output.publish(out, {"kind": "model", "step": step, "run": "one"}, overwrite=True)
    return out


def test_a_new_repository_is_private_and_a_later_push_replaces_its_own_files(hub, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        push(an_export(tmp_path / "out", "config.json", "part-1", "part-2"), "me/model")
        repo = hub.repos["me/model"]
        assert repo["private"] is True
        assert repo["files"].keys() == {
            *(".gitattributes", "config.json", "part-1", "part-2", MARKER)
        }
        push(an_export(tmp_path / "out", "config.json", "part-1", step=6), "me/model")
    assert repo["files"].keys() == {".gitattributes", "config.json", "part-1", MARKER}
    assert repo["files"]["part-1"] == b"part-1 of step 6"
    assert hub.commits == ["The model of step 3 of one", "The model of step 6 of one"]
    assert TOKEN not in caplog.text


def test_what_others_put_there_is_never_replaced(hub, tmp_path):
    out = an_export(tmp_path / "out", "config.json")
    hub.add("me/theirs", {"config.json": b"theirs"})
    with pytest.raises(BadInput, match=r"files that packhorse did not push: config\.json"):
        push(out, "me/theirs")
    assert hub.repos["me/theirs"]["files"] == {"config.json": b"theirs"}
    push(out, "me/ours")
    hub.repos["me/ours"]["files"]["notes.md"] = b"mine"
    with pytest.raises(BadInput, match=r"did not push: notes\.md"):
        push(out, "me/ours")
    hub.add("me/empty", {".gitattributes": b""})
    push(out, "me/empty")


def test_a_hub_that_does_not_let_us_in_says_so_without_the_token(hub, tmp_path, monkeypatch):
    out = an_export(tmp_path / "out", "config.json")
    hub.may_write = False
    with pytest.raises(BadInput, match=r"the hub cannot be used.*may not write here") as refused:
        push(out, "me/new")
    monkeypatch.setenv("HF_TOKEN", "hf_wrongToken")
    with pytest.raises(BadInput, match=r"the hub cannot be used.*HF_TOKEN") as wrong:
        check_push("me/new")
    with pytest.raises(BadInput, match="the hub cannot be used"):
        check_push("a/b/c")
    for error in (refused, wrong):
        assert TOKEN not in str(error.value)
        assert "hf_wrongToken" not in str(error.value)


def test_a_damaged_note_of_what_was_pushed_is_said(tmp_path):
    (tmp_path / PUSHED).write_text('{"repo": ')
    with pytest.raises(BadInput, match=r"pushed\.json: damaged"):
        push_run(tmp_path, "me/it", 3)


def test_a_run_folder_that_begins_with_a_dash_is_a_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("-x").mkdir()
    with pytest.raises(BadInput, match="was not pushed"):
        push_run(Path("-x"), "me/it", 3)
    assert "-x: not a run folder" in capfd.readouterr().err


def test_a_name_that_is_no_repository_is_refused():
    with pytest.raises(BadInput, match="`push_to_hub` is the name of a repository, as org/name"):
        load_recipe(ROOT / "recipes" / "debug.yaml", ["run.push_to_hub=https://x/y"])
