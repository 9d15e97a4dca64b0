"""What a micro-batch costs beyond the model's own work, counted on one rank: bytes that move for
gradients, waits of the host, and the price of exactness.

docs/performance.md has the numbers.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.numerics.test_router_loss import QWEN3_MOE
from tests.ranks import ROOT, run_ranks

# read a gradient, read its sum, write the sum; by template, type of weights, type of sums
BYTES = {
    "zero3-float32-float32-adapter": 4 + 4 + 4,
    "zero3-bfloat16-float32-adapter": 2 + 4 + 4,
    "zero0-float32-float32": 4 + 4 + 4,
    "zero1-float32-float32": 4 + 4 + 4,
    "zero1-bfloat16-float32": 2 + 4 + 4,
    "zero1_streamed-bfloat16-float32": 2 + 4 + 4,
    "zero1-bfloat16-bfloat16": 2 + 2 + 2,
}
# what is trained at stage 3 without an adapter: its hooks hide a backward that keeps no gradient
WHOLE = ("zero3-float32-float32", "zero3-bfloat16-float32", "zero3_streamed-bfloat16-float32")
MORE = ("zero2-float32-float32-muon", "zero3-float32-float32-muon")
MORE += ("zero2-float32-float32-router", "zero3-bfloat16-float32-router", "zero3-bfloat16-float32")
KEYS = {"muon": ["optim.kind=muon"], "adapter": ["adapter={rank: 4}"]}
# at which the host reads the device: the norm, thrice more by DeepSpeed for each of two groups
WAITS_OF_A_STEP = 6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("costs")
    shutil.copytree(ROOT / "recipes" / "debug" / "model", out / "moe")
    config = json.loads((out / "moe" / "config.json").read_text())
    (out / "moe" / "config.json").write_text(json.dumps({**config, **QWEN3_MOE}))
    run_ranks(1, ["-m", "tests.numerics.test_micro_batch_cost", str(out)])
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("name", BYTES)
def test_a_gradient_is_read_once_and_its_sum_once(found: dict[str, Any], name: str) -> None:
    """In the second micro-batch, and in the last one, at which several ranks would reduce."""
    for moved in found[name]["moved"]:
        assert moved == pytest.approx(BYTES[name], abs=0.01)


@pytest.mark.parametrize("name", [*BYTES, *WHOLE])
def test_the_sums_are_deepspeeds_own_bit_by_bit(found: dict[str, Any], name: str) -> None:
    assert found[name]["ours"] == found[name]["deepspeeds"]
    assert all(digest for *_, digest in found[name]["ours"]), "a moment is zero: nothing was summed"


@pytest.mark.parametrize("name", [*BYTES, *MORE])
def test_the_host_waits_in_no_micro_batch(found: dict[str, Any], name: str) -> None:
    """A step of three has as many waits as a step of one: those for its norm, at its end.

    A compiled layer has none either: a read of a tensor would break its graph, which
    tests/unit/test_compiled_layers.py counts.
    """
    one, three = found[name]["waits"]
    assert one == three
    assert set(one) == {"optimizer"}
    assert one["optimizer"] <= WAITS_OF_A_STEP


def test_what_exactness_adds_to_a_micro_batch(found: dict[str, Any]) -> None:
    of = found["price"]
    assert of["packing_check_forwards"] > 0 == of["packing_check_forwards_of_a_step"]
    assert of["operations_of_the_gradient_watch"] == 0
    assert of["operations_of_a_filler"] <= of["operations_of_a_micro_batch"]


def overrides_of(name: str, out: Path) -> list[str]:
    stage, dtype, grad_dtype, *more = name.split("-")
    keys = {**KEYS, "router": ["loss.router_aux=0.1", f"model.name={out / 'moe'}"]}
    return [
        *(f"run.dir={out}", f"parallel.deepspeed={stage}", f"model.dtype={dtype}"),
        *(f"parallel.grad_dtype={grad_dtype}", "loss.neftune_alpha=0"),
        *(key for change in more for key in keys[change]),
    ]


def one_batch() -> Any:
    from packhorse.trainer.data.loader import filler_batch

    ids, trained = torch.arange(5, 13), torch.tensor([0, 1, 2, 3, 5, 6])
    return replace(
        filler_batch(tokens=8),
        input_ids=ids,
        position_ids=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]),
        cu_seqlens=torch.tensor([0, 5, 8], dtype=torch.int32),
        lengths=(5, 3),
        trained_positions=trained,
        targets=ids[trained + 1],
        weights=torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 1.0]),
        document_keys=((0, 0, 0), (0, 1, 0)),
    )


def step(engine: Any, micro_batches: int, clock: Any = None) -> None:
    from packhorse.trainer import dist
    from packhorse.trainer.metrics import Clock

    engine.step([one_batch()] * micro_batches, 1e-3, clock or Clock(dist.device()))


def digests(engine: Any) -> list[Any]:
    step(engine, 3)
    step(engine, 3)
    return sorted([*key, value] for key, value in engine.state.digests().items())


def gradient_bytes(engine: Any) -> list[float]:
    """Return the bytes a parameter of the second and the third of three micro-batches, without
    those of a backward that keeps no gradient.
    """
    from tests.numerics import buffers

    trained = [p for p in engine.module.parameters() if p.requires_grad]
    loss = engine.module(one_batch()) * 1
    with buffers.Counted() as plain:
        torch.autograd.grad(loss, trained)
    moved = []
    for is_last in (False, False, True):
        loss = engine._forward(one_batch(), is_last)
        with buffers.Counted() as backward:
            engine._backward(loss)
        rest = backward.total - plain.total
        moved.append(rest / sum(p.numel() for p in trained))
    return moved[1:]


def waits(engine: Any, micro_batches: int) -> dict[str, int]:
    """Return how often a step reads the device's numbers, or waits for it, by its parts."""
    from deepspeed.accelerator import get_accelerator

    from tests.numerics import buffers

    seen: dict[str, int] = {}

    class Parts:
        @contextmanager
        def part(self, name: str) -> Iterator[None]:
            with (
                mock.patch.object(get_accelerator(), "synchronize") as synchronize,
                buffers.Counted() as counted,
            ):
                yield
            total = synchronize.call_count + counted.waits
            if total:
                seen[name] = seen.get(name, 0) + total

    step(engine, micro_batches, Parts())
    return seen


def price(engine: Any, watched: Any, forwards: int) -> dict[str, int]:
    """Return counts of what exactness adds.

    Args:
        engine: at stage 1.
        watched: at stage 3, which watches gradients.
        forwards: of the decoder, in the packing check.
    """
    from packhorse.trainer.data.loader import filler_batch
    from tests.numerics import buffers

    def operations(of: Any, batch: Any) -> int:
        loss = of._forward(batch, False)
        with buffers.Counted() as counted:
            of._backward(loss)
        return counted.operations

    operations(engine, one_batch())  # a step's first gradients are not added to others
    counts = {
        "operations_of_a_micro_batch": operations(engine, one_batch()),
        "operations_of_a_filler": operations(engine, filler_batch()),
    }
    with_watch = operations(watched, one_batch())
    watched._gradient_watch = None
    with count_forwards() as of_a_step:
        without = operations(watched, one_batch())
    return counts | {
        "operations_of_the_gradient_watch": with_watch - without,
        "packing_check_forwards": forwards,
        "packing_check_forwards_of_a_step": len(of_a_step) - 1,
    }


@contextmanager
def count_forwards() -> Iterator[list[None]]:
    """Add to a list at each forward of the debug model's decoder in the block."""
    calls: list[None] = []

    def hook(module: Any, _: Any) -> None:
        if type(module).__name__ == "LlamaModel":
            calls.append(None)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    yield calls
    handle.remove()


def main(out: Path) -> None:
    """Build an engine of every case, and one without our sums, and count."""
    from packhorse.trainer import dist
    from packhorse.trainer.build_engine import build_engine
    from packhorse.trainer.engine import engine
    from packhorse.trainer.model.load import load_tokenizer
    from tests.numerics.cases import load_recipe

    def build(name: str) -> Any:
        recipe = load_recipe(ROOT / "recipes" / "debug.yaml", overrides_of(name, out))
        return build_engine(recipe, out, load_tokenizer(recipe.model))

    found: dict[str, Any] = {}
    with dist.process_group():
        for name in BYTES:
            ours = build(name)
            with mock.patch.object(engine, "shorten_gradient_sums"):
                deepspeeds = build(name)
            found[name] = {"ours": digests(ours), "deepspeeds": digests(deepspeeds)}
            found[name]["waits"] = [waits(ours, count) for count in (1, 3)]
            found[name]["moved"] = gradient_bytes(ours)
        for name in WHOLE:
            built = build(name)
            with mock.patch.object(engine, "shorten_gradient_sums"):
                found[name] = {"ours": digests(built), "deepspeeds": digests(build(name))}
        for name in MORE:
            with count_forwards() as forwards:
                built = build(name)
            step(built, 2)
            step(
                built, 1
            )  # DeepSpeed compares its order of gathers with other ranks' in the second
            found.setdefault(name, {})["waits"] = [waits(built, count) for count in (1, 3)]
            if name == "zero3-bfloat16-float32":
                found["price"] = price(ours, built, len(forwards))
    (out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    import os

    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
