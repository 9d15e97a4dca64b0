"""Define the recipe's section `data`: where rows come from, which tokens are trained, and how
documents are cut and packed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator

from packhorse.trainer.config.base import (
    FunctionName,
    Pattern,
    Section,
    check_belongs,
    check_one_given,
    share_or,
)
from packhorse.trainer.utils.remote import check_url, is_url


class Filters(Section):
    """Rows to leave out, judged by their last answer (or by their text). They are counted as
    filtered, not as rejected.
    """

    answer_words: tuple[int, int] | None = None
    """Fewest and most words, split at white space, as `[3, 400]`."""
    pattern: Pattern | None = None
    """Regular expression that must match somewhere in the answer; `(?s)\\A(?!.*TEXT)` matches where
    TEXT is nowhere."""
    function: FunctionName | None = None
    """Function of yours, as `module:function`: (row, packhorse.trainer.datatypes.Conversation) ->
    True to keep the row, False or a reason to leave it out. See data.train.function for where it is
    imported from."""
    math_answer: str | None = None
    """Column of the right answer. Keep rows whose answer has the same value, by the library
    math-verify."""

    def check(self) -> None:
        if self.answer_words and not 0 <= self.answer_words[0] <= self.answer_words[1]:
            raise ValueError("`answer_words` is [fewest, most]")


class Source(Section):
    """Where rows come from: files (`path`), or what datasets.load_dataset loads (`name`)."""

    path: str | None = None
    """A .jsonl, .json, .csv, .tsv or .parquet file (all but Parquet also as .gz, .zst, .bz2 or
    .xz), a folder of one kind of them, or a folder saved by datasets' save_to_disk; or the URL of
    one of these, as `s3://bucket/rows.jsonl`."""
    name: str | None = None
    """Dataset on the Hugging Face hub, or a folder, as datasets.load_dataset takes it."""
    config: str | None = None
    """Configuration (subset) of the dataset, the second argument of load_dataset."""
    data_files: tuple[str, ...] = ()
    """Files of the dataset or folder to read, as names or patterns relative to it. All of them are
    the split `train`."""
    revision: str | None = None
    """Branch, tag or commit of the dataset on the hub."""
    split: str = "train"
    """Split of the dataset or folder. Files in a folder belong to splits by their names, as
    load_dataset sees it: test.jsonl to `test`, and those without such names to `train`."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "prompt_completion",
        "instruction",
        "question_answer",
        "text",
    ] = "auto"
    """Format of the rows. auto: recognised from the columns of the first row; all rows must have
    it."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns with other names: the format's name -> the file's, as `question: Problem`."""
    function: FunctionName | None = None
    """Function of yours instead of a format, as `module:function`: row (a dict) -> a list of
    messages, or {messages, tools}. It is imported from the current folder or the environment, never
    from a folder of data, and runs with your rights. The cache is made anew when its file changes,
    not when a module that it imports changes."""
    filters: Filters = Filters()
    """Rows of this source to leave out."""
    weight: float = Field(default=1.0, gt=0)
    """Sampling weight: an epoch has round(weight x rows) rows of this source (C1)."""
    group_by: str | None = None
    """Column for `data.eval_fraction`: rows of this source with the same value are held out
    together."""
    rows: int | None = Field(default=None, ge=1)
    """Use only the first rows, this many."""
    streaming: bool = False
    """Read the source while it grows: a folder to which complete files are renamed, or a streamed
    dataset. Needs train.steps."""

    @field_validator("data_files", mode="before")
    @classmethod
    def _one_or_more(cls, files: Any) -> Any:
        return [files] if isinstance(files, str) else files

    def check(self) -> None:
        check_one_given(path=self.path, name=self.name)
        if self.path and is_url(self.path):
            check_url(self.path)
            if self.streaming:
                raise ValueError("a folder that is streamed must be on a disk, not a URL")
        check_belongs("revision", self.revision is not None, "name", self.name is not None)
        if self.function and (self.format != "auto" or self.columns):
            raise ValueError("`function` reads the row itself: leave out `format` and `columns`")
        if self.streaming and (self.weight != 1 or self.rows is not None):
            raise ValueError("a streamed source is used as it comes: leave out `weight` and `rows`")
        chooses = self.config or self.data_files or self.split != "train"
        if self.streaming and self.path and chooses:
            raise ValueError(
                "all files of a folder that is streamed are used: leave out `split`, `config` and "
                "`data_files`"
            )


# Arguments of apply_chat_template, and variables that come from the row and the tokenizer.
NO_KWARGS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "sanitize_control_tokens", "return_assistant_tokens_mask"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("tokenizer_kwargs", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token"),
    *("cls_token", "mask_token"),
}


class DataSection(Section):
    """Training and evaluation rows, which of their tokens are trained, and packing."""

    train: tuple[Source, ...] = Field(min_length=1)
    """Sources of training rows."""
    eval: tuple[Source, ...] = ()
    """Sources of held-out (evaluation) rows, with the keys of `train`."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows to hold out, in addition to `eval`. A hash of the row decides, so
    that no row changes sides when others are added or reordered."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Training rows whose tokens equal an earlier row's. Both count them."""
    max_leakage: Annotated[float | Literal["drop"], share_or("drop")] = 0.01
    """The run stops if a larger share of the evaluation rows also occurs in the training data,
    exactly or as near-duplicates (a Jaccard similarity of 0.8 or more of their three-word
    sequences), or shares its prompt with a training row. Chance matches of short rows stay below
    the default; a copied file, or a random split of repeated rows or of several answers to each
    question, does not. drop: leave such training rows out instead, however few they are."""
    train_on: Literal["all", "completion", "assistant", "last_turn"] = "assistant"
    """Tokens with a loss. all: every token; completion: the last assistant turn; assistant: every
    assistant turn; last_turn: every assistant turn after the last user message."""
    train_on_eot: Literal[True, False, "with_newline"] = True
    """Train the stop token after an answer. with_newline: also the white space that the chat
    template writes after it, as many trainers do."""
    turns: Literal["auto", "together", "apart"] = "auto"
    """Documents of a row with several trained answers. together: one; apart: one of each answer
    with all before it, as a server renders that; auto: apart where the chat template does not
    render earlier answers as they are generated."""
    missing_reasoning: Literal["reject", "empty", "untrained"] = "reject"
    """Answers without reasoning where the generation prompt opens a thought (`<think>`) that the
    chat template does not close. reject: leave the row out; empty: train an empty thought, so that
    the model learns not to think; untrained: put the empty thought before the answer as context, so
    that only the answer is learned."""
    stop_token: str | None = None
    """Control token that ends an answer where the chat template writes none. null: what follows an
    answer where the conversation goes on (a closing token, or the next role's), if it ends
    generation, else the tokenizer's EOS."""
    ignore_columns: tuple[str, ...] = ()
    """Columns of the rows, and keys of their messages, to pass over on purpose. `packhorse prepare`
    names all others that it does not read."""
    control_tokens: Literal["reject", "text", "keep"] = "reject"
    """Text in a row that spells a control token of the model. reject: leave the row out; text:
    tokenize it as ordinary text; keep: let it be the token."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template, as `enable_thinking: false`, for training, evaluation and
    preview. Give the same ones when you use the model."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest example, in tokens. null: batch.seq_len."""
    too_long: Literal["reject", "truncate", "truncate_anywhere", "split"] = "reject"
    """Examples above max_length. truncate: cut after the last whole answer; truncate_anywhere: cut
    at max_length, even inside an answer; split: make several documents."""
    split_context: int = Field(default=0, ge=0)
    """Tokens that `too_long: split` repeats before each cut, as untrained context."""
    packing: Literal["none", "bfd", "bfd_split", "wrapped", "greedy"] = "bfd"
    """How examples share a packed sequence. bfd: best-fit decreasing, examples stay whole;
    bfd_split: the same, long examples are cut; wrapped: examples are cut wherever a sequence is
    full; greedy: whole examples in their order; none: one example each."""
    broken_lines: Literal["stop", "reject"] = "stop"
    """Rows that cannot be parsed. stop: end the run with the line's place; reject: leave them out
    and count them."""
    max_rejects: float = Field(default=0.01, ge=0, le=1)
    """The run stops if a larger share of the rows is rejected."""
    cache: str = "~/.cache/packhorse"
    """Folder for the tokenized data. It may be local to a node."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that tokenize. null: one for each CPU core."""

    def check(self) -> None:
        grouped = any(source.group_by is not None for source in self.train)
        check_belongs("train[].group_by", grouped, "eval_fraction", bool(self.eval_fraction))
        if any(source.group_by is not None for source in self.eval):
            raise ValueError("`eval`: its sources are held out whole: leave out `group_by`")
        if taken := sorted(NO_KWARGS & set(self.chat_template_kwargs)):
            raise ValueError(
                f"`chat_template_kwargs` cannot hold {', '.join(taken)}: they come from the rows, "
                f"the tokenizer and packhorse itself"
            )
        # `wrapped` cuts the documents anew, where no context could be repeated
        check_belongs(
            "split_context",
            bool(self.split_context),
            "too_long: split`, without `packing: wrapped",
            self.too_long == "split" and self.packing != "wrapped",
        )
