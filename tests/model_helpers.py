"""Tiny random models and hand-made batches for the tests of trainer/model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from packhorse.trainer.config.recipe import LossSection
from packhorse.trainer.datatypes import Batch
from packhorse.trainer.model import attention
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.new_weights import initialise
from packhorse.trainer.model.sft import SftModel

transformers.logging.set_verbosity_error()

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WIDE = {**SIZES, "head_dim": 8}


def tiny(config: Any, dtype: torch.dtype = torch.float32, backend: str = "reference") -> Any:
    """Return a random transformers model that attends through packhorse."""
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.implementation(backend), dtype=dtype
    )
    initialise(model, 0, lambda parameters, write=False: nullcontext())
    return model


def tiny_llama(**changes: Any) -> Any:
    return tiny(transformers.LlamaConfig(**{**SIZES, **changes}))


def sft(
    model: Any, kernel: str = "chunked", alpha: float = 0.0, transform: LogitTransform | None = None
) -> SftModel:
    """Return the model with its loss; the logits' transform is given instead of measured."""
    made = SftModel(
        model, LossSection.model_validate({"kernel": kernel, "neftune_alpha": alpha}), 0, CPU
    )
    made.transform = transform or LogitTransform()
    return made


def documents(
    lengths: Sequence[int], vocabulary: int = SIZES["vocab_size"], seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]


def pack(
    ids: Sequence[torch.Tensor],
    trained: Sequence[Sequence[int]],
    weights: Sequence[float],
    keys: Sequence[int] | None = None,
) -> Batch:
    """Return the documents packed into a batch.

    Args:
        trained: for each document, the positions whose next token is trained.
        weights: for each document, the weight of each of these tokens.
        keys: for each document, its number in the data.
    """
    lengths = [len(d) for d in ids]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    positions = torch.tensor(
        [start + p for start, ps in zip(starts, trained) for p in ps], dtype=torch.long
    )
    by_token = torch.tensor([w for w, ps in zip(weights, trained) for _ in ps], dtype=torch.float32)
    tokens = torch.cat(list(ids))
    return Batch(
        input_ids=tokens,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        lengths=tuple(lengths),
        trained_positions=positions,
        targets=tokens[positions + 1],
        weights=by_token,
        document_keys=tuple((0, key, 0) for key in (keys or range(len(lengths)))),
        sequence_ids=(0,),
    )


def loss_and_gradients(model: SftModel, *batches: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of these batches in training, and every parameter's gradient."""
    model.train()
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = model(batch)
        loss.backward()
        total += loss.item()
    return total, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def saved_bytes(model: Any, forward: Callable[[], Any]) -> int:
    """Return the bytes that a forward saves for its backward, without the model's weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, tuple[int, Any]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # the tensor is kept alive, so that an address comes once
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in saved.values())


def interpreted(module: str, function: str) -> Any:
    """Run a function in a process in which Triton interprets; return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import {function}; {function}()"],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return ||ours - theirs|| / ||theirs||, computed in float64."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
