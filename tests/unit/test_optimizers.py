"""The update rules against their formulas and torch's own optimizers; groups and bytes by kind."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from packhorse.trainer.config.recipe import OptimSection
from packhorse.trainer.engine.adamw_bf16 import round_stochastically
from packhorse.trainer.engine.moments import BLOCK, Piece, Piecewise, moment_bytes, moments_of
from packhorse.trainer.engine.muon import Muon, orthogonalised
from packhorse.trainer.engine.optim import parameter_groups, set_learning_rates
from packhorse.trainer.engine.optimizers import Lion, build_optimizer

STAGE_0: dict[str, Any] = {"zero_optimization": {"stage": 0}}
MOE = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
}


def empty_model(**changes: Any) -> Any:
    with torch.device("meta"):
        config = AutoConfig.for_model("qwen3_moe", **{**MOE, **changes})
        return AutoModelForCausalLM.from_config(config)


def names(model: nn.Module, groups: list[dict[str, Any]], kind: str) -> set[str]:
    ids = {id(p) for group in groups if group["kind"] == kind for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_lion_moves_by_the_sign_of_its_momentum() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    group = {"params": [weight], "weight_decay": 0.5}
    optimizer = Lion([group], {"lr": 0.1, "betas": (0.9, 0.99)})
    weight.grad = torch.tensor([2.0, -3.0, 0.0])
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.tensor([0.85, 1.05, 0.95]))
    weight.grad = torch.tensor([-0.1, 0.0, 0.0])  # 0.9 x 0.02 - 0.1 x 0.1 is still positive
    optimizer.step()
    expected = torch.tensor([0.85 * 0.95 - 0.1, 1.05 * 0.95 + 0.1, 0.95**2])
    assert torch.allclose(weight.detach(), expected)


def test_lion_that_was_restored_goes_on() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Lion([{"params": [weight], "weight_decay": 0.0}], {"lr": 0.1, "betas": (0.9, 0.99)})
    moments_of(optimizer, weight, "lion", updates=7)["exp_avg"].copy_(torch.tensor([1.0, -1.0]))
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.tensor([0.9, 1.1]))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 24)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found = orthogonalised(torch.randn(shape)) / (0.2 * max(shape[-2:]) ** 0.5)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


def test_experts_are_orthogonalised_one_by_one() -> None:
    torch.manual_seed(0)
    experts = torch.randn(3, 16, 24)
    alone = torch.stack([orthogonalised(expert) for expert in experts])
    assert torch.allclose(orthogonalised(experts), alone, atol=1e-6)


def test_muon_is_torchs_own_but_for_its_bf16() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(24, 40), torch.randn(3, 24, 40)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [mine], "weight_decay": 0.1, "lr_scale": 1.0, "kind": "muon"}
    section = OptimSection.model_validate({"kind": "muon", "lr": 0.02, "betas": [0.95, 0.95]})
    optimizer = build_optimizer([group], section, STAGE_0)
    assert isinstance(optimizer, Muon)
    optimizer.pieces = {id(mine): [Piece((24, 40), 0, 0, 960)]}
    optimizer.is_sharded = False
    other = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for gradient in gradients:
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        set_learning_rates(optimizer, 0.02)
        optimizer.step()
        other.step()
    difference = (mine - theirs).norm() / (theirs - start).norm()
    assert difference.item() < 0.02


def test_muon_takes_linear_products_and_experts_alone() -> None:
    model = empty_model()
    groups = parameter_groups(model, OptimSection(kind="muon"))
    matrices = names(model, groups, "muon")
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate.weight"} <= matrices
    assert "model.layers.0.mlp.experts.down_proj" in matrices
    assert names(model, groups, "adamw") >= {"lm_head.weight", "model.embed_tokens.weight"}
    assert all(model.get_parameter(name).dim() in (2, 3) for name in matrices)
    assert all(group["weight_decay"] > 0 for group in groups if group["kind"] == "muon")


def test_sgd_without_momentum_has_moments_of_zeros_to_save() -> None:
    weight = nn.Parameter(torch.ones(2))
    section = OptimSection.model_validate({"kind": "sgd", "betas": [0.0, 0.9]})
    groups: list[dict[str, Any]] = [{"params": [weight], "kind": "sgd", "lr_scale": 1.0}]
    optimizer = build_optimizer(groups, section, STAGE_0)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert moments_of(optimizer, weight, "sgd")["momentum_buffer"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "muon"])
def test_a_checkpoint_before_the_first_update_changes_nothing(kind: str) -> None:
    """As where the guard leaves out the first steps."""
    weights = []
    for is_saved in (False, True):
        weight = nn.Parameter(torch.ones(2, 2))
        groups: list[dict[str, Any]] = [
            {"params": [weight], "kind": kind, "lr_scale": 1.0, "weight_decay": 0.1}
        ]
        optimizer = build_optimizer(groups, OptimSection(kind=kind), STAGE_0)  # type: ignore[arg-type]
        if isinstance(optimizer, Piecewise):
            show(optimizer, {id(weight): [Piece((2, 2), 0, 0, 4)]})
        if is_saved:
            moments_of(optimizer, weight, kind)
        weight.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        optimizer.step()
        weights.append(weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    "kind", ["adamw", "lion", "sgd", "muon", "adafactor", "adamw_8bit", "adamw_bf16"]
)
def test_moments_take_the_bytes_that_are_planned(kind: str) -> None:
    model = empty_model().to_empty(device="cpu")
    section = section_of(kind)
    groups = parameter_groups(model, section)
    optimizer = build_optimizer(groups, section, STAGE_0)
    weights = [(w, group["kind"]) for group in optimizer.param_groups for w in group["params"]]
    if isinstance(optimizer, Piecewise):
        show(optimizer, {id(w): [Piece(tuple(w.shape), 0, 0, w.numel())] for w, _ in weights})
    held = 0
    for weight, kind_of_it in weights:
        moments_of(optimizer, weight, kind_of_it, 0)
        states = {n: state for n, state in optimizer.state[weight].items() if n != "step"}
        held += sum(state.nbytes for state in states.values())
    assert moment_bytes(groups) == held


# ---------------------------------------------------------------------- parameters cut by ranks

SHAPES = ((40, 50), (3, 16, 24), (64, 64))


def show(optimizer: Piecewise, pieces: dict[int, list[Piece]], *, is_sharded: bool = False) -> None:
    optimizer.pieces, optimizer.is_sharded = pieces, is_sharded


def section_of(rule: str) -> OptimSection:
    chosen = {"state_dtype": "bf16"} if rule == "adamw_bf16" else {"kind": rule}
    return OptimSection.model_validate({**chosen, "lr": 1e-2})


def train_cut(
    kind: str, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Take four steps of parameters that lie end to end, cut over threads in place of ranks.

    Returns the weights, and what is saved of the states, by name, state and first element.
    """
    generator = torch.Generator().manual_seed(0)
    total = sum(map(math.prod, SHAPES))
    steps = [10 ** torch.randn(total, generator=generator) for _ in range(5)]
    edges = [0, *cuts, total]
    barrier, sent = threading.Barrier(len(edges) - 1), {}

    def all_reduce(tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        sent[threading.get_ident()] = tensor.clone()
        barrier.wait()
        every = torch.stack(list(sent.values()))
        is_sum = op == torch.distributed.ReduceOp.SUM
        tensor.copy_(every.sum(0) if is_sum else every.amax(0))
        barrier.wait()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    parts: list[list[Piece]] = []
    for low, high in itertools.pairwise(edges):
        start, pieces = 0, []
        for shape in SHAPES:
            stop = start + math.prod(shape)
            first, last = max(low, start), max(min(high, stop), max(low, start))
            blocks = {(cut - start) // BLOCK for cut in cuts if start < cut < stop}
            place = (first - start, first - low, last - first)
            pieces.append(Piece(shape, *place, str(shape), tuple(sorted(blocks))))
            start = stop
        parts.append(pieces)

    def run(rank: int) -> tuple[torch.Tensor, list[Any]]:
        here = slice(edges[rank], edges[rank + 1])
        master = nn.Parameter(steps[-1][here].clone())
        group = {"params": [master], "kind": kind, "lr_scale": 1.0, "weight_decay": 0.1}
        section = section_of(kind)
        optimizer = build_optimizer([group], section, STAGE_0)
        assert isinstance(optimizer, Piecewise)
        show(optimizer, {id(master): parts[rank]}, is_sharded=len(parts) > 1)
        for gradient in steps[:-1]:
            master.grad = gradient[here].clone()
            optimizer.step()
        return master.detach(), list(optimizer.states_beside(master, saves=True))

    with ThreadPoolExecutor(len(parts)) as pool:
        ran = list(pool.map(run, range(len(parts))))
    saved: dict[str, torch.Tensor] = {
        f"{number} {what} {state}": torch.cat([tensor])
        for number, what, _, states in ran[0][1]
        for state, tensor in states.items()
    }
    for _, beside in ran[1:] if kind == "adamw_8bit" else ():
        for number, what, start, states in beside:
            for state, tensor in states.items():
                key = f"{number} {what} {state}"
                assert start == len(saved.get(key, ())), "a block is saved twice, or not at all"
                saved[key] = torch.cat([saved[key], tensor]) if key in saved else tensor
    return torch.cat([weights for weights, _ in ran]), saved


@pytest.mark.parametrize("kind", ["adafactor", "adamw_8bit", "adamw_bf16"])
def test_cuts_do_not_change_what_is_learned_or_saved(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts inside of rows, experts and blocks, two of them in one block."""
    weights, saved = train_cut(kind, [], monkeypatch)
    cut, saved_cut = train_cut(kind, [777, 2100, 2150, 5000], monkeypatch)
    if kind != "adafactor":
        assert torch.equal(cut, weights)
        assert saved.keys() == saved_cut.keys()
        assert all(torch.equal(saved[key], saved_cut[key]) for key in saved)
    else:
        assert torch.allclose(cut, weights, rtol=1e-6, atol=1e-7)
        assert all(torch.allclose(saved[key], saved_cut[key], rtol=1e-6) for key in saved)


def optimizer_of(weight: nn.Parameter, section: OptimSection) -> Piecewise:
    """Build an optimizer of one whole matrix."""
    group = {"params": [weight], "weight_decay": 0.1, "lr_scale": 1.0, "kind": section.kind}
    optimizer = build_optimizer([group], section, STAGE_0)
    assert isinstance(optimizer, Piecewise)
    show(optimizer, {id(weight): [Piece(tuple(weight.shape), 0, 0, weight.numel())]})
    return optimizer


def test_adafactor_is_that_of_transformers() -> None:
    from transformers.optimization import Adafactor as Theirs

    torch.manual_seed(0)
    start, gradients = torch.randn(24, 40), torch.randn(3, 24, 40)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    section = OptimSection.model_validate({"kind": "adafactor", "lr": 0.02})
    optimizer = optimizer_of(mine, section)
    settings: dict[str, Any] = {"scale_parameter": False, "relative_step": False}
    other = Theirs([theirs], lr=0.02, weight_decay=0.1, eps=(1e-30, 1e-3), **settings)
    for gradient in gradients:
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
    assert (mine - theirs).norm() / (theirs - start).norm() < 1e-5


def test_moments_of_8_bits_are_near_those_of_adamw() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(24, 40), torch.randn(6, 24, 40) * torch.logspace(-5, 0, 40)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    section = OptimSection.model_validate({"kind": "adamw_8bit", "lr": 0.02})
    optimizer = optimizer_of(mine, section)
    other = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.1, betas=section.betas)
    for gradient in gradients:
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
    assert (mine - theirs).norm() / (theirs - start).norm() < 0.1


def test_rounding_is_right_on_average_and_belongs_to_the_weight() -> None:
    value = torch.full((200_000,), 1 + 0.3 / 128)  # 0.3 of the way between two numbers of bf16
    rounded = round_stochastically(value, key=7, first=0)
    assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
    assert rounded.float().mean().item() == pytest.approx(1 + 0.3 / 128, abs=2e-5)
    assert torch.equal(round_stochastically(value[500:900], 7, 500), rounded[500:900])
    assert not torch.equal(round_stochastically(value, 8, 0), rounded)
    exact = torch.tensor([0.0, 1.5, -2.0])
    assert torch.equal(round_stochastically(exact, 7, 0).float(), exact)


def test_small_steps_of_a_second_moment_are_not_lost() -> None:
    torch.manual_seed(0)
    gradients = [torch.full((64, 64), 10.0), *[torch.ones(64, 64)] * 40]
    weight = nn.Parameter(torch.zeros(64, 64))
    group = {"params": [weight], "weight_decay": 0.0, "lr_scale": 1.0, "kind": "adamw_bf16"}
    section = OptimSection.model_validate({"state_dtype": "bf16", "betas": [0.9, 0.999]})
    optimizer = build_optimizer([group], section, STAGE_0)
    assert isinstance(optimizer, Piecewise)
    show(optimizer, {id(weight): [Piece((64, 64), 0, 0, 4096)]})
    expected = 0.0
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        expected = 0.999 * expected + 0.001 * float(gradient[0, 0]) ** 2
    second = moments_of(optimizer, weight, "adamw_bf16")["exp_avg_sq"]
    assert second.float().mean().item() == pytest.approx(expected, rel=2e-3)
    # rounded to the nearest, it would stand still: a step is a thousandth, half a spacing 1/512
    stuck = torch.tensor(0.1).bfloat16()
    assert torch.equal((0.999 * stuck.float() + 0.001 * 0.09).bfloat16(), stuck)
