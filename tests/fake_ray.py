"""As much of Ray as cluster.py uses, with real processes, so that a worker can really crash, be killed or hang.

FAULT says what the engine does in its third call of run (after the warm-up and one trial), ONCE a file that it leaves when it
has done so and that keeps it from doing so again.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fakes import FakeEngine

from experiments.engine import vllm_engine, worker
from experiments.records.record import Phase, Record

SPAWN = multiprocessing.get_context("spawn")


class RayError(Exception):
    """What every error of a task is wrapped into."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)


class FaultyEngine(FakeEngine):
    """The fake engine, with a fault in the middle of a step."""

    def run(self, phases: Sequence[Phase], time_limit_s: float) -> Record:
        once = Path(os.environ["ONCE"])
        if len(self.ran) == 2 and not once.exists():
            once.write_text(str(os.getpid()))
            if os.environ["FAULT"] == "crash":
                raise RuntimeError("the step failed")
            if os.environ["FAULT"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ["FAULT"] == "hang":  # inside C, with Python's lock held, as a kernel that never returns
                ctypes.PyDLL(None).pause()
        if os.environ["FAULT"] == "always":
            raise RuntimeError("the step failed")
        return super().run(phases, time_limit_s)


def work(task: Callable[..., Iterator[Any]], arguments: Sequence[Any], pipe: Any) -> None:
    """The worker process."""
    vllm_engine.VllmEngine = FaultyEngine  # type: ignore[assignment,misc]
    worker.GRACE_S = float(os.environ.get("GRACE", worker.GRACE_S))
    with contextlib.suppress(BrokenPipeError):
        try:
            for result in task(*arguments):
                pipe.send(("result", result))
            pipe.send(("end", None))
        except RuntimeError as error:
            pipe.send(("error", f"{type(error).__name__}: {error}"))


class Stream:
    """The results of one task."""

    def __init__(self, task: Callable[..., Iterator[Any]], arguments: Sequence[Any]) -> None:
        self.pipe, theirs = SPAWN.Pipe(duplex=False)
        self.process = SPAWN.Process(target=work, args=(task, arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def __next__(self) -> tuple[str, Any]:
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            kind, value = "error", "the worker died"
        if kind != "result":
            self.process.join()
            self.pipe.close()
        if kind == "end":
            raise StopIteration
        return kind, value


class Remote:
    """A task."""

    def __init__(self, task: Callable[..., Iterator[Any]]) -> None:
        self.task = task

    def options(self, **_options: Any) -> Remote:
        return self

    def remote(self, *arguments: Any) -> Stream:
        return Stream(self.task, arguments)


def get(answer: tuple[str, Any]) -> Any:
    """Raises RayError for what a worker raised, or if it died."""
    kind, value = answer
    if kind == "error":
        raise RayError(value)
    return value


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """In place of cluster.ray_cluster; sessions run one after the other only if there is one of them."""
    yield SimpleNamespace(
        remote=lambda **_options: Remote,
        put=lambda value: value,
        wait=lambda streams, **_options: (streams[:1], streams[1:]),
        get=get,
        nodes=lambda: [{"Alive": True, "NodeID": "a" * 56, "Resources": {"CPU": 2.0, "memory": 2.0**40}}],
        exceptions=SimpleNamespace(RayError=RayError),
    )
