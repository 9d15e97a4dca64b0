"""The recipe's `eval`: what is asked of the model, how answers are scored, which checkpoint is the
best.
"""

from __future__ import annotations

import difflib
import operator
import re
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, field_validator, model_validator

from trainer.config.base import Section, check_function

EVAL_LOSS = "eval_loss"  # what a rule calls the held-out loss; its other names are scorers'


class Server(Section):
    """An OpenAI-compatible server."""

    url: str = Field(
        description="Up to its version, as http://localhost:8000/v1, without a key or a password."
    )
    key_env: str | None = Field(
        default=None,
        description="Name of the environment variable that holds its key; none is sent where not "
        "given.",
    )
    timeout_s: float = Field(default=300.0, gt=0, description="For one answer.")
    patience_s: float = Field(
        default=120.0,
        ge=0,
        description="A request that fails (429, 5xx, no connection) is tried again for so long.",
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
            whole = (
                parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
            )
        except ValueError:
            raise ValueError("`url` is not an address, as http://localhost:8000/v1") from None
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "`url` must hold no user, password or key; name the key's variable in `key_env`"
            )
        if not whole:
            raise ValueError(
                "`url` is an address with http:// or https://, as http://localhost:8000/v1"
            )
        return self


class Endpoint(Server):
    """A model on an OpenAI-compatible server."""

    model: str = Field(description="The name that the server knows it by.")


class Format(Section):
    """1 where the pattern matches all of the answer, else 0."""

    kind: Literal["format"] = "format"
    pattern: str = Field(
        description="A regular expression; `.` matches line ends, too, white space around the "
        "answer is not looked at."
    )

    @model_validator(mode="after")
    def _usable(self) -> Format:
        _compiled(self.pattern)
        return self


class Exact(Section):
    """1 where the answer is the reference, else 0. Composed and decomposed characters are alike
    (Unicode's NFC).
    """

    kind: Literal["exact"] = "exact"
    extract: str | None = Field(
        default=None,
        description="A regular expression: its first group is compared, in both, where it matches "
        "last. "
        "null: all of the text.",
    )
    ignore_case: bool = False
    ignore_space: bool = Field(default=False, description="Any run of white space is one space.")

    @model_validator(mode="after")
    def _usable(self) -> Exact:
        if self.extract is not None and not _compiled(self.extract).groups:
            raise ValueError("`extract` has no group: put what is compared in parentheses")
        return self


class Contains(Section):
    """1 where the answer contains the reference, else 0."""

    kind: Literal["contains"] = "contains"
    text: str | None = Field(
        default=None, min_length=1, description="To be found in place of the reference."
    )
    ignore_case: bool = False


class Math(Section):
    """1 where the answer comes to the reference's value, by the library math-verify, else 0. The
    final answer is what `####` or the last `<answer>` marks, or `\\boxed` holds, read whole; else
    the last value."""

    kind: Literal["math"] = "math"
    column: str | None = Field(
        default=None,
        description="The column of the row that holds the right value, alone or as `#### 18`; "
        "null: the reference, of "
        "which the final value counts, as of an answer.",
    )


class Choice(Section):
    """1 where the right letter is the likeliest to follow the prompt, else 0. Nothing is generated
    for it.
    """

    kind: Literal["choice"] = "choice"
    letters: tuple[str, ...] = Field(
        default=("A", "B", "C", "D"), min_length=2, description="The choices."
    )
    column: str | None = Field(
        default=None,
        description="The column of the row that holds the right letter, or its number from 0; "
        "null: the reference.",
    )

    @model_validator(mode="after")
    def _usable(self) -> Choice:
        if len(set(self.letters)) < len(self.letters) or not all(
            letter.strip() for letter in self.letters
        ):
            raise ValueError("`letters` are different texts, none of them empty")
        return self


class JsonSchema(Section):
    """1 where the answer is JSON that a schema admits, else 0. One fence around all of it is
    allowed, and thinking before it."""

    kind: Literal["json_schema"] = "json_schema"
    file: str | None = Field(default=None, description="A JSON file that holds the schema.")
    column: str | None = Field(default=None, description="The column of the row that holds it.")
    tools: bool = Field(
        default=False,
        description="The answer is a call, or a list of them, of tools of the row, and `arguments` "
        "or `parameters` "
        "fit the tool's.",
    )

    @model_validator(mode="after")
    def _one_schema(self) -> JsonSchema:
        if (self.file is not None) + (self.column is not None) + self.tools != 1:
            raise ValueError("give exactly one of `file`, `column` and `tools: true`")
        return self


class Refusal(Section):
    """1 where the answer refuses, or does not, as it should; else 0. A heuristic: a phrase of
    refusal at its beginning (trainer/eval/scorers.py has the list). What refuses in other words, or
    not in English, passes for an answer."""

    kind: Literal["refusal"] = "refusal"
    expected: bool | None = Field(default=None, description="Whether every answer should refuse.")
    column: str | None = Field(
        default=None, description="The column of the row that says so, as true or false."
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Refusal:
        if (self.expected is None) == (self.column is None):
            raise ValueError("give exactly one of `expected` and `column`")
        return self


class Function(Section):
    """What a function of your own says."""

    kind: Literal["function"] = "function"
    function: str = Field(
        description="`module:function`: (prompt, answer, reference, row) -> a number from 0 to 1, "
        "True or False, or "
        "None where it cannot say. Found and trusted as data.train.function; it must come to an "
        "end by itself."
    )

    @model_validator(mode="after")
    def _usable(self) -> Function:
        check_function(self.function)
        return self


class Judge(Section):
    """What a model on a server thinks of the answer. A reply that holds no verdict is no score; a
    server that is down leaves the evaluation without this metric, and the run goes on."""

    kind: Literal["judge"] = "judge"
    endpoint: Endpoint
    rubric: str = Field(description="What a good answer is, in words.", min_length=1)
    against: Literal["none", "reference"] = Field(
        default="none",
        description="none: a grade, of which 1 becomes 0 and the highest 1. reference: which of "
        "the two is better, "
        "asked in both orders; 1 where the answer wins both times, 0 where the reference does, "
        "else 0.5: the mean is "
        "the win rate.",
    )
    grades: int = Field(default=5, ge=2, le=10, description="The highest grade.")
    max_tokens: int = Field(
        default=1024, ge=1, description="Of the judge's reply, its thinking included."
    )


Scorer = Annotated[
    Format | Exact | Contains | Math | Choice | JsonSchema | Refusal | Judge | Function,
    Field(discriminator="kind"),
]


class GenerateSection(Section):
    """Held-out prompts answered by the model that is trained, at every evaluation, and scored."""

    num_prompts: int = Field(default=64, ge=1, description="The first so many held-out prompts.")
    max_new_tokens: int = Field(
        default=64, ge=1, description="Where an answer is cut that has not ended by itself."
    )
    batch: int = Field(default=32, ge=1, description="Prompts that one rank runs at once.")
    temperature: float = Field(
        default=0.0,
        ge=0,
        description="0: greedy. Above, tokens are drawn; what is drawn follows from train.seed.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Draw from the most likely tokens that have this share of probability.",
    )
    scorers: dict[str, Scorer] = Field(
        default_factory=dict, description="What becomes `eval/NAME`; `kind` says how."
    )

    @model_validator(mode="after")
    def _names_are_free(self) -> GenerateSection:
        for name in self.scorers:
            if name in ("loss", "eval_loss") or not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"`{name}` cannot name a scorer: take letters, digits, `_`, `.` and `-`, and "
                    f"not loss"
                )
        return self

    @model_validator(mode="after")
    def _greedy_draws_nothing(self) -> GenerateSection:
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(
                "`top_p` belongs to a `temperature` above 0: without one nothing is drawn"
            )
        return self


class Condition(NamedTuple):
    """What a metric must be, as `>= 0.98`."""

    sign: str
    bound: float

    @classmethod
    def parse(cls, text: Any) -> Condition:
        """Raises ValueError where it is not a sign and a number."""
        found = re.fullmatch(
            r"\s*(>=|<=|>|<)\s*([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*", str(text)
        )
        if found is None:
            raise ValueError(
                f'`{text}` is no condition: write one of >=, <=, >, < and a number, as ">= 0.98"'
            )
        return cls(found[1], float(found[2]))

    def holds(self, value: float) -> bool:
        return _SIGNS[self.sign](value, self.bound)


_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class BestSection(Section):
    """Which evaluated step is the best one. Its checkpoint is kept apart, for `packhorse export RUN
    --best`. Names are those of scorers, or eval_loss. Of steps that are alike in all of it the
    earliest is taken."""

    maximize: str | None = Field(
        default=None, description="The metric that decides: the highest one wins."
    )
    minimize: str | None = Field(
        default=None, description="In place of `maximize`: the lowest one wins."
    )
    subject_to: dict[str, str] = Field(
        default_factory=dict,
        description='What a step must meet to be the best at all, as `{format_accuracy: ">= '
        '0.98"}`.',
    )
    tie: str | None = Field(
        default=None,
        description="Decides where the metric is equal: the lower eval_loss, or the higher score.",
    )

    @field_validator("subject_to", mode="before")
    @classmethod
    def _conditions(cls, given: Any) -> Any:
        for text in given.values() if isinstance(given, dict) else ():
            Condition.parse(text)
        return given

    @model_validator(mode="after")
    def _one_aim(self) -> BestSection:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("give exactly one of `maximize` and `minimize`")
        if self.maximize == EVAL_LOSS:
            raise ValueError(f"the lower {EVAL_LOSS} is, the better: `minimize` it")
        for name, condition in self.conditions.items():
            if name != EVAL_LOSS and not 0 <= condition.bound <= 1:
                raise ValueError(
                    f"`subject_to.{name}`: scores go from 0 to 1, and `{self.subject_to[name]}` is "
                    f"not there"
                )
        return self

    @property
    def metric(self) -> str:
        """The one that decides."""
        name = self.maximize or self.minimize
        assert name is not None, "`_one_aim` has looked"
        return name

    @property
    def conditions(self) -> dict[str, Condition]:
        return {name: Condition.parse(text) for name, text in self.subject_to.items()}

    @property
    def places(self) -> dict[str, str]:
        """Every name of the rule, by where it stands."""
        aim = "maximize" if self.maximize else "minimize"
        conditions = {f"subject_to.{name}": name for name in self.subject_to}
        return {aim: self.metric, **conditions, **({"tie": self.tie} if self.tie else {})}

    def __str__(self) -> str:
        """The rule as a phrase."""
        aim = f"the {'highest' if self.maximize else 'lowest'} {self.metric}"
        conditions = " and ".join(f"{name} {text}" for name, text in self.subject_to.items())
        return (
            aim
            + (f" with {conditions}" if conditions else "")
            + (f", ties by {self.tie}" if self.tie else "")
        )


class EvalSection(Section):
    every_steps: int | None = Field(
        default=None, ge=1, description="Between evaluations; always before and after training."
    )
    generator: Literal["engine", "server", "vllm"] = Field(
        default="engine",
        description="What answers the prompts of `generate`: the engine itself, or a server that "
        "is handed the current "
        "weights as a Hugging Face folder: the one at `server`, or a vLLM, started between steps "
        "by `vllm_python`.",
    )
    server: Server | None = Field(
        default=None, description="It must see run.dir under the same path."
    )
    vllm_python: str | None = Field(
        default=None,
        description="The Python of an environment of its own that has vllm, as "
        "/opt/vllm/bin/python: vllm pins torch.",
    )
    vllm_args: tuple[str | int | float, ...] = Field(
        default=(),
        description="More arguments of vLLM's server, after packhorse's own, so that these count.",
    )
    generate: GenerateSection | None = None
    best: BestSection | None = None
    lm_eval: tuple[str, ...] = Field(
        default=(),
        description="Tasks of lm-evaluation-harness, as `[gsm8k, mmlu]`, which `packhorse eval` "
        "runs: they take too "
        "long for a run in training. Needs the extra `lm-eval`.",
    )
    lm_eval_path: str | None = Field(
        default=None,
        description="A folder of task files of your own, found before the library's tasks.",
    )
    lm_eval_chat: bool = Field(
        default=False,
        description="Ask its questions through the chat template; the library's own way, and most "
        "published numbers', "
        "is without.",
    )

    @model_validator(mode="after")
    def _generator_is_given(self) -> EvalSection:
        if (self.generator == "server") != (self.server is not None):
            raise ValueError("`server` belongs to `generator: server`, and must be given there")
        if (self.generator == "vllm") != (self.vllm_python is not None):
            raise ValueError("`vllm_python` belongs to `generator: vllm`, and must be given there")
        if self.vllm_args and self.generator != "vllm":
            raise ValueError("`vllm_args` belongs to `generator: vllm`")
        return self

    @model_validator(mode="after")
    def _best_is_evaluated(self) -> EvalSection:
        if self.best is None:
            return self
        names = [EVAL_LOSS, *(self.generate.scorers if self.generate else ())]
        for place, name in self.best.places.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                instead = (
                    f"did you mean `{near[0]}`?" if near else f"names here: {', '.join(names)}"
                )
                raise ValueError(
                    f"`best.{place}`: there is no scorer `{name}` in eval.generate.scorers; "
                    f"{instead}"
                )
        if self.every_steps is None:
            raise ValueError(
                "`best` needs `every_steps`: without it the last step alone is evaluated"
            )
        return self


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"`{pattern}` is not a regular expression: {error}") from None
