"""Peak memory of a step against the length of its sequence, on 1, 2 and 4 ranks that share it, with
and without tiles and offload; and what its attention exchanges.

    python benchmarks/long_context_memory.py [--tokens 2048,4096,8192] [--ranks 1,2,4]

A small Llama of random weights in fp32 on CPU processes over gloo, one document a sequence, no
DeepSpeed. Memory is what torch's profiler sees held at most in one forward and backward, beyond
what a first one left: gradients and, with offload, the host's blocks. Its slope is in bytes for
each token of a rank, beside that of `packhorse plan`, which counts what is saved for the backward
and the loss's workspace, and not the gradients of activations. Writes
benchmarks/results/long_context_cpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as td
import torch.multiprocessing as mp
import transformers
from common import machine, table, write_result
from loss_memory import peak_bytes

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import LossSection, ModelSection, OptimSection
from packhorse.trainer.datatypes import Batch
from packhorse.trainer.estimate.memory import loss_workspace
from packhorse.trainer.estimate.model import (
    attention_shapes,
    build_empty_model,
    measure_model,
    trace_activations,
)
from packhorse.trainer.estimate.sequence import exchanged_elements, slice_activations
from packhorse.trainer.model import activation_offload, attention, feed_forward_tiles
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.attention import SequenceGroup
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.sft import SftModel

OUT = Path(__file__).parent / "results" / "long_context_cpu.md"
HIDDEN, LAYERS, VOCABULARY = 128, 6, 512
CONFIG = transformers.LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=4 * HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=VOCABULARY,
)
# activation checkpointing, and whether feed-forward blocks run in tiles
ARMS = {
    "none": ("none", False),
    "full, no tiles": ("full", False),
    "full": ("full", True),
    "offload": ("offload", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="2048,4096,8192")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tokens, ranks = ([int(n) for n in text.split(",")] for text in (args.tokens, args.ranks))
    found = {size: _measure_on_ranks(size, tokens) for size in ranks}
    write_result(args.out, page(found, tokens))


def _measure_on_ranks(size: int, tokens: list[int]) -> dict[str, Any]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(_worker, (size, port, tokens, folder), nprocs=size)
        return json.loads((Path(folder) / "found.json").read_text())


def _worker(rank: int, size: int, port: int, tokens: list[int], folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    small = [
        mock.patch.object(feed_forward_tiles, "FEWEST_TOKENS", HIDDEN),
        mock.patch.object(activation_offload, "SMALLEST_BYTES", 2**16),
        mock.patch.object(activation_offload, "BLOCK_BYTES", 2**16),
    ]
    for patch in small:
        patch.start()
    with dist.process_group():
        group = SequenceGroup(dist.consecutive_group(size), None) if size > 1 else None
        most = {arm: [max(dist.gather(_peak(arm, n, size, group))) for n in tokens] for arm in ARMS}
        found = {"peaks": most, "sent": _count_sent(max(tokens), size, group)}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))


def _model(arm: str, group: SequenceGroup | None) -> SftModel:
    mode, tiles = ARMS[arm]
    torch.manual_seed(0)
    backend = attention.implementation("reference")
    model = transformers.AutoModelForCausalLM.from_config(CONFIG, attn_implementation=backend)
    set_checkpointing(model, mode)
    feed_forward_tiles.set_tiles(model, tiles)
    section = LossSection(kernel="chunked")
    made = SftModel(model, section, 0, torch.device("cpu"), group, offload=mode == "offload")
    made.transform = LogitTransform()
    return made.train()


def _batch(tokens: int, size: int) -> Batch:
    """Return this rank's slice of a sequence of one document."""
    ids = torch.arange(tokens) % VOCABULARY
    whole = Batch(
        input_ids=ids,
        position_ids=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        lengths=(tokens,),
        trained_positions=torch.arange(tokens - 1),
        targets=ids[1:],
        weights=torch.full((tokens - 1,), 1 / tokens),
        document_keys=((0, 0, 0),),
        sequence_ids=(0,),
    )
    return whole.cut(dist.rank() % size, size)


def _peak(arm: str, tokens: int, size: int, group: SequenceGroup | None) -> int:
    """Return the bytes that a step holds at most on this rank, beyond what an earlier one left."""
    made, batch = _model(arm, group), _batch(tokens, size)
    made(batch).backward()
    made.zero_grad(set_to_none=False)
    return peak_bytes(lambda: made(batch).backward(), torch.device("cpu"))


def _count_sent(tokens: int, size: int, group: SequenceGroup | None) -> list[int]:
    """Return the bytes that this rank sends in the forward of one layer: counted, and by the
    planner's formula.
    """
    if group is None:
        return [0, 0]
    exchange, sent = td.all_to_all_single, 0

    def counted(out: Any, given: Any, received: Any, parts: list[int], **rest: Any) -> Any:
        nonlocal sent
        sent += sum(n for rank, n in enumerate(parts) if rank != dist.rank() % size)
        return exchange(out, given, received, parts, **rest)

    made = _model("none", group)
    with mock.patch.object(td, "all_to_all_single", counted), torch.no_grad():
        made(_batch(tokens, size))
    shapes, index = _planned()[1], dist.rank() % size
    formula = exchanged_elements(shapes[:1], [tokens], size, index, None)
    return [4 * sent // LAYERS, 4 * formula]


def _planned() -> tuple[Any, Any]:
    """Return the model as the planner sees it, and its layers' attention."""
    with tempfile.TemporaryDirectory() as folder:
        CONFIG.architectures = ["LlamaForCausalLM"]
        CONFIG.save_pretrained(folder)
        section = ModelSection.model_validate({"name": folder, "dtype": "float32"})
        empty = build_empty_model(section)
    return empty, attention_shapes(empty)


def _plan(arm: str, tokens: int, size: int) -> int:
    """Return the bytes that the planner counts for a rank and grow with the tokens."""
    empty, shapes = _planned()
    (mode, tiles), own = ARMS[arm], tokens // size
    found = trace_activations(empty, own, tiles=tiles, modes=[mode])
    if size > 1:
        found = slice_activations(found, shapes, own, size, None, 4)
    sizes = measure_model(empty, OptimSection())
    return found[mode].kept + found[mode].layer + loss_workspace(sizes, own, "chunked")


def page(found: dict[int, Any], tokens: list[int]) -> str:
    """Return the result as Markdown."""
    rows, first, last = [], min(tokens), max(tokens)
    with mock.patch.object(feed_forward_tiles, "FEWEST_TOKENS", HIDDEN):
        for size, of_size in found.items():
            for arm, peaks in of_size["peaks"].items():
                measured = (peaks[-1] - peaks[0]) * size / (last - first)
                plan = (_plan(arm, last, size) - _plan(arm, first, size)) * size / (last - first)
                cells = [f"{peak / 2**20:.1f}" for peak in peaks]
                rows.append([str(size), arm, *cells, f"{measured:,.0f}", f"{plan:,.0f}"])
    head = ["ranks", "recomputed", *(f"MiB at {n:,}" for n in tokens)]
    head += ["bytes a token of a rank", "planned"]
    exchanged = [
        [str(size), f"{of_size['sent'][0]:,}", f"{of_size['sent'][1]:,}"]
        for size, of_size in found.items()
        if size > 1
    ]
    return f"""# Memory of a step by the length of its sequence

The most that a rank holds in a forward and a backward, beyond weights, gradients and, with offload,
the host's blocks. {LAYERS} layers of {HIDDEN} ({4 * HIDDEN} inside), fp32, one document a sequence,
tiles of {HIDDEN} tokens.

{machine(("torch", "transformers"))}
- `python benchmarks/long_context_memory.py`

{table(head, rows)}

A layer's input is {4 * HIDDEN} bytes a token, what is widest in it {16 * HIDDEN}. The plan counts
what is saved for the backward and the loss's workspace, not the gradients of activations.

## What a layer's attention sends

Bytes of one rank in a forward over {last:,} tokens, counted in the all-to-all and by the planner's
formula.

{table(["ranks", "counted", "formula"], exchanged)}
"""


if __name__ == "__main__":
    main()
