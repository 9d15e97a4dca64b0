"""Slices go to safetensors and come back in any cut; digests see every change and add up (C8)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine import sharded_state
from packhorse.trainer.engine.moments import MOMENTS
from packhorse.trainer.engine.sharded_state import (
    WEIGHT,
    Shards,
    Slice,
    add_digests,
    digest,
    digests_of,
)
from packhorse.trainer.utils.files import checksum

SHAPES = {"a.weight": [7, 11], "b.bias": [5]}
EXP_AVG = MOMENTS["adamw"][0]


def tensors() -> dict[tuple[str, str], torch.Tensor]:
    torch.manual_seed(0)
    return {
        (name, state): torch.randn(SHAPES[name]) for name in SHAPES for state in (WEIGHT, EXP_AVG)
    }


def cut(world: int) -> list[list[Slice]]:
    """All of it, by rank: ceil(n / world) elements of each tensor, as ZeRO-3 cuts them."""
    whole = tensors()
    ranks = []
    for rank in range(world):
        pieces = []
        for name in SHAPES:
            flat = {state: whole[name, state].view(-1) for state in (WEIGHT, EXP_AVG)}
            share = -(-flat[WEIGHT].numel() // world)
            low, high = (
                min(rank * share, flat[WEIGHT].numel()),
                min((rank + 1) * share, flat[WEIGHT].numel()),
            )
            if low < high:
                pieces.append(
                    Slice(name, low, {state: tensor[low:high] for state, tensor in flat.items()})
                )
        ranks.append(pieces)
    return ranks


def write(folder: Path, world: int) -> tuple[Shards, sharded_state.Digests]:
    files, digests = {}, {}
    for rank, pieces in enumerate(cut(world)):
        name = f"rank{rank}.safetensors"
        files[name], found = sharded_state.write(folder / name, pieces)
        add_digests(digests, found)
    return Shards(folder, files, SHAPES), digests


@pytest.mark.parametrize("saved", [1, 2, 3, 8])
@pytest.mark.parametrize("read", [1, 2, 3, 8])
def test_any_cut_reads_any_other(tmp_path: Path, saved: int, read: int) -> None:
    files, _ = write(tmp_path, saved)
    for pieces in cut(read):
        for piece in pieces:
            empty = Slice(
                piece.name,
                piece.start,
                {s: torch.full_like(t, torch.nan) for s, t in piece.states.items()},
            )
            files.fill(empty)
            for state, tensor in piece.states.items():
                assert torch.equal(empty.states[state], tensor)
    assert torch.equal(files.whole("a.weight", EXP_AVG), tensors()["a.weight", EXP_AVG])


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    write(tmp_path, 2)
    loaded = load_file(tmp_path / "rank1.safetensors")
    assert torch.equal(
        loaded["a.weight[39:77].exp_avg"], tensors()["a.weight", EXP_AVG].view(-1)[39:]
    )


def test_a_file_is_what_the_manifest_will_say(tmp_path: Path) -> None:
    file, _ = sharded_state.write(tmp_path / "x", cut(1)[0])
    assert file.bytes == (tmp_path / "x").stat().st_size
    assert file.xxh3 == checksum(tmp_path / "x")
    assert file.slices == [("a.weight", 0, 77), ("b.bias", 0, 5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.float64])
def test_buffers_of_any_type_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    buffer = torch.arange(6).to(dtype)
    file, found = sharded_state.write(tmp_path / "x", [Slice("seen", 0, {WEIGHT: buffer})])
    assert torch.equal(Shards(tmp_path, {"x": file}, {"seen": [6]}).whole("seen"), buffer)
    assert found == digests_of([Slice("seen", 0, {WEIGHT: buffer})])


def test_what_is_not_saved_is_refused(tmp_path: Path) -> None:
    files, _ = write(tmp_path, 2)
    with pytest.raises(BadInput, match=r"`a.weight\[70:80\].weight`"):
        files.fill(Slice("a.weight", 70, {WEIGHT: torch.empty(10)}))
    with pytest.raises(BadInput, match="another model"):
        files.fill(Slice("c", 0, {WEIGHT: torch.empty(10)}))


# ------------------------------------------------------------------------------------------ digests


def formula(tensor: torch.Tensor) -> int:
    bits = tensor.view(torch.int32).flatten().tolist()
    return sum((bit % 2**32) * (2 * i + 1) for i, bit in enumerate(bits)) % 2**64


def test_a_digest_is_the_formula_of_c8() -> None:
    tensor = tensors()["a.weight", WEIGHT]
    assert digest(tensor) == formula(tensor)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_digests_of_slices_add_up(tmp_path: Path, world: int) -> None:
    assert write(tmp_path, world)[1] == digests_of(cut(1)[0])


def test_a_digest_of_more_than_a_chunk_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = tensors()["a.weight", WEIGHT]
    monkeypatch.setattr(sharded_state, "_CHUNK", 10)
    assert digest(tensor) == formula(tensor)


@pytest.mark.parametrize("change", ["one bit", "two exchanged", "sign of zero"])
def test_a_digest_sees(change: str) -> None:
    tensor = tensors()["a.weight", WEIGHT].flatten()
    tensor[0] = 0.0
    other = tensor.clone()
    if change == "one bit":
        other.view(torch.int32)[5] ^= 1
    elif change == "two exchanged":
        other[[5, 9]] = tensor[[9, 5]]
    else:
        other[0] = -0.0
    assert digest(other) != digest(tensor)
