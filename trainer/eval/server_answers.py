"""Let a server answer prompts in place of the engine: an OpenAI-compatible one, or a vLLM started
for it.

Prompts and the engine enter, whose weights become a Hugging Face folder; or a model folder. One
answer a prompt leaves, in order, on every rank. What would silently give wrong numbers is checked:

- A server that ignores the model's name would answer with whatever it has loaded. It is asked for
  a model that does not exist, and must refuse.
- Servers keep models by name, so each folder has a name that was never used before.
- Prompts are sent as token ids; as text if the server takes no ids; as a conversation, which it
  renders itself, if it takes no text. In each form its prompt token count must equal training's.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch

from packhorse.trainer import dist
from packhorse.trainer.checkpoint.hf_export import copy_to_file, write_folder
from packhorse.trainer.config.eval import GenerateSection, Server
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import BadInput, Prompt
from packhorse.trainer.engine.engine import Engine, gathered
from packhorse.trainer.eval.openai_client import (
    Client,
    Refused,
    Unreachable,
    prompt_tokens_of,
    text_of,
)
from packhorse.trainer.eval.vllm_server import LIMITS, Gpu, check_vllm, free_gpus, running_vllm
from packhorse.trainer.hang_watchdog import Watch
from packhorse.trainer.model.load import persistent_buffers
from packhorse.trainer.model.lora import merged_weights
from packhorse.trainer.model.quantisation import numel
from packhorse.trainer.stop_flag import StopFlag
from packhorse.trainer.utils.staged_build import Stopped
from packhorse.trainer.utils.text import error_line

FOLDER = "serving"  # in the run folder: the weights, while a server needs them
_COMPILED = "_orig_mod."  # torch.compile puts it before parameters' names
_POLL_S = 0.5  # between checks for answers and signals
_OTHER_TOKENS = 422  # our own status: the server counts other tokens than training
# statuses after which another form is tried
_FORM_REFUSED = (400, 404, 405, 415, _OTHER_TOKENS, 501)

PromptForm = Callable[[Prompt], dict[str, Any]]
T = TypeVar("T")


# ----------------------------------------------------------------------------------------- in a run


def check_server(recipe: Recipe) -> None:
    """Raise BadInput, before data is prepared, if the recipe's server is down or refuses, or its
    `vllm_python` cannot be run or has no vllm."""
    if recipe.eval.server is not None:
        try:
            with Client(recipe.eval.server) as client:
                client.check()
        except Unreachable as error:
            raise BadInput(f"eval.server: {error}") from None
    if recipe.eval.vllm_python is not None:
        check_vllm(recipe.eval.vllm_python)


def generate(
    engine: Engine,
    recipe: Recipe,
    run_dir: Path,
    step: int,
    prompts: Sequence[Prompt],
    stop: StopFlag,
    watch: Watch,
) -> list[str]:
    """Return answers by the engine's current weights, on every rank.

    Raises:
        Unreachable: the server is down or refuses, or the weights cannot be written for it; on
            every rank.
        Stopped: the stop flag was raised; on every rank.
    """
    folder = write_weights(engine, recipe, run_dir, step, watch)
    gpus = free_gpus()
    log = run_dir / "logs" / f"vllm-step-{step:06d}.log"

    def work(stopping: Callable[[], bool]) -> list[str]:
        return answers(recipe, str(folder), prompts, log=log, gpus=gpus, stopping=stopping)

    try:
        return in_background(work, stop, watch)
    finally:
        if dist.is_main():
            shutil.rmtree(folder.parent, ignore_errors=True)


def in_background(work: Callable[[Callable[[], bool]], T], stop: StopFlag, watch: Watch) -> T:
    """Run `work(stopping)` in a thread of rank 0; return its result, as JSON holds it, on every
    rank. Meanwhile all ranks beat and poll the stop flag.

    Raises:
        Unreachable: the work did, or failed otherwise; on every rank.
        Stopped: likewise, as the flag was raised: `stopping()` becomes true then.
    """
    stopping = Event()
    # The thread does nothing but its work: collectives belong to the main thread of each rank,
    # where their order is the same.
    with ThreadPoolExecutor(1, "served") as pool:
        future: Future[T] | None = pool.submit(work, stopping.is_set) if dist.is_main() else None
        try:
            while not dist.broadcast(future is None or future.done()):
                watch.beat("answers of a server")
                if stop.poll():
                    stopping.set()
                time.sleep(_POLL_S)
        finally:
            # leaving the pool waits for the work, which ends by this
            stopping.set()
    # only rank 0 has an outcome; errors travel as text, as values between ranks are JSON
    outcome: tuple[str, Any] = ("", None)
    if future is not None:
        try:
            outcome = ("done", future.result())
        except (Stopped, Unreachable) as error:
            outcome = (type(error).__name__, str(error))
        except Exception as error:  # of a rank alone it would leave the others waiting
            outcome = ("Unreachable", error_line(error))
    end, value = dist.broadcast(outcome)
    if end != "done":
        raise (Stopped if end == "Stopped" else Unreachable)(value)
    return value


def write_weights(engine: Engine, recipe: Recipe, run_dir: Path, step: int, watch: Watch) -> Path:
    """Write the engine's current weights as a Hugging Face folder of a new name, as `packhorse
    export` writes it, with an adapter merged. Every rank takes part.

    Parameters are gathered one by one and copied into memory that files back, so that rank 0 need
    not hold the whole model.

    Raises:
        Unreachable: the disk has no room for them, or the folder cannot be written; on every rank.
    """
    model: Any = engine.module.model
    engine.wait_for_prefetch()
    root = run_dir.absolute() / FOLDER  # links stay: a server elsewhere may know their path alone
    staged, folder = root / "weights", root / f"step-{step:06d}-{secrets.token_hex(4)}"
    size = getattr(torch, recipe.model.dtype).itemsize * sum(map(numel, model.parameters()))

    def make_room() -> None:
        shutil.rmtree(root, ignore_errors=True)  # left by a killed run
        staged.mkdir(parents=True)
        needed, free = 2 * size, shutil.disk_usage(root).free  # the staged files, and the folder
        if free < needed:
            raise OSError(
                f"they need {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free there; "
                f"make room"
            )

    failure = dist.run_on_rank0(make_room)
    weights: dict[str, torch.Tensor] = {}
    if failure is None:
        for name, tensor in chain(merged_weights(model, gathered), persistent_buffers(model)):
            watch.beat("weights for a server")
            if dist.is_main():
                file = staged / str(len(weights))
                weights[name.replace(_COMPILED, "")] = copy_to_file(tensor, file)
        watch.pause()
        failure = dist.run_on_rank0(lambda: write_folder(run_dir, recipe, folder, weights))
    weights.clear()  # before the files that back them are deleted
    if dist.is_main():
        shutil.rmtree(staged, ignore_errors=True)
    if failure is not None:
        raise Unreachable(f"{root}: the weights could not be written for the server: {failure}")
    return Path(dist.broadcast(str(folder)))


# ------------------------------------------------------------------------------------- of any model


def answers(
    recipe: Recipe,
    model: str,
    prompts: Sequence[Prompt],
    *,
    log: Path,
    gpus: Sequence[Gpu] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Return answers by a model folder, or a hub name, from the recipe's server or a vLLM. One rank
    calls it.

    Args:
        log: the file for vLLM's own output.
        gpus: that vLLM may use; none: it runs on the CPU.
        stopping: called now and then; if it returns True, the work ends with Stopped.

    Raises:
        Unreachable: the server is down or refuses, or does something else than what it is asked.
    """
    section = recipe.eval.generate or GenerateSection()
    if Path(model).is_dir():
        model = str(Path(model).absolute())
    longest = max(len(prompt.input_ids) for prompt in prompts)
    server_there: AbstractContextManager[Server] = (
        nullcontext(recipe.eval.server)
        if recipe.eval.server
        else running_vllm(recipe, model, longest, log, gpus, stopping)
    )
    limits: Any = () if recipe.eval.server else LIMITS
    with server_there as server, Client(server, stopping, *limits) as client:
        fields: dict[str, Any] = {"model": model, "max_tokens": section.max_new_tokens}
        fields["temperature"] = section.temperature
        if section.temperature:
            fields |= {"top_p": section.top_p, "seed": recipe.train.seed}
        path, form = _choose_form(
            client, server, recipe.data.chat_template_kwargs, fields, prompts[0]
        )
        replies = client.post(path, [{**fields, **form(prompt)} for prompt in prompts])
    # each prompt: one that the server cuts would go unnoticed by the first alone
    for prompt, reply in zip(prompts, replies, strict=True):
        _require_same_tokens(server, prompt, reply)
    return [text_of(reply) for reply in replies]


def _choose_form(
    client: Client,
    server: Server,
    kwargs: Mapping[str, Any],
    fields: Mapping[str, Any],
    prompt: Prompt,
) -> tuple[str, PromptForm]:
    """Return the path and the first form of prompt that the server takes, by asking for one token.

    Raises:
        Unreachable: it takes none of them, or ignores the model's name.
    """
    forms: dict[str, tuple[str, PromptForm]] = {
        "token ids": ("completions", lambda p: {"prompt": p.input_ids}),
        "text": ("completions", lambda p: {"prompt": p.text}),
        "conversations": ("chat/completions", lambda p: _conversation(p, kwargs)),
    }
    for name, (path, form) in forms.items():
        # one token: this asks for the status and the prompt's token count
        body = {**fields, **form(prompt), "max_tokens": 1}
        try:
            (reply,) = client.post(path, [body])
            _require_same_tokens(server, prompt, reply)
        except Refused as refusal:
            if refusal.status not in _FORM_REFUSED or name == "conversations":
                raise
        else:
            _require_names_matter(client, server, path, body)
            dist.log.info("prompts are sent to the server at %s as %s", server.url, name)
            return path, form
    raise AssertionError("the last form returns or raises")


def _conversation(prompt: Prompt, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"messages": [message.as_dict() for message in prompt.asked]}
    if prompt.conversation.tools:
        fields["tools"] = list(prompt.conversation.tools)
    if kwargs:
        fields["chat_template_kwargs"] = dict(kwargs)
    return fields


def _require_same_tokens(server: Server, prompt: Prompt, reply: Mapping[str, Any]) -> None:
    counted = prompt_tokens_of(reply)
    if counted != len(prompt.input_ids):
        raise Refused(
            f"the server at {server.url} counts {counted} tokens in a prompt of "
            f"{len(prompt.input_ids)}: it renders or tokenizes prompts otherwise than training, so "
            f"it would answer another question; use a server whose /v1/completions takes token "
            f"ids, as vLLM's does",
            _OTHER_TOKENS,
        )


def _require_names_matter(
    client: Client, server: Server, path: str, body: Mapping[str, Any]
) -> None:
    """Raise Unreachable if the server answers for a model that does not exist."""
    nowhere = f"/nonexistent/{secrets.token_hex(8)}"
    try:
        client.post(path, [{**body, "model": nowhere}], patience_s=0.0)
    except Refused:
        return
    raise Unreachable(
        f"the server at {server.url} answers for a model that does not exist, so it would answer "
        f"with the one it was started with; use a server that loads the folder which a request "
        f"names, as `transformers serve` does"
    )
