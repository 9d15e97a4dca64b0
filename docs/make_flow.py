"""Draw the diagram of design.md as docs/data_flow.svg, which the site shows: it needs no network.

usage: python docs/make_flow.py MERMAID_JS

MERMAID_JS is dist/mermaid.min.js of npm's package mermaid; Chromium runs it.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
# texts as <text>, which every viewer of SVG shows; mermaid's default are pieces of HTML
PAGE = """<!doctype html><meta charset="utf-8"><pre id="flow">{source}</pre>
<script>{mermaid}</script>
<script>
mermaid.initialize({{startOnLoad: false, fontFamily: 'sans-serif', deterministicIds: true,
                    htmlLabels: false, flowchart: {{htmlLabels: false, wrappingWidth: 250}}}});
mermaid.render('drawn', document.getElementById('flow').textContent)
  .then(made => document.body.innerHTML = made.svg);
</script>"""


def main() -> None:
    mermaid = Path(sys.argv[1]).read_text(encoding="utf-8").replace("</script", "<\\/script")
    design = (DOCS / "design.md").read_text(encoding="utf-8")
    source = design.split("```mermaid\n")[1].split("```")[0]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        text = PAGE.format(source=html.escape(source), mermaid=mermaid)
        page.write_text(text, encoding="utf-8")
        words = ["chromium", "--headless", "--no-sandbox", "--virtual-time-budget=20000"]
        drawn = subprocess.run(
            [*words, f"--user-data-dir={folder}/profile", "--dump-dom", page.as_uri()],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = re.search(r"<svg id=\"drawn\".*</svg>", drawn, re.DOTALL)
    assert found, drawn[-2000:]
    # HTML's short forms are not XML's; white, as its texts are dark on a dark page, too
    svg = found[0].replace("<br>", "<br/>").replace('style="', 'style="background: white; ', 1)
    svg = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", svg)
    (DOCS / "data_flow.svg").write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
