"""A rank of `packhorse train` that takes its time at one place, for signals to meet it there.

    python -m tests.slowed PLACE RANKS SECONDS RECIPE [KEY=VALUE...]

Every rank writes its process id to `pid-RANK` in the run folder; those named in RANKS (as 0 or 01)
make `at-RANK` when they first come to the place, and wait there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ranks import ROOT


def start(
    place: str, ranks: str, seconds: float, run_dir: Path, *overrides: str
) -> subprocess.Popen:
    """A launcher of two such ranks on the debug recipe."""
    run_dir.mkdir(parents=True)
    recipe = [
        "recipes/debug.yaml",
        f"run.dir={run_dir}",
        f"data.cache={run_dir.parent / 'cache'}",
        *overrides,
    ]
    worker = ["-m", "tests.slowed", place, ranks, str(seconds), *recipe]
    call = f"launch({worker!r}, Path({str(run_dir)!r}), nproc=2)"
    program = (
        "import sys; from pathlib import Path; from packhorse.launch.local import launch; "
        f"sys.exit({call})"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, seconds: float = 120) -> str:
    """The content of a file that appears."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


def _slow(place: str, seconds: float, marker: Path) -> None:
    from packhorse.trainer import train
    from packhorse.trainer.data import loader, prepare
    from packhorse.trainer.engine import sharded_state
    from packhorse.trainer.engine.engine import Engine
    from packhorse.trainer.eval import generate

    owners: dict[str, tuple[Any, str]] = {
        "preparation": (prepare.RowTokenizer, "__call__"),
        "meeting": (train, "train_plan"),
        "reading": (loader.Loader, "step"),
        "training": (Engine, "step"),
        "held-out loss": (Engine, "evaluate"),
        "generation": (generate, "_answers"),
        "saving": (sharded_state, "write"),
    }
    owner, name = owners[place]
    call: Callable[..., Any] = getattr(owner, name)

    def slowed(*args: Any, **kwargs: Any) -> Any:
        end = time.monotonic() + (0 if marker.exists() else seconds)
        marker.touch()
        while (left := end - time.monotonic()) > 0:  # a signal ends a sleep
            time.sleep(left)
        return call(*args, **kwargs)

    setattr(owner, name, slowed)


def _main(place: str, ranks: str, seconds: str, *recipe: str) -> None:
    from packhorse.trainer import hang_watchdog
    from packhorse.trainer.cli import main
    from packhorse.trainer.config.recipe import load_recipe
    from packhorse.trainer.eval import generate
    from packhorse.trainer.utils.files import write_synced

    generate.tokens_at_once = lambda recipe: 1  # a batch has one prompt
    hang_watchdog._USUAL_FACTOR = 2  # the first steps are slow, and hangs are waited for
    rank = os.environ["RANK"]
    run_dir = Path(load_recipe(recipe[0], recipe[1:]).run.dir)
    write_synced(run_dir / f"pid-{rank}", str(os.getpid()))
    if rank in ranks:
        _slow(place, float(seconds), run_dir / f"at-{rank}")
    sys.argv[1:] = ["train", *recipe]
    main.main()


if __name__ == "__main__":
    _main(*sys.argv[1:])
