"""Imports go one way, so that a file can be read knowing only those above it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A file imports only from the lines above its own. A new file takes its place here.
TIERS = [
    "flow arguments section supervise",
    "config_data config_eval worker",
    "config dist",
    "once picture template shards watch functions strict_json endpoint bounded statistics data/digest",
    "data/source data/format data/math_answers data/mask data/tokenise data/cache data/pack data/plan data/split",
    "data/filters",
    "data/rows",
    "data/loader",
    "data/leakage",
    "data/growing data/summary",
    "model/attention model/loss model/noise model/adapter model/fused",
    "model/load model/sft",
    "model/probe",
    "optim metrics progress preview zero scorers judge ds_template",
    "engine guard planner score",
    "generate",
    "checkpoint run_folder best",
    "export universal planning compare",
    "served",
    "evaluate",
    "loop",
    "train verify lm_eval_tasks",
    "assess",
    "cli_launch cli_eval",
    "cli",
]
TIER_OF = {name: number for number, tier in enumerate(TIERS) for name in tier.split()}
LAUNCH_MAY_IMPORT = {"config", "flow"}


def modules(package: str) -> dict[str, Path]:
    """Files of a package by their names below it, as `data/loader`."""
    folder = ROOT / package
    paths = (path for path in folder.rglob("*.py") if path.name != "__init__.py")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def imported(source: str) -> set[str]:
    """Dotted names of everything that `source` imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def trainer_files(source: str) -> set[str]:
    """The files of trainer/ among what `source` imports."""
    paths = {
        name.removeprefix("trainer.").replace(".", "/") for name in imported(source) if name.startswith("trainer.")
    }
    return paths & set(modules("trainer"))


def upward(name: str, source: str) -> list[str]:
    """Imports of file `name` that are not from the tiers above it, or are from the other room."""
    wrong = [other for other in trainer_files(source) if TIER_OF[other] >= TIER_OF[name]]
    rooms = {"data/": "model/", "model/": "data/"}
    for room, other_room in rooms.items():
        if name.startswith(room):
            wrong += [other for other in trainer_files(source) if other.startswith(other_room)]
    return [f"{name} imports {other}" for other in sorted(wrong)]


def test_every_file_has_its_place():
    assert set(modules("trainer")) == set(TIER_OF)


def test_imports_go_one_way():
    wrong = [fault for name, path in modules("trainer").items() for fault in upward(name, path.read_text())]
    assert not wrong, wrong


def test_an_upward_import_is_seen():
    assert upward("loop", "from trainer.train import train") == ["loop imports train"]
    assert upward("data/pack", "def f():\n    from trainer.data import plan") == ["data/pack imports data/plan"]
    assert upward("model/load", "import trainer.data.pack") == ["model/load imports data/pack"]
    assert upward("loop", "from trainer import dist") == []


def test_deepspeed_is_imported_in_engine_only():
    files = {**modules("trainer"), **{f"launch/{name}": path for name, path in modules("launch").items()}}
    users = {n for n, path in files.items() if any(i.split(".")[0] == "deepspeed" for i in imported(path.read_text()))}
    assert users == {"engine"}


def test_launch_needs_the_recipe_alone():
    used = set().union(*(trainer_files(path.read_text()) for path in modules("launch").values()))
    assert used <= LAUNCH_MAY_IMPORT
