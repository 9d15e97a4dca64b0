"""Packages import one way, so that each can be read knowing only those before it."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from packhorse.trainer.engine import moments

ROOT = Path(__file__).resolve().parents[2]

# A package, or a file that lies beside them, imports only from lines above its own. Those on one
# line lie side by side: none imports another. A new one takes its place here.
TIERS = [
    "datatypes",
    "dist",
    "utils stop_flag",
    "config",
    "trackers",
    "data model metrics hang_watchdog",
    "engine guard",
    "checkpoint estimate",
    "run_folder loop",
    "eval build_engine attention_choice report",
    "train",
    "evaluate",
    "cli",
]
TIER_OF = {name: number for number, tier in enumerate(TIERS) for name in tier.split()}
TRAINER = "packhorse.trainer"
PICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
LAUNCH_MAY_IMPORT = {"config", "datatypes"}


def modules(folder: str) -> dict[str, str]:
    """The sources of a top-level folder by their dotted names, as `packhorse.trainer.data.pack`."""
    paths = (path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")
    return {
        ".".join(("packhorse", *path.relative_to(ROOT).with_suffix("").parts)): path.read_text()
        for path in paths
    }


def imports_of(source: str) -> set[str]:
    """Dotted names of everything that `source` imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages_of(source: str) -> set[str]:
    """The packages of trainer/, or the files beside them, that `source` imports."""
    names = (name for name in imports_of(source) if name.startswith(f"{TRAINER}."))
    return {name.split(".")[2] for name in names} & TIER_OF.keys()


def upward(module: str, source: str) -> list[str]:
    """Imports of a module from its own line of TIERS, or from one below it."""
    own = module.split(".")[2]
    return [
        f"{module} imports {other}"
        for other in sorted(packages_of(source))
        if other != own and TIER_OF[other] >= TIER_OF[own]
    ]


def cycle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other, in order; empty where there are none."""
    graph = {name: sorted(imports_of(source) & sources.keys()) for name, source in sources.items()}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in graph[name]:
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def test_every_package_has_its_place() -> None:
    assert {name.split(".")[2] for name in modules("trainer")} == TIER_OF.keys()


def test_packages_import_one_way() -> None:
    wrong = [fault for name, source in modules("trainer").items() for fault in upward(name, source)]
    assert not wrong, wrong


def test_no_file_imports_itself_in_a_circle() -> None:
    assert not cycle(modules("trainer") | modules("launch"))


@pytest.mark.parametrize(
    ("module", "planted", "seen"),
    [
        ("loop", f"from {TRAINER}.train import train", ["train"]),
        ("data.pack", f"def f():\n    import {TRAINER}.model.load", ["model"]),
        ("model.load", f"from {TRAINER}.data import pack", ["data"]),
        ("config.recipe", f"from {TRAINER}.engine.engine import Engine", ["engine"]),
        ("data.pack", f"from {TRAINER} import dist\nfrom {TRAINER}.data import cache", []),
    ],
)
def test_a_planted_upward_import_is_found(module: str, planted: str, seen: list[str]) -> None:
    module = f"{TRAINER}.{module}"
    assert upward(module, planted) == [f"{module} imports {name}" for name in seen]


def test_a_planted_circle_is_found() -> None:
    a, b = f"{TRAINER}.a", f"{TRAINER}.b"
    sources = {a: f"import {b}", b: f"def f():\n    from {TRAINER} import a"}
    assert cycle(sources) == [a, b, a]


def test_deepspeed_is_imported_in_engine_only() -> None:
    users = {
        name
        for name, source in (modules("trainer") | modules("launch")).items()
        if any(other.split(".")[0] == "deepspeed" for other in imports_of(source))
    }
    assert users, "the test looks at no file"
    assert {name.rpartition(".")[0] for name in users} == {f"{TRAINER}.engine"}


def test_nothing_is_pickled_between_ranks_or_read_as_a_pickle() -> None:
    """Who reaches gloo's ports would run code by it (docs/security.md)."""
    sources = modules("trainer") | modules("launch")
    found = [fault for name, source in sources.items() for fault in pickling(name, source)]
    assert not found, found
    planted = "import dill\nimport torch.distributed as td\ntd.all_gather_object([], 1)"
    assert pickling("x", planted) == ["x: all_gather_object", "x: dill"]
    assert pickling("x", "import torch\ntorch.load('f')") == ["x: torch.load"]


def test_deepspeed_pickles_between_ranks_only_where_it_is_not_used() -> None:
    """Tensor parallelism compares the ranks' first batch so, Ulysses' loader sends what is no
    tensor; packhorse uses neither."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec
    assert spec.origin
    folder = Path(spec.origin).parent
    naming = {
        str(path.relative_to(folder))
        for path in Path(folder, "runtime").rglob("*.py")
        if re.search(r"\bdist\.\w+_object(_list)?\(", path.read_text())
    }
    assert naming == {"runtime/engine.py", "runtime/sequence_parallel/ulysses_sp.py"}
    engine = Path(folder, "runtime/engine.py").read_text()
    inside = re.split(r"\n    def ", engine.split("_object")[0])[-1]
    assert inside.startswith("_configure_tensor_parallel_states("), inside[:80]
    assert "ulysses_sp" not in "".join(modules("trainer").values())


def pickling(module: str, source: str) -> list[str]:
    """What a module calls that pickles or unpickles: collectives of objects, torch.load, pickle."""
    found = {other.split(".")[0] for other in imports_of(source)} & PICKLERS
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "attr", getattr(node, "id", ""))
        of_torch = getattr(getattr(node, "value", None), "id", "") == "torch"
        if re.search("_object(_list)?$", name) and re.match("(all_)?gather|br|sc|send|recv", name):
            found.add(name)
        elif of_torch and name == "load":
            found.add("torch.load")
    return [f"{module}: {name}" for name in sorted(found)]


def test_one_file_names_the_optimizers_states() -> None:
    """Another optimizer changes `MOMENTS`; checkpoints, exports and the planner follow it."""
    states = {name for names in moments.MOMENTS.values() for name in names}
    naming = {
        name
        for name, source in modules("trainer").items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value in states
    }
    assert naming == {f"{TRAINER}.engine.moments"}


def test_launch_needs_the_recipe_alone() -> None:
    assert set().union(*map(packages_of, modules("launch").values())) <= LAUNCH_MAY_IMPORT
