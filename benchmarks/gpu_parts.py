"""The parts of a training step by themselves, on one card: products, attention, a layer, the loss.

    python benchmarks/gpu_parts.py [--shape 8B] [--out parts.jsonl]           (about a minute)
    python benchmarks/gpu_parts.py --tiny                                     (CPU, a dry run)

One micro-batch of 8192 tokens in documents of real lengths, forward and backward. Each part is a
line that is written as soon as it is measured: milliseconds (median of its calls, compilation and
the first calls left out), what was predicted for an H200 (docs/performance.md), and TFLOP/s of
matrix products and attention. A part that fails is a line with the error, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_cases import CASES, TINY

from packhorse.trainer.attention_choice import milliseconds
from packhorse.trainer.model import attention, fp8, liger_layers
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.attention_kernels import Arguments, Bounds
from packhorse.trainer.model.compiled_layers import compile_layers
from packhorse.trainer.model.decoder import decoder_layers, decoder_of
from packhorse.trainer.model.loss import linear_cross_entropy

SHAPES = {case.name: case.shape for case in CASES}
# Milliseconds of a micro-batch of 8192 trained tokens on an H200, of one layer but for the loss:
# products at 600 to 650 TFLOP/s; 8B has 8/3 of the channels that attend, and twice the elementwise.
# By the beginning of a part's name.
PREDICTED_MS = {
    "1.5B": {"products": 107 / 28, "attention": 1, "loss": 21, "layer liger, none": 154 / 28},
    "8B": {"products": 16.5, "fp8": 16.5 / 1.4, "attention": 8 / 3, "loss": 43}
    | {"layer liger, none": 20.5, "layer liger, full": 27},
}
Part = tuple[str, Callable[[], Any], float]  # name, what is timed, FLOPs of it or 0


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES], default="1.5B")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    parser.add_argument("--budget-s", type=float, help="parts that come later are left out")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.tiny else "cuda")
    lines, started_s = [], time.monotonic()
    for name, work, flops in parts(options.shape, device, tiny=options.tiny):
        line: dict[str, Any] = {"shape": "tiny" if options.tiny else options.shape, "part": name}
        try:
            line["ms"] = round(milliseconds(work, device), 3)
        except Exception as error:  # a kernel that this card or torch cannot run
            line["error"] = f"{type(error).__name__}: {error}"[:200]
        for start, predicted in PREDICTED_MS.get(line["shape"], {}).items():
            line |= {"predicted_ms": round(predicted, 2)} if name.startswith(start) else {}
        line |= {"tflops": round(flops / line["ms"] / 1e9, 1)} if flops and "ms" in line else {}
        print(json.dumps(line), flush=True)
        if options.out:
            with options.out.open("a") as out:
                out.write(json.dumps(line) + "\n")
        lines.append(line)
        if options.budget_s and time.monotonic() - started_s > options.budget_s:
            break
    return lines


def parts(name: str, device: torch.device, *, tiny: bool) -> Iterator[Part]:
    """Give the parts of a model's shape, each when it is asked for: none holds memory before."""
    shape = SHAPES[name] | (TINY if tiny else {})
    tokens = 128 if tiny else 8192
    dtype = torch.float32 if tiny else torch.bfloat16
    lengths = document_lengths(tokens)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    bounds = Bounds(ends, max(lengths), lengths)
    for in_fp8 in (False,) if tiny else (False, True):
        yield products(shape, tokens, device, dtype, in_fp8)
    # on a card the reference would hold all scores
    for kernel in ("reference",) if tiny else attention.fused_kernels(device, dtype):
        yield attention_part(kernel, shape, bounds, device, dtype)
    for mode in ("none", "selective", "full"):
        for kernels in ("torch", *(() if tiny else ("liger",))):
            yield layer_part(shape, bounds, mode, kernels, device, dtype)
    for mode in () if tiny else ("none", "full"):
        yield layer_part(shape, bounds, mode, "compiled", device, dtype)
    for kernel in ("chunked",) if tiny else ("liger", "chunked"):
        yield loss_part(kernel, shape, tokens, device, dtype)


def document_lengths(tokens: int) -> tuple[int, ...]:
    """Return lengths that fill `tokens`, log-normal as those of gpu.py."""
    draw, lengths = random.Random(0), []
    while (left := tokens - sum(lengths)) > 0:
        drawn = max(16, int(draw.lognormvariate(0.0, 0.9) * tokens / 6))
        lengths.append(left if left < 32 else min(drawn, left))
    return tuple(lengths)


def products(
    shape: dict[str, Any], tokens: int, device: torch.device, dtype: torch.dtype, in_fp8: bool
) -> Part:
    """Time the seven products of a layer."""
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    sizes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, wide)] * 2 + [(wide, hidden)]
    layers = [torch.nn.Linear(*size, bias=False, device=device, dtype=dtype) for size in sizes]
    for layer in layers if in_fp8 else ():
        layer.__class__ = fp8.Fp8Linear
    given = {n: torch.randn(tokens, n, device=device, dtype=dtype) for n in (hidden, wide)}
    given = {n: x.requires_grad_() for n, x in given.items()}

    def run() -> None:
        for layer in layers:
            factors = given[layer.in_features], layer.weight
            out = layer(factors[0])
            torch.autograd.grad(out, factors, out.detach())

    return (
        "fp8 products" if in_fp8 else "products",
        run,
        6.0 * tokens * sum(m * n for m, n in sizes),
    )


def attention_part(
    name: str, shape: dict[str, Any], bounds: Bounds, device: torch.device, dtype: torch.dtype
) -> Part:
    heads, size = shape["num_attention_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    numbers = (heads, shape["num_key_value_heads"], shape["num_key_value_heads"])
    tokens = sum(bounds.lengths)
    qkv = [torch.randn(1, n, tokens, size, device=device, dtype=dtype) for n in numbers]
    qkv = [x.requires_grad_() for x in qkv]
    kernel = getattr(attention.attention_kernels, attention.pin(name))
    asked = Arguments(None, None, None, None, None, bounds)

    def run() -> None:
        attention.pin(name)
        out = kernel("layer", *qkv, asked)
        torch.autograd.grad(out, qkv, out.detach())

    # two products forward and five backward, over causal pairs within documents
    pairs = sum(n * n for n in bounds.lengths) / 2
    return f"attention {name}", run, 7 * 2.0 * heads * size * pairs


def layer_part(
    shape: dict[str, Any],
    bounds: Bounds,
    mode: str,
    kernels: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Part:
    def run() -> None:
        if not made:  # its errors are the part's
            made.append(build_layer(shape, bounds, mode, kernels, device, dtype))
        out = made[0]()
        out.backward(out.detach())

    made: list[Callable[[], Any]] = []
    return f"layer {kernels}, {mode} recomputed", run, 0.0


def build_layer(
    shape: dict[str, Any],
    bounds: Bounds,
    mode: str,
    kernels: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], Any]:
    """Return a call of a model's layer with the arguments that its decoder gives it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {**shape, "num_hidden_layers": 1}
    backend, _ = attention.choose("auto", device, dtype)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind.pop("model_type"), **kind),
        dtype=dtype,
        attn_implementation=attention.implementation(backend),
    ).to(device)
    if kernels == "compiled":
        compile_layers(model, checkpointing=mode == "full")
    else:
        liger_layers.fuse(model, kernels, device, dtype)
        set_checkpointing(model.train(), mode)
    calls: list[tuple[Any, Any]] = []
    (layer,) = decoder_layers(model.train())

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    positions = torch.cat([torch.arange(n, device=device) for n in bounds.lengths])[None]
    given = {"position_ids": positions, "document_bounds": bounds, "use_cache": False}
    with torch.no_grad():
        decoder_of(model)(input_ids=torch.zeros_like(positions), **given)
    hook.remove()
    (first, *rest), kwargs = calls[0]
    first = first.detach().requires_grad_()

    def call() -> Any:
        out = layer(first, *rest, **kwargs)
        return out if isinstance(out, torch.Tensor) else out[0]

    return call


def loss_part(
    kernel: str, shape: dict[str, Any], trained: int, device: torch.device, dtype: torch.dtype
) -> Part:
    sizes = (trained, shape["hidden_size"]), (shape["vocab_size"], shape["hidden_size"])
    hidden, head = (torch.randn(*s, device=device, dtype=dtype).requires_grad_() for s in sizes)
    targets = torch.arange(trained, device=device) % shape["vocab_size"]
    weights = torch.full((trained,), 1 / trained, device=device)

    def run() -> None:
        linear_cross_entropy(hidden, head, targets, weights, kernel).backward()

    return f"loss {kernel}", run, 6.0 * trained * sizes[1][0] * sizes[1][1]


if __name__ == "__main__":
    main()
