"""bfloat16 on a CPU that emulates it: found by a product, and said with what to set."""

import logging

import pytest
import torch

from packhorse.trainer import build_engine
from packhorse.trainer.utils import cpu_speed


def test_the_slowdown_is_the_ratio_of_both_types_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.bfloat16: 0.5, torch.float32: 0.02}
    monkeypatch.setattr(cpu_speed, "_product_s", seconds.__getitem__)
    assert cpu_speed.bf16_slowdown() == 25


def test_a_product_is_timed_in_either_type() -> None:
    assert cpu_speed.bf16_slowdown() > 0


@pytest.mark.parametrize(
    ("dtype", "slowdown", "warned"),
    [("bfloat16", 40.0, True), ("bfloat16", 0.6, False), ("float32", 40.0, False)],
)
def test_only_emulated_bf16_is_warned_of(
    dtype: str,
    slowdown: float,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(build_engine, "bf16_slowdown", lambda: slowdown)
    monkeypatch.setattr(build_engine.dist.log, "propagate", True)
    with caplog.at_level(logging.WARNING, "packhorse"):
        build_engine.warn_if_bf16_is_emulated(dtype)
    assert ("40 times as long" in caplog.text and "model.dtype=float32" in caplog.text) == warned
