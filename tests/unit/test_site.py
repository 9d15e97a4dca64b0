"""The site of docs/ is built strictly: each page, link and anchor exists."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.ranks import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def build(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    # with --quiet, mkdocs would count no warning, and --strict would stop at nothing
    words = ["mkdocs", "build", "--strict", "-f", config, "-d", folder]
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_every_page_of_the_repository_is_in_it(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").glob("*.md")]
    pages += [path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.md")]
    assert len(pages) > 20
    made = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    names = {path.with_suffix(".html").as_posix() for path in pages}
    assert {name.replace("README", "index") for name in names} | {"index.html"} <= made
    assert not list(site.rglob("*.py"))


def test_links_that_lead_out_of_docs_in_the_repository_lead_to_pages(site: Path) -> None:
    design = (site / "design.html").read_text(encoding="utf-8")
    assert 'href="index.html#what-is-exact"' in design
    first = (site / "index.html").read_text(encoding="utf-8")
    assert {"recipe.html", "python.ipynb", "benchmarks/results/vs_trl_cpu.html"} <= set(
        re.findall(r'href="([^"#]+)"', first)
    )


def test_it_asks_no_other_host_for_fonts_or_diagrams(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "fonts.googleapis" not in text
        assert 'class="mermaid"' not in text, "the theme would load mermaid.js for it"
    assert 'src="data_flow.svg"' in (site / "design.html").read_text(encoding="utf-8")


def test_the_drawn_diagram_says_what_the_page_says() -> None:
    """`python docs/make_flow.py MERMAID_JS` draws it anew."""
    source = (ROOT / "docs/design.md").read_text().split("```mermaid\n")[1].split("```")[0]
    labels = re.findall(r'\|"?(.+?)"?\||[\[(]+"?([^"\[\]()|]+)"?[\])]+', source)
    wanted = Counter("".join((a or b).split()) for a, b in labels)
    drawn = ElementTree.parse(ROOT / "docs/data_flow.svg").iter("{http://www.w3.org/2000/svg}text")
    assert Counter("".join("".join(text.itertext()).split()) for text in drawn) == wanted
    assert wanted["hf_export"] == 1


def test_a_link_to_nothing_stops_it(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[there](nothing.md)")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[0]
    text = text.replace("hooks: [docs/site_hooks.py]", "")
    (tmp_path / "mkdocs.yml").write_text(text)
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert "link 'nothing.md'" in done.stderr
