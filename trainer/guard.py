"""What becomes of a step that went wrong: a gradient that is not finite, or a loss far above the
usual (C12).

The run stops, naming the step's rows; or goes on without the step; or goes back to the last
checkpoint and then passes the step over. What was passed over stands in skipped_steps.jsonl, so
that every later start, of whatever world, passes over the same.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal

from trainer import dist
from trainer.config.recipe import GuardSection
from trainer.utils.files import read_json_lines

WINDOW = 50  # losses whose median is the usual one
_ENOUGH = 10  # of them, before anything is called a spike


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
        lines = dist.broadcast(read_json_lines(self._path) if dist.is_main() else None)
        self.skipped_steps = {int(line["step"]) - 1 for line in lines}
        self._losses = deque(recent_losses, WINDOW)
        self._is_spike = False

    @property
    def recent_losses(self) -> tuple[float, ...]:
        """For the checkpoint; none where nobody looks for spikes."""
        return tuple(self._losses)

    @property
    def looks_at_losses(self) -> bool:
        return self._section.spike_factor is not None

    def check_loss(self, loss: float) -> str | None:
        """Why a step of this loss is not to be applied, or None; it then counts among the usual
        ones.
        """
        self._is_spike = False
        if not math.isfinite(
            loss
        ):  # its gradient is not, either: that rule's case, and no usual loss
            return None
        if self._section.spike_factor is not None and len(self._losses) >= _ENOUGH:
            usual = median(self._losses)
            self._is_spike = loss > self._section.spike_factor * usual
            if self._is_spike:
                return f"its loss is {loss:.4f}, {loss / usual:.1f} times the usual"
        self._losses.append(loss)
        return None

    def decide(self, step: int, reason: str, rows: str) -> Literal["skip", "rollback"]:
        """The rule for step `step` (from 1), which was not applied; from here on it is passed over.

        Raises:
            StepNotApplied: the rule is to stop, or so many steps were passed over already.
        """
        rule = self._section.spike if self._is_spike else self._section.non_finite
        told = f"step {step} was not applied: {reason}; its rows: {rows}"
        if rule == "stop":
            raise StepNotApplied(told)
        if len(self.skipped_steps) >= self._section.max_skipped_steps:
            raise StepNotApplied(
                f"{told}; {len(self.skipped_steps)} steps were passed over before "
                f"(guard.max_skipped_steps)"
            )
        dist.log.warning("%s (guard: %s)", told, rule)
        self.skipped_steps.add(step - 1)
        if dist.is_main():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": step, "reason": reason, "rule": rule, "rows": rows}) + "\n"
                )
                file.flush()
                os.fsync(file.fileno())
        return rule

    def applied(self, steps: int) -> int:
        """Updates that were applied in the first `steps` of the plan."""
        return steps - sum(index < steps for index in self.skipped_steps)
