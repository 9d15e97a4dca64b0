"""Run a document by itself through the model's own code, for the packing check to compare with.

In: the loaded model and a document's tokens. Out: its states after each layer, its loss, and how
much its layers' roundings add up to.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from packhorse.trainer import dist
from packhorse.trainer.model import liger_layers
from packhorse.trainer.model.attention import other_attention
from packhorse.trainer.model.decoder import recorded_states
from packhorse.trainer.model.probe_documents import compared_positions, num_trained

EAGER_TOKENS = 8192  # longer documents run alone through sdpa: eager attention holds all scores


class Alone(NamedTuple):
    """One document, computed by the model's own means."""

    states: list[torch.Tensor]  # of the compared tokens, after each layer
    loss: torch.Tensor  # summed over the trained tokens
    rounding: list[float]  # difference of the states between its own two ways of attention


def run_alone(model: Any, ids: torch.Tensor) -> Alone:
    """Return what the model computes of a document (T,). Every rank calls it."""
    # eager attention is the plainest code that the model has: every argument is honoured there
    own = "eager" if ids.shape[0] <= EAGER_TOKENS else "sdpa"
    states, loss = _run_own(model, ids, own)
    rounding = [0.0] * len(states)
    if states[0].dtype != torch.float32 and own == "eager":
        others, _ = _run_own(model, ids, "sdpa")
        here = [relative_difference(*pair) for pair in zip(others, states)]
        rounding = dist.max_over_ranks(here)
    return Alone(states, loss, rounding)


def _run_own(
    model: Any, ids: torch.Tensor, own_attention: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the states after each layer and the summed loss, as transformers computes them."""
    trained = num_trained(ids.shape[0])
    fewer_logits = (
        {"logits_to_keep": trained + 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    with (
        liger_layers.plain(model),
        other_attention(model, own_attention),
        recorded_states(model, compared_positions(ids.shape[0]), [ids.shape[0]]) as states,
    ):
        out = model(input_ids=ids.unsqueeze(0), use_cache=False, **fewer_logits)
    logits = out.logits[0, -trained - 1 : -1].float()
    return states, F.cross_entropy(logits, ids[-trained:], reduction="sum")


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the relative difference of a document's states, (tokens, H) each; see TOLERANCE."""
    ours, exact = ours.float(), theirs.float()
    by_token = (ours - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-12)
    return float(by_token.max() if theirs.dtype == torch.float32 else by_token.median())
