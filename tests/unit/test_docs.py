"""The documents agree with the code."""

import ast
import re
import runpy

import yaml

from packhorse.trainer.config.recipe import Recipe, parse_recipe
from packhorse.trainer.metrics import PARTS
from tests.numerics.test_x6_layers import MODELS as WITH_LIGER
from tests.ranks import ROOT
from tests.unit.test_packing_check import BY_ITSELF, MIXING, RIGHT


def test_the_recipe_reference_is_current() -> None:
    """`python docs/make_recipe.py` updates it."""
    reference = runpy.run_path(str(ROOT / "docs" / "make_recipe.py"))["reference"]
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == reference()


def test_every_key_of_the_reference_has_a_text() -> None:
    """But `kind`, whose text is its section's, and those that hold sections."""
    made = runpy.run_path(str(ROOT / "docs" / "make_recipe.py"))
    left, bare = [Recipe], set()
    while left:
        section = left.pop()
        texts = made["descriptions"](section)
        for key, field in section.model_fields.items():
            inner = made["_sections"](field.annotation)
            left += inner
            if not inner and key != "kind" and not texts.get(key):
                bare.add(f"{section.__name__}.{key}")
    assert bare == set()


def test_the_table_of_scale_is_current() -> None:
    """`python docs/make_scale.py` updates it."""
    page = runpy.run_path(str(ROOT / "docs" / "make_scale.py"))["page"]
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") == page()


def test_the_table_of_long_sequences_is_current() -> None:
    """`python docs/make_long_context.py` updates it. All lines take a minute: one is compared."""
    made = runpy.run_path(str(ROOT / "docs" / "make_long_context.py"))
    line = made["table"](rows=made["ROWS"][-12:-11])
    assert line.splitlines()[-1] in (ROOT / "docs" / "long_context.md").read_text(encoding="utf-8")


def test_the_scorers_of_the_page_are_a_recipes() -> None:
    section = (
        (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").split("\n## Scorers\n")[1]
    )
    tree = yaml.safe_load(section.split("```yaml\n")[1].split("```")[0])
    data = {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}]}
    recipe = parse_recipe({"model": {"name": "m"}, "data": data, "run": {"dir": "r"}, **tree})
    assert recipe.eval.generate is not None
    kinds = {scorer.kind for scorer in recipe.eval.generate.scorers.values()}
    assert kinds == {
        "format",
        "exact",
        "contains",
        "math",
        "choice",
        "json_schema",
        "tool_call",
        "refusal",
        "function",
        "judge",
    }


def written_names() -> set[str]:
    """Return the metrics' names in the code; what an f-string inserts is NAME."""
    names = set()
    for path in (ROOT / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "NAME" for part in parts]
            text = "".join(map(str, texts))
            if re.fullmatch(r"(train|perf|pack|mem|eval)/[\w/]+", text):
                names.add(text)
    steps = {f"perf/{part}_s" for part in PARTS}
    assert "perf/NAME_s" in names, "the code writes the parts of a step otherwise"
    return names - {"perf/NAME_s"} | steps


def test_the_page_of_metrics_has_the_names_that_the_code_writes() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+/[\w/]+)` \|", page, flags=re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert set(listed) == written_names()


def test_the_table_of_families_says_what_the_tests_prove() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if re.search(r"\| `\w+` \|", line)
    ]

    families = [row for row in rows if len(row) == 6]

    def kinds(column: int) -> set[str]:
        return {row[1].strip("`") for row in families if row[column].startswith("yes")}

    packed = [config for config, _ in (*RIGHT.values(), *MIXING.values())]
    assert kinds(2) == {config.model_type for config in (*packed, *BY_ITSELF.values())}
    assert kinds(3) == {config.model_type for config in WITH_LIGER.values()}
    named = {name for row in families for name in re.findall(r"`(\w+)`", row[-1])}
    ready = {path.stem for path in (ROOT / "recipes").glob("*.yaml")} - {"debug"}
    assert ready <= named
