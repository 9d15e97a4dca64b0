"""The summary describes the data truly: its numbers, its tables and its picture."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.data import summary
from packhorse.trainer.data.batch_plan import Plan
from packhorse.trainer.data.prepare import Prepared, prepare, train_plan
from packhorse.trainer.data.summary import Histogram, draw
from packhorse.trainer.model.load import load_tokenizer
from tests.ranks import ROOT


@pytest.fixture(scope="module")
def debug(tmp_path_factory) -> tuple[Recipe, Prepared, Plan]:
    cache = tmp_path_factory.mktemp("cache")
    data = f"{ROOT}/recipes/debug"
    overrides = [
        f"data.train.0.path={data}/train.jsonl",
        f"data.eval.0.path={data}/eval.jsonl",
        f"data.cache={cache}",
    ]
    recipe = load_recipe(ROOT / "recipes/debug.yaml", [*overrides, f"model.name={data}/model"])
    prepared = prepare(recipe, load_tokenizer(recipe.model), "train")
    return recipe, prepared, train_plan(recipe, prepared)


def test_the_numbers_are_those_of_documents_and_sequences(debug):
    recipe, prepared, plan = debug
    found = summary.summary(prepared, plan)
    lengths = sorted(prepared.documents.lengths.tolist())
    assert (found["document_tokens"]["min"], found["document_tokens"]["max"]) == (
        lengths[0],
        lengths[-1],
    )
    assert lengths[49] <= found["document_tokens"]["median"] <= lengths[50]
    steps = [plan.step(step) for step in range(plan.steps)]
    sequences = [
        number
        for step in steps
        if step.epoch == 0
        for micro_batch in step.micro_batches
        for number in micro_batch
    ]
    epoch = found["first_epoch"]
    assert epoch["sequences"] == len(sequences)
    assert epoch["steps"] == sum(step.epoch == 0 for step in steps)
    assert found["steps"] == plan.steps
    pieces = [plan.pieces(0, [number]) for number in sequences]
    tokens = [int((of_one[:, 2] - of_one[:, 1]).sum()) for of_one in pieces]
    assert plan.sequence_sizes()[0].tolist() == tokens
    assert epoch["sequence_tokens"]["max"] == max(tokens) <= recipe.batch.seq_len
    fill = sum(tokens) / len(sequences) / recipe.batch.seq_len
    assert epoch["fill"] == pytest.approx(fill, abs=1e-5)
    documents = len(lengths) / len(sequences)
    assert epoch["documents_per_sequence"] == pytest.approx(documents, abs=1e-3)


def test_the_tables_show_rejects_by_reason_and_what_an_epoch_holds(debug):
    recipe, prepared, plan = debug
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(*summary.tables(recipe, prepared, plan, prepared))
    shown = console.export_text()
    found = summary.summary(prepared, plan)
    for expected in (
        "train",
        "eval",
        "bfd",
        f"{plan.fill():.1%}",
        f"{found['first_epoch']['steps']:,}",
        f"{plan.steps:,}",
    ):
        assert expected in shown


def test_the_folder_holds_the_numbers_and_the_picture(debug, tmp_path: Path):
    _, prepared, plan = debug
    summary.write(tmp_path, prepared, plan, prepared)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "data.png"]
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["train"] == summary.summary(prepared, plan)
    assert found["eval"] == summary.summary(prepared)
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_lies_in_a_store_is_replaced_and_not_written_through(debug, tmp_path: Path):
    _, prepared, plan = debug
    run, stored = tmp_path / "run", tmp_path / "stored.png"
    run.mkdir()
    stored.write_bytes(b"of an earlier start")
    (run / "data.png").symlink_to(stored)
    summary.write(run, prepared, plan, None)
    assert (run / "data.png").read_bytes().startswith(b"\x89PNG")
    assert stored.read_bytes() == b"of an earlier start"


DRAWN = """
import sys
import numpy as np
from packhorse.trainer.data import summary
from packhorse.trainer.report.figures import Bars, draw_bars
summary.histograms = lambda *_: [summary.Histogram("a", "b", np.array([0, 1]), np.array([1]))]
summary.summary = summary.of_eval = lambda *_: {}
summary.write(summary.Path(sys.argv[1]), None, None, None)
print(draw_bars("a", "b", "c", [Bars(0, [0.0, 1.0], [1.0])]))
"""


@pytest.mark.parametrize("settings", ["text.usetex: True", "figure.dpi: 1000000", "pipe"])
def test_figures_are_the_same_whatever_settings_lie_in_the_folder(tmp_path: Path, settings: str):
    def draw_in(folder: Path) -> tuple[str, bytes]:
        command = [sys.executable, "-c", DRAWN, str(folder)]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout, (folder / "data.png").read_bytes()

    plain, odd = tmp_path / "plain", tmp_path / "odd"
    plain.mkdir()
    odd.mkdir()
    if settings == "pipe":
        os.mkfifo(odd / "matplotlibrc")
    else:
        (odd / "matplotlibrc").write_text(settings)
    assert draw_in(odd) == draw_in(plain)


def bar_heights(histogram: Histogram) -> list[list[float]]:
    """The heights of the bars, colour by colour."""
    (axes,) = draw([histogram]).axes
    return [[bar.get_height() for bar in bars] for bars in axes.containers]  # type: ignore[attr-defined]


def test_bars_are_as_high_as_their_counts_and_green_as_their_shares():
    edges, counts = np.array([0, 10, 20]), np.array([50, 100])
    assert bar_heights(Histogram("", "", edges, counts)) == [[50, 100]]
    shares = np.array([0.5, 0.25])
    assert bar_heights(Histogram("", "", edges, counts, shares)) == [[50, 100], [25, 25]]


def test_a_bar_spans_its_bin_and_all_bars_are_in_sight():
    (axes,) = draw([Histogram("", "", np.array([0, 10, 30]), np.array([50, 100]))]).axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 10), (10, 20)]  # type: ignore[attr-defined]
    assert axes.get_xlim() == (0, 30)
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 100


def test_drawing_keeps_no_figure_in_memory_and_needs_no_display():
    figure = draw([Histogram("", "", np.array([0, 1]), np.array([1]))])
    assert type(figure.canvas).__name__ == "FigureCanvasAgg"
    assert "matplotlib.pyplot" not in sys.modules


def test_a_picture_of_one_document_or_of_none_can_be_drawn(tmp_path):
    edges = np.array([0, 1])
    one, none = (Histogram("", "tokens", edges, np.array([count])) for count in (1, 0))
    draw([one, none]).savefig(tmp_path / "both.png")
