"""Write where a user says, without destroying what is there.

What packhorse wrote itself may be replaced; anything else is refused with BadInput. A folder is
packhorse's own if it holds the file MARKER, which lists the other files and their checksums; a
text is, while its last line is the digest of the lines before it, so that a file which a user has
edited is the user's.

A folder is built beside its place, in `.NAME.saving`, and enters it by a rename:

    .NAME.saving/unfinished   says that the folder is ours, first to come and last to go
    .NAME.saving/new          what is being built
    .NAME.saving/old          what `new` replaces, between two renames
    .NAME.saving/removing     what `new` has replaced
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.dist import log
from packhorse.trainer.utils.files import (
    checksum,
    publish_folder,
    read_object,
    write_json,
    write_synced,
)

MARKER = "packhorse_export.json"
UNFINISHED = "unfinished"


# ------------------------------------------------------------------------------------------ folders


def require_replaceable(out: Path, *, overwrite: bool) -> str | None:
    """Check that a folder may be built for `out`, and undo a replacement that was killed halfway.

    Returns:
        What is there and would be replaced, or None if nothing is there.

    Raises:
        BadInput: something else is there, or what is there is ours and `overwrite` is false.
    """
    staged = _staging(out)
    if staged.is_symlink() or (staged.exists() and not _is_unfinished(staged)):
        raise BadInput(
            f"{staged}: is in the way, and is not unfinished work of packhorse; remove it by hand, "
            "or give another --out"
        )
    if (staged / "old").exists() and not os.path.lexists(out):
        (staged / "old").rename(out)
    if out.is_symlink():
        raise BadInput(f"--out {out}: is a symbolic link; give the path of a new folder")
    if not out.exists():
        return None
    facts = _read_marker(out)
    if facts is None:
        raise BadInput(
            f"--out {out}: exists, and packhorse export did not write it; give another --out, or "
            "remove it by hand"
        )
    content = f"the {facts['kind']} of step {facts['step']} of {facts['run']}"
    if not overwrite:
        raise BadInput(
            f"--out {out}: holds {content}; give another --out, or --overwrite to replace it"
        )
    others = sorted(_files(out) - {MARKER, *facts["files"]})
    if others:
        raise BadInput(
            f"--out {out}: holds files that packhorse export did not write: "
            f"{', '.join(others[:5])}; move them away, or give another --out"
        )
    return content


def _read_marker(out: Path) -> dict[str, Any] | None:
    """Return the facts of a folder that `publish` wrote, or None if it is another one."""
    path = out / MARKER
    try:
        facts = read_object(path.read_bytes()) if path.is_file() else None  # a pipe is waited for
    except OSError:
        return None
    is_ours = facts and facts.keys() >= {"kind", "step", "run"} and _are_files(facts.get("files"))
    return facts if is_ours else None


def _are_files(files: Any) -> bool:
    # a list in folders of the first versions
    return isinstance(files, dict | list) and all(isinstance(name, str) for name in files)


def stage(out: Path) -> Path:
    """Make an empty staging folder for `out`, and return the path in it at which to build.

    Raises:
        BadInput: the folder that `out` lies in cannot be written.
    """
    staged = _staging(out)
    try:
        staged.parent.mkdir(parents=True, exist_ok=True)
        _remove_staging(staged)
        staged.mkdir()
        (staged / UNFINISHED).touch()
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error}); give another --out") from None
    return staged / "new"


def publish(out: Path, facts: dict[str, Any], *, overwrite: bool) -> None:
    """Move what was built for `out` there, with a MARKER that holds `facts`: kind, step and run.

    A process that is killed meanwhile leaves the old folder or the new one whole: at `out`, or for
    `require_replaceable` to move back there.

    Raises:
        BadInput: something else has come to lie there meanwhile, or the folder cannot be renamed.
    """
    staged = _staging(out)
    new, old = staged / "new", staged / "old"
    files = {name: checksum(new / name) for name in sorted(_files(new))}
    write_json(new / MARKER, {**facts, "files": files})
    for name in _files(new):
        # the old folder is deleted below: after a power cut the new one must not be empty
        with (new / name).open("rb") as file:
            os.fsync(file.fileno())
    is_replaced = require_replaceable(out, overwrite=overwrite) is not None
    try:
        if is_replaced:
            out.rename(old)
        publish_folder(new, out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise BadInput(f"--out {out}: cannot be written ({error}); give another --out") from error
    _remove_staging(staged)


def require_unchanged(folder: Path) -> None:
    """Check the files of a folder that `publish` wrote against their checksums, at disk speed; a
    folder of other origin passes. Texts that a user may have edited are named in the log.

    Raises:
        BadInput: weights have changed.
    """
    facts = _read_marker(folder)
    if facts is None or not isinstance(facts["files"], dict):
        return
    paths = {name: folder / name for name in facts["files"]}
    there = (name for name, path in paths.items() if path.is_file())
    changed = [name for name in there if checksum(paths[name]) != facts["files"][name]]
    if weights := [name for name in changed if name.endswith(".safetensors")]:
        raise BadInput(
            f"{folder}: {weights[0]} holds other bytes than packhorse exported; export it anew, or "
            f"remove {MARKER} if you have changed it yourself"
        )
    if changed:
        log.warning("%s: changed since packhorse exported it: %s", folder, ", ".join(changed[:5]))


def _staging(out: Path) -> Path:
    return out.with_name(f".{out.name}.saving")


def _is_unfinished(staged: Path) -> bool:
    # an empty one was killed before its marker came, or after it went
    return staged.is_dir() and ((staged / UNFINISHED).is_file() or not any(staged.iterdir()))


def _remove_staging(staged: Path) -> None:
    if not staged.exists():
        return
    old = staged / "old"
    if old.exists():  # so that a part of it is never moved back
        shutil.rmtree(staged / "removing", ignore_errors=True)
        old.rename(staged / "removing")
    remove_marked(staged, UNFINISHED)


def remove_marked(folder: Path, marker: str) -> None:
    """Delete a folder, its marker last: killed meanwhile, what is left is still known as ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != marker:
            path.unlink()
    (folder / marker).unlink(missing_ok=True)
    folder.rmdir()


def _files(folder: Path) -> set[str]:
    """Return the relative paths of all that a folder holds but folders."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


# -------------------------------------------------------------------------------------------- texts


def write_own_text(
    path: Path,
    text: str,
    comment: str | None = None,
    instead: str = "give another path, or move it away",
) -> None:
    """Write a text file; replace an earlier one only if it is ours and unedited, or the same.

    Args:
        comment: how a line of the file says nothing, as "# {}": a last line will hold the digest.
            None: the file has no comments, and only the same text may be there.
        instead: what the user can do if another file is there.

    Raises:
        BadInput: another file is there, or it cannot be written.
    """
    if comment is not None:
        text = text.removesuffix("\n") + "\n"
        text += _last_line(text.encode(), comment).decode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not _is_own(path, text, comment):
            raise BadInput(f"{path}: exists, and is not as packhorse wrote it; {instead}")
        write_synced(path, text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error}); give another path") from None


def _last_line(body: bytes, comment: str) -> bytes:
    digest = hashlib.blake2b(body, digest_size=16).hexdigest()
    return (comment.format(f"written by packhorse, {digest}") + "\n").encode()


def _is_own(path: Path, text: str, comment: str | None) -> bool:
    if path.is_symlink() or not path.is_file():  # a pipe would be waited for, /dev/zero never ends
        return False
    there = path.read_bytes()
    if comment is None:
        return there == text.encode()
    *body, last = there.splitlines(keepends=True) or [b""]
    return last == _last_line(b"".join(body), comment)
