"""An OpenAI-compatible server: conversations in, asked in parallel; answers out, in order.

By httpx2, which huggingface_hub brings along. Three JSON requests are asked for here, so that the
`openai` package would be larger than this file, and reads an organisation, headers and an address
of its own from the environment.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import httpx2

from trainer.config.eval import Endpoint, Server
from trainer.utils.text import one_line

_CONNECT_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0  # between tries: doubled each time
_LONGEST_RETRY_AFTER_S = 60.0  # what a server may ask for
_LOOK_S = 0.2  # between looks at whether to stop
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # another try may find it otherwise
_NOT_THERE = {401, 403, 502, 503, 504}  # closed to us, or nothing behind it
_SHOWN = 200  # characters of a server's own words


class Unreachable(Exception):
    """The server is down or refuses. The message is one sentence that names its url and says what
    to do.
    """


class Refused(Unreachable):
    """It answered, with the status of an error that stays."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Cancelled(Exception):
    """The caller asked to stop while answers were waited for."""


def complete(
    endpoint: Endpoint,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> list[str]:
    """The endpoint's answers to conversations, each a list of messages as {role, content}, in their
    order.

    Raises:
        Unreachable: it is down or refuses, still after `patience_s`.
        Cancelled: `stopping`, which is asked now and then, said yes.
    """
    settings = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "stop": list(stop) or None,
    }
    bodies = [
        {"model": endpoint.model, "messages": list(messages), **settings}
        for messages in conversations
    ]
    with Client(endpoint, stopping) as client:
        return [text_of(reply) for reply in client.post("chat/completions", bodies)]


def text_of(reply: Mapping[str, Any]) -> str:
    """The answer in a reply of /chat/completions or /completions."""
    choice = reply["choices"][0]
    return (choice["message"]["content"] if "message" in choice else choice["text"]) or ""


class Client:
    """Connections to a server.

    Args:
        stopping: asked while answers are waited for; where it says yes, the wait ends with
            Cancelled.

    Raises:
        Unreachable: the environment variable that should hold the key does not.
    """

    def __init__(self, server: Server, stopping: Callable[[], bool] = lambda: False) -> None:
        self._server, self._stopping = server, stopping
        self._url = server.url.rstrip("/")
        self._key = _key(server)
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(server.timeout_s, connect=min(_CONNECT_S, server.timeout_s)),
            # a connection that is kept may be closed by the server just as it is used again
            limits=httpx2.Limits(
                max_connections=server.parallel, max_keepalive_connections=0
            ),
            trust_env=urlsplit(server.url).hostname
            not in ("localhost", "127.0.0.1", "::1"),  # no proxy knows this host
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def check(self) -> None:
        """Ask whether it is there, once. Raises Unreachable where it is not, or does not take the
        key.

        A server that is there may have no list of its models, or fail at it: `transformers serve`
        does, in 5.23, on a machine that has never had a model of the hub.
        """
        try:
            self._reply("GET", "models", None, 0.0, threading.Event())
        except Refused as refusal:
            if refusal.status in _NOT_THERE:
                raise

    def post(
        self, path: str, bodies: Sequence[Mapping[str, Any]], patience_s: float | None = None
    ) -> list[Any]:
        """Replies to the bodies, in their order; what the recipe adds or takes out is added and
        taken out here.

        Raises:
            Unreachable: one of them got none; the others are given up.
            Cancelled: `stopping` said yes.
        """
        given_up = threading.Event()
        patience_s = self._server.patience_s if patience_s is None else patience_s
        todo: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        for number, body in enumerate(bodies):
            todo.put(
                (number, {k: v for k, v in {**body, **self._server.extra}.items() if v is not None})
            )

        def work() -> None:
            with suppress(Empty):
                while not given_up.is_set():
                    number, body = todo.get_nowait()
                    try:
                        done.put((number, self._reply("POST", path, body, patience_s, given_up)))
                    except Exception as error:  # raised where it is waited for
                        done.put((number, error))

        for _ in range(min(self._server.parallel, len(bodies))):
            threading.Thread(
                target=work, name="endpoint", daemon=True
            ).start()  # no exit waits for an answer
        replies: dict[int, Any] = {}
        try:
            while len(replies) < len(bodies):
                if self._stopping():
                    raise Cancelled
                with suppress(Empty):
                    number, reply = done.get(timeout=_LOOK_S)
                    if isinstance(reply, Exception):
                        raise reply
                    replies[number] = reply
        finally:
            given_up.set()
        return [replies[number] for number in range(len(bodies))]

    def _reply(
        self, method: str, path: str, body: Any, patience_s: float, given_up: threading.Event
    ) -> Any:
        """One request, tried again with growing pauses for `patience_s` after it first failed."""
        failed_at: float | None = None
        pause_s = _FIRST_PAUSE_S
        while True:
            retry_after: str | None = None
            try:
                response = self._client.request(method, f"{self._url}/{path}", json=body)
                if response.is_success:
                    return self._read(response, is_answer=body is not None)
                fault: Unreachable = self._refusal(response)
                if response.status_code not in _PASSING:
                    raise fault
                retry_after = response.headers.get("retry-after")
            except (httpx2.RequestError, httpx2.InvalidURL) as error:
                why = self._shown(f"{type(error).__name__}: {error}")
                fault = Unreachable(
                    f"the server at {self._url} does not answer ({why}); start it, or correct its "
                    f"`url`"
                )
            now = time.monotonic()
            failed_at = failed_at or now
            if retry_after is not None and retry_after.isdecimal():
                pause_s = max(pause_s, min(float(retry_after), _LONGEST_RETRY_AFTER_S))
            if now + pause_s > failed_at + patience_s:
                raise fault from None
            if given_up.wait(pause_s):
                raise Cancelled
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _read(self, response: httpx2.Response, is_answer: bool) -> Any:
        try:
            reply = response.json()
            if is_answer:
                text_of(reply)
            return reply
        except (ValueError, LookupError, TypeError):
            raise Refused(
                f"the server at {self._url} answered something else than an OpenAI-compatible "
                f"server does "
                f"({self._shown(response.text)!r}); give the `url` up to its /v1",
                response.status_code,
            ) from None

    def _refusal(self, response: httpx2.Response) -> Refused:
        if response.status_code in (401, 403):
            what_to_do = "set `key_env` to the name of the environment variable that holds its key"
        else:
            what_to_do = "its own log says more"
        status, words = response.status_code, self._shown(response.text)
        return Refused(
            f"the server at {self._url} refused ({status}: {words}); {what_to_do}", status
        )

    def _shown(self, text: str) -> str:
        """A part of a text on one line, without the key: servers repeat it in their refusals."""
        text = one_line(text)
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN]


def _key(server: Server) -> str | None:
    if server.key_env is None:
        return None
    key = os.environ.get(server.key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise Unreachable(
            f"the environment variable {server.key_env}, which should hold the key of the server "
            f"at {server.url}, is "
            f"{'not a key' if key else 'not set'}; set it where the run is started"
        )
    return key
