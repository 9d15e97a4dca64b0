"""Push an export to the Hugging Face hub, as `export --push ORG/NAME` and run.push_to_hub do.

A folder that `packhorse export` wrote enters; a commit on the hub leaves. A repository that does
not exist is made, private. What is there already is only added to if packhorse pushed it. The token
is the one that huggingface_hub finds: $HF_TOKEN, or the one that `hf auth login` saved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packhorse.trainer.checkpoint.manifest import read_best
from packhorse.trainer.config.packaged import MAIN
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import log
from packhorse.trainer.utils.files import read_json_file, write_json
from packhorse.trainer.utils.own_output import MARKER
from packhorse.trainer.utils.text import error_line

PUSHED = "pushed.json"  # in a run folder: what run.push_to_hub has pushed, and where


def check_push(repo: str) -> set[str]:
    """Check that an export may be pushed to a repository, before it is made.

    Returns:
        The files there that an earlier push wrote.

    Raises:
        BadInput: the hub cannot be reached, the token does not let us in, or the repository holds
            files that packhorse did not write.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    ours: set[str] = set()
    with _hub_errors_explained(repo):
        api = HfApi()
        api.whoami()
        try:
            there = set(api.list_repo_files(repo)) - {".gitattributes"}
        except RepositoryNotFoundError:
            return set()
        if MARKER in there:
            with tempfile.TemporaryDirectory() as folder:
                marker = Path(api.hf_hub_download(repo, MARKER, local_dir=folder))
                ours = {MARKER, *json.loads(marker.read_text(encoding="utf-8"))["files"]}
    if foreign := sorted(there - ours):
        raise BadInput(
            f"{repo}: the repository holds files that packhorse did not push: "
            f"{', '.join(foreign[:5])}; give another name, or remove them there"
        )
    return there


def push(folder: Path, repo: str) -> str:
    """Upload an export as one commit; return its address.

    Raises as `check_push` does.
    """
    from huggingface_hub import HfApi

    before = check_push(repo)
    facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    gone = before - {MARKER, *facts["files"]}
    with _hub_errors_explained(repo):
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"The {facts['kind']} of step {facts['step']} of {facts['run']}",
            delete_patterns=sorted(gone) or None,
        )
    log.info("pushed step %d to %s", facts["step"], commit.repo_url)
    return str(commit.commit_url)


@contextmanager
def _hub_errors_explained(repo: str) -> Iterator[None]:
    """Turn what the hub's library raises, of a dozen unrelated classes, into BadInput."""
    try:
        yield
    except Exception as error:
        raise BadInput(
            f"{repo}: the hub cannot be used ({error_line(error, 300)}); check the name, the "
            "network and the token ($HF_TOKEN, or `hf auth login`), which must be allowed to write"
        ) from None


def push_run(run_dir: Path, repo: str, last: int) -> None:
    """Export the best step of a run that is done, or else its last one, and push it, unless that
    was done before.

    The export runs in a process of its own, as a rank has the launcher's environment.

    Raises:
        BadInput: it could not be exported or pushed. The process has said why.
    """
    import gc

    import torch

    step = read_best(run_dir / "checkpoints") or last
    facts = {"repo": repo, "step": step}
    told = run_dir / PUSHED
    if read_json_file(told) == facts:
        return
    gc.collect()
    torch.cuda.empty_cache()  # an export may need the GPU
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    environ = {name: value for name, value in os.environ.items() if name not in ranks}
    command = [sys.executable, MAIN, "export", f"--out={run_dir / 'export'}", f"--step={step}"]
    # whoever started the run has consented to what its recipe runs
    command += [f"--push={repo}", "--overwrite", "--trust-run", "--", str(run_dir)]
    log.info("exporting and pushing step %d to %s", step, repo)
    code = subprocess.run(command, env=environ, check=False).returncode
    if code:
        raise BadInput(
            f"run.push_to_hub: the run is done and whole in {run_dir}, but step {step} was not "
            f"pushed to {repo} (exit code {code}, see above); run the same command again, which "
            "pushes it"
        )
    write_json(told, facts)
