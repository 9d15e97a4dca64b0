"""An adapter is put where the recipe says, starts as zero, is trained alone, and merges exactly."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from packhorse.trainer.config.recipe import AdapterSection, OptimSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine import sharded_state
from packhorse.trainer.estimate.model import measure_model
from packhorse.trainer.metrics import model_flops
from packhorse.trainer.model.int8_linear import Int8Linear, in_8_bits
from packhorse.trainer.model.lora import (
    adapter_targets,
    add_adapter,
    full_modules,
    merged_weights,
)
from packhorse.trainer.model.quantisation import _require_near, parts_of
from tests.model_helpers import (
    SIZES,
    documents,
    loss_and_gradients,
    pack,
    relative,
    sft,
    tiny_llama,
)

EVEN = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks of 4-bit weights
LINEAR = 7 * SIZES["num_hidden_layers"]
PROJECTIONS = ["q_proj", "v_proj"]
NF4 = {False: "nf4", True: "nf4_double_quant"}


def section(**fields: Any) -> AdapterSection:
    return AdapterSection.model_validate({"rank": 4, "alpha": 8, **fields})


def adapted(seed: int = 0, model: dict[str, Any] | None = None, **fields: Any) -> Any:
    """Return a tiny model with an adapter."""
    made = tiny_llama(**(model or (EVEN if "base" in fields else {})))
    add_adapter(made, section(**fields), seed)
    return made


def stir(model: Any) -> Any:
    """Change the adapter as training does: B is no longer zero, DoRA's magnitudes are others."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(input_ids=documents([20])[0].unsqueeze(0), use_cache=False).logits[0]


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------ where it goes


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", LINEAR),
        (PROJECTIONS, LINEAR * 2 // 7),
        (["layers.1.self_attn.q_proj"], 1),
        (r".*\.1\.self_attn\.[qv]_proj", 2),
    ],
)
def test_targets_are_found_by_name_end_or_pattern(targets: Any, count: int) -> None:
    found = adapter_targets(tiny_llama(), section(target_modules=targets))
    assert len(found) == count
    assert "lm_head" not in found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_porj"]}, "no module is called `q_porj`; the nearest is `q_proj`"),
        (
            {"target_modules": ["q_proj", "gate"]},
            "no module is called `gate`; the nearest is `gate_proj`",
        ),
        (
            {"target_modules": "q_proj"},
            "no module's whole name matches `q_proj`; the nearest is `q_proj`",
        ),
        ({"target_modules": ["lm_head"]}, "`lm_head` is the head, whose loss is fused"),
        ({"target_modules": ".*(q_proj|lm_head)"}, "`lm_head` is the head"),
        ({"target_modules": ["embed_tokens"]}, "is of the type Embedding"),
        ({"target_modules": ["self_attn"]}, "is of the type LlamaAttention"),
        (
            {"modules_to_save": ["lm_heat"]},
            "no module is called `lm_heat`; the nearest is `lm_head`",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
            "is trained in full by adapter.modules_to_save",
        ),
    ],
)
def test_what_cannot_have_one_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as refused:
        adapted(**fields)
    assert message in str(refused.value)


def test_modules_that_share_a_weight_are_trained_together_or_not_at_all() -> None:
    tied = {"tie_word_embeddings": True}
    with pytest.raises(
        BadInput, match=r"`lm_head` shares its weight with `model.embed_tokens`; name both"
    ):
        adapted(model=tied, modules_to_save=["lm_head"])
    both = adapted(model=tied, modules_to_save=["lm_head", "embed_tokens"])
    assert both.lm_head.weight is both.model.embed_tokens.weight
    assert both.lm_head.weight.requires_grad


def test_modules_trained_whole_get_no_matrices() -> None:
    model = adapted(modules_to_save=["mlp"])
    assert full_modules(model, section(modules_to_save=["mlp"])) == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "model.layers.0.mlp.up_proj.weight" in trained
    assert not any("mlp" in name and "lora" in name for name in trained)


# ------------------------------------------------------------------------------------ how it starts


@pytest.mark.parametrize(
    "fields",
    [{}, {"variants": ["rslora"]}, {"variants": ["dora"]}],
    ids=["plain", "rslora", "dora"],
)
def test_it_starts_as_zero(fields: dict[str, Any]) -> None:
    assert relative(logits(adapted(**fields)), logits(tiny_llama())) < 1e-6


def test_a_follows_from_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = parameters(adapted())
    torch.manual_seed(2)
    again, fewer, other = (
        parameters(adapted()),
        parameters(adapted(target_modules=PROJECTIONS)),
        parameters(adapted(seed=1)),
    )
    of_a = [name for name in first if ".lora_A." in name]
    assert all(torch.equal(first[name], again[name]) for name in of_a)
    assert all(torch.equal(first[name], fewer[name]) for name in of_a if name in fewer)
    assert not any(torch.equal(first[name], other[name]) for name in of_a)
    assert len({first[name].sum().item() for name in of_a}) == len(of_a), "two modules begin alike"
    assert not any(first[name].any() for name in first if ".lora_B." in name)


def test_a_is_spread_as_a_linear_modules_weight() -> None:
    values = torch.cat(
        [
            value.flatten()
            for name, value in parameters(adapted(rank=64)).items()
            if ".0.mlp.up_proj.lora_A" in name
        ]
    )
    bound = SIZES["hidden_size"] ** -0.5
    assert float(values.abs().max()) <= bound
    assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_the_adapter_alone_is_trained() -> None:
    model = adapted(modules_to_save=["lm_head"])
    module = sft(stir(model), alpha=5.0)
    _, gradients = loss_and_gradients(module, pack(documents([9, 14]), [[2, 3], [5]], [0.5, 0.5]))
    assert set(gradients) == {
        f"model.{n}" for n, p in model.named_parameters() if ".lora_" in n or n == "lm_head.weight"
    }
    assert all(gradient.any() for gradient in gradients.values())


def test_recomputation_changes_no_gradient_although_the_embedding_is_frozen() -> None:
    """Recomputation replays dropout, too."""
    batch = pack(documents([9, 14]), [[2, 3], [5]], [0.5, 0.5])
    found = []
    for recompute in (False, True):
        model = stir(adapted(dropout=0.3))
        if recompute:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        found.append(loss_and_gradients(sft(model), batch))
    (loss, plain), (again, recomputed) = found
    assert loss == again
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_dropout_belongs_to_the_rows() -> None:
    module = sft(stir(adapted(dropout=0.3)))
    batch = pack(documents([9, 14]), [[2, 3], [5]], [0.5, 0.5])
    torch.manual_seed(1)
    first, _ = loss_and_gradients(module, batch)
    torch.manual_seed(2)
    assert loss_and_gradients(module, batch)[0] == first
    with torch.no_grad():
        assert float(module.eval()(batch)) != first


def test_frozen_weights_cost_two_thirds() -> None:
    """They take part in a forward and in the gradient of its input, but have none of their own."""
    whole, adapter = model_flops(tiny_llama()), model_flops(adapted(target_modules=["q_proj"]))
    of_matrices = SIZES["num_hidden_layers"] * 4 * 2 * SIZES["hidden_size"]
    assert adapter.head_weights == whole.head_weights * 2 // 3
    assert adapter.body_weights == pytest.approx(whole.body_weights * 2 / 3 + of_matrices, abs=1)


# ------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"variants": ["rslora"]},
        {"variants": ["dora"]},
        {"modules_to_save": ["lm_head"]},
        {"base": "nf4"},
    ],
    ids=["plain", "rslora", "dora", "head", "nf4"],
)
def test_merged_weights_give_the_adapters_logits(fields: dict[str, Any]) -> None:
    model = stir(adapted(**fields))
    plain = tiny_llama(**(EVEN if "base" in fields else {}))
    start = logits(plain)
    merged = dict(merged_weights(model))
    assert merged.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(merged)
    assert relative(logits(plain), logits(model)) < 1e-5
    assert relative(start, logits(model)) > 1e-2, "the adapter does nothing"


# ------------------------------------------------------------------------------------------- 4 bits


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_every_linear_module_but_the_head_lies_in_4_bits(double: bool) -> None:
    model = adapted(base=NF4[double], target_modules=PROJECTIONS)
    quantised = {
        n: list(parts_of(n, p)) for n, p in model.named_parameters() if hasattr(p, "quant_state")
    }
    assert len(quantised) == LINEAR
    held = {
        n: sum(t.nbytes for part, t in parts if "bitsandbytes__" not in part)
        for n, parts in quantised.items()
    }
    of_plan = measure_model(planned(double), OptimSection(), section(base=NF4[double]))
    linear = [m for n, m in tiny_llama(**EVEN).named_modules() if n.endswith("_proj")]
    assert of_plan.quantised == tuple(m.weight.numel() for m in linear)
    assert sum(held.values()) == pytest.approx(
        sum(of_plan.quantised) // 2 + of_plan.scales_bytes, abs=4 * LINEAR
    )  # the mean is a number there
    original = parameters(tiny_llama(**EVEN))
    for name, weight in merged_weights(model):
        error = relative(weight, original[name])
        assert (0.05 < error < 0.12) if "_proj" in name else error == 0, f"{name}: {error}"


def planned(double: bool) -> Any:
    """Return the same model on the meta device, where nothing is quantised."""
    with torch.device("meta"):
        model = type(tiny_llama())(tiny_llama(**EVEN).config)
    add_adapter(model, section(base=NF4[double], target_modules=PROJECTIONS), 0)
    return model


def test_neither_training_nor_evaluation_changes_a_bit_of_the_base() -> None:
    """On some CPUs bitsandbytes would change the weights' layout at an evaluation."""
    model = stir(adapted(base="nf4", dropout=0.1))

    def digests() -> dict[str, int]:
        frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        return {
            part: sharded_state.digest(tensor)
            for name, p in frozen
            for part, tensor in parts_of(name, p)
        }

    before = digests()
    assert any(name.endswith("q_proj.base_layer.weight.absmax") for name in before)
    first = logits(model)
    batch = pack(documents([9, 14]), [[2, 3], [5]], [0.5, 0.5])
    model.set_attn_implementation("packhorse_reference")
    loss_and_gradients(sft(model), batch)
    assert torch.equal(logits(model), first)
    assert digests() == before


def test_weights_that_are_read_back_with_wrong_scales_are_refused() -> None:
    """bitsandbytes 0.50 does so on some CPUs, where a row of a weight is no multiple of 64."""
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    _require_near("up_proj", weight, weight + 0.15 * weight.abs().amax(1, keepdim=True))
    wrong = weight.clone()
    wrong[30:] *= 1.5
    with pytest.raises(
        BadInput, match=r"does not read `up_proj` \(40 x 48\) back from its 4 bits on cpu"
    ):
        _require_near("up_proj", weight, wrong)


def test_without_bitsandbytes_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "packhorse.trainer.model.nf4_linear", raising=False)
    with pytest.raises(BadInput, match=r"pip install 'packhorse\[qlora\]'"):
        adapted(base="nf4")


def test_biases_stay() -> None:
    biased = {**EVEN, "attention_bias": True}
    model = tiny_llama(**biased)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.fill_(0.5)
    add_adapter(model, section(base="nf4"), 0)
    stir(model)
    plain = tiny_llama(**biased)
    plain.load_state_dict(dict(merged_weights(model)))
    assert float(plain.model.layers[0].self_attn.q_proj.bias.detach().min()) == 0.5
    assert relative(logits(plain), logits(model)) < 1e-5


def test_a_base_of_8_bits_acts_as_what_it_reads_back() -> None:
    model = stir(adapted(base="int8"))
    held = [p for p in model.parameters() if getattr(p, "quant_state", None)]
    assert len(held) == LINEAR
    assert {p.element_size() for p in held} == {1}
    original = parameters(tiny_llama(**EVEN))
    plain = tiny_llama(**EVEN)
    plain.load_state_dict(dict(merged_weights(adapted(base="int8"))))
    for name, weight in parameters(plain).items():
        assert relative(weight, original[name]) < 0.01, "half a step of 127"
    plain.load_state_dict(dict(merged_weights(model)))
    assert relative(logits(plain), logits(model)) < 1e-5
    of_plan = measure_model(planned(False), OptimSection(), section(base="int8"))
    parts = [part for p in held for _, part in parts_of("x", p)]
    assert sum(of_plan.quantised) + of_plan.scales_bytes == sum(part.nbytes for part in parts)


def test_gradients_through_8_bits_are_those_of_the_expanded_weight() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40)
    as_zero3_holds_it = in_8_bits(plain.weight, torch.float32, torch.device("cpu"))
    held = Int8Linear(plain, as_zero3_holds_it)
    with torch.no_grad():
        plain.weight.copy_(held.weight.quant_state.expand(held.weight.data))
    x, y = (torch.randn(7, 24).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    assert torch.equal(held(x), plain(y))
    held(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-5)  # type: ignore[arg-type]
