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
    "zero2-float32-float32": 4 + 4 + 4,
    "zero2-bfloat16-float32": 2 + 4 + 4,
    "zero2-bfloat16-bfloat16": 2 + 2 + 2,
    "zero1-bfloat16-bfloat16": 2 + 2 + 2,
}
# what is trained at stage 3 without an adapter: its hooks hide a backward that keeps no gradient
WHOLE = ("zero3-float32-float32", "zero3-bfloat16-float32", "zero3_streamed-bfloat16-float32")
MORE = ("zero2-float32-float32-muon", "zero3-float32-float32-muon")
MORE += ("zero2-float32-float32-router", "zero3-bfloat16-float32-router", "zero3-bfloat16-float32")
# two groups of parameters, but for an adapter's one
OF_TWO_RANKS = (
    *("zero0-float32-float32", "zero1-float32-float32", "zero1-bfloat16-float32"),
    *("zero2-float32-float32", "zero2-bfloat16-float32", "zero2-bfloat16-float32-adapter"),
    *("zero3-bfloat16-float32", "zero3_streamed-bfloat16-float32"),
)
KEYS = {"muon": ["optim.kind=muon"], "adapter": ["adapter={rank: 4}"]}


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
def test_the_host_waits_once_a_step(found: dict[str, Any], name: str) -> None:
    """For the norm, at the end, and for the loss with it, if a guard looks at losses; never in a
    micro-batch.

    A compiled layer does not wait either: a read of a tensor would break its graph, which
    tests/unit/test_compiled_layers.py counts.
    """
    assert found[name]["waits"] == [{"optimizer": 1}] * len(STEPS)


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("costs")
    run_ranks(2, ["-m", "tests.numerics.test_micro_batch_cost", str(out)])
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("name", OF_TWO_RANKS)
def test_each_of_two_ranks_waits_once_a_step(of_two_ranks: dict[str, Any], name: str) -> None:
    assert of_two_ranks[name] == [[{"optimizer": 1}] * len(STEPS)] * 2


@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank_with_its_optimizer_offloaded_gets_its_gradients(
    found: dict[str, Any], stage: int
) -> None:
    """There DeepSpeed copies them to the host where several ranks reduce."""
    plain, offloaded = found["norms"]["plain"], found["norms"][f"offloaded-{stage}"]
    assert plain[0] > 1
    assert offloaded == pytest.approx(plain, rel=1e-6)


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


def step(engine: Any, micro_batches: int) -> float:
    from packhorse.trainer import dist
    from packhorse.trainer.metrics import Clock

    return engine.step([one_batch()] * micro_batches, 1e-3, Clock(dist.device())).grad_norm


def norms(engine: Any) -> list[float]:
    return [step(engine, 2) for _ in range(2)]


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


# micro-batches, and what a guard says of their loss
STEPS: tuple[tuple[int, Any], ...] = ((1, None), (3, None), (3, lambda loss: None))
STEPS += ((3, lambda loss: "refused"),)


def waits(engine: Any) -> list[dict[str, int]]:
    return [waits_of(engine, *kind) for kind in STEPS]


def waits_of(engine: Any, micro_batches: int, check_loss: Any) -> dict[str, int]:
    """Return how often a step reads the device's numbers, or waits for it, by its parts."""
    from deepspeed.accelerator import get_accelerator

    from packhorse.trainer import dist
    from tests.numerics import buffers

    accelerator = get_accelerator()
    seen: dict[str, int] = {}
    batches = [one_batch()] * micro_batches
    # With a GPU's streams, which a CPU does not have, DeepSpeed waits for what several ranks reduce
    # beside the backward, and at stage 3 for each micro-batch's gradients.
    needs_streams = dist.world_size() > 1 or engine.stage == 3

    with (
        mock.patch.object(accelerator, "resolves_data_dependency", return_value=needs_streams),
        mock.patch.object(accelerator, "synchronize") as synchronize,
        buffers.Counted() as counted,
    ):

        class Parts:
            @contextmanager
            def part(self, name: str) -> Iterator[None]:
                before = counted.waits + synchronize.call_count
                yield
                now = counted.waits + synchronize.call_count
                seen[name] = seen.get(name, 0) + now - before

        engine.step(batches, 1e-3, Parts(), check_loss)
    seen["between them"] = counted.waits + synchronize.call_count - sum(seen.values())
    return {part: count for part, count in seen.items() if count}


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
    """Build an engine of every case, and on one rank one without our sums, and count."""
    from packhorse.trainer import dist
    from packhorse.trainer.build_engine import build_engine
    from packhorse.trainer.engine import engine
    from packhorse.trainer.model.load import load_tokenizer
    from tests.numerics.cases import load_recipe

    def build(name: str, *more: str) -> Any:
        recipe = load_recipe(ROOT / "recipes" / "debug.yaml", [*overrides_of(name, out), *more])
        return build_engine(recipe, out, load_tokenizer(recipe.model))

    found: dict[str, Any] = {}
    with dist.process_group():
        one = dist.world_size() == 1
        for name in () if one else OF_TWO_RANKS:
            built = build(name)
            step(built, 2)
            step(built, 1)  # as below
            found[name] = dist.gather(waits(built))
        for name in BYTES if one else ():
            ours = build(name)
            with mock.patch.object(engine, "shorten_gradient_sums"):
                deepspeeds = build(name)
            found[name] = {"ours": digests(ours), "deepspeeds": digests(deepspeeds)}
            found[name]["waits"] = waits(ours)
            found[name]["moved"] = gradient_bytes(ours)
        if one:
            found["norms"] = {"plain": norms(build("zero1-float32-float32"))}
            for stage in (1, 2):
                zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
                template = out / f"offloaded{stage}.json"
                template.write_text(json.dumps({"zero_optimization": zero}))
                offloaded = build("zero1-float32-float32", f"parallel.deepspeed={template}")
                found["norms"][f"offloaded-{stage}"] = norms(offloaded)
        for name in WHOLE if one else ():
            built = build(name)
            with mock.patch.object(engine, "shorten_gradient_sums"):
                found[name] = {"ours": digests(built), "deepspeeds": digests(build(name))}
        for name in MORE if one else ():
            with count_forwards() as forwards:
                built = build(name)
            step(built, 2)
            step(
                built, 1
            )  # DeepSpeed compares its order of gathers with other ranks' in the second
            found.setdefault(name, {})["waits"] = waits(built)
            if name == "zero3-bfloat16-float32":
                found["price"] = price(ours, built, len(forwards))
        if dist.is_main():
            (out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    import os

    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
