"""Run tasks of lm-evaluation-harness (`eval.lm_eval`), after the recipe's own evaluation by
`packhorse eval`.

A recipe whose model is a folder or a hub name enters. Two files leave, in the results folder:
lm_eval.json has the metrics as in a line of evaluations.jsonl, and lm_eval.jsonl the samples, so
that `packhorse compare` pairs them.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer.config.eval import EvalSection
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval.compare import HARNESS_METRICS, HARNESS_SAMPLES
from packhorse.trainer.eval.confidence import Z, interval
from packhorse.trainer.utils.download import local_folder
from packhorse.trainer.utils.files import write_json, write_synced
from packhorse.trainer.utils.text import one_line


def require_tasks(section: EvalSection) -> Any:
    """Return the library's TaskManager, which knows all of the recipe's tasks. FOLDER/TASK is a
    task of a folder of the user's.

    Raises:
        BadInput: the library is not installed, a folder does not exist, or a task is unknown.
    """
    folders: list[str | Path] = [str(Path(task).parent) for task in section.lm_eval if "/" in task]
    for folder in folders:
        if not Path(folder).is_dir():
            raise BadInput(f"eval.lm_eval: there is no folder {folder}")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadInput(
            f"eval.lm_eval: lm-evaluation-harness is not installed ({error}); install packhorse's "
            f"extra [lm-eval]"
        ) from None
    manager = TaskManager(include_path=folders or None)
    for task in _task_names(section):
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.5)
            instead = f"; the nearest: {', '.join(near)}" if near else ""
            raise BadInput(f"eval.lm_eval: lm-evaluation-harness has no task `{task}`{instead}")
    return manager


def _task_names(section: EvalSection) -> list[str]:
    return [Path(task).name for task in section.lm_eval]


def run_tasks(recipe: Recipe, out: Path, manager: Any) -> None:
    """Run the tasks in this process, on its GPUs if there are any, and write metrics and samples.
    `manager` is what `require_tasks` returned. Raises BadInput if a task's data cannot be
    downloaded."""
    from lm_eval import evaluator
    from lm_eval.models import huggingface

    # Any: the library's decorators hide its functions' parameters
    library: Any = evaluator
    load: Any = huggingface.HFLM
    section, model = recipe.eval, recipe.model
    harness = load(
        pretrained=str(local_folder(model.name, "model.name", weights=True) or model.name),
        revision=model.revision or "main",
        dtype=model.dtype,
        device="cuda" if torch.cuda.is_available() else "cpu",
        parallelize=torch.cuda.device_count() > 1,
        batch_size="auto" if torch.cuda.is_available() else 8,
        trust_remote_code=model.trust_remote_code,
    )
    tasks = _task_names(section)
    print(f"lm-evaluation-harness {version('lm_eval')}: {', '.join(tasks)}", file=sys.stderr)
    try:
        found = library.simple_evaluate(
            harness,
            tasks=tasks,
            task_manager=manager,
            apply_chat_template=section.lm_eval_chat,
            bootstrap_iters=1000,  # for metrics that have no formula for their standard error
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise BadInput(
            f"eval.lm_eval: a task's data cannot be downloaded ({one_line(error, 300)})"
        ) from None
    samples = samples_of(found["samples"])
    write_json(out / HARNESS_METRICS, metrics_of(found["results"], samples))
    write_synced(out / HARNESS_SAMPLES, "".join(json.dumps(sample) + "\n" for sample in samples))


def metrics_of(
    results: dict[str, dict[str, Any]], samples: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Convert the library's results to metrics: `task/metric` -> value, count and 95% interval.

    The interval is ours if the value is the mean of the samples' scores, else from the library's
    standard error.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for name, score in sample["scores"].items():
            scores[name].append(score)
    metrics = {}
    for task, numbers in results.items():
        count = numbers.get("sample_len", 0)
        for key, value in numbers.items():
            name, comma, rule = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            full = _name(task, name, rule)
            own, error = scores.get(full), numbers.get(f"{name}_stderr,{rule}")
            low = high = None
            # medians, perplexities and groups are no means of samples' scores
            if own and math.isclose(sum(own) / len(own), value):
                low, high = interval(own)
            elif isinstance(error, int | float):
                low, high = value - Z * error, value + Z * error
            metrics[full] = {"value": value, "count": count, "low": low, "high": high}
    return metrics


def samples_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Convert the library's samples to ours: the prompt, by its digest, and its scores.

    Only scores that are numbers of one sample are kept. A metric that is no mean of such numbers,
    as a perplexity, has none, and is not compared by pairs.
    """
    samples = []
    for task, of_task in found.items():
        for sample in of_task:
            scores = {
                _name(task, metric, sample["filter"]): float(sample[metric])
                for metric in sample["metrics"]
                if isinstance(sample.get(metric), bool | int | float)
            }
            samples.append(
                {"prompt": f"{task}:{sample['filter']}:{sample['doc_hash']}", "scores": scores}
            )
    return samples


def _name(task: str, metric: str, rule: str) -> str:
    """Return our name of a metric. `rule` is the library's filter of answers, most often none."""
    return f"{task}/{metric}" + ("" if rule == "none" else f",{rule}")
