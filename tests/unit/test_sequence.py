"""Slices of packed sequences: what each rank gets, and that nothing is lost or counted twice (C13).

What ranks compute together is in tests/numerics/test_x9_sequence.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from packhorse.trainer import build_engine, datatypes, dist
from packhorse.trainer.config.recipe import LossSection, load_recipe
from packhorse.trainer.data import loader
from packhorse.trainer.data.loader import filler_batch
from packhorse.trainer.datatypes import BadInput, first_key, slice_pieces
from packhorse.trainer.estimate.model import AttentionShape
from packhorse.trainer.estimate.sequence import exchanged_elements
from packhorse.trainer.metrics import ModelFlops
from packhorse.trainer.model import packing_check, sequence_check
from packhorse.trainer.model.attention_kernels import Bounds
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.neftune import document_noise
from packhorse.trainer.model.packing_check import Proof
from packhorse.trainer.model.ring_attention import seen_in_ring
from packhorse.trainer.model.sft import SftModel
from tests.model_helpers import CPU, documents, pack, tiny_llama
from tests.unit.test_batch_plan import make_plan

LENGTHS = (5, 17, 1, 8)  # 31 tokens, a prime
BATCH = pack(documents(LENGTHS), [[0, 3], list(range(2, 16)), [], [6]], [0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 31])
def test_slices_hold_every_token_and_every_target_once(number: int, zigzag: bool) -> None:
    with mock.patch.object(datatypes, "ZIGZAG_TOKENS", 1):
        slices = [BATCH.cut(index, number, zigzag) for index in range(number)]
        own = [part.own_tokens(torch.arange(31)) for part in slices]
    assert torch.cat(own).sort().values.tolist() == list(range(31))
    for place, part in zip(own, slices, strict=True):
        for name in ("input_ids", "position_ids"):
            assert torch.equal(getattr(part, name), getattr(BATCH, name)[place]), name
    of_all = [own_[part.trained_positions] for own_, part in zip(own, slices, strict=True)]
    order = torch.cat(of_all).argsort()
    assert torch.equal(torch.cat(of_all)[order], BATCH.trained_positions)
    for name in ("targets", "weights"):
        joined = torch.cat([getattr(part, name) for part in slices])
        assert torch.equal(joined[order], getattr(BATCH, name)), name
    assert all(part.lengths == LENGTHS for part in slices), "documents stay whole"
    assert sum(part.tokens for part in slices) == BATCH.tokens == 31
    assert [part.is_counted for part in slices] == [True] + [False] * (number - 1)
    flops = ModelFlops(7, 11, 13)
    assert sum(map(flops.of, slices)) == pytest.approx(flops.of(BATCH))


@pytest.mark.parametrize("number", [2, 3, 5])
def test_fillers_and_short_sequences_have_a_token_for_each_rank(number: int) -> None:
    filler = filler_batch(3, max(2, number))
    assert [filler.cut(i, number).input_ids.shape[0] >= 1 for i in range(number)] == [True] * number
    assert sum(filler.cut(i, number).trained_positions.shape[0] for i in range(number)) == 1
    short = pack(documents([2]), [[0]], [0.5])
    longer = loader._lengthened(short, filler)
    assert longer.lengths == (2, len(filler.input_ids))
    assert longer.cu_seqlens.tolist() == [0, 2, 2 + len(filler.input_ids)]
    assert longer.position_ids.tolist() == [0, 1, *range(len(filler.input_ids))]
    assert torch.equal(longer.weights, short.weights), "the filler's tokens are not trained"


def test_ranks_that_share_a_sequence_are_one_to_the_plan() -> None:
    plan: Any = make_plan([torch.tensor([False, True]).numpy()] * 12, "none", global_batch_size=6)
    data = mock.Mock()
    for rank, group in ((0, 0), (1, 0), (4, 2), (5, 2)):
        made = loader.Loader(data, plan, rank, 6, False, sequence=2)
        assert (made._group, made.groups, made._slice) == (group, 3, (rank % 2, 2, False))
        made.close()
    assert plan.check_world(12, False, 2) is None
    with pytest.raises(BadInput, match=r"8 groups of 2 ranks, but a step has only 6 .*start .*12"):
        plan.check_world(16, False, 2)
    with pytest.raises(BadInput, match=r"parallel\.sequence: 2 ranks .*\(7\) does not divide"):
        plan.check_world(7, False, 2)


def test_groups_that_cross_nodes_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dist.log, "propagate", True)
    monkeypatch.setenv("WORLD_SIZE", "8")
    recipe = load_recipe("debug", ["parallel.sequence=4", "parallel.sequence_kind=gather"])
    with mock.patch.object(dist, "consecutive_group", return_value="group"):
        for per_node, told in ((4, False), (2, True)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
            assert build_engine._sequence_group(recipe) == ("group", "gather")
            assert ("cross nodes of 2" in caplog.text) == told


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_a_slice_has_the_noise_of_its_tokens(number: int) -> None:
    """Also where a document is longer than a block of noise, and a slice begins inside a block."""
    lengths, keys = (3, 5000, 9000, 7), [(0, n, 0) for n in range(4)]
    whole = document_noise(0, keys, lengths, 4, 5.0, CPU)
    parts = [
        document_noise(0, keys, lengths, 4, 5.0, CPU, range(*piece))
        for (piece,) in slice_pieces(lengths, number)
    ]
    assert torch.equal(torch.cat(parts), whole)
    blocks = whole[3 : 3 + 5000].split(4096)
    assert not torch.equal(blocks[0][: len(blocks[1])], blocks[1]), "blocks have their own noise"


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("start", range(0, 31, 5))
def test_queries_of_a_slice_have_the_keys_that_they_see(start: int, window: int | None) -> None:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    stop = min(start + 7, 31)
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    of_first = int((document == document[start]).nonzero()[0])
    first = first_key(LENGTHS, start, window)
    assert first == (max(of_first, start - window + 1) if window else of_first)
    queries, keys = Bounds(ends, 17, LENGTHS).of_pieces(((start, stop),), [first])
    inside = document[start:stop].unique(return_counts=True)[1].tolist()
    assert list(queries.lengths) == inside == queries.cu_seqlens.diff().tolist()
    seen = document[first:stop].unique(return_counts=True)[1].tolist()
    assert list(keys.lengths) == seen == keys.cu_seqlens.diff().tolist()


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"by_document": ("MambaBlock (why)",)}, "MambaBlock"),
        ({"by_itself": "why"}, "its own code"),
        ({"is_random": True}, "dropout"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_its_name(change: dict[str, Any], said: str) -> None:
    module = SftModel(tiny_llama(), LossSection(), 0, CPU)
    module.is_random = change.get("is_random", False)
    proof = Proof(0.0, 0.0, (1,), LogitTransform())
    proof = proof._replace(**{k: v for k, v in change.items() if k in Proof._fields})
    with pytest.raises(BadInput, match=rf"parallel\.sequence: .*{said}.*parallel\.sequence=1"):
        sequence_check.prove_slices(module, proof, size=2, seq_len=64, seed=0)


def test_a_layer_that_differs_after_the_cut_is_named() -> None:
    """As one that carries a state, which a rank's slice begins without."""
    module = SftModel(tiny_llama(), LossSection(), 0, CPU)
    proof = packing_check.prove_packing(module, seq_len=64, one_document=False, seed=0)
    cut = sequence_check.Batch.cut

    def other_tokens(batch: Any, *given: Any) -> Any:
        part = cut(batch, *given)
        return replace(part, input_ids=part.input_ids.flip(0), slice=(0, 1), lengths=(37,))

    with (
        mock.patch.object(sequence_check.Batch, "cut", other_tokens),
        pytest.raises(BadInput, match=r"layer 0 \(LlamaDecoderLayer.* where a sequence is cut"),
    ):
        sequence_check.prove_slices(module, proof, size=2, seq_len=64, seed=0)


# ----------------------------------------------------------------------------------------- the ring


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("lengths", [(40_000,), (30_000, 100, 200, 9_000, 50), (5_000,) * 4])
def test_a_zigzag_gives_each_rank_as_many_pairs_in_each_step(
    lengths: tuple[int, ...], number: int
) -> None:
    """As query-key pairs of the kernels' blocks; contiguous slices are the control."""

    def pairs(zigzag: bool) -> torch.Tensor:
        """Return those of each step (rows) and rank (columns)."""
        seen = seen_in_ring(lengths, slice_pieces(lengths, number, zigzag))
        counted = [
            [
                sum(q * k for q, k in zip(*of_rank[rank - step].documents[:2], strict=True))
                for rank, of_rank in enumerate(seen)
            ]
            for step in range(number)
        ]
        return torch.tensor(counted, dtype=torch.float64)

    balanced, control = pairs(True), pairs(False)
    assert (balanced.amax(1) <= 1.02 * balanced.mean(1)).all(), balanced
    if len(lengths) == 1:
        whole = control[0] / 2 + control[1:].sum(0)  # what a rank sees of its own is causal
        assert whole.max() > 1.4 * whole.mean(), control


def test_a_rank_of_a_ring_sends_the_keys_that_others_see() -> None:
    """Of one document in 2 x 4 pieces, later ranks see a rank's early one and earlier ones both."""
    attend, window = (AttentionShape(8, 2, 16, 8, reach) for reach in (None, 65))
    width, piece = 2 * (16 + 8), 1000
    sent = [exchanged_elements([attend], [8 * piece], 4, rank, "ring") for rank in range(4)]
    assert sent == [width * piece * n for n in (3, 2 + 2, 1 + 4, 6)]
    # the keys before each piece, 1 to 7; pieces 3 and 4 lie on the last rank
    sent = [exchanged_elements([window], [8 * piece], 4, rank, "ring") for rank in range(4)]
    assert sent == [width * 64 * n for n in (1, 2, 2, 1)]
    sent = [exchanged_elements([window], [8 * piece], 4, rank, "gather") for rank in range(4)]
    assert sent == [width * 64 * n for n in (1, 1, 1, 0)]
