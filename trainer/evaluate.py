"""Score a model on held-out rows as training does: the workers of `packhorse eval` run this.

recipe -> tokenizer -> held-out data -> process group -> model -> packing check -> Evaluation

There is no plan, no optimizer and no loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packhorse.trainer import dist
from packhorse.trainer.build_engine import (
    build_engine,
    explain_out_of_memory,
    open_metrics,
    require_same_data,
)
from packhorse.trainer.checkpoint.hf_export import save_description
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.data.prepare import masker_of, prepare
from packhorse.trainer.eval.evaluator import Evaluation
from packhorse.trainer.eval.generate import stop_tokens
from packhorse.trainer.hang_watchdog import Watch
from packhorse.trainer.model.load import load_tokenizer
from packhorse.trainer.run_folder import write_stop
from packhorse.trainer.stop_flag import StopFlag
from packhorse.trainer.trackers import Trackers
from packhorse.trainer.utils.staged_build import Stopped


def evaluate_model(recipe: Recipe, out: Path, step: int) -> None:
    """Evaluate the recipe's model once. Every rank calls it.

    Writes evaluations.jsonl, samples.jsonl and metrics.jsonl into the folder `out`.

    Args:
        step: the checkpoint's step, under which the results are recorded; 0 without a checkpoint.
    """
    dist.start_logging()
    stop = StopFlag()
    tokenizer = load_tokenizer(recipe.model)
    try:
        data = prepare(recipe, tokenizer, "eval", stop.raised_early)
        if not stop.wait_for_ranks():
            raise Stopped("stopped before all ranks were ready")
    except Stopped:
        write_stop(out, 0)
        return
    with dist.process_group():
        stop.attach_group()
        require_same_data(data)
        with explain_out_of_memory("the model"):
            engine = build_engine(recipe, out, tokenizer, learns=False)
        model: Any = engine.module.model
        masker = masker_of(recipe.data, tokenizer)
        model.generation_config.eos_token_id = stop_tokens(model, masker.stop_token_ids)
        if recipe.eval.by_server and dist.is_main():
            # a part of the folder that the server loads
            save_description(model, tokenizer, recipe.model, out)
        with Watch(recipe.guard, out) as watch:
            metrics = open_metrics(recipe, out, engine, watch, step, Trackers([]))
            evaluate = Evaluation(recipe, out, engine, data, masker, metrics, stop, watch)
            if not evaluate(step):
                write_stop(out, step)
            metrics.close()
