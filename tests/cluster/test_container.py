"""The real image, CPU flavour, run as clusters run it: any user, read-only root, no privileges.

If selected, these tests run: without root, docker.io or mmdebstrap they fail.
"""

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from packhorse import __version__
from packhorse.trainer.checkpoint import checkpoint
from packhorse.trainer.utils.json_lines import read_json_lines
from tests.cluster.engine import IMAGE, NETWORK, Engine, engine
from tests.ranks import ROOT

# the image compiles DeepSpeed's ops, in .ci/run beside the whole runs
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")
DEBUG = ("train", "recipes/debug.yaml")
NO_EVALUATION = ("data.eval=[]", "eval.every_steps=null", "eval.generate=null")
ENDLESS = ("train.epochs=1000", "checkpoint.every_steps=null", *NO_EVALUATION)


@pytest.fixture(scope="module")
def docker() -> Iterator[Engine]:
    with engine() as made:
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the host's folder of runs, which any user can write to, as the cache beside it."""
    folder = tmp_path_factory.mktemp("volumes")
    for name in ("runs", "cache"):
        (folder / name).mkdir()
        (folder / name).chmod(0o1777)
    return folder / "runs"


def words(runs: Path, name: str, *options: str) -> list[str]:
    """Return a hardened `docker run` of the image with volumes, without its arguments."""
    volumes = [f"--volume={runs}:/runs", f"--volume={runs.parent / 'cache'}:/cache"]
    return [
        "run",
        "--rm",
        f"--name={name}",
        f"--network={NETWORK}",
        *HARDENED,
        "--env=OMP_NUM_THREADS=1",
        *volumes,
        *options,
        IMAGE,
    ]


def inside(docker: Engine, *command: str) -> str:
    """Return the output of a command in a bare container of the image."""
    return docker.run(
        "run", "--rm", f"--entrypoint={command[0]}", "--network=none", IMAGE, *command[1:]
    )


def test_the_bill_of_materials_has_the_images_packages(docker):
    bill = json.loads(inside(docker, "cat", "sbom.json"))
    assert bill["metadata"]["component"]["version"] == __version__
    assert {"torch", "deepspeed", "transformers"} <= {part["name"] for part in bill["components"]}


def losses(run_dir: Path) -> list[float]:
    return [
        line["train/loss"]
        for line in read_json_lines(run_dir / "metrics.jsonl")
        if "train/loss" in line
    ]


def wait_for_step(run_dir: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not ((run_dir / "metrics.jsonl").is_file() and losses(run_dir)):
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        assert time.monotonic() < end, "no step came"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def trained(docker: Engine, runs: Path) -> Path:
    """Return the run folder of the debug recipe."""
    docker.run(*words(runs, "ph-one"), *DEBUG, "run.dir=/runs/debug")
    return runs / "debug"


def test_on_a_read_only_root_it_trains_and_exports_and_is_not_root(docker, runs, trained):
    assert json.loads((trained / "summary.json").read_text())["steps"] == 18
    assert (trained / "summary.json").stat().st_uid == 1000
    docker.run(*words(runs, "ph-export"), "export", "/runs/debug", "--out", "/runs/model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (runs / "model").iterdir()
    }


def test_two_containers_on_one_network_are_two_nodes_of_one_run_by_name_and_as_any_user(
    docker, runs, trained
):
    nodes = ["--nnodes=2", "--nproc=1", "--rdzv-endpoint=ph-node0:29400"]
    started = [
        docker.start(
            *words(runs, name, f"--hostname={name}", "--user=1234:1234"),
            *DEBUG,
            "run.dir=/runs/two",
            *nodes,
        )
        for name in ("ph-node0", "ph-node1")
    ]
    for container in started:
        output, _ = container.communicate(timeout=400)
        assert container.returncode == 0, output
    two = runs / "two"
    assert json.loads((two / "environment.json").read_text())["world_size"] == 2
    assert (two / "summary.json").stat().st_uid == 1234
    assert losses(two) == pytest.approx(losses(trained), rel=1e-6), (
        "the run is a function of the recipe"
    )


def test_docker_stop_saves_and_ends_with_75_and_the_same_command_goes_on(docker, runs):
    command = [*words(runs, "ph-stopped"), *DEBUG, "run.dir=/runs/stopped", *ENDLESS]
    saved = []
    for _ in range(2):
        container = docker.start(*command)
        (runs / "stopped" / "metrics.jsonl").unlink(missing_ok=True)
        wait_for_step(runs / "stopped", container)
        docker.run("stop", "--time=200", "ph-stopped")
        output, _ = container.communicate(timeout=60)
        assert container.returncode == 75, output
        found = checkpoint.find(runs / "stopped")
        assert found is not None
        assert (
            found[1].state.step == json.loads((runs / "stopped" / "stop.json").read_text())["step"]
        )
        saved.append(found[1].state.step)
    assert 0 < saved[0] < saved[1]
    assert "resuming from" in output


# in a container that runs, a signal to the last process that the health check sees, a worker
SIGNAL = """
import os, pathlib, sys
sys.path.insert(0, "docker")
import health
os.kill(max(health.processes(pathlib.Path("/proc"))), int(sys.argv[1]))
"""


def test_the_health_check_sees_a_worker_that_is_stopped(docker, runs):
    often = ("--health-interval=1s", "--health-retries=2", "--health-start-period=0s")
    container = docker.start(
        *words(runs, "ph-health", *often), *DEBUG, "run.dir=/runs/health", *ENDLESS
    )

    def wait_for(status: str) -> None:
        end = time.monotonic() + 60
        while (
            docker.run("inspect", "--format={{.State.Health.Status}}", "ph-health").strip()
            != status
        ):
            assert time.monotonic() < end, docker.run(
                "inspect", "--format={{json .State.Health}}", "ph-health"
            )
            time.sleep(0.5)

    wait_for_step(runs / "health", container)
    wait_for("healthy")
    for number, status in ((signal.SIGSTOP, "unhealthy"), (signal.SIGCONT, "healthy")):
        docker.run("exec", "ph-health", "python", "-c", SIGNAL, str(int(number)))
        wait_for(status)
    docker.run("stop", "--time=200", "ph-health")
    container.communicate(timeout=60)


def test_deepspeeds_ops_need_no_compiler(docker, runs):
    template = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    for offload in ("offload_optimizer", "offload_param"):
        template["zero_optimization"][offload]["nvme_path"] = "/runs/nvme"
    (runs / "nvme.json").write_text(json.dumps(template))
    changes = ("run.dir=/runs/offloaded", "train.steps=2", *NO_EVALUATION)
    docker.run(*words(runs, "ph-nvme"), *DEBUG, "parallel.deepspeed=/runs/nvme.json", *changes)
    assert len(losses(runs / "offloaded")) == 2


def test_its_own_check_says_what_is_in_it_and_fails_where_something_is_missing(docker):
    table = inside(docker, "python", "docker/check.py")
    for row in (
        r"flash-attn +│ not installed",
        r"cpu_adam +│ compiled ",
        r"async_io +│ compiled ",
        r"pin_memory +│ compiled ",
        r"user +│ 1000:1000",
    ):
        assert re.search(row, table), table
    missing = docker.fails(
        "run", "--rm", "--entrypoint=python", "--network=none", IMAGE, "docker/check.py", "--gpus=8"
    )
    assert "8 GPUs are required, but torch sees 0" in missing


def test_deepspeeds_ops_have_no_instruction_that_other_machines_lack(docker, runs):
    copy = "cp /opt/venv/lib/python3*/site-packages/deepspeed/ops/*/*_op.*.so /runs"
    docker.run(*words(runs, "ph-ops", "--entrypoint=sh"), "-c", copy)
    ops = sorted(runs.glob("*.so"))
    assert [op.name.split(".")[0] for op in ops] == ["async_io_op", "cpu_adam_op", "pin_memory_op"]
    for op in ops:
        code = subprocess.run(
            ["objdump", "--disassemble", op], check=True, capture_output=True, text=True
        ).stdout
        assert "%zmm" not in code, f"{op} has AVX-512, which x86-64-v3 lacks"


def test_the_cpu_flavour_is_small(docker):
    assert int(docker.run("inspect", "--format={{.Size}}", IMAGE)) < 2.5e9


def test_what_is_in_the_image_and_what_is_not(docker):
    assert set(inside(docker, "ls", "-A").split()) == {
        *("LICENSE", "constraints.txt", "docker", "recipes", "sbom.json")
    }
    code = "import packhorse; print(packhorse.__file__)"
    for python in (("python", "-c"), ("python", "-I", "-c")):
        assert re.search("/opt/venv/.*/site-packages/packhorse/", inside(docker, *python, code))
    tools = inside(docker, "sh", "-c", "command -v cc gcc c++ g++ clang nvcc ld make || true")
    assert tools == "", "no compiler"
    find = "find / -xdev -name '*.safetensors' -o -path '*/.cache/pip'"
    weights = docker.run(
        "run", "--rm", "--user=0", "--network=none", "--entrypoint=sh", IMAGE, "-c", find
    )
    assert weights == "", "no weights, and nothing that pip left"
    writable = inside(
        docker, "sh", "-c", "find /opt /usr /etc -xdev -writable -not -type l 2>/dev/null || true"
    )
    assert writable == "", "nothing of the program can be changed"
    config = json.loads(docker.run("inspect", IMAGE))[0]["Config"]
    assert config["User"] == "1000:1000"
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert not any(
        re.search("token|secret|password|PIP_", variable, re.IGNORECASE)
        for variable in config["Env"]
    )


def test_every_package_in_it_is_one_of_the_pins(docker):
    pins = {
        tuple(re.split(r"==|;", line)[:2])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    every = "(f'{d.name}=={d.version}' for d in m.distributions())"
    names = f"import importlib.metadata as m; print(*{every})"
    installed = {
        tuple(package.split("+")[0].split("=="))
        for package in inside(docker, "python", "-c", names).split()
    }
    normal = {(re.sub(r"[-_.]+", "-", name).lower(), number) for name, number in installed}
    assert {package for package in normal - pins if package[0] not in ("pip", "packhorse")} == set()


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ("FLAVOUR=gpu", "FLAVOUR=gpu: give cuda or cpu"),
        ("FLASH_ATTN=source", "flash-attn needs FLAVOUR=cuda"),
    ],
)
def test_a_build_that_cannot_be_right_is_refused(docker, argument, why):
    assert why in docker.fails(*docker.build(f"--build-arg={argument}"))
