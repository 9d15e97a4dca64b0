"""Tokenizers and models load unchanged, or are refused in one sentence; shards equal the whole."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import ModelSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model.checks import require_positions
from packhorse.trainer.model.load import load_model, load_tokenizer
from packhorse.trainer.model.new_weights import initialise
from tests.model_helpers import SIZES, tiny_llama
from tests.ranks import run_ranks

torch.set_num_threads(1)

ROWS = 120
CHATML = ["<|im_start|>", "<|im_end|>"]


def write_tokenizer(folder: Path, tokens: int = 100) -> None:
    words = {f"w{i}": i for i in range(tokens - 2)} | {"<unk>": tokens - 2, "</s>": tokens - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tf.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_model(folder: Path, **changes: Any) -> None:
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, "vocab_size": ROWS, **changes})).save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path)
    write_model(path)
    return path


def section(name: Path | str, **changes: Any) -> ModelSection:
    return ModelSection.model_validate({"name": str(name), "dtype": "float32", **changes})


def load(name: Path, seed: int = 0, **changes: Any) -> Any:
    wanted = section(name, **changes)
    return load_model(wanted, load_tokenizer(wanted), seed=seed)


# --------------------------------------------------------------------------------------- tokenizers


def test_the_tokenizer_is_the_folders_own(folder: Path) -> None:
    assert load_tokenizer(section(folder)).encode("w3 w7") == [3, 7]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no folder .*/nowhere"):
        load_tokenizer(section(tmp_path / "nowhere"))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(BadInput, match="has no tokenizer"):
        load_tokenizer(section(tmp_path))


def test_an_unreachable_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        BadInput, match=r"cannot load the tokenizer .* from the hub .* local folder"
    ):
        load_tokenizer(section("nobody/no-such-model"))


def test_a_template_file_takes_the_place_of_the_tokenizers_own(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer = load_tokenizer(section(folder, chat_template=str(tmp_path / "t.jinja")))
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1"
    )
    with pytest.raises(BadInput, match="there is no file"):
        load_tokenizer(section(folder, chat_template=str(tmp_path / "missing.jinja")))


def test_chatml_needs_its_tokens(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"no <\|im_start\|> and no <\|im_end\|>.*model.add_tokens"):
        load_tokenizer(section(folder, chat_template="chatml"))


def test_chatml_with_its_tokens_added(folder: Path) -> None:
    tokenizer = load_tokenizer(section(folder, chat_template="chatml", add_tokens=CHATML))
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\nw1<|im_end|>\n<|im_start|>assistant\nw2<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(CHATML) == [100, 101]
    assert tokenizer.encode("<|im_end|>") == [101]


# ------------------------------------------------------------------------------------------- models


def test_the_weights_are_the_folders_own(folder: Path) -> None:
    ours, plain = load(folder), tf.AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters()))
    assert ours.config._attn_implementation == "packhorse_reference"
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_recomputation_follows_the_recipe(folder: Path) -> None:
    assert load(folder).is_gradient_checkpointing
    assert not load(folder, activation_checkpointing="none").is_gradient_checkpointing


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_before_weights_are_read(
    tmp_path: Path,
) -> None:
    write_tokenizer(tmp_path)
    tf.LlamaConfig(**{**SIZES, "vocab_size": 99}).save_pretrained(tmp_path)  # no weights at all
    with pytest.raises(BadInput, match="has 99 embeddings, but its tokenizer makes ids up to 99"):
        load(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_tokenizer(tmp_path)
    write_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BadInput, match=r"lacks weights of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            tf.T5Config(vocab_size=120, d_model=16, num_layers=1, num_heads=2),
            "not a causal language model",
        ),
        (tf.ViTConfig(), "not a causal language model"),
        (tf.LlamaConfig(**{**SIZES, "quantization_config": {"quant_method": "fp8"}}), "quantised"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(tmp_path: Path, config: Any, says: str) -> None:
    write_tokenizer(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=says):
        load(tmp_path)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(BadInput, match=r"no config\.json"):
        load(tmp_path)


def test_a_model_with_a_fixed_list_of_attentions_attends_by_itself(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tf.GPTNeoConfig(
        vocab_size=ROWS,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
    ).save_pretrained(tmp_path)
    assert load(tmp_path, init="random").config._attn_implementation == "eager"


# ------------------------------------------------------------------------------------- made weights


def test_random_weights_follow_the_seed_and_nothing_else(folder: Path) -> None:
    torch.manual_seed(1)
    first = load(folder, seed=7, init="random").state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again = load(folder, seed=7, init="random").state_dict()
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    other = load(folder, seed=8, init="random").state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("layers.0", "layers.1")])
    assert float(first[name].std()) == pytest.approx(0.02, rel=0.1), "the model's own rule"
    assert torch.equal(first["model.norm.weight"], torch.ones(32))


class Elsewhere(torch.nn.Parameter):
    """A parameter that says it lies on a GPU."""

    device = property(lambda _: torch.device("cuda"))  # type: ignore[assignment]


def test_new_weights_are_drawn_on_the_cpu_wherever_the_model_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ZeRO-3 builds it on the GPU, whose numbers are others, and the other stages on the CPU."""
    expected, model = tiny_llama().state_dict(), tiny_llama()
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, Elsewhere(torch.full_like(parameter, 9.0)))
    there = {name: p.data_ptr() for name, p in model.named_parameters()}
    copied: set[int] = set()
    plain = model._init_weights

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.clone()
        copied.add(made.data_ptr())
        return made

    def draw(module: torch.nn.Module) -> None:
        assert {p.data_ptr() for p in module.parameters(recurse=False)} <= copied
        plain(module)

    monkeypatch.setattr(torch.Tensor, "cpu", copy)
    monkeypatch.setattr(model, "_init_weights", draw)
    initialise(model, 0, lambda parameters, write=False: nullcontext())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == there
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old(tmp_path: Path, tied: bool) -> None:
    write_tokenizer(tmp_path)
    write_model(tmp_path, vocab_size=100, tie_word_embeddings=tied)
    before = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    after = load(tmp_path, chat_template="chatml", add_tokens=CHATML)
    assert after.config.vocab_size == 102
    for part in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, part)().weight, getattr(after, part)().weight
        assert torch.equal(new[:100], old)
        torch.testing.assert_close(new[100:], old.mean(0).expand(2, -1))
    assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == tied


def test_spare_rows_are_taken_and_those_of_other_tokens_left_alone(folder: Path) -> None:
    before: Any = tf.AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    model = load(folder, add_tokens=CHATML)
    after: torch.Tensor = model.get_input_embeddings().weight
    assert model.config.vocab_size == ROWS
    assert torch.equal(after[:100], before[:100])
    assert torch.equal(after[102:], before[102:])
    old = torch.cat([before[:100], before[102:]])
    torch.testing.assert_close(after[100:102], old.mean(0).expand(2, -1))


def test_tokens_that_an_export_already_has_keep_their_rows(folder: Path, tmp_path: Path) -> None:
    wanted = section(folder, add_tokens=CHATML)
    model, tokenizer = load(folder, add_tokens=CHATML), load_tokenizer(wanted)
    with torch.no_grad():
        model.get_input_embeddings().weight[101] = 7.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path, add_tokens=CHATML)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


# ---------------------------------------------------------------------------------------- in shards


def test_two_zero3_ranks_load_what_one_process_loads(tmp_path: Path) -> None:
    for name, tied in {"tied": True, "untied": False}.items():
        write_tokenizer(tmp_path / name)
        write_model(tmp_path / name, vocab_size=100, tie_word_embeddings=tied)
    output, other = run_ranks(
        2, ["-m", "tests.model_sharded", str(tmp_path / "tied"), str(tmp_path / "untied")]
    )
    # three pretrained cases of two folders, each loaded by one process and in shards
    counts = re.findall(r"loading weights: (\d+) of (\d+) weights", output)
    assert sum(done == of for done, of in counts) == 2 * 2 * 3, "each load ends with all weights"
    assert "oading weights" not in other, "only rank 0 shows it"
    seen = json.loads(next(line for line in output.splitlines() if line.startswith('{"tied')))
    print(json.dumps(seen, indent=1))
    assert len(seen) == 8
    for case, found in seen.items():
        assert found["differ"] == [], case
        assert found["sharded"], case
        if "loss" in found:
            assert found["loss"] == pytest.approx(found["plain loss"], rel=1e-6), case
            assert found["after"] < found["loss"] - 0.05, "it learns after the check"
            assert found["packing check"] < 1e-5
    more = json.loads(next(line for line in output.splitlines() if line.startswith('{"gradients')))
    print(more)
    control = more["gradients"].pop("control")
    assert control > 0.01, "DeepSpeed alone reduces after each call"
    assert max(more["gradients"].values()) < 1e-5, "gradients are those of plain PyTorch"
    for verdict in more["verdicts"]:  # rank 1's kernel alone is wrong, and both ranks heed that
        assert "its states differ" in verdict


# ------------------------------------------------------------------------------ damaged, too old


def damaged(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


def test_a_file_that_is_cut_short_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = damaged(folder, tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"cannot load the model in .*damaged \("):
        load(copy)


def test_a_pickled_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = damaged(folder, tmp_path)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="safetensors"):
        load(copy)


def test_a_tensor_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = damaged(folder, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 101}))
    with pytest.raises(BadInput, match="cannot load the model"):
        load(copy)


def test_a_generation_configuration_that_does_not_sample_can_be_saved(
    folder: Path, tmp_path: Path
) -> None:
    copy = damaged(folder, tmp_path)
    (copy / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    model = load(copy)
    model.generation_config.pad_token_id = 1  # which a run sets before it saves
    model.generation_config.save_pretrained(tmp_path)


def test_a_table_of_positions_must_reach_the_longest_document() -> None:
    gpt2 = tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=160, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    )
    require_positions(gpt2, 64)
    with pytest.raises(BadInput, match=r"table of 64 positions; set data\.max_length=64"):
        require_positions(gpt2, 65)


def test_documents_beyond_the_models_context_are_said(caplog: pytest.LogCaptureFixture) -> None:
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    with caplog.at_level("WARNING", logger=dist.log.name):
        require_positions(llama, 256)
        assert not caplog.messages
        require_positions(llama, 257)
    assert "more than the 256 that the model was made for" in caplog.text
