"""Time of the loss, forward and backward, for each kernel on heads of real models; beside it how
exact and how big.

    python benchmarks/loss_speed.py [--rounds 5]
    python benchmarks/loss_speed.py --tiny          (a dry run)

Liger stands there with c = 1, its own, and c = LIGER_HIDDEN, ours: it makes the logits of c x
hidden x tokens / vocabulary positions at a time. Errors are of the hidden states' gradient and of
the weight's, against fp32. Prints a markdown table and writes it to
benchmarks/results/loss_speed_<device>.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import machine, spread
from common import table as markdown
from loss_memory import peak_bytes

from packhorse.trainer.model import liger_loss
from packhorse.trainer.model.liger_loss import LIGER_HIDDEN
from packhorse.trainer.model.loss import linear_cross_entropy

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {  # trained positions, hidden size, vocabulary
    "Qwen2.5-1.5B": (8192, 1536, 151936),
    "Llama-3.1-8B": (8192, 4096, 128256),
    "SmolLM2-135M, a third trained": (2730, 576, 49152),
}
TINY = {"tiny": (96, 64, 4099)}
ON_CPU = {"SmolLM2-135M, a row of 512": (512, 576, 49152)}


class Case:
    """A head and hidden states in bf16; each position has the weight 1 / N."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        n, hidden, vocabulary = shape
        draw = torch.Generator(device).manual_seed(0)
        self.hidden = (
            torch.randn(n, hidden, device=device, generator=draw).bfloat16().requires_grad_()
        )
        head = torch.randn(vocabulary, hidden, device=device, generator=draw) * hidden**-0.5
        self.head = head.bfloat16().requires_grad_()
        self.targets = torch.randint(vocabulary, (n,), device=device, generator=draw)
        self.weights = torch.full((n,), 1 / n, device=device)

    def run(self, kernel: str) -> tuple[torch.Tensor, ...]:
        """The gradients of hidden states and head."""
        total = linear_cross_entropy(self.hidden, self.head, self.targets, self.weights, kernel)
        return torch.autograd.grad(total, [self.hidden, self.head])

    def true_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In fp32, some positions at a time."""
        hidden, head = self.hidden.detach().float(), self.head.detach().float()
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        for rows in torch.arange(len(hidden), device=hidden.device).split(256):
            grad = (hidden[rows] @ head.T).softmax(-1)
            grad.scatter_add_(1, self.targets[rows, None], -torch.ones_like(grad[:, :1]))
            grad *= self.weights[rows, None]
            grad_hidden[rows] = grad @ head
            grad_head.addmm_(grad.T, hidden[rows])
        return grad_hidden, grad_head


@contextmanager
def liger_parts(c: int) -> Iterator[None]:
    before, liger_loss.LIGER_HIDDEN = liger_loss.LIGER_HIDDEN, c
    try:
        yield
    finally:
        liger_loss.LIGER_HIDDEN = before


def times_ms(work: Callable[[], object], rounds: int, device: torch.device) -> list[float]:
    """Of each round, after two that warm up; on a GPU until it has ended."""
    found = []
    for number in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            found.append(1000 * (time.perf_counter() - began))
    return found


def rows(name: str, case: Case, rounds: int, device: torch.device) -> list[list[str]]:
    true = case.true_gradients()
    arms = [
        ("reference", 0),
        ("chunked", 0),
        *([("liger", c) for c in (1, LIGER_HIDDEN)] if device.type == "cuda" else []),
    ]
    found = []
    for kernel, c in arms:
        with liger_parts(c or LIGER_HIDDEN):
            errors = [
                float((a.float() - b).norm() / b.norm())
                for a, b in zip(case.run(kernel), true, strict=True)
            ]
            times = times_ms(lambda kernel=kernel: case.run(kernel), rounds, device)
            mib = peak_bytes(lambda kernel=kernel: case.run(kernel), device) / 2**20
        label = f"{kernel}, c = {c}" if c else kernel
        found.append(
            [
                name,
                label,
                spread(times, "{:.1f}"),
                f"{mib:.0f}",
                *(f"{error:.1e}" for error in errors),
            ]
        )
        print(" | ".join(found[-1]), flush=True)
    fastest = min(found, key=lambda row: float(row[2].split()[0]))
    fastest[1] = f"**{fastest[1]}**"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tiny", action="store_true", help="a small head: shows that it runs, no speed"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = TINY if options.tiny else SHAPES if device.type == "cuda" else ON_CPU
    head = ["head", "kernel", "ms", "peak memory, MiB", "error, hidden", "error, weight"]
    lines = [
        row
        for name, shape in shapes.items()
        for row in rows(name, Case(shape, device), options.rounds, device)
    ]
    where = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    versions = ("torch", "liger-kernel") if device.type == "cuda" else ("torch",)
    text = f"""# Time of the loss

`python benchmarks/loss_speed.py`: forward and backward of the head and the loss in bfloat16, median
of {options.rounds} (lowest to highest).

- {where}
{machine(versions)}

{markdown(head, lines)}
"""
    print(text)
    if not options.tiny:
        (RESULTS / f"loss_speed_{device.type}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
