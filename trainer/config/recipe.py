"""Define the recipe, of which a run is a function, and read it.

In: YAML and `key=value` overrides. Out: a frozen `Recipe`. Parsing has no side effects: it starts
no process group, makes no folder, calls no network. Each stage of a run receives its own section.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from packhorse.trainer.config.adapter import ADAPTER_LR, AdapterSection
from packhorse.trainer.config.base import Section
from packhorse.trainer.config.data import DataSection
from packhorse.trainer.config.eval import EvalSection
from packhorse.trainer.config.optim import OptimSection
from packhorse.trainer.config.packaged import RECIPES, find_recipe, locate_files
from packhorse.trainer.config.parallel import ParallelSection
from packhorse.trainer.config.parsing import (
    apply_override,
    describe_fault,
    join_faults,
    read_yaml,
    unfit_texts,
)
from packhorse.trainer.config.sections import (
    BatchSection,
    CheckpointSection,
    GuardSection,
    LossSection,
    ModelSection,
    RunSection,
    TrainSection,
)
from packhorse.trainer.datatypes import BadInput

# Sections and keys that may change when a run is resumed (C8): they do not change what is learned.
_FREE_SECTIONS = ("checkpoint", "eval", "guard", "run")
_FREE_KEYS = {
    "model": (
        *("activation_checkpointing", "attention", "compile", "layer_kernels"),
        "trust_remote_code",
    ),
    "data": (*("eval", "max_leakage", "cache", "workers", "max_rejects", "broken_lines"),),
    "batch": ("micro_batch_size",),
    "loss": ("kernel",),
    "train": ("max_hours",),
    "parallel": ("deepspeed", "allow_idle_ranks", "sequence", "sequence_kind"),
}


class Recipe(Section):
    """All sections of a recipe, and the checks that concern more than one of them."""

    model: ModelSection
    adapter: AdapterSection | None = None
    data: DataSection
    batch: BatchSection = BatchSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    guard: GuardSection = GuardSection()
    run: RunSection

    @model_validator(mode="before")
    @classmethod
    def _set_adapter_lr(cls, tree: Any) -> Any:
        optim = (tree.get("optim") or {}) if isinstance(tree, dict) else None
        if isinstance(optim, dict) and tree.get("adapter") is not None:
            return {**tree, "optim": {"lr": ADAPTER_LR, **optim}}
        return tree

    def check(self) -> None:
        if self.adapter and self.model.add_tokens:
            raise ValueError(
                "model.add_tokens: an adapter does not hold the embeddings of new tokens, so that "
                "nobody who loads it has them; train all weights, or take a model that has the "
                "tokens"
            )
        if self.adapter and self.adapter.base and self.model.matmul == "fp8_rowwise":
            raise ValueError(
                f"adapter.base: the products with weights in 4 bits ({self.adapter.base}) are not "
                "made in fp8; remove adapter.base, or set model.matmul to bf16"
            )
        if self.loss.router_aux is not None and self.model.compile:
            raise ValueError(
                "loss.router_aux needs the routers' own forward; remove it, or model.compile"
            )
        if self.checkpoint.mirror is not None and self.batch.micro_batch_size == "auto":
            raise ValueError(
                "batch.micro_batch_size: auto is chosen before checkpoint.mirror brings the run "
                "folder, which holds what was chosen before; give the number"
            )
        self._check_lengths()
        self._check_held_out()
        if self.streaming:
            self._check_streaming()

    def _check_lengths(self) -> None:
        cuts_rows = self.data.packing in ("bfd_split", "wrapped")
        if self.data.max_length and self.data.max_length > self.batch.seq_len and not cuts_rows:
            raise ValueError(
                f"data.max_length ({self.data.max_length}) is more than batch.seq_len "
                f"({self.batch.seq_len}): an example must fit in a packed sequence; raise seq_len, "
                f"or use `packing: bfd_split`"
            )
        if self.data.split_context and self.max_length < self.data.split_context + 2:
            raise ValueError(
                f"data.split_context ({self.data.split_context}) leaves no room for anything new "
                f"in {self.max_length} tokens; lower it"
            )

    def _check_held_out(self) -> None:
        if any(source.streaming for source in self.data.eval):
            raise ValueError("data.eval: a held-out source cannot be streamed; its rows must stay")
        for key in ("generate", "best", "early_stopping"):
            if getattr(self.eval, key) and not self.has_eval:
                raise ValueError(
                    f"eval.{key}: there are no held-out rows; give data.eval or "
                    f"data.eval_fraction, or leave eval.{key} out"
                )

    def _check_streaming(self) -> None:
        if len(self.data.train) > 1:
            raise ValueError(
                "data.train: a streamed source must be the only one; put all files in its folder"
            )
        if self.data.eval_fraction:
            raise ValueError(
                "data.eval_fraction: rows of a later shard cannot be held out; give data.eval "
                "instead"
            )
        if self.train.steps is None:
            raise ValueError(
                "data.train.0.streaming: a streamed source has no last row; say how long to train "
                "in train.steps"
            )
        if self.train.epochs != 1:
            raise ValueError(
                "train.epochs: a streamed source has no epochs; leave it out, train.steps counts"
            )

    @property
    def streaming(self) -> bool:
        """Whether the training data is streamed, and may grow during the run (C1)."""
        return any(source.streaming for source in self.data.train)

    @property
    def has_eval(self) -> bool:
        """Whether there are held-out rows."""
        return bool(self.data.eval or self.data.eval_fraction)

    @property
    def max_length(self) -> int:
        """Most tokens of an example."""
        return self.data.max_length or self.batch.seq_len

    def fixed(self) -> dict[str, Any]:
        """Return what may not change on a resume (C8), as flat keys: `optim.lr` -> 2e-5.

        `adapter` is one value: a section that is null has no keys to compare.
        """
        tree = self.model_dump(mode="json", exclude=set(_FREE_SECTIONS))
        fixed = {"adapter": tree.pop("adapter")} | {
            f"{section}.{key}": value
            for section, values in tree.items()
            for key, value in values.items()
            if key not in _FREE_KEYS.get(section, ())
        }
        # the share may change, and not which rows are trained
        return fixed | {"data.max_leakage": "drop" if self.data.max_leakage == "drop" else "stop"}

    def to_yaml(self) -> str:
        """Return the resolved recipe, defaults included, as `load_recipe` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `a.b=value` overrides, whose values are YAML.

    Items of a list go by number: `data.train.0.path=x`. Relative paths start at the current folder,
    but those of a packaged recipe's own model and data at the package.

    Args:
        path: of the file, or the name of a packaged recipe, as `debug`.

    Raises:
        BadInput: the file is missing or not YAML, a key is unknown or given twice, or a value does
            not fit.
    """
    file = find_recipe(path)
    tree = read_yaml(file)
    if file.parent == RECIPES:
        tree = locate_files(tree)
    if not isinstance(tree, dict):
        raise BadInput(
            f"{path}: a recipe is a mapping of sections; start from recipes/quickstart.yaml"
        )
    faults = []
    for override in overrides:
        try:
            apply_override(tree, override)
        except BadInput as error:
            faults.append(str(error))
    return parse_recipe(tree, str(path), faults)


def parse_recipe(
    tree: dict[str, Any], where: str = "recipe", faults: list[str] | None = None
) -> Recipe:
    """Validate a plain tree. Raises BadInput with all faults, those that are known among them.

    Args:
        where: the name of the recipe, for the message.
    """
    faults = [*(faults or ()), *unfit_texts(tree)]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
        for fault in found:
            # pydantic counts items that have faults as missing from their list
            within = [other for other in found if other["loc"][: len(fault["loc"])] == fault["loc"]]
            if fault["type"] != "too_short" or len(within) == 1:
                faults += describe_fault(fault, Recipe)
    if faults:
        raise BadInput(join_faults(where, faults))
    return recipe
