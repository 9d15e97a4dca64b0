"""Write docs/scale.md: what models of three sizes need, and the arithmetic behind it.

python docs/make_scale.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.estimate.memory import GIB, Cluster
from packhorse.trainer.estimate.report import (
    Report,
    build_report,
    describe_report,
    inspect_model,
    table_cells,
)
from packhorse.trainer.estimate.traffic import ASSUMED

PAGE = Path(__file__).parent / "scale.md"
SHAPES = {  # of Llama 3.1
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
GPUS = {"8B": (8, 64), "70B": (32, 128), "405B": (128, 512)}
GPU_GIB, PER_NODE, FLOPS, MFU = 80, 8, 989e12, 0.4


def page() -> str:
    return "\n".join([TOP, *map(_section, SHAPES), ARITHMETIC])


def _reports(size: str) -> tuple[Recipe, list[Report]]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**COMMON, **SHAPES[size]}))
        recipe = Recipe.model_validate(
            {
                "model": {"name": folder, "activation_checkpointing": "auto"},
                "data": {"train": [{"path": "train.jsonl"}]},
                "batch": {"seq_len": 8192, "global_batch_size": 512, "micro_batch_size": 1},
                "loss": {"kernel": "liger"},
                "run": {"dir": "runs/scale"},
            }
        )
        inspected = inspect_model(recipe, recipe.batch.seq_len)
        clusters = [Cluster(gpus, PER_NODE, GPU_GIB * GIB) for gpus in GPUS[size]]
        return recipe, [build_report(recipe, cluster, inspected=inspected) for cluster in clusters]


def _section(size: str) -> str:
    lines = [f"## {size}", ""]
    recipe, reports = _reports(size)
    for gpus, report in zip(GPUS[size], reports, strict=True):
        sentences = describe_report(report, recipe, FLOPS, MFU)
        lines += [f"### {size} on {gpus} GPUs", "", *(f"- {text}" for text in sentences), ""]
        heading, body = table_cells(report, FLOPS * MFU)
        rule = ["---", *["---:"] * (len(heading) - 1)]
        lines += [f"| {' | '.join(cells)} |" for cells in (heading, rule, *body)]
        lines += [""]
    return "\n".join(lines)


TOP = f"""# Memory and time by model size

`python docs/make_scale.py` writes this page. It runs `packhorse plan` for models of the shapes of
Llama 3.1, with `model.activation_checkpointing: auto`, a sequence length of 8,192 tokens, a global
batch of 512 sequences and micro-batches of one, on GPUs of {GPU_GIB} GiB, {PER_NODE} a node.
For a model of your own: `packhorse plan RECIPE --gpus 64 --gpu-gib 80 --nodes 8`. It reads the
model's configuration and no weights.

How sure each number is:

- *weights, gradients, optimizer*: exact, byte for byte DeepSpeed's own buffers
  (`tests/numerics/test_memory.py`, [planner_cpu.md](../benchmarks/results/planner_cpu.md)).
- *activations*: traced. The model runs once on tensors without data, and what autograd saves is
  counted. It is within 10% of a real run (`tests/unit/test_memory.py`). A fused attention kernel is
  assumed: `model.attention: reference` with soft caps or sinks holds all scores, which is more.
- *gathered, communication, loss*: upper bounds from the libraries' sources, below.
- *reserve*: 1.5 GiB for CUDA, NCCL and cuBLAS, and 5% for what the allocator cannot use. **The
  reserve, the bounds and the peaks are not yet measured on a GPU.** Training logs the predicted
  peak beside the measured one.
- *time*: predicted, not measured. The time to compute is the model's FLOPs at an MFU that you
  state. A template's time is at least that, and at most that, what it recomputes and its
  communication, at an assumed
  {ASSUMED}.
"""

ARITHMETIC = """## The arithmetic

P parameters, W GPUs, L of them on a node, T tokens and N trained tokens of the fullest micro-batch,
H hidden size, V vocabulary; b bytes of a weight (2 in bfloat16, 4 in float32), g bytes of a summed
gradient (`parallel.grad_dtype`: 4, or 2). Sums over parameters p are of their sizes.

| bytes on a GPU | stage 0 (float32) | 1 | 2 | 3 |
|---|---|---|---|---|
| weights | 4 P | b A | b A | b S + b (those below `stage3_param_persistence_threshold`) |
| gradients | 4 P | 4 A (float32: F) | g A / W (float32: F) | g S |
| master weights | (the weights) | 4 A / W | 4 A / W | 4 S |
| moments (AdamW) | 8 P | 8 A / W | 8 A / W | 8 S |

A is P with each of the optimizer's groups filled up to a multiple of 2 W. F is 4 bytes for each
element of the parameters that lie, even in part, in the rank's piece of A. S is the sum of ceil(p /
W): stage 3 cuts each parameter by itself. With `offload_optimizer`, gradients, master weights and
moments lie in the host's memory, and the gradients there twice (g S + 4 S); with `offload_param`, b
S too; with `zero_hpz_partition_size` h the weights take b P / h more. On NVMe, master weights,
moments and weights are files, and the host keeps the summed gradients and the buffers between. With
`"packhorse": {"optimizer_state": "streamed"}` master weights and moments lie on the host, and the
GPU has room for two chunks, 24 bytes for each of 2^24 elements; or for its master weights, which
are made there, less what a micro-batch takes.

- *activations*: what autograd saves of the decoder. With activation checkpointing that is each
  layer's input, and one layer whole while it is recomputed.
- *loss*: Liger's kernel holds 2 N H b, the head's gradient in float32 and once in b
  (V H (4 + b)), and V b for each token of a chunk of about N H / V tokens. The chunked one holds
  N H (2 b + 4), the head's gradient (V H b) and N x min(V, 4 H) x (4 + b).
- *gathered* (stage 3): the parameters that are whole at one time: `stage3_max_live_parameters` of
  them, or the largest module's and `stage3_prefetch_bucket_size` if that is more.
- *communication*: stage 0, and stage 1 in bfloat16: a bucket of `reduce_bucket_size` in float32.
  Stage 2: two buckets in b, their copy in float32, and the largest gradient twice; stage 1 in
  float32, and stage 2 with [experts in a list](models.md): all gradients instead. Stage 3:
  one bucket in float32, the largest gradient in float32, and in b the gradients of the largest
  parameter or of the largest part that is gathered as a whole: a layer of up to 2^28 weights.
- *a host*: the larger of loading (b P by rank 0 at stage 3; b P by each rank of a node before) and
  training. The kernel's cache of files and the loader's processes are not counted; pinned memory
  may be rounded up.
- *disk*: a checkpoint is 12 P (float32 weights and two moments); `checkpoint.keep` of them and the
  one being written. The universal form is 12 P more, an export 2 b P while it is written and b P
  after.
- *time of a step*: 6 FLOPs a weight and token (for the head, a trained token), and
  6 x (heads x head size) a layer and squared document length, over W x peak x MFU x (1 - share of
  fillers). The MFU is that of a run that recomputes nothing. What a template recomputes is 2 FLOPs
  a weight and token more, but for the product that ends a feed-forward block, and 2 x (heads x head
  size) a layer and squared length; with `selective`, a weight of attention's own products alone.
  Without `--data`, each sequence is one full document with all tokens trained.

- *communication of a step*, m micro-batches on a rank, times (W - 1) / W: stage 0 sends 2 g P;
  stage 1 2 g P + b P; stage 2 m g P + b P; stage 3 m (2 b P + g P), of which with groups of h ranks
  (`zero_hpz_partition_size`) all but b P + m g P stays in the group. To the host go, with
  `offload_optimizer`, (m g P + b P) / W; with `offload_param` 2 m b P / W; to NVMe instead, for
  `offload_optimizer` there, 24 P / W more. A streamed state sends 24 P / W to the host and back.
  The host's own optimizer step is not counted.

Not planned: `offload_optimizer` at stages 1 and 2; models whose forward depends on the values of
its tensors (most mixtures of experts that sort tokens), which `packhorse plan` refuses.
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
