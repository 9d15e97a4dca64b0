"""Packages import one way, so that each can be read knowing only those before it."""

import ast
from pathlib import Path

import pytest

from packhorse.trainer.engine import optimizers

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
    "checkpoint estimate run_folder loop",
    "eval build_engine report",
    "train",
    "evaluate",
    "cli",
]
TIER_OF = {name: number for number, tier in enumerate(TIERS) for name in tier.split()}
TRAINER = "packhorse.trainer"
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


def test_one_file_names_the_optimizers_states() -> None:
    """Another optimizer changes `MOMENTS`; checkpoints, exports and the planner follow it."""
    states = {name for names in optimizers.MOMENTS.values() for name in names}
    naming = {
        name
        for name, source in modules("trainer").items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value in states
    }
    assert naming == {f"{TRAINER}.engine.optimizers"}


def test_launch_needs_the_recipe_alone() -> None:
    assert set().union(*map(packages_of, modules("launch").values())) <= LAUNCH_MAY_IMPORT
