"""A run that is done is exported and pushed to the hub, once: the real client and a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.hub import TOKEN, Hub, hub_server
from tests.ranks import ROOT

pytestmark = pytest.mark.runs


def packhorse(hub: Hub, *arguments: str, token: str = TOKEN) -> tuple[int, str]:
    environ = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "packhorse", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_a_run_is_pushed_when_it_is_done_and_an_export_when_asked(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train = (
        *("train", "recipes/debug.yaml", "--nproc=1", "run.push_to_hub=me/run", "train.steps=2"),
        *("eval.generate=null", "eval.every_steps=null", f"run.dir={run_dir}"),
        f"data.cache={tmp_path / 'cache'}",
    )
    with hub_server() as hub:
        code, said = packhorse(hub, *train, token="hf_wrongToken")
        assert code == 2, said
        assert "me/run: the hub cannot be used" in said, "before anything is trained"
        assert not list(run_dir.glob("checkpoints/step-*"))

        code, said = packhorse(hub, *train)
        assert code == 0, said
        repo = hub.repos["me/run"]
        assert repo["private"] is True
        assert hub.commits == ["The model of step 2 of run"]
        for name, content in repo["files"].items():
            (tmp_path / "copy").mkdir(exist_ok=True)
            (tmp_path / "copy" / name).write_bytes(content)
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")

        code, again = packhorse(hub, *train)
        assert code == 0, again
        assert len(hub.commits) == 1, "it was pushed before"

        out = tmp_path / "out"
        code, exported = packhorse(hub, "export", str(run_dir), f"--out={out}", "--push=me/other")
        assert code == 0, exported
        assert hub.repos["me/other"]["files"].keys() == repo["files"].keys()
        assert f"\n{hub.url}/me/other/commit/" in exported

        hub.add("me/theirs", {"model.safetensors": b"theirs"})
        none = tmp_path / "none"
        code, refused = packhorse(hub, "export", str(run_dir), f"--out={none}", "--push=me/theirs")
        assert code == 2, refused
        assert "files that packhorse did not push: model.safetensors" in refused
        assert not none.exists()
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in text for text in texts)
    assert TOKEN not in said + again + exported + refused
