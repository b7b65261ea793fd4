"""Engines in processes of their own, for what calls one directly: calibration and `make bench`. Figures use Ray."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from experiments.spec.spec import EngineSettings


def _serve(pipe: Connection, settings: EngineSettings) -> None:
    """Child process: load, then answer (function, arguments) with function(engine, *arguments) until None comes.

    What libraries say on standard error is shown only if the engine dies.
    """
    real = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            from experiments.engine.vllm_engine import VllmEngine

            engine = VllmEngine(settings)
            pipe.send(None)
            while (job := pipe.recv()) is not None:
                pipe.send(job[0](engine, *job[1:]))
            engine.close()
        except BaseException:
            said.seek(0)
            os.write(real, said.read()[-4000:])
            raise
        finally:
            os.dup2(real, 2)


def _ask(pipe: Connection, *job: Any) -> Any:
    pipe.send(job)
    return pipe.recv()


@contextmanager
def engines(settings: Sequence[EngineSettings]) -> Iterator[list[Callable[..., Any]]]:
    """One process per settings, all loaded. Yields a caller for each: call(f, *arguments) is f(engine, *arguments).

    Raises EOFError if an engine dies; what it said is on standard error.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    for one in settings:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, one))
        process.start()
        theirs.close()
        started.append((ours, process))

    try:
        for pipe, _ in started:
            pipe.recv()  # loaded
        yield [partial(_ask, pipe) for pipe, _ in started]
    finally:
        for pipe, process in started:
            with suppress(OSError):
                pipe.send(None)
            process.join(30)
            process.kill()
