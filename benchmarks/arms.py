"""The arms of the side-by-side benchmarks that are not packhorse: `python arms.py ARM JOB.json`.

    prepare   rows -> `documents` (input_ids, labels) and `packed` (by TRL's own pack_dataset), on
              disk, before any clock runs
    trl       TRL's SFTTrainer
    loop      the upper bound: a loop that does the work and nothing else

In: common.Job. Out: metrics.jsonl, a line a step: step, train/loss (mean over the step's trained
tokens), tokens (without padding), train/trained_tokens.

T tokens of a packed sequence, N trained positions in it, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Job
from torch import Tensor

IGNORED = -100
HEAD_CHUNK = 256  # trained positions whose logits exist at one time, on CPU
HEAD_CHUNK_CUDA = 1024
QUERY_BLOCK = 256


def main() -> None:
    arm, path = sys.argv[1:]
    {"prepare": prepare, "trl": run_trl, "loop": run_loop}[arm](
        Job(**json.loads(Path(path).read_text()))
    )


def write_line(job: Job, line: dict[str, float]) -> None:
    with Path(job.metrics).open("a") as out:
        out.write(json.dumps(line) + "\n")


# --------------------------------------------------------------------------------------------- data


def prepare(job: Job) -> None:
    """Tokenize as TRL does, so that what follows the generation prompt is trained; pack with TRL;
    shuffle once by seed.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    with Path(job.source).open(
        encoding="utf-8"
    ) as file:  # not splitlines: questions hold other separators
        rows = [json.loads(line) for line in file]
    documents = Dataset.from_list([document(tokenizer, row) for row in rows])
    documents = documents.filter(lambda row: len(row["input_ids"]) <= job.seq_len)
    documents = documents.shuffle(seed=job.seed).flatten_indices()
    documents.save_to_disk(f"{job.tokens}/documents")
    packed = pack_dataset(documents, job.seq_len, "bfd").shuffle(seed=job.seed).flatten_indices()
    packed.save_to_disk(f"{job.tokens}/packed")
    lengths = [len(ids) for ids in documents["input_ids"]]
    counts = {
        "mean_tokens": sum(lengths) / len(lengths),
        "pairs_per_token": sum(n * n for n in lengths) / sum(lengths),  # for FLOPs of attention
        "fill": sum(lengths) / len(packed) / job.seq_len,
    }
    Path(job.tokens, "counts.json").write_text(json.dumps(counts))


def document(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """Return a row's tokens and labels: a `text` is trained whole and ends with EOS, a `question`
    with an `answer` from the answer on.
    """
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": ids}
    turns = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids[: len(prompt)] == prompt, (
        "the template's generation prompt is no prefix of the whole"
    )
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}


# ---------------------------------------------------------------------------------------- attention


def documents_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return causal attention inside each document.

    query (1, heads, T, d), key and value (1, kv heads, T, d) -> (1, T, heads, d). On CUDA it is
    torch's varlen kernel; on CPU torch's flash kernel, a document at a time, or `CausalProducts`
    for `products`.
    """
    starts, scale = kwargs["cu_seq_lens_q"], kwargs["scaling"]
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        longest = kwargs["max_length_q"]
        grouped: dict[str, Any] = (
            {"enable_gqa": True}
            if "enable_gqa" in inspect.signature(varlen_attn).parameters
            else {}
        )
        out: Any = varlen_attn(
            q, k, v, starts, starts, longest, longest, scale=scale, window_size=(-1, 0), **grouped
        )
        return out[None], None
    lengths = starts.diff().tolist()
    config: Any = module.config
    if config._attn_implementation == "products":
        cut = zip(*(each[0].split(lengths, dim=1) for each in (query, key, value)), strict=True)
        out = torch.cat([CausalProducts.apply(q, k, v, scale) for q, k, v in cut], dim=1)
        return out.transpose(0, 1)[None], None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    cut = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in cut
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


class CausalProducts(torch.autograd.Function):
    """Causal attention of one document by matrix products, QUERY_BLOCK queries at a time.

    query (heads, L, d), key and value (kv heads, L, d) -> (heads, L, d). Heads that share a key
    are stacked as rows of one product. For the short documents of instruction data it is 3 to 4
    times as fast as torch's flash kernel for CPUs, forward and backward; it keeps the
    probabilities, L^2 / 2 a head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, kept = torch.empty_like(query), []
        for start, stop in blocks(query.shape[1]):
            scores = torch.bmm(
                stacked(query, key, start, stop), key[:, :stop].transpose(1, 2)
            ).mul_(scale)
            later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu_(1)
            scores.view(-1, stop - start, stop)[..., start:].masked_fill_(later, -torch.inf)
            kept.append(scores.softmax(-1))
            out[:, start:stop] = torch.bmm(kept[-1], value[:, :stop]).view_as(out[:, start:stop])
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        grad_query, grad_key, grad_value = (
            torch.empty_like(query),
            torch.zeros_like(key),
            torch.zeros_like(value),
        )
        for (start, stop), probs in zip(blocks(query.shape[1]), kept, strict=True):
            grad = stacked(grads[0], key, start, stop)
            grad_probs = torch.bmm(grad, value[:, :stop].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype).mul_(
                ctx.scale
            )
            grad_query[:, start:stop] = torch.bmm(grad_scores, key[:, :stop]).view_as(
                grad_query[:, start:stop]
            )
            grad_key[:, :stop] += torch.bmm(
                grad_scores.transpose(1, 2), stacked(query, key, start, stop)
            )
            grad_value[:, :stop] += torch.bmm(probs.transpose(1, 2), grad)
        return grad_query, grad_key, grad_value, None


def blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def stacked(query: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
    """(heads, L, d) -> (kv heads, heads a kv head x block, d)"""
    return query[:, start:stop].reshape(key.shape[0], -1, query.shape[-1])


def load_model(job: Job) -> Any:
    """Load the model onto its device in training mode; `documents` and `products` attend by the
    functions above, without a mask.
    """
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoConfig,
        AutoModelForCausalLM,
    )

    for name in ("documents", "products"):
        AttentionInterface.register(name, documents_attention)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    dtype = getattr(torch, job.dtype)
    if job.init == "pretrained":
        model: Any = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=dtype, attn_implementation=job.attention
        )
        return model.to(torch.device(job.device)).train()
    torch.manual_seed(job.seed)
    with torch.device(job.device):
        config = AutoConfig.from_pretrained(job.model)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=job.attention
        ).train()


# ---------------------------------------------------------------------------------------------- TRL


def run_trl(job: Job) -> None:
    from datasets import load_from_disk
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    counts = {"tokens": 0, "train/trained_tokens": 0}

    class Counting(SFTTrainer):
        """Counts what a step trains on; the training is the peer's own."""

        def training_step(
            self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> Tensor:
            add_counts(counts, inputs)
            return super().training_step(model, inputs, *args, **kwargs)

    class Lines(TrainerCallback):
        def on_log(
            self,
            args: Any,
            state: Any,
            control: Any,
            logs: dict[str, float] | None = None,
            **_: Any,
        ) -> None:
            if logs and "loss" in logs:
                write_line(job, {"step": state.global_step, "train/loss": logs["loss"], **counts})
                counts.update(dict.fromkeys(counts, 0))

    data: Any = load_from_disk(f"{job.tokens}/{'packed' if job.packed else 'documents'}")
    trainer = Counting(
        model=load_model(job),
        args=SFTConfig(output_dir=str(Path(job.metrics).parent / "trl"), **trl_settings(job)),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Lines()],
    )
    trainer.train()


def trl_settings(job: Job) -> dict[str, Any]:
    """Return the settings of every TRL arm: the same data, order and optimizer, and no saving;
    `job.trl` gives the rest.
    """
    same: dict[str, Any] = {
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_steps": job.steps,
        "max_length": job.seq_len,
        "seed": job.seed,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
    }
    if job.packed:
        same |= {
            "packing": True,
            "packing_strategy": "bfd",
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        same |= {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": job.global_batch_size,
        }
    return same | job.trl


def add_counts(counts: dict[str, int], inputs: dict[str, Any]) -> None:
    """Add the real and the trained tokens of one micro-batch of TRL's collator. Only an unpacked
    one has padding, and a mask.
    """
    padded = inputs.get("attention_mask")
    counts["tokens"] += inputs["input_ids"].numel() if padded is None else int(padded.sum())
    counts["train/trained_tokens"] += int((inputs["labels"][:, 1:] != IGNORED).sum())


# -------------------------------------------------------------------------------------- the ceiling


class HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies, logits in chunks.

    hidden (N, H), weight (V, H), targets (N,) -> () float32. Both gradients are made in the forward
    (d loss / d logits = softmax - one-hot), so that no logits are kept or made twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
        chunk = HEAD_CHUNK_CUDA if hidden.is_cuda else HEAD_CHUNK
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(
            weight, dtype=torch.float32 if weight.is_cuda else weight.dtype
        )
        for start in range(0, hidden.shape[0], chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = (part @ weight.T).float()
            log_z = logits.logsumexp(-1, keepdim=True)
            total += (log_z - logits.gather(1, target)).sum() * scale
            probs = logits.sub_(log_z).exp_()
            probs.scatter_add_(1, target, torch.full_like(target, -1, dtype=probs.dtype))
            grad = probs.mul_(scale).to(weight.dtype)
            grad_hidden[start : start + chunk] = grad @ weight
            if weight.is_cuda:
                torch.addmm(grad_weight, grad.T, part, out_dtype=torch.float32, out=grad_weight)
            else:
                grad_weight.addmm_(grad.T, part)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight, None, None


def run_loop(job: Job) -> None:
    """bf16 weights, fp32 master weights and moments; gradients accumulate in `job.grad_dtype`."""
    model = load_model(job)
    if job.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            model, cross_entropy=False, fused_linear_cross_entropy=False
        )
    if job.activation_checkpointing == "full":
        model.gradient_checkpointing_enable()
    weights = list(model.parameters())
    masters = [each.detach().float().clone() for each in weights]
    settings = {"lr": job.lr, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    # one optimizer a weight where gradients stay in bf16: then one fp32 gradient exists at a time
    whole = job.grad_dtype == "float32"
    optimizers = [
        torch.optim.AdamW(group, **settings)
        for group in ([masters] if whole else [[m] for m in masters])
    ]
    for step, rows in enumerate(packed_steps(job), 1):
        trained_tokens = sum(row["targets"].shape[0] for row in rows)
        loss = torch.zeros((), device=job.device)
        for row in rows:
            loss += forward_backward(model, row, 1 / trained_tokens)
            if whole:
                accumulate(weights, masters)
        torch.nn.utils.clip_grad_norm_(masters if whole else weights, 1.0, foreach=True)
        update(weights, masters, optimizers)
        tokens = sum(row["input_ids"].shape[1] for row in rows)
        write_line(
            job,
            {
                "step": step,
                "train/loss": loss.item(),
                "tokens": tokens,
                "train/trained_tokens": trained_tokens,
            },
        )


@torch.no_grad()
def update(
    weights: list[Tensor], masters: list[Tensor], optimizers: list[torch.optim.AdamW]
) -> None:
    """One AdamW step on the masters, copied to the weights; no gradient is left."""
    if len(optimizers) == 1:
        optimizers[0].step()
        optimizers[0].zero_grad()
        torch._foreach_copy_(weights, masters)
        return
    for weight, master, optimizer in zip(weights, masters, optimizers, strict=True):
        master.grad = take_grad(weight).float()
        optimizer.step()
        optimizer.zero_grad()
        weight.copy_(master)


def forward_backward(model: Any, row: dict[str, Any], scale: float) -> Tensor:
    """One row's share of the step's loss, its gradients left in the model's weights."""
    hidden = model.base_model(
        input_ids=row["input_ids"],
        position_ids=row["position_ids"],
        cu_seq_lens_q=row["starts"],
        cu_seq_lens_k=row["starts"],
        max_length_q=row["longest"],
        max_length_k=row["longest"],
        use_cache=False,
    ).last_hidden_state[0]
    loss = HeadLoss.apply(
        hidden[row["positions"]], model.get_output_embeddings().weight, row["targets"], scale
    )
    loss.backward()
    return loss.detach()


@torch.no_grad()
def accumulate(weights: list[Tensor], masters: list[Tensor]) -> None:
    """Add the row's gradients to the fp32 ones beside the masters, and free them."""
    grads = [take_grad(each) for each in weights]
    if masters[0].grad is None:
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad.float()
    else:
        sums: Any = [each.grad for each in masters]
        torch._foreach_add_(sums, grads)


def take_grad(weight: Tensor) -> Tensor:
    assert weight.grad is not None, "every weight has a gradient in every row"
    grad, weight.grad = weight.grad, None
    return grad


def packed_steps(job: Job) -> Iterator[list[dict[str, Any]]]:
    """The rows of each step, in the order TRL's packed arm takes them, as tensors on the device."""
    from datasets import load_from_disk

    packed: Any = load_from_disk(f"{job.tokens}/packed")
    for step in range(job.steps):
        chosen = packed.select(
            range(step * job.global_batch_size, (step + 1) * job.global_batch_size)
        )
        yield [row_tensors(row, job.device) for row in chosen]


def row_tensors(row: dict[str, Any], device: str) -> dict[str, Any]:
    """Return a packed sequence as model arguments (1, T), its N trained positions and targets."""
    ids = torch.tensor(row["input_ids"])
    labels = torch.tensor(row["labels"])
    lengths = torch.tensor(row["seq_lengths"])
    starts = F.pad(lengths.cumsum(0), (1, 0))
    labels[starts[:-1]] = IGNORED  # nothing predicts a document's first token
    positions = (labels != IGNORED).nonzero()[:, 0]
    tensors = {
        "input_ids": ids[None],
        "position_ids": (torch.arange(len(ids)) - starts[:-1].repeat_interleave(lengths))[None],
        "starts": starts.int(),
        "positions": positions - 1,
        "targets": labels[positions],
    }
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
    return moved | {"longest": int(lengths.max())}


if __name__ == "__main__":
    main()
