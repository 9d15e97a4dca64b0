"""Histograms, one below the other, as an image.

Drawn with Pillow, which TensorBoard brings in: a plotting library would be the heaviest part of the
image that a run does not need, and writes a font cache into the home folder, which a container may
not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT = 1000, 330  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 46, 54  # its margins
INK, FAINT, BAR, SHARE = "#222222", "#dddddd", "#9db4cc", "#2e9e4f"


@dataclass(frozen=True)
class Panel:
    """A histogram: `counts` (b,) between `edges` (b + 1,). Of each bar `shares` (b,), 0 to 1, is
    coloured.
    """

    title: str
    label: str  # of the x axis
    edges: np.ndarray
    counts: np.ndarray
    shares: np.ndarray | None = None


def draw(panels: Sequence[Panel]) -> Image:
    """The panels as a PIL image."""
    from PIL import Image

    image = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    for number, panel in enumerate(panels):
        _draw_panel(image, HEIGHT * number, panel)
    return image


def _draw_panel(image: Image, top: int, panel: Panel) -> None:
    from PIL import ImageDraw, ImageFont

    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    bottom = top + HEIGHT - BOTTOM
    x_ticks, y_ticks = _ticks(float(panel.edges[-1])), _ticks(max(float(panel.counts.max()), 1.0))
    right_value, top_value = float(panel.edges[-1]), max(y_ticks[-1], float(panel.counts.max()))

    def x(value: float) -> float:
        return LEFT + value / right_value * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return bottom - value / top_value * (HEIGHT - TOP - BOTTOM)

    pen.text((LEFT, top + 12), panel.title, INK, ImageFont.load_default(17))
    for tick in y_ticks:
        pen.line([(LEFT, y(tick)), (WIDTH - RIGHT, y(tick))], FAINT)
        pen.text((LEFT - 8, y(tick)), f"{tick:,.0f}", INK, font, anchor="rm")
    shares = np.zeros(len(panel.counts)) if panel.shares is None else panel.shares
    for left, right, count, share in zip(
        panel.edges, panel.edges[1:], panel.counts, shares, strict=False
    ):
        for height, colour in ((count, BAR), (count * share, SHARE)):
            if height:
                pen.rectangle([(x(left), y(height)), (max(x(right) - 2, x(left)), bottom)], colour)
    pen.line([(LEFT, bottom), (WIDTH - RIGHT, bottom)], INK)
    for tick in x_ticks:
        pen.line([(x(tick), bottom), (x(tick), bottom + 4)], INK)
        pen.text((x(tick), bottom + 7), f"{tick:,.0f}", INK, font, anchor="mt")
    pen.text(((LEFT + WIDTH - RIGHT) / 2, bottom + 28), panel.label, INK, font, anchor="mt")


def _ticks(most: float) -> list[float]:
    """About five round numbers from 0 to at most `most`: steps of 1, 2 or 5 times a power of ten,
    whole ones.
    """
    power = 10.0 ** np.floor(np.log10(max(most, 1.0) / 5)) if most > 5 else 1.0
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 6 > most)
    return [step * number for number in range(int(most // step) + 1)]
