"""Rows as the model will see them: trained, context and special tokens in colours.

Titled Examples (or RowErrors, for rows left out) and their tokenizer enter; a rich renderable for the terminal or one
self-contained HTML page leaves. Nothing is printed or written here.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Group
from rich.text import Text

from trainer.flow import Example, Filtered, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = tuple[str, "Example | RowError"]  # a title such as `train.jsonl:3`, and what became of the row

STYLES = {"trained": "green", "context": "dim", "special": "magenta", "special trained": "bold underline magenta"}
LEGEND = {
    "trained": "trained",
    "context": "context",
    "special": "special token, context",
    "special trained": "special token, trained",
}
CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886; border-radius: 6px; padding: .8rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 .4rem; }}
.context {{ opacity: .6; }}
.trained {{ background: #2e9e4f40; }}
.special {{ color: #a626a4; }}
.special.trained {{ font-weight: bold; text-decoration: underline; }}
.rejected {{ color: #c0392b; }}
</style></head><body>
<h1>{title}</h1>
<p>{legend}</p>
{rows}
</body></html>
"""


class Run(NamedTuple):
    """Neighbouring tokens of one kind (a key of STYLES) and their text."""

    kind: str
    text: str


def runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Run]:
    """The example's tokens, (L,), as runs of one kind, in order."""
    ids = example.input_ids.tolist()
    special_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = np.isin(example.input_ids, list(special_ids | set(tokenizer.all_special_ids)))
    kinds = special * 2 + example.trained
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    names = ("context", "trained", "special", "special trained")
    before = ""
    for start, stop in pairwise(edges):
        # Decoded from the beginning: many decoders drop the space before the first token they are given.
        text = _decoded(tokenizer, ids[:stop])
        piece = text[len(before) :] if text.startswith(before) else _decoded(tokenizer, ids[start:stop])
        before = text
        yield Run(names[kinds[start]], piece)


def counts(example: Example) -> str:
    """How many tokens the example has, and how many are trained."""
    trained, tokens = int(example.trained.sum()), len(example.input_ids)
    return f"{tokens} tokens, {trained} trained ({trained / tokens:.0%})"


def as_text(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Group:
    """The rows for a terminal, below a legend."""
    legend = Text("  ").join(Text(LEGEND[kind], style=style) for kind, style in STYLES.items())
    blocks: list[Text] = [legend]
    for title, result in rows:
        if isinstance(result, RowError):
            blocks.append(Text.assemble("\n", (title, "bold"), "  ", (_left_out(result), "red")))
            continue
        blocks.append(Text.assemble("\n", (title, "bold"), f"  {counts(result)}"))
        blocks.append(Text.assemble(*((_visible(run), STYLES[run.kind]) for run in runs(result, tokenizer))))
    return Group(*blocks)


def as_html(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, title: str = "packhorse preview") -> str:
    """The rows as one page that needs nothing else; every text is escaped."""
    legend = " &middot; ".join(f'<span class="{kind}">{LEGEND[kind]}</span>' for kind in STYLES)
    blocks = [_html_row(name, result, tokenizer) for name, result in rows]
    return PAGE.format(title=html.escape(title), legend=legend, rows="\n".join(blocks))


def _html_row(title: str, result: Example | RowError, tokenizer: PreTrainedTokenizerBase) -> str:
    heading = html.escape(title)
    if isinstance(result, RowError):
        return f'<h2>{heading} <span class="rejected">{html.escape(_left_out(result))}</span></h2>'
    spans = "".join(f'<span class="{run.kind}">{html.escape(_visible(run))}</span>' for run in runs(result, tokenizer))
    return f"<h2>{heading} &middot; {counts(result)}</h2>\n<pre>{spans}</pre>"


def _left_out(reason: RowError) -> str:
    return f"{'filtered' if isinstance(reason, Filtered) else 'rejected'}: {reason}"


def _visible(run: Run) -> str:
    """Control characters as pictures, so that no row steers the terminal; a line end that is learned is shown too."""
    text = run.text.translate(CONTROL_PICTURES)
    return text.replace("\n", "↵\n") if "trained" in run.kind else text


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)
