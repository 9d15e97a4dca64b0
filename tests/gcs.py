"""A Google Cloud Storage server on this machine (gcp-storage-emulator), for tests of gs://."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import fsspec


@contextmanager
def gcs_server(bucket: str) -> Iterator[str]:
    """Run a server with an empty bucket, to which gs:// leads here and in child processes.

    Yields the bucket's URL.
    """
    from gcp_storage_emulator.server import create_server

    server: Any = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    server.start()
    port = server._api._httpd.server_port
    environ = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        # the kind of a bucket is asked for by gRPC, which the server does not speak
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    try:
        with mock.patch.dict(os.environ, environ):
            fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)
            yield f"gs://{bucket}"
    finally:
        server.stop()
