"""Places sessions with Ray and brings their records back. Ray runs sessions; it never runs a step."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.expand import Session
from experiments.session import TrialResult, run_session
from experiments.spec import EngineSettings, SpecError
from experiments.workload import Trace

ATTEMPTS = 3  # a session that dies is started again for the trials it still owes, at most this often in all
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


SWEEPER = """
import select, shutil, sys, psutil
folder, driver, seen = sys.argv[1], psutil.Process(int(sys.argv[2])), set()
while not select.select([sys.stdin], [], [], 5.0)[0]:  # readable when the driver has ended, however it did
    try:
        seen |= set(driver.children(recursive=True))
    except psutil.Error:
        break
for process in seen - {psutil.Process()}:
    try:
        process.kill()
    except psutil.Error:
        pass
shutil.rmtree(folder, ignore_errors=True)
"""


@contextlib.contextmanager
def _sweeper(folder: str) -> Iterator[None]:
    """A process that outlives the driver, kill -9 included, and then ends whatever is left of its Ray; folder and all.

    Left alone, Ray's agents stay for more than a minute after their node is gone.
    """
    command = [sys.executable, "-c", SWEEPER, folder, str(os.getpid())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


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

    yield from run_session(session, owed, make, trace)


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
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
    except (ConnectionError, ValueError) as error:
        raise SpecError(f"RAY_ADDRESS: got {address!r}; no Ray cluster answers there ({type(error).__name__})") from None


def _options(session: Session, ray: Any) -> dict[str, Any]:
    """What a session asks of Ray: GPUs by tensor-parallel size, or a whole CPU node, so that none disturbs another."""
    from experiments.vllm_engine import environment

    options: dict[str, Any] = {
        "name": f"{session.figure}/{session.name}",
        "num_returns": "streaming",
        "max_retries": 0,
        "runtime_env": {"env_vars": environment(session.engine)},
    }
    if session.engine.platform == "cuda":
        return options | {"num_gpus": session.engine.tensor_parallel, "num_cpus": session.engine.tensor_parallel}
    return options | {"num_cpus": max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])}


def run_sessions(
    ray: Any,
    sessions: Sequence[Session],
    owed: Mapping[str, Sequence[str]],
    trace: Trace | None,
    store: Callable[[TrialResult], None],
) -> dict[str, str]:
    """Run what is owed, storing each record as it comes. Returns session -> reason for what could not be run."""
    failed: dict[str, str] = {}
    remote = ray.remote(max_calls=1)(_work)  # a fresh process each time: one engine, one process
    left = {session.name: list(owed[session.name]) for session in sessions if owed.get(session.name)}
    shared = ray.put(trace)
    by_name = {session.name: session for session in sessions}
    attempts = dict.fromkeys(left, 1)

    def start(name: str) -> Any:
        return remote.options(**_options(by_name[name], ray)).remote(by_name[name], tuple(left[name]), shared)

    running = {start(name): name for name in left}  # in the order given: longest first
    while running:
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
            if attempts[name] < ATTEMPTS:
                attempts[name] += 1
                running[start(name)] = name
            else:
                failed[name] = f"{len(left[name])} trials missing after {ATTEMPTS} attempts: {_reason(error)}"
    return failed


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    last = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {last[-1][:200] if last else 'no message'}"
