"""X6: each loss kernel equals its readable twin, and its workspace stays within C5's bound."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.loss import BLOCK_HIDDEN, choose_kernel, linear_cross_entropy
from tests.model_helpers import interpreted, relative
from tests.numerics import buffers

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
# Relative to the reference in fp32: fp32 differs by the order of sums alone; bf16 by rounding
# logits' gradients to 8 bits, which the reference in bf16 does too (it is off by as much).
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2}
# bytes for each (trained position x hidden) beyond the weight's gradient, with a soft cap: c = 12
# in fp32
WORKSPACE = 48


class Case(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    weights: torch.Tensor
    transform: LogitTransform


def case(
    dtype: torch.dtype = torch.float32,
    *,
    uniform: bool = False,
    bias: bool = False,
    transform: LogitTransform | None = None,
    shape: tuple[int, int, int] = (23, 16, 203),  # the last block of the vocabulary is short
) -> Case:
    generator = torch.Generator().manual_seed(0)
    n, h, v = shape
    targets = torch.randint(v, (n,), generator=generator)
    targets[:4] = torch.tensor([0, BLOCK_HIDDEN * h - 1, BLOCK_HIDDEN * h, v - 1]).clamp(
        max=v - 1
    )  # edges of blocks
    weights = torch.full((n,), 1 / n) if uniform else torch.rand(n, generator=generator) / n
    weights[0] = weights[0] if uniform else 0.0
    return Case(
        torch.randn(n, h, generator=generator).to(dtype).requires_grad_(),
        torch.randn(v, h, generator=generator).to(dtype).requires_grad_(),
        torch.randn(v, generator=generator).to(dtype).requires_grad_() if bias else None,
        targets,
        weights,
        transform or LogitTransform(),
    )


def run(kernel: str, given: Case, incoming: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = linear_cross_entropy(
        given.hidden,
        given.weight,
        given.targets,
        given.weights,
        kernel,
        bias_V=given.bias,
        transform=given.transform,
    )
    leaves = (given.hidden, given.weight, given.bias)
    leaves = [t for t in leaves if t is not None and t.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss * incoming, leaves))


def in_fp32(given: Case) -> Case:
    return given._replace(
        hidden=given.hidden.detach().float().requires_grad_(),
        weight=given.weight.detach().float().requires_grad_(),
        bias=None if given.bias is None else given.bias.detach().float().requires_grad_(),
    )


def worst(kernel: str, given: Case, incoming: float = 1.0, twin: Case | None = None) -> float:
    """Return the largest relative difference of loss and gradients from the reference in fp32."""
    loss, gradients = run(kernel, given, incoming)
    true_loss, true_gradients = run("reference", twin or in_fp32(given), incoming)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    return max(
        [relative(loss, true_loss), *(relative(g, t) for g, t in zip(gradients, true_gradients))]
    )


def of_one_alone(kernel: str, given: Case, trained: str) -> float:
    """Return the relative difference of the gradient if `hidden` or `weight` alone needs one: under
    an adapter the head is frozen, or all but the head.
    """
    frozen = "weight" if trained == "hidden" else "hidden"
    _, one = run(kernel, given._replace(**{frozen: getattr(given, frozen).detach()}))
    return relative(one[0], run("reference", given)[1][trained == "weight"])


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one weight": {"uniform": True},
    "bias": {"bias": True},
    "scale": {"transform": LogitTransform(0.125)},
    "soft cap": {"transform": LogitTransform(1.0, 5.0)},
    "scale, soft cap, bias": {"transform": LogitTransform(0.5, 3.0), "bias": True},
    "one block": {"shape": (23, 64, 203)},
    "vocabulary of one more than a block": {"shape": (23, 16, 65)},
}

# ------------------------------------------------------------------------------------------ chunked


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunked_is_the_reference(variant: str, dtype: torch.dtype) -> None:
    given = case(dtype, **VARIANTS[variant])
    seen = worst("chunked", given, incoming=3.0)
    print(
        f"X6 chunked, {variant}, {dtype}: {seen:.1e}; the reference in this type: "
        f"{worst('reference', given, 3.0):.1e}"
    )
    assert seen <= BOUND[dtype]


@pytest.mark.parametrize(
    "defect", ["soft cap left out", "scale left out", "weights made alike", "a target moved"]
)
def test_control_a_defect_shows_tenfold(defect: str) -> None:
    right = case(torch.bfloat16, transform=LogitTransform(0.5, 3.0))
    wrong = {
        "soft cap left out": right._replace(transform=LogitTransform(0.5)),
        "scale left out": right._replace(transform=LogitTransform(1.0, 3.0)),
        "weights made alike": right._replace(
            weights=torch.full_like(right.weights, float(right.weights.mean()))
        ),
        "a target moved": right._replace(targets=right.targets.roll(1)),
    }[defect]
    seen = worst("chunked", wrong, twin=in_fp32(right))
    print(f"X6 control, {defect}: {seen:.1e}")
    assert seen >= 10 * BOUND[torch.bfloat16]


def test_confident_tokens_keep_their_small_gradients_in_bf16() -> None:
    """At probability 0.998, softmax - 1 is lost if the softmax is rounded before subtracting."""
    given = case(torch.bfloat16)
    with torch.no_grad():
        given.hidden.copy_(given.weight[given.targets] * 0.5)
    assert worst("chunked", given) <= 2 * max(worst("reference", given), BOUND[torch.bfloat16])


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_head_or_hidden_states_alone_get_their_gradient(trained: str) -> None:
    assert of_one_alone("chunked", case(), trained) <= BOUND[torch.float32]


def test_a_tied_head_gets_both_gradients() -> None:
    tied = (
        torch.randn(203, 16) / 4
    ).requires_grad_()  # at 1 the softmax saturates, and its rounding with it
    ids, targets, weights = torch.arange(9), torch.arange(9) + 100, torch.full((9,), 1 / 9)
    gradients = []
    for kernel in ("chunked", "reference"):
        loss = linear_cross_entropy(
            torch.nn.functional.embedding(ids, tied), tied, targets, weights, kernel
        )
        gradients += torch.autograd.grad(loss, [tied])
    assert relative(*gradients) <= BOUND[torch.float32]


@pytest.mark.parametrize("kernel", ["chunked", "reference", "liger"])
def test_no_trained_position_is_a_zero_with_gradients(kernel: str) -> None:
    hidden, weight = (
        torch.randn(0, 16, requires_grad=True),
        torch.randn(203, 16, requires_grad=True),
    )
    nothing = torch.empty(0)
    loss = linear_cross_entropy(hidden, weight, nothing.long(), nothing, kernel)
    loss.backward()
    assert loss == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()
    assert hidden.grad is not None


# ---------------------------------------------------------------------------------------- workspace


def peak_bytes(work: Any) -> int:
    path = ROOT / "benchmarks" / "loss_memory.py"
    spec = importlib.util.spec_from_file_location("loss_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.peak_bytes(work, torch.device("cpu"))


@pytest.mark.parametrize("vocabulary", [4_096, 65_536])
def test_workspace_stays_under_c_times_tokens_times_hidden(vocabulary: int) -> None:
    n, h = 128, 64
    given = case(torch.bfloat16, shape=(n, h, vocabulary), transform=LogitTransform(0.5, 30.0))
    held = {
        k: peak_bytes(lambda k=k: run(k, given)) - given.weight.numel() * 2
        for k in ("chunked", "reference")
    }
    units = {kernel: round(number / (n * h), 1) for kernel, number in held.items()}
    print(f"X6 workspace, vocabulary {vocabulary}: {units} bytes x N x H")
    assert 0 < held["chunked"] <= WORKSPACE * n * h
    assert held["reference"] > 10 * held["chunked"], "the control: whole logits"


# -------------------------------------------------------------------------------------------- liger


LIGER_CASES = ["plain", "one weight", "bias", "soft cap", "scale, soft cap, bias"]


class Interpreted(float):
    """A float with `to`, which a compiled kernel's numbers have and Triton's interpreter's lack."""

    def to(self, dtype: Any) -> Interpreted:
        return self


def liger_main() -> None:
    """Run in a process of its own: Triton decides at import whether it interprets."""
    import triton.language as tl
    from liger_kernel.ops import cross_entropy

    # CUDA's libdevice, where the kernel takes its tanh from, is not interpreted
    cross_entropy.tanh = lambda x: 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    torch.set_num_threads(1)
    seen = {}
    for variant in LIGER_CASES:
        for dtype in BOUND:
            given = case(dtype, **{**VARIANTS[variant], "shape": (19, 4, 99)})
            if given.transform.softcap:
                given = given._replace(
                    transform=LogitTransform(
                        given.transform.scale, Interpreted(given.transform.softcap)
                    )
                )
            seen[f"{variant}, {dtype}"] = worst("liger", given, incoming=3.0)
    right = case(shape=(7, 16, 99))
    for trained in ("hidden", "weight"):
        seen[f"{trained} alone"] = of_one_alone("liger", right, trained)
    with torch.no_grad():
        loss = linear_cross_entropy(*right[:2], right.targets, right.weights, "liger")
    seen["without gradients"] = relative(loss, run("reference", right)[0])
    with buffers.Counted() as counted:
        run("liger", right)
    seen["waits"] = counted.waits
    seen["control"] = worst(
        "liger", right._replace(transform=LogitTransform(0.5)), twin=in_fp32(right)
    )
    print(json.dumps(seen))


@pytest.fixture(scope="module")
def liger() -> dict[str, float]:
    return interpreted("tests.numerics.test_x6_kernels", "liger_main")


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("variant", LIGER_CASES)
def test_ligers_own_kernel_is_the_reference(
    liger: dict[str, float], variant: str, dtype: torch.dtype
) -> None:
    seen = liger[f"{variant}, {dtype}"]
    print(f"X6 liger (interpreted), {variant}, {dtype}: {seen:.1e}")
    assert seen <= BOUND[dtype]


@pytest.mark.parametrize("what", ["hidden alone", "weight alone", "without gradients"])
def test_liger_makes_the_gradients_that_are_needed(liger: dict[str, float], what: str) -> None:
    assert liger[what] <= BOUND[torch.float32]


def test_the_host_does_not_wait_for_ligers_loss(liger: dict[str, float]) -> None:
    assert liger["waits"] == 0


def test_control_of_liger_shows_tenfold(liger: dict[str, float]) -> None:
    assert liger["control"] >= 10 * BOUND[torch.bfloat16]


# ------------------------------------------------------------------------------------------- choice


def test_auto_takes_chunked_without_a_gpu() -> None:
    assert choose_kernel("auto", torch.device("cpu")) == "chunked"


def test_liger_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BadInput, match="CUDA"):
        choose_kernel("liger", torch.device("cpu"))
