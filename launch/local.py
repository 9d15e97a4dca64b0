"""Start the workers of one node, pass signals on to them, and turn what became of them into an exit code (C9).

In: a worker's command and the run folder. Out: 0, 1, 2 or 75 (trainer/flow.py). Torch's elastic agent starts
and watches the processes, inside this one. What is done differently from torchrun, and why:

- torchrun kills workers 30 s after SIGTERM and dies of SIGUSR1. Here both are passed on, and the workers are
  waited for however long their save takes.
- torchrun makes every failure exit code 1. Here a worker's 2 (bad input) stays 2, and a saved run is 75.
- Only rank 0 speaks; the other ranks write to files in the run folder, shown when one of them fails.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

from trainer.flow import BAD_INPUT, DONE, FAILED, SAVED_RUN_AGAIN, STOP_FILE, BadInput

_TAIL_LINES = 20
_CTRL_C_TO_KILL = 3
# SIGHUP: the terminal went away. SIGQUIT (Ctrl-\) is left to torch's agent, which ends the workers without a save.
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def launch(
    worker: Sequence[str],
    run_dir: Path,
    *,
    nproc: int | None = None,
    endpoint: str = "localhost:0",
    nodes: int = 1,
    run_id: str | None = None,
) -> int:
    """Run `python *worker` in `nproc` processes on this node until all have ended. Returns the exit code.

    Args:
        worker: arguments of this Python, as `["-m", "trainer.cli", "train", "recipe.yaml"]`.
        run_dir: where `stop.json` appears, and where ranks other than 0 write `logs/`.
        nproc: processes on this node; all GPUs, or one where there is none.
        endpoint: host:port of the rendezvous; port 0 takes a free one, on a single node only.
        nodes: launchers that meet at the endpoint, each with the same `run_id`.
        run_id: names this start, in the logs and at the rendezvous.

    Raises:
        BadInput: more processes than GPUs, or the port is in use.
    """
    nproc = _processes(nproc)
    if nodes == 1:
        _require_free(endpoint)
    run_id = run_id or time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid()}"
    threads = _set_threads(nproc)
    logs = _RankLogs(run_dir / "logs" / run_id)
    where = f"; other ranks write to {logs.folder}" if nproc > 1 else ""
    _say(f"{nproc} {'process' if nproc == 1 else 'processes'} with OMP_NUM_THREADS={threads}{where}")
    (run_dir / STOP_FILE).unlink(missing_ok=True)

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # said below, in fewer words
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    spec = WorkerSpec(
        role="trainer",
        local_world_size=nproc,
        entrypoint=sys.executable,
        # torch's agent substitutes $local_rank and the like in arguments
        args=tuple(argument.replace("$", "$$") for argument in worker),
        rdzv_handler=registry.get_rendezvous_handler(_rendezvous(endpoint, nodes, run_id)),
        max_restarts=0,
        local_addr="localhost" if nodes == 1 else None,
    )
    agent = _Agent(spec, logs)
    try:
        with _passing_signals(agent):
            result: Any = agent.run()
    except _NotStartedError:
        _say("stopped before the workers had started")
        return SAVED_RUN_AGAIN
    except SignalException:
        _say("quit without a save")
        return FAILED
    return _conclude(result, run_dir, logs)


class _Agent(LocalElasticAgent):
    """Torch's agent, whose workers can be sent signals."""

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        """Start them with the stop signals held back: a worker lets them in when it is ready for them
        (trainer/dist.py), so that a signal in its first seconds stops it in order, too."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
        try:
            return super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue] - torch's decorator hides it
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def workers(self) -> list[Any]:
        """The started processes, as subprocess.Popen."""
        context: Any = self._pcontext
        return [handler.proc for handler in context.subprocess_handlers.values()] if context else []


class _NotStartedError(Exception):
    """A signal came before there were workers."""


@contextmanager
def _passing_signals(agent: _Agent) -> Iterator[None]:
    """Inside, signals go to the workers, and this process waits for them. A third Ctrl-C kills them."""
    interrupts = 0

    def pass_on(number: int, _frame: Any) -> None:
        nonlocal interrupts
        workers = agent.workers()
        if not workers:
            raise _NotStartedError
        interrupts += number == signal.SIGINT
        if interrupts >= _CTRL_C_TO_KILL:
            for worker in workers:
                worker.kill()
            return
        # Workers lead sessions of their own: the terminal's Ctrl-C reaches this process alone.
        asked = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        for worker in workers:
            worker.send_signal(asked)
        once_more = f"; Ctrl-C {_CTRL_C_TO_KILL - interrupts} more times kills them" if interrupts else ""
        _say(f"{signal.Signals(number).name}: the workers save and stop{once_more}")

    # a signal that is ignored (nohup) stays ignored
    taken = [number for number in _PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------- before


def _processes(asked: int | None) -> int:
    gpus = torch.cuda.device_count()
    if asked is None:
        return max(gpus, 1)
    if 0 < gpus < asked:
        raise BadInput(f"--nproc {asked}: this machine has {gpus} GPUs; ask for at most as many")
    return asked


def _set_threads(nproc: int) -> str:
    """OMP_NUM_THREADS of the workers: the cores shared out, where the user has not said otherwise."""
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
                f"port {port} cannot be used ({error.strerror}): give another --port, or none to take a free one"
            ) from None


def _rendezvous(endpoint: str, nodes: int, run_id: str) -> RendezvousParameters:
    host: dict[str, Any] = {"is_host": True} if nodes == 1 else {}  # of several nodes torch finds it by its name
    return RendezvousParameters("c10d", endpoint, run_id, nodes, nodes, **host)


class _RankLogs(LogsSpecs):
    """Rank 0 writes to this terminal, every other rank to files of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        if any(ranks.values()):
            self.folder.mkdir(parents=True, exist_ok=True)
        return LogsDest(
            stdouts={local: str(self.path(rank, "out")) if rank else "" for local, rank in ranks.items()},
            stderrs={local: str(self.path(rank, "err")) if rank else "" for local, rank in ranks.items()},
            error_files=dict.fromkeys(ranks, ""),
        )

    def path(self, rank: int, stream: str) -> Path:
        return self.folder / f"rank{rank:05d}.{stream}"

    def drop_empty(self) -> None:
        """Leave what there is to read: most ranks say nothing."""
        for path in self.folder.glob("rank*"):
            if path.stat().st_size == 0:
                path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


# ----------------------------------------------------------------------------------------------- after


def _conclude(result: RunResult | None, run_dir: Path, logs: _RankLogs) -> int:
    if result is None:
        _say("another node closed the rendezvous; see its log")
        return FAILED
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    code = exit_code(codes.values(), stopped=(run_dir / STOP_FILE).exists())
    if code == SAVED_RUN_AGAIN:
        _say("saved; the same command goes on from there")
    elif code != DONE and codes.get(0) != BAD_INPUT:  # rank 0 has said itself what is wrong with the input
        _explain(codes, logs)
    logs.drop_empty()
    return code


def exit_code(codes: Collection[int], stopped: bool) -> int:
    """The launcher's exit code from those of failed workers (negative: the signal that killed one)."""
    if BAD_INPUT in codes:
        return BAD_INPUT
    if any(codes):
        return FAILED
    return SAVED_RUN_AGAIN if stopped else DONE


def _explain(codes: dict[int, int], logs: _RankLogs) -> None:
    """Show once which rank failed first (the others fell with it), and its last lines."""
    bad_input = [rank for rank, code in codes.items() if code == BAD_INPUT]
    rank = bad_input[0] if bad_input else next(iter(codes))
    code = codes[rank]
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    if rank == 0:
        _say(f"rank 0 failed ({how}); what it said is above")
        return
    path = logs.path(rank, "err")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        _say(f"rank {rank} failed ({how}) without a word")
        return
    _say(f"rank {rank} failed ({how}); the end of {path}:")
    for line in lines[-_TAIL_LINES:]:
        _say(f"  {line}")


def _say(text: str) -> None:
    os.write(2, f"packhorse: {text}\n".encode())  # unbuffered: a signal handler says things, too
