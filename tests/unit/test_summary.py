"""What is told of the data is what the data is: numbers, tables and the picture."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.ranks import ROOT
from trainer.config.recipe import Recipe, load_recipe
from trainer.data import summary
from trainer.data.batch_plan import Plan
from trainer.data.picture import BAR, SHARE, Panel, _ticks, draw
from trainer.data.prepare import Prepared, prepare, train_plan
from trainer.model.load import load_tokenizer


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


def test_the_numbers_are_those_of_documents_and_rows(debug):
    recipe, prepared, plan = debug
    found = summary.summary(prepared, plan)
    lengths = sorted(prepared.lengths.tolist())
    assert (found["document_tokens"]["min"], found["document_tokens"]["max"]) == (
        lengths[0],
        lengths[-1],
    )
    assert lengths[49] <= found["document_tokens"]["median"] <= lengths[50]
    steps = [plan.step(step) for step in range(plan.steps)]
    rows = [
        row
        for step in steps
        if step.epoch == 0
        for micro_batch in step.micro_batches
        for row in micro_batch
    ]
    epoch = found["first_epoch"]
    assert epoch["rows"] == len(rows)
    assert epoch["steps"] == sum(step.epoch == 0 for step in steps)
    assert found["steps"] == plan.steps
    tokens = [sum(piece.stop - piece.start for piece in plan.sequence(0, row)) for row in rows]
    assert plan.sequence_sizes()[0].tolist() == tokens
    assert epoch["seq_len"]["max"] == max(tokens) <= recipe.batch.seq_len
    assert epoch["fill"] == pytest.approx(sum(tokens) / len(rows) / recipe.batch.seq_len, abs=1e-5)
    assert epoch["documents_per_row"] == pytest.approx(len(lengths) / len(rows), abs=1e-3)


def test_the_tables_show_rejects_by_reason_and_what_an_epoch_holds(debug):
    recipe, prepared, plan = debug
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(*summary.tables(recipe, prepared, plan, prepared))
    shown = console.export_text()
    found = summary.summary(prepared, plan)
    for told in (
        "train",
        "eval",
        "bfd",
        f"{plan.fill():.1%}",
        f"{found['first_epoch']['steps']:,}",
        f"{plan.steps:,}",
    ):
        assert told in shown


def test_the_folder_holds_the_numbers_and_the_picture(debug, tmp_path: Path):
    from PIL import Image

    _, prepared, plan = debug
    summary.write(tmp_path, prepared, plan, prepared)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "data.png"]
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["train"] == summary.summary(prepared, plan)
    assert found["eval"] == summary.summary(prepared)
    with Image.open(tmp_path / "data.png") as image:
        assert image.format == "PNG"


def colours(panel: Panel) -> dict[str, int]:
    """How often each colour stands in the picture of the panel."""
    picture = draw([panel])
    found = picture.getcolors(picture.width * picture.height)
    assert found is not None
    return {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in found}  # type: ignore[misc]


def test_bars_are_as_high_as_their_counts_and_green_as_their_shares():
    edges, counts = np.array([0, 10, 20]), np.array([50, 100])
    plain = colours(Panel("", "", edges, counts))
    half = colours(Panel("", "", edges, counts, np.array([0.5, 0.5])))
    assert SHARE not in plain
    assert half[SHARE] + half[BAR] == plain[BAR]
    assert half[SHARE] == pytest.approx(half[BAR], rel=0.02)
    first = colours(Panel("", "", edges, np.array([50, 0])))
    both = colours(Panel("", "", edges, np.array([50, 50])))
    assert both[BAR] == pytest.approx(2 * first[BAR], rel=0.02)


@pytest.mark.parametrize("most", [0.5, 1, 3, 7, 40, 99, 570, 1044, 123_456])
def test_ticks_are_few_and_round_and_within(most):
    ticks = _ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] <= most
    assert len(ticks) <= 7
    assert all(tick == round(tick) for tick in ticks)


def test_a_picture_of_one_document_can_be_drawn():
    draw(
        [
            Panel("one", "tokens", np.array([0, 1]), np.array([1])),
            Panel("none", "", np.array([0, 1]), np.array([0])),
        ]
    )
