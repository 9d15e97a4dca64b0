"""The proof at the start of a run that packing changes nothing (C4).

In: the loaded model with its loss (sft.py), through the backend it will train with. Out: what the
    model does to its
logits, and the largest differences seen; or BadInput, which names the first layer that differs.

Three short documents of seeded random tokens, one longer than the windows and chunks that a row can
reach, are run packed through our path and alone through the model's own eager attention and layers.
Compared are: the mask each layer would make for itself against what the backend sees (exactly),
every layer's output token by token, and our loss against cross-entropy of the model's own logits.
No list of known models: each one is measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from trainer import dist
from trainer.datatypes import BadInput, Batch
from trainer.model import liger_layers
from trainer.model.attention import checked_masks, other_attention
from trainer.model.loss import LogitTransform
from trainer.model.sft import SftModel
from trainer.utils.text import one_line

SHORT = (24, 17)  # tokens of the first and the last document
PAST_LIMIT = 24  # tokens of the middle one beyond the longest window or chunk
KEPT_FIRST, KEPT_LAST = 16, 48  # tokens of a document that are compared
EAGER_TOKENS = 8192  # longer documents run alone through sdpa: eager attention holds all scores

# Largest ||ours - theirs|| / ||theirs|| of hidden states in any layer, against the model alone and
# against ourselves with other neighbours, and largest relative difference of the loss. In fp32 the
# worst token counts: only the order of sums differs (seen: 2e-6; 0 with other neighbours). In bf16
# the roundings of all layers add up (seen: 0.04 for the worst token) and an expert's router may tip
# over (seen: 0.3 for one token), so that a document's median token counts. Neighbours that are
# seen, in any of the models tried, move it by 0.2 and more.
TOLERANCE = {torch.float32: (1e-4, 1e-5, 1e-4), torch.bfloat16: (0.05, 5e-3, 0.02)}
# A deep model's roundings add up to more than that. How much more is measured: its own two ways of
# attention, eager and sdpa, differ by roundings alone. Ours may differ by this many times as much,
# where that is still less than a defect.
OWN_ROUNDING, MOST_ROUNDING = 2.0, 0.15


class Proof(NamedTuple):
    """What the probe saw: largest relative differences, and the documents' lengths."""

    hidden_difference: float
    loss_difference: float
    lengths: tuple[int, ...]
    transform: LogitTransform


class _Alone(NamedTuple):
    """A document by the model's own means: kept tokens' states after each layer, and summed loss."""

    states: list[torch.Tensor]
    loss: torch.Tensor
    rounding: list[
        float
    ]  # by which the states after each layer differ between its own two ways of attention


@torch.no_grad()
def probe(sft: SftModel, *, seq_len: int, one_document: bool, seed: int) -> Proof:
    """Prove the model, and set `sft.transform`. All ranks must call it: under ZeRO-3 its forwards
    are collective.

    Args:
        seq_len: the longest row a run will make; longer windows are out of reach.
        one_document: every micro-batch of this run is one document (`data.packing: none`,
            `batch.micro_batch_size: 1`), so that documents are proved one by one.

    Raises:
        BadInput: packed differs from alone, naming the first layer that differs, or our loss from
            the model's.
    """
    training = sft.training
    sft.eval()
    try:
        sft.transform = measure_transform(sft.model)
        documents = _documents(sft.model.config.get_text_config(), seq_len, seed)
        alone = [_run_alone(sft.model, ids) for ids in documents]
        groups = [[0], [1], [2]] if one_document else [[0, 1, 2]]
        worst = [
            _compare(sft, [documents[i] for i in group], [alone[i] for i in group])
            for group in groups
        ]
    except _LayerDiffers as difference:
        raise BadInput(_advice(sft, difference, documents, alone, one_document)) from None
    finally:
        sft.train(training)
    hidden, loss = (max(values) for values in zip(*worst))
    return Proof(hidden, loss, tuple(ids.shape[0] for ids in documents), sft.transform)


# ---------------------------------------------------------------------------------------- documents


def _documents(config: Any, seq_len: int, seed: int) -> list[torch.Tensor]:
    """Three documents of random tokens, (L,) int64 each."""
    middle = max(
        [33, *(limit + PAST_LIMIT for limit in limits(config.to_dict()) if limit < seq_len)]
    )
    longest = getattr(config, "max_position_embeddings", None) or middle
    generator = torch.Generator().manual_seed(dist.seed_from(seed, "probe"))
    lengths = (SHORT[0], min(middle, longest), SHORT[1])
    return [
        torch.randint(config.vocab_size, (n,), generator=generator).to(dist.device())
        for n in lengths
    ]


def limits(config: dict[str, Any]) -> set[int]:
    """The lengths of windows and chunks in a model's configuration, by the words their keys are
    made of.
    """
    found = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= limits(value)
        elif (
            any(word in str(key) for word in ("window", "chunk", "local"))
            and type(value) is int
            and value > 1
        ):
            found.add(value)
    return found


def _kept(length: int) -> list[int]:
    """Positions of a document that are compared: all of a short one, both ends of a long one."""
    if length <= KEPT_FIRST + KEPT_LAST:
        return list(range(length))
    return [*range(KEPT_FIRST), *range(length - KEPT_LAST, length)]


def _trained(length: int) -> int:
    """The number of last tokens whose prediction is compared."""
    return min(length - 1, KEPT_LAST)


def _batch(documents: Sequence[torch.Tensor]) -> Batch:
    """The documents packed, the last tokens of each trained with one weight."""
    lengths = [ids.shape[0] for ids in documents]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    positions = [
        p
        for start, n in zip(starts, lengths)
        for p in range(start + n - 1 - _trained(n), start + n - 1)
    ]
    device = documents[0].device
    trained_positions = torch.tensor(positions, device=device)
    ids = torch.cat(list(documents))
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        lengths=tuple(lengths),
        trained_positions=trained_positions,
        targets=ids[trained_positions + 1],
        weights=torch.full((len(positions),), 1 / len(positions), device=device),
        uniform_weight=1 / len(positions),
        document_keys=tuple((0, i, 0) for i in range(len(lengths))),
        sequence_ids=(0,),
    )


# ------------------------------------------------------------------------------------- the two ways


def decoder_layers(model: Any) -> list[nn.Module]:
    """The model's stack of layers: its longest list of modules that has the configured number of
    them.
    """
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    stacks.sort(key=lambda stack: (len(stack) == number, len(stack)))
    return list(stacks[-1]) if stacks else []


@contextmanager
def _states(model: Any, kept: list[int]) -> Iterator[list[torch.Tensor]]:
    """Collects the kept tokens' states, (tokens, H), after each layer and at the decoder's end."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        state = output if isinstance(output, torch.Tensor) else output[0]
        seen.append(state[0, kept])

    with ExitStack() as hooks:
        for module in [*decoder_layers(model), model.get_decoder()]:
            hooks.callback(module.register_forward_hook(hook).remove)
        yield seen


def _run_alone(model: Any, ids: torch.Tensor) -> _Alone:
    own = "eager" if ids.shape[0] <= EAGER_TOKENS else "sdpa"
    states, loss = _own_states(model, ids, own)
    rounding = [0.0] * len(states)
    if states[0].dtype != torch.float32 and own == "eager":
        others, _ = _own_states(model, ids, "sdpa")
        rounding = [_difference(*pair) for pair in zip(others, states)]
    return _Alone(states, loss, rounding)


def _own_states(
    model: Any, ids: torch.Tensor, own_attention: str
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The kept tokens' states after each layer and the summed loss, as transformers computes them."""
    trained = _trained(ids.shape[0])
    fewer = (
        {"logits_to_keep": trained + 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    with (
        liger_layers.plain(model),
        other_attention(model, own_attention),
        _states(model, _kept(ids.shape[0])) as states,
    ):
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False, **fewer).logits[
            0, -trained - 1 : -1
        ]
    return states, F.cross_entropy(logits.float(), ids[-trained:], reduction="sum")


class _LayerDiffers(Exception):
    """Which layer differs, and how."""

    def __init__(self, layer: str, how: str) -> None:
        super().__init__(how)
        self.layer = layer


def _compare(
    sft: SftModel, documents: Sequence[torch.Tensor], alone: Sequence[_Alone]
) -> tuple[float, float]:
    """The largest differences of states and loss between these documents packed and alone."""
    dtype = next(sft.model.parameters()).dtype
    hidden_allowed, neighbour_allowed, loss_allowed = TOLERANCE[dtype]
    kept = [_kept(ids.shape[0]) for ids in documents]
    packed, loss = _run_packed(sft, documents, kept)
    worst = 0.0
    for layer, ours in enumerate(packed):
        pairs = zip(ours, (document.states[layer] for document in alone))
        difference = max(_difference(mine, theirs) for mine, theirs in pairs)
        rounding = min(
            OWN_ROUNDING * max(document.rounding[layer] for document in alone), MOST_ROUNDING
        )
        allowed = max(hidden_allowed, rounding)
        _require(sft.model, layer, difference, allowed, "from the same document alone")
        worst = max(worst, difference)
    _other_neighbours(sft, documents, neighbour_allowed)
    own = float(torch.stack([document.loss for document in alone]).sum()) / sum(
        _trained(len(d)) for d in documents
    )
    off = abs(loss - own) / max(1.0, abs(own))
    if not off <= loss_allowed:
        raise BadInput(
            f"{type(sft.model).__name__}: the loss made from the hidden states ({loss:.6g}) is not "
            f"the one of the "
            f"model's own logits ({own:.6g}), though its layers agree: it does something between "
            f"backbone and head "
            "that packhorse cannot measure; this model cannot be trained here"
        )
    return worst, off


def _other_neighbours(sft: SftModel, documents: Sequence[torch.Tensor], allowed: float) -> None:
    """A document's first half must not change where all the other tokens of its row do.

    The same shapes and kernels run twice, so that even 16-bit types show a neighbour, or a later
    token, that is seen.
    """
    middle = len(documents) // 2
    half = documents[middle].shape[0] // 2
    others = [(ids + 1) % sft.model.config.get_text_config().vocab_size for ids in documents]
    others[middle] = torch.cat([documents[middle][:half], others[middle][half:]])
    kept = [
        list(range(min(half, KEPT_FIRST))) if i == middle else [] for i in range(len(documents))
    ]
    before, _ = _run_packed(sft, documents, kept)
    after, _ = _run_packed(sft, others, kept)
    for layer, (mine, changed) in enumerate(zip(before, after)):
        difference = _difference(changed[middle], mine[middle])
        _require(
            sft.model, layer, difference, allowed, "once its neighbours and later tokens are others"
        )


def _run_packed(
    sft: SftModel, documents: Sequence[torch.Tensor], kept: Sequence[list[int]]
) -> tuple[list[tuple[torch.Tensor, ...]], float]:
    """The kept tokens' states by layer and document, and the loss, of the documents in one row."""
    batch = _batch(documents)
    positions = [
        start + i for start, tokens in zip(batch.cu_seqlens.tolist(), kept) for i in tokens
    ]
    try:
        with checked_masks(sft.model), _states(sft.model, positions) as states:
            loss = float(sft(batch))
    except BadInput:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:  # the model's own refusal
        raise _LayerDiffers(_raising_module(error), one_line(error)) from error
    return [state.split([len(tokens) for tokens in kept]) for state in states], loss


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of a document's tokens, (tokens, H) each: see TOLERANCE."""
    by_token = (ours.float() - theirs.float()).norm(dim=1) / theirs.float().norm(dim=1).clamp_min(
        1e-12
    )
    return float(by_token.max() if theirs.dtype == torch.float32 else by_token.median())


def _require(model: Any, layer: int, difference: float, allowed: float, what: str) -> None:
    if not difference <= allowed:
        how = f"its states differ by {difference:.2g} of their size {what}; {allowed:g} is allowed"
        raise _LayerDiffers(_layer_name(model, layer), how)


def _advice(
    sft: SftModel,
    difference: _LayerDiffers,
    documents: Sequence[torch.Tensor],
    alone: Sequence[_Alone],
    one_document: bool,
) -> str:
    """One sentence: which layer, and whether documents one by one would do."""
    backend = sft.model.config._attn_implementation.removeprefix("packhorse_")
    layers = liger_layers.is_fused(sft.model)
    single = one_document
    if not one_document:
        try:
            for ids, own in zip(documents, alone):
                _compare(sft, [ids], [own])
        except (_LayerDiffers, BadInput):
            single = True
    if single:
        return (
            f"{difference.layer} gives other hidden states through the backend {backend} than by "
            f"the model's own "
            f"attention{' and layers' if layers else ''}, even for one document ({difference}): "
            f"try "
            f"model.attention=reference{', model.layer_kernels=torch' if layers else ''}, or "
            f"another model"
        )
    return (
        f"{difference.layer} does not keep packed documents apart ({difference}): set "
        f"data.packing=none and "
        "batch.micro_batch_size=1, so that every micro-batch is one document, or take another model"
    )


def _layer_name(model: Any, layer: int) -> str:
    layers = decoder_layers(model)
    if layer >= len(layers):
        return f"the end of {type(model.get_decoder()).__name__}"
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    kind = f", {types[layer]}" if layer < len(types) else ""
    return f"layer {layer} ({type(layers[layer]).__name__}{kind})"


def _raising_module(error: BaseException) -> str:
    """The class of the innermost module in whose forward the error arose."""
    name, trace = "the model", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        name = type(module).__name__ if isinstance(module, nn.Module) else name
        trace = trace.tb_next
    return name


# ------------------------------------------------------------------------------------------- logits


def measure_transform(model: Any) -> LogitTransform:
    """What the model's forward does to its head's output, found by putting known numbers there.

    Raises:
        BadInput: it is neither a scale nor a soft cap of the form cap x tanh(scale x logits / cap).
    """
    head = model.get_output_embeddings()
    vocabulary = model.config.get_text_config().vocab_size
    known: list[torch.Tensor] = []

    def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        magnitudes = torch.logspace(-3, 6, output.shape[-1] // 2, device=output.device)
        values = torch.cat([magnitudes, -magnitudes, magnitudes.new_zeros(output.shape[-1] % 2)])
        known.append(values)
        return values.expand(output.shape)

    ids = torch.arange(4, device=dist.device()).unsqueeze(0) % vocabulary
    hook = head.register_forward_hook(replace)
    try:
        with other_attention(model, "eager"):
            out = model(input_ids=ids, use_cache=False).logits[0, -1].double()
    finally:
        hook.remove()
    given = known[-1].double()
    transform = _fit(given, out)
    if transform is None:
        raise BadInput(
            f"{type(model).__name__} changes its logits by more than a scale and a soft cap, "
            "which the loss does not know; this model cannot be trained here"
        )
    return transform


def _fit(given: torch.Tensor, out: torch.Tensor) -> LogitTransform | None:
    """The transform that takes `given` to `out` (float64, magnitudes from 1e-3 to 1e6), if there is
    one.
    """
    scale = float(out[0] / given[0])
    for cap in (None, float(out.abs().max())):
        fitted: Callable[[torch.Tensor], torch.Tensor] = LogitTransform(scale, cap)
        if out.shape == given.shape and torch.allclose(fitted(given), out, rtol=1e-3, atol=1e-6):
            rounded = float(f"{scale:.6g}")
            return LogitTransform(rounded, None if cap is None else float(f"{cap:.6g}"))
    return None
