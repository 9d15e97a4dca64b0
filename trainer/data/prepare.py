"""Turn a recipe's sources into tokenized documents, and those into the plan of the run.

    rows -> Conversation -> Example -> (cache) -> Prepared -> Plan

`prepare` needs no process group (C10): every process calls it, one does the work, the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import astuple, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from packhorse.trainer.config.data import DataSection
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data import cache, kept_packing, pack, split, tokenize
from packhorse.trainer.data.batch_plan import Corpus, Epochs, Packer, Plan
from packhorse.trainer.data.digest import json_digest
from packhorse.trainer.data.documents import Documents
from packhorse.trainer.data.mask import Masker
from packhorse.trainer.data.rows import RowReader
from packhorse.trainer.data.source import source_digest
from packhorse.trainer.data.split import SplitRows, parts_of, rows_of
from packhorse.trainer.data.tokenize import LengthPolicy, RowResult
from packhorse.trainer.datatypes import (
    BadInput,
    Conversation,
    Packed,
    Prompt,
    Row,
    RowError,
    StepPlan,
    Tokenized,
)
from packhorse.trainer.dist import is_main
from packhorse.trainer.utils import numa
from packhorse.trainer.utils.time_limit import many_interruptions

# Of fewer documents, packing again is quicker than keeping an epoch's packing.
KEPT_FROM_DOCUMENTS = 100_000


# ---------------------------------------------------------------------------------------- preparing


class TrainData(Protocol):
    """The training data: Prepared, or the shards of a streaming source (data/streaming.py)."""

    @property
    def report(self) -> dict[str, Any]:
        """See Prepared.report."""
        ...

    @property
    def epochs(self) -> Epochs:
        """The documents of each epoch, as the plan sees them."""
        ...

    def for_epoch(self, epoch: int) -> Prepared:
        """Return the documents of an epoch."""
        ...

    def fingerprint_at(self, step: int) -> str:
        """Return the fingerprint of all data that the first `step` steps are made of."""
        ...

    def open(self) -> None:
        """Note that a loader begins to read."""

    def close(self) -> None:
        """Note that no loader reads any more: waiting for a shard, or preparing one, ends."""


@dataclass(frozen=True)
class Prepared:
    """The tokenized documents of the recipe's train or eval sources."""

    documents: Documents
    weights: tuple[float, ...]  # of each source
    files: tuple[str, ...]
    leakage: dict[str, Any] | None = None  # of held-out data: the report of data/leakage.py

    @property
    def fingerprint(self) -> str:
        """A hash of the documents, equal on every node and as long as nothing trained changes."""
        return self.documents.fingerprint

    @property
    def report(self) -> dict[str, Any]:
        """Counts of rows, documents, tokens, duplicates, rejected and filtered rows by reason.

        They are in total, and of each source under `sources`. Held-out data that was compared with
        train has `leakage` too.
        """
        return self.documents.report | ({"leakage": self.leakage} if self.leakage else {})

    @property
    def rejects_path(self) -> Path:
        """The JSON lines of rejected rows: source, row, reason."""
        return self.documents.folder / cache.REJECTS

    @property
    def epochs(self) -> Corpus:
        found = self.documents
        return Corpus(
            found.lengths, found.trained_counts, found.sources, self.weights, found.count_trained
        )

    def for_epoch(self, epoch: int) -> Prepared:
        return self

    def fingerprint_at(self, step: int) -> str:
        return self.fingerprint

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def place(self, document: int) -> tuple[str, int]:
        """Return where a document came from: the file, and its row there, counted from 1."""
        return self.files[self.documents.files[document]], int(self.documents.rows[document])


def prepare(
    recipe: Recipe,
    tokenizer: Any,
    which: Literal["train", "eval"],
    stopping: Callable[[], bool] = lambda: False,
) -> Prepared:
    """Tokenize the recipe's sources, or find them tokenized in the cache.

    Raises:
        BadInput: a source cannot be read, no row of it is left, or too many are rejected.
        Stopped: `stopping()` became true; the next start resumes there.
    """
    section = recipe.data
    split_rows = SplitRows(section, which)
    masker, readers = masker_of(section, tokenizer), row_readers(section, which)
    work = RowTokenizer(masker, readers, tuple(split_rows.files))
    limits = length_policy(recipe)
    drop = which == "train" and section.duplicates == "drop"

    def chunks(done: int) -> Generator[Tokenized, None, None]:
        rows = islice(split_rows.rows(), done, None)
        given = rows, work, limits, workers_of(section), split_rows.files
        # math-verify takes milliseconds for what is no plain number
        slow = any(part.source.filters.math_answer for part in split_rows.parts)
        return tokenize.tokenize_rows(*given, slow=slow)

    documents = cache.prepare(
        cache_folder(section) / f"documents-{_cache_key(split_rows, work, limits, drop)}",
        chunks,
        sources=split_rows.names,
        files=split_rows.files,
        what=f"data.{which}",
        max_rejects=section.max_rejects,
        limit=f"{'data.max_length' if section.max_length else 'batch.seq_len'} "
        f"({recipe.max_length:,})",
        drop_duplicates=drop,
        total_rows=split_rows.count_rows,
        stopping=stopping,
    )
    weights = tuple(part.source.weight for part in split_rows.parts)
    require_rows(f"data.{which}", weights, documents.report["sources"])
    return Prepared(documents, weights, tuple(split_rows.files))


def require_rows(what: str, weights: tuple[float, ...], counts: list[dict[str, Any]]) -> None:
    """Refuse a weight that leaves nothing of its source: the mixture would not have it (C1)."""
    for number, (weight, source) in enumerate(zip(weights, counts, strict=True)):
        found = source["documents"]
        if found and not round(weight * found):
            raise BadInput(
                f"{what}.{number}.weight: {weight:g} x {found} documents of {source['name']} come "
                f"to 0 in an epoch; raise it to {1 / found:.2g} or more, or leave the source out"
            )


def held_out_prompts(recipe: Recipe, masker: Masker, count: int) -> list[Prompt]:
    """Return the first `count` held-out rows that have a prompt and an answer.

    Raises:
        BadInput: no held-out row has both.
    """
    prompts: list[Prompt] = []
    readers = row_readers(recipe.data, "eval")
    for part, reader in zip(parts_of(recipe.data, "eval"), readers, strict=True):
        for row in rows_of(recipe.data, part):
            if len(prompts) == count:
                return prompts
            try:
                place = f"{row.file or part.source.name}:{row.number}"
                conversation = reader.conversation(row.fields, place)
                ids, answer = masker.prompt(conversation)
            except RowError:  # counted and named where the data is prepared
                continue
            assert not isinstance(row.fields, RowError), "it would have been raised"
            text = str(masker.tokenizer.decode(ids))
            prompts.append(Prompt(ids, text, answer, conversation, row.fields))
    if not prompts:
        raise BadInput(
            "data.eval: no row has a prompt and an answer, which eval.generate needs; name rows "
            "that have them, or remove eval.generate"
        )
    return prompts


def length_policy(recipe: Recipe) -> LengthPolicy:
    """Return what is done with examples that are too long."""
    data = recipe.data
    packing_cuts = data.packing in ("bfd_split", "wrapped") and not data.split_context
    return LengthPolicy(recipe.max_length, data.too_long, packing_cuts, data.split_context)


def masker_of(section: DataSection, tokenizer: Any) -> Masker:
    """Build the Masker, which decides the trained tokens of a row."""
    return Masker(
        tokenizer,
        section.train_on,
        section.train_on_eot,
        control_tokens=section.control_tokens,
        chat_template_kwargs=section.chat_template_kwargs,
        turns=section.turns,
        missing_reasoning=section.missing_reasoning,
        stop_token=section.stop_token,
    )


def workers_of(section: DataSection) -> int:
    """Return the number of processes that tokenize rows, on all cores that this one was given."""
    return section.workers or len(numa.GIVEN)


def cache_folder(section: DataSection) -> Path:
    return Path(section.cache).expanduser()


def digests_folder(section: DataSection) -> Path:
    """Return the folder that remembers the digests of unchanged files."""
    return cache_folder(section) / "digests"


# --------------------------------------------------------------------------------------------- rows


def row_readers(data: DataSection, which: Literal["train", "eval"]) -> tuple[RowReader, ...]:
    """Return what reads the rows of each train or eval source."""
    return tuple(RowReader.of(part.source, data.ignore_columns) for part in parts_of(data, which))


@dataclass(frozen=True)
class RowTokenizer:
    """Turn a chunk of rows into examples; workers run it, so it is picklable."""

    masker: Masker
    readers: tuple[RowReader, ...]  # of each source
    files: tuple[str, ...]  # names, for errors

    def __call__(self, rows: list[Row]) -> list[RowResult]:
        read: list[Conversation | RowError] = []
        with many_interruptions():
            for row in rows:
                try:
                    place = f"{self.files[row.file]}:{row.number}"
                    read.append(self.readers[row.source].conversation(row.fields, place))
                except RowError as error:
                    read.append(error)
        # One call for the whole chunk, as the tokenizer is faster on many texts.
        conversations = [found for found in read if isinstance(found, Conversation)]
        made = iter(self.masker.documents(conversations))
        return [found if isinstance(found, RowError) else next(made) for found in read]


def _cache_key(
    split_rows: SplitRows, work: RowTokenizer, limits: LengthPolicy, drop_duplicates: bool
) -> str:
    """Hash everything that shapes the cache: not the files' folder, nor the sources' weights."""
    data = split_rows.data
    sources = []
    for part, reader in zip(split_rows.parts, work.readers, strict=True):
        split_key = None
        if part.held_out is not None:
            split_key = [split.VERSION, part.held_out, data.eval_fraction, part.source.group_by]
        digest = source_digest(part.source, digests_folder(data))
        sources.append([digest, part.source.rows, *reader.key(), split_key])
    # Whether packing cuts changes the documents only where long ones are split.
    cut = replace(limits, packing_cuts=limits.too_long == "split" and limits.packing_cuts)
    policy = [*astuple(cut), drop_duplicates, data.broken_lines]
    versions = [cache.VERSION, tokenize.VERSION]
    return json_digest([*versions, work.masker.fingerprint(), sources, policy])


# ----------------------------------------------------------------------------------------- planning


def train_plan(
    recipe: Recipe, data: TrainData, stopping: Callable[[], bool] = lambda: False
) -> Plan:
    """Plan the steps of the run.

    Large packings are kept in the cache, so that one process packs for all.
    """

    def keep(epoch: int, make: Callable[[], Packed]) -> Packed:
        prepared = data.for_epoch(epoch)
        if len(prepared.documents.lengths) < KEPT_FROM_DOCUMENTS:
            return make()
        versions = [kept_packing.VERSION, pack.VERSION]
        parts = [*versions, prepared.fingerprint, prepared.weights, recipe.data.packing]
        key = json_digest([*parts, recipe.batch.seq_len, recipe.train.seed, epoch])
        folder = cache_folder(recipe.data) / f"packing-{key}"
        return kept_packing.keep_packed(folder, make, f"packing epoch {epoch}", stopping)

    plan = Plan(data.epochs, packer(recipe), recipe.batch, recipe.train, recipe.loss, keep)
    if data.epochs.streaming and is_main():
        # Choose and prepare the first shard now, before any collective that could time out.
        plan.micro_batch_counts()
    return plan


def documents_of(plan: Plan, step: StepPlan, data: TrainData) -> list[tuple[str, int]]:
    """Return the (file, row) of every document of a step, each once, for messages."""
    prepared = data.for_epoch(step.epoch)
    sequences = [number for micro_batch in step.micro_batches for number in micro_batch]
    documents = plan.pieces(step.epoch, sequences)[:, 0].tolist()
    return sorted({prepared.place(document) for document in documents})


def packer(recipe: Recipe) -> Packer:
    """Return the recipe's way to pack documents, see data/pack.py."""
    seq_len, packing = recipe.batch.seq_len, recipe.data.packing
    return lambda lengths, *others: pack.pack(lengths, seq_len, packing, *others)
