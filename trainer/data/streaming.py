"""A source that grows while it is trained on: its shards, one after the other, and the log of them
(C1).

    folder of files, or a stream of rows -> shard -> (cache) -> Prepared -> an epoch of the plan

A shard is to the plan what an epoch is to a source that does not grow: packed by itself, from the
seed and the shard's number. Rank 0 decides which shard is next when a step needs one, and logs it;
the other ranks read the log, and wait for it where they are ahead. No rank waits for another one's
answer, so this may go on beside the steps. The plan is a function of the log: a resumed run reads
it back, also what had been decided beyond its checkpoint, and a new run folder with a copy of it
repeats the run.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from trainer.config.data import Source
from trainer.config.recipe import Recipe
from trainer.data.batch_plan import Corpus
from trainer.data.leakage import check_leakage
from trainer.data.loader import STEPS_AHEAD
from trainer.data.prepare import Prepared, TrainData, digest_of, prepare
from trainer.data.source import open_stream, source_files, without_nulls
from trainer.datatypes import BadInput
from trainer.dist import is_main, log
from trainer.utils.files import Stopped, replace_file, sync_folder

LOG = "shards.jsonl"  # in the run folder
STREAMED = "shards"  # beside it, the rows that were taken from a stream
POLL_S = 0.1  # of the ranks that wait for rank 0's decision
OPEN = STEPS_AHEAD + 2  # shards of the steps that are at work, however small the shards are


def prepare_train(
    recipe: Recipe, tokenizer: Any, stopping: Callable[[], bool] = lambda: False
) -> TrainData:
    """The recipe's training data: tokenized, or ready to be, shard by shard. Raises as
    `loader.prepare`.
    """
    return (
        StreamingData(recipe, tokenizer, stopping)
        if recipe.streaming
        else prepare(recipe, tokenizer, "train", stopping)
    )


# ------------------------------------------------------------------------------------------ the log


@dataclass(frozen=True)
class Shard:
    """A line of the log: a shard, as it was used. One that comes again has another line, and
    another number.
    """

    number: int  # from 0; the plan's epoch
    file: str  # its name in the source's folder; what came from a stream is in the run folder
    bytes: int
    digest: str  # of the file
    documents: str  # fingerprint of what it was tokenized into
    packed_rows: int
    first_step: int  # counted from 1, as in metrics.jsonl
    report: dict[str, Any]  # as Prepared.report
    rejects: str  # where its rejected rows are listed
    stream: dict[str, Any] | None = (
        None  # its rows [from, to] of the stream, and how to go on after them
    )


class ShardLog:
    """The lines of the log, in order. Rank 0 appends; all read."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.shards: list[Shard] = []
        self.known: dict[str, Shard] = {}  # by file, in the order of first use
        self._turn = 0  # of the known ones, which comes next where there is no new one
        self.read()

    def read(self) -> None:
        """Take in the whole lines that have come. What a killed start has left of one is none."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().split(b"\n")[:-1]
        for line in lines:
            self._offset += len(line) + 1
            try:
                self._add(Shard(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise BadInput(
                    f"{self._path}: line {len(self.shards) + 1} is not as it was written "
                    f"({error}); put the file back, "
                    "or give another run.dir"
                ) from None

    def append(self, shard: Shard) -> None:
        """Write a line that survives a power cut, in place of what a killed start has left of one."""
        with self._path.open("ab") as file:
            file.truncate(self._offset)
            self._offset += file.write(
                json.dumps(asdict(shard), ensure_ascii=False).encode() + b"\n"
            )
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._path.parent)
        self._add(shard)

    def _add(self, shard: Shard) -> None:
        if shard.file in self.known:
            self._turn = [*self.known].index(shard.file) + 1
        self.known.setdefault(shard.file, shard)
        self.shards.append(shard)

    def again(self) -> Shard:
        """The known shard whose turn it is to be used again: from the first to the last, and round."""
        known = [*self.known.values()]
        return known[self._turn % len(known)]

    def digest(self, step: int) -> str:
        """Of the shards that the first `step` steps are taken from: each in its place, as it was."""
        used = [s for s in self.shards if s.first_step <= step]
        lines = [
            [s.number, s.file, s.digest, s.documents, s.packed_rows, s.first_step] for s in used
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(lines).encode())


# --------------------------------------------------------------------------------------- the shards


class StreamingData:
    """The training data of a run whose source grows: TrainData, and the plan's Epochs.

    Raises, here and from every method:
        BadInput: a shard cannot be read, too much of it is rejected, or a file is not what it was
            when it was used.
        Stopped: `stopping()` became true before the first shard was ready, or it was closed. While
            steps ask, a shard is prepared to its end: a stop is then agreed on after a step.
    """

    streaming = True

    def __init__(
        self, recipe: Recipe, tokenizer: Any, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        (self._source,) = recipe.data.train
        self._recipe = recipe
        self._tokenizer = copy.deepcopy(
            tokenizer
        )  # for one thread at a time; the loop uses its own beside it
        self._stopping = stopping
        self._log = ShardLog(Path(recipe.run.dir) / LOG)
        self._folder = (
            Path(recipe.run.dir) / STREAMED if self._source.name else _folder(self._source)
        )
        self._stream = _Stream(recipe, self._log, self._folder) if self._source.name else None
        self._reading, self._preparing = threading.Lock(), threading.Lock()
        self._prepared: dict[int, Prepared] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-shard")
        self._ahead: Future[_New | None] | None = None
        self._closed = self._going_round = False

    @property
    def epochs(self) -> StreamingData:
        return self

    @property
    def report(self) -> dict[str, Any]:
        """As Prepared.report, of the shards that are known so far."""
        counts = _sum([shard.report for shard in self._log.known.values()])
        name = self._source.path or str(self._source.name)
        return {**counts, "shards": len(self._log.known), "sources": [{"name": name, **counts}]}

    def fingerprint_at(self, step: int) -> str:
        """Of the log, up to what the first `step` steps are taken from; rank 0 has said where the
        first is.
        """
        if not is_main():
            self._logged(0)
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
        """The documents of shard `epoch`. Its file must be there, as it was."""
        found = self._prepared.get(epoch)
        if found is not None:
            return found
        shard = self._logged(epoch)
        self._digest(shard.file, shard.digest)
        prepared = self._prepare(shard.file)
        if prepared.fingerprint != shard.documents:
            raise BadInput(
                f"{shard.file}: this rank tokenized it into other documents than rank 0 once did: "
                f"the tokenizer, its "
                "version or the masks are others; make them alike, or put data.cache on a shared "
                "folder"
            )
        return self._keep(epoch, prepared)

    def num_sequences(self, epoch: int, first_step: int, count: Callable[[], int]) -> int:
        """As the log says; where it does not, rank 0 says it, and the others wait for that."""
        if is_main() and epoch == len(self._log.shards):
            return self._decide(epoch, first_step, count).packed_rows
        shard = self._logged(epoch)
        if shard.first_step != first_step + 1:
            raise BadInput(
                f"{LOG}: shard {epoch} begins with step {shard.first_step}, and in this run with "
                f"{first_step + 1}: it "
                "is the log of another recipe; put its own back, or give another run.dir"
            )
        return shard.packed_rows

    def _logged(self, epoch: int) -> Shard:
        """The line of a shard, waited for."""
        while True:
            with self._reading:
                self._log.read()
            if epoch < len(self._log.shards):
                return self._log.shards[epoch]
            if self._closed:  # rank 0 may have been closed before it chose
                raise Stopped(f"stopped waiting for shard {epoch}")
            time.sleep(POLL_S)

    def _decide(self, epoch: int, first_step: int, count: Callable[[], int]) -> Shard:
        """Which shard is next: a new one; where none is there, the known ones again."""
        if self._ahead is None or self._ahead.result() is None:
            self._ahead = self._thread.submit(self._prepare_next)
        new = self._ahead.result()
        if new:
            file, digest = new.file, self._digest(new.file)
        else:
            known = self._log.again()
            file, digest = known.file, self._digest(known.file, known.digest)
            if not self._going_round:
                self._going_round = True
                log.info("no new shard: going round again, from %s, whenever there is none", file)
        prepared = self._keep(epoch, self._prepare(file))
        self._digest(file, digest)  # it has been read, and is what it was before
        rows = count()
        shard = Shard(
            number=epoch,
            file=file,
            bytes=(self._folder / file).stat().st_size,
            digest=digest,
            documents=prepared.fingerprint,
            packed_rows=rows,
            first_step=first_step + 1,
            report={key: value for key, value in prepared.report.items() if key != "sources"},
            rejects=str(prepared.rejects_path),
            stream=new.stream if new else None,
        )
        with self._reading:
            self._log.append(shard)
        more = first_step + -(-rows // self._recipe.batch.global_batch_size) < (
            self._recipe.train.steps or 0
        )
        self._ahead = self._thread.submit(self._prepare_next) if more else None
        return shard

    def _prepare_next(self) -> _New | None:
        """While the last shard is trained on, so that the steps need not wait. Nothing is decided
        here.
        """
        new = self._stream.next() if self._stream else _new_file(self._folder, self._log)
        if new:
            with suppress(Stopped):  # it is found again, and then asked for
                self._prepare(new.file)
        return new

    def _prepare(self, file: str) -> Prepared:
        def stopping() -> bool:
            return self._closed or (not self._log.shards and self._stopping())

        with self._preparing:
            return _prepare_shard(self._recipe, self._folder / file, self._tokenizer, stopping)

    def _keep(self, epoch: int, prepared: Prepared) -> Prepared:
        with self._reading:
            while len(self._prepared) >= OPEN:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[epoch] = prepared
        return prepared

    def _digest(self, file: str, digest: str | None = None) -> str:
        """What the file holds, which must be what it held."""
        path = self._folder / file
        if not path.is_file():
            raise BadInput(
                f"{path}: {LOG} names this shard, which is needed again, and it is not there; put "
                f"it back"
            )
        now = digest_of(self._recipe.data, Source(path=str(path)))
        if now != (digest or now):
            raise _changed(path)
        return now


def prepare_now(recipe: Recipe, tokenizer: Any) -> list[Prepared]:
    """The shards that are there now, tokenized into the cache; of a stream the first. Nothing is
    decided.
    """
    (source,) = recipe.data.train
    if source.path:
        return [_prepare_shard(recipe, path, tokenizer) for path in _files(_folder(source))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "first.jsonl"
        _write_rows(path, islice(open_stream(source, None), recipe.data.shard_rows))
        return [_prepare_shard(recipe, path, tokenizer)]


def _prepare_shard(
    recipe: Recipe, path: Path, tokenizer: Any, stopping: Callable[[], bool] = lambda: False
) -> Prepared:
    """A shard as any file is prepared, and compared with the held-out rows."""
    alone = _recipe_of(recipe, path)
    prepared = prepare(alone, tokenizer, "train", stopping)
    if recipe.has_eval:
        check_leakage(
            alone, tokenizer, prepared, prepare(alone, tokenizer, "eval", stopping), stopping
        )
    return prepared


def _sum(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and counts by reason, of several shards together."""
    total: dict[str, Any] = {}
    for key, value in ((key, value) for report in reports for key, value in report.items()):
        if isinstance(value, dict):
            total[key] = dict(Counter(total.get(key, {})) + Counter(value))
        else:
            total[key] = total.get(key, 0) + value
    return total


def _recipe_of(recipe: Recipe, shard: Path) -> Recipe:
    """The recipe with a shard in place of what grows: it is prepared as any file is."""
    source = recipe.data.train[0].model_copy(
        update={"path": str(shard), "name": None, "streaming": False}
    )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": (source,)})})


def _changed(path: Path) -> BadInput:
    return BadInput(
        f"{path}: the file has changed since it was used; put the old one back, or give another "
        f"run.dir; write new "
        "rows into a new file, and rename it into the folder when it is whole"
    )


# ----------------------------------------------------------------------------- where they come from


class _New(NamedTuple):
    file: str
    stream: dict[str, Any] | None = None


def _folder(source: Source) -> Path:
    folder = Path(str(source.path)).expanduser()
    if not folder.is_dir():
        raise BadInput(
            f"{folder}: a source that grows is a folder, to which files are added; make it one"
        )
    return folder


def _files(folder: Path) -> list[Path]:
    """By name. Hidden ones are still being written."""
    return [path for path in source_files(str(folder)) if not path.name.startswith(".")]


def _new_file(folder: Path, log: ShardLog) -> _New | None:
    """The first by name that has not been used. Those that have been must not have grown: new rows
    would be lost.
    """
    new = None
    for path in _files(folder):
        known = log.known.get(path.name)
        if known and path.stat().st_size != known.bytes:
            raise _changed(path)
        if not known and not new:
            new = _New(path.name)
    return new


class _Stream:
    """The next rows of a stream, written to a file in the run folder: where a stream stood, and
    what it gave, is then there when the run goes on, on every node."""

    def __init__(self, recipe: Recipe, log: ShardLog, folder: Path) -> None:
        (self._source,) = recipe.data.train
        self._shard_rows, self._log, self._folder = recipe.data.shard_rows, log, folder
        self._dataset: Any = None

    def next(self) -> _New | None:
        taken = [shard.stream for shard in self._log.known.values() if shard.stream]
        if self._dataset is None:
            self._dataset = open_stream(self._source, taken[-1]["state"] if taken else None)
            self._rows = iter(self._dataset)
        self._folder.mkdir(exist_ok=True)
        file = f"{len(taken):06d}.jsonl"
        count = _write_rows(self._folder / file, islice(self._rows, self._shard_rows))
        first = taken[-1]["rows"][1] + 1 if taken else 1
        rows = [first, first + count - 1]
        return _New(file, {"rows": rows, "state": self._dataset.state_dict()}) if count else None


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write a JSONL file, unless there is no row; return the number of rows."""
    rows, count = iter(rows), 0
    first = next(rows, None)
    if first is None:
        return 0
    with replace_file(path) as file:
        for count, row in enumerate(chain([first], rows), start=1):  # noqa: B007 - counted
            plain = {name: without_nulls(value) for name, value in row.items()}
            file.write(json.dumps(plain, default=str) + "\n")
    return count
