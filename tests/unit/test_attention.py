"""Backends keep documents apart, honour windows, caps and sinks, and refuse the rest."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from packhorse.trainer.build_engine import be_deterministic
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import attention, attention_kernels, flash_versions
from packhorse.trainer.model.attention_kernels import Arguments, Bounds

torch.set_num_threads(1)

CPU = torch.device("cpu")
LENGTHS = (5, 12, 1, 7)
HEADS, GROUPS, SIZE = 4, 2, 8


class Layer(nn.Module):
    """A causal attention layer, as a backend sees one."""

    is_causal = True
    config = SimpleNamespace(_attn_implementation="packhorse_reference")


def bounds(lengths: tuple[int, ...] = LENGTHS) -> Bounds:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return Bounds(ends, max(lengths), lengths)


def packed_qkv(lengths: tuple[int, ...] = LENGTHS, value_size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, SIZE), (GROUPS, SIZE), (GROUPS, value_size)]
    return [
        torch.randn(1, heads, sum(lengths), e, generator=generator).requires_grad_()
        for heads, e in shapes
    ]


def attend(backend: str, *qkv: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return attention._FUNCTIONS[backend](
        Layer(), *qkv, None, **{"document_bounds": bounds(), **arguments}
    )[0]


def by_the_formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention token by token: softmax over those before it in its document and window."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    out = torch.empty(1, q.shape[2], HEADS, v.shape[-1])
    for i in range(q.shape[2]):
        first = max(int((document < document[i]).sum()), i + 1 - (sliding_window or i + 1))
        for head in range(HEADS):
            scores = (k[0, head, first : i + 1] @ q[0, head, i]) * (scaling or SIZE**-0.5)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            sink = torch.empty(0) if s_aux is None else s_aux[head : head + 1]
            shares = torch.cat([scores, sink]).softmax(0)[: len(scores)]
            out[0, i, head] = shares @ v[0, head, first : i + 1]
    return out


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scaling": 0.3},
        {"sliding_window": 3},
        {"sliding_window": 12},
        {"sliding_window": 1},
        {"softcap": 0.5},
        {"softcap": 0.5, "sliding_window": 3, "scaling": 0.7},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]), "sliding_window": 3},
    ],
    ids=lambda arguments: ", ".join(arguments) or "plain",
)
def test_reference_is_the_formula(arguments: dict[str, Any]) -> None:
    ours, true = packed_qkv(), packed_qkv()
    out, out_true = attend("reference", *ours, **arguments), by_the_formula(*true, **arguments)
    torch.testing.assert_close(out, out_true, rtol=1e-5, atol=1e-6)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad((out * weights).sum(), ours),
        torch.autograd.grad((out_true * weights).sum(), true),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"scaling": 0.7}])
@pytest.mark.parametrize("value_size", [SIZE, 2 * SIZE])
def test_short_documents_in_bf16_on_a_cpu_are_products_with_the_same_values_and_gradients(
    arguments: dict[str, Any], value_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are as near to torch's kernel in fp32 as its kernel in bf16 is, and within 3e-2."""

    def off(products_tokens: int, **defect: Any) -> float:
        monkeypatch.setattr(attention_kernels, "PRODUCTS_TOKENS", products_tokens)
        exact, rounded = (
            packed_qkv(value_size=value_size),
            [x.detach().bfloat16().requires_grad_() for x in packed_qkv(value_size=value_size)],
        )
        outs = (
            attend("reference", *exact, **arguments),
            attend("reference", *rounded, **arguments, **defect),
        )
        for out in outs:
            out.float().square().sum().backward()
        pairs = [
            (outs[0], outs[1]),
            *((a.grad, b.grad) for a, b in zip(exact, rounded, strict=True)),
        ]
        return max(
            float((a - b.float()).norm() / a.norm())
            for a, b in pairs
            if a is not None and b is not None
        )

    assert off(max(LENGTHS)) <= max(3 * off(0), 1e-2) <= 3e-2
    assert off(max(LENGTHS), document_bounds=bounds((sum(LENGTHS),))) > 0.3, (
        "the control: boundaries ignored"
    )


def test_values_may_be_wider_or_narrower_than_keys() -> None:
    q, k, v = packed_qkv(value_size=5)
    torch.testing.assert_close(
        attend("reference", q, k, v), by_the_formula(q, k, v), rtol=1e-5, atol=1e-6
    )


def test_a_single_document_is_a_packed_sequence() -> None:
    q, k, v = packed_qkv()
    first = attend(
        "reference",
        *(x[:, :, : LENGTHS[0]] for x in (q, k, v)),
        document_bounds=bounds(LENGTHS[:1]),
    )
    torch.testing.assert_close(first, attend("reference", q, k, v)[:, : LENGTHS[0]])


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"document_bounds": None}, "does not hand the document boundaries on"),
        ({"is_causal": False}, "not causal"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"something_new": 3}, "something_new"),
    ],
)
def test_what_no_backend_does_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        attend("reference", *packed_qkv(), **arguments)


def test_a_mask_is_refused() -> None:
    with pytest.raises(BadInput, match="mask of its own"):
        attention._FUNCTIONS["reference"](
            Layer(), *packed_qkv(), torch.ones(1, 1, 25, 25), document_bounds=bounds()
        )


def test_attention_to_other_positions_is_refused() -> None:
    q, k, v = packed_qkv()
    with pytest.raises(BadInput, match="other positions"):
        attend("reference", q[:, :, :3], k, v)


@pytest.mark.parametrize(
    ("backend", "arguments", "says"),
    [
        ("torch_varlen", {"softcap": 1.0}, "softcap"),
        ("torch_varlen", {"s_aux": torch.zeros(HEADS)}, "sinks"),
        ("torch_varlen", {"dropout": 0.1}, "dropout"),
        ("torch_varlen", {}, "16-bit"),
    ],
)
def test_what_a_backend_lacks_is_refused(
    backend: str, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        attend(backend, *packed_qkv(), **arguments)


def test_arguments_that_mean_nothing_to_attention_pass() -> None:
    qkv = packed_qkv()
    out = attend(
        "reference",
        *qkv,
        position_ids=torch.zeros(1),
        use_cache=False,
        output_attentions=False,
        other=None,
    )
    assert torch.equal(out, attend("reference", *qkv))


def test_heads_for_fused_kernels_are_padded_to_a_size_they_take() -> None:
    q, k, v = (x.bfloat16() for x in packed_qkv(value_size=5))
    asked = Arguments(
        scale=None, window=None, softcap=None, sinks=None, dropout=None, bounds=bounds()
    )
    *padded, scale = attention_kernels.for_varlen(
        "Layer", "torch_varlen", (), q[..., :6], k[..., :6], v, asked
    )
    assert [tuple(x.shape) for x in padded] == [(25, HEADS, 8), (25, GROUPS, 8), (25, GROUPS, 8)]
    assert scale == 6**-0.5, "the scale is that of the size before padding"
    assert not padded[0][..., 6:].any()


def test_heads_wider_than_the_kernels_take_are_refused() -> None:
    wide = torch.zeros(1, 1, 4, 512, dtype=torch.bfloat16)
    asked = Arguments(
        scale=None, window=None, softcap=None, sinks=None, dropout=None, bounds=bounds()
    )
    with pytest.raises(BadInput, match="256"):
        attention_kernels.for_varlen("Layer", "flash_attn", (), wide, wide, wide, asked)


# ------------------------------------------------------------------------------------------- choice


def test_auto_returns_its_choice_and_the_reason() -> None:
    backend, why = attention.choose("auto", CPU, torch.bfloat16)
    assert backend == "reference"
    assert "CUDA" in why


@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
def test_a_named_backend_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=f"{name} cannot be used"):
        attention.choose(name, CPU, torch.bfloat16)


FOUND = "flash_attn_varlen_func = len"
OTHER_TORCH = "raise OSError('undefined symbol: _ZN3c104')"


@pytest.mark.parametrize(
    ("major", "files", "says"),
    [
        # flash-attn 4 alone leaves a folder `flash_attn` without __init__.py
        (9, {"flash_attn/cute/__init__.py": FOUND}, 4),
        (8, {"flash_attn/cute/__init__.py": FOUND}, "^no flash-attn for this GPU is"),
        (9, {"flash_attn_interface.py": FOUND, "flash_attn/cute/__init__.py": FOUND}, 3),
        (10, {"flash_attn_interface.py": FOUND, "flash_attn/__init__.py": FOUND}, 2),
        (9, {"flash_attn_interface.py": OTHER_TORCH, "flash_attn/__init__.py": FOUND}, 2),
        (9, {"flash_attn_interface.py": OTHER_TORCH}, "flash-attn 3 .* undefined symbol"),
        (9, {"flash_attn/cute/__init__.py": "import cutlass_of_no_kind"}, "4 .*no_kind"),
        (9, {}, "^no flash-attn for this GPU is installed$"),
        (7, {"flash_attn/__init__.py": FOUND}, "^no flash-attn for this GPU is installed$"),
    ],
)
def test_the_flash_attn_that_is_found_is_the_best_that_can_be_imported(
    major: int,
    files: dict[str, str],
    says: int | str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        if isinstance(says, int):
            assert flash_versions.load.__wrapped__(major)[0].version == says
            return
        with pytest.raises(ImportError, match=says):
            flash_versions.load.__wrapped__(major)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_each_flash_attn_is_called_with_what_it_takes(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        calls.append(given | {"size": q.shape[-1]})
        return q if version == 2 else (q, None)

    flash = flash_versions.FlashAttention(version, varlen)
    monkeypatch.setattr(flash_versions, "load_for", lambda device: flash)
    q, k, v = (x.bfloat16() for x in packed_qkv())
    assert torch.equal(attend("flash_attn", q, k, v, sliding_window=3), q.transpose(1, 2))
    wide = (F.pad(x, (0, 192 - SIZE)) for x in (q, k, v))
    assert attend("flash_attn", *wide).shape[-1] == 192
    assert [call["size"] for call in calls] == [SIZE, 256 if version == 4 else 192]
    assert calls[0]["window_size"] == (2, 0)
    assert calls[0]["max_seqlen_q"] == max(LENGTHS)
    assert calls[0]["deterministic"] is False
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own stays
    be_deterministic()
    try:
        attend("flash_attn", q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[-1]["deterministic"] is True
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    for asked in ({"dropout": 0.1}, {"softcap": 2.0}, {"s_aux": torch.zeros(HEADS)}):
        if {"dropout": (2,), "softcap": (2, 3)}.get(next(iter(asked)), ()).count(version):
            attend("flash_attn", q, k, v, **asked)
        else:
            with pytest.raises(BadInput, match="lacks"):
                attend("flash_attn", q, k, v, **asked)


def test_torchs_own_kernel_takes_what_it_is_given() -> None:
    """On tensors without data, where its real operation runs on any machine."""
    qkv = [x.detach().bfloat16().to("meta").requires_grad_() for x in packed_qkv(value_size=5)]
    meta = replace(bounds(), cu_seqlens=bounds().cu_seqlens.to("meta"))
    out = attend("torch_varlen", *qkv, sliding_window=3, scaling=0.7, document_bounds=meta)
    assert out.shape == (1, sum(LENGTHS), HEADS, 5)
    gradients = torch.autograd.grad(out.float().sum(), qkv)
    assert [x.shape for x in gradients] == [x.shape for x in qkv]


def test_fused_kernels_are_not_for_fp32() -> None:
    assert "float32" in str(attention._fused_missing(torch.device("cuda"), torch.float32))


# -------------------------------------------------------------------------------------------- masks


def layer_mask(window: int | None, *, chunk: int | None = None) -> torch.Tensor:
    """Return the mask that transformers makes for a layer with this window or chunk."""
    position = torch.cat([torch.arange(n) for n in LENGTHS])
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    distance = position[:, None] - position[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0)
    if window:
        seen &= distance < window
    if chunk:
        seen &= position[:, None] // chunk == position[None, :] // chunk
    return seen[None, None]


def test_a_layers_own_mask_is_compared_with_what_the_backend_sees() -> None:
    ends, chunks = bounds(), bounds().chunked(6)
    attention._compare_mask("Layer", layer_mask(None), None, ends, ends)
    attention._compare_mask("Layer", layer_mask(4), 4, ends, ends)
    attention._compare_mask("Layer", layer_mask(None, chunk=6), None, ends, chunks)
    for mask, window, seen in [
        (layer_mask(4), None, ends),
        (layer_mask(4), 5, ends),
        (layer_mask(None, chunk=6), None, ends),
        (layer_mask(None, chunk=5), None, chunks),
        (layer_mask(None), None, chunks),
    ]:
        with pytest.raises(BadInput, match="more than causality"):
            attention._compare_mask("Layer", mask, window, ends, seen)


def test_bounds_of_chunks_cut_each_document_from_its_start() -> None:
    ends = torch.tensor([0, 13, 16, 22], dtype=torch.int32)
    chunks = Bounds(ends, 13, (13, 3, 6)).chunked(6)
    assert chunks.lengths == (6, 6, 1, 3, 6)
    assert chunks.cu_seqlens.tolist() == [0, 6, 12, 13, 16, 22]
    assert chunks.max_seqlen == 6


def test_a_mask_that_knows_no_documents_is_no_difference() -> None:
    total = sum(LENGTHS)
    causal = torch.ones(total, total, dtype=torch.bool).tril()[None, None]
    attention._compare_mask("Layer", causal, None, bounds(), bounds())
