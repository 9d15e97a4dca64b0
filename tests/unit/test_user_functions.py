"""Functions of the user are found in the current folder, and identified by their file's content."""

import sys

import pytest

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.user_functions import function_digest, load_function


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Return a current folder that is not on Python's path, as for the installed command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


def test_a_function_of_the_current_folder_or_of_a_package_in_it_is_found(here):
    (here / "mine_a.py").write_text("def double(x): return 2 * x")
    (here / "package_a").mkdir()
    (here / "package_a" / "inner.py").write_text("from mine_a import double")
    assert load_function("mine_a:double")(4) == 8
    assert load_function("package_a.inner:double")(4) == 8
    assert load_function("json:loads")("4") == 4


def test_the_named_module_comes_from_the_current_folder_and_what_it_imports_from_packages(here):
    for name in ("tabnanny", "pyclbr"):  # modules of Python that nobody else imports
        (here / f"{name}.py").write_text(
            "import pyclbr\ndef where(): return __file__, pyclbr.__file__"
        )
    module, other = load_function("tabnanny:where")()
    assert module == str(here / "tabnanny.py")
    assert other != str(here / "pyclbr.py")
    assert sys.path[0] != str(here)


def test_a_function_beside_the_data_is_not_found(here):
    (here / "data").mkdir()
    (here / "data" / "mine_b.py").write_text("def double(x): return 2 * x")
    with pytest.raises(
        BadInput, match=r"`mine_b:double`: the module cannot be imported .*ModuleNotFoundError"
    ):
        load_function("mine_b:double")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(): pass", r"has no function `double`"),
        ("double = 3", r"has no function `double`"),
        ("def double(x) return", r"cannot be imported .*SyntaxError"),
        ("1 / 0", r"cannot be imported .*ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", r"cannot be imported .*SystemExit: 3"),
    ],
)
def test_a_module_that_cannot_be_used_is_refused(here, request, source, message):
    name = f"bad_{abs(hash(request.node.name))}"
    (here / f"{name}.py").write_text(source)
    with pytest.raises(BadInput, match=message):
        load_function(f"{name}:double")


def test_the_digest_is_of_the_file(here):
    (here / "mine_c.py").write_text("def double(x): return 2 * x")
    before = function_digest("mine_c:double")
    assert function_digest("mine_c:double") == before
    (here / "mine_c.py").write_text("def double(x): return x + x")
    assert function_digest("mine_c:double") != before
    with pytest.raises(BadInput, match="has no file"):
        function_digest("builtins:dict")
