"""A run folder belongs to one recipe: keys that shape the run must not change, keys that follow the
hardware may (C8).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer

from packhorse.trainer import dist
from packhorse.trainer.build_engine import require_same_micro_batch, resolve_micro_batch
from packhorse.trainer.config.recipe import GuardSection, Recipe, load_recipe
from packhorse.trainer.data.prepare import prepare, train_plan
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.guard import Guard
from packhorse.trainer.metrics import EVALUATIONS, Metrics, ModelFlops
from packhorse.trainer.run_folder import (
    describe_end,
    is_done,
    open_run_folder,
    require_shared,
    write_description,
    write_summary,
)
from packhorse.trainer.trackers import Trackers
from tests.ranks import ROOT


def open_and_save(run_dir: Path, *overrides: str) -> None:
    """Open a run folder of the debug recipe and give it a checkpoint."""
    open_run_folder(recipe(run_dir, *overrides), run_dir)
    (run_dir / "checkpoints" / "step-000001").mkdir(parents=True)


def recipe(run_dir: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "debug.yaml", [f"run.dir={run_dir}", *overrides])


def test_a_start_forgets_the_stop_of_an_earlier_one(tmp_path: Path) -> None:
    open_and_save(tmp_path)
    (tmp_path / "stop.json").write_text('{"step": 1}')
    open_run_folder(recipe(tmp_path), tmp_path)
    assert not (tmp_path / "stop.json").exists()


def test_a_damaged_summary_is_said_in_a_sentence(tmp_path: Path) -> None:
    assert not is_done(tmp_path, 1)
    (tmp_path / "summary.json").write_text('{"steps"')
    with pytest.raises(BadInput, match=r"summary\.json: damaged"):
        is_done(tmp_path, 1)
    with pytest.raises(BadInput, match=r"summary\.json: damaged"):
        describe_end(recipe(tmp_path), tmp_path)
    (tmp_path / "summary.json").unlink()
    with pytest.raises(BadInput, match=r"summary\.json: missing, damaged, or written by"):
        describe_end(recipe(tmp_path), tmp_path)
    write_summary(tmp_path, 1, 2.0, 0, {})
    assert "1 steps are done" in describe_end(recipe(tmp_path), tmp_path), (
        "without environment.json"
    )


@pytest.mark.parametrize(
    "change",
    [
        "optim.lr=1e-3",
        "train.seed=1",
        "train.epochs=3",
        "batch.global_batch_size=8",
        "batch.seq_len=128",
        "data.packing=none",
        "data.train_on=all",
        "data.eval_fraction=0.1",
        "data.duplicates=drop",
        "loss.weighting=example",
        "loss.neftune_alpha=0",
        "model.dtype=bfloat16",
        "model.name=other",
        "parallel.grad_dtype=bfloat16",
    ],
)
def test_what_shapes_the_run_may_not_change(tmp_path: Path, change: str) -> None:
    open_and_save(tmp_path)
    with pytest.raises(BadInput, match=change.split("=")[0]):
        open_run_folder(recipe(tmp_path, change), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        "model.activation_checkpointing=full",
        "model.attention=reference",
        "batch.micro_batch_size=2",
        "batch.micro_batch_size=auto",
        "parallel.deepspeed=zero2",
        "checkpoint.keep=9",
        "eval.every_steps=7",
        "data.cache=/elsewhere",
        "data.max_leakage=0.5",
        "run.log_every=5",
    ],
)
def test_what_the_hardware_decides_may(tmp_path: Path, change: str) -> None:
    open_and_save(tmp_path)
    open_run_folder(recipe(tmp_path, change), tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe(tmp_path, change), (
        "the folder holds the recipe that runs"
    )


def test_a_run_keeps_the_micro_batch_that_auto_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = recipe(tmp_path, "batch.micro_batch_size=auto", "batch.global_batch_size=8")
    assert resolve_micro_batch(auto, tmp_path).batch.micro_batch_size == 1, "on a CPU"
    monkeypatch.setattr(dist, "device", lambda: torch.device("cuda"))
    card = mock.Mock(total_memory=2**33)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    chosen = resolve_micro_batch(auto, tmp_path)
    assert chosen.batch.micro_batch_size == 8
    open_and_save(tmp_path, "batch.micro_batch_size=4", "batch.global_batch_size=8")
    assert resolve_micro_batch(auto, tmp_path).batch.micro_batch_size == 4, "a resume"
    with (
        mock.patch.object(dist, "gather", lambda value: [value, 2]),
        pytest.raises(BadInput, match=r"auto is \[2, 8\] on different ranks; set it to 2"),
    ):
        require_same_micro_batch(chosen)


def test_the_evaluation_of_another_recipes_untrained_model_is_forgotten(tmp_path: Path) -> None:
    open_run_folder(recipe(tmp_path), tmp_path)
    (tmp_path / EVALUATIONS).write_text('{"step": 0}\n')
    open_run_folder(recipe(tmp_path), tmp_path)
    assert (tmp_path / EVALUATIONS).exists(), "the same recipe made it"
    open_run_folder(recipe(tmp_path, "model.name=other"), tmp_path)
    assert not (tmp_path / EVALUATIONS).exists()


def test_a_recipe_may_be_mended_until_there_is_a_checkpoint(tmp_path: Path) -> None:
    open_run_folder(recipe(tmp_path, "data.train.0.path=mistyped.jsonl"), tmp_path)
    open_run_folder(recipe(tmp_path), tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe(tmp_path)


def test_more_epochs_or_steps_are_asked_for_by_name(tmp_path: Path) -> None:
    open_and_save(tmp_path)
    longer = recipe(tmp_path, "train.epochs=3")
    with pytest.raises(BadInput, match=r"train\.epochs was 2, is 3; add --extend to train on"):
        open_run_folder(longer, tmp_path)
    open_run_folder(longer, tmp_path, extend=True)
    assert load_recipe(tmp_path / "recipe.yaml") == longer


@pytest.mark.parametrize(
    "change", [["train.epochs=1"], ["train.epochs=3", "train.seed=1"], ["optim.lr=1e-3"]]
)
def test_to_extend_is_nothing_else(tmp_path: Path, change: list[str]) -> None:
    open_and_save(tmp_path)
    with pytest.raises(BadInput, match="set them back"):
        open_run_folder(recipe(tmp_path, *change), tmp_path, extend=True)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"run\.dir"):
        open_run_folder(recipe(tmp_path / "file" / "run"), tmp_path / "file" / "run")


def test_a_recipe_that_the_user_wrote_is_not_replaced(tmp_path: Path) -> None:
    """As with `run.dir: .` beside a recipe.yaml."""
    own = (ROOT / "recipes" / "debug.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(own)
    with pytest.raises(BadInput, match="is not the resolved recipe of a run, and would be replace"):
        open_run_folder(recipe(tmp_path), tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == own


@pytest.mark.parametrize(
    "name", ["model/config.json", "checkpoints/step-000001/x", "metrics.jsonl", "data.png"]
)
def test_files_that_no_run_wrote_are_not_replaced(tmp_path: Path, name: str) -> None:
    """As with run.dir=recipes/debug, whose model/ is the base model."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(BadInput, match=name.split("/")[0]):
        open_run_folder(recipe(tmp_path), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml", "stop.json", "logs", "model"])
@pytest.mark.parametrize("kind", ["pipe", "link to nowhere", "other kind"])
def test_what_cannot_be_a_runs_own_file_or_folder_is_refused(
    tmp_path: Path, name: str, kind: str
) -> None:
    """Of a link to nowhere nothing can be read, and a pipe would hold the run up for ever."""
    run = tmp_path / "run"
    open_run_folder(recipe(run), run)
    (run / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "link to nowhere":
        (run / name).symlink_to(tmp_path / "nowhere")
    elif name in ("logs", "model"):
        (run / name).write_text("")
    else:
        (run / name).mkdir()
    with pytest.raises(BadInput, match=rf"{name} is no (folder|plain file)"):
        open_run_folder(recipe(run), run)
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_the_run_replaces_may_be_a_link_into_a_store(tmp_path: Path) -> None:
    """As git-annex and DVC put in the place of files."""
    run, store = tmp_path / "run", tmp_path / "store"
    open_run_folder(recipe(run), run)
    logs = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "trace.jsonl")
    for name in (*logs, "skipped_steps.jsonl", "stop.json", "data.json", "data.png"):
        (run / name).write_text("")
    there = [path for path in run.iterdir() if path.is_file()]
    store.mkdir()
    for path in there:
        path.rename(store / path.name)
        path.symlink_to(store / path.name)
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    open_run_folder(recipe(run), run)
    Metrics(
        run,
        log_every=1,
        seq_len=8,
        flops=ModelFlops(1, 1, 1),
        resumed_at=2,
        beat=lambda _: None,
        trackers=Trackers([]),
        to_tensorboard=False,
    )
    Guard(GuardSection(), run, [])
    for name in (*logs, "skipped_steps.jsonl", "recipe.yaml"):
        assert not (run / name).is_symlink()
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before


@pytest.mark.parametrize("name", ["logs/rank00000.log", "shards.jsonl"])
def test_a_file_that_the_run_appends_to_is_no_link(tmp_path: Path, name: str) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    open_run_folder(recipe(run), run)
    mine.write_text("")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(mine)
    with pytest.raises(BadInput, match=rf"{name} is a link, through which the run would append"):
        open_run_folder(recipe(run), run)


def test_a_runs_folders_may_lie_on_another_disk(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "large").mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "large")
    run.joinpath("recipe.yaml").write_text(recipe(run).to_yaml())
    open_run_folder(recipe(run), run)


def test_a_folder_with_other_files_may_become_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "slurm.sh").write_text("")
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "shards.jsonl").write_text("")  # of a run that is to be repeated
    open_run_folder(recipe(tmp_path), tmp_path)
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_it_tells_of_every_row_that_is_left_out(tmp_path: Path, shared: Path) -> None:
    rows = [
        {"question": "1?", "answer": "One."},
        {"question": "2?"},
        {"question": "3?", "answer": ""},
    ]
    for name, count in (("train", 3), ("eval", 2)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows[:count])
        )
    paths = [f"data.{name}=[{{path: {tmp_path / name}.jsonl}}]" for name in ("train", "eval")]
    made = recipe(tmp_path, *paths, f"data.cache={tmp_path / 'cache'}", "data.max_rejects=1")
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "smollm2")
    train, held_out = (prepare(made, tokenizer, which) for which in ("train", "eval"))
    flops = ModelFlops(1, 1, 1)
    metrics = Metrics(
        tmp_path,
        log_every=1,
        seq_len=8,
        flops=flops,
        resumed_at=0,
        beat=lambda part: None,
        trackers=Trackers([]),
    )
    write_description(made, tmp_path, train, train_plan(made, train), held_out, metrics)
    metrics.close()
    reports = json.loads((tmp_path / "data.json").read_text())
    assert (reports["train"]["reasons"], reports["eval"]["reasons"]) == (
        {"no answer": 2},
        {"no answer": 1},
    )
    told = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(Path(row["source"]).name, row["row"], row["reason"]) for row in told] == [
        ("train.jsonl", 2, "no answer"),
        ("train.jsonl", 3, "no answer"),
        ("eval.jsonl", 2, "no answer"),
    ]


# ------------------------------------------------------------------------------------ several nodes


def two_nodes(monkeypatch: pytest.MonkeyPatch, other_writes: Path) -> None:
    """This process is rank 0 of two nodes with a rank each; what rank 1 writes lands in
    `other_writes`.
    """

    def gather(value: Any) -> list[Any]:
        for path in other_writes.parent.rglob(
            ".node-of-rank-0-*"
        ):  # rank 1 comes here just after rank 0
            (other_writes / path.name.replace("rank-0", "rank-1")).touch()
        return [value, value]

    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", lambda value: value)
    monkeypatch.setattr(dist, "gather", gather)


def test_nodes_with_one_run_folder_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    two_nodes(monkeypatch, tmp_path / "run")
    require_shared(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".node-of-rank-0-*"))


def test_nodes_with_folders_of_their_own_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    two_nodes(monkeypatch, tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="not the same folder on all nodes"):
        require_shared(tmp_path / "run")
