"""X1: a packed sequence gives the loss and gradients of its documents, with noise (C3, C4)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig

from packhorse.trainer.datatypes import Batch
from packhorse.trainer.model import sft as sft_module
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.neftune import document_noise
from packhorse.trainer.model.packing_check import prove_packing
from tests.model_helpers import (
    SIZES,
    WIDE,
    documents,
    loss_and_gradients,
    pack,
    relative,
    sft,
    tiny,
)
from tests.models.shrunk import config_of
from tests.runs.test_export_kinds import gemma_config

torch.set_num_threads(1)

BOUND = 1e-6
LENGTHS = [9, 31, 2, 14, 8]
TRAINED = [
    [3, 4, 7],
    list(range(5, 30)),
    [0],
    [12],
    [],
]  # uneven; the last document teaches nothing
WEIGHTS = [0.02, 0.03, 0.05, 0.02, 0.01]
MODELS = {
    "llama": (LlamaConfig(**SIZES, tie_word_embeddings=True), LogitTransform()),
    "mistral, window 8": (MistralConfig(**WIDE, sliding_window=8), LogitTransform()),
    "gemma 2, window 8, soft caps": (
        Gemma2Config(**WIDE, sliding_window=8, query_pre_attn_scalar=8),
        LogitTransform(1.0, 30.0),
    ),
    "gpt-2, learned positions": (
        GPT2Config(
            vocab_size=160,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        ),
        LogitTransform(),
    ),
}


FAMILIES = {
    "experts, sinks": lambda: config_of("gpt_oss"),
    "experts": lambda: config_of("qwen3_moe"),
    "hybrid, by document": lambda: config_of("lfm2"),
    "hybrid with experts": lambda: config_of("jamba"),
    "towers": gemma_config,
}


def difference(model: Any, packed: Batch, apart: list[Batch]) -> float:
    """Return the larger of the relative differences of the losses and of the whole gradients."""
    loss, gradients = loss_and_gradients(model, packed)
    loss_apart, gradients_apart = loss_and_gradients(model, *apart)
    assert gradients.keys() == gradients_apart.keys()
    flat, flat_apart = (
        torch.cat([g.flatten() for g in all_.values()]) for all_ in (gradients, gradients_apart)
    )
    return max(abs(loss - loss_apart) / abs(loss_apart), relative(flat, flat_apart))


def packed_and_apart() -> tuple[Batch, list[Batch]]:
    ids = documents(LENGTHS)
    alone = [pack([d], [t], [w], [key]) for key, (d, t, w) in enumerate(zip(ids, TRAINED, WEIGHTS))]
    return pack(ids, TRAINED, WEIGHTS), alone


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_sequence_is_its_documents_alone(name: str, kernel: str) -> None:
    config, transform = MODELS[name]
    packed, apart = packed_and_apart()
    seen = difference(sft(tiny(config), kernel, alpha=5.0, transform=transform), packed, apart)
    print(f"X1 {name}, {kernel}: {seen:.1e}")
    assert seen <= BOUND


@pytest.mark.parametrize("name", FAMILIES)
def test_it_holds_for_experts_hybrids_and_models_with_towers(name: str) -> None:
    """A hybrid's layers with a state run document by document, as the packing check finds."""
    model = sft(tiny(FAMILIES[name]()), alpha=5.0)
    prove_packing(model, seq_len=64, one_document=False, seed=0)
    packed, apart = packed_and_apart()
    seen, control = (difference(model, one, apart) for one in (packed, boundaries_ignored(packed)))
    print(f"X1 {name}: {seen:.1e}, control {control:.1e}")
    assert seen <= BOUND
    assert control >= 10 * BOUND


def test_recomputation_changes_nothing() -> None:
    packed, _ = packed_and_apart()
    model = tiny(MODELS["llama"][0])
    loss, plain = loss_and_gradients(sft(model, alpha=5.0), packed)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = loss_and_gradients(sft(model, alpha=5.0), packed)
    assert again == loss
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)


# ----------------------------------------------------------------------------------------- controls


def boundaries_ignored(packed: Batch) -> Batch:
    total = packed.input_ids.shape[0]
    return replace(packed, cu_seqlens=torch.tensor([0, total], dtype=torch.int32), lengths=(total,))


def one_boundary_late(packed: Batch) -> Batch:
    ends = packed.cu_seqlens.clone()
    ends[1] += 1
    return replace(packed, cu_seqlens=ends, lengths=tuple(ends.diff().tolist()))


def positions_run_on(packed: Batch) -> Batch:
    return replace(packed, position_ids=torch.arange(packed.input_ids.shape[0]))


def labels_shifted_across_a_boundary(packed: Batch) -> Batch:
    ids, last = (
        packed.input_ids,
        LENGTHS[0] - 1,
    )  # the first document's last token learns its neighbour's first
    return replace(
        packed,
        trained_positions=torch.cat([packed.trained_positions, torch.tensor([last])]),
        targets=torch.cat([packed.targets, ids[last + 1 : last + 2]]),
        weights=torch.cat([packed.weights, torch.tensor([0.02])]),
    )


@pytest.mark.parametrize(
    ("defect", "name"),
    [
        (boundaries_ignored, "llama"),
        (one_boundary_late, "llama"),
        (positions_run_on, "gpt-2, learned positions"),
        (labels_shifted_across_a_boundary, "llama"),
    ],
)
def test_control_a_defect_shows_tenfold(defect: Any, name: str) -> None:
    packed, apart = packed_and_apart()
    seen = difference(sft(tiny(MODELS[name][0])), defect(packed), apart)
    print(f"X1 control, {defect.__name__}: {seen:.1e}")
    assert seen >= 10 * BOUND


def test_control_noise_by_the_sequences_length_shows_tenfold() -> None:
    def by_sequence(seed: int, keys: Any, lengths: Any, *rest: Any) -> torch.Tensor:
        return document_noise(seed, keys[:1], [sum(lengths)], *rest)

    packed, apart = packed_and_apart()
    with mock.patch.object(sft_module, "document_noise", by_sequence):
        seen = difference(sft(tiny(MODELS["llama"][0]), alpha=5.0), packed, apart)
    print(f"X1 control, noise scaled by the sequence: {seen:.1e}")
    assert seen >= 10 * BOUND


def test_control_a_window_that_is_not_honoured_shows_tenfold() -> None:
    config, _ = MODELS["mistral, window 8"]
    packed, apart = packed_and_apart()
    windowed, full = sft(tiny(config)), sft(tiny(MistralConfig(**WIDE, sliding_window=None)))
    _, seen_by_window = loss_and_gradients(windowed, packed)
    _, seen_by_all = loss_and_gradients(full, *apart)
    assert max(relative(seen_by_window[n], seen_by_all[n]) for n in seen_by_all) >= 10 * BOUND


# -------------------------------------------------------------------------------------------- noise


def test_noise_belongs_to_the_document_and_to_nothing_else() -> None:
    keys = [(0, 7, 0), (0, 3, 0), (1, 7, 0), (0, 7, 1)]
    noise = document_noise(0, keys, [5, 9, 5, 5], 16, 5.0, torch.device("cpu")).split([5, 9, 5, 5])
    alone = document_noise(0, keys[:1], [5], 16, 5.0, torch.device("cpu"))
    assert torch.equal(noise[0], alone)
    assert not torch.equal(noise[0], noise[2]), "another epoch has other noise"
    assert not torch.equal(noise[0], noise[3]), "another piece has other noise"
    assert not torch.equal(alone, document_noise(1, keys[:1], [5], 16, 5.0, torch.device("cpu")))


def test_noise_is_uniform_within_alpha_over_root_of_length_times_width() -> None:
    bound = 5.0 / (400 * 64) ** 0.5
    noise = document_noise(0, [(0, 0, 0)], [400], 64, 5.0, torch.device("cpu"))
    assert noise.dtype == torch.float32
    assert 0.99 * bound < float(noise.max()) <= bound
    assert -bound <= float(noise.min()) < -0.99 * bound
    assert float(noise.std()) == pytest.approx(bound / 3**0.5, rel=0.01)


def test_noise_is_for_training_only() -> None:
    packed, _ = packed_and_apart()
    noisy, plain = (sft(tiny(MODELS["llama"][0]), alpha=alpha).eval() for alpha in (5.0, 0.0))
    with torch.no_grad():
        assert noisy(packed) == plain(packed)
        assert noisy.train()(packed) != plain(packed)


def test_dropout_belongs_to_the_micro_batch() -> None:
    packed, _ = packed_and_apart()
    model = sft(tiny(GPT2Config(vocab_size=160, n_embd=32, n_layer=2, n_head=4)))
    first, gradients = loss_and_gradients(model, packed)
    torch.manual_seed(1)  # whatever ran before
    again, gradients_again = loss_and_gradients(model, packed)
    other, _ = loss_and_gradients(model, replace(packed, sequence_ids=(1,)))
    assert first == again
    assert all(torch.equal(gradients[n], gradients_again[n]) for n in gradients)
    assert other != first
