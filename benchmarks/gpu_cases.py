"""What gpu.py runs: models by their shapes, and the arms of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

QWEN_1_5B: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Arm:
    """A line of the table: `program` is packhorse or an arm of arms.py; `fields` change the job."""

    program: str
    label: str
    fields: dict[str, Any] = field(default_factory=dict)
    predicted: str = ""  # for an H200: docs/performance.md; nothing of it was measured
    needs_gib: int = 0  # of the card


@dataclass(frozen=True)
class Case:
    name: str
    shape: dict[str, Any]
    fields: dict[str, Any]  # of the job, for all its arms
    arms: tuple[Arm, ...]


TRL: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}  # no autocast
RECOMPUTING = {"trl": TRL | {"gradient_checkpointing": True}}
# 8B with fp32 master weights and moments on the card: 128 GB with gradients in bf16
WHOLE = {"activation_checkpointing": "full", "grad_dtype": "bfloat16"}
CASES = (
    Case(
        "8B, 8 layers",
        LLAMA_8B | {"num_hidden_layers": 8},
        {"global_batch_size": 2},
        (
            Arm("packhorse", "packhorse, ZeRO-1", {}, "57 to 67% MFU"),
            Arm("trl", "TRL + Liger, all in bf16", {"trl": TRL}),
            Arm("trl", "TRL + Liger, all in bf16, recomputing", RECOMPUTING),
            Arm("packhorse", "packhorse, fp8", {"matmul": "fp8_rowwise"}, "1.2x and more"),
            Arm("loop", "bare loop"),
        ),
    ),
    Case(
        "1.5B",
        QWEN_1_5B,
        {"global_batch_size": 4},
        (
            Arm("packhorse", "packhorse, ZeRO-1", {}, "36,000 to 42,000 tokens/s"),
            Arm("trl", "TRL + Liger, all in bf16", {"trl": TRL}, "40,142, measured once"),
            Arm(
                "packhorse",
                "packhorse, gradients summed in bf16",
                {"grad_dtype": "bfloat16"},
                "faster by 1.1% at most: the price of sums in fp32",
            ),
            Arm("loop", "bare loop"),
        ),
    ),
    Case(
        "8B",
        LLAMA_8B,
        {"global_batch_size": 2},
        (
            Arm(
                "packhorse",
                "packhorse, ZeRO-1, state on the host",
                # what is recomputed follows from the card: nothing, with 110 GiB
                {"deepspeed": "zero1_streamed", "activation_checkpointing": "auto"},
                "57 to 67% MFU without the optimizer, which takes 4,000 to 8,000 ms",
                needs_gib=75,
            ),
            Arm(
                "packhorse",
                "packhorse, ZeRO-3",
                {"deepspeed": "zero3", **WHOLE},
                "45 to 52% MFU",
                needs_gib=130,
            ),
            Arm("trl", "TRL + Liger, all in bf16, recomputing", RECOMPUTING, needs_gib=75),
            Arm("trl", "TRL + Liger, all in bf16", {"trl": TRL}, needs_gib=110),
            Arm("loop", "bare loop", WHOLE, needs_gib=130),
        ),
    ),
)
