"""A stand-in for a judge: it replies to each question by a function of the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.stand_in_server import StandIn, chat_reply


class JudgeServer(StandIn):
    """A server that answers each question with `reply(question)`."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        super().__init__(
            lambda request: (200, chat_reply(reply(request.body["messages"][-1]["content"])))
        )

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of the requests until now."""
        return [request.body for request in self.requests]


def part(text: str, name: str) -> str:
    """Return the text under one of the question's marks."""
    mark = next(line for line in text.splitlines() if line.startswith("====")).split(" ")[0]
    return text.split(f"{mark} {name}\n")[1].split(f"\n{mark} ")[0]
