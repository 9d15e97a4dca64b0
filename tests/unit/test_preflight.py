"""Nodes that differ, or cannot write, are refused on all nodes; one is named."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from packhorse.launch import preflight
from packhorse.launch.preflight import (
    Disk,
    Facts,
    find_bad_disk,
    find_difference,
    find_unshared,
    host_names,
    list_warnings,
)
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput
from tests.ranks import ROOT

NODE = Facts(
    "a", {"packhorse": "1", "torch": "2.13.0"}, "c0de", "7ec1be", 8, ("H100",) * 8, loopback=False
)
DISK = Disk(1000.0, None, {"run.dir": 900.0, "data.cache": 50.0}, shared=True)


def nodes(*changes: dict[str, Any]) -> tuple[list[Facts], list[str]]:
    """Return nodes a, b, c, ... with these changes to NODE, and their hosts."""
    every = [
        replace(NODE, **{"host": chr(ord("a") + i), **change}) for i, change in enumerate(changes)
    ]
    return every, host_names(every)


def recipe(run_dir: Path) -> Recipe:
    return load_recipe(
        ROOT / "recipes" / "debug.yaml",
        [f"run.dir={run_dir}", f"data.cache={run_dir.parent / 'cache'}"],
    )


def on_all(
    recipes: list[Recipe], change: Callable[[int], None] = lambda node: None
) -> list[tuple[Any, list[str]]]:
    """Run the check in threads as nodes and return what each raised and logged.

    Args:
        change: runs on each node before the check.
    """
    store = HashStore()
    ends: list[tuple[Any, list[str]]] = [(None, [])] * len(recipes)
    store.set_timeout(timedelta(seconds=10))

    def node(number: int) -> None:
        said: list[str] = []
        try:
            change(number)
            preflight.check_nodes(recipes[number], 1, said.append, store, number, len(recipes))
        except (Exception, SystemExit) as error:
            ends[number] = (error, said)
        else:
            ends[number] = (None, said)

    threads = [threading.Thread(target=node, args=(number,)) for number in range(len(recipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_nodes_that_agree_are_let_in_and_leave_nothing_behind(tmp_path):
    (first, said), (second, silent) = on_all([recipe(tmp_path / "run")] * 2)
    assert first is second is None
    assert "2 nodes agree and share" in said[-1]
    assert silent == []
    assert list((tmp_path / "run").iterdir()) == []


def test_all_nodes_refuse_alike(tmp_path):
    ends = on_all([recipe(tmp_path / f"run{number}") for number in (0, 0, 1)])
    sentences = {str(error) for error, _ in ends}
    assert all(isinstance(error, BadInput) for error, _ in ends)
    assert len(sentences) == 1
    assert "another recipe" in sentences.pop(), "the path is a part of the recipe"


def test_a_node_that_does_not_answer_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "_ANSWER_S", 0.5)

    def dies(number: int) -> None:
        if number == 1:
            raise SystemExit

    error, _ = on_all([recipe(tmp_path / "run")] * 2, dies)[0]
    assert isinstance(error, preflight.NoAnswer)
    assert "node 1 did not answer" in str(error)


def test_another_template_of_deepspeed_is_another_recipe(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text("{}")
    same = load_recipe(
        ROOT / "recipes" / "debug.yaml", [f"parallel.deepspeed={tmp_path / 'ds.json'}"]
    )
    before = preflight.collect_facts(same, 1)
    assert preflight.collect_facts(same, 1) == before
    (tmp_path / "ds.json").write_text("{ }")
    assert preflight.collect_facts(same, 1).recipe != before.recipe
    assert preflight.collect_facts(recipe(tmp_path), 1).recipe != before.recipe


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"versions": {"packhorse": "1", "torch": "2.12.0"}}, "b has torch 2.12.0, and a 2.13.0"),
        ({"code": "other"}, "b has other packhorse code than a"),
        ({"recipe": "other"}, "b has another recipe or DeepSpeed template than a"),
        (
            {"processes": 7, "gpus": ("H100",) * 7},
            "b has 7 GPUs and starts 7 processes, where a starts 8",
        ),
        ({"loopback": True}, "b's own name resolves to the loopback address"),
    ],
)
def test_a_node_that_differs_is_named(change, sentence):
    assert find_difference(*nodes({}, {})) is None
    assert sentence in (find_difference(*nodes({}, change)) or "")


def test_the_odd_one_is_at_fault_even_if_it_is_the_first():
    every, hosts = nodes({"code": "other"}, {}, {})
    assert "a has other packhorse code than b" in (find_difference(every, hosts) or "")


def test_launchers_on_one_host_are_told_apart_and_may_meet_by_the_loopback():
    every, hosts = nodes({"host": "a", "loopback": True}, {"host": "a", "loopback": True})
    assert hosts == ["a (node 0)", "a (node 1)"]
    assert find_difference(every, hosts) is None


def test_a_node_that_cannot_write_or_has_no_room_is_named():
    hosts, folder = ["a", "b"], Path("/shared/run")
    assert find_bad_disk([DISK, DISK], hosts, folder) is None
    read_only = replace(DISK, fault="Read-only")
    assert (
        find_bad_disk([DISK, read_only], hosts, folder)
        == "b cannot write to run.dir, /shared/run (Read-only)"
    )
    full = replace(DISK, free_gib={"run.dir": 900.0, "data.cache": 0.25})
    assert (
        find_bad_disk([DISK, full], hosts, folder)
        == "b has 0.25 GiB free at data.cache; make room there"
    )


def test_a_node_with_a_copy_of_the_folder_is_named(tmp_path, monkeypatch):
    """The secret by which the nodes meet was copied, too."""
    here, try_disks = threading.local(), preflight._try_disks

    def in_a_copy(given: Recipe, mark: Path) -> Disk:
        copy = tmp_path / "copy" / mark.name
        return try_disks(given, copy if here.node == 1 else mark)

    monkeypatch.setattr(preflight, "_try_disks", in_a_copy)
    ends = on_all([recipe(tmp_path / "run")] * 2, lambda node: setattr(here, "node", node))
    for error, _ in ends:
        assert isinstance(error, BadInput)
        assert re.search(
            r"not the same folder .* \(node 1\) does not see what .* \(node 0\)", str(error)
        )
    assert find_unshared([DISK, DISK], ["a", "b"], Path("run")) is None
    assert list((tmp_path / "run").iterdir()) == []


def test_clocks_and_other_gpus_are_warned_of():
    every, hosts = nodes({}, {"gpus": ("A100",) * 8})
    assert list(list_warnings(every, [DISK, replace(DISK, clock=1002.0)], hosts)) == [
        "b has other GPUs than a; the slowest sets the pace"
    ]
    clock, _ = list_warnings(every, [DISK, replace(DISK, clock=940.0)], hosts)
    assert clock.startswith("b's clock is 60 s behind a's")
