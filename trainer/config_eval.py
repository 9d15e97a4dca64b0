"""The recipe's `eval`: what is asked of the model, how answers are scored, which checkpoint is the best."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, model_validator

from trainer.section import Section


class Server(Section):
    """An OpenAI-compatible server."""

    url: str = Field(description="Up to its version, as http://localhost:8000/v1, without a key or a password.")
    key_env: str | None = Field(
        default=None, description="Name of the environment variable that holds its key; none is sent where not given."
    )
    timeout_s: float = Field(default=300.0, gt=0, description="For one answer.")
    patience_s: float = Field(
        default=120.0, ge=0, description="A request that fails (429, 5xx, no connection) is tried again for so long."
    )
    parallel: int = Field(default=16, ge=1, description="Requests at once.")
    extra: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="More fields of each request, as `chat_template_kwargs`; null takes one out.",
    )

    @model_validator(mode="after")
    def _plain_url(self) -> Server:
        try:
            parts = urlsplit(self.url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            raise ValueError("`url` is not an address, as http://localhost:8000/v1") from None
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("`url` must hold no user, password or key; name the key's variable in `key_env`")
        if not whole:
            raise ValueError("`url` is an address with http:// or https://, as http://localhost:8000/v1")
        return self


class Endpoint(Server):
    """A model on an OpenAI-compatible server."""

    model: str = Field(description="The name that the server knows it by.")


class Scorer(Section):
    """A generated answer's score: `pattern` must match all of it, or `extract`'s group must equal the reference's."""

    pattern: str | None = None
    extract: str | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Scorer:
        if (self.pattern is None) == (self.extract is None):
            raise ValueError("give exactly one of `pattern` and `extract`")
        return self


class GenerateSection(Section):
    """Held-out prompts answered greedily, before and after training, and scored."""

    rows: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    batch: int = Field(default=32, ge=1, description="Prompts that one rank runs at once.")
    scorers: dict[str, Scorer] = Field(default_factory=dict)


class EvalSection(Section):
    every_steps: int | None = Field(
        default=None, ge=1, description="Between evaluations; always before and after training."
    )
    generator: Literal["engine", "server", "vllm"] = Field(
        default="engine",
        description="What answers the prompts of `generate`: the engine itself, or a server that is handed the current "
        "weights as a Hugging Face folder: the one at `server`, or a vLLM, started between steps by `vllm_python`.",
    )
    server: Server | None = Field(default=None, description="It must see run.dir under the same path.")
    vllm_python: str | None = Field(
        default=None,
        description="The Python of an environment of its own that has vllm, as /opt/vllm/bin/python: vllm pins torch.",
    )
    vllm_args: tuple[str | int | float, ...] = Field(
        default=(), description="More arguments of vLLM's server, after packhorse's own, so that these count."
    )
    generate: GenerateSection | None = None

    @model_validator(mode="after")
    def _generator_is_given(self) -> EvalSection:
        if (self.generator == "server") != (self.server is not None):
            raise ValueError("`server` belongs to `generator: server`, and must be given there")
        if (self.generator == "vllm") != (self.vllm_python is not None):
            raise ValueError("`vllm_python` belongs to `generator: vllm`, and must be given there")
        if self.vllm_args and self.generator != "vllm":
            raise ValueError("`vllm_args` belongs to `generator: vllm`")
        return self
