"""Show rows as the model sees them: trained, context and special tokens in colours, and each
message's role.

Titled Examples (or RowErrors, for rows left out) and their tokenizer enter; a rich renderable for
the terminal or one self-contained HTML page leaves. Nothing is printed or written here.
"""

from __future__ import annotations

import html
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Group
from rich.text import Text

from packhorse.trainer.data.served import serve_last
from packhorse.trainer.data.turns import find_turn
from packhorse.trainer.datatypes import Conversation, Example, Filtered, RowError
from packhorse.trainer.utils.text import show_controls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from packhorse.trainer.data.mask import Masker
    from packhorse.trainer.data.skeleton import Render, Turn


@dataclass(frozen=True)
class ShownRow:
    """The result of a row, under a title such as `train.jsonl:3`.

    `roles` holds the messages' roles, by the index of the token with which each one's text begins.
    """

    title: str
    result: Example | RowError
    roles: Mapping[int, str] = field(default_factory=dict)


STYLES = {
    "trained": "green",
    "context": "dim",
    "special": "magenta",
    "special trained": "bold underline magenta",
}
ROLE_STYLE = "black on cyan"
BRACKETS = ("⟦", "⟧")
CONTEXT_TOKENS = 16  # that are decoded before a span; all of them would take hours for long rows
LEGEND = {
    "trained": "trained",
    "context": "context",
    "special": "special token, context",
    "special trained": "special token, trained",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>packhorse preview</title>
<style>
:root {{ color-scheme: light dark; }}
body {{
  font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
}}
pre {{
  white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886; border-radius: 6px;
  padding: .8rem;
}}
h2 {{ font-size: 1rem; margin: 2rem 0 .4rem; }}
.context {{ opacity: .6; }}
.trained {{ background: #2e9e4f40; }}
.special {{ color: #a626a4; }}
.special.trained {{ font-weight: bold; text-decoration: underline; }}
.rejected {{ color: #c0392b; }}
.role {{
  font: 600 .75rem system-ui, sans-serif; background: #8883; border-radius: 4px; padding: 0 .4em;
}}
</style></head><body>
<h1>packhorse preview</h1>
<p>{legend}</p>
{rows}
</body></html>
"""


class Span(NamedTuple):
    """The text of neighbouring tokens of one kind, a key of STYLES; `role`, if a message begins
    with them."""

    kind: str
    text: str
    role: str | None = None


def role_starts(conversation: Conversation, example: Example, masker: Masker) -> dict[int, str]:
    """Return the messages' roles by the index of the token with which each message's text, or its
    call, begins.

    The result is empty for a plain text, and for a row whose tokens were changed by the tokenizer's
    normalizer and made from several pieces of its text.
    """
    for render, answer in _renders(conversation, masker):
        token_at = _find_tokens(render, answer, example, masker.tokenizer)
        if token_at is None:
            continue
        found: dict[int, str] = {}
        seen = {-1}  # the tools that the row offers
        for number, slot in enumerate(render.skeleton.slots):
            message, part = render.skeleton.owners[slot]
            if message not in seen:
                seen.add(message)
                begins = render.starts[number] + len(render.skeleton.literals[number])
                if part == "tool_calls":  # its first text, a function's name, stands inside it
                    turn = answer or find_turn(masker.template, render.skeleton, message)
                    begins = render.position(turn.start)
                found[token_at(begins)] = conversation.messages[message].role
        return found
    return {}


def _find_tokens(
    render: Render, answer: Turn | None, example: Example, tokenizer: Any
) -> Callable[[int], int] | None:
    """Return what finds the token that holds a character; nothing, if they are not the example's.

    The text may have been tokenized whole; up to the answer, and the answer; or in several pieces,
    as where control tokens are taken as text: then the tokens spell it.
    """
    ids = example.input_ids.tolist()
    for cut in (0, render.position(answer.start)) if answer else (0,):
        before, after = (
            tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            for text in (render.text[:cut], render.text[cut:])
        )
        if [*before.ids, *after.ids] == ids:
            ends = [stop for _, stop in before.offsets] + [cut + s for _, s in after.offsets]
            return partial(bisect_right, ends)
    if _decode(tokenizer, ids) != render.text:
        return None
    return partial(
        bisect_right, range(len(ids)), key=lambda n: len(_decode(tokenizer, ids[: n + 1]))
    )


def _renders(conversation: Conversation, masker: Masker) -> Iterator[tuple[Render, Turn | None]]:
    """Yield what a document's text may be: the template's, or a server's prompt and the answer."""
    if conversation.text is None:
        with suppress(RowError):  # the template leaves out what the answer was trained with
            yield masker.template.follow(conversation), None
        with suppress(RowError):
            yield serve_last(masker.template, conversation, masker.missing_reasoning)


def spans(
    example: Example, tokenizer: PreTrainedTokenizerBase, roles: Mapping[int, str] | None = None
) -> Iterator[Span]:
    """Yield the example's tokens, (L,), as spans of one kind, in order; each role begins a span."""
    roles = roles or {}
    ids = example.input_ids.tolist()
    special_ids = {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    special = np.isin(example.input_ids, list(special_ids | set(tokenizer.all_special_ids)))
    kinds = special * 2 + example.trained
    edges = sorted({0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), *roles, len(ids)})
    names = ("context", "trained", "special", "special trained")
    for start, stop in pairwise(edges):
        # with some tokens before it, as many decoders drop the space before their first token
        near = max(0, start - CONTEXT_TOKENS)
        before, text = (_decode(tokenizer, ids[near:end]) for end in (start, stop))
        is_continued = text.startswith(before)
        piece = text[len(before) :] if is_continued else _decode(tokenizer, ids[start:stop])
        yield Span(names[kinds[start]], piece, roles.get(start))


def counts(example: Example) -> str:
    """Return a text with the numbers of tokens and of trained tokens, and what is not read."""
    trained, tokens = int(example.trained.sum()), len(example.input_ids)
    unread = f"; not read: {', '.join(example.unread)}" if example.unread else ""
    return f"{tokens} tokens, {trained} trained ({trained / tokens:.0%}){unread}"


def as_text(
    rows: Sequence[ShownRow], tokenizer: PreTrainedTokenizerBase, *, brackets: bool
) -> Group:
    """Return the rows for a terminal, below a legend.

    Args:
        brackets: put what is trained into brackets, where no colour shows it.
    """
    legend = Text("  ").join(Text(LEGEND[kind], style=style) for kind, style in STYLES.items())
    legend.append("  ").append(" role ", ROLE_STYLE).append(" of the message that begins")
    if brackets:
        legend.append(f"  {BRACKETS[0]}trained{BRACKETS[1]}")
    blocks: list[Text] = [legend]
    for row in rows:
        if isinstance(row.result, RowError):
            reason = (_describe_reject(row.result), "red")
            blocks.append(Text.assemble("\n", (row.title, "bold"), "  ", reason))
            continue
        blocks.append(Text.assemble("\n", (row.title, "bold"), f"  {counts(row.result)}"))
        shown = Text()
        is_trained = False
        for span in spans(row.result, tokenizer, row.roles):
            if brackets and is_trained != ("trained" in span.kind):
                shown.append(BRACKETS[is_trained])
                is_trained = not is_trained
            if span.role:
                shown.append(f" {span.role} ", ROLE_STYLE)
            shown.append(_visible(span), STYLES[span.kind])
        blocks.append(shown.append(BRACKETS[1] if is_trained else ""))
    return Group(*blocks)


def as_html(rows: Sequence[ShownRow], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the rows as one HTML page that loads nothing; every text is escaped."""
    legend = " &middot; ".join(f'<span class="{kind}">{LEGEND[kind]}</span>' for kind in STYLES)
    legend += ' &middot; <b class="role">role</b> of the message that begins'
    blocks = [_html_row(row, tokenizer) for row in rows]
    return PAGE.format(legend=legend, rows="\n".join(blocks))


def _html_row(row: ShownRow, tokenizer: PreTrainedTokenizerBase) -> str:
    heading = html.escape(row.title)
    if isinstance(row.result, RowError):
        reason = html.escape(_describe_reject(row.result))
        return f'<h2>{heading} <span class="rejected">{reason}</span></h2>'
    marked = "".join(
        (f'<b class="role">{html.escape(span.role)}</b>' if span.role else "")
        + f'<span class="{span.kind}">{html.escape(_visible(span))}</span>'
        for span in spans(row.result, tokenizer, row.roles)
    )
    return f"<h2>{heading} &middot; {html.escape(counts(row.result))}</h2>\n<pre>{marked}</pre>"


def _describe_reject(reason: RowError) -> str:
    return f"{'filtered' if isinstance(reason, Filtered) else 'rejected'}: {reason}"


def _visible(span: Span) -> str:
    """Return the text with pictures for control characters, so that no row controls the terminal,
    and for line ends that are trained."""
    text = show_controls(span.text)
    return text.replace("\n", "↵\n") if "trained" in span.kind else text


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)
