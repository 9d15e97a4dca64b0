"""Read YAML and overrides, and put the faults that pydantic finds into sentences.

In: a recipe's text and `key=value` arguments. Out: a plain tree of values; for a fault, a sentence
that names the key, what is wrong with it and the nearest right name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from packhorse.trainer.config import foreign_keys
from packhorse.trainer.config.base import Section, items_of, kind_of, sections_of
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.text import one_line

# Keys that had another name, or became part of another key, before the first release. The numbers
# of a list's items and the names in a mapping are left out. Values continue "`KEY` is now ".
RENAMED_KEYS = {
    "batch.row_tokens": "`batch.seq_len`",
    "batch.rows_per_step": "`batch.global_batch_size`",
    "batch.rows_per_micro": "`batch.micro_batch_size`",
    "data.max_tokens": "`data.max_length`",
    "data.cut_answers": "`data.too_long: truncate_anywhere`",
    "data.group_by": "a key of each source: `data.train[].group_by`",
    "data.leakage": "`data.max_leakage: drop`",
    "data.near_duplicate": "always 0.8: leave it out",
    "data.shard_rows": "always 10,000: leave it out",
    "data.train_trailing_newline": "`data.train_on_eot: with_newline`",
    "data.train.grows": "`data.train[].streaming`",
    "data.eval.grows": "`data.eval[].streaming`",
    "data.train.filters.verify": "`math_answer`, which names the column of the right answer",
    "data.train.filters.reference": "`math_answer`",
    "data.train.filters.not_pattern": r"`pattern: '(?s)\A(?!.*TEXT)'`",
    "data.eval.filters.not_pattern": r"`pattern: '(?s)\A(?!.*TEXT)'`",
    "data.eval.filters.verify": "`math_answer`, which names the column of the right answer",
    "data.eval.filters.reference": "`math_answer`",
    "model.recompute": "`model.activation_checkpointing: none | selective | full | auto`",
    "model.layers": "`model.layer_kernels: auto | liger | torch`",
    "optim.clip": "`optim.max_grad_norm`",
    "optim.warmup": "`optim.warmup_ratio`",
    "optim.schedule": "`optim.lr_schedule`",
    "loss.constant_tokens": "the number itself: `loss.weighting: 4096`",
    "adapter.targets": "`adapter.target_modules`",
    "adapter.save_modules": "`adapter.modules_to_save`",
    "adapter.rslora": "`adapter.variants: [rslora]`",
    "adapter.dora": "`adapter.variants: [dora]`",
    "adapter.double_quantisation": "`adapter.base: nf4_double_quant`",
    "adapter.double_quant": "`adapter.base: nf4_double_quant`",
    "eval.generate.batch": "decided by the lengths of the prompts: leave it out",
    "eval.generate.rows": "`eval.generate.num_prompts`",
    "eval.generator": "decided by `eval.server` and `eval.vllm_python`: the one that is given "
    "answers, else the engine",
    "eval.lm_eval_path": "a part of the task's name: `eval.lm_eval: [FOLDER/TASK]`",
    "eval.server.parallel": "always 16: leave it out, or raise `timeout_s` if the server is slow",
    "eval.server.patience_s": "`eval.server.timeout_s`, which limits an answer and its retries",
    "eval.generate.scorers.text": "`kind: format` with the pattern `.*TEXT.*`",
    "eval.generate.scorers.ignore_case": "`ignore: [case]`",
    "eval.generate.scorers.ignore_space": "`ignore: [space]`",
    "eval.generate.scorers.tools": "`kind: tool_call`",
    "eval.generate.scorers.column": "`expected: COLUMN` of `kind: refusal`",
    "eval.generate.scorers.endpoint": "a part of the scorer: `url`, `model` and the other keys of "
    "`endpoint` stand beside `rubric`",
    "eval.generate.scorers.parallel": "always 16: leave it out, or raise `timeout_s` if the server "
    "is slow",
    "eval.generate.scorers.grades": "always 5: leave it out",
    "eval.generate.scorers.max_tokens": "a field of the request: `extra: {max_tokens: 4096}`",
    "eval.best.maximize": "`eval.best.metric`: of a scorer the highest value wins",
    "eval.best.minimize": "`eval.best.metric`: of eval_loss the lowest value wins",
    "guard.at_most": "`guard.max_skipped_steps`",
    "guard.hang_floor_s": "`guard.hang_timeout_s`",
    "guard.hang_factor": "always 10: leave it out, or raise `guard.hang_timeout_s`",
    "profile": "`run.profile_steps: [first, last]`",
}


MAX_DEPTH, MAX_VALUES = 64, 100_000  # of a recipe's values: far more than any has
_MOST_CHARACTERS = 1_000_000  # of a YAML file
_SHOWN = 100  # characters of a wrong value


class UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, of which YAML keeps the last in silence, and
    text that is small as YAML alone: nested without end, or unfolding by aliases of aliases."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _unfolded(node, {}) > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"its aliases unfold to more than {MAX_VALUES:,}")
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"values are nested more than {MAX_DEPTH} deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # here, as keys that `<<` merges from another mapping come later, and may stand there, too
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key `{key.value}` is given twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return node


def _unfolded(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node stands for where each alias is written out; infinitely many if
    it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # while its children are counted
        pairs = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [each for pair in pairs for each in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_unfolded(each, known) for each in inner)
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises YAMLError if it is none."""
    try:
        return yaml.load(text, Loader=UniqueKeys)  # noqa: S506 - a SafeLoader
    # PyYAML's own for a tag that does not fit its value, a date that is none, a key that is a list
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(error) from None


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises BadInput if it cannot be read."""
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise BadInput(f"{path}: is no plain file; give one, as its copy")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:  # as of /dev/zero, or of data that is taken for a recipe
            raise BadInput(f"{path}: has more than {_MOST_CHARACTERS:,} characters; give a recipe")
        return parse_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the file cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not valid YAML: {one_line(error)}") from None


# ---------------------------------------------------------------------------------------- overrides


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of the tree, as `optim.lr=1e-5`; items of a list go by number.

    Raises:
        BadInput: it is not `key=value`, its value is not YAML, or its path leads through a value.
    """
    key, equals, text = override.partition("=")
    override = override[:_SHOWN]  # in messages
    if not equals or not key:
        raise BadInput(f"override `{override}`: write key=value, as optim.lr=1e-5")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise BadInput(f"override `{override}`: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list):
            node = node[_index(node, parent, override)]
            continue
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict | list):
            raise BadInput(f"override `{override}`: `{parent}` is a value, not a section")
    place: Any = _index(node, last, override) if isinstance(node, list) else last
    node[place] = value


def _index(items: list[Any], text: str, override: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(items):
        raise BadInput(f"override `{override}`: `{text}` is not an item of a list of {len(items)}")
    return int(text)


# ------------------------------------------------------------------------------------------- faults


def describe_fault(fault: Any, recipe: type[Section]) -> list[str]:
    """Return a fault of `ValidationError.errors()` as sentences, as `section.key: what is wrong`.

    There are several only for an unknown section whose keys are another trainer's.
    """
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        return _unknown_key(path, fault["input"], recipe)
    keys, _, sections = _follow(path, recipe)
    place = ".".join(keys) or "recipe"
    kinds = [kind_of(section) for section in sections]
    if fault["type"] == "union_tag_invalid":
        return [f"`{place}`: {_unknown('kind', fault['ctx']['tag'], kinds)}"]
    if fault["type"] == "union_tag_not_found":
        return [f"`{place}.kind` is missing; kinds: {', '.join(map(str, kinds))}"]
    if fault["type"] == "missing":
        return [f"`{place}` is missing"]
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "model_type" and sections:
        inside = ", ".join(f"{place}.{name}" for name in sections[0].model_fields)
        message = f"it is a section, of {inside}"
    given = fault.get("input")
    shown = f" (got {_shown(given)})" if isinstance(given, str | int | float | bool) else ""
    return [f"`{place}`: {message[0].lower()}{message[1:]}{shown}"]


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes integers up to a limit of digits only
        return "a number of too many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all values in a tree; items of a list go by number."""
    if isinstance(tree, dict | list) and tree:
        for name, inner in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(inner, f"{place}.{name}" if place else str(name))
    else:
        yield place, tree


def unfit_texts(tree: Any) -> list[str]:
    """Return a fault for each text that neither a file's name nor UTF-8 can hold."""
    return [
        f"`{place}`: it holds a character that no file can hold: {_shown(text)}"
        for place, text in leaves(tree)
        if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text)
    ]


def join_faults(where: str, faults: list[str]) -> str:
    """Return a message with a line for each fault; a single one stands behind `where`."""
    if len(faults) == 1:
        return f"{where}: {faults[0]}"
    return "\n  ".join([f"{where}: {len(faults)} faults", *faults])


def _unknown_key(path: list[str], value: Any, recipe: type[Section]) -> list[str]:
    *parents, key = path
    keys, names, sections = _follow(parents, recipe)
    prefix = "".join(f"{parent}." for parent in keys)
    if renamed := RENAMED_KEYS.get(".".join([*names, key])):
        return [f"`{prefix}{key}` is now {renamed}"]
    if isinstance(value, dict):
        # a section of another trainer, such as torchtitan's `training`
        inner = [_elsewhere([*names, key, str(name)], recipe) for name in value]
        if any(inner):
            return [sentence for sentence in inner if sentence]
    if found := _elsewhere([*names, key], recipe):
        return [found]
    return [_unknown("key", key, list(sections[0].model_fields), prefix)]


def _elsewhere(names: list[str], recipe: type[Section]) -> str | None:
    """Answer a key that another trainer has, or that the recipe has in another section alone."""
    if found := foreign_keys.answer(names):
        return found
    places = [key for key in keys_of(recipe) if key.rpartition(".")[2] == names[-1]]
    if names[-1] == "lr":
        places = ["optim.lr"]  # and not that of a group of parameters
    if len(places) == 1:
        return f"`{'.'.join(names)}` is `{places[0]}` here"
    return None


def keys_of(annotation: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a section, as `data.train[].path`; those of `data.train` stand for
    those of `data.eval`, and scorers are left out."""
    keys: list[str] = []
    for section in sections_of(annotation):
        for name, field in section.model_fields.items():
            key = f"{prefix}{name}"
            keys.append(key)
            if key not in ("data.eval", "eval.generate"):
                keys += keys_of(field.annotation, f"{key}.")
                keys += keys_of(items_of(field.annotation), f"{key}[].")
    return keys


def _unknown(what: str, name: str, known: list[Any], prefix: str = "") -> str:
    near = _nearest(name, known)
    return f"unknown {what} `{prefix}{name}`; " + (
        f"did you mean `{prefix}{near}`?" if near else f"{what}s here: {', '.join(known)}"
    )


def _nearest(name: str, known: list[Any]) -> str | None:
    """Return the known name that `name` misspells or abbreviates, if there is one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    swapped = [other for other in known if sorted(other) == sorted(name)]
    longer = [other for other in known if other.startswith(f"{name}_")]
    return next(iter([*near, *swapped, *(longer if len(longer) == 1 else [])]), None)


def _follow(
    path: list[str], recipe: type[Section]
) -> tuple[list[str], list[str], list[type[Section]]]:
    """Return where pydantic's path leads.

    Returns:
        The keys as they stand in the recipe; the same without the items of lists and mappings; the
        section there, or those of a union.
    """
    keys: list[str] = []
    names: list[str] = []
    place: Any = recipe
    for part in path:
        sections, items = sections_of(place), items_of(place)
        if len(sections) > 1:
            # pydantic's path names the kind that was chosen, which is no key of the recipe
            place = next((section for section in sections if kind_of(section) == part), None)
            continue
        keys.append(part)
        field = sections[0].model_fields.get(part) if sections else None
        if sections:
            names.append(part)
        place = field.annotation if field else items
    return keys, names, sections_of(place)
