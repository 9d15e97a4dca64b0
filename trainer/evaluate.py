"""A model scored on held-out rows as a run scores it: what the workers of `packhorse eval` do.

recipe (its model is what is scored) -> tokenizer -> held-out data -> process group -> model ->
probe -> Evaluation

Read it beside train.py, whose parts it uses: there is no plan, no optimizer and no loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer import dist
from trainer.checkpoint.hf_export import save_description
from trainer.config.recipe import Recipe
from trainer.data.prepare import Prepared, masker_of, prepare
from trainer.eval.evaluator import Evaluation
from trainer.eval.generate import stop_tokens
from trainer.hang_watchdog import Watch
from trainer.metrics import Metrics, model_flops
from trainer.model.load import load_tokenizer
from trainer.run_folder import write_stop
from trainer.train import build_engine, out_of_memory_told, require_same_data
from trainer.utils.files import Stopped


def assess(recipe: Recipe, out: Path, step: int) -> None:
    """Evaluate once, into the folder `out`: evaluations.jsonl, samples.jsonl, metrics.jsonl. One
    call a rank.

    Args:
        step: of the checkpoint, under which the results are recorded; 0 where it is none.

    Raises:
        BadInput: the recipe, its model or its held-out data cannot be used.
    """
    dist.start_logging()
    stop = dist.StopFlag()
    tokenizer = load_tokenizer(recipe.model)
    try:
        data = prepare(recipe, tokenizer, "eval", stop.raised_early)
        if not stop.wait_for_ranks():
            raise Stopped("stopped before the ranks had met")
    except Stopped:
        write_stop(out, 0)
        return
    with dist.process_group():
        stop.attach_group()
        _evaluate(recipe, out, tokenizer, data, stop, step)


def _evaluate(
    recipe: Recipe, out: Path, tokenizer: Any, data: Prepared, stop: dist.StopFlag, step: int
) -> None:
    require_same_data(data)
    with out_of_memory_told("the model"):
        engine = build_engine(recipe, out, tokenizer, learns=False)
    model: Any = engine.module.model
    masker = masker_of(recipe.data, tokenizer)
    model.generation_config.eos_token_id = stop_tokens(
        model, masker.stop_token_ids
    )  # as in training
    if recipe.eval.generator != "engine" and dist.is_main():
        save_description(model, tokenizer, out)  # for the folder that a server is handed
    watch = Watch(recipe.guard, out)
    metrics = Metrics(
        out,
        log_every=1,
        seq_len=recipe.batch.seq_len,
        flops=model_flops(model),
        resumed_at=step,
        beat=watch.beat,
    )
    if not Evaluation(recipe, out, engine, data, masker, metrics, stop, watch)(step):
        write_stop(out, step)
    metrics.close()
