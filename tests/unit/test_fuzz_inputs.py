"""Random recipes, manifests, side files, replies and variables: read, or refused as promised.

`make chaos` tries many more of them, and by coverage (tests/fuzz.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packhorse.launch.cluster_env import read_cluster_env, refuse_tasks
from packhorse.trainer.checkpoint.manifest import Manifest, _content_checksum
from packhorse.trainer.config.parsing import keys_of
from packhorse.trainer.config.recipe import Recipe, load_recipe, parse_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval.openai_client import prompt_tokens_of, text_of
from packhorse.trainer.utils.json_lines import cut_json_lines, read_json_lines
from tests import fuzz
from tests.ranks import ROOT

EXAMPLES = int(os.environ.get("PACKHORSE_FUZZ", "60"))
tried = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES == 60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

TEXT = (ROOT / "recipes" / "debug.yaml").read_text()
KEYS = [key.replace("[]", ".0") for key in keys_of(Recipe)]
# what YAML means something by, and numbers and names at the edges
SNIPPETS = [
    *("{", "}", "[", "]", ": ", ", ", "- ", "\n", "\t", "#", "&a ", "*a", "<<: ", "? ", "!!int "),
    *("!!set ", "!!binary ", "'", '"', "|", ">", "---", "...", "%YAML", "~", "true", "2020-13-01"),
    *(
        "0x",
        ".nan",
        "-.inf",
        "1e999",
        "9" * 400,
        "\\0",
        "\\ud800",
        "\x85",
        "\u202e",
        "=",
        "a" * 300,
    ),
]
YAML = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=8).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def refused(work: Any, *promised: type[Exception]) -> None:
    try:
        work()
    except promised as error:
        str(error).encode(errors="replace")


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_what_once_failed_is_answered_as_promised(target: str) -> None:
    for data in fuzz.seeds(target):
        fuzz.TARGETS[target](data)


@tried
@given(st.integers(0, len(TEXT)), st.integers(0, 12), YAML)
def test_recipes(tmp_path: Path, at: int, cut: int, inserted: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT[:at] + inserted + TEXT[at + cut :], errors="surrogatepass")
    refused(lambda: load_recipe(path), BadInput)


@tried
@given(st.sampled_from(KEYS), YAML)
def test_overrides(key: str, value: str) -> None:
    refused(lambda: load_recipe("debug", [f"{key}={value}"]), BadInput)


@tried
@given(st.sampled_from(KEYS), JSON)
def test_values(key: str, value: Any) -> None:
    tree: Any = {"model": {"name": "x"}, "data": {"train": [{"path": "x"}]}, "run": {"dir": "x"}}
    node, (*parents, last) = tree, key.split(".")
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            return
    if isinstance(node, dict):
        node[last] = value
    refused(lambda: parse_recipe(tree).to_yaml(), BadInput)


@tried
@given(st.sampled_from(["format", "state", "shapes", "files", "digests", "description"]), JSON)
def test_manifests(key: str, value: Any) -> None:
    file = {"rank00000-000.safetensors": {"bytes": 1, "xxh3": "0", "slices": []}}
    content = {"format": 2, "state": {}, "shapes": {}, "files": file, "digests": {}, key: value}
    text = json.dumps({**content, "xxh3": _content_checksum(content)})
    refused(lambda: Manifest.parse(text), ValueError, KeyError, TypeError)


@tried
@given(st.lists(st.binary(max_size=12) | JSON.map(json.dumps).map(str.encode), max_size=5))
def test_side_files(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\n".join(lines))
    cut_json_lines(path, lambda line: line["step"] <= 1)
    assert {"step": 1} in read_json_lines(path), "a damaged line takes no other with it"


@tried
@given(JSON | st.fixed_dictionaries({"choices": JSON, "usage": JSON}))
def test_replies(reply: Any) -> None:
    for read in (text_of, prompt_tokens_of):
        refused(lambda read=read: read(reply), LookupError, TypeError, AttributeError)


NAMES = ("SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID")
NAMES += ("SLURM_STEP_NODELIST", "PET_NNODES", "PET_RDZV_CONF", "OMPI_COMM_WORLD_LOCAL_SIZE")


@tried
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["", "2", "a[1-", "²"]) | st.text()))
def test_variables(environ: dict[str, str]) -> None:
    refused(lambda: refuse_tasks(environ, nodes_given=False), BadInput)
    refused(lambda: read_cluster_env(environ), BadInput)
