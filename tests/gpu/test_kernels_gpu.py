"""On a GPU: every fused kernel against its readable twin, and the probe through each of them.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from tests.model_helpers import WIDE, relative, tiny
from tests.numerics.test_x6_kernels import BOUND, VARIANTS, Case, case, in_fp32, run
from trainer.config import LossSection
from trainer.flow import BadInput
from trainer.model import attention, probe
from trainer.model.attention import Bounds
from trainer.model.loss import LogitTransform
from trainer.model.sft import SftModel

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LENGTHS = (300, 1, 129, 700, 64)
FUSED = ["torch_varlen", *(["flash_attn"] if importlib.util.find_spec("flash_attn") else [])]
ATTENTION_BOUND = 1e-2  # relative to fp32 from the same bf16 inputs: outputs and gradients are rounded to 8 bits


class Layer(nn.Module):
    is_causal = True
    config = SimpleNamespace(_attn_implementation="packhorse")


def bounds(lengths: tuple[int, ...] = LENGTHS) -> Bounds:
    return Bounds(torch.tensor([0, *lengths], device=CUDA).cumsum(0).int(), max(lengths), lengths)


def row(heads: int, groups: int, size: int, value_size: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = [(heads, size), (groups, size), (groups, value_size or size)]
    made = [torch.randn(1, sum(LENGTHS), h, e, device=CUDA, generator=generator) for h, e in shapes]
    return [x.bfloat16().transpose(1, 2).requires_grad_() for x in made]  # as a model's projections leave them


def attend(backend: str, qkv: list[torch.Tensor], **arguments: Any) -> list[torch.Tensor]:
    """The output and the gradients of queries, keys and values."""
    out, _ = attention._FUNCTIONS[backend](Layer(), *qkv, None, **{"document_bounds": bounds(), **arguments})
    weights = torch.randn(out.shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), qkv)]


def worst(backend: str, qkv: list[torch.Tensor], twin: dict[str, Any] | None = None, **arguments: Any) -> float:
    exact = [x.detach().float().requires_grad_() for x in qkv]
    pairs = zip(attend(backend, qkv, **arguments), attend("reference", exact, **(arguments if twin is None else twin)))
    return max(relative(ours, theirs) for ours, theirs in pairs)


# ----------------------------------------------------------------------------------------------- attention

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


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("arguments", [{"sliding_window": 1}, {"sliding_window": 128}, {"scaling": 0.05}], ids=str)
def test_windows_and_scales_are_honoured(backend: str, arguments: dict[str, Any]) -> None:
    seen = worst(backend, row(8, 2, 64), **arguments)
    print(f"{backend}, {arguments}: {seen:.1e}")
    assert seen <= ATTENTION_BOUND


@pytest.mark.parametrize("backend", FUSED)
def test_control_a_window_of_one_more_shows(backend: str) -> None:
    assert worst(backend, row(8, 2, 64), twin={"sliding_window": 5}, sliding_window=4) > 10 * ATTENTION_BOUND


@pytest.mark.parametrize("backend", FUSED)
def test_control_one_document_shows(backend: str) -> None:
    whole = bounds((sum(LENGTHS),))
    assert worst(backend, row(8, 2, 64), twin={}, document_bounds=whole) > 10 * ATTENTION_BOUND


@pytest.mark.parametrize("backend", FUSED)
def test_soft_caps_are_honoured_or_refused(backend: str) -> None:
    if backend == "flash_attn":
        assert worst(backend, row(8, 2, 64), softcap=2.0) <= ATTENTION_BOUND
    else:
        with pytest.raises(BadInput, match="softcap"):
            worst(backend, row(8, 2, 64), softcap=2.0)


def test_auto_takes_a_fused_kernel_for_bf16_and_the_reference_for_fp32() -> None:
    assert attention.choose("auto", CUDA, torch.bfloat16)[0] == FUSED[-1]
    assert attention.choose("auto", CUDA, torch.float32)[0] == "reference"


# ----------------------------------------------------------------------------------------------- loss


def on_gpu(given: Case) -> Case:
    def moved(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().to(CUDA).requires_grad_(tensor.requires_grad)

    return given._replace(**{k: moved(getattr(given, k)) for k in ("hidden", "weight", "bias", "targets", "weights")})


@pytest.mark.parametrize("kernel", ["liger", "chunked"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_kernel_is_the_reference(variant: str, dtype: torch.dtype, kernel: str) -> None:
    given = on_gpu(case(dtype, **{"shape": (515, 256, 4099), **VARIANTS[variant]}))
    loss, gradients = run(kernel, given, 3.0)
    true_loss, true_gradients = run("reference", in_fp32(given), 3.0)
    seen = max([relative(loss, true_loss), *(relative(g, t) for g, t in zip(gradients, true_gradients))])
    print(f"{kernel}, {variant}, {dtype}: {seen:.1e}")
    assert seen <= (1e-5 if dtype == torch.float32 else BOUND[dtype])  # sums of 4099 in another order


def test_control_of_the_losses_shows() -> None:
    given = on_gpu(case(torch.bfloat16, shape=(515, 256, 4099)))
    _, gradients = run("liger", given._replace(transform=LogitTransform(0.5)))
    _, true_gradients = run("reference", in_fp32(given))
    assert relative(gradients[0], true_gradients[0]) > 10 * BOUND[torch.bfloat16]


# ----------------------------------------------------------------------------------------------- the probe


def proof(config: Any, backend: str, dtype: torch.dtype = torch.bfloat16) -> probe.Proof:
    module = SftModel(tiny(config, dtype, backend).to(CUDA), LossSection(), 0, CUDA)
    return probe.probe(module, row_tokens=1024, one_document=False, seed=0)


SIZES = {**WIDE, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize(
    "config",
    [
        tf.LlamaConfig(**{**SIZES, "num_hidden_layers": 8}),
        tf.MistralConfig(**SIZES, sliding_window=128),
        tf.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    ],
    ids=lambda config: config.model_type,
)
def test_the_probe_proves_each_backend_in_bf16(config: Any, backend: str) -> None:
    seen = proof(config, backend)
    print(f"{config.model_type}, {backend}: hidden {seen.hidden_difference:.1e}, loss {seen.loss_difference:.1e}")


def test_the_probe_refuses_a_soft_cap_that_the_kernel_lacks() -> None:
    with pytest.raises(BadInput, match="softcap"):
        proof(tf.Gemma2Config(**SIZES, sliding_window=128, query_pre_attn_scalar=64), "torch_varlen")


def test_control_the_probe_catches_a_kernel_without_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._torch_varlen

    def whole(layer: str, q: Any, k: Any, v: Any, arguments: attention.Arguments) -> torch.Tensor:
        return right(layer, q, k, v, arguments._replace(bounds=bounds((q.shape[2],))))

    monkeypatch.setitem(attention._FUNCTIONS, "torch_varlen", attention._bound(whole))
    with pytest.raises(BadInput, match="does not keep packed documents apart"):
        proof(tf.LlamaConfig(**SIZES), "torch_varlen")
