"""Make one HTML page of one or several runs: it loads nothing, runs no script, and can be mailed.

Runs enter; the text of the page leaves. What the page says is gathered here, how it looks is in
page.html.jinja. Answers of models, prompts and names are untrusted: jinja2 escapes every value but
the figures, which hold no text of a user.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from packhorse import __version__
from packhorse.trainer.config.parsing import leaves
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.report.figures import Bars, Curve, draw_bars, draw_curves, draw_sample
from packhorse.trainer.report.runs import LOSS, TOKENS_PER_S, Run, is_finite
from packhorse.trainer.report.samples import compare_samples
from packhorse.trainer.utils.text import show_controls


class Plotted(NamedTuple):
    """How a metric of metrics.jsonl is shown."""

    title: str
    y_label: str
    note: str
    zero: bool = False  # whether the axis begins at 0


_TRAINING = {
    LOSS: Plotted(
        "Training loss", "loss (nats per token)", "Mean of the steps between two log lines."
    ),
}
_OPTIMIZER = {
    "train/lr": Plotted("Learning rate", "learning rate", "Of the logged step.", True),
    "train/grad_norm": Plotted("Gradient norm", "L2 norm", "Before clipping.", True),
}
_MACHINE = {
    TOKENS_PER_S: Plotted("Speed", "tokens per second", "Of all ranks, without fillers.", True),
    "perf/step_s": Plotted("Time of a step", "seconds", "Without evaluation.", True),
    "perf/mfu": Plotted("Model FLOPs utilization", "share of peak", "Dense bf16 peak.", True),
    "mem/gpu_peak_gib": Plotted("GPU memory", "GiB", "Peak of a GPU, allocated.", True),
    "mem/host_peak_gib": Plotted("Host memory", "GiB", "Peak of all ranks' processes.", True),
}


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    svg: Markup


def make_page(runs: Sequence[Run]) -> str:
    """Return the report on the runs, in their order, as an HTML page."""
    names = short_names([run.folder for run in runs])
    groups = {
        "Loss and evaluations": [
            *_curves(runs, _TRAINING),
            *_evaluation_figures(runs),
        ],
        "Optimizer": _curves(runs, _OPTIMIZER),
        "Speed and memory": _curves(runs, _MACHINE),
        "Data": _data_figures(runs),
    }
    values = {
        "title": f"Training report: {', '.join(names)}",
        "version": __version__,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "runs": [
            {
                "name": name,
                "sample": draw_sample(number),
                "sample_id": f"sample-{number}-figure_1",
                **_outcome(run),
            }
            for number, (run, name) in enumerate(zip(runs, names, strict=True))
        ],
        "metrics": _metric_names(runs),
        "groups": {title: figures for title, figures in groups.items() if figures},
        "samples": compare_samples(runs),
        "differences": differing_keys([run.recipe for run in runs]),
    }
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return show_controls(environment.get_template("page.html.jinja").render(values))


def differing_keys(recipes: Sequence[Recipe]) -> dict[str, list[str]]:
    """Return each key but run.dir whose value is not the same in all recipes, with the values, and
    `-` for that of a recipe which has no such key, as adapter.rank without an adapter."""
    flat = [dict(leaves(recipe.model_dump(mode="json"))) for recipe in recipes]
    keys = dict.fromkeys(key for values in flat for key in values if key != "run.dir")
    rows = {key: [_text(values.get(key, "-")) for values in flat] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    raise AssertionError("whole paths tell folders apart")


# ------------------------------------------------------------------------------------------ outcome


def _outcome(run: Run) -> dict[str, Any]:
    """Return what the first table says of a run."""
    losses = [value for _, value in run.values(LOSS)]
    lines = list(run.evaluations.values())
    memory = run.values("mem/gpu_peak_gib") or run.values("mem/host_peak_gib")
    return {
        "folder": str(run.folder),
        "state": run.state,
        "step": run.step,
        "steps": run.steps,
        "losses": losses[:1] + losses[-1:],
        "eval_losses": [line["eval_loss"] for line in lines[:1] + lines[1:][-1:]],
        "evaluated": list(run.evaluations)[-1:],
        "metrics": lines[-1]["metrics"] if lines else {},
        "tokens_per_s": run.tokens_per_s,
        "memory_gib": memory[-1][1] if memory else None,
        "memory_of": "GPU" if run.values("mem/gpu_peak_gib") else "host",
        "ranks": run.environment.get("world_size"),
        "device": run.environment.get("device"),
        "recipe": run.recipe.to_yaml(),
    }


def _metric_names(runs: Sequence[Run]) -> list[str]:
    names = (name for run in runs for line in run.evaluations.values() for name in line["metrics"])
    return list(dict.fromkeys(names))


# ------------------------------------------------------------------------------------------ figures


def _curves(runs: Sequence[Run], plotted: dict[str, Plotted]) -> list[Figure]:
    """Draw the metrics that a run has logged."""
    figures = []
    for key, shown in plotted.items():
        curves = [
            Curve(number, *zip(*values, strict=True))
            for number, run in enumerate(runs)
            if (values := run.values(key))
        ]
        if curves:
            svg = draw_curves(_id(key), shown.y_label, curves, zero=shown.zero)
            figures.append(Figure(shown.title, shown.note, svg))
    return figures


def _evaluation_figures(runs: Sequence[Run]) -> list[Figure]:
    """Draw the held-out loss, that of each source, and each metric with its intervals."""
    lines = [line for run in runs for line in run.evaluations.values()]
    note = "Mean over all trained tokens."
    if len({line["held_out"] for line in lines if "held_out" in line}) > 1:
        note += " The runs' held-out rows or tokens differ: do not compare their values."
    sources = dict.fromkeys(name for line in lines for name in line.get("losses", ()))
    figures = []
    for place, source in enumerate((None, *sources)):
        if curves := _held_out_losses(runs, source):
            svg = draw_curves(f"loss-{place}", "loss (nats per token)", curves, points=True)
            title = f"Held-out loss{f' of {source}' if source else ''}"
            figures.append(Figure(title, note, svg))
    for place, name in enumerate(_metric_names(runs)):
        curves = [curve for number, run in enumerate(runs) if (curve := _scores(number, run, name))]
        if curves:
            svg = draw_curves(f"score-{place}", "mean score (0 to 1)", curves, points=True)
            figures.append(Figure(name, "Held-out prompts; 95% intervals.", svg))
    return figures


def _held_out_losses(runs: Sequence[Run], source: str | None) -> list[Curve]:
    """Return each run's held-out loss, of a source or of all rows."""
    curves = []
    for number, run in enumerate(runs):
        found = {
            step: line.get("losses", {}).get(source) if source else line["eval_loss"]
            for step, line in run.evaluations.items()
        }
        found = {step: loss for step, loss in found.items() if is_finite(loss)}
        if found:
            curves.append(Curve(number, list(found), list(found.values())))
    return curves


def _scores(number: int, run: Run, name: str) -> Curve | None:
    """Return a metric at the evaluations that have it, with its intervals."""
    found = {}
    for step, line in run.evaluations.items():
        metric = line["metrics"].get(name, {})
        values = [metric.get(key) for key in ("value", "low", "high")]
        if all(map(is_finite, values)):
            found[step] = values
    return Curve(number, list(found), *zip(*found.values(), strict=True)) if found else None


def _data_figures(runs: Sequence[Run]) -> list[Figure]:
    """Draw the histograms of data.json; those of equal data once."""
    figures = []
    for key, title, x_label, y_label, note in (
        ("document_tokens", "Length of a document", "tokens", "documents", "Training data"),
        ("sequence_fill", "Fill of a packed sequence", "% filled", "sequences", "First epoch"),
    ):
        drawn: dict[str, Bars] = {}
        for number, run in enumerate(runs):
            histogram = run.data.get("train", {}).get("histograms", {}).get(key)
            if histogram:
                drawn.setdefault(str(histogram), Bars(number, **histogram))
        if drawn:
            same = "; the same in all runs." if 1 == len(drawn) < len(runs) else "."
            svg = draw_bars(_id(key), x_label, y_label, list(drawn.values()))
            figures.append(Figure(title, note + same, svg))
    return figures


def _id(key: str) -> str:
    return key.replace("/", "-").replace("_", "-")
