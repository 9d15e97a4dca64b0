"""Define the recipe's sections for the model, the batch, the loss and the run.

`adapter`, `data`, `eval`, `optim` and `parallel` have files of their own; trainer/config/recipe.py
puts all of them together.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from packhorse.trainer.config.base import Pattern, Section, number_or
from packhorse.trainer.utils.remote import check_url, is_url


class ModelSection(Section):
    """The model to train and the kernels that it runs with."""

    name: str
    """Hugging Face hub name, or a folder in its format, which may be a URL as `s3://bucket/model`.
    """
    revision: str | None = None
    """Branch, tag or commit on the hub. null: the default branch."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: read only the configuration and the tokenizer, and draw the weights from train.seed.
    """
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the weights in forward and backward. bfloat16 keeps fp32 master weights; float32
    is for exact comparisons."""
    attention: Literal["auto", "flash_attn", "torch_varlen", "reference"] = "auto"
    """Attention kernel for packed sequences (variable length). auto: of flash_attn 2, 3 and 4, if
    installed, and PyTorch's own, the fastest on the run's shapes, measured at its start; on a CPU
    or in float32 the reference."""
    layer_kernels: Literal["auto", "liger", "torch"] = "auto"
    """Kernels for norms, rotary embeddings and gated activations. liger: Liger's, compared with
    PyTorch's when the run starts. auto: liger on CUDA in bfloat16 if Liger supports the model."""
    activation_checkpointing: Literal["none", "selective", "full", "offload", "auto"] = "auto"
    """What the backward pass recomputes (gradient checkpointing). full: each layer but its input;
    selective: not attention, nor the products that widen a feed-forward block; offload: full, with
    these inputs in the host's memory until shortly before they are needed; auto: as little as fits
    the GPU's memory by `packhorse plan`, and full on a CPU. Gradients stay the same by the bit; but
    full and offload run feed-forward blocks of long sequences in tiles, which rounds otherwise."""
    compile: Literal[False, "layers"] = False
    """layers: compile each decoder layer but its attention by torch.compile, at ZeRO stages 0 to 2.
    The first steps take up to minutes longer. It takes the place of `layer_kernels`, and recomputes
    a whole layer or nothing."""
    matmul: Literal["bf16", "fp8_rowwise"] = "bf16"
    """How the layers' linear modules multiply in training. bf16: in model.dtype. fp8_rowwise: with
    both factors rounded to fp8, a scale for each row, on GPUs from Ada and Hopper on. Routers,
    adapters, head and embeddings stay as they are, as do all weights."""
    add_tokens: tuple[str, ...] = ()
    """Special tokens to add to the tokenizer. Their embeddings start at the mean of the existing
    ones."""
    chat_template: str | None = None
    """Jinja file, or `chatml`, to use instead of the tokenizer's chat template."""
    trust_remote_code: bool = False
    """Run the Python code in the model's folder. Read that code first."""
    rope_scaling: dict[str, JsonValue] | None = None
    """Rotary positions for longer contexts in place of config.json's, as `{rope_type: yarn, factor:
    4.0}`. Exported models have them in config.json, adapters in their card. null: as the model has
    them."""
    freeze: tuple[Pattern, ...] = ()
    """Parameters that are not trained: regular expressions that occur in their names, as
    `[embed_tokens, 'layers\\.[0-3]\\.']`."""

    def check(self) -> None:
        if self.rope_scaling is not None and not {"rope_type", "type"} & self.rope_scaling.keys():
            raise ValueError("`rope_scaling` names no kind; give its `rope_type`, as yarn")
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "`activation_checkpointing: selective` keeps single results of a layer, which a "
                "compiled layer does not have; set it to full, none or auto, or compile to false"
            )
        if self.compile and self.layer_kernels == "liger":
            raise ValueError(
                "`layer_kernels: liger` and `compile: layers` fuse the same operations; take one"
            )
        if self.matmul == "fp8_rowwise" and self.dtype != "bfloat16":
            raise ValueError(
                f"`matmul: fp8_rowwise` gives products in bfloat16, and dtype is {self.dtype}; set "
                "dtype to bfloat16, or matmul to bf16"
            )
        if is_url(self.name):
            check_url(self.name)


class BatchSection(Section):
    """The batch of one optimizer step. It does not depend on the number of GPUs."""

    seq_len: int = Field(default=8192, ge=2)
    """Length of a packed sequence, in tokens."""
    global_batch_size: int = Field(default=64, ge=1)
    """Packed sequences of one optimizer step, at most, summed over all data-parallel ranks."""
    micro_batch_size: Annotated[int | Literal["auto"], number_or("auto")] = 1
    """Packed sequences in one forward pass of a rank. Gradient accumulation does the rest. auto: as
    many as fit a quarter of the GPU's memory with nothing recomputed, if no power of two of GPUs
    then has to recompute more than for one, and 1 on a CPU; a resumed run keeps the number."""

    @property
    def micro(self) -> int:
        """Return `micro_batch_size`; for `auto`, which only a run on a GPU resolves, 1."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size


class LossSection(Section):
    """The training objective (C2)."""

    weighting: Annotated[Literal["token", "example"] | int, number_or("token", "example")] = "token"
    """token: mean over the trained tokens of the global batch; example: mean over the documents'
    means; a whole number N: mean over the documents' sums, each divided by N tokens."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """NEFTune noise on the embeddings. 0: off; 5 is usual."""
    router_aux: float | None = Field(default=None, ge=0)
    """Coefficient of the loss that balances a mixture's experts, by document; 0 only logs what the
    routers do. transformers' `router_aux_loss_coef`."""
    kernel: Literal["auto", "liger", "chunked", "reference"] = "auto"
    """Cross-entropy kernel. auto: liger on CUDA, else chunked."""


MAX_EPOCHS = 10_000  # all are packed before the first step
MAX_STEPS = 10**9


class TrainSection(Section):
    """How long the run trains, and its seed."""

    epochs: int = Field(default=1, ge=1, le=MAX_EPOCHS)
    """Passes over the training data."""
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """Optimizer steps. If given, `epochs` does not count."""
    max_hours: float | None = Field(default=None, gt=0, le=10_000)
    """Hours after its start at which the run saves and exits with 75, as on a signal. The same
    command goes on, for as long again."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Seed of the data order, dropout, noise and random weights."""
    deterministic: bool = False
    """On GPUs, take kernels that add in a fixed order (torch.use_deterministic_algorithms), so that
    equal runs on equal GPUs have equal bits. They are slower, and an operation that has no such
    kernel ends the run."""


class CheckpointSection(Section):
    """When the training state is saved, and how many checkpoints are kept."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints. null: only the last step saves, as it always does."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints to keep. Older ones are deleted after a new one is complete."""
    asynchronous: bool | None = None
    """Write in the background from a copy in CPU memory. null: do so if the copy leaves half of the
    free memory."""
    before_timeout_s: float | None = Field(default=None, ge=0)
    """Seconds before the end of the Slurm job at which the run saves and stops, if that end is
    known."""
    mirror: str | None = None
    """URL of a folder, as `s3://bucket/runs/one`, to which checkpoints are copied beside training.
    A start takes the newest one from there if run.dir has none as new. Credentials come from the
    environment."""

    def check(self) -> None:
        if self.mirror is not None:
            check_url(self.mirror)


class RunSection(Section):
    """The run folder and what is written to it."""

    dir: str
    """The run folder. All nodes must share it."""
    log_every: int = Field(default=1, ge=1)
    """Steps between log lines."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml"], ...] = (
        "tensorboard",
    )
    """Where metrics go besides metrics.jsonl. Each tracker takes its server and key from its own
    environment variables."""
    project: str = Field(default="packhorse", min_length=1)
    """Project, or experiment, in the trackers."""
    name: str | None = None
    """Name of the run in the trackers. null: that of the run folder."""
    group: str | None = None
    """Group of runs in the trackers."""
    tags: tuple[str, ...] = ()
    """Tags of the run in the trackers."""
    trace: bool = False
    """Write trace.jsonl: documents, loss, gradient norm and settings of each step."""
    profile_steps: tuple[int, int] | None = None
    """First and last step to record with torch.profiler, as `[10, 12]`, in the run folder's
    profile/."""
    stop_after: int | None = Field(default=None, ge=1)
    """Save and exit with 75 after this step, as on a signal. The learning rate schedule does not
    change."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face hub, as `org/name`, to which the run is exported when it is
    done: its best step if the recipe has eval.best, else the last. A new one is private. The token
    comes from the environment."""

    def check(self) -> None:
        if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError("`profile_steps` is [first, last], counted from 1")
        if self.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise ValueError("`push_to_hub` is the name of a repository, as org/name")


Rule = Literal["stop", "skip", "rollback"]


class GuardSection(Section):
    """What happens when a step goes wrong. stop: end the run; skip: do not apply the step;
    rollback: resume from the last checkpoint and leave the step out.
    """

    non_finite: Rule = "stop"
    """At a gradient that is not finite (NaN or infinite)."""
    spike: Rule = "stop"
    """At a loss spike."""
    spike_factor: float | None = Field(default=None, gt=1)
    """A loss is a spike above this many times the median of the last 50. null: losses are not
    checked."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """The run stops when more steps than these would be left out."""
    hang_timeout_s: float = Field(default=900.0, gt=0)
    """Seconds without progress after which the run counts as hung and ends with exit code 1. Ten
    times the usual pause counts instead if that is longer."""
