"""Texts of other programs made fit for our messages: one line, and not too long."""

from __future__ import annotations

import re


def one_line(text: object, cap: int | None = None) -> str:
    """Return the text, or the message of an error, on one line of at most `cap` characters, without
    the passwords of URLs."""
    return hide_passwords(" ".join(str(text).split()))[:cap]


def hide_passwords(text: str) -> str:
    """Return the text with `***` for the user and the password of each URL, which a library names
    whole where a server cannot be reached."""
    return re.sub(r"(?<!abfss://)(?<!abfs://)(?<=://)[^/@\s]+(?=@)", "***", text)


def printable(text: object, cap: int) -> str:
    """Return the text on one line, with `?` for what a log or terminal cannot show.

    That is a control character, or a lone surrogate, as from a file's name.
    """
    return "".join(c if c.isprintable() else "?" for c in one_line(text, cap))


def error_line(error: BaseException, cap: int = 80) -> str:
    """Return the class and the message of an error on one printable line."""
    try:
        message = printable(error, cap)
    except Exception:  # a class of the user's, whose text cannot be made
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


# Unicode's pictures of control characters, without those of a new line and a tab; an escape for the
# controls of Latin-1, for what ends a line, and for what turns the direction of the text around it
_CONTROL_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    127: "␡",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{
        code: f"\\u{code:04x}"
        for code in (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
    },
}


def show_controls(text: str) -> str:
    """Return a text of several lines with a picture or an escape for each control character.

    So no text of a row, a recipe or a model controls the terminal or is read backwards there. A
    lone surrogate, which cannot be written as UTF-8, becomes a question mark.
    """
    return text.encode(errors="replace").decode().translate(_CONTROL_PICTURES)
