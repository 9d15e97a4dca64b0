"""The recipe: what a run is a function of.

YAML and `key=value` overrides in, a frozen `Recipe` out. Parsing has no side effects: no process
group, no folder, no network. Each stage receives its own section only.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from trainer.config.base import Section, items_of, kind_of, sections_of
from trainer.config.data import DataSection
from trainer.config.eval import EvalSection
from trainer.datatypes import BadInput
from trainer.utils.text import one_line


class ModelSection(Section):
    """Which model is trained, and how it runs."""

    name: str = Field(description="A Hugging Face folder or hub name.")
    revision: str | None = Field(default=None, description="The hub's branch, tag or commit.")
    init: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="random: only the configuration and tokenizer are read; weights follow "
        "train.seed.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="bfloat16 trains on fp32 master weights; float32 is for exact comparisons.",
    )
    attention: Literal["auto", "flash_attn", "torch_varlen", "reference"] = Field(
        default="auto",
        description="The varlen kernel. auto: flash_attn, else torch's own on CUDA, else the "
        "reference.",
    )
    layer_kernels: Literal["auto", "liger", "torch"] = Field(
        default="auto",
        description="Norms, rotary positions and gated activations by Liger's kernels, proved at "
        "the start. auto: on "
        "CUDA in bfloat16, where Liger knows the model.",
    )
    activation_checkpointing: Literal["none", "full"] = Field(
        default="full",
        description="full: keep each layer's input alone and compute the rest again in the "
        "backward: less memory, "
        "about a third more compute.",
    )
    add_tokens: tuple[str, ...] = Field(
        default=(),
        description="Special tokens to add to a base model; new embedding rows start at the mean "
        "of the old.",
    )
    chat_template: str | None = Field(
        default=None,
        description="A Jinja file, or `chatml`, in place of the tokenizer's own template.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Runs the model's own Python code. Read it first."
    )


ADAPTER_LR = 1e-4  # the rate where an adapter is trained and the recipe gives none


class AdapterSection(Section):
    """LoRA: the model stays as it is, small matrices beside its linear modules are trained. null:
    all its weights.
    """

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(
        default=32,
        ge=1,
        description="What the matrices add is multiplied by alpha / rank. Left alone it keeps the "
        "best learning rate "
        "alike for all ranks.",
    )
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear",
        description="all-linear: every linear module but the head; a list of names or their ends, "
        "as "
        "`[q_proj, v_proj]`; or a regular expression that must match a whole name.",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Of what goes into the matrices (C3)."
    )
    rslora: bool = Field(default=False, description="alpha / sqrt(rank) instead, for high ranks.")
    dora: bool = Field(
        default=False, description="The size of each of a weight's rows is learned apart (DoRA)."
    )
    modules_to_save: tuple[str, ...] = Field(
        default=(),
        description="Modules that are trained whole and saved with the adapter, as `[embed_tokens, "
        "lm_head]`.",
    )
    base: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: the linear modules lie in 4 bits (QLoRA), by the library bitsandbytes; "
        "at ZeRO stages 0 "
        "to 2.",
    )
    double_quant: bool = Field(
        default=False, description="Of nf4: its scales lie in 8 bits, 0.37 bits a weight less."
    )

    @model_validator(mode="after")
    def _usable(self) -> AdapterSection:
        if not self.target_modules:
            raise ValueError("`target_modules` names nothing; give `all-linear`, or names")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"`{self.target_modules}` is not a regular expression: {error}"
                ) from None
        if self.double_quant and self.base is None:
            raise ValueError("`double_quant` belongs to `base: nf4`")
        if self.dora and self.base is not None:
            raise ValueError(
                "`dora` needs the norms of the weights, and is not proved with `base: nf4`; take "
                "one of them"
            )
        return self


class BatchSection(Section):
    """The batch of one optimizer step, whatever the number of GPUs."""

    seq_len: int = Field(default=8192, ge=2, description="Most tokens of a packed row.")
    global_batch_size: int = Field(
        default=64, ge=1, description="Most rows of an optimizer step, over all ranks."
    )
    micro_batch_size: int = Field(default=1, ge=1, description="Rows that one rank runs at once.")


class LossSection(Section):
    """The objective (C2)."""

    weighting: Literal["token", "example", "constant"] = "token"
    constant_tokens: int | None = Field(default=None, ge=1, description="K of `constant`.")
    neftune_alpha: float = Field(
        default=0.0, ge=0, description="NEFTune noise; 0 is off, 5 is usual."
    )
    kernel: Literal["auto", "liger", "chunked", "reference"] = Field(
        default="auto", description="auto: liger on CUDA, else chunked."
    )

    @model_validator(mode="after")
    def _k_given(self) -> LossSection:
        if (self.weighting == "constant") != (self.constant_tokens is not None):
            raise ValueError(
                "`constant_tokens` belongs to `weighting: constant`, and must be given there"
            )
        return self


class OptimSection(Section):
    """AdamW and its schedule; the learning rate is a function of the step alone."""

    lr: float = Field(
        default=2e-5, gt=0, description=f"With an `adapter` the default is {ADAPTER_LR:g}."
    )
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(
        default=0.1, ge=0, description="On matrices; never on norms and biases."
    )
    decay_embeddings: bool = Field(
        default=True, description="Whether the embeddings count as matrices."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps.")
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    wsd_decay: float = Field(
        default=0.2, gt=0, le=1, description="Share of the steps in which wsd goes down."
    )
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, description="Largest gradient norm of a step.")


class TrainSection(Section):
    """How long, and from which seed."""

    epochs: int = Field(default=1, ge=1)
    steps: int | None = Field(
        default=None, ge=1, description="Exactly so many steps, whatever `epochs` says."
    )
    seed: int = 0


class ParallelSection(Section):
    """What the hardware decides; nothing here changes what is learned."""

    deepspeed: str = Field(default="ds_configs/zero3.json", description="A DeepSpeed template.")
    grad_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Of accumulation and reduction; bfloat16 makes the batch's cutting change the "
        "run.",
    )
    sequence: Literal[1] = 1
    allow_idle_ranks: bool = Field(
        default=False, description="Allow more ranks than a step has micro-batches."
    )


class CheckpointSection(Section):
    every_steps: int | None = Field(
        default=None, ge=1, description="Between checkpoints; the last step always saves."
    )
    keep: int = Field(
        default=3, ge=1, description="Older ones are removed once a new one is whole."
    )
    asynchronous: bool | None = Field(
        default=None,
        description="Written beside training, from a copy in the host's memory. null: where half "
        "of it stays free.",
    )
    before_timeout_s: float | None = Field(
        default=None,
        ge=0,
        description="Save and stop so long before the end of the Slurm job, where that is known.",
    )


class RunSection(Section):
    dir: str = Field(description="The run folder; on more than one node a shared one.")
    log_every: int = Field(default=1, ge=1)
    trace: bool = Field(
        default=False,
        description="trace.jsonl: the documents, loss, norm and settings of each step.",
    )
    stop_after: int | None = Field(
        default=None,
        ge=1,
        description="Save and leave after so many steps, as on a signal; the schedule stays.",
    )


Rule = Literal["stop", "skip", "rollback"]


class GuardSection(Section):
    """What is done when a run goes wrong. rollback: from the last checkpoint again, and then
    without the step.
    """

    non_finite: Rule = Field(
        default="stop", description="With a step whose gradient is not finite."
    )
    spike: Rule = Field(default="stop", description="With a step whose loss is a spike.")
    spike_factor: float | None = Field(
        default=None, gt=1, description="A spike is so many times the median of the last 50 losses."
    )
    max_skipped_steps: int = Field(
        default=3, ge=0, description="Steps that are passed over, before the run stops after all."
    )
    hang_factor: float = Field(
        default=10.0,
        gt=1,
        description="Nothing moves for so many times as long as usual: the run hangs, and is ended.",
    )
    hang_floor_s: float = Field(
        default=900.0, gt=0, description="But never before so many seconds."
    )


class ProfileSection(Section):
    """torch.profiler: a trace of `steps` steps from step `start`, in the run folder."""

    start: int = Field(ge=1)
    steps: int = Field(default=1, ge=1)


class Recipe(Section):
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
    profile: ProfileSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _rate_of_an_adapter(cls, tree: Any) -> Any:
        optim = (tree.get("optim") or {}) if isinstance(tree, dict) else None
        if isinstance(optim, dict) and tree.get("adapter") is not None:
            return {**tree, "optim": {"lr": ADAPTER_LR, **optim}}
        return tree

    @model_validator(mode="after")
    def _adapter_fits(self) -> Recipe:
        if self.adapter and self.model.add_tokens:
            raise ValueError(
                "model.add_tokens: the new rows of the embeddings lie outside an adapter, and "
                "nobody who loads it has "
                "them; train all weights, or take a model that has the tokens"
            )
        return self

    @model_validator(mode="after")
    def _lengths_agree(self) -> Recipe:
        cuts_rows = self.data.packing in ("bfd_split", "wrapped")
        if self.data.max_length and self.data.max_length > self.batch.seq_len and not cuts_rows:
            raise ValueError(
                f"data.max_length ({self.data.max_length}) is more than batch.seq_len "
                f"({self.batch.seq_len}): "
                "an example must fit in a row; raise seq_len, or use `packing: bfd_split`"
            )
        if self.data.split_context and self.max_length < self.data.split_context + 2:
            raise ValueError(
                f"data.split_context ({self.data.split_context}) leaves no room for anything new "
                f"in "
                f"{self.max_length} tokens; lower it"
            )
        return self

    @model_validator(mode="after")
    def _prompts_are_held_out(self) -> Recipe:
        if self.eval.generate and not self.has_eval:
            raise ValueError(
                "eval.generate: no rows are held out to ask; give data.eval or data.eval_fraction, "
                "or take it out"
            )
        return self

    @model_validator(mode="after")
    def _growth_is_bounded(self) -> Recipe:
        if any(source.streaming for source in self.data.eval):
            raise ValueError(
                "data.eval: held-out rows must stay the same, so no source of them may grow"
            )
        if self.streaming:
            if len(self.data.train) > 1:
                raise ValueError(
                    "data.train: a source that grows must be the only one; put all files in its "
                    "folder"
                )
            if self.data.eval_fraction:
                raise ValueError(
                    "data.eval_fraction: a later shard's rows could not be held out; give "
                    "data.eval instead"
                )
            if self.train.steps is None:
                raise ValueError(
                    "data.train.0.streaming: a source that grows has no last row; say how long in "
                    "train.steps"
                )
            if self.train.epochs != 1:
                raise ValueError(
                    "train.epochs: a source that grows has no epochs; take it out, train.steps "
                    "says all"
                )
        return self

    @model_validator(mode="after")
    def _best_has_rows(self) -> Recipe:
        if self.eval.best and not self.has_eval:
            raise ValueError(
                "eval.best: no rows are held out to evaluate; give data.eval or data.eval_fraction"
            )
        return self

    @property
    def streaming(self) -> bool:
        """Whether the training data grows while it is trained on (C1)."""
        return any(source.streaming for source in self.data.train)

    @property
    def has_eval(self) -> bool:
        """Whether rows are held out."""
        return bool(self.data.eval or self.data.eval_fraction)

    @property
    def max_length(self) -> int:
        """Most tokens of an example."""
        return self.data.max_length or self.batch.seq_len

    def fixed(self) -> dict[str, Any]:
        """What may not change when a run is resumed (C8), as flat keys: `optim.lr` -> 2e-5."""
        tree = self.model_dump(mode="json")
        free = {
            "model": (
                "activation_checkpointing",
                "attention",
                "layer_kernels",
                "trust_remote_code",
            ),
            "data": (
                "eval",
                "near_duplicate",
                "max_leakage",
                "cache",
                "workers",
                "max_rejects",
                "broken_lines",
            ),
            "batch": ("micro_batch_size",),
            "loss": ("kernel",),
            "parallel": ("deepspeed", "sequence", "allow_idle_ranks"),
        }
        for section in ("checkpoint", "eval", "guard", "run", "profile"):
            del tree[section]
        return {
            "adapter": tree.pop("adapter")
        } | {  # whole: a section that is not there has no keys to compare
            f"{section}.{key}": value
            for section, values in tree.items()
            for key, value in values.items()
            if key not in free.get(section, ())
        }

    def to_yaml(self) -> str:
        """The resolved recipe, defaults included, as `load` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------------------ reading


# Keys that had another name before the first release, without the numbers of a list's items; a
# scorer stands by its kind.
RENAMED_KEYS = {
    "batch.row_tokens": "`batch.seq_len`",
    "batch.rows_per_step": "`batch.global_batch_size`",
    "batch.rows_per_micro": "`batch.micro_batch_size`",
    "data.max_tokens": "`data.max_length`",
    "data.train.grows": "`data.train[].streaming`",
    "data.eval.grows": "`data.eval[].streaming`",
    "model.recompute": "`model.activation_checkpointing: none | full`",
    "model.layers": "`model.layer_kernels: auto | liger | torch`",
    "optim.clip": "`optim.max_grad_norm`",
    "optim.warmup": "`optim.warmup_ratio`",
    "optim.schedule": "`optim.lr_schedule`",
    "adapter.targets": "`adapter.target_modules`",
    "adapter.save_modules": "`adapter.modules_to_save`",
    "adapter.double_quantisation": "`adapter.double_quant`",
    "eval.generate.rows": "`eval.generate.num_prompts`",
    "eval.generator": "decided by `eval.server` and `eval.vllm_python`: the one that is given "
    "answers, else the engine",
    "eval.lm_eval_path": "a part of the task's name: `eval.lm_eval: [FOLDER/TASK]`",
    "eval.server.patience_s": "`eval.server.timeout_s`, which limits an answer and its retries",
    "eval.generate.scorers.contains.text": "`kind: format` with the pattern `.*TEXT.*`",
    "eval.generate.scorers.json_schema.tools": "`kind: tool_call`",
    "eval.generate.scorers.refusal.column": "`expected: COLUMN`",
    "eval.generate.scorers.judge.endpoint": "a part of the scorer: `url`, `model` and the other "
    "keys of `endpoint` stand beside `rubric`",
    "eval.generate.scorers.judge.grades": "always 5",
    "eval.generate.scorers.judge.max_tokens": "a field of the request: `extra: {max_tokens: 4096}`",
    "guard.at_most": "`guard.max_skipped_steps`",
}


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `a.b=value` overrides (values are YAML; list items by number:
    `data.train.0.path=x`).

    Raises:
        BadInput: the file is missing or not YAML, a key is unknown or given twice, or a value does
            not fit.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the recipe cannot be read ({error})") from None
    try:
        tree = yaml.load(text, Loader=UniqueKeys)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise BadInput(
            f"{path}: a recipe is a mapping of sections; start from recipes/quickstart.yaml"
        )
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, where=str(path))


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a plain tree. Raises BadInput with every fault in one line."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(_fault(fault) for fault in error.errors())
        raise BadInput(f"{where}: {faults}") from None


class UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key `{key}` is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput(f"override `{override}`: write key=value, as optim.lr=1e-5")
    try:
        value = yaml.load(text, Loader=UniqueKeys)  # noqa: S506 - a SafeLoader
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
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(items: list[Any], text: str, override: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise BadInput(f"override `{override}`: `{text}` is not an item of a list of {len(items)}")
    return int(text)


def _fault(fault: Any) -> str:
    """One pydantic fault as `section.key: what is wrong`, with the nearest right name for an
    unknown one.
    """
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        parents, sections = _follow(path[:-1])
        names = [key for key in [*parents, path[-1]] if not key.isdigit()]
        if names[:3] == ["eval", "generate", "scorers"] and len(names) > 4:
            names[3] = str(kind_of(sections[0]))
        if renamed := RENAMED_KEYS.get(".".join(names)):
            return f"`{'.'.join([*parents, path[-1]])}` is now {renamed}"
        return _unknown(
            "key", path[-1], list(sections[0].model_fields), "".join(f"{key}." for key in parents)
        )
    keys, sections = _follow(path)
    place = ".".join(keys) or "recipe"
    if fault["type"] == "union_tag_invalid":
        return f"`{place}`: " + _unknown(
            "kind", fault["ctx"]["tag"], [kind_of(section) for section in sections]
        )
    if fault["type"] == "union_tag_not_found":
        return f"`{place}.kind` is missing; kinds: {', '.join(str(kind_of(section)) for section in sections)}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"`{place}` is missing"
    given = fault.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"`{place}`: {message[0].lower()}{message[1:]}{shown}"


def _unknown(what: str, name: str, known: list[Any], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {what} `{prefix}{name}`; " + (
        f"did you mean `{prefix}{near[0]}`?" if near else f"{what}s here: {', '.join(known)}"
    )


def _follow(path: list[str]) -> tuple[list[str], list[type[Section]]]:
    """Where pydantic's path leads: the keys as they stand in the recipe, and the section there, or
    those of a union.

    In a union pydantic names the kind, too, which is no key.
    """
    keys: list[str] = []
    place: Any = Recipe
    for part in path:
        sections, items = sections_of(place), items_of(place)
        if len(sections) > 1:
            place = next((section for section in sections if kind_of(section) == part), None)
            continue
        keys.append(part)
        field = sections[0].model_fields.get(part) if sections else None
        place = field.annotation if field else items
    return keys, sections_of(place)
