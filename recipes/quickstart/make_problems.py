"""Generate word problems of one or two steps with worked answers, from a seed.

usage: python recipes/quickstart/make_problems.py OUT_DIR

Writes OUT_DIR/train.jsonl (500 rows) and OUT_DIR/heldout.jsonl (64 rows) with the columns
`question` and `answer`. No question is in both. An answer shows its steps, then the result:

    <think>3 * 4 = 12. 12 + 5 = 17.</think><answer>17</answer>
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.own_output import write_own_text

TRAIN_ROWS, HELDOUT_ROWS, SEED = 500, 64, 0
LARGEST = 50  # number in a problem: a small model can learn to calculate up to here

NAMES = (
    "Ada Ben Chloe Dev Elif Farid Grace Hugo Ines Jonas Kofi Lena Maya Nils Olga Pablo Rosa Sami "
    "Tara Uma Viktor Wen Yara Zoe"
).split()
ITEMS = (
    "apples beads books buttons cards coins cookies cups eggs flowers marbles muffins nails "
    "oranges pears pencils photos plates shells stamps stickers stones tickets tiles"
).split()
HOLDERS = "bags boxes baskets jars packs trays crates bundles".split()

# The calculation (a first number, then operations) -> questions that ask for it
KINDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("a", "+ b"): (
        "{name} has {a} {items} and finds {b} more. How many {items} does {name} have now?",
        "There are {a} {items} on the table. {name} puts {b} more there. How many are on the "
        "table?",
        "{name} has {a} {items}. {other} has {b}. How many {items} do they have together?",
        "{name} collects {a} {items} on Monday and {b} on Tuesday. How many {items} is that in "
        "all?",
    ),
    ("a", "- b"): (
        "{name} has {a} {items} and gives {b} to {other}. How many {items} are left?",
        "There were {a} {items} in the shop. {b} of them were sold. How many are still there?",
        "{name} needs {a} {items} and has {b}. How many more {items} does {name} need?",
        "{name} has {a} {items} and {other} has {b}. How many more {items} does {name} have than "
        "{other}?",
    ),
    ("a", "* b"): (
        "{name} buys {a} {holders} of {items}. Each one holds {b}. How many {items} is that?",
        "There are {a} {holders} with {b} {items} in each. How many {items} are there in total?",
        "{name} makes {a} {items} every day. How many {items} does {name} make in {b} days?",
        "One of the {items} costs {a} dollars. How many dollars does {name} pay for {b} of them?",
    ),
    ("a", "/ b"): (
        "{name} shares {a} {items} equally among {b} friends. How many {items} does each friend "
        "get?",
        "{name} puts {a} {items} into {b} {holders}, the same number in each. How many are in "
        "each?",
        "{name} packs {a} {items}, {b} to a pack. How many packs does {name} fill?",
        "{a} {items} are laid in {b} equal rows. How many {items} are in a row?",
    ),
    ("a", "* b", "+ c"): (
        "{name} has {a} {holders} with {b} {items} each, and {c} loose {items}. How many {items} "
        "does {name} have?",
        "{name} buys {a} {holders} of {b} {items}. {other} adds {c} more. How many {items} are "
        "there now?",
        "{name} reads {a} pages a day for {b} days, then {c} more pages. How many pages is that?",
        "A ticket costs {a} dollars. {name} buys {b} tickets and a drink for {c} dollars. How much "
        "is it in all?",
    ),
    ("a", "* b", "- c"): (
        "{name} fills {a} {holders} with {b} {items} each, then takes {c} {items} out. How many "
        "{items} remain?",
        "{name} bakes {a} trays of {b} muffins and eats {c}. How many muffins are left?",
        "There are {a} rows of {b} chairs. {c} chairs are broken. How many chairs can be used?",
        "{name} earns {a} dollars an hour, works {b} hours and spends {c} dollars. How many "
        "dollars are left?",
    ),
    ("a", "+ b", "- c"): (
        "{name} has {a} {items}, gets {b} more and loses {c}. How many {items} does {name} have?",
        "{a} people are on a bus. {b} get on and {c} get off. How many people are on the bus?",
        "{name} picks {a} {items} and {other} picks {b}. They sell {c} of them. How many {items} "
        "are left?",
    ),
    ("a", "- b", "+ c"): (
        "{name} has {a} {items}, gives away {b} and then buys {c}. How many {items} does {name} "
        "have now?",
        "A tank holds {a} litres. {name} uses {b} litres and pours in {c}. How many litres does it "
        "hold now?",
        "There are {a} birds on a tree. {b} fly away and {c} arrive. How many birds are on the "
        "tree?",
    ),
    ("a", "+ b", "/ c"): (
        "{name} has {a} {items} and {other} has {b}. They share all of them among {c} friends. How "
        "many does each get?",
        "{name} puts {a} red and {b} blue {items} into {c} equal {holders}. How many {items} are "
        "in each?",
    ),
    ("a", "- b", "* c"): (
        "{name} has {a} {items} and keeps {b}. {name} sells the others for {c} dollars each. How "
        "many dollars is that?",
        "Of {a} {holders}, {b} are empty. Every other one holds {c} {items}. How many {items} are "
        "there?",
    ),
}


def problem(rng: random.Random) -> dict[str, str]:
    """Return a random problem with its answer."""
    steps = rng.choice(list(KINDS))
    numbers, lines = _worked(rng, steps)
    name, other = rng.sample(NAMES, 2)
    words = {
        "name": name,
        "other": other,
        "items": rng.choice(ITEMS),
        "holders": rng.choice(HOLDERS),
    }
    question = rng.choice(KINDS[steps]).format(**numbers, **words)
    result = lines[-1].split(" = ")[1]
    return {
        "question": question,
        "answer": f"<think>{'. '.join(lines)}.</think><answer>{result}</answer>",
    }


def _worked(rng: random.Random, steps: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """Return numbers for the steps, and the worked lines.

    Numbers are drawn until every result is an integer from 1 to LARGEST.
    """
    while True:
        numbers, lines = {"a": rng.randint(2, LARGEST)}, []
        total = numbers["a"]
        for operator, letter in (step.split() for step in steps[1:]):
            number = numbers[letter] = rng.randint(2, 9 if operator in "*/" else 12)
            if operator == "/" and total % number:
                break
            result = {
                "+": total + number,
                "-": total - number,
                "*": total * number,
                "/": total // number,
            }[operator]
            if not 1 <= result <= LARGEST:
                break
            lines.append(f"{total} {operator} {number} = {result}")
            total = result
        if len(lines) == len(steps) - 1:
            return numbers, lines


def problems(rows: int, seed: int) -> list[dict[str, str]]:
    """Return `rows` problems with different questions."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    found: dict[str, dict[str, str]] = {}
    while len(found) < rows:
        row = problem(rng)
        found.setdefault(row["question"], row)
    return list(found.values())


def write(folder: Path) -> None:
    rows = problems(TRAIN_ROWS + HELDOUT_ROWS, SEED)
    for name, part in (("train", rows[:TRAIN_ROWS]), ("heldout", rows[TRAIN_ROWS:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        write_own_text(folder / f"{name}.jsonl", text)


if __name__ == "__main__":
    try:
        write(Path(sys.argv[1]))
    except BadInput as error:
        sys.exit(f"make_problems: error: {error}")
