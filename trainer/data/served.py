"""Put an answer behind the prompt that a server sends, where the template shows it otherwise (C14).

A conversation that ends with the answer to train enters; a `Render` of the prompt and the answer
leaves, with the answer's `Turn`. It is used for rows whose own render does not begin the answer
where the generation prompt ends, or leaves its reasoning out.

The prompt is the template's, with the generation prompt. Behind it comes what the template writes
of the answer after the header that both share:

- Where the prompt ends with a closed thought (`<think></think>`) that history does not show, the
  answer follows it. So it does where only white space differs.
- Where the prompt opens a thought (`<think>`), the reasoning follows, from the row's field or from
  the beginning of the answer's own text, then what closes it, then the answer. Many templates write
  reasoning nowhere (DeepSeek-R1's drops it from history), so its end is not theirs: it is the
  marker's counterpart (`</think>`), set off as the prompt sets off the marker.
- Without reasoning there is nothing that a model would write there, and the recipe chooses
  (`data.missing_reasoning`): an empty thought, trained or as context.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from os.path import commonprefix
from typing import NamedTuple

from packhorse.trainer.data.chat_template import Template
from packhorse.trainer.data.skeleton import Place, Render, Skeleton, Turn
from packhorse.trainer.data.turns import explain_beginning, find_last_stop, require_whole
from packhorse.trainer.datatypes import Conversation, Message, RowError

BRACKETED = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")
NAMED = re.compile(r"([<\[])([\w:.-]+[>\]])")  # <think>, but not <|user|> or </think>


class _Opened(NamedTuple):
    """A thought that the generation prompt opens with `marker`, which begins at `start` in it."""

    start: int
    marker: str
    closer: str  # the marker's counterpart
    end: str  # the closer with the white space around it


class _Shown(NamedTuple):
    """An answer as the template renders it last: from literal `first` to `stop` in the last one."""

    render: Render
    first: int
    stop: re.Match[str]


def serve_last(template: Template, conversation: Conversation, missing: str) -> tuple[Render, Turn]:
    """Return the prompt with the conversation's last answer behind it, and the answer's bounds.

    Args:
        missing: what becomes of an answer without reasoning where the prompt opens a thought:
            `reject`, `empty` or `untrained`.

    Raises:
        RowError: the answer cannot be put there, and why.
    """
    *before, answer = conversation.messages
    asked = template.follow(replace(conversation, messages=tuple(before)), prompt=True)
    header = asked.skeleton.literals[-1]
    knows = partial(template.knows, tools=conversation.tools)
    opened = _open_thought(header, knows) or _open_in_words(template, conversation, asked)
    if opened is not None:
        thought, bare = _take_thought(answer, opened)
        shown = _show(template, replace(conversation, messages=(*before, bare)), asked)
        literal = shown.render.skeleton.literals[shown.first]
        # a marker that the template writes before every answer opens no thought
        if not literal.startswith(header) or opened.closer in literal[len(header) :]:
            return _behind_thought(template, asked, shown, opened, thought, missing)
    shown = _show(template, conversation, asked)
    shared = _where_shared_ends(shown.render.skeleton, shown.first, header, answer, knows)
    return _compose(template, asked, shown, shared)


def _behind_thought(
    template: Template, asked: Render, shown: _Shown, opened: _Opened, thought: str, missing: str
) -> tuple[Render, Turn]:
    header = asked.skeleton.literals[-1]
    literal = shown.render.skeleton.literals[shown.first]
    to_marker = opened.start + len(opened.marker)
    shared = next(
        (end for end in (len(header), to_marker, opened.start) if literal.startswith(header[:end])),
        None,
    )
    if shared is None:
        raise RowError("an answer does not begin where the generation prompt ends")
    if not thought and missing == "reject":
        raise RowError(
            f"the generation prompt opens a thought with {header[opened.start :]!r}, and the "
            f"answer has no reasoning; data.missing_reasoning: empty trains the model to close the "
            f"thought at once, untrained puts the closed thought before the answer as context"
        )
    end = re.compile(re.escape(opened.closer) + r"\s*")
    closes = end.search(literal, shared)
    glue = "" if closes else opened.end
    if closes and thought and closes.start() == shared:  # an empty thought's end, set off as usual
        glue = opened.end[: opened.end.index(opened.closer)]
    if opened.closer in thought:  # the answer's own text, which brings the end along
        glue, shared = "", closes.end() if closes else shared
    skipped = 0
    if not thought and missing == "untrained":
        first_end = end.search(glue + literal[shared:])
        assert first_end is not None
        skipped = first_end.end()
    return _compose(template, asked, shown, shared, thought, glue, skipped)


def _compose(
    template: Template,
    asked: Render,
    shown: _Shown,
    shared: int,
    thought: str = "",
    glue: str = "",
    skipped: int = 0,
) -> tuple[Render, Turn]:
    """Join the prompt, a thought, the text that ends it, and the answer.

    Args:
        shared: length of the part of the answer's first literal that the prompt has already.
        skipped: characters after the prompt that are context, too.
    """
    prompt, full, first = asked.skeleton, shown.render.skeleton, shown.first
    begin = shown.render.position(Place(first, shared))
    end = shown.render.position(Place(len(full.slots), shown.stop.end()))
    lead = glue + full.literals[first][shared:]
    openings = [prompt.literals[-1], lead] if thought else [prompt.literals[-1] + lead]
    after = [*full.literals[first + 1 : -1], full.literals[-1][: shown.stop.end()]]
    literals = [*prompt.literals[:-1], *openings, *after]
    glued = len(asked.text) + len(thought)  # where the text that ends the thought begins
    starts = [*asked.starts, *([glued] if thought else [])]
    starts += [start - begin + glued + len(glue) for start in shown.render.starts[first + 1 :]]
    controls = [
        (Place(number, match.start()), template.control_ids[match[0]])
        for number, text in enumerate(literals)
        for match in template.find_controls(text)
    ]
    places = [place for place, _ in controls]
    skeleton = replace(
        full,
        literals=literals,
        slots=[*prompt.slots, *full.slots[first : first + bool(thought)], *full.slots[first:]],
        controls=places,
        control_ids=[number for _, number in controls],
        marks=[],
        turns={},
    )
    text = asked.text + thought + glue + shown.render.text[begin:end]
    start = Place(len(prompt.slots), len(prompt.literals[-1]) + skipped)
    number = places.index(Place(len(literals) - 1, shown.stop.start()))
    turn = Turn(start, sum(place < start for place in places) - 1, number, newline=False)
    return Render(text, skeleton, starts), turn


def _show(template: Template, conversation: Conversation, asked: Render) -> _Shown:
    """Render a conversation and find its last answer, which must follow the prompt's last text."""
    render = template.follow(conversation)
    skeleton, message = render.skeleton, len(conversation.messages) - 1
    require_whole(skeleton, message)
    owners = [skeleton.owners[slot][0] for slot in skeleton.slots]
    if message not in owners:
        raise RowError("no answer")
    first = owners.index(message)
    last_asked = [asked.skeleton.owners[slot] for slot in asked.skeleton.slots[-1:]]
    before = [skeleton.owners[slot] for slot in skeleton.slots[:first][-1:]]
    if set(owners[first:]) != {message} or before != last_asked:
        raise RowError("the template writes an answer out of its place")
    return _Shown(render, first, find_last_stop(template, skeleton))


def _where_shared_ends(
    skeleton: Skeleton, first: int, header: str, answer: Message, knows: Callable[[str], bool]
) -> int:
    """Return where in literal number `first` the answer begins that a server's prompt, which ends
    with `header`, asks for.

    Raises:
        RowError: the prompt ends with more than a closed thought or white space.
    """
    literal = skeleton.literals[first]
    shared = len(commonprefix([header, literal]))  # noqa: RUF071 - of characters, as is meant
    for match in BRACKETED.finditer(header):
        if match.start() < shared < match.end():
            shared = match.start()
    more, lead = header[shared:], literal[shared:]
    if not more:
        return shared
    markers = BRACKETED.findall(more)
    if _open_thought(header[:shared], knows) or answer.content.lstrip().startswith(tuple(markers)):
        raise RowError(
            f"the generation prompt closes the thought, with {more!r}, before an answer with "
            f"reasoning; set data.chat_template_kwargs so that it does not, or leave the reasoning "
            f"out (data.ignore_columns)"
        )
    if not (more + lead).strip() or (lead and more.endswith(lead)):
        return len(literal)
    if more.strip() and len(markers) < 2:
        message = skeleton.owners[skeleton.slots[first]][0]
        last_text = skeleton.slots[first - 1] if first else None
        raise RowError(explain_beginning(skeleton, message, last_text, header))
    return shared


def _open_thought(header: str, knows: Callable[[str], bool]) -> _Opened | None:
    """Find the marker that a prompt ends with, as `<think>`, if its counterpart is known."""
    matches: Sequence[re.Match[str]] = list(BRACKETED.finditer(header))
    if not matches or header[matches[-1].end() :].strip():
        return None
    marker = matches[-1][0]
    named = NAMED.fullmatch(marker)
    candidates = [marker.replace("START", "END"), marker.replace("BEGIN", "END")]
    candidates += [f"{named[1]}/{named[2]}"] if named else []
    closer = next((one for one in candidates if one != marker and knows(one)), None)
    if closer is None:
        return None
    blank = "\n" if matches[-1].end() < len(header) else ""
    return _Opened(matches[-1].start(), marker, closer, f"{blank}{closer}{blank * 2}")


def _open_in_words(template: Template, conversation: Conversation, asked: Render) -> _Opened | None:
    """Find words that a prompt ends with and that the template does not write before reasoning, as
    Apriel's "Here are my reasoning steps:"; what closes the thought is what it writes after it."""
    header = asked.skeleton.literals[-1]
    if not header.rstrip() or header.rstrip()[-1] in ">])}":
        return None
    *before, answer = conversation.messages
    tried = replace(answer, content="x", reasoning_content="y", tool_calls=())
    try:
        shown = _show(template, replace(conversation, messages=(*before, tried)), asked)
    except RowError:  # it writes no reasoning
        return None
    skeleton, first = shown.render.skeleton, shown.first
    literal, end = skeleton.literals[first : first + 2]
    is_reasoning = skeleton.owners[skeleton.slots[first]][1] == "reasoning_content"
    words = header[len(literal) :].strip()
    if not (is_reasoning and words and end.strip() and header.startswith(literal)):
        return None
    return _Opened(header.index(words, len(literal)), words, end.strip(), end)


def _take_thought(answer: Message, opened: _Opened) -> tuple[str, Message]:
    """Return an answer's reasoning and the answer without it.

    Reasoning at the beginning of the answer's text keeps what closes it there.
    """
    reasoning = (answer.reasoning_content or "").strip()
    inline = re.fullmatch(
        rf"\s*{re.escape(opened.marker)}\s*(.*?{re.escape(opened.closer)}\s*)(.*)",
        answer.content,
        re.DOTALL,
    )
    if inline is None or reasoning:
        return reasoning, replace(answer, reasoning_content=None)
    thought, content = inline.groups()
    if not content and answer.tool_calls:  # its end stands where the calls begin
        thought = thought.rstrip().removesuffix(opened.closer).rstrip()
    return thought, replace(answer, content=content)
