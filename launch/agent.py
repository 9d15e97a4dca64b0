"""Start, watch and restart the workers of one node: torch's elastic agent with additions.

It passes signals to the workers, sends heartbeats to the other nodes, and begins each round without
state of the last one. A round is one start of workers on all nodes that met for it. The next round
begins after a worker failed, a node was lost or a node came back, while restarts are left.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from packhorse.launch.heartbeat import Heartbeat
from packhorse.trainer.datatypes import BAD_INPUT, FAILED, SAVED_RUN_AGAIN, STOP_FILE

_DAY_S = 86_400
_TAIL_LINES = 20  # of a failed rank's stderr that are shown


class Agent(LocalElasticAgent):
    """Start, watch and restart the workers of one node.

    Args:
        preflight: called with the round's store, this node's number and the number of nodes, if
            there are several. What it raises ends this launcher.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        run_dir: Path,
        preflight: Callable[[Any, int, int], None] | None = None,
    ) -> None:
        self._preflight = preflight
        self.logs = RankLogs(run_dir / "logs")
        self.lost: str | None = None  # hosts that stopped their heartbeats in this round
        self._stop_file = run_dir / STOP_FILE
        self._heartbeat: Heartbeat | None = None
        self._is_done = False  # waits for the other nodes to be
        # A node whose workers are done waits here for the others. The heartbeats end the wait if
        # one of them dies, so the barrier itself needs no timeout.
        super().__init__(spec, self.logs, exit_barrier_timeout=_DAY_S)

    def workers(self) -> list[Any]:
        """Return the running workers, as subprocess.Popen."""
        context: Any = self._pcontext
        handlers = context.subprocess_handlers.values() if context else ()
        return [handler.proc for handler in handlers if handler.proc.poll() is None]

    def kill_workers(self) -> None:
        for worker in self.workers():
            worker.kill()

    @property
    def is_between_rounds(self) -> bool:
        return self._worker_group.state in (WorkerState.INIT, WorkerState.STOPPED)

    def close(self) -> None:
        """Tell the other nodes that this one takes part in no further round."""
        self._rdzv_handler.shutdown()
        if self._heartbeat:
            self._heartbeat.close()

    # The methods below override steps of torch's agent. A decorator of torch hides `super()` from
    # pyright.

    def _rendezvous(self, worker_group: Any) -> None:
        if self._heartbeat:
            self._heartbeat.close()
        self.lost = None
        # The stop file of the last round would turn this round's success into exit code 75. That of
        # an earlier start is rank 0's to delete, once the run folder is its own.
        if self.logs.name:
            self._stop_file.unlink(missing_ok=True)
        super()._rendezvous(worker_group)  # pyright: ignore[reportCallIssue]
        store: Any = self._store
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid()}"
        # all nodes take the name that the first one writes
        self.logs.name = store.compare_set("packhorse/logs", "", stamp).decode()
        assert re.fullmatch(r"[0-9-]+", self.logs.name), self.logs.name  # a folder in the run's
        node, nodes = worker_group.group_rank, worker_group.group_world_size
        self._heartbeat = None
        if nodes > 1:
            if self._preflight:
                self._preflight(store, node, nodes)
            # a store serves one thread at a time: the heartbeat gets a connection of its own
            self._heartbeat = Heartbeat(store.clone(), node, nodes, self._end_round, self._exit)

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        """Start the workers with SIGTERM and SIGUSR1 blocked.

        A worker unblocks them when its handlers are set (trainer/dist.py). So a signal in its first
        seconds also makes it save and stop, instead of killing it.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
        try:
            return super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        if {BAD_INPUT, SAVED_RUN_AGAIN} & set(codes.values()):
            self._remaining_restarts = 0  # bad input would fail again, and a stop was asked for
        elif codes and self._remaining_restarts:
            log_failure(codes, self)
            log(
                f"restarting from the last checkpoint; {self._remaining_restarts - 1} restarts "
                f"left after this one"
            )
        return result

    def _stop_workers(self, worker_group: Any) -> None:
        # Healthy workers are stopped only to let another node in. They save first, and a save of a
        # large model takes minutes.
        if worker_group.state == WorkerState.HEALTHY:
            log("another node wants to join: the workers save, then restart together with it")
            context: Any = self._pcontext
            context.close(signal.SIGTERM, _DAY_S)  # torch 2.11's _shutdown takes no time
        else:
            self._shutdown()

    def _exit_barrier(self) -> None:
        self._is_done = True
        try:
            super()._exit_barrier()
        finally:
            self._is_done = False

    def _end_round(self, hosts: str) -> None:
        """Kill the workers: they wait for lost nodes in a collective. torch then sees a failure."""
        self.lost = hosts
        log(f"no heartbeat from {hosts}: ending this node's workers, which wait for it")
        if self._is_done:
            self._exit("its work was not done")
        self.kill_workers()

    def _exit(self, why: str) -> None:
        """End this launcher at once. The main thread may be waiting for the network."""
        log(f"{why}: exit code {FAILED}; run the same command to resume from the last checkpoint")
        self.kill_workers()
        os._exit(FAILED)


class RankLogs(LogsSpecs):
    """Show rank 0 on this terminal; let every other rank write files in a folder of the round."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self.name = ""  # of the round's folder
        self._files: list[Path] = []  # of this node's ranks in this round

    @property
    def root_log_dir(self) -> str:
        return str(self._root)

    @property
    def folder(self) -> Path:
        return self._root / self.name

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return where each local rank writes to; `""` is this terminal."""
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        if any(ranks.values()):
            self.folder.mkdir(parents=True, exist_ok=True)
            log(f"the output of ranks other than 0 is in {self.folder}")
        files = {
            stream: {local: self.path(rank, stream) for local, rank in ranks.items() if rank}
            for stream in ("out", "err")
        }
        self._files = [path for paths in files.values() for path in paths.values()]
        on_terminal = dict.fromkeys(ranks, "")
        return LogsDest(
            stdouts=on_terminal | {local: str(path) for local, path in files["out"].items()},
            stderrs=on_terminal | {local: str(path) for local, path in files["err"].items()},
            error_files=on_terminal,
        )

    def path(self, rank: int, stream: str) -> Path:
        return self.folder / f"rank{rank:05d}.{stream}"

    def drop_empty(self) -> None:
        """Delete this node's empty log files, and the folder if nothing is left in it.

        Other nodes do the same with their files in the folder, perhaps at this moment.
        """
        for path in self._files:
            if path.exists() and path.stat().st_size == 0:
                path.unlink()
        with suppress(OSError):  # not empty, or another node was faster
            self.folder.rmdir()


def log_failure(codes: dict[int, int], agent: Agent) -> None:
    """Log which rank failed first, and the end of its stderr. The other ranks fell with it.

    Args:
        codes: exit codes of this node's failed ranks; a negative one is the signal that killed it.
    """
    if agent.lost:  # it was logged when the heartbeat stopped
        return
    bad_input = [rank for rank, code in codes.items() if code == BAD_INPUT]
    rank = bad_input[0] if bad_input else next(iter(codes))
    code = codes[rank]
    # a real-time signal has no name
    names = {number.value: number.name for number in signal.Signals}
    how = f"exit code {code}" if code > 0 else f"killed by {names.get(-code, f'signal {-code}')}"
    if rank == 0:
        log(f"rank 0 failed ({how}); its output is above")
        return
    path = agent.logs.path(rank, "err")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        log(f"rank {rank} failed ({how}) and wrote no error")
        return
    log(f"rank {rank} failed ({how}); the end of {path}:")
    for line in lines[-_TAIL_LINES:]:
        log(f"  {line}")


def log(text: str) -> None:
    """Write a line to stderr, unbuffered: signal handlers and threads call this, too."""
    os.write(2, f"packhorse: {text}\n".encode())
