"""Feed inputs to everything that packhorse reads, led by the code's coverage (atheris, Linux).

    python -m tests.fuzz [TARGET...] [--runs 100000] [--seconds 3600] [--seed 1] [--out FILE]

A target reads bytes as one kind of input: it accepts them, or refuses them as promised. What does
neither ends its campaign and is kept in build/; once mended it moves to tests/corpus/TARGET/, which
tests/unit/test_fuzz_inputs.py reads again. A line for each campaign is appended to `--out`, and a
table of all of them is printed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.ranks import ROOT

CORPUS = ROOT / "tests" / "corpus"
LIMIT_S = 20  # an input that takes longer is a fault
SMALL = b"model: {name: x}\ndata: {train: [{path: x}]}\nrun: {dir: x}\n"
REPLY = {
    "choices": {"0": {"message": {"content": "4"}, "text": "4"}},
    "usage": {"prompt_tokens": 3},
}
STATE = ("step", "updates", "data", "micro_batch_size", "recent_losses", "world_size", "stage")
MANIFEST = {
    "format": 2,
    "state": dict.fromkeys(STATE, 1),
    "shapes": {"w": [2]},
    "files": {"rank00000-000.safetensors": {"bytes": 8, "xxh3": "0", "slices": []}},
    "digests": {"w": {"weight": "0f"}},
    "description": {"config.json": "0"},
}
VALUES: list[Any] = [None, True, 0, -1, 1.5, float("nan"), 10**400, "", "x", "../x", "\ud800"]
VALUES += [[], [[]], {}, {"": {}}, [{"message": {"content": 4}}], {"prompt_tokens": []}]
WORKING = tempfile.TemporaryDirectory()


def _file(name: str, data: bytes) -> Path:
    path = Path(WORKING.name, name)
    path.write_bytes(data)
    return path


def recipe(data: bytes) -> None:
    from packhorse.trainer.config.recipe import load_recipe
    from packhorse.trainer.datatypes import BadInput

    with suppress(BadInput):
        load_recipe(_file("r.yaml", data)).to_yaml()


def override(data: bytes) -> None:
    """The first byte chooses the key."""
    from packhorse.trainer.config.recipe import load_recipe
    from packhorse.trainer.datatypes import BadInput

    key = _keys()[(data[:1] or b"\0")[0] % len(_keys())]
    with suppress(BadInput):
        value = data[1:].decode(errors="surrogateescape")
        load_recipe(_file("small.yaml", SMALL), [f"{key}={value}"])


@functools.cache
def _keys() -> list[str]:
    from packhorse.trainer.config.parsing import keys_of
    from packhorse.trainer.config.recipe import Recipe

    return [key.replace("[]", ".0") for key in keys_of(Recipe)]


def rows(data: bytes) -> None:
    """The first byte chooses the format."""
    from packhorse.trainer.config.data import Source
    from packhorse.trainer.data.format import REQUIRED
    from packhorse.trainer.data.rows import RowReader
    from packhorse.trainer.data.source import read_rows
    from packhorse.trainer.datatypes import BadInput, RowError

    source = Source(path=str(_file("rows.jsonl", data[1:])))
    reader = RowReader(source, list(REQUIRED)[(data[:1] or b"\0")[0] % len(REQUIRED)])
    with suppress(BadInput):
        for row in read_rows(source):
            with suppress(RowError):
                reader.conversation(row.fields)


def template(data: bytes) -> None:
    """A chat template renders a conversation, of which every answer is found, or none is."""
    from packhorse.trainer.data.prepare import masker_of
    from packhorse.trainer.datatypes import BadInput, Conversation, Message

    recipe, tokenizer = _debug_tokenizer()
    tokenizer.chat_template = data.decode(errors="replace")
    turns = (Message("system", "Be brief."), Message("user", "2+2?"), Message("assistant", "4"))
    with suppress(BadInput):
        masker_of(recipe.data, tokenizer).documents([Conversation(turns)])


@functools.cache
def _debug_tokenizer() -> Any:
    from packhorse.trainer.config.recipe import load_recipe
    from packhorse.trainer.model.load import load_tokenizer

    recipe = load_recipe("debug")
    return recipe, load_tokenizer(recipe.model)


def tokenizer(data: bytes) -> None:
    """The first byte chooses the file of a tokenizer's folder that the others replace."""
    import shutil

    from packhorse.trainer.config.recipe import load_recipe
    from packhorse.trainer.datatypes import BadInput
    from packhorse.trainer.model.load import load_tokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
    folder = Path(WORKING.name, "model")
    shutil.copytree(ROOT / "recipes" / "debug" / "model", folder, dirs_exist_ok=True)
    (folder / names[(data[:1] or b"\0")[0] % len(names)]).write_bytes(data[1:])
    with suppress(BadInput):
        load_tokenizer(load_recipe("debug", [f"model.name={folder}"]).model)


def manifest(data: bytes) -> None:
    from packhorse.trainer.checkpoint.manifest import Manifest, _content_checksum

    with suppress(ValueError, KeyError, TypeError):
        Manifest.parse(data.decode())
    content = _altered(MANIFEST, data)
    with suppress(ValueError, KeyError, TypeError):
        Manifest.parse(json.dumps({**content, "xxh3": _content_checksum(content)}))


def _altered(tree: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Return a tree in which the bytes choose values that others replace."""
    tree = json.loads(json.dumps(tree))
    numbers = iter(data)
    for first in numbers:
        parent, key = tree, list(tree)[first % len(tree)]
        while isinstance(parent[key], dict) and parent[key] and next(numbers, 0) % 3:
            parent, key = parent[key], list(parent[key])[next(numbers, 0) % len(parent[key])]
        parent[key] = VALUES[next(numbers, 0) % len(VALUES)]
    return tree


def side_file(data: bytes) -> None:
    from packhorse.trainer.utils.json_lines import cut_json_lines, read_json_lines

    path = _file("x.jsonl", b'{"step": 1}\n' + data)
    cut_json_lines(path, lambda line: line["step"] <= 1)
    assert {"step": 1} in read_json_lines(path), "a damaged line takes no other with it"


def reply(data: bytes) -> None:
    from packhorse.trainer.eval.openai_client import prompt_tokens_of, text_of

    # what the client expects of a reply, see Client._read_reply
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        answer = _altered(REPLY, data[1:]) if data[:1] < b"\x80" else json.loads(data[1:])
        text_of(answer)
        prompt_tokens_of(answer)


def variables(data: bytes) -> None:
    """Lines of NAME=VALUE."""
    from packhorse.launch.cluster_env import read_cluster_env, refuse_tasks
    from packhorse.trainer.datatypes import BadInput

    lines = data.decode(errors="surrogateescape").splitlines()
    environ = dict(line.split("=", 1) for line in lines if "=" in line)
    with suppress(BadInput):
        refuse_tasks(environ, nodes_given=False)
        read_cluster_env(environ)


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (recipe, override, rows, template, tokenizer, manifest, side_file, reply, variables)
}


def seeds(target: str) -> Iterator[bytes]:
    """Yield inputs to begin with."""
    debug = ROOT / "recipes" / "debug"
    row = (debug / "train.jsonl").read_bytes().splitlines(keepends=True)[0]
    yield from {
        "recipe": [debug.with_suffix(".yaml").read_bytes(), b"a: &a {x: 1}\nb: {<<: *a}\n"],
        "override": [bytes([n]) + text for n in range(200) for text in (b"1", b"[{a: b}]")],
        "rows": [bytes([n]) + text for n in range(8) for text in (row, _messages())],
        "template": [b"{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"],
        "tokenizer": [
            bytes([n]) + (debug / "model" / name).read_bytes()
            for n, name in enumerate(("tokenizer.json", "tokenizer_config.json", "config.json"))
            if (debug / "model" / name).exists()
        ],
        "manifest": [b"\1\1\1\1", json.dumps(MANIFEST).encode()],
        "side_file": [b'{"step": 2, "train/loss": NaN}\n{"step": 1}\n'],
        "reply": [b"\1\1\1\1", b'\xff{"choices": [{"message": {"content": "4"}}], "usage": {}}'],
        "variables": [b"SLURM_JOB_ID=1\nSLURM_STEP_NODELIST=a[1-2]\nPET_NNODES=1:2\n"],
    }[target]
    folder = CORPUS / target
    yield from (path.read_bytes() for path in sorted(folder.glob("*")))


def _messages() -> bytes:
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    return json.dumps({"messages": turns, "tools": []}).encode()


def fuzz(target: str, options: list[str]) -> None:
    """Run libFuzzer on a target in this process, which it ends."""
    atheris: Any = importlib.import_module("atheris")
    logging.disable(logging.CRITICAL)
    # coverage of ours and of PyYAML leads the inputs
    with atheris.instrument_imports(include=["packhorse", "yaml"], enable_loader_override=False):
        for seed in seeds(target):
            TARGETS[target](seed)  # imports what it needs
    atheris.Setup([sys.argv[0], *options], TARGETS[target])
    atheris.Fuzz()


def campaign(target: str, runs: int, seconds: int, seed: int, kept: Path) -> dict[str, Any]:
    """Fuzz a target in a process of its own; return what came of it.

    Args:
        kept: the beginning of the path of a file for the input that failed.
    """
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # as files are fsynced
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for number, data in enumerate(seeds(target)):
            (corpus / str(number)).write_bytes(data)
        options = [f"-runs={runs}", f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=8192"]
        options += [f"-timeout={LIMIT_S}", "-rss_limit_mb=4096", f"-artifact_prefix={kept}"]
        program = f"from tests.fuzz import fuzz; fuzz({target!r}, {[*options, str(corpus)]!r})"
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    said = done.stderr.decode(errors="replace")
    if done.returncode:
        print(said[-3000:], file=sys.stderr)
    inputs = max(map(int, re.findall(r"^#(\d+)\s", said, re.MULTILINE)), default=0)
    took = {"seconds": round(time.monotonic() - began), "failed": int(done.returncode != 0)}
    return {"target": target, "seed": seed, "inputs": inputs, **took}


def table(campaigns: list[dict[str, Any]]) -> str:
    rows = ["| target | inputs | seconds | answered otherwise |", "|---|---|---|---|"]
    for target in (*TARGETS, "all"):
        chosen = [each for each in campaigns if target in (each["target"], "all")]
        sums = (sum(each[key] for each in chosen) for key in ("inputs", "seconds", "failed"))
        rows.append(f"| {target} | {' | '.join(f'{number:,}' for number in sums)} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs of each target")
    parser.add_argument("--seconds", type=int, default=3600, help="of each target, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz.jsonl")
    asked = parser.parse_args()
    asked.out.parent.mkdir(exist_ok=True)
    failed = 0
    for target in asked.targets:
        kept = asked.out.parent / f"fuzz-{target}-"
        found = campaign(target, asked.runs, asked.seconds, asked.seed, kept)
        failed += found["failed"]
        with asked.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
    print(table([json.loads(line) for line in asked.out.read_text().splitlines()]))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
