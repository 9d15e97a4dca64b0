"""A stale cache is never used: every key of the recipe that can shape the documents changes the
cache's key.

All keys of the sections `model`, `data` and `batch` must be in one of the tables below, or a test
fails. So whoever adds a key decides here whether it shapes the documents. The other sections are
about what is done with the documents.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.config.data import DataSection, Source
from packhorse.trainer.config.recipe import BatchSection, ModelSection, Recipe, parse_recipe
from packhorse.trainer.data import prepare
from packhorse.trainer.model.load import load_tokenizer

OTHER_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)

# Key of the recipe -> values that make other documents than BASE does. {work} is the folder of the
# test.
SHAPES: dict[str, list[Any]] = {
    "model.name": ["{work}/qwen2_5", "{work}/other_merges", "{work}/other_template"],
    "model.add_tokens": [["<tool>"]],
    "model.chat_template": ["{work}/other.jinja", "chatml"],
    "data.train.0.path": ["{work}/changed.jsonl"],
    "data.train.0.format": ["text"],
    "data.train.0.columns": [{"question": "text"}],
    "data.train.0.rows": [10],
    "data.train.0.function": ["test_cache_key:as_messages"],
    "data.train.0.filters": [{"answer_words": [1, 9]}, {"pattern": "is"}],
    "data.eval_fraction": [0.2, 0.3],
    "data.duplicates": ["drop"],
    "data.train_on": ["all", "completion", "last_turn"],
    "data.train_on_eot": [False, "with_newline"],
    "data.control_tokens": ["text", "keep"],
    "data.ignore_columns": [["text"]],
    "data.turns": ["together", "apart"],
    "data.max_length": [100],
    "data.too_long": ["truncate", "truncate_anywhere", "split"],
    "data.broken_lines": ["reject"],
    "batch.seq_len": [128],  # as data.max_length is not given
}

# Key of the recipe -> values that make the same documents, which need not be built again.
DOES_NOT: dict[str, list[Any]] = {
    "model.name": ["{work}/moved"],  # what lies there counts
    "model.revision": ["v2"],
    "model.init": ["random"],
    "model.dtype": ["float32"],
    "model.attention": ["reference"],
    "model.layer_kernels": ["torch"],
    "model.compile": ["layers"],
    "model.activation_checkpointing": ["none"],
    "model.trust_remote_code": [True],
    "model.freeze": [["embed"]],
    "model.matmul": ["fp8_rowwise"],
    "model.rope_scaling": [{"rope_type": "yarn", "factor": 2.0}],
    "data.train.0.path": ["{work}/moved.jsonl"],
    "data.train.0.weight": [0.5],
    "data.eval": [[{"path": "{work}/changed.jsonl"}]],
    "data.max_leakage": [0.5, "drop"],  # which makes a folder of its own of those documents
    "data.packing": ["none", "bfd_split", "wrapped", "greedy"],
    "data.max_rejects": [0.5],
    "data.cache": ["{work}/elsewhere"],
    "data.workers": [2],
    "batch.global_batch_size": [3],
    "batch.micro_batch_size": [2],
}

# Key of the recipe -> the keys and values that it needs beside it, and a value of its own under
# which the documents are others than with those alone.
WITH_OTHERS: dict[str, tuple[dict[str, Any], Any]] = {
    "data.train.0.group_by": ({"data.eval_fraction": 0.3}, "question"),
    "data.chat_template_kwargs": ({"model.chat_template": "{work}/named.jinja"}, {"name": "Bob"}),
    "data.split_context": ({"data.too_long": "split"}, 5),
    "data.missing_reasoning": (
        {"model.chat_template": "{work}/thinks.jinja", "data.missing_reasoning": "empty"},
        "untrained",
    ),
    "data.stop_token": ({"model.chat_template": "{work}/endless.jinja"}, "<|im_start|>"),
}

# A source that grows is prepared shard by shard, each as a file like any other.
GROWS = {"data.train.0.streaming"}

# Keys that choose rows of a dataset or a folder: its files shape the documents, or on the hub the
# fingerprint that datasets gives to the rows.
CHOOSE = {f"data.train.0.{name}" for name in ("name", "split", "config", "data_files", "revision")}


@pytest.fixture(scope="module")
def work(shared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("key")
    for name, origin in {"base": "smollm2", "moved": "smollm2", "qwen2_5": "qwen2_5"}.items():
        shutil.copytree(
            shared / "tokenizers" / origin, folder / name, copy_function=shutil.copyfile
        )
    for name in ("other_merges", "other_template"):
        shutil.copytree(folder / "base", folder / name)
    tokenizer = json.loads((folder / "base/tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "other_merges/tokenizer.json").write_text(json.dumps(tokenizer))
    for path in (folder / "other.jinja", folder / "other_template/chat_template.jinja"):
        path.write_text(OTHER_TEMPLATE)
    (folder / "named.jinja").write_text("{{ name }}\n" + OTHER_TEMPLATE)
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant: THINK{% endif %}"
    (folder / "endless.jinja").write_text(endless + prompt.replace("THINK", ""))
    (folder / "thinks.jinja").write_text(
        endless + prompt.replace("THINK", "<think>") + "{# </think> #}"
    )
    rows = [
        {"question": f"What is {n}?", "answer": f"It is {n}.", "text": f"{n} it is."}
        for n in range(20)
    ]
    write(folder / "rows.jsonl", rows)
    write(folder / "moved.jsonl", rows)
    write(folder / "changed.jsonl", [*rows[:19], {**rows[19], "answer": "It is 19!"}])
    return folder


def as_messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def key(work: Path, changes: dict[str, Any]) -> str:
    """Return the folder name, which has the key, of the base recipe's cache with changes."""
    tree: Any = {
        "model": {"name": f"{work}/base"},
        "data": {"train": [{"path": f"{work}/rows.jsonl"}], "cache": f"{work}/cache", "workers": 1},
        "batch": {"seq_len": 512},
        "run": {"dir": f"{work}/run"},
    }
    for path, value in changes.items():
        node = tree
        *parents, last = path.split(".")
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node[parent]
        node[last] = json.loads(json.dumps(value).replace("{work}", str(work)))
    recipe = parse_recipe(tree)
    return prepare.prepare(recipe, load_tokenizer(recipe.model), "train").documents.folder.name


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(path, value, id=f"{path}={value}")
        for path, values in table.items()
        for value in values
    ]


@pytest.mark.parametrize(("path", "value"), cases(SHAPES))
def test_what_shapes_the_documents_makes_another_cache(work, path, value):
    assert key(work, {path: value}) != key(work, {})


@pytest.mark.parametrize("path", WITH_OTHERS)
def test_a_key_that_needs_others_makes_another_cache_too(work, path):
    others, value = WITH_OTHERS[path]
    assert key(work, {**others, path: value}) != key(work, others)


@pytest.mark.parametrize(("path", "value"), cases(DOES_NOT))
def test_what_does_not_shape_them_finds_the_same_cache(work, path, value):
    assert key(work, {path: value}) == key(work, {})


def test_every_key_is_in_a_table():
    sections = {
        "model": ModelSection,
        "data": DataSection,
        "batch": BatchSection,
        "data.train.0": Source,
    }
    keys = {
        f"{place}.{name}" for place, section in sections.items() for name in section.model_fields
    }
    assert keys - {"data.train"} == set(SHAPES) | set(DOES_NOT) | set(WITH_OTHERS) | GROWS | CHOOSE


def test_no_key_of_another_section_reaches_the_preparation():
    known = {
        "model",
        "data",
        "batch",
        "loss",
        "optim",
        "train",
        "parallel",
        "checkpoint",
        "eval",
        "guard",
        "run",
    }
    assert set(Recipe.model_fields) == known | {"adapter"}


def test_long_examples_are_cut_by_the_packing_or_before_it(work):
    """Under `split` the packing decides who cuts, so it shapes the documents there."""
    split = {"data.too_long": "split", "data.max_length": 40}
    whole, cut = (key(work, {**split, "data.packing": packing}) for packing in ("bfd_split", "bfd"))
    assert whole != cut
    assert key(work, {**split, "data.packing": "greedy"}) == cut


def test_a_folder_is_known_by_the_content_that_is_chosen(work, tmp_path):
    shutil.copyfile(work / "rows.jsonl", tmp_path / "train.jsonl")
    shutil.copyfile(work / "changed.jsonl", tmp_path / "test.jsonl")

    def of(**chosen: Any) -> str:
        return key(work, {"data.train": [{"name": str(tmp_path), **chosen}]})

    train, test = of(split="train"), of(split="test")
    assert train != test
    assert (of(), of(data_files=["test.jsonl"])) == (train, test)
    shutil.copyfile(work / "changed.jsonl", tmp_path / "train.jsonl")
    assert of() == test


def test_a_dataset_that_datasets_loads_is_known_by_its_rows_and_choice(work, tmp_path, monkeypatch):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def of(*files: str) -> str:
        given = {"name": "json", "data_files": [str(tmp_path / file) for file in files]}
        return key(work, {"data.train": [given]})

    for file in ("a.jsonl", "b.jsonl"):
        shutil.copyfile(work / "rows.jsonl", tmp_path / file)
    first = of("a.jsonl")
    assert of("a.jsonl") == first != of("a.jsonl", "b.jsonl")
    shutil.copyfile(work / "changed.jsonl", tmp_path / "a.jsonl")
    assert of("a.jsonl") != first
