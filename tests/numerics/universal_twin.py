"""A program on DeepSpeed that knows nothing of packhorse's checkpoints: loads a universal one, and
tells its digests.

python -m tests.numerics.universal_twin MODEL FOLDER STAGE OUT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.trainer import dist
from packhorse.trainer.engine import zero_state
from packhorse.trainer.engine.engine import deepspeed
from packhorse.trainer.engine.sharded_state import Digests, add_digests, digests_of


def main(model_folder: str, folder: str, stage: str, out: str) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 100},
        "checkpoint": {"load_universal": True},
    }
    with dist.process_group():
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(model_folder))
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": others, "weight_decay": 0.0}], fused=True
        )
        for own in optimizer.param_groups:
            own["kind"] = "adamw"  # by which zero_state knows the moments
        engine: Any
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        engine.load_checkpoint(folder)
        found: Digests = {}
        for group in zero_state.read(
            engine.optimizer, {id(p): name for name, p in model.named_parameters()}
        ):
            add_digests(found, digests_of(group))
        total: Digests = {}
        for share in dist.gather(list(found.items())):
            add_digests(total, {(name, key): value for (name, key), value in share})
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        if dist.is_main():
            digests = {"\t".join(key): value for key, value in total.items()}
            Path(out).write_text(json.dumps({"digests": digests, "decays": decays}))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # DeepSpeed leaves threads behind that now and then abort a process at its very end
