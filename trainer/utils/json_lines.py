"""Files of JSON lines, which a killed run may leave with a half-written last line (C10)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import log
from packhorse.trainer.utils.files import read_object, replace_file
from packhorse.trainer.utils.lease import require_owned

Check = Callable[[dict[str, Any]], None]
"""check(line) raises LookupError or TypeError for a damaged line, as in utils/log_lines.py."""


def append_json_lines(path: Path, contents: Iterable[Any], *, sync: bool = False) -> None:
    """Append lines to a file of JSON lines, which a kill of this process does not take back.

    Args:
        sync: a power cut does not either, once this has returned.
    """
    require_owned(path)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in contents))
        if sync:
            file.flush()
            os.fsync(file.fileno())


def read_json_lines(
    path: Path, *, skip_damaged: bool = False, check: Check = lambda _: None
) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; an empty list if there is no file.

    Args:
        skip_damaged: leave out lines that are no JSON object, as the last one may be while a run
            writes, or once it was killed, and those that `check` finds damaged.

    Raises:
        ValueError: a line is damaged, and `skip_damaged` is false.
    """
    found = []
    for line in _lines(path):
        fields = read_object(line)
        try:
            if fields is None:
                raise TypeError("no JSON object")
            check(fields)
        except (LookupError, TypeError) as error:
            if not skip_damaged:
                raise ValueError(f"{path}: {line[:100]!r} is damaged ({error})") from None
        else:
            found.append(fields)
    return found


def cut_json_lines(
    path: Path, is_kept: Callable[[dict[str, Any]], bool], check: Check = lambda _: None
) -> None:
    """Keep the lines of a file of JSON lines that `is_kept` wants, unchanged.

    Lines that are no JSON object, or that `check` finds damaged, are moved to a file beside it, and
    that is said; a last line without an end, as a killed run leaves it, is dropped. `is_kept` may
    find them damaged, too, as `check` does.
    """
    if not path.is_file():
        return
    kept, damaged = [], []
    for line in _lines(path):
        fields = read_object(line)
        try:
            if fields is None:
                raise TypeError
            check(fields)
            if is_kept(fields):
                kept.append(line.removesuffix(b"\n") + b"\n")
        except (LookupError, TypeError):
            if line.endswith(b"\n"):
                damaged.append(line)
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        if os.path.lexists(aside) and (aside.is_symlink() or not aside.is_file()):
            raise BadInput(f"{aside}: is no plain file, to set damaged lines aside; move it away")
        require_owned(aside)
        with aside.open("ab") as file:
            file.writelines(damaged)
        log.warning("%s: %d damaged lines are set aside in %s", path, len(damaged), aside.name)
    with replace_file(path, "wb") as file:
        file.writelines(kept)


def _lines(path: Path) -> list[bytes]:
    # As bytes end at \n and \r alone: an answer may hold U+2028, at which a text would end, too.
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []
