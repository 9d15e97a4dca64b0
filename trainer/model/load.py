"""A folder or hub name -> its tokenizer and its causal language model, ready to be trained.

In: the recipe's model section. Out: a tokenizer with the chat template that will be trained, and a
    transformers
model in the recipe's type, attending through packhorse, its weights in shards under ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import dist
from trainer.config.recipe import AdapterSection, ModelSection
from trainer.datatypes import BadInput
from trainer.model import attention, liger_layers
from trainer.model.lora import add_adapter
from trainer.utils.text import one_line

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)

# ---------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer, with `add_tokens` added and `chat_template` put in its place.

    Raises:
        BadInput: no such folder, no tokenizer in it, an unreachable hub, a missing template, or
            ChatML on a tokenizer that lacks its tokens.
    """
    tokenizer = _tokenizer_as_it_is(section)
    if section.add_tokens:
        from tokenizers import AddedToken

        new = [AddedToken(t, special=True, normalized=False) for t in section.add_tokens]
        tokenizer.add_tokens(new, special_tokens=True)
    if section.chat_template == "chatml":
        _use_chatml(tokenizer, section)
    elif section.chat_template is not None:
        path = Path(section.chat_template)
        if not path.is_file():
            raise BadInput(
                f"model.chat_template: there is no file {path}; give a Jinja file, or `chatml`"
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def _tokenizer_as_it_is(section: ModelSection) -> Any:
    from transformers import AutoTokenizer

    folder = _local_folder(section.name)
    # transformers makes an empty tokenizer of a folder that has none
    if folder is not None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BadInput(
            f"model.name: the folder {folder} has no tokenizer; copy the model's tokenizer files "
            f"into it"
        )
    return _from_hub(AutoTokenizer.from_pretrained, section, "tokenizer")


def _use_chatml(tokenizer: Any, section: ModelSection) -> None:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CHATML_TOKENS if token not in vocabulary]
    if missing:
        raise BadInput(
            f"model.chat_template: the tokenizer of {section.name} has no "
            f"{' and no '.join(missing)} for chatml; "
            f'add them: model.add_tokens=["{CHATML_TOKENS[0]}","{CHATML_TOKENS[1]}"]'
        )
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"  # noqa: S105 - the token that ends a turn


def _local_folder(name: str) -> Path | None:
    """The folder that `model.name` names, None for a hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BadInput(f"model.name: there is no folder {name}")
    return None


def _from_hub(load: Callable[..., Any], section: ModelSection, what: str, **arguments: Any) -> Any:
    """`load`, with what goes wrong on the way told in one sentence."""
    folder = _local_folder(section.name)
    try:
        return load(
            str(folder or section.name),
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            **arguments,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = one_line(error, 300)
        if folder is None:
            raise BadInput(
                f"model.name: the {what} of {section.name} cannot be had from the hub ({reason}); "
                "give a local folder, or point HF_HOME at a cache that holds it"
            ) from None
        raise BadInput(f"model.name: the {what} in {folder} cannot be loaded ({reason})") from None


# -------------------------------------------------------------------------------------------- model


def load_model(
    section: ModelSection,
    tokenizer: Any,
    *,
    seed: int,
    adapter: AdapterSection | None = None,
    sharded_init: Callable[[], AbstractContextManager[Any]] = nullcontext,
    gathered: Callable[..., AbstractContextManager[Any]] = lambda parameters, write=False: (
        nullcontext()
    ),
) -> Any:
    """The transformers model in `section.dtype`, with rows for every token of `tokenizer`; all of
    it is trained, or the adapter alone.

    Args:
        sharded_init: makes the context in which transformers builds and loads in shards
            (engine.sharded_init).
        gathered: `gathered(parameters, write=True)` holds parameters whole and hands rank 0's
            changes to all.

    Raises:
        BadInput: not a causal model, a vocabulary smaller than the tokenizer's, weights that are
            missing or quantised, a model without recomputation where the recipe wants it, an
            adapter that it cannot have.
    """
    config = load_config(section)
    new_ids = _new_token_ids(section, tokenizer)
    rows = _rows_needed(section, config, tokenizer, new_ids)
    device, dtype = dist.device(), getattr(torch, section.dtype)
    backend, why = attention.choose(section.attention, device, dtype)
    dist.log.info("attention: %s (%s)", backend, why)
    arguments = {"dtype": dtype, "attn_implementation": attention.implementation(backend)}
    with sharded_init():
        try:
            if section.init == "random":
                model = _random_model(section, config, seed, gathered, arguments)
            else:
                model = _pretrained_model(section, config, arguments)
        except KeyError as error:
            if error.args != (arguments["attn_implementation"],):
                raise
            raise BadInput(
                f"model.name: {config.model_type} chooses among attentions of its own, so that no "
                f"varlen kernel "
                "can be put in; take another model"
            ) from None
        if new_ids:
            _add_rows(model, rows, new_ids, gathered)
        model.requires_grad_(True)
        if adapter:
            add_adapter(model, adapter, seed)
    dist.log.info("layers: %s", liger_layers.fuse(model, section.layer_kernels, device, dtype))
    if section.activation_checkpointing == "full":
        if not model.supports_gradient_checkpointing:
            raise BadInput(
                f"{type(model).__name__} does not support activation checkpointing; set "
                f"model.activation_checkpointing=none"
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device) if not _sharded(model) else model


def load_config(section: ModelSection) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder = _local_folder(section.name)
    if folder is not None and not (folder / "config.json").is_file():
        raise BadInput(
            f"model.name: the folder {folder} has no config.json; give a Hugging Face model folder"
        )
    config = _from_hub(AutoConfig.from_pretrained, section, "configuration")
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if getattr(config, "is_encoder_decoder", False) or not (
        own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise BadInput(
            f"model.name: {section.name} ({config.model_type}) is not a causal language model"
        )
    if getattr(config, "quantization_config", None):
        raise BadInput(
            f"model.name: the weights of {section.name} are quantised; give a bfloat16 or float32 "
            f"model"
        )
    return config


def _new_token_ids(section: ModelSection, tokenizer: Any) -> list[int]:
    """The ids of `add_tokens` that the tokenizer did not have before (an export of an earlier run
    has them).
    """
    if not section.add_tokens:
        return []
    before = _tokenizer_as_it_is(section).get_vocab()
    return [
        tokenizer.convert_tokens_to_ids(token)
        for token in section.add_tokens
        if token not in before
    ]


def _rows_needed(section: ModelSection, config: Any, tokenizer: Any, new_ids: Sequence[int]) -> int:
    """Rows of the embeddings: the model's own number, or more where added tokens need them."""
    rows = config.get_text_config().vocab_size
    old_ids = set(tokenizer.get_vocab().values()) - set(new_ids)
    if max(old_ids) >= rows:
        raise BadInput(
            f"model.name: the vocabulary of {section.name} has {rows} rows, and its tokenizer "
            f"makes ids up to "
            f"{max(old_ids)}: the two do not belong together; give the model's own tokenizer"
            + (", or name its extra tokens in model.add_tokens" if section.add_tokens == () else "")
        )
    return max(rows, *(i + 1 for i in new_ids)) if new_ids else rows


def _pretrained_model(section: ModelSection, config: Any, arguments: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = _from_hub(
        AutoModelForCausalLM.from_pretrained,
        section,
        "model",
        config=config,
        output_loading_info=True,
        **arguments,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (
            f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        )
        raise BadInput(
            f"model.name: {section.name} lacks weights of {type(model).__name__}: {shown}"
        )
    return model


# ------------------------------------------------------------------------------------- made weights


def _random_model(
    section: ModelSection,
    config: Any,
    seed: int,
    gathered: Callable[..., Any],
    arguments: dict[str, Any],
) -> Any:
    """A model of this configuration with its own kind of random weights, the same in every world
    and stage.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():  # under ZeRO-3 it would fill shards; below, each module is filled whole
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=section.trust_remote_code, **arguments
        )
    model.tie_weights()
    initialise(model, seed, gathered)
    return model


@torch.no_grad()
def initialise(model: Any, seed: int, gathered: Callable[..., Any]) -> None:
    """Every module's own `_init_weights`, each from its own seed, (seed, name), so that no order
    matters.

    Children come before their parents, whose rules may touch a child's weights (GPT-2 scales its
    residual projections by depth); nothing looks further down than that. A tied head is left to the
    embedding's rule.
    """
    from transformers import PreTrainedModel

    done: set[nn.Parameter] = set()

    def visit(module: nn.Module, name: str, owner: Any) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}", owner)
        own = set(module.parameters(recurse=False))
        if own and own <= done:
            return
        done.update(own)
        near = [m for m in (module, *module.children()) if not isinstance(m, PreTrainedModel)]
        parameters = list(dict.fromkeys(p for m in near for p in m.parameters(recurse=False)))
        with torch.random.fork_rng(), gathered(parameters, write=True):
            torch.manual_seed(dist.seed_from(seed, "init", name))
            owner._init_weights(module)

    visit(model, "", model)


def _add_rows(model: Any, rows: int, new_ids: Sequence[int], gathered: Callable[..., Any]) -> None:
    """Rows for new tokens, in the embedding and the head: the mean of all rows there were.

    A new token is then as likely as tokens are on average (Hewitt, 2021), whatever the scale of the
    logits.
    """
    if rows > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    weights: Iterable[nn.Parameter] = dict.fromkeys(
        [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    )
    bias = getattr(model.get_output_embeddings(), "bias", None)
    for parameter in [*weights, *([] if bias is None else [bias])]:
        with torch.no_grad(), gathered([parameter], write=True):
            if parameter.numel() == 0:  # whole on rank 0 alone
                continue
            old = torch.ones(parameter.shape[0], dtype=torch.bool)
            old[list(new_ids)] = False
            parameter[list(new_ids)] = parameter[old].float().mean(0).to(parameter.dtype)


def _sharded(model: Any) -> bool:
    return any(hasattr(p, "ds_id") for p in model.parameters())
