"""Make weights that no folder holds: of a random model, and the embeddings of new tokens.

In: a built model. Out: the same model with numbers that are alike at every world size and stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.model.lora import Gathered


@torch.no_grad()
def initialise(model: Any, seed: int, gathered: Gathered) -> None:
    """Run every module's own `_init_weights` with a seed of its own, (seed, name).

    No module's numbers then depend on the order. Children come before their parents, whose rules
    may touch a child's weights (GPT-2 scales its residual projections by depth); no rule reaches
    further down. A tied head is left to the embedding's rule.
    """
    from transformers import PreTrainedModel

    done: set[nn.Parameter] = set()

    def visit(module: nn.Module, name: str, owner: Any) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}", owner)
        own = set(module.parameters(recurse=False))
        if own and own <= done:
            return
        done.update(own)
        parameters = list(
            dict.fromkeys(p for m in _near(module) for p in m.parameters(recurse=False))
        )
        with torch.random.fork_rng(), gathered(parameters, write=True):
            torch.manual_seed(dist.seed_from(seed, "init", name))
            # drawn on the CPU: a GPU's numbers are others, and stage 3 builds the model there
            there = {p: p.data for p in parameters if p.device.type not in ("cpu", "meta")}
            for parameter in there:
                parameter.data = parameter.data.cpu()
            owner._init_weights(module)
            for parameter, data in there.items():
                parameter.data = data.copy_(parameter.data)

    visit(model, "", model)


def _near(module: nn.Module) -> list[nn.Module]:
    """Return the modules whose weights the rule of a module may touch."""
    from transformers import PreTrainedModel

    return [m for m in (module, *module.children()) if not isinstance(m, PreTrainedModel)]


@contextmanager
def loaded_weights_kept(gathered: Gathered) -> Iterator[None]:
    """Let transformers initialise only modules that a folder has not filled, inside the block.

    After a load it runs all rules, which leave loaded weights as they are. But some ask for their
    shapes, and weights in shards (ZeRO-3) have none: RWKV's, xLSTM's and Marian's fail there.
    """
    from transformers import PreTrainedModel

    plain = PreTrainedModel._initialize_weights

    def fill(owner: Any, module: Any, *args: Any) -> None:
        near = _near(module)
        parameters = [p for m in near for p in m.parameters(recurse=False)]
        loaded = [p for p in parameters if getattr(p, "_is_hf_initialized", False)]
        buffers = [b for m in near for b in m.buffers(recurse=False)]
        is_left = len(loaded) < len(parameters) or not all(
            getattr(b, "_is_hf_initialized", False) for b in buffers
        )
        if is_left or not any(hasattr(p, "ds_id") for p in parameters):
            with gathered(loaded):  # the others transformers has gathered itself
                plain(owner, module, *args)

    PreTrainedModel._initialize_weights = fill  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = plain  # type: ignore[method-assign]


def add_embeddings(model: Any, rows: int, new_ids: list[int], gathered: Gathered) -> None:
    """Give new tokens the mean of all old embeddings, in the input and in the head.

    A new token is then about as likely as tokens are on average, whatever the scale of the logits
    (Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    if rows > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    parameters = (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None))
    # a dict, as a tied head has the embedding's parameter
    for parameter in dict.fromkeys(p for p in parameters if p is not None):
        with torch.no_grad(), gathered([parameter], write=True):
            # under ZeRO-3 only rank 0 holds it whole, and its changes are broadcast
            if parameter.numel() == 0:
                continue
            old = torch.ones(parameter.shape[0], dtype=torch.bool)
            old[new_ids] = False
            # in fp32: bf16 would lose most of a mean over 10^5 entries; and on the CPU, as above
            parameter[new_ids] = parameter.cpu()[old].float().mean(0).to(parameter)
