"""A stand-in for Azure Blob Storage: containers of block blobs in memory, for the real client."""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

WHEN = "Mon, 01 Jan 2024 00:00:00 GMT"
KEY = "c2VjcmV0LXRoYXQtbm8tbG9nLW1heS1ob2xk"  # of base64, as Azure's are

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


class Blobs:
    """Containers by name, each a content and an ETag by blob."""

    def __init__(self) -> None:
        self.containers: dict[str, dict[str, tuple[bytes, str]]] = {}
        self.blocks: dict[tuple[str, str], dict[str, bytes]] = {}

    def answer(
        self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> Answer:
        _, container, *rest = path.strip("/").split("/", 2)
        blob = rest[0] if rest else ""
        if query.get("restype") == "container":
            if method == "PUT":
                self.containers[container] = {}
                return 201, {}, b""
            if container not in self.containers:
                return _missing("ContainerNotFound")
            if query.get("comp") == "list":
                return 200, {"Content-Type": "application/xml"}, self._list(container, query)
            return 200, {}, b""
        if container not in self.containers:
            return _missing("ContainerNotFound")
        if method == "PUT":
            return self._put(container, blob, query, body)
        if blob not in self.containers[container]:
            return _missing("BlobNotFound")
        if method == "DELETE":
            del self.containers[container][blob]
            return 202, {}, b""
        return self._get(container, blob, headers)

    def _put(self, container: str, blob: str, query: dict[str, str], body: bytes) -> Answer:
        blocks = self.blocks.setdefault((container, blob), {})
        if query.get("comp") == "block":
            blocks[query["blockid"]] = body
            return 201, {}, b""
        if query.get("comp") == "blocklist":
            ids = re.findall(r"<(?:Latest|Uncommitted)>(.*?)</", body.decode())
            body = b"".join(blocks[each] for each in ids)
        etag = f'"{uuid.uuid4().hex}"'
        self.containers[container][blob] = (body, etag)
        return 201, {"ETag": etag, "Last-Modified": WHEN}, b""

    def _get(self, container: str, blob: str, headers: dict[str, str]) -> Answer:
        content, etag = self.containers[container][blob]
        answer = {"ETag": etag, "Last-Modified": WHEN, "x-ms-blob-type": "BlockBlob"}
        asked = headers.get("x-ms-range", headers.get("Range", ""))
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if span is None:
            return 200, answer, content
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return 416, {"x-ms-error-code": "InvalidRange"}, b""
        answer["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, answer, content[first : last + 1]

    def _list(self, container: str, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        entries, folders = [], set()
        for name, (content, etag) in sorted(self.containers[container].items()):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
                continue
            entries.append(
                f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{WHEN}"
                f"</Last-Modified><Etag>{etag}</Etag><Content-Length>{len(content)}"
                "</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob>"
            )
        entries += [f"<BlobPrefix><Name>{escape(each)}</Name></BlobPrefix>" for each in folders]
        return (
            f'<?xml version="1.0"?><EnumerationResults ContainerName="{container}">'
            f"<Blobs>{''.join(entries)}</Blobs><NextMarker/></EnumerationResults>"
        ).encode()


def _missing(code: str) -> Answer:
    return 404, {"x-ms-error-code": code}, b""


@contextmanager
def azure_server(container: str) -> Iterator[str]:
    """Run a server with an empty container, to which az:// leads here and in child processes.

    Yields the container's URL.
    """
    blobs = Blobs()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = blobs.answer(
                *(self.command, unquote(parts.path), dict(parse_qsl(parts.query))),
                *(dict(self.headers), body),
            )
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_DELETE = do_PUT  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={KEY};"
        f"BlobEndpoint=http://127.0.0.1:{server.server_address[1]}/devstoreaccount1;"
    )
    blobs.containers[container] = {}
    try:
        with mock.patch.dict(os.environ, {"AZURE_STORAGE_CONNECTION_STRING": connection}):
            yield f"az://{container}"
    finally:
        server.shutdown()
        server.server_close()
