"""A real S3 server on this machine (moto's), for tests of object stores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import fsspec

SECRET = "secret-that-no-log-may-hold"


@contextmanager
def s3_server(
    bucket: str, before: Callable[[str, str], None] = lambda method, path: None
) -> Iterator[str]:
    """Run a server with an empty bucket, to which s3:// leads here and in child processes.

    Yields the bucket's URL.

    Args:
        before: called with the method and the path of each request, before it is answered.
    """
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None: ...

    moto = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start: Any) -> Any:
        before(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        return moto(environ, start)

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environ = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, environ):
            s3().mkdir(bucket)
            yield f"s3://{bucket}"
    finally:
        server.shutdown()


def s3() -> Any:
    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
