"""Engines in processes of their own, for what calls one directly: calibration and `make bench`. Figures use Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments.records.errors import SpecError
from experiments.spec.spec import EngineSettings


def _serve(pipe: Connection, settings: EngineSettings, log: str) -> None:
    """Child process: load, then answer (function, arguments) with function(engine, *arguments) until None comes.

    What libraries say on standard error goes to the log, and so do Python's last words if the engine dies.
    """
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    from experiments.engine.vllm_engine import VllmEngine

    engine = VllmEngine(settings)
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        pipe.send(job[0](engine, *job[1:]))
    engine.close()


class EngineCaller:
    """An engine in a process of its own: call(f, *arguments) is f(engine, *arguments)."""

    def __init__(self, settings: EngineSettings) -> None:
        context = multiprocessing.get_context("spawn")
        handle, log = tempfile.mkstemp(prefix=f"engine-{settings.model}-", suffix=".log")
        os.close(handle)
        self._model, self._log, (self._pipe, theirs) = settings.model, Path(log), context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings, log))
        self._process.start()
        theirs.close()
        self._died = False

    def __call__(self, *job: Any) -> Any:
        """Raises SpecError, with the engine's last words, if it dies."""
        with suppress(BrokenPipeError):  # it died before: its end of the pipe tells
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

    def close(self) -> None:
        """End the process; what an engine said that did not die is of no use."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(30)
        self._process.kill()
        if not self._died:
            self._log.unlink(missing_ok=True)


@contextmanager
def engines(settings: Sequence[EngineSettings]) -> Iterator[list[EngineCaller]]:
    """One process per settings, all loaded. Raises SpecError, in one line with its last words, if an engine dies."""
    started: list[EngineCaller] = []
    try:
        started += [EngineCaller(one) for one in settings]
        for engine in started:
            engine.answer()
        yield started
    finally:
        for engine in started:
            engine.close()
