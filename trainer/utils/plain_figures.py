"""Draw by matplotlib's own settings, whatever lies in the current folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from packhorse.trainer.utils.lean_import import replaced

_SETTINGS = "matplotlibrc"  # matplotlib reads the one of the current folder while it is imported


@contextmanager
def plain_figures() -> Iterator[None]:
    """Let figures that are made and saved in the block be the same in every folder.

    Settings that lie about could start programs (LaTeX), take all memory, or be a pipe, which an
    import would wait for.
    """
    exists = os.path.exists
    with replaced(os.path, "exists", lambda path: path != _SETTINGS and exists(path)):
        import matplotlib
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield
