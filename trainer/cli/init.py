"""Define `packhorse init`: a commented recipe for a model and data, after looking at both."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packhorse.trainer.datatypes import BadInput, RowError

if TYPE_CHECKING:
    from packhorse.trainer.config.data import Source
    from packhorse.trainer.data.rows import RowReader

_SAMPLE = 2000  # rows that are looked at
_DEFAULT_LENGTH = 4096  # where no tokenizer can measure
_SHORTEST, _LONGEST = 512, 32768
_FEW_ROWS = 20  # with fewer, nothing is held out


def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a hub name.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A file or folder of rows, or a hub dataset.")
    ],
    out: Annotated[Path, typer.Option(help="File to write; it must not exist.")] = Path(
        "recipe.yaml"
    ),
) -> None:
    """Write a commented recipe for a model and data, after looking at the rows.

    [bold]packhorse init Qwen/Qwen3-8B data/train.jsonl[/bold]
    [bold]packhorse init models/mine org/dataset --out mine.yaml[/bold]

    The format follows from the columns, and the sequence length from the lengths of the first rows
    if MODEL is a folder with its tokenizer. Nothing is overwritten.
    """
    if os.path.lexists(out):
        raise BadInput(f"--out {out}: exists; give another file, or move it away")
    from itertools import islice

    import yaml

    from packhorse.trainer.config.data import Source
    from packhorse.trainer.config.recipe import parse_recipe
    from packhorse.trainer.data.rows import RowReader
    from packhorse.trainer.data.source import count_rows, read_rows
    from packhorse.trainer.utils.files import write_synced

    key = "path" if Path(data).expanduser().exists() or Path(data).suffix else "name"
    source = Source(path=data) if key == "path" else Source(name=data)
    reader = RowReader.of(source)
    rows = [row.fields for row in islice(read_rows(source), _SAMPLE)]
    total = len(rows) if len(rows) < _SAMPLE else count_rows(source) if key == "path" else None
    lengths = _lengths(model, reader, rows) if Path(model).expanduser().is_dir() else []
    text = _recipe_text(model, source, reader, rows, total, lengths)
    parse_recipe(yaml.safe_load(text), where=str(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_synced(out, text)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error})") from None
    print(out)
    print(f"look at what is trained: packhorse preview {shlex.quote(str(out))}")


def _lengths(model: str, reader: RowReader, rows: list[Any]) -> list[int]:
    """Return the tokens of each row that can be used.

    Raises:
        BadInput: the tokenizer cannot be used, or no row can.
    """
    from packhorse.trainer.config.data import DataSection
    from packhorse.trainer.config.sections import ModelSection
    from packhorse.trainer.data.prepare import masker_of
    from packhorse.trainer.model.load import load_tokenizer

    masker = masker_of(
        DataSection(train=(reader.source,)), load_tokenizer(ModelSection(name=model))
    )
    conversations, faults = [], []
    for fields in rows:
        try:
            conversations.append(reader.conversation(fields))
        except RowError as error:
            faults.append(str(error))
    examples = masker.examples(conversations)
    faults += [str(example) for example in examples if isinstance(example, RowError)]
    lengths = [len(example.input_ids) for example in examples if not isinstance(example, RowError)]
    if not lengths:
        raise BadInput(
            f"{reader.source.path or reader.source.name}: no row can be used: {faults[0]}"
        )
    return lengths


def _recipe_text(
    model: str,
    source: Source,
    reader: RowReader,
    rows: list[Any],
    total: int | None,
    lengths: list[int],
) -> str:
    columns = next(fields for fields in rows if isinstance(fields, dict))
    counted = "of unknown number" if total is None else f"{total:,}"
    key, place = ("path", source.path) if source.path else ("name", source.name)
    seq_len, why = _DEFAULT_LENGTH, "the model is no folder here, so no row was measured"
    if lengths:
        power = 1 << (max(lengths) - 1).bit_length()  # the smallest that holds the longest row
        seq_len = min(max(power, _SHORTEST), _LONGEST)
        why = f"the longest of the first {len(lengths):,} rows has {max(lengths):,} tokens"
    if total is not None and total < _FEW_ROWS:
        held_out = "  # eval_fraction: 0.1          # too few rows to hold some out"
    else:
        share = 0.02 if total is None or total >= 1000 else 0.1
        held_out = f"  eval_fraction: {share}            # held out by a hash of the row"
    name = Path(model).name or "model"
    batch_size = _batch_size(total, lengths, seq_len)
    return f"""\
# Written by packhorse init. docs/recipe.md has every key; what is not here has a default.
model: {{name: {_quoted(model)}}}
# adapter: {{rank: 16, alpha: 32}}  # LoRA: trains small matrices beside the model
data:
  # rows: {counted}; columns: {", ".join(_quoted(str(name)) for name in columns)}
  train: [{{{key}: {_quoted(place)}, format: {reader.format}}}]
{held_out}
  train_on: assistant             # tokens with a loss: all, completion, assistant, last_turn
batch:
  seq_len: {seq_len}                   # of a packed sequence; {why}
  global_batch_size: {batch_size}           # packed sequences of a step, over all GPUs
optim: {{lr: 2.0e-5}}               # 1e-4 is usual with an adapter
train: {{epochs: 1}}
parallel: {{deepspeed: zero3}}      # `packhorse plan` recommends one
checkpoint: {{every_steps: 200}}
run: {{dir: {_quoted(f"runs/{name}")}}}
"""


def _quoted(text: str | None) -> str:
    """Return a text in YAML's double quotes, where JSON's pair of escapes for 😀 is no 😀."""
    import yaml

    return yaml.safe_dump(text, default_style='"', width=float("inf")).strip()


def _batch_size(total: int | None, lengths: list[int], seq_len: int) -> int:
    """Return 64, or a smaller power of two with which an epoch has ten steps."""
    if total is None or not lengths:
        return 64
    sequences = total * sum(lengths) / len(lengths) / seq_len
    return max([n for n in (1, 2, 4, 8, 16, 32, 64) if 10 * n <= sequences], default=1)
