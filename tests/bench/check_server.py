"""`make check-server`: our numbers, and advice from bench results, against a real `vllm serve` and `vllm bench serve` here.

At 0.6 of saturation the same requests are sent to the server and to our own loop, in turn, and simulated: P99 TTFT, mean TPOT,
goodput, and a closed loop. Then a calibration is scaled to two other loads, as `make recommend BENCH=...` does, and foretells
that load and another chunk size. About 8 minutes, on an idle machine, by CPU. Results stay in the report's folder.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_serve
import numpy as np
from bench import cpu_settings, serve

from analysis.advise.case import Case
from analysis.advise.on_server import Bench, again, as_is, fitted, runs_in
from analysis.advise.recommend import session_of
from experiments.calibrate.here import calibrate, settings_of
from experiments.engine.engine_process import engines
from experiments.records.metrics import NAMES, Served, saturation_throughput, served_of
from experiments.records.record import Phase, Request
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, paragraph, parse, result
from experiments.simulator.calibration import Calibration, load_calibration
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.spec import load_testbed
from experiments.spec.workload import synthetic_trace

LOAD, FITTED = 0.6, (0.4, 0.8)  # of saturation: where they are compared; what the scales are fitted to
REQUESTS, ROUNDS, EACH, USERS = 150, 6, 50, 5  # many short rounds: the speed of a machine drifts
LENGTHS: dict[str, Any] = {
    "mean": (512, 64),
    "spread": 0.5,
}  # tokens; long, so that what HTTP adds to each request is little of it
OTHER = 256  # tokens: the other chunk size
MEASURED, SIMULATED, POINTS, FORETOLD = 0.10, 0.25, 0.10, 0.20  # targets: relative, relative, shares of requests, relative


def case_here(folder: Path) -> Case:
    """The model on this machine with one thread, as the server has it; calibrated now."""
    settings, decoding = settings_of(load_testbed("cpu"))["mistral-7b-w8"]
    settings = dataclasses.replace(settings, threads=1)
    calibration = load_calibration(str(calibrate(settings, decoding, "check-server", folder)))
    session = session_of(load_testbed("cpu"), "mistral-7b")
    session = dataclasses.replace(session, engine=dataclasses.replace(session.engine, threads=1))
    return as_is(Case(session, calibration, synthetic_trace(), 1024, 8192, (42,)))


def saturation(case: Case) -> float:
    """Requests per second with the server's chunk size and batch, simulated."""
    draw, near = np.random.default_rng(1), LENGTHS["spread"]
    lengths = [draw.integers(round(n * (1 - near)), round(n * (1 + near)), 400).tolist() for n in LENGTHS["mean"]]
    engine = SimulatedEngine(bench_serve.serving_settings(case.settings), case.calibration, 1)
    phase = Phase(bench_serve.CHUNK_SIZE, tuple(Request(0.0, *own) for own in zip(*lengths, strict=True)))
    return saturation_throughput(engine.run([phase], 1e9))


def pooled(parts: Sequence[Served]) -> Served:
    """Several rounds as one."""
    requests = {name: np.concatenate([part.requests[name] for part in parts]) for name in parts[0].requests}
    return Served(requests, np.concatenate([part.gaps for part in parts]))


def values(seen: Served, targets: tuple[float, float], users: int = 0) -> dict[str, float]:
    """What is compared: P99 TTFT and mean TPOT (s); the share of requests that keeps both targets or, of a closed loop, its
    requests/s by Little's law."""
    ttft, tpot, found = seen.requests["ttft"], np.nan_to_num(seen.requests["tpot"]), {"P99 TTFT": seen.percentile("ttft_p99")}
    last = {"requests/s": users / float(seen.requests["e2e"].mean())}
    if not users:
        last = {"goodput": float(np.mean((ttft <= targets[0]) & (tpot <= targets[1])))}
    return found | {"mean TPOT": float(tpot.mean())} | last


def judged(what: str, theirs: dict[str, float], ours: dict[str, float], limit: float) -> list[tuple[str, bool]]:
    """Each value of ours against theirs, in a line, and whether it is within the limit."""
    found = []
    for name, value in theirs.items():
        off = ours[name] - value if name == "goodput" else ours[name] / value - 1
        most, told = (POINTS, f"{100 * off:+.0f} points") if name == "goodput" else (limit, f"{off:+.1%}")
        found.append(
            (f"{what}: {name}: {value:.4g} of the server, {ours[name]:.4g}: {told}, at most {most:.0%}", abs(off) <= most)
        )
    return found


def measure(case: Case, folder: Path) -> tuple[dict[str, Bench], dict[str, list[Served]]]:
    """Serve every load, in turn with our own loop: the client's runs by name, results in the folder; what our loop saw."""
    settings, top = bench_serve.serving_settings(cpu_settings()), saturation(case)
    runs, ours = dict[str, Bench](), {"open": list[Served](), "closed": list[Served]()}

    def keep(name: str, found: dict[str, Any], budget: int = settings.max_budget) -> Bench:
        write_whole(path := folder / f"{name}.json", json.dumps(found))
        (runs[name],) = runs_in(path, f"{budget}/{bench_serve.BATCH}")
        return runs[name]

    with engines([settings]) as (run,), bench_serve.serving(settings) as bench:

        def replay(one: Bench) -> Served:
            run(serve, bench_serve.phase([0.0] * bench_serve.WARM_UP))
            return served_of(run(serve, one.phase))

        for seed, share in enumerate(FITTED):
            keep(f"fitted-{share:g}", bench(REQUESTS, share * top, seed, **LENGTHS))
        for number in range(ROUNDS):
            ours["open"].append(replay(keep(f"open-{number}", bench(EACH, LOAD * top, 10 + number, **LENGTHS))))
            ours["closed"].append(replay(keep(f"closed-{number}", bench(EACH, None, 20 + number, users=USERS, **LENGTHS))))
    with bench_serve.serving(dataclasses.replace(settings, max_budget=OTHER)) as bench:
        keep("other", bench(REQUESTS, LOAD * top, 30, **LENGTHS), OTHER)
    return runs, ours


def compare(case: Case, runs: dict[str, Bench], ours: dict[str, list[Served]]) -> list[tuple[str, bool]]:
    """Every comparison in a line, and whether it is within its target."""
    found, known = list[tuple[str, bool]](), case.calibration
    loops = {kind: [runs[f"{kind}-{number}"] for number in range(ROUNDS)] for kind in ours}

    def simulated(benches: Sequence[Bench], calibration: Calibration) -> Served:
        return pooled([again(case, calibration, one) for one in benches])

    requests = simulated(loops["open"], known).requests
    targets = float(np.quantile(requests["ttft"], 0.8)), float(np.quantile(requests["tpot"], 0.9))
    for kind, benches in loops.items():
        theirs = values(pooled([one.seen for one in benches]), targets, benches[0].users)
        for what, seen, limit in (
            ("measured", pooled(ours[kind]), MEASURED),
            ("simulated", simulated(benches, known), SIMULATED),
        ):
            found += judged(f"{kind} loop, {what}", theirs, values(seen, targets, benches[0].users), limit)
    scales = fitted(case, [runs[f"fitted-{share:g}"] for share in FITTED])
    paragraph(f"the server, from our loop's calibration: {scales}")
    for what, benches in (("third load", loops["open"]), (f"chunk size {OTHER}", [runs["other"]])):
        sides = pooled([one.seen for one in benches]), simulated(benches, scales.applied(known))
        theirs, foretold = ({words: side.percentile(name) for name, words in NAMES.items()} for side in sides)
        found += judged(f"{what}, foretold from two others", theirs, foretold, FORETOLD)
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 if a target is missed."""
    options = parse(arguments("tests.bench.check_server", __doc__, "report"), argv)
    folder = options.report / "check-server"
    folder.mkdir(parents=True, exist_ok=True)
    case = case_here(folder)
    lines = compare(case, *measure(case, folder))
    for words, met in lines:
        paragraph(f"{'met   ' if met else 'MISSED'}  {words}")
    result(met=all(met for _, met in lines), lines=[words for words, _ in lines])
    return 0 if all(met for _, met in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
