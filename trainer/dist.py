"""Ranks, the device, seeds, the process group and rank-0 logging."""

from __future__ import annotations

import hashlib
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger("packhorse")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def seed_from(*parts: int | str) -> int:
    """A seed in [0, 2^63) from what it belongs to, as `seed_from(seed, "noise", epoch, document)`.

    Unlike Python's own hash it is the same in every process, and neighbouring parts give unrelated seeds.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
