"""Draw histograms, one below the other: Histograms in, a matplotlib figure out.

matplotlib is imported only when something is drawn, as that takes a second. It keeps a list of the
machine's fonts below HOME, or in a temporary folder where HOME cannot be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_INCHES = (10.0, 3.3)
COUNT_COLOUR, SHARE_COLOUR = "#9db4cc", "#2e9e4f"


@dataclass(frozen=True)
class Histogram:
    """`counts` (b,) between `edges` (b + 1,); `shares` (b,), from 0 to 1, colours part of a bar."""

    title: str
    x_label: str
    edges: np.ndarray
    counts: np.ndarray
    shares: np.ndarray | None = None

    def as_json(self) -> dict[str, list[float]]:
        """Return the numbers, for data.json: edges to four digits, as no eye sees more."""
        return {
            "edges": [float(f"{edge:.4g}") for edge in self.edges],
            "counts": [int(count) for count in self.counts],
        }


def draw(histograms: Sequence[Histogram]) -> Figure:
    """Draw each histogram in a panel of its own, the first on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    width, height = PANEL_INCHES
    figure = Figure(figsize=(width, height * len(histograms)), layout="constrained")
    # The Agg canvas needs no display. pyplot would look for one, and keep the figure in memory.
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(histograms), squeeze=False)[:, 0]
    for axes, histogram in zip(panels, histograms, strict=True):
        left, widths = histogram.edges[:-1], np.diff(histogram.edges)
        axes.bar(left, histogram.counts, widths, align="edge", color=COUNT_COLOUR)
        if histogram.shares is not None:
            trained = histogram.counts * histogram.shares
            axes.bar(left, trained, widths, align="edge", color=SHARE_COLOUR)
        axes.set_title(histogram.title, loc="left")
        axes.set_xlabel(histogram.x_label)
        axes.set_xlim(0, histogram.edges[-1])
        axes.set_ylim(0, max(1.05 * float(histogram.counts.max()), 1))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure
