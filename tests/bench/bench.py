"""`make bench`: what our loop costs, and whether switching the chunk size equals a freshly built engine.

Ratios only, interleaved in one run, medians: absolute times on a shared machine say little. Run it on an idle machine.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import bench_driver
import bench_serve

from experiments.engine.engine_process import engines
from experiments.engine.vllm_engine import EngineError
from experiments.machine.doctor import choose_testbed
from experiments.machine.gpus import environment_here
from experiments.records.errors import SpecError
from experiments.records.metrics import prefill_seconds
from experiments.records.record import Phase, Record, Request
from experiments.records.terminal import arguments, command, paragraph, parse, result
from experiments.spec.expand import expand
from experiments.spec.spec import EngineSettings, Testbed, load_figure, load_testbed
from experiments.spec.workload import prompt_ids

ROUNDS = 40
LOOP_TARGET = 1.01  # engine time in our loop / in a bare loop over the same engine


def prefill(engine: Any, budget: int, tokens: int) -> tuple[float, tuple[int, ...]]:
    """One prompt in our loop: seconds, tokens of each step."""
    record = engine.run([Phase(budget, (Request(0.0, tokens, 1),))], time_limit_s=600.0)
    return float(prefill_seconds(record).iloc[0]), tuple(record.steps["prefill_tokens"])


def bare_loop(engine: Any, budget: int, tokens: int) -> tuple[float, tuple[int, ...]]:
    """The least that a loop over vLLM can do: add a request, step until it is done. Seconds in step(), nothing else."""
    request, inner, seconds = Request(0.0, tokens, 1), engine._engine, 0.0
    engine._scheduler.max_num_scheduled_tokens = budget
    watched, engine._scheduler.schedule = engine._scheduler.schedule, engine._schedule
    engine._add("bare", request, prompt_ids(request, engine._vocabulary))
    while inner.has_unfinished_requests():
        started = time.perf_counter()
        inner.step()
        seconds += time.perf_counter() - started
    engine._scheduler.schedule = watched
    return seconds, ()


def serve(engine: Any, *phases: Phase) -> Record:
    """The record of these phases."""
    return cast(Record, engine.run(phases, 600.0))


def loop_ratio(settings: EngineSettings, rounds: int = ROUNDS) -> float:
    """Median over rounds of (engine time in our loop / in a bare loop), the two in turn on one engine."""
    with engines([settings], environment_here(settings)) as (run,):
        budget, tokens = settings.max_budget // 8, settings.max_model_len - 1
        ratios = []
        for number in range(rounds + 2):
            order = (prefill, bare_loop) if number % 2 else (bare_loop, prefill)  # each goes first every other time
            seconds = {loop: run(loop, budget, tokens)[0] for loop in order}
            ratios.append(seconds[prefill] / seconds[bare_loop])
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
                one, two = (run(prefill, budget, settings.max_model_len - 1) for run in (switched, own))
                ratios.append(one[0] / two[0])
                same &= one[1] == two[1]
            rows.append((budget, statistics.median(ratios[1:]), same))
    return rows


def settings_on(testbed: Testbed) -> EngineSettings:
    """The settings of Figure 9a's Mistral-7B panel there."""
    sessions = expand(load_figure("fig9a"), testbed, 1)
    return next(session.engine for session in sessions if session.model == "mistral-7b")


def cpu_settings() -> EngineSettings:
    """The same on the cpu testbed."""
    return settings_on(load_testbed("cpu"))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratios; 1 if a target is missed."""
    options = parse(arguments("tests.bench.bench", __doc__, "testbed", "out"), argv)
    testbed, reason = choose_testbed(options.testbed, options.out)
    settings, switched = settings_on(testbed), list[tuple[int, float, bool]]()
    paragraph(f"testbed {testbed.testbed} ({reason})")
    try:
        ratio = loop_ratio(settings)
        paragraph(f"engine time, our loop / bare loop: {ratio:.4f} (median of {ROUNDS}, target at most {LOOP_TARGET})")
        if settings.platform == "cpu":
            switched = switching()
        else:
            paragraph("switched against fresh, vllm bench serve: not measured here, as a GPU holds one engine at a time")
        for budget, median, equal in switched:
            batches = "equal" if equal else "DIFFER"
            paragraph(f"chunk size {budget}: switched / freshly built {median:.3f}, batches {batches}")
        ms, mb = bench_driver.measure()
        paragraph(bench_driver.line(ms, mb))
        if settings.platform == "cpu":
            serving = bench_serve.serving_settings(settings)
            with engines([serving]) as (run,):
                for line in bench_serve.table(bench_serve.measure(serving, partial(run, serve))):
                    paragraph(line)
    except EngineError as error:
        raise SpecError(str(error)) from None
    met = ratio <= LOOP_TARGET and all(equal for _, _, equal in switched)
    met = met and ms <= bench_driver.TARGET_MS and mb <= bench_driver.TARGET_MB
    result(met=met, loop_ratio=ratio, switched={budget: median for budget, median, _ in switched}, driver_ms=ms, driver_mb=mb)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
