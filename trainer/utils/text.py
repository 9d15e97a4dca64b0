"""Texts of other programs made fit for our messages: one line, and not too long."""

from __future__ import annotations


def one_line(text: object, cap: int | None = None) -> str:
    """Return the text, or the message of an error, on one line of at most `cap` characters."""
    return " ".join(str(text).split())[:cap]


def error_line(error: BaseException, cap: int = 80) -> str:
    """Return the class and the message of an error on one line that can be written as UTF-8."""
    # a lone surrogate in the message, as from a file's name, could not be written to a log
    message = one_line(error, cap).encode(errors="replace").decode()
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
