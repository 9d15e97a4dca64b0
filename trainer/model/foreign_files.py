"""Refuse of a stranger's model what would run code or lead out of its folder.

transformers asks for consent before it runs Python files of a model. It does not ask before it
downloads a kernel that a configuration names, nor does it check what an index of weights names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.files import read_json_file, read_object

_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_labels")
_MOST = 100_000
_WEIGHTS = ".safetensors"
_FILE = re.compile(r"[^/\\\0]+\.safetensors(\.index\.json)?")


def require_no_kernel(config: Any, name: str) -> None:
    """Raise BadInput if a configuration names a kernel of the hub, `owner/kernel`, as its
    attention: transformers would download and run it.
    """
    for found in _attentions(config):
        if "/" in str(found):
            raise BadInput(
                f"model.name: the configuration of {name} names a kernel of the hub, "
                f"{found!r:.200}, which is code; remove `attn_implementation` from its config.json"
            )


def _attentions(config: Any) -> Iterator[Any]:
    yield getattr(config, "_attn_implementation", None)
    for part in getattr(config, "sub_configs", ()):
        yield from _attentions(getattr(config, part, None))


def require_buildable(name: str, revision: str | None) -> None:
    """Raise BadInput if a configuration asks for more layers or labels than any model has:
    transformers would make them one by one, until memory is full.

    Args:
        name: a folder, or a name on the hub.
    """
    found = _cached(name, "config.json", revision)
    whole = read_object(Path(found).read_bytes()) if found else None
    for part in (whole or {}, *(whole or {}).values()):
        for key in _COUNTS if isinstance(part, dict) else ():
            if isinstance(part.get(key), int) and part[key] > _MOST:
                raise BadInput(f"{found}: `{key}` is {part[key]:.3g}; no model has so many")


def require_safetensors(name: str, revision: str | None, config: Any) -> None:
    """Raise BadInput if a model's weights are other files than safetensors in its own folder.

    Args:
        name: a folder, or a name on the hub.
        config: its configuration, which may name the file to be read instead of the usual one.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    given = getattr(config, "transformers_weights", None)
    file = given or SAFE_WEIGHTS_INDEX_NAME
    if not _FILE.fullmatch(str(file)):
        raise BadInput(f"{name}: its configuration names {file!r:.200}, no safetensors file in it")
    is_one_file = (Path(name) / SAFE_WEIGHTS_NAME).is_file() and not given  # it comes first
    if is_one_file or not file.endswith(".json"):
        return
    index = _cached(name, file, revision)
    if index is None:
        return
    files = read_json_file(Path(index)).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise BadInput(f"{index}: names no weights; put it back as it was")
    for each in files.values():
        if not (isinstance(each, str) and _FILE.fullmatch(each) and each.endswith(_WEIGHTS)):
            raise BadInput(f"{index}: names {each!r:.200}, no safetensors file beside it")
        if Path(name).is_dir() and not (Path(name) / each).is_file():  # a pipe is waited for
            raise BadInput(f"{index}: there is no file {each} beside it; copy it there")


def _cached(name: str, file: str, revision: str | None) -> str | None:
    """Return the path of a model's file, or None if it has none or cannot be reached."""
    from transformers.utils import cached_file

    return cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
