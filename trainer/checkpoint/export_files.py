"""Write what an export needs beside the trained weights.

In: the model's source, a folder or a name on the hub. Out: its processor's files; its tensors that
are not the trained model's; configurations that transformers 4 reads as transformers 5 does.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import ModelSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.download import local_folder
from packhorse.trainer.utils.files import write_json

# What turns images, videos and sounds into a model's input. A text does not need them, and they are
# no part of a tokenizer or a configuration.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
CARRIED = "carried_tensors.json"  # names of the source's tensors that the model has no place for
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Keys of the number of layers that predict further tokens: DeepSeek's and GLM's, Qwen's, Ernie's
_FURTHER_TOKENS = re.compile(r"num_nextn_predict_layers|mtp_num_(hidden_)?layers|num_mtp_layers")


def keep_files(section: ModelSection, model: Any, folder: Path) -> None:
    """Copy the processor's files of the model's source into `folder`, and the code that it brings
    if that is trusted; and note the tensors that an export has to carry over.
    """
    # all files of a name on the hub lie in one folder of the hub's cache, once they are there
    found = [_source_file(section, name) for name in ("config.json", *PROCESSOR_FILES)]
    if found[0]:
        copy_files(found[0].parent, folder, with_code=section.trust_remote_code)
    names = sorted(_unplaced(section, model)) if section.init == "pretrained" else []
    write_json(folder / CARRIED, names)


def copy_files(source: Path, folder: Path, *, with_code: bool) -> None:
    """Copy the processor's files and, if asked, Python files."""
    code = [path.name for path in source.glob("*.py")] if with_code else []
    for name in (*PROCESSOR_FILES, *code):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _source_file(section: ModelSection, name: str, *, weights: bool = False) -> Path | None:
    """Return the path of a file of the model's source, or None if it has no such file."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        local_folder(section.name, "model.name", weights=weights) or section.name,
        name,
        revision=section.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


# -------------------------------------------------------------------------- tensors of the source


def carry_over(section: ModelSection, kept: Path, folder: Path) -> None:
    """Add the tensors of the model's source that the model has no place for to the export, as they
    are, and say so. They are, for example, layers that predict further tokens.

    Where the source lacks such layers the configuration names none.

    Args:
        kept: the folder that `keep_files` has filled.
        folder: the export, with its weights.
    """
    names = json.loads((kept / CARRIED).read_text())
    if names:
        files = _copy_tensors(section, folder, names)
        dist.log.info(
            "carried over unchanged, as they are no part of the trained model: %d tensors of %s "
            "(%s%s)",
            *(len(names), section.name, ", ".join(names[:2]), ", ..." * (len(names) > 2)),
        )
        _write_index(folder, files)
    else:
        _name_no_further_tokens(folder)


def _unplaced(section: ModelSection, model: Any) -> Iterator[str]:
    """Yield the names of the source's tensors that transformers has not loaded into the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    # an adapter, and torch.compile, put their modules around the model's
    places = {
        re.sub(r"\b(base_layer|_orig_mod)\.", "", k): v for k, v in model.state_dict().items()
    }
    for name in _source_tensors(section):
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        plain, _ = rename_source_key(name, [], [], model.base_model_prefix, places)
        # older checkpoints hold rotary tables, which are computed
        if renamed not in places and plain not in places and not name.endswith("inv_freq"):
            yield name


def _source_tensors(section: ModelSection) -> dict[str, str]:
    """Return the file of each tensor of the model's source by name; nothing if it has no weights
    in safetensors.
    """
    from safetensors import safe_open

    if index := _source_file(section, _INDEX, weights=True):
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    single = _source_file(section, _WEIGHTS, weights=True)
    if single is None:
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), _WEIGHTS)


def _copy_tensors(section: ModelSection, folder: Path, names: list[str]) -> dict[str, str]:
    """Write these tensors of the source into files of their own, and return the file of each."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    places = _source_tensors(section)
    by_file: dict[str, list[str]] = {}
    for name in names:
        if name not in places:
            raise BadInput(
                f"model.name: {section.name} has `{name}` no more, which the export carries over; "
                "put the model back"
            )
        by_file.setdefault(places[name], []).append(name)
    placed = {}
    for number, (file, inside) in enumerate(sorted(by_file.items()), 1):
        path = _source_file(section, file, weights=True)
        assert path, f"{section.name}: its index names {file}"
        target = f"model-carried-{number:05d}.safetensors"
        with safe_open(path, framework="pt") as source:
            tensors = {name: source.get_tensor(name) for name in inside}
        save_file(tensors, folder / target, metadata={"format": "pt"})
        placed |= dict.fromkeys(inside, target)
    return placed


def _write_index(folder: Path, carried: dict[str, str]) -> None:
    """Add files to the export's index, which a single file lacks."""
    from safetensors import safe_open

    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    else:
        first = "model-00001-of-00001.safetensors"
        # transformers reads no index beside a file of the plain name
        (folder / _WEIGHTS).rename(folder / first)
        with safe_open(folder / first, framework="pt") as file:
            index["weight_map"] = dict.fromkeys(file.keys(), first)
    index["weight_map"] |= carried
    index["metadata"]["total_size"] = sum(
        (folder / name).stat().st_size for name in set(index["weight_map"].values())
    )
    write_json(folder / _INDEX, index)


def _name_no_further_tokens(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in part:
            if _FURTHER_TOKENS.fullmatch(key) and part[key]:
                dist.log.info("config.json: %s is 0, as there are no such layers", key)
                part[key] = 0
    write_json(path, config)


# ----------------------------------------------------------------------- for two major versions


def suit_transformers_4(folder: Path, trust_remote_code: bool) -> None:
    """Change the configurations that transformers 5 has written so that 4.57 reads them alike.

    Transformers 5 reads them as before, which is checked. A kind of model that 4.57 does not know
    needs 5.
    """
    from transformers import AutoConfig

    def read() -> Any:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)

    def values(config: Any) -> dict[str, Any]:
        return {**config.to_dict(), "_name_or_path": None, "auto_map": None}

    path = folder / "config.json"
    before, text = read(), path.read_text(encoding="utf-8")
    config = json.loads(text)
    _own_code(config, folder)
    parts = [(config, before)]
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:  # a part, as a model's tower
            parts.append((value, getattr(before, key)))
    for part, known in parts:
        # experts are counted under one name for all models now, and under a model's own in 4.57
        for older, name in (getattr(known, "attribute_map", None) or {}).items():
            if "expert" in older and name in part:
                part.setdefault(older, part[name])
        kind = str(part.get("model_type", ""))
        part |= _rope_of_4(part.get("rope_parameters") or {}, kind)
    write_json(path, config)
    if values(read()) != values(before):
        path.write_text(text, encoding="utf-8")
        dist.log.info("config.json: its rotary embeddings can only be read by transformers 5")


def clean_tokenizer(folder: Path) -> None:
    """Take out of a saved tokenizer's configuration what is of this machine or unknown to 4.57."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # where and how it was loaded here says nothing about the export
    for key in ("is_local", "local_files_only", "backend"):
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the older name of the same class
    _own_code(config, folder)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)


def _own_code(config: dict[str, Any], folder: Path) -> None:
    """Let a configuration name the code that lies beside it, not the hub's."""

    def here(reference: Any) -> Any:
        if not isinstance(reference, str):  # a tokenizer names two classes, or None
            return [here(one) for one in reference] if isinstance(reference, list) else reference
        local = reference.rpartition("--")[2]
        return local if (folder / f"{local.partition('.')[0]}.py").is_file() else reference

    if "auto_map" in config:
        config["auto_map"] = {name: here(value) for name, value in config["auto_map"].items()}


def _rope_of_4(parameters: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the keys by which transformers 4 names what 5 has in `rope_parameters`."""
    found: dict[str, Any] = {}
    if "full_attention" in parameters:  # beside layers with a window
        if kind.startswith("gemma3"):
            found["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        elif kind != "olmo3":
            return found  # 4.57 does not know the kind
        parameters = parameters["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(key) is not None:
            found[key] = parameters[key]
    scaling = {key: value for key, value in parameters.items() if key not in found}
    if "rope_type" in scaling and scaling != {"rope_type": "default"}:
        found["rope_scaling"] = scaling
    return found
