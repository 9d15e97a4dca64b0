"""Decide about a step that went wrong: a non-finite gradient, or a loss spike (C12).

In: each step's loss, and the reason why a step was not applied. Out: the run stops and names the
step's rows, or skips the step, or returns to the last checkpoint and then skips it. Skipped steps
stand in skipped_steps.jsonl, so that every later start, at any world size, skips the same ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import GuardSection
from packhorse.trainer.utils.json_lines import append_json_lines, cut_json_lines, read_json_lines
from packhorse.trainer.utils.log_lines import check_skipped

WINDOW = 50  # losses whose median is the usual one
_ENOUGH = 10  # losses before any is called a spike


class StepNotApplied(RuntimeError):
    """A step went wrong, and by its rule the run stops; the message names the step's rows."""


class Guard:
    """Every rank has one, and all decide alike.

    Args:
        recent_losses: of the steps before the first, from the checkpoint.
    """

    def __init__(
        self, section: GuardSection, run_dir: Path, recent_losses: Sequence[float]
    ) -> None:
        self._section = section
        self._path = run_dir / "skipped_steps.jsonl"
        if dist.is_main():
            # a step of a line that is lost is decided anew, unless a checkpoint has passed it
            cut_json_lines(self._path, lambda _: True, check_skipped)
        lines = dist.broadcast(read_json_lines(self._path) if dist.is_main() else None)
        self.skipped_steps = {line["step"] - 1 for line in lines}
        self._losses = deque(recent_losses, WINDOW)
        self._is_spike = False

    @property
    def recent_losses(self) -> tuple[float, ...]:
        """The losses that the checkpoint keeps; none unless spikes are looked for."""
        return tuple(self._losses)

    @property
    def looks_at_losses(self) -> bool:
        return self._section.spike_factor is not None

    def check_loss(self, loss: float) -> str | None:
        """Return why a step of this loss must not be applied, or None, and remember the loss."""
        self._is_spike = False
        if not math.isfinite(loss):
            # Its gradient is not finite either, which is the other rule's case. Remembered, it
            # would make the median of the usual losses NaN.
            return None
        if self._section.spike_factor is not None and len(self._losses) >= _ENOUGH:
            usual = median(self._losses)
            # losses of exactly 0, as of what is learned by heart, say nothing of what is usual
            self._is_spike = 0 < self._section.spike_factor * usual < loss
            if self._is_spike:
                return f"its loss is {loss:.4f}, {loss / usual:.1f} times the usual"
        self._losses.append(loss)
        return None

    def decide(self, step: int, reason: str, rows: str) -> Literal["skip", "rollback"]:
        """Record that step `step` (from 1), which was not applied, is skipped; return the rule.

        Raises:
            StepNotApplied: the rule is to stop, or guard.max_skipped_steps were skipped already.
        """
        rule = self._section.spike if self._is_spike else self._section.non_finite
        message = f"step {step} was not applied: {reason}; its rows: {rows}"
        if rule == "stop":
            raise StepNotApplied(message)
        if len(self.skipped_steps) >= self._section.max_skipped_steps:
            raise StepNotApplied(
                f"{message}; {len(self.skipped_steps)} steps were skipped before "
                "(guard.max_skipped_steps)"
            )
        dist.log.warning("%s (guard: %s)", message, rule)
        self.skipped_steps.add(step - 1)
        if dist.is_main():
            # on the disk before the run trains on: a later start must not apply the step
            line = {"step": step, "reason": reason, "rule": rule, "rows": rows}
            append_json_lines(self._path, [line], sync=True)
        return rule

    def applied(self, steps: int) -> int:
        """Return how many of the plan's first `steps` steps were applied."""
        return steps - sum(index < steps for index in self.skipped_steps)
