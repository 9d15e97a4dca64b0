"""Reach files of object stores by fsspec: s3://, gs://, az://, hf://, file://.

A URL enters; a file system and a path in it leave. Credentials come from the environment alone, as
each store's own library reads them: a URL that holds one is refused, as a recipe is saved and
shown.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from packhorse.trainer.datatypes import BadInput
from packhorse.trainer.utils.text import error_line

_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}


def is_url(place: str) -> bool:
    """Return whether a place is a URL, and no path or hub name."""
    return re.match(r"[a-z][a-z0-9+.-]*://", place) is not None


def check_url(url: str) -> None:
    """Raise ValueError if `url` is no URL, or holds credentials."""
    if not is_url(url):
        raise ValueError("it is a URL, as s3://bucket/folder")
    parts = urlsplit(url)
    if ("@" in parts.netloc and parts.scheme != "abfss") or parts.query:
        raise ValueError(
            "a URL in a recipe may hold no credentials and no `?`: give them in the environment"
        )


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it. Nothing is connected yet.

    Raises:
        BadInput: no such store is known, or its library is not installed.
    """
    import fsspec

    # no cache, as others write meanwhile; only on a disk have folders to be made
    options = {"use_listings_cache": False, "skip_instance_cache": True}
    if urlsplit(url).scheme in ("file", "local"):
        options["auto_mkdir"] = True
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(urlsplit(url).scheme)
        hint = f"pip install packhorse[{extra}]" if extra else "install its library"
        raise BadInput(f"{url}: {error_line(error, 200)}; {hint}") from None
    except Exception as error:  # each store's library raises classes of its own
        raise BadInput(f"{url}: {error_line(error, 200)}") from None
