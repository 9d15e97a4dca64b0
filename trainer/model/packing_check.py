"""Prove at the start of a run that packing changes nothing (C4).

In: the loaded model with its loss (sft.py), on the attention backend that it will train with. Out:
what the model does to its logits, and the largest differences seen; or BadInput, which names the
first layer that differs.

Three short documents of seeded random tokens, one of them longer than each length in the model's
configuration (a window, a chunk, a first context) that a packed sequence can reach, run packed
through our path, and alone through the model's own eager attention and layers. Three things are
compared: the mask that each layer would make for itself with what the backend sees (exactly), every
layer's output token by token, and our loss with the cross-entropy of the model's own logits. There
is no list of known models: each one is measured. All ranks judge the largest differences of any, so
that they go on in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import liger_layers
from packhorse.trainer.model.attention import (
    checked_masks,
    fused_kernels,
    implementation,
    set_implementation,
)
from packhorse.trainer.model.checks import (
    draws_random_numbers,
    raising_module,
    require_finite_weights,
)
from packhorse.trainer.model.decoder import decoder_layers, layer_name, recorded_states
from packhorse.trainer.model.document_alone import Alone, relative_difference, run_alone
from packhorse.trainer.model.logit_transform import LogitTransform, measure_transform
from packhorse.trainer.model.probe_documents import (
    COMPARED_FIRST,
    compared_positions,
    num_trained,
    pack_documents,
    random_documents,
)
from packhorse.trainer.model.sft import SftModel
from packhorse.trainer.utils.text import error_line, one_line

# Largest ||ours - theirs|| / ||theirs|| of hidden states in any layer, against the model alone and
# against ourselves with other neighbours, and largest relative difference of the loss. In fp32 the
# worst token counts: only the order of sums differs (seen: 2e-6; 0 with other neighbours). In bf16
# the roundings of all layers add up (seen: 0.04 for the worst token) and an expert's router may tip
# over (seen: 0.3 for one token), so that a document's median token counts. Neighbours that are
# seen, in any of the models tried, move it by 0.2 and more.
TOLERANCE = {torch.float32: (1e-4, 1e-5, 1e-4), torch.bfloat16: (0.05, 5e-3, 0.02)}
# A deep model's roundings add up to more than that. How much more is measured: its own two ways of
# attention, eager and sdpa, differ by roundings alone. Ours may differ by OWN_ROUNDING times as
# much, up to MOST_ROUNDING, which is less than a defect's difference.
OWN_ROUNDING, MOST_ROUNDING = 2.0, 0.15


class Proof(NamedTuple):
    """The largest relative differences that the check saw, and the documents' lengths."""

    hidden_difference: float
    loss_difference: float
    lengths: tuple[int, ...]
    transform: LogitTransform
    by_document: tuple[str, ...] = ()  # which modules run once for each document, and why
    by_itself: str = ""  # why the model attends by its own code, a document at a time; or nothing


class _LayerDiffers(Exception):
    """Which layer differs and how. `attended`: modules that went through our backend until then."""

    def __init__(
        self, layer: str, how: str, module: nn.Module | None, attended: set[nn.Module]
    ) -> None:
        super().__init__(how)
        self.layer, self.module, self.attended = layer, module, attended


class _LossDiffers(BadInput):
    """The loss is not the model's own; `attended` as above."""

    def __init__(self, how: str, attended: set[nn.Module]) -> None:
        super().__init__(how)
        self.attended = attended


@torch.no_grad()
def prove_packing(sft: SftModel, *, seq_len: int, one_document: bool, seed: int) -> Proof:
    """Prove the model, and set `sft.transform` and `sft.is_random`.

    Every rank calls it: under ZeRO-3 its forwards are collective.

    Args:
        seq_len: tokens of the longest packed sequence of the run. Longer windows are out of reach.
        one_document: every micro-batch of the run is one document (`data.packing: none` and
            `batch.micro_batch_size: 1`), so that documents are proved one by one.

    Raises:
        BadInput: a layer gives other states packed than alone, our loss is not the model's, or the
            model's own forward fails.
    """
    training = sft.training
    by_document: tuple[str, ...] = ()
    why = ""
    sft.eval()
    try:
        sft.transform = measure_transform(sft.model)
        documents = random_documents(sft.model.config.get_text_config(), seq_len, seed)
        alone = [run_alone(sft.model, ids) for ids in documents]
        try:
            # Not last: under ZeRO-3 it frees the small weights that the other forwards keep whole.
            forward = partial(sft.hidden_states, pack_documents(documents[:1]))
            draws = partial(draws_random_numbers, sft, forward)
            sft.is_random = sft.by_either_attention(draws)
            sft.eval()
            if one_document:
                worst = _compare_each(sft, documents, alone)
            else:
                worst, by_document, why = _compare_packed(sft, documents, alone)
        except (_LayerDiffers, BadInput) as difference:
            require_finite_weights(sft.model)
            raise BadInput(_advise(sft, difference)) from None
    finally:
        sft.train(training)
    hidden, loss = (max(values) for values in zip(*worst))
    lengths = tuple(map(len, documents))
    if sft.attends_by_itself:
        why = why or "packhorse's kernels do not serve it"
    return Proof(hidden, loss, lengths, sft.transform, by_document, why)


# ------------------------------------------------------------------------------------- the two ways


def _run_packed(
    sft: SftModel, documents: Sequence[torch.Tensor], compared: Sequence[list[int]]
) -> tuple[list[tuple[torch.Tensor, ...]], float, set[nn.Module]]:
    """Return the compared tokens' states by layer and document, and the loss, of one sequence.

    The third value are the modules that attended through our backend.
    """
    batch = pack_documents(documents)
    calls = batch.lengths if sft.attends_by_itself else [len(batch.input_ids)]
    starts = batch.cu_seqlens.tolist()
    positions = [start + i for start, tokens in zip(starts, compared) for i in tokens]
    attended: set[nn.Module] = set()
    states: list[torch.Tensor] = []
    loss, error = math.nan, None
    try:
        with (
            checked_masks(sft.model) as attended,
            recorded_states(sft.model, positions, calls) as states,
        ):
            loss = float(sft(batch))
    except torch.OutOfMemoryError:
        raise
    except Exception as caught:
        error = caught
    failures = dist.gather(error and error_line(error))
    if None in failures and any(failures):
        failed = next(text for text in failures if text)
        raise BadInput(f"the model fails on rank {failures.index(failed)} alone: {failed}")
    if isinstance(error, BadInput):
        raise error
    if error:
        # a layer that cannot handle document boundaries refuses them by an error of its own
        module = raising_module(error)
        name = type(module).__name__ if module else "the model"
        raise _LayerDiffers(name, one_line(error), module, attended) from error
    by_document = [state.split([len(tokens) for tokens in compared]) for state in states]
    return by_document, loss, attended


# --------------------------------------------------------------------------------------- comparison


def _compare_packed(
    sft: SftModel, documents: Sequence[torch.Tensor], alone: Sequence[Alone]
) -> tuple[list[tuple[float, float]], tuple[str, ...], str]:
    """Compare packed documents; let a model that mixes them run document by document.

    Returns:
        The largest differences, which modules run by document and why, and why the model does.
    """
    try:
        return *_compare_splitting(sft, documents, alone), ""
    except (_LayerDiffers, BadInput) as error:
        difference = error
    if isinstance(difference, _LayerDiffers) and difference.attended:
        _require_innocent_kernel(sft, difference, documents, alone)
    _compare_each(sft, documents, alone)  # a kernel that is wrong for these, too, ends here
    sft.attends_by_itself = True
    layer = f"{difference.layer}: " if isinstance(difference, _LayerDiffers) else ""
    return [_compare(sft, documents, alone)], (), f"{layer}{difference}"


def _require_innocent_kernel(sft: SftModel, difference: _LayerDiffers, *documents: Any) -> None:
    """Refuse a kernel that mixes documents which the reference keeps apart."""
    backend, reference = sft.model.config._attn_implementation, implementation("reference")
    if backend == reference:
        return
    set_implementation(sft.model, reference)
    try:
        _compare(sft, *documents)
    except (_LayerDiffers, BadInput):
        return
    finally:
        set_implementation(sft.model, backend)
    raise BadInput(
        f"{difference.layer} does not keep packed documents apart through the backend "
        f"{backend.removeprefix('packhorse_')} ({difference}), and does through reference: set "
        f"{' or '.join(_other_backends(sft))}"
    )


def _compare_splitting(
    sft: SftModel, documents: Sequence[torch.Tensor], alone: Sequence[Alone]
) -> tuple[list[tuple[float, float]], tuple[str, ...]]:
    """Compare packed documents; let modules that mix them run document by document, if that helps.

    A module that attends through our backend is never among them: packed attention must be right.

    Returns:
        The largest differences, and the modules' classes with the reason.
    """
    found: dict[str, str] = {}
    first: _LayerDiffers | None = None
    while True:
        try:
            return [_compare(sft, documents, alone)], tuple(
                f"{name} ({why})" for name, why in found.items()
            )
        except (_LayerDiffers, BadInput) as error:
            difference = error if isinstance(error, _LayerDiffers) else None
            first = first or difference
            mixing = _modules_like(sft.model, difference) if difference else []
            name = type(mixing[0]).__name__ if mixing else ""
            if not mixing or name in found:
                sft.run_whole()
                raise first or error from None
            found[name] = str(difference)
            sft.run_by_document(mixing)


def _compare_each(
    sft: SftModel, documents: Sequence[torch.Tensor], alone: Sequence[Alone]
) -> list[tuple[float, float]]:
    """Compare documents one by one; let a model that cannot attend through us attend by itself.

    One that does attend through us, and gives other states, is not helped: its kernel is wrong.
    """
    try:
        return [_compare(sft, [ids], [own]) for ids, own in zip(documents, alone)]
    except (_LayerDiffers, BadInput) as error:
        if getattr(error, "attended", None):
            raise
        sft.attends_by_itself = True
        try:
            return [_compare(sft, [ids], [own]) for ids, own in zip(documents, alone)]
        except (_LayerDiffers, BadInput):
            sft.attends_by_itself = False
            raise error from None


def _modules_like(model: nn.Module, difference: _LayerDiffers) -> list[nn.Module]:
    """Return the modules of the class that differs, without those that attend through us."""
    same = [m for m in model.modules() if type(m) is type(difference.module)]
    return [m for m in same if not difference.attended.intersection(m.modules())]


def _compare(
    sft: SftModel, documents: Sequence[torch.Tensor], alone: Sequence[Alone]
) -> tuple[float, float]:
    """Return the largest differences of states and loss between documents packed and alone."""
    dtype = next(sft.model.parameters()).dtype
    hidden_allowed, neighbour_allowed, loss_allowed = TOLERANCE[dtype]
    compared = [compared_positions(ids.shape[0]) for ids in documents]
    packed, loss, attended = _run_packed(sft, documents, compared)
    trained = sum(num_trained(ids.shape[0]) for ids in documents)
    own_loss = float(torch.stack([own.loss for own in alone]).sum()) / trained
    by_document = [
        [*map(relative_difference, (mine[i] for mine in packed), own.states)]
        for i, own in enumerate(alone)
    ]
    here = torch.tensor(by_document, dtype=torch.float64).amax(0).tolist()
    here.append(abs(loss - own_loss) / max(1.0, abs(own_loss)))
    # a rank that went on alone in another way would make other gathers than the rest
    *worst, off = dist.max_over_ranks(here)
    for layer, difference in enumerate(worst):
        rounding = max(own.rounding[layer] for own in alone)
        allowed = max(hidden_allowed, min(OWN_ROUNDING * rounding, MOST_ROUNDING))
        what = "from the same document alone"
        _require_close(sft.model, layer, attended, difference, allowed, what)
    _require_isolation(sft, documents, neighbour_allowed)
    # written so that a NaN fails, too
    if not off <= loss_allowed:
        raise _LossDiffers(
            f"{type(sft.model).__name__}: the loss made from the hidden states ({loss:.6g}) is not "
            f"that of the model's own logits ({own_loss:.6g}), though its layers agree: it does "
            "something between backbone and head that packhorse cannot measure; this model cannot "
            "be trained here",
            attended,
        )
    return max(worst), off


def _require_isolation(sft: SftModel, documents: Sequence[torch.Tensor], allowed: float) -> None:
    """Require that a document's first half keeps its states while all other tokens change.

    The same shapes and kernels run twice, so that nothing is rounded in another way: even 16-bit
    types then show a neighbour, or a later token, that is seen.
    """
    middle = len(documents) // 2
    half = documents[middle].shape[0] // 2
    others = [(ids + 1) % sft.model.config.get_text_config().vocab_size for ids in documents]
    others[middle] = torch.cat([documents[middle][:half], others[middle][half:]])
    compared: list[list[int]] = [[] for _ in documents]
    compared[middle] = list(range(min(half, COMPARED_FIRST)))
    before, *_ = _run_packed(sft, documents, compared)
    after, _, attended = _run_packed(sft, others, compared)
    what = "once its neighbours and later tokens are others"
    here = [relative_difference(new[middle], old[middle]) for old, new in zip(before, after)]
    for layer, difference in enumerate(dist.max_over_ranks(here)):
        _require_close(sft.model, layer, attended, difference, allowed, what)


def _require_close(
    model: Any,
    layer: int,
    attended: set[nn.Module],
    difference: float,
    allowed: float,
    what: str,
) -> None:
    if not difference <= allowed:
        how = f"its states differ by {difference:.2g} of their size {what}; {allowed:g} is allowed"
        module = [*decoder_layers(model), None][layer]
        raise _LayerDiffers(layer_name(model, layer), how, module, attended)


def _advise(sft: SftModel, difference: _LayerDiffers | BadInput) -> str:
    """Return which layer differs, even for a document alone, and what may help."""
    if isinstance(difference, BadInput):
        return str(difference)
    backend = sft.model.config._attn_implementation.removeprefix("packhorse_")
    fused = liger_layers.is_fused(sft.model)
    layers = ["model.layer_kernels=torch"] if fused else []
    other = [*filter(None, [" or ".join(_other_backends(sft))]), *layers]
    advice = f"try {' and '.join(other)}, or" if other else "take"
    return (
        f"{difference.layer} gives other hidden states through the backend {backend} than by "
        f"the model's own attention{' and layers' if fused else ''}, even for one document "
        f"({difference}): {advice} another model"
    )


def _other_backends(sft: SftModel) -> list[str]:
    """Return the settings of the other backends that run here, the fast ones first."""
    own = sft.model.config._attn_implementation.removeprefix("packhorse_")
    if own == "reference":
        return []
    weight = next(sft.model.parameters())
    fused = [kernel.partition(" ")[0] for kernel in fused_kernels(weight.device, weight.dtype)]
    names = dict.fromkeys([*fused, "reference"])
    return [f"model.attention={name}" for name in names if name != own]
