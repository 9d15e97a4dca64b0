"""Answers from a server in place of the engine: an OpenAI-compatible one, or a vLLM that is started
for it.

In: prompts, and a model folder or the engine, whose weights become one. Out: one answer a prompt,
    in order, on every
rank. Nothing is taken on trust of which a wrong number would be the price:

- A server that looks at no name would answer with whatever it has loaded. It is asked for a model
  that does not exist, and must refuse.
- Each folder has a name that was never used: a server keeps models by their names.
- Prompts are given as token ids; as text where the server does not take ids; as a conversation,
  which it renders itself, where it takes no text. In all forms it must count as many tokens of each
  prompt as training does.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

import torch

from trainer import dist
from trainer.checkpoint.hf_export import copy_to_file, write_folder
from trainer.config.eval import GenerateSection, Server
from trainer.config.recipe import Recipe
from trainer.datatypes import BadInput, Prompt
from trainer.engine.engine import Engine, gathered
from trainer.eval import subprocess_guard
from trainer.eval.openai_client import Cancelled, Client, Refused, Unreachable, text_of
from trainer.hang_watchdog import Watch
from trainer.model.lora import merged_weights, numel

FOLDER = "serving"  # of a run: the weights that a server is handed, while it has them
COMPILED = "_orig_mod."  # what torch.compile puts before the names of a module's parameters
_LOOK_S = 0.5  # between looks at whether the answers are there, or a signal is
_START_S = 1800.0  # for vLLM to load a model: hundreds of GB over a network take their time
_END_S = 60.0  # for all of it to end
_SHARE = 0.9  # of what is free on a GPU: vLLM refuses to start on less than it is told
_WEIGHTS_SHARE = 0.7  # of that; the rest is for what attention keeps of the prompts
_UNFIT = 422  # of a form of prompt that it makes something else of
_OTHER_FORM = {
    400,
    404,
    405,
    415,
    _UNFIT,
    501,
}  # statuses of a form of prompt that a server does not take

Form = Callable[[Prompt], dict[str, Any]]
T = TypeVar("T")


class Gpu(NamedTuple):
    """Memory of a GPU in bytes."""

    free: int
    total: int


# ----------------------------------------------------------------------------------------- in a run


def check_generator(recipe: Recipe) -> None:
    """Look whether the recipe's generator is there, before anything is prepared.

    Raises:
        BadInput: the server is down or refuses, or there is no vLLM.
    """
    section = recipe.eval
    if section.server is not None:
        try:
            with Client(section.server) as client:
                client.check()
        except Unreachable as error:
            raise BadInput(f"eval.server: {error}") from None
    if section.vllm_python is not None:
        look = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
        try:
            found = subprocess.run(
                [section.vllm_python, "-c", look], env=clean_environment(), cwd="/", check=False
            )
        except OSError as error:
            raise BadInput(
                f"eval.vllm_python: {section.vllm_python} cannot be run ({error})"
            ) from None
        if found.returncode:
            raise BadInput(
                f"eval.vllm_python: {section.vllm_python} has no vllm; install it there, with pip"
            )


def generate(
    engine: Engine,
    recipe: Recipe,
    run_dir: Path,
    step: int,
    prompts: Sequence[Prompt],
    stop: dist.StopFlag,
    watch: Watch,
) -> list[str] | None:
    """Answers to the prompts, from the engine's current weights, on every rank. None where the stop
    flag went up.

    Raises:
        Unreachable: the server is down or refuses, or the weights cannot be written for it; on
            every rank.
    """
    folder = write_weights(engine, recipe, run_dir, step, watch)
    gpus = _gpus()
    log = run_dir / "logs" / f"vllm-step-{step:06d}.log"
    try:
        return in_background(
            lambda stopping: answers(
                recipe, str(folder), prompts, log=log, gpus=gpus, stopping=stopping
            ),
            stop,
            watch,
        )
    finally:
        if dist.is_main():
            shutil.rmtree(folder.parent, ignore_errors=True)


def in_background(
    work: Callable[[Callable[[], bool]], T], stop: dist.StopFlag, watch: Watch
) -> T | None:
    """What `work(stopping)` returns, done by a thread of rank 0, on every rank: meanwhile all of
    them beat and look at the stop flag. None where that went up, once the work has ended for it by
    raising Cancelled."""
    stopping = Event()
    with ThreadPoolExecutor(1, "served") as pool:
        future: Future[T] | None = pool.submit(work, stopping.is_set) if dist.is_main() else None
        try:
            while not dist.broadcast(future is None or future.done()):
                watch.beat("answers of a server")
                if stop.poll():
                    stopping.set()
                time.sleep(_LOOK_S)
        finally:
            stopping.set()
    outcome: tuple[str, Any] = ("", None)
    if future is not None:
        try:
            outcome = ("done", future.result())
        except Cancelled:
            outcome = ("stopped", None)
        except Unreachable as error:
            outcome = ("unreachable", str(error))
    end, value = dist.broadcast(outcome)
    if end == "unreachable":
        raise Unreachable(value)
    return value


def write_weights(engine: Engine, recipe: Recipe, run_dir: Path, step: int, watch: Watch) -> Path:
    """The engine's current weights as a Hugging Face folder of a new name, as `packhorse export`
    writes it.

    Every rank takes part: parameters are gathered one by one, and pass through files, so that no
    rank holds all. An adapter is merged into them.

    Raises:
        Unreachable: there is no room for them, or the folder cannot be written; on every rank.
    """
    model: Any = engine.module.model
    engine.wait_for_prefetch()
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)
    root = run_dir.absolute() / FOLDER  # not resolved: another machine may have the link alone
    staged, folder = root / "weights", root / f"step-{step:06d}-{secrets.token_hex(4)}"
    size = getattr(torch, recipe.model.dtype).itemsize * sum(map(numel, model.parameters()))
    failure = dist.run_on_rank0(lambda: _make_room(root, staged, size))
    weights: dict[str, torch.Tensor] = {}
    if failure is None:
        for name, tensor in chain(merged_weights(model, gathered), buffers):
            watch.beat("weights for a server")
            if dist.is_main():
                weights[name.replace(COMPILED, "")] = copy_to_file(
                    tensor, staged / str(len(weights))
                )
        watch.pause()
        failure = dist.run_on_rank0(lambda: write_folder(run_dir, recipe, folder, weights))
    weights.clear()
    if dist.is_main():
        shutil.rmtree(staged, ignore_errors=True)
    if failure is not None:
        raise Unreachable(f"{root}: the weights could not be written for the server: {failure}")
    return Path(dist.broadcast(str(folder)))


def _make_room(root: Path, staged: Path, size: int) -> None:
    """Clear what a killed start has left, and see that weights of `size` bytes fit: twice, as files
    become a folder.
    """
    shutil.rmtree(root, ignore_errors=True)
    staged.mkdir(parents=True)
    needed, free = 2 * size, shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            f"they need {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free there; make "
            f"room"
        )


def _gpus() -> list[Gpu]:
    """Of rank 0's node, whose ranks come first; free is what is free once each rank has given back
    what it only keeps. Every rank calls it."""
    mine = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        mine = Gpu(*torch.cuda.mem_get_info(dist.device()))
    return [gpu for gpu in dist.gather(mine)[: dist.local_world_size()] if gpu is not None]


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
    """Answers to the prompts by a model folder, or a hub name, from the recipe's server or a vLLM.
    One rank calls it.

    Args:
        log: where vLLM's own output goes.
        gpus: that vLLM may use; none: it runs on the CPU.
        stopping: asked now and then; where it says yes, the work ends with Cancelled.

    Raises:
        Unreachable: the server is down or refuses, or what it does is not what is asked for.
        Cancelled: `stopping` said yes.
    """
    section = recipe.eval.generate or GenerateSection()
    if Path(model).is_dir():
        model = str(Path(model).absolute())
    with (
        _server(recipe, model, prompts, log, gpus, stopping) as server,
        Client(server, stopping) as client,
    ):
        fields: dict[str, Any] = {"model": model, "max_tokens": section.max_new_tokens}
        fields["temperature"] = section.temperature
        if section.temperature:
            fields |= {"top_p": section.top_p, "seed": recipe.train.seed}
        path, form = _form(client, server, recipe.data.chat_template_kwargs, fields, prompts[0])
        replies = client.post(path, [{**fields, **form(prompt)} for prompt in prompts])
    for prompt, reply in zip(prompts, replies, strict=True):
        _require_same_prompt(server, prompt, reply)
    return [text_of(reply) for reply in replies]


def _form(
    client: Client,
    server: Server,
    kwargs: Mapping[str, Any],
    fields: Mapping[str, Any],
    prompt: Prompt,
) -> tuple[str, Form]:
    """The first form in which the server takes the prompt as it is, and where: see the top of this
    file.
    """
    forms: dict[str, tuple[str, Form]] = {
        "token ids": ("completions", lambda p: {"prompt": p.input_ids}),
        "text": ("completions", lambda p: {"prompt": p.text}),
        "conversations": ("chat/completions", lambda p: _conversation(p, kwargs)),
    }
    for name, (path, form) in forms.items():
        body = {**fields, **form(prompt), "max_tokens": 1}
        try:
            (reply,) = client.post(path, [body])
            _require_same_prompt(server, prompt, reply)
        except Refused as refusal:
            if refusal.status not in _OTHER_FORM or name == "conversations":
                raise
        else:
            _require_names_matter(client, server, path, body)
            dist.log.info("the server at %s is given prompts as %s", server.url, name)
            return path, form
    raise AssertionError("the last form returns or raises")


def _conversation(prompt: Prompt, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What was said up to the reference's turn, the last one of the assistant."""
    messages = [message.as_dict() for message in prompt.conversation.messages]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    fields: dict[str, Any] = {"messages": messages[:last]}
    if prompt.conversation.tools:
        fields["tools"] = list(prompt.conversation.tools)
    if kwargs:
        fields["chat_template_kwargs"] = dict(kwargs)
    return fields


def _require_same_prompt(server: Server, prompt: Prompt, reply: Mapping[str, Any]) -> None:
    counted = (reply.get("usage") or {}).get("prompt_tokens")
    if counted != len(prompt.input_ids):
        raise Refused(
            f"the server at {server.url} counts {counted} tokens in a prompt of "
            f"{len(prompt.input_ids)}: it renders or "
            "tokenizes it otherwise than training does, so that its answers would be to another "
            "question; take a "
            "server whose /v1/completions takes token ids, as vLLM's does",
            _UNFIT,
        )


def _require_names_matter(
    client: Client, server: Server, path: str, body: Mapping[str, Any]
) -> None:
    """Raises Unreachable where the server answers although it is asked for a model that there is
    not.
    """
    nowhere = f"/nonexistent/{secrets.token_hex(8)}"
    try:
        client.post(path, [{**body, "model": nowhere}], patience_s=0.0)
    except Refused:
        return
    raise Unreachable(
        f"the server at {server.url} answers whatever model it is asked for, so that it would "
        f"answer with the one it "
        "started with; take one that loads the folder which a request names, as `transformers "
        "serve` does"
    )


# --------------------------------------------------------------------------------------------- vLLM


@contextmanager
def _server(
    recipe: Recipe,
    model: str,
    prompts: Sequence[Prompt],
    log: Path,
    gpus: Sequence[Gpu],
    stopping: Callable[[], bool],
) -> Iterator[Server]:
    """The recipe's server; or a vLLM that serves the model until the block is left, and is gone
    then.
    """
    if recipe.eval.server is not None:
        yield recipe.eval.server
        return
    port = _free_port()
    server = Server(
        url=f"http://127.0.0.1:{port}/v1", timeout_s=900.0, patience_s=10.0, parallel=64
    )
    longest = max(len(prompt.input_ids) for prompt in prompts)
    command = vllm_command(recipe, model, port, longest, gpus)
    environment = (
        clean_environment() if gpus else {"VLLM_CPU_KVCACHE_SPACE": "1", **clean_environment()}
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("ab") as file,
        tempfile.TemporaryDirectory() as empty,
    ):  # python -m looks into its folder first
        process = subprocess.Popen(
            [sys.executable, subprocess_guard.__file__, str(os.getpid()), *command],
            cwd=empty,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is not for it
        )
        try:
            _wait_until_there(process, server, log, stopping)
            try:
                yield server
            except Unreachable as error:
                raise Unreachable(
                    f"vLLM: {error} ({_last_error(log)}); its output is in {log}"
                ) from None
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:  # as where a GPU's driver holds a process
                dist.log.warning(
                    "vLLM does not end: the process group %d is still there", process.pid
                )


def vllm_command(
    recipe: Recipe, model: str, port: int, longest_prompt_tokens: int, gpus: Sequence[Gpu]
) -> list[str]:
    """vLLM's OpenAI-compatible server of the model, on what is free of the GPUs.

    Raises:
        Unreachable: the weights do not fit there.
    """
    section = recipe.eval
    new_tokens = (section.generate or GenerateSection()).max_new_tokens
    given = {
        "--model": model,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": recipe.model.dtype,  # its own choice makes float16 of float32
        "--max-model-len": str(
            longest_prompt_tokens + new_tokens
        ),  # else it keeps room for the longest there can be
        "--seed": str(recipe.train.seed),
    }
    if gpus:
        free, total = min(gpu.free for gpu in gpus), max(gpu.total for gpu in gpus)
        given["--gpu-memory-utilization"] = f"{int(100 * _SHARE * free / total) / 100:.2f}"
        given["--tensor-parallel-size"] = str(
            _gpus_needed(Path(model), int(_SHARE * free), len(gpus))
        )
    assert section.vllm_python is not None
    return [
        *(section.vllm_python, "-m", "vllm.entrypoints.openai.api_server"),
        *(part for pair in given.items() for part in pair),
        # compiling and capturing graphs takes minutes and memory, for a few answers
        "--enforce-eager",
        *(["--trust-remote-code"] if recipe.model.trust_remote_code else []),
        *map(str, section.vllm_args),
    ]


def _gpus_needed(folder: Path, room_bytes: int, gpus: int) -> int:
    """The fewest GPUs over which the model's heads and weights can be split; 1 for a model of the
    hub.
    """
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not weights:
        return 1
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = int(config.get("text_config", config).get("num_attention_heads", 1))
    for count in range(1, gpus + 1):
        if heads % count == 0 and weights / count <= _WEIGHTS_SHARE * room_bytes:
            return count
    raise Unreachable(
        f"vLLM's weights of {weights / 2**30:.1f} GiB do not fit into the {room_bytes / 2**30:.1f} "
        f"GiB that are free "
        f"on each of {gpus} GPUs; take `eval.generator: server`, or a template of ds_configs/ that "
        f"leaves more"
    )


def _wait_until_there(
    process: subprocess.Popen, server: Server, log: Path, stopping: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + _START_S
    with Client(server) as client:
        while not stopping():
            if process.poll() is not None:
                raise Unreachable(
                    f"vLLM ended while it was started ({_last_error(log)}); its output is in {log}"
                )
            try:
                client.check()
                return
            except Unreachable:
                if time.monotonic() > deadline:
                    raise Unreachable(
                        f"vLLM was not there after {_START_S:.0f} s; its output is in {log}"
                    ) from None
            time.sleep(_LOOK_S)
    raise Cancelled


def _last_error(log: Path) -> str:
    """The last line of vLLM's output that names an error, else the last of all."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["it said nothing"])[-1][-200:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_KEPT = {
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME"),  # which GPUs are the run's
}
_KEPT_PREFIXES = ("HF_", "VLLM_", "XDG_", "NVIDIA_")


def clean_environment() -> dict[str, str]:
    """What a program of another environment may know of ours: not torchrun's RANK and MASTER_ADDR,
    which would make it wait for ranks, nor PYTHONPATH, which would bring in our packages, nor keys
    of judges."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }
    kept.pop("VLLM_API_KEY", None)  # it would ask us for it
    return {**kept, "VLLM_NO_USAGE_STATS": "1"}
