"""Answers of 1, 2 and 3 ranks at every ZeRO stage are those of `model.generate` (fp32, CPU).

The latter gets one prompt at a time. Sampled answers are the same, too; likelihoods agree to 1e-5.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.dist import seed_from
from packhorse.trainer.eval.generate import sample_tokens
from packhorse.trainer.model.load import load_model, load_tokenizer
from tests.numerics.generation import CHOICES, SAMPLED
from tests.ranks import ROOT, run_ranks

TEMPLATES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload_all")
SHARDED = ("zero3", "zero3_offload_all")
WORLDS = (1, 2, 3)
LENGTHS = (3, 17, 8, 30, 5, 21, 12)
NEW = 12


class Alone:
    """The plain model, without engine, batches and padding."""

    def __init__(self, recipe: list[str]) -> None:
        loaded = load_recipe(ROOT / "recipes" / "debug.yaml", ["run.dir=unused", *recipe])
        self.tokenizer = load_tokenizer(loaded.model)
        self.model = load_model(loaded.model, self.tokenizer, seed=loaded.train.seed)
        self.model.set_attn_implementation("sdpa")
        self.model.eval()

    def greedy(self, prompt: list[int], stops: list[int] | None) -> list[int]:
        ids = torch.tensor([prompt], device=self.model.device)
        self.model.generation_config.eos_token_id = stops
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0
        )
        tokens = out[0, len(prompt) :].tolist()
        return tokens[:-1] if stops and tokens[-1] in stops else tokens

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """(L, V)"""
        return (
            self.model(torch.tensor([tokens], device=self.model.device))
            .logits[0]
            .float()
            .log_softmax(-1)
            .cpu()
        )

    def sampled(self, prompt: list[int], stops: list[int], seed: int) -> list[int]:
        """Token by token, without a cache."""
        generator, tokens = torch.Generator().manual_seed(seed), list(prompt)
        for _ in range(NEW):
            uniform = torch.rand(1, 1, generator=generator, dtype=torch.float64)
            likely = self.logprobs(tokens)[-1:]
            token = int(sample_tokens(likely, SAMPLED["temperature"], SAMPLED["top_p"], uniform))
            if token in stops:
                break
            tokens.append(token)
        return tokens[len(prompt) :]

    def choices(self, prompt: list[int]) -> list[float]:
        after = [
            self.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in CHOICES
        ]
        found = []
        for tokens in after:
            rows = self.logprobs([*prompt, *tokens])[len(prompt) - 1 : -1]
            found.append(float(rows[torch.arange(len(tokens)), torch.tensor(tokens)].sum()))
        return found


def make_order(folder: Path) -> dict[str, Any]:
    """The debug model with weights so large that its answers differ, prompts, and stop tokens that
    end some of the answers early: each rank has work of another length."""
    shutil.copytree(ROOT / "recipes" / "debug" / "model", folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "initializer_range": 0.4}))
    recipe = [f"model.name={folder / 'model'}", "optim.eps=1e-3"]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 500, (length,), generator=generator).tolist() for length in LENGTHS]
    alone = Alone(recipe)
    unstopped = [alone.greedy(prompt, None) for prompt in prompts]
    stops = [unstopped[0][1], unstopped[1][7], unstopped[3][4]]
    return {
        "folder": str(folder),
        "recipe": recipe,
        "prompts": prompts,
        "stops": stops,
        "max_new_tokens": NEW,
    }


class Answers:
    """Answers of the model alone, and of ranks by world size and template."""

    def __init__(
        self, order: dict[str, Any], worlds: Sequence[int], templates: Sequence[str]
    ) -> None:
        plain, prompts, stops = Alone(order["recipe"]), order["prompts"], order["stops"]
        self.alone = {
            "greedy": [plain.greedy(prompt, stops) for prompt in prompts],
            "sampled": [
                plain.sampled(prompt, stops, seed_from("test", i))
                for i, prompt in enumerate(prompts)
            ],
            "choices": [plain.choices(prompt) for prompt in prompts],
        }
        self.seen: dict[int, dict[str, Any]] = {}
        for world in worlds:
            traced = SHARDED if world == 2 else ()
            path = Path(order["folder"]) / f"order-{world}.json"
            path.write_text(json.dumps({**order, "templates": templates, "traced": traced}))
            began = time.monotonic()
            outputs = run_ranks(
                world, ["-m", "tests.numerics.generation", str(path)], timeout_s=600
            )
            print(f"\n  {world} ranks: {time.monotonic() - began:.0f} s", end="")
            self.seen[world] = json.loads(outputs[0].strip().splitlines()[-1])


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(make_order(tmp_path_factory.mktemp("generation")), WORLDS, TEMPLATES)


@pytest.fixture(scope="module")
def seen(answers: Answers) -> dict[int, dict[str, Any]]:
    return answers.seen


@pytest.fixture(scope="module")
def alone(answers: Answers) -> dict[str, Any]:
    return answers.alone


def test_the_answers_are_of_different_lengths(alone: dict[str, Any]) -> None:
    """Otherwise no rank would wait for another."""
    lengths = [len(answer) for answer in alone["greedy"]]
    assert len(set(lengths)) >= 4, lengths
    assert NEW in lengths
    assert len({tuple(answer) for answer in alone["sampled"]}) == len(LENGTHS)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_greedy_answers_are_those_of_the_model_alone(
    seen, alone, template: str, world: int
) -> None:
    answers = seen[world][template]
    assert answers["greedy"] == alone["greedy"]
    assert answers["greedy, by layers"] == alone["greedy"]
    assert answers["fewer prompts than ranks"] == alone["greedy"][:1]
    assert answers["fewer prompts than ranks, by layers"] == alone["greedy"][:1]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_sampled_answer_belongs_to_its_prompt(seen, alone, template: str, world: int) -> None:
    """Neither the batch nor the world, the stage or the cache changes it."""
    assert seen[world][template]["sampled"] == alone["sampled"]
    assert seen[world][template]["sampled, by layers"] == alone["sampled"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_choice_has_the_likelihood_that_the_model_alone_gives_it(
    seen, alone, template: str, world: int
) -> None:
    found = torch.tensor(seen[world][template]["choices"], dtype=torch.float64)
    expected = torch.tensor(alone["choices"], dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("template", TEMPLATES)
def test_control_padding_that_is_seen_changes_answers(seen, alone, template: str) -> None:
    assert seen[1][template]["padding is seen"] != alone["greedy"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_stage_3_gathers_its_weights_once_where_they_fit(seen, template: str) -> None:
    for world in WORLDS[1:]:
        assert seen[world][template]["whole"] is True
        assert seen[world][template]["whole, by layers"] is (template not in SHARDED)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_gathered_weights_are_freed(seen, template: str, world: int) -> None:
    assert seen[world][template]["left behind"] < 0.01  # of the weights


@pytest.mark.parametrize("template", SHARDED)
def test_training_does_not_notice_answers(seen, template: str) -> None:
    """Bit by bit: the next step's loss and norm, the weights and their moments."""
    without, with_answers = seen[2][f"trace of {template}"]
    assert with_answers == without
