"""Run a vLLM server for the length of an evaluation, on the GPUs of the run.

A recipe and a model folder or hub name enter; a server's address leaves, inside a block. vLLM has a
Python environment of its own, as it pins a version of torch. When the block is left, or this
process dies in any way, vLLM ends with all its children (subprocess_guard.py).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from packhorse.trainer import dist
from packhorse.trainer.config.eval import GenerateSection, Server
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval import subprocess_guard
from packhorse.trainer.eval.openai_client import Client, Unreachable
from packhorse.trainer.utils.staged_build import Stopped

# A client's seconds for retries, as a vLLM of our own that does not answer has ended; and its
# requests at the same time.
LIMITS = (10.0, 64)
_ANSWER_S = 900.0
_START_S = 1800.0  # to load a model: hundreds of GB over a network take long
_END_S = 60.0
_PROBE_S = 120.0  # to say whether there is a vllm: a Python on a network file system takes long
_NO_VLLM = 3  # exit code; Python's own after an error is 1
_POLL_S = 0.5
# of a GPU's free memory: vLLM refuses to start if less is free than its share
_SHARE = 0.9
# of that share; the rest is for the cache of keys and values
_WEIGHTS_SHARE = 0.7


class Gpu(NamedTuple):
    """Memory of a GPU in bytes."""

    free: int
    total: int


def check_vllm(python: str) -> None:
    """Raise BadInput if this Python cannot be run, does not answer, or has no vllm."""
    program = f"import importlib.util as u, sys; sys.exit({_NO_VLLM} * (not u.find_spec('vllm')))"
    try:
        code = subprocess.run(
            [python, "-c", program],
            env=clean_environment(),
            cwd="/",
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_PROBE_S,
        ).returncode
    except OSError as error:
        raise BadInput(f"eval.vllm_python: {python} cannot be run ({error})") from None
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"eval.vllm_python: {python} has not said within {_PROBE_S:.0f} s whether it has vllm; "
            "try it by hand, and the file system that it lies on"
        ) from None
    if code == _NO_VLLM:
        raise BadInput(f"eval.vllm_python: {python} has no vllm; install it there, with pip")
    if code:
        how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
        raise BadInput(
            f"eval.vllm_python: {python} {how} when it was asked for vllm; signal 9 mostly means "
            "that memory ran out; else what it says itself stands above"
        )


def free_gpus() -> list[Gpu]:
    """Return the memory of the GPUs of rank 0's node, after each rank has given back what torch
    only caches. Every rank calls it."""
    mine = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        mine = Gpu(*torch.cuda.mem_get_info(dist.device()))
    # the ranks of rank 0's node come first
    return [Gpu(*gpu) for gpu in dist.gather(mine)[: dist.local_world_size()] if gpu is not None]


@contextmanager
def running_vllm(
    recipe: Recipe,
    model: str,
    longest_prompt_tokens: int,
    log: Path,
    gpus: Sequence[Gpu],
    stopping: Callable[[], bool],
) -> Iterator[Server]:
    """Start a vLLM that serves the model; end it with all its processes when the block is left.

    Args:
        log: the file that vLLM's output is appended to.
        gpus: that vLLM may use; none: it runs on the CPU.
        stopping: if it returns True, the start ends with Stopped.

    Raises:
        Unreachable: vLLM does not start, or fails inside the block; with its last error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    server = Server(url=url, timeout_s=_ANSWER_S)
    command = vllm_command(recipe, model, port, longest_prompt_tokens, gpus)
    environment = clean_environment()
    if not gpus:
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **environment}
    log.parent.mkdir(parents=True, exist_ok=True)
    # an empty folder: `python -m` looks for modules in its working directory first
    with log.open("ab") as file, tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(
            [sys.executable, subprocess_guard.__file__, str(os.getpid()), *command],
            cwd=empty,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the run, which ends vLLM itself
        )
        try:
            _wait_until_up(process, server, log, stopping)
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
            except subprocess.TimeoutExpired:  # a GPU's driver can hold a process
                dist.log.warning("vLLM does not end: process group %d still runs", process.pid)


def vllm_command(
    recipe: Recipe, model: str, port: int, longest_prompt_tokens: int, gpus: Sequence[Gpu]
) -> list[str]:
    """Return the command of vLLM's OpenAI-compatible server of the model.

    Raises:
        Unreachable: the weights do not fit into the GPUs' free memory.
    """
    section = recipe.eval
    new_tokens = (section.generate or GenerateSection()).max_new_tokens
    given = {
        "--model": model,
        "--host": "127.0.0.1",
        "--port": str(port),
        # vLLM's own choice turns float32 into float16
        "--dtype": recipe.model.dtype,
        # by itself it needs room for the longest context that the model has
        "--max-model-len": str(longest_prompt_tokens + new_tokens),
        "--seed": str(recipe.train.seed),
    }
    if gpus:
        free, total = min(gpu.free for gpu in gpus), max(gpu.total for gpu in gpus)
        # a share of the whole GPU, not of what is free; rounded down, so that it is free
        given["--gpu-memory-utilization"] = f"{int(100 * _SHARE * free / total) / 100:.2f}"
        count = _count_gpus(Path(model), int(_SHARE * free), len(gpus))
        given["--tensor-parallel-size"] = str(count)
    assert section.vllm_python is not None
    return [
        *(section.vllm_python, "-m", "vllm.entrypoints.openai.api_server"),
        *(part for pair in given.items() for part in pair),
        # compiling and capturing graphs takes minutes and memory, for a few answers
        "--enforce-eager",
        *(["--trust-remote-code"] if recipe.model.trust_remote_code else []),
        # last, so that they override the others
        *map(str, section.vllm_args),
    ]


def _count_gpus(folder: Path, room_bytes: int, gpus: int) -> int:
    """Return the fewest GPUs over which the model's heads and weights can be split; 1 for a model
    of the hub. Raises Unreachable if there are too few."""
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
        f"GiB that are free on each of {gpus} GPUs; use `eval.server`, or a DeepSpeed template "
        f"that leaves more memory free"
    )


def _wait_until_up(
    process: subprocess.Popen, server: Server, log: Path, stopping: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + _START_S
    with Client(server) as client:
        while not stopping():
            if process.poll() is not None:
                raise Unreachable(
                    f"vLLM ended while it started ({_last_error(log)}); its output is in {log}"
                )
            try:
                client.check()
                return
            except Unreachable:
                if time.monotonic() > deadline:
                    raise Unreachable(
                        f"vLLM was not up after {_START_S:.0f} s; its output is in {log}"
                    ) from None
            time.sleep(_POLL_S)
    raise Stopped("stopped while vLLM started")


def _last_error(log: Path) -> str:
    """Return the last line of vLLM's output that names an error, or else the last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["it wrote nothing"])[-1][-200:]


_KEPT = {
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME"),  # which GPUs are the run's
}
_KEPT_PREFIXES = ("HF_", "VLLM_", "XDG_", "NVIDIA_")


def clean_environment() -> dict[str, str]:
    """Return the environment variables for a program of another Python environment.

    torchrun's RANK and MASTER_ADDR are left out, as vLLM would wait for ranks; PYTHONPATH, which
    would bring in our packages; and keys of judges.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }
    kept.pop("VLLM_API_KEY", None)  # with it, vLLM would ask us for a key
    return {**kept, "VLLM_NO_USAGE_STATS": "1"}
