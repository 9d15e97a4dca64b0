"""Prove at the start of a run that cutting packed sequences over ranks changes nothing (C13).

In: the loaded model, whose packing is proved already (packing_check.py). Out: the largest
difference of hidden states and loss, or BadInput, which names the first layer that differs. As
there, no model is known by name: a layer that carries a state from token to token, as a recurrent
one, gives other states after a cut, and is refused.
"""

from __future__ import annotations

import torch

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput, Batch
from packhorse.trainer.model.decoder import layer_name, recorded_states
from packhorse.trainer.model.document_alone import relative_difference
from packhorse.trainer.model.packing_check import MOST_ROUNDING, TOLERANCE, Proof
from packhorse.trainer.model.probe_documents import pack_documents, random_documents
from packhorse.trainer.model.sft import SftModel

AFTER_CUT = 4  # tokens after a cut that are compared by themselves: a convolution's loss is short
COMPARED_TOKENS = 128  # of a slice
_ADVICE = "set parallel.sequence=1, or take another model"


@torch.no_grad()
def prove_slices(
    sft: SftModel, proof: Proof, *, size: int, zigzag: bool = False, seq_len: int, seed: int
) -> float:
    """Compare each rank's slice of the packing check's sequence with the whole, run on this rank.

    Every rank calls it. Returns the largest relative difference.

    Args:
        proof: of packing.
        size: ranks that share a sequence.
        zigzag: how it is cut; see datatypes.slice_pieces.

    Raises:
        BadInput: the model is one that cannot be cut, or a layer differs.
    """
    config = sft.model.config.get_text_config()
    refused = _refusal(sft, proof)
    if refused:
        raise BadInput(f"parallel.sequence: {refused}; {_ADVICE}")
    training = sft.training
    sft.eval()
    whole = pack_documents(random_documents(config, seq_len, seed))
    own = whole.cut(dist.rank() % size, size, zigzag)
    place = own.own_tokens(torch.arange(len(whole.input_ids)))[:COMPARED_TOKENS].tolist()
    exact, loss = _run(sft, whole, place)
    ours, part = _run(sft, own, list(range(len(place))))
    sft.train(training)
    halves = [
        [relative_difference(x[half], y[half]) for x, y in zip(ours, exact, strict=True)]
        for half in (slice(AFTER_CUT), slice(None))
    ]
    off = torch.tensor(halves, dtype=torch.float64).amax(0).tolist()
    # every group has the same sequence
    total = dist.sum_over_ranks([part])[0] * size / dist.world_size()
    return _require_close(sft, dist.max_over_ranks(off), abs(total - loss) / max(1.0, abs(loss)))


def _refusal(sft: SftModel, proof: Proof) -> str | None:
    """Return why the model cannot be cut, as far as it is known before it is run."""
    if sft.is_random:
        return (
            "the model draws random numbers in training (dropout, or a router's jitter), which "
            "would be others for each number of ranks; set its dropout to 0"
        )
    if proof.by_document:
        return f"{proof.by_document[0]} carries a state from token to token"
    if proof.by_itself:
        return "the model attends by its own code, which knows whole documents only"
    return None


def _run(sft: SftModel, batch: Batch, compared: list[int]) -> tuple[list[torch.Tensor], float]:
    """Return the compared tokens' states after each layer, and the loss."""
    with recorded_states(sft.model, compared, [batch.input_ids.shape[0]]) as states:
        loss = float(sft(batch))
    return states, loss


def _require_close(sft: SftModel, worst: list[float], loss_off: float) -> float:
    dtype = next(sft.model.parameters()).dtype
    hidden_allowed, _, loss_allowed = TOLERANCE[dtype]
    if dtype != torch.float32:
        hidden_allowed = MOST_ROUNDING  # products of other shapes round otherwise in each layer
    for layer, off in enumerate(worst):
        if not off <= hidden_allowed:
            raise BadInput(
                f"parallel.sequence: {layer_name(sft.model, layer)} gives other states where a "
                f"sequence is cut over ranks (they differ by {off:.2g} of their size, and "
                f"{hidden_allowed:g} is allowed): it carries a state from token to token; {_ADVICE}"
            )
    if not loss_off <= loss_allowed:
        raise BadInput(
            f"parallel.sequence: the loss of a sequence that is cut over ranks differs by "
            f"{loss_off:.2g}, though its layers agree; {_ADVICE}"
        )
    return max(*worst, loss_off)
