"""Start a real Slurm on this machine: a controller and the nodes `cn1` and `cn2`.

Each node has its own network, name, processes and mounts, and claims eight GPUs, which are null
devices. Needs root, and Debian's packages slurmctld, slurmd, slurm-client, munge and iproute2.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cluster import network
from tests.ranks import ROOT

BRIDGE, NET, GPUS = "phslurm", "10.83.0", 8

CONFIG = """
ClusterName=packhorse
SlurmctldHost=phctl({net}.1)
SlurmctldPort=26917
SlurmdPort=26918
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_min_interval=100000
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=10
MinJobAge=3600
SlurmdTimeout=30
NodeName=DEFAULT CPUs=64 RealMemory=1048576 Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The cluster: `run` calls sbatch, scontrol and other commands; nodes can fail and return."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self.nodes = {f"cn{i}": f"{NET}.{10 + i}" for i in range(1, count + 1)}
        self._started: dict[str, subprocess.Popen] = {}
        packhorse = Path(sys.executable).parent  # jobs inherit the environment of their submission
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{packhorse}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=120
        )

    def submit(self, *command: str, **env: str) -> str:
        """Submit a script and return the job's number."""
        done = self.run(*command, **env)
        found = re.search(r"Submitted batch job (\d+)", done.stdout)
        assert found, done.stderr
        return found[1]

    def job(self, number: str) -> dict[str, str]:
        """Return what `scontrol show job` prints, as JobState, Restarts, ExitCode."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number).stdout))

    def wait(
        self,
        number: str,
        *states: str,
        restarts: int = 0,
        reason: str | None = None,
        seconds: float = 600,
    ) -> dict[str, str]:
        """Wait until the job is in one of the states, in that start and for that reason (at first
        Slurm says that it cleans up), and return it."""
        end = time.monotonic() + seconds
        while True:
            job = self.job(number)
            is_reason = reason in (None, job["Reason"])
            if job["JobState"] in states and int(job["Restarts"]) >= restarts and is_reason:
                return job
            assert job["JobState"] in (
                "PENDING",
                "CONFIGURING",
                "RUNNING",
                "COMPLETING",
                *states,
            ), job
            assert time.monotonic() < end, f"job {number} is {job['JobState']}, not {states}: {job}"
            time.sleep(0.2)

    def wait_idle(self) -> None:
        """Wait until all nodes are up and free of the last job."""
        self._until(lambda: self._idle() == len(self.nodes), "the nodes are not all idle")

    def start_now(self, number: str) -> None:
        """Start a requeued job without its usual delay of two minutes.

        A node treats credentials from before the second in which the last start ended as
        revoked, and the job as failed.
        """
        self._until(
            lambda: not self.run("sinfo", "-h", "-t", "completing", "-o", "%N").stdout,
            "a start does not end",
        )
        time.sleep(3)
        self.run("scontrol", "update", f"jobid={number}", "starttime=now")

    # ---------------------------------------------------------------------------------- up and down

    def up(self) -> None:
        self._write_config()
        network.link(
            BRIDGE, {f"ph-{node}": f"{address}/24" for node, address in self.nodes.items()}
        )
        network.ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        folder = self._folder
        sockets = [
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
            f"--seed-file={folder}/seed",
        ]
        keys = [f"--key-file={folder}/munge.key", f"--log-file={folder}/munged.log"]
        self._start("munged", "munged", "--force", "--foreground", *sockets, *keys)
        self._until(lambda: (folder / "munge.socket").exists(), "munged did not start")
        # a host's name of its own, because SlurmctldHost must equal it
        self._start(
            "slurmctld", "unshare", "--uts", "bash", "-c", "hostname phctl; exec slurmctld -D -i"
        )
        for node in self.nodes:
            self.revive(node)
        self.wait_idle()

    def down(self) -> None:
        for process in reversed(self._started.values()):
            _end(process)
        network.unlink(BRIDGE, [f"ph-{node}" for node in self.nodes])

    def revive(self, node: str) -> None:
        """Start slurmd as the child of the node's first process.

        Everything ends with that process, as on a host that dies.
        """
        # there is no DNS: asked in vain, it would take seconds for each name that the table does
        # not have
        inside = (
            'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nsswitch.conf" '
            "/etc/nsswitch.conf; "
            'slurmd -D -N "$1" & wait $!'
        )
        self._start(
            node, *network.enter(f"ph-{node}"), "bash", "-c", inside, "_", node, str(self._folder)
        )
        self._until(lambda: network.inside(self._started[node]), f"{node} did not start")

    def fail(self, node: str) -> None:
        _end(self._started.pop(node))

    def hide(self, node: str, folder: Path) -> None:
        """Give the node an empty folder of its own at this place from now on."""
        self._inside(node, "mount", "-t", "tmpfs", "tmpfs", str(folder))

    def show(self, node: str, folder: Path) -> None:
        self._inside(node, "umount", str(folder))

    def _inside(self, node: str, *command: str) -> None:
        (first,) = network.inside(self._started[node])
        subprocess.run(["nsenter", f"--mount=/proc/{first}/ns/mnt", *command], check=True)

    def _idle(self) -> int:
        return (
            self.run("sinfo", "-h", "-N", "-o", "%T").stdout.split().count("idle")
        )  # -t idle: completing ones, too

    def _start(self, name: str, *command: str) -> None:
        log = (self._folder / f"{name}.out").open("a")
        dies_with_us = ["setpriv", "--pdeathsig", "KILL"]
        self._started[name] = subprocess.Popen(
            [*dies_with_us, *command],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=0o022,
        )

    def _until(self, true, otherwise: str) -> None:
        end = time.monotonic() + 120
        while not true():
            if time.monotonic() > end:
                logs = [
                    f"--- {path}\n{path.read_text()[-1500:]}" for path in self._folder.glob("*.log")
                ]
                raise AssertionError("\n".join([otherwise, *logs]))
            time.sleep(0.2)

    def _write_config(self) -> None:
        folder = self._folder
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir()
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        addresses = {"localhost": "127.0.0.1", "phctl": f"{NET}.1", **self.nodes}
        (folder / "hosts").write_text(
            "".join(f"{address} {name}\n" for name, address in addresses.items())
        )
        others = [
            line
            for line in Path("/etc/nsswitch.conf").read_text().splitlines()
            if not line.startswith("hosts:")
        ]
        (folder / "nsswitch.conf").write_text("\n".join(["hosts: files", *others, ""]))
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address}" for name, address in self.nodes.items()
        )
        (folder / "slurm.conf").write_text(
            CONFIG.format(folder=folder, net=NET, gpus=GPUS, nodes=nodes)
        )
        for number in range(GPUS):  # slurmd registers a GPU by its file alone
            os.mknod(folder / f"nvidia{number}", 0o020666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu File={folder}/nvidia[0-{GPUS - 1}]\n"
        )


def _end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


@contextmanager
def slurm(folder: Path, count: int = 2) -> Iterator[Slurm]:
    made = Slurm(folder, count)
    made.down()  # what a killed test left
    try:
        made.up()
        yield made
    finally:
        made.down()
