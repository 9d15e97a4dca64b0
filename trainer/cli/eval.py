"""Define `packhorse eval` and `packhorse compare`.

`eval` scores any model with the code that scores it during training; `compare` tests whether two
evaluations differ.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packhorse.launch.cluster_env import refuse_tasks
from packhorse.trainer.cli.arguments import (
    Best,
    Ema,
    NumProcesses,
    Overrides,
    RecipeFile,
    Step,
    TrustRun,
    read_recipe,
)
from packhorse.trainer.cli.worker import (
    exit_on_early_signals,
    exit_with_launcher,
    exit_worker,
    is_worker,
)
from packhorse.trainer.datatypes import DONE, EVALUATED, BadInput
from packhorse.trainer.utils.download import local_folder
from packhorse.trainer.utils.files import read_json_file, write_json
from packhorse.trainer.utils.own_output import remove_marked

if TYPE_CHECKING:
    from packhorse.trainer.config.recipe import Recipe

# These keys describe how the recipe's model was made. The scored model brings its own.
_OWN = ("model.revision=null", "model.init=pretrained", "model.rope_scaling=null", "adapter=null")
_EXPORTED = ("model.chat_template=null", "model.add_tokens=[]")  # they are in the exported folder


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder or a hub name."),
    ],
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    step: Step = None,
    best: Best = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write. Default: RUN/evals/... for a run, else evals/..."),
    ] = None,
    nproc: NumProcesses = None,
    ema: Ema = False,
    trust_run: TrustRun = False,
) -> None:
    """Evaluate a checkpoint, an export or a hub model on the held-out rows.

    [bold]packhorse eval runs/quickstart recipe.yaml --best[/bold]
    [bold]packhorse eval HuggingFaceTB/SmolLM2-135M-Instruct my.yaml data.max_length=512[/bold]
    [bold]packhorse eval models/word-problems my.yaml eval.lm_eval='\\[gsm8k]' --nproc 1[/bold]

    The loss and the scores come from the code that evaluates during training. Exit codes are those
    of `packhorse train`; after 75 (stopped) the same command starts anew.
    """
    recipe = read_recipe(recipe_file, overrides)
    if is_worker():
        exit_with_launcher()
        from packhorse.trainer.evaluate import evaluate_model

        if out is None or step is None:
            raise BadInput("packhorse eval starts its own processes: run it without torchrun")
        evaluate_model(recipe, out, step)
        exit_worker()
    refuse_tasks(os.environ, nodes_given=True)  # nodes evaluate alone
    exit_on_early_signals()
    if not recipe.has_eval:
        raise BadInput(
            f"{recipe_file}: there are no held-out rows; give data.eval or data.eval_fraction"
        )
    run = find_run(model, step, best)
    if run:
        from packhorse.trainer.config.code_keys import require_trust

        require_trust(run, trusted=trust_run, recipe=recipe, recipe_file=recipe_file)
    tasks = _require_tasks(recipe)
    step = chosen_step(run, step, best) if run else 0
    if ema and not run:
        raise BadInput(f"{model}: --ema takes a run's averages, and this is no run folder")
    out = out or _default_out(model, run, recipe_file, step, ema)
    _start_results(out, f"{model} --ema" if ema else model, step)
    with exported_model(model, run, step, out, ema=ema) as name:
        own = _OWN + _EXPORTED * bool(run)
        changes = [*own, *(overrides or ()), f"model.name={json.dumps(name)}"]
        raise typer.Exit(_score(recipe_file, changes, out, step, nproc, tasks))


def _require_tasks(recipe: Recipe) -> Any:
    """Return the recipe's tasks of lm-evaluation-harness, or None if it has none."""
    if not recipe.eval.lm_eval:
        return None
    from packhorse.trainer.eval.lm_eval_harness import require_tasks

    return require_tasks(recipe.eval)


def _score(
    recipe_file: Path, changes: list[str], out: Path, step: int, nproc: int | None, tasks: Any
) -> int:
    """Run the workers, then the tasks if given; show the scores, and return the exit code."""
    from rich.console import Console

    from packhorse.launch.local import launch
    from packhorse.trainer.config.packaged import MAIN
    from packhorse.trainer.eval.compare import read_results, table_of_one

    recipe = read_recipe(recipe_file, changes)
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    arguments = ["--", recipe.model.name, str(recipe_file), *changes]  # a path may begin with `-`
    worker = [MAIN, "eval", f"--out={out}", f"--step={step}", *arguments]
    code = launch(worker, out, nproc=nproc)
    if code == DONE:
        if tasks:
            from packhorse.trainer.eval.lm_eval_harness import run_tasks

            run_tasks(recipe, out, tasks)
        Console().print(table_of_one(read_results(str(out))))
        print(out)
    return code


def find_run(model: str, step: int | None, best: bool) -> Path | None:
    """Return the run folder, or None if `model` is a model folder or a hub name.

    Raises:
        BadInput: it is none of them, or a step of a model is asked for.
    """
    folder = Path(model).expanduser()
    if (folder / "recipe.yaml").is_file() and not (folder / EVALUATED).is_file():
        return folder
    if folder.exists() and not (folder / "config.json").is_file():
        raise BadInput(
            f"{folder}: neither a run folder (no recipe.yaml) nor a model folder (no config.json)"
        )
    local_folder(model, "RUN_OR_MODEL")
    if best or step is not None:
        raise BadInput(
            f"{model}: --best and --step choose a checkpoint of a run, and this is no run folder"
        )
    return None


def resolve_step(run: Path, step: int | None, best: bool) -> int | None:
    """Return the step that --step or --best names, or None for the last one.

    Raises:
        BadInput: both are given, or the run has no best step.
    """
    if best and step is not None:
        raise BadInput("--best and --step: give one of them")
    if not best:
        return step
    from packhorse.trainer.checkpoint.best import best_step

    return best_step(run)


def chosen_step(run: Path, step: int | None, best: bool) -> int:
    """Return the step that --step or --best names, or that of the last checkpoint."""
    from packhorse.trainer.checkpoint import checkpoint

    chosen = resolve_step(run, step, best)
    if chosen is not None:
        return chosen
    found = checkpoint.find(run)
    if found is None:
        raise BadInput(f"{run}: there is no checkpoint yet; train first")
    return found[1].state.step


def _default_out(model: str, run: Path | None, recipe_file: Path, step: int, ema: bool) -> Path:
    if run:
        return run / "evals" / f"{recipe_file.stem}-step-{step:06d}{'-ema' * ema}"
    folder = Path(model).expanduser()
    name = folder.resolve().name if folder.is_dir() else model.replace("/", "--")
    return Path("evals") / f"{name}-{recipe_file.stem}"


@contextmanager
def exported_model(
    model: str, run: Path | None, step: int, out: Path, *, ema: bool = False
) -> Iterator[str]:
    """Give the name of the model to load. A run's checkpoint is exported into `out` meanwhile."""
    if run is None:
        yield model
        return
    from packhorse.trainer.checkpoint.hf_export import export

    exported = out / "exported"
    try:
        is_adapter = read_recipe(run / "recipe.yaml", None).adapter is not None
        export(run, exported, step, merge=is_adapter, ema=ema)
        yield str(exported)
    finally:
        shutil.rmtree(exported, ignore_errors=True)


def _start_results(out: Path, model: str, step: int) -> None:
    """Make an empty results folder; replace results of the same model and step, nothing else."""
    marker = out / EVALUATED
    if out.is_symlink() or (out.exists() and not marker.is_file()):
        raise BadInput(f"{out}: exists and holds no results of packhorse eval; give another --out")
    try:
        if out.exists():
            found = read_json_file(marker)
            scored, at = str(found.get("model")), found.get("step")
            if Path(scored).resolve() != Path(model).resolve() or at != step:
                raise BadInput(
                    f"{out}: holds the results of {scored} at step {at}; give another --out, or "
                    "remove it"
                )
            remove_marked(out, EVALUATED)
        out.mkdir(parents=True)
        write_json(marker, {"model": model, "step": step})
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error})") from None


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A run folder, or results of packhorse eval.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The same kind, to compare with A.")],
) -> None:
    """Compare two evaluations: each metric with its interval, and a paired test.

    [bold]packhorse compare runs/a runs/b[/bold]
    [bold]packhorse compare runs/a@10 runs/a@best[/bold]
    [bold]packhorse compare runs/a/evals/gsm8k-step-000200 evals/base-gsm8k[/bold]

    The test uses the prompts that both have answered. Evaluations of other held-out rows, or with
    another tokenizer, are refused. A step is named as RUN@200 or RUN@best;
    without one the last evaluated step counts.
    """
    from rich.console import Console

    from packhorse.trainer.eval.compare import read_results, table_of_two

    Console().print(table_of_two(read_results(a), read_results(b)))
