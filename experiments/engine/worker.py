"""What runs in a session's own process on its node: the engine, watched, under a parent without which it ends."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from experiments.engine.session import TrialResult, run_trials, start_engine
from experiments.spec.expand import Session
from experiments.spec.traces import Trace

LOAD_S, GRACE_S = 900.0, 120.0  # an engine that takes so long to load, or for a trial its time limit and so much, is hung
T = TypeVar("T")


def _die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it ends, however that ends."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def work(session: Session, owed: Sequence[str], trace: Trace | None) -> Iterator[TrialResult | None]:
    """Run the owed trials on vLLM. Yields None once the engine is loaded and warm, then each result."""
    from experiments.engine.vllm_engine import VllmEngine  # imported here: the driver needs neither vLLM nor torch

    _die_with_parent()

    def results() -> Iterator[TrialResult | None]:
        engine = start_engine(session, VllmEngine)
        yield None
        yield from run_trials(session, owed, engine, trace)

    yield from watched(results(), LOAD_S, session.time_limit_s + GRACE_S)


def watched(results: Iterator[T], first_s: float, each_s: float) -> Iterator[T]:
    """The same results, but the process ends if the first takes more than first_s, or another more than each_s.

    faulthandler's watchdog is a thread of C: it ends a process that hangs inside a kernel, too.
    """
    with Path(os.devnull).open("w") as nowhere:
        faulthandler.dump_traceback_later(first_s, exit=True, file=nowhere)
        try:
            for result in results:
                faulthandler.cancel_dump_traceback_later()
                yield result
                faulthandler.dump_traceback_later(each_s, exit=True, file=nowhere)
        finally:
            faulthandler.cancel_dump_traceback_later()
