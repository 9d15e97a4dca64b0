"""Feed-forward blocks in tiles: what they compute, what they never hold, and what is left whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from packhorse.trainer.config.recipe import AdapterSection
from packhorse.trainer.model import feed_forward_tiles
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.feed_forward_tiles import (
    feed_forward_blocks,
    set_tiles,
    tiled_blocks,
    wants_tiles,
)
from packhorse.trainer.model.lora import add_adapter
from tests.model_helpers import (
    SIZES,
    WIDE,
    documents,
    loss_and_gradients,
    pack,
    relative,
    sft,
    tiny,
    tiny_llama,
)

TILE = 32  # as SIZES' hidden size
TOKENS = 5 * TILE + 7  # of which the last tile has few
INNER = 256
LLAMA = tf.LlamaConfig(**{**SIZES, "intermediate_size": INNER})
FAMILIES = {
    "llama": LLAMA,
    "gemma 3, whose block has a norm behind it": tf.Gemma3TextConfig(**WIDE),
    "one product for gate and up": tf.Phi3Config(**SIZES, pad_token_id=0),
    "not gated, with biases": tf.GPTNeoXConfig(**{**SIZES, "intermediate_size": 128}),
    "transposed products": tf.GPT2Config(
        vocab_size=160, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "functional dropout, if any": tf.SeedOssConfig(**WIDE, residual_dropout=0, attention_dropout=0),
    "a shared expert": tf.Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward_tiles, "FEWEST_TOKENS", TILE)


def batch() -> Any:
    ids = documents((TOKENS - 40, 40))
    return pack(ids, [range(len(document) - 1) for document in ids], [0.02] * 2)


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(config)


def step(config: Any, mode: str, tiles: bool, **adapter: Any) -> tuple[float, dict[str, Any]]:
    """Return the loss and the gradients with a mode of activation checkpointing."""
    model = tiny(config)
    if adapter:
        add_adapter(model, AdapterSection(**adapter), seed=0)
    set_checkpointing(model, mode)
    set_tiles(model, tiles)
    assert bool(tiled_blocks(model)) == tiles
    return loss_and_gradients(sft(model), batch())


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tiles_give_the_plain_blocks_gradients(name: str, mode: str) -> None:
    loss, gradients = step(FAMILIES[name], "none", False)
    again_loss, again = step(FAMILIES[name], mode, True)
    assert again_loss == pytest.approx(loss, rel=1e-6)
    assert again.keys() == gradients.keys()
    worst = max(relative(again[key], gradients[key]) for key in gradients)
    print(f"{name}, {mode}: {worst:.1e}")
    assert worst <= 1e-6


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["q_proj"]])
def test_and_an_adapters_gradients(targets: Any) -> None:
    """Below the first adapter no input needs a gradient."""
    adapter = {"rank": 4, "target_modules": targets}
    _, gradients = step(LLAMA, "none", False, **adapter)
    _, again = step(LLAMA, "full", True, **adapter)
    assert again.keys() == gradients.keys()
    assert gradients
    assert max(relative(again[key], gradients[key]) for key in gradients) <= 1e-6


class _Largest(TorchDispatchMode):
    """Notes the most elements that a tensor has, of those made inside."""

    elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = operation(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("tiles", [True, False])
def test_no_tensor_of_all_tokens_by_the_inner_width_is_made(tiles: bool) -> None:
    block = tiny(LLAMA).model.layers[0].mlp
    set_tiles(block, tiles)
    x = torch.randn(1, TOKENS, 32, requires_grad=True)
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    )
    with _Largest() as seen:
        with hooks:
            out = block(x)
        out.sum().backward()
    weights = INNER * 32
    assert (seen.elements >= TOKENS * INNER) != tiles
    assert tiles == (saved == [TOKENS * 32]), saved
    assert not tiles or seen.elements <= max(weights, TILE * INNER)


def test_a_recomputed_layer_repeats_the_block_once() -> None:
    """Its recomputation ends before the block, whose own backward repeats it, to its last product:
    of the plain block that one is spared.
    """
    flops = {}
    for tiles in (False, True):
        model = tiny(LLAMA)
        set_checkpointing(model, "full")
        set_tiles(model, tiles)
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(sft(model), batch())
        flops[tiles] = counter.get_total_flops()
    last_products = 2 * 2 * TOKENS * 32 * INNER
    assert flops[True] - flops[False] == last_products


def test_in_bf16_they_are_nearer_to_the_truth_than_deepspeeds() -> None:
    """DeepSpeed's TiledMLP sums its tiles' gradients in bf16."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    plain = tiny_llama(intermediate_size=INNER).model.layers[0].mlp
    x = torch.randn(1, 64 * TILE, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, theirs = (copy.deepcopy(plain).bfloat16() for _ in range(2))
    exact = copy.deepcopy(ours).float()
    exact(x.float()).square().sum().backward()
    set_tiles(ours, True)
    ours(x.clone().requires_grad_()).float().square().sum().backward()
    weights = list(theirs.parameters())
    out = TiledMLP.apply(type(theirs).forward, theirs, x.clone().requires_grad_(), 64, weights)
    out.float().square().sum().backward()

    def error(block: Any, name: str) -> float:
        truth = exact.get_parameter(name).grad
        return relative(block.get_parameter(name).grad, truth)

    for name, _ in plain.named_parameters():
        print(f"{name}: {error(ours, name):.1e}, DeepSpeed's {error(theirs, name):.1e}")
        assert error(ours, name) < error(theirs, name) / 2


def test_experts_and_dropout_run_whole() -> None:
    experts = tiny(tf.Qwen3MoeConfig(**WIDE, num_experts=4, moe_intermediate_size=24))
    assert not list(feed_forward_blocks(experts))
    dropout = tiny(LLAMA)
    add_adapter(dropout, AdapterSection(rank=4, dropout=0.1), seed=0)
    assert not list(feed_forward_blocks(dropout))
    dora = tiny(LLAMA)
    add_adapter(dora, AdapterSection(rank=4, variants=("dora",)), seed=0)
    assert not list(feed_forward_blocks(dora))


@pytest.mark.parametrize(
    ("dropout", "make"),
    [
        ("residual_dropout", lambda rate: tf.SeedOssConfig(**WIDE, residual_dropout=rate)),
        ("residual_dropout", lambda rate: tf.Starcoder2Config(**SIZES, residual_dropout=rate)),
        (
            "resid_pdrop",
            lambda rate: tf.GPT2Config(n_embd=32, n_head=4, n_layer=1, resid_pdrop=rate),
        ),
    ],
)
def test_so_do_blocks_with_a_rate_of_dropout(dropout: str, make: Any) -> None:
    for rate in (0.0, 0.1):
        config = make(rate)
        assert getattr(config, dropout) == rate
        assert any(feed_forward_blocks(on_meta(config))) == (rate == 0)


HYBRID = {
    **{"num_hidden_layers": 3, "mamba_d_state": 16, "n_mamba_heads": 4, "mamba_ngroups": 1},
    **{"hybrid_layer_ids": [1], "layers_block_type": ["mamba", "hybrid", "mamba"]},
    **{"num_mem_blocks": 1, "attention_hidden_size": 64, "attention_head_dim": 32},
}


@pytest.mark.parametrize(
    "config",
    [
        tf.BloomConfig(hidden_size=32, n_layer=1, n_head=2, hidden_dropout=0),
        tf.MptConfig(d_model=32, n_layers=1, n_heads=2),
        tf.Zamba2Config(**{**SIZES, **HYBRID}),
        tf.MoshiConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_and_those_that_take_more_than_their_input(config: Any) -> None:
    assert not list(feed_forward_blocks(on_meta(config)))


class Gated(nn.Module):
    """A block of which a weight takes no part; an attention with `names`."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in ("up_proj", "idle", *names):
            self.add_module(name, nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("up_proj")(x).sigmoid()


def test_an_attention_with_a_gate_runs_whole() -> None:
    assert [len(list(feed_forward_blocks(Gated(*names)))) for names in ((), ("q_proj",))] == [1, 0]
    # the real one takes its positions, too
    if hasattr(tf, "HrmTextConfig"):
        model = on_meta(tf.HrmTextConfig(**WIDE))
        assert {type(block).__name__ for block in feed_forward_blocks(model)} == {"HrmTextMLP"}


def test_a_weight_without_a_part_gets_no_gradient() -> None:
    block = Gated()
    set_tiles(block, True)
    block(torch.randn(1, TOKENS, 32)).sum().backward()
    learns = {name for name, p in block.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {"up_proj.weight", "up_proj.bias"}


def test_tiles_are_a_matter_of_the_run() -> None:
    """So that gradients come in the same order on all ranks, of which one may have a filler."""
    assert wants_tiles("full", 4 * TILE, 32)
    assert wants_tiles("offload", 4 * TILE, 32)
    assert not wants_tiles("full", 4 * TILE - 1, 32)
    assert not wants_tiles("selective", 4 * TILE, 32)

    def order(tokens: int) -> list[str]:
        model, seen = tiny(LLAMA), []
        set_checkpointing(model, "full")
        set_tiles(model, True)
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
        ids = documents((tokens,))
        loss_and_gradients(sft(model), pack(ids, [range(tokens - 1)], [0.1]))
        return seen

    assert order(TOKENS) == order(2)


def test_tiles_are_taken_off() -> None:
    model = tiny(LLAMA)
    assert set_tiles(model, True) == len(tiled_blocks(model)) == 2
    block = model.model.layers[0].mlp
    several = torch.randn(2, TILE, 32)
    assert "Tiles" not in block(several).grad_fn.name(), "as in generation"
    set_tiles(model, False)
    assert not tiled_blocks(model)
    assert "forward" not in vars(block)
    assert not block._forward_pre_hooks
