"""Prove at the start of a run that packing changes nothing (C4).

In: the loaded model with its loss (sft.py), on the attention backend that it will train with. Out:
what the model does to its logits, and the largest differences seen; or BadInput, which names the
first layer that differs.

Three short documents of seeded random tokens, one of them longer than each length in the model's
configuration (a window, a chunk, a first context) that a packed sequence can reach, run packed
through our path, and alone through the model's own eager attention and layers. Three things are
compared: the mask that each layer would make for itself with what the backend sees (exactly), every
layer's output token by token, and our loss with the cross-entropy of the model's own logits. There
is no list of known models: each one is measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, chain
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput, Batch
from packhorse.trainer.model import liger_layers, rotary
from packhorse.trainer.model.attention import checked_masks, other_attention
from packhorse.trainer.model.logit_transform import LogitTransform, measure_transform
from packhorse.trainer.model.sft import SftModel
from packhorse.trainer.utils.text import one_line

SHORT = (24, 17)  # tokens of the first and the last document
PAST_LIMIT = 24  # tokens of the middle one beyond the longest window or chunk
COMPARED_FIRST, COMPARED_LAST = 16, 48  # tokens at a document's ends that are compared
EAGER_TOKENS = 8192  # longer documents run alone through sdpa: eager attention holds all scores

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


class _Alone(NamedTuple):
    """One document, computed by the model's own means."""

    states: list[torch.Tensor]  # of the compared tokens, after each layer
    loss: torch.Tensor  # summed over the trained tokens
    rounding: list[float]  # difference of the states between its own two ways of attention


class _LayerDiffers(Exception):
    """Which layer differs, and how."""

    def __init__(self, layer: str, how: str) -> None:
        super().__init__(how)
        self.layer = layer


@torch.no_grad()
def prove_packing(sft: SftModel, *, seq_len: int, one_document: bool, seed: int) -> Proof:
    """Prove the model, and set `sft.transform` and `sft.is_random`.

    Every rank calls it: under ZeRO-3 its forwards are collective.

    Args:
        seq_len: tokens of the longest packed sequence of the run. Longer windows are out of reach.
        one_document: every micro-batch of the run is one document (`data.packing: none` and
            `batch.micro_batch_size: 1`), so that documents are proved one by one.

    Raises:
        BadInput: a layer gives other states packed than alone, or our loss is not the model's.
    """
    training = sft.training
    sft.eval()
    try:
        sft.transform = measure_transform(sft.model)
        documents = _random_documents(sft.model.config.get_text_config(), seq_len, seed)
        # before the others: under ZeRO-3 it frees the small weights that forwards keep whole
        sft.is_random = _draws_random_numbers(sft, _pack(documents[:1]))
        sft.eval()
        alone = [_run_alone(sft.model, ids) for ids in documents]
        try:
            if one_document:
                worst = [_compare(sft, [ids], [own]) for ids, own in zip(documents, alone)]
            else:
                worst = [_compare(sft, documents, alone)]
        except _LayerDiffers as difference:
            advice = _advise(sft, difference, documents, alone, one_document)
            raise BadInput(advice) from None
    finally:
        sft.train(training)
    hidden, loss = (max(values) for values in zip(*worst))
    return Proof(hidden, loss, tuple(ids.shape[0] for ids in documents), sft.transform)


# ---------------------------------------------------------------------------------------- documents


def _random_documents(config: Any, seq_len: int, seed: int) -> list[torch.Tensor]:
    """Return three documents of random tokens, (L,) int64 each."""
    limits = length_limits(config.to_dict())
    longest = getattr(config, "max_position_embeddings", None)
    if rotary.stretches(config):
        limits, longest = {*limits, longest or 0}, None
    middle = max([33, *(limit + PAST_LIMIT for limit in limits if limit < seq_len)])
    generator = torch.Generator().manual_seed(dist.seed_from(seed, "probe"))
    return [
        torch.randint(config.vocab_size, (n,), generator=generator).to(dist.device())
        for n in (SHORT[0], min(middle, longest or middle), SHORT[1])
    ]


# What the keys of lengths are called beyond which a model acts otherwise: windows and chunks of
# attention, the length that its positions were first trained for, the tokens that sparse attention
# chooses, the position from which it scales queries.
_LIMIT_WORDS = ("window", "chunk", "local", "block", "original_max", "topk", "budget", "floor")


def length_limits(config: dict[str, Any]) -> set[int]:
    """Return the lengths in a model's configuration beyond which a document is treated otherwise.

    They are found by the words in their keys, as each model names them in its own way.
    """
    found = set()
    for key, value in config.items():
        is_limit = any(word in str(key) for word in _LIMIT_WORDS)
        if isinstance(value, dict):
            found |= length_limits(value)
        elif is_limit and type(value) is int and value > 1:
            found.add(value)
    return found


def _compared_positions(length: int) -> list[int]:
    """Return the positions that are compared: all of a short document, both ends of a long one."""
    if length <= COMPARED_FIRST + COMPARED_LAST:
        return list(range(length))
    return [*range(COMPARED_FIRST), *range(length - COMPARED_LAST, length)]


def _num_trained(length: int) -> int:
    """Return how many of a document's last tokens are predicted for the comparison of the loss."""
    return min(length - 1, COMPARED_LAST)


def _pack(documents: Sequence[torch.Tensor]) -> Batch:
    """Return the documents packed; the last tokens of each are trained, with one weight."""
    lengths = [ids.shape[0] for ids in documents]
    starts = [0, *accumulate(lengths)]
    device = documents[0].device
    # a document's last token predicts nothing: the next one is its neighbour's
    trained = [range(end - 1 - _num_trained(n), end - 1) for end, n in zip(starts[1:], lengths)]
    trained_positions = torch.tensor([*chain(*trained)], device=device)
    weight = 1 / len(trained_positions)
    ids = torch.cat(list(documents))
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        lengths=tuple(lengths),
        trained_positions=trained_positions,
        targets=ids[trained_positions + 1],
        weights=torch.full((len(trained_positions),), weight, device=device),
        uniform_weight=weight,
        document_keys=tuple((0, i, 0) for i in range(len(lengths))),
        sequence_ids=(0,),
    )


# ------------------------------------------------------------------------------------- the two ways


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the model's stack of layers.

    It is the longest list of modules; one of the configured number of layers comes first.
    """
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    stacks.sort(key=lambda stack: (len(stack) == number, len(stack)))
    return list(stacks[-1]) if stacks else []


@contextmanager
def _recorded_states(model: Any, positions: list[int]) -> Iterator[list[torch.Tensor]]:
    """Record the states at these positions, (tokens, H), after each layer and the whole decoder."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        state = output if isinstance(output, torch.Tensor) else output[0]
        seen.append(state[0, positions])

    with ExitStack() as hooks:
        for module in [*decoder_layers(model), model.get_decoder()]:
            hooks.callback(module.register_forward_hook(hook).remove)
        yield seen


def _run_alone(model: Any, ids: torch.Tensor) -> _Alone:
    # eager attention is the plainest code that the model has: every argument is honoured there
    own = "eager" if ids.shape[0] <= EAGER_TOKENS else "sdpa"
    states, loss = _run_own(model, ids, own)
    rounding = [0.0] * len(states)
    if states[0].dtype != torch.float32 and own == "eager":
        others, _ = _run_own(model, ids, "sdpa")
        rounding = [_difference(*pair) for pair in zip(others, states)]
    return _Alone(states, loss, rounding)


def _run_own(
    model: Any, ids: torch.Tensor, own_attention: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the states after each layer and the summed loss, as transformers computes them."""
    trained = _num_trained(ids.shape[0])
    fewer_logits = (
        {"logits_to_keep": trained + 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    with (
        liger_layers.plain(model),
        other_attention(model, own_attention),
        _recorded_states(model, _compared_positions(ids.shape[0])) as states,
    ):
        out = model(input_ids=ids.unsqueeze(0), use_cache=False, **fewer_logits)
    logits = out.logits[0, -trained - 1 : -1].float()
    return states, F.cross_entropy(logits, ids[-trained:], reduction="sum")


def _run_packed(
    sft: SftModel, documents: Sequence[torch.Tensor], compared: Sequence[list[int]]
) -> tuple[list[tuple[torch.Tensor, ...]], float]:
    """Return the compared tokens' states by layer and document, and the loss, of one sequence."""
    batch = _pack(documents)
    starts = batch.cu_seqlens.tolist()
    positions = [start + i for start, tokens in zip(starts, compared) for i in tokens]
    try:
        with checked_masks(sft.model), _recorded_states(sft.model, positions) as states:
            loss = float(sft(batch))
    except BadInput:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        # a layer that cannot handle document boundaries refuses them by an error of its own
        raise _LayerDiffers(_raising_module(error), one_line(error)) from error
    return [state.split([len(tokens) for tokens in compared]) for state in states], loss


# --------------------------------------------------------------------------------------- comparison


def _compare(
    sft: SftModel, documents: Sequence[torch.Tensor], alone: Sequence[_Alone]
) -> tuple[float, float]:
    """Return the largest differences of states and loss between documents packed and alone."""
    dtype = next(sft.model.parameters()).dtype
    hidden_allowed, neighbour_allowed, loss_allowed = TOLERANCE[dtype]
    compared = [_compared_positions(ids.shape[0]) for ids in documents]
    packed, loss = _run_packed(sft, documents, compared)
    worst = 0.0
    for layer, ours in enumerate(packed):
        difference = max(
            _difference(mine, own.states[layer]) for mine, own in zip(ours, alone, strict=True)
        )
        rounding = max(own.rounding[layer] for own in alone)
        allowed = max(hidden_allowed, min(OWN_ROUNDING * rounding, MOST_ROUNDING))
        _require_close(sft.model, layer, difference, allowed, "from the same document alone")
        worst = max(worst, difference)
    _require_isolation(sft, documents, neighbour_allowed)
    trained = sum(_num_trained(ids.shape[0]) for ids in documents)
    own_loss = float(torch.stack([own.loss for own in alone]).sum()) / trained
    off = abs(loss - own_loss) / max(1.0, abs(own_loss))
    # written so that a NaN fails, too
    if not off <= loss_allowed:
        raise BadInput(
            f"{type(sft.model).__name__}: the loss made from the hidden states ({loss:.6g}) is not "
            f"that of the model's own logits ({own_loss:.6g}), though its layers agree: it does "
            "something between backbone and head that packhorse cannot measure; this model cannot "
            "be trained here"
        )
    return worst, off


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
    before, _ = _run_packed(sft, documents, compared)
    after, _ = _run_packed(sft, others, compared)
    what = "once its neighbours and later tokens are others"
    for layer, (mine, changed) in enumerate(zip(before, after)):
        _require_close(sft.model, layer, _difference(changed[middle], mine[middle]), allowed, what)


def _draws_random_numbers(sft: SftModel, batch: Batch) -> bool:
    """Return whether the forward of training draws random numbers.

    The generators are asked, as configurations name their randomness in many ways: a dropout, a
    layer that is left out, the jitter of a router.
    """
    on_gpu = dist.device().type == "cuda"
    sft.train()
    with torch.random.fork_rng([dist.device()] if on_gpu else []):
        read = [torch.get_rng_state, *([torch.cuda.get_rng_state] if on_gpu else [])]
        before = [state() for state in read]
        sft.hidden_states(batch)
        return not all(torch.equal(state(), old) for state, old in zip(read, before))


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the relative difference of a document's states, (tokens, H) each; see TOLERANCE."""
    ours, exact = ours.float(), theirs.float()
    by_token = (ours - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-12)
    return float(by_token.max() if theirs.dtype == torch.float32 else by_token.median())


def _require_close(model: Any, layer: int, difference: float, allowed: float, what: str) -> None:
    if not difference <= allowed:
        how = f"its states differ by {difference:.2g} of their size {what}; {allowed:g} is allowed"
        raise _LayerDiffers(_layer_name(model, layer), how)


def _advise(
    sft: SftModel,
    difference: _LayerDiffers,
    documents: Sequence[torch.Tensor],
    alone: Sequence[_Alone],
    one_document: bool,
) -> str:
    """Return which layer differs, and whether documents one by one would do."""
    if not one_document:
        try:
            for ids, own in zip(documents, alone):
                _compare(sft, [ids], [own])
        except (_LayerDiffers, BadInput):
            one_document = True  # packing is not to blame
    if not one_document:
        return (
            f"{difference.layer} does not keep packed documents apart ({difference}): set "
            "data.packing=none and batch.micro_batch_size=1, so that every micro-batch is one "
            "document, or take another model"
        )
    backend = sft.model.config._attn_implementation.removeprefix("packhorse_")
    fused = liger_layers.is_fused(sft.model)
    return (
        f"{difference.layer} gives other hidden states through the backend {backend} than by "
        f"the model's own attention{' and layers' if fused else ''}, even for one document "
        f"({difference}): try model.attention=reference"
        f"{', model.layer_kernels=torch' if fused else ''}, or another model"
    )


def _layer_name(model: Any, layer: int) -> str:
    layers = decoder_layers(model)
    if layer >= len(layers):
        return f"the end of {type(model.get_decoder()).__name__}"
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    kind = f", {types[layer]}" if layer < len(types) else ""
    return f"layer {layer} ({type(layers[layer]).__name__}{kind})"


def _raising_module(error: BaseException) -> str:
    """Return the class of the innermost module in whose forward the error arose."""
    callers = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    modules = [type(caller).__name__ for caller in callers if isinstance(caller, nn.Module)]
    return modules[-1] if modules else "the model"
