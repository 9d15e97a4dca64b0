"""Packing lays every token of every document into exactly one sequence, and wastes little room."""

import json
from itertools import islice, repeat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.trainer.data import pack as packs
from packhorse.trainer.data.pack import greedy, pack

SEQ_LEN = 16
WHOLE = ("none", "bfd", "greedy")  # packings that cut no document
PACKINGS = (*WHOLE, "bfd_split", "wrapped")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def documents(packing: str) -> st.SearchStrategy[list[int]]:
    longest = SEQ_LEN if packing in WHOLE else 3 * SEQ_LEN + 1
    return st.lists(st.integers(1, longest), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def gsm8k_lengths(shared) -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/smollm2_tokenizer")
    lines = (shared / "data/gsm8k_train.jsonl").read_bytes().splitlines()
    rows = [json.loads(line) for line in lines]
    frame = len(
        tokenizer(
            tokenizer.apply_chat_template([{"role": "user", "content": ""}] * 2, tokenize=False)
        ).input_ids
    )
    encoded = tokenizer([f"{row['question']}{row['answer']}" for row in rows]).input_ids
    return np.array([frame + len(ids) for ids in encoded])


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data(), seed=st.integers(0, 9))
def test_every_token_lies_in_one_piece_and_no_sequence_is_too_long(packing, data, seed):
    lengths = np.array(data.draw(documents(packing)))
    packed = pack(lengths, SEQ_LEN, packing, rng(seed))

    taken = [np.zeros(length, int) for length in lengths]
    for document, start, stop, _ in packed.pieces:
        assert start < stop
        taken[document][start:stop] += 1
    assert all((tokens == 1).all() for tokens in taken)

    sizes = packed.pieces[:, 2] - packed.pieces[:, 1]
    assert packed.sequence_offsets[0] == 0
    assert packed.sequence_offsets[-1] == len(packed.pieces)
    assert (np.diff(packed.sequence_offsets) > 0).all(), "no sequence is empty"
    tokens = np.add.reduceat(sizes, packed.sequence_offsets[:-1])
    assert max(tokens) <= SEQ_LEN
    if packing == "wrapped":
        assert (tokens[:-1] == SEQ_LEN).all()


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_pieces_of_a_document_are_numbered_in_order(packing, data):
    lengths = np.array(data.draw(documents(packing)))
    packed = pack(lengths, SEQ_LEN, packing, rng())
    for document in range(len(lengths)):
        of_document = packed.pieces[packed.pieces[:, 0] == document]
        of_document = of_document[np.argsort(of_document[:, 1])]
        assert of_document[:, 3].tolist() == list(range(len(of_document)))
        if packing in WHOLE:
            assert len(of_document) == 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_seed_decides_the_sequences(packing):
    lengths = rng(7).integers(1, SEQ_LEN + 1, 500)
    one, same, other = (pack(lengths, SEQ_LEN, packing, rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one.pieces, same.pieces)
    assert np.array_equal(one.sequence_offsets, same.sequence_offsets)
    assert not np.array_equal(one.pieces, other.pieces)


def test_epochs_group_documents_differently_even_where_all_lengths_differ():
    lengths = np.arange(1, 4001)

    def together(seed: int) -> set[tuple[int, ...]]:
        packed = pack(lengths, 4096, "bfd", rng(seed))
        cut = np.split(packed.pieces[:, 0], packed.sequence_offsets[1:-1])
        return {tuple(sorted(row)) for row in cut}

    assert len(together(1) & together(2)) < 0.25 * len(together(1))  # without windows: all


def test_best_fit_takes_the_tightest_sequence():
    packed = pack(np.array([10, 9, 7, 6]), SEQ_LEN, "bfd", rng())  # 10 + 6 and 9 + 7, both full
    assert packed.num_sequences == 2
    assert {
        tuple(sorted(row)) for row in np.split(packed.pieces[:, 0], packed.sequence_offsets[1:-1])
    } == {(0, 3), (1, 2)}


@pytest.mark.parametrize("packing", WHOLE)
def test_a_document_longer_than_a_sequence_is_refused_where_documents_stay_whole(packing):
    with pytest.raises(ValueError, match="17 tokens does not fit in a sequence of 16"):
        pack(np.array([3, 17]), SEQ_LEN, packing, rng())


def test_an_empty_document_is_refused():
    with pytest.raises(ValueError, match="empty"):
        pack(np.array([3, 0]), SEQ_LEN, "bfd", rng())


@pytest.mark.parametrize("seed", [0, 1])
def test_sequences_of_gsm8k_are_nearly_full(gsm8k_lengths, seed):
    packed = pack(gsm8k_lengths, 2048, "bfd", rng(seed))
    fill = gsm8k_lengths.sum() / (packed.num_sequences * 2048)
    print(f"fill {fill:.4f} of {packed.num_sequences} sequences")
    assert fill >= 0.985


def test_greedy_takes_the_oldest_sequence_that_has_room():
    assert list(greedy([10, 12, 9, 6, 4, 5], SEQ_LEN)) == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]  # bfd would lay 6 beside 9
    assert list(greedy([16, 3], SEQ_LEN)) == [[0], [1]]


def test_greedy_closes_its_oldest_sequence_when_too_many_are_open(monkeypatch):
    monkeypatch.setattr(packs, "OPEN_SEQUENCES", 2)
    assert list(greedy([9, 10, 11, 7, 6, 5], SEQ_LEN)) == [
        [0],
        [1],
        [2, 5],
        [3, 4],
    ]  # 7 found the first closed


@given(
    st.lists(st.integers(1, SEQ_LEN), max_size=60), st.lists(st.integers(1, SEQ_LEN), max_size=60)
)
def test_later_documents_do_not_change_the_sequences_that_greedy_has_yielded(first, later):
    came: list[int] = []

    def stream():
        for length in first + later:
            came.append(length)
            yield length

    settled = [each for each in greedy(stream(), SEQ_LEN) if len(came) <= len(first)]
    assert list(greedy(first, SEQ_LEN))[: len(settled)] == settled


def test_greedy_reads_a_stream_without_an_end_and_no_document_waits_for_long():
    lengths = (int(length) for length in rng(3).integers(1, 600, 1_000_000))
    ages = (max(row) - min(row) for row in islice(greedy(lengths, 1024), 2000))
    assert max(ages) < 40 * packs.OPEN_SEQUENCES
    assert len(list(islice(greedy(repeat(7), 1024), 90))) == 90


@pytest.mark.parametrize("length", [0, SEQ_LEN + 1])
def test_greedy_refuses_what_fits_in_no_sequence(length):
    with pytest.raises(ValueError, match=f"a document of {length} tokens"):
        list(greedy([3, length], SEQ_LEN))


@pytest.mark.parametrize(("seq_len", "fill"), [(1024, 0.96), (2048, 0.98)])
def test_greedy_fills_gsm8k_nearly_as_well_as_bfd(gsm8k_lengths, seq_len, fill):
    rows = {
        packing: pack(gsm8k_lengths, seq_len, packing, rng()).num_sequences
        for packing in ("greedy", "bfd")
    }
    fills = {packing: gsm8k_lengths.sum() / (count * seq_len) for packing, count in rows.items()}
    print(fills)
    assert fill - 0.005 < fills["greedy"] < fills["bfd"] < fills["greedy"] + 0.02


def test_a_million_documents_are_packed_nearly_full():
    """Packing that is quadratic in the documents would exceed the test's time limit."""
    lengths = np.clip(rng(0).lognormal(5.5, 1.0, 1_000_000).astype(int), 2, 8192)
    packed = pack(lengths, 8192, "bfd", rng(1))
    assert lengths.sum() / packed.num_sequences / 8192 > 0.995
