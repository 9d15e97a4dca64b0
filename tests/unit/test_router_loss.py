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
from tests.model_helpers import pack

SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}


def empty(kind: str, **sizes: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}))


def test_a_document_alone_has_transformers_own_loss_and_gradient() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(7, 4, requires_grad=True) for _ in range(2)]
    batch = pack([torch.arange(7)], [[0, 1, 4]], [1 / 3] * 3)
    mine = RouterLoss(empty("qwen3_moe"), 0.5)(tuple(logits), batch)
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
    packed = router((logits,), pack(documents, [[0], [1, 2, 3]], [0.25] * 4))
    alone = [
        router((part,), pack([document], [[0]], [1.0]))
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
                    parts.append(RouterLoss(empty("qwen3_moe"), 0.5)((logits[place],), part))
            return torch.stack(parts).sum()

        run(lambda sums, group: given[-1].append(sums.clone()))
        totals = [torch.stack(of_ranks).sum(0) for of_ranks in zip(*given, strict=True)]

        def put(sums: torch.Tensor, group: Any) -> None:
            given[-1].append(sums)
            sums.copy_(totals[len(given[-1]) - 1])

        in_slices = run(put)
    whole = RouterLoss(empty("qwen3_moe"), 0.5)((logits,), batch)
    assert in_slices.item() == pytest.approx(whole.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (in_slices, whole))
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_a_router_recorded_by_its_probabilities_has_the_same_loss() -> None:
    """Gemma 4's is: a softmax of them would make every router look balanced."""
    torch.manual_seed(0)
    logits, batch = 3 * torch.randn(7, 4), pack([torch.arange(7)], [[0, 1, 4]], [1 / 3] * 3)
    of_logits, of_shares = (RouterLoss(empty("qwen3_moe"), 0.5) for _ in range(2))
    expected = of_logits((logits,), batch)
    assert of_shares((logits.softmax(-1),), batch).item() == pytest.approx(expected.item())


def test_a_step_that_is_not_applied_leaves_the_sums() -> None:
    router, batch = RouterLoss(empty("qwen3_moe"), 0.5), pack([torch.arange(7)], [[0]], [1.0])
    router((torch.ones(7, 4),), batch)
    before = router.sums
    router((torch.full((7, 4), torch.nan),), batch)
    router.sums = before
    assert router.read(1)["train/router_entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("llama", {}, "has no router"),
        # their code knows routers, and this configuration builds none
        ("granitemoehybrid", {"num_local_experts": 0, **MAMBA}, "has no router"),
        ("doge", {"is_moe": False}, "has no router"),
        ("glm4_moe", {"n_routed_experts": 4, "first_k_dense_replace": 0}, "by a bias"),
        ("lfm2_moe", {"num_dense_layers": 0, "layer_types": ["conv"] * 2}, "by a bias"),
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
        router((torch.randn(2, 7, 4),), pack([torch.arange(7)], [[0]], [1.0]))
