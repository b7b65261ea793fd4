"""What runs in a session's own process on its node: the engine, watched, under a parent without which it ends."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from experiments.engine.engine_process import lead_group
from experiments.engine.session import TrialResult, run_trials, start_engine
from experiments.spec.expand import Session
from experiments.spec.traces import Trace

LOAD_S, GRACE_S = 900.0, 120.0  # an engine that takes so long to load, or for a trial its time limit and so much, is hung
CORES = "ENGINE_CORES"  # environment variable: which parts of its node's cores a session has; "0,1/4": the first two quarters
T = TypeVar("T")


def cores_of(share: str, cores: Sequence[int]) -> set[int]:
    """The cores, in their order, that are these parts of them (see CORES); parts are disjoint, and all together are all."""
    parts, count = share.split("/")
    bounds = [len(cores) * part // int(count) for part in range(int(count) + 1)]
    return {core for part in map(int, parts.split(",")) for core in cores[bounds[part] : bounds[part + 1]]}


def _place(core: int) -> tuple[int, ...]:
    """By which cores are sorted, so that those of a socket lie together, and the threads of a core."""
    told = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        return int((told / "physical_package_id").read_text()), int((told / "core_id").read_text()), core
    except (OSError, ValueError):
        return 0, core, core


def work(session: Session, owed: Sequence[str], trace: Trace | None) -> Iterator[TrialResult | None]:
    """Run the owed trials on vLLM. Yields None once the engine is loaded and warm, then each result."""
    from experiments.engine.vllm_engine import VllmEngine  # imported here: the driver needs neither vLLM nor torch

    lead_group()
    share = os.environ.get(CORES)
    if share and (own := cores_of(share, sorted(os.sched_getaffinity(0), key=_place))):  # none with fewer cores than GPUs
        os.sched_setaffinity(0, own)  # what compiles and tensor-parallel workers inherit it

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
