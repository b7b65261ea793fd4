"""`make bench`: what our loop costs, and whether switching the chunk size equals a freshly built engine.

Ratios only, interleaved in one run, medians: absolute times on a shared machine say little. Run it on an idle machine.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from experiments import bench_driver, bench_serve
from experiments.engine import Phase, Request
from experiments.expand import expand
from experiments.metrics import prefill_seconds
from experiments.spec import EngineSettings, SpecError, load_figure, load_testbed
from experiments.vllm_engine import EngineError

ROUNDS = 40
LOOP_TARGET = 1.01  # engine time in our loop / in a bare loop over the same engine


def engine_process(pipe: Connection, settings: EngineSettings) -> None:
    """Child process: _serve_jobs, in which what libraries say on standard error is shown only if the engine dies."""
    real = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            _serve_jobs(pipe, settings)
        except BaseException:
            said.seek(0)
            os.write(real, said.read()[-4000:])
            raise
        finally:
            os.dup2(real, 2)


def _serve_jobs(pipe: Connection, settings: EngineSettings) -> None:
    """One engine that answers (budget, prompt tokens, bare loop?) with (seconds, tokens of each step).

    A job of phases is answered with their record, an empty job with the engine's facts.
    """
    from experiments.vllm_engine import VllmEngine

    engine = VllmEngine(settings)
    engine.check()
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        if not job:
            pipe.send(dict(engine.facts))
            continue
        if isinstance(job[0], Phase):
            pipe.send(engine.run(job, time_limit_s=600.0))
            continue
        budget, tokens, bare = job
        request = Request(0.0, tokens, 1)
        if bare:
            pipe.send((_bare_loop(engine, budget, request), ()))
            continue
        record = engine.run([Phase(budget, (request,))], time_limit_s=600.0)
        pipe.send((float(prefill_seconds(record).iloc[0]), tuple(record.steps["prefill_tokens"])))
    engine.close()


def _bare_loop(engine: Any, budget: int, request: Request) -> float:
    """The least that a loop over vLLM can do: add a request, step until it is done. Seconds in step()."""
    from experiments.workload import prompt_ids

    inner = engine._engine
    engine._scheduler.max_num_scheduled_tokens = budget
    watched, engine._scheduler.schedule = engine._scheduler.schedule, engine._schedule
    engine._add("bare", request, prompt_ids(request, engine._vocabulary))
    seconds = 0.0
    while inner.has_unfinished_requests():
        started = time.perf_counter()
        inner.step()
        seconds += time.perf_counter() - started
    engine._scheduler.schedule = watched
    return seconds


@contextmanager
def engines(settings: list[EngineSettings]) -> Iterator[list[Callable[..., Any]]]:
    """One process per settings, all loaded; yields a function for each that runs one job and returns its answer."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[SpawnProcess] = []
    for one in settings:
        ours, theirs = context.Pipe()
        process = context.Process(target=engine_process, args=(theirs, one))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)

    def caller(pipe: Connection) -> Callable[..., Any]:
        def call(*job: Any) -> Any:
            pipe.send(job)
            return pipe.recv()

        return call

    try:
        for pipe in pipes:
            pipe.recv()  # "ready"; EOFError if the engine died, its own words are on standard error
        yield [caller(pipe) for pipe in pipes]
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            with suppress(OSError):
                pipe.send(None)
            process.join(30)
            process.kill()


def loop_ratio(rounds: int = ROUNDS) -> float:
    """Median over rounds of (engine time in our loop / in a bare loop), the two in turn on one engine."""
    settings = cpu_settings()
    with engines([settings]) as (run,):
        budget, tokens = settings.max_budget // 8, settings.max_model_len - 1
        ratios = []
        for number in range(rounds + 2):
            order = (False, True) if number % 2 else (True, False)  # each goes first every other time
            seconds = {bare: run(budget, tokens, bare)[0] for bare in order}
            ratios.append(seconds[False] / seconds[True])
    return float(statistics.median(ratios[2:]))


def switching(rounds: int = 12) -> list[tuple[int, float, bool]]:
    """Per chunk size: budget, median ratio of switched to freshly built, and whether every step's batch was the same."""
    settings = cpu_settings()
    budgets = [settings.max_budget // part for part in (32, 16, 8)]
    fresh = [dataclasses.replace(settings, max_budget=budget) for budget in budgets]
    rows = []
    with engines([settings, *fresh]) as (switched, *built):
        for budget, own in zip(budgets, built, strict=True):
            ratios, same = [], True
            for _ in range(rounds + 1):
                one, two = switched(budget, settings.max_model_len - 1, False), own(budget, settings.max_model_len - 1, False)
                ratios.append(one[0] / two[0])
                same &= one[1] == two[1]
            rows.append((budget, statistics.median(ratios[1:]), same))
    return rows


def cpu_settings() -> EngineSettings:
    """The settings of Figure 9a's Mistral-7B panel on the cpu testbed."""
    sessions = expand(load_figure("fig9a"), load_testbed("cpu"), 1)
    return next(session.engine for session in sessions if session.model == "mistral-7b")


def main() -> int:
    """Print the ratios; 1 if a target is missed."""
    try:
        ratio = loop_ratio()
        print(f"engine time, our loop / bare loop: {ratio:.4f} (median of {ROUNDS}, target at most {LOOP_TARGET})")
        met = ratio <= LOOP_TARGET
        for budget, median, equal in switching():
            print(f"chunk size {budget}: switched / freshly built {median:.3f}, batches {'equal' if equal else 'DIFFER'}")
            met &= equal
        ms, mb = bench_driver.measure()
        print(bench_driver.line(ms, mb))
        met &= ms <= bench_driver.TARGET_MS and mb <= bench_driver.TARGET_MB
        serving = bench_serve.serving_settings(cpu_settings())
        with engines([serving]) as (run,):
            print(*bench_serve.table(bench_serve.measure(serving, run)), sep="\n")
        return 0 if met else 1
    except (SpecError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
