"""Layers' inputs in the host's memory: the same gradients, fetched ahead, in blocks used again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from packhorse.trainer.config.recipe import LossSection
from packhorse.trainer.estimate.model import trace_activations
from packhorse.trainer.model import activation_offload
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.activation_offload import HostMemory, InOrder
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.lora import not_in_shards
from packhorse.trainer.model.reach import freeze_unreached
from packhorse.trainer.model.sft import SftModel
from tests.model_helpers import CPU, SIZES, documents, loss_and_gradients, pack, sft, tiny_llama

LAYERS, TOKENS = 5, 137
INPUT_BYTES = TOKENS * SIZES["hidden_size"] * 4
BLOCK = 4096


class Recorded(InOrder):
    """A stream that notes its copies and who waits for which of them, and copies late: once a copy
    is waited for, and no sooner.
    """

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.pending: list[list[Any]] = []

    @contextmanager
    def copying(self) -> Iterator[None]:
        copies: list[Any] = []
        copy = torch.Tensor.copy_

        def later(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
            assert non_blocking
            copies.append((into, source))

        with mock.patch.object(torch.Tensor, "copy_", later):
            yield
        self.pending.append([(copy, *tensors) for tensors in copies])
        self.events.append(("copy", len(self.pending)))

    def mark(self) -> Any:
        return len(self.pending)

    def wait_for(self, mark: Any) -> None:
        self.events.append(("wait", mark))
        for copies in self.pending[:mark]:  # those of a stream are done in order
            for copy, into, source in copies:
                copy(into, source)
            copies.clear()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "SMALLEST_BYTES", INPUT_BYTES)
    monkeypatch.setattr(activation_offload, "BLOCK_BYTES", BLOCK)


def batch() -> Any:
    ids = documents((90, 40, 7))
    return pack(ids, [range(len(document) - 1) for document in ids], [0.02] * 3)


def offloading(stream: InOrder) -> tuple[SftModel, HostMemory]:
    model = tiny_llama(num_hidden_layers=LAYERS)
    set_checkpointing(model, "offload")
    made = SftModel(model, LossSection(), 0, CPU, offload=True)
    made.transform = LogitTransform()
    made._host = HostMemory(stream, pinned=False)
    return made, made._host


@pytest.mark.parametrize("stream", [InOrder(), Recorded()])
def test_no_gradient_changes_by_a_bit(stream: InOrder) -> None:
    kept = tiny_llama(num_hidden_layers=LAYERS)
    set_checkpointing(kept, "full")
    loss, gradients = loss_and_gradients(sft(kept), batch())
    made, _ = offloading(stream)
    for _ in range(2):  # the second in the first one's blocks
        again_loss, again = loss_and_gradients(made, batch())
        assert again_loss == loss
        assert all(torch.equal(again[name], gradients[name]) for name in gradients)


def test_the_next_layers_input_comes_while_a_layer_is_recomputed() -> None:
    stream = Recorded()
    made, memory = offloading(stream)
    with mock.patch.object(memory, "_give", wraps=memory._give) as given:
        given.side_effect = lambda saved: stream.events.append("asked") or mock.DEFAULT
        loss = made(batch())
        sent = [event for event in stream.events if event != "asked"]
        stream.events.clear()
        loss.backward()
    number = sum(event[0] == "copy" for event in sent)
    assert number >= LAYERS, "and what the norm at the end keeps"
    assert sent[:6] == [*(("copy", n) for n in (1, 2, 3)), ("wait", 1), ("copy", 4), ("wait", 2)]
    # small tensors are asked for too, without an event; the last two have not left the device
    steps = "".join(map(str, stream.events)).split("asked")
    last = 2 * number - activation_offload.IN_FLIGHT
    expected = [f"{('wait', number)}", f"{('wait', number - 1)}{('copy', number + 1)}"]
    expected += [f"{('wait', n)}{('copy', n + 1)}" for n in range(number + 1, last)]
    assert [step for step in steps if step] == [*expected, f"{('wait', last)}"]


def test_blocks_are_used_again() -> None:
    made, memory = offloading(InOrder())
    with mock.patch.object(memory, "_block", wraps=memory._block) as taken:
        for _ in range(3):
            loss_and_gradients(made, batch())
            gc.collect()
            free = len(memory._free)
    assert free == taken.call_count / 3, "each forward takes all of them, and gives them back"


def test_as_much_goes_out_as_the_planner_says() -> None:
    made, memory = offloading(InOrder())
    sent: dict[int, torch.Tensor] = {}  # alive, so that an address comes once
    with mock.patch.object(memory, "_send", wraps=memory._send) as send:
        send.side_effect = lambda tensor: sent.update({tensor.data_ptr(): tensor}) or mock.DEFAULT
        loss_and_gradients(made, batch())
    planned = trace_activations(made.model.to("meta"), TOKENS)["offload"]
    assert planned.kept == 2 * INPUT_BYTES
    out = sum(tensor.nbytes for tensor in sent.values() if tensor.nbytes >= INPUT_BYTES)
    assert out == pytest.approx(planned.host, rel=0.1)


def test_nothing_is_held_without_a_backward_that_gives_it_back() -> None:
    """As at the start, where the graph of a document shows what it reaches."""
    made, memory = offloading(InOrder())
    made.train()
    with mock.patch.object(memory, "_send", wraps=memory._send) as send:
        forward = partial(made.hidden_states, batch())
        assert not freeze_unreached(made.model, forward, not_in_shards)
    assert not send.called
    assert made.model.training


def test_views_of_weights_stay_and_what_is_saved_is_freed() -> None:
    memory = HostMemory(InOrder(), pinned=False)
    weight = torch.nn.Parameter(torch.randn(TOKENS, 32))
    x = torch.randn(TOKENS, 32, requires_grad=True)
    with memory.holding():
        y = x @ weight.t().mT.mT  # a view of a view
        small = y[:1].exp()  # which saves its own output
    assert [saved.shape for saved in memory._order] == [x.shape]
    alive = weakref.ref(small)
    small.sum().backward()
    expected = small.detach().T @ x.detach()[:1]
    assert weight.grad is not None
    del small, y
    gc.collect()
    assert alive() is None
    assert len(memory._free) == -(-INPUT_BYTES // BLOCK)
    assert torch.allclose(weight.grad, expected)
