"""Give mkdocs the pages that lie outside docs/: README.md, as the first page, and benchmarks/.

The diagram of design.md, which GitHub draws, is shown as docs/make_flow.py has drawn it.

Pages are written for the repository, where links are relative to their files. Here the links
follow the pages to their places in the site. mkdocs.yml names this file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")

DIAGRAM = re.compile(r"^```mermaid\n.*?^```$", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs/."""
    for path in (ROOT / "README.md", *sorted((ROOT / "benchmarks").rglob("*.md"))):
        place = _in_site(path.relative_to(ROOT).as_posix())
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links between files of the repository into links between pages."""
    own = page.file.src_uri
    source = "README.md" if own == "index.md" else own
    if not source.startswith(("README", "benchmarks/")):
        source = f"docs/{source}"

    def follow(link: re.Match[str]) -> str:
        path, sharp, anchor = link[1].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        return posixpath.relpath(_in_site(target), posixpath.dirname(own) or ".") + sharp + anchor

    markdown = DIAGRAM.sub("![How data flows, as the text below says](data_flow.svg)", markdown)
    return LINK.sub(follow, markdown)


def _in_site(path: str) -> str:
    """Return where a file of the repository lies in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")
