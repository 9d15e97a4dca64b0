"""The recipe's `eval`: prompts for the model, how answers are scored, which checkpoint is best."""

from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue

from packhorse.trainer.config.base import FunctionName, Pattern, Section, check_one_given
from packhorse.trainer.config.best import EVAL_LOSS, BestSection, EarlyStoppingSection

# The name of a field that holds a secret, in JSON.
_SECRET = re.compile(
    r'"((?:[^"]*(?:api[-_]?key|secret|passw(?:or)?d|authorization|credentials?|bearer'
    r'|(?:access|api|auth|hf|session)[-_]?token))|token)":',
    re.IGNORECASE,
)


class Server(Section):
    """An OpenAI-compatible server."""

    url: str
    """As http://localhost:8000/v1, without a user, key or password."""
    key_env: str | None = None
    """Environment variable with the API key; null: no key is sent."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Limit for one answer; a request that fails (429, 5xx, no connection) is retried for as long.
    """
    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """More fields of each request, as `{max_tokens: 4096}`; null removes a field."""

    def check(self) -> None:
        # the messages must not repeat the url: it may hold a key
        try:
            parts = urlsplit(self.url)
            is_http = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            raise ValueError("`url` is not an address, as http://localhost:8000/v1") from None
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "`url` must hold no user, password or key; name the key's variable in `key_env`"
            )
        if not is_http:
            raise ValueError("`url` must be an address with http:// or https://")
        if field := _SECRET.search(json.dumps(self.extra)):
            raise ValueError(
                f"`extra` must hold no secret, as `{field[1]}`: a recipe is saved and shown; name "
                "the key's variable in `key_env`"
            )


# ------------------------------------------------------------------------------------------ scorers


class _Ignores(Section):
    ignore: tuple[Literal["case", "space"], ...] = ()
    """What may differ, as `[case, space]`. space: runs of white space count as a space."""


class _HasColumn(Section):
    column: str | None = None
    """Column of the row that holds the expected value, letter (or its number from 0) or schema;
    null: the last assistant turn."""


class Format(Section):
    """1 if the pattern matches the whole answer, else 0."""

    kind: Literal["format"] = "format"
    pattern: Pattern
    """A regular expression; `.` matches line ends. White space around the answer is ignored.
    `(?i).*sorry.*` finds a text anywhere, in any case."""


class Exact(_Ignores):
    """1 if the answer equals the reference, else 0. Both are brought to Unicode's NFC first."""

    kind: Literal["exact"] = "exact"
    extract: Pattern | None = None
    """A regular expression: the first group of its last match is compared, in the answer and in the
    reference. null: the whole text."""

    def check(self) -> None:
        if self.extract is not None and not re.compile(self.extract).groups:
            raise ValueError("`extract` has no group: put what is compared in parentheses")


class Contains(_Ignores):
    """1 if the answer contains the reference, else 0."""

    kind: Literal["contains"] = "contains"


class Math(_HasColumn):
    """1 if the answer's value equals the reference's, by the library math-verify, else 0. The final
    answer is what follows `####`, stands in the last `<answer>` or in `\\boxed`, all of it; without
    such a mark it is the last value. A column holds the value alone, or as `#### 18`."""

    kind: Literal["math"] = "math"


class Choice(_HasColumn):
    """1 if the right letter is the likeliest one after the prompt, else 0. Nothing is generated."""

    kind: Literal["choice"] = "choice"
    letters: tuple[str, ...] = Field(default=("A", "B", "C", "D"), min_length=2)
    """Texts that are compared, in the order in which the column's numbers count them, from 0."""

    def check(self) -> None:
        if len(set(self.letters)) < len(self.letters) or not all(map(str.strip, self.letters)):
            raise ValueError("`letters` must be different texts, none of them empty")


class JsonSchema(_HasColumn):
    """1 if the answer is JSON that the schema of a file or of the row's column admits, else 0. One
    code fence around all of it and thinking before it are allowed."""

    kind: Literal["json_schema"] = "json_schema"
    file: str | None = None
    """A JSON file that holds the schema."""

    def check(self) -> None:
        check_one_given(file=self.file, column=self.column)


class ToolCall(Section):
    """1 if the answer is a call, or a list of calls, of the row's tools, as JSON whose `arguments`
    or `parameters` fit the tool's schema, else 0."""

    kind: Literal["tool_call"] = "tool_call"


class Refusal(Section):
    """1 if the answer refuses exactly when it should, else 0. A heuristic: it finds a phrase of
    refusal at the answer's beginning (the list is in trainer/eval/scorers.py). A refusal in other
    words, or in another language than English, counts as an answer."""

    kind: Literal["refusal"] = "refusal"
    expected: bool | str
    """Whether every answer should refuse, or the row's column that says so."""


class Function(Section):
    """The score that a function of your own returns."""

    kind: Literal["function"] = "function"
    function: FunctionName
    """`module:function`: (prompt, answer, reference, row) -> a number from 0 to 1, True, False, or
    None for no score. It is found and trusted as data.train.function, and has no time limit."""


class Judge(Server):
    """The verdict of a model on an OpenAI-compatible server. A reply without a verdict is no score.
    If the server is down, the evaluation lacks this metric and the run continues."""

    kind: Literal["judge"] = "judge"
    model: str
    """The model's name on the server."""
    rubric: str = Field(min_length=1)
    """What a good answer is, in words."""
    against: Literal["none", "reference"] = "none"
    """none: a grade from 1 to 5, which becomes 0 to 1. reference: whether the answer or the
    reference is better, asked in both orders to cancel position bias: 1 if the answer wins twice, 0
    if the reference does, else 0.5, so that the mean is the win rate."""


Scorer = Annotated[
    Format | Exact | Contains | Math | Choice | JsonSchema | ToolCall | Refusal | Judge | Function,
    Field(discriminator="kind"),
]


# --------------------------------------------------------------------------------------- generation


class GenerateSection(Section):
    """Held-out prompts that the model answers at every evaluation, and how answers are scored."""

    num_prompts: int = Field(default=64, ge=1)
    """The first so many held-out prompts."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy decoding. Above 0: sampling, reproducible from train.seed."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that have this share of the probability."""
    scorers: dict[str, Scorer] = Field(default_factory=dict)
    """Each name becomes the metric `eval/NAME`."""

    def check(self) -> None:
        for name in self.scorers:
            if name in ("loss", EVAL_LOSS) or not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"`{name}` cannot name a scorer: use letters, digits, `_`, `.` and `-`, and "
                    f"not loss"
                )
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(
                "`top_p` belongs to a `temperature` above 0: greedy decoding samples nothing"
            )


# -------------------------------------------------------------------------------------- the section


class EvalSection(Section):
    """Evaluation during training, and by `packhorse eval`."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations; there is always one before and one after training."""
    generate: GenerateSection | None = None
    server: Server | None = None
    """Answers the prompts of `generate` in place of the engine, from the current weights as a
    Hugging Face folder. It must see run.dir under the same path."""
    vllm_python: str | None = None
    """In place of `server`: the Python of an environment of its own that has vllm, as
    /opt/vllm/bin/python. Each evaluation starts vLLM and ends it."""
    vllm_args: tuple[str | int | float, ...] = ()
    """More arguments of vLLM's server; they override packhorse's own."""
    best: BestSection | None = None
    early_stopping: EarlyStoppingSection | None = None
    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, as `[gsm8k, mmlu]`, or your own as FOLDER/TASK. `packhorse
    eval` runs them, as they take too long during training. Needs the extra `lm-eval`."""
    lm_eval_chat: bool = False
    """Ask the tasks through the chat template. The library's default, and most published numbers',
    is without."""

    @property
    def by_server(self) -> bool:
        """Whether a server, and not the engine, answers the prompts."""
        return self.server is not None or self.vllm_python is not None

    def check(self) -> None:
        if self.server is not None and self.vllm_python is not None:
            raise ValueError("give `server` or `vllm_python`, not both: one of them answers")
        if self.vllm_args and self.vllm_python is None:
            raise ValueError("`vllm_args` belongs to `vllm_python`, which is not given")
        self._check_rules()

    def _check_rules(self) -> None:
        used = {
            f"best.{key}": name for key, name in (self.best.places if self.best else {}).items()
        }
        if self.early_stopping:
            used["early_stopping.metric"] = self.early_stopping.metric
        names = [EVAL_LOSS, *(self.generate.scorers if self.generate else ())]
        for place, name in used.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                instead = (
                    f"did you mean `{near[0]}`?" if near else f"names here: {', '.join(names)}"
                )
                raise ValueError(
                    f"`{place}`: there is no scorer `{name}` in eval.generate.scorers; {instead}"
                )
        if used and self.every_steps is None:
            key = next(iter(used)).partition(".")[0]
            raise ValueError(f"`{key}` needs `every_steps`: else only the last step is evaluated")
