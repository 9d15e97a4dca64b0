"""Whether the nodes of a run agree and share its folder, asked in seconds, before their workers
start.

In: the store of the rendezvous, and what this node is. Out: nothing, or BadInput on all nodes
    alike, which names the
node at fault. Each launcher publishes its facts, reads everybody's, and judges them as all the
others do. A run of one node is not asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import trainer
from trainer.config.recipe import Recipe
from trainer.datatypes import BadInput

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")
_ANSWER_S = 120.0  # a launcher that is here answers at once, where its folders do
_LEAST_GIB = 1.0  # of free disk: less, and even logs and samples may not fit
_CLOCKS_S = 5.0


class NoAnswer(Exception):
    """A node met the others and then fell silent."""


@dataclass(frozen=True)
class Facts:
    """What a node is, before it looks at the shared folder."""

    host: str
    versions: dict[str, str]
    code: str  # digest of trainer/ and launch/
    recipe: str  # digest of the recipe, overrides applied, and of the DeepSpeed template
    processes: int
    gpus: tuple[str, ...]
    loopback: (
        bool  # the host's own name leads to itself alone, and gloo is not told another interface
    )


@dataclass(frozen=True)
class Disk:
    """What a node finds at its folders."""

    clock: float  # seconds since 1970, just after the nodes' facts had come
    fault: str | None  # why run.dir cannot be written
    free_gib: dict[str, float]  # run.dir and data.cache


def facts(recipe: Recipe, processes: int) -> Facts:
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Facts(
        host=socket.gethostname(),
        versions={
            "packhorse": trainer.__version__,
            "Python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        code=_digest(_code()),
        recipe=_digest(_recipe(recipe)),
        processes=processes,
        gpus=gpus,
        loopback=_is_loopback(socket.gethostname()) and "GLOO_SOCKET_IFNAME" not in os.environ,
    )


def check(
    recipe: Recipe,
    processes: int,
    say: Callable[[str], None],
    store: Any,
    node: int,
    nodes: int,
    stamp: str,
) -> None:
    """Every launcher calls it, between their meeting and the start of the workers.

    Args:
        processes: workers on this node.
        say: shows a line; node 0 has one for each warning, and one at the end.
        store: of this round.
        node: this launcher's number among `nodes`.
        stamp: names the round, the same on all nodes.

    Raises:
        BadInput: a node differs from the others, or cannot be used; all nodes raise the same
            sentence.
        NoAnswer: a node did not answer.
    """
    run_dir = Path(recipe.run.dir)
    every = [
        Facts(**{**told, "gpus": tuple(told["gpus"])})
        for told in _exchange(
            store,
            "facts",
            node,
            [f"node {i}" for i in range(nodes)],
            asdict(facts(recipe, processes)),
        )
    ]
    hosts = names(every)
    token = run_dir / f".preflight-{stamp}-%d"
    mine = Path(str(token) % node)
    try:
        disks = [
            Disk(**told)
            for told in _exchange(store, "disk", node, hosts, asdict(_disk(recipe, mine)))
        ]
        seen = [i for i in range(nodes) if Path(str(token) % i).exists()]
        sees = _exchange(store, "sees", node, hosts, seen)
    finally:
        with suppress(OSError):
            mine.unlink(missing_ok=True)
    fault = (
        differing(every, hosts) or unusable(disks, hosts, run_dir) or unshared(sees, hosts, run_dir)
    )
    if fault:
        _leave_together(store, nodes)
        raise BadInput(f"preflight: {fault}")
    if node == 0:
        for warning in warnings(every, disks, hosts):
            say(f"preflight: {warning}")
        free = min(disk.free_gib["run.dir"] for disk in disks)
        say(f"preflight: {nodes} nodes agree and share {run_dir}, where {free:,.0f} GiB are free")


# ------------------------------------------------------------------------------------------ judging


def names(every: Sequence[Facts]) -> list[str]:
    """The nodes' hosts; with a number where several are on one."""
    count = Counter(facts.host for facts in every)
    return [
        f"{facts.host} (node {i})" if count[facts.host] > 1 else facts.host
        for i, facts in enumerate(every)
    ]


def differing(every: Sequence[Facts], hosts: Sequence[str]) -> str | None:
    """The first node that is not like most of the others, or not like node 0 where no kind is the
    more common.
    """
    for package in every[0].versions:
        if odd := _odd([facts.versions[package] for facts in every], hosts):
            host, has, other, usual = odd
            return f"{host} has {package} {has}, and {other} {usual}; install the same versions on all nodes"
    if odd := _odd([facts.code for facts in every], hosts):
        return f"{odd[0]} runs other code of packhorse than {odd[2]}; install the same on all nodes"
    if odd := _odd([facts.recipe for facts in every], hosts):
        return (
            f"{odd[0]} has another recipe or DeepSpeed template than {odd[2]}; "
            "give all nodes the same files and the same overrides"
        )
    if odd := _odd([facts.processes for facts in every], hosts):
        host, has, other, usual = odd
        gpus = len(every[hosts.index(host)].gpus)
        return (
            f"{host} has {gpus} GPUs and starts {has} processes, where {other} starts {usual}; "
            f"repair or leave out "
            "that node, or give --nproc"
        )
    apart = len({facts.host for facts in every}) > 1
    for facts, host in zip(every, hosts):
        if apart and facts.loopback:
            return (
                f"{host}'s own name leads to the loopback address, where no other node finds it; "
                f"correct its "
                "/etc/hosts, or set GLOO_SOCKET_IFNAME to the network that the nodes share"
            )
    return None


def unusable(disks: Sequence[Disk], hosts: Sequence[str], run_dir: Path) -> str | None:
    """The first node that cannot write to the run folder, or has no room."""
    for disk, host in zip(disks, hosts):
        if disk.fault:
            return f"{host} cannot write to run.dir, {run_dir} ({disk.fault})"
        for folder, free in disk.free_gib.items():
            if free < _LEAST_GIB:
                return f"{host} has {free:.2f} GiB free at {folder}; make room there"
    return None


def unshared(sees: Sequence[Sequence[int]], hosts: Sequence[str], run_dir: Path) -> str | None:
    """
    Args:
        sees: for each node, the nodes whose file it finds in its run folder.
    """
    everyone = range(len(hosts))
    blind = min(everyone, key=lambda node: (len(sees[node]), -node))
    unseen = [node for node in everyone if node not in sees[blind]]
    if not unseen:
        return None
    return (
        f"run.dir: {run_dir} is not the same folder on all nodes, {hosts[blind]} does not see what "
        f"{hosts[unseen[0]]} "
        "wrote there; put it on a file system that all of them share"
    )


def warnings(every: Sequence[Facts], disks: Sequence[Disk], hosts: Sequence[str]) -> Iterable[str]:
    """What is odd, and changes nothing that is learned."""
    for disk, host in zip(disks, hosts):
        ahead_s = disk.clock - disks[0].clock
        if abs(ahead_s) > _CLOCKS_S:
            yield (
                f"{host}'s clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} "
                f"{hosts[0]}'s, whose "
                "time is the run's"
            )
    if odd := _odd([facts.gpus for facts in every], hosts):
        yield f"{odd[0]} has other GPUs than {odd[2]}; the slowest sets the pace"


def _odd(values: Sequence[Any], hosts: Sequence[str]) -> tuple[str, Any, str, Any] | None:
    """A host with another value than most, its value, a host with the usual one, and that."""
    usual = Counter(values).most_common(1)[0][0]  # the first of those that are as common
    odd = [i for i, value in enumerate(values) if value != usual]
    return (hosts[odd[0]], values[odd[0]], hosts[values.index(usual)], usual) if odd else None


# ---------------------------------------------------------------------------------------- this node


def _disk(recipe: Recipe, mine: Path) -> Disk:
    clock, fault = time.time(), None
    try:
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(socket.gethostname())
    except OSError as error:
        fault = str(error)
    folders = {"run.dir": mine.parent, "data.cache": Path(recipe.data.cache).expanduser()}
    return Disk(clock, fault, {name: _free_gib(folder) for name, folder in folders.items()})


def _free_gib(folder: Path) -> float:
    """Of the disk that the folder is on, or will be."""
    there = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    return shutil.disk_usage(there).free / 2**30


def _code() -> Iterable[bytes]:
    package = Path(trainer.__file__).parent
    for folder in (package, package.parent / "launch"):
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(package.parent).as_posix().encode()
            yield path.read_bytes()


def _recipe(recipe: Recipe) -> Iterable[bytes]:
    yield recipe.to_yaml().encode()
    with suppress(OSError):  # the workers say that it is missing
        yield Path(recipe.parallel.deepspeed).read_bytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


# ---------------------------------------------------------------------------------------- all nodes


def _exchange(store: Any, what: str, node: int, hosts: Sequence[str], mine: Any) -> list[Any]:
    """Every node's value, in the order of nodes."""
    keys = [f"packhorse/preflight/{what}/{i}" for i in range(len(hosts))]
    store.set(keys[node], json.dumps(mine))
    try:
        store.wait(keys, timedelta(seconds=_ANSWER_S))
    except RuntimeError:
        try:
            silent = [host for host, key in zip(hosts, keys) if not store.check([key])]
        except RuntimeError:
            silent = ["the rendezvous"]
        raise NoAnswer(
            f"preflight: {', '.join(silent)} did not answer within {_ANSWER_S:.0f} s; look at its "
            f"log, and at the file "
            "system of run.dir there"
        ) from None
    return [json.loads(value) for value in store.multi_get(keys)]


def _leave_together(store: Any, nodes: int) -> None:
    """The store ends with the launcher that hosts it: it waits until all have read what they judge
    by.
    """
    end = time.monotonic() + _ANSWER_S / 10
    with suppress(RuntimeError):  # that one had waited long enough
        left = store.add("packhorse/preflight/judged", 1)
        while left < nodes and time.monotonic() < end:
            time.sleep(0.05)
            left = store.add("packhorse/preflight/judged", 0)
