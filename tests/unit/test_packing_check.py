"""The check accepts a model that is right packed, and refuses others, naming the layer (C4)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import AdapterSection, LossSection
from packhorse.trainer.datatypes import BadInput, Batch
from packhorse.trainer.model import (
    attention,
    attention_kernels,
    logit_transform,
    packing_check,
    probe_documents,
    sft,
)
from packhorse.trainer.model.attention_kernels import Arguments, Bounds
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.lora import add_adapter
from packhorse.trainer.model.sft import SftModel
from tests.model_helpers import (
    CPU,
    SIZES,
    WIDE,
    documents,
    loss_and_gradients,
    pack,
    relative,
    tiny,
)

torch.set_num_threads(1)

FOUR = {**WIDE, "num_hidden_layers": 4}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 24,
}
LLAMA4 = tf.Llama4TextConfig(
    **WIDE,
    attention_chunk_size=16,
    num_local_experts=2,
    num_experts_per_tok=1,
    intermediate_size_mlp=48,
)
RIGHT: dict[str, tuple[Any, LogitTransform]] = {
    "llama": (tf.LlamaConfig(**SIZES), LogitTransform()),
    "llama, tied": (tf.LlamaConfig(**SIZES, tie_word_embeddings=True), LogitTransform()),
    "qwen 2": (tf.Qwen2Config(**SIZES), LogitTransform()),
    "qwen 3": (tf.Qwen3Config(**WIDE), LogitTransform()),
    "mistral, window": (tf.MistralConfig(**WIDE, sliding_window=16), LogitTransform()),
    "gemma 2, window, soft caps": (
        tf.Gemma2Config(**WIDE, sliding_window=16, query_pre_attn_scalar=8),
        LogitTransform(1.0, 30.0),
    ),
    "gemma 3, windows": (
        tf.Gemma3TextConfig(
            **WIDE,
            sliding_window=16,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        LogitTransform(),
    ),
    "granite, logit scale": (tf.GraniteConfig(**SIZES, logits_scaling=8.0), LogitTransform(0.125)),
    "cohere, logit scale": (tf.CohereConfig(**SIZES, logit_scale=0.0625), LogitTransform(0.0625)),
    "gpt-oss, sinks, windows, experts": (
        tf.GptOssConfig(**WIDE, sliding_window=16, num_local_experts=4, num_experts_per_tok=2),
        LogitTransform(),
    ),
    "qwen 3 moe": (tf.Qwen3MoeConfig(**WIDE, **EXPERTS), LogitTransform()),
    "mixtral": (tf.MixtralConfig(**WIDE, num_local_experts=4), LogitTransform()),
    "gpt-2": (
        tf.GPT2Config(vocab_size=160, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        LogitTransform(),
    ),
    "smollm 3, a layer without positions": (
        tf.SmolLM3Config(**SIZES, pad_token_id=0, no_rope_layers=[1, 0]),
        LogitTransform(),
    ),
    "olmo 2": (tf.Olmo2Config(**SIZES), LogitTransform()),
    "phi 3": (tf.Phi3Config(**SIZES, pad_token_id=0), LogitTransform()),
    "llama 4, chunks": (LLAMA4, LogitTransform()),
    "stablelm, whose layers hand no boundaries on": (tf.StableLmConfig(**SIZES), LogitTransform()),
    "nemotron, likewise": (tf.NemotronConfig(**SIZES), LogitTransform()),
    "phi, biased head": (tf.PhiConfig(**SIZES), LogitTransform()),
}
# They carry a state from document to document, which their own library says, or what the check
# measures. The module that does so runs document by document.
MIXING = {
    "qwen 3 next": (
        tf.Qwen3NextConfig(**FOUR, **EXPERTS, **LINEAR),
        "Qwen3NextGatedDeltaNet",
    ),
    "lfm 2": (
        tf.Lfm2Config(**FOUR, layer_types=["conv", "full_attention"] * 2),
        "Lfm2ShortConv",
    ),
    "mamba": (tf.MambaConfig(vocab_size=160, hidden_size=32, num_hidden_layers=2), "MambaBlock"),
    "jamba, attention in other layers": (
        tf.JambaConfig(
            **SIZES,
            pad_token_id=0,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=4,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        "JambaMambaDecoderLayer",
    ),
}


def proof(
    model: Any, *, one_document: bool = False, kernel: str = "chunked"
) -> packing_check.Proof:
    module = SftModel(model, LossSection.model_validate({"kernel": kernel}), 0, CPU)
    return packing_check.prove_packing(module, seq_len=128, one_document=one_document, seed=0)


# --------------------------------------------------------------------------------------- right ones


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_is_accepted_and_its_logits_are_known(name: str) -> None:
    config, transform = RIGHT[name]
    seen = proof(tiny(config))
    print(f"{name}: hidden {seen.hidden_difference:.1e}, loss {seen.loss_difference:.1e}")
    assert seen.transform == transform
    assert not seen.by_document
    assert not seen.by_itself
    assert seen.hidden_difference < 1e-5
    assert seen.loss_difference < 1e-5


@pytest.mark.parametrize("name", ["llama, tied", "gpt-oss, sinks, windows, experts"])
def test_bf16_is_proved_within_its_own_rounding(name: str) -> None:
    seen = proof(tiny(RIGHT[name][0], torch.bfloat16))
    assert seen.hidden_difference < 0.05
    assert seen.loss_difference < 0.01


# its roundings add up to more than a shallow model's may
DEEP = tf.LlamaConfig(
    **{**SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 32},
    initializer_range=0.12,
)


def test_a_deep_model_in_bf16_is_proved_within_the_rounding_of_its_own_two_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 0.05 < proof(tiny(DEEP, torch.bfloat16)).hidden_difference < packing_check.MOST_ROUNDING
    monkeypatch.setattr(packing_check, "OWN_ROUNDING", 0.0)
    with pytest.raises(BadInput, match=r"0\.05 is allowed"):
        proof(tiny(DEEP, torch.bfloat16))


@pytest.mark.parametrize("change", [{"scale": 0.3}, {"window": 12}], ids=str)
def test_control_a_deep_models_rounding_hides_no_defect(change: dict[str, Any]) -> None:
    with (
        with_backend(lambda arguments: arguments._replace(**change)),
        pytest.raises(BadInput, match=r"even for one document|not that of the model's own logits"),
    ):
        proof(tiny(DEEP, torch.bfloat16))


def test_one_document_is_longer_than_the_window() -> None:
    assert proof(tiny(RIGHT["mistral, window"][0])).lengths[1] > 16


def test_the_model_is_left_as_it_was() -> None:
    model = tiny(RIGHT["llama"][0])
    module = SftModel(model, LossSection(), 0, CPU).train()
    packing_check.prove_packing(module, seq_len=64, one_document=False, seed=0)
    assert module.training
    assert model.config._attn_implementation == "packhorse_reference"
    assert all(p.grad is None for p in model.parameters())


PHIMOE = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "is_random"),
    [
        (tf.LlamaConfig(**SIZES), False),
        (tf.LlamaConfig(**SIZES, attention_dropout=0.1), True),
        (tf.OPTConfig(**SIZES, ffn_dim=48, dropout=0.0, layerdrop=0.1), True),
        (tf.MixtralConfig(**WIDE, num_local_experts=4, router_jitter_noise=0.01), True),
        (tf.MixtralConfig(**WIDE, num_local_experts=4), False),
        (tf.PhimoeConfig(**PHIMOE, router_jitter_noise=0.01), True),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_forward_that_draws_random_numbers_is_seen_whatever_its_key_is_called(
    config: Any, is_random: bool
) -> None:
    module = SftModel(tiny(config), LossSection(), 0, CPU)
    before = torch.get_rng_state()
    packing_check.prove_packing(module, seq_len=64, one_document=False, seed=0)
    assert module.is_random == is_random
    assert torch.equal(torch.get_rng_state(), before)


def test_the_dropout_of_a_new_adapter_is_seen_although_it_changes_nothing_yet() -> None:
    model = tiny(tf.LlamaConfig(**SIZES))
    add_adapter(model, AdapterSection(rank=2, dropout=0.1), seed=0)
    module = SftModel(model, LossSection(), 0, CPU)
    packing_check.prove_packing(module, seq_len=64, one_document=False, seed=0)
    assert module.is_random


# -------------------------------------------------------------------------------------- mixing ones


@pytest.mark.parametrize("name", MIXING)
def test_a_module_that_mixes_documents_runs_by_document(name: str) -> None:
    config, mixer = MIXING[name]
    seen = proof(tiny(config))
    assert [why.split()[0] for why in seen.by_document] == [mixer]
    assert seen.hidden_difference < 1e-5
    assert proof(tiny(config), one_document=True).by_document == ()


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", MIXING)
def test_its_gradients_are_those_of_the_documents_alone(name: str, recomputes: bool) -> None:
    module = SftModel(tiny(MIXING[name][0]), LossSection(), 0, CPU)
    packing_check.prove_packing(module, seq_len=128, one_document=False, seed=0)
    ids = documents([9, 30, 9, 1, 17])  # two of one length, and the shortest
    trained = [list(range(len(d) - 1)) for d in ids]
    apart = [pack([d], [t], [0.1], keys=[i]) for i, (d, t) in enumerate(zip(ids, trained))]
    own_loss, own = loss_and_gradients(module, *apart)
    if recomputes:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients = loss_and_gradients(module, pack(ids, trained, [0.1] * len(ids)))
    assert loss == pytest.approx(own_loss, rel=1e-6)
    assert max(relative(gradients[key], own[key]) for key in own) < 1e-4


def test_idle_calls_for_the_other_ranks_change_nothing() -> None:
    module = SftModel(tiny(MIXING["qwen 3 next"][0]), LossSection(), 0, CPU)
    packing_check.prove_packing(module, seq_len=128, one_document=False, seed=0)
    batch = pack(documents([9, 30]), [[1, 2], [3]], [0.5, 0.5])
    loss, own = loss_and_gradients(module, batch)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    mixer = module.model.get_decoder().layers[0].linear_attn
    mixer.in_proj_qkvz.register_forward_hook(count)
    with mock.patch.object(SftModel, "_idle_calls", return_value=3):
        again, gradients = loss_and_gradients(module, batch)
    assert calls == 5
    assert again == loss
    assert all(torch.equal(gradients[name], own[name]) for name in own)


def test_control_a_mixer_that_is_not_told_of_documents_is_seen() -> None:
    with mock.patch.object(SftModel, "_documents_in_call", return_value=()):
        seen = proof(tiny(MIXING["mamba"][0]))
    assert seen.by_document == ()
    assert "MambaBlock" in seen.by_itself


def test_generation_is_not_cut_into_a_batchs_documents() -> None:
    model = tiny(MIXING["mamba"][0])
    module = SftModel(model, LossSection(), 0, CPU)
    packing_check.prove_packing(module, seq_len=128, one_document=False, seed=0)
    (ids,) = documents([30])
    with torch.no_grad():
        before = model(input_ids=ids[None], use_cache=False).logits
        module.eval()(pack(documents([9, 21]), [[1], [1]], [0.5, 0.5]))
        after = model(input_ids=ids[None], use_cache=False).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("size", [None, 15])
def test_control_other_chunks_are_caught(size: int | None) -> None:
    with mock.patch.object(attention, "_chunk_size", return_value=size):
        seen = proof(tiny(LLAMA4))
    assert "Llama4TextAttention masks its attention by more" in seen.by_itself


def test_control_chunks_counted_from_the_start_of_the_packed_sequence_are_caught() -> None:
    def from_the_start(bounds: Bounds, size: int) -> Bounds:
        cuts = {*range(0, sum(bounds.lengths), size), *bounds.cu_seqlens.tolist()}
        ends = torch.tensor(sorted(cuts), dtype=torch.int32)
        return Bounds(ends, size, tuple(ends.diff().tolist()))

    with (
        mock.patch.object(Bounds, "chunked", from_the_start),
        mock.patch.object(attention, "_compare_mask"),  # which sees it, too
    ):
        assert "same document alone" in proof(tiny(LLAMA4)).by_itself


# BLOOM attends by code of its own; an indexer of DeepSeek V3.2 chooses 8 keys for each query, and
# of GLM's layers the second takes the first one's; XGLM's positions count on over documents.
SPARSE = {
    **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16},
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "head_dim": 8, "mlp_layer_types": ["dense", "sparse"]},
    **SIZES,
    "num_key_value_heads": 4,
}
XGLM: dict[str, Any] = {
    **{"vocab_size": 160, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0},
}
BY_ITSELF: dict[str, Any] = {
    "bloom": tf.BloomConfig(vocab_size=160, hidden_size=32, n_layer=2, n_head=4),
    "deepseek 3.2": tf.DeepseekV32Config(**SPARSE),
    "glm 5": tf.GlmMoeDsaConfig(**SPARSE, indexer_types=["full", "shared"]),
    "xglm": tf.XGLMConfig(**XGLM),
}


@pytest.mark.parametrize("name", BY_ITSELF)
@pytest.mark.parametrize("one_document", [False, True])
def test_a_model_that_cannot_attend_through_packhorse_attends_by_itself(
    name: str, one_document: bool
) -> None:
    seen = proof(tiny(BY_ITSELF[name]), one_document=one_document)
    assert seen.hidden_difference < 1e-5
    assert seen.by_itself


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", BY_ITSELF)
def test_its_packed_gradients_are_those_of_the_model_without_packhorse(
    name: str, recomputes: bool
) -> None:
    model = tiny(BY_ITSELF[name])
    module = SftModel(model, LossSection(), 0, CPU)
    packing_check.prove_packing(module, seq_len=128, one_document=False, seed=0)
    ids = documents([9, 30, 9, 2])  # one is longer than the keys that an indexer chooses
    weights = [0.1, 0.2, 0.3, 0.4]
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [list(range(len(d) - 1)) for d in ids]
    loss, ours = loss_and_gradients(module, pack(ids, trained, weights))
    model.zero_grad(set_to_none=True)
    attention.set_implementation(model, "eager")
    own = 0.0
    for document, weight in zip(ids, weights):
        logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
        summed = torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum") * weight
        summed.backward()
        own += summed.item()
    assert loss == pytest.approx(own, rel=1e-6)
    plain = {f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == plain.keys()
    # a bias of keys has none but rounding
    floor = 1e-4 * max(float(gradient.norm()) for gradient in plain.values())
    off = {
        key: float((ours[key] - own).norm() / (own.norm() + floor)) for key, own in plain.items()
    }
    assert max(off.values()) < 1e-4


def test_its_noise_and_its_routers_loss_are_those_of_the_documents_alone() -> None:
    section = LossSection(neftune_alpha=5.0, router_aux=0.1)
    module = SftModel(tiny(tf.Qwen3MoeConfig(**WIDE, **EXPERTS)), section, 0, CPU)
    packing_check.prove_packing(module, seq_len=64, one_document=False, seed=0)
    batch = pack(documents([9, 30, 9]), [[1, 2], [3], [4]], [0.5, 0.25, 0.25])
    loss, own = loss_and_gradients(module, batch)
    module.attends_by_itself = True
    with mock.patch.object(SftModel, "_idle_calls", return_value=2):  # which have no effect
        again, gradients = loss_and_gradients(module, batch)
    assert again == pytest.approx(loss, rel=1e-6)
    assert max(relative(gradients[key], own[key]) for key in own) < 1e-4


def test_control_another_choice_of_keys_is_caught() -> None:
    indexer = tf.models.deepseek_v32.modeling_deepseek_v32.DeepseekV32Indexer
    choose, decode = indexer.forward, SftModel._decode_by_document

    def first_keys(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        chosen = choose(self, *args, **kwargs)
        return torch.arange(chosen.shape[-1], dtype=chosen.dtype).expand_as(chosen)

    def decode_so(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(indexer, "forward", first_keys):
            return decode(*args, **kwargs)

    with (
        mock.patch.object(SftModel, "_decode_by_document", decode_so),
        pytest.raises(BadInput, match="asks attention for `indices`"),
    ):
        proof(tiny(BY_ITSELF["deepseek 3.2"]))


def test_layers_with_several_streams_are_compared() -> None:
    config = tf.Gemma3nTextConfig(
        **{**WIDE, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
        vocab_size_per_layer_input=160,
        hidden_size_per_layer_input=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        laurel_rank=8,
        activation_sparsity_pattern=[0.5, 0.0] * 2,
    )
    assert proof(tiny(config)).hidden_difference < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = tiny(RIGHT["llama"][0])
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
    with pytest.raises(BadInput, match=r"NaN or infinity in `model\.layers\.1\.mlp\.up_proj"):
        proof(model)


def test_no_advice_is_given_that_is_followed_already() -> None:
    with (
        with_backend(lambda arguments: arguments._replace(scale=1.0)),
        pytest.raises(BadInput, match=r"is allowed\): take another model$"),
    ):
        proof(tiny(RIGHT["qwen 3"][0]))


# -------------------------------------------------------------------------------------- broken ones


def with_backend(change: Any) -> Any:
    """Put a reference backend in place that gets changed arguments."""
    right = attention_kernels.reference

    def wrong(layer: str, q: Any, k: Any, v: Any, arguments: Arguments) -> torch.Tensor:
        return right(layer, q, k, v, change(arguments))

    return mock.patch.dict(
        attention._FUNCTIONS, {"reference": attention.as_attention_function(wrong)}
    )


def no_boundaries(arguments: Arguments) -> Arguments:
    total = int(arguments.bounds.cu_seqlens[-1])
    return arguments._replace(bounds=replace(arguments.bounds, lengths=(total,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_control_a_backend_without_boundaries_is_caught(dtype: torch.dtype) -> None:
    with with_backend(no_boundaries):
        seen = proof(tiny(RIGHT["llama"][0], dtype))
    # the model then runs by its own attention
    assert "layer 0 (LlamaDecoderLayer): its states differ" in seen.by_itself


@pytest.mark.parametrize(
    ("fused", "others"),
    [
        ([], "model.attention=reference"),
        (
            ["flash_attn 3", "flash_attn 2", "torch_varlen"],
            "model.attention=flash_attn or model.attention=reference",
        ),
    ],
)
def test_a_kernel_that_mixes_what_the_reference_keeps_apart_is_refused(
    fused: list[str], others: str
) -> None:
    right = attention_kernels.reference

    def wrong(layer: str, q: Any, k: Any, v: Any, arguments: Arguments) -> torch.Tensor:
        return right(layer, q, k, v, no_boundaries(arguments))

    kernel = attention.as_attention_function(wrong)
    with (
        mock.patch.dict(attention._FUNCTIONS, {"torch_varlen": kernel}),
        mock.patch.object(packing_check, "fused_kernels", return_value=fused),
        pytest.raises(BadInput, match=rf"apart through the backend torch_varlen .*: set {others}$"),
    ):
        proof(tiny(RIGHT["llama"][0], backend="torch_varlen"))


def test_ranks_fall_back_to_the_models_own_attention_together_and_both_errors_are_told() -> None:
    module = SftModel(tiny(RIGHT["llama"][0]), LossSection(), 0, CPU)

    def fail() -> None:
        raise (RuntimeError("own") if module.attends_by_itself else ValueError("ours"))

    with (
        mock.patch.object(dist.log, "info") as said,
        pytest.raises(RuntimeError, match="own") as caught,
    ):
        module.by_either_attention(fail)
    assert str(caught.value.__cause__) == "ours"
    assert said.call_args.args[-1] == "ValueError: ours"
    assert not module.attends_by_itself
    assert module.by_either_attention(lambda: module.attends_by_itself) is False
    with mock.patch.object(dist, "gather", lambda own: [own, "ValueError: another rank's"]):
        assert module.by_either_attention(lambda: module.attends_by_itself) is True


def test_a_forward_that_fails_on_another_rank_alone_counts_as_failed_here() -> None:
    def gather(own: Any) -> list[Any]:
        packed = lengths[-1] > 1
        return [own, "ImportError: no kernel" if own is None and packed else own]

    def counted(self: SftModel, batch: Batch) -> torch.Tensor:
        lengths.append(1 if self.attends_by_itself else len(batch.lengths))
        return hidden_states(self, batch)

    lengths, hidden_states = [1], SftModel.hidden_states
    with (
        mock.patch.object(dist, "gather", gather),
        mock.patch.object(SftModel, "hidden_states", counted),
    ):
        seen = proof(tiny(RIGHT["llama"][0]))
    assert seen.by_itself == "the model fails on rank 1 alone: ImportError: no kernel"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral, window", {"window": None}),
        ("mistral, window", {"window": 15}),
        ("gemma 2, window, soft caps", {"softcap": None}),
        ("gpt-oss, sinks, windows, experts", {"sinks": None}),
        ("qwen 3", {"scale": 1.0}),
    ],
)
def test_control_a_backend_that_ignores_an_argument_is_caught(
    name: str, change: dict[str, Any]
) -> None:
    with with_backend(lambda arguments: arguments._replace(**change)):
        model = tiny(RIGHT[name][0])
        for parameter in model.parameters():  # large scores, so that a soft cap of 50 bends them
            if parameter.dim() == 2:
                parameter.data *= 20
        with pytest.raises(BadInput, match="even for one document"):
            proof(model)


def test_control_positions_that_do_not_restart_are_caught() -> None:
    right = SftModel.hidden_states

    def running_on(self: SftModel, batch: Batch) -> torch.Tensor:
        batch.position_ids.copy_(torch.arange(batch.input_ids.shape[0]) % 64)
        return right(self, batch)

    with mock.patch.object(SftModel, "hidden_states", running_on):
        assert "GPT2" in proof(tiny(RIGHT["gpt-2"][0])).by_itself


def test_control_a_window_that_only_the_mask_knows_is_caught() -> None:
    right = attention._attend

    def forgets(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return right(*args, **kwargs)

    with mock.patch.object(attention, "_attend", forgets):
        seen = proof(tiny(RIGHT["mistral, window"][0], torch.bfloat16))
    assert "more than causality" in seen.by_itself


def test_control_a_loss_that_is_not_the_models_is_caught() -> None:
    def no_scale(*args: Any, transform: LogitTransform, **kwargs: Any) -> torch.Tensor:
        return right(*args, transform=LogitTransform(), **kwargs)

    right = sft.linear_cross_entropy
    model = tiny(RIGHT["granite, logit scale"][0])
    model.lm_head.weight.data *= 50
    with (
        mock.patch.object(sft, "linear_cross_entropy", no_scale),
        pytest.raises(BadInput, match="own logits"),
    ):
        proof(model)


class Halved(tf.LlamaForCausalLM):
    """A model that does something between its backbone and its head."""

    def forward(self, input_ids: Any = None, logits_to_keep: int = 0, **others: Any) -> Any:
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden * 0.5)[:, -logits_to_keep:])


def test_something_between_backbone_and_head_is_caught() -> None:
    model = tiny(RIGHT["llama"][0])
    model.lm_head.weight.data *= 50
    model.__class__ = Halved
    with pytest.raises(BadInput, match="Halved: the loss made from the hidden states"):
        proof(model)


# -------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "transform",
    [
        LogitTransform(),
        LogitTransform(0.0625),
        LogitTransform(1.0, 30.0),
        LogitTransform(0.5, 15.0),
    ],
)
def test_a_scale_and_a_soft_cap_are_measured(transform: LogitTransform) -> None:
    given = torch.logspace(-3, 6, 80).double()
    assert logit_transform._fit(given, transform(given)) == transform


def test_logits_changed_in_another_way_are_not_fitted() -> None:
    given = torch.logspace(-3, 6, 80).double()
    hidden_tail = given.clone()
    hidden_tail[-3:] = -torch.inf
    for changed in (given.relu() + 1, given.sqrt(), given.clamp(max=20), hidden_tail):
        assert logit_transform._fit(given, changed) is None


def test_windows_and_chunks_are_found_by_their_words() -> None:
    config = {
        "sliding_window": 4096,
        "text": {"attention_chunk_size": 8192, "use_sliding_window": True},
        "sliding_window_pattern": "LLG",
        "max_window_layers": 28,
        "local_attention": 128,
        "id2label": {0: "a"},
    }
    assert probe_documents.length_limits(config) == {4096, 8192, 28, 128}


def test_the_middle_document_passes_every_limit_within_reach() -> None:
    config = SimpleNamespace(
        vocab_size=99,
        max_position_embeddings=10**6,
        to_dict=lambda: {"sliding_window": 512, "chunk": 8192},
    )
    assert len(probe_documents.random_documents(config, 1024, 0)[1]) > 512
    assert len(probe_documents.random_documents(config, 1024, 0)[1]) < 1024
    assert len(probe_documents.random_documents(config, 16384, 0)[1]) > 8192
