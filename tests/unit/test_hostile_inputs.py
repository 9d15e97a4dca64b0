"""Recipes, manifests and variables that are odd or made to harm: a sentence each, and no traceback.

Each text once raised something else than BadInput, took minutes, or was written to the terminal as
it is. tests/fuzz.py looks for more of them.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from packhorse.launch.cluster_env import read_cluster_env, refuse_tasks
from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.checkpoint.manifest import Manifest, _content_checksum
from packhorse.trainer.checkpoint.model_card import model_card
from packhorse.trainer.cli import main
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import escape_controls, start_logging
from packhorse.trainer.engine import ds_config
from packhorse.trainer.eval import scorers
from packhorse.trainer.model.load import load_tokenizer
from packhorse.trainer.utils.text import show_controls
from tests.ranks import ROOT

DEBUG = (ROOT / "recipes" / "debug.yaml").read_text()
BOMB = "a: &a [x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))

RECIPES = {
    "a date that is none": "2020-13-45",
    "an hour that is none": "2020-01-01T99:00:00Z",
    "a date": "2020-01-01",
    **{f"no {tag}": f"!!{tag} abc" for tag in ("timestamp", "int", "float", "bool", "omap")},
    "Python's own": "!!python/object/apply:os.system [id]",
    "a list as a key": "{? [a, b] : 3}",
    "a mapping as a key": "{? {a: b} : 3}",
    "a huge number": "9" * 5000,
    "a large number": "9" * 4200,
    "a huge hexadecimal number": "0x" + "f" * 10_000,
    "a huge sexagesimal number": ":".join(["59"] * 3000),
    "deep lists": "[" * 200 + "]" * 200,
    "deep mappings": "{a: " * 200 + "}" * 200,
    "itself": "&x [*x]",
    "NUL": '"a\\0b"',
    "half a surrogate pair": '"a\\ud800b"',
    "a pattern of too many repetitions": "{pattern: 'a{4294967296}'}",
    "a merge key of a number": "{<<: 3}",
}


@pytest.mark.parametrize("key", ["run.dir", "nowhere"])
@pytest.mark.parametrize("value", RECIPES.values(), ids=RECIPES.keys())
def test_an_odd_value_is_answered_by_a_sentence(key: str, value: str) -> None:
    if value == "2020-01-01" and key != "nowhere":
        load_recipe("debug", [f"run.dir='{value}'"])
        return
    with pytest.raises(BadInput) as said:
        load_recipe("debug", [f"{key}={value}"])
    assert len(str(said.value)) < 2500


@pytest.mark.parametrize(
    "text",
    [BOMB + "chat: *j", CHAIN, BOMB.replace("a: &a", "model: &a"), "[" * 9000, "\x00", "- a"],
)
def test_an_odd_recipe_is_answered_by_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(BadInput):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "key",
    [
        *("batch.seq_len", "batch.global_batch_size", "batch.micro_batch_size", "data.max_length"),
        *("adapter.rank", "eval.generate.max_new_tokens", "eval.generate.num_prompts"),
        *("run.profile_steps.1", "checkpoint.keep", "adapter.trainable_token_indices.0"),
    ],
)
def test_a_whole_number_that_no_machine_takes_is_refused(key: str) -> None:
    lists = ["run.profile_steps=[1, 2]", "adapter={trainable_token_indices: [1]}"]
    load_recipe("debug", [*lists, f"{key}=3"])
    name = [part for part in key.split(".") if not part.isdigit()][-1]
    with pytest.raises(BadInput, match=rf"`{name}`: whole numbers go up to 2,147,483,647"):
        load_recipe("debug", [*lists, f"{key}={10**15}"])


def test_aliases_do_not_unfold_without_end(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(BOMB + DEBUG.replace("data:\n", "data:\n  turns: *j\n"))
    with pytest.raises(BadInput, match="its aliases unfold to more than"):
        load_recipe(tmp_path / "r.yaml")


def test_an_endless_recipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for endless in (Path("/dev/zero"), tmp_path / "pipe.yaml"):
        with pytest.raises(BadInput, match=f"{endless}: is no plain file"):
            load_recipe(endless)
    (tmp_path / "rows.yaml").write_text("a: 1\n" * 300_000)
    with pytest.raises(BadInput, match="has more than 1,000,000 characters"):
        load_recipe(tmp_path / "rows.yaml")


def test_merge_keys_are_allowed(tmp_path: Path) -> None:
    merged = "optim: {<<: {lr: 2.0e-2, eps: 1.0e-6}, lr: 1.0e-2}"
    (tmp_path / "r.yaml").write_text(DEBUG.replace("optim: {lr: 1.0e-2}", merged))
    found = load_recipe(tmp_path / "r.yaml").optim
    assert (found.lr, found.eps) == (1e-2, 1e-6)


@pytest.mark.parametrize("key", ["model.chat_template", "parallel.deepspeed", "schema"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 99_999, None])
def test_a_file_that_the_recipe_names_may_hold_anything(
    tmp_path: Path, key: str, content: bytes | None
) -> None:
    """None: it is a device, which has no end."""
    path = tmp_path / "file"
    if content is None:
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(content)
    if key == "schema":
        scorer = f"eval.generate.scorers={{odd: {{kind: json_schema, file: {path}}}}}"
        section: Any = load_recipe("debug", [scorer]).eval.generate
        prompt: Any = None  # which a schema of a file does not ask for
        work = lambda: scorers.expected(section.scorers["odd"], prompt)  # noqa: E731
    elif key == "parallel.deepspeed":
        recipe = load_recipe("debug", [f"{key}={path}"])
        work = lambda: ds_config._read_template(recipe.parallel.deepspeed)  # noqa: E731
    else:
        work = lambda: load_tokenizer(load_recipe("debug", [f"{key}={path}"]).model)  # noqa: E731
    if key == "model.chat_template" and content == b"[" * 99_999:
        work()  # a text, which is rendered later
        return
    with pytest.raises(BadInput, match="file"):
        work()


@pytest.mark.parametrize("cluster", ["slurm", "kubernetes"])
def test_a_launched_template_is_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("template.json").write_bytes(b"\xff\xfe")
    Path("recipe.yaml").write_text(DEBUG)
    words = ["launch", cluster, "recipe.yaml", "--nodes", "2", "parallel.deepspeed=template.json"]
    words += ["run.dir=/work/run", "--image", "x"] if cluster == "kubernetes" else []
    done = CliRunner().invoke(main.app, words)
    assert isinstance(done.exception, BadInput), done.output
    assert "template.json is no text in UTF-8" in str(done.exception)


STATE = dict.fromkeys(("step", "updates", "micro_batch_size", "world_size", "stage"), 1)
STATE |= {"data": "0", "recent_losses": [1.5]}
FILE = "rank00000-000.safetensors"


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "rank00000-000.safetensors/../../x", "", "manifest.json"]
)
def test_a_manifest_names_no_file_elsewhere(name: str) -> None:
    content = {
        "format": 2,
        "state": {},
        "shapes": {},
        "files": {name: {"bytes": 1, "xxh3": "0", "slices": []}},
        "digests": {},
    }
    with pytest.raises(ValueError, match="no name of a checkpoint's file"):
        Manifest.parse(json.dumps({**content, "xxh3": _content_checksum(content)}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state", {**STATE, "step": "many"}),
        ("state", {**STATE, "step": "1"}),
        ("state", {**STATE, "step": 1.0}),
        ("state", {**STATE, "step": -1, "updates": -1}),
        ("state", {**STATE, "step": 10**40}),
        ("state", {**STATE, "updates": 2}),
        ("state", {**STATE, "updates": True}),
        ("state", {**STATE, "rng": 5}),
        ("state", [["step", 1]]),
        ("state", {**STATE, "recent_losses": {"a": 1}}),
        ("state", {**STATE, "recent_losses": [float("nan")]}),
        ("shapes", {"w": [10**15]}),
        ("shapes", {"w": [-1]}),
        ("shapes", {"w": "2"}),
        ("files", {FILE: {"bytes": 8, "xxh3": "0", "slices": [["w", "0", []]]}}),
        ("files", {FILE: {"bytes": None, "xxh3": "0", "slices": []}}),
        ("files", {FILE: {"bytes": -8, "xxh3": "0", "slices": []}}),
        ("files", {FILE: {"bytes": "8", "xxh3": "0", "slices": []}}),
        ("files", {FILE: {"bytes": 8, "xxh3": "0", "slices": [], "packed": "zstd"}}),
        ("digests", {"w": {"weight": "-0x_f"}}),
        ("digests", {"w": []}),
        ("optimizer", {}),
        ("description", {"config.json": ["0"]}),
    ],
)
def test_a_manifest_of_other_values_is_a_damaged_one(tmp_path: Path, key: str, value: Any) -> None:
    """Its checksum proves nothing: whoever changes it can make a new one."""
    content = {
        "format": 2,
        "state": STATE,
        "shapes": {"w": [2]},
        "files": {FILE: {"bytes": 8, "xxh3": "0", "slices": [["w", 0, 2]]}},
        "digests": {"w": {"weight": "0f"}},
    }
    folder = tmp_path / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    for tree in (content, {**content, key: value}):
        text = json.dumps({**tree, "xxh3": _content_checksum(tree)})
        (folder / "manifest.json").write_text(text)
        if tree is content:
            assert Manifest.read(folder).state.step == 1
    with pytest.raises(
        ValueError, match=r"validation error|does not fit into its files|updates in|not know"
    ):
        Manifest.read(folder)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(BadInput, match=r"none of its 1 checkpoints .*no file"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("SLURM_JOB_ID", odd) for odd in ("abc", "", "-1", "²", "9" * 5000)),
        *(("SLURM_NODEID", odd) for odd in ("", "x")),
        *(("SLURM_STEP_NODELIST", odd) for odd in ("", ",", "[1-2]x"[:0])),
        *(("OMPI_COMM_WORLD_LOCAL_SIZE", odd) for odd in ("abc", "1.5", "")),
    ],
)
def test_an_odd_variable_of_a_cluster_is_named(name: str, value: str) -> None:
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "a[1-2]",
        "SLURM_NODEID": "0",
        name: value,
    }

    def read() -> None:
        refuse_tasks(environ, nodes_given=False)
        read_cluster_env(environ)

    with pytest.raises(BadInput, match=name):
        read()


HARMFUL = "\x1b]0;title\x07 \x9b31m \u202egnp.exe \u2066x \ud800 \u2028 \x7f"


def test_no_text_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger("packhorse").handlers[:]
    start_logging()
    logging.getLogger("packhorse").warning("a row holds %s", HARMFUL)
    logging.getLogger("packhorse").handlers[:] = before
    for text in (show_controls(HARMFUL), escape_controls(HARMFUL), capsys.readouterr().err):
        text.encode()
        assert not set(HARMFUL) - set(" ;title0xgnp.em31]") & set(text.rstrip("\n"))


@pytest.mark.parametrize("name", ["a/b\nlicense: mit", "a\n---\n# b", "a: b", "a/b/c", "[a]"])
def test_a_models_name_adds_nothing_to_the_head_of_a_card(tmp_path: Path, name: str) -> None:
    recipe = load_recipe("debug", [f"model.name={json.dumps(name)}"])
    head = yaml.safe_load(model_card(tmp_path, recipe, 3, False).split("---\n")[1])
    assert head.keys() == {"library_name", "pipeline_tag", "tags"}


def os_error(number: int) -> None:
    raise OSError(number, os.strerror(number), "/runs/x")


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (lambda: os_error(errno.EMFILE), "raise the limit, as by `ulimit -n 4096`"),
        (lambda: os_error(errno.ENOSPC), "make room where run.dir and data.cache lie"),
        (lambda: os_error(errno.EROFS), "make room where run.dir and data.cache lie"),
        (lambda: os_error(errno.ENAMETOOLONG), "give another path"),
        (
            lambda: Tokenizer(WordLevel({"a": 0}, "a")).save("/dev/full"),
            "No space left on device (os error 28); make room where run.dir and data.cache lie",
        ),
    ],
)
def test_what_the_system_refuses_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[[], None],
    said: str,
) -> None:
    monkeypatch.setattr(main, "app", lambda **_: refused())
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
