"""Of several attention kernels the fastest on the run's shapes is taken, and a resume keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from packhorse.trainer import attention_choice, dist
from packhorse.trainer.attention_choice import choose_attention, fastest, time_kernels
from packhorse.trainer.checkpoint import mirror_place
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.estimate import model as estimated_model
from packhorse.trainer.estimate.model import AttentionShape, attention_shapes, build_empty_model
from packhorse.trainer.model import attention, attention_kernels, flash_versions
from packhorse.trainer.model.attention_kernels import Arguments

torch.set_num_threads(1)

CPU = torch.device("cpu")
LENGTHS = (40, 7, 17)
KERNELS = ["flash_attn 3", "flash_attn 4", "torch_varlen"]


class Kernels:
    """Stand-ins for fused kernels, each of which takes the time that a test says."""

    def __init__(self, ms: dict[str, float]) -> None:
        self.ms = ms
        self.calls: list[tuple[str, int, Arguments]] = []
        self.running = ""

    def attend(self, backend: str) -> Any:
        def run(layer: str, q: torch.Tensor, k: Any, v: Any, asked: Arguments) -> torch.Tensor:
            version = f" {flash_versions._pinned}" if backend == "flash_attn" else ""
            self.running = backend + version
            self.calls.append((self.running, q.shape[1], asked))
            if self.running not in self.ms:
                raise OSError("undefined symbol: _ZN3c104")
            return attention_kernels.reference(layer, q, k, v, asked)

        return run

    def milliseconds(self, work: Any, device: torch.device) -> float:
        work()
        return self.ms[self.running]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Kernels({"flash_attn 3": 2.0, "flash_attn 4": 1.0, "torch_varlen": 3.0})
    for backend in ("flash_attn", "torch_varlen"):
        monkeypatch.setattr(attention_kernels, backend, made.attend(backend))
    monkeypatch.setattr(attention_choice, "milliseconds", made.milliseconds)
    monkeypatch.setattr(attention, "fused_kernels", lambda device, dtype: KERNELS)
    yield made
    flash_versions.pin(None)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("debug", ["model.dtype=bfloat16", "run.dir=x", *overrides])


def chosen(run_dir: Path, *overrides: str) -> str:
    pieces = np.array([(0, 0, n, 0) for n in LENGTHS])
    step = SimpleNamespace(epoch=0)
    plan: Any = SimpleNamespace(
        fullest=lambda: [(step, (0,))], pieces=lambda epoch, sequences: pieces
    )
    flash_versions.pin(None)
    backend = choose_attention(recipe(*overrides), plan, run_dir).model.attention
    return f"{backend} {flash_versions._pinned}" if flash_versions._pinned else backend


@pytest.mark.parametrize("own", [[], KERNELS[2:], KERNELS])
def test_ranks_with_other_kernels_meet_as_often(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: list[str]
) -> None:
    asked = []
    monkeypatch.setattr(attention, "fused_kernels", lambda device, dtype: own)
    monkeypatch.setattr(dist, "gather", lambda value: [asked.append(value), value, KERNELS[2:]][1:])
    assert chosen(tmp_path) == (KERNELS[2] if own else "auto")
    assert asked == [own]


def test_the_fastest_on_the_runs_own_shapes_is_taken_and_recorded(
    kernels: Kernels, tmp_path: Path
) -> None:
    assert chosen(tmp_path) == "flash_attn 4"
    found = json.loads((tmp_path / "attention.json").read_text())
    assert found == {"kernel": "flash_attn 4", "ms": {k: 2 * ms for k, ms in kernels.ms.items()}}
    _, heads, asked = kernels.calls[0]
    assert (heads, asked.bounds.lengths) == (4, LENGTHS)
    assert [name for name, *_ in kernels.calls] == KERNELS, "two layers of one shape, timed once"


def test_a_resume_keeps_the_kernel_if_it_still_loads(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    chosen(tmp_path)
    kernels.ms["torch_varlen"] = 0.1
    assert chosen(tmp_path) == "torch_varlen", "without a checkpoint the run starts anew"
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    kernels.ms["torch_varlen"] = 9.0
    kernels.calls.clear()
    assert chosen(tmp_path) == "torch_varlen"
    assert not kernels.calls
    monkeypatch.setattr(attention, "fused_kernels", lambda device, dtype: KERNELS[:2])
    monkeypatch.setattr(dist.log, "propagate", True)
    assert chosen(tmp_path) == "flash_attn 4"
    assert "the run had torch_varlen, which cannot be used here now" in caplog.text


def test_a_run_of_before_keeps_the_preferred_kernel_and_a_mirror_the_record(
    kernels: Kernels, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    assert chosen(tmp_path) == "flash_attn 3", "it had no other, and recorded none"
    assert not kernels.calls
    assert attention_choice.RECORD in mirror_place.RUN_FILES


def test_a_long_sequence_is_timed_on_its_beginning(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_choice, "MOST_TOKENS", 45)
    chosen(tmp_path)
    assert kernels.calls[0][2].bounds.lengths == (40, 5)


def test_a_kernel_that_fails_or_lacks_something_is_left_out(
    kernels: Kernels, tmp_path: Path
) -> None:
    del kernels.ms["flash_attn 4"]
    assert chosen(tmp_path) == "flash_attn 3"
    assert json.loads((tmp_path / "attention.json").read_text())["ms"].keys() == kernels.ms.keys()
    kernels.ms.clear()
    assert chosen(tmp_path) == "flash_attn 3", "all fail: the packing check says how"


def test_only_the_kernels_of_what_is_asked_for_are_compared(
    kernels: Kernels, tmp_path: Path
) -> None:
    kernels.ms["torch_varlen"] = 0.1
    assert chosen(tmp_path, "model.attention=flash_attn") == "flash_attn 4"
    kernels.calls.clear()
    assert chosen(tmp_path, "model.attention=torch_varlen") == "torch_varlen"
    assert chosen(tmp_path, "model.attention=reference") == "reference"
    assert not kernels.calls, "one kernel needs no timing"


def test_all_ranks_take_a_kernel_that_all_have(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "gather", lambda own: [own, ["flash_attn 3", "torch_varlen"]])
    assert chosen(tmp_path) == "flash_attn 3"
    monkeypatch.setattr(dist, "is_main", lambda: False)
    monkeypatch.setattr(dist, "broadcast", lambda value: value or "torch_varlen")
    kernels.calls.clear()
    assert chosen(tmp_path) == "torch_varlen"
    assert not kernels.calls, "rank 0 alone measures"


def test_without_a_fused_kernel_nothing_is_chosen(tmp_path: Path) -> None:
    assert chosen(tmp_path) == "auto"
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced_takes_the_preferred_kernel(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise KeyError("packhorse_fused")  # as in Falcon's own table of kernels

    monkeypatch.setattr(estimated_model.decoder, "decoder_of", fails)
    assert chosen(tmp_path) == "flash_attn 3"


def test_a_kernel_wins_by_more_than_two_measurements_differ() -> None:
    assert fastest({"a": 1.0, "b": 0.97}) == "a"
    assert fastest({"a": 1.0, "b": 0.9, "c": 0.88}) == "b"
    assert fastest({}) is None


def test_windows_caps_and_sinks_are_part_of_what_is_timed(kernels: Kernels) -> None:
    shapes = [AttentionShape(4, 2, 16, 16, 5, 30.0, True), AttentionShape(4, 2, 16, 8, None)] * 2
    times = time_kernels(KERNELS[:1], shapes, LENGTHS, CPU, torch.bfloat16)
    assert times == {"flash_attn 3": 8.0}, "each layer counts"
    capped, plain = (asked for *_, asked in kernels.calls)
    assert (capped.window, capped.softcap, plain.sinks) == (5, 30.0, None)
    assert capped.sinks is not None


def test_real_time_is_taken_of_real_work() -> None:
    calls: list[int] = []
    assert attention_choice.milliseconds(lambda: calls.append(0), CPU) >= 0
    assert len(calls) == attention_choice.WARM_UP + attention_choice.CALLS


def test_a_models_layers_tell_what_they_ask() -> None:
    made = recipe()
    assert (
        attention_shapes(build_empty_model(made.model)) == (AttentionShape(4, 2, 16, 16, None),) * 2
    )
