"""`packhorse eval` and `packhorse compare`: score any model with the code that scores it in
training, and say whether two of them differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.cli.arguments import Overrides, RecipeFile
from trainer.cli.worker import end_with_the_launcher, end_worker, is_worker, stop_while_starting
from trainer.datatypes import DONE, BadInput
from trainer.utils.files import local_folder

if TYPE_CHECKING:
    from trainer.config.recipe import Recipe

_EVALUATED = "evaluated.json"  # of a results folder: what was scored


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder or a hub name."),
    ],
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Of a run. Default: its last checkpoint.", show_default=False),
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="A run's best step, by its own eval.best.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder to write. Default: in RUN/evals, or in evals here.", show_default=False
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on this machine. Default: one for each GPU, or one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Score a checkpoint, an export or a hub model on the recipe's held-out rows, with the code
    that training uses.

    [bold]packhorse eval runs/quickstart recipes/quickstart.yaml --best[/bold]
    [bold]packhorse eval HuggingFaceTB/SmolLM2-135M-Instruct recipes/quickstart.yaml
    eval.generate.num_prompts=256[/bold] [bold]packhorse eval models/word-problems
    recipes/quickstart.yaml eval.lm_eval='[gsm8k]' --nproc 1[/bold]

    Exit codes are those of `packhorse train`; 75: stopped, and the same command starts anew.
    """
    from trainer.config.recipe import load_recipe

    if is_worker():
        end_with_the_launcher()
        from trainer.evaluate import evaluate_model

        if out is None or step is None:
            raise BadInput("packhorse eval starts its own processes: run it without torchrun")
        evaluate_model(load_recipe(recipe_file, overrides or ()), out, step)
        end_worker()
    stop_while_starting()
    recipe = load_recipe(recipe_file, overrides or ())
    if not recipe.has_eval:
        raise BadInput(
            f"{recipe_file}: no rows are held out to evaluate; give data.eval or data.eval_fraction"
        )
    tasks = None
    if recipe.eval.lm_eval:
        from trainer.eval.lm_eval_harness import require_tasks

        tasks = require_tasks(recipe.eval)
    run = _run_folder(model, step, best)
    step = _step_of(run, step, best) if run else 0
    out = out or _default_out(model, run, recipe_file, step)
    _start_results(out, model, step)
    with _model_folder(model, run, step, out) as name:
        # what is the model's own comes from it, and may still be overridden
        own = ["model.revision=null", "model.init=pretrained", "adapter=null"]
        if run:
            own += ["model.chat_template=null", "model.add_tokens=[]"]  # they are in its folder
        changes = [*own, *(overrides or ()), f"model.name={json.dumps(name)}"]
        code = _score(
            load_recipe(recipe_file, changes), recipe_file, changes, out, step, nproc, tasks
        )
    if code == DONE:
        from rich.console import Console

        from trainer.eval.compare import read_results, table_of_one

        Console().print(table_of_one(read_results(str(out))))
        print(out)
    raise typer.Exit(code)


def _score(
    recipe: Recipe,
    recipe_file: Path,
    changes: list[str],
    out: Path,
    step: int,
    nproc: int | None,
    tasks: Any,
) -> int:
    """Run the workers, then the harness's tasks, where there are some. Returns the exit code."""
    from launch.local import launch

    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    given = [recipe.model.name, str(recipe_file), *changes, "--out", str(out), "--step", str(step)]
    code = launch(["-m", "trainer.cli.main", "eval", *given], out, nproc=nproc)
    if code == DONE and tasks:
        from trainer.eval.lm_eval_harness import run_tasks

        run_tasks(recipe, out, tasks)
    return code


def _run_folder(model: str, step: int | None, best: bool) -> Path | None:
    """The run folder that is named, None where it is a model.

    Raises:
        BadInput: it is neither.
    """
    folder = Path(model).expanduser()
    if (folder / "recipe.yaml").is_file() and not (folder / _EVALUATED).is_file():
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


def chosen_step(run: Path, step: int | None, best: bool) -> int | None:
    """The step that is asked for; None: the last one.

    Raises:
        BadInput: both are given, or the run has no best step.
    """
    if best and step is not None:
        raise BadInput("--best and --step: give one of them")
    if not best:
        return step
    from trainer.checkpoint.best import best_step

    return best_step(run)


def _default_out(model: str, run: Path | None, recipe_file: Path, step: int) -> Path:
    if run:
        return run / "evals" / f"{recipe_file.stem}-step-{step:06d}"
    folder = Path(model).expanduser()
    name = folder.resolve().name if folder.is_dir() else model.replace("/", "--")
    return Path("evals") / f"{name}-{recipe_file.stem}"


@contextmanager
def _model_folder(model: str, run: Path | None, step: int, out: Path) -> Iterator[str]:
    """The name of the model to score; a run's checkpoint is exported into `out` until the block is
    left.
    """
    if run is None:
        yield model
        return
    from trainer.checkpoint.hf_export import export
    from trainer.config.recipe import load_recipe

    exported = out / "exported"
    try:
        export(run, exported, step, merge=load_recipe(run / "recipe.yaml").adapter is not None)
        yield str(exported)
    finally:
        shutil.rmtree(exported, ignore_errors=True)


def _step_of(run: Path, step: int | None, best: bool) -> int:
    """The step of a run that is asked for, or its last."""
    from trainer.checkpoint import checkpoint

    chosen = chosen_step(run, step, best)
    if chosen is not None:
        return chosen
    found = checkpoint.find(run)
    if found is None:
        raise BadInput(f"{run}: there is no checkpoint to evaluate; train first")
    return found[1].state.step


def _start_results(out: Path, model: str, step: int) -> None:
    """An empty results folder; an earlier one there is replaced."""
    if out.exists() and not (out / _EVALUATED).is_file():
        raise BadInput(f"{out}: exists and holds no results of packhorse eval; give another --out")
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / _EVALUATED).write_text(
            json.dumps({"model": model, "step": step}) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error})") from None


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A run folder, or results of packhorse eval.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, or another step of it.")],
) -> None:
    """Say whether two evaluations differ: each metric with its interval, and a paired test on the
    prompts of both.

    [bold]packhorse compare runs/a runs/b[/bold]
    [bold]packhorse compare runs/a@10 runs/a@best[/bold]
    [bold]packhorse compare runs/a/evals/gsm8k-step-000200 evals/base-gsm8k[/bold]

    A step is named as RUN@200 or RUN@best; without one the last evaluated step is taken.
    """
    from rich.console import Console

    from trainer.eval.compare import read_results, table_of_two

    Console().print(table_of_two(read_results(a), read_results(b)))
