"""Start the workers of one node, pass signals on to them, and return one exit code (C9).

In: a worker's command and the run folder. Out: 0, 1, 2 or 75 (trainer/datatypes.py). Torch's
elastic agent starts and watches the processes, inside this one (launch/agent.py). What differs from
torchrun, and why:

- torchrun kills workers 30 s after SIGTERM, and SIGUSR1 kills torchrun. Here both are passed on,
  and the launcher waits until the workers have saved, however long that takes.
- torchrun turns every failure into exit code 1. Here a worker's 2 (bad input) stays 2, and a saved
  run is 75.
- torchrun notices a lost node only when its workers' collectives time out. Here heartbeats notice
  it within seconds.
- Only rank 0 writes to the terminal. The other ranks write to files in the run folder, of which the
  end is shown when one of them fails.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)

from packhorse.launch import preflight, rendezvous
from packhorse.launch.agent import Agent, log, log_failure
from packhorse.launch.cluster_env import JOIN_S
from packhorse.launch.signed_store import Forged
from packhorse.trainer.config.recipe import Recipe
from packhorse.trainer.datatypes import (
    BAD_INPUT,
    DONE,
    FAILED,
    LAUNCHER,
    SAVED_RUN_AGAIN,
    STOP_FILE,
    BadInput,
)

_CTRL_C_TO_KILL = 3
# SIGHUP: the terminal was closed. SIGQUIT (Ctrl-\) is left to torch's agent, which ends the workers
# without a save.
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


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
    join_s: int = JOIN_S,
    recipe: Recipe | None = None,
) -> int:
    """Run `python *worker` in `nproc` processes on this node and return the exit code at their end.

    Args:
        worker: arguments of this Python, as `[MAIN, "train", "recipe.yaml"]`.
        run_dir: the run folder, where `stop.json` appears and ranks other than 0 write `logs/`.
        nproc: None: one for each GPU, or one without a GPU.
        endpoint: host:port of the rendezvous. A single node uses the port alone; 0: a free one.
        nodes: least and most launchers that meet at the endpoint.
        is_host: whether this node is the rendezvous host. None: torch compares the endpoint's name
            with this host's.
        restarts: how often the workers are restarted after a failure, on the nodes that are left.
        run_id: the same in all launchers of a run, and in no other run that meets at the endpoint.
        join_s: seconds to wait for the least number of nodes.
        recipe: what several nodes compare before the workers start (launch/preflight.py).

    Raises:
        BadInput: there are too few GPUs, the endpoint cannot be used, or the nodes differ.
    """
    nproc = _resolve_nproc(nproc)
    if nodes[1] == 1:
        _require_free_port(endpoint)
    _set_environment(nproc)
    # torch's own lines say the same as ours, with a traceback for each rank
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    check = partial(preflight.check_nodes, recipe, nproc, log) if recipe else None
    try:
        run_id = run_id or run_dir.resolve().name
        handler = rendezvous.meet(endpoint, nodes, is_host, run_id, join_s, run_dir, log)
        spec = WorkerSpec(
            role="trainer",
            local_world_size=nproc,
            entrypoint=sys.executable,
            # torch's agent replaces $local_rank and other variables in arguments
            args=tuple(word.replace("$", "$$") for word in worker),
            rdzv_handler=handler,
            max_restarts=restarts,
        )
        agent = Agent(spec, run_dir, check)
        with closing(agent), _passing_signals(agent):
            result: Any = agent.run()
    except Forged as error:
        raise BadInput(str(error)) from None
    except (_NotStartedError, SignalException, RendezvousError, preflight.NoAnswer) as error:
        log(_describe(error, join_s))
        return SAVED_RUN_AGAIN if isinstance(error, _NotStartedError) else FAILED
    return _conclude(result, run_dir, agent)


class _NotStartedError(Exception):
    """A signal came while no workers were running."""


@contextmanager
def _passing_signals(agent: Agent) -> Iterator[None]:
    """Pass signals to the workers while the block runs. The third Ctrl-C kills the workers."""
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
        # Workers lead sessions of their own: the terminal's Ctrl-C reaches only this process.
        passed = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        for worker in workers:
            worker.send_signal(passed)
        left = _CTRL_C_TO_KILL - interrupts
        warning = f"; Ctrl-C {left} more times kills them" if interrupts else ""
        log(f"{signal.Signals(number).name}: the workers save and stop{warning}")

    # a signal that is ignored (nohup) stays ignored
    taken = [number for number in _PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- before


def _resolve_nproc(nproc: int | None) -> int:
    gpus = torch.cuda.device_count()
    if nproc is None:
        return max(gpus, 1)
    if 0 < gpus < nproc:
        raise BadInput(f"--nproc {nproc}: this machine has {gpus} GPUs; give at most that many")
    return nproc


def _set_environment(nproc: int) -> None:
    """Set variables for the workers unless the user has set them."""
    if not torch.cuda.is_available():
        # On a CPU the buffers of a micro-batch come from malloc. To give their pages back to the
        # system and ask for them anew takes a tenth of a step.
        os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**40))
    elif "PYTORCH_ALLOC_CONF" not in os.environ:
        # micro-batches differ in length: segments that grow leave fewer gaps between blocks
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ[LAUNCHER] = str(os.getpid())
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // nproc, 1)))
    log(f"{nproc} {'process' if nproc == 1 else 'processes'} with OMP_NUM_THREADS={threads}")


def _require_free_port(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_server((host, int(port))).close()
    except OSError as error:
        # create_server's own text has the system's twice; a name that is not found has no errno > 0
        why = os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror
        raise BadInput(
            f"port {port} cannot be used ({why}): give another --port, or leave it out to take a "
            "free one"
        ) from None


# -------------------------------------------------------------------------------------------- after


def _conclude(result: RunResult | None, run_dir: Path, agent: Agent) -> int:
    """Log how the run ended on this node and return the exit code."""
    if result is None:
        log("the run ended on the other nodes, which had continued without this one")
        return FAILED
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    code = exit_code(codes.values(), stopped=(run_dir / STOP_FILE).exists())
    if code == SAVED_RUN_AGAIN:
        log("saved; run the same command to resume")
    elif code != DONE and codes.get(0) != BAD_INPUT:  # rank 0 shows its own sentence
        log_failure(codes, agent)
    agent.logs.drop_empty()
    return code


def exit_code(codes: Collection[int], stopped: bool) -> int:
    """Return the launcher's exit code.

    Args:
        codes: exit codes of failed workers; a negative one is the signal that killed the worker.
        stopped: the workers saved and stopped because they were asked to.
    """
    if BAD_INPUT in codes:
        return BAD_INPUT
    # a worker was asked to stop a second time, before the first step
    if SAVED_RUN_AGAIN in codes and FAILED not in codes:
        return SAVED_RUN_AGAIN
    if any(codes):
        return FAILED
    return SAVED_RUN_AGAIN if stopped else DONE


def _describe(error: Exception, join_s: int) -> str:
    if isinstance(error, _NotStartedError):
        return "stopped before the workers had started"
    if isinstance(error, SignalException):
        return "SIGQUIT: ended without a save"
    if isinstance(error, preflight.NoAnswer):
        return str(error)
    if isinstance(error, RendezvousClosedError):
        return "another node has ended the run; see its log"
    if isinstance(error, RendezvousTimeoutError):
        return f"too few nodes joined within {join_s} s"
    return "the rendezvous host is lost; run the same command to resume from the last checkpoint"
