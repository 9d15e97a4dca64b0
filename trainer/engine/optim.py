"""Group the parameters, set the groups' learning rates and sum the gradients.

In: a model and the recipe's `optim` section. Out: parameter groups for `optimizers.py`; the
learning rate of a step; sums of gradients that DeepSpeed makes in one pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import OptimSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.expert_lora import stacked_matrices
from packhorse.trainer.model.quantisation import numel
from packhorse.trainer.model.roles import EMBEDDINGS, EXPERTS, LINEAR, OTHERS, roles
from packhorse.trainer.utils.time_limit import names_matching

# -------------------------------------------------------------------------------- groups and rates


def decays(role: str, section: OptimSection) -> bool:
    """Return whether parameters of this role have weight decay."""
    return role in (LINEAR, EXPERTS) or (role == EMBEDDINGS and section.decay_embeddings)


def parameter_groups(model: nn.Module, section: OptimSection) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups: matrices with weight decay, the rest without, and
    two more for each of `section.groups`.

    Matrices are those of linear products and of experts, and embeddings if
    `section.decay_embeddings` is set. A group's learning rate is the schedule's times the group's
    `lr_scale`. Its `kind` is `section.rule`, and `adamw` for what that kind does not take (see
    `_takes`).

    Raises:
        BadInput: one of `section.groups` matches no parameter that is trained, or does not end.
    """
    role, stacked = roles(model), stacked_matrices(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = dict.fromkeys(("adamw", section.rule))
    groups: dict[tuple[int, bool, str], dict[str, Any]] = {
        (number, decay, kind): {
            "params": [],
            "weight_decay": section.weight_decay if decay else 0.0,
            "lr_scale": scale,
            "kind": kind,
        }
        for number, scale in enumerate([1.0, *(group.lr / section.lr for group in section.groups)])
        for decay in (True, False)
        for kind in kinds
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matching = [set(names_matching("optim.groups", g.match, trained)) for g in section.groups]
    for name, parameter in trained.items():
        number = next((i for i, names in enumerate(matching, 1) if name in names), 0)
        does, is_head = role[id(parameter)], parameter is getattr(head, "weight", None)
        takes = _takes(section.rule, does, is_head, id(parameter) in stacked)
        kind = section.rule if takes else "adamw"
        groups[number, decays(does, section), kind]["params"].append(parameter)
    for group, names in zip(section.groups, matching, strict=True):
        if not names:
            raise BadInput(
                f"optim.groups: `{group.match}` occurs in no trained parameter's name; "
                f"`{next(model.named_parameters())[0]}` is one"
            )
    return [group for group in groups.values() if group["params"]]


def _takes(kind: str, role: str, is_head: bool, is_stacked: bool) -> bool:
    """Return whether an optimizer of this kind updates such parameters; AdamW does otherwise.

    Muon's authors leave the head to AdamW, and transformers keeps the moments of embeddings in fp32
    where it has an optimizer of 8 bits: rare tokens' are small beside a block's largest. Muon and
    Adafactor would mix the experts whose matrices an adapter stacks in one.
    """
    matrices = {
        "muon": (LINEAR, EXPERTS),
        "adamw_8bit": (LINEAR, EXPERTS),
        "adafactor": (LINEAR, EXPERTS, EMBEDDINGS),
    }
    if (is_head and kind == "muon") or (is_stacked and kind in ("muon", "adafactor")):
        return False
    return kind not in matrices or role in matrices[kind]


def describe_decay(model: nn.Module, section: OptimSection) -> str:
    """Return the decay of each role, and how many tensors and weights have it, in one line."""
    role = roles(model)
    counted: dict[str, tuple[int, int]]
    counted = dict.fromkeys((LINEAR, EXPERTS, EMBEDDINGS, OTHERS), (0, 0))
    for parameter in model.parameters():
        if parameter.requires_grad:
            tensors, weights = counted[role[id(parameter)]]
            counted[role[id(parameter)]] = (tensors + 1, weights + numel(parameter))
    return "; ".join(
        f"{name} {section.weight_decay if decays(name, section) else 0:g} "
        f"({tensors} tensors, {weights:,} weights)"
        for name, (tensors, weights) in counted.items()
        if tensors
    )


def learning_rate(step: int, steps: int, section: OptimSection) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`.

    It rises linearly during warm-up, then follows the schedule down to `min_lr_ratio` times the
    peak. The first step's rate is above zero; the last one's is the floor, except for `constant`.
    """
    warmup_steps = math.ceil(section.warmup_ratio * steps)
    if step < warmup_steps:
        return section.lr * (step + 1) / warmup_steps
    floor = section.min_lr_ratio
    if section.lr_schedule == "wsd":
        decay_steps = max(1, math.ceil(section.wsd_decay * steps))
        progress = max(0.0, (step - (steps - 1 - decay_steps)) / decay_steps)
    else:
        progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    shares = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "wsd": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return section.lr * (floor + (1.0 - floor) * shares[section.lr_schedule])


def set_learning_rates(optimizer: Any, lr: float) -> None:
    """Give each parameter group its own learning rate: the schedule's `lr` x the `lr_scale`.

    This runs before every step, so that neither a resume nor DeepSpeed's own load, which gives all
    groups the hyperparameters of the first, can change a group's rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


# -------------------------------------------------------------------------------------- gradients


def shorten_gradient_sums(engine: Any) -> None:
    """Make DeepSpeed add each gradient to its sum in one pass, and reduce nothing on one rank.

    A micro-batch then moves 10 bytes a parameter for bf16 gradients with fp32 sums, and 12 for fp32
    ones, at every stage. The sums are the same, bit by bit.
    """
    optimizer = engine.optimizer
    stage_3 = hasattr(optimizer, "fp16_partitioned_groups_flat")
    if hasattr(optimizer, "bf16_groups"):
        # DeepSpeed's own makes an fp32 copy of the gradient first: 18 bytes
        optimizer._update_hp_grad = partial(_add_gradient, optimizer)
    if dist.world_size() == 1:
        engine.buffered_allreduce_fallback = _reduce_nothing  # of stage 0, and of 1 in bf16
        if not getattr(optimizer, "cpu_offload", True):  # stages 1 and 2
            optimizer.overlap_comm = False  # else the host waits for the GPU after a backward
            optimizer.reduce_ready_partitions_and_remove_grads = _reduce_nothing
            if optimizer.partition_gradients:
                # DeepSpeed's own casts, copies to a bucket, divides by 1 and adds
                optimizer.process_gradients = partial(_add_to_partition, optimizer)
                optimizer.reduce_ipg_grads = _reduce_nothing
        if stage_3 and not optimizer.offload_optimizer:
            # DeepSpeed's own copies to a bucket, joins, casts, divides by 1 and copies: 26 and more
            optimizer.reduce_bucket_size = 1  # each at once
            optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = _whole_gradients
            optimizer.partition_grads = partial(_add_whole_gradients, optimizer)


def _add_gradient(optimizer: Any, parameter: Any, group: int, index: int, **_: Any) -> None:
    if parameter.grad is None:
        return
    total = optimizer.fp32_groups_gradients[group][index]
    total.view_as(parameter).add_(parameter.grad)
    parameter._hp_grad = total
    optimizer.fp32_groups_has_gradients[group][index] = True


def _add_to_partition(optimizer: Any, parameter: Any, group: int) -> None:
    if optimizer._use_compact_grad_partition_buffer(group):
        number = optimizer.get_param_id(parameter)
        total = optimizer._get_compact_grad_partition_slice(group, 0, number, parameter.numel())
        total.view_as(parameter).add_(parameter.grad)
        parameter.grad = None
    # else sums are of the gradients' own type, and DeepSpeed adds to them after the backward


def _whole_gradients(parameters: Iterable[Any], _: torch.dtype) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters]


def _add_whole_gradients(
    optimizer: Any, parameters: Iterable[Any], gradients: Iterable[torch.Tensor]
) -> None:
    totals = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    for parameter, gradient in zip(parameters, gradients):
        total = totals[parameter.ds_id].narrow(0, 0, gradient.numel()).view_as(gradient)
        if optimizer.micro_step_id == 0:
            total.copy_(gradient)
        else:
            total.add_(gradient)
        if gradient.is_cuda:  # it was made on another stream
            gradient.record_stream(torch.cuda.current_stream())
        parameter.grad = None


def _reduce_nothing(*_: Any, **__: Any) -> None:
    pass


def reduce_leaves_once(engine: Any) -> None:
    """Make ZeRO-3 reduce a layer that it gathers whole once, after its last call in a micro-batch.

    DeepSpeed 0.19.8 reduces after each call that the backward comes to, when gradients are not
    complete yet. A model that runs document by document calls its layers several times.
    """
    optimizer, calls = engine.optimizer, Counter[nn.Module]()
    engine.module.register_forward_pre_hook(lambda *_: calls.clear())

    def count(layer: nn.Module, _: Any, output: Any) -> Any:
        # a call inside the backward is activation checkpointing's, and has no backward of its own
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            calls[layer] += 1
        # torch calls no backward hook of a module that gives a list, as GPT-1's layers
        return tuple(output) if isinstance(output, list) else None

    reduces: dict[nn.Module, Any] = {}

    def reduce_after_last(layer: nn.Module, *gradients: Any) -> None:
        calls[layer] -= 1
        if calls[layer] <= 0:
            reduces[layer](layer, *gradients)

    def reduce_rest() -> None:
        # the backward comes to no call whose output nothing uses
        for layer in [layer for layer, left in calls.items() if left > 0]:
            del calls[layer]
            if any(p.grad is not None for p in layer.parameters()):
                reduces[layer](layer, (), ())

    for layer, handle in zip(optimizer.leaf_parameters, optimizer._leaf_module_hooks, strict=True):
        reduces[layer] = layer._backward_hooks[handle.id]
        layer._backward_hooks[handle.id] = reduce_after_last
        layer.register_forward_hook(count)
    optimizer._grad_acc_post_hooks.insert(0, reduce_rest)  # before the end of DeepSpeed's backward
