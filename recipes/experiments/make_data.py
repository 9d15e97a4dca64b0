"""Make the data of the experiments: problems with worked answers, and two other forms of them.

usage: python recipes/experiments/make_data.py OUT_DIR [--train FILE.jsonl --heldout FILE.jsonl]

Without files the problems are the quickstart's; with files, rows of `question` and `answer` as in
gsm8k. Written to OUT_DIR:

    train.jsonl, heldout.jsonl    the problems; no question is in both
    sheets.jsonl                  train with half of its problems on sheets of five, so that the
                                  lengths of answers differ much
    traces.jsonl                  train with half of its answers wrong; the column `solution` holds
                                  the right value

A wrong answer uses another operation in its last step, and calculates it correctly: 4 + 9 = 13
instead of 4 * 9 = 36.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

from make_problems import SEED, TRAIN_ROWS, problems  # in the quickstart's folder

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.own_output import write_own_text

HELDOUT_ROWS = 128
ON_A_SHEET = 5
WRONG_SHARE = 0.5

Row = dict[str, str]

FINAL = re.compile(r"<answer>(-?\d+)</answer>|#### (-?\d+)\s*$")
# `4 * 9 = 36`, or gsm8k's `<<4*9=36>>`; no number is a part of a longer one
CALCULATION = re.compile(r"(?<![\d.,])(\d+)( ?)([-+*/]) ?([1-9]\d*)( ?= ?)(\d+)(?![\d.,]*\d)")
WORKED = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
MISTAKEN_FOR = {"+": "-", "-": "+", "*": "+", "/": "-"}


def final(answer: str) -> str | None:
    """Return the integer that an answer ends with, or None."""
    found = FINAL.search(answer)
    return found and (found[1] or found[2])


def wrong(answer: str) -> str | None:
    """Return the answer with another operation in its last calculation.

    Returns None if there is no calculation, or none that gives another result.
    """
    calculations = list(CALCULATION.finditer(answer))
    if not calculations:
        return None
    first, space, sign, second, equals, result = calculations[-1].groups()
    numbers = int(first), int(second)
    # a result that does not follow: the match is the end of a longer formula
    if result != final(answer) or WORKED[sign](*numbers) != int(result):
        return None
    other = MISTAKEN_FOR[sign]
    large, small = (max(numbers), min(numbers)) if other == "-" else numbers
    mistaken = WORKED[other](large, small)
    if mistaken == int(result):
        return None
    shown = f"{large}{space}{other}{space}{small}"
    before, line_end, line = answer[: calculations[-1].start()].rpartition("\n")
    # gsm8k writes the calculation in words before `<<`, too
    line = re.sub(rf"(?<![\d.,]){first} ?[{re.escape(sign)}x] ?{second}(?!\d)", shown, line)
    after = answer[calculations[-1].end() :]
    after = re.sub(rf"(?<![\d.,]){result}(?![\d.,]*\d)", str(mistaken), after)
    return f"{before}{line_end}{line}{shown}{equals}{mistaken}{after}"


def traces(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Return the rows with a `share` of wrong answers, chosen by `seed`.

    The column `solution` holds the right value of every row.

    Raises:
        ValueError: too few answers can be made wrong.
    """
    mistakes = {
        i: mistaken for i, row in enumerate(rows) if (mistaken := wrong(row["answer"])) is not None
    }
    count = round(share * len(rows))
    if count > len(mistakes):
        raise ValueError(
            f"only {len(mistakes)} of {len(rows)} answers can be made wrong, and {count} should be"
        )
    chosen = set(random.Random(seed).sample(sorted(mistakes), count))  # noqa: S311 - reproducible, not secret
    return [
        {
            **row,
            "answer": mistakes[i] if i in chosen else row["answer"],
            "solution": final(row["answer"]) or "",
        }
        for i, row in enumerate(rows)
    ]


def sheets(rows: Sequence[Row]) -> list[Row]:
    """Return the first half of the rows as they are, the others ON_A_SHEET to a row, numbered."""
    half = len(rows) // 2
    parts = [rows[start : start + ON_A_SHEET] for start in range(half, len(rows), ON_A_SHEET)]
    numbered = [
        {
            key: "\n".join(f"{n}. {row[key]}" for n, row in enumerate(part, 1))
            for key in ("question", "answer")
        }
        for part in parts
    ]
    return [*rows[:half], *numbered]


def write(folder: Path, train: Sequence[Row], heldout: Sequence[Row]) -> None:
    """Write the four files."""
    parts = {
        "train": train,
        "heldout": heldout,
        "sheets": sheets(train),
        "traces": traces(train, WRONG_SHARE, SEED),
    }
    for name, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_own_text(folder / f"{name}.jsonl", text)


def word_problems() -> tuple[list[Row], list[Row]]:
    """Return the quickstart's training problems, and its held-out ones with more after them."""
    rows = problems(TRAIN_ROWS + HELDOUT_ROWS, SEED)
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def read(path: Path) -> list[Row]:
    """Return the questions and answers of a file, without rows whose answer ends in no integer."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    keys = ("question", "answer")
    return [{key: row[key] for key in keys} for row in rows if final(row["answer"])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--heldout", type=Path)
    asked = parser.parse_args()
    if (asked.train is None) != (asked.heldout is None):
        parser.error("give --train and --heldout together, or neither")
    write(
        asked.folder,
        *((read(asked.train), read(asked.heldout)) if asked.train else word_problems()),
    )


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"make_data: error: {error}")
