"""Products in fp8 keep packed documents apart, and one scale for a whole tensor does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import transformers as tf
from pydantic import ValidationError
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from packhorse.trainer.config.recipe import AdapterSection, ModelSection, Recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import attention, fp8
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.compiled_layers import compile_layers
from packhorse.trainer.model.lora import add_adapter
from packhorse.trainer.model.packing_check import prove_packing
from tests.model_helpers import CPU, WIDE, documents, loss_and_gradients, pack, relative, sft, tiny

torch.set_num_threads(1)

LLAMA = tf.LlamaConfig(**{**WIDE, "num_hidden_layers": 4})
EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the products run here: torch emulates fp8 on a CPU, which the trainer refuses."""
    monkeypatch.setattr(fp8, "missing_for_fp8", lambda device: None)


def in_fp8(config: Any = LLAMA) -> Any:
    model = tiny(config, torch.bfloat16)
    fp8.use_fp8(model, CPU)
    return model


def one_scale(rows_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round with one scale for the whole tensor, as torchao's recipe `tensorwise` does."""
    scale = 448.0 / rows_RC.abs().amax().float()
    rounded = (rows_RC.float() * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    padded = F.pad(rounded, (0, -rows_RC.shape[1] % fp8.MULTIPLE)).contiguous()
    return padded, (1 / scale).expand(rows_RC.shape[0], 1).contiguous()


def batch(*lengths: int, seed: int = 0) -> Any:
    return pack(
        documents(lengths, seed=seed), [range(n - 1) for n in lengths], [0.1] * len(lengths)
    )


def test_the_packing_check_accepts_a_scale_a_row() -> None:
    proof = prove_packing(sft(in_fp8()), seq_len=64, one_document=False, seed=0)
    assert proof.hidden_difference < 0.05


def test_the_packing_check_refuses_a_scale_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_cast", one_scale)
    with pytest.raises(BadInput, match="once its neighbours"):
        prove_packing(sft(in_fp8()), seq_len=64, one_document=False, seed=0)


def test_other_neighbours_change_no_bit_of_a_documents_states() -> None:
    model = sft(in_fp8())
    ids = documents((9, 30, 12))
    others = documents((9, 30, 12), seed=1)
    with torch.no_grad():
        first, second = (
            model.hidden_states(pack(packed, [[0]] * 3, [1.0] * 3))[9:39]
            for packed in (ids, [others[0], ids[1], others[2]])
        )
    assert torch.equal(first, second)


def test_a_gradient_is_near_bfloat16s_and_every_weight_has_one() -> None:
    loss, ours = loss_and_gradients(sft(in_fp8()), batch(9, 12, 31))
    own_loss, theirs = loss_and_gradients(sft(tiny(LLAMA, torch.bfloat16)), batch(9, 12, 31))
    assert ours.keys() == theirs.keys()
    assert loss == pytest.approx(own_loss, rel=1e-2)
    off = {name: relative(ours[name], theirs[name]) for name in ours}
    assert max(off.values()) < 0.2
    assert min(value for name, value in off.items() if "_proj" in name) > 0.01, "they were in fp8"


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_changes_no_bit_of_a_gradient(mode: str) -> None:
    plain, recomputed = in_fp8(), in_fp8()
    set_checkpointing(recomputed, mode)
    loss, ours = loss_and_gradients(sft(recomputed), batch(9, 12, 31))
    own_loss, theirs = loss_and_gradients(sft(plain), batch(9, 12, 31))
    assert loss == own_loss
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Products(TorchDispatchMode):
    """Counts the products in fp8."""

    number = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += op is torch.ops.aten._scaled_mm.default
        return op(*args, **(kwargs or {}))


def test_selective_checkpointing_keeps_the_widening_products() -> None:
    made = {}
    for mode in ("none", "selective", "full"):
        model = in_fp8()
        set_checkpointing(model, mode)
        with Products() as products:
            loss_and_gradients(sft(model), batch(9, 12))
        made[mode] = products.number / len(model.model.layers)
    modules, widening = 7, 2
    assert made == {"none": modules * 3, "selective": modules * 4 - widening, "full": modules * 4}


def test_compiled_layers_have_no_graph_break_and_the_same_gradients() -> None:
    torch._dynamo.reset()
    model, graphs = in_fp8(), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    try:
        compile_layers(model, checkpointing=False, backend=backend)
        _, ours = loss_and_gradients(sft(model), batch(9, 12, 31))
        first = len(graphs)
        loss_and_gradients(sft(model), batch(5, 7, 40))
    finally:
        attention.implementation("reference")
        torch._dynamo.reset()
    assert len(graphs) == first
    _, theirs = loss_and_gradients(sft(in_fp8()), batch(9, 12, 31))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_routers_head_and_embeddings_stay() -> None:
    model = in_fp8(tf.Qwen2MoeConfig(**WIDE, **EXPERTS))
    changed = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is fp8.Fp8Linear}
    attends = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert changed == attends | {"gate_proj", "up_proj", "down_proj"}  # of the shared expert
    loss_and_gradients(sft(model), batch(9, 12))


@pytest.mark.parametrize("variants", [(), ("dora",)])
def test_an_adapter_trains_beside_frozen_weights_in_fp8(variants: tuple[str, ...]) -> None:
    model = tiny(LLAMA, torch.bfloat16)
    model.requires_grad_(True)
    add_adapter(model, AdapterSection.model_validate({"rank": 16, "variants": variants}), 0)
    fp8.use_fp8(model, CPU)
    kinds = {type(m) for n, m in model.named_modules() if "lora_" in n}
    assert fp8.Fp8Linear not in kinds
    assert sum(type(m) is fp8.Fp8Linear for m in model.modules()) == 4 * 7
    _, gradients = loss_and_gradients(sft(model), batch(9, 12))
    assert gradients
    assert all("lora_" in name for name in gradients)


@pytest.mark.parametrize("tokens", [0, 1, 16, 35])
def test_any_number_of_tokens(tokens: int) -> None:
    linear = torch.nn.Linear(32, 48).bfloat16()
    linear.__class__ = fp8.Fp8Linear
    given = torch.randn(1, tokens, 32).bfloat16().requires_grad_()
    out = linear(given)
    out.sum().backward()
    assert out.shape == (1, tokens, 48)
    assert linear.weight.grad is not None


def test_a_number_that_is_not_finite_is_not_rounded_away() -> None:
    rows = torch.tensor([[1.0, 2.0], [float("inf"), 1.0], [float("nan"), 1.0]]).bfloat16()
    rounded, scale = fp8._cast(rows)
    finite = (rounded.float()[:, :2] * scale).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, False]


def test_a_wrong_scale_is_seen_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cast = fp8._cast

    def exchanged(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounded, scale = cast(rows)
        return rounded, scale.flip(0)

    monkeypatch.setattr(fp8, "_cast", exchanged)
    with pytest.raises(BadInput, match="in fp8 gives a output"):
        in_fp8()


def test_a_card_without_the_kernel_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("rowwise scaling requires another card")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    with pytest.raises(BadInput, match=r"cannot be made in fp8 here .*rowwise scaling"):
        in_fp8()


def test_it_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(BadInput, match="needs a CUDA device"):
        in_fp8()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "8.9" in str(fp8.missing_for_fp8(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.missing_for_fp8(torch.device("cuda")) is None
    with pytest.raises(ValidationError, match="matmul: fp8_rowwise"):
        ModelSection(name="x", matmul="fp8_rowwise", dtype="float32")
    tree: dict[str, Any] = {
        "model": {"name": "x", "matmul": "fp8_rowwise"},
        "adapter": {"base": "nf4"},
        "data": {"train": [{"path": "x"}]},
        "run": {"dir": "x"},
    }
    with pytest.raises(ValidationError, match=r"adapter\.base: the products"):
        Recipe.model_validate(tree)
