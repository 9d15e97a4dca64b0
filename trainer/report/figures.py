"""Draw a report's figures as SVG that takes its colours and its type from the page around it.

Numbers of each run enter; `<svg>` elements leave. No text of a user is drawn, so that none has to
be escaped: titles and names of runs stand in the page. Runs differ by colour, dashes and markers,
so that they can be told apart without colour, too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from packhorse.trainer.utils.plain_figures import plain_figures

COLOURS = 8  # of runs; a ninth run has the first one's again, with other dashes
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (7, 1.5, 1.2, 1.5)),
    (0, (3, 1)),
)
_MARKERS = "osD^vPX"
_INCHES = (4.8, 2.75)  # so that the type stays legible in a card of 340 pixels
_MOST_POINTS = 240  # of a curve; more are joined in groups
_INK, _GRID, _RUN = "#000001", "#000002", "#0000f{}"
# What is drawn in these stand-ins gets the page's colours, which follow its light or dark scheme.
_VARIABLES = {_INK: "var(--muted)", _GRID: "var(--line)"} | {
    _RUN.format(number): f"var(--run-{number})" for number in range(COLOURS)
}


@dataclass(frozen=True)
class Curve:
    """Values of a run by step: `steps`, `values` (n,), and the ends of their intervals if known."""

    run: int  # the run's number, from 0
    steps: Sequence[float]
    values: Sequence[float]
    lows: Sequence[float] | None = None
    highs: Sequence[float] | None = None


@dataclass(frozen=True)
class Bars:
    """A histogram of a run's data: `counts` (b,) between `edges` (b + 1,)."""

    run: int
    edges: Sequence[float]
    counts: Sequence[float]


@plain_figures()
def draw_curves(
    name: str, y_label: str, curves: Sequence[Curve], *, points: bool = False, zero: bool = False
) -> Markup:
    """Draw curves over the steps.

    Args:
        name: letters, digits and hyphens; another one for each figure of a page.
        points: mark each value; for evaluations, which are few.
        zero: let the axis of values begin at 0.
    """
    figure, axes = _start("step", y_label)
    for curve in curves:
        _draw_curve(axes, curve, points)
    if _spans_decades(curves):
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_ylabel(f"{y_label} (log scale)")
    else:
        _format_ticks(axes.yaxis, "{:,.5g}")
        axes.margins(y=0.08)
        if zero:
            axes.set_ylim(bottom=0)
    _format_ticks(axes.xaxis, "{:,.0f}", whole=True)
    return _as_svg(figure, name)


def _draw_curve(axes: Any, curve: Curve, points: bool) -> None:
    style = {"color": _colour(curve.run), "linestyle": _DASHES[curve.run % len(_DASHES)]}
    marks = {"marker": _marker(curve.run), "markersize": 4.5}
    if curve.lows is not None and curve.highs is not None:
        if len(curve.steps) == 1:  # a band of one step has no width
            ends = np.abs(np.asarray([curve.lows, curve.highs]) - np.asarray(curve.values))
            axes.errorbar(curve.steps, curve.values, ends, capsize=3, **style)
        _draw_band(axes, curve.run, curve.steps, curve.lows, curve.highs)
        axes.plot(curve.steps, curve.values, linewidth=1.3, **style, **marks)
        return
    steps, means, lows, highs = _joined(np.asarray(curve.steps), np.asarray(curve.values))
    if len(steps) < len(curve.steps):
        _draw_band(axes, curve.run, steps, lows, highs)
    has_marks = points or len(steps) == 1
    axes.plot(steps, means, linewidth=1.5, **style, **(marks if has_marks else {}))


def _draw_band(axes: Any, run: int, steps: Any, lows: Any, highs: Any) -> None:
    axes.fill_between(steps, lows, highs, color=_colour(run), alpha=0.12, linewidth=0)


def _joined(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return (steps, means, lows, highs) of at most _MOST_POINTS groups of neighbours."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), _MOST_POINTS))
    reduced = [
        (steps[group].mean(), values[group].mean(), values[group].min(), values[group].max())
        for group in groups
    ]
    return tuple(np.asarray(reduced).T)


def _spans_decades(curves: Sequence[Curve]) -> bool:
    """Return whether a few high values would press the others flat on a linear axis."""
    values = np.concatenate([np.asarray(curve.values) for curve in curves])
    return bool(values.min() > 0 and values.max() > 30 * np.median(values))


@plain_figures()
def draw_bars(name: str, x_label: str, y_label: str, runs: Sequence[Bars]) -> Markup:
    """Draw the outlines of histograms over each other."""
    figure, axes = _start(x_label, y_label)
    for bars in runs:
        dashes = _DASHES[bars.run % len(_DASHES)]
        style = {"color": _colour(bars.run), "baseline": 0}
        axes.stairs(bars.counts, bars.edges, fill=True, alpha=0.22, linewidth=0, **style)
        axes.stairs(bars.counts, bars.edges, linewidth=1.3, linestyle=dashes, **style)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        _format_ticks(axis, "{:,.0f}", whole=True)
    return _as_svg(figure, name)


@plain_figures()
def draw_sample(run: int) -> Markup:
    """Draw a short piece of a run's line with its marker, for a legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.42, 0.16))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    style = {"color": _colour(run), "linestyle": _DASHES[run % len(_DASHES)]}
    axes.plot([0, 1], [0, 0], linewidth=1.8, **style)
    axes.plot([0.5], [0], marker=_marker(run), markersize=5, color=_colour(run))
    return _as_svg(figure, f"sample-{run}")


def _colour(run: int) -> str:
    return _RUN.format(run % COLOURS)


def _marker(run: int) -> str:
    return _MARKERS[run % len(_MARKERS)]


def _start(x_label: str, y_label: str) -> tuple[Any, Any]:
    """Return an empty figure and its axes, in the page's colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.tick_params(colors=_INK, length=0, pad=5)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.patch.set_visible(False)
    return figure, axes


def _format_ticks(axis: Any, form: str, whole: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=whole))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))


def _as_svg(figure: Any, name: str) -> Markup:
    """Return the figure as one element: without a size, in variable colours, its ids its own."""
    import matplotlib

    # text as text, so that the page's font is used and a reader can find it
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10.5}
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # matplotlib's style sheet would hold for the whole page, and its fonts are not the page's
    others = r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;]*; "
    text = re.sub(others, "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box, "matplotlib writes a viewBox"
    text = f'<svg aria-hidden="true" {box[0]}>' + text[text.index(">") + 1 :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return Markup(text)  # noqa: S704 - no text of a user is in it
