"""Check in seconds that the nodes of a run agree, before their workers start.

In: the rendezvous store, and the facts of this node. Out: nothing, or on all nodes the same
BadInput, which names the node at fault. Each launcher publishes its facts, reads everybody's and
judges them as all others do. A run on one node is not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from packhorse import __version__
from packhorse.trainer.config.packaged import find_template
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import BadInput

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")
_ANSWER_S = 120.0  # a living launcher answers at once if its folders do
_LEAST_GIB = 1.0  # of free disk: with less, logs and samples may not fit
_CLOCKS_S = 5.0  # difference of two clocks that is worth a warning


class NoAnswer(Exception):
    """A node joined the rendezvous and then did not answer."""


@dataclass(frozen=True)
class Facts:
    """What a node is, before it opens the shared folder."""

    host: str
    versions: dict[str, str]
    code: str  # digest of trainer/ and launch/
    recipe: str  # digest of the recipe, overrides applied, and of the DeepSpeed template
    processes: int
    gpus: tuple[str, ...]
    loopback: bool  # the host's own name resolves to the loopback, and gloo has no other interface


@dataclass(frozen=True)
class Disk:
    """What a node finds in its folders."""

    clock: float  # seconds since 1970, just after the nodes' facts had come
    fault: str | None  # why run.dir cannot be written
    free_gib: dict[str, float]  # for run.dir and data.cache
    shared: bool  # node 0's file of this start is in run.dir


def check_nodes(
    recipe: Recipe,
    processes: int,
    log: Callable[[str], None],
    store: Any,
    node: int,
    nodes: int,
) -> None:
    """Compare the nodes. Every launcher calls this between the rendezvous and its workers' start.

    They have met by the secret in the run folder (signed_store.py), which may have been copied with
    it: so node 0 writes a file there for which all look.

    Args:
        processes: workers on this node.
        log: writes a line. Node 0 logs the warnings, and one line at the end.
        store: the store of this round.
        node: this launcher's number among `nodes`.

    Raises:
        BadInput: a node differs from the others, or cannot be used. All nodes raise the same.
        NoAnswer: a node did not answer.
    """
    run_dir = Path(recipe.run.dir)
    numbers = [f"node {i}" for i in range(nodes)]
    with ExitStack() as at_end:
        if node == 0:
            name = ""
            with suppress(OSError):  # `_try_disks` says why
                run_dir.mkdir(parents=True, exist_ok=True)
                mark = tempfile.NamedTemporaryFile(dir=run_dir, prefix=".preflight-")  # noqa: SIM115
                name = Path(at_end.enter_context(mark).name).name
            store.set("packhorse/preflight/mark", name)
        answers = _exchange(store, "facts", node, numbers, asdict(collect_facts(recipe, processes)))
        every = [Facts(**{**answer, "gpus": tuple(answer["gpus"])}) for answer in answers]
        hosts = host_names(every)
        name = store.get("packhorse/preflight/mark").decode()
        answers = _exchange(store, "disk", node, hosts, asdict(_try_disks(recipe, run_dir / name)))
    disks = [Disk(**answer) for answer in answers]
    fault = (
        find_difference(every, hosts)
        or find_bad_disk(disks, hosts, run_dir)
        or find_unshared(disks, hosts, run_dir)
    )
    if fault:
        _leave_together(store, nodes)
        raise BadInput(f"preflight: {fault}")
    if node == 0:
        for warning in list_warnings(every, disks, hosts):
            log(f"preflight: {warning}")
        free = min(disk.free_gib["run.dir"] for disk in disks)
        log(f"preflight: {nodes} nodes agree and share {run_dir}, where {free:,.0f} GiB are free")


# ---------------------------------------------------------------------------------------- judgement


def host_names(every: Sequence[Facts]) -> list[str]:
    """Return the nodes' hosts, with the node's number if several nodes are on one host."""
    count = Counter(facts.host for facts in every)
    return [
        f"{facts.host} (node {i})" if count[facts.host] > 1 else facts.host
        for i, facts in enumerate(every)
    ]


def find_difference(every: Sequence[Facts], hosts: Sequence[str]) -> str | None:
    """Return a sentence about the first node that differs from the majority, or None.

    Without a majority the nodes are compared with node 0.
    """
    for package in every[0].versions:
        if odd := _find_outlier([facts.versions[package] for facts in every], hosts):
            host, has, other, usual = odd
            return (
                f"{host} has {package} {has}, and {other} {usual}; install the same versions on "
                f"all nodes"
            )
    if odd := _find_outlier([facts.code for facts in every], hosts):
        return f"{odd[0]} has other packhorse code than {odd[2]}; install the same on all nodes"
    if odd := _find_outlier([facts.recipe for facts in every], hosts):
        return (
            f"{odd[0]} has another recipe or DeepSpeed template than {odd[2]}; give all nodes the "
            f"same files and the same overrides"
        )
    if odd := _find_outlier([facts.processes for facts in every], hosts):
        host, has, other, usual = odd
        gpus = len(every[hosts.index(host)].gpus)
        return (
            f"{host} has {gpus} GPUs and starts {has} processes, where {other} starts {usual}; "
            f"repair that node or leave it out, or give --nproc"
        )
    on_several_hosts = len({facts.host for facts in every}) > 1
    for facts, host in zip(every, hosts):
        if on_several_hosts and facts.loopback:
            return (
                f"{host}'s own name resolves to the loopback address, which other nodes cannot "
                f"reach; correct its /etc/hosts, or set GLOO_SOCKET_IFNAME to the network that the "
                f"nodes share"
            )
    return None


def find_bad_disk(disks: Sequence[Disk], hosts: Sequence[str], run_dir: Path) -> str | None:
    """Return a sentence about the first node that cannot write or has no room, or None."""
    for disk, host in zip(disks, hosts):
        if disk.fault:
            return f"{host} cannot write to run.dir, {run_dir} ({disk.fault})"
        for folder, free in disk.free_gib.items():
            if free < _LEAST_GIB:
                return f"{host} has {free:.2f} GiB free at {folder}; make room there"
    return None


def find_unshared(disks: Sequence[Disk], hosts: Sequence[str], run_dir: Path) -> str | None:
    """Return a sentence about the first node that does not see node 0's file, or None."""
    for disk, host in zip(disks, hosts):
        if not disk.shared:
            return (
                f"run.dir: {run_dir} is not the same folder on all nodes; {host} does not see what "
                f"{hosts[0]} wrote there; put it on a file system that all of them share"
            )
    return None


def list_warnings(
    every: Sequence[Facts], disks: Sequence[Disk], hosts: Sequence[str]
) -> Iterable[str]:
    """Yield what is unusual but does not change what is learned."""
    for disk, host in zip(disks, hosts):
        ahead_s = disk.clock - disks[0].clock
        if abs(ahead_s) > _CLOCKS_S:
            yield (
                f"{host}'s clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} "
                f"{hosts[0]}'s, which the run's times are taken from"
            )
    if odd := _find_outlier([facts.gpus for facts in every], hosts):
        yield f"{odd[0]} has other GPUs than {odd[2]}; the slowest sets the pace"


def _find_outlier(values: Sequence[Any], hosts: Sequence[str]) -> tuple[str, Any, str, Any] | None:
    """Return a host with an unusual value, that value, a host with the usual one, and that."""
    usual = Counter(values).most_common(1)[0][0]  # of equally common values the first
    odd = [i for i, value in enumerate(values) if value != usual]
    return (hosts[odd[0]], values[odd[0]], hosts[values.index(usual)], usual) if odd else None


# ---------------------------------------------------------------------------------------- this node


def collect_facts(recipe: Recipe, processes: int) -> Facts:
    """Return the facts of this node."""
    host = socket.gethostname()
    try:
        loopback = socket.gethostbyname(host).startswith("127.")
    except OSError:
        loopback = False
    return Facts(
        host=host,
        versions={
            "packhorse": __version__,
            "Python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        code=_digest(_code_parts()),
        recipe=_digest(_recipe_parts(recipe)),
        processes=processes,
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        loopback=loopback and "GLOO_SOCKET_IFNAME" not in os.environ,
    )


def _try_disks(recipe: Recipe, mark: Path) -> Disk:
    """Write a file into the run folder, look for node 0's, and return what the disks are like."""
    clock, fault, run_dir = time.time(), None, Path(recipe.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"written")
    except OSError as error:
        fault = str(error)
    free_gib = {}
    folders = {"run.dir": run_dir, "data.cache": Path(recipe.data.cache).expanduser()}
    for name, folder in folders.items():
        above = (folder.absolute(), *folder.absolute().parents)
        existing = next(place for place in above if place.exists())
        free_gib[name] = shutil.disk_usage(existing).free / 2**30
    return Disk(clock, fault, free_gib, mark.exists())


def _code_parts() -> Iterable[bytes]:
    package = Path(__file__).parents[1] / "trainer"
    for folder in (package, package.parent / "launch"):
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(package.parent).as_posix().encode()
            yield path.read_bytes()


def _recipe_parts(recipe: Recipe) -> Iterable[bytes]:
    yield recipe.to_yaml().encode()
    with suppress(OSError, BadInput):  # the workers report a missing template
        yield find_template(recipe.parallel.deepspeed).read_bytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- all nodes


def _exchange(store: Any, what: str, node: int, hosts: Sequence[str], value: Any) -> list[Any]:
    """Publish this node's value and return every node's, in the order of nodes."""
    keys = [f"packhorse/preflight/{what}/{i}" for i in range(len(hosts))]
    store.set(keys[node], json.dumps(value))
    try:
        store.wait(keys, timedelta(seconds=_ANSWER_S))
    except RuntimeError:
        try:
            silent = [host for host, key in zip(hosts, keys) if not store.check([key])]
        except RuntimeError:
            silent = ["the rendezvous host"]
        raise NoAnswer(
            f"preflight: {', '.join(silent)} did not answer within {_ANSWER_S:.0f} s; check its "
            f"log, and the file system of run.dir there"
        ) from None
    return [json.loads(answer) for answer in store.multi_get(keys)]


def _leave_together(store: Any, nodes: int) -> None:
    """Wait until all nodes have read what they judge by.

    The store ends with the launcher of the rendezvous host, which would otherwise leave first.
    """
    end = time.monotonic() + _ANSWER_S / 10
    with suppress(RuntimeError):  # the host has left after its own wait
        left = store.add("packhorse/preflight/judged", 1)
        while left < nodes and time.monotonic() < end:
            time.sleep(0.05)
            left = store.add("packhorse/preflight/judged", 0)
