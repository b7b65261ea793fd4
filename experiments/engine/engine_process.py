"""Engines in processes of their own, for what calls one directly: calibration and `make bench`. Figures use Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments.records.errors import SpecError
from experiments.spec.spec import EngineSettings, slug

# Kills what is left of a group once its leader, who holds the pipe, has ended. Python's tracker of shared memory is left to
# itself: it frees what the others leave, then ends.
REAPER = """
import contextlib, os, sys, psutil
group = int(sys.argv[1])
sys.stdin.read()
for process in psutil.process_iter():
    with contextlib.suppress(psutil.Error, OSError):
        if os.getpgid(process.pid) == group and "resource_tracker" not in " ".join(process.cmdline()):
            process.kill()
"""


def lead_group() -> None:
    """Make this process, an engine's, the leader of a group that ends with it, however it ends; it ends with its parent.

    A tensor-parallel worker that hangs in a kernel notices nothing of its engine's end and would keep the GPU's memory.
    """
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    end = os.pipe()[0]  # the other end stays open until the process is gone: Python, as it ends, may still be saying why
    nowhere, command = subprocess.DEVNULL, [sys.executable, "-c", REAPER, str(os.getpid())]
    subprocess.Popen(command, stdin=end, stdout=nowhere, stderr=nowhere, start_new_session=True).returncode = 0  # unwaited for
    os.close(end)


def _serve(pipe: Connection, settings: EngineSettings, environment: Mapping[str, str], log: str) -> None:
    """Child process: load, then answer (function, arguments) with function(engine, *arguments) until None comes.

    What libraries say on standard error goes to the log, and so do Python's last words if the engine dies.
    """
    lead_group()
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    os.environ.update(environment)
    from experiments.engine.vllm_engine import VllmEngine

    engine = VllmEngine(settings)
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        pipe.send(job[0](engine, *job[1:]))
    engine.close()


class EngineCaller:
    """An engine in a process of its own: call(f, *arguments) is f(engine, *arguments)."""

    def __init__(self, settings: EngineSettings, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        handle, log = tempfile.mkstemp(prefix=f"engine-{slug(settings.model)[-80:]}-", suffix=".log")
        os.close(handle)
        self._model, self._log, (self._pipe, theirs) = settings.model, Path(log), context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings, environment, log))
        self._process.start()
        theirs.close()
        self._died = False

    def __call__(self, *job: Any) -> Any:
        """Raises SpecError, with the engine's last words, if it dies."""
        with contextlib.suppress(BrokenPipeError):  # it died before: its end of the pipe tells
            self._pipe.send(job)
        return self.answer()

    def answer(self) -> Any:
        """What the engine sends next: first that it is loaded, then the answer to each call."""
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(30)
            raise SpecError(self._last_words()) from None

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        code, self._died = self._process.exitcode, True
        how, last = f" of {signal.Signals(-code).name}" if code and code < 0 else "", lines[-1] if lines else "it said nothing"
        return f"{self._model}: the engine died{how}: {last[:300]}; all it said: {self._log}"

    def finish(self) -> None:
        """Ask it to end, and wait."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(30)

    def kill(self) -> None:
        """End it now, if it has not ended; what an engine said that did not die is of no use."""
        self._process.kill()
        self._process.join(30)
        if not self._died:
            self._log.unlink(missing_ok=True)


@contextlib.contextmanager
def engines(settings: Sequence[EngineSettings], environment: Mapping[str, str] | None = None) -> Iterator[list[EngineCaller]]:
    """One process per settings, all loaded, with these environment variables beside the engine's own.

    Raises SpecError, in one line with its last words, if an engine dies.
    """
    started: list[EngineCaller] = []
    try:
        for one in settings:
            started.append(EngineCaller(one, environment or {}))
        for engine in started:
            engine.answer()
        yield started
        for engine in started:
            engine.finish()
    finally:
        for engine in started:
            engine.kill()
