"""The planner: activations against a real forward, what fits, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from packhorse.trainer.config.recipe import ModelSection, Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine import streamed_adamw
from packhorse.trainer.estimate.choice import largest_micro_batch, memory_by_mode
from packhorse.trainer.estimate.memory import (
    GIB,
    Cluster,
    full_step_stats,
    peak_memory,
    step_seconds,
)
from packhorse.trainer.estimate.model import (
    Activations,
    build_empty_model,
    trace_activations,
)
from packhorse.trainer.estimate.report import (
    build_report,
    describe_report,
    fill_template,
    longest_sequence,
    measure_steps,
    recommend,
    require_fit,
)
from packhorse.trainer.estimate.sequence import longest_slice
from packhorse.trainer.model import feed_forward_tiles
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.attention_kernels import Bounds
from packhorse.trainer.model.feed_forward_tiles import set_tiles
from tests.model_helpers import SIZES, WIDE, saved_bytes, tiny
from tests.models import listed_experts
from tests.ranks import ROOT

TOKENS = 192
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**WIDE),
    "gemma2": transformers.Gemma2Config(
        **WIDE, attn_logit_softcapping=None
    ),  # a soft cap needs a kernel that no CPU has
    "olmo2": transformers.Olmo2Config(**SIZES),
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
}


def really_saved(model: Any) -> int:
    """Return the bytes that a forward on the CPU saves for its backward, without the weights."""
    bounds = Bounds(torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS, (TOKENS,))
    forward = partial(
        model.train().get_decoder(),
        input_ids=torch.randint(SIZES["vocab_size"], (1, TOKENS)),
        position_ids=torch.arange(TOKENS)[None],
        use_cache=False,
        document_bounds=bounds,
    )
    return saved_bytes(model, forward)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_a_forward_saves(
    family: str, checkpointing: str, tmp_path: Path
) -> None:
    """Within 10%, for several families, with and without activation checkpointing."""
    FAMILIES[family].architectures = None
    FAMILIES[family].save_pretrained(tmp_path)
    section = ModelSection.model_validate({"name": str(tmp_path), "dtype": "float32"})
    planned = trace_activations(build_empty_model(section), TOKENS)[checkpointing]
    real = tiny(FAMILIES[family])
    set_checkpointing(real, checkpointing)
    assert planned.kept == pytest.approx(really_saved(real), rel=0.1)
    assert (planned.layer > 0) == (checkpointing == "full")


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_leave_out_what_widens(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By as many bytes as a forward saves less; a tile and the gradients' sums come instead."""
    FAMILIES[family].architectures = None
    FAMILIES[family].save_pretrained(tmp_path)
    section = ModelSection.model_validate({"name": str(tmp_path), "dtype": "float32"})
    empty, real = build_empty_model(section), tiny(FAMILIES[family])
    whole, saved = trace_activations(empty, TOKENS)["full"], really_saved(real)
    tile = SIZES["hidden_size"]
    monkeypatch.setattr(feed_forward_tiles, "FEWEST_TOKENS", tile)
    planned = trace_activations(empty, TOKENS)["full"]
    assert planned.kept == whole.kept
    block = feed_forward_tiles.feed_forward_blocks(real)[0]
    of_tile = saved_bytes(block, partial(block, torch.randn(1, tile, tile, requires_grad=True)))
    sums = (4 + 4) * sum(p.numel() for p in block.parameters())
    set_tiles(real, True)
    less = (saved - really_saved(real)) / SIZES["num_hidden_layers"]
    assert whole.layer - (planned.layer - of_tile - sums) == pytest.approx(less, rel=0.01)


def test_experts_in_fp32_are_planned_to_the_byte(tmp_path: Path) -> None:
    """Beside a model without experts: attention saves something else on a CPU."""
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
    configs = (
        transformers.Qwen3Config(**WIDE),
        transformers.Qwen3MoeConfig(**WIDE, **experts, moe_intermediate_size=24),
    )
    planned, saved = [], []
    for config in configs:
        config.architectures = None
        config.save_pretrained(tmp_path)
        section = ModelSection.model_validate({"name": str(tmp_path), "dtype": "float32"})
        planned.append(trace_activations(build_empty_model(section), TOKENS)["none"].kept)
        saved.append(really_saved(tiny(config)))
    offsets = 4 * SIZES["num_hidden_layers"] * experts["num_experts"]  # of the groups, int32
    assert planned[1] - planned[0] + offsets == saved[1] - saved[0]


def test_selective_keeps_attention_and_what_widens() -> None:
    """By arithmetic: outputs of gate and up, of attention, and its log-sum-exp."""
    model = build_empty_model(debug().model)
    planned = trace_activations(model, TOKENS)
    config = model.config
    heads = config.num_attention_heads
    a_token = 4 * (2 * config.intermediate_size + heads * config.head_dim + heads)
    kept = planned["selective"].kept - planned["full"].kept
    assert kept == config.num_hidden_layers * TOKENS * a_token
    assert planned["none"].kept > planned["selective"].kept + planned["selective"].layer


def debug(*overrides: str) -> Recipe:
    model = f"model.name={ROOT / 'recipes' / 'debug' / 'model'}"
    return load_recipe(
        ROOT / "recipes" / "debug.yaml", [model, "batch.global_batch_size=64", *overrides]
    )


def cluster(gpus: int, gpu_gib: float = 80, **others: float) -> Cluster:
    return Cluster(gpus, 8, gpu_gib * GIB, **{name: gib * GIB for name, gib in others.items()})


def test_auto_takes_the_largest_micro_batch_whose_activations_fit_a_share_of_the_card() -> None:
    recipe = load_recipe("debug", ["batch.micro_batch_size=auto", "batch.global_batch_size=6"])
    model = build_empty_model(recipe.model)
    one = trace_activations(model, recipe.batch.seq_len)["none"].kept
    sizes = [largest_micro_batch(recipe, 4 * n * one) for n in (0, 1, 2, 3, 4, 64)]
    assert sizes == [1, 1, 2, 2, 4, 4]


def test_a_larger_micro_batch_costs_no_recomputation_on_any_number_of_gpus() -> None:
    """Two sequences are taken on cards where one recomputes nothing, or as much as two."""
    recipe = debug("model.dtype=bfloat16", "batch.seq_len=4096", "parallel.deepspeed=zero3")
    needed: dict[int, list[float]] = {}
    for gpus in (1, 1024):
        one, two = (
            memory_by_mode(recipe, cluster(gpus), tokens, tokens, "liger")["none"].gpu_total
            for tokens in (4096, 8192)
        )
        needed[gpus] = [one, two]
    between = [largest_micro_batch(recipe, room[1] - 1) for room in needed.values()]
    assert between == [1, 1], "two sequences would fit there with something recomputed"
    # all of the state lies on one GPU, and what does not fit there fits no other number
    assert largest_micro_batch(recipe, needed[1][1]) == 2
    assert largest_micro_batch(recipe, 4 * GIB) > 2


def test_recomputation_takes_time() -> None:
    """As many FLOPs as tests/unit/test_activation_checkpointing.py counts, for a gated model."""
    report = build_report(debug("model.dtype=bfloat16"), cluster(2))
    model, stats = report.model, report.stats
    none, *others = (
        step_seconds(model, stats, 2, 0.5, mode)
        for mode in ("none", "selective", "full", "offload")
    )
    selective, full, offload = (seconds - none for seconds in others)
    config = transformers.AutoConfig.from_pretrained(ROOT / "recipes" / "debug" / "model")
    hidden, layers = config.hidden_size, config.num_hidden_layers
    keys = config.num_key_value_heads * config.head_dim
    norms = (2 * layers + 1) * hidden
    attention = layers * hidden * 2 * (hidden + keys) + norms
    widening = layers * 2 * hidden * config.intermediate_size
    assert selective == pytest.approx(2 * attention * stats.tokens)
    scores = 2 * layers * hidden * stats.pairs
    assert full == pytest.approx(2 * (attention + widening) * stats.tokens + scores)
    assert offload == full


def test_the_template_that_recomputes_less_may_be_recommended_although_it_sends_more() -> None:
    recipe = debug("model.dtype=bfloat16")
    report = build_report(recipe, cluster(4))
    found = {
        name: replace(report.candidates[name], checkpointing=mode, shortages=[])
        for name, mode in {"zero1": "full", "zero2": "selective"}.items()
    }
    assert found["zero2"].traffic.total > found["zero1"].traffic.total
    weighed = replace(report, candidates=found)
    slow, fast = (recommend(weighed, recipe, flops) for flops in (1e9, 1e18))
    assert slow.startswith("recommended: zero2: ")
    assert "recomputes selective, and takes " in slow
    assert fast.startswith("recommended: zero1: "), "where only communication takes time"


def test_products_in_fp8_take_less_time_and_room_for_their_factors() -> None:
    plain, fp8 = (
        debug("model.dtype=bfloat16", f"model.matmul={m}") for m in ("bf16", "fp8_rowwise")
    )
    reports = [build_report(recipe, cluster(2)) for recipe in (plain, fp8)]
    times, rooms = zip(
        *(
            (
                step_seconds(r.model, r.stats, 2, 1e12),
                r.candidates["zero1"].memory.gpu["activations"],
            )
            for r in reports
        )
    )
    assert times[0] / 1.4 < times[1] < times[0], "attention and the head gain nothing"
    tokens = reports[1].stats.rank_tokens
    assert rooms[1] - rooms[0] == tokens * (64 + 128) + 64 * 128  # of the widest module
    said = "".join(describe_report(reports[1], fp8, 1e12, 0.4))
    assert "products in fp8 1.4 times as fast" in said
    assert "fp8" not in "".join(describe_report(reports[0], plain, 1e12, 0.4))


def test_a_plan_names_what_fits_and_the_fewest_gpus() -> None:
    report = build_report(debug(), cluster(4))
    assert not any(one.shortages for one in report.candidates.values())
    assert require_fit(report).startswith("fits: zero0")
    assert {one.smallest for one in report.candidates.values()} == {1}


def test_where_nothing_fits_one_sentence_says_so() -> None:
    with pytest.raises(
        BadInput, match=r"no template fits 4 GPUs of 1.0 GiB; .*model.activation_checkpointing=full"
    ):
        require_fit(build_report(debug(), cluster(4, gpu_gib=1)))


def test_a_template_moves_what_its_stage_sends() -> None:
    report = build_report(debug("model.dtype=bfloat16"), cluster(4))
    weights, micro_batches = report.model.trained, 64 / 4
    sent = {name: one.traffic.between_gpus for name, one in report.candidates.items()}
    assert sent["zero1"] == pytest.approx(3 / 4 * (2 * 4 + 2) * weights)
    assert sent["zero2"] == pytest.approx(3 / 4 * (4 * micro_batches + 2) * weights)
    assert sent["zero3"] == pytest.approx(3 / 4 * (2 + 2 + 4) * micro_batches * weights)
    to_host = {name: one.traffic.host for name, one in report.candidates.items()}
    assert to_host["zero3"] == 0
    assert to_host["zero3_offload_optimizer"] == pytest.approx(
        (4 * micro_batches + 2) * weights / 4
    )
    assert to_host["zero3_offload_all"] > to_host["zero3_offload_optimizer"]
    assert report.candidates["zero3_nvme"].traffic.nvme > 24 * weights / 4
    # one gather of a step's first forward, and the rest in a group, which four ranks are
    hpz = report.candidates["zero3_hpz"].traffic
    assert hpz.between_gpus == pytest.approx(3 / 4 * (2 + 4 * micro_batches) * weights)
    assert hpz.in_group == pytest.approx(3 / 4 * (4 * micro_batches - 2) * weights)
    assert to_host["zero1_streamed"] == pytest.approx(24 * weights / 4, rel=1e-3)
    assert sent["zero1_streamed"] == sent["zero1"]


def test_a_streamed_state_lies_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_adamw, "CHUNK", 100)
    recipe = debug("model.dtype=bfloat16")
    report = build_report(recipe, cluster(4))
    found = report.candidates
    plain, streamed = found["zero1"].memory, found["zero1_streamed"].memory
    assert streamed.host["optimizer"] == 4 * plain.gpu["optimizer"]
    # at the start the masters are on the GPU; a micro-batch of the debug model takes more
    assert plain.gpu["activations"] > plain.gpu["optimizer"]
    assert streamed.gpu["optimizer"] == 24 * 100
    one = {"groups": ((10**9,),), "kinds": ("adamw",), "group_moments": (8 * 10**9,)}
    model = replace(report.model, **one)
    config = fill_template(recipe, "zero1_streamed", model.hidden)
    alone = peak_memory(model, config, 1, 8, 1, "liger", Activations(7, 0))
    later = sum(alone.gpu[part] for part in ("gathered", "communication", "activations", "loss"))
    assert alone.gpu["optimizer"] == 4 * 10**9 - later


def test_the_template_that_fits_and_communicates_least_is_recommended() -> None:
    recipe = debug("model.dtype=bfloat16")
    report = build_report(recipe, cluster(4))
    said = recommend(report, recipe, 1e12)
    assert said.startswith("recommended: zero1: it needs 1.5 of 80.0 GiB a GPU, moves ")
    assert " GB a GPU and step, recomputes none, and takes " in said
    assert "the least of those that fit (zero1_streamed " in said
    assert said.endswith("; set parallel.deepspeed=zero1")
    small = {
        name: replace(one, shortages=[] if name == "zero3" else ["GPU"])
        for name, one in report.candidates.items()
    }
    zero3 = debug("parallel.deepspeed=zero3")
    alone = recommend(replace(report, candidates=small), zero3, 1e12)
    assert alone.startswith("recommended: zero3")
    assert alone.endswith("and it alone fits"), "the recipe has it already"


def test_where_nothing_is_sent_the_lowest_stage_is_recommended() -> None:
    recipe = debug()
    said = recommend(build_report(recipe, cluster(1)), recipe, 1e12)
    assert said.startswith("recommended: zero0")


@pytest.mark.parametrize(("limit", "what"), [("host", "host"), ("disk", "disk"), ("nvme", "NVMe")])
def test_every_limit_given_is_asked(limit: str, what: str) -> None:
    found = build_report(debug(), cluster(4, **{limit: 1e-6})).candidates
    assert what in found["zero3_nvme"].shortages


def test_more_gpus_than_micro_batches_are_refused_with_good_numbers() -> None:
    with pytest.raises(BadInput, match="only 64 micro-batches: give --gpus 16 or 32 or 64"):
        build_report(debug(), cluster(65))


def test_a_template_that_cannot_train_the_recipe_is_left_out_with_its_reason() -> None:
    report = build_report(debug("model.dtype=bfloat16"), cluster(2))
    assert "fp32 master weights" in report.refused["zero0"]


def test_more_gpus_need_less_of_each_and_less_time() -> None:
    recipe = debug("model.dtype=bfloat16")
    few, many = (build_report(recipe, cluster(gpus)) for gpus in (2, 8))
    zero3 = [report.candidates["zero3"].memory.gpu for report in (few, many)]
    assert zero3[0]["optimizer"] > 3 * zero3[1]["optimizer"]
    seconds = [
        step_seconds(report.model, report.stats, report.cluster.gpus, 1e12)
        for report in (few, many)
    ]
    assert seconds[0] == pytest.approx(4 * seconds[1])


def test_fillers_make_nobody_faster() -> None:
    report = build_report(debug("batch.global_batch_size=4"), cluster(3))
    three, two = (step_seconds(report.model, report.stats, gpus, 1e12) for gpus in (3, 2))
    assert three == pytest.approx(two), "four micro-batches take two turns of either"
    assert "fillers: 33.3%" in "\n".join(describe_report(report, debug(), 1e12, 1.0))


def test_a_fullest_micro_batch_of_the_plan_bounds_all_others(tmp_path: Path) -> None:
    """The stats are of the data's own sequences, in place of full ones."""
    from packhorse.trainer.data.prepare import prepare, train_plan
    from packhorse.trainer.model.load import load_tokenizer

    recipe = debug(
        "batch.global_batch_size=4", "batch.micro_batch_size=2", f"data.cache={tmp_path}"
    )
    plan = train_plan(recipe, prepare(recipe, load_tokenizer(recipe.model), "train"))
    sizes = [
        plan.size(plan.step(step), rows)
        for step in range(plan.steps)
        for rows in plan.step(step).micro_batches
    ]
    stats = measure_steps(plan)
    assert stats.fullest_tokens == max(tokens for tokens, _ in sizes)
    assert stats.fullest_trained == max(trained for _, trained in sizes)
    assert stats.steps == plan.steps
    assert stats.tokens < full_step_stats(recipe).tokens


def test_the_longest_sequence_fits_and_a_longer_one_does_not() -> None:
    """Planned for a short one, whose blocks run whole, it is what a plan for that length says."""
    full = "model.activation_checkpointing=full"
    gpus = cluster(4, gpu_gib=2)
    longest = build_report(debug(full), gpus).candidates["zero3"].longest
    assert longest > 4 * feed_forward_tiles.FEWEST_TOKENS, "its blocks run in tiles"
    for tokens, fits in ((longest, True), (longest + 1024, False)):
        planned = build_report(debug(full, f"batch.seq_len={tokens}"), gpus)
        assert (planned.candidates["zero3"].shortages == []) == fits


def test_below_tiles_the_longest_sequence_is_that_of_whole_blocks() -> None:
    few = 4 * feed_forward_tiles.FEWEST_TOKENS

    def longest(room: int) -> int:
        trace = lambda tokens: Activations(tokens * (1 if tokens >= few else 2), 0)  # noqa: E731
        return longest_slice(lambda of, _: of.kept <= room, trace, hidden=64)

    assert longest(few) == few, "although a little fewer tokens would not fit"
    assert longest(few - 1) == few // 2 - 1024
    assert longest(10 * few) == 10 * few
    assert longest(2047) == 0


def test_ranks_that_share_a_sequence_have_a_share_of_its_activations() -> None:
    """So much longer may the sequence be; groups of ranks take the micro-batches."""
    recipe = debug("batch.seq_len=4096")
    shared = recipe.model_copy(
        update={"parallel": recipe.parallel.model_copy(update={"sequence": 4})}
    )
    alone, four = (build_report(made, cluster(8)) for made in (recipe, shared))
    of_rank = [report.activations["full"].kept for report in (alone, four)]
    assert of_rank[0] == pytest.approx(4 * of_rank[1], rel=0.02)
    longest = [report.candidates["zero3"].longest for report in (alone, four)]
    # not quite: two key heads are repeated for four ranks
    assert 0.95 < longest[1] / (4 * longest[0]) < 1
    assert (
        four.candidates["zero3"].traffic.in_group > 0 == alone.candidates["zero3"].traffic.in_group
    )
    assert "longest batch.seq_len that fits on 4 GPUs each: " in longest_sequence(four)
    assert four.candidates["zero3"].smallest == 4
    with pytest.raises(BadInput, match=r"parallel\.sequence: 4 ranks .*\(6\) does not divide"):
        build_report(shared, cluster(6))
    with pytest.raises(BadInput, match="only 64 micro-batches, for 4 GPUs each: give --gpus 64"):
        build_report(shared, cluster(260))


def test_whole_gradients_wait_at_zero_2_where_ranks_call_other_modules() -> None:
    """Their bytes come to the buckets', where else the two largest gradients wait."""
    recipe = debug("model.dtype=bfloat16")
    model = replace(build_report(recipe, cluster(2)).model, partly_called=False)
    config = fill_template(recipe, "zero2", model.hidden)
    plain, listed = (
        peak_memory(replace(model, partly_called=c), config, 2, 8, 1, "liger", Activations(7, 0))
        for c in (False, True)
    )
    more = listed.gpu["communication"] - plain.gpu["communication"]
    assert more == 2 * model.trained - 2 * 2 * max(map(max, model.groups))


def test_what_the_data_choose_cannot_be_planned(tmp_path: Path) -> None:
    config = listed_experts.ListedConfig(**SIZES)
    config.auto_map = listed_experts.PLACES
    config.save_pretrained(tmp_path)
    shutil.copy(listed_experts.__file__, tmp_path)
    recipe = debug(f"model.name={tmp_path}", "model.trust_remote_code=true")
    with pytest.raises(BadInput, match=r"without weights ListedExperts fails.* on one GPU"):
        build_report(recipe, cluster(2))
