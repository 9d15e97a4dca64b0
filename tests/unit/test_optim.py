"""Which parameters decay, each group's own rate, and the learning rate by step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from packhorse.trainer.config.recipe import OptimSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.optim import (
    describe_decay,
    learning_rate,
    parameter_groups,
    set_learning_rates,
)
from packhorse.trainer.engine.optimizers import build_optimizer


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight  # tied


def names(model: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_matrices_decay_and_nothing_else(decay_embeddings: bool) -> None:
    model = Tiny()
    decayed, plain = parameter_groups(
        model, OptimSection(weight_decay=0.1, decay_embeddings=decay_embeddings)
    )
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    embedding = {"embedding.weight"}
    assert names(model, decayed) == {"linear.weight"} | (embedding if decay_embeddings else set())
    assert names(model, plain) == {"linear.bias", "norm.weight", "norm.bias"} | (
        set() if decay_embeddings else embedding
    )


# Of models of transformers: the ends of the names that do not decay though they have two dimensions
# or more, and of those that do though they are no module's `weight`.
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "gpt_oss": ({"gate_up_proj_bias", "down_proj_bias"}, {"gate_up_proj", "down_proj"}),
    "mamba": ({"A_log", "conv1d.weight"}, set()),
    "rwkv": ({"time_mix_key", "time_mix_value", "time_mix_receptance"}, set()),
    "ernie4_5_moe": ({"moe_statics.e_score_correction_bias"}, {"gate_up_proj", "down_proj"}),
    "cohere": ({"q_norm.weight", "k_norm.weight"}, set()),
    "gpt2": (set(), set()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_decay_goes_by_role_and_not_by_shape(kind: str) -> None:
    sizes = {
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "use_qk_norm": True},
        **{"d_model": 32, "n_heads": 4, "n_layers": 2, "pad_token_id": 0},
    }
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decayed, _ = parameter_groups(model, OptimSection())
    decays, wide = names(model, decayed), set()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert name not in decays
        elif name not in decays:
            wide.add(name)
    without, with_decay = KINDS[kind]
    for ends, found in ((without, wide), (with_decay, decays)):
        for end in ends:
            assert any(name.endswith(end) for name in found), end
    assert all(any(name.endswith(end) for end in without) for name in wide), wide
    routers = [name for name, _ in model.named_parameters() if name.endswith("gate.weight")]
    assert set(routers) <= decays, "a router's matrix is a linear product"


def test_the_table_counts_what_is_trained() -> None:
    assert describe_decay(Tiny(), OptimSection(weight_decay=0.1)) == (
        "linear products 0.1 (1 tensors, 16 weights); embeddings 0.1 (1 tensors, 32 weights); "
        "norms, biases and other vectors 0 (3 tensors, 12 weights)"
    )


def test_each_group_moves_by_its_own_rate() -> None:
    model = Tiny()
    groups = parameter_groups(model, OptimSection())
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0], "the schedule's rate by default"
    groups[1]["lr_scale"] = 0.25
    section = OptimSection(lr=0.5, weight_decay=0.0)
    groups[0]["weight_decay"] = 0.0
    optimizer = build_optimizer(groups, section, {"zero_optimization": {"stage": 0}})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]
    # what DeepSpeed's own load does: all groups get the hyperparameters of the first
    for group in optimizer.param_groups:
        group["lr"] = optimizer.param_groups[0]["lr"]
    set_learning_rates(optimizer, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step()
    moved = {
        name: float((before[name] - p.detach()).abs().max()) for name, p in model.named_parameters()
    }
    assert moved["linear.weight"] == pytest.approx(0.1, rel=1e-4), "AdamW's first step is the rate"
    assert moved["linear.bias"] == pytest.approx(0.025, rel=1e-4)
    assert moved["frozen.weight"] == 0.0


def test_groups_of_the_recipe_have_rates_of_their_own_and_decay_as_before() -> None:
    model = Tiny()
    section = OptimSection.model_validate(
        {
            "lr": 1e-3,
            "groups": [{"match": "embed", "lr": 1e-4}, {"match": "bias|embed", "lr": 2e-3}],
        }
    )
    seen = [
        (names(model, group), group["weight_decay"], pytest.approx(group["lr_scale"]))
        for group in parameter_groups(model, section)
    ]
    assert seen == [
        ({"linear.weight"}, 0.1, 1.0),
        ({"norm.weight"}, 0.0, 1.0),
        ({"embedding.weight"}, 0.1, 0.1),
        ({"linear.bias", "norm.bias"}, 0.0, 2.0),
    ]
    none = OptimSection.model_validate({"groups": [{"match": "frozen", "lr": 1e-4}]})
    with pytest.raises(BadInput, match=r"`frozen` occurs in no trained parameter's name"):
        parameter_groups(model, none)


def rates(steps: int, **settings: object) -> list[float]:
    section = OptimSection.model_validate(
        {"lr": 1.0, "warmup_ratio": 0.1, "min_lr_ratio": 0.1, **settings}
    )
    return [learning_rate(step, steps, section) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_warm_up_peak_and_end_at_the_floor(schedule: str) -> None:
    seen = rates(100, lr_schedule=schedule)
    assert seen[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(seen) == seen[9] == 1.0
    assert seen[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(seen[9:])), "down only after the peak"


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates(101, warmup_ratio=0)[50] == pytest.approx(0.55)


def test_wsd_stays_up_until_its_decay_begins() -> None:
    seen = rates(100, lr_schedule="wsd", wsd_decay=0.2)
    assert set(seen[10:80]) == {1.0}
    assert seen[89] == pytest.approx(0.1 + 0.9 * 0.5, abs=0.05)


def test_constant_stays_at_the_peak() -> None:
    assert set(rates(50, lr_schedule="constant")[5:]) == {1.0}


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_the_shortest_runs_have_rates_above_zero(steps: int, schedule: str) -> None:
    assert all(0 < rate <= 1 for rate in rates(steps, lr_schedule=schedule, warmup_ratio=0.03))
