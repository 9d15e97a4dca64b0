"""Configurations of other trainers become recipes, and what they do not hold is listed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from packhorse.trainer.config.convert import convert, recognise
from packhorse.trainer.config.recipe import Recipe, load_recipe, parse_recipe
from packhorse.trainer.datatypes import BadInput
from tests.ranks import ROOT

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
  - path: data/chats.jsonl
    type: chat_template
    field_messages: chat
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
peft_use_rslora: true
peft_trainable_token_indices: [128000]
wandb_project: mine
wandb_api_key: SECRET1
trackio: {space: x, hf_token: SECRET2}
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.0
deepspeed: deepspeed_configs/zero3_bf16.json
chat_template: llama3
"""
LLAMA_FACTORY = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
moe_aux_loss_coef: 0.001
### dataset
dataset: identity,alpaca_en_demo
dataset_dir: DATA
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-7B
torch_dtype: bfloat16
attn_implementation: flash_attention_2
dataset_name: HuggingFaceH4/ultrachat_200k
dataset_train_split: train_sft
dataset_test_split: test_sft
max_length: 4096
packing: true
assistant_only_loss: true
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
gradient_checkpointing: true
learning_rate: 2.0e-5
lr_scheduler_type: cosine
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_steps: 100
max_steps: 1000
adam_beta2: 0.95
eval_strategy: steps
eval_steps: 100
save_strategy: epoch
output_dir: runs/ultrachat
report_to: [wandb]
hub_token: SECRET3
fp16: false
"""
INFO = """{
  "identity": {"file_name": "identity.json"},
  "alpaca_en_demo": {"hf_hub_url": "me/alpaca", "columns": {"prompt": "question"}}
}"""


def converted(text: str, gpus: int = 1) -> tuple[Recipe, str]:
    """The recipe, as it parses, and the notes."""
    tree = yaml.safe_load(text)
    recipe, notes = convert(tree, recognise(tree), gpus)
    return parse_recipe(recipe), "\n".join(notes)


def values(recipe: Recipe, *keys: str) -> list[object]:
    flat = recipe.model_dump()
    return [flat[key.split(".")[0]][key.split(".")[1]] for key in keys]


def test_axolotl() -> None:
    recipe, notes = converted(AXOLOTL, gpus=4)
    assert values(recipe, "model.name", "batch.seq_len", "data.eval_fraction", "run.dir") == [
        "NousResearch/Llama-3.2-1B",
        2048,
        0.1,
        "./outputs/lora-out",
    ]
    assert values(recipe, "batch.micro_batch_size", "batch.global_batch_size") == [2, 2 * 2 * 4]
    assert values(recipe, "adapter.rank", "adapter.alpha", "adapter.base", "adapter.variants") == [
        16,
        32,
        "nf4",
        ("rslora",),
    ]
    assert values(recipe, "optim.lr", "optim.betas", "optim.min_lr_ratio") == [
        2e-4,
        (0.9, 0.999),
        0.0,
    ]
    assert recipe.parallel.deepspeed == "zero3"
    alpaca, chats = recipe.data.train
    assert (alpaca.name, alpaca.format) == ("teknium/GPT4-LLM-Cleaned", "instruction")
    assert (chats.path, chats.format) == ("data/chats.jsonl", "sharegpt")
    assert chats.columns == {"conversations": "chat"}
    assert recipe.optim.kind == "adamw_8bit"
    assert values(recipe, "adapter.trainable_token_indices") == [(128000,)]
    listed = ("warmup_steps: 10", "chat_template: 'llama3'")
    listed += ("evals_per_epoch: 4", "wandb_project: 'mine'", "datasets[1].roles_to_train:")
    assert all(note in notes for note in listed)
    assert "2 x 2 accumulated x 4 GPUs = 16" in notes
    assert "SECRET" not in notes
    assert "load_in_8bit" not in notes, "it is switched off"


@pytest.mark.parametrize("described", [True, False])
def test_llama_factory(tmp_path: Path, described: bool) -> None:
    if described:
        (tmp_path / "dataset_info.json").write_text(INFO)
    recipe, notes = converted(LLAMA_FACTORY.replace("DATA", str(tmp_path)))
    assert values(recipe, "adapter.rank", "adapter.alpha", "adapter.target_modules") == [
        8,
        16,
        "all-linear",
    ]
    assert values(recipe, "batch.seq_len", "data.too_long", "data.packing", "train.epochs") == [
        2048,
        "truncate",
        "none",
        3,
    ]
    assert values(recipe, "eval.every_steps", "checkpoint.every_steps", "run.log_every") == [
        500,
        500,
        10,
    ]
    assert recipe.loss.router_aux == 0.001
    identity, alpaca = recipe.data.train
    assert (identity.path, identity.rows) == (str(tmp_path / "identity.json"), 1000)
    if described:
        assert (alpaca.name, alpaca.format) == ("me/alpaca", "instruction")
        assert alpaca.columns == {"instruction": "question"}
    assert ("dataset_info.json does not describe it" in notes) == (not described)
    assert "template: 'llama3' - `model.chat_template`" in notes


def test_trl() -> None:
    recipe, notes = converted(TRL, gpus=2)
    (source,), (held_out,) = recipe.data.train, recipe.data.eval
    assert (source.name, source.split) == ("HuggingFaceH4/ultrachat_200k", "train_sft")
    assert held_out.split == "test_sft"
    assert values(recipe, "data.train_on", "data.packing", "model.attention", "model.dtype") == [
        "assistant",
        "bfd",
        "flash_attn",
        "bfloat16",
    ]
    assert values(recipe, "optim.warmup_ratio", "optim.min_lr_ratio", "optim.betas") == [
        0.1,
        0.1,
        (0.9, 0.95),
    ]
    assert values(recipe, "batch.global_batch_size", "batch.seq_len", "train.steps") == [
        4 * 4 * 2,
        4096,
        1000,
    ]
    assert recipe.adapter is None
    assert "report_to: ['wandb']" in notes
    assert "save_strategy: 'epoch'" in notes
    assert "hub_token: '(not shown)'" in notes


def test_defaults_that_differ_are_written_down() -> None:
    recipe, _ = converted("model_name_or_path: m\ndataset_name: d\n")
    assert values(recipe, "batch.seq_len", "batch.micro_batch_size", "train.epochs") == [1024, 8, 3]
    assert values(recipe, "optim.weight_decay", "optim.lr_schedule", "data.train_on") == [
        0.0,
        "linear",
        "all",
    ]


def test_switches_of_one_key_do_not_undo_each_other() -> None:
    text = "model_name_or_path: m\nstage: sft\ndataset: d.jsonl\n"
    assert converted(f"{text}train_on_prompt: true\nmask_history: false")[0].data.train_on == "all"
    last = converted(f"{text}mask_history: true\ntrain_on_prompt: false")[0]
    assert last.data.train_on == "completion"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {name: x}", "no configuration of Axolotl"),
        ("- a", "no configuration of Axolotl"),
        ("base_model: m\ndatasets: [text]", "is not of the type that Axolotl gives it"),
        ("base_model: m\nnum_epochs: many", "is not of the type that Axolotl gives it"),
        ("base_model: m\nnum_epochs: .inf", "is not of the type that Axolotl gives it"),
        (f"base_model: m\nnum_epochs: 1{'0' * 400}", "is not of the type that Axolotl gives it"),
        ("base_model: m\nmicro_batch_size: {a: 1}", "sizes of batches are {'a': 1} and 1"),
        # 40 GB, if the text were repeated
        (
            "base_model: m\nmicro_batch_size: eightchr\ngradient_accumulation_steps: 5000000000",
            "sizes of batches are 'eightchr' and 5000000000",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, sentence: str) -> None:
    tree = yaml.safe_load(text)
    with pytest.raises(BadInput, match=sentence):
        convert(tree, recognise(tree), 1)


def test_the_command_writes_a_recipe_and_replaces_only_its_own(tmp_path: Path) -> None:
    config, out = tmp_path / "trl.yaml", tmp_path / "recipe.yaml"
    config.write_text(TRL)

    def command(*more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "packhorse", "convert", str(config), *more]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    done = command("--out", str(out), "--gpus", "8")
    following = f"look at what is trained: packhorse preview {out}"
    assert (done.returncode, done.stdout) == (0, f"{out}\n{following}\n")
    assert "report_to: ['wandb']" in done.stderr
    assert "# report_to: ['wandb']" in out.read_text()
    assert load_recipe(out).batch.global_batch_size == 128
    shown = command()
    assert parse_recipe(yaml.safe_load(shown.stdout)).run.dir == "runs/ultrachat"
    out.write_text("mine")
    refused = command("--out", str(out))
    assert (refused.returncode, out.read_text()) == (2, "mine")


def test_every_file_of_a_dataset_is_a_source() -> None:
    files = {"path": "./data", "type": "alpaca", "data_files": ["a.jsonl", "b.jsonl"]}
    recipe, _ = convert({"base_model": "x", "datasets": [files]}, "Axolotl", 1)
    assert recipe["data"]["train"] == [
        {"path": path, "format": "instruction"} for path in ("a.jsonl", "b.jsonl")
    ]


def test_a_split_of_a_local_folder_stays() -> None:
    given = [{"path": "./data", "split": "test", "data_files": "test-*.jsonl"}, {"path": "./x"}]
    recipe, _ = convert({"model_name_or_path": "x", "datasets": given}, "TRL", 1)
    assert recipe["data"]["train"] == [
        {"path": "./data", "split": "test", "data_files": "test-*.jsonl"},
        {"path": "./x"},
    ]


def test_a_key_of_an_adapter_makes_none_where_all_weights_are_trained() -> None:
    given = {"model_name_or_path": "x", "finetuning_type": "full", "additional_target": "lm_head"}
    recipe, notes = convert(given, "LLaMA-Factory", 1)
    assert "adapter" not in recipe
    assert any("additional_target" in note for note in notes)


def test_a_split_that_is_null_is_train_and_a_file_has_none() -> None:
    given = [
        {"path": "./data", "split": None},
        {"path": "x.jsonl", "split": "test", "name": "main", "data_files": "y.jsonl"},
    ]
    recipe, notes = convert({"model_name_or_path": "x", "datasets": given}, "TRL", 1)
    assert recipe["data"]["train"] == [{"path": "./data"}, {"path": "x.jsonl"}]
    for key, value in (("split", "test"), ("name", "main"), ("data_files", "y.jsonl")):
        assert f"datasets[1].{key}: {value!r}" in notes


@pytest.mark.parametrize("place", ["./data", "some/dataset"])
def test_files_by_split_are_the_files_and_not_the_names_of_splits(place: str) -> None:
    files = {"train": ["a.jsonl", "b.jsonl"], "more": "c.jsonl"}
    given = {"path": place, "type": "alpaca", "data_files": files}
    recipe, notes = convert({"base_model": "x", "datasets": [given]}, "Axolotl", 1)
    read = ["a.jsonl", "b.jsonl", "c.jsonl"]
    paths = [{"path": path, "format": "instruction"} for path in read]
    alone = [{"name": place, "data_files": read, "format": "instruction"}]
    assert recipe["data"]["train"] == (paths if place == "./data" else alone)
    assert any("datasets[0].data_files" in note for note in notes)


@pytest.mark.parametrize("content", ["[" * 99_999, "[]", None])
def test_a_description_of_the_data_may_hold_anything(tmp_path: Path, content: str | None) -> None:
    """None: it is a pipe, which would be waited for."""
    if content is None:
        os.mkfifo(tmp_path / "dataset_info.json")
        converted(LLAMA_FACTORY.replace("DATA", str(tmp_path)))
    else:
        (tmp_path / "dataset_info.json").write_text(content)
        with pytest.raises(BadInput, match="holds no JSON object"):
            converted(LLAMA_FACTORY.replace("DATA", str(tmp_path)))


def test_a_foreign_key_controls_neither_the_terminal_nor_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(
        'base_model: "m\\u202e"\ndatasets: [{path: a.jsonl, type: alpaca}]\n'
        '"\\e[31m\\nrun: {dir: elsewhere}": 1\n'
    )
    words = ["convert", str(tmp_path / "c.yml"), "--out", str(tmp_path / "r.yaml")]
    command = [sys.executable, "-m", "packhorse", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for shown in (done.stderr, (tmp_path / "r.yaml").read_text()):
        assert "␛[31m run: {dir: elsewhere}: 1" in shown
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    assert load_recipe(tmp_path / "r.yaml").model.name == "m\u202e"


def test_no_secret_is_shown_whatever_its_key_is_called() -> None:
    secrets = "aws_secret_access_key: S1\nhub: {credentials: S2, db_passwd: S3}\n"
    secrets += "tracking_uri: https://me:S4@host/x\n"
    notes = converted(AXOLOTL + secrets)[1]
    assert "tracking_uri: 'https://***@host/x'" in notes
    assert not [secret for secret in ("S1", "S2", "S3", "S4") if secret in notes]
