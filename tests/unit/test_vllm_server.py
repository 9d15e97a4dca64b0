"""A server answers in place of the engine, and what it does is checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from packhorse.trainer.checkpoint.hf_export import save_description
from packhorse.trainer.config.recipe import Recipe, load_recipe
from packhorse.trainer.datatypes import BadInput, Conversation, Message, Prompt
from packhorse.trainer.eval import server_answers, vllm_server
from packhorse.trainer.eval.openai_client import Unreachable
from packhorse.trainer.eval.server_answers import (
    answers,
    check_server,
    in_background,
    write_weights,
)
from packhorse.trainer.eval.vllm_server import Gpu, clean_environment, running_vllm, vllm_command
from packhorse.trainer.model.load import load_model, load_tokenizer
from packhorse.trainer.utils.staged_build import Stopped
from tests.ranks import ROOT
from tests.stand_in_server import Reply, Request, StandIn

LIMIT_S = 60.0
MODEL = "/runs/one/serving/step-000002-1f3a"
PROMPTS = [
    Prompt(
        ids,
        f"text {n}",
        "right",
        Conversation((Message("user", f"question {n}"), Message("assistant", "right"))),
        {},
    )
    for n, ids in enumerate([[5, 6, 7], [8, 9]])
]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "debug.yaml", overrides)


def with_server(url: str, *overrides: str, timeout_s: float = LIMIT_S) -> Recipe:
    return recipe(f"eval.server={{url: {url}, timeout_s: {timeout_s}}}", *overrides)


def prompt_of(request: Request) -> tuple[str, Prompt]:
    """Return the form in which the request has a prompt, and the prompt."""
    body = request.body
    if "messages" in body:
        (found,) = [
            p
            for p in PROMPTS
            if body["messages"] == [{"role": "user", "content": p.conversation.messages[0].content}]
        ]
        return "conversation", found
    form = "text" if isinstance(body["prompt"], str) else "ids"
    (found,) = [p for p in PROMPTS if body["prompt"] in (p.text, p.input_ids)]
    return form, found


def server_that(takes: Set[str], miscounts: Set[str] = frozenset(), names: bool = True) -> StandIn:
    """Return a server that takes prompts in some forms, and counts one token more in some."""

    def answer(request: Request) -> Reply:
        form, prompt = prompt_of(request)
        if names and request.body["model"] != MODEL:
            return 404, "no such model"
        if form not in takes:
            return 400, f"{form} is not taken"
        usage = {"prompt_tokens": len(prompt.input_ids) + (form in miscounts)}
        text = f"{form} of {prompt.text}"
        choice = {"message": {"content": text}} if form == "conversation" else {"text": text}
        return 200, {"choices": [choice], "usage": usage}

    return StandIn(answer)


def ask(server: StandIn, *overrides: str) -> list[str]:
    return answers(with_server(server.url, *overrides), MODEL, PROMPTS, log=Path("unused"))


# --------------------------------------------------------------------------------------- any server


@pytest.mark.parametrize(
    ("takes", "miscounts", "form"),
    [
        ({"ids", "text", "conversation"}, set(), "ids"),
        ({"text", "conversation"}, set(), "text"),
        ({"conversation"}, set(), "conversation"),
        (
            {"text", "conversation"},
            {"text"},
            "conversation",
        ),  # as where a second BOS is put before a text
    ],
)
def test_prompts_are_given_in_the_first_form_that_keeps_them(
    takes: set[str], miscounts: set[str], form: str
) -> None:
    with server_that(takes, miscounts) as server:
        assert ask(server) == [f"{form} of text 0", f"{form} of text 1"]


def test_a_conversation_ends_before_the_reference_and_brings_the_templates_variables() -> None:
    with server_that({"conversation"}) as server:
        ask(
            server,
            "data.chat_template_kwargs.enable_thinking=false",
            "eval.generate.max_new_tokens=9",
        )
        body = server.requests[-1].body
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["temperature"], body["max_tokens"]) == (0.0, 9)


def test_a_server_that_tokenizes_prompts_otherwise_is_refused() -> None:
    forms = {"ids", "text", "conversation"}
    with (
        server_that(forms, forms) as server,
        pytest.raises(Unreachable, match="counts 4 tokens in a prompt of 3"),
    ):
        ask(server)


def test_a_server_that_ignores_the_models_name_is_refused() -> None:
    """It would answer with the weights that it was started with."""
    with (
        server_that({"ids"}, names=False) as server,
        pytest.raises(Unreachable, match="answers for a model that does not exist"),
    ):
        ask(server)


def test_a_server_that_cannot_load_the_folder_is_quoted() -> None:
    with StandIn(lambda _: (500, "cannot read /runs/one")) as server:
        with pytest.raises(Unreachable, match=r"refused .500: cannot read /runs/one."):
            answers(with_server(server.url, timeout_s=0.4), MODEL, PROMPTS, log=Path("unused"))
        assert len(server.requests) == 1


# ------------------------------------------------------------------------------------- at the start


def test_a_server_that_is_down_is_bad_input_at_the_start() -> None:
    with StandIn(lambda _: (200, {})) as server:
        check_server(with_server(server.url))
    with pytest.raises(BadInput, match=f"eval.server: the server at {server.url} does not answer"):
        check_server(with_server(server.url))


def vllm_recipe(python: str | Path, *overrides: str) -> Recipe:
    return recipe(f"eval.vllm_python={python}", *overrides)


@pytest.mark.parametrize(
    ("python", "why"), [("/nowhere/python", "cannot be run"), (sys.executable, "has no vllm")]
)
def test_a_python_without_vllm_is_bad_input_at_the_start(python: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        check_server(vllm_recipe(python))


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("kill -9 $$", "was killed by signal 9 when it was asked for vllm"),
        ("exit 1", "ended with exit code 1 when it was asked for vllm"),
        ("exec sleep 600", "has not said within 1 s whether it has vllm"),
    ],
)
def test_a_python_that_does_not_answer_is_not_said_to_lack_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, why: str
) -> None:
    if "sleep" in does:
        monkeypatch.setattr(vllm_server, "_PROBE_S", 1.0)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    with pytest.raises(BadInput, match=why):
        check_server(vllm_recipe(python))


@pytest.mark.parametrize(
    "given",
    [
        ["eval.server.url=http://host/v1", "eval.vllm_python=/opt/vllm/bin/python"],
        ["eval.vllm_args=[--quantization, fp8]"],
    ],
)
def test_one_server_answers_and_arguments_are_for_vllm(given: list[str]) -> None:
    with pytest.raises(
        BadInput, match=r"give `server` or `vllm_python`, not both|belongs to `vllm_python`"
    ):
        recipe(*given)


# ------------------------------------------------------------------------------------- on all ranks


class Flag:
    """A stop flag that is raised when it is polled for the nth time."""

    def __init__(self, at: int | None = None) -> None:
        self._at, self.polled = at, 0

    def poll(self) -> bool:
        self.polled += 1
        return self.polled == self._at


class Beats:
    def __init__(self) -> None:
        self.count = 0

    def beat(self, where: str) -> None:
        self.count += 1

    def pause(self) -> None:
        pass


def wait(work: Callable[[Callable[[], bool]], Any], flag: Flag, beats: Beats | None = None) -> Any:
    return in_background(work, cast(Any, flag), cast(Any, beats or Beats()))


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_while_answers_are_waited_for_every_rank_beats() -> None:
    beats, flag = Beats(), Flag()

    def work(stopping: Callable[[], bool]) -> list[str]:
        until(lambda: beats.count >= 3)
        return ["answer"]

    assert wait(work, flag, beats) == ["answer"]
    assert flag.polled >= 2


def test_a_signal_ends_the_wait_without_answers() -> None:
    def work(stopping: Callable[[], bool]) -> list[str]:
        until(stopping)
        raise Stopped("stopped")

    with pytest.raises(Stopped):
        wait(work, Flag(at=2))


def test_a_failure_is_raised_on_all_ranks() -> None:
    def work(_: Callable[[], bool]) -> list[str]:
        raise Unreachable("the server is down")

    with pytest.raises(Unreachable, match="the server is down"):
        wait(work, Flag())


# --------------------------------------------------------------------------------------- the folder


@pytest.fixture
def run(tmp_path: Path) -> tuple[Recipe, Any, Path]:
    """A compiled model with tied weights and added tokens, in a run folder."""
    made = recipe("model.add_tokens=[<tool>]", f"run.dir={tmp_path}")
    tokenizer = load_tokenizer(made.model)
    from contextlib import nullcontext

    model = load_model(
        made.model,
        tokenizer,
        seed=0,
        sharded_init=nullcontext,
        gathered=lambda *_, **__: nullcontext(),
    )
    model.generation_config.eos_token_id = [3, 7]
    save_description(model, tokenizer, made.model, tmp_path)
    return made, model, tmp_path


def written(run: tuple[Recipe, Any, Path]) -> Path:
    made, model, run_dir = run
    engine = SimpleNamespace(
        module=SimpleNamespace(model=torch.compile(model)), wait_for_prefetch=lambda: None
    )
    return write_weights(cast(Any, engine), made, run_dir, 2, cast(Any, Beats()))


def test_the_folder_has_the_compiled_models_weights_under_their_own_names(
    run: tuple[Recipe, Any, Path],
) -> None:
    folder = written(run)
    loaded, info = cast(Any, AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    trained = dict(run[1].named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == set(trained)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_it_has_the_added_tokens_and_the_stop_tokens(run: tuple[Recipe, Any, Path]) -> None:
    folder = written(run)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("<tool>") == ["<tool>"]
    assert tokenizer.chat_template
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [3, 7]


def test_its_name_is_new_each_time_and_one_copy_is_left(run: tuple[Recipe, Any, Path]) -> None:
    first, second = written(run), written(run)
    assert first != second
    assert [path.name for path in (run[2] / "serving").iterdir()] == [second.name]


def test_a_full_disk_is_named(
    run: tuple[Recipe, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_answers.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        Unreachable, match=r"serving: the weights could not be written for the server: .* make room"
    ):
        written(run)


def test_an_adapter_is_merged_into_them(tmp_path: Path) -> None:
    made = recipe("adapter={rank: 4, modules_to_save: [lm_head]}", f"run.dir={tmp_path}")
    tokenizer = load_tokenizer(made.model)
    model = load_model(made.model, tokenizer, seed=0, adapter=made.adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    save_description(model, tokenizer, made.model, tmp_path)
    loaded, info = cast(
        Any,
        AutoModelForCausalLM.from_pretrained(
            written((made, model, tmp_path)), output_loading_info=True
        ),
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(20).unsqueeze(0)
    model.set_attn_implementation("sdpa")
    assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(loaded(ids).logits, base_logits(made, ids), rtol=1e-2, atol=1e-2)


def base_logits(made: Recipe, ids: torch.Tensor) -> torch.Tensor:
    base = load_model(made.model, load_tokenizer(made.model), seed=0)
    base.set_attn_implementation("sdpa")
    return base.eval()(ids).logits


# ----------------------------------------------------------------------------------- vLLM's command

GIB = 2**30


def command(*overrides: str, model: str = "org/model", gpus: list[Gpu] | None = None) -> list[str]:
    return vllm_command(
        vllm_recipe("/opt/vllm/bin/python", *overrides), model, 1234, 100, gpus or []
    )


def argument(of: list[str], name: str) -> str:
    """Return the argument's last value, which overrides the others."""
    return of[len(of) - of[::-1].index(name)]


def model_folder(tmp_path: Path, gib: float, heads: int) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(int(gib * GIB))  # a sparse file: nothing is written
    return str(tmp_path)


def test_vllm_gets_what_it_would_choose_wrongly() -> None:
    made = command("model.dtype=float32", "eval.generate.max_new_tokens=28")
    assert made[:3] == ["/opt/vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert argument(made, "--dtype") == "float32"
    assert argument(made, "--max-model-len") == "128"
    assert argument(made, "--host") == "127.0.0.1"
    assert "--enforce-eager" in made
    assert "--trust-remote-code" not in made
    assert "--gpu-memory-utilization" not in made


def test_it_takes_what_is_free_on_the_fullest_gpu(tmp_path: Path) -> None:
    gpus = [Gpu(40 * GIB, 80 * GIB), Gpu(20 * GIB, 80 * GIB)]
    assert argument(command(gpus=gpus), "--gpu-memory-utilization") == "0.22"


@pytest.mark.parametrize(
    ("gib", "heads", "gpus"), [(1, 32, 1), (15, 32, 2), (30, 32, 4), (30, 6, 3), (15, 9, 3)]
)
def test_it_takes_the_fewest_gpus_that_hold_the_weights(
    tmp_path: Path, gib: float, heads: int, gpus: int
) -> None:
    made = command(model=model_folder(tmp_path, gib, heads), gpus=[Gpu(20 * GIB, 80 * GIB)] * 4)
    assert argument(made, "--tensor-parallel-size") == str(gpus)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        Unreachable, match=r"140.0 GiB do not fit into the 18.0 GiB that are free on each of 8 GPUs"
    ):
        command(model=model_folder(tmp_path, 140, 64), gpus=[Gpu(20 * GIB, 80 * GIB)] * 8)


def test_the_recipes_own_arguments_override() -> None:
    assert argument(command("eval.vllm_args=[--max-model-len, 4096]"), "--max-model-len") == "4096"


def test_it_knows_nothing_of_the_run_it_is_started_from(monkeypatch: pytest.MonkeyPatch) -> None:
    leaks = {
        *(
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "MASTER_ADDR",
            "TORCHELASTIC_RUN_ID",
            "PYTHONPATH",
            "PYTHONHOME",
        ),
        *(
            "VIRTUAL_ENV",
            "DS_ACCELERATOR",
            "NCCL_DEBUG",
            "OMP_NUM_THREADS",
            "JUDGE_KEY",
            "PYTORCH_CUDA_ALLOC_CONF",
        ),
    }
    kept = {"CUDA_VISIBLE_DEVICES", "HOME", "HF_HOME", "VLLM_LOGGING_LEVEL"}
    for name in leaks | kept:
        monkeypatch.setenv(name, "x")
    assert kept <= set(clean_environment())
    assert not leaks & set(clean_environment())


# -------------------------------------------------------------------------------------- its process

# A stand-in for vLLM: it has a child that outlives it, as vLLM has its engine, and speaks the
# protocol. What vLLM itself is needed for is not tested with it.
STAND_IN = """
    import json, os, signal, subprocess, sys
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    given = dict(zip(sys.argv[1:], sys.argv[2:]))
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    engine = subprocess.Popen(sleep, start_new_session=True)
    seen = {"pids": [os.getpid(), engine.pid], "cwd": os.listdir()}
    with open(os.environ["VLLM_STAND_IN"], "w") as file:
        json.dump(seen, file)
    if given["--seed"] == "13":
        sys.exit("ValueError: no room for the KV cache\\nbye")

    print("RuntimeError: head_dim=16 is not supported", flush=True)

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply(200, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["model"] != given["--model"] or given["--seed"] == "14":
                return self.reply(404, {"error": "no such model"})
            choices = [{"text": " ".join(map(str, body["prompt"]))}]
            usage = {"prompt_tokens": len(body["prompt"])}
            self.reply(200, {"choices": choices, "usage": usage})

    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make `vllm_python`, whose vllm is the stand-in; yield the file that it writes its ids to."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(textwrap.dedent(STAND_IN))
    python = tmp_path / "vllm_python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("VLLM_STAND_IN", str(tmp_path / "started.json"))
    yield tmp_path / "started.json"
    for pid in started(tmp_path / "started.json")["pids"]:
        if runs(pid):
            os.kill(pid, signal.SIGKILL)


def started(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() and path.read_text() else {"pids": []}


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_vllm_is_gone_with_all_its_processes_when_it_has_answered(
    vllm: Path, tmp_path: Path
) -> None:
    made = vllm_recipe(tmp_path / "vllm_python")
    check_server(made)
    assert answers(made, MODEL, PROMPTS, log=tmp_path / "logs" / "vllm.log") == ["5 6 7", "8 9"]
    seen = started(vllm)
    assert len(seen["pids"]) == 2
    assert not [pid for pid in seen["pids"] if runs(pid)]
    assert seen["cwd"] == [], "its Python looks for modules in the working directory first"


def test_vllm_that_does_not_start_is_quoted(vllm: Path, tmp_path: Path) -> None:
    made = vllm_recipe(tmp_path / "vllm_python", "train.seed=13")
    with pytest.raises(
        Unreachable, match=r"ValueError: no room for the KV cache.; its output is in .*vllm.log"
    ):
        answers(made, MODEL, PROMPTS, log=tmp_path / "vllm.log")
    assert not [pid for pid in started(vllm)["pids"] if runs(pid)]


def test_vllm_that_does_not_answer_is_quoted(vllm: Path, tmp_path: Path) -> None:
    made = vllm_recipe(tmp_path / "vllm_python", "train.seed=14")
    with pytest.raises(
        Unreachable,
        match=r"refused .404.* .RuntimeError: head_dim=16 is not supported.; its output",
    ):
        answers(made, MODEL, PROMPTS, log=tmp_path / "vllm.log")
    assert not [pid for pid in started(vllm)["pids"] if runs(pid)]


def test_vllm_is_gone_when_a_stop_ends_the_wait(vllm: Path, tmp_path: Path) -> None:
    made = vllm_recipe(tmp_path / "vllm_python")
    with pytest.raises(Stopped):
        answers(
            made,
            MODEL,
            PROMPTS,
            log=tmp_path / "vllm.log",
            stopping=lambda: bool(started(vllm)["pids"]),
        )
    assert not [pid for pid in started(vllm)["pids"] if runs(pid)]


def test_vllm_is_gone_when_the_run_is_killed(vllm: Path, tmp_path: Path) -> None:
    """By SIGKILL, after which it cannot clean up."""
    program = f"""
        import sys, time
        from pathlib import Path
        from tests.unit import test_vllm_server as t
        from packhorse.trainer.eval import vllm_server
        made = t.vllm_recipe({str(tmp_path / "vllm_python")!r})
        log = Path({str(tmp_path / "vllm.log")!r})
        with vllm_server.running_vllm(made, t.MODEL, 3, log, (), lambda: False):
            print("there", flush=True)
            time.sleep(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "there\n"
        pids = started(vllm)["pids"]
        assert all(runs(pid) for pid in pids)
    finally:
        process.kill()
        process.wait()
    until(lambda: not [pid for pid in pids if runs(pid)])


def test_vllm_is_gone_when_its_guard_is_killed(vllm: Path, tmp_path: Path) -> None:
    made = vllm_recipe(tmp_path / "vllm_python")
    with running_vllm(made, MODEL, 3, tmp_path / "vllm.log", (), lambda: False):
        server = psutil.Process(started(vllm)["pids"][0])
        guard = server.parent()
        assert guard
        guard.kill()
        server.wait(60)
