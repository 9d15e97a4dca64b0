"""Answers behind the prompt that a server sends, and stop tokens that no template writes (C14).

Each shape is a short template, written anew. The oracle knows nothing of the masker's method: it is
transformers' own generation prompt before the answer, and behind it what is written here by hand.
"""

import json
import re
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from packhorse.trainer.config.recipe import ModelSection
from packhorse.trainer.data.format import to_conversation
from packhorse.trainer.data.mask import Masker
from packhorse.trainer.data.preview import role_starts
from packhorse.trainer.datatypes import BadInput, Conversation, Example, Message, RowError
from packhorse.trainer.model.load import load_tokenizer
from tests.unit.test_chat_templates import ARGUMENTS, tokenizer_of, turns
from tests.unit.test_mask import CALL, chat, official

ONE = chat("Say OK.", "OK.")
TWO = chat("Say OK.", "OK.", "Why?", "No reason.")
GIVEN = Conversation(
    tuple(
        replace(message, reasoning_content="Hm.") if message.role == "assistant" else message
        for message in TWO.messages
    )
)
INLINE = chat("Say OK.", "<think>\nHm.\n</think>\n\nOK.", "Why?", "<think>No.</think>So.")
ASKS = "opens a thought with .* data.missing_reasoning: empty trains .* untrained puts"

# R1 and QwQ: the prompt opens a thought, and no answer is rendered with one
R1 = turns("<U>M", "<A>M<end>", "<A><think>\\n").replace(
    "m.content + '<end>'", "m.content.split('</think>')[-1] + '<end>'"
)
# Nemotron 3: reasoning is written, and an empty thought otherwise than the prompt opens it
NEMOTRON = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}"
    "{% else %}{{ '<think></think>' }}{% endif %}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# GLM 4.7: the prompt opens what the history only closes, and the next role's marker is the stop
GLM = (
    "{{ '[gMASK]' }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
    "{{ ('<think>' + m.reasoning_content if m.reasoning_content and loop.last else '') }}"
    "{{ '</think>' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ '<|observation|>' + m.content }}"
    "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
# Command R7B, Gemma 4 31B, QwQ without thinking: the prompt holds a closed thought
CLOSED = turns("<U>M<end>", "<A><TEXT>M<end>", "<A><START_THOUGHT><END_THOUGHT>")
# Command A reasoning: control tokens around a thought, and around the answer
START_END = turns("<U>M<end>", "<A><TEXT>M<end>", "<A><START_THOUGHT>")
# Apriel: a thought that is opened in words
WORDS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<A>\n' }}{% if m.reasoning_content "
    "%}{{ m.reasoning_content + '\n[FINAL]\n' }}{% endif %}{{ m.content + '<end>' }}"
    "{% else %}{{ '<U>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A>\nMy reasoning steps:\n' }}{% endif %}"
)
TURNS = "<U> <A> <TEXT> <START_THOUGHT> <END_THOUGHT> <end>"
GLM_CONTROLS = "[gMASK] <|user|> <|assistant|> <|observation|> <|endoftext|>"


@dataclass
class Shape:
    """What is written after the prompt of each answer; before `¦`, it is context."""

    controls: str
    template: str
    conversation: Conversation
    answers: list[str]
    options: dict[str, Any] = field(default_factory=dict)  # of the masker


EMPTY, UNTRAINED = {"missing_reasoning": "empty"}, {"missing_reasoning": "untrained"}
SHAPES = {
    "r1, reasoning in a field": Shape(
        TURNS, R1, GIVEN, ["Hm.\n</think>\n\nOK.<end>", "Hm.\n</think>\n\nNo reason.<end>"]
    ),
    "r1, reasoning in the text": Shape(
        TURNS, R1, INLINE, ["Hm.\n</think>\n\nOK.<end>", "No.</think>So.<end>"]
    ),
    "r1, an empty thought": Shape(
        TURNS, R1, TWO, ["\n</think>\n\nOK.<end>", "\n</think>\n\nNo reason.<end>"], EMPTY
    ),
    "r1, an empty thought as context": Shape(
        TURNS, R1, TWO, ["\n</think>\n\n¦OK.<end>", "\n</think>\n\n¦No reason.<end>"], UNTRAINED
    ),
    "nemotron, no reasoning": Shape(
        "<|im_start|> <|im_end|>", NEMOTRON, ONE, ["</think>OK.<|im_end|>"], EMPTY
    ),
    "nemotron, no reasoning, as context": Shape(
        "<|im_start|> <|im_end|>", NEMOTRON, ONE, ["</think>¦OK.<|im_end|>"], UNTRAINED
    ),
    "nemotron, reasoning": Shape(
        "<|im_start|> <|im_end|>",
        NEMOTRON,
        GIVEN,
        ["Hm.\n</think>\nOK.<|im_end|>", "Hm.\n</think>\nNo reason.<|im_end|>"],
    ),
    "glm, no reasoning": Shape(
        GLM_CONTROLS, GLM, TWO, ["</think>OK.<|user|>", "</think>No reason.<|user|>"], EMPTY
    ),
    "glm, as context": Shape(GLM_CONTROLS, GLM, ONE, ["</think>¦OK.<|user|>"], UNTRAINED),
    "glm, reasoning": Shape(
        GLM_CONTROLS, GLM, GIVEN, ["Hm.</think>OK.<|user|>", "Hm.</think>No reason.<|user|>"]
    ),
    "a closed thought in the prompt": Shape(
        TURNS, CLOSED, TWO, ["<TEXT>OK.<end>", "<TEXT>No reason.<end>"]
    ),
    "a closed thought that history closes, too": Shape(
        TURNS, turns("<U>M", "<A></think>M<end>", "<A><think></think>"), ONE, ["OK.<end>"]
    ),
    "control tokens around a thought": Shape(
        TURNS, START_END, GIVEN, [f"Hm.<END_THOUGHT><TEXT>{t}<end>" for t in ("OK.", "No reason.")]
    ),
    "control tokens around no thought": Shape(
        TURNS, START_END, ONE, ["<END_THOUGHT>¦<TEXT>OK.<end>"], UNTRAINED
    ),
    "a thought in words": Shape(
        TURNS, WORDS, GIVEN, ["Hm.\n[FINAL]\nOK.<end>", "Hm.\n[FINAL]\nNo reason.<end>"]
    ),
    "no thought in words": Shape(TURNS, WORDS, ONE, ["\n[FINAL]\nOK.<end>"], EMPTY),
    "white space that differs": Shape(
        TURNS, turns("Q: M\\n", "A:   M<end>\\n", "A:\\n"), TWO, ["OK.<end>", "No reason.<end>"]
    ),
    "a stop token that is left out at the very end": Shape(
        TURNS,
        turns("<U>M<end>", "<A>M", "<A>")
        .replace("<A>' + m.content", "<A>' + m.content + ('' if loop.last else '\\n<end>\\n')")
        .replace("+ ''", ""),
        TWO,
        ["OK.\n<end>", "No reason.\n<end>"],
    ),
    "no stop token: EOS": Shape(
        "</s>",
        turns("### Q:\\nM\\n", "### A:\\nM\\n", "### A:\\n"),
        TWO,
        ["OK.</s>", "No reason.</s>"],
    ),
    "answers marked after a space that the prompt lacks": Shape(
        "</s>",
        turns("USER: M ", "ASSISTANT: M ", "ASSISTANT:").replace(
            "ASSISTANT: ' + m.content + '",
            "ASSISTANT: ' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '",
        ),
        TWO,
        [" OK.</s>", " No reason.</s>"],
    ),
    "no stop token: the recipe's": Shape(
        "<over> </s>",
        turns("### Q:\\nM\\n", "### A:\\nM\\n", "### A:\\n"),
        ONE,
        ["OK.<over>"],
        {"stop_token": "<over>"},
    ),
    "texts in lists of parts alone": Shape(
        TURNS,
        turns("<U>M<end>", "<A>M<end>", "<A>").replace(
            "m.content", "(m.content | map(attribute='text') | join)"
        ),
        TWO,
        ["OK.<end>", "No reason.<end>"],
    ),
}


@pytest.fixture(scope="module")
def base(shared):
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "smollm2")


def documents(masker: Masker, conversation: Conversation) -> tuple[Example, ...]:
    (made,) = masker.documents([conversation])
    assert not isinstance(made, RowError), made
    return made


def reason(masker: Masker, conversation: Conversation) -> str:
    (made,) = masker.documents([conversation])
    assert isinstance(made, RowError)
    return str(made)


def is_written(tokenizer: Any, example: Example, context: str, learned: str) -> bool:
    """Return whether the example is the tokens of a prompt, and those generated after it, which are
    trained; untrained white space may follow."""
    before, after = (
        tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        for text in (context, learned)
    )
    ids, trained = example.input_ids.tolist(), example.trained.tolist()
    size = len(before) + len(after)
    rest = tokenizer.decode(ids[size:]).strip()
    flags = [False] * len(before) + [True] * len(after) + [False] * (len(ids) - size)
    return ids[:size] == before + after and trained == flags and not rest


def prompt_of(tokenizer: Any, conversation: Conversation, upto: int) -> str:
    """Return transformers' prompt, of texts or, where a template needs them, of lists of parts."""
    try:
        text = official(tokenizer, conversation, upto)
        if conversation.messages[0].content in text:
            return text
    except jinja2.UndefinedError:
        pass
    messages = [
        {"role": m.role, "content": [{"type": "text", "text": m.content}]}
        for m in conversation.messages[:upto]
    ]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def begins_with(answer: Message) -> str:
    """Return the answer's first three characters that are not white space."""
    text = (answer.reasoning_content or "") + answer.content
    return "".join(text.removeprefix("<think>").split())[:3]


@pytest.mark.parametrize("name", SHAPES)
def test_each_answer_stands_behind_a_servers_prompt(base, name):
    shape = SHAPES[name]
    tokenizer = tokenizer_of(base, shape.controls, shape.template)
    masker = Masker(tokenizer, turns="apart", **shape.options)
    made = documents(masker, shape.conversation)
    assert len(made) == len(shape.answers)
    for number, answer, example in zip((1, 3), shape.answers, made, strict=False):
        context, _, learned = answer.rpartition("¦")
        prompt = prompt_of(tokenizer, shape.conversation, number)
        assert is_written(tokenizer, example, prompt + context, learned)
    (stop, *_) = masker.stop_token_ids
    assert made[-1].input_ids[made[-1].trained][-1] == stop, "generation ends with what was trained"
    assert masker.prompt(shape.conversation)[0] == tokenizer.encode(prompt), "evaluation asks alike"
    for part, example in masker.rendered(shape.conversation):
        roles = role_starts(part, example, masker)
        assert [*roles.values()] == [message.role for message in part.messages]
        begins = max(roles)  # where the answer or its thought begins
        assert "".join(str(tokenizer.decode(example.input_ids[begins:])).split()).startswith(
            begins_with(part.messages[-1])
        )


@pytest.mark.parametrize(
    ("controls", "template", "conversation", "why"),
    [
        (TURNS, R1, ONE, ASKS),
        (TURNS, WORDS, ONE, ASKS),
        (GLM_CONTROLS, GLM, TWO, ASKS),
        ("<|im_start|> <|im_end|>", NEMOTRON, TWO, ASKS),
        (TURNS, START_END, ONE, ASKS),
        (TURNS, turns("<U>M", "<A>M<end>", "<B>"), ONE, "does not begin where"),
        (TURNS, turns("<U>M", "<A>M<end>", "<A>Well, "), ONE, "does not begin where"),
        # a closed thought before an answer that brings one
        (TURNS, turns("<U>M", "<A>M<end>", "<A><think></think>"), INLINE, "closes the thought"),
        (TURNS, CLOSED, GIVEN, "drops the reasoning of an answer"),
    ],
)
def test_what_no_server_would_see_generated_is_refused(base, controls, template, conversation, why):
    masker = Masker(tokenizer_of(base, controls, template), turns="auto")
    assert re.search(why, reason(masker, conversation))


def test_a_tool_call_ends_with_what_follows_it(base):
    """GLM's stop is the next role's marker: the user's after an answer, the tool's after a call."""
    tokenizer = tokenizer_of(base, GLM_CONTROLS, GLM.replace("<think>", ""))
    calling = Conversation(
        (
            Message("user", "2+2?"),
            Message("assistant", "So", tool_calls=(CALL,)),
            Message("tool", "4"),
            Message("assistant", "Four"),
        )
    )
    (example,) = documents(Masker(tokenizer, turns="auto"), calling)
    learned = tokenizer.decode(example.input_ids[example.trained])
    assert learned == f"</think>So<call>add{ARGUMENTS}<|observation|></think>Four<|user|>"
    (apart, _) = documents(Masker(tokenizer, turns="apart"), calling)
    assert tokenizer.decode(apart.input_ids[-1:]) == "<|observation|>"
    stops = tokenizer.decode(list(Masker(tokenizer).stop_token_ids))
    assert stops == "<|user|><|observation|><|endoftext|>", "generation ends with both"
    # a conversation of several turns is one document, as its history is as it was generated
    (example,) = documents(Masker(tokenizer, turns="auto"), TWO)
    learned = tokenizer.decode(example.input_ids[example.trained])
    assert learned == "</think>OK.<|user|></think>No reason.<|user|>"


def test_a_marker_is_no_stop_token_where_the_models_configuration_says_otherwise(base):
    tokenizer = tokenizer_of(base, GLM_CONTROLS, GLM)
    for ends, stop in [
        (["<|endoftext|>", "<|user|>"], "<|user|>"),
        (["<|endoftext|>"], "<|endoftext|>"),
    ]:
        tokenizer.generation_eos_token_ids = tokenizer.convert_tokens_to_ids(ends)
        masker = Masker(tokenizer, turns="auto", missing_reasoning="empty")
        made = documents(masker, TWO)
        assert [tokenizer.decode(one.input_ids[-1:]) for one in made] == [stop, stop]
        assert tokenizer.decode(list(masker.stop_token_ids[:1])) == stop


def test_what_ends_generation_is_read_from_the_models_folder(shared, tmp_path):
    AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen3").save_pretrained(tmp_path)
    section = ModelSection(name=str(tmp_path))
    assert load_tokenizer(section).generation_eos_token_ids == []
    for ids, found in ((7, [7]), ([7, 9], [7, 9]), (None, [])):
        text = json.dumps({"eos_token_id": ids})
        (tmp_path / "generation_config.json").write_text(text)
        assert load_tokenizer(section).generation_eos_token_ids == found


def test_a_stop_token_that_cannot_be_is_refused(base):
    plain = turns("### Q:\\nM\\n", "### A:\\nM\\n", "### A:\\n")
    with pytest.raises(BadInput, match=r"data.stop_token: the tokenizer has no control .* </s>"):
        Masker(tokenizer_of(base, "</s>", plain), stop_token="<over>")
    masker = Masker(tokenizer_of(base, TURNS, CLOSED), turns="auto", stop_token="<TEXT>")
    assert "ends an answer with <end>, not data.stop_token" in reason(masker, ONE)
    no_eos = PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer)
    no_eos.chat_template = plain
    assert "name the token that ends an answer as data.stop_token" in reason(Masker(no_eos), ONE)


@pytest.mark.parametrize(
    ("condition", "role"),
    [("m.role == 'system'", "system"), ("m.role == 'tool'", "tool")],
)
@pytest.mark.parametrize("refusal", ["{{ raise_exception('No such role') }}", ""])
def test_a_role_that_a_template_does_not_write_is_named(base, condition, role, refusal):
    template = (
        f"{{% for m in messages %}}{{% if {condition} %}}{refusal}{{% else %}}"
        "{{ '<U>' + m.role + m.content + '<end>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<U>assistant' }}{% endif %}"
    )
    messages = (*ONE.messages, Message("tool", "4"), Message("assistant", "Four"))
    row = Conversation((Message("system", "Be brief."), *messages))
    said = reason(Masker(tokenizer_of(base, TURNS, template), turns="auto"), row)
    assert said.startswith(f"the template {'refuses' if refusal else 'drops'} the {role} message")
    assert ("No such role" in said) == bool(refusal)
    assert "give a model.chat_template that writes it" in said
    assert ("data.ignore_columns" in said) == (role == "system")


# --------------------------------------------------------------------------------- public templates

BAR = "\uff5c"  # with which DeepSeek writes its markers
MARKERS = re.compile(rf"<([|{BAR}])[^|{BAR}<>\s'\"{{}}]+\1>|</?s>|<[a-z]+_of_[a-z]+>|<\|?turn\|?>")
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|return|>", "<|end|>"),
    *("<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", f"<{BAR}end\u2581of\u2581sentence{BAR}>"),
    "<|endoftext|>",
)
# without importing trl, which takes seconds
OF_TRL = Path(str(distribution("trl").locate_file("trl/chat_templates")))


@pytest.mark.parametrize("path", sorted(OF_TRL.glob("*.jinja")), ids=lambda path: path.stem)
def test_every_template_of_trl_trains_a_plain_conversation(base, path):
    source = path.read_text()
    controls = dict.fromkeys(match[0] for match in MARKERS.finditer(source))
    eos = next(end for end in ENDS if end in controls or end == ENDS[-1])
    tokenizer = tokenizer_of(base, " ".join([*controls, "<bos>", eos]), source)
    tokenizer.bos_token = "<bos>"
    masker = Masker(tokenizer, turns="apart", missing_reasoning="empty")
    for number, example in zip((1, 3), documents(masker, TWO), strict=True):
        prompt = prompt_of(tokenizer, TWO, number).replace(date.today().isoformat(), "2024-07-26")
        first, last = np.flatnonzero(example.trained)[[0, -1]]
        assert example.input_ids[:first].tolist() == tokenizer.encode(prompt)
        learned = tokenizer.decode(example.input_ids[first : last + 1])
        assert TWO.messages[number].content in learned
        assert example.input_ids[last] == masker.stop_token_ids[0]
        assert example.trained[first : last + 1].all()


# --------------------------------------------------------------------------------- any conversation

# For each shape, by hand: what opens a row, a question, the prompt's end, and an answer (reasoning,
# content) as it is generated after it and as history shows it.
WRITERS: dict[str, tuple[str, str, str, str, Any, Any]] = {
    "r1": (
        R1,
        "",
        "<U>{}",
        "<A><think>\n",
        lambda thought, text: f"{thought}\n</think>\n\n{text}<end>",
        lambda thought, text: f"<A>{text}<end>",
    ),
    "nemotron": (
        NEMOTRON,
        "",
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n",
        lambda thought, text: (
            (f"{thought}\n</think>\n" if thought else "</think>") + f"{text}<|im_end|>"
        ),
        lambda thought, text: (
            "<|im_start|>assistant\n"
            + (f"<think>\n{thought}\n</think>\n" if thought else "<think></think>")
            + f"{text}<|im_end|>\n"
        ),
    ),
    "glm": (
        GLM,
        "[gMASK]",
        "<|user|>{}",
        "<|assistant|><think>",
        lambda thought, text: f"{thought}</think>{text}<|user|>",
        lambda thought, text: f"<|assistant|></think>{text}",
    ),
    "words": (
        WORDS,
        "",
        "<U>{}",
        "<A>\nMy reasoning steps:\n",
        lambda thought, text: f"{thought}\n[FINAL]\n{text}<end>",
        lambda thought, text: (
            "<A>\n" + (f"{thought}\n[FINAL]\n" if thought else "") + f"{text}<end>"
        ),
    ),
    "alpaca": (
        turns("### Q:\\nM\\n", "### A:\\nM\\n", "### A:\\n"),
        "",
        "### Q:\n{}\n",
        "### A:\n",
        lambda thought, text: f"{text}<end>",
        lambda thought, text: f"### A:\n{text}\n",
    ),
}
CONTROLS = {
    "nemotron": "<|im_start|> <|im_end|>",
    "glm": GLM_CONTROLS,
}


@pytest.fixture(scope="module")
def writers(base):
    return {
        name: tokenizer_of(base, CONTROLS.get(name, TURNS), writer[0])
        for name, writer in WRITERS.items()
    }


FLAGS = {"train": 1, "trainable": 1, "training": 1, "loss": 1, "weight": 1, "masked": 0}
words = st.lists(
    st.sampled_from(
        ["a", "OK.", "ß", "数", "🙂", " ", "\n", "<", "think>", "</", "[", '"', "7", "zq"]
    )
    | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=6,
).map("".join)
# a text that spells a marker of the template is another matter
texts = words.map(lambda text: text.strip(" \n\x1c\x1d\x1e\x1f\x85")).filter(
    lambda text: text.strip() == text and text and "</think>" not in text and "<think>" not in text
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_of_any_row_each_chosen_answer_stands_behind_its_prompt(writers, data):
    """Rows come with flags and reasoning under the names that files have."""
    name = data.draw(st.sampled_from(sorted(WRITERS)))
    _, begin, question, header, generated, shown = WRITERS[name]
    tokenizer = writers[name]
    missing = data.draw(st.sampled_from(["empty", "untrained"]))
    train_on = data.draw(st.sampled_from(["assistant", "completion", "last_turn"]))
    flag, key = (
        data.draw(st.sampled_from(sorted(FLAGS))),
        data.draw(st.sampled_from(["reasoning_content", "reasoning", "thinking"])),
    )
    rows, wanted, history = [], [], begin
    count = data.draw(st.integers(1, 3))
    for number in range(count):
        asked, text = data.draw(texts), data.draw(texts)
        thought = "" if name == "alpaca" else data.draw(st.just("") | texts)
        chosen = data.draw(st.booleans())
        rows.append({"role": "user", "content": asked})
        rows.append(
            {"role": "assistant", "content": text, flag: FLAGS[flag] if chosen else 1 - FLAGS[flag]}
        )
        if thought:
            rows[-1][key] = thought
        history += question.format(asked)
        if chosen and (train_on == "assistant" or number == count - 1):
            end = re.compile(r"^\s*(</think>|\[FINAL\])\s*")
            written = generated(thought, text)
            skip = 0
            if missing == "untrained" and not thought and name != "alpaca":
                skip = len(written) - len(end.sub("", written))
            wanted.append((history + header, written, skip))
        history += shown(thought, text)
    conversation = to_conversation({"messages": rows}, "messages", {})
    masker = Masker(tokenizer, train_on, turns="apart", missing_reasoning=missing)
    (made,) = masker.documents([conversation])
    if isinstance(made, RowError):
        assert not wanted
        assert str(made) == "nothing to train"
        return
    assert len(made) == len(wanted)
    for example, (prompt, written, skip) in zip(made, wanted, strict=True):
        assert is_written(tokenizer, example, prompt + written[:skip], written[skip:])


def test_control_the_oracle_sees_a_shifted_mask(base):
    tokenizer = tokenizer_of(base, TURNS, R1)
    (example,) = documents(Masker(tokenizer, missing_reasoning="empty", turns="apart"), ONE)
    prompt, learned = official(tokenizer, ONE, 1), "\n</think>\n\nOK.<end>"
    assert is_written(tokenizer, example, prompt, learned)
    for wrong in (np.roll(example.trained, 1), np.roll(example.trained, -1), ~example.trained):
        assert not is_written(tokenizer, Example(example.input_ids, wrong), prompt, learned)
    assert not is_written(tokenizer, example, prompt[:-1], prompt[-1:] + learned)
