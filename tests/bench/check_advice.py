"""`make check-advice`: what make recommend says, against an exhaustive search on the real engine of this machine.

Every chunk size of a sweep is measured at every rate of a grid, seed by seed. The capacity of the recommended chunk size is
compared with the best of all, for three P99 TBT targets, and the engine time of both ways is counted.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd

from analysis.advise.advice import Advice, advise, settled
from analysis.advise.capacity import DELAY_LIMIT_S, Latency, Search, Setting
from analysis.advise.case import Case, requests_asked
from analysis.advise.question import SHOWN, Question
from analysis.advise.recommend import case_of, confirm
from analysis.advise.tell import show_confirmed
from experiments.calibrate.here import calibrate, settings_of
from experiments.cluster.trials import Load, load_sessions, serve_loads
from experiments.machine.doctor import choose_testbed
from experiments.records.errors import SpecError
from experiments.records.metrics import served_of
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, paragraph, parse, result, took
from experiments.spec.spec import Testbed, load_figure

RATES = [1.19**n for n in range(-4, 3)]  # times the highest simulated capacity without a TBT target
SIZES = 8  # chunk sizes: those of the sweep, and between them from the smallest on
SECONDS = 5.0  # of arrivals in a measured load
SEEDS = 2
ENOUGH, SHARE = 0.95, 0.25  # of the best capacity; of the exhaustive search's engine time
ABOVE = 1.15  # a target lets through what a chunk size needs, and this much more


def measure(case: Case, testbed: Testbed, settings: Sequence[Setting], rates: Sequence[float], seed: int) -> pd.DataFrame:
    """Every setting at every rate on the real engine; seed, budget, rate, the latencies, and the engine seconds of all."""
    loads = [Load(setting.budget, setting.max_batch, rate) for setting in settings for rate in rates]
    began = time.monotonic()
    base, most = replace(case.session, seed=seed), len(case.trace.prompt)
    sessions = load_sessions(base, loads, SECONDS, case.max_total, testbed.switch_chunk_size, most)
    found = serve_loads(sessions, case.trace)
    spent = time.monotonic() - began
    seen = ((load, Question().latency(served_of(record))) for load, record in found)
    rows = [{"seed": seed, "budget": load.budget, "rate": load.rate, **latency} for load, latency in seen]
    return pd.DataFrame(rows).assign(engine_s=spent)


def measured_capacity(rows: pd.DataFrame, limits: Latency) -> float:
    """Of one setting and seed: the rate where the worst ratio to a limit first exceeds 1, log-interpolated; NaN if always."""
    rows = rows.sort_values("rate")
    seen = rows[[*SHOWN]].to_numpy().tolist()
    excess = np.maximum.accumulate([Latency(zip(SHOWN, row, strict=True)).within(limits)[0] for row in seen])
    rates = np.log(rows["rate"].to_numpy())
    if excess[0] > 0:
        return math.nan
    over = int(np.searchsorted(excess, 0.0, side="right"))
    if over == len(excess):
        return float(np.exp(rates[-1]))
    share = -excess[over - 1] / (excess[over] - excess[over - 1])
    return float(np.exp(rates[over - 1] + share * (rates[over] - rates[over - 1])))


def targets_of(case: Case, search: Search, delay: float) -> list[float]:
    """Three P99 TBT targets, seconds: a little above what every second chunk size of the sweep takes under full load."""
    found = []
    for setting in case.settings_to_try()[0:6:2]:
        top = search.capacity(setting, Latency(delay_p50=delay), case.seeds[0])
        found.append(ABOVE * search.serve(setting, top.rate, case.seeds[0])["tbt_p99"])
    return found


def exhaustive(
    case: Case, testbed: Testbed, settings: Sequence[Setting], top: float, options: argparse.Namespace
) -> pd.DataFrame:
    """The search on the engine: what measure returns, of all seeds; a seed measured before is read from its CSV."""
    tables = []
    for seed in case.seeds[: options.seeds]:
        path = options.report / f"check-advice-{testbed.testbed}-seed{seed}.csv"
        if not path.is_file():
            table = measure(case, testbed, settings, [top * rate for rate in RATES], seed)
            write_whole(path, table.to_csv(index=False))
        tables.append(pd.read_csv(path))
    table = pd.concat(tables)
    if lacking := sorted({setting.budget for setting in settings} - {*table["budget"]}):
        words = f"chunk size {lacking[0]} was not measured; delete them and start again"
        raise SpecError(f"{options.report}: check-advice-*.csv: {words}")
    return table


def judge(case: Case, testbed: Testbed, advice: Advice, table: pd.DataFrame) -> tuple[bool, float]:
    """Whether the advice is as good as the best of the search, and the engine seconds that confirming it took."""
    began = time.monotonic()
    found = confirm(case, advice, testbed)
    spent = time.monotonic() - began
    target = f"P99 TBT {1e3 * advice.question.targets['tbt_p99']:.1f} ms"
    console.print(f"\n{target}: chunk size {advice.best.setting.budget}, {advice.value:.3g} requests/s simulated")
    show_confirmed(advice, found)
    real = {key: measured_capacity(rows, advice.question.limits) for key, rows in table.groupby(["budget", "seed"])}
    means = pd.Series(real).fillna(0.0).groupby(level=0).mean()
    own, best = settled(advice, found).budget, int(str(means.idxmax()))
    ratio = float(means[own] / means[best]) if means[best] else 1.0
    words = f"{means[own]:.3g} requests/s measured, {ratio:.0%} of the best ({best}: {means[best]:.3g})"
    paragraph(f"{target}: chunk size {own} carries {words}; predicted {advice.low:.3g} to {advice.high:.3g}")
    paragraph(", ".join(f"{budget}: {rate:.3g}" for budget, rate in means.items()))
    return ratio >= ENOUGH or bool(advice.low <= means[best] <= advice.high), spent


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 if a target is missed, 2 for bad input."""
    parser = arguments("tests.bench.check_advice", __doc__, "testbed", "trace", "out", "report")
    parser.add_argument("--model", default="mistral-7b")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parse(parser, argv)
    testbed, _ = choose_testbed(options.testbed, options.out)
    if testbed.platform == "simulated":
        raise SpecError(f"TESTBED: got {testbed.testbed}, which has no engine; allowed: a testbed with one")
    if options.model not in testbed.models:
        raise SpecError(f"MODEL: got {options.model!r}; allowed: {', '.join(testbed.models)}")
    trace = requests_asked(options.trace, load_figure("fig9b").max_model_len)
    began = time.monotonic()
    calibrate(*settings_of(testbed)[testbed.models[options.model]], testbed.testbed)
    spent = time.monotonic() - began
    case = case_of(testbed, options.model, trace)
    search, delay = case.search(Question()), DELAY_LIMIT_S / testbed.scale
    sweep = case.settings_to_try()
    between = [Setting((a.budget + b.budget) // 2, a.max_batch) for a, b in pairwise(sweep)]
    sweep += between[: SIZES - len(sweep)]
    top = max(search.capacity(setting, Latency(delay_p50=delay), case.seeds[0]).rate for setting in sweep)
    advised = [
        advise(case, search, Question(Latency(tbt_p99=target), delay_s=delay)) for target in targets_of(case, search, delay)
    ]
    settings = sorted({*sweep, *(advice.best.setting for advice in advised)})
    table = exhaustive(case, testbed, settings, top, options)
    judged = [judge(case, testbed, advice, table) for advice in advised]
    spent += sum(seconds for _, seconds in judged)
    searched = float(table.groupby("seed")["engine_s"].first().sum())
    words = f"{spent:.0f} s for calibration and three answers, {searched:.0f} s for the search"
    paragraph(f"engine time: {words}: {spent / searched:.0%}")
    met = all(good for good, _ in judged) and spent <= SHARE * searched
    missed = "MISSED: at least 95 % of the best or inside the interval, with a quarter of the engine time"
    console.print(f"{'met' if met else missed}; in {took()}")
    result(met=met, good=[good for good, _ in judged], advice_s=spent, search_s=searched)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
