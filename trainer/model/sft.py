"""Join a causal language model with its loss: a micro-batch in, its share of the step's loss out.

In: a transformers model (load.py) and a Batch. Out: sum(cross-entropy x weight) over the trained
positions, () float32. The backbone runs over all T tokens of the packed sequence, the head over the
N trained positions only. The loss is computed inside the head's forward, because there ZeRO-3 holds
the head's weight whole, tied or not (C5).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import LossSection
from packhorse.trainer.datatypes import BadInput, Batch
from packhorse.trainer.model import attention
from packhorse.trainer.model.activation_offload import host_memory
from packhorse.trainer.model.attention import SequenceGroup, found_by_all, keyword_arguments
from packhorse.trainer.model.by_document import split_calls, with_gradient
from packhorse.trainer.model.decoder import decoder_of
from packhorse.trainer.model.logit_transform import LogitTransform
from packhorse.trainer.model.loss import choose_kernel, linear_cross_entropy
from packhorse.trainer.model.neftune import document_noise
from packhorse.trainer.model.rotary import make_tables_by_document
from packhorse.trainer.model.router_loss import RouterLoss
from packhorse.trainer.model.token_rows import head_weight
from packhorse.trainer.utils.text import error_line

Result = TypeVar("Result")


class SftModel(nn.Module):
    """The module that is trained: `forward(batch)` returns the loss, `model` is transformers' own.

    Call `packing_check.prove_packing` before the first batch, once a forward can run (under ZeRO-3:
    once the engine exists). It measures what the model does to its logits, and whether it draws
    random numbers, and proves that packing changes nothing.

    Args:
        group: of this rank, if several share each packed sequence (C13).
        offload: what is saved between the layers, of checkpointed ones their inputs, lies in the
            host's memory until the backward.

    Raises:
        BadInput: the model has no output head with a weight, the loss kernel cannot run here, or
            `loss.router_aux` is set for a model without experts.
    """

    def __init__(
        self,
        model: Any,
        loss: LossSection,
        seed: int,
        device: torch.device,
        group: SequenceGroup | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.kernel = choose_kernel(loss.kernel, device)
        self.transform: LogitTransform | None = None  # measured by the packing check
        self.is_random = False  # draws random numbers in training, beside NEFTune's; likewise
        self.router = None if loss.router_aux is None else RouterLoss(model, loss.router_aux)
        self._alpha = loss.neftune_alpha
        self.seed = seed
        self._group = group
        self._host = host_memory(device) if offload else None
        self._batch: Batch | None = None  # the one in the forward, for the embedding's hook
        self._calls: tuple[int, ...] = ()  # its documents' lengths, for modules that run by them
        self._undo_split: list[Callable[[], None]] = []
        self._backend: str | None = None  # ours, where the model attends by itself
        head = model.get_output_embeddings()
        if head is None or not isinstance(getattr(head, "weight", None), nn.Parameter):
            raise BadInput(
                f"{type(model).__name__} has no output head with a weight, so it cannot be trained "
                "here"
            )
        # only once: a second SftModel of the same model finds the head changed already
        if "loss" not in inspect.signature(head.forward).parameters:
            head.forward = MethodType(_loss_or_logits(type(head).forward), head)
        model.get_input_embeddings().register_forward_hook(self._add_noise)
        make_tables_by_document(model)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return sum(cross-entropy x weight) over the batch's trained positions, () float32.

        In training the batch's share of the routers' loss is added, if the recipe has one.
        """
        assert self.transform is not None, "the packing check has not run"
        if self.training:
            # dropout, or a router's jitter, must belong to the micro-batch and not to the rank or
            # the step (C3)
            epoch = batch.document_keys[0][0]
            torch.manual_seed(dist.seed_from(self.seed, "dropout", epoch, *batch.sequence_ids))
        # the head is the largest matrix product; prompts and fillers need none of it
        router = self.router if self.training else None
        with router.records.recording() if router else nullcontext([]) as routed:
            hidden_TH = self.hidden_states(batch)
        hidden_NH = hidden_TH.index_select(0, batch.trained_positions)
        loss = partial(
            linear_cross_entropy,
            targets_N=batch.targets,
            weights_N=batch.weights,
            kernel=self.kernel,
            transform=self.transform,
        )
        total = self.model.get_output_embeddings()(hidden_NH, loss=loss)
        group = self._group and self._group.process_group
        return total + router(routed, batch, group) if router else total

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return what the model hands to its head, (T, H)."""
        self._batch = batch
        if self._undo_split:
            self._calls = (*batch.lengths, *[0] * self._idle_calls(len(batch.lengths)))
        # checkpointed layers save by hooks of their own, which take precedence inside them; outside
        # of training they are not checkpointed, and no backward gives back what would be held
        on_host = self._host.holding() if self._host and self.model.training else nullcontext()
        bounds = {} if self.attends_by_itself else keyword_arguments(batch, self._group)
        try:
            with on_host, found_by_all(bounds.get("document_bounds")):
                if self.attends_by_itself:
                    return self._decode_by_document(batch)
                out = decoder_of(self.model)(
                    input_ids=batch.input_ids.unsqueeze(0),
                    position_ids=batch.position_ids.unsqueeze(0),
                    use_cache=False,
                    **bounds,
                )
                return out.last_hidden_state[0]
        finally:
            # other forwards of the model, as in generation, get no noise
            self._batch = None
            if not torch.is_grad_enabled():  # else a backward may recompute layers
                self._calls = ()

    def _decode_by_document(self, batch: Batch) -> torch.Tensor:
        """Run the decoder once for each document, which its own code takes for a sequence."""
        ids = batch.input_ids.split(batch.lengths)
        idle_calls = self._idle_calls(len(ids))  # it asks the other ranks: before anything else

        def decode(number: int) -> torch.Tensor:
            length, key = batch.lengths[number], batch.document_keys[number]
            self._batch = replace(batch, lengths=(length,), document_keys=(key,))  # for the noise
            document = ids[number].unsqueeze(0)
            return decoder_of(self.model)(input_ids=document, use_cache=False).last_hidden_state[0]

        hidden = [decode(number) for number in range(len(ids))]
        return with_gradient(torch.cat(hidden), [decode(0) for _ in range(idle_calls)])

    def by_either_attention(self, run: Callable[[], Result]) -> Result:
        """Return `run()`: by the model's own attention, if it fails on any rank through ours."""
        result: Any = None
        first: Exception | None = None
        try:
            result = run()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self.attends_by_itself:
                raise
            first = error
        # a rank that ran again alone would leave the others hanging in ZeRO-3's gathers
        failures = [text for text in dist.gather(first and error_line(first)) if text is not None]
        if not failures:
            return result
        dist.log.info("through packhorse's attention the model fails: %s", failures[0])
        self.attends_by_itself = True
        try:
            return run()
        except Exception as error:
            raise error from first
        finally:
            self.attends_by_itself = False

    @property
    def attends_by_itself(self) -> bool:
        """Whether the model attends by its own code, which knows a single document only."""
        return not attention.is_ours(self.model)

    @attends_by_itself.setter
    def attends_by_itself(self, by_itself: bool) -> None:
        backend = self._backend = self._backend or str(self.model.config._attn_implementation)
        own = "sdpa" if getattr(self.model, "_supports_sdpa", False) else "eager"
        attention.set_implementation(self.model, own if by_itself else backend)

    def run_by_document(self, modules: Iterable[nn.Module]) -> None:
        """Let modules that mix packed documents be called once for each; see by_document.py."""
        self._undo_split.append(split_calls(modules, self._documents_in_call))

    def run_whole(self) -> None:
        """Let all modules run packed sequences as a whole again."""
        while self._undo_split:
            self._undo_split.pop()()

    def _documents_in_call(self) -> tuple[int, ...]:
        # without gradients and outside of a batch's forward it is generation that calls
        return self._calls if self._batch or torch.is_grad_enabled() else ()

    def _idle_calls(self, documents: int) -> int:
        """Return how many calls this rank makes less than another: ZeRO-3 gathers in each."""
        in_shards = any(hasattr(p, "ds_id") for p in self.model.parameters())
        return max(dist.gather(documents)) - documents if in_shards else 0

    def _add_noise(
        self, embedding: nn.Module, args: Any, embedded: torch.Tensor
    ) -> torch.Tensor | None:
        """Add NEFTune's noise to the embeddings (1, T, H) of a batch, or its slice, in training."""
        batch = self._batch
        if not self.training or self._alpha == 0.0 or batch is None:
            return None  # which leaves the module's output as it is
        keys, lengths, width = batch.document_keys, batch.lengths, embedded.shape[-1]
        of_pieces = [
            document_noise(
                self.seed, keys, lengths, width, self._alpha, embedded.device, range(*piece)
            )
            for piece in batch.pieces
        ]
        return embedded + torch.cat(of_pieces).to(embedded.dtype)


def _loss_or_logits(plain_forward: Any) -> Any:
    """Return a forward for the head: `loss` of its input and weights if given, else its logits."""

    def forward(self: Any, hidden: torch.Tensor, *, loss: Any = None) -> torch.Tensor:
        if loss is None:
            return plain_forward(self, hidden)
        return loss(hidden, head_weight(self), bias_V=getattr(self, "bias", None))

    return forward
