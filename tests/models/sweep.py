"""Train every causal architecture of the installed transformers, tiny, and compare with PyTorch.

    python -m tests.models.sweep RESULTS.json [MODEL_TYPE ...]

Without names it goes on with those that RESULTS.json does not have yet.

For each `model_type`: a random model (shrunk.py) is saved, loaded and proved as a run does it, and
trained for three steps of packed documents at ZeRO 0 and 3. The same steps run in plain PyTorch,
one document at a time, through the model's own eager attention. Losses and weights are compared;
the export is loaded into transformers and its logits are compared, too. One process tries many: a
start takes longer than a model.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from packhorse.trainer import build_engine, dist
from packhorse.trainer.checkpoint.export_folder import describe
from packhorse.trainer.checkpoint.hf_export import export, save_description
from packhorse.trainer.checkpoint.manifest import RunState
from packhorse.trainer.checkpoint.saver import Saver
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine import engine as engines
from packhorse.trainer.engine.optim import parameter_groups
from packhorse.trainer.metrics import Clock, model_flops
from packhorse.trainer.model.load import load_tokenizer, model_class
from packhorse.trainer.model.packing_check import Proof, prove_packing
from packhorse.trainer.utils.text import one_line
from tests.model_helpers import documents, pack
from tests.models.shrunk import NOT_TRIED, VOCABULARY, config_of
from tests.ranks import ROOT

LENGTHS = (24, 40, 9, 12)  # of a step's documents; the second is longer than windows and chunks
STEPS = 3
LR, MAX_GRAD_NORM = 1e-3, 1.0
# Largest relative differences that are rounding: of a step's loss, of a tensor's change in
# training, and of the export's logits. A defect is ten times as much and more.
BOUNDS = {"losses": 1e-6, "weights": 1e-3, "logits": 1e-4}


# Of no causal class in transformers: models with towers whose text is trained.
WITH_TOWERS = ("mistral3", "qwen3_vl", "qwen3_vl_moe")


def try_model(name: str, root: Path) -> dict[str, Any]:
    """Return how a `model_type` works, in the words of table.py, and how exactly."""
    if name in NOT_TRIED:
        return {"works": "not tried", "why": NOT_TRIED[name]}
    folder = root / "source"
    failed = None
    if dist.is_main():
        try:
            _save_random(name, folder)
        except Exception as error:
            failed = _describe(error)
    if failed := dist.broadcast(failed):
        return {"works": "not built", "why": failed}
    result: dict[str, Any] = {}
    try:
        for stage in (0, 3):
            result |= _train_and_compare(folder, root / f"zero{stage}", stage)
    except BadInput as error:
        return {**result, "works": "refused", "why": one_line(error, 400).replace(f"{root}/", "")}
    except Exception as error:
        return {**result, "works": "crashed", "crash": _describe(error)}
    return result


def _save_random(name: str, folder: Path) -> None:
    """Save a random model of this kind, with the debug recipe's tokenizer."""
    torch.manual_seed(0)
    config = config_of(name)
    model = model_class(config).from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for path in (ROOT / "recipes" / "debug" / "model").glob("token*"):
        shutil.copy(path, folder)


def _recipe(folder: Path, run_dir: Path, stage: int) -> Recipe:
    settings = [
        f"model.name={folder}",
        "model.init=pretrained",
        f"run.dir={run_dir}",
        f"parallel.deepspeed=zero{stage}",
        "checkpoint.asynchronous=false",
        f"optim.lr={LR}",
        f"optim.max_grad_norm={MAX_GRAD_NORM}",
        "optim.eps=1e-3",
        "loss.neftune_alpha=0",
        "eval.every_steps=null",
        "eval.generate=null",
    ]
    return load_recipe(ROOT / "recipes" / "debug.yaml", settings)


def _train_and_compare(folder: Path, run_dir: Path, stage: int) -> dict[str, Any]:
    recipe = _recipe(folder, run_dir, stage)
    if dist.is_main():
        run_dir.mkdir()
        (run_dir / "recipe.yaml").write_text(recipe.to_yaml())
    tokenizer = load_tokenizer(recipe.model)
    engines.deepspeed.zero.Init.param_id = 0  # as in a process of its own
    proofs: list[Proof] = []

    def proved(*args: Any, **kwargs: Any) -> Proof:
        proofs.append(prove_packing(*args, **kwargs))
        return proofs[-1]

    with mock.patch.object(build_engine, "prove_packing", proved):
        engine = build_engine.build_engine(recipe, run_dir, tokenizer)
    model_flops(engine.module.model)
    steps = [documents(LENGTHS, VOCABULARY, seed) for seed in range(STEPS)]
    losses = []
    for ids in steps:
        weight = 1 / sum(len(d) - 1 for d in ids)
        batches = [
            pack(group, [range(len(d) - 1) for d in group], [weight] * len(group))
            for group in (ids[:3], ids[3:])
        ]
        done = engine.step(batches[dist.rank() :: dist.world_size()], LR, Clock(dist.device()))
        assert done.skipped is None
        losses += dist.sum_over_ranks([float(done.loss)])
    if dist.is_main():
        save_description(engine.module.model, tokenizer, recipe.model, run_dir)
    description = describe(run_dir, recipe) if dist.is_main() else None
    with Saver(run_dir, engine, recipe.checkpoint, None, description) as saver:
        saver.save(RunState(STEPS, STEPS, "", 1, losses, 1, stage))
    outcome, failure = None, None
    if dist.is_main():
        # an export is a command of one process
        with mock.patch.object(dist, "world_size", return_value=1):
            try:
                out = export(run_dir, run_dir / "export")
                outcome = _compare_with_plain(folder, out, recipe, steps, losses)
            except Exception as error:
                failure = error
    if dist.broadcast(failure is not None):  # so that all ranks go on alike
        raise failure or RuntimeError("rank 0 says why")
    by_itself, mixers = proofs[0].by_itself, ", ".join(proofs[0].by_document)
    works = "by document" if by_itself else "packed"
    return {"works": works, "why": by_itself or mixers, f"zero{stage}": dist.broadcast(outcome)}


def _compare_with_plain(
    folder: Path, out: Path, recipe: Recipe, steps: list[list[torch.Tensor]], losses: list[float]
) -> dict[str, float]:
    from transformers import AutoConfig

    cls = model_class(AutoConfig.from_pretrained(folder))
    plain, before, ours = (
        cls.from_pretrained(f, dtype=torch.float32, attn_implementation="eager")
        for f in (folder, folder, out)
    )
    own_losses = _train_plainly(plain, recipe, steps)
    start, trained = before.state_dict(), ours.state_dict()
    moved = {
        n: (w - start[n]).norm() for n, w in plain.state_dict().items() if w.is_floating_point()
    }
    largest = float(max(moved.values()))
    # fp32 rounds each update by 1e-7 of the weight, which is 1e-3 of a change that small
    off = {
        n: float((trained[n] - w).norm())
        / max(float(moved[n]), 1e-3 * largest, 1e-4 * float(w.norm()))
        for n, w in plain.state_dict().items()
        if n in moved
    }
    worst = max(off, key=lambda n: off[n])
    ids = steps[0][0].unsqueeze(0)
    with torch.no_grad():
        a, b = (m.eval()(input_ids=ids, use_cache=False).logits for m in (ours, plain))
    return {
        "losses": max(abs(x - y) / abs(y) for x, y in zip(losses, own_losses)),
        "weights": off[worst],
        "worst": worst,
        "logits": float((a - b).norm() / b.norm()),
    }


def _train_plainly(model: Any, recipe: Recipe, steps: list[list[torch.Tensor]]) -> list[float]:
    """Train as a reader would write it, each document alone, and return the losses."""
    groups = parameter_groups(model, recipe.optim)
    optim = recipe.optim
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=optim.betas, eps=optim.eps)
    losses = []
    model.train()
    for ids in steps:
        total = sum(len(d) - 1 for d in ids)
        optimizer.zero_grad()
        loss = 0.0
        for d in ids:
            logits = model(input_ids=d.unsqueeze(0), use_cache=False).logits[0, :-1]
            share = F.cross_entropy(logits, d[1:], reduction="sum") / total
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss)
    return losses


def _describe(error: BaseException) -> str:
    """Return an error in a line, with the last place in our code and the place where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/trainer/" in frame.filename][-1:]
    places = [
        f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno}"
        for f in (*own, frames[-1])
    ]
    return f"{type(error).__name__}: {one_line(error, 200)} ({', '.join(places)})"


def main(path: str, names: list[str]) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.log.setLevel("ERROR")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {name: {"works": "not run"} for name in (*KNOWN, *WITH_TOWERS)}
    if Path(path).is_file():
        results |= json.loads(Path(path).read_text())
    with dist.process_group():
        for name in names or [n for n, seen in results.items() if seen["works"] == "not run"]:
            root = Path(dist.broadcast(tempfile.mkdtemp() if dist.is_main() else None))
            results[name] = try_model(name, root)
            dist.barrier()
            if dist.is_main():
                shutil.rmtree(root)
                print(name, json.dumps(results[name]), flush=True)
                Path(path).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
