"""A report of real runs, opened by a real browser: narrow and wide, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from packhorse.trainer.cli.runs import report
from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.runs

WIDTHS = (390, 1400)
# a page that shows the report in frames of these widths, and writes what it measures as its text
HARNESS = """<!doctype html><meta charset="utf-8"><body>{frames}<script>
addEventListener('load', () => {{
  const found = [...document.querySelectorAll('iframe')].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const box = element => {{
      const size = element.getBoundingClientRect();
      return [size.width, size.height, size.right];
    }};
    const style = frame.contentWindow.getComputedStyle(page.body);
    return {{
      width: root.clientWidth, scroll_width: root.scrollWidth,
      figures: [...page.querySelectorAll('figure svg')].map(box),
      type: [...page.querySelectorAll('figure svg text')].map(text => box(text)[1]),
      tables: [...page.querySelectorAll('.scroll')].map(box),
      headings: [...page.querySelectorAll('h2, h3')].map(heading => heading.textContent),
      colours: [style.color, style.backgroundColor],
      text: page.body.textContent,
    }};
  }});
  document.body.textContent = JSON.stringify(found);
}});
</script></body>"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two debug runs that differ in the learning rate and in their lengths."""
    root = tmp_path_factory.mktemp("report")
    cases = [
        {
            "run": str(root / name),
            "recipe": str(ROOT / "recipes" / "debug.yaml"),
            "overrides": [f"data.cache={root / 'cache'}", "eval.every_steps=3", *changes],
        }
        for name, changes in {
            "long": ["train.steps=6"],
            "<short>": ["train.steps=4", "optim.lr=1e-3"],
        }.items()
    ]
    path = root / "cases.json"
    path.write_text(json.dumps(cases))
    run_ranks(1, ["-m", "tests.numerics.cases", str(path)])
    return [root / "long", root / "<short>"]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    out = runs[0].parent / "report.html"
    report(runs, out)
    return out


def measure(page: Path, *flags: str) -> tuple[list[dict[str, Any]], str]:
    """Open a page in frames of WIDTHS; return what they measure, and the browser's messages."""
    browser = shutil.which("chromium")
    assert browser, "apt-get install chromium"
    frames = "".join(
        f'<iframe src="{html.escape(page.name)}" width="{width}" height="900" frameborder="0">'
        "</iframe>"
        for width in WIDTHS
    )
    harness = page.with_name("harness.html")
    harness.write_text(HARNESS.format(frames=frames))
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        "--allow-file-access-from-files",
        *(f"--user-data-dir={page.parent / 'browser'}", "--enable-logging=stderr", *flags),
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run(
        [browser, *options, "--dump-dom", harness.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(body[1])), "\n".join(messages)


def test_the_page_fits_every_width(page: Path) -> None:
    frames, messages = measure(page)
    assert not messages
    for width, frame in zip(WIDTHS, frames, strict=True):
        assert frame["width"] == frame["scroll_width"] == width
        assert len(frame["figures"]) >= 9
        for w, h, right in frame["figures"]:
            assert w > 250
            assert h > 140
            assert right <= width
        assert min(frame["type"]) >= 9  # pixels
        assert all(right <= width for _, _, right in frame["tables"])


def test_the_page_says_what_the_runs_did(page: Path) -> None:
    (frame, _), _ = measure(page)
    for heading in (
        *("Outcome", "Training loss", "Held-out loss", "format_accuracy", "Learning rate"),
        *("Gradient norm", "Speed", "Host memory", "Length of a document"),
        *("Fill of a packed sequence", "Samples", "Recipe"),
    ):
        assert heading in frame["headings"]
    assert "6 of 6" in frame["text"]
    assert "<short>" in frame["text"]
    assert re.search(r"optim\.lr\s*0\.01\s*0\.001", frame["text"])


def test_dark_readers_get_a_dark_page(page: Path) -> None:
    schemes = [measure(page, f"--blink-settings=preferredColorScheme={n}")[0] for n in (1, 0)]
    light, dark = (
        [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in frames[0]["colours"]]
        for frames in schemes
    )
    assert light[0] < 200 < 600 < light[1]  # dark ink on a light page
    assert dark[1] < 200 < 600 < dark[0]


def test_the_browser_notices_what_it_should(page: Path) -> None:
    broken = page.with_name("broken.html")
    text = page.read_text().replace("<main>", '<main><p style="width: 2000px">x</p>', 1)
    broken.write_text(text.replace("</main>", "<script>1</script></main>"))
    frames, messages = measure(broken)
    assert all(frame["scroll_width"] >= 2000 for frame in frames)
    assert "Content Security Policy" in messages
