"""Check what a run's files hold, which an editor, a disk or a stranger may have changed.

The JSON object of a line or a file enters; nothing leaves, or LookupError or TypeError is raised,
by which the readers of lines know a damaged one (utils/json_lines.py).
"""

from __future__ import annotations

from typing import Any

_LARGEST = 2**63  # of a whole number: one of hundreds of digits fits no float


def check_metrics(line: dict[str, Any]) -> None:
    """Check a line of metrics.jsonl: a step and numbers by name."""
    _require_step(line["step"])
    _require_numbers(line)


def check_evaluation(line: dict[str, Any]) -> None:
    """Check a line of evaluations.jsonl."""
    _require_step(line["step"])
    _require(line["eval_loss"], int, float)
    _require_numbers(line.get("losses", {}))
    check_scores(line["metrics"])
    for key in ("held_out", "tokenizer"):
        _require(line.get(key, ""), str)


def check_scores(metrics: dict[str, Any]) -> None:
    """Check metrics by name, which may lack the ends of the interval."""
    _require(metrics, dict)
    for metric in metrics.values():
        _require(metric, dict)
        _require(metric.get("missing", ""), str)
        given = {key: metric[key] for key in ("value", "count")}
        given |= {key: metric.get(key) for key in ("low", "high")}
        _require_numbers({key: value for key, value in given.items() if value is not None})


def check_pair(line: dict[str, Any]) -> None:
    """Check what a sample is paired by: its prompt, and its scores by name."""
    _require(line["prompt"], str)
    _require(line["scores"], dict)
    _require_numbers({name: score for name, score in line["scores"].items() if score is not None})


def check_sample(line: dict[str, Any]) -> None:
    """Check a line of samples.jsonl."""
    _require_step(line["step"])
    check_pair(line)
    for key in ("answer", "reference"):
        _require(line[key], str)
    _require(line.get("unscored", {}), dict)


def check_trace(line: dict[str, Any]) -> None:
    """Check a line of trace.jsonl as far as it is read."""
    _require_step(line["step"])


def check_skipped(line: dict[str, Any]) -> None:
    """Check a line of skipped_steps.jsonl: a step, from 1."""
    _require_step(line["step"])
    if not line["step"]:
        raise TypeError("step 0")


def check_shard(line: dict[str, Any], number: int) -> None:
    """Check a line of shards.jsonl, of which `number` lines stand before it."""
    _require(line, dict)
    for key in ("number", "bytes", "sequences", "first_step"):
        _require_step(line[key])
    if line["number"] != number or not line["first_step"]:
        raise TypeError(f"shard {line['number']}, from step {line['first_step']} on")
    for key in ("file", "digest", "documents", "rejects"):
        _require(line[key], str)
    _require(line["report"], dict)
    stream = line.get("stream")
    if stream is not None:
        _require(stream, dict)
        _require(stream["state"], dict)
        first, last = stream["rows"]
        _require_step(first)
        _require_step(last)


# a run's logs of steps, and what finds damaged lines
LOGS = {"metrics.jsonl": check_metrics, "samples.jsonl": check_sample, "trace.jsonl": check_trace}


def check_data(content: dict[str, Any]) -> None:
    """Check data.json as far as it is read: the number of steps, and histograms."""
    train = content.get("train", {})
    _require(train, dict)
    _require(train.get("steps", 0), int)
    _require(train.get("histograms", {}), dict)
    for histogram in train.get("histograms", {}).values():
        if histogram.keys() != {"edges", "counts"}:
            raise LookupError("edges and counts")
        for values in histogram.values():
            _require(values, list)
            _require_numbers(dict(enumerate(values)))
        if len(histogram["edges"]) != len(histogram["counts"]) + 1:
            raise LookupError("edges")


def check_summary(content: dict[str, Any]) -> None:
    """Check summary.json as far as it is read."""
    for key in ("before", "after"):
        _require(content[key], dict)
        _require_numbers({k: value for k, value in content[key].items() if value is not None})
    _require_numbers(content["seconds"])
    _require_numbers({key: content[key] for key in ("steps", "skipped_steps", "tokens_per_s")})
    best = content["best"]
    if best is not None:
        _require(best, dict)
        _require(best["rule"], str)
        _require(best["step"], int, type(None))


def _require_step(value: Any) -> None:
    _require(value, int)
    if value < 0:
        raise TypeError(f"step {value}")


def _require_numbers(values: Any) -> None:
    _require(values, dict)
    for value in values.values():
        _require(value, int, float, bool)


def _require(value: Any, *kinds: type) -> None:
    is_huge = isinstance(value, int) and abs(value) >= _LARGEST
    if type(value) not in kinds or is_huge:
        raise TypeError(
            f"{str(value)[:100]!r} is no {' or '.join(kind.__name__ for kind in kinds)}"
        )
