"""Run many small recipes on one set of ranks, as starting ranks takes longer than the runs.

    python -m tests.numerics.cases CASES.json

A case is {"run": folder, "recipe": file, "overrides": [...], "changes": [names], "stop_after": step
or null}, with "skips": a step that the run skips from its start. A change patches the trainer: with
a defect that a test of exactness must catch, or with another model or event.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from packhorse.trainer import build_engine, dist, guard, run_folder, train
from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.config.sections import ModelSection
from packhorse.trainer.data import loader, streaming, summary
from packhorse.trainer.data.prepare import prepare, train_plan
from packhorse.trainer.data.streaming import StreamingData
from packhorse.trainer.engine import (
    clipping,
    engine,
    moments,
    muon,
    optim,
    sharded_state,
    streamed_adamw,
    zero_state,
)
from packhorse.trainer.model import fp8, lora, router_loss, sft
from packhorse.trainer.model.load import load_tokenizer
from packhorse.trainer.model.roles import LINEAR
from packhorse.trainer.stop_flag import StopFlag
from packhorse.trainer.trackers import Trackers
from tests.numerics import buffers, sequence_defects, tiled


def main(path: str) -> None:
    torch.manual_seed(os.getpid())  # nothing may depend on the global generator
    dist.start_logging()
    dist.log.setLevel("WARNING")
    # no test of these looks at a run's picture, which takes as long to draw as a step
    with dist.process_group(), mock.patch.object(summary, "picture"):
        stop = StopFlag()
        stop.attach_group()
        for case in json.loads(Path(path).read_text()):
            run_case(case, stop)
            # DeepSpeed collects garbage once an engine: not what imports and other cases left
            gc.collect()
            gc.freeze()


def run_case(case: dict[str, Any], stop: StopFlag) -> None:
    recipe = load_recipe(case["recipe"], [*case["overrides"], f"run.dir={case['run']}"])
    # as in a process of its own: DeepSpeed names its NVMe files by it
    engine.deepspeed.zero.Init.param_id = 0
    run_dir = Path(case["run"])
    if dist.is_main():
        run_folder.open_run_folder(recipe, run_dir)
        if "skips" in case:
            (run_dir / "skipped_steps.jsonl").write_text(json.dumps({"step": case["skips"]}) + "\n")
    dist.barrier()
    tokenizer = tokenizer_of(recipe.model.model_dump_json())
    train_data = (
        StreamingData(recipe, tokenizer)
        if recipe.streaming
        else prepare(recipe, tokenizer, "train")
    )
    eval_data = prepare(recipe, tokenizer, "eval") if recipe.has_eval else None
    with contextlib.ExitStack() as changed:
        for name in case.get("changes", ()):
            changed.enter_context(CHANGES[name]())
        changed.enter_context(stopping_after(case.get("stop_after"), stop))
        plan = train_plan(recipe, train_data)
        data = (tokenizer, train_data, plan, eval_data)
        train.fit(train.PreparedRun(recipe, run_dir, *data, stop, Trackers([])))
    stop.raised = False
    dist.barrier()


@functools.cache
def tokenizer_of(section: str) -> Any:
    """Load each tokenizer once for all cases, by the recipe's section as JSON."""
    return load_tokenizer(ModelSection.model_validate_json(section))


@contextlib.contextmanager
def stopping_after(step: int | None, stop: StopFlag) -> Iterator[None]:
    """Raise the stop flag on the last rank while step `step` runs."""
    if step is None:
        yield
        return
    apply = engine.Engine.step
    count = 0

    def counted(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        # the flag is read at a step's start, so it goes up during the step before
        stop.raised = stop.raised or (count == step - 1 and dist.rank() == dist.world_size() - 1)
        return apply(self, *args)

    with mock.patch.object(engine.Engine, "step", counted):
        yield


def mean_of_means() -> Any:
    """Average the micro-batches' means, as gradient accumulation does in other trainers."""
    apply = engine.Engine.step

    def step(self: Any, batches: list[Any], *args: Any) -> Any:
        real = max(1, dist.sum_over_ranks([sum(not b.is_filler for b in batches)])[0])
        even = [
            b
            if b.is_filler
            else replace(b, weights=torch.full_like(b.weights, 1 / (real * len(b.weights))))
            for b in batches
        ]
        return apply(self, even, *args)

    return mock.patch.object(engine.Engine, "step", step)


def dropped_micro_batch() -> Any:
    """Replace rank 0's first micro-batch by a filler."""
    apply = engine.Engine.step

    def step(self: Any, batches: list[Any], *args: Any) -> Any:
        kept = [loader.filler_batch(), *batches[1:]] if dist.is_main() else batches
        return apply(self, kept, *args)

    return mock.patch.object(engine.Engine, "step", step)


def decay_everywhere() -> Any:
    """Give norms and biases the weight decay of matrices."""
    build = build_engine.parameter_groups

    def groups(model: Any, section: Any) -> Any:
        return [{**group, "weight_decay": section.weight_decay} for group in build(model, section)]

    return mock.patch.object(build_engine, "parameter_groups", groups)


def bf16_accumulation() -> Any:
    """Sum and reduce gradients in bf16, which is DeepSpeed's default."""
    build = build_engine.deepspeed_config

    def config(*args: Any, **options: Any) -> Any:
        made = build(*args, **options)
        return {
            **made,
            "data_types": {"grad_accum_dtype": "bf16"},
            "communication_data_type": "bf16",
        }

    return mock.patch.object(build_engine, "deepspeed_config", config)


def boundaries_ignored() -> Any:
    """Let documents of a packed sequence see each other in training.

    The packing check at the start, which would refuse the run, still sees them apart.
    """
    forward = sft.SftModel.forward

    def whole(self: Any, batch: Any) -> Any:
        if self.training:
            total = batch.input_ids.shape[0]
            ends = torch.tensor([0, total], dtype=torch.int32)
            batch = replace(
                batch, cu_seqlens=ends, lengths=(total,), document_keys=batch.document_keys[:1]
            )
        return forward(self, batch)

    return mock.patch.object(sft.SftModel, "forward", whole)


def labels_shifted_across_boundaries() -> Any:
    """Train a document's last position to predict its neighbour's first token."""
    build = loader.build_batch

    def shifted(*args: Any, **kwargs: Any) -> Any:
        batch = build(*args, **kwargs)
        last = batch.cu_seqlens[1:-1].long() - 1
        extra = torch.full((len(last),), float(batch.weights[0]))
        return replace(
            batch,
            trained_positions=torch.cat([batch.trained_positions, last]),
            targets=torch.cat([batch.targets, batch.input_ids[last + 1]]),
            weights=torch.cat([batch.weights, extra]),
        )

    return mock.patch.object(loader, "build_batch", shifted)


def parts_orthogonalised() -> Any:
    """Let each rank orthogonalise its part of a matrix, as Muon over a flat partition would."""
    whole = muon._orthogonalised_by_owners

    def alone(batch: Any, update: Any, is_sharded: bool) -> Any:
        return [next(whole([piece], update, False)) for piece in batch]

    return mock.patch.object(muon, "_orthogonalised_by_owners", alone)


def small_chunks() -> Any:
    """Stream the optimizer's state in chunks of which every master weight has several."""
    return mock.patch.object(streamed_adamw, "CHUNK", 1024)


def routers_balanced_by_micro_batch() -> Any:
    """Take the auxiliary loss over the micro-batch, as other trainers do."""
    plain = router_loss.RouterLoss.__call__

    def over_all(self: Any, logits: Any, batch: Any, *_: Any) -> Any:
        ends = batch.cu_seqlens[[0, -1]]
        whole = replace(batch, cu_seqlens=ends, lengths=(sum(batch.lengths),))
        return plain(self, logits, whole)

    return mock.patch.object(router_loss.RouterLoss, "__call__", over_all)


def stale_expert_gradients() -> Any:
    """Give an expert that no token reached the gradient of the step before."""
    clip = engine.step_clipped
    before: dict[int, torch.Tensor] = {}

    def stale(wrapped: Any, parameters: Any, *args: Any) -> Any:
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.dim() == 3 and parameter.grad is not None:
                last = before.get(id(parameter))
                idle = ~parameter.grad.flatten(1).any(1)
                before[id(parameter)] = parameter.grad.clone()
                if last is not None:
                    parameter.grad[idle] = last[idle]
        return clip(wrapped, parameters, *args)

    return mock.patch.object(engine, "step_clipped", stale)


def idle_lists_get_the_last_gradient() -> Any:
    """Give a parameter without a gradient that of the step before."""
    before: dict[int, torch.Tensor] = {}

    def fill(parameters: Any) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = before.get(id(parameter), torch.zeros_like(parameter)).clone()
            before[id(parameter)] = parameter.grad.clone()

    return mock.patch.object(clipping, "fill_gradients", fill)


def router_bias_decayed() -> Any:
    """Give the biases of routers the weight decay of matrices, and nothing else."""
    of_all = optim.roles

    def as_matrices(model: Any) -> dict[int, str]:
        named = model.named_parameters()
        biases = {id(p): LINEAR for name, p in named if name.endswith("router.bias")}
        assert biases
        return of_all(model) | biases

    return mock.patch.object(optim, "roles", as_matrices)


def experts_unpacked() -> Any:
    """Leave experts in the model's type where `adapter.base` quantises them."""
    return mock.patch.object(lora, "packable_experts", return_value={})


def towers_trained() -> Any:
    """Train what a text's loss does not depend on."""
    return mock.patch.object(build_engine, "freeze_unreached", return_value=None)


# ------------------------------------------------------------------------------ defects of a resume


def restore_unchecked(fill: Any) -> Any:
    """Restore with `fill(shards, piece)` in place of Shards.fill, and check no digest."""

    def restore(folder: Path, manifest: Any, engine: Any) -> None:
        with mock.patch.object(sharded_state.Shards, "fill", fill):
            engine.state.restore(
                sharded_state.Shards(folder, manifest.files, manifest.shapes),
                manifest.state.updates,
            )

    return mock.patch.object(checkpoint, "restore", restore)


def moment_zeroed() -> Any:
    fill = sharded_state.Shards.fill

    def without(self: Any, piece: Any) -> None:
        fill(self, piece)
        for first in {names[0] for names in moments.MOMENTS.values()} & piece.states.keys():
            piece.states[first].zero_()

    return restore_unchecked(without)


def slices_exchanged() -> Any:
    """Exchange the two halves of what a rank reads of a parameter."""
    fill = sharded_state.Shards.fill

    def exchanged(self: Any, piece: Any) -> None:
        fill(self, piece)
        for tensor in piece.states.values():
            half = tensor.numel() // 2
            first = tensor[:half].clone()
            tensor[:half] = tensor[half : 2 * half]
            tensor[half : 2 * half] = first

    return restore_unchecked(exchanged)


def hyperparameters_of_group_0() -> Any:
    """Give every group the first one's, as DeepSpeed's own universal load does at ZeRO-3."""
    restore = zero_state.TrainingState.restore

    def overwrite(self: Any, *args: Any) -> None:
        restore(self, *args)
        groups = self._optimizer.param_groups
        for group in groups:
            group["weight_decay"] = groups[0]["weight_decay"]

    return mock.patch.object(zero_state.TrainingState, "restore", overwrite)


def average_forgotten() -> Any:
    """Let the moving average begin again from the weights of the resume."""
    fill = sharded_state.Shards.fill

    def begun_anew(self: Any, piece: Any) -> None:
        fill(self, piece)
        piece.states[sharded_state.EMA].copy_(piece.states[sharded_state.WEIGHT])

    return restore_unchecked(begun_anew)


DEFECTS = {
    f.__name__: f
    for f in (
        mean_of_means,
        dropped_micro_batch,
        decay_everywhere,
        bf16_accumulation,
        boundaries_ignored,
        labels_shifted_across_boundaries,
    )
}
DEFECTIVE_RESUMES = {
    f.__name__: f for f in (moment_zeroed, slices_exchanged, hyperparameters_of_group_0)
}

# ------------------------------------------------------------------------------------- other models


def frozen_and_buffers() -> Any:
    """Freeze the embeddings, and count the steps in a persistent buffer."""
    load, apply = build_engine.load_model, engine.Engine.step

    def load_model(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.get_input_embeddings().weight.requires_grad = False
        model.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))
        return model

    def step(self: Any, *args: Any) -> Any:
        self.module.model.steps_seen += 1
        return apply(self, *args)

    both = contextlib.ExitStack()
    both.enter_context(mock.patch.object(build_engine, "load_model", load_model))
    both.enter_context(mock.patch.object(engine.Engine, "step", step))
    return both


def fp8_on_cpu() -> Any:
    """Let products run in fp8 here, where torch emulates them and the trainer refuses."""
    return mock.patch.object(fp8, "missing_for_fp8", return_value=None)


# -------------------------------------------------------------------------------- streaming sources


def shards_appear() -> Any:
    """Rename a `*.later` file in the source's folder to its name before every second step."""
    take = loader.Loader.step

    def step(self: Any, number: int) -> Any:
        source = getattr(self.data, "_source", None)
        later = sorted(Path(source.path).glob("*.later")) if source else []
        if later and dist.is_main() and number % 2:
            later[0].rename(later[0].with_suffix(""))
        return take(self, number)

    return mock.patch.object(loader.Loader, "step", step)


def small_shards() -> Any:
    """Cut a stream into shards of ten rows."""
    return mock.patch.object(streaming, "SHARD_ROWS", 10)


# ------------------------------------------------------------------------------ steps that go wrong


def third_step_times(factor: float) -> Any:
    """Multiply the last rank's share of the third step's loss, each time the step is built."""
    build = loader.Loader._build_step

    def build_step(self: Any, step: int) -> Any:
        batches = build(self, step)
        if step == 2 and dist.rank() == dist.world_size() - 1:
            first = batches[0]
            batches[0] = replace(first, weights=first.weights * factor)
        return batches

    return mock.patch.object(loader.Loader, "_build_step", build_step)


def nan_in_the_third_step() -> Any:
    return third_step_times(float("nan"))


def spike_in_the_third_step() -> Any:
    changed = contextlib.ExitStack()
    changed.enter_context(mock.patch.object(guard, "_ENOUGH", 2))
    changed.enter_context(third_step_times(100.0))
    return changed


# ----------------------------------------------------------------------------------- memory dry run


def dry_run_first() -> Any:
    """Run the memory dry run before the first step, as on a GPU; assert that gradients are zero."""
    memory_dry_run, forget = engine.Engine.memory_dry_run, zero_state.forget_gradients

    def looked_at(self: Any, batches: list[Any]) -> None:
        def look(optimizer: Any) -> None:
            found = list(buffers.gradients(self.module, optimizer))
            assert found, "no gradient was found to look at"
            assert not any(gradient.any() for gradient in found), "weights of zero left a gradient"
            forget(optimizer)

        with mock.patch.object(zero_state, "forget_gradients", look):
            memory_dry_run(self, batches)

    changed = contextlib.ExitStack()
    changed.enter_context(mock.patch.object(build_engine, "DRY_RUN_DEVICES", ("cpu",)))
    changed.enter_context(mock.patch.object(engine.Engine, "memory_dry_run", looked_at))
    return changed


def dry_run_that_learns() -> Any:
    """Control: let the dry run leave its gradients."""
    changed = contextlib.ExitStack()
    changed.enter_context(mock.patch.object(build_engine, "DRY_RUN_DEVICES", ("cpu",)))
    changed.enter_context(mock.patch.object(engine, "_weightless", lambda batch: batch))
    changed.enter_context(mock.patch.object(zero_state, "forget_gradients", return_value=None))
    return changed


MISHAPS = {f.__name__: f for f in (nan_in_the_third_step, spike_in_the_third_step)}
CHANGES: dict[str, Any] = {
    **MISHAPS,
    **DEFECTS,
    **DEFECTIVE_RESUMES,
    "frozen_and_buffers": frozen_and_buffers,
}
CHANGES |= {f.__name__: f for f in (shards_appear, small_shards, fp8_on_cpu)}
CHANGES |= {f.__name__: f for f in (dry_run_first, dry_run_that_learns)}
CHANGES |= {f.__name__: f for f in (stale_expert_gradients, experts_unpacked, towers_trained)}
CHANGES |= {f.__name__: f for f in (parts_orthogonalised, routers_balanced_by_micro_batch)}
CHANGES |= {
    f.__name__: f
    for f in (router_bias_decayed, average_forgotten, idle_lists_get_the_last_gradient)
}
CHANGES["small_chunks"] = small_chunks
CHANGES |= sequence_defects.DEFECTS | tiled.CHANGES
CHANGES["short_zigzag"] = sequence_defects.short_zigzag

if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DeepSpeed leaves threads behind that now and then abort a process at its very end
