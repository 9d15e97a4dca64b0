"""Memory of the data path against the number of rows, and how soon a cache is found again.

    python benchmarks/data_scale.py [--rows 100000,500000,2000000] [--turns]

For each number: synthetic rows of about 200 tokens as JSONL; then, each in a fresh process,
`prepare` builds the cache and packs, `again` finds it, `train` makes the plan and the batches of
its last 1,000 steps. Rows are plain texts, or with --turns conversations of three answers, each of
which becomes a document with all before it (`data.turns: apart`). The tokenizer, which is made
here, takes words as tokens: what is measured is memory, not speed. Peaks are looked up twice a
second in /proc/PID/smaps_rollup, anonymous pages apart from those of mapped files, which the system
takes back when it needs them. Writes benchmarks/results/data_scale_cpu.md or, with --turns,
data_scale_turns_cpu.md. Needs about 4 GB of disk for 2,000,000 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, family, machine, table, write_result

MIB = 2**20
LOOK_S = 0.5
WORDS = 50_000
STEPS = 1000  # of the plan, made into batches
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }} A {% else %}"
    "{{ m.content }} <eos> {% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Peak:
    """The seconds of one part, and the peaks in MiB of anonymous and of mapped pages of the main
    process, and of anonymous pages of its largest worker. `says` is the part's own report.
    """

    seconds: float
    anonymous: float
    mapped: float
    worker: float
    says: dict[str, float]


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        run_part(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="100000,500000,2000000")
    parser.add_argument(
        "--out", type=Path, help="default: results/data_scale_cpu.md, data_scale_turns_cpu.md"
    )
    parser.add_argument("--turns", action="store_true", help="conversations with turns apart")
    options = parser.parse_args()
    found = {}
    for rows in map(int, options.rows.split(",")):
        work = Path(tempfile.mkdtemp(prefix="data_scale."))
        make_tokenizer(work / "model")
        make_rows(work / "rows.jsonl", rows, options.turns)
        found[rows] = {part: measured(part, work) for part in ("prepare", "again", "train")}
        found[rows]["prepare"].says["rows_gib"] = (work / "rows.jsonl").stat().st_size / 2**30
        print(rows, found[rows], flush=True)
        shutil.rmtree(work)
    text = report(found)
    name = f"data_scale{'_turns' * options.turns}_cpu.md"
    write_result(options.out or Path(__file__).parent / "results" / name, text)


def measured(part: str, work: Path) -> Peak:
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, __file__, "--part", part, str(work)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    anonymous = mapped = worker = 0.0
    while process.poll() is None:
        first, *others = family(process.pid)
        for pid in (first, *others):
            with suppress(OSError):
                pages = smaps(pid)
                if pid == first:
                    anonymous, mapped = max(anonymous, pages[0]), max(mapped, pages[1])
                else:
                    worker = max(worker, pages[0])
        time.sleep(LOOK_S)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"{part} ended with {process.returncode}")
    return Peak(
        time.monotonic() - started, anonymous, mapped, worker, json.loads(process.stdout.read())
    )


def smaps(pid: int) -> tuple[float, float]:
    """Resident MiB of a process: anonymous pages, and those of files."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    return kib["Anonymous:"] / 1024, (kib["Rss:"] - kib["Anonymous:"]) / 1024


# ----------------------------------------------------------------------------------------- the rows


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", "x", "Q", "A", *(f"w{number}" for number in range(WORDS))]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_rows(path: Path, count: int, turns: bool) -> None:
    """Texts of 140 to 260 words, no two alike; or six turns of them."""
    draw = random.Random(0)
    pool = draw.choices([f"w{number}" for number in range(WORDS)], k=1_000_000)
    with path.open("w") as file:
        for _ in range(count):
            start = draw.randrange(len(pool) - 300)
            words = pool[start : start + draw.randint(140, 260)]
            file.write(
                json.dumps(conversation(words) if turns else {"text": " ".join(words)}) + "\n"
            )


def conversation(words: list[str]) -> dict[str, Any]:
    """Three questions and answers of the words."""
    size = len(words) // 6
    texts = (" ".join(words[turn * size : (turn + 1) * size]) for turn in range(6))
    roles = ("user", "assistant") * 3
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}


# ---------------------------------------------------------------------------------------- the parts


def run_part(part: str, work: Path) -> None:
    from packhorse.trainer.config.recipe import parse_recipe
    from packhorse.trainer.data.loader import Loader
    from packhorse.trainer.data.prepare import prepare, train_plan
    from packhorse.trainer.model.load import load_tokenizer

    sections = {
        "model": {"name": str(work / "model")},
        "data": {
            "train": [{"path": str(work / "rows.jsonl")}],
            "cache": str(work / "cache"),
            "turns": "apart",  # of plain texts there are none
        },
        "batch": {"seq_len": 4096, "global_batch_size": 8},
        "run": {"dir": str(work / "run")},
    }
    recipe = parse_recipe(sections)
    tokenizer = load_tokenizer(recipe.model)
    if part == "train":
        import torch  # noqa: F401 - as in a run, so that it is not counted as the batches'
    before = smaps(os.getpid())[0]
    started = time.monotonic()
    prepared = prepare(recipe, tokenizer, "train")
    says = {"documents_s": time.monotonic() - started}
    plan = train_plan(recipe, prepared)
    says |= {"plan_s": time.monotonic() - started, "steps": plan.steps, "fill": plan.fill()}
    says |= {
        "documents": len(prepared.documents.lengths),
        "tokens": prepared.report["tokens"],
        "before": before,
    }
    if part == "train":
        started = time.monotonic()
        with Loader(prepared, plan, 0, 1, pin=False) as loader:
            taken = range(max(0, plan.steps - STEPS), plan.steps)
            tokens = sum(batch.tokens for step in taken for batch in loader.step(step))
        says |= {"tokens_per_s": tokens / (time.monotonic() - started)}
    says["held"] = smaps(os.getpid())[0]
    print(json.dumps(says))


# --------------------------------------------------------------------------------------- the report


def report(found: dict[int, dict[str, Peak]]) -> str:
    command = shlex.join(["python", "benchmarks/data_scale.py", *sys.argv[1:]])
    head = [
        "rows", "file, GiB", "tokens", "prepare: anonymous", "its largest worker", "train: before "
                                                                                   "the data",
        "train: with plan", "train: peak", "mapped", "found again, by one start and the next",
    ]  # fmt: skip
    lines = []
    for rows, parts in found.items():
        prepare, again, train = parts["prepare"], parts["again"], parts["train"]
        mib = (
            prepare.anonymous,
            prepare.worker,
            train.says["before"],
            train.says["held"],
            train.anonymous,
        )
        lines.append(
            [
                f"{rows:,}",
                f"{prepare.says['rows_gib']:.2f}",
                f"{prepare.says['tokens']:,.0f}",
                *(f"{value:,.0f}" for value in (*mib, train.mapped)),
                f"{again.says['documents_s']:.2f} s, {train.says['documents_s']:.2f} s",
            ]
        )
    most = max(found)
    got = max(found[most][part].says["documents_s"] for part in ("again", "train"))
    parts = [
        "# Memory of the data path",
        f"`{command}`",
        machine(("transformers", "tokenizers", "numpy")),
        "Peak resident MiB: anonymous pages of the process, pages of mapped files apart.",
        table(head, lines),
        f"- aim: the cache of {most:,} rows found again in under 2 s: {got:.2f} s at most, "
        + ("met" if got < 2 else "NOT met"),
        NOTES,
    ]
    return "\n\n".join(parts) + "\n"


NOTES = """\
Held for each document: 8 bytes, its length. The columns (tokens, flags, offsets, counts, places)
and the packings of 100,000 documents or more are mapped files. While an epoch is packed, by one
process for all, about 75 bytes a document come and go (order, rows, and two copies of its pieces,
of 32 bytes each): that is what `prepare` grows by. A start reads the sources' bytes once, and then
no more as long as no file changes (trainer/data/digest.py)."""


if __name__ == "__main__":
    main()
