"""`packhorse chat` answers as `model.generate` does, from a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from packhorse.trainer.cli.main import app
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.eval import chat
from packhorse.trainer.eval.chat import _Pieces
from tests.ranks import ROOT

DEBUG_MODEL = ROOT / "recipes" / "debug" / "model"
QUESTIONS = ["How many eggs are in 3 boxes?", "Ada has 4 books. How many does Ada have?"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a random model with room for an answer of any length."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(DEBUG_MODEL, max_position_embeddings=1_000_000)
    model = AutoModelForCausalLM.from_config(config)
    # what only sampling uses must not stop greedy answers
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEBUG_MODEL).save_pretrained(folder)
    return folder


def generated(folder: Path, messages: list[dict[str, str]], max_tokens: int) -> str:
    """Return what transformers alone answers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
    answer = out[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def piped(model_dir: Path, text: str, *options: str) -> str:
    """Return what the command prints for the lines of `text`."""
    done = CliRunner().invoke(app, ["chat", str(model_dir), *options], input=text)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_answers_to_a_pipe_are_those_of_generate(model_dir: Path) -> None:
    system = {"role": "system", "content": "Be short."}
    text = "\n\n".join(QUESTIONS)  # the last line has no end, and an empty line asks nothing
    for first, options in (([], ()), ([system], ("--system", "Be short."))):
        answers = [
            generated(model_dir, [*first, {"role": "user", "content": question}], 24)
            for question in QUESTIONS
        ]
        assert piped(model_dir, text, "--max-tokens", "24", *options) == "".join(
            f"{answer}\n" for answer in answers
        )


def test_a_template_that_reads_lists_of_parts_is_given_them(model_dir: Path) -> None:
    written = model_dir / "chat_template.jinja"
    before = written.read_text()
    written.write_text(
        "{% for m in messages %}{{ m.role }}: {% for p in m.content if p.type == 'text' %}"
        "{{ p.text }}{% endfor %}\n{% endfor %}"
    )
    try:
        parts: Any = [{"type": "text", "text": QUESTIONS[0]}]
        answer = generated(model_dir, [{"role": "user", "content": parts}], 24)
        assert piped(model_dir, QUESTIONS[0], "--max-tokens", "24") == f"{answer}\n"
    finally:
        written.write_text(before)


def test_answers_are_sampled_at_a_temperature(model_dir: Path) -> None:
    same = "\n".join([QUESTIONS[0]] * 3)
    answers = piped(model_dir, same, "--max-tokens", "24", "--temperature", "1.5")
    greedy = generated(model_dir, [{"role": "user", "content": QUESTIONS[0]}], 24)
    assert answers != f"{greedy}\n" * 3


def test_pieces_of_an_answer_are_whole_characters() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(DEBUG_MODEL)
    text = "Zoë said:\n 3 eggs → 🥚"
    shown: list[str] = []
    pieces = _Pieces(tokenizer, shown.append)
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(shown) == pieces.text == text
    assert len(shown) > 3
    assert not any("\ufffd" in piece for piece in shown)


def test_a_model_without_room_or_template_is_refused(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, max_position_embeddings=64)
    model.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(DEBUG_MODEL)
    tokenizer.save_pretrained(folder)
    done = CliRunner().invoke(app, ["chat", str(folder)], input="word " * 100)
    assert isinstance(done.exception, BadInput)
    assert "and the model 64 positions" in str(done.exception)
    (folder / "chat_template.jinja").unlink()
    done = CliRunner().invoke(app, ["chat", str(folder)], input="word")
    assert isinstance(done.exception, BadInput)
    assert "no chat template" in str(done.exception)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('no \x1b[31m') }}", "the template refuses the row: no "),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ 'a' * 20000000000 }}", "the template refuses the row: MemoryError"),
        ("{% if %}", "not valid Jinja"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "is not finished within",
        ),
    ],
)
def test_a_strangers_template_ends_and_is_a_sentence(
    model_dir: Path, tmp_path: Path, template: str, sentence: str
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    before = resource.getrlimit(resource.RLIMIT_AS)
    done = CliRunner().invoke(app, ["chat", str(folder)], input="word")
    assert isinstance(done.exception, BadInput), done.output
    assert sentence in str(done.exception)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_weights_that_are_a_pickle_are_not_read(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    weights = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    done = CliRunner().invoke(app, ["chat", str(folder)], input="word")
    assert isinstance(done.exception, BadInput), done.output
    assert "no file named model.safetensors" in str(done.exception)


def changed(folder: Path, name: str, **keys: Any) -> None:
    """Set keys of a JSON file in the folder."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def refusal(folder: Path) -> str:
    """Return the sentence with which the command refuses the folder."""
    done = CliRunner().invoke(app, ["chat", str(folder)], input="word")
    assert isinstance(done.exception, BadInput), (done.output, done.exception)
    return str(done.exception)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "evil/kernel@main:fn", {"": "evil/kernel"}])
def test_a_kernel_that_a_configuration_names_is_not_downloaded(
    model_dir: Path, tmp_path: Path, key: str, value: Any
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    changed(folder, "config.json", **{key: value})
    assert "names a kernel of the hub" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("../elsewhere.safetensors", "no safetensors file beside it"),
        ("pickle.bin", "no safetensors file beside it"),
        ("pipe.safetensors", "there is no file pipe.safetensors"),
        (5, "no safetensors file beside it"),
    ],
)
def test_an_index_of_weights_names_safetensors_beside_it_alone(
    model_dir: Path, tmp_path: Path, file: Any, sentence: str
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    torch.save(tensors, folder / "pickle.bin")
    os.mkfifo(folder / "pipe.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sentence in refusal(folder)


def test_a_configuration_names_no_pickle_of_weights(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    changed(folder, "config.json", transformers_weights="adapter_model.bin")
    assert "names 'adapter_model.bin', no safetensors file" in refusal(folder)


@pytest.mark.parametrize("key", ["num_labels", "num_hidden_layers"])
def test_a_configuration_of_a_billion_parts_is_refused(
    model_dir: Path, tmp_path: Path, key: str
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    changed(folder, "config.json", **{key: 10**9})
    assert f"`{key}` is 1e+09; no model has so many" in refusal(folder)


def test_a_model_that_lacks_weights_does_not_answer_by_random_ones(
    model_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "lacks weights" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("tokenizer_config.json", {"model_max_length": "many"}),
        ("generation_config.json", {"stop_strings": 5}),
        ("config.json", {"quantization_config": {"load_in_4bit": True}}),
    ],
)
def test_what_generation_cannot_use_is_a_sentence(
    model_dir: Path, tmp_path: Path, file: str, keys: dict[str, Any]
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    changed(folder, file, **keys)
    assert "the model cannot answer" in refusal(folder)


def test_questions_that_are_no_text_are_named(model_dir: Path) -> None:
    for words, text, sentence in (
        ([], b"hi\ncaf\xff\n", "line 2 of stdin is no text in UTF-8"),
        (["--system", "a\udcff"], b"hi", "--system is no text in UTF-8"),
    ):
        command = ["chat", str(model_dir), "--max-tokens", "2", *words]
        done = CliRunner().invoke(app, command, input=text)
        assert isinstance(done.exception, BadInput), done.output
        assert sentence in str(done.exception)


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_stdin_or_stdout_is_a_sentence(model_dir: Path, closed: str) -> None:
    command = [sys.executable, "-m", "packhorse", "chat", str(model_dir)]
    line = f"{shlex.join(command)} {closed}"
    done = subprocess.run(line, shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "error: chat: it reads stdin and writes stdout" in done.stderr


def test_an_adapter_answers_on_the_base_that_it_names(model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model: Any = get_peft_model(base, config)
    model.save_pretrained(str(tmp_path / "adapter"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(DEBUG_MODEL).save_pretrained(tmp_path / "merged")
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    expected = generated(tmp_path / "merged", asked, 24)
    assert expected != generated(model_dir, asked, 24)
    assert piped(tmp_path / "adapter", QUESTIONS[0], "--max-tokens", "24") == f"{expected}\n"

    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(model_dir), str(tmp_path / "gone")))
    refused = CliRunner().invoke(app, ["chat", str(file.parent)], input="word")
    assert isinstance(refused.exception, BadInput)
    assert f"there is no folder {tmp_path / 'gone'}" in str(refused.exception)
    file.write_text("{}")
    refused = CliRunner().invoke(app, ["chat", str(file.parent)], input="word")
    assert "names no base model" in str(refused.exception)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"peft_type": "XLORA"}, "its peft_type is 'XLORA'"),
        ({"target_modules": "["}, "does not fit"),
        ({"init_lora_weights": 5}, "does not fit"),
        ({"megatron_config": {"a": 1}}, "does not fit"),
        ({"layer_replication": [[0, 99999999]]}, "does not fit"),
        ({"target_modules": "(.+)+!"}, "within 1 s of computing"),
    ],
)
def test_a_strangers_adapter_ends_and_is_a_sentence(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.setattr(chat, "_ADAPTER_S", 1)
    folder = tmp_path / "adapter"
    base: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(folder))
    changed(folder, "adapter_config.json", **keys)
    assert sentence in refusal(folder)


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(model_dir: Path) -> None:
    terminal, other_end = pty.openpty()
    command = ["chat", str(model_dir), "--max-tokens", "900000"]  # days, unless it is ended
    process = subprocess.Popen(
        [sys.executable, "-m", "packhorse", *command],
        stdin=other_end,
        stdout=other_end,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # so that Ctrl-C is sent
        env=os.environ | {"TERM": "dumb"},
    )
    os.close(other_end)
    seen = b""

    def read_until(pattern: bytes) -> None:
        nonlocal seen
        while not re.search(pattern, seen):
            assert select.select([terminal], [], [], 120)[0], seen
            seen += os.read(terminal, 4096)

    try:
        for _ in range(2):
            read_until(rb"> ")
            seen = b""
            os.write(terminal, QUESTIONS[0].encode() + b"\n")
            read_until(rb"\n[^\n]{10}")  # after the echo of the question, an answer has begun
            os.write(terminal, b"\x03")
        read_until(rb"\n> ")
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)
