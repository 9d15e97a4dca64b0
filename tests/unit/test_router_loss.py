"""The balancing loss against transformers' own, by document, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from packhorse.trainer import datatypes
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import router_loss
from packhorse.trainer.model.router_loss import RouterLoss
from packhorse.trainer.model.router_records import Routed
from tests.model_helpers import pack
from tests.models.shrunk import config_of

SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
}
DBRX = {"attn_config": {"rope_theta": 1e4}}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}


def empty(kind: str, **sizes: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}))


def test_a_document_alone_has_transformers_own_loss_and_gradient() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(7, 4, requires_grad=True) for _ in range(2)]
    batch = pack([torch.arange(7)], [[0, 1, 4]], [1 / 3] * 3)
    mine = RouterLoss(empty("qwen3_moe"), 0.5)([Routed(x) for x in logits], batch)
    # of one layer: transformers multiplies means over all layers, which then balance each other
    theirs = torch.stack([torch.as_tensor(load_balancing_loss_func((x,), 4, 2)) for x in logits])
    theirs = theirs.mean()
    assert mine.item() == pytest.approx(0.5 * theirs.item(), rel=1e-6)
    of_mine, of_theirs = torch.autograd.grad(mine, logits), torch.autograd.grad(theirs, logits)
    for ours, other in zip(of_mine, of_theirs, strict=True):
        assert torch.allclose(ours, 0.5 * other, atol=1e-7)


def test_packed_documents_count_by_their_trained_tokens() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 4)
    router = RouterLoss(empty("qwen3_moe"), 1.0)
    documents = [torch.arange(5), torch.arange(7)]
    packed = router([Routed(logits)], pack(documents, [[0], [1, 2, 3]], [0.25] * 4))
    alone = [
        router([Routed(part)], pack([document], [[0]], [1.0]))
        for part, document in zip(logits.split([5, 7]), documents, strict=True)
    ]
    assert packed.item() == pytest.approx(0.25 * alone[0].item() + 0.75 * alone[1].item())


@pytest.mark.parametrize("zigzag", [False, True])
def test_slices_of_a_sequence_add_up_to_the_whole(zigzag: bool) -> None:
    """With the sums over ranks that a first round records, each slice has its part of the loss."""
    torch.manual_seed(0)
    logits = torch.randn(29, 4, requires_grad=True)
    ids = [torch.arange(n) for n in (11, 1, 17)]
    batch = pack(ids, [[0, 7], [], [3, 4, 15]], [0.3, 0.1, 0.2])
    with mock.patch.object(datatypes, "ZIGZAG_TOKENS", 2):
        slices = [batch.cut(index, 3, zigzag) for index in range(3)]
        places = [part.own_tokens(torch.arange(29)) for part in slices]
        given: list[list[torch.Tensor]] = []

        def run(reduce: Callable[..., None]) -> torch.Tensor:
            parts = []
            for part, place in zip(slices, places, strict=True):
                given.append([])
                with mock.patch.object(router_loss.td, "all_reduce", reduce):
                    parts.append(RouterLoss(empty("qwen3_moe"), 0.5)([Routed(logits[place])], part))
            return torch.stack(parts).sum()

        run(lambda sums, group: given[-1].append(sums.clone()))
        totals = [torch.stack(of_ranks).sum(0) for of_ranks in zip(*given, strict=True)]

        def put(sums: torch.Tensor, group: Any) -> None:
            given[-1].append(sums)
            sums.copy_(totals[len(given[-1]) - 1])

        in_slices = run(put)
    whole = RouterLoss(empty("qwen3_moe"), 0.5)([Routed(logits)], batch)
    assert in_slices.item() == pytest.approx(whole.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (in_slices, whole))
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_a_router_recorded_by_its_probabilities_has_the_same_loss() -> None:
    """Gemma 4's is: a softmax of them would make every router look balanced."""
    torch.manual_seed(0)
    logits, batch = 3 * torch.randn(7, 4), pack([torch.arange(7)], [[0, 1, 4]], [1 / 3] * 3)
    of_logits, of_shares = (RouterLoss(empty("qwen3_moe"), 0.5) for _ in range(2))
    expected = of_logits([Routed(logits)], batch)
    assert of_shares([Routed(logits.softmax(-1))], batch).item() == pytest.approx(expected.item())


def test_a_step_that_is_not_applied_leaves_the_sums() -> None:
    router, batch = RouterLoss(empty("qwen3_moe"), 0.5), pack([torch.arange(7)], [[0]], [1.0])
    router([Routed(torch.ones(7, 4))], batch)
    before = router.sums
    router([Routed(torch.full((7, 4), torch.nan))], batch)
    router.sums = before
    assert router.read(1)["train/router_entropy"] == pytest.approx(1.0)


def by_hand(shares_TE: torch.Tensor, chosen_TE: torch.Tensor) -> float:
    return shares_TE.shape[1] * float((chosen_TE.mean(0) * shares_TE.mean(0)).sum())


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "lfm2_moe", "longcat_flash"])
def test_a_router_with_a_bias_is_balanced_by_what_it_chooses(kind: str) -> None:
    """By DeepSeek V3's equations 17 to 20, with shares of the scores that its weights have."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32)
    biases = [b for name, b in model.named_buffers() if name.endswith("bias")]
    for bias in biases:
        bias.normal_(0, 0.3)
    router, ids = RouterLoss(model, 0.5), torch.arange(4, 33)
    with router.records.recording() as routed:
        model(input_ids=ids[None], use_cache=False)
    assert len(routed) == len(biases) > 0
    expected = []
    for layer in routed:
        scores_TE = layer.scores.detach()
        shares_TE = scores_TE.softmax(-1) if kind == "longcat_flash" else scores_TE.sigmoid()
        assert layer.chosen is not None
        chosen_TE = torch.zeros_like(scores_TE).scatter_(1, layer.chosen, 1.0)
        by_score = torch.zeros_like(scores_TE).scatter_(
            1, scores_TE.topk(layer.chosen.shape[1]).indices, 1.0
        )
        assert not torch.equal(chosen_TE, by_score), "the bias chooses others"
        expected.append(by_hand(shares_TE / shares_TE.sum(-1, keepdim=True), chosen_TE))
    mine = router(routed, pack([ids], [[0, 1]], [0.5] * 2))
    assert mine.item() == pytest.approx(0.5 * sum(expected) / len(expected), rel=1e-5)
    mine.backward()
    weights = [
        p
        for name, p in model.named_parameters()
        if name.endswith(("gate.weight", "classifier.weight"))
    ]
    assert all(p.grad is not None and p.grad.norm() > 0 for p in weights[: len(routed)])


def test_an_expert_at_weight_zero_is_not_chosen() -> None:
    """ZAYA names expert 0 where a token skips all of them."""
    chosen, weights = torch.tensor([[0], [1], [0]]), torch.tensor([[0.7], [0.6], [0.0]])
    router = RouterLoss(empty("qwen3_moe"), 0.5)
    router([Routed(torch.randn(3, 4), weights, chosen)], pack([torch.arange(3)], [[0]], [1.0]))
    assert (router.sums[2] * 2).tolist() == [pytest.approx([1 / 3, 1 / 3, 0, 0])]


def test_a_bias_without_the_choice_is_refused() -> None:
    router = RouterLoss(empty("glm4_moe", n_routed_experts=4, first_k_dense_replace=0), 0.1)
    with pytest.raises(BadInput, match="does not hand out the choice"):
        router([Routed(torch.randn(7, 4))], pack([torch.arange(7)], [[0]], [1.0]))


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("llama", {}, "has no router"),
        ("dbrx", {**DBRX, "num_experts_per_tok": None}, "does not say how many"),
        # their code knows routers, and this configuration builds none
        ("granitemoehybrid", {"num_local_experts": 0, **MAMBA}, "has no router"),
        ("doge", {"is_moe": False}, "has no router"),
    ],
)
def test_models_without_such_a_router_are_refused(
    kind: str, sizes: dict[str, Any], why: str
) -> None:
    with pytest.raises(BadInput, match=why):
        RouterLoss(empty(kind, **sizes), 0.1)


def test_a_router_by_keys_is_refused() -> None:
    """Doge's scores two keys for each expert."""
    router = RouterLoss(empty("doge", is_moe=True, num_experts=16), 0.1)
    with pytest.raises(BadInput, match="DogeForCausalLM scores no experts"):
        router([Routed(torch.randn(2, 7, 4))], pack([torch.arange(7)], [[0]], [1.0]))
