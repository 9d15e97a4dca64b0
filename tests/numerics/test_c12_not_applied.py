"""All ranks apply a step or none does, at every stage, also if one rank has a NaN (C12)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT, run_ranks

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload_optimizer", "zero3_offload_all")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By stage, what became of a second step with a NaN in the last rank's last micro-batch."""
    out = tmp_path_factory.mktemp("c12")
    run_ranks(2, ["-m", "tests.numerics.test_c12_not_applied", str(out)])
    return json.loads((out / "outcomes.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_is_a_step_that_no_rank_applies(
    outcomes: dict[str, Any], stage: str
) -> None:
    seen = outcomes[stage]
    assert seen["before"] == [None, None], "the first step is applied"
    assert seen["skipped"] == ["the gradient norm is not finite"] * 2, "both ranks know"
    assert seen["norms"] == ["nan", "nan"]
    assert seen["weights_moved"] == [False, False]


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_names_its_rows_and_is_not_counted(outcomes: dict[str, Any], stage: str) -> None:
    assert "train.jsonl:" in outcomes[stage]["message"]
    assert outcomes[stage]["logged_steps"] == [1]


def main(out: Path) -> None:
    """Run a good step and one with a NaN through the loop on each rank, stage after stage."""
    from packhorse.trainer import dist, guard, run_folder, train
    from packhorse.trainer.engine.engine import Engine
    from packhorse.trainer.model.load import load_tokenizer
    from packhorse.trainer.stop_flag import StopFlag
    from packhorse.trainer.trackers import Trackers
    from tests.numerics.cases import load_recipe, prepare, train_plan

    real_step = Engine.step
    seen: dict[str, Any] = {}

    def step(self: Any, batches: list[Any], *args: Any) -> Any:
        first = "before" not in seen
        if not first and dist.rank() == 1:
            last = batches[-1]
            nan = float("nan")
            batches = [*batches[:-1], replace(last, weights=last.weights * nan)]
        weights = _weights(self)
        result = real_step(self, batches, *args)
        if first:
            seen["before"] = dist.gather(result.skipped)
        else:
            seen["skipped"] = dist.gather(result.skipped)
            seen["norms"] = dist.gather(str(result.grad_norm))
            seen["weights_moved"] = dist.gather(_weights(self) != weights)
        return result

    def _weights(engine: Any) -> list[float]:
        from packhorse.trainer.engine.engine import gathered

        parameters = list(engine.module.parameters())
        with gathered(parameters):
            return [float(p.detach().double().sum()) for p in parameters]

    Engine.step = step  # type: ignore[method-assign]
    outcomes = {}
    with dist.process_group():
        stop = StopFlag()
        stop.attach_group()
        for stage in STAGES:
            run_dir = out / stage
            recipe = load_recipe(
                ROOT / "recipes" / "debug.yaml",
                [
                    f"run.dir={run_dir}",
                    f"parallel.deepspeed={stage}",
                    f"data.cache={out}/cache",
                    "eval.generate=null",
                    "data.eval=[]",
                ],
            )
            if dist.is_main():
                run_folder.open_run_folder(recipe, run_dir)
            dist.barrier()
            tokenizer = load_tokenizer(recipe.model)
            data = prepare(recipe, tokenizer, "train")
            seen.clear()
            try:
                prepared = (tokenizer, data, train_plan(recipe, data), None)
                train.fit(train.PreparedRun(recipe, run_dir, *prepared, stop, Trackers([])))
            except guard.StepNotApplied as error:
                seen["message"] = str(error)
            if dist.is_main():
                lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
                seen["logged_steps"] = [line["step"] for line in lines]
            outcomes[stage] = dict(seen)
    if dist.is_main():
        (out / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    import os

    main(Path(sys.argv[1]))
    os._exit(0)
