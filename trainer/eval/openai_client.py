"""Send requests to an OpenAI-compatible server in parallel; return its answers in their order.

The client is httpx2, which huggingface_hub installs. Three JSON requests are sent from here: the
`openai` package would be more code than this file, and would read an organisation, headers and an
address of its own from the environment.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from typing import Any
from urllib.parse import urlsplit

import httpx2

from packhorse.trainer.config.eval import Server
from packhorse.trainer.utils.staged_build import Stopped
from packhorse.trainer.utils.text import one_line

_CONNECT_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0  # between tries; each pause is twice the last
_LONGEST_RETRY_AFTER_S = 60.0  # that a server may ask for
_POLL_S = 0.2  # between checks whether to stop
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}  # errors that may pass
_NO_SERVICE = {401, 403, 502, 503, 504}  # closed to us, or no server behind the proxy
_SHOWN = 200  # characters of a server's own message
_LONGEST_REPLY = 16 << 20  # bytes
_GRACE_S = 10.0  # beyond all limits of a request, after which nobody waits for its thread


class Unreachable(Exception):
    """The server is down or refuses. The message is one sentence that names its url and says what
    to do."""


class Refused(Unreachable):
    """The server answered with an error that a retry would not change, or not as such a server
    does."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


def text_of(reply: Any) -> str:
    """Return the answer in a reply of /chat/completions or /completions. Raises LookupError,
    TypeError or AttributeError if it is no such reply."""
    choice = reply["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if not isinstance(text, str | None):
        raise TypeError("the answer is no text")
    # JSON may hold half a surrogate pair, which is no character and fits in no file
    return (text or "").encode(errors="replace").decode()


def prompt_tokens_of(reply: Any) -> Any:
    """Return how many tokens the server says it read; None if it does not say. Raises as `text_of`
    does."""
    return (reply.get("usage") or {}).get("prompt_tokens")


class Client:
    """Connections to a server.

    Args:
        stopping: called while answers are waited for; if it returns True, the wait ends with
            Stopped.
        patience_s: how long a request that fails is retried; the server's `timeout_s` if None.
        requests: at the same time, at most.

    Raises:
        Unreachable: the environment variable that should hold the key does not.
    """

    def __init__(
        self,
        server: Server,
        stopping: Callable[[], bool] = lambda: False,
        patience_s: float | None = None,
        requests: int = 16,
    ) -> None:
        self._server, self._stopping, self._requests = server, stopping, requests
        self._patience_s = server.timeout_s if patience_s is None else patience_s
        self._url = server.url.rstrip("/")
        self._key = _read_key(server)
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(server.timeout_s, connect=min(_CONNECT_S, server.timeout_s)),
            # no connection is kept: the server may close it just as it is used again
            limits=httpx2.Limits(max_connections=requests, max_keepalive_connections=0),
            # a proxy cannot reach this host
            trust_env=urlsplit(server.url).hostname not in ("localhost", "127.0.0.1", "::1"),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def check(self) -> None:
        """Ask once whether the server is up. Raises Unreachable if it is down or refuses the key.

        A server that is up may have no list of models, or fail at it: `transformers serve` 5.23
        does on a machine that has never had a model of the hub.
        """
        try:
            self._send_all("GET", "models", [None], 0.0)
        except Refused as refusal:
            if refusal.status in _NO_SERVICE:
                raise

    def post(
        self, path: str, bodies: Sequence[Mapping[str, Any]], patience_s: float | None = None
    ) -> list[Any]:
        """Return the replies to the bodies, in their order. The recipe's `extra` is merged into
        each body, and fields that are None are left out.

        Raises:
            Unreachable: one request got no reply; the others are given up.
            Stopped: `stopping` returned True.
        """
        filled = [{**body, **self._server.extra} for body in bodies]
        filled = [{key: v for key, v in body.items() if v is not None} for body in filled]
        return self._send_all(
            "POST", path, filled, self._patience_s if patience_s is None else patience_s
        )

    def _send_all(self, method: str, path: str, bodies: Sequence[Any], patience_s: float) -> list:
        """Send a request for each body; return the replies. No wait is longer than all limits of a
        request, which a server may evade that sends a head of its answer without end."""
        given_up = threading.Event()
        begun: dict[int, float] = {}

        def send(number: int) -> tuple[int, Any]:
            begun[number] = time.monotonic()
            return number, self._request(method, path, bodies[number], patience_s, given_up)

        # its threads are daemons, so that no exit of the process waits for an answer
        pool = ThreadPool(min(self._requests, len(bodies)) or 1)
        arriving = pool.imap_unordered(send, range(len(bodies)))
        # the first try, and one that was begun just before the patience ended
        limit_s = 2 * self._server.timeout_s + patience_s + _GRACE_S
        replies: dict[int, Any] = {}
        try:
            while len(replies) < len(bodies):
                if self._stopping():
                    raise Stopped("stopped while waiting for a server")
                if time.monotonic() - min(begun.values(), default=math.inf) > limit_s:
                    raise self._too_long()
                with suppress(TimeoutError):
                    number, replies[number] = arriving.next(_POLL_S)
                    begun.pop(number)
        finally:
            given_up.set()
            pool.terminate()
        return [replies[number] for number in range(len(bodies))]

    def _request(
        self, method: str, path: str, body: Any, patience_s: float, given_up: threading.Event
    ) -> Any:
        """Send a request; retry it with growing pauses for `patience_s` after its first failure."""
        failed_at: float | None = None
        pause_s = _FIRST_PAUSE_S
        while not given_up.is_set():
            retry_after: str | None = None
            try:
                response, content = self._exchange(method, path, body)
                if response.is_success:
                    return self._read_reply(response, content, is_answer=body is not None)
                fault: Unreachable = self._refusal(response, content)
                if response.status_code not in _RETRIED:
                    raise fault
                retry_after = response.headers.get("retry-after")
            except (httpx2.RequestError, httpx2.InvalidURL) as error:
                why = self._excerpt(f"{type(error).__name__}: {error}")
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
            given_up.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise Stopped("given up with the other requests")

    def _exchange(self, method: str, path: str, body: Any) -> tuple[httpx2.Response, bytes]:
        """Send a request once; return the response and its content.

        httpx2 limits the time between two pieces of a response. Here the whole of it is limited.
        """
        end, content = time.monotonic() + self._server.timeout_s, bytearray()
        with self._client.stream(method, f"{self._url}/{path}", json=body) as response:
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > end:
                    raise self._too_long()
                if len(content) > _LONGEST_REPLY:
                    raise Refused(
                        f"the server at {self._url} answers with more than "
                        f"{_LONGEST_REPLY >> 20} MiB; see its own log",
                        response.status_code,
                    )
        return response, bytes(content)

    def _too_long(self) -> Unreachable:
        return Unreachable(
            f"the server at {self._url} has not ended its answer within {self._server.timeout_s:g} "
            "s; raise its `timeout_s`, or see its own log"
        )

    def _read_reply(self, response: httpx2.Response, content: bytes, is_answer: bool) -> Any:
        try:
            reply = json.loads(content)
            if is_answer:
                text_of(reply)
                prompt_tokens_of(reply)
            return reply
        # nested too deeply is one of them
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Refused(
                f"the server at {self._url} answered something else than an OpenAI-compatible "
                f"server does ({self._excerpt(content)!r}); give the `url` up to its /v1",
                response.status_code,
            ) from None

    def _refusal(self, response: httpx2.Response, content: bytes) -> Refused:
        status = response.status_code
        what_to_do = (
            "set `key_env` to the name of the environment variable that holds its key"
            if status in (401, 403)
            else "see its own log"
        )
        reason = self._excerpt(content)
        return Refused(
            f"the server at {self._url} refused ({status}: {reason}); {what_to_do}", status
        )

    def _excerpt(self, text: str | bytes) -> str:
        """Return the text's beginning on one line, without the key: servers repeat it in errors."""
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return one_line(text.replace(self._key, "***") if self._key else text, _SHOWN)


def _read_key(server: Server) -> str | None:
    if server.key_env is None:
        return None
    key = os.environ.get(server.key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise Unreachable(
            f"the environment variable {server.key_env}, which should hold the key of the server "
            f"at {server.url}, is {'not a key' if key else 'not set'}; set it where the run is "
            f"started"
        )
    return key
