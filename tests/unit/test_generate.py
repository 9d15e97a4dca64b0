"""Sampling, the spread of prompts over ranks, what is refused, and the size of the logits."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from packhorse.trainer.config.eval import GenerateSection
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.datatypes import BadInput, Conversation, Prompt
from packhorse.trainer.eval import generate
from tests.model_helpers import SIZES, documents, pack, sft, tiny, tiny_llama
from tests.ranks import ROOT

VOCABULARY = 1013  # no other size of the tiny model
QUIET: Any = SimpleNamespace(poll=lambda: False, beat=lambda where: None)


def letters(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    """Tokenize into one token a letter."""
    return {"input_ids": [ord(letter) for letter in text]}


def engine(model: Any) -> Any:
    """Return the parts of an engine that generation uses."""
    return SimpleNamespace(
        module=SimpleNamespace(model=model), gather_for_generation=lambda: nullcontext(True)
    )


def answer(model: Any, prompts: list[list[int]], **values: Any) -> list[list[int]]:
    at_once = values.pop("batch", 32) * (max(map(len, prompts)) + 5)
    section = GenerateSection.model_validate({"max_new_tokens": 5, **values})
    seeds = list(range(len(prompts)))
    found = generate.answer_ids(engine(model), prompts, section, at_once, QUIET, QUIET, seeds=seeds)
    assert found is not None
    return found


def prompts_of(*lengths: int, vocabulary: int = SIZES["vocab_size"]) -> list[list[int]]:
    return [ids.tolist() for ids in documents(lengths, vocabulary)]


# ----------------------------------------------------------------------------------------- sampling


def test_tokens_are_sampled_as_often_as_they_are_likely() -> None:
    scores, temperature = torch.tensor([[2.0, -1.0, 0.5, -torch.inf, 1.0]]), 0.7
    uniform = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = generate.sample_tokens(scores.expand(20000, -1), temperature, 1.0, uniform)
    shares = torch.bincount(drawn[:, 0], minlength=5) / 20000
    assert (shares - (scores[0] / temperature).softmax(-1)).abs().max() < 0.015
    assert shares[3] == 0


@pytest.mark.parametrize(
    ("top_p", "left"),
    [(0.5, [2]), (0.51, [2, 0]), (0.8, [2, 0]), (0.81, [2, 0, 4]), (1.0, [2, 0, 4, 1])],
)
def test_top_p_keeps_the_fewest_tokens_that_have_the_share(top_p: float, left: list[int]) -> None:
    probabilities = torch.tensor([[0.3, 0.05, 0.5, 0.0, 0.15]])
    uniform = torch.linspace(0, 1 - 1e-9, 2000, dtype=torch.float64)[:, None]
    drawn = generate.sample_tokens(probabilities.log().expand(2000, -1), 1.0, top_p, uniform)
    assert sorted(set(drawn[:, 0].tolist())) == sorted(left)


def test_the_same_seed_samples_the_same_in_any_batch() -> None:
    model, prompts = tiny_llama(), prompts_of(4, 9, 6, 6)
    together = answer(model, prompts, temperature=1.0, batch=4)
    assert together == answer(model, prompts, temperature=1.0, batch=1)
    assert together != answer(model, prompts, batch=4), "nothing was sampled"


def test_top_p_without_a_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="`top_p` belongs to a `temperature` above 0"):
        GenerateSection(top_p=0.9)


# ------------------------------------------------------------------------------------------ batches


def gpt2() -> Any:
    """Build a model with learned positions, which shows positions that count the padding."""
    sizes = {
        "vocab_size": 160,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.5,
    }
    return tiny(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def test_padding_changes_no_answer_and_no_likelihood() -> None:
    model, prompts = gpt2(), prompts_of(3, 20, 11, 7)
    model.generation_config.eos_token_id = None
    alone = [answer(model, [prompt])[0] for prompt in prompts]
    assert answer(model, prompts, batch=4) == alone
    asked = [Prompt(p, "", "", Conversation(), {}) for p in prompts]

    def likelihoods(prompts: list[Prompt]) -> Any:
        return generate.choice_logprobs(
            engine(model), prompts, ["A", "BC"], 100, letters, QUIET, QUIET
        )

    together = torch.tensor(likelihoods(asked))
    apart = torch.tensor([likelihoods([prompt])[0] for prompt in asked])
    assert (together - apart).abs().max() < 1e-4


def test_control_positions_of_the_padded_row_would_change_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prompts = gpt2(), prompts_of(3, 20, 11, 7)
    model.generation_config.eos_token_id = None
    alone = [answer(model, [prompt])[0] for prompt in prompts]
    prepare = model.prepare_inputs_for_generation

    def padded_positions(ids: torch.Tensor, **kwargs: Any) -> Any:
        inputs = prepare(ids, **kwargs)
        new = inputs["input_ids"].shape[1]
        inputs["position_ids"] = torch.arange(ids.shape[1] - new, ids.shape[1]).expand(
            ids.shape[0], -1
        )
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", padded_positions)
    assert answer(model, prompts, batch=4) != alone


def test_a_penalty_of_the_generation_configuration_is_not_applied() -> None:
    """It would count the padding as repetition."""
    model, prompts = tiny_llama(), prompts_of(3, 20)
    plain = answer(model, prompts, batch=2)
    model.generation_config.repetition_penalty = 5.0
    assert answer(model, prompts, batch=2) == plain
    assert model.generation_config.repetition_penalty == 5.0, "the exported model must keep it"


@pytest.mark.parametrize("stops", [5, [5, 7]])
def test_an_answer_ends_before_its_first_stop_token(stops: int | list[int]) -> None:
    assert generate._until_stop([3, 4, 7, 5, 0, 0], generate._as_list(stops)) == (
        [3, 4, 7] if stops == 5 else [3, 4]
    )


@pytest.mark.parametrize(("named", "stops"), [(None, [5]), (7, [5, 7]), ([9, 5], [5, 9])])
def test_stop_tokens_are_the_trained_ones_and_the_configurations(
    named: Any, stops: list[int]
) -> None:
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
    assert generate.stop_tokens(model, (5,)) == stops


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_every_prompt_runs_once_in_equally_many_rounds(
    monkeypatch: pytest.MonkeyPatch, world: int, size: int, count: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    lengths = [(7 * i) % 5 + 1 for i in range(count)]
    at_once = size * max(lengths, default=1)
    by_rank = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        by_rank.append(list(generate._rounds(lengths, at_once, "generation", QUIET, QUIET)))
    assert len({len(rounds) for rounds in by_rank}) == 1
    assert sorted(i for rounds in by_rank for batch in rounds for i in batch) == list(range(count))
    assert all(len(batch) <= size for rounds in by_rank for batch in rounds)
    in_time = [
        lengths[i] for together in zip(*by_rank, strict=True) for batch in together for i in batch
    ]
    assert in_time == sorted(lengths, reverse=True), "prompts of similar lengths run together"


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({}, generate.FEWEST_TOKENS),
        ({"seq_len": 32768, "micro_batch_size": 2}, 65536),
    ],
)
def test_a_batch_of_prompts_has_as_many_tokens_as_one_of_training(
    keys: dict[str, int], tokens: int
) -> None:
    recipe = load_recipe(
        ROOT / "recipes" / "debug.yaml", [f"batch.{key}={value}" for key, value in keys.items()]
    )
    assert generate.tokens_at_once(recipe) == tokens
    shared = recipe.parallel.model_copy(update={"sequence": 4})
    assert generate.tokens_at_once(recipe.model_copy(update={"parallel": shared})) == max(
        tokens // 4, generate.FEWEST_TOKENS
    )


def test_prompts_that_leave_no_room_for_an_answer_are_refused() -> None:
    model = tiny_llama(max_position_embeddings=64)
    prompts = [Prompt([1] * length, "", "", Conversation(), {}) for length in (9, 50)]
    generate.require_room(model, prompts, 14)
    with pytest.raises(
        BadInput, match="50 tokens and max_new_tokens=15 do not fit into the model's 64 positions"
    ):
        generate.require_room(model, prompts, 15)


# -------------------------------------------------------------------------------------- likelihoods


def test_a_choice_is_tokenized_as_in_training() -> None:
    """After its prompt: alone, a tokenizer may split it otherwise."""

    def merging(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Tokenize with "ab" merged, and 0 before a text that begins with a letter."""
        merged = text.replace("ab", "\x01")
        return {"input_ids": [0] * text[0].isalpha() + [ord(letter) for letter in merged]}

    prompt = Prompt([ord(">")], ">", "", Conversation(), {})
    assert generate.tokens_after(merging, prompt, "B") == [ord("B")]
    ends_in_a = Prompt([ord(">"), ord("a")], ">a", "", Conversation(), {})
    assert generate.tokens_after(merging, ends_in_a, "b") == [0, ord("b")], (
        "alone, as it would merge with the prompt"
    )


# ------------------------------------------------------------------------------------------- memory


class LargestLogits(TorchDispatchMode):
    """Record the most elements of a tensor with the vocabulary as a dimension, weights aside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.elements = 0
        self._weights = {p.numel() for p in model.parameters()}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if (
                isinstance(tensor, torch.Tensor)
                and VOCABULARY in tensor.shape
                and tensor.numel() not in self._weights
            ):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_logits_of_a_prompt_are_those_of_its_last_position() -> None:
    model, prompts = tiny_llama(vocab_size=VOCABULARY), prompts_of(40, 33, vocabulary=VOCABULARY)
    with LargestLogits(model) as seen:
        answer(model, prompts, batch=2, temperature=1.0, top_p=0.9)
    assert seen.elements == 2 * VOCABULARY


def test_control_whole_logits_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_llama(vocab_size=VOCABULARY), prompts_of(40, 33, vocabulary=VOCABULARY)
    monkeypatch.setattr(model, "_supports_logits_to_keep", lambda: False)
    with LargestLogits(model) as seen:
        answer(model, prompts, batch=2)
    assert seen.elements == 2 * 40 * VOCABULARY


def test_the_head_sees_the_positions_of_the_choices_alone() -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    asked = [
        Prompt(p, "", "", Conversation(), {}) for p in prompts_of(40, 33, vocabulary=VOCABULARY)
    ]
    with LargestLogits(model) as seen:
        generate.choice_logprobs(engine(model), asked, ["A", "B"], 100, letters, QUIET, QUIET)
    assert seen.elements == 2 * VOCABULARY


def test_held_out_loss_has_no_whole_logits() -> None:
    model = sft(tiny_llama(vocab_size=VOCABULARY))
    batch = pack(documents([60, 50], VOCABULARY), [list(range(59)), list(range(49))], [0.01, 0.01])
    model.eval()
    with torch.no_grad(), LargestLogits(model) as seen:
        model(batch)
    assert seen.elements == 0, "blocks of the vocabulary have another width"
    model.kernel = "reference"
    with torch.no_grad(), LargestLogits(model) as seen:
        model(batch)
    assert seen.elements == 108 * VOCABULARY, "the control's are whole"
