"""The planner's training state is what DeepSpeed holds: every byte, at every stage and dtype."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from packhorse.trainer.engine.moments import MOMENTS
from tests.model_helpers import SIZES
from tests.models import listed_experts
from tests.models.shrunk import config_of
from tests.numerics.compare import STAGES
from tests.ranks import ROOT, run_ranks
from tests.runs.test_export_kinds import gemma_config

pytestmark = pytest.mark.runs

WORLD = 3  # which divides none of the model's sizes, so that every piece is filled up
_CASES = (
    *(
        f"{stage}-float32-float32" for stage in STAGES if stage != "zero3_nvme"
    ),  # whose states are files
    *(f"{stage}-bfloat16-float32" for stage in STAGES[1:-1]),
    *(f"{stage}-bfloat16-bfloat16" for stage in ("zero1", "zero2", "zero3")),
    *(f"{stage}-bfloat16-float32-adapter" for stage in ("zero1", "zero2", "zero3")),
    "zero0-float32-float32-adapter",
    *(f"{stage}-bfloat16-float32-{b}" for stage in ("zero2", "zero3") for b in ("nf4", "int8")),
    *(f"{stage}-bfloat16-float32-experts-nf4" for stage in ("zero2", "zero3")),
    "zero3-bfloat16-float32-experts-int8",
    *(f"{stage}-float32-float32-muon" for stage in ("zero0", "zero2", "zero3")),
    *(f"{stage}_streamed-bfloat16-float32" for stage in ("zero1", "zero3")),
    "zero3_hpz-bfloat16-float32",
    "zero3_hpz-bfloat16-float32-adapter",
    *(f"{stage}-float32-float32-adamw_8bit" for stage in ("zero0", "zero2", "zero3")),
    *(f"{stage}-bfloat16-float32-adafactor" for stage in ("zero1", "zero3")),
    "zero1-bfloat16-float32-lion",
    "zero3-float32-float32-sgd-ema",
    *(
        f"{stage}-float32-float32-{family}-{kind}"
        for family, stage in (("experts", "zero3"), ("hybrid", "zero2"))
        for kind in MOMENTS
    ),
    # each family at every stage, with another optimizer at each
    *(
        f"{stage}-float32-float32-{family}-{kind}"
        for shift, family in enumerate(("experts", "hybrid", "towers"))
        for stage, kind in zip(
            ("zero0", "zero1", "zero2", "zero3"), (*MOMENTS, *MOMENTS)[2 * shift :], strict=False
        )
    ),
    *(f"{stage}-bfloat16-float32-experts" for stage in ("zero1", "zero2")),
    *(f"{stage}-bfloat16-float32-hybrid-ema" for stage in ("zero1", "zero3")),
    *(f"{stage}-float32-float32-listed" for stage in ("zero1", "zero2", "zero3")),
    *(f"zero2-bfloat16-{sums}-listed" for sums in ("float32", "bfloat16")),
    *(f"{stage}-float32-float32-shared" for stage in ("zero2", "zero3")),
)
CASES = list(dict.fromkeys(_CASES))


def shared_config() -> Any:
    """Return a configuration whose feed-forward block has two places, and is the largest module."""
    config = config_of("zamba2")
    config.intermediate_size = 512
    return config


# random models of these configurations
FAMILIES: dict[str, Callable[[], Any]] = {
    "experts": lambda: config_of("gpt_oss"),
    "hybrid": lambda: config_of("lfm2"),
    "shared": shared_config,
    "towers": gemma_config,
    # a plan sees which experts a forward calls where the data do not choose them
    "listed": lambda: listed_experts.ListedConfig(
        **{**SIZES, "vocab_size": 512, "by_place": True, "auto_map": listed_experts.PLACES}
    ),
}
KEYS = {
    "adapter": "adapter={rank: 4, modules_to_save: [lm_head]}",
    "nf4": "adapter={rank: 4, base: nf4_double_quant}",
    "int8": "adapter={rank: 4, base: int8}",
    "ema": "optim.ema_decay=0.9",
} | {kind: f"optim.kind={kind}" for kind in MOMENTS}
KEYS["adamw_bf16"] = "optim.state_dtype=bf16"
PARTS = ("weights", "gradients", "masters", "moments", "shared")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the bytes of each rank's buffers and the planner's number, by case and part."""
    out = tmp_path_factory.mktemp("planner")
    for family, config in FAMILIES.items():
        shutil.copytree(ROOT / "recipes" / "debug" / "model", out / family)
        config().save_pretrained(out / family)
        shutil.copy(listed_experts.__file__, out / family)
    run_ranks(WORLD, ["-m", "tests.numerics.test_memory", str(out)], timeout_s=600)
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_deepspeeds_own_bytes(found: dict[str, Any], name: str, part: str) -> None:
    """The plan is of the fullest rank."""
    assert found[name][part]["planned"] == max(found[name][part]["held"]), found[name][part]


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_a_checkpoints_own_bytes(found: dict[str, Any], name: str) -> None:
    """What all ranks together write, and what the room for it is asked by."""
    seen = found[name]["checkpoint"]
    assert seen["planned"] == seen["written"] == seen["asked"]


@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch_does_not_wait_for_the_device(found: dict[str, Any], name: str) -> None:
    """DeepSpeed synchronizes with it as often in a step of three micro-batches as in one of one."""
    one, three = found[name]["synchronizations"]
    assert three == one


@pytest.mark.parametrize("name", [name for name in CASES if "_streamed" in name])
@pytest.mark.parametrize("part", ["room", "moved"])
def test_the_plan_is_what_a_streamed_state_takes_and_moves(
    found: dict[str, Any], name: str, part: str
) -> None:
    """Room on the GPU, and bytes of a step between it and the host."""
    assert found[name][part]["planned"] == max(found[name][part]["held"]) > 0


_WAIT = ("zero3", "listed", "shared")


@pytest.mark.parametrize("name", [n for n in CASES if any(word in n for word in _WAIT)])
def test_the_plan_is_what_waits_to_be_reduced(found: dict[str, Any], name: str) -> None:
    """All gradients at stages 1 and 2, where a module calls a part of a list of modules; those of a
    layer at 3, but of one parameter where it has another place, too."""
    assert found[name]["waiting"]["planned"] == max(found[name]["waiting"]["held"]) > 0


def waiting(engine: Any, model: Any, config: Any) -> dict[str, Any]:
    """Return the bytes of gradients that wait, where one is reduced, counted and planned."""
    from packhorse.trainer import dist
    from packhorse.trainer.data.loader import filler_batch
    from packhorse.trainer.estimate.memory import waiting_gradients
    from packhorse.trainer.metrics import Clock

    optimizer = engine._optimizer
    held, seen = [0], set[Any]()
    reduce = getattr(optimizer, "reduce_ready_partitions_and_remove_grads", None)
    if not reduce:
        return {}

    def look(parameter: Any, *group: Any) -> None:
        leaf = getattr(parameter, "ds_z3_leaf_module", None)
        whole = leaf if engine.stage == 3 else engine.module
        if whole is None or whole not in seen:  # else some of its gradients lie in a bucket
            seen.add(whole)
            parameters = [parameter] if whole is None else whole.parameters()
            held.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
        reduce(parameter, *group)

    with mock.patch.object(optimizer, "reduce_ready_partitions_and_remove_grads", look):
        engine.step([filler_batch(tokens=64)], 1e-3, Clock(dist.device()))
    planned = waiting_gradients(model, config)
    return {"waiting": {"held": dist.gather(max(held)), "planned": planned}}


def streamed(engine: Any, model: Any, config: Any) -> dict[str, Any]:
    """Return the room and the copied bytes of a step, counted and planned; {} where all is on the
    device.
    """
    from packhorse.trainer import dist
    from packhorse.trainer.data.loader import filler_batch
    from packhorse.trainer.engine import streamed_adamw, zero_state
    from packhorse.trainer.estimate.state import masters_of_groups
    from packhorse.trainer.estimate.traffic import step_traffic
    from packhorse.trainer.metrics import Clock

    base = zero_state._base(engine._engine.optimizer)
    if not isinstance(base, streamed_adamw.StreamedAdamW):
        return {}
    copy, moved = streamed_adamw._copy, []

    def counted(to: Any, source: Any) -> None:
        moved.append(sum(tensor.nbytes for tensor in to))
        copy(to, source)

    with mock.patch.object(streamed_adamw, "_copy", counted):
        engine.step([filler_batch()], 1e-3, Clock(dist.device()))
    masters = masters_of_groups(model, engine.stage, WORLD)
    room = streamed_adamw.room_for_chunks(masters)
    return {
        "moved": {
            "held": dist.gather(sum(moved)),
            "planned": step_traffic(model, config, WORLD, 1).host,
        },
        "room": {"held": dist.gather(base._chunks._room.nbytes), "planned": room},
    }


def synchronizations(engine: Any, micro_batches: int) -> int:
    """Return how often DeepSpeed waits for the whole device in a step."""
    from deepspeed.accelerator import get_accelerator

    from packhorse.trainer import dist
    from packhorse.trainer.data.loader import filler_batch
    from packhorse.trainer.metrics import Clock

    with mock.patch.object(get_accelerator(), "synchronize") as synchronize:
        engine.step([filler_batch()] * micro_batches, 1e-3, Clock(dist.device()))
    return synchronize.call_count


def main(out: Path) -> None:
    """Build an engine of every case on each rank, and run one micro-batch and one step."""
    from packhorse.trainer import dist
    from packhorse.trainer.build_engine import build_engine
    from packhorse.trainer.data.loader import filler_batch
    from packhorse.trainer.estimate.memory import disk_needed
    from packhorse.trainer.estimate.model import build_empty_model, measure_model
    from packhorse.trainer.estimate.report import fill_template
    from packhorse.trainer.estimate.state import count_state_bytes
    from packhorse.trainer.model.load import load_tokenizer
    from tests.numerics import buffers
    from tests.numerics.cases import load_recipe

    found: dict[str, Any] = {}
    with dist.process_group():
        for name in CASES:
            stage, dtype, grad_dtype, *changed = name.split("-")
            recipe = load_recipe(
                ROOT / "recipes" / "debug.yaml",
                [
                    f"run.dir={out}",
                    "model.trust_remote_code=true",
                    f"parallel.deepspeed={stage}",
                    f"model.dtype={dtype}",
                    f"parallel.grad_dtype={grad_dtype}",
                    *(KEYS.get(change, f"model.name={out / change}") for change in changed),
                ],
            )
            engine = build_engine(recipe, out, load_tokenizer(recipe.model))
            held = buffers.held(engine, filler_batch())
            empty = build_empty_model(recipe.model, recipe.adapter)
            model = measure_model(empty, recipe.optim, recipe.adapter)
            config = fill_template(recipe, recipe.parallel.deepspeed, model.hidden)
            state = count_state_bytes(model, config, WORLD)
            planned = {part: getattr(state, part) for part in PARTS} | {
                "weights": state.weights + state.persistent
            }
            of_ranks = dist.gather(held)
            found[name] = {
                part: {"held": [h[part] for h in of_ranks], "planned": planned[part]}
                for part in PARTS
            } | {"synchronizations": [synchronizations(engine, count) for count in (1, 3)]}
            found[name] |= streamed(engine, model, config) | waiting(engine, model, config)
            written = sum(
                tensor.nbytes
                for group in engine.state.slices()
                for piece in group
                for tensor in piece.states.values()
            )
            found[name]["checkpoint"] = {
                "planned": disk_needed(model, keep=1).checkpoint,
                "written": sum(dist.gather(written)),
                "asked": engine.state.bytes(),
            }
    if dist.is_main():
        (out / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    import os

    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
