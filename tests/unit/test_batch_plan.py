"""The steps are arithmetic: every packed sequence runs once an epoch, whatever the number of ranks,
with weights that are known beforehand.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.trainer.config.recipe import BatchSection, LossSection, TrainSection
from packhorse.trainer.data.batch_plan import Corpus, Plan
from packhorse.trainer.data.pack import pack
from packhorse.trainer.data.ranks import filler_share, good_worlds, micro_batches_of
from packhorse.trainer.datatypes import BadInput, Piece

SEQ_LEN = 32


def corpus(flags: list[np.ndarray], sources=None, weights=(1.0,)) -> Corpus:
    """Documents by their trained flags."""

    def count(documents, starts, stops):
        return np.array(
            [
                flags[d][a + 1 : b + 1].sum()
                for d, a, b in zip(documents, starts, stops, strict=True)
            ]
        )

    lengths = np.array([len(f) for f in flags])
    counts = np.array([f.sum() for f in flags])
    return Corpus(
        lengths,
        counts,
        np.zeros(len(flags), int) if sources is None else np.array(sources),
        weights,
        count,
    )


def some_flags(seed: int, documents: int, longest: int = SEQ_LEN) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    flags = [rng.random(rng.integers(2, longest + 1)) < 0.5 for _ in range(documents)]
    for f in flags:
        f[0] = False
        f[-1] |= not f.any()  # as preparation leaves no document without a trained token
    return flags


def make_plan(
    documents,
    packing="bfd",
    global_batch_size=4,
    micro_batch_size=1,
    epochs=1,
    steps=None,
    seed=0,
    **loss,
) -> Plan:
    return Plan(
        documents if isinstance(documents, Corpus) else corpus(documents),
        lambda lengths, *others: pack(lengths, SEQ_LEN, packing, *others),
        BatchSection(
            seq_len=SEQ_LEN, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
        ),
        TrainSection(epochs=epochs, steps=steps, seed=seed),
        LossSection(**loss),
    )


def sequences_of(plan: Plan, step: int) -> list[int]:
    return [number for micro_batch in plan.step(step).micro_batches for number in micro_batch]


plans = st.builds(
    make_plan,
    st.builds(some_flags, st.integers(0, 99), st.integers(1, 40)),
    packing=st.sampled_from(["none", "bfd", "bfd_split", "wrapped", "greedy"]),
    global_batch_size=st.integers(1, 9),
    micro_batch_size=st.integers(1, 4),
    epochs=st.integers(1, 3),
)


@given(plans)
def test_every_sequence_comes_once_an_epoch_and_sizes_differ_by_at_most_one(plan):
    numbers, sizes = {}, {}
    for step in range(plan.steps):
        epoch = plan.step(step).epoch
        numbers.setdefault(epoch, []).extend(sequences_of(plan, step))
        sizes.setdefault(epoch, []).append(len(sequences_of(plan, step)))
    assert sorted(numbers) == list(range(plan.train.epochs))
    for epoch, seen in numbers.items():
        assert seen == list(range(len(seen)))
        assert max(sizes[epoch]) <= plan.batch.global_batch_size
        assert max(sizes[epoch]) - min(sizes[epoch]) <= 1
        steps = [plan.step(s) for s in range(plan.steps) if plan.step(s).epoch == epoch]
        trained = [step.trained_tokens for step in steps]
        assert min(trained) > 0, "no step is empty"
        assert sum(trained) == plan.epochs.corpus(0).trained_counts.sum(), "each once an epoch"


@given(
    st.builds(some_flags, st.integers(0, 99), st.integers(1, 20), st.just(6 * SEQ_LEN)),
    st.floats(0, 1),
    st.sampled_from(["bfd_split", "wrapped"]),
    st.integers(1, 4),
)
def test_no_step_is_empty_where_documents_are_cut(flags, kept, packing, global_batch_size):
    for f in flags:  # mostly prompt
        last = np.flatnonzero(f)[-1]
        f[: int(kept * last)] = False
    plan = make_plan(flags, packing, global_batch_size)
    trained = [plan.step(s).trained_tokens for s in range(plan.steps)]
    assert min(trained) > 0
    assert sum(trained) == sum(f.sum() for f in flags)


@given(plans, st.integers(1, 12))
def test_ranks_share_every_micro_batch_once_and_run_equally_many(plan, world):
    for step in map(plan.step, range(plan.steps)):
        shares = [micro_batches_of(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        taken = Counter(
            micro_batch for share in shares for micro_batch in share if micro_batch is not None
        )
        assert taken == Counter(step.micro_batches)
        assert all(
            1 <= len(micro_batch) <= plan.batch.micro_batch_size
            for micro_batch in step.micro_batches
        )


@given(plans, st.integers(1, 12))
def test_the_filler_share_is_the_share_of_fillers(plan, world):
    shares = [
        micro_batches_of(plan.step(s), r, world) for s in range(plan.steps) for r in range(world)
    ]
    all_of_them = [micro_batch for share in shares for micro_batch in share]
    share = filler_share(plan.micro_batch_counts(), world)
    assert share == pytest.approx(all_of_them.count(None) / len(all_of_them))


@given(plans)
def test_token_weights_of_a_step_sum_to_one_and_count_every_trained_token(plan):
    trained = 0
    for step in map(plan.step, range(plan.steps)):
        for micro_batch in step.micro_batches:
            weights = plan.piece_weights(step, plan.pieces(step.epoch, micro_batch))
            assert weights * step.trained_tokens == pytest.approx(1)
        trained += step.trained_tokens
    assert trained == plan.train.epochs * plan.epochs.corpus(0).trained_counts.sum()


@pytest.mark.parametrize("packing", ["none", "bfd", "bfd_split", "wrapped", "greedy"])
def test_example_weights_give_every_example_the_same_say(packing):
    flags = some_flags(
        3, 50, longest=SEQ_LEN if packing in ("none", "bfd", "greedy") else 3 * SEQ_LEN
    )
    plan = make_plan(flags, packing, weighting="example")
    for step in map(plan.step, range(plan.steps)):
        says = []
        for micro_batch in step.micro_batches:
            pieces = plan.pieces(step.epoch, micro_batch)
            weights = plan.piece_weights(step, pieces)
            counts = [flags[d][a + 1 : b + 1].sum() for d, a, b, _ in pieces]
            says += [count * weight for count, weight in zip(counts, weights, strict=True) if count]
        assert says == pytest.approx([1 / step.examples] * len(says))
        assert len(says) == step.examples
        assert sum(says) == pytest.approx(1)


def test_constant_weights_divide_by_k_and_the_examples():
    plan = make_plan(some_flags(0, 20), weighting=10)
    step = plan.step(0)
    weights = plan.piece_weights(step, plan.pieces(step.epoch, step.micro_batches[0]))
    assert weights == pytest.approx(1 / (10 * step.examples))


@pytest.mark.parametrize("weighting", ["token", "example", 5])
@pytest.mark.parametrize("packing", ["bfd_split", "wrapped"])
def test_pieces_without_a_trained_token_are_dropped_and_no_step_is_empty(packing, weighting):
    flags = [np.zeros(382, bool) for _ in range(40)]  # long prompts, answers of two tokens
    for f in flags:
        f[-2:] = True
    plan = make_plan(flags, packing, global_batch_size=2, weighting=weighting)
    steps = [plan.step(s) for s in range(plan.steps)]
    assert all(step.trained_tokens for step in steps)
    assert sum(step.trained_tokens for step in steps) == 80, "no trained token is lost"
    for step in steps:
        pieces = plan.pieces(0, [s for micro_batch in step.micro_batches for s in micro_batch])
        assert step.examples == len(pieces)
        assert plan._packings.targets(0, pieces).all()
        weights = plan.piece_weights(step, pieces)
        assert np.isfinite(weights).all()
        assert (weights > 0).all()
    if packing == "bfd_split":  # what is dropped leaves no holes
        tokens, _ = plan.sequence_sizes()
        assert tokens.sum() <= 40 * SEQ_LEN
        assert plan.fill() > 0.5


def test_a_token_after_a_cut_is_predicted_by_the_piece_before_it():
    flags = [np.zeros(SEQ_LEN + 1, bool)]
    flags[0][SEQ_LEN] = True  # the second piece's first and only token
    plan = make_plan(flags, "bfd_split", global_batch_size=1)
    piece = Piece(*plan.pieces(0, [0])[0].tolist())
    assert (plan.steps, piece.start, plan.step(0).trained_tokens) == (1, 0, 1)


def test_epochs_are_packed_afresh_and_the_same_seed_gives_the_same_plan():
    one, same, other = (make_plan(some_flags(0, 60), epochs=2, seed=seed) for seed in (1, 1, 2))

    def pieces(plan, epoch):
        last = sum(
            len(sequences_of(plan, s)) for s in range(plan.steps) if plan.step(s).epoch == epoch
        )
        return plan.pieces(epoch, range(last)).tolist()

    assert pieces(one, 0) == pieces(same, 0)
    assert pieces(one, 1) == pieces(same, 1)
    assert pieces(one, 0) != pieces(one, 1)
    assert pieces(one, 0) != pieces(other, 0)


def test_steps_take_as_many_epochs_as_they_need():
    documents = some_flags(0, 30)
    one_epoch = make_plan(documents)
    plan = make_plan(documents, steps=2 * one_epoch.steps + 1)
    assert plan.steps == 2 * one_epoch.steps + 1
    assert plan.step(plan.steps - 1).epoch == 2
    assert len(plan.micro_batch_counts()) == plan.steps
    with pytest.raises(IndexError):
        plan.step(plan.steps)


def test_steps_that_would_be_counted_for_ever_are_refused():
    flags = some_flags(0, documents=20)
    with pytest.raises(BadInput, match=r"train\.steps: 1,000,000,000 steps are [\d,]+ epochs"):
        make_plan(flags, steps=10**9)


def test_more_epochs_leave_the_first_ones_as_they_are():
    short, long = (make_plan(some_flags(0, 30), epochs=epochs) for epochs in (1, 3))
    assert [short.step(s) for s in range(short.steps)] == [long.step(s) for s in range(short.steps)]


@pytest.mark.parametrize(("weight", "times"), [(0.25, 5), (1.0, 20), (2.3, 46), (0.01, 0)])
def test_a_source_gives_its_weight_in_rows(weight, times):
    flags = some_flags(0, 40)
    sources = [0] * 20 + [1] * 20
    plan = make_plan(corpus(flags, sources, (weight, 1.0)), "none", epochs=2)
    for epoch in range(2):
        steps = [s for s in range(plan.steps) if plan.step(s).epoch == epoch]
        numbers = [number for s in steps for number in sequences_of(plan, s)]
        counts = Counter(plan.pieces(epoch, numbers)[:, 0].tolist())
        of_first = [counts[document] for document in range(20)]
        assert sum(of_first) == times
        assert max(of_first) - min(of_first) <= 1, (
            "whole passes, and a remainder without replacement"
        )
        assert all(counts[document] == 1 for document in range(20, 40))


def test_samples_of_a_source_differ_between_epochs():
    plan = make_plan(
        corpus(some_flags(0, 40), weights=(0.5,)), "none", epochs=2, global_batch_size=20
    )
    first, second = (set(plan.pieces(epoch, range(20))[:, 0].tolist()) for epoch in (0, 1))
    assert len(first) == len(second) == 20
    assert first != second


@pytest.mark.parametrize("packing", ["none", "wrapped"])
def test_a_document_that_comes_twice_has_noise_of_its_own_each_time(packing):
    plan = make_plan(corpus(some_flags(0, 10), weights=(2.5,)), packing, global_batch_size=99)
    pieces = plan.pieces(0, sequences_of(plan, 0))
    assert len({(document, piece) for document, _, _, piece in pieces.tolist()}) == len(pieces)


def test_weights_that_leave_no_row_are_refused():
    with pytest.raises(BadInput, match="raise `weight`"):
        make_plan(corpus(some_flags(0, 3), weights=(0.1,)))


def test_more_ranks_than_micro_batches_are_refused_unless_allowed():
    plan = make_plan(
        [np.array([False, True])] * 12, "none", global_batch_size=6, micro_batch_size=2
    )  # steps of 3
    with pytest.raises(
        BadInput, match=r"4 ranks, but a step has only 3 micro-batches: start 1, 3 ranks"
    ):
        plan.check_world(4, allow_idle_ranks=False)
    assert plan.check_world(4, allow_idle_ranks=True) == (
        "25% of the micro-batches of 4 ranks are fillers; good numbers of ranks: 1, 3"
    )
    assert plan.check_world(3, allow_idle_ranks=False) is None
    assert [micro_batches_of(plan.step(0), rank, 4) for rank in (0, 3)] == [[(0, 1)], [None]]


def test_good_worlds_are_near_the_one_asked_for():
    plan = make_plan([np.array([False, True])] * 64, "none", global_batch_size=64)
    counts = plan.micro_batch_counts()
    assert filler_share(counts, 48) == pytest.approx(1 - 64 / 96)
    assert good_worlds(counts, 48) == [16, 32, 64]
    assert [filler_share(counts, world) for world in good_worlds(counts, 48)] == [0, 0, 0]


def test_only_two_packings_stay_in_memory_and_all_can_be_asked_for_again():
    made = []
    plan = Plan(
        corpus(some_flags(0, 30)),
        lambda lengths, *others: pack(lengths, SEQ_LEN, "bfd", *others),
        BatchSection.model_validate({"seq_len": SEQ_LEN, "global_batch_size": 4}),
        TrainSection.model_validate({"epochs": 5}),
        LossSection.model_validate({}),
        keep=lambda epoch, make: made.append(epoch) or make(),
    )
    assert made == [0, 1, 2, 3, 4]
    first = plan.pieces(0, [0])
    plan.pieces(4, [0])
    plan.pieces(0, [0])
    assert made == [0, 1, 2, 3, 4, 0]
    plan.pieces(1, [0])
    assert np.array_equal(plan.pieces(0, [0]), first)


def test_fill_is_the_share_of_the_sequences_that_holds_tokens():
    plan = make_plan(
        [np.array([False] + [True] * (SEQ_LEN // 2 - 1))] * 3, "bfd"
    )  # 1.5 sequences in 2
    assert plan.fill() == pytest.approx(0.75)


@given(plans)
def test_sizes_of_sequences_and_epochs_are_those_of_the_steps(plan):
    for epoch in range(plan.train.epochs):
        steps = [step for step in map(plan.step, range(plan.steps)) if step.epoch == epoch]
        assert plan.epoch_steps(epoch) == len(steps)
        sequences = [
            plan.pieces(epoch, [number])
            for step in steps
            for number in sequences_of(plan, step.step)
        ]
        tokens, pieces = plan.sequence_sizes(epoch)
        assert tokens.tolist() == [int((each[:, 2] - each[:, 1]).sum()) for each in sequences]
        assert pieces.tolist() == list(map(len, sequences))


def test_a_run_may_end_inside_its_first_epoch():
    plan = make_plan(some_flags(0, 40), global_batch_size=2, steps=3)
    assert plan.epoch_steps() == 3
