"""What the preview shows: every token in its kind's colour, and no markup or control character of
a row's own."""

import html
import io
import re

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from packhorse.trainer.data.mask import Masker
from packhorse.trainer.data.preview import (
    ShownRow,
    Span,
    as_html,
    as_text,
    counts,
    role_starts,
    spans,
)
from packhorse.trainer.datatypes import Conversation, Example, Filtered, Message, RowError

HOSTILE = "<script>alert('x')</script> & \x1b[2J größe"
ROW = Conversation((Message("user", HOSTILE), Message("assistant", "line one\nline 数")))


@pytest.fixture(scope="module", params=["smollm2", "llama2", "qwen3"])
def shown(request, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / request.param)
    return tokenizer, Masker(tokenizer).example(ROW)


def test_runs_are_the_whole_row_in_order(shown):
    tokenizer, example = shown
    found = list(spans(example, tokenizer))
    whole = tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=False)
    assert "".join(span.text for span in found) == whole
    learned = "".join(span.text for span in found if "trained" in span.kind)
    assert learned.strip().endswith(
        "line one\nline 数"
        + ("" if "llama" not in tokenizer.name_or_path else " ")
        + tokenizer.eos_token
    )
    assert found[-1 if found[-1].kind == "special trained" else -2] == Span(
        "special trained", tokenizer.eos_token
    )
    assert {span.text for span in found if span.kind == "special"} <= set(
        tokenizer.all_special_tokens
    )


def test_counts(shown):
    _, example = shown
    assert (
        counts(Example(np.arange(4), np.array([False, False, True, True])))
        == "4 tokens, 2 trained (50%)"
    )
    assert counts(example).startswith(
        f"{len(example.input_ids)} tokens, {example.trained.sum()} trained"
    )


def test_the_terminal_shows_colours_counts_and_reasons(shown):
    tokenizer, example = shown
    console = Console(
        width=200, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO()
    )
    left_out = [
        ShownRow("a.jsonl:2", RowError("no answer")),
        ShownRow("a.jsonl:3", Filtered("too short")),
    ]
    console.print(as_text([ShownRow("a.jsonl:1", example), *left_out], tokenizer, brackets=False))
    plain = console.export_text(clear=False)
    assert counts(example) in plain
    assert "a.jsonl:2  rejected: no answer" in plain
    assert "a.jsonl:3  filtered: too short" in plain
    assert "line one↵" in plain
    styled = console.export_text(styles=True)
    assert all(code in styled for code in ("\x1b[32m", "\x1b[2m", "\x1b[1;4;35m"))
    assert "\x1b[2J" not in styled  # a row cannot clear the screen
    assert "␛[2J" in plain


def test_the_page_holds_the_text_escaped_and_asks_for_nothing(shown):
    tokenizer, example = shown
    page = as_html(
        [ShownRow("a<b>.jsonl:1", example), ShownRow("a.jsonl:2", RowError("unknown role '<b>'"))],
        tokenizer,
    )
    assert "<script" not in page
    assert not re.search(r"(src|href)=|@import|url\(", page)
    body = html.unescape(
        "".join(
            re.findall(r'<span class="[a-z ]+">(.*?)</span>', page.split("<pre>")[1], re.DOTALL)
        )
    )
    assert HOSTILE.replace("\x1b", "␛") in body
    assert all(
        f'class="{kind}"' in page.split("<pre>")[1]
        for kind in ("context", "trained", "special trained")
    )
    assert "a&lt;b&gt;.jsonl:1" in page
    assert "rejected: unknown role &#x27;&lt;b&gt;&#x27;" in page


# -------------------------------------------------------------------------------------------- roles


CALLING = Conversation(
    (
        Message("user", "2+2?"),
        Message(
            "assistant",
            "",
            tool_calls=(
                {"id": "a23456789", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}},
            ),
        ),
    ),
    tools=(
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Add.",
                "parameters": {"type": "object", "properties": {}},
            },
        },
    ),
)
TURNS = Conversation(
    (
        Message("user", "What is it?"),
        Message("assistant", "It is 数."),
        Message("user", " What is it?"),
        Message("assistant", "The same."),
    )
)


@pytest.mark.parametrize(
    "name", ["smollm2", "llama2", "qwen3", "qwen2_5", "llama3_2", "mistral_nemo"]
)
def test_each_message_is_named_where_its_text_begins(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    masker = Masker(tokenizer)
    example = masker.example(TURNS)
    roles = role_starts(TURNS, example, masker)
    assert list(roles.values()) == ["user", "assistant", "user", "assistant"]
    begun = [span for span in spans(example, tokenizer, roles) if span.role]
    assert [span.text.strip().split("<")[0][:4] for span in begun] == [
        "What",
        "It i",
        "What",
        "The ",
    ]
    assert ["trained" in span.kind for span in begun] == [False, True, False, True]
    whole = "".join(span.text for span in spans(example, tokenizer))
    assert "".join(span.text for span in spans(example, tokenizer, roles)) == whole


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "qwen2_5", "llama3_2"])
def test_each_message_is_named_where_control_tokens_are_text(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    masker = Masker(tokenizer, control_tokens="text")
    spelt = f"What is {tokenizer.eos_token}? 数"
    row = Conversation(
        (
            Message("user", spelt),
            Message("assistant", spelt),
            Message("user", " W"),
            TURNS.messages[3],
        )
    )
    example = masker.example(row)
    assert example.input_ids.tolist() != tokenizer.encode(
        tokenizer.decode(example.input_ids), add_special_tokens=False
    ), "the row was tokenized in pieces"
    roles = role_starts(row, example, masker)
    assert list(roles.values()) == ["user", "assistant", "user", "assistant"]
    begun = [span for span in spans(example, tokenizer, roles) if span.role]
    assert [span.text.strip()[:1] for span in begun] == ["W", "W", "W", "T"]
    assert ["trained" in span.kind for span in begun] == [False, True, False, True]


def test_without_colours_what_is_trained_stands_in_brackets(shown):
    tokenizer, example = shown
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(as_text([ShownRow("a.jsonl:1", example)], tokenizer, brackets=True))
    text = console.export_text().split("a.jsonl:1")[1].replace("↵\n", "\n")
    bracketed = re.findall(r"⟦(.*?)⟧", text, re.DOTALL)
    found = [span for span in spans(example, tokenizer) if "trained" in span.kind]
    assert "".join(bracketed) == "".join(span.text for span in found)
    assert len(bracketed) == 1


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "mistral_nemo", "llama3_2"])
def test_a_call_is_named_where_it_begins_and_not_inside_it(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    masker = Masker(tokenizer)
    example = masker.example(CALLING)
    roles = role_starts(CALLING, example, masker)
    begun = next(span for span in spans(example, tokenizer, roles) if span.role == "assistant")
    assert begun.kind.endswith("trained")
    trained = [span.text for span in spans(example, tokenizer) if "trained" in span.kind]
    assert trained[0].startswith(begun.text[:5])


def test_a_plain_text_has_no_roles(shared):
    masker = Masker(AutoTokenizer.from_pretrained(shared / "tokenizers/smollm2"))
    text = Conversation(text="To be or not to be")
    assert role_starts(text, masker.example(text), masker) == {}


def test_roles_stand_in_the_terminal_and_on_the_page(shared):
    tokenizer = AutoTokenizer.from_pretrained(
        shared / "tokenizers/llama2"
    )  # whose text names no role
    masker = Masker(tokenizer)
    example = masker.example(TURNS)
    row = ShownRow("a.jsonl:1", example, role_starts(TURNS, example, masker))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(as_text([row], tokenizer, brackets=False))
    shown = console.export_text().split("a.jsonl:1")[1]
    assert (shown.count(" user "), shown.count(" assistant ")) == (2, 2)
    assert (
        shown.index(" user ")
        < shown.index("What is it?")
        < shown.index(" assistant ")
        < shown.index("It is")
    )
    page = as_html([row], tokenizer).split("<pre>")[1]
    assert re.findall(r'<b class="role">(\w+)</b>', page) == [
        "user",
        "assistant",
        "user",
        "assistant",
    ]
