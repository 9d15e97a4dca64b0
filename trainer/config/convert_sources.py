"""Translate the data sources of TRL, Axolotl and LLaMA-Factory configurations.

A `Draft` with the trainer's keys enters; `data.train` and `data.eval` are written into its recipe.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from packhorse.trainer.utils.files import read_json_file
from packhorse.trainer.utils.text import hide_passwords

Source = dict[str, Any]
"""An item of `data.train`, as a recipe holds it."""

_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".gz", ".zst")
_FORMATS = {
    "alpaca": "instruction",
    "chat_template": "messages",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "openai": "messages",
}
_SECRET = re.compile(r"(api_?key|access_?key|token|secret|password|passwd|credentials?)$", re.I)
_COLUMNS = {  # a key of an Axolotl dataset -> the name of the column here
    "field_messages": "messages",
    "field": "text",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
}


class Draft:
    """Their keys that are left, our recipe as far as it has come, and the notes."""

    def __init__(self, tree: dict[str, Any], trainer: str) -> None:
        self.left = {str(key): value for key, value in tree.items()}
        self.trainer = trainer
        self.recipe: dict[str, Any] = {}
        self.notes: list[str] = []

    def take(self, *keys: str) -> Any:
        """Remove the keys; return the value of the first that has one, or None."""
        values = [self.left.pop(key, None) for key in keys]
        return next((value for value in values if value is not None), None)

    def get(self, ours: str) -> Any:
        section, key = ours.split(".")
        return self.recipe.get(section, {}).get(key)

    def put(self, ours: str, value: Any) -> None:
        section, key = ours.split(".")
        self.recipe.setdefault(section, {})[key] = value

    def note(self, key: str, value: Any, why: str = "") -> None:
        """Note a value of theirs that is not carried over as it is."""
        shown = _without_secrets({key: value})[key]
        self.notes.append(f"{key}: {shown!r}" + (f" - {why}" if why else ""))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    if isinstance(value, str):
        return hide_passwords(value)
    if not isinstance(value, dict):
        return value
    return {
        key: "(not shown)" if _SECRET.search(str(key)) else _without_secrets(item)
        for key, item in value.items()
    }


def read_sources(draft: Draft) -> None:
    """Take all keys that name data, and write `data.train` and `data.eval`."""
    readers = {"TRL": _trl, "Axolotl": _axolotl, "LLaMA-Factory": _llama_factory}
    train, held_out = readers[draft.trainer](draft)
    most = draft.take("max_samples")
    if draft.take("streaming"):
        train = [{**source, "streaming": True} for source in train]
    if most:
        train = [{**source, "rows": most} for source in train]
    draft.put("data.train", train)
    if held_out:
        draft.put("data.eval", held_out)


def _place(name: str) -> Source:
    """Return where a source lies: a file or folder, or a dataset of the hub."""
    is_local = name.startswith((".", "/", "~")) or name.endswith(_FILES) or Path(name).exists()
    return {"path" if is_local else "name": name}


def _is_file(source: Source) -> bool:
    """Return whether the source is a file, which has neither splits nor configurations."""
    path = str(source.get("path", ""))
    return path.endswith(_FILES) or Path(path).expanduser().is_file()


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _carry(theirs: dict[str, Any], source: Source, names: dict[str, str]) -> None:
    """Move values from a source of theirs to ours: each key of theirs -> ours."""
    for key, ours in names.items():
        if value := theirs.pop(key, None):
            source[ours] = value


def _axolotl(draft: Draft) -> tuple[list[Source], list[Source]]:
    train, held_out = (
        [
            source
            for number, given in enumerate(draft.take(key) or [])
            for source in _axolotl_sources(draft, f"{key}[{number}]", given)
        ]
        for key in ("datasets", "test_datasets")
    )
    return train, held_out


def _axolotl_sources(draft: Draft, where: str, given: dict[str, Any]) -> list[Source]:
    left = dict(given)
    source = _place(str(left.pop("path", "")))
    files = left.pop("data_files", None) or []
    if isinstance(files, dict):  # by split
        draft.note(f"{where}.data_files", files, "the files of all its splits are read")
        files = [file for one in files.values() for file in _as_list(one)]
    files = _as_list(files)
    if "name" in source:
        source |= {"data_files": files} if files else {}
        _carry(left, source, {"name": "config", "revision": "revision", "split": "split"})
    kind = left.pop("type", None)
    base = str(kind).partition(".")[0]
    if isinstance(kind, str) and base in _FORMATS:
        source["format"] = _FORMATS[base]
    elif kind is not None:
        draft.note(f"{where}.type", kind, "name the format, or a data.train[].function of yours")
    roles = left.pop("message_property_mappings", None)
    if roles == {"role": "from", "content": "value"}:
        source["format"] = "sharegpt"
    elif roles not in (None, {"role": "role", "content": "content"}):
        draft.note(f"{where}.message_property_mappings", roles, "write a data.train[].function")
    columns = {}
    for key, name in _COLUMNS.items():
        column = left.pop(key, None)
        is_sharegpt = name == "messages" and source.get("format") == "sharegpt"
        ours = "conversations" if is_sharegpt else name
        if column not in (None, ours):
            columns[ours] = column
    source |= {"columns": columns} if columns else {}
    left.pop("ds_type", None)
    for key, value in left.items():
        draft.note(f"{where}.{key}", value)
    # beside a local path, the files' own paths are meant
    return [source | {"path": str(file)} for file in files if "path" in source] or [source]


def _trl(draft: Draft) -> tuple[list[Source], list[Source]]:
    given = draft.take("datasets")
    if given is None:
        given = [
            {"path": draft.take("dataset_name"), "name": draft.take("dataset_config")}
            | {"split": draft.take("dataset_train_split") or "train"}
        ]
    text = draft.take("dataset_text_field")
    columns = {"columns": {"text": text}, "format": "text"} if text not in (None, "text") else {}
    train = [_trl_source(draft, i, source) | columns for i, source in enumerate(given)]
    held_out = []
    split = draft.take("dataset_test_split")
    if (draft.left.get("eval_strategy") or "no") != "no" and len(train) == 1:
        held_out = [train[0] | {"split": split or "test"}] if "name" in train[0] else []
        if not held_out:
            draft.note("dataset_test_split", split or "test", "name the file in data.eval")
    return train, held_out


def _trl_source(draft: Draft, number: int, given: dict[str, Any]) -> Source:
    left = dict(given)
    source = _place(str(left.pop("path", None) or ""))
    split = left.pop("split", None) or "train"
    if not _is_file(source):
        if "name" in source or split != "train":
            source["split"] = split
        _carry(left, source, {"name": "config", "data_files": "data_files"})
    elif split != "train":
        left["split"] = split
    for key, value in left.items():
        draft.note(f"datasets[{number}].{key}", value)
    return source


def _llama_factory(draft: Draft) -> tuple[list[Source], list[Source]]:
    folder = Path(draft.take("dataset_dir") or "data")
    described = read_json_file(folder / "dataset_info.json")
    found = []
    for key in ("dataset", "eval_dataset"):
        names = draft.take(key) or []
        names = names.split(",") if isinstance(names, str) else names
        found.append([_factory_source(draft, folder, described, name.strip()) for name in names])
    return found[0], found[1]


def _factory_source(draft: Draft, folder: Path, described: dict[str, Any], name: str) -> Source:
    facts = described.get(name)
    if facts is None:
        draft.note(
            "dataset", name, f"{folder}/dataset_info.json does not describe it; mend its path"
        )
        return {"path": str(folder / f"{name}.json")}
    if "hf_hub_url" in facts:
        source = {"name": facts["hf_hub_url"]}
        _carry(dict(facts), source, {"subset": "config", "split": "split"})
    else:
        source = {"path": str(folder / str(facts.get("file_name", f"{name}.json")))}
    columns = facts.get("columns", {})
    if facts.get("formatting") == "sharegpt":
        is_openai = facts.get("tags", {}).get("role_tag") == "role"
        source["format"] = "messages" if is_openai else "sharegpt"
        names = {"messages": "messages" if is_openai else "conversations", "tools": "tools"}
    else:
        source["format"] = "instruction"
        names = {"prompt": "instruction", "query": "input", "response": "output"}
    renamed = {ours: columns[key] for key, ours in names.items() if key in columns}
    renamed = {ours: column for ours, column in renamed.items() if ours != column}
    source |= {"columns": renamed} if renamed else {}
    for key in columns.keys() - names.keys():
        draft.note(f"{name}.columns.{key}", columns[key])
    return source
