"""Write training state as slices of parameters, and read it back on any number of ranks (C8).

In: slices, which are elements of a parameter with the states that belong to them: the fp32 weight
and both moments. Out: safetensors files, their checksums and digests. A rank writes what it owns.
Another world size cuts the parameters elsewhere, and each of its ranks reads what overlaps its own
cut from memory-mapped files. Every byte is thus written once and read once, and none is converted.

    rank00000-000.safetensors   `model.layers.0.mlp.up_proj.weight[0:8192].exp_avg`, ...
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import xxhash
from pydantic import ConfigDict, Field, with_config
from safetensors import safe_open

from packhorse.trainer.datatypes import BadInput

# State of a parameter or a buffer. A trained parameter has moments.MOMENTS beside it.
WEIGHT = "weight"
# Between a parameter's name and what its states of another length are of, as `::blocks`.
BESIDE = "::"
# The moving average of a trained parameter, with `optim.ema_decay`.
EMA = "ema"
# State of a parameter that is not trained. Only its digest is saved: the model's folder has it.
FROZEN = "frozen"
_CHUNK = 2**18  # elements hashed and written at a time, which fit into a core's cache
# what the library itself reads a file's types by
_SAFETENSORS_NAMES = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}


@dataclass(frozen=True)
class Slice:
    """Elements [start, stop) of a flattened parameter or buffer, with its states."""

    name: str
    start: int
    states: Mapping[str, torch.Tensor]  # (stop - start,) each

    @property
    def stop(self) -> int:
        return self.start + next(iter(self.states.values())).numel()

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.states.values())

    def key(self, state: str) -> str:
        return key_of(self.name, self.start, self.stop, state)

    def copy(self) -> Slice:
        """Return a copy in the host's memory, which the next step does not change."""
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in self.states.items()}
        return Slice(self.name, self.start, copies)


def key_of(name: str, start: int, stop: int, state: str) -> str:
    """Return the name of a slice's state in its file."""
    return f"{name}[{start}:{stop}].{state}"


# ------------------------------------------------------------------------------------------ digests

Digests = dict[tuple[str, str], int]
"""(name, state) -> the digest; those of a tensor's slices add up to the tensor's own, mod 2^64."""


def add_digests(total: Digests, more: Digests) -> None:
    for key, value in more.items():
        total[key] = (total.get(key, 0) + value) % 2**64


def digest(tensor: torch.Tensor, start: int = 0) -> int:
    """Return sum over i of bits(x_i) x (2 (start + i) + 1) mod 2^64 (C8).

    The sum is exact in any order, and changes if elements change places. An odd factor has an
    inverse mod 2^64, so that no change of a single element goes unseen.

    Args:
        start: the index of the first element in the whole tensor, so that slices add up.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = 0
    for at in range(0, bits.numel(), _CHUNK):
        part = bits[at : at + _CHUNK].to(torch.int64)
        if tensor.element_size() < 8:
            # the bits as a number without a sign
            part &= (1 << 8 * tensor.element_size()) - 1
        odd = torch.arange(start + at, start + at + part.numel(), device=part.device) * 2 + 1
        total += int((part * odd).sum())  # int64 wraps around, which is the sum mod 2^64
    return total % 2**64


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digests_of(slices: Iterable[Slice]) -> Digests:
    """Return the digests of the slices, to be added to those of other slices and ranks."""
    found: Digests = {}
    for piece in slices:
        for state, tensor in piece.states.items():
            add_digests(found, {(piece.name, state): digest(tensor, piece.start)})
    return found


# -------------------------------------------------------------------------------------------- write


Count = Annotated[int, Field(ge=0, lt=10**18)]  # as a manifest may hold it


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class File:
    """A file as the manifest describes it."""

    bytes: Count
    xxh3: str
    slices: list[tuple[str, Count, Count]]  # name, start, stop


def write(path: Path, slices: list[Slice]) -> tuple[File, Digests]:
    """Write slices as a safetensors file that survives a power cut.

    Each byte is touched once: it is hashed and digested while it is written. The library's own
    writer would hold all of them in the host's memory a second time.
    """
    header, at = {}, 0
    for piece in slices:
        for state, tensor in piece.states.items():
            header[piece.key(state)] = {
                "dtype": _SAFETENSORS_NAMES[tensor.dtype],
                "shape": [tensor.numel()],
                "data_offsets": [at, at + tensor.nbytes],
            }
            at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
    hasher = xxhash.xxh3_128()
    found: Digests = {}
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            hasher.update(block)
            file.write(block)
        for piece in slices:
            for state, tensor in piece.states.items():
                flat = tensor.detach().reshape(-1)
                for start in range(0, flat.numel(), _CHUNK):
                    part = flat[start : start + _CHUNK].cpu().contiguous()
                    block = part.view(torch.uint8).numpy().data
                    hasher.update(block)
                    file.write(block)
                    add_digests(found, {(piece.name, state): digest(part, piece.start + start)})
        # the manifest that names this file must not reach the disk before its bytes do
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    places = [(piece.name, piece.start, piece.stop) for piece in slices]
    return File(size, hasher.hexdigest(), places), found


# --------------------------------------------------------------------------------------------- read


class Shards:
    """The files of a checkpoint, from which any slice can be read.

    Args:
        shapes: of the trained parameters and the buffers, by name.
    """

    averaged: frozenset[str] = frozenset()  # parameters of which `whole` returns the average

    def __init__(
        self, folder: Path, files: Mapping[str, File], shapes: Mapping[str, list[int]]
    ) -> None:
        self._shapes = shapes
        self._opened: dict[Path, Any] = {}
        self._places: dict[str, list[tuple[int, int, Path]]] = defaultdict(list)
        for name, file in files.items():
            for parameter, start, stop in file.slices:
                self._places[parameter].append((start, stop, folder / name))
        for places in self._places.values():
            places.sort()

    @property
    def names(self) -> list[str]:
        """The names of the trained parameters and the buffers."""
        return list(self._shapes)

    def fill(self, piece: Slice) -> None:
        """Read the slice's states into its tensors.

        Raises:
            BadInput: the files do not hold all of its elements.
        """
        for state, tensor in piece.states.items():
            filled = 0
            for first, last, path in self._places.get(piece.name, ()):
                low, high = max(piece.start, first), min(piece.stop, last)
                if low < high:
                    saved = self._open(path).get_slice(key_of(piece.name, first, last, state))
                    part = saved[low - first : high - first]
                    tensor[low - piece.start : high - piece.start].copy_(part)
                    filled += high - low
            if filled != tensor.numel():
                raise BadInput(
                    f"the checkpoint does not hold `{piece.key(state)}`: it was written from "
                    "another model; use that model, or another run.dir"
                )

    def whole(self, name: str, state: str | None = None) -> torch.Tensor:
        """Return a state of a parameter, by default its weight or average, in its shape, on the
        host.
        """
        state = state or (EMA if name in self.averaged else WEIGHT)
        start, stop, path = self._places[name][0]
        dtype = self._open(path).get_slice(key_of(name, start, stop, state))[:0].dtype
        shape = torch.Size(self._shapes[name])
        flat = torch.empty(shape.numel(), dtype=dtype)
        self.fill(Slice(name, 0, {state: flat}))
        return flat.view(shape)

    def _open(self, path: Path) -> Any:
        # memory-mapped: reading a slice touches that slice's bytes alone
        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt").__enter__()
        return self._opened[path]
