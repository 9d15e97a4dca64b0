"""Which tokens are trained of each kind of row, in each family, under each mode (C6).

A case is a conversation, and for each family how its messages are rendered, written by hand: ⟦ ⟧
enclose what a model has to write. transformers' own render must be an opening and just that. What
each mode trains follows from the
brackets: `all` everything but the first token, `completion` the last bracket, `assistant` all of
    them, `last_turn`
those after the last question. A family that cannot say a case must refuse it, for the reason named.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from packhorse.trainer.data.mask import Masker
from packhorse.trainer.datatypes import Conversation, Example, Message, RowError
from tests.unit.test_mask import (
    CALL,
    CHATML_TURNS,
    FAMILIES,
    LLAMA3_SYSTEM,
    QWEN_SYSTEM,
    RENDERS,
    SMOLLM2_SYSTEM,
    TOOLS,
    TURNS,
    chat,
    official,
    parse,
)

MODES = ("all", "completion", "assistant", "last_turn")
OPENINGS = {
    "smollm2": SMOLLM2_SYSTEM,
    "qwen2_5": QWEN_SYSTEM,
    "llama3_2": LLAMA3_SYSTEM,
    "mistral_nemo": "<s>",
}
CHATML = ("<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n⟦{}<|im_end|>⟧\n")
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{}<|eot_id|>⟧",
)
FORMS = {  # a question and an answer, each with its {}
    "smollm2": CHATML,
    "qwen2_5": CHATML,
    "qwen3": CHATML,
    "llama3_2": LLAMA3,
    "mistral_nemo": ("[INST]{}[/INST]", "⟦{}</s>⟧"),
    "llama2": ("<s>[INST] {} [/INST]", "⟦ {} </s>⟧"),
}
NO_THOUGHT = "<think>\n\n</think>\n\n"  # qwen3 opens its last answer with it
STRIPPING = ("llama3_2", "llama2")  # they take white space from a text's ends


@dataclass
class Case:
    conversation: Conversation
    renders: dict[
        str, str
    ]  # by family: the messages, with brackets, or the reason why they are refused
    last_turn: int = 1  # brackets after the last question
    opening: dict[str, str] | None = field(
        default_factory=lambda: OPENINGS
    )  # None: whatever the template writes


def written(family: str, *texts: str) -> str:
    """Questions and answers by turns, in the family's own form."""
    if family in STRIPPING:
        texts = tuple(text.strip() for text in texts)
    if family == "qwen3":
        texts = (*texts[:-1], NO_THOUGHT + texts[-1])
    return "".join(
        FORMS[family][number % 2].replace("{}", text) for number, text in enumerate(texts)
    )


def plain(*texts: str) -> Case:
    """The same questions and answers in every family."""
    return Case(chat(*texts), {family: written(family, *texts) for family in FAMILIES})


def refused(reason: str, *families: str) -> dict[str, str]:
    return dict.fromkeys(families, f"refused: {reason}")


CALLED = '{"name": "add", "arguments": {"a": "2", "b": "say \\"zwölf\\""}}'
QWEN_CALLING = (
    "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n"
    + CALLED
    + "\n</tool_call><|im_end|>⟧\n"
    '<|im_start|>user\n<tool_response>\n{"sum": '
    '"4"}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
)
SYSTEM = (Message("system", "Be brief."), *chat("Hi", "Hello!", "Bye", "See you.").messages)
GREETINGS = ("Hi", "Hello!", "Bye", "See you.")
THOUGHT = (Message("user", "2+2?"), Message("assistant", "4", reasoning_content="two\nand two"))

CASES = {
    "multi-turn": Case(
        TURNS,
        {family: RENDERS[family].removeprefix(OPENINGS.get(family, "")) for family in FAMILIES},
    ),
    "system": Case(
        Conversation(SYSTEM),
        {
            **{
                f: "<|im_start|>system\nBe brief.<|im_end|>\n" + written(f, *GREETINGS)
                for f in ("smollm2", "qwen2_5")
            },
            "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n" + written("qwen3", *GREETINGS),
            "llama3_2": LLAMA3_SYSTEM.replace("<|eot_id|>", "Be brief.<|eot_id|>")
            + written("llama3_2", *GREETINGS),
            "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n"
            + written("llama2", *GREETINGS).removeprefix("<s>[INST] "),
            **refused("the template drops the system message", "mistral_nemo"),
        },
        opening={},
    ),
    "tools": Case(
        Conversation(
            (
                Message("user", "2+2?"),
                Message("assistant", "", tool_calls=(CALL,)),
                Message("tool", '{"sum": "4"}', tool_call_id="call00001"),
                Message("assistant", "4"),
            ),
            TOOLS,
        ),
        {
            "qwen2_5": QWEN_CALLING + "⟦4<|im_end|>⟧\n",
            "qwen3": QWEN_CALLING + "⟦" + NO_THOUGHT + "4<|im_end|>⟧\n",
            "llama3_2": "2+2?<|eot_id|>"
            + LLAMA3[1].replace("{}", CALLED.replace("arguments", "parameters"))
            + '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"sum\\": \\"4\\"}"<|eot_id|>'
            + LLAMA3[1].replace("{}", "4"),
            "mistral_nemo": "[INST]2+2?[/INST]⟦[TOOL_CALLS]["
            + CALLED[:-1]
            + ', "id": "call00001"}]</s>⟧'
            '[TOOL_RESULTS]{"content": {"sum": "4"}, "call_id": "call00001"}[/TOOL_RESULTS]⟦4</s>⟧',
            **refused("the template drops the tools", "smollm2"),
            **refused("the template refuses the row: Conversation roles must alternate", "llama2"),
        },
        last_turn=2,
        opening=None,
    ),
    "reasoning": Case(
        Conversation(THOUGHT),
        {
            "qwen3": written("qwen3", "2+2?", "4").replace(
                "<think>\n\n", "<think>\ntwo\nand two\n"
            ),
            **refused(
                "the template drops the reasoning",
                *(family for family in FAMILIES if family != "qwen3"),
            ),
        },
    ),
    "quoted by the user": plain("Say OK.\nOK.", "OK.", "You said OK.", "OK."),
    "white space at the ends": plain(" a \n", " \n b\t\n", "\tc", "d  "),
    "empty answer": Case(chat("a", "b", "c", " \n"), refused("no answer", *FAMILIES)),
    "unicode": plain(
        "Größe?", "数 🙂 e\u0301 \u202e\u2028x\u200b.", "ﬁ \u00a0?", "\ufeffZ\u0085z 👩‍👩‍👧"
    ),
}
assert CHATML_TURNS.format(think="") == "".join(
    CASES["multi-turn"].renders["smollm2"]
)  # one form, written twice


@pytest.fixture(scope="module")
def tokenizers(shared):
    return {
        family: AutoTokenizer.from_pretrained(shared / "tokenizers" / family) for family in FAMILIES
    }


def trained_spans(
    case: Case, mode: str, text: str, spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What a mode trains, as spans of characters."""
    return {
        "all": [(0, len(text))],
        "completion": spans[-1:],
        "assistant": spans,
        "last_turn": spans[-case.last_turn :],
    }[mode]


def expected(
    backend, text: str, spans: list[tuple[int, int]], starts: list[int] | None = None
) -> list[tuple[int, bool]]:
    """Return token ids, each with whether it is trained, as it has a character in `spans`. A token
    that would span the end of a prompt (one of `starts`) is cut there, as inference cuts it."""
    whole = backend.encode(text, add_special_tokens=False).offsets
    starts = [start for start, _ in spans] if starts is None else starts
    cuts = [start for start in starts if any(a < start < b for a, b in whole)]
    tokens = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece = backend.encode(text[begin:end], add_special_tokens=False)
        for number, (a, b) in zip(piece.ids, shifted(piece.offsets, begin), strict=True):
            tokens.append((number, any(a < stop and start < b for start, stop in spans)))
    return tokens


def agrees(example: Example, tokens: list[tuple[int, bool]]) -> bool:
    """Token by token; the first is never trained."""
    ids, trained = zip(*tokens, strict=True)
    return example.input_ids.tolist() == list(ids) and example.trained.tolist() == [
        False,
        *trained[1:],
    ]


def shifted(offsets: list[tuple[int, int]], by: int) -> list[tuple[int, int]]:
    return [(start + by, stop + by) for start, stop in offsets]


def render(case: Case, family: str, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """transformers' text, and where the brackets lie in it."""
    tail, spans = parse(case.renders[family])
    text = official(tokenizer, case.conversation)
    head = len(text) - len(tail)
    assert text[head:] == tail
    assert case.opening is None or text[:head] == case.opening.get(family, "")
    return text, shifted(spans, head)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_what_is_trained(tokenizers, name, family, mode):
    case, tokenizer = CASES[name], tokenizers[family]
    masker = Masker(tokenizer, mode)
    if case.renders[family].startswith("refused: "):
        with pytest.raises(RowError, match=case.renders[family].removeprefix("refused: ")):
            masker.example(case.conversation)
        return
    text, spans = render(case, family, tokenizer)
    example = masker.example(case.conversation)
    assert agrees(
        example, expected(tokenizer.backend_tokenizer, text, trained_spans(case, mode, text, spans))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_one_bos_and_it_is_the_templates_or_the_tokenizers(tokenizers, family):
    tokenizer = tokenizers[family]
    ids = Masker(tokenizer).example(TURNS).input_ids.tolist()
    encoded = tokenizer.apply_chat_template(
        [message.as_dict() for message in TURNS.messages], date_string="26 Jul 2024"
    )
    assert ids == encoded["input_ids"]
    opens = {"llama3_2": "<|begin_of_text|>", "mistral_nemo": "<s>", "llama2": "<s>"}.get(family)
    if opens:
        bos = tokenizer.convert_tokens_to_ids(opens)
        assert ids[0] == bos != ids[1]
        assert ids.count(bos) == (
            2 if family == "llama2" else 1
        )  # llama2 writes one before each question
    plain_text = Masker(tokenizer).example(Conversation(text="Once upon")).input_ids.tolist()
    assert plain_text == [*tokenizer("Once upon")["input_ids"], tokenizer.eos_token_id]
    assert not opens or plain_text.count(bos) == 1


# --------------------------------------------------------------------------------------- injections

INJECTED = "I-N-J"  # stands for the injected text in what is written by hand
INJECTIONS = {
    "by the user": (f"Say {INJECTED}!", "No.", f"{INJECTED}\nWhy?", "So."),
    "in an answer": ("a", f"It is {INJECTED}.", "b", f"{INJECTED} again"),
}
A_TURN = {
    "<|im_end|>": "<|im_start|>assistant\n",
    "<|eot_id|>": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "</s>": "<s>[INST] ",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", INJECTIONS)
def test_a_text_that_spells_control_tokens_is_rejected_kept_or_text(tokenizers, name, family, mode):
    tokenizer = tokenizers[family]
    eos = tokenizer.eos_token
    for injected in (eos, f"x{eos}\n{A_TURN[eos]}y"):
        texts = [text.replace(INJECTED, injected) for text in INJECTIONS[name]]
        with pytest.raises(RowError, match="a text holds a control token"):
            Masker(tokenizer, mode).example(chat(*texts))

        case = plain(*texts)
        text, spans = render(case, family, tokenizer)
        kept = Masker(tokenizer, mode, control_tokens="keep").example(case.conversation)
        assert agrees(
            kept,
            expected(tokenizer.backend_tokenizer, text, trained_spans(case, mode, text, spans)),
        )

        as_text = Masker(tokenizer, mode, control_tokens="text").example(case.conversation)
        case = plain(*INJECTIONS[name])
        text, spans = render(case, family, tokenizer)
        tokens = expected_as_text(tokenizer, text, trained_spans(case, mode, text, spans), injected)
        assert agrees(as_text, tokens)
        assert len(kept.input_ids) < len(as_text.input_ids)


def expected_as_text(
    tokenizer,
    text: str,
    spans: list[tuple[int, int]],
    injected: str,
    starts: list[int] | None = None,
) -> list[tuple[int, bool]]:
    """Return the tokens as `expected` does, but with the injection put between the control tokens
    of a render without it, and encoded by a tokenizer that knows no control token."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    controls = {
        token.content: n for n, token in tokenizer.added_tokens_decoder.items() if token.special
    }

    def moved(piece: str, position: int) -> int:
        return len(piece[:position].replace(INJECTED, injected))

    tokens, position = [], 0
    for piece in re.split("(" + "|".join(map(re.escape, controls)) + ")", text):
        inside = [(max(a - position, 0), min(b - position, len(piece))) for a, b in spans]
        inside = [(a, b) for a, b in inside if a < b]
        begun = [a for a, _ in inside] if starts is None else [a - position for a in starts]
        begun = [moved(piece, a) for a in begun if 0 < a < len(piece)]
        position += len(piece)
        if piece in controls:
            tokens.append((controls[piece], bool(inside)))
        else:
            inside = [(moved(piece, a), moved(piece, b)) for a, b in inside]
            tokens += expected(backend, piece.replace(INJECTED, injected), inside, begun)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_is_given_the_prompt_that_was_learned(tokenizers, family):
    tokenizer = tokenizers[family]
    question = f"What does {tokenizer.eos_token} do?"
    for policy in ("text", "keep"):
        masker = Masker(tokenizer, "completion", control_tokens=policy)
        example = masker.example(chat(question, "It ends."))
        ids, _ = masker.prompt(chat(question, "It ends."))
        assert example.input_ids[: int(np.flatnonzero(example.trained)[0])].tolist() == ids
        assert ids.count(tokenizer.eos_token_id) - masker.prompt(chat("?", "It ends."))[0].count(
            tokenizer.eos_token_id
        ) == (policy == "keep")


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_texts_follow_the_same_rule(tokenizers, family):
    tokenizer = tokenizers[family]
    eos, bos = tokenizer.eos_token, tokenizer.bos_token or ""
    ids = (
        Masker(tokenizer, control_tokens="text")
        .example(Conversation(text=f"a{eos}b"))
        .input_ids.tolist()
    )
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
    assert tokenizer.decode(ids).count(eos) == 2
    rendered = Conversation(text=f"{bos}a{eos}b{eos}")
    ids = Masker(tokenizer, control_tokens="keep").example(rendered).input_ids.tolist()
    assert ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"], (
        "no second BOS, no second EOS"
    )


def test_what_cannot_be_told_apart_is_refused(tokenizers):
    tokenizer = tokenizers["qwen2_5"]
    tool = {"type": "function", "function": {"name": "add", "description": "Writes <|im_end|>."}}
    for policy in ("text", "keep"):  # a tool's description becomes template text
        with pytest.raises(RowError, match="a text holds a control token"):
            Masker(tokenizer, control_tokens=policy).example(
                Conversation(chat("a", "b").messages, (tool,))
            )
    greedy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    greedy.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    other = PreTrainedTokenizerFast(tokenizer_object=greedy, eos_token="<|end|>")
    other.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    )
    assert Masker(other, control_tokens="text").example(chat("a", "b")).trained.any()
    with pytest.raises(RowError, match="does not take it as text"):
        Masker(other, control_tokens="text").example(chat("a <|end|> ", "b"))


# --------------------------------------------------------------------------------- any conversation

SNIPPETS = [
    "a",
    "Z ",
    "ß",
    "数",
    "🙂",
    "\u0301",
    "\u00a0",
    "\n",
    "\t",
    " ",
    "7",
    "'",
    '"',
    "\\",
    "{",
    "}",
    "<|im_",
    "|>",
    "user",
]
SNIPPETS += ["assistant\n", "[/INST", "zq0001qz", "{{ x }}", "<tool_call>", INJECTED]
snippets = st.lists(
    # without the brackets in which this file's expected renders enclose what is learned
    st.sampled_from(SNIPPETS) | st.characters(exclude_categories=["Cs"], exclude_characters="⟦⟧"),
    min_size=1,
    max_size=8,
)
any_text = snippets.map("".join).filter(lambda text: text.strip().strip("\x1c\x1d\x1e\x1f\x85"))


def text_for(tokenizer: Any) -> st.SearchStrategy[str]:
    """Texts without a control token that came about by accident, as "[/INST" and "]" would make."""
    controls = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return any_text.filter(lambda text: not any(control in text for control in controls))


def asked(family: str, system: str | None, texts: list[str], thought: str | None) -> str:
    """The row as the family writes it, with brackets."""
    opening = {
        "llama3_2": LLAMA3_SYSTEM.replace("<|eot_id|>", (system or "").strip() + "<|eot_id|>"),
        "llama2": f"<s>[INST] <<SYS>>\n{(system or '').strip()}\n<</SYS>>\n\n",
    }.get(family, f"<|im_start|>system\n{system}<|im_end|>\n")
    if family == "qwen3":
        texts = [*texts[:-1], texts[-1].lstrip("\n")]
    tail = written(family, *texts)
    if thought is not None:
        tail = tail.replace(NO_THOUGHT, "<think>\n" + thought.strip("\n") + "\n</think>\n\n")
    if system is None:
        return OPENINGS.get(family, "") + tail
    if family == "llama2":  # it strips the system text and the first question as one
        return opening + texts[0].rstrip() + tail.removeprefix("<s>[INST] " + texts[0].strip())
    return opening + tail


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_of_any_conversation_the_answers_with_their_stop_tokens_are_trained_and_nothing_else(
    tokenizers, data
):
    family = data.draw(st.sampled_from(FAMILIES))
    mode, policy = (
        data.draw(st.sampled_from(MODES)),
        data.draw(st.sampled_from(["reject", "text", "keep"])),
    )
    tokenizer, injected = tokenizers[family], tokenizers[family].eos_token
    a_text = text_for(tokenizer)
    texts = [data.draw(a_text) for _ in range(2 * data.draw(st.integers(1, 3)))]
    weights = [data.draw(st.integers(0, 3)) and 1 for _ in texts[1::2]]
    system = None if family == "mistral_nemo" else data.draw(st.none() | a_text)
    thought = data.draw(st.none() | a_text) if family == "qwen3" else None

    def said(text: str) -> str:
        return text.replace(INJECTED, injected)

    messages = [Message("system", said(system))] if system is not None else []
    for number, text in enumerate(texts):
        weight = weights[number // 2] if number % 2 else 1
        reasoning = said(thought) if thought is not None and number == len(texts) - 1 else None
        role = "assistant" if number % 2 else "user"
        messages.append(Message(role, said(text), weight=weight, reasoning_content=reasoning))
    conversation = Conversation(tuple(messages))

    text, spans = parse(asked(family, system, texts, thought))
    assert said(text) == official(tokenizer, conversation)
    if mode == "all":
        starts = [start for (start, _), weight in zip(spans, weights, strict=True) if not weight]
        edges = [0, *(edge for span in spans if span[0] in starts for edge in span), len(text)]
        wanted = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
    else:
        last = len(spans) - (1 if mode in ("completion", "last_turn") else len(spans))
        wanted = [span for span, weight in zip(spans[last:], weights[last:], strict=True) if weight]
        starts = [start for start, _ in wanted]
    (example,) = Masker(tokenizer, mode, control_tokens=policy).examples([conversation])
    if isinstance(example, RowError):
        reasons = {
            "nothing to train": not wanted,
            "a text holds a control token of the model": policy == "reject" and said(text) != text,
            "a token spans the end of the prompt and the answer": family
            == "llama2",  # which cannot be cut
        }
        assert reasons[str(example)]
        return
    if policy == "text":
        tokens = expected_as_text(tokenizer, text, wanted, injected, starts)
    else:
        assert policy == "keep" or said(text) == text
        places = {
            a: len(said(text[:a]))
            for span in [*wanted, *((start, start) for start in starts)]
            for a in span
        }
        wanted = [(places[a], places[b]) for a, b in wanted]
        tokens = expected(
            tokenizer.backend_tokenizer, said(text), wanted, [places[start] for start in starts]
        )
    assert agrees(example, tokens)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_of_any_tool_call_the_call_is_trained_with_its_stop_token(tokenizers, data):
    family = data.draw(st.sampled_from(["qwen2_5", "qwen3", "llama3_2", "mistral_nemo"]))
    tokenizer = tokenizers[family]
    plain_text = text_for(tokenizer).map(lambda text: text.replace(INJECTED, "-"))
    arguments = data.draw(
        st.dictionaries(st.sampled_from("abc"), plain_text | st.integers() | st.lists(plain_text))
    )
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "add", "arguments": arguments},
    }
    question, answer = data.draw(plain_text), data.draw(plain_text)
    conversation = Conversation(
        (
            Message("user", question),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", '{"sum": "4"}', tool_call_id="call00001"),
            Message("assistant", answer),
        ),
        TOOLS,
    )
    written = json.dumps(arguments, ensure_ascii=False)
    called = {
        "llama3_2": f'{{"name": "add", "parameters": {written}}}<|eot_id|>',
        "mistral_nemo": f'[TOOL_CALLS][{{"name": "add", "arguments": {written}, '
        '"id": "call00001"}]</s>',
    }.get(family, f'<tool_call>\n{{"name": "add", "arguments": {written}}}\n</tool_call><|im_end|>')
    answered = {
        "qwen3": NO_THOUGHT + answer.lstrip("\n") + "<|im_end|>",
        "llama3_2": answer.strip() + "<|eot_id|>",
        "mistral_nemo": answer + "</s>",
    }.get(family, answer + "<|im_end|>")
    example = Masker(tokenizer).example(conversation)
    trained = tokenizer.decode(
        example.input_ids[example.trained].tolist(), clean_up_tokenization_spaces=False
    )
    normal = tokenizer.backend_tokenizer.normalizer
    assert trained == "".join(
        normal.normalize_str(text) if normal else text for text in (called, answered)
    )
