"""Tasks of lm-evaluation-harness through `packhorse eval`, on a task of our own, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from packhorse.trainer.checkpoint.best import evaluations
from packhorse.trainer.config.eval import EvalSection
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval.compare import difference, read_results
from packhorse.trainer.eval.lm_eval_harness import metrics_of, require_tasks, samples_of
from packhorse.trainer.model.load import load_model, load_tokenizer
from tests.ranks import ROOT

pytestmark = pytest.mark.runs

QUESTIONS = [
    {
        "question": f"How many are {n} and {n}?",
        "choices": ["two", "seven", "a dozen"],
        "label": n % 3,
    }
    for n in range(8)
]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a task, and the debug model with the weights of two seeds."""
    work = tmp_path_factory.mktemp("harness")
    (work / "tasks").mkdir()
    (work / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (work / "tasks" / "sums.yaml").write_text(TASK.format(data=work / "sums.jsonl"))
    recipe = load_recipe(ROOT / "recipes" / "debug.yaml")
    section = recipe.model.model_copy(update={"name": str(ROOT / recipe.model.name)})
    tokenizer = load_tokenizer(section)
    for seed in (0, 1):
        load_model(section, tokenizer, seed=seed).save_pretrained(work / f"model-{seed}")
        tokenizer.save_pretrained(work / f"model-{seed}")
    return work


@pytest.fixture(scope="module")
def results(work: Path) -> list[Path]:
    folders = [work / f"results-{seed}" for seed in (0, 1)]
    for seed, out in enumerate(folders):
        command = [
            *(
                sys.executable,
                "-m",
                "packhorse",
                "eval",
                str(work / f"model-{seed}"),
                "recipes/debug.yaml",
            ),
            *(
                "--out",
                str(out),
                "--nproc",
                "1",
                f"data.cache={work / 'cache'}",
                "eval.generate=null",
            ),
            f"eval.lm_eval=[{work / 'tasks' / 'sums'}]",
        ]
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(work / "hub"),
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert "sums/acc" in done.stdout
    return folders


def right_answers(folder: Path) -> list[bool]:
    """Return for each question whether the right choice is likeliest, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = []
    for row in QUESTIONS:
        prompt = f"Q: {row['question']} A:"
        likelihoods = []
        for choice in row["choices"]:
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            ids = torch.tensor(
                [tokenizer(f"{prompt} {choice}", add_special_tokens=False)["input_ids"]]
            )
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)
            likelihoods.append(
                sum(float(logprobs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
            )
        right.append(likelihoods.index(max(likelihoods)) == row["label"])
    return right


def test_the_harness_counts_what_the_model_thinks_likeliest(
    work: Path, results: list[Path]
) -> None:
    for seed, out in enumerate(results):
        right = right_answers(work / f"model-{seed}")
        metric = read_results(str(out)).metrics["sums/acc"]
        assert metric["value"] == pytest.approx(sum(right) / len(right))
        assert metric["count"] == len(QUESTIONS)
        assert list(evaluations(out)) == [0], "beside the recipe's own evaluation"


def test_two_models_are_compared_question_by_question(work: Path, results: list[Path]) -> None:
    a, b = (right_answers(work / f"model-{seed}") for seed in (0, 1))
    found = difference(read_results(str(results[0])), read_results(str(results[1])), "sums/acc")
    assert found
    assert found[1] == len(QUESTIONS)
    assert found[0].value == pytest.approx((sum(b) - sum(a)) / len(QUESTIONS))


def test_an_unknown_task_is_refused_with_the_nearest(work: Path) -> None:
    with pytest.raises(BadInput, match="has no task `sumss`; the nearest: sums"):
        require_tasks(EvalSection(lm_eval=(f"{work}/tasks/sumss",)))


def test_an_interval_is_wilsons_for_a_mean_of_right_answers_and_else_by_the_libraries_error() -> (
    None
):
    found = {"alias": "t", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.1, "em,none": 1.0}
    found |= {"em_stderr,none": 0.0, "f1,strict": 0.7, "f1_stderr,strict": "N/A"}
    samples = [{"prompt": str(n), "scores": {"t/em": 1.0}} for n in range(4)]
    metrics = metrics_of({"t": found}, samples)
    assert metrics["t/acc"]["low"] == pytest.approx(0.5 - 1.96 * 0.1, abs=1e-4)
    assert metrics["t/acc"]["high"] == pytest.approx(0.5 + 1.96 * 0.1, abs=1e-4)
    assert metrics["t/em"]["low"] == pytest.approx(4 / (4 + 1.96**2), abs=1e-4), (
        "Wilson's of 4 of 4"
    )
    assert metrics["t/em"]["high"] == 1
    assert metrics["t/f1,strict"] == {"value": 0.7, "count": 4, "low": None, "high": None}


def test_what_is_no_number_of_one_sample_is_not_paired() -> None:
    sample = {
        "filter": "none",
        "doc_hash": "x",
        "metrics": ["acc", "ppl"],
        "acc": 1.0,
        "ppl": (-3.0, 4),
    }
    assert samples_of({"t": [sample]}) == [{"prompt": "t:none:x", "scores": {"t/acc": 1.0}}]
