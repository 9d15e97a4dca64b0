"""A small server that speaks the protocol of judges, over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.stand_in_server import PatientServer


class JudgeServer:
    """Replies to a question with what `reply` says of it; remembers what it was asked."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        self.asked: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                said = reply(body["messages"][-1]["content"])
                content = json.dumps(
                    {"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]}
                )
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = PatientServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def part(text: str, name: str) -> str:
    """What stands under a mark of the question."""
    mark = next(line for line in text.splitlines() if line.startswith("====")).split(" ")[0]
    return text.split(f"{mark} {name}\n")[1].split(f"\n{mark} ")[0]
