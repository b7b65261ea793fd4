"""A server that runs already, by results of `vllm bench serve`: a base calibration, rescaled until it explains them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from analysis.advise.capacity import Setting
from analysis.advise.case import Case
from experiments.records.errors import SpecError
from experiments.records.metrics import NAMES, Served, seen_once, served
from experiments.records.record import Phase, Request
from experiments.records.terminal import paragraph
from experiments.simulator.calibration import Calibration, Floats, at_speed
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.expand import FEWEST_REQUESTS
from experiments.spec.formats import find_requests, number_at

APART = 1.2  # the least ratio of the highest load to the lowest: of one load alone many scales explain everything
MOST_FAILED = 0.05  # share of requests without an answer
WORST = 0.25  # error of a latency beyond which a calibration explains nothing
SHARES, TAILS = (0.25, 0.5, 0.75, 0.9), (0.5, 0.9, 0.99)  # quantiles of TTFT and of gaps that are compared
SURER = 3.0  # how much more these weigh: a run has some fifty gaps a request
START, PRIOR = (1.0, 1e-3, 5e-3), 0.002  # scale, seconds between steps and of a request; how much it weighs to stay near them
WANTED = "what vllm bench serve --save-result --save-detailed writes"
BUDGET, BATCH = "max_num_batched_tokens", "max_num_seqs"  # in a result by --metadata


@dataclass(frozen=True)
class Bench:
    """A run of the client: how the server was set, its requests (s, tokens), users of a closed loop or 0, what they saw."""

    name: str
    setting: Setting
    arrivals: Floats
    lengths: tuple[tuple[int, int], ...]
    users: int
    seen: Served

    @property
    def rate(self) -> float:
        """Requests per second."""
        return (len(self.arrivals) - 1) / max(float(self.arrivals[-1]), 1e-9)

    @property
    def phase(self) -> Phase:
        """Its requests, for an engine; in a closed loop all but the first of each user come when another is served."""
        arrivals = np.where(np.arange(len(self.arrivals)) < self.users, 0.0, np.inf) if self.users else self.arrivals
        asked = zip(arrivals.tolist(), self.lengths, strict=True)
        return Phase(self.setting.budget, tuple(Request(at, *own, seed=n) for n, (at, own) in enumerate(asked)))


@dataclass(frozen=True)
class Scales:
    """What turns the base calibration into the server: a factor on the time of steps, seconds between steps, seconds of each
    request before the engine has it."""

    steps: float
    between_s: float
    front_s: float

    def applied(self, base: Calibration) -> Calibration:
        """The calibration of the server."""
        slower = at_speed(base, 1 / self.steps)
        return replace(slower, loop=replace(slower.loop, between_s=self.between_s, front_s=self.front_s))


def read_benches(given: str, told: str) -> list[Bench]:
    """The runs in files that commas separate, of two loads or more, none if none is given. told: CHUNK/BATCH of the server, for
    those that do not say it. Raises SpecError."""
    paths = [path.strip() for path in given.split(",") if path.strip()]
    if told and not paths:
        raise SpecError(f"SERVED: got {told} without BENCH; allowed: with BENCH=low.json,high.json, which it speaks of")
    found = [run for path in paths for run in runs_in(Path(path), told)]
    rates = [run.rate for run in found]
    if paths and (len(found) < 2 or max(rates) < APART * min(rates)):
        came = ", ".join(f"{run.name} with requests sent at {run.rate:.3g}/s" for run in found)
        allowed = (
            f"two runs or more, the fastest at least {APART:g} times the slowest: another --request-rate or --max-concurrency"
        )
        raise SpecError(f"BENCH: got {came}; allowed: {allowed}")
    return found


def runs_in(path: Path, told: str) -> list[Bench]:
    """The runs in a file. Raises SpecError."""
    where = f"BENCH: {path}"
    try:
        runs = find_requests(path.read_bytes())
    except OSError as error:
        raise SpecError(f"{where}: cannot be read: {error.strerror}; allowed: files, separated by commas; {WANTED}") from None
    except SpecError as error:  # what is wrong with it, not how a trace is had
        raise SpecError(f"{where}: {re.split('; allowed|: vllm bench|; or ', str(error))[0]}; allowed: {WANTED}") from None
    return [_bench(where, run.node, told) for run in runs]


def _bench(where: str, node: Any, told: str) -> Bench:
    lists = ("input_lens", "output_lens", "start_times", "ttfts", "itls")
    if not isinstance(node, dict) or (lacks := [name for name in lists if not isinstance(node.get(name), list)]):
        came = f"no {', '.join(lacks)}" if isinstance(node, dict) else "no result of it"
        raise SpecError(f"{where}: got {came}; allowed: {WANTED}")
    prompt, output, start, ttft, itls = (node[name] for name in lists)
    good = [n for n in np.argsort(start).tolist() if output[n] > 0 and ttft[n] > 0]
    if len(good) < max(FEWEST_REQUESTS, (1 - MOST_FAILED) * len(start)):
        came = f"{len(good)} of {len(start)} requests answered"
        raise SpecError(f"{where}: got {came}; allowed: at least {FEWEST_REQUESTS}, and {1 - MOST_FAILED:.0%} of them")
    pick = [[every[n] for n in good] for every in (prompt, output, start, ttft, itls)]
    gaps = seen_once(np.array([gap for own in pick[4] for gap in own]))
    e2e = [first + sum(own) for first, own in zip(pick[3], pick[4], strict=True)]
    users = int(node.get("max_concurrency") or 0) if node.get("request_rate") in ("inf", math.inf) else 0
    arrivals = np.array(pick[2]) - pick[2][0]
    seen = served(pick[0], pick[1], pick[3], [0.0] * len(good), e2e, gaps)
    return Bench(where.rpartition("/")[2], _setting(where, node, told), arrivals, (*zip(*pick[:2], strict=True),), users, seen)


def _setting(where: str, node: Any, told: str) -> Setting:
    """Chunk size and batch, as the result has them by --metadata or else as told."""
    numbers = [number_at(node, BUDGET), number_at(node, BATCH)]
    if any(map(math.isnan, numbers)):
        numbers = [float(part) if part.strip().isdecimal() else math.nan for part in told.split("/")]
    if len(numbers) != 2 or not 1 <= numbers[1] <= numbers[0] <= 1e6:
        form = "SERVED=2048/256, the server's --max-num-batched-tokens and --max-num-seqs, which is no more"
        own = f"--metadata {BUDGET}=2048 {BATCH}=256"
        raise SpecError(f"SERVED: got {told!r} for {where.removeprefix('BENCH: ')}; allowed: {form}, or {own} of the client")
    return Setting(int(numbers[0]), int(numbers[1]))


def again(case: Case, calibration: Calibration, bench: Bench) -> Served:
    """What the requests of a run see in simulation. Raises SpecError where the calibration does not cover them."""
    longest = max(sum(lengths) for lengths in bench.lengths)
    settings = replace(case.settings_of(bench.setting), max_model_len=max(longest, case.max_total))
    engine = SimulatedEngine(settings, calibration, case.seeds[0])
    return engine.served(engine.requests(bench.phase))


def compared(seen: Served) -> Floats:
    """Logs of the latencies that a simulation is to meet: quantiles of TTFT and of the gaps, mean TPOT."""
    gaps = np.repeat(seen.gaps["seconds"], seen.gaps["count"])
    tpot = seen.requests["tpot"]
    parts = (np.quantile(seen.requests["ttft"], SHARES), np.quantile(gaps, TAILS), [np.mean(tpot[~np.isnan(tpot)])])
    return np.asarray(np.log(np.maximum(np.concatenate(parts), 1e-9)), dtype=np.float64)


def fitted(case: Case, benches: Sequence[Bench]) -> Scales:
    """The scales with which the simulation is closest to these runs, by least squares over the logs of `compared`."""
    wanted = [compared(bench.seen) for bench in benches]
    weights = np.repeat([1.0, SURER], [len(SHARES), len(TAILS) + 1])

    def off(logs: Floats) -> float:
        calibration = Scales(*np.exp(logs)).applied(case.calibration)
        found = [compared(again(case, calibration, bench)) - own for bench, own in zip(benches, wanted, strict=True)]
        return float(np.mean(np.square(weights * found)) + PRIOR * np.mean(np.square(logs - np.log(START))))

    best, around = np.log(START), np.vstack([np.zeros(3), np.diag([0.4, 1.0, 1.0])])
    for size in (1.0, 0.5, -0.25):  # anew from where it ended, as batches make the way uneven
        options: Any = {"initial_simplex": best + size * around, "xatol": 3e-3, "fatol": 1e-5, "maxfev": 200}
        best = minimize(off, best, method="Nelder-Mead", options=options).x
    return Scales(*map(float, np.exp(best)))


def errors(case: Case, scales: Scales, bench: Bench) -> dict[str, float]:
    """Simulated over measured, less 1, of P50 TTFT and P99 TBT."""
    found = again(case, scales.applied(case.calibration), bench)
    return {name: found.percentile(name) / bench.seen.percentile(name) - 1 for name in NAMES}


def as_is(case: Case) -> Case:
    """The case in the server's own tokens, which no testbed divides."""
    return replace(case, session=replace(case.session, scale=1), max_total=case.max_total // case.session.scale)


def on_server(case: Case, benches: Sequence[Bench]) -> tuple[Case, dict[str, Any]]:
    """The case on the server that the runs are of, and how well its calibration explains them, for machines; said on the way.

    Its error is the worst with which all runs but one foretell that one. Raises SpecError if they are not explained.
    """
    scales, case = fitted(case, benches), replace(case, running=benches[0].setting)
    paragraph(
        f"the server, from calibration {case.calibration.calibration}: steps take {scales.steps:.3g} times as long, "
        f"{1e3 * scales.between_s:.3g} ms between them, {1e3 * scales.front_s:.3g} ms a request before the engine has it"
    )
    rows, explained, foretold = list[dict[str, Any]](), list[float](), list[float]()
    for bench in benches:
        others = [other for other in benches if other is not bench]
        own, left = errors(case, scales, bench), errors(case, fitted(case, others), bench)
        explained += map(abs, own.values())
        foretold += map(abs, left.values())
        seen = {name: bench.seen.percentile(name) for name in NAMES}
        rows.append(
            {"run": bench.name, "rate": bench.rate, **asdict(bench.setting), "measured": seen, "error": own, "foretold": left}
        )
        parts = ", ".join(
            f"{words} {1e3 * seen[name]:.1f} ms (simulated {own[name]:+.0%}; fitted without this run {left[name]:+.0%})"
            for name, words in NAMES.items()
        )
        paragraph(
            f"{bench.name}: {len(bench.arrivals)} requests at {bench.rate:.3g}/s, chunk size {bench.setting.budget}: {parts}"
        )
    if max(explained) > WORST:
        came = (
            f"got {max(explained):.0%} between these runs and calibration {case.calibration.calibration}, however it is scaled"
        )
        check = "check MODEL, GPU or TESTBED, and SERVED, or bench again with nothing else on the machine"
        raise SpecError(f"BENCH: {came}; allowed: at most {WORST:.0%}; {check}")
    error = replace(case.calibration.error, end_to_end=max(foretold), small_steps=None)
    fixed = f"scaled to {len(benches)} runs of a server, each foretold without it within {max(foretold):.0%}"
    calibration = replace(scales.applied(case.calibration), title=f"{case.calibration.title}, {fixed}", error=error)
    return replace(case, calibration=calibration), {**asdict(scales), "runs": rows, "end_to_end": max(foretold)}
