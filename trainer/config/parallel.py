"""Define the recipe's section for what depends on the hardware."""

from __future__ import annotations

from typing import Annotated, Literal

from packhorse.trainer.config.base import Section, number_or


class ParallelSection(Section):
    """What depends on the hardware. Nothing here changes what is learned."""

    deepspeed: str = "zero3"
    """DeepSpeed template: ZeRO stage and offload. A packaged one by name (zero0, zero1,
    zero1_streamed, zero2, zero3, zero3_hpz, zero3_prefetch, zero3_streamed,
    zero3_offload_optimizer, zero3_offload_all, zero3_nvme), or the path of a file of yours. Batch
    sizes and the optimizer come from the recipe."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of gradient accumulation and all-reduce. bfloat16 makes the result depend on the
    number of GPUs and the micro-batch size."""
    allow_idle_ranks: bool = False
    """Allow more ranks than a step has micro-batches."""
    sequence: Annotated[int | Literal["auto"], number_or("auto")] = 1
    """Ranks that share each packed sequence (sequence parallelism), for contexts that do not fit
    one GPU. It divides the number of ranks. auto: the fewest with which a step fits the GPU's
    memory by `packhorse plan`."""
    sequence_kind: Literal["ulysses", "gather", "ring"] | None = None
    """How ranks that share a sequence attend over all of it. ulysses: exchange tokens for heads;
    gather: collect keys and values; ring: pass them round, with balanced work. null: gather in a
    layer whose window fits a slice, or whose query heads `sequence` does not divide; else ulysses.
    """

    @property
    def ranks_a_sequence(self) -> int:
        """Return `sequence`; for `auto`, which estimate/choice.py resolves, 1."""
        return 1 if self.sequence == "auto" else self.sequence

    @property
    def cut(self) -> tuple[int, bool]:
        """How many ranks share a sequence, and whether it is cut in a zigzag (C13)."""
        return self.ranks_a_sequence, self.sequence_kind == "ring"
