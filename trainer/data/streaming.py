"""Train on a streaming source: use its shards one after the other, and log each use (C1).

    folder of files, or a stream of rows -> shard -> (cache) -> Prepared -> an epoch of the plan

A shard is to the plan what an epoch is to other sources: it is packed by itself, from the seed and
the shard's number. Rank 0 decides which shard is next when a step needs one, and logs it. The
other ranks read the log, and wait for its next line if they are ahead. There is no collective, so
this can run beside the steps.

The plan is a function of the log. A resumed run reads the log, also what was decided after its
checkpoint. A new run folder with a copy of the log repeats the run.
"""

from __future__ import annotations

import copy
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from packhorse.trainer.config.data import Source
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.arrow_fields import fields_of_batches
from packhorse.trainer.data.batch_plan import Corpus
from packhorse.trainer.data.cache import sum_counts
from packhorse.trainer.data.leakage import prepare_compared
from packhorse.trainer.data.loader import STEPS_AHEAD
from packhorse.trainer.data.prepare import Prepared, TrainData, digests_folder, prepare
from packhorse.trainer.data.row_files import UNREADABLE, kind_of_file
from packhorse.trainer.data.shard_log import LOG, Shard, ShardLog
from packhorse.trainer.data.source import open_stream, say_once, shown, source_digest
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import is_main, log
from packhorse.trainer.utils.files import replace_file
from packhorse.trainer.utils.staged_build import Stopped

STREAMED = "shards"  # in the run folder: the rows that were taken from a stream
SHARD_ROWS = 10_000  # of a stream, which are packed together
POLL_S = 0.1  # of the ranks that wait for rank 0's decision
# However small the shards are, those of the steps being built and run must stay open.
OPEN_SHARDS = STEPS_AHEAD + 2
# What chose the rows of the stream has no place in the file that they were written to.
AS_A_FILE = {"config": None, "data_files": (), "revision": None, "split": "train"}


def prepare_data(
    recipe: Recipe, tokenizer: Any, stopping: Callable[[], bool] = lambda: False
) -> tuple[TrainData, Prepared | None]:
    """Tokenize the recipe's training data, or get ready to do so shard by shard, and its held-out
    rows, if it has any.

    Raises as `prepare.prepare` and `check_leakage` do.
    """
    if not recipe.streaming:
        return prepare_compared(recipe, tokenizer, stopping)
    held_out = prepare(recipe, tokenizer, "eval", stopping) if recipe.has_eval else None
    return StreamingData(recipe, tokenizer, stopping), held_out


# --------------------------------------------------------------------------------------- the shards


class StreamingData:
    """The training data of a run with a streaming source: both TrainData and the plan's Epochs.

    Raises, here and from every method:
        BadInput: a shard cannot be read, too many of its rows are rejected, or a file is not what
            it was when it was used.
        Stopped: `stopping()` became true before the first shard was ready, or this was closed.
            While steps run, a shard is prepared to its end: ranks agree on a stop after a step.
    """

    streaming = True

    def __init__(
        self, recipe: Recipe, tokenizer: Any, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        (self._source,) = recipe.data.train
        self._recipe = recipe
        # A copy: tokenizers are not thread-safe, and the loop uses its own meanwhile.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._stopping = stopping
        run_dir = Path(recipe.run.dir)
        self._log = ShardLog(run_dir / LOG)
        self._folder = run_dir / STREAMED if self._source.name else _source_folder(self._source)
        self._stream = _Stream(recipe, self._log, self._folder) if self._source.name else None
        self._reading, self._preparing = threading.Lock(), threading.Lock()
        self._prepared: dict[int, Prepared] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-shard")
        self._ahead: Future[_NewShard | None] | None = None
        self._closed = self._repeats = False

    @property
    def epochs(self) -> StreamingData:
        return self

    @property
    def report(self) -> dict[str, Any]:
        """Prepared.report, summed over the shards that are known so far."""
        counts = sum_counts([shard.report for shard in self._log.known.values()])
        sources = [{"name": shown(self._source), **counts}]
        return {**counts, "shards": len(self._log.known), "sources": sources}

    def fingerprint_at(self, step: int) -> str:
        """Return the fingerprint of the log up to what the first `step` steps are made of."""
        if not is_main():
            self._wait_for_line(0)
        with self._reading:
            self._log.read()
            return self._log.digest(step)

    def open(self) -> None:
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def corpus(self, epoch: int) -> Corpus:
        return self.for_epoch(epoch).epochs

    def for_epoch(self, epoch: int) -> Prepared:
        """Return the documents of shard `epoch`, whose file must still exist unchanged."""
        found = self._prepared.get(epoch)
        if found is not None:
            return found
        shard = self._wait_for_line(epoch)
        self._check_file(shard.file, shard.digest)
        prepared = self._prepare(shard.file)
        if prepared.fingerprint != shard.documents:
            raise BadInput(
                f"{shard.file}: this rank tokenized it into other documents than rank 0 logged: "
                "the tokenizer, its version or the masks differ; make them equal, or put "
                "data.cache on a shared folder"
            )
        return self._remember(epoch, prepared)

    def num_sequences(self, epoch: int, first_step: int, count: Callable[[], int]) -> int:
        """Return the number of packed sequences in the log; rank 0 decides on a missing shard."""
        if is_main() and epoch == len(self._log.shards):
            return self._decide(epoch, first_step, count).sequences
        shard = self._wait_for_line(epoch)
        if shard.first_step != first_step + 1:
            raise BadInput(
                f"{LOG}: shard {epoch} begins with step {shard.first_step}, but in this run with "
                f"step {first_step + 1}: it is the log of another recipe; restore the log of this "
                "one, or give another run.dir"
            )
        return shard.sequences

    def _wait_for_line(self, epoch: int) -> Shard:
        while True:
            with self._reading:
                self._log.read()
            if epoch < len(self._log.shards):
                return self._log.shards[epoch]
            if self._closed:  # rank 0 may have been closed before it decided
                raise Stopped(f"stopped waiting for shard {epoch}")
            time.sleep(POLL_S)

    def _decide(self, epoch: int, first_step: int, count: Callable[[], int]) -> Shard:
        """Choose the next shard and log it: a new one, or if there is none, a known one again."""
        if self._ahead is None or self._ahead.result() is None:
            self._ahead = self._thread.submit(self._prepare_next)
        new = self._ahead.result()
        if new:
            file, digest = new.file, self._check_file(new.file)
        else:
            known = self._log.next_known()
            file, digest = known.file, self._check_file(known.file, known.digest)
            if not self._repeats:
                self._repeats = True
                log.info("no new shard: known ones are used again, from %s on", file)
        prepared = self._remember(epoch, self._prepare(file))
        self._check_file(file, digest)  # it may have changed while it was read
        sequences = count()
        shard = Shard(
            number=epoch,
            file=file,
            bytes=(self._folder / file).stat().st_size,
            digest=digest,
            documents=prepared.fingerprint,
            sequences=sequences,
            first_step=first_step + 1,
            report={key: value for key, value in prepared.report.items() if key != "sources"},
            rejects=str(prepared.rejects_path),
            stream=new.stream if new else None,
        )
        with self._reading:
            self._log.append(shard)
        end = first_step + -(-sequences // self._recipe.batch.global_batch_size)
        more = end < (self._recipe.train.steps or 0)
        self._ahead = self._thread.submit(self._prepare_next) if more else None
        return shard

    def _prepare_next(self) -> _NewShard | None:
        """Prepare the next new shard while this one is trained on; nothing is decided here."""
        new = self._stream.next() if self._stream else _find_new_file(self._folder, self._log)
        if new:
            with suppress(Stopped):  # `_decide` prepares it once more, and raises then
                self._prepare(new.file)
        return new

    def _prepare(self, file: str) -> Prepared:
        def stopping() -> bool:
            return self._closed or (not self._log.shards and self._stopping())

        with self._preparing:  # one thread at a time, as they share the tokenizer
            return _prepare_shard(self._recipe, self._folder / file, self._tokenizer, stopping)

    def _remember(self, epoch: int, prepared: Prepared) -> Prepared:
        with self._reading:
            while len(self._prepared) >= OPEN_SHARDS:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[epoch] = prepared
        return prepared

    def _check_file(self, file: str, digest: str | None = None) -> str:
        """Return the digest of a shard's file, which must be `digest` if that is given."""
        path = self._folder / file
        if not path.is_file():
            raise BadInput(
                f"{path}: {LOG} names this shard, which is needed again, but the file is missing; "
                "restore it"
            )
        now = source_digest(Source(path=str(path)), digests_folder(self._recipe.data))
        if now != (digest or now):
            raise _changed(path)
        return now


def prepare_now(recipe: Recipe, tokenizer: Any) -> list[Prepared]:
    """Tokenize the shards that exist now into the cache, of a stream the first; decide nothing."""
    (source,) = recipe.data.train
    if source.path:
        paths = _shard_files(_source_folder(source))
        return [_prepare_shard(recipe, path, tokenizer) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "first.jsonl"
        _write_rows(path, islice(_plain_rows(open_stream(source, None)), SHARD_ROWS))
        return [_prepare_shard(recipe, path, tokenizer)]


def _prepare_shard(
    recipe: Recipe, path: Path, tokenizer: Any, stopping: Callable[[], bool] = lambda: False
) -> Prepared:
    """Prepare a shard as the only source of a recipe, and compare it with the held-out rows."""
    changes = {"path": str(path), "name": None, "streaming": False, **AS_A_FILE}
    source = recipe.data.train[0].model_copy(update=changes)
    data = recipe.data.model_copy(update={"train": (source,)})
    alone = recipe.model_copy(update={"data": data})
    return prepare_compared(alone, tokenizer, stopping)[0]


def _changed(path: Path) -> BadInput:
    return BadInput(
        f"{path}: the file has changed since it was used; restore the old one, or give another "
        "run.dir; write new rows into a new file, and rename it into the folder when it is complete"
    )


# --------------------------------------------------------------------------- where shards come from


class _NewShard(NamedTuple):
    file: str
    stream: dict[str, Any] | None = None


def _source_folder(source: Source) -> Path:
    folder = Path(str(source.path)).expanduser()
    if not folder.is_dir():
        raise BadInput(
            f"{folder}: a streaming source must be a folder, to which files are added; make it one"
        )
    return folder


def _shard_files(folder: Path) -> list[Path]:
    """Return the files by name, without hidden ones, which are still being written."""
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in there if kind_of_file(path) and path.is_file()]
    if not files:
        raise BadInput(f"{folder}: the folder holds no file of rows yet; put the first one there")
    for path in there:
        if path not in files:
            say_once(f"{path}: is not read; a streamed folder's rows are in files of its own")
    return files


def _find_new_file(folder: Path, log: ShardLog) -> _NewShard | None:
    """Return the first file by name that has not been used yet.

    Raises:
        BadInput: a used file has another size now: rows added to it would be lost.
    """
    new = None
    for path in _shard_files(folder):
        known = log.known.get(path.name)
        if known and path.stat().st_size != known.bytes:
            raise _changed(path)
        if not known and not new:
            new = _NewShard(path.name)
    return new


class _Stream:
    """Write the next rows of a stream to a file in the run folder, with the stream's state.

    So a resumed run has the rows and knows where the stream stood, on every node.
    """

    def __init__(self, recipe: Recipe, log: ShardLog, folder: Path) -> None:
        (self._source,) = recipe.data.train
        self._log, self._folder = log, folder
        self._dataset: Any = None

    def next(self) -> _NewShard | None:
        taken = [shard.stream for shard in self._log.known.values() if shard.stream]
        if self._dataset is None:
            self._dataset = open_stream(self._source, taken[-1]["state"] if taken else None)
            self._rows = _plain_rows(self._dataset)
        self._folder.mkdir(exist_ok=True)
        file = f"{len(taken):06d}.jsonl"
        count = _write_rows(self._folder / file, islice(self._rows, SHARD_ROWS))
        if not count:
            return None
        first = taken[-1]["rows"][1] + 1 if taken else 1
        rows = [first, first + count - 1]
        return _NewShard(file, {"rows": rows, "state": self._dataset.state_dict()})


def _plain_rows(stream: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a stream as those of a file are read; the reason for one that cannot be."""
    for fields in fields_of_batches(stream):
        yield fields if isinstance(fields, dict) else {UNREADABLE: str(fields)}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write a JSONL file, unless there is no row; return the number of rows."""
    rows, count = iter(rows), 0
    first = list(islice(rows, 1))
    if first:
        with replace_file(path) as file:
            for count, row in enumerate(chain(first, rows), start=1):  # noqa: B007 - counted
                # cut short: what JSON does not have, as a picture, is in a column that nobody reads
                file.write(json.dumps(row, default=lambda value: str(value)[:1000]) + "\n")
    return count
