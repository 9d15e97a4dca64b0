"""Rows to packed, masked tokens, on CPU: packhorse beside TRL's SFTTrainer and a plain `map`.

    python benchmarks/data.py [--model DIR] [--data gsm8k_train.jsonl] [--times 8] [--rounds 3]

All arms read the same JSONL and leave what training maps into memory: tokens, which of them are
trained, packed sequences. Each round runs every arm on one core and on two, in a fresh process that
is bound to so many cores; rounds alternate. The clock is this process's: from the line that an arm
writes when its libraries and tokenizer are loaded to the line after its work. Nothing is cached.
Writes benchmarks/results/data_cpu.md. Needs the extra `bench` (TRL).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import ROOT, machine, spread, table, write_result

MODEL = Path("~/.cache/packhorse/models/smollm2-135m-instruct")
DATA = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
VERSIONS = ("transformers", "tokenizers", "trl", "datasets", "pyarrow", "numpy")
LABELS = {
    "packhorse": "packhorse",
    "trl_assistant": "TRL, assistant_only_loss",
    "trl_completion": "TRL, prompt and completion",
    "map": "datasets.map, batched",
}
IGNORED = -100
AIM = 2.0  # times TRL's


@dataclass(frozen=True)
class Job:
    """What every arm is given."""

    model: str
    messages: str  # JSONL, a row as {"messages": [question, answer]}
    pairs: str  # JSONL, the same rows as {"prompt": [question], "completion": [answer]}
    seq_len: int
    cores: int
    folder: str  # for the caches


@dataclass(frozen=True)
class Done:
    """What an arm made: real tokens, trained ones and packed sequences; and its seconds, by the
    clock outside.
    """

    tokens: int
    trained: int
    rows: int
    seconds: float = 0.0


def main() -> None:
    if sys.argv[1:2] == ["--arm"]:
        run_arm(sys.argv[2], Job(**json.loads(sys.argv[3])))
        return
    options = parse()
    work = Path(tempfile.mkdtemp(prefix="data."))
    write_rows(options, work)
    runs: dict[tuple[str, int], list[Done]] = {
        (arm, cores): [] for cores in (1, 2) for arm in LABELS
    }
    load = os.getloadavg()[0]
    for number in range(1, options.rounds + 1):
        for (arm, cores), done in runs.items():
            done.append(timed(arm, job(options, work, cores)))
            print(f"round {number} {arm:15} {cores} cores", done[-1], flush=True)
    text = report(runs, options, load)
    shutil.rmtree(work)
    write_result(options.out, text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="a folder with a tokenizer and its template"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL with question and answer")
    parser.add_argument("--times", type=int, default=8, help="the data, so many times over")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "data_cpu.md"
    )
    options = parser.parse_args()
    options.model, options.data = (
        options.model.expanduser().resolve(),
        options.data.expanduser().resolve(),
    )
    return options


def write_rows(options: argparse.Namespace, work: Path) -> None:
    with options.data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    with (work / "messages.jsonl").open("w") as messages, (work / "pairs.jsonl").open("w") as pairs:
        for row in rows * options.times:
            prompt = [{"role": "user", "content": row["question"]}]
            answer = [{"role": "assistant", "content": row["answer"]}]
            messages.write(json.dumps({"messages": prompt + answer}) + "\n")
            pairs.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")


def job(options: argparse.Namespace, work: Path, cores: int) -> Job:
    messages, pairs = (str(work / f"{name}.jsonl") for name in ("messages", "pairs"))
    return Job(
        str(options.model), messages, pairs, options.seq_len, cores, tempfile.mkdtemp(dir=work)
    )


def timed(arm: str, job: Job) -> Done:
    """Run an arm in a fresh process; the time between its lines, by this process's clock."""
    cpus = sorted(os.sched_getaffinity(0))[: job.cores]
    env = {
        "TOKENIZERS_PARALLELISM": "false",  # so many processes as cores, and no threads beside them
        "OMP_NUM_THREADS": "1",
        "HF_HOME": job.folder,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    with (Path(job.folder) / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--arm", arm, json.dumps(asdict(job))],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **env},
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )
        assert process.stdout is not None
        started = seconds = 0.0
        result = None
        for line in process.stdout:
            if line == "READY\n":
                started = time.monotonic()
            elif line.startswith("DONE "):
                seconds = time.monotonic() - started
                result = json.loads(line.removeprefix("DONE "))
        if process.wait() or result is None:
            log.seek(0)
            raise SystemExit(f"{arm} ended with {process.returncode}\n{log.read()[-3000:]}")
    shutil.rmtree(job.folder)
    return Done(**result, seconds=seconds)


# --------------------------------------------------------------------------------------------- arms


def run_arm(arm: str, job: Job) -> None:
    """Let an arm load what it needs and return its work, and do that between the two lines."""
    work = {"packhorse": packhorse, "trl_assistant": trl, "trl_completion": trl, "map": plain_map}[
        arm
    ](arm, job)
    print("READY", flush=True)
    done = work()
    print(
        "DONE",
        json.dumps({"tokens": done.tokens, "trained": done.trained, "rows": done.rows}),
        flush=True,
    )


def packhorse(arm: str, job: Job) -> Callable[[], Done]:
    from packhorse.trainer.config.recipe import parse_recipe
    from packhorse.trainer.data.prepare import prepare, train_plan
    from packhorse.trainer.model.load import load_tokenizer

    recipe = parse_recipe(
        {
            "model": {"name": job.model},
            "data": {
                "train": [{"path": job.messages}],
                "cache": f"{job.folder}/cache",
                "workers": job.cores,
            },
            "batch": {"seq_len": job.seq_len},
            "run": {"dir": f"{job.folder}/run"},
        }
    )
    tokenizer = load_tokenizer(recipe.model)

    def work() -> Done:
        prepared = prepare(recipe, tokenizer, "train")
        rows = sum(map(len, (m for s in [train_plan(recipe, prepared)] for m in rows_of(s))))
        return Done(prepared.report["tokens"], prepared.report["trained_tokens"], rows)

    def rows_of(plan: Any) -> list[tuple[int, ...]]:
        return [
            micro_batch
            for step in range(plan.steps)
            for micro_batch in plan.step(step).micro_batches
        ]

    return work


def trl(arm: str, job: Job) -> Callable[[], Done]:
    """TRL's own preparation: what SFTTrainer does to its dataset before it trains."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if arm == "trl_assistant":
        tokenizer.chat_template = marked(tokenizer.chat_template)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    settings = SFTConfig(
        output_dir=f"{job.folder}/trl",
        assistant_only_loss=arm == "trl_assistant",
        packing=True,
        packing_strategy="bfd",
        max_length=job.seq_len,
        dataset_num_proc=job.cores if job.cores > 1 else None,
        use_cpu=True,
        report_to="none",
    )

    def work() -> Done:
        rows: Any = Dataset.from_json(job.messages if arm == "trl_assistant" else job.pairs)
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=rows, processing_class=tokenizer
        )
        return counted(trainer.train_dataset)

    return work


def marked(template: str) -> str:
    """ChatML that marks its answers, as assistant_only_loss needs them."""
    content = "message['content'] + '<|im_end|>'"
    old = "{{'<|im_start|>' + message['role'] + '\n' + " + content + " + '\n'}}"
    assert old in template, "this benchmark knows SmolLM2's template"
    new = (
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% "
        "generation %}{{ "
        + content
        + " }}{% endgeneration %}{% else %}{{ "
        + content
        + " }}{% endif %}{{ '\n' }}"
    )
    return template.replace(old, new)


def plain_map(arm: str, job: Job) -> Callable[[], Done]:
    """Prepare as one writes it by hand: render and tokenize batches, mask the prompt's tokens, fill
    sequences in turn.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(job.model)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        whole = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        prompts = [messages[:-1] for messages in batch["messages"]]
        before = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        prompt_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
        labels = [[IGNORED] * len(p) + i[len(p) :] for p, i in zip(prompt_ids, ids, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def pack(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows: list[tuple[list[int], list[int]]] = [([], [])]
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            if len(rows[-1][0]) + len(ids) > job.seq_len:
                rows.append(([], []))
            rows[-1][0].extend(ids)
            rows[-1][1].extend(labels)
        return {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}

    def work() -> Done:
        rows: Any = Dataset.from_json(job.messages)
        same: dict[str, Any] = {"batched": True, "num_proc": job.cores if job.cores > 1 else None}
        rows = rows.map(tokenize, remove_columns=["messages"], **same)
        return counted(rows.shuffle(seed=0).map(pack, **same))

    return work


def counted(packed: Any) -> Done:
    """Count the tokens of an Arrow dataset of packed sequences, in Arrow: part of a second, in both
    arms alike.
    """
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made as it is imported
    labels = packed.with_format("arrow")
    tokens = trained = 0
    for batch in labels.iter(1000):
        flat = pc.list_flatten(batch["labels"])
        tokens += len(flat)
        trained += len(flat) - pc.sum(pc.equal(flat, IGNORED)).as_py()
    return Done(tokens, trained, len(packed))


# --------------------------------------------------------------------------------------- the report


def report(
    runs: dict[tuple[str, int], list[Done]], options: argparse.Namespace, load: float
) -> str:
    command = shlex.join(["python", "benchmarks/data.py", *sys.argv[1:]]).replace(
        str(Path.home()), "~"
    )
    rows = options.times * sum(1 for _ in options.data.open("rb"))
    parts = [
        "# Preparing data beside TRL and a plain `datasets.map`, on CPU",
        f"`{command}`",
        machine(VERSIONS),
        f"{options.data.name}, {options.times} times over ({rows:,} rows), the tokenizer and "
        f"template of "
        f"{options.model.name}, rows of {options.seq_len}; {options.rounds} alternating rounds, a "
        f"fresh process "
        "each, median (lowest to highest). From a JSONL file to masked, packed rows that training "
        "can map into memory." + busy(load),
        *(
            f"## {cores} core{'s' * (cores > 1)}\n\n{speed_table(runs, cores, options.seq_len)}"
            for cores in (1, 2)
        ),
        aims(runs),
        NOTES,
    ]
    return "\n\n".join(parts) + "\n"


def busy(load: float) -> str:
    if load < 0.5:
        return ""
    return (
        f" The machine was busy with other work (load {load:.1f} before the start), so this table "
        f"says little: run "
        "the command on a quiet one."
    )


def speed_table(runs: dict[tuple[str, int], list[Done]], cores: int, seq_len: int) -> str:
    head = ["", "tokens/s", "packhorse / it", "trained share", "fill"]
    rows = []
    for arm, label in LABELS.items():
        done = runs[arm, cores]
        rates = [run.tokens / run.seconds for run in done]
        first = done[0]
        rows.append(
            [
                label,
                spread(rates, "{:,.0f}"),
                spread(ratios(runs, arm, cores), "{:.2f}"),
                f"{first.trained / first.tokens:.3f}",
                f"{first.tokens / first.rows / seq_len:.3f}",
            ]
        )
    return table(head, rows)


def ratios(runs: dict[tuple[str, int], list[Done]], arm: str, cores: int) -> list[float]:
    """packhorse over `arm` in tokens a second, round by round."""
    pairs = zip(runs["packhorse", cores], runs[arm, cores], strict=True)
    return [ours.tokens / ours.seconds / theirs.tokens * theirs.seconds for ours, theirs in pairs]


def aims(runs: dict[tuple[str, int], list[Done]]) -> str:
    lines = []
    for cores in (1, 2):
        faster = min(
            ("trl_assistant", "trl_completion"),
            key=lambda arm: statistics.median(ratios(runs, arm, cores)),
        )
        got = statistics.median(ratios(runs, faster, cores))
        met = "met" if got >= AIM else "NOT met"
        lines.append(
            f"- aim on {cores} core{'s' * (cores > 1)}: at least {AIM:g} x {LABELS[faster]}: "
            f"{got:.2f}, {met}"
        )
    return "\n".join(lines)


NOTES = """\
packhorse proves each row's mask, trains the answer with its stop token, packs all documents of the
epoch together and syncs its cache to the disk. TRL renders and tokenizes row by row and packs a
thousand rows at a time; with prompt and completion it tokenizes the prompt twice and trains the
newline after the stop token too. The plain map renders and tokenizes batches, whole and prompt,
proves nothing and fills each row in turn. Tokens are real ones; TRL's may be fewer where it
truncates."""


if __name__ == "__main__":
    main()
