"""Turns a recipe's sources into tokenized documents, and those into the plan of the run.

    rows -> Conversation -> Example -> (cache) -> Prepared -> Plan

`prepare` needs no process group (C10): each process calls it, one does the work, the others wait.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import astuple, dataclass, replace
from itertools import islice
from os import sched_getaffinity
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xxhash

from trainer.config.data import DataSection, Source
from trainer.config.recipe import Recipe
from trainer.data import cache, pack, split, tokenize
from trainer.data.batch_plan import Corpus, Epochs, Plan
from trainer.data.cache import Documents
from trainer.data.mask import Masker
from trainer.data.rows import RowReader
from trainer.data.source import RawRow, read_rows, source_digest, source_files
from trainer.data.split import SourceSplit, held_out, parts_of
from trainer.data.tokenize import LengthPolicy, Row
from trainer.datatypes import (
    BadInput,
    Conversation,
    Example,
    Packed,
    Prompt,
    RowError,
    StepPlan,
    Tokenized,
)
from trainer.dist import is_main

KEPT_FROM_DOCUMENTS = (
    100_000  # below so many, packing again is quicker than keeping an epoch's packing
)


# ---------------------------------------------------------------------------------------- preparing


class TrainData(Protocol):
    """What is trained on: Prepared, or the shards of a source that grows (data/growing.py)."""

    @property
    def report(self) -> dict[str, Any]: ...

    @property
    def epochs(self) -> Epochs: ...

    def of(self, epoch: int) -> Prepared:
        """The documents of an epoch."""
        ...

    def fingerprint_at(self, step: int) -> str:
        """Of everything that the first `step` steps have been taken from."""
        ...

    def open(self) -> None:
        """A loader begins to ask."""
        ...

    def close(self) -> None:
        """It asks no more: whoever waits for a shard, or prepares one, gives up."""
        ...


@dataclass(frozen=True)
class Prepared:
    """The tokenized documents of the recipe's train or eval sources."""

    documents: Documents
    weights: tuple[float, ...]  # of each source
    files: tuple[str, ...]
    leakage: dict[str, Any] | None = None  # of held-out data: data/leakage.py's report

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each document."""
        return self.documents.lengths

    @property
    def trained_counts(self) -> np.ndarray:
        """(n,) trained tokens of each document."""
        return self.documents.trained_counts

    @property
    def sources(self) -> np.ndarray:
        """(n,) each document's source, by its number in the recipe."""
        return self.documents.sources

    @property
    def fingerprint(self) -> str:
        """Of the documents themselves: equal on every node, and as long as nothing changes what is
        learned.
        """
        return self.documents.fingerprint

    @property
    def report(self) -> dict[str, Any]:
        """Rows, documents, tokens, trained tokens, duplicates, rejects and filtered rows by reason:
        of all, and under `sources` of each. Of held-out data that was compared with train,
        `leakage` too."""
        return self.documents.report | ({"leakage": self.leakage} if self.leakage else {})

    @property
    def rejects_path(self) -> Path:
        """JSON lines: source, row, reason."""
        return self.documents.folder / "rejects.jsonl"

    @property
    def epochs(self) -> Corpus:
        count = self.documents.count_trained
        return Corpus(self.lengths, self.trained_counts, self.sources, self.weights, count)

    def of(self, epoch: int) -> Prepared:
        """Every epoch is made of these documents."""
        return self

    def fingerprint_at(self, step: int) -> str:
        return self.fingerprint

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def example(self, document: int) -> Example:
        return self.documents.example(document)

    def place(self, document: int) -> tuple[str, int]:
        """Where a document came from: the file, and its row there, counted from 1."""
        return self.files[self.documents.files[document]], int(self.documents.rows[document])


def prepare(
    recipe: Recipe,
    tokenizer: Any,
    which: Literal["train", "eval"],
    stopping: Callable[[], bool] = lambda: False,
) -> Prepared:
    """Tokenize the recipe's sources, or find them tokenized.

    Raises:
        BadInput: a source cannot be read, nothing is left of it, or too much is rejected.
        Stopped (trainer.utils.files): `stopping()` became true; the next start goes on from there.
    """
    section = recipe.data
    side = SplitRows(section, which)
    work = tokenizer_of_rows(recipe, tokenizer, which)
    limits = limits_of(recipe)
    drop = which == "train" and section.duplicates == "drop"

    def chunks(done: int) -> Generator[Tokenized, None, None]:
        return tokenize.tokenize_rows(
            islice(side.rows(), done, None), work, limits, workers_of(section), side.files
        )

    documents = cache.prepare(
        cache_folder(section) / f"documents-{_key(side, work, limits, drop)}",
        chunks,
        sources=side.names,
        files=side.files,
        what=f"data.{which}",
        max_rejects=section.max_rejects,
        drop_duplicates=drop,
        total_rows=side.count_rows,
        stopping=stopping,
    )
    return Prepared(documents, tuple(part.source.weight for part in side.parts), tuple(side.files))


def held_out_prompts(recipe: Recipe, masker: Masker, rows: int) -> list[Prompt]:
    """The first `rows` held-out questions that can be asked.

    Raises:
        BadInput: none of the eval rows has an answer.
    """
    prompts: list[Prompt] = []
    for part in parts_of(recipe.data, "eval"):
        reader = RowReader.of(part.source)
        for row in rows_of(recipe.data, part):
            if len(prompts) == rows:
                return prompts
            try:
                conversation = reader.conversation(row.fields)
                ids, answer = masker.prompt(conversation)
            except RowError:  # counted and named where the data is prepared
                continue
            assert not isinstance(row.fields, RowError), "it would have been raised"
            prompts.append(
                Prompt(ids, str(masker.tokenizer.decode(ids)), answer, conversation, row.fields)
            )
    if not prompts:
        raise BadInput(
            "data.eval: no row has a prompt and an answer; eval.generate needs some, or take it out"
        )
    return prompts


def limits_of(recipe: Recipe) -> LengthPolicy:
    """What becomes of examples that are too long."""
    data = recipe.data
    packing_cuts = data.packing in ("bfd_split", "wrapped") and not data.split_context
    return LengthPolicy(
        recipe.max_length,
        "truncate" if data.too_long == "truncate_anywhere" else data.too_long,
        packing_cuts,
        data.too_long == "truncate_anywhere",
        data.split_context,
    )


def masker_of(section: DataSection, tokenizer: Any) -> Masker:
    """What is learned of a row."""
    return Masker(
        tokenizer,
        section.train_on,
        bool(section.train_on_eot),
        train_trailing_newline=section.train_on_eot == "with_newline",
        control_tokens=section.control_tokens,
        chat_template_kwargs=section.chat_template_kwargs,
    )


def workers_of(section: DataSection) -> int:
    """How many processes work on rows."""
    return section.workers or len(sched_getaffinity(0))


def cache_folder(section: DataSection) -> Path:
    return Path(section.cache).expanduser()


def digest_of(section: DataSection, source: Source) -> str:
    """What the source holds; of files that have not changed, as the cache remembers it."""
    return source_digest(source, cache_folder(section) / "digests")


def tokenizer_of_rows(recipe: Recipe, tokenizer: Any, which: Literal["train", "eval"]) -> _Tokenize:
    """How the rows of a side are read and tokenized."""
    readers = tuple(RowReader.of(part.source) for part in parts_of(recipe.data, which))
    return _Tokenize(masker_of(recipe.data, tokenizer), readers)


@dataclass(frozen=True)
class _Tokenize:
    """A chunk of rows to examples: what the workers run."""

    masker: Masker
    readers: tuple[RowReader, ...]  # of each source

    def __call__(self, rows: list[Row]) -> list[Example | RowError]:
        read = [self.conversation(row) for row in rows]
        examples = iter(
            self.masker.examples([found for found in read if isinstance(found, Conversation)])
        )
        return [found if isinstance(found, RowError) else next(examples) for found in read]

    def conversation(self, row: Row) -> Conversation | RowError:
        try:
            return self.readers[row.source].conversation(row.fields)
        except RowError as error:
            return error


def rows_of(data: DataSection, part: SourceSplit) -> Iterator[RawRow]:
    """The rows of a source that are on its part's side. Every reader of rows reads them here."""
    for row in read_rows(part.source):
        if part.held_out is None or part.held_out == held_out(
            row.fields, data, f"{row.file or part.source.name}:{row.number}"
        ):
            yield row


class SplitRows:
    """The train or eval side: its `parts` and `names`, one for each source, and its `files`, one
    after the other.
    """

    def __init__(self, data: DataSection, which: Literal["train", "eval"]) -> None:
        self.data = data
        self.parts = parts_of(data, which)
        self.names = [part.source.path or str(part.source.name) for part in self.parts]
        self._files = [_files(part.source) for part in self.parts]
        self.files = [name for of_source in self._files for name in of_source]

    def rows(self) -> Iterator[Row]:
        """Raises BadInput at one that cannot be read, unless data.broken_lines lets it be rejected."""
        first = 0
        for source, (part, files) in enumerate(zip(self.parts, self._files, strict=True)):
            numbers = {Path(name).name: first + i for i, name in enumerate(files)}
            for row in rows_of(self.data, part):
                file = numbers[row.file] if part.source.path else first
                if isinstance(row.fields, RowError) and self.data.broken_lines == "stop":
                    place = f"{self.files[file]}:{row.number}"
                    raise BadInput(
                        f"{place}: {row.fields}; mend or delete the line, or set "
                        f"data.broken_lines: reject"
                    )
                yield Row(source, file, row.number, row.fields)
            first += len(files)

    def count_rows(self) -> int | None:
        """About how many rows there are, where that can be told without parsing them."""
        share = {None: 1.0, False: 1 - self.data.eval_fraction, True: self.data.eval_fraction}
        counts = [(_count_rows(part.source), share[part.held_out]) for part in self.parts]
        return (
            None
            if any(rows is None for rows, _ in counts)
            else round(sum((rows or 0) * s for rows, s in counts))
        )


def _files(source: Source) -> list[str]:
    return (
        [str(path) for path in source_files(source.path)]
        if source.path
        else [f"{source.name}:{source.split}"]
    )


def _key(side: SplitRows, work: _Tokenize, limits: LengthPolicy, drop_duplicates: bool) -> str:
    """Everything that shapes the cache. Where the files lie, and the sources' weights, do not."""
    read = [
        [
            digest_of(side.data, part.source),
            part.source.rows,
            *reader.key(),
            _split_key(side.data, part),
        ]
        for part, reader in zip(side.parts, work.readers, strict=True)
    ]
    cut = replace(limits, packing_cuts=limits.too_long == "split" and limits.packing_cuts)
    policy = [*astuple(cut), drop_duplicates, side.data.broken_lines]
    whole = [cache.VERSION, tokenize.VERSION, work.masker.fingerprint(), read, policy]
    return xxhash.xxh3_128_hexdigest(json.dumps(whole).encode())


def _split_key(data: DataSection, part: SourceSplit) -> list[Any] | None:
    return (
        None
        if part.held_out is None
        else [split.VERSION, part.held_out, data.eval_fraction, data.group_by]
    )


def _count_rows(source: Source) -> int | None:
    if not source.path:
        return None
    rows = 0
    for path in source_files(source.path):
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows += pyarrow.parquet.read_metadata(path).num_rows
        elif path.suffix == ".jsonl":
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    rows += block.count(b"\n")
        else:
            return None
    return min(rows, source.rows or rows)


# ----------------------------------------------------------------------------------------- planning


def train_plan(
    recipe: Recipe, data: TrainData, stopping: Callable[[], bool] = lambda: False
) -> Plan:
    """The steps of the run. Large packings are kept in the cache, so that one process does the work
    for all.
    """

    def keep(epoch: int, make: Callable[[], Packed]) -> Packed:
        prepared = data.of(epoch)
        if len(prepared.lengths) < KEPT_FROM_DOCUMENTS:
            return make()
        parts = [pack.VERSION, prepared.fingerprint, prepared.weights, recipe.data.packing]
        key = xxhash.xxh3_128_hexdigest(
            json.dumps([*parts, recipe.batch.seq_len, recipe.train.seed, epoch]).encode()
        )
        folder = cache_folder(recipe.data) / f"packing-{key}"
        return cache.keep_packed(folder, make, f"packing epoch {epoch}", stopping)

    plan = Plan(data.epochs, _packer(recipe), recipe.batch, recipe.train, recipe.loss, keep)
    if data.epochs.streaming and is_main():
        # its first shard is chosen and prepared now: no collective yet that could time out
        plan.micro_batch_counts()
    return plan


def eval_plan(recipe: Recipe, prepared: Prepared) -> Plan:
    """All held-out rows as one step, weighted by token."""
    return Plan.for_eval(prepared.epochs, _packer(recipe), recipe.batch)


def documents_of(plan: Plan, step: StepPlan, data: TrainData) -> list[tuple[str, int]]:
    """The (file, row) of every document of a step, each once, for messages."""
    prepared = data.of(step.epoch)
    rows = [row for micro_batch in step.micro_batches for row in micro_batch]
    return sorted(
        {prepared.place(document) for document in plan.pieces(step.epoch, rows)[:, 0].tolist()}
    )


def _packer(recipe: Recipe) -> Callable[[np.ndarray, np.random.Generator], Packed]:
    return lambda lengths, rng: pack.pack(lengths, recipe.batch.seq_len, recipe.data.packing, rng)
