"""Write a checkpoint in DeepSpeed's universal form, for other programs on DeepSpeed.

Packhorse itself never reads it.

    out/
      latest_universal
      step-000200/
        zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt
        zero/optimizer_state.pt
        mp_rank_00_model_states.pt                  read at ZeRO stages 1 and 2
        zero_pp_rank_0_mp_rank_00_model_states.pt   read at stage 3

Parameters have the names of the Hugging Face model. A program loads it with
`{"checkpoint": {"load_universal": true}}` and `engine.load_checkpoint(out)`. Hyperparameters are
the program's own: none are written, since DeepSpeed at stage 3 would give every parameter group
those of the first.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from packhorse.trainer import dist
from packhorse.trainer.checkpoint.export_folder import open_for_export, run_recipe
from packhorse.trainer.checkpoint.manifest import folder_name
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.engine.moments import MOMENTS
from packhorse.trainer.engine.sharded_state import WEIGHT
from packhorse.trainer.utils import own_output
from packhorse.trainer.utils.progress import track

_GROUPS = 16  # parameter groups that a program may have: DeepSpeed loads as many as it finds here
_FILES = {"fp32": WEIGHT, **{name: name for name in MOMENTS["adamw"]}}  # DeepSpeed's names: ours


def export_universal(
    run_dir: Path, out: Path, step: int | None = None, *, overwrite: bool = False
) -> Path:
    """Write a checkpoint to `out`, one tensor at a time; the newest whole one, or that of `step`.

    Another optimizer than AdamW is refused, and what `open_for_export` refuses.
    """
    recipe = run_recipe(run_dir)
    if recipe.optim.kind != "adamw":
        raise BadInput(
            f"{run_dir}: DeepSpeed's universal form has AdamW's states, and the run's optim.kind "
            f"is {recipe.optim.kind}; export it without --universal"
        )
    saved, manifest = open_for_export(run_dir, recipe, out, step, overwrite=overwrite)
    step = manifest.state.step
    tag = folder_name(step)
    folder = own_output.stage(out)
    zero = folder / tag / "zero"
    zero.mkdir(parents=True)

    # AdamW's count of updates, which bias correction needs: without it the moments of a resumed
    # run would be taken for those of a first step
    updates = torch.tensor(float(manifest.state.updates))
    trained = manifest.trained
    buffers = [name for name in saved.names if name not in trained]
    parameters = [name for name in saved.names if name in trained]
    for name in track(parameters, "writing", len(parameters), "weights"):
        (zero / name).mkdir()
        for file, state in _FILES.items():
            content = {"param": saved.whole(name, state), "cat_dim": 0}
            torch.save(content, zero / name / f"{file}.pt")
        torch.save(updates, zero / name / "step.pt")
    common = {
        "param_groups": [{"params": []} for _ in range(_GROUPS)],
        "state": {0: {"step": updates}},
        "ds_version": version("deepspeed"),
    }
    torch.save({**common, "optimizer_state_dict": common}, zero / "optimizer_state.pt")
    model_states = {
        "module": {name: saved.whole(name) for name in buffers},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": step,
        "skipped_steps": 0,
        "ds_version": version("deepspeed"),
    }
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(model_states, folder / tag / name)
    (folder / "latest_universal").write_text(tag)
    facts = {"kind": "universal checkpoint", "step": step, "run": run_dir.name}
    own_output.publish(out, facts, overwrite=overwrite)
    dist.log.info("exported step %d to %s, not loaded back", step, out)
    return out
