"""docker/preflight.sh on hosts made of stubs: every message, its cause and the command that mends it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from experiments.records.provenance import ROOT

TOOLS = ("awk", "bash", "sh", "cat", "df", "dirname", "env", "git", "grep", "head", "mkdir", "realpath", "tail", "tr", "wc")
INFO = 'case "$*" in *DockerRootDir*) echo / ;; esac'
DOCKER = {
    "version": "echo 20.10.24",
    "info": INFO,
    "image": "echo sha256:1234",
    "run": 'case "$*" in *"--entrypoint nvidia-smi"*) echo "GPU 0: NVIDIA A100" ;; esac',
}
SMI = {
    "driver_version": "echo 580.95.05",
    "compute-apps": "true",
}


def host(folder: Path, docker: dict[str, str] | None, smi: dict[str, str] | None, df: str = "500G") -> dict[str, str]:
    """A PATH with nothing but basic tools, and docker and nvidia-smi that answer as told."""
    for tool in TOOLS:
        if found := next((Path(p) / tool for p in os.environ["PATH"].split(":") if (Path(p) / tool).exists()), None):
            (folder / tool).symlink_to(found)
    stubs = {"df": f"echo Avail; echo {df}"}
    if docker is not None:
        stubs["docker"] = 'case "$1" in ' + " ".join(f"{name}) {does} ;;" for name, does in docker.items()) + " esac"
    if smi is not None:
        stubs["nvidia-smi"] = 'case "$*" in ' + " ".join(f"*{name}*) {does} ;;" for name, does in smi.items()) + " esac"
    for name, does in stubs.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder), "OUT": str(folder / "runs"), "GPU_FLAGS": "--gpus all"}


def preflight(env: dict[str, str], what: str = "run") -> tuple[int, str]:
    done = subprocess.run(
        ["bash", ROOT / "docker/preflight.sh", what], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def test_all_is_well(tmp_path: Path) -> None:
    assert preflight(host(tmp_path, DOCKER, SMI)) == (0, "")


def test_without_a_gpu_the_cpu_image_is_fine(tmp_path: Path) -> None:
    env = host(tmp_path, DOCKER, None) | {"TARGET": "cpu"}
    assert preflight(env) == (0, "")
    assert preflight(env, "build") == (0, "")


NO_TOOLKIT = 'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].'
CASES = {
    "no docker": (None, SMI, "docker is not installed: sudo apt-get install docker.io"),
    "not answering": (
        DOCKER | {"info": "echo 'Cannot connect to the Docker daemon at unix:///var/run/docker.sock.' >&2; exit 1"},
        SMI,
        "docker does not answer: sudo systemctl start docker",
    ),
    "not allowed": (
        DOCKER | {"info": "echo 'permission denied while trying to connect' >&2; exit 1"},
        SMI,
        "docker refuses this user: sudo usermod -aG docker",
    ),
    "no driver": (DOCKER, None, "no NVIDIA driver (no nvidia-smi): sudo apt-get install nvidia-driver-580, or TARGET=cpu"),
    "driver not answering": (
        DOCKER,
        SMI | {"driver_version": "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9"},
        "the NVIDIA driver does not answer: sudo modprobe nvidia",
    ),
    "old driver": (
        DOCKER,
        SMI | {"driver_version": "echo 535.183.01"},
        "NVIDIA driver 535.183.01; 580 or newer is needed for CUDA 13: sudo apt-get install nvidia-driver-580",
    ),
    "memory taken": (
        DOCKER,
        SMI | {"compute-apps": "echo 'GPU-0, 4711, python3, 30000 MiB'; echo 'GPU-0, 4712, python3, 3 MiB'"},
        "every GPU is in use, the first by process 4711 python3 30000 MiB: wait for it, or kill 4711",
    ),
    "no image": (DOCKER | {"image": "exit 1"}, SMI, "no image chunked-prefill:cuda: make image TARGET=cuda"),
    "no toolkit": (
        DOCKER | {"run": f"echo '{NO_TOOLKIT}' >&2; exit 125"},
        SMI,
        "docker knows no NVIDIA toolkit: sudo apt-get install nvidia-container-toolkit && sudo nvidia-ctk runtime configure",
    ),
    "no CDI device": (
        DOCKER | {"run": "echo 'Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=all' >&2; exit 126"},
        SMI,
        "docker knows no NVIDIA toolkit",
    ),
    "container without nvidia-smi": (
        DOCKER | {"run": "echo 'exec: \"nvidia-smi\": executable file not found in $PATH' >&2; exit 127"},
        SMI,
        "the container has no nvidia-smi; GPU_FLAGS is '--gpus all'",
    ),
    "container does not start": (
        DOCKER | {"run": "echo 'error setting rlimit type 8: operation not permitted' >&2; exit 125"},
        SMI,
        "a container with '--gpus all' does not start: error setting rlimit type 8",
    ),
    "no GPU in the container": (
        DOCKER | {"run": "echo No devices were found"},
        SMI,
        "the container sees no GPU although the host",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_failure_is_one_line_with_its_remedy(tmp_path: Path, case: str) -> None:
    docker, smi, message = CASES[case]
    status, printed = preflight(host(tmp_path, docker, smi))
    assert status == 1
    assert printed.startswith("preflight: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_one_busy_card_does_not_refuse_a_host(tmp_path: Path) -> None:
    two = {"driver_version": "echo 580.95.05; echo 580.95.05", "compute-apps": "echo 'GPU-0, 4711, python3, 30000 MiB'"}
    assert preflight(host(tmp_path, DOCKER, two)) == (0, "")


@pytest.mark.parametrize(
    ("smi", "info", "tool", "message"),
    [
        (None, INFO, None, "no NVIDIA driver (no nvidia-smi)"),
        (SMI | {"driver_version": "echo 535.183.01"}, INFO, None, "NVIDIA driver 535.183.01; 580 or newer"),
        (SMI, INFO, None, "docker knows no NVIDIA toolkit"),
        (SMI, INFO, "nvidia-ctk", ""),
        (SMI, 'case "$*" in *Runtimes*) echo \'{"nvidia":{},"runc":{}}\' ;; esac', None, ""),
    ],
)
def test_driver_and_toolkit_are_looked_at_before_the_build(
    tmp_path: Path, smi: dict[str, str] | None, info: str, tool: str | None, message: str
) -> None:
    """A build takes 20 GB, and a container that asks for GPUs takes an image."""
    env = host(tmp_path, DOCKER | {"image": "exit 1", "run": "exit 1", "build": "exit 1", "info": info}, smi)
    if tool:
        (tmp_path / tool).symlink_to("/bin/true")
    status, printed = preflight(env, "host")
    assert (status, message in printed, printed.count("\n")) == (int(bool(message)), True, int(bool(message)))
    assert preflight(env | {"TARGET": "cpu"}, "host") == (0, "")


def test_a_full_disk(tmp_path: Path) -> None:
    env = host(tmp_path, DOCKER, SMI, df="1G")
    assert preflight(env) == (
        1,
        f"preflight: 1 GiB free in {tmp_path}; 2 are needed for the run: free some, or OUT= a folder on another disk\n",
    )


def test_the_first_build_needs_room(tmp_path: Path) -> None:
    env = host(tmp_path, DOCKER | {"image": "exit 1"}, SMI, df="35G")
    status, printed = preflight(env, "build")
    assert (status, printed.count("\n")) == (1, 1)
    assert "35 GiB free in /; 40 are needed for the image: docker system prune, or IMAGE_DISK=" in printed
    assert preflight(env | {"IMAGE_DISK": "30"}, "build") == (0, "")


def test_a_rebuild_needs_no_room_for_a_second_image(tmp_path: Path) -> None:
    assert preflight(host(tmp_path, DOCKER, SMI, df="5G"), "build") == (0, "")


def test_a_client_without_buildkit(tmp_path: Path) -> None:
    env = host(tmp_path, DOCKER | {"version": "echo 28.2.2", "buildx": "exit 1"}, None)
    assert "docker has no buildx: sudo apt-get install docker-buildx" in preflight(env, "build")[1]


def test_an_unknown_word_is_refused() -> None:
    status, printed = preflight({"PATH": os.environ["PATH"], "DOCKER": "true"}, "fly")
    assert (status, printed) == (1, "preflight: got 'fly'; allowed: build, host or run\n")
