"""Balance the experts of a mixture by an auxiliary loss, and measure how tokens spread over them.

In: what the routers said of a packed micro-batch, a layer each, and the Batch. Out: this rank's
share of the step's auxiliary loss, () float32, and sums for the log.

For a document of L tokens that each choose k of E experts, and a layer,

    aux = E x sum over experts e of (choices of e / L) x (mean probability of e)

which is k where all experts get the same (Fedus et al., 2022). It is taken over each document, as
in DeepSeek V3's sequence-wise loss (2024, equations 17 to 20), and averaged over layers, and over
documents with the weights of their trained tokens (C2). So packing, micro-batches and ranks change
nothing: over a micro-batch, as elsewhere, its cut would count, and documents that are packed
together would push each other.

Choices are the router's own, with its bias and its groups of experts, which stay as they are. Where
it does not hand them out they are those of the highest scores. A probability is the score that the
router weighs experts by, over the sum of all: a softmax, or sigmoids as in DeepSeek V3.

Where a document lies on several ranks (C13), choices and weights are summed over them.

Shapes: L layers with experts, T tokens, D documents, E experts, k chosen ones.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as td
import torch.nn.functional as F

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput, Batch
from packhorse.trainer.model.router_records import Routed, RouterRecords

_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")

# Logarithms of the scores by which routers weigh experts: of a softmax (up to a sum), of sigmoids,
# and of DeepSeek V4's square roots of softplus.
_SCORES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda x: x,
    F.logsigmoid,
    lambda x: F.softplus(x).clamp_min(1e-30).log() / 2,
)
# Largest mean difference of a chosen expert's share of its token's weights. bf16 rounds by 0.002.
_SAME_SHARE = 0.01


class RouterLoss:
    """The auxiliary loss of a model's routers, with sums of what they did since the last `read`.

    `sums` are the auxiliary loss, the entropy, and (layers, E) C2's weights by expert. They are put
    back where a step is not applied, as it does not count (C12).

    Args:
        model: a transformers model with experts, whose routers transformers can record.

    Raises:
        BadInput: it has none, or does not say how many experts a token chooses.
    """

    def __init__(self, model: Any, coefficient: float) -> None:
        config = model.config.get_text_config()
        chosen = [getattr(config, name, None) for name in _CHOSEN]
        self._chosen = next((k for k in chosen if isinstance(k, int)), 0)
        self.records = RouterRecords(model)
        if not self.records.routers:
            raise BadInput(
                f"loss.router_aux: {type(model).__name__} has no router whose logits transformers "
                "records; remove the key"
            )
        if not self._chosen:  # as DBRX's, in a part of it
            raise BadInput(
                f"loss.router_aux: the configuration of {type(model).__name__} does not say how "
                f"many experts a token chooses ({', '.join(_CHOSEN)}); remove the key"
            )
        named = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        self._has_bias = any(n.endswith(("e_score_correction_bias", "expert_bias")) for n in named)
        self._coefficient, self._name = coefficient, type(model).__name__
        # measured on the first micro-batch
        self._score: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin the sums anew."""
        self.sums: tuple[Any, Any, Any] = 0.0, 0.0, 0.0  # on the device from the first batch on

    def __call__(self, routed: Sequence[Routed], batch: Batch, group: Any = None) -> torch.Tensor:
        """Return coefficient x the batch's share of the step's auxiliary loss, and add to the sums.

        Args:
            routed: of each layer with experts.
            group: the ranks that have the other slices of the batch, if it is one.
        """
        device, documents = batch.weights.device, len(batch.lengths)
        lengths_D = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long()
        number = torch.arange(documents, device=device)
        of_all = torch.repeat_interleave(number, lengths_D, output_size=sum(batch.lengths))
        document_T = batch.own_tokens(of_all)
        weights_D = torch.zeros(documents, device=device).index_add_(
            0, document_T[batch.trained_positions], batch.weights
        )
        routed = [self._of_tokens(layer, len(document_T)) for layer in routed]
        score = self._score or self._measure_score(routed)
        log_LTE = [score(layer.scores.float()).log_softmax(-1) for layer in routed]
        chosen_LTE = [self._choices(layer) for layer in routed]
        choices_LDE = torch.stack(
            [x.new_zeros(documents, x.shape[1]).index_add_(0, document_T, x) for x in chosen_LTE]
        )
        if batch.slice[1] > 1:  # a document's other tokens
            for sums in (weights_D, choices_LDE):
                td.all_reduce(sums, group=group)
        # what a token counts: its share of the document's weight
        weight_T1 = (weights_D / lengths_D)[document_T].unsqueeze(1)
        aux, entropy, loads = [], [], []
        for log_TE, chosen_TE, choices_DE in zip(log_LTE, chosen_LTE, choices_LDE, strict=True):
            experts, probability_TE = log_TE.shape[-1], log_TE.exp()
            share_TE = (choices_DE / lengths_D.unsqueeze(1))[document_T]
            aux.append(experts * (weight_T1 * share_TE * probability_TE).sum())
            spread = -(weight_T1 * probability_TE * log_TE).sum().detach()
            entropy.append(spread / math.log(experts))
            loads.append((weight_T1 * chosen_TE).sum(0) / self._chosen)
        mean = torch.stack(aux).mean()
        more = mean.detach(), torch.stack(entropy).mean(), torch.stack(loads)
        aux_sum, entropy_sum, load = map(operator.add, self.sums, more)
        self.sums = aux_sum, entropy_sum, load
        return self._coefficient * mean

    def _of_tokens(self, routed: Routed, tokens: int) -> Routed:
        """Return what a router said of a batch's tokens: calls without effect come after them."""
        scores = routed.scores
        if scores.dim() != 2 or len(scores) < tokens:  # as Doge's, two keys an expert
            raise BadInput(
                f"loss.router_aux: {self._name} scores no experts: {tokens} tokens have "
                f"{tuple(scores.shape)} scores; remove the key"
            )
        if self._has_bias and routed.chosen is None:
            raise BadInput(
                f"loss.router_aux: {self._name} chooses its experts by a bias, and its router does "
                "not hand out the choice; remove the key"
            )
        weights, chosen = (part if part is None else part[:tokens] for part in routed[1:])
        return Routed(scores[:tokens], weights, chosen)

    def _choices(self, routed: Routed) -> torch.Tensor:
        """Return (T, E) float: 1 where a token chose an expert."""
        scores = routed.scores.detach()
        none = torch.zeros_like(scores, dtype=torch.float32)
        if routed.chosen is None:
            return none.scatter_(1, scores.topk(self._chosen).indices, 1.0)
        ones = torch.ones_like(routed.chosen, dtype=torch.float32)
        if routed.weights is not None:  # 0 is none, as where ZAYA skips the experts
            ones = (routed.weights != 0).float()
        return none.scatter_add_(1, routed.chosen.long(), ones)

    def _measure_score(self, routed: Sequence[Routed]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the logarithm of the score by which the routers weigh experts, alike on all ranks.

        A record may be of probabilities, as Gemma 4's. Else it is the score whose shares the chosen
        experts' weights have, and a softmax, as in transformers' own loss, where none is.
        """
        here = torch.zeros(1 + len(_SCORES), dtype=torch.float64, device=routed[0].scores.device)
        for layer in routed:
            scores_TE = layer.scores.detach().float()
            is_share = (scores_TE >= 0).all() and ((scores_TE.sum(-1) - 1).abs() < 1e-2).all()
            here[0] += 0.0 if is_share else 1.0
            here[1:] += torch.stack([_off(layer, scores_TE, score) for score in _SCORES])
        no_shares, *off = dist.sum_over_ranks(here.tolist())
        layers = len(routed) * dist.world_size()
        if no_shares == 0:
            score = _log_of_shares
        else:
            best = min(range(len(off)), key=off.__getitem__)
            score = _SCORES[best if off[best] < _SAME_SHARE * layers else 0]
        if all(map(math.isfinite, off)):  # a step with a NaN is not applied
            self._score = score
        return score

    def read(self, steps: int) -> dict[str, float]:
        """Return the metrics of the last `steps` steps, over all ranks, and begin anew.

        Every rank calls it. Entropy is 1 where each expert is as likely as another. The peak load
        is the fullest expert's share of tokens over an even one, the mean over layers.
        """
        aux, entropy, load = self.sums
        layers, experts = load.shape
        sums = [float(aux), float(entropy), *load.double().flatten().tolist()]
        aux, entropy, *flat = (total / steps for total in dist.sum_over_ranks(sums))
        load = torch.tensor(flat).view(layers, experts)
        self.reset()
        return {
            "train/router_aux": aux,
            "train/router_entropy": entropy,
            "train/router_peak_load": float(load.amax(1).mean()) * experts,
            "train/router_unused": float((load == 0).float().mean()),
        }


def _log_of_shares(scores: torch.Tensor) -> torch.Tensor:
    return scores.clamp_min(1e-30).log()


def _off(
    routed: Routed, scores_TE: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return how far the weights of chosen experts are from a score, () float64.

    Shares of a token's weights are compared, as the router may have scaled them. Of one expert a
    token it is the sizes over tokens.
    """
    if routed.chosen is None or routed.weights is None:
        return scores_TE.new_ones((), dtype=torch.float64)
    log_TE = score(scores_TE)
    one = routed.chosen.shape[1] == 1
    if one and score is _SCORES[0]:
        log_TE = log_TE.log_softmax(-1)
    theirs_Tk = log_TE.gather(1, routed.chosen.long()).exp()
    weights_Tk = routed.weights.float()
    axis = 0 if one else 1
    shares = [x / x.sum(axis, keepdim=True) for x in (weights_Tk, theirs_Tk)]
    off = (shares[0] - shares[1]).abs().double().mean()
    return off * len(scores_TE) if one else off
