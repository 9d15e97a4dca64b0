"""docs/design.md has what the code cites, and the files that it names exist; links of all pages."""

import re
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.unit.test_structure import TIERS

PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
CITING = [
    *(ROOT / "trainer").rglob("*.py"),
    *(ROOT / "launch").rglob("*.py"),
    *(ROOT / "docs").glob("*.md"),
]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]


def cited(text: str) -> set[str]:
    """The contracts that a text cites in brackets, as (C7) or (C1 to C3)."""
    brackets = re.findall(r"\(([^()]*\bC\d[^()]*)\)", text)
    return {number for inside in brackets for number in re.findall(r"\bC\d+\b", inside)}


def test_every_contract_that_is_cited_has_a_heading() -> None:
    citations = {path: cited(path.read_text(encoding="utf-8")) for path in CITING}
    assert len(set().union(*citations.values())) > 8, "no citation was found"
    headings = set(re.findall(r"^### (C\d+) ", PAGE, flags=re.MULTILINE))
    assert headings == {f"C{number}" for number in range(1, 15)}
    wrong = {str(path): numbers - headings for path, numbers in citations.items()}
    assert not any(wrong.values()), {path: numbers for path, numbers in wrong.items() if numbers}


def test_citations_are_found() -> None:
    assert cited("the weights (C2), their order (C1 to C3) and C4; (see C99)") == {
        *("C1", "C2", "C3", "C99")
    }


def test_the_files_that_it_names_exist() -> None:
    named = re.findall(r"`((?:trainer|launch|tests|docs|ds_configs)/[\w./-]*)`", PAGE)
    assert len(named) > 60, "no file was found"
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_order_of_packages_is_the_one_that_is_tested() -> None:
    assert PAGE.split("```text\n")[1].split("```")[0].splitlines() == TIERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_all_pages_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    targets = [link for link in links if not link.startswith("http")]
    assert not [link for link in targets if not (page.parent / link).exists()]
