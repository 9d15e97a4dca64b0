"""Compare attention over slices on several ranks with attention on one, values and gradients.

    python -m tests.numerics.exchange      # on each rank; prints the largest differences as JSON

The elements that are sent are counted, and equal to the planner's formula.

Hypothesis draws the same cases on all ranks, as it is derandomized.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as td
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import LossSection, ModelSection
from packhorse.trainer.datatypes import BadInput, slice_borders
from packhorse.trainer.estimate.model import (
    AttentionShape,
    attention_shapes,
    build_empty_model,
    trace_activations,
)
from packhorse.trainer.estimate.sequence import exchanged_elements, slice_activations
from packhorse.trainer.model import attention, sequence_exchange
from packhorse.trainer.model.attention_kernels import Arguments, Bounds, Slices, reference
from packhorse.trainer.model.packing_check import prove_packing
from packhorse.trainer.model.sequence_check import prove_slices
from packhorse.trainer.model.sft import SftModel
from tests.model_helpers import CPU, documents, pack, saved_bytes, tiny, tiny_llama
from tests.numerics import sequence_defects
from tests.ranks import ROOT

SIZE, VALUE_SIZE = 8, 6
seen = {"ulysses": 0.0, "gather": 0.0, "by layer": 0.0}
counted = {"cases": 0}


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=9),
    groups=st.sampled_from([1, 2, 3, 6]),
    window=st.sampled_from([None, 1, 5]),
    kind=st.sampled_from([*seen]),
    in_full=st.booleans(),
    seed=st.integers(0, 99),
)
def compare(
    lengths: list[int], groups: int, window: int | None, kind: str, in_full: bool, seed: int
) -> None:
    number, heads = dist.world_size(), 6 if dist.world_size() != 4 else 12
    lengths = [*lengths, number]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, SIZE), (groups, SIZE), (groups, VALUE_SIZE))
    whole = [torch.randn(1, h, total, e, generator=generator).double() for h, e in shapes]
    sinks = torch.randn(heads, generator=generator).double() if in_full else None
    wanted = torch.randn(1, total, heads, VALUE_SIZE, generator=generator).double()
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    bounds = Bounds(ends, max(lengths), tuple(lengths))

    borders = slice_borders(lengths, number)
    start, stop = borders[dist.rank() : dist.rank() + 2]
    own = slice(start, stop)
    asked = None if kind == "by layer" else kind
    slices = Slices(borders, dist.rank(), None, asked)

    def run(attend: Any, tensors: list[torch.Tensor], where: Bounds, part: slice) -> list[Any]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        sink = sinks.clone().requires_grad_() if sinks is not None else None
        cap = 3.0 if in_full else None
        out = attend("Layer", *leaves, Arguments(0.4, window, cap, sink, None, where))
        (out * wanted[:, part]).sum().backward()
        return [
            out.detach().transpose(1, 2),
            *(x.grad for x in leaves),
            None if sink is None else sink.grad,
        ]

    *expected, sink_grad = run(reference, whole, bounds, slice(None))
    with mock.patch.object(td, "all_to_all_single", wraps=td.all_to_all_single) as sent:
        *found, own_sink_grad = run(
            lambda *given: sequence_exchange.attend_in_slices(reference, *given),
            [x[:, :, own] for x in whole],
            replace(bounds, slices=slices),
            own,
        )
    for mine, all_of_it in zip(found, expected, strict=True):
        theirs = all_of_it[:, :, own]
        off = float((mine - theirs).norm() / theirs.norm().clamp_min(1e-9))
        seen[kind] = max(seen[kind], off)
    if in_full:
        td.all_reduce(own_sink_grad)
        seen[kind] = max(seen[kind], float((own_sink_grad - sink_grad).abs().max()))
    counted["cases"] += 1
    # what goes to another rank, forward: half of the calls, as each has one back
    forward = sent.call_args_list[: sent.call_count // 2]
    elements = sum(sum(call.args[3]) - call.args[3][dist.rank()] for call in forward)
    layer = AttentionShape(heads, groups, SIZE, VALUE_SIZE, window)
    assert elements == exchanged_elements([layer], lengths, number, dist.rank(), asked)


def check_at_the_start() -> tuple[float, str]:
    """Return what the check sees of a sound model, and what it says of one cut at its borders."""
    group = attention.SequenceGroup(None, None)
    module = SftModel(tiny_llama(), LossSection(), 0, CPU, group)
    proof = prove_packing(module, seq_len=64, one_document=False, seed=0)
    prove = partial(prove_slices, module, proof, size=dist.world_size(), seq_len=64, seed=0)
    difference = prove()
    within = sequence_defects.attend_within_the_slice
    try:
        with mock.patch.object(attention, "attend_in_slices", within):
            prove()
    except BadInput as error:
        return difference, str(error)
    return difference, ""


def saved_over_planned(kind: str) -> float:
    """Return the bytes that a slice's forward saves for the backward, over the planner's."""
    ranks, tokens = dist.world_size(), 96
    folder = str(ROOT / "recipes" / "debug" / "model")
    empty = build_empty_model(ModelSection.model_validate({"name": folder, "dtype": "float32"}))
    shapes = attention_shapes(empty)
    planned = slice_activations(trace_activations(empty, tokens), shapes, tokens, ranks, kind, 4)
    model = tiny(transformers.AutoConfig.from_pretrained(folder)).train()
    # as the planner assumes: the reference holds masks where queries begin later than keys
    attention.set_implementation(model, "packhorse_fused")
    group = attention.SequenceGroup(None, kind if kind == "gather" else None)
    module = SftModel(model, LossSection(), 0, CPU, group)
    batch = pack(documents([ranks * tokens]), [[1]], [1.0]).cut(dist.rank(), ranks)
    return saved_bytes(model, partial(module.hidden_states, batch)) / planned["none"].kept


if __name__ == "__main__":
    with dist.process_group():
        compare()
        difference, said = check_at_the_start()
        saved = [saved_over_planned(kind) for kind in ("ulysses", "gather")]
        found = {**seen, **counted, "check": difference, "said": said, "saved": saved}
        print(json.dumps(found), flush=True)
