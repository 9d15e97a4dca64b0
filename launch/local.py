"""Start the workers of one node, pass signals on to them, and turn what became of them into an exit
code (C9).

In: a worker's command and the run folder. Out: 0, 1, 2 or 75 (trainer/datatypes.py). Torch's
    elastic agent starts
and watches the processes, inside this one (launch/agent.py). What is done differently from
torchrun, and why:

- torchrun kills workers 30 s after SIGTERM and dies of SIGUSR1. Here both are passed on, and the
  workers are waited for however long their save takes.
- torchrun makes every failure exit code 1. Here a worker's 2 (bad input) stays 2, and a saved run
  is 75.
- torchrun waits for a node that is gone as long as its workers do. Here launchers miss each other
  in seconds.
- Only rank 0 speaks; the other ranks write to files in the run folder, shown when one of them
  fails.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, registry
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)

from launch import preflight
from launch.agent import Agent, explain, say
from trainer.config.recipe import Recipe
from trainer.datatypes import BAD_INPUT, DONE, FAILED, SAVED_RUN_AGAIN, STOP_FILE, BadInput

_CTRL_C_TO_KILL = 3
# SIGHUP: the terminal went away. SIGQUIT (Ctrl-\) is left to torch's agent, which ends the workers
# without a save.
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_JOIN_S = 600  # for the least number of nodes to come, where nothing else is said
_LAST_CALL_S = 15  # for more than the least to come
_STORE_S = 30  # for an answer of the rendezvous


def launch(
    worker: Sequence[str],
    run_dir: Path,
    *,
    nproc: int | None = None,
    endpoint: str = "localhost:0",
    nodes: tuple[int, int] = (1, 1),
    is_host: bool | None = None,
    restarts: int = 0,
    run_id: str | None = None,
    join_s: int | None = None,
    recipe: Recipe | None = None,
) -> int:
    """Run `python *worker` in `nproc` processes on this node until all have ended. Returns the exit
    code.

    Args:
        worker: arguments of this Python, as `["-m", "trainer.cli.main", "train", "recipe.yaml"]`.
        run_dir: where `stop.json` appears, and where ranks other than 0 write `logs/`.
        nproc: processes on this node; all GPUs, or one where there is none.
        endpoint: host:port of the rendezvous; port 0 takes a free one, on a single node only.
        nodes: least and most launchers that meet at the endpoint.
        is_host: whether this node holds the rendezvous; None: found by the endpoint's name.
        restarts: how often the workers are started again after a failure, with the nodes that are
            left.
        run_id: the same in all launchers of a run, and in no other that meets at the endpoint.
        join_s: seconds that the least number of nodes may take to come; None: ten minutes.
        recipe: what the nodes are compared for before the workers start (launch/preflight.py);
            None: they are not.

    Raises:
        BadInput: more processes than GPUs, the port is in use, nobody answers at the endpoint, or
            nodes differ.
    """
    nproc = _processes(nproc)
    join_s = join_s or _JOIN_S
    if nodes[1] == 1:
        _require_free(endpoint)
    threads = _set_environment(nproc)
    say(f"{nproc} {'process' if nproc == 1 else 'processes'} with OMP_NUM_THREADS={threads}")

    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # said below, in fewer words
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    spec = WorkerSpec(
        role="trainer",
        local_world_size=nproc,
        entrypoint=sys.executable,
        # torch's agent substitutes $local_rank and the like in arguments
        args=tuple(argument.replace("$", "$$") for argument in worker),
        rdzv_handler=_rendezvous(
            endpoint, nodes, is_host, run_id or run_dir.resolve().name, join_s
        ),
        max_restarts=restarts,
        local_addr="localhost" if nodes[1] == 1 else None,
    )
    check = partial(preflight.check, recipe, nproc, say) if recipe else None
    agent = Agent(spec, run_dir, check)
    try:
        with _passing_signals(agent):
            result: Any = agent.run()
    except _NotStartedError:
        say("stopped before the workers had started")
        return SAVED_RUN_AGAIN
    except SignalException:
        say("quit without a save")
        return FAILED
    except RendezvousError as error:
        say(_why(error, join_s))
        return FAILED
    except preflight.NoAnswer as error:
        say(str(error))
        return FAILED
    finally:
        agent.close()
    return _conclude(result, run_dir, agent)


class _NotStartedError(Exception):
    """A signal came while there were no workers."""


@contextmanager
def _passing_signals(agent: Agent) -> Iterator[None]:
    """Inside, signals go to the workers, and this process waits for them. A third Ctrl-C kills
    them.
    """
    interrupts = 0

    def pass_on(number: int, _frame: Any) -> None:
        nonlocal interrupts
        workers = agent.workers()
        if not workers and agent.is_between_rounds:
            raise _NotStartedError
        interrupts += number == signal.SIGINT
        if interrupts >= _CTRL_C_TO_KILL:
            agent.kill_workers()
            return
        # Workers lead sessions of their own: the terminal's Ctrl-C reaches this process alone.
        asked = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        for worker in workers:
            worker.send_signal(asked)
        once_more = (
            f"; Ctrl-C {_CTRL_C_TO_KILL - interrupts} more times kills them" if interrupts else ""
        )
        say(f"{signal.Signals(number).name}: the workers save and stop{once_more}")

    # a signal that is ignored (nohup) stays ignored
    taken = [number for number in _PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- before


def _processes(asked: int | None) -> int:
    gpus = torch.cuda.device_count()
    if asked is None:
        return max(gpus, 1)
    if 0 < gpus < asked:
        raise BadInput(f"--nproc {asked}: this machine has {gpus} GPUs; ask for at most as many")
    return asked


def parse_nodes(text: str) -> tuple[int, int]:
    """`2` or `1:4` as the least and most number of nodes."""
    numbers = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    least, most = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
    if not 1 <= least <= most:
        raise BadInput(f"--nnodes {text}: give a number, or MIN:MAX, as 2 or 1:4")
    return least, most


def _set_environment(nproc: int) -> str:
    """What the workers find there, where the user has not said otherwise; OMP_NUM_THREADS, the
    cores shared out.
    """
    if not torch.cuda.is_available():
        # a micro-batch's buffers come and go, and to ask the system for their pages anew takes a
        # tenth of a step
        os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**40))
    cores = len(os.sched_getaffinity(0))
    return os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // nproc, 1)))


def _require_free(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise BadInput(
                f"port {port} cannot be used ({error.strerror}): give another --port, or none to "
                f"take a free one"
            ) from None


def _rendezvous(
    endpoint: str, nodes: tuple[int, int], is_host: bool | None, run_id: str, join_s: int
) -> RendezvousHandler:
    """Where the nodes meet: the node that the endpoint names hosts it, the others wait for that
    one.
    """
    options: dict[str, Any] = {
        "join_timeout": join_s,
        "last_call_timeout": _LAST_CALL_S,
        "read_timeout": _STORE_S,
    }
    if nodes[1] == 1 or is_host is not None:
        options["is_host"] = nodes[1] == 1 or is_host
    parameters = RendezvousParameters("c10d", endpoint, run_id, *nodes, **options)
    end = time.monotonic() + join_s
    if is_host is False:
        _wait_for_host(endpoint, end)
    while True:
        try:
            return registry.get_rendezvous_handler(parameters)
        except RendezvousConnectionError:
            if time.monotonic() > end:
                raise BadInput(
                    f"nobody answers at {endpoint}: is it one of this run's nodes, and reachable?"
                ) from None
            time.sleep(1)


def _wait_for_host(endpoint: str, end: float) -> None:
    """Until somebody listens there. Torch's store would wait, too, but fills the log, and in a
    cluster it can last.
    """
    host, _, port = endpoint.rpartition(":")
    said = False
    while time.monotonic() < end:
        try:
            socket.create_connection((host, int(port)), timeout=_STORE_S).close()
            return
        except OSError as error:
            if not said:
                say(f"waiting for the first node at {endpoint} ({error})")
            said = True
            time.sleep(1)


# -------------------------------------------------------------------------------------------- after


def _conclude(result: RunResult | None, run_dir: Path, agent: Agent) -> int:
    if result is None:
        say("the run goes on without this node, and has ended")
        return FAILED
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    code = exit_code(codes.values(), stopped=(run_dir / STOP_FILE).exists())
    if code == SAVED_RUN_AGAIN:
        say("saved; the same command goes on from there")
    elif (
        code != DONE and codes.get(0) != BAD_INPUT
    ):  # rank 0 has said itself what is wrong with the input
        explain(codes, agent)
    agent.logs.drop_empty()
    return code


def exit_code(codes: Collection[int], stopped: bool) -> int:
    """The launcher's exit code from those of failed workers (negative: the signal that killed one)."""
    if BAD_INPUT in codes:
        return BAD_INPUT
    if any(codes):
        return FAILED
    return SAVED_RUN_AGAIN if stopped else DONE


def _why(error: RendezvousError, join_s: int) -> str:
    if isinstance(error, RendezvousClosedError):
        return "another node has ended the run; see its log"
    if isinstance(error, RendezvousTimeoutError):
        return f"too few nodes came within {join_s} s"
    return "the node of the rendezvous is gone; the same command goes on from the last checkpoint"
