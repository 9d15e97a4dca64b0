"""The recipe's `adapter`: LoRA, and what the frozen model beside it is held in."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from packhorse.trainer.config.base import Section, check_pattern

ADAPTER_LR = 1e-4  # learning rate of a recipe with an adapter that gives none


class AdapterSection(Section):
    """LoRA: freeze the model and train low-rank matrices beside its linear modules. null: train all
    weights.
    """

    rank: int = Field(default=16, ge=1)
    """Rank r of the low-rank matrices."""
    alpha: int = Field(default=32, ge=1)
    """LoRA's alpha: the update is scaled by alpha / rank. Keep it when you change the rank: the
    best learning rate then stays about the same."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter. all-linear: every linear module except the output head; a list
    of names or their ends, as `[q_proj, v_proj]`; or a regular expression that matches a whole
    name."""
    target_parameters: str | tuple[str, ...] = ()
    """Parameters that hold the matrices of all experts of a layer, which get an adapter:
    all-experts, or names or their ends, as `[experts.down_proj]`."""
    trainable_token_indices: tuple[int, ...] = ()
    """Ids of tokens whose embeddings are trained, too, as those of a chat template that the base
    never saw. A head that shares the embeddings shares their rows."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """LoRA dropout: share of the adapter's inputs set to 0."""
    variants: tuple[Literal["rslora", "dora"], ...] = ()
    """rslora: scale by alpha / sqrt(rank) instead, for high ranks; dora: also train the magnitude
    of each row of a weight."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train in full and save with the adapter, as `[embed_tokens, lm_head]`."""
    base: Literal["nf4", "nf4_double_quant", "int8"] | None = None
    """nf4: hold the frozen linear modules and experts in 4 bits (QLoRA, bitsandbytes).
    nf4_double_quant: store the scales in 8 bits, too, which saves 0.37 bits a weight. int8: 8 bits,
    with a scale for each row. null: keep model.dtype."""
    init_from: str | None = None
    """Folder of an adapter to start from, as peft and `packhorse export` write it. null: a new one,
    which changes nothing at first."""

    def check(self) -> None:
        if not self.target_modules:
            raise ValueError("`target_modules` names nothing; give `all-linear`, or names")
        if isinstance(self.target_modules, str):
            check_pattern(self.target_modules)
        if isinstance(self.target_parameters, str) and self.target_parameters != "all-experts":
            raise ValueError("`target_parameters` is `all-experts`, or a list of names")
        if self.target_parameters and (self.dropout or "dora" in self.variants):
            raise ValueError(
                "`target_parameters`: experts' matrices have neither `dropout` nor `dora`; leave "
                "them out"
            )
        if "dora" in self.variants and self.base is not None:
            raise ValueError(
                "`dora` needs the norms of the weights, and is not tested with `base`; take "
                "one of them"
            )
