"""Which tokens are trained, token by token, on real templates (C6).

test_mask_matrix.py has each kind of row under each mode; this file has all other cases.
The oracle is written by hand: a render in which ⟦ ⟧ enclose what is to be learned. It must be what
the tokenizer's own `apply_chat_template` gives, and the flags must be those of the tokens whose
characters lie inside the brackets.
"""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from packhorse.trainer.data.encode import Encoder
from packhorse.trainer.data.mask import Masker
from packhorse.trainer.data.template_source import DATE_STRING
from packhorse.trainer.datatypes import BadInput, Conversation, Example, Message, RowError

FAMILIES = ("smollm2", "qwen2_5", "qwen3", "llama3_2", "mistral_nemo", "llama2")
SMOLLM2_SYSTEM = (
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
QWEN_SYSTEM = (
    "<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
)
LLAMA3_SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    f"Cutting Knowledge Date: December 2023\nToday Date: {DATE_STRING}\n\n<|eot_id|>"
)
CHATML_TURNS = (
    "<|im_start|>user\nSay OK.<|im_end|>\n<|im_start|>assistant\n⟦OK.<|im_end|>⟧\n"
    "<|im_start|>user\n OK. Why?<|im_end|>\n"
    "<|im_start|>assistant\n⟦{think} Größe 数 \n<|im_end|>⟧\n"
)
LLAMA3_TURN = "<|start_header_id|>{role}<|end_header_id|>\n\n"
# Two answers: the first is what the user quoted; the second has white space at both ends.
TURNS = Conversation(
    (
        Message("user", "Say OK."),
        Message("assistant", "OK."),
        Message("user", " OK. Why?"),
        Message("assistant", " Größe 数 \n"),
    )
)
RENDERS = {
    "smollm2": SMOLLM2_SYSTEM + CHATML_TURNS.format(think=""),
    "qwen2_5": QWEN_SYSTEM + CHATML_TURNS.format(think=""),
    "qwen3": CHATML_TURNS.format(
        think="<think>\n\n</think>\n\n"
    ),  # the model must write the empty block itself
    "llama3_2": LLAMA3_SYSTEM
    + LLAMA3_TURN.format(role="user")
    + "Say OK.<|eot_id|>"
    + LLAMA3_TURN.format(role="assistant")
    + "⟦OK.<|eot_id|>⟧"
    + LLAMA3_TURN.format(role="user")
    + "OK. Why?<|eot_id|>"
    + LLAMA3_TURN.format(role="assistant")
    + "⟦Größe 数<|eot_id|>⟧",
    "mistral_nemo": "<s>[INST]Say OK.[/INST]⟦OK.</s>⟧[INST] OK. Why?[/INST]⟦ Größe 数 \n</s>⟧",
    "llama2": "<s>[INST] Say OK. [/INST]⟦ OK. </s>⟧<s>[INST] OK. Why? [/INST]⟦ Größe 数 </s>⟧",
}


@pytest.fixture(scope="module")
def tokenizers(shared):
    return {
        family: AutoTokenizer.from_pretrained(shared / "tokenizers" / family) for family in FAMILIES
    }


def chat(*contents: str) -> Conversation:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    return Conversation(
        tuple(Message(roles[number % 2], text) for number, text in enumerate(contents))
    )


def official(tokenizer, conversation: Conversation, upto: int | None = None, **kwargs) -> str:
    """Return transformers' own render; with `upto`, of the messages before it, with the generation
    prompt."""
    messages = [message.as_dict() for message in conversation.messages[:upto]]
    tools = list(conversation.tools) or None
    prompt = upto is not None
    kwargs = {"date_string": DATE_STRING, **kwargs}
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **kwargs
    )


def parse(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without brackets, and the spans that they enclosed."""
    text, spans = "", []
    for piece in marked.split("⟦"):
        inside, bracket, outside = piece.partition("⟧")
        if bracket:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


def agrees(tokenizer, example: Example, text: str, spans: list[tuple[int, int]]) -> bool:
    """Return whether `example` is `text` tokenized whole, and exactly the tokens with characters in
    `spans` are trained."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    inside = [any(start < b and a < stop for a, b in spans) for start, stop in encoding.offsets]
    return encoding.ids == example.input_ids.tolist() and inside == example.trained.tolist()


def trained_text(tokenizer, example: Example) -> str:
    return tokenizer.decode(example.input_ids[example.trained].tolist(), skip_special_tokens=False)


# ------------------------------------------------------------------------------- families and modes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_on", ["assistant", "completion", "last_turn", "all"])
def test_exactly_the_answers_and_their_stop_tokens_are_trained(tokenizers, family, train_on):
    tokenizer = tokenizers[family]
    text, spans = parse(RENDERS[family])
    assert text == official(tokenizer, TURNS)
    example = Masker(tokenizer, train_on).example(TURNS)
    if train_on == "all":
        first = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets[0]
        spans = [(first[1], len(text))]
    elif train_on != "assistant":
        spans = spans[-1:]
    assert agrees(tokenizer, example, text, spans)


@pytest.mark.parametrize("family", FAMILIES)
def test_control_the_oracle_sees_a_wrong_mask(tokenizers, family):
    tokenizer = tokenizers[family]
    text, spans = parse(RENDERS[family])
    example = Masker(tokenizer).example(TURNS)
    shifted = np.roll(example.trained, 1)
    without_stop = example.trained.copy()
    without_stop[np.flatnonzero(example.trained)[-1]] = False
    for wrong in (shifted, without_stop, ~example.trained, np.zeros_like(shifted)):
        assert not agrees(tokenizer, Example(example.input_ids, wrong), text, spans)
    assert not agrees(tokenizer, Example(example.input_ids[1:], example.trained[1:]), text, spans)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stop_token_can_be_left_out_and_weight_0_leaves_out_a_turn(tokenizers, family):
    tokenizer = tokenizers[family]
    text, spans = parse(RENDERS[family])
    stop = tokenizer.eos_token
    without_stop = [(start, text.index(stop, start)) for start, _ in spans]
    assert agrees(
        tokenizer, Masker(tokenizer, train_on_eot=False).example(TURNS), text, without_stop
    )
    asked, first, *rest = TURNS.messages
    skipped = Conversation((asked, Message("assistant", first.content, weight=0), *rest))
    assert agrees(tokenizer, Masker(tokenizer).example(skipped), text, spans[1:])
    unlearned = Masker(tokenizer, "all").example(skipped).trained
    assert (unlearned[1:] == ~Masker(tokenizer).example(TURNS).trained[1:]).sum() == len(
        unlearned
    ) - 1 - sum(Masker(tokenizer, "completion").example(TURNS).trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_what_inference_is_given(tokenizers, family):
    tokenizer = tokenizers[family]
    masker = Masker(tokenizer, "completion")
    ids, reference = masker.prompt(TURNS)
    official_ids = tokenizer(official(tokenizer, TURNS, upto=3), add_special_tokens=False)[
        "input_ids"
    ]
    assert ids == official_ids
    assert reference == " Größe 数 \n"
    example = masker.example(TURNS)
    assert example.input_ids[: np.flatnonzero(example.trained)[0]].tolist() == ids
    assert masker.stop_token_ids == (tokenizer.eos_token_id,)


def test_the_newline_after_the_stop_token_is_trained_on_request_only(tokenizers):
    tokenizer = tokenizers["qwen2_5"]
    text, spans = parse(RENDERS["qwen2_5"].replace("⟧\n", "\n⟧"))
    assert agrees(
        tokenizer, Masker(tokenizer, train_on_eot="with_newline").example(TURNS), text, spans
    )


def test_the_reference_count_of_gsm8k(shared):
    """6215 trained tokens in 48 rows, with the stop token and the newline after it."""
    import json

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "smollm2_tokenizer")
    with (shared / "data" / "gsm8k_test.jsonl").open() as file:
        rows = [
            chat(row["question"], row["answer"])
            for row in map(json.loads, [next(file) for _ in range(48)])
        ]
    examples = Masker(tokenizer, train_on_eot="with_newline").examples(rows)
    assert (
        sum(int(example.trained.sum()) for example in examples if isinstance(example, Example))
        == 6215
    )


# ------------------------------------------------------------------------------ tools and reasoning

TOOLS = (
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
    },
)
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": "2", "b": 'say "zwölf"'}},
}
CALLING = (
    Message("user", "2+2?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", '{"sum": "4"}', tool_call_id="call00001"),
    Message("assistant", "4"),
)
WITH_TOOLS = Conversation(CALLING, TOOLS)


REASONED = Conversation(
    (
        Message("user", "2+2?"),
        Message("assistant", "4", reasoning_content="two\nand two"),
        *chat("3?", "3").messages,
    )
)


def test_reasoning_is_trained_where_the_template_writes_it(tokenizers):
    tokenizer = tokenizers["qwen3"]
    alone = Conversation(REASONED.messages[:2])
    expected = "<think>\ntwo\nand two\n</think>\n\n4<|im_end|>"
    assert trained_text(tokenizer, Masker(tokenizer).example(alone)) == expected
    inline = chat(
        "2+2?", "<think>\ntwo\nand two\n</think>\n\n4"
    )  # the template takes the text apart
    assert trained_text(tokenizer, Masker(tokenizer).example(inline)) == expected


def test_old_reasoning_may_go_from_context_but_not_from_a_trained_answer(tokenizers):
    tokenizer = tokenizers["qwen3"]
    last = Masker(tokenizer, "completion").example(REASONED)
    assert trained_text(tokenizer, last) == "<think>\n\n</think>\n\n3<|im_end|>"
    with pytest.raises(RowError, match="drops the reasoning of an answer"):
        Masker(tokenizer).example(REASONED)


@pytest.mark.parametrize(
    ("family", "conversation", "reason"),
    [
        ("smollm2", WITH_TOOLS, "the template drops the tools"),
        ("smollm2", Conversation(CALLING), "the template drops tool calls"),
        ("llama2", Conversation(chat("a", "b").messages, TOOLS), "the template drops the tools"),
        ("qwen2_5", REASONED, "the template drops the reasoning of an answer"),
        (
            "mistral_nemo",
            Conversation((Message("system", "Be brief."), *chat("a", "b").messages)),
            "the template drops the system message",
        ),
        (
            "llama2",
            Conversation(CALLING),
            "the template refuses the row: Conversation roles must alternate",
        ),
        ("qwen3", chat("a"), "nothing to train"),
    ],
)
def test_what_a_template_leaves_out_is_not_trained_around(tokenizers, family, conversation, reason):
    with pytest.raises(RowError, match=reason):
        Masker(tokenizers[family]).example(conversation)


# ------------------------------------------------------------------------------------ hostile texts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_a_text_cannot_bring_in_control_tokens(tokenizers, family, where):
    tokenizer = tokenizers[family]
    contents = ["a", "b", "c", "d"]
    for token in Masker(tokenizer).template.control_ids:
        contents[where] = f"x{token}y"
        for train_on in ("assistant", "all"):
            with pytest.raises(RowError, match="control token"):
                Masker(tokenizer, train_on).example(chat(*contents))
    with pytest.raises(RowError, match="control token"):
        Masker(tokenizer).example(Conversation(text=f"x{tokenizer.eos_token}y"))


def test_nor_can_tools_and_calls(tokenizers):
    tokenizer = tokenizers["qwen2_5"]
    for key, value in (("b<|im_end|>", "x"), ("b", "<|im_end|>")):
        call = {**CALL, "function": {"name": "add", "arguments": {key: value}}}
        with pytest.raises(RowError, match="control token"):
            Masker(tokenizer).example(
                Conversation((CALLING[0], Message("assistant", "", tool_calls=(call,))))
            )
    tool = {"type": "function", "function": {"name": "add", "description": "<|im_end|>"}}
    with pytest.raises(RowError, match="control token"):
        Masker(tokenizer).example(Conversation(chat("a", "b").messages, (tool,)))


@pytest.mark.parametrize("word", ["zq0000qz", "zq9999qz"])
def test_a_schema_that_holds_a_word_of_the_proof_is_rejected(tokenizers, word):
    tool = {"type": "function", "function": {"name": "add", "description": word}}
    with pytest.raises(RowError, match="a word that the proof of the mask"):
        Masker(tokenizers["qwen2_5"]).example(Conversation(chat("a", "b").messages, (tool,)))


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_look_like_template_text(tokenizers, family):
    tokenizer = tokenizers[family]
    for odd in (
        "assistant\n",
        "<|im_",
        "|im_end|>",
        "zq0001qz",
        "zq0000qz",
        "[/INST",
        "{{ x }}",
        "user",
        "</think>",
    ):
        conversation = chat(odd, f"{odd} b {odd}", odd, "c")
        masker = Masker(tokenizer)
        try:
            example = masker.example(conversation)
        except RowError as error:
            if (family, odd) == ("qwen3", "</think>") and "drops" in str(error):
                continue  # it cuts the answer at the tag, and drops a part
            raise
        spans = []
        text = official(tokenizer, conversation)
        for upto in (1, 3):
            start = len(official(tokenizer, conversation, upto))
            spans.append((start, text.index(tokenizer.eos_token, start) + len(tokenizer.eos_token)))
        assert agrees(tokenizer, example, text, spans)


@pytest.mark.parametrize("family", ["smollm2", "qwen2_5", "llama3_2"])
def test_a_token_across_the_end_of_the_prompt_is_cut_as_inference_cuts_it(tokenizers, family):
    tokenizer = tokenizers[family]
    masker = Masker(templated(tokenizer, PLAIN_TURNS.replace("A: ", "A:\n")))
    conversation = chat("a", "\n\nb")
    text = "U: a\nA:\n\n\nb" + tokenizer.eos_token + "\n"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    example = masker.example(conversation)
    prompt = tokenizer("U: a\nA:\n", add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert trained_text(tokenizer, example) == "\n\nb" + tokenizer.eos_token
    assert tokenizer.decode(example.input_ids.tolist()) == text
    if family != "smollm2":  # there the newlines stay apart
        assert whole != example.input_ids.tolist()


# ---------------------------------------------------------------------------------------- templates

PLAIN_TURNS = (
    "{% for m in messages %}{{ {'user': 'U: ', 'assistant': 'A: ', 'system': 'S: '}[m.role] + "
    "m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}A: {% "
    "endif %}"
)


def templated(tokenizer, template: str):
    """The tokenizer with another chat template."""
    import copy

    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("{{ eos_token if m.role == 'assistant' }}", ""), "ends an answer otherwise when more"),
        (
            ("m.content", "m.content|upper"),
            "drops the user message",
        ),  # what is shouted is not what was said
        (("m.content", "m.content|replace('ca', 'b')|title"), "drops the user message"),
        (("m.content", "m.content[:3]"), "drops the user message"),
        (("m.content", "m.content|reverse"), "drops an answer"),
        (("m.content", "(m.content if 'cat' not in m.content else 'a dog')"), "drops an answer"),
        (("m.content", "(m.content if m.content|length != 5 else 'a dog')"), "changes a text"),
        (("m.content", "m.content * 2"), "writes a text twice"),
        (("m.content", "(m.content if m.role != 'user' else '')"), "drops the user message"),
        (("m.content", "(m.content if m.role != 'assistant' else '')"), "drops an answer"),
        (
            ("in messages", "in messages|reverse"),
            "(begin where the generation prompt ends|out of its place)",
        ),
        (
            ("{% if add_generation_prompt %}A: ", "{% if add_generation_prompt %}A: <think>"),
            "does not begin where",
        ),
        (("{% for", "{{ raise_exception('never') }}{% for"), "refuses the row: never"),
        (("{% for", "{{ 1 / 0 }}{% for"), "refuses the row: division by zero"),
        (
            ("{% for", "{% macro walk(n) %}{{ walk(n) }}{% endmacro %}{{ walk(1) }}{% for"),
            "refuses the row: maximum recursion depth",
        ),
        (("{% for", "{{ range(10 ** 9) | list }}{% for"), "refuses the row"),
        (("{% for", "{{ 'x'.encode('no such') }}{% for"), "refuses the row"),
        (("{% for", "{{ messages | map('no such') | list }}{% for"), "refuses the row"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(tokenizers, change, reason):
    conversation = chat("who sat?", "a cat", "and?", "a bat")
    tokenizer = tokenizers["smollm2"]
    followed = Masker(templated(tokenizer, PLAIN_TURNS)).example(conversation)
    assert trained_text(tokenizer, followed) == "a cat<|im_end|>a bat<|im_end|>"
    with pytest.raises(RowError, match=reason):
        Masker(templated(tokenizer, PLAIN_TURNS.replace(*change))).example(conversation)


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ("{% generation %}{{ m.content + eos_token }}{% endgeneration %}", "a cat<|im_end|>"),
        (
            "{{ '...' }}{% generation %}{{ m.content + eos_token + '!' }}{% endgeneration %}",
            "a cat<|im_end|>",
        ),
        (
            "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}",
            "a cat<|im_end|>",
        ),  # train_on_eot says so
        (
            "{{ m.content }}{% generation %}{{ eos_token }}{% endgeneration %}",
            "leaves out a part of an answer",
        ),
        (
            "{% generation %}{{ m.content }}{% endgeneration %}{{ '...' }}{% generation %}{{ "
            "eos_token }}"
            "{% endgeneration %}",
            "leaves out a part of an answer",
        ),
        (
            "{{ m.content + eos_token }}{% generation %}{{ '!' }}{% endgeneration %}",
            "leaves out an answer",
        ),
    ],
)
def test_a_template_that_marks_answers_is_checked(tokenizers, mark, expected):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' }}"
        + mark
        + "{% else %}{{ 'U: ' + m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    masker = Masker(templated(tokenizers["smollm2"], template))
    if expected.startswith("a cat"):
        assert (
            trained_text(tokenizers["smollm2"], masker.example(chat("a cat", "a cat"))) == expected
        )
    else:
        with pytest.raises(RowError, match=expected):
            masker.example(chat("a cat", "a cat"))


def test_a_template_that_writes_the_date_writes_a_fixed_one(tokenizers):
    template = "{{ strftime_now('%Y-%m-%d') }}\n" + PLAIN_TURNS
    masker = Masker(templated(tokenizers["smollm2"], template), "all")
    text = tokenizers["smollm2"].decode(masker.example(chat("a", "b")).input_ids.tolist())
    assert text == "2024-07-26\nU: a\nA: b<|im_end|>\n"


def test_no_template_and_a_broken_one(shared, tokenizers):
    base = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    with pytest.raises(BadInput, match=r"model\.chat_template: chatml"):
        Masker(base).example(chat("a", "b"))
    with pytest.raises(BadInput, match=r"not valid Jinja \(line 1"):
        Masker(templated(base, "{% for %}")).example(chat("a", "b"))
    with pytest.raises(BadInput, match="slow"):
        Masker(SimpleNamespace(is_fast=False))  # pyright: ignore[reportArgumentType]


# ----------------------------------------------------------------------------- the proof, the state


@pytest.mark.parametrize(
    "fault", ["a control token lost", "one more", "two exchanged", "the header changed"]
)
def test_control_tokens_that_are_not_accounted_for_are_refused(tokenizers, monkeypatch, fault):
    """The proof at work: the masker is handed tokens that are not those of its render."""
    masker = Masker(tokenizers["qwen2_5"])
    controls = set(masker.template.control_ids.values())
    encode = Encoder.encode

    def tampered(self, texts, *options):
        results = encode(self, texts, *options)
        for text, ids in zip(texts, results, strict=True):
            places = [place for place, number in enumerate(ids) if number in controls]
            if "Say OK." not in text or len(places) < 5:
                continue
            if fault == "a control token lost":
                del ids[places[2]]
            elif fault == "one more":
                ids.insert(5, ids[places[0]])
            elif fault == "two exchanged":
                ids[places[0]], ids[places[1]] = ids[places[1]], ids[places[0]]
            else:
                ids[places[4] + 1] += 1
        return results

    assert masker.example(TURNS).trained.any()
    monkeypatch.setattr(Encoder, "encode", tampered)
    with pytest.raises(RowError, match=r"control token|spans the end"):
        masker.example(TURNS)


def test_a_skeleton_of_another_shape_does_not_pass(tokenizers):
    masker = Masker(tokenizers["qwen2_5"])
    masker.example(TURNS)
    (skeleton,) = masker.template._skeletons.values()
    skeleton.literals[2] = skeleton.literals[2].replace("user", "tool")
    with pytest.raises(RowError, match="cannot be followed"):
        masker.example(TURNS)


def test_plain_texts_are_trained_between_bos_and_eos(tokenizers):
    text = Conversation(text="Once upon a time")
    for family, bos, eos in (("llama2", 1, 1), ("qwen2_5", 0, 1), ("smollm2", 0, 1)):
        tokenizer = tokenizers[family]
        example = Masker(tokenizer).example(text)
        ids = example.input_ids.tolist()
        assert ids[bos:-eos] == tokenizer(text.text, add_special_tokens=False)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert not bos or ids[0] == tokenizer.bos_token_id
        assert example.trained.tolist() == [False] + [True] * (len(ids) - 1)
        assert not Masker(tokenizer, train_on_eot=False).example(text).trained[-1]
    with pytest.raises(RowError, match="nothing to train"):
        Masker(tokenizers["qwen2_5"], train_on_eot=False).example(Conversation(text="a"))


def test_many_rows_at_once_are_as_one_by_one(tokenizers):
    rows = [
        TURNS,
        Conversation(text="abc"),
        chat("a"),
        WITH_TOOLS,
        chat("a", "<|im_end|>"),
        chat("x", "y"),
    ]
    masker = Masker(tokenizers["qwen3"])
    together = masker.examples(rows)
    assert [type(result) for result in together] == [
        Example,
        Example,
        RowError,
        Example,
        RowError,
        Example,
    ]
    for row, result in zip(rows, together, strict=True):
        if isinstance(result, Example):
            alone = Masker(tokenizers["qwen3"]).example(row)
            assert result.input_ids.tolist() == alone.input_ids.tolist()
            assert result.trained.tolist() == alone.trained.tolist()
            assert (result.input_ids.dtype, result.trained.dtype) == (np.int32, np.bool_)


def test_padding_set_elsewhere_does_not_reach_the_rows(tokenizers):
    tokenizer = tokenizers["qwen2_5"]
    before = Masker(tokenizer).fingerprint()
    tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=2)
    examples = Masker(tokenizer).examples([chat("a", "b"), TURNS])
    assert [len(example.input_ids) for example in examples if isinstance(example, Example)] != [
        2,
        2,
    ]
    tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=2)
    assert Masker(tokenizer).fingerprint() == before


def test_the_fingerprint_tells_apart_what_shapes_an_example(tokenizers):
    tokenizer = tokenizers["qwen2_5"]
    maskers = [
        Masker(tokenizer),
        Masker(tokenizer, "all"),
        Masker(tokenizer, train_on_eot=False),
        Masker(tokenizer, train_on_eot="with_newline"),
        Masker(tokenizer, control_tokens="text"),
        Masker(tokenizer, control_tokens="keep"),
        Masker(templated(tokenizer, PLAIN_TURNS)),
        Masker(tokenizers["qwen3"]),
        Masker(tokenizers["qwen3"], chat_template_kwargs={"enable_thinking": False}),
        Masker(tokenizers["qwen3"], chat_template_kwargs={"enable_thinking": 0}),
    ]
    assert len({masker.fingerprint() for masker in maskers}) == len(maskers)
    assert Masker(tokenizer).fingerprint() == maskers[0].fingerprint()


def test_a_masker_travels_to_worker_processes(tokenizers):
    masker = Masker(tokenizers["qwen3"])
    masker.example(TURNS)
    copied = pickle.loads(pickle.dumps(masker))
    assert copied.example(TURNS).trained.tolist() == masker.example(TURNS).trained.tolist()
    assert copied.fingerprint() == masker.fingerprint()


def test_an_answer_that_says_nothing_to_the_template_is_refused(tokenizers):
    """It splits answers at the end of a thought."""
    with pytest.raises(RowError, match="no answer"):
        Masker(tokenizers["qwen3"]).example(chat("a", "</think>"))
