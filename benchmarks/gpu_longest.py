"""The longest packed sequence that an 8B-shaped model trains on one card, by doubling.

    python benchmarks/gpu_longest.py [--budget-s 90]
    python benchmarks/gpu_longest.py --tiny --limit-mib 100        (CPU: a stand-in for its memory)

LoRA of rank 64 beside every linear module, random weights, Liger's layers, every layer recomputed,
feed-forward blocks in tiles. Documents have 8,192 tokens, as memory is that of one long document
and time is not. Each length is one forward and backward, and a line of JSON as soon as it is done.
It ends where memory does, or where the next length would not be done in time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_cases import LLAMA_8B, TINY

FIRST_TOKENS, DOCUMENT_TOKENS = 65_536, 8192
LORA_RANK = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--budget-s", type=float, default=90.0)
    parser.add_argument("--limit-mib", type=float, help="memory of the card that a CPU stands for")
    options = parser.parse_args()
    limit = None if options.limit_mib is None else int(options.limit_mib * 2**20)
    for line in lengths(options.tiny, options.budget_s, limit):
        print(json.dumps(line), flush=True)


def lengths(tiny: bool, budget_s: float, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Give a line for each length that is tried.

    Args:
        limit: bytes that a step may hold on a CPU.
    """
    import torch

    deadline_s = time.monotonic() + budget_s
    device = torch.device("cpu" if tiny else "cuda")
    module, vocabulary = _build(tiny, device)
    document = 32 if tiny else DOCUMENT_TOKENS
    tokens = FIRST_TOKENS * document // DOCUMENT_TOKENS
    while True:
        start = time.monotonic()
        try:
            peak = _step(module, _batch(tokens, document, vocabulary), device, limit)
        except torch.OutOfMemoryError:
            yield {"tokens": tokens, "ended": "out of memory"}
            return
        seconds = time.monotonic() - start
        yield {"tokens": tokens, "seconds": round(seconds, 2), "peak_gib": round(peak / 2**30, 2)}
        tokens *= 2
        if time.monotonic() + 2 * seconds > deadline_s:
            yield {"tokens": tokens, "ended": "no time left"}
            return


def _build(tiny: bool, device: Any) -> tuple[Any, int]:
    """Return the model with its adapter and loss, and the size of its vocabulary."""
    import torch
    import transformers

    from packhorse.trainer.config.recipe import AdapterSection, LossSection
    from packhorse.trainer.model import attention, liger_layers
    from packhorse.trainer.model.activation_checkpointing import set_checkpointing
    from packhorse.trainer.model.feed_forward_tiles import set_tiles
    from packhorse.trainer.model.logit_transform import LogitTransform
    from packhorse.trainer.model.lora import add_adapter
    from packhorse.trainer.model.sft import SftModel

    config = transformers.AutoConfig.for_model(**LLAMA_8B | (TINY if tiny else {}))
    dtype = torch.float32 if tiny else torch.bfloat16
    backend, _ = attention.choose("auto", device, dtype)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention.implementation(backend)
        )
    add_adapter(model, AdapterSection(rank=LORA_RANK), seed=0)
    liger_layers.fuse(model, "auto", device, dtype)
    set_checkpointing(model, "full")
    set_tiles(model, True)
    module = SftModel(model, LossSection(), 0, device)
    module.transform = LogitTransform()
    return module.train(), config.vocab_size


def _batch(tokens: int, document: int, vocabulary: int) -> Any:
    """Return a packed sequence of documents, all of it trained."""
    import torch

    from packhorse.trainer.datatypes import Batch

    ids, number = torch.arange(tokens) % vocabulary, tokens // document
    trained = torch.arange(tokens).view(number, document)[:, :-1].flatten()
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(document).repeat(number),
        cu_seqlens=torch.arange(0, tokens + 1, document, dtype=torch.int32),
        lengths=(document,) * number,
        trained_positions=trained,
        targets=ids[trained + 1],
        weights=torch.full((len(trained),), 1 / len(trained)),
        document_keys=tuple((0, key, 0) for key in range(number)),
        sequence_ids=(0,),
    )


def _step(module: Any, batch: Any, device: Any, limit: int | None) -> int:
    """Run a forward and backward; return the most bytes that the card held.

    Raises:
        torch.OutOfMemoryError: it holds no more, or the stand-in for it does not.
    """
    import torch
    from loss_memory import peak_bytes

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        module(batch.to(device)).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    peak = peak_bytes(lambda: module(batch).backward(), device)
    if limit is not None and peak > limit:
        raise torch.OutOfMemoryError(f"{peak} of {limit} bytes")
    return peak


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
