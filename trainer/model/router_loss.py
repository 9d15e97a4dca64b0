"""Balance the experts of a mixture by an auxiliary loss, and measure how tokens spread over them.

In: the routers' logits of a packed micro-batch, a layer each, and the Batch. Out: this rank's share
of the step's auxiliary loss, () float32, and sums for the log.

For a document of L tokens that each choose k of E experts, and a layer,

    aux = E x sum over experts e of (choices of e / L) x (mean probability of e)

which is k where all experts get the same (Fedus et al., 2022). It is taken over each document, as
in DeepSeek V3's sequence-wise loss (2024, equations 17 to 20), and
averaged over layers, and over documents with the weights of their trained tokens (C2). So packing,
micro-batches and ranks change nothing: over a micro-batch, as elsewhere, its cut would count, and
documents that are packed together would push each other.

Where a document lies on several ranks (C13), choices and weights are summed over them.

Shapes: L layers with experts, T tokens, D documents, E experts, k chosen ones.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.distributed as td

from packhorse.trainer import dist
from packhorse.trainer.datatypes import BadInput, Batch

_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")


class RouterLoss:
    """The auxiliary loss of a model's routers, with sums of what they did since the last `read`.

    `sums` are the auxiliary loss, the entropy, and (layers, E) C2's weights by expert. They are put
    back where a step is not applied, as it does not count (C12).

    Args:
        model: a transformers model with experts, whose routers transformers can record.

    Raises:
        BadInput: it has none, or balances them by a bias.
    """

    def __init__(self, model: Any, coefficient: float) -> None:
        config = model.config.get_text_config()
        chosen = [getattr(config, name, None) for name in _CHOSEN]
        self._chosen = next((k for k in chosen if isinstance(k, int)), 0)
        if not self._chosen or not _has_routers(model):
            raise BadInput(
                f"loss.router_aux: {type(model).__name__} has no router whose logits transformers "
                "records; remove the key"
            )
        named = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        if any(name.endswith(("e_score_correction_bias", "expert_bias")) for name in named):
            raise BadInput(
                f"loss.router_aux: {type(model).__name__} balances its experts by a bias "
                "(as e_score_correction_bias), not by a loss; remove the key"
            )
        self._coefficient, self._name = coefficient, type(model).__name__
        self._are_probabilities: bool | None = None  # asked of the first micro-batch
        self.reset()

    def reset(self) -> None:
        """Begin the sums anew."""
        self.sums: tuple[Any, Any, Any] = 0.0, 0.0, 0.0  # on the device from the first batch on

    def __call__(
        self, logits: tuple[torch.Tensor, ...], batch: Batch, group: Any = None
    ) -> torch.Tensor:
        """Return coefficient x the batch's share of the step's auxiliary loss, and add to the sums.

        Args:
            logits: (T, E) or (1, T, E) of each layer with experts.
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
        for layer in logits:
            if layer.numel() != len(document_T) * layer.shape[-1]:  # as Doge's, two keys an expert
                raise BadInput(
                    f"loss.router_aux: {self._name} scores no experts: {len(document_T)} tokens "
                    f"have {tuple(layer.shape)} scores; remove the key"
                )
        log_LTE = [self._log_probabilities(x.reshape(-1, x.shape[-1]).float()) for x in logits]
        chosen_LTE = [
            torch.zeros_like(x).scatter_(1, x.detach().topk(self._chosen).indices, 1.0)
            for x in log_LTE
        ]
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

    def _log_probabilities(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """Return (T, E) of a router's record: logits, or probabilities as Gemma 4's."""
        if self._are_probabilities is None:
            rows = scores_TE.detach()
            sums_to_1 = ((rows.sum(-1) - 1).abs() < 1e-2).all()
            self._are_probabilities = bool((rows >= 0).all() and sums_to_1)
        if self._are_probabilities:
            return scores_TE.clamp_min(1e-30).log()
        return scores_TE.log_softmax(-1)

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


def _has_routers(model: Any) -> bool:
    """Return whether the model has modules whose router's logits transformers records.

    A model's code may know routers that this configuration builds none of, as a dense Granite.
    """
    recorded = [
        (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for module in model.modules()
    ]
    kinds = [kind for kind in recorded for kind in (kind if isinstance(kind, list) else [kind])]
    classes = tuple({getattr(kind, "target_class", kind) for kind in kinds if kind is not None})
    return any(isinstance(module, classes) for module in model.modules())
