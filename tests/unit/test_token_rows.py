"""The embeddings of a few tokens are trained beside an adapter, merged, and saved as peft does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.lora import add_adapter, in_peft_form, is_of_adapter, merged_weights
from tests.model_helpers import documents, loss_and_gradients, pack, sft, tiny_llama

IDS = (9, 3, 4)


def section(**fields: Any) -> AdapterSection:
    given = {"rank": 4, "alpha": 8, "trainable_token_indices": IDS, **fields}
    return AdapterSection.model_validate(given)


def adapted(**model: Any) -> Any:
    made = tiny_llama(**model)
    add_adapter(made, section(), seed=0)
    return made


def stir(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def logits(model: Any) -> torch.Tensor:
    (getattr(model, "base_model", model)).set_attn_implementation("eager")
    return model.eval()(input_ids=torch.arange(1, 14)[None], use_cache=False).logits


def test_rows_alone_are_trained_and_start_as_they_were() -> None:
    model, plain = adapted(), tiny_llama()
    assert torch.equal(logits(model), logits(plain))
    logits(model).square().sum().backward()
    rows = model.get_parameter("model.embed_tokens.trainable_tokens_delta")
    assert rows.shape == (3, model.config.hidden_size)
    assert rows.grad is not None
    assert rows.grad.any(1).all(), "each token occurs"
    assert not model.get_input_embeddings().weight.requires_grad
    model.zero_grad()
    model(input_ids=torch.tensor([[1, 2, 5]])).logits.sum().backward()
    assert not rows.grad.any(), "a gradient of zero where none occurs, and not the last one"


def test_a_tied_head_has_the_rows_too() -> None:
    """Loss and gradient are those of the whole matrix."""
    model, plain = adapted(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True)
    batch = pack(documents((9, 5)), [range(8), range(4)], [1.0, 0.5])
    (loss, own), (whole_loss, whole) = (loss_and_gradients(sft(m), batch) for m in (model, plain))
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    expected = whole["model.model.embed_tokens.weight"][sorted(IDS)]
    assert torch.allclose(
        own["model.model.embed_tokens.trainable_tokens_delta"], expected, atol=1e-6
    )
    assert expected.any(1).all()
    with torch.no_grad():
        for each in (model.get_input_embeddings().trainable_tokens_delta, plain.lm_head.weight):
            each[...] = 2 * each
    changed = plain.lm_head.weight
    with torch.no_grad():
        kept = torch.ones(len(changed), dtype=torch.bool)
        kept[list(IDS)] = False
        changed[kept] /= 2
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    assert sft(model)(batch).item() == pytest.approx(sft(plain)(batch).item(), rel=1e-6)


def test_a_tied_heads_bias_stays_in_the_logits_of_the_rows() -> None:
    model, plain = adapted(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True)
    for each in (model, plain):
        each.lm_head.bias = torch.nn.Parameter(torch.arange(float(plain.config.vocab_size)))
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)


@pytest.mark.parametrize("is_tied", [False, True])
def test_merged_and_in_pefts_form_it_acts_alike(is_tied: bool, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": is_tied}
    model, plain = stir(adapted(**tied)), tiny_llama(**tied)
    merged = {name: weight.clone() for name, weight in merged_weights(model)}
    plain.load_state_dict(merged, strict=not is_tied)  # the head is no parameter of its own
    expected = logits(model)
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    trained = {n: p.detach() for n, p in model.named_parameters() if is_of_adapter(n)}
    config, tensors = in_peft_form(model, section(), trained, "base", None)
    assert config.trainable_token_indices == {"embed_tokens": [3, 4, 9]}
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(tiny_llama(**tied), str(tmp_path))
    assert torch.allclose(logits(loaded), expected, atol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BadInput, match=r"the model has \d+ embeddings"):
        add_adapter(tiny_llama(), section(trainable_token_indices=[10_000]), 0)
    with pytest.raises(BadInput, match=r"`model\.embed_tokens` is trained in full"):
        add_adapter(tiny_llama(), section(modules_to_save=["embed_tokens"]), 0)
