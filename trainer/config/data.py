"""The recipe's section `data`: where rows come from, which of them are learned, and how they are
cut and packed.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from trainer.config.base import Section, check_function


class Filters(Section):
    """Which rows are not wanted, by their last answer (or text). They are counted apart from
    rejected ones.
    """

    answer_words: tuple[int, int] | None = Field(
        default=None, description="Fewest and most words, parted by white space, as `[3, 400]`."
    )
    pattern: str | None = Field(
        default=None, description="A regular expression that must be found in it."
    )
    not_pattern: str | None = Field(default=None, description="One that must not be found.")
    function: str | None = Field(
        default=None,
        description="`module:function` of your own: (row, flow.Conversation) -> True to keep it, "
        "False or a reason to "
        "leave it out. Found and trusted as data.train.function.",
    )
    verify: Literal["math"] | None = Field(
        default=None,
        description="math: it must come to the reference's value, by the library math-verify.",
    )
    reference: str | None = Field(
        default=None, description="The column that holds the right answer, for `verify`."
    )

    @model_validator(mode="after")
    def _usable(self) -> Filters:
        for pattern in (self.pattern, self.not_pattern):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"`{pattern}` is not a regular expression: {error}") from None
        if self.answer_words and not 0 <= self.answer_words[0] <= self.answer_words[1]:
            raise ValueError("`answer_words` is [fewest, most]")
        if (self.verify is None) != (self.reference is None):
            raise ValueError("`reference` belongs to `verify`, and must be given there")
        check_function(self.function)
        return self


class Source(Section):
    """Where rows come from: a file or folder (`path`), or a dataset of the hub (`name`)."""

    path: str | None = Field(
        default=None,
        description=".jsonl, .json or .parquet, a folder of them, or one that datasets has saved.",
    )
    name: str | None = Field(
        default=None,
        description="A dataset of the hub, or a folder of files, as datasets.load_dataset takes "
        "them.",
    )
    split: str = Field(default="train", description="Its split.")
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "prompt_completion",
        "instruction",
        "question_answer",
        "text",
    ] = Field(
        default="auto",
        description="auto: recognised from the columns of the first row; all rows must have it.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our name -> the file's, as `question: Problem`."
    )
    function: str | None = Field(
        default=None,
        description="`module:function` of your own, in place of a format: row (a dict) -> list of "
        "messages, or "
        "{messages, tools}. Your code is run: it is imported from the current folder or the "
        "environment, never from a "
        "folder of data. Its file is part of the cache's key, modules that it imports are not.",
    )
    filters: Filters = Filters()
    weight: float = Field(default=1.0, gt=0, description="round(weight x rows) rows an epoch (C1).")
    rows: int | None = Field(default=None, ge=1, description="Only the first so many rows.")
    streaming: bool = Field(
        default=False,
        description="Files are still added to the folder, each renamed into it when it is whole; "
        "or the dataset is "
        "read as a stream. Needs train.steps.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.name is None):
            raise ValueError("give exactly one of `path` and `name`")
        check_function(self.function)
        if self.function and (self.format != "auto" or self.columns):
            raise ValueError("`function` reads the row itself: leave out `format` and `columns`")
        if self.streaming and (self.weight != 1 or self.rows is not None):
            raise ValueError(
                "a source that grows is used as it comes: take out `weight` and `rows`"
            )
        return self


# Names that mean something to apply_chat_template itself, or that come from the row and the
# tokenizer.
NO_KWARGS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *(
        "continue_final_message",
        "sanitize_control_tokens",
        "return_assistant_tokens_mask",
        "tokenize",
        "padding",
    ),
    *("truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
}


class DataSection(Section):
    """Which tokens are learned, and how documents are laid into rows."""

    train: tuple[Source, ...] = Field(min_length=1, description="Where rows come from.")
    eval: tuple[Source, ...] = Field(default=(), description="Held-out rows, as `train`.")
    eval_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the train rows that are held out, besides `eval`: by a hash of what "
        "is in the row, so "
        "that no row changes sides when others are added or reordered.",
    )
    group_by: str | None = Field(
        default=None,
        description="A column; rows with the same value there stay on one side of `eval_fraction`.",
    )
    duplicates: Literal["keep", "drop"] = Field(
        default="keep",
        description="Train rows that are, token by token, an earlier one. Counted in either case.",
    )
    near_duplicate: float = Field(
        default=0.8,
        ge=0.5,
        le=1,
        description="Two rows are near-duplicates that share so much of what was said: common "
        "three-word sequences "
        "over all of theirs (Jaccard), system prompts and tool schemas left out.",
    )
    max_leakage: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="The run stops above this share of eval rows with a near-duplicate in train. "
        "Chance matches of "
        "short rows stay below it; of a real leak, as a copied file or a random split of repeated "
        "rows, more is found.",
    )
    train_on: Literal["all", "completion", "assistant", "last_turn"] = Field(
        default="assistant",
        description="all tokens, the last assistant turn after its prompt, every assistant turn.",
    )
    train_on_eot: bool = Field(
        default=True, description="The stop token after an answer is learned with it."
    )
    train_trailing_newline: bool = Field(
        default=False,
        description="So is the white space that a template writes after the stop token.",
    )
    control_tokens: Literal["reject", "text", "keep"] = Field(
        default="reject",
        description="A text that spells a control token: its row is left out; it stays text; it is "
        "the token.",
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Variables of the chat template, as `enable_thinking: false`: the same in "
        "training, evaluation and "
        "preview, and to be given when the model is used.",
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Of an example; batch.seq_len where it is not given."
    )
    too_long: Literal["reject", "truncate", "split"] = Field(
        default="reject",
        description="Of an example of more tokens. truncate keeps whole answers only; split makes "
        "documents of it.",
    )
    cut_answers: bool = Field(
        default=False, description="truncate may keep an answer without its end."
    )
    split_context: int = Field(
        default=0,
        ge=0,
        description="Tokens before a cut that split repeats, as context that is not learned again.",
    )
    packing: Literal["none", "bfd", "bfd_split", "wrapped", "greedy"] = Field(
        default="bfd",
        description="bfd keeps examples whole; bfd_split cuts long ones; wrapped fills every row "
        "to the end; greedy "
        "keeps them whole and packs as they come.",
    )
    broken_lines: Literal["stop", "reject"] = Field(
        default="stop",
        description="A row that cannot be read at all ends the preparation, or is rejected like "
        "others.",
    )
    max_rejects: float = Field(
        default=0.01, ge=0, le=1, description="The run stops above this share of rejected rows."
    )
    shard_rows: int = Field(
        default=10_000, ge=1, description="Rows of a stream that are packed together."
    )
    cache: str = Field(
        default="~/.cache/packhorse", description="Tokenized data; may be local to a node."
    )
    workers: int | None = Field(
        default=None, ge=1, description="Processes that tokenize; all cores where it is not given."
    )

    @model_validator(mode="after")
    def _keys_agree(self) -> DataSection:
        if self.group_by is not None and not self.eval_fraction:
            raise ValueError(
                "`group_by` says how `eval_fraction` splits, and must not be given without it"
            )
        if self.cut_answers and self.too_long != "truncate":
            raise ValueError("`cut_answers` belongs to `too_long: truncate`")
        if taken := sorted(NO_KWARGS & set(self.chat_template_kwargs)):
            raise ValueError(
                f"`chat_template_kwargs` cannot hold {', '.join(taken)}: they come from the rows, "
                f"the tokenizer and "
                "packhorse itself"
            )
        if self.split_context and (self.too_long != "split" or self.packing == "wrapped"):
            raise ValueError(
                "`split_context` belongs to `too_long: split`, without `packing: wrapped`, which "
                "cuts anew"
            )
        return self
