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

import deepspeed
import torch
import torch.distributed as td
import transformers
from deepspeed.runtime.sequence_parallel import ulysses_sp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from packhorse.trainer import datatypes, dist
from packhorse.trainer.config.recipe import LossSection, ModelSection
from packhorse.trainer.datatypes import BadInput, slice_pieces
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
from tests.model_helpers import CPU, SIZES, documents, pack, relative, saved_bytes, tiny
from tests.numerics import sequence_defects
from tests.ranks import ROOT
from tests.unit.test_rotary import CHANGING

SIZE, VALUE_SIZE = 8, 6
LLAMA = transformers.LlamaConfig(**SIZES)
seen = {"ulysses": 0.0, "gather": 0.0, "ring": 0.0, "by layer": 0.0}
counted = {"cases": 0}


@settings(
    max_examples=80,
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

    asked = None if kind == "by layer" else kind
    pieces = slice_pieces(lengths, number, asked == "ring")
    own = [token for piece in pieces[dist.rank()] for token in range(*piece)]
    slices = Slices(pieces, dist.rank(), None, asked)

    def run(attend: Any, tensors: list[torch.Tensor], where: Bounds, part: Any) -> list[Any]:
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
    # what goes to another rank, forward: half of the calls, as each has one back; a ring's has two
    in_ring = sequence_exchange.goes_round(asked, lengths, window)
    forward = sent.call_args_list[: sent.call_count // (2 + in_ring)]
    elements = sum(sum(call.args[3]) - call.args[3][dist.rank()] for call in forward)
    layer = AttentionShape(heads, groups, SIZE, VALUE_SIZE, window)
    assert elements == exchanged_elements([layer], lengths, number, dist.rank(), asked)


def check_at_the_start(
    kind: str | None, config: Any = LLAMA, seq_len: int = 64
) -> tuple[float, str]:
    """Return what the check sees of a sound model, and what it says of one whose documents, or
    whose rotary tables, are cut at a slice's borders.
    """
    group = attention.SequenceGroup(None, kind)
    module = SftModel(tiny(config), LossSection(), 0, CPU, group)
    proof = prove_packing(module, seq_len=seq_len, one_document=False, seed=0)
    cut = {"size": dist.world_size(), "zigzag": kind == "ring"}
    prove = partial(prove_slices, module, proof, **cut, seq_len=seq_len, seed=0)
    difference = prove()
    within, parts = sequence_defects.attend_within_the_slice, Bounds.own_parts
    of_parts = property(lambda self: [(tokens, tokens) for tokens, _ in parts.__get__(self)])
    defect = (
        mock.patch.object(attention, "attend_in_slices", within)
        if config is LLAMA
        else mock.patch.object(Bounds, "own_parts", of_parts)
    )
    try:
        with defect:
            prove()
    except BadInput as error:
        return difference, str(error)
    return difference, ""


def differs_from_deepspeed() -> float:
    """Return how far attention by heads is from DeepSpeed's own, of a document in even slices."""
    number, tokens, heads, groups = dist.world_size(), 8, 12, 3 if dist.world_size() == 3 else 2
    lengths = (number * tokens,)
    bounds = Bounds(torch.tensor([0, *lengths], dtype=torch.int32), *lengths, lengths)
    plain = Arguments(None, None, None, None, None, bounds)
    slices = Slices(slice_pieces(lengths, number), dist.rank(), None, "ulysses")
    in_slices = plain._replace(bounds=replace(bounds, slices=slices))
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    group: Any = td.group.WORLD
    theirs = ulysses_sp.UlyssesSPAttentionHF(
        lambda module, q, k, v, *_, **__: (reference("Layer", q, k, v, plain), None),
        *(1, heads, SIZE, groups, 1, group),
        local_seq_length=tokens,
        global_seq_length=sum(lengths),
    )
    positions = torch.arange(tokens)[None]
    results = []
    for attend in (
        lambda q, k, v: sequence_exchange.attend_in_slices(reference, "Layer", q, k, v, in_slices),
        lambda *qkv: theirs(theirs, *qkv, None, position_ids=positions)[0],
    ):
        generator = torch.Generator().manual_seed(dist.rank())
        qkv = [
            torch.randn(1, h, tokens, SIZE, generator=generator).double().requires_grad_()
            for h in (heads, groups, groups)
        ]
        out = attend(*qkv).reshape(tokens, heads, SIZE)
        (out * torch.arange(heads).view(-1, 1)).sum().backward()
        results.append([out.detach(), *(x.grad for x in qkv)])
    return max(map(relative, *results))


def saved_over_planned(kind: str) -> float:
    """Return the bytes that a slice's forward saves for the backward, over the planner's."""
    ranks, tokens = dist.world_size(), 96
    folder = str(ROOT / "recipes" / "debug" / "model")
    empty = build_empty_model(ModelSection.model_validate({"name": folder, "dtype": "float32"}))
    shapes = attention_shapes(empty)
    planned = slice_activations(trace_activations(empty, tokens), shapes, tokens, ranks, kind, 4)
    model = tiny(transformers.AutoConfig.from_pretrained(folder)).train()
    # as the planner assumes: the reference holds masks where queries begin later than keys
    attention.set_implementation(model, f"packhorse_{'reference' if kind == 'ring' else 'fused'}")
    group = attention.SequenceGroup(None, None if kind == "ulysses" else kind)
    module = SftModel(model, LossSection(), 0, CPU, group)
    whole = pack(documents([ranks * tokens]), [[1]], [1.0])
    batch = whole.cut(dist.rank(), ranks, kind == "ring")
    return saved_bytes(model, partial(module.hidden_states, batch)) / planned["none"].kept


if __name__ == "__main__":
    # zigzags of short documents
    with dist.process_group(), mock.patch.object(datatypes, "ZIGZAG_TOKENS", 1):
        compare()
        # rotary tables by a document's length, of which a rank has a part
        changing = [config for name, config in CHANGING.items() if "moe" not in name]  # no jitter
        tables = [(kind, config, 128) for config in changing for kind in (None, "ring")]
        checks = [check_at_the_start(*given) for given in [(None,), ("ring",), *tables]]
        differences, said = zip(*checks, strict=True)
        saved = [saved_over_planned(kind) for kind in ("ulysses", "gather", "ring")]
        found = {**seen, **counted, "check": max(differences), "said": said, "saved": saved}
        found |= {"DeepSpeed": differs_from_deepspeed()}
        print(json.dumps(found), flush=True)
