"""Build what training and evaluation run: the engine with its model, proved, and their metrics.

recipe -> model (sharded) -> adapter -> SftModel -> engine -> packing check

Here, too, is what fails early: other data on a rank, and a GPU that is too small.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import AdapterSection, Recipe, load_recipe
from packhorse.trainer.data.batch_plan import Plan
from packhorse.trainer.data.loader import Loader, filler_batch
from packhorse.trainer.data.prepare import TrainData
from packhorse.trainer.data.ranks import count_groups
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.ds_config import clear_nvme, deepspeed_config, stage_of
from packhorse.trainer.engine.engine import Engine, gathered, reads_gathered, sharded_init
from packhorse.trainer.engine.optim import describe_decay, parameter_groups
from packhorse.trainer.estimate.choice import choose_sequence, largest_micro_batch, predict_memory
from packhorse.trainer.estimate.memory import Cluster, Memory
from packhorse.trainer.hang_watchdog import Watch
from packhorse.trainer.metrics import Metrics, model_flops
from packhorse.trainer.model.attention import SequenceGroup
from packhorse.trainer.model.checks import failures_explained, require_positions
from packhorse.trainer.model.compiled_layers import compile_layers, require_compilable
from packhorse.trainer.model.feed_forward_tiles import set_tiles, tile_tokens, wants_tiles
from packhorse.trainer.model.fp8 import use_fp8
from packhorse.trainer.model.load import load_config, load_model
from packhorse.trainer.model.loss import choose_kernel
from packhorse.trainer.model.packing_check import prove_packing
from packhorse.trainer.model.partly_called import partly_called_blocks
from packhorse.trainer.model.probe_documents import longest_document
from packhorse.trainer.model.reach import freeze_named, freeze_unreached
from packhorse.trainer.model.sequence_check import prove_slices
from packhorse.trainer.model.sft import SftModel
from packhorse.trainer.run_folder import has_checkpoint
from packhorse.trainer.trackers import TENSORBOARD, Trackers
from packhorse.trainer.utils.cpu_speed import EMULATED_FROM, bf16_slowdown


def build_engine(recipe: Recipe, run_dir: Path, tokenizer: Any, *, learns: bool = True) -> Engine:
    """Load the model, sharded at ZeRO-3, put it under DeepSpeed, and prove its packing (C4).

    Args:
        learns: False builds no optimizer and none of its state.
    """
    if dist.is_main() and dist.device().type == "cpu":
        warn_if_bf16_is_emulated(recipe.model.dtype)
    # some name their sizes otherwise, as BLT does by its parts
    hidden_size = getattr(load_config(recipe.model).get_text_config(), "hidden_size", 0)
    sections = (recipe.parallel, recipe.model, recipe.optim)
    ds_config = deepspeed_config(*sections, hidden_size, run_dir, learns=learns)
    require_compilable(recipe.model.compile, stage_of(ds_config))
    clear_nvme(ds_config)
    model = load_model(
        recipe.model,
        tokenizer,
        seed=recipe.train.seed,
        adapter=_adapter(recipe, run_dir),
        sharded_init=partial(sharded_init, ds_config),
        gathered=gathered,
    )
    if learns and recipe.model.matmul == "fp8_rowwise":  # what reads an export computes in bf16
        dist.log.info("products: %s", use_fp8(model, dist.device()))
    group = _sequence_group(recipe)
    _set_tiles(recipe, model, hidden_size)
    offload = recipe.model.activation_checkpointing == "offload"
    module = SftModel(model, recipe.loss, recipe.train.seed, dist.device(), group, offload)
    groups = None
    if learns:
        freeze_named(model, recipe.model.freeze)
        text_config = model.config.get_text_config()
        document = longest_document(text_config, recipe.batch.seq_len, recipe.train.seed)
        with failures_explained(model):
            forward = partial(module.hidden_states, document)
            module.by_either_attention(partial(freeze_unreached, model, forward, gathered))
        groups = parameter_groups(model, recipe.optim)
        say_other_types(model, recipe.model.dtype)
        dist.log.info("weight decay: %s", describe_decay(model, recipe.optim))
    with failures_explained(model):
        one_token = partial(module.hidden_states, filler_batch(tokens=1).to(dist.device()))
        find = partial(partly_called_blocks, model, one_token, gathered)
        partly_called = module.by_either_attention(find)
    engine = Engine(module, groups, recipe.optim, ds_config, partly_called)
    if learns and recipe.model.compile:
        recomputes = recipe.model.activation_checkpointing != "none"
        num_layers = compile_layers(model, checkpointing=recomputes)
        dist.log.info("layers: %d, compiled at their first calls", num_layers)
    check_packing(recipe, module)
    return engine


def _adapter(recipe: Recipe, run_dir: Path) -> AdapterSection | None:
    """Return the section; a run with a checkpoint has the values from there, not from a folder
    (`init_from`) that may be gone.
    """
    section = recipe.adapter
    # rank 0's view, as a network file system may show ranks different folders for a moment
    if section and dist.broadcast(has_checkpoint(run_dir)):
        return section.model_copy(update={"init_from": None})
    return section


def _set_tiles(recipe: Recipe, model: Any, hidden_size: int) -> None:
    """Let feed-forward blocks run in tiles if the recipe's sequences are long."""
    tokens = recipe.batch.micro * recipe.batch.seq_len // recipe.parallel.ranks_a_sequence
    mode = "none" if recipe.model.compile else recipe.model.activation_checkpointing
    if not wants_tiles(mode, tokens, hidden_size):
        return
    if blocks := set_tiles(model, True):
        tile = tile_tokens(hidden_size)
        dist.log.info("feed-forward blocks: %d run in tiles of %d tokens", blocks, tile)
    else:
        dist.log.info("feed-forward blocks: all run whole, as experts and dropout need")


def _sequence_group(recipe: Recipe) -> SequenceGroup | None:
    """Return the ranks that share a packed sequence with this one (C13); None if it is alone."""
    size = recipe.parallel.ranks_a_sequence
    count_groups(dist.world_size(), size)
    if size == 1:
        return None
    if dist.local_world_size() % size:
        dist.log.warning(
            "parallel.sequence: groups of %d ranks cross nodes of %d, and exchange in each layer",
            *(size, dist.local_world_size()),
        )
    return SequenceGroup(dist.consecutive_group(size), recipe.parallel.sequence_kind)


def resolve_micro_batch(recipe: Recipe, run_dir: Path) -> Recipe:
    """Choose for `batch.micro_batch_size: auto`; on a CPU it is 1.

    The number goes into the run folder's recipe, and a run with a checkpoint keeps it: the random
    numbers of dropout belong to a micro-batch (C3). There is no process group yet.
    """
    if recipe.batch.micro_batch_size != "auto":
        return recipe
    saved = run_dir / "recipe.yaml"
    if has_checkpoint(run_dir) and saved.is_file():
        size, why = load_recipe(saved).batch.micro, "as before"
    elif dist.device().type == "cuda":
        card = torch.cuda.get_device_properties(dist.device()).total_memory
        kernel = choose_kernel(recipe.loss.kernel, dist.device())
        size = largest_micro_batch(recipe, card, kernel)
        why = f"for a GPU of {card / 2**30:.1f} GiB"
    else:
        size, why = 1, "on a CPU"
    dist.log.info("micro-batch: %d packed sequences, %s", size, why)
    batch = recipe.batch.model_copy(update={"micro_batch_size": size})
    return recipe.model_copy(update={"batch": batch})


def require_same_micro_batch(recipe: Recipe) -> None:
    """Refuse ranks that chose different micro-batches, as on GPUs of different sizes."""
    sizes = sorted(set(dist.gather(recipe.batch.micro)))
    if len(sizes) > 1:
        raise BadInput(
            f"batch.micro_batch_size: auto is {sizes} on different ranks; set it to {sizes[0]}"
        )


def resolve_checkpointing(recipe: Recipe, plan: Plan) -> Recipe:
    """Choose for `model.activation_checkpointing: auto` what recomputes least and fits every GPU.

    On a CPU the recipe stays as it is. The choice changes rounding alone (where layers are
    recomputed, long sequences run in tiles), so that a resumed run may make another.
    """
    if recipe.model.activation_checkpointing != "auto" or dist.device().type != "cuda":
        return recipe
    room = _smallest_gpu()
    mode = least_checkpointing(predict_memory(recipe, *_fullest(plan)), room)
    dist.log.info("activation checkpointing: %s, the least that fits %.1f GiB", mode, room / 2**30)
    model = recipe.model.model_copy(update={"activation_checkpointing": mode})
    return recipe.model_copy(update={"model": model})


def _fullest(plan: Plan) -> tuple[int, int]:
    """Return the most tokens, and the most trained ones, of the plan's micro-batches."""
    tokens, trained = zip(*(plan.size(*place) for place in plan.fullest()), strict=True)
    return max(tokens), max(trained)


def _smallest_gpu() -> float:
    """Return the bytes of the smallest of all ranks' GPUs; infinite on a CPU."""
    if dist.device().type != "cuda":
        return math.inf
    return min(dist.gather(torch.cuda.get_device_properties(dist.device()).total_memory))


def resolve_sequence(recipe: Recipe, plan: Plan) -> Recipe:
    """Choose for `parallel.sequence: auto`, or refuse where none fits. Every rank calls it."""
    if recipe.parallel.sequence != "auto":
        return recipe
    cluster = Cluster(dist.world_size(), dist.local_world_size(), _smallest_gpu())
    kernel = choose_kernel(recipe.loss.kernel, dist.device())
    fewest = int(plan.micro_batch_counts().min())
    recipe, why = choose_sequence(recipe, cluster, *_fullest(plan), fewest, kernel)
    dist.log.info("parallel.sequence: %s", why)
    return recipe


def least_checkpointing(predicted: Mapping[str, Memory], room: float) -> str:
    """Return the first value that fits a GPU of `room` bytes; `full` where none does."""
    return next((mode for mode, memory in predicted.items() if memory.gpu_total <= room), "full")


def say_other_types(model: Any, dtype: str) -> None:
    """Log the trained parameters that transformers keeps in another type than they are trained in.

    DeepSpeed has one type for all that is trained, as for a router's matrix, and fp32 masters.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = [n for n, p in named.items() if str(p.dtype) != f"torch.{dtype}"]
    if others:
        dist.log.warning(
            "%d tensors that transformers keeps in float32 are trained and exported in %s: %s",
            *(len(others), dtype, ", ".join(others[:3]) + ", ..." * (len(others) > 3)),
        )


def be_deterministic() -> None:
    """Let torch, cuBLAS and the attention kernels add in a fixed order, from now on."""
    # cuBLAS reads it at its first product
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # it would fill all new memory, for what reads memory that nobody wrote
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def warn_if_bf16_is_emulated(dtype: str) -> None:
    """Warn about bfloat16 on a CPU without instructions for it, and say what to set."""
    if dtype == "bfloat16" and (slowdown := bf16_slowdown()) > EMULATED_FROM:
        dist.log.warning(
            "model.dtype is bfloat16, which this CPU emulates: a matrix product takes %.0f times "
            "as long as in float32; set model.dtype=float32",
            slowdown,
        )


def check_packing(recipe: Recipe, module: SftModel) -> None:
    """Refuse a loaded model whose packed documents, through the chosen kernels, differ from the
    same documents alone (C4)."""
    require_positions(module.model, recipe.max_length)
    one_document = recipe.data.packing == "none" and recipe.batch.micro == 1
    # these are the engine's first forwards
    with reads_gathered(module), failures_explained(module.model):
        proof = prove_packing(
            module, seq_len=recipe.batch.seq_len, one_document=one_document, seed=recipe.train.seed
        )
    dist.log.info(
        "packing check: documents of %s tokens, packed against apart: hidden states differ by "
        "%.1e, the loss by %.1e",
        *(", ".join(map(str, proof.lengths)), proof.hidden_difference, proof.loss_difference),
    )
    if proof.by_itself:
        dist.log.warning(
            "the model attends by its own code, not by packhorse's (%s)", proof.by_itself
        )
    whole = (f"{type(module.model).__name__}",) if proof.by_itself and not one_document else ()
    for name in (*proof.by_document, *whole):
        if recipe.model.compile:
            raise BadInput(
                f"model.compile: packed sequences run document by document through {name}, which "
                "compiled layers cannot; set it to false"
            )
        dist.log.warning(
            "packed sequences run document by document through %s: right, but slower", name
        )
    size, zigzag = recipe.parallel.cut
    if size > 1:
        given = {"size": size, "zigzag": zigzag, "seed": recipe.train.seed}
        seen = prove_slices(module, proof, seq_len=recipe.batch.seq_len, **given)
        dist.log.info("sequences cut over %d ranks differ from whole ones by %.1e", size, seen)


# Devices on which the dry run pays: a GPU runs out of memory in the middle of a run, and the kernel
# of a CPU machine kills the process however early it is asked.
DRY_RUN_DEVICES = ("cuda",)


def memory_dry_run(recipe: Recipe, engine: Engine, loader: Loader, first_step: int) -> int | None:
    """Run the plan's fullest micro-batches, so that a GPU that is too small is refused now.

    Returns:
        The predicted peak of GPU memory in bytes, on rank 0 where the planner knows the model.
    """
    # With states on an NVMe it is not proved that a dry run leaves no trace in them.
    device = dist.device().type
    if device not in DRY_RUN_DEVICES or engine.swaps or first_step == loader.plan.steps:
        return None
    batches = loader.fullest(first_step)
    tokens = max(batch.tokens for batch in batches)
    trained = max(batch.trained_tokens for batch in batches)
    fullest = f"the fullest micro-batch of the run ({tokens:,} tokens, {trained:,} trained)"
    with explain_out_of_memory(fullest):
        engine.memory_dry_run(batches)
    dist.log.info("memory dry run: %s fits", fullest)
    is_planned = dist.is_main() and device == "cuda"
    whole = tokens * recipe.parallel.ranks_a_sequence
    predicted = predict_memory(recipe, whole, trained) if is_planned else {}
    # torch's allocator counts neither CUDA's context nor what is not in a tensor
    held = [memory.gpu_total - memory.gpu["reserve"] for memory in predicted.values()]
    return held[0] if held else None


@contextmanager
def explain_out_of_memory(what: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into a BadInput that names `what` and what takes less."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise BadInput(
            f"{what} does not fit into the memory of rank {dist.rank()}'s GPU: lower "
            "batch.micro_batch_size or batch.seq_len, set model.activation_checkpointing=full, "
            "use more GPUs or a DeepSpeed template that shards or offloads more; "
            "`packhorse plan` says which template fits"
        ) from None


def require_same_data(*prepared: TrainData | None) -> None:
    """Refuse a rank whose data cache, which may be local to its node, differs from rank 0's."""
    prints = dist.gather([data.fingerprint_at(1) for data in prepared if data])
    others = [rank for rank, theirs in enumerate(prints) if theirs != prints[0]]
    if others:
        raise BadInput(
            f"ranks {others} tokenized other data than rank 0: their nodes see other files under "
            "the same path, or have another version of the tokenizer; make them the same, or put "
            "data.cache on a shared folder"
        )


def open_metrics(
    recipe: Recipe,
    run_dir: Path,
    engine: Engine,
    watch: Watch,
    first_step: int,
    trackers: Trackers,
) -> Metrics:
    """Open the run folder's metrics, which drop what a killed run logged after `first_step`."""
    router = engine.module.router
    if router:
        router.reset()  # a step before the guard's rollback may stand in its sums
    return Metrics(
        run_dir,
        log_every=recipe.run.log_every,
        seq_len=recipe.batch.seq_len,
        flops=model_flops(engine.module.model),
        resumed_at=first_step,
        beat=watch.beat,
        trackers=trackers,
        to_tensorboard=TENSORBOARD in recipe.run.trackers,
        more=router.read if router else None,
    )
