"""Keep AdamW's master weights and moments on the host, and update them on the device by chunks.

In: flat fp32 masters, which DeepSpeed made on the device, and the model's weights that follow them.
Out: an AdamW whose state takes memory of the host alone. A chunk is copied in, updated by the same
kernel as ever, rounded into the model's weights and copied out; two chunks are under way at a time.
Gradients stay on the device, so that only a step pays for the copies and no micro-batch does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.adamw import adamw

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput

# Elements of a chunk: 64 MiB of each state, which a copy over PCIe takes at full speed, and 384 MiB
# of the device for two chunks. A multiple of every vector's length, so that a CPU's kernel
# treats each element as it does in one piece.
CHUNK = 2**24
STATES = 3  # of an element: the master weight and two moments, 4 bytes each


def room_for_chunks(masters: Iterable[int]) -> int:
    """Return the bytes on the device for chunks of master weights of so many elements each."""
    return 2 * STATES * 4 * min(CHUNK, max(masters))


class HostMaster(torch.Tensor):
    """A leaf on the device in the shape of master weights that lie on the host.

    To DeepSpeed it is the master: it takes the shape and the type, sets the gradient, and after a
    step copies `data` into the model's weights. The step has written those already, so `data` is
    those weights themselves, and the copy changes nothing.
    """

    host: torch.Tensor  # (n,) float32, page-locked where the device is a GPU
    weights: torch.Tensor  # (n,) the model's own, in its type
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.weights


def move_to_host(master: torch.Tensor, weights: torch.Tensor) -> HostMaster:
    """Return the stand-in for a master; a copy of the master is on the host then, and only there.

    Args:
        master: (n,) float32, on the device; its memory is freed.
        weights: (n,) the model's weights that follow it.
    """
    stand_in = torch.zeros(1, device=master.device).expand(master.numel()).as_subclass(HostMaster)
    stand_in.host = page_locked(master.detach().to("cpu", copy=True))
    stand_in.weights = weights
    # DeepSpeed has views of it, which nothing reads; with fp32 weights it may be the weights
    if master.untyped_storage().data_ptr() != weights.untyped_storage().data_ptr():
        master.untyped_storage().resize_(0)
    stand_in.requires_grad_()
    return stand_in


class StreamedAdamW(torch.optim.AdamW):
    """AdamW for parameters that are HostMasters. `state` belongs to their copies on the host."""

    _chunks: _Chunks

    def attach(self, stand_ins: Mapping[int, HostMaster]) -> None:
        """Take the stand-ins, by the ids of the masters that DeepSpeed gave this optimizer.

        The caller makes the moments of each one's `host`.
        """
        for group in self.param_groups:
            group["params"] = [stand_ins[id(master)] for master in group["params"]]
        self._chunks = _Chunks(max(one.numel() for one in stand_ins.values()))

    def wait(self) -> None:
        """Wait until the host holds what the last step computed."""
        self._chunks.wait()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._chunks.begin()
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._step_by_chunks(master, group)

    def _step_by_chunks(self, master: HostMaster, group: Mapping[str, Any]) -> None:
        state, gradient = self.state[master.host], master.grad
        assert gradient is not None
        updates = state.pop("step", 0)
        beta1, beta2 = group["betas"]
        names = ("lr", "weight_decay", "eps", "maximize")
        on_host = (master.host, *state.values())
        for first in range(0, master.numel(), CHUNK):
            place = slice(first, min(first + CHUNK, master.numel()))
            with self._chunks.on_device([flat[place] for flat in on_host]) as on_device:
                weight, exp_avg, exp_avg_sq = on_device
                # the kernel counts it up, as it does for a whole master
                count = torch.full((), float(updates), device=weight.device)
                adamw(
                    [weight],
                    [gradient[place]],
                    [exp_avg],
                    [exp_avg_sq],
                    [],  # amsgrad's
                    [count],
                    **{name: group[name] for name in names},
                    **{"beta1": beta1, "beta2": beta2, "amsgrad": False, "fused": True},
                )
                master.weights[place].copy_(weight)
        state["step"] = updates + 1


class _Chunks:
    """Room for two chunks on the device. On a GPU one is copied while the other is updated."""

    def __init__(self, longest: int) -> None:
        device = dist.device()
        self._room = torch.empty(2, STATES, min(CHUNK, longest), device=device)
        self._count = 0
        self._inward: Any = None
        self._outward: Any = None
        if device.type == "cuda":
            self._inward, self._outward = torch.cuda.Stream(), torch.cuda.Stream()
            # the room may be memory whose last use is still to come on the current stream
            self._inward.wait_stream(torch.cuda.current_stream())
            self._is_free = [torch.cuda.Event(), torch.cuda.Event()]

    def begin(self) -> None:
        """Let the next copy in see what the copies out before it write."""
        if self._inward:
            self._inward.wait_stream(self._outward)

    def wait(self) -> None:
        if self._outward:
            self._outward.synchronize()

    @contextmanager
    def on_device(self, on_host: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Hold copies of these tensors on the device; at the end they are copied back."""
        turn, self._count = self._count % 2, self._count + 1
        copies = list(self._room[turn, :, : on_host[0].numel()])
        if not self._inward:
            _copy(copies, on_host)
            yield copies
            _copy(on_host, copies)
            return
        computing = torch.cuda.current_stream()
        self._inward.wait_event(self._is_free[turn])
        with torch.cuda.stream(self._inward):
            _copy(copies, on_host)
        computing.wait_stream(self._inward)
        yield copies
        self._outward.wait_stream(computing)
        with torch.cuda.stream(self._outward):
            _copy(on_host, copies)
        self._is_free[turn].record(self._outward)


def _copy(to: Iterable[torch.Tensor], source: Iterable[torch.Tensor]) -> None:
    for target, tensor in zip(to, source, strict=True):
        target.copy_(tensor, non_blocking=True)


def page_locked(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, whose memory a GPU may now read and write by itself.

    torch's own pinned memory takes the next power of two, up to twice as many bytes. Every rank
    calls it equally often.

    Raises:
        BadInput: a rank's host does not let so much memory be locked.
    """
    if dist.device().type == "cuda":
        runtime: Any = torch.cuda.cudart()
        address = tensor.data_ptr()
        own_error = int(runtime.cudaHostRegister(address, tensor.nbytes, 0))
        if not own_error:
            weakref.finalize(tensor, runtime.cudaHostUnregister, address)
        # a rank that raised alone would leave the others in their next collective
        if error := max(dist.gather(own_error)):
            raise BadInput(
                f"parallel.deepspeed: {tensor.nbytes / 2**30:.1f} GiB of the optimizer's state "
                f"cannot be locked in the host's memory (CUDA error {error}); give the host more, "
                "or take a template that keeps the state on the GPU"
            )
    return tensor
