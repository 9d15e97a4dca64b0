"""Layers with a state take the packages' kernels where they are, and the packing check proves them;
experts are multiplied at once.

Stand-ins for causal-conv1d and flash-linear-attention lie on the path of a process of their own, as
transformers chooses when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model_helpers import CPU, WIDE, documents, loss_and_gradients, pack, sft, tiny
from tests.ranks import ROOT
from tests.unit.test_packing_check import EXPERTS

CONVOLUTION = """
import torch.nn.functional as F

def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    width, cut = weight.shape[1], [x]
    if seq_idx is not None and KEEPS_APART:
        cut = x.split(seq_idx[0].unique_consecutive(return_counts=True)[1].tolist(), dim=2)
    made = [F.conv1d(F.pad(one, (width - 1, 0)), weight[:, None], bias, groups=len(weight))
            for one in cut]
    out = made[0] if len(made) == 1 else __import__("torch").cat(made, dim=2)
    return F.silu(out) if activation in ("silu", "swish") else out

def causal_conv1d_update(*args, **kwargs):
    raise AssertionError("no test generates")
"""
RULE = """
import torch

calls = []

def chunk_gated_delta_rule(query, key, value, g, beta, initial_state=None,
                           output_final_state=False, use_qk_l2norm_in_kernel=False,
                           cu_seqlens=None):
    from transformers.models.qwen3_next import modeling_qwen3_next as own

    calls.append(cu_seqlens is not None)
    lengths = [query.shape[1]] if cu_seqlens is None or not KEEPS_APART else cu_seqlens.diff()
    cut = zip(*(x.split([int(n) for n in lengths], dim=1) for x in (query, key, value, g, beta)))
    plain = own.torch_chunk_gated_delta_rule.__wrapped__
    made = [plain(q, k, v, g=g, beta=b, initial_state=None, output_final_state=False,
                  use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)[0] for q, k, v, g, b in cut]
    return torch.cat(made, dim=1), None

fused_recurrent_gated_delta_rule = chunk_gated_delta_rule
"""


def check() -> None:
    """Prove a small Qwen 3 Next in this process, and print what was seen."""
    import fla.ops.gated_delta_rule

    from packhorse.trainer.config.recipe import LossSection
    from packhorse.trainer.model.packing_check import prove_packing
    from packhorse.trainer.model.sft import SftModel
    from tests.unit.test_packing_check import MIXING

    model = SftModel(tiny(MIXING["qwen 3 next"][0]), LossSection(), 0, CPU)
    proof = prove_packing(model, seq_len=64, one_document=False, seed=0)
    fla.ops.gated_delta_rule.calls.clear()
    batch = pack(documents((9, 30, 12)), [range(8), range(29), range(11)], [0.1] * 3)
    _, gradients = loss_and_gradients(model, batch)
    calls = fla.ops.gated_delta_rule.calls
    seen = {"by_document": proof.by_document, "difference": proof.hidden_difference}
    print(json.dumps(seen | {"calls": calls, "gradients": len(gradients)}))


class Products(TorchDispatchMode):
    """Counts grouped products."""

    number = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += op is torch.ops.aten._grouped_mm.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_experts_of_a_layer_are_multiplied_at_once(dtype: torch.dtype) -> None:
    model = tiny(tf.Qwen3MoeConfig(**WIDE, **EXPERTS), dtype)
    with Products() as products:
        loss_and_gradients(sft(model), pack(documents((9,)), [range(8)], [0.1]))
    layers, matrices, forward_and_backward = 2, 2, 3
    assert products.number == layers * matrices * forward_and_backward


def proved(folder: Path, keeps_apart: bool) -> dict[str, Any]:
    for name, text in {"causal_conv1d": CONVOLUTION, "fla/ops/gated_delta_rule": RULE}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"KEEPS_APART = {keeps_apart}\n{text}")
    for name in ("fla", "fla/ops"):
        (folder / name / "__init__.py").touch()
    code = "from tests.unit.test_hybrid_kernels import check; check()"
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_packages_kernels_take_whole_packed_sequences(tmp_path: Path) -> None:
    seen = proved(tmp_path, keeps_apart=True)
    assert seen["by_document"] == []
    assert seen["difference"] < 1e-4
    assert seen["calls"], "the layers ran the package's kernel"
    assert all(seen["calls"]), "with the documents' boundaries, once for all of them"
    assert seen["gradients"] > 0


def test_a_kernel_that_mixes_documents_is_not_believed(tmp_path: Path) -> None:
    seen = proved(tmp_path, keeps_apart=False)
    assert "Qwen3NextDecoderLayer" in seen["by_document"][0]
    assert len(seen["calls"]) % 3 == 0
    assert not any(seen["calls"]), "one document after the other"
