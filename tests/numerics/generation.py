"""Generate answers with engines of many kinds, for their test; rank 0 prints them as JSON.

    python -m tests.numerics.generation ORDER.json      (under tests/ranks.py)

An order is {"folder", "recipe": overrides, "templates": of DeepSpeed, "traced": some of them,
"prompts", "stops", "max_new_tokens"}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from packhorse.trainer import dist
from packhorse.trainer.build_engine import build_engine
from packhorse.trainer.config.eval import GenerateSection
from packhorse.trainer.config.recipe import GuardSection, load_recipe
from packhorse.trainer.datatypes import Conversation, Prompt
from packhorse.trainer.engine import engine
from packhorse.trainer.eval import generate
from packhorse.trainer.hang_watchdog import Watch
from packhorse.trainer.metrics import Clock
from packhorse.trainer.model.load import load_tokenizer
from packhorse.trainer.stop_flag import StopFlag
from tests.model_helpers import documents, pack
from tests.ranks import ROOT

CHOICES = ("A", "B", "C", "yes and no")
SAMPLED = {"temperature": 0.8, "top_p": 0.9}


def main(path: str) -> None:
    torch.manual_seed(os.getpid())  # nothing may depend on the global generator
    dist.start_logging()
    dist.log.setLevel("WARNING")
    order = json.loads(Path(path).read_text())
    with dist.process_group():
        stop = StopFlag()
        stop.attach_group()
        watch = Watch(GuardSection(), Path(order["folder"]))
        seen: dict[str, Any] = {
            template: answers(order, template, stop, watch) for template in order["templates"]
        }
        for template in order["traced"]:
            seen[f"trace of {template}"] = traces(order, template, stop, watch)
    if dist.is_main():
        print(json.dumps(seen), flush=True)


def build(order: dict[str, Any], template: str) -> tuple[Any, Any]:
    recipe = load_recipe(
        ROOT / "recipes" / "debug.yaml",
        [
            f"parallel.deepspeed={template}",
            f"run.dir={order['folder']}/run",
            *order["recipe"],
        ],
    )
    tokenizer = load_tokenizer(recipe.model)
    built = build_engine(recipe, Path(recipe.run.dir), tokenizer)
    model: Any = built.module.model
    model.generation_config.eos_token_id = order["stops"]
    return built, tokenizer


def answers(order: dict[str, Any], template: str, stop: StopFlag, watch: Watch) -> dict[str, Any]:
    built, tokenizer = build(order, template)
    seeds = [dist.seed_from("test", number) for number in range(len(order["prompts"]))]

    def ids(prompts: list[list[int]], batch: int, **changes: Any) -> Any:
        values = {"max_new_tokens": order["max_new_tokens"], **changes}
        section = GenerateSection.model_validate(values)
        at_once = batch * (max(map(len, prompts)) + section.max_new_tokens)
        return generate.answer_ids(built, prompts, section, at_once, stop, watch, seeds=seeds)

    prompts = order["prompts"]
    with whole_seen(built) as whole:
        before = tensor_bytes()
        found = {"greedy": ids(prompts, 2), "sampled": ids(prompts, 2, **SAMPLED)}
        found["fewer prompts than ranks"] = ids(prompts[:1], 2)
        found["left behind"] = (tensor_bytes() - before) / weight_bytes(built)
    found["whole"] = all(whole)
    with gathering_never(), whole_seen(built) as whole:
        found["greedy, by layers"] = ids(prompts, 2)
        found["sampled, by layers"] = ids(prompts, 3, **SAMPLED)
        found["fewer prompts than ranks, by layers"] = ids(prompts[:1], 2)
    found["whole, by layers"] = all(whole)
    with padding_is_seen():
        found["padding is seen"] = ids(prompts, len(prompts))
    asked = [Prompt(p, tokenizer.decode(p), "", Conversation(), {}) for p in prompts]
    found["choices"] = generate.choice_logprobs(built, asked, CHOICES, 50, tokenizer, stop, watch)
    return found


def traces(order: dict[str, Any], template: str, stop: StopFlag, watch: Watch) -> list[Any]:
    """Trace two steps with answers between them, by whole weights and by layers, and without."""
    section = GenerateSection(max_new_tokens=4)
    at_once = 2 * (max(map(len, order["prompts"])) + section.max_new_tokens)
    batch = pack(documents([9, 5], vocabulary=500), [[2, 3, 4], [1]], [0.25, 0.25])
    seen = []
    for answers_between in (False, True):
        built, _ = build(order, template)
        built.step([batch, batch], 1e-2, Clock(dist.device()))
        for context in (whole_seen(built), gathering_never()) if answers_between else ():
            with context:
                generate.answer_ids(
                    built, order["prompts"], section, at_once, stop, watch, seeds=[]
                )
        result = built.step([batch], 1e-2, Clock(dist.device()))
        digests = sorted((str(key), value) for key, value in built.state.digests().items())
        seen.append([float(result.loss), result.grad_norm, dist.gather(digests)])
    return seen


def weight_bytes(built: Any) -> int:
    """Return the bytes of the whole model's weights in fp32."""
    return sum(4 * getattr(p, "ds_numel", p.numel()) for p in built.module.parameters())


def tensor_bytes() -> int:
    """Return the bytes of all live tensors."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def whole_seen(built: Any) -> Iterator[list[bool]]:
    """Record before each batch whether all weights are whole."""
    plain, seen = generate._answers, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(
            all(p.numel() == getattr(p, "ds_numel", p.numel()) for p in built.module.parameters())
        )
        return plain(*args, **kwargs)

    with mock.patch.object(generate, "_answers", noted):
        yield seen


def gathering_never() -> Any:
    return mock.patch.object(engine, "GATHER_SHARE", 0.0)


def padding_is_seen() -> Any:
    """Patch, as a control: the model takes the padding for tokens."""
    plain = generate._padded

    def unmasked(*args: Any) -> Any:
        ids, mask = plain(*args)
        return ids, torch.ones_like(mask)

    return mock.patch.object(generate, "_padded", unmasked)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed leaves threads behind that now and then abort a process at its very end
