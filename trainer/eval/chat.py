"""Answer messages by a model as a user would have it: a plain transformers model, no engine.

Messages enter; an answer leaves in pieces, while it is generated. The prompt is the tokenizer's
chat template, and an answer ends with the stop tokens of the model's generation configuration,
which an export has from training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from packhorse.trainer import dist
from packhorse.trainer.config.sections import ModelSection
from packhorse.trainer.data.template_call import call_template, wants_parts, with_parts
from packhorse.trainer.datatypes import BadInput, RowError
from packhorse.trainer.model.load import load_pretrained, load_tokenizer, pretrained_model
from packhorse.trainer.utils.download import local_folder
from packhorse.trainer.utils.text import error_line
from packhorse.trainer.utils.time_limit import OutOfTime, interrupted_after, memory_limited

ADAPTER = "adapter_config.json"
_ADAPTER_S = 600  # of processor time to put an adapter onto its base
Message = dict[str, str]
"""role and content."""


class Chat:
    """A loaded model and how it answers.

    Args:
        name: a model folder, a hub name or the folder of a peft adapter, which names its base.
        template_options: further variables of the chat template, as `enable_thinking`.
        temperature: 0 for the likeliest token each time, else it is sampled.

    Raises:
        BadInput: the model cannot be loaded, or its tokenizer has no chat template.
    """

    def __init__(
        self,
        name: str,
        template_options: Mapping[str, Any],
        *,
        max_tokens: int,
        temperature: float,
    ) -> None:
        self._tokenizer, model = _load(name)
        if self._tokenizer.chat_template is None:
            raise BadInput(f"{name}: its tokenizer has no chat template, so it cannot be asked")
        self._model = model.to(dist.device()).eval()
        self._variables = {**self._tokenizer.special_tokens_map, **template_options}
        try:
            self._source = self._tokenizer.get_chat_template()
        except Exception as error:  # of several templates none is the default
            raise BadInput(
                f"{name}: its chat template cannot be used ({error_line(error)})"
            ) from None
        with memory_limited():
            self._in_parts = wants_parts(self._source, self._variables)
        self._max_tokens = max_tokens
        # None where the model's own configuration holds what only sampling uses
        self._how = (
            {"do_sample": True, "temperature": temperature}
            if temperature
            else dict.fromkeys(("temperature", "top_p", "top_k")) | {"do_sample": False}
        )

    @torch.inference_mode()
    def answer(self, messages: Sequence[Message], show: Callable[[str], None]) -> str:
        """Return the answer to the messages.

        Args:
            show: called with each piece of the answer as soon as it is known.

        Raises:
            BadInput: the messages fill all positions of the model, or its template refuses them.
            KeyboardInterrupt: Ctrl-C; what was shown until then is all there is.
        """
        text = self._render([*map(with_parts, messages)] if self._in_parts else [*messages])
        pieces = _Pieces(self._tokenizer, show)
        with _faults_of("the model cannot answer"):
            prompt = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
            prompt = prompt.to(self._model.device)
            room = self._room(prompt["input_ids"].shape[1])
            self._model.generate(**prompt, max_new_tokens=room, streamer=pieces, **self._how)
        return pieces.text

    def _render(self, messages: list[dict[str, Any]]) -> str:
        """Return the template's text, within the limits of time and memory that rows have."""
        variables = {**self._variables, "add_generation_prompt": True}
        try:
            with memory_limited():
                return call_template(self._source, messages, None, variables)[0][0]
        except RowError as error:
            raise BadInput(f"the model's chat template cannot be used: {error}") from None

    def _room(self, prompt_tokens: int) -> int:
        """Return how many tokens an answer may have."""
        positions = getattr(
            self._model.config.get_text_config(), "max_position_embeddings", None
        ) or (prompt_tokens + self._max_tokens)
        if prompt_tokens >= positions:
            raise BadInput(
                f"the conversation has {prompt_tokens} tokens, and the model {positions} positions"
            )
        return min(self._max_tokens, positions - prompt_tokens)


def is_adapter(name: str) -> bool:
    """Return whether a name is the folder of a peft adapter without a model in it."""
    folder = Path(name).expanduser()
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def _load(name: str) -> tuple[Any, Any]:
    """Return tokenizer and model. An adapter is put onto the base that it names."""
    if not is_adapter(name):
        section = ModelSection(name=name)
        return load_tokenizer(section), _load_model(section)
    from peft import PeftModel

    folder = Path(name).expanduser()
    try:
        facts = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base = ModelSection(name=facts["base_model_name_or_path"], revision=facts.get("revision"))
        kind = facts.get("peft_type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{folder / ADAPTER}: names no base model ({error_line(error)})") from None
    if kind != "LORA":  # XLORA loads further adapters by name, and some kinds load tokenizers
        raise BadInput(f"{folder / ADAPTER}: its peft_type is {kind!r:.50}; give a LORA adapter")
    if not (folder / "adapter_model.safetensors").is_file():  # peft would read a pickle instead
        raise BadInput(f"{folder}: an adapter without adapter_model.safetensors")
    local_folder(name, "an adapter", weights=True)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(ModelSection(name=str(folder)) if has_tokenizer else base)
    dist.log.info("the adapter %s on %s", folder, base.name)
    model = _load_model(base)
    try:
        with _faults_of(f"{folder}: does not fit {base.name}"), interrupted_after(_ADAPTER_S):
            return tokenizer, PeftModel.from_pretrained(model, str(folder))
    except OutOfTime:  # as (a+)+$ among its target_modules
        raise BadInput(
            f"{folder}: was not put onto {base.name} within {_ADAPTER_S} s of computing; make the "
            f"patterns in its {ADAPTER} simpler"
        ) from None


@contextmanager
def _faults_of(sentence: str) -> Iterator[None]:
    """Turn what a stranger's configuration makes libraries raise into BadInput."""
    try:
        yield
    except (BadInput, OutOfTime, OSError, MemoryError, torch.OutOfMemoryError):
        raise  # not the configuration's fault, or said better elsewhere
    except Exception as error:
        raise BadInput(f"{sentence} ({error_line(error, 300)})") from None


def _load_model(section: ModelSection) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = load_pretrained(AutoConfig.from_pretrained, section, "configuration")
    return pretrained_model(AutoModelForCausalLM, section, config, {"dtype": "auto"})


class _Pieces:
    """What `generate` calls a streamer: it shows an answer's text as it grows.

    transformers' own decodes from the last line end on, which drops a space after it with some
    tokenizers. Here the whole answer is decoded each time, so that the pieces are what `decode`
    returns at the end.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] | None = None
        self.text = ""

    def put(self, ids: torch.Tensor) -> None:
        """Take the prompt at the first call, (1, L), then a token at each, (1,)."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.tolist()
        text = self._decode()
        # a character of several tokens is shown when it is whole
        if not text.endswith("\ufffd"):
            self._extend(text)

    def end(self) -> None:
        self._extend(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids or [], skip_special_tokens=True)

    def _extend(self, text: str) -> None:
        self._show(text[len(self.text) :])
        self.text = text
