"""Templates and the debug recipe come with the package; no file of the current folder hides it."""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from packhorse.trainer.config.packaged import MAIN, PACKAGE, find_template, template_names
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.child_process import start_child


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_the_packaged_template_in_every_folder(here: Path) -> None:
    assert {"zero0", "zero3", "zero3_nvme"} <= set(template_names())
    packaged = PACKAGE / "ds_configs" / "zero3.json"
    assert find_template("zero3") == packaged
    (here / "zero3").write_text("{}")
    assert find_template("zero3") == packaged


def test_a_path_is_a_file_from_the_current_folder(here: Path) -> None:
    assert find_template("ds_configs/zero3.json") == PACKAGE / "ds_configs" / "zero3.json"
    (here / "ds_configs").mkdir()
    mine = here / "ds_configs" / "zero3.json"
    mine.write_text("{}")
    assert find_template("ds_configs/zero3.json").samefile(mine)
    assert find_template(str(mine)) == mine


@pytest.mark.parametrize("name", ["zero4", "mine.json", ""])
def test_a_missing_template_is_refused_with_the_names(here: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"one of zero0, zero1, zero1_streamed, zero2, zero3, "):
        find_template(name)


def test_the_packaged_recipe_brings_its_files_and_runs_in_the_current_folder(here: Path) -> None:
    recipe = load_recipe("debug", ["data.eval.0.path=recipes/mine.jsonl"])
    assert (Path(recipe.model.name) / "config.json").is_file()
    assert recipe.data.train[0].path == str(PACKAGE / "recipes" / "debug" / "train.jsonl")
    assert recipe.data.eval[0].path == "recipes/mine.jsonl"
    assert recipe.run.dir == "runs/debug"


def test_a_file_comes_before_a_packaged_recipe_and_a_missing_one_names_them(here: Path) -> None:
    with pytest.raises(BadInput, match="debg: there is no such file; packaged recipes: debug"):
        load_recipe("debg")
    (here / "debug").write_text("- no recipe")
    with pytest.raises(BadInput, match="debug: a recipe is a mapping"):
        load_recipe("debug")


# ------------------------------------------------------------------------------- the current folder


def _send_path(pipe: Connection) -> None:
    pipe.send(sys.path)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_searches_what_its_parent_searches(here: Path, method: str) -> None:
    """What Python itself imports before it has the parent's path would be found here first."""
    (here / "selectors.py").write_text("import os; os._exit(9)")
    child = start_child(multiprocessing.get_context(method), _send_path)
    try:
        assert child.pipe.recv() == sys.path
    finally:
        child.end()


@pytest.mark.parametrize("command", [[MAIN], ["-m", "packhorse"]])
def test_the_command_imports_nothing_of_the_current_folder(here: Path, command: list[str]) -> None:
    for name in ("trainer", "typer", "yaml", "pathlib", "json", "tempfile", "subprocess", "xxhash"):
        (here / f"{name}.py").write_text("import os; os._exit(9)")
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, *command, "train", "nowhere"], env=env, capture_output=True, text=True
    )
    assert (done.returncode, "there is no such file" in done.stderr) == (2, True), done.stderr


def test_a_checkout_that_is_not_installed_runs_its_own_code(here: Path) -> None:
    """Here the environment has another packhorse, which must not be mixed in."""
    command = here / "packhorse" / "trainer" / "cli"
    command.mkdir(parents=True)
    (here / "packhorse" / "__init__.py").touch()
    (command / "main.py").write_text("def main(): print(__file__)")
    main = here / "packhorse" / "__main__.py"
    main.write_text(Path(MAIN).read_text())
    done = subprocess.run([sys.executable, str(main)], cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == str(command / "main.py")
