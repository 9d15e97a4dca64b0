"""The demo's parts: correct problems, no question twice, a model folder that is whole or absent."""

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes/quickstart"))

import get_smollm2  # noqa: E402 - scripts of a recipe, not a package
import make_problems  # noqa: E402

from packhorse.trainer.datatypes import BadInput  # noqa: E402

ANSWER = re.compile(
    r"<think>(\d+ [-+*/] \d+ = \d+)(?:\. (\d+ [-+*/] \d+ = \d+))?\.</think><answer>(\d+)</answer>"
)


@pytest.fixture(scope="module")
def rows():
    return make_problems.problems(
        make_problems.TRAIN_ROWS + make_problems.HELDOUT_ROWS, make_problems.SEED
    )


def worked(answer: str) -> list[str]:
    """Return the steps of an answer, and assert its format."""
    found = ANSWER.fullmatch(answer)
    assert found, answer
    return [step for step in found.groups()[:2] if step]


def test_every_step_is_right_and_leads_to_the_answer(rows):
    for row in rows:
        steps = worked(row["answer"])
        for step in steps:
            term, result = step.split(" = ")
            assert eval(term) == int(result), row  # digits and one operator, by the pattern above
        if len(steps) == 2:
            assert steps[1].split()[0] == steps[0].split()[-1], row
        assert row["answer"].endswith(f"<answer>{steps[-1].split(' = ')[1]}</answer>")


def test_the_question_gives_the_numbers_that_are_used(rows):
    for row in rows:
        steps = worked(row["answer"])
        used = [steps[0].split()[0], *(step.split()[2] for step in steps)]
        assert sorted(used) == sorted(re.findall(r"\d+", row["question"])), row
        assert "{" not in row["question"]


def test_all_kinds_and_wordings_occur(rows):
    assert {len(worked(row["answer"])) for row in rows} == {1, 2}
    assert {
        operator for row in rows for operator in re.findall(r" ([-+*/]) ", row["answer"])
    } == set("+-*/")
    openings = {re.sub(r"\d+|[A-Z]\w+", "_", row["question"])[:25] for row in rows}
    assert len(openings) > 50


def test_no_question_is_shared_and_the_same_seed_gives_the_same_files(tmp_path):
    make_problems.write(tmp_path / "a")
    make_problems.write(tmp_path / "b")
    parts = {}
    for name, count in (("train", 500), ("heldout", 64)):
        text = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{name}.jsonl").read_text()
        parts[name] = [json.loads(line)["question"] for line in text.splitlines()]
        assert len(parts[name]) == count
    assert len({*parts["train"], *parts["heldout"]}) == 564


def test_problems_replace_no_other_file(tmp_path):
    make_problems.write(tmp_path)
    make_problems.write(tmp_path)
    (tmp_path / "heldout.jsonl").write_text("mine")
    with pytest.raises(BadInput, match="is not as packhorse wrote it"):
        make_problems.write(tmp_path)
    assert (tmp_path / "heldout.jsonl").read_text() == "mine"


def test_no_problem_is_longer_than_100_tokens(rows, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/smollm2_tokenizer")
    for row in rows:
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        assert (
            len(tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"])
            <= 100
        ), row


def test_the_tokenizer_of_the_gguf_file_is_repaired(shared):
    real = AutoTokenizer.from_pretrained(shared / "models/smollm2_tokenizer")
    read = AutoTokenizer.from_pretrained(shared / "models/smollm2_tokenizer")
    # what transformers makes of the GGUF file: byte level, without the rule for digits
    from tokenizers.pre_tokenizers import ByteLevel

    read.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    texts = [json.dumps(json.loads(line)) for line in (shared / "data/gsm8k_test.jsonl").open()][
        :200
    ]
    assert [read(text)["input_ids"] for text in texts] != [
        real(text)["input_ids"] for text in texts
    ]
    get_smollm2.split_digits(read)
    assert [read(text)["input_ids"] for text in texts] == [
        real(text)["input_ids"] for text in texts
    ]


def test_a_model_folder_is_whole_or_absent(tmp_path):
    folder = tmp_path / "models" / "m"

    def breaks(aside: Path) -> None:
        aside.mkdir()
        (aside / "config.json").write_text("half")
        raise OSError("the network went away")

    with pytest.raises(OSError, match="the network went away"):
        get_smollm2.publish(folder, breaks)
    assert list(folder.parent.iterdir()) == [], "nothing is left, aside neither"

    def builds(aside: Path) -> None:
        aside.mkdir()
        (aside / "config.json").write_text("whole")
        assert not folder.exists(), "it appears at once, at the end"

    get_smollm2.publish(folder, builds)
    assert (folder / "config.json").read_text() == "whole"
    get_smollm2.publish(folder, breaks)  # it is there: nothing is built, nothing fetched
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_the_debug_recipes_folder_is_what_its_script_makes(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "recipes/debug"))
    import make_debug

    monkeypatch.setattr(make_debug, "HERE", tmp_path)
    make_debug.main()
    committed = ROOT / "recipes/debug"
    for name in ("train.jsonl", "eval.jsonl", "model/chat_template.jinja"):
        assert (tmp_path / name).read_text() == (committed / name).read_text(), name
    assert (
        sum(path.stat().st_size for path in committed.rglob("*") if path.suffix != ".pyc") < 60_000
    )
    made, kept = (
        AutoTokenizer.from_pretrained(folder / "model") for folder in (tmp_path, committed)
    )
    assert made.get_vocab() == kept.get_vocab()
    text = "Zoë has 12 apples.\n"
    assert kept.decode(kept(text)["input_ids"]) == text
    assert len(kept) == 512
