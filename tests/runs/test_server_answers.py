"""Answers of a real OpenAI-compatible server, `transformers serve`, are the engine's."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packhorse.trainer.config.eval import Server
from packhorse.trainer.config.recipe import load_recipe
from packhorse.trainer.data.prepare import held_out_prompts, masker_of
from packhorse.trainer.eval.generate import answer_ids
from packhorse.trainer.eval.openai_client import Client, Unreachable
from packhorse.trainer.eval.server_answers import answers
from packhorse.trainer.model.load import load_model, load_tokenizer
from tests.ranks import ROOT, run_ranks
from tests.stand_in_server import Reply, Request, StandIn

pytestmark = pytest.mark.runs

START_S = 180.0
ADAPTER = ("adapter={rank: 8, variants: [dora], modules_to_save: [lm_head]}", "optim.lr=0.1")
SHORT = (
    "train.steps=2",
    "eval.every_steps=1",
    "optim.lr=1e-3",
    "parallel.deepspeed=zero3",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run `transformers serve` with no model loaded."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("transformers"),
                "serve",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        made = Server(url=f"http://127.0.0.1:{port}/v1")
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                with Client(made) as client:
                    client.check()
                break
            except Unreachable:
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        yield made
    finally:
        process.kill()
        process.wait()


def case(root: Path, name: str, *overrides: str) -> dict[str, Any]:
    return {
        "run": str(root / name),
        "recipe": str(ROOT / "recipes" / "debug.yaml"),
        "overrides": [*SHORT, f"data.cache={root / 'cache'}", *overrides],
    }


def asks(server: Server | StandIn) -> list[str]:
    return [f"eval.server.url={server.url}"]


@pytest.fixture(scope="module")
def runs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train the same run on two ranks at ZeRO-3 with answers of the engine and of servers.

    One server fails after step 0. A run with an adapter has answers of the engine and of a server.
    """
    root = tmp_path_factory.mktemp("runs")

    def first_step_alone(request: Request) -> Reply:
        if "step-000000" not in request.body["model"]:
            return 400, "the disk is not there"
        if not isinstance(request.body["prompt"], list):
            return 400, "ids alone"
        return 200, {
            "choices": [{"text": "hm"}],
            "usage": {"prompt_tokens": len(request.body["prompt"])},
        }

    with StandIn(first_step_alone) as failing:
        cases = [
            case(root, "engine"),
            case(root, "server", *asks(server)),
            case(root, "failing", *asks(failing)),
            case(root, "adapter, engine", *ADAPTER),
            case(root, "adapter, server", *ADAPTER, *asks(server)),
        ]
        (root / "cases.json").write_text(json.dumps(cases))
        run_ranks(2, ["-m", "tests.numerics.cases", str(root / "cases.json")], timeout_s=600)
    return {
        name: root / name
        for name in ("engine", "server", "failing", "adapter, engine", "adapter, server")
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("what", ["", "adapter, "])
def test_a_run_is_evaluated_alike_by_the_engine_and_by_a_server(
    runs: dict[str, Path], what: str
) -> None:
    by_engine, by_server = (
        lines(runs[what + name] / "samples.jsonl") for name in ("engine", "server")
    )
    assert by_server == by_engine
    at = {
        step: [sample["answer"] for sample in by_engine if sample["step"] == step]
        for step in (0, 1, 2)
    }
    assert at[0] != at[1] != at[2], "else a server that keeps old weights would pass"


def test_the_weights_are_deleted_after_the_answers(runs: dict[str, Path]) -> None:
    assert not (runs["server"] / "serving").exists()


def test_a_server_that_fails_in_the_middle_ends_no_run(runs: dict[str, Path]) -> None:
    assert {sample["step"] for sample in lines(runs["failing"] / "samples.jsonl")} == {0}
    evaluated = {
        line["step"]: line
        for line in lines(runs["failing"] / "metrics.jsonl")
        if "eval/loss" in line
    }
    assert set(evaluated) == {0, 1, 2}
    assert "eval/format_accuracy" in evaluated[0]
    assert "eval/format_accuracy" not in evaluated[1]
    assert (runs["failing"] / "summary.json").is_file()


def test_a_server_that_is_down_at_the_start_is_bad_input(tmp_path: Path) -> None:
    with StandIn(lambda _: (200, {})) as down:
        pass
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "packhorse",
            "train",
            "recipes/debug.yaml",
            f"run.dir={tmp_path / 'run'}",
            *asks(down),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert f"eval.server: the server at {down.url} does not answer" in run.stderr
    assert "Traceback" not in run.stderr


class NoStop:
    def poll(self) -> bool:
        return False

    def beat(self, where: str) -> None:
        pass


def test_a_real_models_greedy_answers_are_the_engines(
    server: Server, shared: Path, tmp_path: Path
) -> None:
    folder = Path("~/.cache/packhorse/models/smollm2-135m-instruct").expanduser()
    runpy.run_path(str(ROOT / "recipes" / "quickstart" / "get_smollm2.py"))["get"](folder)
    recipe = load_recipe(
        ROOT / "recipes" / "debug.yaml",
        [
            f"model={{name: {folder}, dtype: float32}}",
            f"data.eval=[{{path: {shared / 'data' / 'gsm8k_test.jsonl'}}}]",
            "eval.generate.num_prompts=4",
            "eval.generate.max_new_tokens=24",
            *asks(server),
        ],
    )
    assert recipe.eval.generate
    tokenizer = load_tokenizer(recipe.model)
    masker = masker_of(recipe.data, tokenizer)
    prompts = held_out_prompts(recipe, masker, recipe.eval.generate.num_prompts)
    model = load_model(recipe.model, tokenizer, seed=0)
    model.generation_config.eos_token_id = sorted(masker.stop_token_ids)
    model.config.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    module = SimpleNamespace(model=model)
    engine: Any = SimpleNamespace(module=module, gather_for_generation=lambda: nullcontext(True))
    never: Any = NoStop()
    seeds = [0] * len(prompts)  # nothing is drawn
    asked = [prompt.input_ids for prompt in prompts]
    ids = answer_ids(engine, asked, recipe.eval.generate, 1000, never, never, seeds=seeds)
    by_engine = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert answers(recipe, str(tmp_path / "model"), prompts, log=tmp_path / "unused") == by_engine
