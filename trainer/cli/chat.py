"""Define `packhorse chat`: ask a run's checkpoint, an export or a hub model."""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packhorse.trainer.cli.arguments import Best, Step, TrustRun, read_recipe
from packhorse.trainer.cli.eval import chosen_step, exported_model, find_run
from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.text import show_controls

if TYPE_CHECKING:
    from packhorse.trainer.eval.chat import Chat, Message


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN", help="A model or adapter folder, a hub name or a run folder."
        ),
    ],
    best: Best = False,
    step: Step = None,
    system: Annotated[
        str | None, typer.Option(help="A system message before the first question.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: the likeliest answer; above it, answers are sampled.")
    ] = 0,
    trust_run: TrustRun = False,
) -> None:
    """Chat with a model in the terminal, or answer the questions of a pipe.

    [bold]packhorse chat runs/quickstart --best[/bold]
    [bold]packhorse chat HuggingFaceTB/SmolLM2-135M-Instruct --temperature 0.7[/bold]
    [bold]packhorse chat models/lora[/bold]
    [bold]packhorse chat models/word-problems < questions.txt > answers.txt[/bold]

    A run's checkpoint is exported to a temporary folder (TMPDIR) and loaded from there. Ctrl-C ends
    an answer, Ctrl-D the chat. From a pipe each line is a question of its own, without the lines
    before it.
    """
    from packhorse.trainer import dist
    from packhorse.trainer.config.code_keys import require_trust
    from packhorse.trainer.eval.chat import Chat, is_adapter

    dist.start_logging()
    if sys.stdin is None or sys.stdout is None:
        raise BadInput("chat: it reads stdin and writes stdout, of which one is closed; open both")
    _require_text(system or "", "--system")
    run = None if is_adapter(model) else find_run(model, step, best)
    if run:
        require_trust(run, trusted=trust_run)
    chosen = chosen_step(run, step, best) if run else 0
    options = read_recipe(run / "recipe.yaml", None).data.chat_template_kwargs if run else {}
    with (
        tempfile.TemporaryDirectory(prefix="packhorse-chat-") as folder,
        exported_model(model, run, chosen, Path(folder)) as name,
    ):
        loaded = Chat(name, options, max_tokens=max_tokens, temperature=temperature)
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    if sys.stdin.isatty():
        print("Ctrl-C ends an answer, Ctrl-D the chat.", file=sys.stderr)
        _talk(loaded, first)
    else:
        for number, line in enumerate(sys.stdin.buffer, 1):
            question = line.decode(errors="surrogateescape").strip()
            _require_text(question, f"line {number} of stdin")
            if question:
                _answer(loaded, [*first, {"role": "user", "content": question}])


def _require_text(text: str, what: str) -> None:
    """Raise BadInput if a text was read from other bytes than UTF-8's, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"chat: {what} is no text in UTF-8") from None


def _talk(loaded: Chat, messages: list[Message]) -> None:
    """Ask for questions until Ctrl-D; each answer knows what was said before."""
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` edits lines and keeps a history with it
    while True:
        try:
            question = input("\n> ").strip()
            _require_text(question, "the question")
        except (BadInput, UnicodeDecodeError) as error:
            print(error, file=sys.stderr)
            continue
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D ends the chat.", file=sys.stderr)
            continue
        if not question:
            continue
        asked = [*messages, {"role": "user", "content": question}]
        try:
            answer = _answer(loaded, asked)
        except BadInput as error:  # its positions are used up, and the user may copy what was said
            print(f"{show_controls(str(error))}; start a new chat", file=sys.stderr)
            return
        messages = [*asked, {"role": "assistant", "content": answer}]


def _answer(loaded: Chat, messages: list[Message]) -> str:
    """Write an answer to stdout as it is generated, and return it, or as much as Ctrl-C left."""
    on_terminal = sys.stdout.isatty()
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        print(show_controls(piece) if on_terminal else piece, end="", flush=True)

    try:
        loaded.answer(messages, show)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():  # Ctrl-C ends a pipe as a whole
            raise
    print(flush=True)
    return "".join(shown)
