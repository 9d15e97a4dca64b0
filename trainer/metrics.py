"""Report a run: a line of metrics.jsonl and the TensorBoard scalars of each logged step (C11).

In: step results, batches, the clock. Out: metrics.jsonl, tensorboard/, profile/ and lines on the
terminal. Sums stay on the device until a line is due; then one reduction over all ranks makes it.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.datatypes import Batch, StepPlan, StepResult
from packhorse.trainer.trackers import Trackers
from packhorse.trainer.utils.json_lines import append_json_lines, cut_json_lines, read_json_lines
from packhorse.trainer.utils.log_lines import LOGS, check_evaluation

# Dense bf16 FLOP/s from the makers' data sheets. The longest name that a device's name contains
# counts, so that an "H100 PCIe" is not taken for an H100.
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 FLOP/s, or None for a CPU or an unknown card."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in _PEAK_FLOPS if key in name]
    return _PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class ModelFlops:
    """What the FLOPs of training a model follow from.

    6 FLOPs a weight and token (Kaplan et al. 2020, section 2.1), and 6 a layer, channel of
    attention and squared document length: scores and values are two products of 2 FLOPs over half
    of L^2 causal pairs, and the backward takes twice the forward. A frozen weight takes 4 FLOPs, as
    it has no gradient of its own, and counts as two thirds of a weight. The head is counted at
    trained positions, where it is used. Recomputation is not counted.
    """

    # used by every token: matrices but for embeddings and head; of experts, the chosen ones
    body_weights: int
    head_weights: int
    attention_channels: int  # heads x head size, summed over the layers that attend

    def count(self, tokens: float, trained: float, pairs: float) -> float:
        """Return the FLOPs of a forward and a backward.

        Args:
            trained: tokens that are trained, at which the head is used.
            pairs: the sum of the documents' squared lengths.
        """
        return 6.0 * (
            self.body_weights * tokens
            + self.head_weights * trained
            + self.attention_channels * pairs
        )

    def of(self, batch: Batch) -> float:
        # each rank attends to its share of the pairs of a sequence that it has a slice of
        pairs = sum(length * length for length in batch.lengths) / batch.slice[1]
        return self.count(batch.tokens, batch.trained_tokens, pairs)


def model_flops(model: Any) -> ModelFlops:
    """Count the weights of a Hugging Face causal LM, sharded or not."""
    body = sum(_count_weights(parameter) * share for _, parameter, share in used_weights(model))
    head = int(sum(_count_weights(p) for p in model.get_output_embeddings().parameters()))
    return ModelFlops(int(body), head, _attention_channels(model.config.get_text_config()))


def used_weights(model: Any) -> Iterator[tuple[str, Any, float]]:
    """Give each parameter but those of embeddings and head, by name, with the share of it that a
    token uses: of experts, that of the chosen ones.
    """
    config = model.config.get_text_config()
    embeddings = {
        id(p)
        for m in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in m.parameters()
    }
    experts = max(
        getattr(config, name, None) or 0
        for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    for name, parameter in model.named_parameters():
        if id(parameter) not in embeddings:
            yield name, parameter, share if ".experts." in name else 1.0


def _attention_channels(config: Any) -> int:
    """Return heads x head size, summed over the layers that attend: 0 for a state-space model."""
    number = getattr(config, "num_hidden_layers", None) or 0
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * number
    per_layer = getattr(config, "per_layer_config", None)  # sizes of a layer's own, as in Gemma 4
    total = 0
    for layer, kind in enumerate(kinds):
        own = config if per_layer is None else per_layer[layer]
        heads = getattr(own, "num_attention_heads", None) or 0
        if heads and "attention" in kind and "linear" not in kind:
            width = getattr(own, "hidden_size", None) or 0
            total += heads * (getattr(own, "head_dim", None) or width // heads)
    return total


def _count_weights(parameter: Any) -> float:
    # ZeRO-3 leaves an empty tensor and the size in `ds_numel`; bitsandbytes packs two 4-bit weights
    # into a byte and keeps the shape in `quant_state`
    quantised = getattr(parameter, "quant_state", None)
    count = (
        quantised.shape.numel() if quantised else getattr(parameter, "ds_numel", parameter.numel())
    )
    return count if parameter.requires_grad else count * 2 / 3


# --------------------------------------------------------------------------------------------- time


class Clock:
    """Seconds spent in named parts of steps. On a GPU, events mark the parts, and nothing waits
    until `read`.

    Args:
        beat: called with the name of each part as it begins.
    """

    def __init__(
        self, device: torch.device, beat: Callable[[str], None] = lambda part: None
    ) -> None:
        self._on_gpu = device.type == "cuda"
        self._beat = beat
        self._spans: list[tuple[str, Any, Any]] = []

    def _mark(self, host: bool) -> Any:
        if host or not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str, host: bool = False) -> Iterator[None]:
        """Time what runs inside; `host` for work that the host waits for, as reading data."""
        self._beat(name)
        start = self._mark(host)
        yield
        self._spans.append((name, start, self._mark(host)))

    def read(self) -> dict[str, float]:
        """Return the seconds by part since the last reading. Waits for the GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, start, stop in self._spans:
            spent = stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1e3
            seconds[name] = seconds.get(name, 0.0) + spent
        self._spans.clear()
        return seconds


PARTS = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation")


# ------------------------------------------------------------------------------------------ the log

EVALUATIONS = "evaluations.jsonl"  # in the run folder: a line for each evaluation that ended
_STEPS_MEASURED = 3  # after which a GPU's memory is compared with the prediction
# summed between two lines, then over ranks
_SUMS = ("tokens", "trained", "sequences", "fillers", "micro_batches", "flops", "seconds", *PARTS)


def memory_line(predicted: int, allocated: int, reserved: int) -> str:
    """Return a sentence about a GPU's peak memory, from bytes predicted and measured."""
    gib = [f"{size / 2**30:.1f} GiB" for size in (predicted, allocated, reserved)]
    off = f"{(allocated - predicted) / predicted:+.0%}"
    return (
        f"memory of a GPU at its peak: predicted {gib[0]}, measured {gib[1]} ({off}), "
        f"reserved {gib[2]}"
    )


class Metrics:
    """Accumulates steps and writes a line every `log_every` of them. Only rank 0 writes.

    A resume at step k drops the lines of later steps, which a killed run left, so that the files
    read as if the run had never been stopped. It also drops what an evaluation of step k logged
    unless that stands in EVALUATIONS: it did not end, and is repeated.

    Args:
        more: gets the number of steps of a line and returns more of its metrics, on every rank.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        log_every: int,
        seq_len: int,
        flops: ModelFlops,
        resumed_at: int,
        beat: Callable[[str], None],
        trackers: Trackers,
        to_tensorboard: bool = True,
        more: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        self._trackers = trackers
        self._more = more
        self.clock = Clock(dist.device(), beat)
        self._log_every = log_every
        self._seq_len = seq_len
        self._flops = flops
        self._peak = peak_flops(dist.device())
        self._path = run_dir / "metrics.jsonl"
        self._board = None
        if dist.is_main():
            done = run_dir / EVALUATIONS
            cut_json_lines(done, lambda line: line["step"] <= resumed_at, check_evaluation)
            evaluated = {line["step"] for line in read_json_lines(done)}

            def is_kept(line: dict[str, Any]) -> bool:
                if line["step"] == resumed_at and resumed_at not in evaluated:
                    return "train/loss" in line
                return line["step"] <= resumed_at

            for name, check in LOGS.items():
                cut_json_lines(run_dir / name, is_kept, check)
            if to_tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                purge_step = resumed_at + 1 if resumed_at else None
                self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        self._expected_memory: tuple[int, int] | None = None  # bytes, and steps until compared
        self._all_tokens = self._all_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        # a device tensor: reading the loss at every step would make the host wait for the GPU
        self._loss = torch.zeros((), dtype=torch.float64, device=dist.device())
        self._steps = 0
        self._sums = dict.fromkeys(_SUMS, 0.0)

    def expect_memory(self, gpu_bytes: int) -> None:
        """Log the planned peak of a GPU's memory beside the measured one, after a few steps."""
        self._expected_memory = (gpu_bytes, _STEPS_MEASURED)
        torch.cuda.reset_peak_memory_stats()

    def _compare_memory(self) -> None:
        expected, left = self._expected_memory or (0, 0)
        self._expected_memory = (expected, left - 1) if left > 1 else None
        if left == 1:
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            dist.log.info(memory_line(expected, *peaks))

    def begin_step(self) -> None:
        """Start the time of a step, which `step` ends: evaluation and saving lie outside."""
        self._begun = time.perf_counter()

    def step(
        self, plan: StepPlan, result: StepResult, batches: list[Batch], lr: float
    ) -> dict[str, float] | None:
        """Count one step. If a line is due, log it and return it, on every rank; else None."""
        self._compare_memory()
        self._loss += result.loss
        self._steps += 1
        for batch in batches:
            self._sums["tokens"] += batch.tokens
            self._sums["trained"] += batch.trained_tokens
            self._sums["sequences"] += len(batch.sequence_ids) * batch.is_counted
            self._sums["fillers"] += batch.is_filler
            self._sums["micro_batches"] += 1
            self._sums["flops"] += self._flops.of(batch)
        due = (plan.step + 1) % self._log_every == 0
        if due:  # waits for the GPU, so it comes before the time is taken
            self._sums |= self.clock.read()
        self._sums["seconds"] += time.perf_counter() - self._begun
        if not due:
            return None
        line = self._make_line(plan, result, lr)
        self.write(plan.step + 1, line)
        self._reset()
        return line

    def _make_line(self, plan: StepPlan, result: StepResult, lr: float) -> dict[str, float]:
        """Return the metrics of the steps since the last line, over all ranks."""
        host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
        loss, host_gib, *sums = dist.sum_over_ranks(
            [float(self._loss), host_gib, *self._sums.values()]
        )
        total = dict(zip(self._sums, sums, strict=True))
        world = dist.world_size()
        seconds = total["seconds"] / world
        self._all_tokens += total["tokens"]
        self._all_seconds += seconds
        line = {
            "train/loss": loss / self._steps,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/epoch": plan.epoch,
            "train/trained_tokens": total["trained"] / self._steps,
            "perf/tokens_per_s": total["tokens"] / seconds,
            "perf/trained_tokens_per_s": total["trained"] / seconds,
            "perf/filler_share": total["fillers"] / total["micro_batches"],
            "perf/step_s": seconds / self._steps,
            **{f"perf/{part}_s": total[part] / world / self._steps for part in PARTS},
            "pack/fill": total["tokens"] / (total["sequences"] * self._seq_len),
            "mem/host_peak_gib": host_gib,
        }
        if self._peak:
            line["perf/mfu"] = total["flops"] / seconds / world / self._peak
        if dist.device().type == "cuda":
            line["mem/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            line["mem/gpu_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return line | (self._more(self._steps) if self._more else {})

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second without fillers, over all logged steps of this start."""
        return self._all_tokens / self._all_seconds if self._all_seconds else 0.0

    def write(self, step: int, line: dict[str, float]) -> None:
        """Write a JSON line, and hand the same names to the trackers.

        Args:
            step: steps of the plan that are done; 0 is before any.
        """
        if not dist.is_main():
            return
        append_json_lines(self._path, [{"step": step, **line}])
        if self._board is not None:
            for name, value in line.items():
                self._board.add_scalar(name, value, step)
        self._trackers.log(step, line)

    def write_text(self, name: str, markdown: str, step: int | None = None) -> None:
        """Write a text to TensorBoard."""
        if self._board is not None:
            self._board.add_text(name, markdown, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


# ----------------------------------------------------------------------------------------- profiler


class Profiler:
    """Writes a torch.profiler trace of steps, for TensorBoard and Perfetto. Only rank 0 profiles.

    Args:
        steps: the first and the last profiled step, counted from 1; None for no trace.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path) -> None:
        self._steps = steps if dist.is_main() else None
        self._folder = run_dir / "profile"
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Start at the first profiled step. Call it before step `step`, counted from 0."""
        if self._steps and step + 1 == self._steps[0]:
            from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

            on_gpu = torch.cuda.is_available()
            self._profile = profile(
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
                record_shapes=True,
                profile_memory=True,
                on_trace_ready=tensorboard_trace_handler(str(self._folder)),
            )
            self._profile.start()

    def after(self, step: int) -> None:
        """Stop after the last profiled step. Call it after step `step`, counted from 0."""
        if self._profile and self._steps and step + 1 >= self._steps[1]:
            self._profile.stop()
            self._profile = None
