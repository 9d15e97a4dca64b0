"""Torch's elastic agent, with what a launcher of training runs needs beside: signals for the
workers, a watch on the other nodes, and starts that carry nothing over from the last one.

A round is one start of workers, on all nodes that met for it. Another one follows where workers
failed, a node was lost, or one came back, as long as restarts are left.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from launch.heartbeat import Peers
from trainer.datatypes import BAD_INPUT, FAILED, STOP_FILE

_DAY_S = 86_400


class Agent(LocalElasticAgent):
    """Starts, watches and restarts the workers of one node.

    Args:
        preflight: called with the round's store, this node's number, the number of nodes and the
            round's name, where there are several; what it raises ends this launcher.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        run_dir: Path,
        preflight: Callable[[Any, int, int, str], None] | None = None,
    ) -> None:
        self._preflight = preflight
        self.logs = RankLogs(run_dir / "logs")
        self.lost: str | None = None  # the nodes that fell silent in this round
        self._stop_file = run_dir / STOP_FILE
        self._peers: Peers | None = None
        # once its workers are done, a node waits for the others' last words; one that dies
        # meanwhile is missed
        super().__init__(spec, self.logs, exit_barrier_timeout=_DAY_S)

    def workers(self) -> list[Any]:
        """The processes that run, as subprocess.Popen."""
        context: Any = self._pcontext
        started = (
            [handler.proc for handler in context.subprocess_handlers.values()] if context else []
        )
        return [process for process in started if process.poll() is None]

    def kill_workers(self) -> None:
        for worker in self.workers():
            worker.kill()

    @property
    def is_between_rounds(self) -> bool:
        return self._worker_group.state in (WorkerState.INIT, WorkerState.STOPPED)

    def close(self) -> None:
        """Tell the other nodes that this one takes part in no other round."""
        self._rdzv_handler.shutdown()
        if self._peers:
            self._peers.close()

    # What follows overrides steps of torch's agent; `super()` is hidden from pyright by torch's decorator.

    def _rendezvous(self, worker_group: Any) -> None:
        if self._peers:
            self._peers.close()
        self.lost = None
        self._stop_file.unlink(missing_ok=True)  # the last round's, whose workers have ended
        # torch 2.13 hands the workers' store on from round to round, with addresses of processes
        # that are gone; nodes other than the first keep the address of its host, too
        handler: Any = self._rdzv_handler
        handler._bootstrap_store_info = handler._shared_tcp_store_server = None
        super()._rendezvous(worker_group)  # pyright: ignore[reportCallIssue]
        store: Any = self._store
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid()}"
        self.logs.name = store.compare_set("packhorse/logs", "", stamp).decode()  # the first node's
        node, nodes = worker_group.group_rank, worker_group.group_world_size
        if nodes > 1 and self._preflight:
            self._preflight(store, node, nodes, self.logs.name)
        self._peers = (
            Peers(store.clone(), node, nodes, self._end_round, self._end) if nodes > 1 else None
        )

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        """Start them with the stop signals held back: a worker lets them in when it is ready for
        them (trainer/dist.py), so that a signal in its first seconds stops it in order, too."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
        try:
            return super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        if BAD_INPUT in codes.values():
            self._remaining_restarts = 0  # it would fail again
        elif codes and self._remaining_restarts:
            explain(codes, self)
            say(
                f"starting again from the last checkpoint, {self._remaining_restarts - 1} restarts "
                f"left after this one"
            )
        return result

    def _stop_workers(self, worker_group: Any) -> None:
        """Healthy workers are stopped because another node wants in: they save first, however long
        that takes.
        """
        if worker_group.state == WorkerState.HEALTHY:
            say("a node waits to join: the workers save, and start again with it")
            self._shutdown(timeout=_DAY_S)
        else:
            self._shutdown()

    def _end_round(self, silent: str) -> None:
        """Other nodes are gone. Workers wait for them without end: killed, they are a failure that
        torch handles.
        """
        self.lost = silent
        say(f"{silent} fell silent: ending this node's workers, which wait for it")
        if self._in_exit_barrier:
            self._end("its work was not done")
        self.kill_workers()

    def _end(self, why: str) -> None:
        """This node cannot go on. The main thread may wait for the network: it is not asked."""
        say(f"{why}: ending; the same command goes on from the last checkpoint")
        self.kill_workers()
        os._exit(FAILED)


class RankLogs(LogsSpecs):
    """Rank 0 writes to this terminal, every other rank to files of its own, in a folder for each
    round.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self.name = ""  # of the round's folder
        self._files: list[Path] = []  # of this node's ranks, in this round

    @property
    def root_log_dir(self) -> str:
        return str(self._root)

    @property
    def folder(self) -> Path:
        return self._root / self.name

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        if any(ranks.values()):
            self.folder.mkdir(parents=True, exist_ok=True)
            say(f"ranks other than 0 write to {self.folder}")
        self._files = [
            self.path(rank, stream) for rank in ranks.values() if rank for stream in ("out", "err")
        ]
        return LogsDest(
            stdouts={
                local: str(self.path(rank, "out")) if rank else "" for local, rank in ranks.items()
            },
            stderrs={
                local: str(self.path(rank, "err")) if rank else "" for local, rank in ranks.items()
            },
            error_files=dict.fromkeys(ranks, ""),
        )

    def path(self, rank: int, stream: str) -> Path:
        return self.folder / f"rank{rank:05d}.{stream}"

    def drop_empty(self) -> None:
        """Leave what there is to read: most ranks say nothing. Other nodes write to the folder,
        too, and do the same with their own files, perhaps at this moment."""
        for path in self._files:
            if path.exists() and path.stat().st_size == 0:
                path.unlink()
        with suppress(OSError):  # not empty, or another node was faster
            self.folder.rmdir()


_TAIL_LINES = 20


def explain(codes: dict[int, int], agent: Agent) -> None:
    """Show once which rank failed first (the others fell with it), and its last lines.

    Args:
        codes: exit codes of this node's ranks that failed; negative: the signal that killed one.
    """
    if agent.lost:  # said when it was seen
        return
    bad_input = [rank for rank, code in codes.items() if code == BAD_INPUT]
    rank = bad_input[0] if bad_input else next(iter(codes))
    code = codes[rank]
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    if rank == 0:
        say(f"rank 0 failed ({how}); what it said is above")
        return
    path = agent.logs.path(rank, "err")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        say(f"rank {rank} failed ({how}) without a word")
        return
    say(f"rank {rank} failed ({how}); the end of {path}:")
    for line in lines[-_TAIL_LINES:]:
        say(f"  {line}")


def say(text: str) -> None:
    os.write(
        2, f"packhorse: {text}\n".encode()
    )  # unbuffered: signal handlers and threads say things, too
