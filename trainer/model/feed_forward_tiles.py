"""Run a layer's feed-forward block in tiles along the tokens, each recomputed in the backward.

In: a model whose layers are recomputed. Out: the same model, in which a long sequence makes no
tensor of T tokens x the block's inner width: a block of 14,336 numbers inside would hold 28 KiB a
token, several times. Values and gradients change by rounding alone. Weights' gradients are summed
over the tiles in fp32, so that the number of tiles, as that of ranks, is not learned (C2);
DeepSpeed's TiledMLP sums them in the weights' type.

H hidden size, T tokens of this rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.decoder import untied

# Modules that widen in a feed-forward block, by the names that transformers gives them.
WIDENING = {"gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc", "dense_h_to_4h"}
# Modules of an attention, some of which gate their output by a `gate_proj` of their own.
ATTENDING = {"q_proj", "k_proj", "qkv_proj", "query_key_value", "o_proj"}
# A tile of H tokens makes tensors as large as the block's weights; products of fewer tokens than
# these leave a GPU idle.
FEWEST_TOKENS = 2048
# The sums of gradients take 4 bytes a weight, which fewer tiles than these would not save.
FEWEST_TILES = 4


def tile_tokens(hidden: int) -> int:
    """Return the tokens of a tile."""
    return max(hidden, FEWEST_TOKENS)


def wants_tiles(checkpointing: str, tokens: int, hidden: int) -> bool:
    """Return whether a run's blocks run in tiles: in all its micro-batches, or in none.

    With tiles a block's gradients come in another order, and ZeRO's buckets need the same one on
    all ranks, of which some may have a short sequence or a filler.

    Args:
        checkpointing: model.activation_checkpointing.
        tokens: that a rank has at most.
    """
    recomputes = checkpointing not in ("none", "selective")
    return recomputes and tokens >= FEWEST_TILES * tile_tokens(hidden)


def feed_forward_blocks(model: Any) -> list[nn.Module]:
    """Return the blocks that may run in tiles: those that treat each token by itself.

    Experts, each of which gets some tokens only, are left out, as are blocks with dropout, whose
    random numbers belong to the whole sequence, those with other weights than products', those that
    take more than their input, as a residual or the layer's number, and those that share weights.
    """
    found = []
    for name, module in model.named_modules():
        children = {child for child, _ in module.named_children()}
        # some models have these modules in the layer itself, beside its attention
        whole_layer = any("attn" in child or "attention" in child for child in children)
        of_experts = any(part.startswith("expert") for part in name.split("."))
        if not children & WIDENING or children & ATTENDING or whole_layer or of_experts:
            continue
        if _takes_one_tensor(module) and _is_by_token(module):
            found.append(module)
    return untied(model, found)


def _takes_one_tensor(block: nn.Module) -> bool:
    # by its class, as its own forward may be Liger's or that of tiles
    _, *given = inspect.signature(type(block).forward).parameters.values()
    return [one.kind for one in given] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _is_by_token(block: nn.Module) -> bool:
    for part in block.modules():
        # `p` of dropout modules, and the numbers that forwards hand to functional.dropout
        rates = (value for name, value in vars(part).items() if name == "p" or "drop" in name)
        if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return False
        # Conv1D is GPT-2's name for a transposed Linear
        is_product = isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
        if not is_product and any(True for _ in part.parameters(recurse=False)):
            return False
    return True


def set_tiles(model: Any, on: bool) -> int:
    """Let the blocks run in tiles, or whole again; return their number."""
    blocks = feed_forward_blocks(model)
    # Liger's forwards, which liger_layers.py takes off and puts back by this table
    fused: dict[nn.Module, Any] = getattr(model, "_fused_forwards", {})
    for block in blocks:
        whole = block.forward
        if isinstance(whole, _InTiles):
            whole.hook.remove()
            whole = whole.whole
        vars(block).pop("forward", None)
        if on:
            block.forward = _InTiles(block, whole)
        elif block in fused:
            block.forward = whole
        if block in fused:
            fused[block] = block.forward
    return len(blocks)


def tiled_blocks(model: Any) -> list[nn.Module]:
    """Return the blocks that run in tiles."""
    return [module for module in model.modules() if isinstance(module.forward, _InTiles)]


class _InTiles:
    """A block's forward. `whole` is the one that it takes the place of."""

    def __init__(self, block: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.whole = whole
        self._block = block
        # ZeRO-3 gathers a block's weights once for all tiles (missing_gradients.py)
        self.hook = block.register_forward_pre_hook(require_gradient)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output for (1, T, H) or (T, H)."""
        tile = tile_tokens(x.shape[-1])
        if x.shape[:-2].numel() > 1:  # several sequences, as in generation
            return self.whole(x)
        trained = [p for p in self._block.parameters() if p.requires_grad]
        return _Tiles.apply(_Input.apply(x, self.whole, tile, *trained), self.whole, tile)


def require_gradient(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let the input of a block that is trained need a gradient, as a hook before its forward.

    ZeRO-3 reduces the gradients of a block that it gathers as a whole when its input has one:
    earlier, and so before they are there, where that needs none, as below the first adapter.

    Raises:
        BadInput: the block gets its input by name, where torch's hooks do not see it.
    """
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in block.parameters()):
        return None
    floats = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in args]
    if not any(floats):
        raise BadInput(
            f"{type(block).__name__} gets its input by name, and ZeRO-3 would reduce its gradients "
            "before they are there; set parallel.deepspeed=zero2"
        )
    if any(is_float and x.requires_grad for x, is_float in zip(args, floats, strict=True)):
        return None
    first = floats.index(True)
    return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])


class _Tiles(torch.autograd.Function):
    """Gives the block's output by tiles; hands its gradient on to `_Input`, which has its shape.

    These are two functions, as torch's checkpointing ends a layer's recomputation where the last
    tensor is saved that the backward needs: at `_Input`, before this one would run again. So tiles
    cost the block's last product, a twelfth of its FLOPs.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, whole: Any, tile: int) -> torch.Tensor:
        out = torch.empty_like(x)
        if x.is_meta:  # the planner's, for which hundreds of tiles would take seconds
            return out
        for part, into in zip(x.detach().split(tile, -2), out.split(tile, -2), strict=True):
            into.copy_(whole(part))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return grad, None, None


class _Input(torch.autograd.Function):
    """Saves the block's input; its backward is that of the whole block."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, whole: Any, tile: int, *trained: nn.Parameter
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.whole, ctx.tile, ctx.trained = whole, tile, trained
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x,), trained = ctx.saved_tensors, ctx.trained
        types = [torch.promote_types(p.dtype, torch.float32) for p in trained]
        sums = [torch.zeros_like(p, dtype=t) for p, t in zip(trained, types, strict=True)]
        of_input = torch.empty_like(x)
        tiles = (tensor.split(ctx.tile, -2) for tensor in (x, grad, of_input))
        for part, of_output, into in zip(*tiles, strict=True):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.whole(part.view_as(part))  # torch's counter of FLOPs takes no leaf
            # by `grad`, as `backward` would let ZeRO reduce the weights' gradients at each tile
            mine, *of_weights = torch.autograd.grad(
                out, [part, *trained], of_output, allow_unused=True, materialize_grads=True
            )
            into.copy_(mine)
            for total, one in zip(sums, of_weights, strict=True):
                total += one
            del out, mine, of_weights
        rounded = (total.to(p.dtype) for total, p in zip(sums, trained, strict=True))
        return of_input, None, None, *rounded
