"""On a GPU: every fused kernel against its readable twin, and the packing check on each of them.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from packhorse.trainer.attention_choice import time_kernels
from packhorse.trainer.config.recipe import LossSection
from packhorse.trainer.datatypes import BadInput, Batch, first_key
from packhorse.trainer.estimate.model import AttentionShape
from packhorse.trainer.model import (
    attention,
    attention_kernels,
    flash_versions,
    fp8,
    liger_layers,
    packing_check,
    ring_blocks,
)
from packhorse.trainer.model.attention_kernels import Arguments, Bounds
from packhorse.trainer.model.logit_transform import LogitTransform, measure_transform
from packhorse.trainer.model.new_weights import initialise
from packhorse.trainer.model.sft import SftModel
from tests.model_helpers import WIDE, documents, pack, relative, tiny
from tests.numerics.test_x6_kernels import VARIANTS, Case, case, in_fp32, run

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LENGTHS = (300, 1, 129, 700, 64)
FUSED = ["torch_varlen"]
if torch.cuda.is_available() and attention.choose("auto", CUDA, torch.bfloat16)[0] == "flash_attn":
    FUSED.append("flash_attn")
ATTENTION_BOUND = (
    1e-2  # relative to fp32 from the same bf16 inputs: outputs and gradients are rounded to 8 bits
)


class Layer(nn.Module):
    is_causal = True
    config = SimpleNamespace(_attn_implementation="packhorse")


def bounds(lengths: tuple[int, ...] = LENGTHS) -> Bounds:
    return Bounds(torch.tensor([0, *lengths], device=CUDA).cumsum(0).int(), max(lengths), lengths)


def row(heads: int, groups: int, size: int, value_size: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = [(heads, size), (groups, size), (groups, value_size or size)]
    made = [torch.randn(1, sum(LENGTHS), h, e, device=CUDA, generator=generator) for h, e in shapes]
    return [
        x.bfloat16().transpose(1, 2).requires_grad_() for x in made
    ]  # as a model's projections leave them


def attend(backend: str, qkv: list[torch.Tensor], **arguments: Any) -> list[torch.Tensor]:
    """The output and the gradients of queries, keys and values."""
    out, _ = attention._FUNCTIONS[backend](
        Layer(), *qkv, None, **{"document_bounds": bounds(), **arguments}
    )
    weights = torch.randn(out.shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), qkv)]


def worst(
    backend: str, qkv: list[torch.Tensor], twin: dict[str, Any] | None = None, **arguments: Any
) -> float:
    exact = [x.detach().float().requires_grad_() for x in qkv]
    pairs = zip(
        attend(backend, qkv, **arguments),
        attend("reference", exact, **(arguments if twin is None else twin)),
    )
    return max(relative(ours, theirs) for ours, theirs in pairs)


def test_each_kernel_that_is_found_can_be_timed() -> None:
    kernels = attention.fused_kernels(CUDA, torch.bfloat16)
    shapes = [AttentionShape(8, 2, 128, 128, None)]
    times = time_kernels(kernels, shapes, LENGTHS, CUDA, torch.bfloat16)
    flash_versions.pin(None)
    assert times.keys() == set(kernels)


def test_layers_with_a_state_run_over_whole_packed_sequences() -> None:
    pytest.importorskip("fla")
    pytest.importorskip("causal_conv1d")
    from tests.unit.test_packing_check import MIXING

    model = tiny(MIXING["qwen 3 next"][0], torch.bfloat16, "reference").to(CUDA)
    module = SftModel(model, LossSection(), 0, CUDA)
    seen = packing_check.prove_packing(module, seq_len=64, one_document=False, seed=0)
    assert seen.by_document == ()


def test_products_in_fp8() -> None:
    if fp8.missing_for_fp8(CUDA):
        pytest.skip("this GPU has no fp8")
    for outputs, inputs in ((14336, 4096), (4096, 14336), (48, 16)):
        fp8._require_right(outputs, inputs, CUDA)
    rows = torch.randn(35, 48, device=CUDA).bfloat16()
    for given in (rows, rows.t()):
        fused, plain = fp8._compiled_cast()(given), fp8._cast(given)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(fused, plain))
    model = tiny(tf.LlamaConfig(**WIDE), torch.bfloat16, "torch_varlen").to(CUDA)
    fp8.use_fp8(model, CUDA)
    module = SftModel(model, LossSection(), 0, CUDA)
    packing_check.prove_packing(module, seq_len=64, one_document=False, seed=0)


# ---------------------------------------------------------------------------------------- attention

SHAPES = {
    "many heads": (8, 8, 64),
    "grouped": (8, 2, 128),
    "one group": (6, 1, 64),
    "head size 80": (4, 4, 80),
    "head size 256": (4, 2, 256),
    "head size 36, filled up": (4, 2, 36),
    "narrow values": (4, 4, 96, 64),
}


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fused_kernel_is_the_reference(backend: str, shape: str) -> None:
    seen = worst(backend, row(*SHAPES[shape]))
    print(f"{backend}, {shape}: {seen:.1e}")
    assert seen <= ATTENTION_BOUND


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("backend", FUSED)
def test_fewer_queries_are_the_last_of_their_documents(backend: str, window: int | None) -> None:
    """As in a rank's slice of a sequence, which gathers the keys before it (C13)."""
    start, stop = 350, 1000
    first = first_key(LENGTHS, start, window)
    queries, keys = bounds().of_pieces(((start, stop),), [first])
    q, k, v = (x.detach() for x in row(8, 2, 64))
    cut = (q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop])
    arguments = Arguments(None, window, None, None, None, keys, queries)
    ours = getattr(attention_kernels, backend)("Layer", *cut, arguments)
    q, k, v = (x.float() for x in cut)
    exact = attention_kernels.reference("Layer", q, k, v, arguments)
    assert relative(ours, exact) <= ATTENTION_BOUND


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    "arguments", [{"sliding_window": 2}, {"sliding_window": 128}, {"scaling": 0.05}], ids=str
)
def test_windows_and_scales_are_honoured(backend: str, arguments: dict[str, Any]) -> None:
    seen = worst(backend, row(8, 2, 64), **arguments)
    print(f"{backend}, {arguments}: {seen:.1e}")
    assert seen <= ATTENTION_BOUND


@pytest.mark.parametrize("backend", FUSED)
def test_control_a_window_of_one_more_shows(backend: str) -> None:
    assert (
        worst(backend, row(8, 2, 64), twin={"sliding_window": 5}, sliding_window=4)
        > 10 * ATTENTION_BOUND
    )


@pytest.mark.parametrize("backend", FUSED)
def test_control_one_document_shows(backend: str) -> None:
    whole = bounds((sum(LENGTHS),))
    assert worst(backend, row(8, 2, 64), twin={}, document_bounds=whole) > 10 * ATTENTION_BOUND


@pytest.mark.parametrize("backend", FUSED)
def test_a_deterministic_backward_gives_the_same_bits_again(backend: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (attend(backend, row(8, 2, 128)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("backend", FUSED)
def test_soft_caps_are_honoured_or_refused(backend: str) -> None:
    if backend == "flash_attn" and "softcap" not in flash_versions.load_for(CUDA).lacks:
        assert worst(backend, row(8, 2, 64), softcap=2.0) <= ATTENTION_BOUND
    else:
        with pytest.raises(BadInput, match="softcap"):
            worst(backend, row(8, 2, 64), softcap=2.0)


def test_auto_takes_a_fused_kernel_for_bf16_and_the_reference_for_fp32() -> None:
    assert attention.choose("auto", CUDA, torch.bfloat16)[0] == FUSED[-1]
    assert attention.choose("auto", CUDA, torch.float32)[0] == "reference"


# --------------------------------------------------------------------------------------------- loss


LOSS_BOUND = {
    torch.float32: 1e-5,
    torch.bfloat16: 2.5e-2,
}  # sums of 4099 in another order; a bias adds a rounding


def on_gpu(given: Case) -> Case:
    def moved(tensor: torch.Tensor | None) -> Any:
        return (
            None
            if tensor is None
            else tensor.detach().to(CUDA).requires_grad_(tensor.requires_grad)
        )

    return given._replace(
        **{k: moved(getattr(given, k)) for k in ("hidden", "weight", "bias", "targets", "weights")}
    )


@pytest.mark.parametrize("kernel", ["liger", "chunked"])
@pytest.mark.parametrize("dtype", LOSS_BOUND, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_kernel_is_the_reference(variant: str, dtype: torch.dtype, kernel: str) -> None:
    given = on_gpu(case(dtype, **{"shape": (515, 256, 4099), **VARIANTS[variant]}))
    loss, gradients = run(kernel, given, 3.0)
    true_loss, true_gradients = run("reference", in_fp32(given), 3.0)
    seen = max(
        [relative(loss, true_loss), *(relative(g, t) for g, t in zip(gradients, true_gradients))]
    )
    print(f"{kernel}, {variant}, {dtype}: {seen:.1e}")
    assert seen <= LOSS_BOUND[dtype]


def test_control_of_the_losses_shows() -> None:
    given = on_gpu(case(torch.bfloat16, shape=(515, 256, 4099)))
    _, gradients = run("liger", given._replace(transform=LogitTransform(0.5)))
    _, true_gradients = run("reference", in_fp32(given))
    assert relative(gradients[0], true_gradients[0]) > 10 * LOSS_BOUND[torch.bfloat16]


# ------------------------------------------------------------------------------------------- layers

SIZES = {
    **WIDE,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FUSED_MODELS = [
    tf.LlamaConfig(**SIZES),
    tf.Qwen2Config(**{key: value for key, value in SIZES.items() if key != "head_dim"}),
    tf.Qwen3Config(**SIZES),
    tf.MistralConfig(**SIZES, sliding_window=128),
    tf.Gemma3TextConfig(**SIZES, sliding_window=128, query_pre_attn_scalar=64),
    tf.Qwen3MoeConfig(**SIZES, **EXPERTS),
]
LAYERS_BOUND = {
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
}  # of the worst tensor's gradient, against plain in fp32


def fused_model(
    config: Any, dtype: torch.dtype, layers: str, backend: str = "reference"
) -> tuple[SftModel, Batch]:
    """The model, and a batch of three packed documents."""
    model = tiny(config, dtype, backend).to(CUDA)
    liger_layers.fuse(model, layers, CUDA, dtype)
    module = SftModel(model, LossSection(), 0, CUDA)
    module.transform = measure_transform(model)
    ids = documents((100, 30, 140))
    return module, pack(ids, [range(len(one) - 1) for one in ids], [0.01, 0.01, 0.01]).to(CUDA)


def learned(
    config: Any, dtype: torch.dtype, layers: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of three packed documents and every parameter's gradient."""
    module, batch = fused_model(config, dtype, layers)
    loss = module(batch)
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("backend", FUSED)
def test_no_micro_batch_makes_the_host_wait(backend: str) -> None:
    module, batch = fused_model(FUSED_MODELS[0], torch.bfloat16, "liger", backend)
    module.train()(batch).backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", LAYERS_BOUND, ids=str)
@pytest.mark.parametrize("config", FUSED_MODELS, ids=lambda config: config.model_type)
def test_fused_layers_are_the_plain_ones(config: Any, dtype: torch.dtype) -> None:
    true_loss, true = learned(config, torch.float32, "torch")
    loss, gradients = learned(config, dtype, "liger")
    own_loss, own = learned(config, dtype, "torch")
    assert gradients.keys() == true.keys()
    seen = max(relative(loss, true_loss), *(relative(gradients[name], true[name]) for name in true))
    without = max(
        relative(own_loss, true_loss), *(relative(own[name], true[name]) for name in true)
    )
    print(f"{config.model_type}, {dtype}: {seen:.1e}, not fused {without:.1e}")
    assert seen <= max(LAYERS_BOUND[dtype], 1.5 * without if dtype == torch.bfloat16 else 0.0)


def test_a_model_made_later_is_as_it_was_written() -> None:
    liger_layers.fuse(tiny(tf.LlamaConfig(**SIZES)).to(CUDA), "liger", CUDA, torch.float32)
    later = tiny(tf.LlamaConfig(**SIZES))
    ids = torch.arange(20).unsqueeze(0)
    later.set_attn_implementation("sdpa")
    on_cpu = later(ids).logits
    assert "Liger" not in repr(later)
    assert relative(later.to(CUDA)(ids.to(CUDA)).logits.cpu(), on_cpu) < 1e-5


def test_the_probe_compares_fused_layers_with_the_models_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    right = LigerRMSNorm.forward
    monkeypatch.setattr(LigerRMSNorm, "forward", lambda self, hidden: right(self, hidden) * 1.2)
    model = tiny(tf.LlamaConfig(**SIZES), torch.bfloat16, FUSED[0]).to(CUDA)
    liger_layers.fuse(model, "liger", CUDA, torch.bfloat16)
    with pytest.raises(BadInput, match=r"model\.layer_kernels=torch"):
        packing_check.prove_packing(
            SftModel(model, LossSection(), 0, CUDA), seq_len=1024, one_document=False, seed=0
        )


# ------------------------------------------------------------------------------------ packing check


def proof(config: Any, backend: str, dtype: torch.dtype = torch.bfloat16) -> packing_check.Proof:
    model = tiny(config, dtype, backend).to(CUDA)
    liger_layers.fuse(model, "auto", CUDA, dtype)
    return packing_check.prove_packing(
        SftModel(model, LossSection(), 0, CUDA), seq_len=1024, one_document=False, seed=0
    )


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize(
    "config",
    [
        tf.LlamaConfig(**{**SIZES, "num_hidden_layers": 8}),
        tf.MistralConfig(**SIZES, sliding_window=128),
        tf.LlamaConfig(
            **{**SIZES, "num_hidden_layers": 32, "hidden_size": 2048, "head_dim": 512 // 4}
        ),
        tf.Qwen3MoeConfig(**SIZES, **EXPERTS),
    ],
    ids=["llama", "mistral", "llama, deep", "qwen3_moe"],
)
def test_the_probe_proves_each_backend_in_bf16(config: Any, backend: str) -> None:
    seen = proof(config, backend)
    print(
        f"{config.model_type}, {backend}: hidden {seen.hidden_difference:.1e}, loss "
        f"{seen.loss_difference:.1e}"
    )


def test_the_probe_refuses_a_soft_cap_that_the_kernel_lacks() -> None:
    with pytest.raises(BadInput, match="softcap"):
        proof(
            tf.Gemma2Config(**SIZES, sliding_window=128, query_pre_attn_scalar=64), "torch_varlen"
        )


def test_control_the_probe_catches_a_kernel_without_boundaries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = attention_kernels.torch_varlen

    def whole(layer: str, q: Any, k: Any, v: Any, arguments: Arguments) -> torch.Tensor:
        return right(layer, q, k, v, arguments._replace(bounds=bounds((q.shape[2],))))

    monkeypatch.setitem(
        attention._FUNCTIONS, "torch_varlen", attention.as_attention_function(whole)
    )
    with pytest.raises(BadInput, match="does not keep packed documents apart"):
        proof(tf.LlamaConfig(**SIZES), "torch_varlen")


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_block_of_a_ring_is_the_reference(is_causal: bool) -> None:
    """Of keys that are a part of the softmax, whose sum is greater (ring_blocks.py)."""
    keys = LENGTHS if is_causal else (64, 1, 700, 129, 300)
    blocks = ring_blocks.BlockLengths(LENGTHS, keys, is_causal)
    q, k, v = (x[0].detach() for x in row(8, 2, 64))
    arguments = Arguments(None, None, None, None, None, bounds())
    exact, log_sum = ring_blocks._reference(q, k, v, blocks, arguments)
    out, its_log_sum = ring_blocks._flash(q, k, v, blocks, arguments)
    assert relative(out, exact) <= ATTENTION_BOUND
    assert relative(its_log_sum, log_sum) <= ATTENTION_BOUND
    grad = torch.randn_like(q)
    given = (grad, q, exact.to(q.dtype), log_sum + 0.5, k, v, blocks, arguments)
    both = zip(ring_blocks._flash_backward(*given), ring_blocks._reference_backward(*given))
    assert max(relative(ours, theirs) for ours, theirs in both) <= ATTENTION_BOUND


def test_random_weights_are_drawn_as_on_a_cpu():
    """ZeRO-3 builds the model on the GPU, the other stages on the CPU."""
    expected = tiny(tf.LlamaConfig(**SIZES)).state_dict()
    model = tiny(tf.LlamaConfig(**SIZES)).to(CUDA)
    for parameter in model.parameters():
        parameter.data.zero_()
    initialise(model, 0, lambda parameters, write=False: nullcontext())
    for name, tensor in model.state_dict().items():
        assert tensor.is_cuda
        assert torch.equal(tensor.cpu(), expected[name]), name
