"""What a run reports: one JSON line and the TensorBoard scalars of each logged step (C11).

In: step results, batches, the clock. Out: `metrics.jsonl`, `tensorboard/`, `profile/`, lines on the
    terminal.
Sums stay on the device until a line is due; then one reduction over all ranks makes it.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer import dist
from trainer.config.recipe import ProfileSection
from trainer.datatypes import Batch, StepPlan, StepResult
from trainer.utils.files import read_json_lines, write_synced

# Dense bf16 FLOP/s as the makers state them; the longest name that fits a device is taken.
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
    """The device's stated dense bf16 FLOP/s; None where nobody states one (a CPU, an unknown card)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in _PEAK_FLOPS if key in name]
    return _PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass(frozen=True)
class ModelFlops:
    """Training FLOPs that a model needs: 6 a weight and token, as Kaplan et al. 2020 count them,
    and 6 a layer for each channel of attention and pair of positions (causal pairs: half of L^2,
    scores and values).

    A frozen weight takes 4, as it has no gradient of its own, and counts as two thirds of one.
    The head is counted where it is used: at trained positions. Recomputation is not counted.
    """

    # used by every token: matrices but for embeddings and head; of experts, the chosen ones
    body_weights: int
    head_weights: int
    attention_channels: int  # heads x head size, summed over the layers that attend

    def of(self, batch: Batch) -> float:
        pairs = sum(length * length for length in batch.lengths)
        return (
            6.0 * self.body_weights * batch.tokens
            + 6.0 * self.head_weights * batch.trained_tokens
            + 6.0 * self.attention_channels * pairs
        )


def model_flops(model: Any) -> ModelFlops:
    """Count the weights of a Hugging Face causal LM, sharded or not."""
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
    body = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) not in embeddings:
            body += _weights(parameter) * (share if ".experts." in name else 1.0)
    head = int(sum(_weights(p) for p in model.get_output_embeddings().parameters()))
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    layer_types = (
        getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    )
    attending = sum("attention" in kind and "linear" not in kind for kind in layer_types)
    return ModelFlops(int(body), head, head_size * config.num_attention_heads * attending)


def _weights(parameter: Any) -> float:
    """Of a parameter, sharded or in 4 bits, as ModelFlops counts them."""
    quantised = getattr(parameter, "quant_state", None)
    count = (
        quantised.shape.numel() if quantised else getattr(parameter, "ds_numel", parameter.numel())
    )
    return count if parameter.requires_grad else count * 2 / 3


# --------------------------------------------------------------------------------------------- time


class Clock:
    """Seconds spent in named parts of steps. On a GPU, events mark the parts and nothing waits
    until `read`.
    """

    def __init__(
        self, device: torch.device, beat: Callable[[str], None] = lambda part: None
    ) -> None:
        self._on_gpu = device.type == "cuda"
        self._beat = beat  # told of each part as it begins
        self._spans: list[tuple[str, Any, Any]] = []

    def _mark(self, host: bool) -> Any:
        if host or not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str, host: bool = False) -> Iterator[None]:
        """Time what runs inside; `host` for work that the host itself waits on, as reading data."""
        self._beat(name)
        start = self._mark(host)
        yield
        self._spans.append((name, start, self._mark(host)))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, start, stop in self._spans:
            spent = stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1e3
            seconds[name] = seconds.get(name, 0.0) + spent
        self._spans.clear()
        return seconds


_PARTS = ("data", "forward", "backward", "optimizer", "checkpoint")


# ------------------------------------------------------------------------------------------ the log

EVALUATIONS = "evaluations.jsonl"  # of a run folder: a line for each evaluation that ended
_STEPS_MEASURED = 3  # after which a GPU's memory is compared with the plan


def memory_line(predicted: int, allocated: int, reserved: int) -> str:
    """Bytes predicted and measured, as a sentence."""
    gib = [f"{size / 2**30:.1f} GiB" for size in (predicted, allocated, reserved)]
    off = f"{(allocated - predicted) / predicted:+.0%}"
    return f"memory of a GPU at its peak: predicted {gib[0]}, measured {gib[1]} ({off}), reserved {gib[2]}"


class Metrics:
    """Accumulates steps and writes a line every `log_every` of them. Only rank 0 writes.

    On a resume from step k, lines of later steps, which a killed run left, are dropped: the files
    read as if the run had never been stopped. So is what an evaluation of step k left that does not
    stand in EVALUATIONS: it did not end, and is made anew.
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
    ) -> None:
        self.clock = Clock(dist.device(), beat)
        self._log_every = log_every
        self._row_tokens = seq_len
        self._flops = flops
        self._peak = peak_flops(dist.device())
        self._writer = self._board = None
        if dist.is_main():
            from torch.utils.tensorboard import SummaryWriter

            _drop_lines_after(run_dir / EVALUATIONS, resumed_at, None)
            evaluated = any(
                line["step"] == resumed_at for line in read_json_lines(run_dir / EVALUATIONS)
            )
            for name in ("metrics.jsonl", "samples.jsonl", "trace.jsonl"):
                _drop_lines_after(run_dir / name, resumed_at, None if evaluated else resumed_at)
            self._writer = (run_dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
            self._board = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None
            )
        self._predicted: tuple[int, int] | None = None  # bytes, and steps until they are compared
        self._real_tokens = 0.0
        self._real_seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=dist.device())
        self._steps = self._tokens = self._trained = self._rows = self._fillers = (
            self._micro_batches
        ) = 0
        self._flop = self._seconds = 0.0

    def predict(self, gpu_bytes: int) -> None:
        """What the planner expects of a GPU at the peak of a step: after a few steps it is logged
        beside what is.
        """
        self._predicted = (gpu_bytes, _STEPS_MEASURED)
        torch.cuda.reset_peak_memory_stats()

    def _compare_memory(self) -> None:
        expected, left = self._predicted or (0, 0)
        self._predicted = (expected, left - 1) if left > 1 else None
        if left == 1:
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            dist.log.info(memory_line(expected, *peaks))

    def begin_step(self) -> None:
        """A step's time runs from here to `step`: evaluation and saving lie outside."""
        self._begun = time.perf_counter()

    def step(
        self, plan: StepPlan, result: StepResult, batches: list[Batch], lr: float
    ) -> dict[str, float] | None:
        """Count one step; returns the line that was logged, on the steps where one is due, on every
        rank.
        """
        self._compare_memory()
        self._loss += result.loss
        self._steps += 1
        for batch in batches:
            self._tokens += batch.tokens
            self._trained += batch.trained_tokens
            self._rows += len(batch.sequence_ids)
            self._fillers += batch.is_filler
            self._micro_batches += 1
            self._flop += self._flops.of(batch)
        due = (plan.step + 1) % self._log_every == 0
        parts = self.clock.read() if due else {}  # waits for the GPU, so before the time is taken
        self._seconds += time.perf_counter() - self._begun
        if not due:
            return None
        line = self._line(plan, result, lr, parts)
        self.write(plan.step + 1, line)
        self._reset()
        return line

    def _line(
        self, plan: StepPlan, result: StepResult, lr: float, parts: dict[str, float]
    ) -> dict[str, float]:
        counted = [
            float(self._loss),
            self._tokens,
            self._trained,
            self._rows,
            self._fillers,
            self._micro_batches,
        ]
        host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        parts_s = [parts.get(part, 0.0) for part in _PARTS]
        sums = dist.sum_over_ranks([*counted, self._flop, self._seconds, host_gib, *parts_s])
        (
            loss,
            tokens,
            trained,
            rows,
            fillers,
            micro_batches,
            flop,
            seconds,
            host_gib,
            *part_seconds,
        ) = sums
        world = dist.world_size()
        seconds /= world
        self._real_tokens += tokens
        self._real_seconds += seconds
        line = {
            "train/loss": loss / self._steps,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/epoch": plan.epoch,
            "train/trained_tokens": trained / self._steps,
            "perf/tokens_per_s": tokens / seconds,
            "perf/trained_tokens_per_s": trained / seconds,
            "perf/filler_share": fillers / micro_batches,
            "perf/step_s": seconds / self._steps,
            **{
                f"perf/{p}_s": s / world / self._steps
                for p, s in zip(_PARTS, part_seconds, strict=True)
            },
            "pack/fill": tokens / (rows * self._row_tokens),
            "mem/host_peak_gib": host_gib,
        }
        if self._peak:
            line["perf/mfu"] = flop / seconds / world / self._peak
        if dist.device().type == "cuda":
            line["mem/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            line["mem/gpu_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return line

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second over all logged steps of this start."""
        return self._real_tokens / self._real_seconds if self._real_seconds else 0.0

    def write(self, step: int, line: dict[str, float]) -> None:
        """One JSON line and the same names in TensorBoard. `step` counts applied steps, from 1; 0
        is before any.
        """
        if self._writer is None or self._board is None:
            return
        self._writer.write(json.dumps({"step": step, **line}) + "\n")
        for name, value in line.items():
            self._board.add_scalar(name, value, step)

    def text(self, name: str, markdown: str, step: int | None = None) -> None:
        if self._board is not None:
            self._board.add_text(name, markdown, step)

    def close(self) -> None:
        if self._writer is not None and self._board is not None:
            self._writer.close()
            self._board.close()


def _drop_lines_after(path: Path, step: int, remade: int | None) -> None:
    """Keep a file's lines up to `step`, without the evaluation at step `remade`."""
    if not path.is_file():
        return
    lines = read_json_lines(path, may_be_torn=True)
    with path.open(encoding="utf-8", errors="replace") as file:
        # as they were written; a torn last line has no object and falls out
        texts = [
            text.removesuffix("\n") + "\n"
            for text, line in zip(file, lines, strict=False)
            if line["step"] <= step and not (line["step"] == remade and "train/loss" not in line)
        ]
    write_synced(path, "".join(texts))


# ----------------------------------------------------------------------------------------- profiler


class Profiler:
    """A torch.profiler trace of the steps that the recipe names, for TensorBoard's plug-in and
    Perfetto.
    """

    def __init__(self, section: ProfileSection | None, run_dir: Path) -> None:
        self._section = section if dist.is_main() else None
        self._folder = run_dir / "profile"
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Call before step `step` (from 0)."""
        if self._section and step + 1 == self._section.start:
            from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

            activities = [ProfilerActivity.CPU] + [
                ProfilerActivity.CUDA
            ] * torch.cuda.is_available()
            self._profile = profile(
                activities=activities,
                record_shapes=True,
                profile_memory=True,
                on_trace_ready=tensorboard_trace_handler(str(self._folder)),
            )
            self._profile.start()

    def after(self, step: int) -> None:
        """Call after step `step` (from 0)."""
        if (
            self._profile
            and self._section
            and step + 1 >= self._section.start + self._section.steps - 1
        ):
            self._profile.stop()
            self._profile = None
