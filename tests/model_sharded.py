"""Load a model in shards on the ranks that run this, and print how it differs from a plain load.

python -m tests.model_sharded FOLDER ...    (under tests/ranks.py; contracts C4 and C5)
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import LossSection, ModelSection, OptimSection, ParallelSection
from packhorse.trainer.engine.ds_config import deepspeed_config
from packhorse.trainer.engine.engine import Engine, gathered, sharded_init
from packhorse.trainer.engine.optim import parameter_groups
from packhorse.trainer.metrics import Clock
from packhorse.trainer.model.load import load_model, load_tokenizer
from packhorse.trainer.model.packing_check import prove_packing
from packhorse.trainer.model.sft import SftModel
from packhorse.trainer.utils import progress
from tests import sharded_layers
from tests.model_helpers import documents, pack


def differences(plain: Any, sharded: Any) -> list[str]:
    """Return the names of tensors that are not bitwise the same."""
    names = []
    parameters = dict(plain.named_parameters())
    assert parameters.keys() == dict(sharded.named_parameters()).keys()
    for name, parameter in sharded.named_parameters():
        with gathered([parameter]):
            if not torch.equal(parameter.detach().cpu(), parameters[name].detach()):
                names.append(name)
    buffers = dict(plain.named_buffers())
    names += [
        name
        for name, b in sharded.named_buffers()
        if not (torch.equal(b, buffers[name]) and b.dtype == buffers[name].dtype)
    ]
    return names


CASES: dict[str, dict[str, Any]] = {
    "pretrained": {},
    "pretrained, bf16": {"dtype": "bfloat16"},
    "random": {"init": "random"},
    "added tokens": {"add_tokens": ["<|im_start|>", "<|im_end|>"], "chat_template": "chatml"},
}


def main(folders: list[str]) -> None:
    torch.set_num_threads(1)
    dist.start_logging()
    progress.LINE_EVERY_S = -1.0  # every line
    seen: dict[str, Any] = {}
    with dist.process_group():
        for folder, (case, changes) in itertools.product(folders, CASES.items()):
            section = ModelSection.model_validate({"name": folder, "dtype": "float32", **changes})
            parallel, optim = ParallelSection(deepspeed="zero3"), OptimSection()
            config = deepspeed_config(parallel, section, optim, 32, Path(folder))
            tokenizer = load_tokenizer(section)
            plain = load_model(section, tokenizer, seed=3)
            sharded = load_model(
                section,
                tokenizer,
                seed=3,
                sharded_init=partial(sharded_init, config),
                gathered=gathered,
            )
            found: dict[str, Any] = {
                "differ": differences(plain, sharded),
                "sharded": any(p.numel() == 0 for p in sharded.parameters()),
            }
            if section.dtype == "float32":
                found |= trained(plain, sharded, optim, config)
            seen[f"{Path(folder).name}, {case}"] = found
        config = deepspeed_config(
            parallel, section.model_copy(update={"dtype": "float32"}), optim, 32, Path(folder)
        )
        more = {
            "gradients": sharded_layers.gradient_differences(config),
            "verdicts": sharded_layers.verdicts(config),
        }
    if dist.is_main():
        print(json.dumps(seen), flush=True)
        print(json.dumps(more), flush=True)


def trained(
    plain: Any, sharded: Any, optim: OptimSection, config: dict[str, Any]
) -> dict[str, float]:
    """Return the losses of the engine before and after five steps, and of the plain model."""
    batch = pack(documents([9, 5], vocabulary=100), [[2, 3, 4], [1]], [0.25, 0.25])
    module = SftModel(sharded, LossSection(neftune_alpha=0.1), 0, torch.device("cpu"))
    engine = Engine(module, parameter_groups(module, optim), optim, config)
    proof = prove_packing(module, seq_len=64, one_document=False, seed=0)
    alone = SftModel(plain, LossSection(), 0, torch.device("cpu"))
    prove_packing(alone, seq_len=64, one_document=False, seed=0)
    before = float(engine.evaluate(batch))
    clock = Clock(torch.device("cpu"))
    for _ in range(5):
        engine.step([batch, batch], 3e-3, clock)
    return {
        "packing check": proof.hidden_difference,
        "loss": before,
        "plain loss": float(alone.eval()(batch)),
        "after": float(engine.evaluate(batch)),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed leaves threads behind that now and then abort a process at its very end
