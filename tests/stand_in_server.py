"""A server whose replies a test decides, for what a real one cannot be made to do: fail, repeat a
key, know no name.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Server = TypeVar("Server", bound="StandIn")

Reply = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]
"""Status, body (JSON, or a text as it is) and headers."""


class Request:
    """What the server was asked."""

    def __init__(self, path: str, body: Any, headers: Mapping[str, str]) -> None:
        self.path, self.body, self.headers = path, body, headers


class PatientServer(ThreadingHTTPServer):
    """Many may connect at once: with Python's queue of 5 some would be reset."""

    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        # a client that was asked to stop does not wait for its replies
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class StandIn:
    """A server on this machine that answers by `answer(request)`, each request in a thread of its
    own. It runs until it is closed."""

    def __init__(self, answer: Callable[[Request], Reply]) -> None:
        self.requests: list[Request] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                request = Request(
                    self.path, body, {name.lower(): value for name, value in self.headers.items()}
                )
                stand_in.requests.append(request)
                status, content, *more = answer(request)
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in (more[0] if more else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST  # noqa: N815 - http.server's names

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = PatientServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        # a request that a test left unanswered must not hold up the end
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        # 0.02: shutdown() waits for the next of these polls
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self: Server) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def chat_reply(text: str | None) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}
