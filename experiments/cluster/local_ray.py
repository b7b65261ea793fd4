"""Ray for a run: started here and swept afterwards, or joined. Whoever needs Ray gets it from here.

`make node` makes this machine a node of a cluster, and stays until it is interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from experiments.machine import gpus
from experiments.records.errors import SpecError
from experiments.records.provenance import PACKAGE
from experiments.records.terminal import arguments, command, console, parse, result

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_prestart_worker_first_driver": "0",  # a worker per core, none of which has a session's environment
    "RAY_enable_worker_prestart": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # a minute otherwise, until a run notices that Ray's server is gone
}
# What only a Ray of a run's own gets, for which a user's other Rays are none of its business: a token that is nowhere but in
# this environment, new with each process (Ray reads it once), and no address but loopback: left to itself, Ray turns 127.0.0.1
# into the machine's own address and listens on every one.
OWN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
PORT = 6379  # Ray's default
LONGEST = 20  # of a path in which Ray's folder may lie: its sockets lie 87 characters deeper, and Linux allows 107
STORE_BYTES = 256 * 2**20  # for records on their way, at most a few MB each

SWEEPER = """
import contextlib, shutil, sys, time, psutil
driver, folder = int(sys.argv[1]), sys.argv[2]
sys.stdin.read()  # ends when the driver has ended, however it did
for _ in range(50):
    left = False
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != driver and any(file.path.startswith(folder) for file in process.open_files()):
                left = True
                process.kill()
    if not left:
        break
    time.sleep(0.1)
shutil.rmtree(folder, ignore_errors=True)
"""


@contextlib.contextmanager
def _sweeper(folder: str) -> Iterator[None]:
    """A process that outlives the driver, kill -9 included, and then ends whatever is left of its Ray; folder and all.

    Left alone, Ray's agents stay for more than a minute after their node is gone. They are known by the logs that they write in
    the folder: their titles overwrite their environment. A sweeper that is killed is replaced.
    """
    command = [sys.executable, "-c", SWEEPER, str(os.getpid()), folder]
    theirs, ours = os.pipe()
    closing = threading.Event()

    def keep() -> None:
        while True:  # once at least
            subprocess.run(command, stdin=theirs, start_new_session=True, check=False)
            if closing.is_set():
                return

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        closing.set()
        os.close(ours)
        keeper.join(60)
        os.close(theirs)


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """Ray, started for this run and stopped with it, or the cluster of RAY_ADDRESS. Raises SpecError if that is not there."""
    os.environ.update(QUIET)
    address = os.environ.get("RAY_ADDRESS")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.ExitStack() as stack:
        if address:
            authenticate()
        else:
            stack.enter_context(_environment(OWN))
        import ray  # which reads how to authenticate as it is imported

        folder = None
        if not address or not _node_here(address):
            mine = os.path.realpath(tempfile.mkdtemp(prefix="chunked-ray-", dir=short_place()))
            stack.enter_context(_sweeper(mine))
            folder = f"{mine}/r"  # which Ray opens to everyone, sockets and all; who cannot enter the one around it is kept out
        try:
            if address and folder:
                _join(address, folder)
            with _hushed():
                ray.init(**_options(address), log_to_driver=False, logging_level="error", _temp_dir=folder)
        except Exception as error:  # Ray raises bare ones, too
            raise SpecError(_why(address, error)) from None
        stack.callback(ray.shutdown)
        for number, handler in handlers.items():  # Ray puts its own in their place, which print a stack and end the process
            signal.signal(number, handler)
        yield ray


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables for as long as it lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what Ray's C++ writes to standard error, twenty lines while it tries a wrong token; errors are raised besides."""
    real, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(real, 2)
        os.close(real)
        os.close(nowhere)


def short_place() -> str:
    """Where Ray's folder can lie: the usual place for temporary files, or one with a shorter path. Raises SpecError."""
    places = (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
    for place in places:
        if len(os.fsencode(os.path.realpath(place))) <= LONGEST and os.access(place, os.W_OK | os.X_OK):
            return place
    raise SpecError(f"TMPDIR: got {places[0]}; allowed: a folder that can be written, its path at most {LONGEST} bytes long")


def _why(address: str | None, error: Exception) -> str:
    """In one line why there is no Ray: of one's own, the cause; of a cluster, what to do about it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(getattr(error, "stderr", None) or error))
    said = " ".join(plain.split()) or type(error).__name__
    if not address:
        return f"Ray did not start on this machine: {said[-400:]}"
    if found := re.search(r"[Vv]ersion mismatch.*", said):
        return f"RAY_ADDRESS: got {address!r}; {found[0][:300]}: every node needs the same Ray and Python"
    return f"RAY_ADDRESS: got {address!r}; no Ray cluster answers there, or it wants another RAY_AUTH_TOKEN ({said[:200]})"


def _node_here(address: str) -> bool:
    """Whether a node of that cluster is seen on this machine; one in another container is not."""
    host, _, port = address.rpartition(":")
    hosts = ".*" if host in ("127.0.0.1", "localhost") else f"({re.escape(host)}|127.0.0.1)"
    raylets = (p.info["cmdline"] or () for p in psutil.process_iter(["name", "cmdline"]) if p.info["name"] == "raylet")
    return any(re.fullmatch(f"--gcs-address={hosts}:{re.escape(port)}", word) for words in raylets for word in words)


def _options(address: str | None) -> dict[str, Any]:
    if address:  # the nodes need the environment, not this checkout: the code travels with the job
        return {"address": address, "runtime_env": {"py_modules": [str(PACKAGE)], "excludes": ["**/__pycache__"]}}
    own = {"object_store_memory": STORE_BYTES, "resources": gpus.resources()}
    return {**own, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}


def _join(address: str, folder: str) -> None:
    """Make this driver's place a node of the cluster, without cores: a driver speaks to it through a node beside it.

    Raises OSError or ValueError if nothing answers there, SubprocessError if Ray does not take it.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()  # Ray would try for minutes
    command = [*_ray_start(f"--address={address}"), f"--temp-dir={folder}", "--num-cpus=0", "--num-gpus=0"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def authenticate() -> None:
    """Show the cluster RAY_AUTH_TOKEN, if there is one. Left to itself, Ray goes by what happens to lie in the home folder."""
    os.environ.setdefault("RAY_AUTH_MODE", "token" if os.environ.get("RAY_AUTH_TOKEN") else "disabled")


def node_command(address: str | None) -> list[str]:
    """`ray start` for this machine with its GPUs and NVLink sets: a node of the cluster at that address, else a head."""
    where = ["--head", f"--port={PORT}", "--include-dashboard=true"] if not address else [f"--address={address}"]
    return [*_ray_start(*where), f"--resources={json.dumps(gpus.resources())}", "--block"]


def _ray_start(*where: str) -> list[str]:
    ip = os.environ.get("NODE_IP")  # of a machine with several; Ray takes the one that leads to the internet
    own = [f"--node-ip-address={ip}"] if ip else []
    ray = str(Path(sys.executable).with_name("ray"))
    return [ray, "start", *where, *own, f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Become the node. A head without RAY_AUTH_TOKEN makes one: whoever reaches a Ray cluster without may run what he likes."""
    parse(arguments("experiments.cluster.local_ray", "Make this machine a node of a Ray cluster, until interrupted."), argv)
    os.environ.update(QUIET)
    os.environ.setdefault("RAY_TMPDIR", short_place())
    address = os.environ.pop("RAY_ADDRESS", None)
    if not address and not os.environ.get("RAY_AUTH_TOKEN"):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    authenticate()
    if address:
        result(RAY_ADDRESS=address)
    else:
        ip, token = os.environ.get("NODE_IP") or "ADDRESS OF THIS MACHINE", os.environ["RAY_AUTH_TOKEN"]
        console.print(f"on the others, and for runs: export RAY_AUTH_TOKEN={token} RAY_ADDRESS={ip}:{PORT}")
        result(RAY_AUTH_TOKEN=token, RAY_ADDRESS=f"{ip}:{PORT}")
    sys.stdout.flush()
    if console.quiet:  # what Ray prints, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    words = node_command(address)
    os.execv(words[0], words)


if __name__ == "__main__":
    sys.exit(main())
