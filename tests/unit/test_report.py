"""`packhorse report` shows what run folders hold, escapes it, and writes over nobody's file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from packhorse.trainer.cli.runs import report
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.report.figures import Bars, Curve, draw_bars, draw_curves
from packhorse.trainer.report.page import differing_keys, short_names
from packhorse.trainer.report.runs import read_run
from packhorse.trainer.report.samples import SHOWN, compare_samples
from tests.unit.test_runs import make_run

EVIL = "<script>alert(1)</script>\x1b[31m $x$"


def make_evaluated(folder: Path, *overrides: str, prompts: int = 2) -> Path:
    """Write a run with two evaluations whose texts are hostile."""
    run = make_run(folder, *overrides)
    lines = [
        {
            "step": step,
            "eval_loss": 6.0 - step,
            "losses": {f"source {EVIL}": 5.0 - step},
            "held_out": folder.name,
            "metrics": {EVIL: {"value": 0.5, "count": 2, "low": 0.1, "high": 0.9}},
        }
        for step in (0, 3)
    ]
    samples = [
        {
            "step": step,
            "prompt": f"{number} {EVIL}",
            "answer": f"answer {number} at {step} {EVIL}",
            "reference": EVIL,
            "scores": {EVIL: None if number else 1.0},
        }
        for step in (0, 3, 5)  # of step 5 the evaluation did not end
        for number in range(prompts)
    ]
    for name, content in {"evaluations.jsonl": lines, "samples.jsonl": samples}.items():
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in content))
    return run


class Page(HTMLParser):
    """The tags, ids and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_the_page_escapes_texts_and_loads_nothing(tmp_path: Path) -> None:
    runs = [make_evaluated(tmp_path / "a"), make_evaluated(tmp_path / "<b>", "optim.lr=1e-3")]
    out = tmp_path / "report.html"
    report(runs, out)
    text = out.read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "b" in page.tags  # of the scores
    assert "\x1b" not in text
    assert "answer 0 at 3 <script>alert(1)</script>␛[31m $x$" in page.shown
    assert "answer 0 at 5" not in page.shown
    assert "<b>" in page.shown
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    # drawn in the page's colours alone
    assert not re.findall(r"#0000[0-9a-f]{2}", text)
    assert "Held-out loss of source <script>" in page.shown
    assert "do not compare" in page.shown  # their held-out rows have other hashes
    assert re.search(r"optim\.lr\s*0\.01\s*0\.001", page.shown)


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", logged=0)
    for name in ("data.json", "metrics.jsonl", "evaluations.jsonl"):
        (run / name).unlink()
    (run / "logs").mkdir()  # made before the data is prepared
    report([run], tmp_path / "report.html")
    assert "failed" in Page((tmp_path / "report.html").read_text()).shown


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "report.html"
    report([run], out)
    report([run], out)
    out.write_text(out.read_text().replace("Outcome", "My notes"))
    with pytest.raises(BadInput, match="is not as packhorse wrote it; give another --out"):
        report([run], out)
    assert "My notes" in out.read_text()


def test_a_run_that_is_given_twice_or_is_none_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(BadInput, match="given twice"):
        report([run, tmp_path / "run" / ".." / "run"], tmp_path / "report.html")
    with pytest.raises(BadInput, match="not a run folder"):
        report([run, tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_answers_are_paired_by_prompt(tmp_path: Path) -> None:
    runs = [
        read_run(make_evaluated(tmp_path / "a", prompts=SHOWN + 3)),
        read_run(make_evaluated(tmp_path / "b", prompts=1)),
    ]
    found = compare_samples(runs)
    assert found
    assert (found.total, len(found.prompts)) == (SHOWN + 3, SHOWN)
    assert found.columns == [(0, 0), (0, 3), (1, 3)]
    assert [bool(answer) for answer in found.prompts[0]["answers"]] == [True, True, True]
    assert [bool(answer) for answer in found.prompts[1]["answers"]] == [True, True, False]
    assert compare_samples([read_run(make_run(tmp_path / "c"))]) is None


def test_differences_name_each_key_and_skip_the_folder(tmp_path: Path) -> None:
    a = read_run(make_run(tmp_path / "a")).recipe
    b = read_run(make_run(tmp_path / "b", "adapter={rank: 4}", "data.train.0.weight=2")).recipe
    found = differing_keys([a, b])
    assert found["data.train.0.weight"] == ["1.0", "2.0"]
    assert found["adapter"] == ["null", "-"]
    assert found["adapter.rank"] == ["-", "4"]
    assert "run.dir" not in found
    assert not differing_keys([a, a])


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names([Path("/x/a"), Path("/y/b")]) == ["a", "b"]
    assert short_names([Path("/x/1/a"), Path("/x/2/a")]) == ["1/a", "2/a"]
    assert short_names([Path("/x/1/a")]) == ["a"]


def test_a_long_curve_is_drawn_in_few_points_with_its_extremes() -> None:
    values = [2.0] * 50_000
    values[25_000] = 9.0
    long = draw_curves("a", "loss", [Curve(0, range(50_000), values)])
    assert len(long) < 60_000
    assert "fill-opacity" in long or "opacity: 0.12" in long
    ticks = re.findall(r">([\d.,]+)</text>", long)
    assert "9" in ticks or "8" in ticks  # the axis reaches to the spike


def test_figures_of_one_point_and_of_huge_ranges_are_drawn() -> None:
    one = draw_curves("b", "score", [Curve(0, [3], [0.5], [0.1], [0.9])])
    assert one.count("<path") > 3
    log = draw_curves("c", "norm", [Curve(0, range(9), [1.0] * 8 + [1e4])])
    assert "log scale" in log
    assert ">10,000</text>" in log
    assert "log scale" not in draw_curves("d", "norm", [Curve(0, range(9), [1.0] * 9)])
    assert "documents" in draw_bars("e", "tokens", "documents", [Bars(9, [0, 1, 2], [3, 4])])
