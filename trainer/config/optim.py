"""The recipe's `optim`: the optimizer, its learning rates and its weight decay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from packhorse.trainer.config.base import Pattern, Section


class OptimGroup(Section):
    """Parameters with a learning rate of their own. The first group that matches counts."""

    match: Pattern = Field(min_length=1)
    """Regular expression that occurs in a parameter's name."""
    lr: float = Field(gt=0)
    """Their peak learning rate, which follows the schedule of `optim.lr`."""


class OptimSection(Section):
    """The optimizer and its learning rate schedule. The rate depends on the step alone."""

    kind: Literal["adamw", "adamw_8bit", "muon", "lion", "adafactor", "sgd"] = "adamw"
    """lion and sgd keep one moment in place of two. muon: orthogonalised updates for matrices,
    AdamW for embeddings, the head and vectors. adamw_8bit: moments of matrices in 8 bits.
    adafactor: second moments by row and column, no first ones. All but adamw are refused with an
    offloaded optimizer."""
    lr: float = Field(default=2e-5, gt=0)
    """Peak learning rate. With an `adapter` the default is 0.0001."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's and Lion's beta1 and beta2. beta1 is the momentum of sgd and muon; adafactor has none
    for matrices."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of AdamW's moments. bf16 halves them; they are rounded stochastically, by seed, step and
    parameter."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay on the matrices of linear products and experts. Norms, biases and other vectors
    have 0."""
    decay_embeddings: bool = True
    """Apply weight decay to the embeddings, too, as Hugging Face's Trainer and torchtitan do."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Linear warm-up, as a share of all steps."""
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up. wsd: warm-up, stable, decay."""
    wsd_decay: float = Field(default=0.2, gt=0, le=1)
    """Decay phase of wsd, as a share of all steps."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step, as a share of `lr`."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global L2 norm."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average (EMA) of the weights, as 0.999. `export --ema` and `eval --ema`
    take it. It is updated at each step and takes 4 bytes a trained weight. null: none."""
    groups: tuple[OptimGroup, ...] = ()
    """Learning rates of their own, as `[{match: embed, lr: 1e-6}]`."""

    def check(self) -> None:
        if self.state_dtype == "bf16" and self.kind != "adamw":
            raise ValueError("`state_dtype: bf16` is for `kind: adamw`; take one of them out")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("`betas` lie in [0, 1): at 1 a moment never moves")

    @property
    def rule(self) -> str:
        """Return what updates the weights: `kind`, or AdamW with its states in bf16."""
        return "adamw_bf16" if self.state_dtype == "bf16" else self.kind
