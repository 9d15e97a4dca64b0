"""X6: Liger's norms, rotary positions and gated activations give transformers' own gradients.

Triton's interpreter runs Liger's code on a CPU in fp32; tests/gpu has it compiled, in bf16 too.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import activation_checkpointing, liger_layers, packing_check
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.logit_transform import measure_transform
from tests.model_helpers import (
    CPU,
    SIZES,
    WIDE,
    documents,
    interpreted,
    loss_and_gradients,
    pack,
    relative,
    sft,
    tiny,
)

BOUND = 5e-6  # of the worst tensor's gradient: the order of sums alone
WINDOW: dict[str, Any] = {**WIDE, "sliding_window": 16}
MODELS = {
    "llama": tf.LlamaConfig(**SIZES),
    "qwen 2": tf.Qwen2Config(**SIZES),
    "qwen 3": tf.Qwen3Config(**WIDE),
    "mistral": tf.MistralConfig(**WINDOW),
    "gemma 2": tf.Gemma2Config(**WINDOW, query_pre_attn_scalar=8),
    "gemma 3": tf.Gemma3TextConfig(
        **WINDOW, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen 3 moe": tf.Qwen3MoeConfig(
        **WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "olmo 2": tf.Olmo2Config(**SIZES),
    "phi 3": tf.Phi3Config(**SIZES, pad_token_id=0),
    "granite": tf.GraniteConfig(**SIZES),
}


def difference(config: Any) -> float:
    """Return the largest relative difference of the loss or a gradient, fused against plain."""
    results = []
    for layers in ("liger", "torch"):
        model = tiny(config)
        done = liger_layers.fuse(model, layers, CPU, torch.float32)
        assert ("Liger's kernels" in done) == (layers == "liger"), done
        ids = documents((9, 3, 5))  # each token takes the interpreter long
        batch = pack(ids, [range(len(document) - 1) for document in ids], [0.02] * 3)
        results.append(loss_and_gradients(sft(model, transform=measure_transform(model)), batch))
    (loss, gradients), (own_loss, own_gradients) = results
    assert gradients.keys() == own_gradients.keys()
    return max(
        abs(loss / own_loss - 1),
        *(relative(gradients[name], own_gradients[name]) for name in gradients),
    )


def recomputed_difference() -> float:
    """Return the largest difference of a fused model's gradients by selective recomputation."""
    results = []
    for mode in ("none", "selective"):
        model = tiny(MODELS["llama"])
        liger_layers.fuse(model, "liger", CPU, torch.float32)
        set_checkpointing(model, mode)
        ids = documents((9, 3))
        batch = pack(ids, [range(len(document) - 1) for document in ids], [0.1] * 2)
        results.append(loss_and_gradients(sft(model), batch)[1])
    plain, again = results
    return max(relative(again[name], plain[name]) for name in plain)


def refusal(config: Any) -> str | None:
    """Return why the packing check refuses a model whose layers are fused."""
    model = tiny(config)
    liger_layers.fuse(model, "liger", CPU, torch.float32)
    try:
        packing_check.prove_packing(sft(model), seq_len=64, one_document=False, seed=0)
    except BadInput as error:
        return str(error)
    return None


def of_a_model_made_later() -> str:
    """Return the repr of a model that is made after another of its kind was fused."""
    config, ids = MODELS["llama"], documents((12,))[0].unsqueeze(0)

    def logits(model: Any) -> torch.Tensor:
        model.set_attn_implementation("sdpa")
        with liger_layers.plain(model):
            return model(ids).logits

    before = logits(tiny(config))
    fused_one = tiny(config)
    liger_layers.fuse(fused_one, "liger", CPU, torch.float32)
    assert torch.equal(logits(fused_one), before)
    later = tiny(config)
    assert torch.equal(logits(later), before)
    return repr(later)


def main() -> None:
    """Run in a process of its own: Triton decides at import whether it interprets."""
    interpret_as_compiled()
    torch.set_num_threads(1)
    seen: dict[str, Any] = {name: difference(config) for name, config in MODELS.items()}
    seen["later"] = of_a_model_made_later()
    seen["recomputed"] = recomputed_difference()
    # the control: queries and keys, which Liger's rotary kernel writes into, are kept as well
    with mock.patch.object(activation_checkpointing, "WIDENING", {"q_proj", "k_proj"}):
        seen["rotated twice"] = recomputed_difference()
    seen["proved"] = [refusal(MODELS["llama"]), refusal(MODELS["gemma 2"])]

    from liger_kernel.transformers import monkey_patch

    norm: Any = monkey_patch.LigerRMSNorm
    right = norm.forward
    norm.forward = lambda self, hidden: right(self, hidden) * 1.01  # the control
    seen["control"] = difference(MODELS["llama"])
    seen["refused"] = refusal(MODELS["llama"])
    print(json.dumps(seen))


def interpret_as_compiled() -> None:
    """Give Triton's interpreter what it lacks: numbers that have `to`, and CUDA's libdevice."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(given: Any) -> Any:
        if type(given) is not float:
            return convert(given)
        return tl.tensor(
            interpreter.TensorHandle(np.array([given], dtype=np.float32), tl.float32), tl.float32
        )

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    geglu.tanh = lambda x: 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return interpreted("tests.numerics.test_x6_layers", "main")


@pytest.mark.parametrize("name", MODELS)
def test_ligers_layers_are_the_models_own(seen: dict[str, Any], name: str) -> None:
    print(f"X6 layers (interpreted), {name}: {seen[name]:.1e}")
    assert seen[name] <= BOUND


def test_control_a_norm_off_by_a_hundredth_shows(seen: dict[str, Any]) -> None:
    assert seen["control"] >= 10 * BOUND


def test_selective_recomputation_changes_no_bit(seen: dict[str, Any]) -> None:
    assert seen["recomputed"] == 0


def test_control_keeping_what_a_kernel_writes_into_shows(seen: dict[str, Any]) -> None:
    assert seen["rotated twice"] >= 10 * BOUND


def test_the_probe_proves_them_against_the_models_own(seen: dict[str, Any]) -> None:
    assert seen["proved"] == [None, None]


def test_the_probe_refuses_a_kernel_that_is_off(seen: dict[str, Any]) -> None:
    assert "layer 0" in seen["refused"]
    assert "model.layer_kernels=torch" in seen["refused"]


def test_a_model_made_later_is_as_it_was_written(seen: dict[str, Any]) -> None:
    assert "Liger" not in seen["later"]


# ------------------------------------------------------------------------------------------- choice


def test_without_a_gpu_the_layers_stay_plain() -> None:
    model = tiny(tf.LlamaConfig(**SIZES))
    assert (
        liger_layers.fuse(model, "auto", CPU, torch.bfloat16)
        == "as transformers has them (they need a CUDA device)"
    )
    assert not liger_layers.is_fused(model)


def test_liger_that_cannot_run_is_refused() -> None:
    with pytest.raises(BadInput, match="need a CUDA device"):
        liger_layers.fuse(tiny(tf.LlamaConfig(**SIZES)), "liger", CPU, torch.bfloat16)


def test_a_model_that_liger_does_not_know_is_refused_by_name_and_left_alone_by_auto() -> None:
    model = tiny(tf.GPT2Config(vocab_size=160, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(BadInput, match="does not know models of type gpt2"):
        liger_layers.fuse(model, "liger", torch.device("cuda"), torch.bfloat16)
    assert "does not know" in liger_layers.fuse(model, "auto", torch.device("cuda"), torch.bfloat16)


def test_a_model_that_brings_code_of_its_own_stays_plain() -> None:
    class Own(tf.LlamaForCausalLM):
        """A model as `trust_remote_code` loads it, of a type that Liger knows."""

    done = liger_layers.fuse(
        Own(tf.LlamaConfig(**SIZES)), "auto", torch.device("cuda"), torch.bfloat16
    )
    assert "code of its own" in done


def test_in_fp32_auto_leaves_them_plain() -> None:
    done = liger_layers.fuse(
        tiny(tf.LlamaConfig(**SIZES)), "auto", torch.device("cuda"), torch.float32
    )
    assert "float32" in done
