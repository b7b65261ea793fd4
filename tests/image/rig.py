"""A Docker engine, a registry and a stand-in base of our own, so that the image is tested without a registry or a GPU.

Needs root on Debian or Ubuntu. The stand-in is a minimal Debian under the names of the pinned bases; it carries what pip is
configured with on this machine, so that the Dockerfile stays free of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = {"dockerd": "docker.io", "docker-registry": "docker-registry", "mmdebstrap": "mmdebstrap"}
BASES = ("library/debian:bookworm-slim", "nvidia/cuda:13.0.3-devel-ubuntu24.04")
UID = 4321  # who calls make: in nobody's /etc/passwd
HEAVY = "torch.*|triton|tilelang|vllm|nvidia-.*|cuda-.*|flashinfer-.*|nccl.*|apache-.*|pynvvideocodec|opencv-.*"
HEAVY += "|xgrammar|tokenspeed-.*|z3-solver|.*-kernels|transformers"
FLAGS = ["SHM=--shm-size=1g", "ULIMITS="]  # this engine may not raise limits
CA = Path("/etc/ssl/certs/ca-certificates.crt")
HOOK = """#!/bin/sh
# Stands for the NVIDIA toolkit's hook: puts a fake nvidia-smi into the container that is being created.
[ "$1" = prestart ] || exit 0
bundle=$(sed -n 's/.*"bundle":"\\([^"]*\\)".*/\\1/p')
root=$(sed -n 's/.*"root":{"path":"\\([^"]*\\)".*/\\1/p' "$bundle/config.json")
cp "$(dirname "$0")/fake-nvidia-smi" "$root/usr/bin/nvidia-smi"
"""
NVIDIA_SMI = """#!/bin/sh
# A fake: two A100 joined by 12 NVLinks.
case "$*" in
-L) printf 'GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)\\nGPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-1)\\n' ;;
"topo -m") printf '\\tGPU0\\tGPU1\\tCPU Affinity\\nGPU0\\t X \\tNV12\\t0-7\\nGPU1\\tNV12\\t X \\t0-7\\n' ;;
*driver_version\\ --format=csv,noheader) printf '580.95.05\\n580.95.05\\n' ;;
*compute-apps*) ;;
*) printf 'NVIDIA A100-SXM4-80GB, 81920, 4, 580.95.05\\nNVIDIA A100-SXM4-80GB, 81920, 4, 580.95.05\\n' ;;
esac
"""


def install() -> None:
    """What of the engine, the registry and the bootstrapper is missing, by apt."""
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if missing:
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *command], check=True, stdout=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def wait_for(what: str, there: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"{what}: not there after {seconds:g} s"
        time.sleep(0.2)


@contextlib.contextmanager
def process(command: list[str], log: Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A background process that is ended with the context."""
    with log.open("ab") as file:
        started = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@dataclass
class Rig:
    """A running engine; `digests` are the stand-ins' (repository -> sha256:...)."""

    folder: Path
    registry: int
    digests: dict[str, str] = field(default_factory=dict)
    running: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def docker(self) -> str:
        """The client that came with the engine: others may lack BuildKit."""
        return "/usr/bin/docker"

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": f"unix://{self.folder}/d.sock", "DOCKER": self.docker, "DOCKER_BUILDKIT": "1"}

    def __call__(self, *arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run docker."""
        command = [self.docker, *arguments]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done

    def start(self, toolkit: bool) -> None:
        """(Re)start the engine, with or without the stand-in of NVIDIA's toolkit on its PATH; images stay."""
        self.stop()
        path = f"{self.folder}/hook:{os.environ['PATH']}" if toolkit else os.environ["PATH"]
        socket_path = self.folder / "d.sock"
        command = ["dockerd", "-H", f"unix://{socket_path}", "--data-root", f"{self.folder}/data"]
        command += ["--exec-root", f"{self.folder}/exec", "-p", f"{self.folder}/d.pid", "--storage-driver", "overlay2"]
        command += ["--iptables=false", "--ip6tables=false", "--bridge=none"]
        command += ["--registry-mirror", f"http://127.0.0.1:{self.registry}"]
        self.running.enter_context(process(command, self.folder / "dockerd.log", {**os.environ, "PATH": path}))
        wait_for("dockerd", lambda: self("info", check=False).returncode == 0, 30)
        socket_path.chmod(0o666)  # tests call it as an ordinary user

    def stop(self) -> None:
        self.running.close()


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[int]:
    """A registry on this machine; yields its port."""
    port = free_port()
    config = folder / "registry.yml"
    storage = f"storage: {{filesystem: {{rootdirectory: {folder}/registry}}}}"
    config.write_text(f"version: 0.1\n{storage}\nhttp: {{addr: '127.0.0.1:{port}'}}\n")
    with process(["docker-registry", "serve", str(config)], folder / "registry.log"):

        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        wait_for("registry", answers, 20)
        yield port


def pip_setting(name: str) -> str:
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.split("=", 1)[1].strip("'\"") for line in lines if line.split("=", 1)[0].endswith(f".{name}")]
    return found[0] if found else ""


@contextlib.contextmanager
def pip_configuration(folder: Path, log: str) -> Iterator[str]:
    """pip.conf for the stand-in: this machine's, folders of wheels served over HTTP, or what is fetched noted in `log`."""
    lines = ["[global]", *(f"{name} = {value}" for name in ("index-url", "timeout") if (value := pip_setting(name)))]
    with contextlib.ExitStack() as stack:
        if log:  # those wheels would be taken for the index's: torch 2.13.0+cpu for 2.13.0
            lines.append(f"log = {log}")
        elif (wheels := pip_setting("find-links")) and Path(wheels).is_dir():
            port = free_port()
            command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", wheels, str(port)]
            stack.enter_context(process(command, folder / "wheels.log"))
            lines.append(f"find-links = http://127.0.0.1:{port}/")
        if CA.is_file():
            lines.append(f"cert = {CA}")
        yield "\n".join(lines) + "\n"


def bootstrap(folder: Path, pip_conf: str) -> Path:
    """A minimal Debian with this machine's certificates and pip configuration, as a tar file."""
    (folder / "pip.conf").write_text(pip_conf)
    tar = folder / "rootfs.tar"
    hooks = [f"--customize-hook=copy-in {folder}/pip.conf /etc"]
    if CA.is_file():
        hooks.append(f"--customize-hook=copy-in {CA} {CA.parent}")
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", *hooks, "bookworm", str(tar)]
    subprocess.run(command, check=True)
    return tar


def push_stand_ins(rig: Rig, tar: Path) -> None:
    """The stand-in under the name of each pinned base, in the registry only."""
    for name in BASES:
        local = f"127.0.0.1:{rig.registry}/{name}"
        rig("import", str(tar), local)
        rig("push", "--quiet", local)
        digest = rig("image", "inspect", "--format", "{{index .RepoDigests 0}}", local).stdout.strip()
        rig.digests[name.removeprefix("library/").split(":")[0]] = digest.rsplit("@", 1)[1]
        rig("rmi", local)


def write_hook(folder: Path) -> None:
    hook = folder / "hook"
    hook.mkdir()
    for name, text in (("nvidia-container-runtime-hook", HOOK), ("fake-nvidia-smi", NVIDIA_SMI), ("nvidia-smi", NVIDIA_SMI)):
        (hook / name).write_text(text)
        (hook / name).chmod(0o755)


def command(rig: Rig, *arguments: str, target: str = "cpu", left_out: str = HEAVY) -> list[str]:
    """A call of make by an ordinary user; the cuda image without what `left_out` names."""
    base = {"cpu": "CPU_BASE=debian:bookworm-slim@", "cuda": "CUDA_BASE=nvidia/cuda:13.0.3-devel-ubuntu24.04@"}[target]
    digest = rig.digests["debian" if target == "cpu" else "nvidia/cuda"]
    build = f"BUILD_FLAGS=--network host --build-arg {base}{digest}"
    if target == "cuda":
        build += f" --build-arg LEAVE_OUT={left_out}"  # flags are split at spaces, and not read by a shell
    room = "IMAGE_DISK=8"  # GiB; both images and the registry took 7
    user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "env", "HOME=/nonexistent"]
    return [*user, "make", f"DOCKER={rig.docker}", "IN=docker", f"TARGET={target}", build, room, *FLAGS, *arguments]


def make(rig: Rig, checkout: Path, *arguments: str, check: bool = True, path: str = "", limit: float = 500, **how: str) -> str:
    """What it prints; `path` is put first on PATH, `how` is for command()."""
    env = rig.env | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    full = command(rig, *arguments, **how)
    done = subprocess.run(full, cwd=checkout, env=env, capture_output=True, text=True, timeout=limit, check=False)
    printed = done.stdout + done.stderr
    assert (done.returncode == 0) == check, f"{' '.join(full)}: exit status {done.returncode}\n{printed[-6000:]}"
    return printed
