"""A stand-in for the Hugging Face hub: repositories of small files, for the real client."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_tokenThatNoLogMayHold"


class Hub:
    """Its repositories by name, each with `private` and `files`."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: list[str] = []
        self.may_write, self.url = True, ""

    def add(self, repo: str, files: dict[str, bytes]) -> None:
        self.repos[repo] = {"private": False, "files": dict(files)}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the body, bytes or JSON."""
        parts = path.split("?")[0].strip("/").split("/")
        if path.startswith("/api/whoami-v2"):
            return 200, {"name": "me", "type": "user", "auth": {}}
        if path == "/api/validate-yaml":
            # the real one refuses a base that is no name on the hub
            fault = re.search(r"base_model: (\.|/|~|\S+/\S+/|\S+://)", json.loads(body)["content"])
            return 200, {"errors": [{"message": "base_model"}] if fault else [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        is_api = parts[0] == "api"
        if parts[0] == "datasets":  # of a dataset's files; a model's have no such word
            del parts[0]
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        rest, files = parts[4:] if is_api else parts[2:], self.repos[repo]["files"]
        if rest[:1] == ["resolve"]:
            return 200, files["/".join(rest[2:])]
        if rest[:1] == ["preupload"]:
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": name, **plain} for name in names]}
        if rest[:1] == ["commit"]:
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        if rest[:1] == ["tree"]:
            folder = "/".join([*rest[2:], ""])
            found = [_facts(*each) for each in files.items() if each[0].startswith(folder)]
            return (200, found) if found or not rest[2:] else (404, {"error": "Entry not found"})
        if rest[:1] == ["paths-info"]:
            paths = json.loads(body)["paths"]
            return 200, [_facts(name, files[name]) for name in paths if name in files]
        siblings = [{"rfilename": name} for name in files]
        return 200, {"id": repo, "sha": "0" * 40, "siblings": siblings, "private": True}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        if repo in self.repos:
            return 409, {"error": "exists", "url": f"{self.url}/{repo}"}
        if not self.may_write:
            return 403, {"error": "you may not write here"}
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repos[repo] = {"private": private, "files": {".gitattributes": b""}}
        return 200, {"url": f"{self.url}/{repo}", "id": repo}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = self.repos[repo]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = f"{len(self.commits):040d}"
        url = f"{self.url}/{repo}/commit/{oid}"
        return 200, {"success": True, "commitUrl": url, "commitOid": oid}


def _facts(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}


def _code(error: str) -> str:
    return "EntryNotFound" if error.startswith("Entry") else "RepoNotFound"


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub, whose `url` is for $HF_ENDPOINT. It asks for TOKEN."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content = 401, {"error": "who are you?"}
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                status, content = hub.answer(self.command, self.path, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if span and status == 200:
                status, data = 206, data[int(span[1]) : int(span[2] or len(data)) + 1]
            self.send_response(status)
            error = content["error"] if isinstance(content, dict) and status == 404 else None
            for name, value in {
                "Content-Length": len(data),
                "X-Repo-Commit": "0" * 40,
                "ETag": f'"{len(data)}-{hash(data)}"',
                **({"X-Error-Code": _code(error)} if error else {}),
            }.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
