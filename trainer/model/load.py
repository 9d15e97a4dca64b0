"""Load a tokenizer and a causal language model from a folder or the hub, ready to be trained.

In: the recipe's model section. Out: a tokenizer with the chat template of the training data, and a
transformers model in the recipe's type that attends through packhorse, its weights in shards under
ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from packhorse.trainer import dist
from packhorse.trainer.config.recipe import AdapterSection, ModelSection
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.model import attention, foreign_files, liger_layers
from packhorse.trainer.model.activation_checkpointing import set_checkpointing
from packhorse.trainer.model.adapter_start import start_adapter
from packhorse.trainer.model.conversions import alike_in_shards
from packhorse.trainer.model.lora import Gathered, add_adapter, not_in_shards
from packhorse.trainer.model.new_weights import (
    add_embeddings,
    initialise,
    loaded_weights_kept,
)
from packhorse.trainer.model.rescaling import keep_scale
from packhorse.trainer.model.rope_scaling import require_rope, rope_kind, scale_rope
from packhorse.trainer.utils.download import local_folder
from packhorse.trainer.utils.progress import WorkProgress, show_bars_of_transformers
from packhorse.trainer.utils.text import one_line

dist.choose_accelerator()

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "tekken.json"),
}

# ---------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(section: ModelSection) -> Any:
    """Return the model's tokenizer with the recipe's `add_tokens` and `chat_template`.

    `generation_eos_token_ids` of it are what ends generation by the model's own configuration,
    which the data needs where a chat template writes no stop token.

    Raises:
        BadInput: no such folder, no tokenizer in it, an unreachable hub, a missing template, or
            ChatML on a tokenizer that lacks its tokens.
    """
    tokenizer = _original_tokenizer(section)
    tokenizer.generation_eos_token_ids = _generation_eos(section)
    if section.add_tokens:
        from tokenizers import AddedToken

        new = [AddedToken(t, special=True, normalized=False) for t in section.add_tokens]
        tokenizer.add_tokens(new, special_tokens=True)
    if section.chat_template == "chatml":
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in CHATML_TOKENS if token not in vocabulary]
        if missing:
            raise BadInput(
                f"model.chat_template: the tokenizer of {section.name} has no "
                f"{' and no '.join(missing)} for chatml; "
                f'add them: model.add_tokens=["{CHATML_TOKENS[0]}","{CHATML_TOKENS[1]}"]'
            )
        tokenizer.chat_template = CHATML
        tokenizer.eos_token = CHATML_TOKENS[1]  # the token that ends a turn
    elif section.chat_template is not None:
        path = Path(section.chat_template)
        if not path.is_file():
            raise BadInput(
                f"model.chat_template: there is no file {path}; give a Jinja file, or `chatml`"
            )
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(
                f"model.chat_template: {path} is no text in UTF-8 ({error}); give a Jinja file"
            ) from None
    return tokenizer


def _original_tokenizer(section: ModelSection) -> Any:
    from transformers import AutoTokenizer

    folder = local_folder(section.name, "model.name")
    # for a folder without a tokenizer, transformers would make an empty one
    if folder is not None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BadInput(
            f"model.name: the folder {folder} has no tokenizer; copy the model's tokenizer files "
            "into it"
        )
    return load_pretrained(AutoTokenizer.from_pretrained, section, "tokenizer")


def _generation_eos(section: ModelSection) -> list[int]:
    """Return the stop tokens of the model's generation configuration; none, if it has no such."""
    from transformers import GenerationConfig

    folder = local_folder(section.name, "model.name")
    read: Any = GenerationConfig.from_pretrained
    try:
        config = read(str(folder or section.name), revision=section.revision)
    except OSError:  # many models have none
        return []
    except Exception as error:  # whatever transformers raises for a file that holds something else
        raise BadInput(
            f"model.name: {section.name}: its generation_config.json ({one_line(error, 300)})"
        ) from None
    given: Any = config.eos_token_id
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(each) is int for each in ids):
        raise BadInput(f"model.name: {section.name}: eos_token_id of its generation is {given!r}")
    return ids


def load_pretrained(
    from_pretrained: Callable[..., Any], section: ModelSection, what: str, **arguments: Any
) -> Any:
    """Call a `from_pretrained` for the section's model; turn its errors into BadInput."""
    folder = local_folder(section.name, "model.name", weights=what == "model")
    place = str(folder or section.name)
    try:
        foreign_files.require_buildable(place, section.revision)
        if what == "model":
            foreign_files.require_safetensors(place, section.revision, arguments.get("config"))
            arguments["use_safetensors"] = True  # the older kind of file is a pickle
        loaded = from_pretrained(
            place,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            **arguments,
        )
        if what == "configuration" and not section.trust_remote_code:
            foreign_files.require_no_kernel(loaded, section.name)
        return loaded
    except (BadInput, MemoryError, torch.OutOfMemoryError):
        raise  # another file would not help
    except Exception as error:
        if error.args == (arguments.get("attn_implementation"),):
            raise  # the model picks its attention from a table without ours
        # a file that is cut short, a tensor of another shape, a class that is missing: libraries
        # have an exception of their own for each
        reason = one_line(error, 300)
        if folder is None:
            raise BadInput(
                f"model.name: there is no folder {section.name}, and cannot load the {what} of "
                f"that name from the hub ({reason}); give a local folder, or set HF_HOME to a "
                "cache that holds it"
            ) from None
        raise BadInput(f"model.name: cannot load the {what} in {folder} ({reason})") from None


# -------------------------------------------------------------------------------------------- model


def load_model(
    section: ModelSection,
    tokenizer: Any,
    *,
    seed: int,
    adapter: AdapterSection | None = None,
    sharded_init: Callable[[], AbstractContextManager[Any]] = nullcontext,
    gathered: Gathered = not_in_shards,
) -> Any:
    """Return the transformers model in `section.dtype`, with an embedding for every token.

    All of it is trainable, or only the adapter.

    Args:
        sharded_init: the context in which transformers loads in shards (engine.sharded_init).
        gathered: holds parameters whole inside its block (engine.gathered).

    Raises:
        BadInput: the model is not a causal language model, its vocabulary is smaller than the
            tokenizer's, weights are missing or quantised, it lacks activation checkpointing where
            the recipe asks for it, or it cannot have the adapter.
    """
    config = load_config(section)
    rows, new_ids = _embedding_rows(section, config, tokenizer)
    device, dtype = dist.device(), getattr(torch, section.dtype)
    backend, why = attention.choose(section.attention, device, dtype)
    dist.log.info("attention: %s (%s)", backend, why)
    arguments = {"dtype": dtype, "attn_implementation": attention.implementation(backend)}
    with sharded_init():
        try:
            model = _build(section, config, seed, gathered, arguments)
        except KeyError as error:
            # a model that picks its attention class from a fixed table does not find ours there
            if error.args != (arguments["attn_implementation"],):
                raise
            dist.log.info("attention: %s has classes of its own for it", config.model_type)
            own = {**arguments, "attn_implementation": "eager"}
            model = _build(section, config, seed, gathered, own)
        if new_ids:
            add_embeddings(model, rows, new_ids, gathered)
        _drop_unused_sampling(model)
        keep_scale(model)
        if section.rope_scaling:
            require_rope(model, rope_kind(section.rope_scaling))
        model.requires_grad_(True)
        if adapter:
            add_adapter(model, adapter, seed, gathered)
            if adapter.init_from:
                start_adapter(model, adapter, gathered)
    if section.compile:  # compiled_layers.py does both, once the engine is there
        set_checkpointing(model, "none")
    else:
        dist.log.info("layers: %s", liger_layers.fuse(model, section.layer_kernels, device, dtype))
        set_checkpointing(model, section.activation_checkpointing)
    # DeepSpeed has put shards where they belong already
    in_shards = any(hasattr(p, "ds_id") for p in model.parameters())
    return model if in_shards else model.to(device)


def _build(
    section: ModelSection, config: Any, seed: int, gathered: Gathered, arguments: dict[str, Any]
) -> Any:
    """Return the model with random weights or its own, whichever the recipe says."""
    if section.init == "random":
        return _random_model(section, config, seed, gathered, arguments)
    with _loading_shown(), loaded_weights_kept(gathered), alike_in_shards():
        return pretrained_model(model_class(config), section, config, arguments)


def _drop_unused_sampling(model: Any) -> None:
    """Drop settings of sampling from a generation configuration that does not sample.

    Llama 2's has a temperature beside `do_sample: false`; transformers 5 refuses to save it.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or settings.do_sample:
        return
    plain = type(settings)()
    names = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
    for name in names:
        if getattr(settings, name, None) != getattr(plain, name, None):
            dist.log.info("generation: %s is dropped, as do_sample is not set", name)
            setattr(settings, name, getattr(plain, name, None))


def load_config(section: ModelSection) -> Any:
    """Return the model's configuration.

    Raises:
        BadInput: there is none, or it is not of a causal language model with plain weights.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder = local_folder(section.name, "model.name")
    if folder is not None and not (folder / "config.json").is_file():
        raise BadInput(
            f"model.name: the folder {folder} has no config.json; give a Hugging Face model folder"
        )
    config = load_pretrained(AutoConfig.from_pretrained, section, "configuration")
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if getattr(config, "is_encoder_decoder", False) or not (
        own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or _has_towers(config)
    ):
        raise BadInput(
            f"model.name: {section.name} ({config.model_type}) is not a causal language model"
        )
    if getattr(config, "quantization_config", None):
        raise BadInput(
            f"model.name: the weights of {section.name} are quantised; give a bfloat16 or float32 "
            "model (docs/models.md has the way for gpt-oss)"
        )
    if section.rope_scaling:
        scale_rope(config, section.rope_scaling)
    return config


def model_class(config: Any) -> Any:
    """Return the class of transformers that loads all of a model: with towers for images and the
    like, which a text does not reach, where the configuration has them.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if _has_towers(config) else AutoModelForCausalLM


def _has_towers(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return known and config.get_text_config() is not config


def _embedding_rows(section: ModelSection, config: Any, tokenizer: Any) -> tuple[int, list[int]]:
    """Return the number of embeddings that the model needs, and the ids of new tokens.

    A token of `add_tokens` is not new if the original tokenizer has it: an export of an earlier run
    has trained embeddings for it.
    """
    new_ids = []
    if section.add_tokens:
        before = _original_tokenizer(section).get_vocab()
        new = [token for token in section.add_tokens if token not in before]
        new_ids = [tokenizer.convert_tokens_to_ids(token) for token in new]
    rows = config.get_text_config().vocab_size
    highest = max(set(tokenizer.get_vocab().values()) - set(new_ids))
    if highest >= rows:
        raise BadInput(
            f"model.name: {section.name} has {rows} embeddings, but its tokenizer makes ids up to "
            f"{highest}; give the model's own tokenizer"
            + (", or name its extra tokens in model.add_tokens" if section.add_tokens == () else "")
        )
    return max([rows, *(i + 1 for i in new_ids)]), new_ids


def pretrained_model(
    cls: Any, section: ModelSection, config: Any, arguments: dict[str, Any]
) -> Any:
    """Return a model of the class with the section's weights. Raises BadInput if any is missing."""
    model, info = load_pretrained(
        cls.from_pretrained,
        section,
        "model",
        config=config,
        output_loading_info=True,
        **arguments,
    )
    # transformers only warns of missing weights, and fills them with random numbers
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BadInput(
            f"model.name: {section.name} lacks weights of {type(model).__name__}: "
            f"{', '.join(missing[:3])}{more}"
        )
    return model


@contextmanager
def _loading_shown() -> Iterator[None]:
    """Show how many weights are loaded, and the time to go.

    Under ZeRO-3 transformers has no bar of its own: there it hands all tensors to one module after
    the other, on rank 0.
    """
    show_bars_of_transformers()
    plain = nn.Module._load_from_state_dict
    progress, done = None, 0

    def load(module: nn.Module, tensors: Any, prefix: str, *rest: Any) -> None:
        nonlocal progress, done
        progress = progress or WorkProgress("loading weights", 0, len(tensors), "weights")
        plain(module, tensors, prefix, *rest)
        done += sum(prefix + name in tensors for name in module._parameters)
        progress.show(done)

    nn.Module._load_from_state_dict = load  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._load_from_state_dict = plain  # type: ignore[method-assign]
        if progress:
            progress.close()


def _random_model(
    section: ModelSection, config: Any, seed: int, gathered: Gathered, arguments: dict[str, Any]
) -> Any:
    """Return a model with random weights of its own kind, alike at every world size and stage."""
    from transformers.initialization import no_init_weights

    # under ZeRO-3 transformers would fill shards; `initialise` fills each module whole
    with no_init_weights():
        model = model_class(config).from_config(
            config, trust_remote_code=section.trust_remote_code, **arguments
        )
    model.tie_weights()
    initialise(model, seed, gathered)
    return model


def persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the buffers that belong to a model's state, by name.

    The others, as rotary tables, are computed from the configuration.
    """
    persistent = model.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
