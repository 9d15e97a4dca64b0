"""Keep the log of a streaming run's shards: a line for each use of one.

Rank 0 appends to shards.jsonl in the run folder; all ranks read it. The plan of the run is a
function of its lines (C1).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packhorse.trainer.data.digest import json_digest
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.files import sync_folder
from packhorse.trainer.utils.json_lines import append_json_lines
from packhorse.trainer.utils.lease import require_owned
from packhorse.trainer.utils.log_lines import check_shard
from packhorse.trainer.utils.text import printable

LOG = "shards.jsonl"  # in the run folder


@dataclass(frozen=True)
class Shard:
    """One use of a shard: a line of the log. A shard that is used again has another number."""

    number: int  # from 0; the plan's epoch
    file: str  # its name in the source's folder; what came from a stream is in the run folder
    bytes: int
    digest: str  # of the file
    documents: str  # fingerprint of what it was tokenized into
    sequences: int  # into which it packs
    first_step: int  # counted from 1, as in metrics.jsonl
    report: dict[str, Any]  # see Prepared.report
    rejects: str  # the file that lists its rejected rows
    stream: dict[str, Any] | None = None  # its `rows` [from, to] of the stream, and `state` after


class ShardLog:
    """The lines of the log, in order. Rank 0 appends to it; all ranks read it."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.shards: list[Shard] = []
        self.known: dict[str, Shard] = {}  # by file, in the order of first use
        self._turn = 0  # the next of the known shards to use again
        self.read()

    def read(self) -> None:
        """Read the lines that were added; a torn last line, which a killed start left, is ignored.

        Raises:
            BadInput: a line is damaged.
        """
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().split(b"\n")[:-1]
        for line in lines:
            self._offset += len(line) + 1
            try:
                fields = json.loads(line)
                check_shard(fields, len(self.shards))
                self._add(Shard(**fields))
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise BadInput(
                    f"{self._path}: line {len(self.shards) + 1} is damaged "
                    f"({printable(error, 200)}); restore the file, or give another run.dir"
                ) from None

    def append(self, shard: Shard) -> None:
        """Write a line that survives a power cut, over a torn one if a killed start left it."""
        require_owned(self._path)
        with self._path.open("ab") as file:
            file.truncate(self._offset)
        append_json_lines(self._path, [asdict(shard)], sync=True)
        sync_folder(self._path.parent)
        self.read()

    def _add(self, shard: Shard) -> None:
        if shard.file in self.known:
            self._turn = [*self.known].index(shard.file) + 1
        self.known.setdefault(shard.file, shard)
        self.shards.append(shard)

    def next_known(self) -> Shard:
        """Return the known shard to use again: from the first to the last, then the first again."""
        known = [*self.known.values()]
        return known[self._turn % len(known)]

    def digest(self, step: int) -> str:
        """Hash what the log says of the shards that the first `step` steps are made of."""
        return json_digest(
            [
                [s.number, s.file, s.digest, s.documents, s.sequences, s.first_step]
                for s in self.shards
                if s.first_step <= step
            ]
        )
