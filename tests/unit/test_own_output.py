"""What packhorse wrote may be replaced, and is never half there; all else is left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils import own_output
from packhorse.trainer.utils.files import checksum
from packhorse.trainer.utils.own_output import MARKER, require_replaceable, write_own_text

FACTS = {"kind": "model", "step": 3, "run": "mine"}


def build(out: Path, text: str, *, overwrite: bool = False) -> None:
    """Write a folder of two files, as an export does."""
    require_replaceable(out, overwrite=overwrite)
    folder = own_output.stage(out)
    (folder / "code").mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "code" / "model.py").write_text(text)
    own_output.publish(out, FACTS, overwrite=overwrite)


def content(folder: Path) -> str | None:
    """The text of a whole folder; None if it is not there."""
    if not folder.exists():
        return None
    weights, code, marker = (folder / name for name in ("weights", "code/model.py", MARKER))
    assert weights.read_text() == code.read_text()
    assert json.loads(marker.read_text())["step"] == 3
    return weights.read_text()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------ folders


def test_a_folder_says_what_it_is_and_nothing_is_left_beside_it(out: Path) -> None:
    build(out, "first")
    both = checksum(out / "weights")
    files = {"code/model.py": both, "weights": both}
    assert json.loads((out / MARKER).read_text()) == {**FACTS, "files": files}
    assert names(out.parent) == ["out"]


def test_an_own_folder_is_replaced_only_if_asked(out: Path) -> None:
    build(out, "first")
    with pytest.raises(BadInput, match=r"holds the model of step 3 of mine; .*--overwrite"):
        build(out, "second")
    assert content(out) == "first"
    assert require_replaceable(out, overwrite=True) == "the model of step 3 of mine"
    build(out, "second", overwrite=True)
    assert (content(out), names(out.parent)) == ("second", ["out"])


def a_base_model(out: Path) -> None:
    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).write_text("{}")


def an_empty_folder(out: Path) -> None:
    out.mkdir()


def a_file(out: Path) -> None:
    out.write_text("a thesis")


def a_link_to_a_folder(out: Path) -> None:
    build(out.with_name("elsewhere"), "first")
    out.symlink_to("elsewhere")


def a_broken_link(out: Path) -> None:
    out.symlink_to("nowhere")


def a_marker_of_another_program(out: Path) -> None:
    out.mkdir()
    (out / MARKER).write_text('{"step": 3}')


def notes_in_an_export(out: Path) -> None:
    build(out, "first")
    (out / "code" / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("put", "why"),
    [
        (a_base_model, "did not write it; give another --out, or remove it by hand"),
        (an_empty_folder, "did not write it"),
        (a_file, "did not write it"),
        (a_marker_of_another_program, "did not write it"),
        (a_link_to_a_folder, "is a symbolic link"),
        (a_broken_link, "is a symbolic link"),
        (notes_in_an_export, r"did not write: code/notes\.txt"),
    ],
)
def test_what_is_not_ours_is_refused_even_with_overwrite(
    out: Path, put: Callable[[Path], None], why: str
) -> None:
    put(out)
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(BadInput, match=why):
        build(out, "second", overwrite=True)
    assert sorted(out.parent.rglob("*")) == before


def test_what_comes_to_lie_there_while_the_folder_is_built_is_left_alone(out: Path) -> None:
    folder = own_output.stage(out)
    folder.mkdir()
    a_base_model(out)
    with pytest.raises(BadInput, match="did not write it"):
        own_output.publish(out, FACTS, overwrite=True)
    assert names(out) == ["config.json", "model.safetensors"]


def test_unfinished_work_is_known_by_a_marker_not_by_its_name(out: Path) -> None:
    staged = own_output.stage(out).parent
    (staged / "weights").write_text("half")
    build(out, "first")
    assert names(out.parent) == ["out"], "the unfinished work was ours"
    shutil.rmtree(out)
    staged.mkdir()
    (staged / "thesis.tex").write_text("mine")
    with pytest.raises(BadInput, match="is not unfinished work of packhorse"):
        build(out, "second")
    assert (staged / "thesis.tex").exists()


def test_a_place_that_cannot_be_written_is_bad_input(out: Path) -> None:
    out.write_text("a file")
    with pytest.raises(BadInput, match="cannot be written"):
        own_output.stage(out / "below")


def killed_at(monkeypatch: pytest.MonkeyPatch, call: int, work: Callable[[], Any]) -> bool:
    """Do the work in a process that is killed (-9) before its call of that number which renames,
    deletes or syncs; a tree is then half deleted.

    Returns whether it came to that call.
    """
    child = os.fork()
    if child == 0:
        try:
            kill_at(monkeypatch, call)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    calls = 0

    def killing(work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def count(path: Any, *rest: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                if name == "rmtree":
                    for found in [path for path in Path(path).rglob("*") if path.is_file()][:1]:
                        os.unlink(found)
                os.kill(os.getpid(), signal.SIGKILL)
            return work(path, *rest, **options)

        return count

    for name in ("rename", "replace", "rmdir", "touch", "unlink"):
        monkeypatch.setattr(Path, name, killing(getattr(Path, name), name))
    monkeypatch.setattr(shutil, "rmtree", killing(shutil.rmtree, "rmtree"))
    monkeypatch.setattr(os, "fsync", killing(os.fsync, "fsync"))


@pytest.mark.parametrize("call", range(1, 30))
def test_killed_at_any_point_the_old_folder_or_the_new_one_is_whole(
    out: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(out, "old")
    if not killed_at(monkeypatch, call, lambda: build(out, "new", overwrite=True)):
        assert call > 15, "a point at which to kill has vanished: lower this number"
        return
    there = content(out)
    assert there in ("old", "new") or content(out.with_name(".out.saving") / "old") == "old"
    assert require_replaceable(out, overwrite=True), "the next start finds it ours"
    assert content(out) == (there or "old"), "and puts the old one back"
    build(out, "newest", overwrite=True)
    assert (content(out), names(out.parent)) == ("newest", ["out"])


def test_a_failing_rename_puts_the_old_folder_back(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(out, "old")

    def fail(*_: Path) -> None:
        raise OSError("the network file system is gone")

    with monkeypatch.context() as patch:
        patch.setattr(own_output, "publish_folder", fail)
        with pytest.raises(BadInput, match="is gone"):
            build(out, "new", overwrite=True)
    assert content(out) == "old"


def test_a_marker_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results"
    (folder / "logs").mkdir(parents=True)
    for name in ("a.json", "marker", "z.json", "logs/rank"):
        (folder / name).write_text("")
    assert killed_at(monkeypatch, 1, lambda: own_output.remove_marked(folder, "marker"))
    assert (folder / "marker").exists()
    own_output.remove_marked(folder, "marker")
    assert not folder.exists()


# -------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("comment", ["# {}", "<!-- {} -->"])
def test_a_text_of_ours_is_replaced_until_the_user_edits_it(tmp_path: Path, comment: str) -> None:
    path = tmp_path / "new" / "job.yaml"
    write_own_text(path, "nodes: 2", comment)
    assert path.read_text().startswith("nodes: 2\n" + comment.split()[0])
    write_own_text(path, "nodes: 4\r\n", comment)
    write_own_text(path, "nodes: 8\n", comment)
    edited = path.read_text().replace("nodes: 8", "nodes: 9")
    path.write_text(edited)
    with pytest.raises(BadInput, match=r"is not as packhorse wrote it; move it away"):
        write_own_text(path, "nodes: 8\n", comment, "move it away")
    assert path.read_text() == edited
    assert names(path.parent) == ["job.yaml"]


def test_a_file_without_comments_is_written_once_or_the_same(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_own_text(path, "{}\n")
    write_own_text(path, "{}\n")
    with pytest.raises(BadInput, match="is not as packhorse wrote it"):
        write_own_text(path, "[]\n")
    assert path.read_text() == "{}\n"


@pytest.mark.parametrize(
    "marker",
    [
        *('{"files": 5}', '{"files": [[1]]}', '{"files": null}', "[" * 99_999),
        None,  # a pipe, which would be waited for
    ],
)
def test_a_marker_that_holds_anything_else_is_not_ours(out: Path, marker: str | None) -> None:
    out.mkdir()
    if marker is None:
        os.mkfifo(out / MARKER)
    else:
        (out / MARKER).write_text(marker.replace("{", '{"kind": 1, "step": 2, "run": 3, '))
    with pytest.raises(BadInput, match="packhorse export did not write it"):
        require_replaceable(out, overwrite=True)
    own_output.require_unchanged(out)  # as a model of other origin
    assert names(out) == [MARKER]


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless device"])
def test_a_text_does_not_go_where_no_file_is(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero") if kind == "endless device" else tmp_path / "page.html"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(BadInput, match="is not as packhorse wrote it"):
        write_own_text(path, "<html>", "<!-- {} -->")


@pytest.mark.parametrize("there", ["", "my page", "a\nb\n"])
def test_a_text_of_the_user_is_left_alone(tmp_path: Path, there: str) -> None:
    path = tmp_path / "page.html"
    path.write_text(there)
    with pytest.raises(BadInput, match="is not as packhorse wrote it"):
        write_own_text(path, "<html>", "<!-- {} -->")
    assert path.read_text() == there


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write_own_text(tmp_path / "a.html", "<html>", "<!-- {} -->")
    (tmp_path / "b.html").symlink_to("a.html")
    with pytest.raises(BadInput):
        write_own_text(tmp_path / "b.html", "<html>", "<!-- {} -->")
    assert (tmp_path / "b.html").is_symlink()
