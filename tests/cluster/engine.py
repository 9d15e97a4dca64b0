"""Start a Docker engine for the tests, and build the project's image with it.

Needs root, docker.io and mmdebstrap. The engine has its own folder and socket, and does not touch
the machine's network rules. The image is the CPU flavour of docker/Dockerfile. Its bases, which no
test may download, are replaced by a Debian made from packages. pip in a build finds the packages
that pip finds on this machine.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.ranks import ROOT

DOCKER = "/usr/bin/docker"  # Debian's own client, which needs no plugin to build
BASE, IMAGE = "localhost/debian:bookworm", "localhost/packhorse:cpu"
NETWORK, BRIDGE, SUBNET = "packhorse-test", "phdocker", "10.81.0.0/24"


class Engine:
    """`dockerd` and its client, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environ = os.environ | {
            "DOCKER_HOST": f"unix://{folder}/socket",
            "DOCKER_BUILDKIT": "1",
        }
        self._daemon: subprocess.Popen | None = None
        self.pip: dict[str, str] = {}  # build arguments that say where packages are

    def up(self) -> None:
        self._down_bridge()  # that a killed test left
        own = self._folder
        places = [
            f"--data-root={own}/data",
            f"--exec-root={own}/exec",
            f"--pidfile={own}/pid",
            f"--host=unix://{own}/socket",
        ]
        network = [
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
            "--ip-masq=false",
            "--ip-forward=false",
        ]
        log = self._folder / "log"
        with log.open("w") as file:
            self._daemon = subprocess.Popen(
                ["dockerd", *places, *network, "--userland-proxy=false"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + 60
        while self._run("version").returncode:
            if self._daemon.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the engine did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        bridge = f"--opt=com.docker.network.bridge.name={BRIDGE}"
        self.run("network", "create", bridge, f"--subnet={SUBNET}", NETWORK)

    def down(self) -> None:
        """Stop everything that the engine runs, the engine itself, and delete its folder."""
        if self._daemon and self._daemon.poll() is None:
            containers = self._run("ps", "-aq").stdout.split()
            self._run("rm", "--force", *containers)
            self._run("network", "rm", NETWORK)
            self._daemon.terminate()
            try:
                self._daemon.wait(60)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        self._down_bridge()
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{self._folder}/"):
                subprocess.run(["umount", "--lazy", line.split()[1]], check=False)
        # hundreds of thousands of files take minutes, for which no test waits
        subprocess.Popen(["rm", "-rf", self._folder], start_new_session=True)

    def _down_bridge(self) -> None:
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [DOCKER, *words], env=self._environ, capture_output=True, text=True, check=False
        )

    def run(self, *words: str) -> str:
        """Return the output of `docker *words`, which must not fail."""
        done = self._run(*words)
        said = done.stdout[-6000:] + done.stderr[-6000:]
        assert done.returncode == 0, (
            f"docker {' '.join(words)} ended with {done.returncode}:\n{said}"
        )
        return done.stdout

    def fails(self, *words: str) -> str:
        """Return the output of `docker *words`, which must fail."""
        done = self._run(*words)
        assert done.returncode != 0, (
            f"docker {' '.join(words)} should have failed:\n{done.stdout[-3000:]}"
        )
        return done.stdout + done.stderr

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [DOCKER, *words],
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    # --------------------------------------------------------------------------------------- images

    def make_base(self) -> None:
        """Make a minimal Debian that trusts the same certificates as this machine."""
        context = self._folder / "base"
        context.mkdir()
        packages = "--include=apt,ca-certificates"
        subprocess.run(
            [
                "mmdebstrap",
                "--mode=root",
                "--variant=minbase",
                packages,
                "bookworm",
                context / "base.tar",
            ],
            check=True,
            capture_output=True,
        )
        (context / "certificates").mkdir()
        for certificate in Path("/usr/local/share/ca-certificates").glob("*.crt"):
            shutil.copy(certificate, context / "certificates")
        (context / "pip.conf").write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n")
        (context / "Dockerfile").write_text(
            "FROM scratch\nADD base.tar /\nCOPY certificates/ /usr/local/share/ca-certificates/\n"
            "COPY pip.conf /etc/pip.conf\nRUN update-ca-certificates \\\n"
            # as Debian's own image has it
            "  && echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/speed\n"
        )
        self.run(
            "build", "--network=host", "--tag", BASE, str(context)
        )  # BuildKit knows host and none
        shutil.rmtree(context)

    def build(self, *words: str) -> list[str]:
        """Return the arguments of a `docker build` of docker/Dockerfile's CPU flavour."""
        arguments = {"BASE_IMAGE": BASE, "RUNTIME_IMAGE": BASE, "FLAVOUR": "cpu", **self.pip}
        given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        return [
            "build",
            "--network=host",
            f"--file={ROOT}/docker/Dockerfile",
            *given,
            *words,
            str(ROOT),
        ]


@contextmanager
def packages() -> Iterator[dict[str, str]]:
    """Return this machine's package sources as pip settings, with local folders served."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    )
    settings = {
        name: value
        for name, _, value in (line.partition("=") for line in listed.stdout.splitlines())
    }
    with tempfile.TemporaryDirectory() as folder:
        handler = functools.partial(_Quiet, directory=folder)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield {
                    f"PIP_{name.upper().replace('-', '_')}": _served(
                        _setting(settings, name),
                        Path(folder),
                        f"http://127.0.0.1:{server.server_port}",
                    )
                    for name in ("find-links", "index-url", "extra-index-url")
                    if _setting(settings, name)
                }
            finally:
                server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        pass


def _setting(settings: dict[str, str], name: str) -> list[str]:
    values = [
        settings.get(f"{level}.{name}", "''")
        for level in (":env:", "global", "user", "site", "install")
    ]
    return [place for value in values for place in value.strip("'").replace("\\n", " ").split()]


def _served(places: Sequence[str], folder: Path, address: str) -> str:
    """Return the sources, with local folders replaced by addresses below `address`."""
    found = []
    for place in dict.fromkeys(places):
        path = Path(place.removeprefix("file://"))
        if path.is_absolute():  # an index refers to files that lie beside it
            link = folder / path.parent.relative_to("/").as_posix().replace("/", "-")
            if not link.exists():
                link.symlink_to(path.parent)
            place = f"{address}/{link.name}/{path.name}"
        found.append(place)
    return " ".join(found)


@contextmanager
def engine() -> Iterator[Engine]:
    """Give an engine that has the image."""
    made = Engine(Path(tempfile.mkdtemp(prefix="packhorse-engine-")))
    try:
        made.up()
        made.make_base()
        with packages() as made.pip:
            made.run(*made.build("--tag", IMAGE))
            yield made
    finally:
        made.down()
