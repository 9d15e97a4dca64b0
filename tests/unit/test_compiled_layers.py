"""Compiled layers give the plain model's gradients, and are compiled in the first micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers as tf
from pydantic import ValidationError
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from packhorse.trainer.config.recipe import ModelSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import attention
from packhorse.trainer.model.attention import other_attention
from packhorse.trainer.model.compiled_layers import compile_layers, require_compilable
from packhorse.trainer.model.decoder import decoder_layers
from packhorse.trainer.model.packing_check import prove_packing
from tests.model_helpers import (
    WIDE,
    documents,
    loss_and_gradients,
    pack,
    relative,
    sft,
    tiny,
)

torch.set_num_threads(1)

FOUR_LAYERS = tf.LlamaConfig(**{**WIDE, "num_hidden_layers": 4})
# the first two show both forms of a micro-batch: several documents, and one
LENGTHS = [(9, 12), (40,), (5, 7, 30), (3, 2, 2, 2, 9), (64, 64), (17,), (4,), (100, 3)]


def batch(lengths: tuple[int, ...], seed: int) -> Any:
    ids = documents(lengths, seed=seed)
    return pack(ids, [range(n - 1) for n in lengths], [0.1] * len(lengths))


class Compiler:
    """A backend of torch.compile that counts the graphs, each differentiated but not fused."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    attention.implementation("reference")


def test_gradients_are_the_plain_models_and_nothing_is_compiled_after_the_first_micro_batches(
    tmp_path: Path,
) -> None:
    plain, model = (tiny(FOUR_LAYERS) for _ in range(2))
    names = list(model.state_dict())
    compiler = Compiler()
    layers = compile_layers(model, checkpointing=True, backend=compiler)
    assert layers == len(decoder_layers(plain))
    ours, theirs = sft(model), sft(plain)
    proof = prove_packing(ours, seq_len=128, one_document=False, seed=0)
    assert proof.hidden_difference < 1e-5
    assert compiler.graphs > 0, "the check ran the compiled layers"
    after = []
    for seed, lengths in enumerate(LENGTHS):
        loss, gradients = loss_and_gradients(ours, batch(lengths, seed))
        own_loss, own_gradients = loss_and_gradients(theirs, batch(lengths, seed))
        assert loss == pytest.approx(own_loss, rel=1e-6)
        assert gradients.keys() == own_gradients.keys()
        off = {n: relative(gradients[n], own_gradients[n]) for n in gradients}
        assert max(off.values()) < 1e-5, max(off, key=lambda n: off[n])
        after.append(compiler.graphs)
    assert after[0] < after[1], "the control: the counter counts"
    assert set(after[1:]) == {after[1]}
    # attention is the one break of a layer's graph, which leaves five functions to compile in each
    # of four forms (one document or several, training or not), and no layer has forms of its own
    assert all("disable" in reason for reason in counters["graph_break"]), counters["graph_break"]
    assert compiler.graphs <= 5 * 4 < 3 * 2 * layers, "graphs do not grow with the layers"
    seen: list[torch.Size] = []
    layer: Any = decoder_layers(model)[0]
    layer.mlp.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    ours.hidden_states(batch((4,), 9))
    assert seen == [(1, 4, WIDE["hidden_size"])], "a hook that comes later is called"
    after.append(compiler.graphs)
    with other_attention(model, "sdpa"):  # as generation and comparisons run
        model(input_ids=torch.arange(20).unsqueeze(0))
    assert compiler.graphs == after[-1]
    # what is saved knows nothing of it
    assert list(model.state_dict()) == names == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in n or "compiled" in n for n in names)
    assert "ompiled" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_the_packing_check_sees_a_compiler_that_computes_something_else() -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(
            x * 1.01 if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in graph(*args)
        )

    model = tiny(tf.Qwen3Config(**WIDE))
    compile_layers(model, checkpointing=False, backend=wrong)
    with pytest.raises(BadInput, match="layer 0"):
        prove_packing(sft(model), seq_len=128, one_document=False, seed=0)


def test_what_cannot_be_compiled_is_refused() -> None:
    require_compilable(False, 3)
    require_compilable("layers", 2)
    with pytest.raises(BadInput, match="ZeRO-3"):
        require_compilable("layers", 3)
    for other in ({"activation_checkpointing": "selective"}, {"layer_kernels": "liger"}):
        with pytest.raises(ValidationError, match="compile"):
            ModelSection.model_validate({"name": "x", "compile": "layers", **other})
