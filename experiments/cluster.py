"""Places sessions with Ray and brings their records back. Ray runs sessions; it never runs a step."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import gpus
from experiments.expand import Session
from experiments.session import TrialResult, run_session
from experiments.spec import EngineSettings, SpecError
from experiments.workload import Trace

ATTEMPTS = 3  # a session that dies is started again for the trials it still owes, at most this often in all
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}
QUIET |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # a minute otherwise, until a run notices that Ray's server is gone


LOAD_S, GRACE_S = 900.0, 120.0  # a session that gives nothing for so long, or for a trial's time limit and so much, is hung

SWEEPER = """
import shutil, sys, time, psutil
driver, folder = int(sys.argv[1]), sys.argv[2]
sys.stdin.read()  # ends when the driver has ended, however it did
for _ in range(50):
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid != driver and any(file.path.startswith(folder) for file in process.open_files()):
                left.append(process)
                process.kill()
        except (psutil.Error, OSError):
            pass
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
        while True:
            subprocess.Popen(command, stdin=theirs, start_new_session=True).wait()
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


def _die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it ends, however that ends."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _work(session: Session, owed: Sequence[str], trace: Trace | None) -> Iterator[TrialResult]:
    from experiments.vllm_engine import VllmEngine  # imported here: the driver needs neither vLLM nor torch

    _die_with_parent()

    def make(settings: EngineSettings) -> VllmEngine:
        engine = VllmEngine(settings)
        engine.check()
        return engine

    yield from watched(run_session(session, owed, make, trace), LOAD_S, session.time_limit_s + GRACE_S)


def watched(results: Iterator[TrialResult], first_s: float, each_s: float) -> Iterator[TrialResult]:
    """The same results, but the process ends if the first takes more than first_s + each_s, or another more than each_s.

    faulthandler's watchdog is a thread of C: it ends a process that hangs inside a kernel, too.
    """
    with Path(os.devnull).open("w") as nowhere:
        faulthandler.dump_traceback_later(first_s + each_s, exit=True, file=nowhere)
        try:
            for result in results:
                faulthandler.cancel_dump_traceback_later()
                yield result
                faulthandler.dump_traceback_later(each_s, exit=True, file=nowhere)
        finally:
            faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """Ray, started for this run and stopped with it, or the cluster of RAY_ADDRESS. Raises SpecError if that is not there."""
    os.environ.update(QUIET)
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    address = os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        folder = None
        if not address:
            folder = tempfile.mkdtemp(prefix="chunked-ray-")
            stack.enter_context(_sweeper(folder))
        _start(ray, address, folder)
        stack.callback(ray.shutdown)
        for number, handler in handlers.items():  # Ray puts its own in their place, which print a stack and end the process
            signal.signal(number, handler)
        yield ray


def _start(ray: Any, address: str | None, folder: str | None) -> None:
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        else:
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                object_store_memory=256 * 2**20,
                resources=gpus.resources(),
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
    except (ConnectionError, ValueError) as error:
        raise SpecError(f"RAY_ADDRESS: got {address!r}; no Ray cluster answers there ({type(error).__name__})") from None


def _options(session: Session, ray: Any, place: Sequence[str]) -> dict[str, Any]:
    """What a session asks of Ray: the GPUs of its place, or a whole CPU node, so that none disturbs another."""
    from experiments.vllm_engine import environment

    options: dict[str, Any] = {
        "name": f"{session.figure}/{session.name}",
        "num_returns": "streaming",
        "max_retries": 0,
        "runtime_env": {"env_vars": environment(session.engine)},
    }
    if session.engine.platform == "cuda":
        # nvidia-smi counts by PCI bus, CUDA by speed unless told. Ray leaves the variable alone as no GPU is asked of it.
        visible = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpus.devices(place)}
        options["runtime_env"]["env_vars"] |= visible
        return options | {"num_gpus": 0, "num_cpus": session.engine.tensor_parallel, "resources": dict.fromkeys(place, 1)}
    return options | {"num_cpus": max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])}


def run_sessions(
    ray: Any,
    sessions: Sequence[Session],
    owed: Mapping[str, Sequence[str]],
    trace: Trace | None,
    store: Callable[[TrialResult], None],
    say: Callable[[str], None],
) -> dict[str, str]:
    """Run what is owed, storing each record as it comes, saying what goes wrong. Returns session -> reason for what could not
    be run."""
    failed: dict[str, str] = {}
    remote = ray.remote(max_calls=1)(_work)  # a fresh process each time: one engine, one process
    left = {session.name: list(owed[session.name]) for session in sessions if owed.get(session.name)}
    shared = ray.put(trace)
    by_name = {session.name: session for session in sessions}
    attempts = dict.fromkeys(left, 1)
    total = ray.cluster_resources()
    free = dict(total)
    choices = {name: _places(by_name[name], total) for name in left}
    waiting = list(left)
    running: dict[Any, str] = {}
    taken: dict[str, tuple[str, ...]] = {}

    def start(name: str) -> Any:
        options = _options(by_name[name], ray, taken[name])
        return remote.options(**options).remote(by_name[name], tuple(left[name]), shared)

    heard = time.monotonic()  # of any session
    while waiting or running:
        for name in tuple(waiting):  # in the order given: longest first
            place = gpus.take(choices[name], free)
            if place is not None:
                waiting.remove(name)
                taken[name] = place
                running[start(name)] = name
        ready, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
        stream = ready[0]
        name = running[stream]
        try:
            result = ray.get(next(stream))
            store(result)
            left[name].remove(result.trial)
        except StopIteration:
            del running[stream]
        except ray.exceptions.RayError as error:
            del running[stream]
            silent = time.monotonic() - heard
            reason = _reason(error) + (f"; hung, no result in {silent:.0f} s" if silent > by_name[name].time_limit_s else "")
            if attempts[name] < ATTEMPTS:
                attempts[name] += 1
                say(f"{name} died ({reason}); attempt {attempts[name]} of {ATTEMPTS} for its {len(left[name])} trials left")
                waiting.insert(0, name)
            else:
                failed[name] = f"{len(left[name])} trials missing after {ATTEMPTS} attempts: {reason}"
        heard = time.monotonic()
        if stream not in running:
            for resource in taken.pop(name):
                free[resource] += 1
    return failed


def _places(session: Session, total: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Where a session may run: GPUs by tensor-parallel size; on CPUs anywhere, Ray decides."""
    return gpus.places(session.engine.tensor_parallel, total) if session.engine.platform == "cuda" else [()]


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    last = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {last[-1][:200] if last else 'no message'}"
