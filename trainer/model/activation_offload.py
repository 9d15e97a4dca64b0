"""Hold what the layers save for the backward in the host's memory, and fetch it ahead.

In: the tensors that autograd saves between layers, which of checkpointed layers are their inputs.
Out: the same numbers in the backward.

    forward     a tensor goes out while the next layer computes
    backward    when a layer asks for its input, that of the next one starts to come, so that it is
                there once this layer is recomputed

On CUDA a stream of its own copies, to and from pinned blocks of one size, which later micro-batches
use again: torch's own pinned memory would round each tensor up to a power of two. On a CPU it is
plain copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

BLOCK_BYTES = 2**24
SMALLEST_BYTES = 2**20  # less is not worth a copy, as of norms' weights
IN_FLIGHT = 2  # tensors that wait on the device for their copy; more would fill it


class InOrder:
    """Stands for a stream where copies are done when they are called, as on a CPU."""

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copy inside the block, after all that was computed so far."""
        yield

    def mark(self) -> Any:
        """Return what `wait_for` takes to wait for all copies so far."""

    def wait_for(self, mark: Any) -> None:
        """Let all that is computed from now on wait for these copies."""


class CopyStream(InOrder):
    """A CUDA stream that copies while the current one computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def copying(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Any:
        return self._stream.record_event()

    def wait_for(self, mark: Any) -> None:
        torch.cuda.current_stream().wait_event(mark)


class _Saved:
    """A saved tensor: on the device, in the host's blocks, or both."""

    def __init__(self, tensor: torch.Tensor, place: int, blocks: list[torch.Tensor]) -> None:
        self.on_device: torch.Tensor | None = tensor
        self.mark: Any = None  # of its last copy
        self.place = place  # of those saved in a forward
        self.blocks = blocks
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def pieces(self, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield blocks with the parts of a tensor of this one's shape that lie in them."""
        parts = tensor.view(-1).view(torch.uint8).split(BLOCK_BYTES)
        for block, part in zip(self.blocks, parts, strict=True):
            yield block[: len(part)], part


class HostMemory:
    """Blocks in the host's memory, and what of a forward lies there.

    Args:
        stream: that copies.
        pinned: whether the blocks are, which copies beside computation need.
    """

    def __init__(self, stream: InOrder, pinned: bool) -> None:
        self._stream, self._pinned = stream, pinned
        self._free: list[torch.Tensor] = []
        self._order: list[_Saved] = []  # what the backward will ask for, the next one last

    def holding(self) -> saved_tensors_hooks:
        """Return the context of a forward whose saved tensors lie in the host's memory."""
        self._order = []
        return saved_tensors_hooks(self._send, self._give)

    def _send(self, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, nn.Parameter):
            return tensor
        # a transposed weight lies on the device all the same
        if tensor.nbytes < SMALLEST_BYTES or isinstance(tensor._base, nn.Parameter):
            return tensor.detach()  # an operation that kept its own output would never be freed
        tensor = tensor.detach().contiguous()
        blocks = [self._block() for _ in range(-(-tensor.nbytes // BLOCK_BYTES))]
        saved = _Saved(tensor, len(self._order), blocks)
        # the stream orders the next copies into these blocks after those out of them
        weakref.finalize(saved, self._free.extend, blocks)
        with self._stream.copying():
            for block, part in saved.pieces(tensor):
                block.copy_(part, non_blocking=True)
        saved.mark = self._stream.mark()
        self._order.append(saved)
        if len(self._order) > IN_FLIGHT:
            # its memory is used again by what waits from now on, whatever the allocator knows
            gone = self._order[-1 - IN_FLIGHT]
            self._stream.wait_for(gone.mark)
            gone.on_device = None
        return saved

    def _give(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        while self._order and self._order[-1].place >= saved.place:
            self._order.pop()
        tensor = self._fetch(saved)
        self._stream.wait_for(saved.mark)
        saved.on_device = None
        if self._order:
            self._fetch(self._order[-1])
        return tensor

    def _fetch(self, saved: _Saved) -> torch.Tensor:
        if saved.on_device is None:
            saved.on_device = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
            with self._stream.copying():
                for block, part in saved.pieces(saved.on_device):
                    part.copy_(block, non_blocking=True)
            saved.mark = self._stream.mark()
        return saved.on_device

    def _block(self) -> torch.Tensor:
        if self._free:
            return self._free.pop()
        return torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._pinned)


def host_memory(device: torch.device) -> HostMemory:
    """Return memory of the host for the tensors of a device."""
    on_gpu = device.type == "cuda"
    return HostMemory(CopyStream(device) if on_gpu else InOrder(), pinned=on_gpu)
