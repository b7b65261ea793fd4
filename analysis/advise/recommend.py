"""`make recommend`: the chunk size for a model, a machine, latency targets and a load; see docs/recommend.md."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.advise.advice import Advice, Case, advise, advise_rate, describe, evidence
from analysis.advise.capacity import DELAY_LIMIT_S, WORDS, Latency, Search, Setting, curve, latency
from analysis.show.plots import save
from analysis.show.plots_advice import capacity_figure
from experiments.cluster.trials import TRIAL_SECONDS, Load, load_sessions, serve_loads
from experiments.engine.arguments import command_line, serving_arguments, serving_environment
from experiments.machine.doctor import choose_testbed, problems
from experiments.records import terminal
from experiments.records.errors import SpecError
from experiments.records.metrics import NAMES
from experiments.records.provenance import gpus
from experiments.records.store import to_json, write_whole
from experiments.records.terminal import arguments, command, console, parse, result, written
from experiments.simulator.calibration import load_calibration
from experiments.simulator.estimate import calibration_here
from experiments.spec.expand import FEWEST_REQUESTS, expand
from experiments.spec.spec import MODELS, ServingFigure, Testbed, load_figure, read_yaml
from experiments.spec.traces import Trace, describe_trace
from experiments.spec.workload import check_gaps, check_requests, choose_trace

SEEDS = 4
TARGETS_SHOWN = 60  # P99 TBT targets of a capacity curve, spread evenly over their logarithm
MOST = 1e6  # seconds, requests per second: what a figure may say, too
CONFIRM_AT = 0.9  # of the simulated capacity: at the capacity itself a coin would decide


@dataclass(frozen=True)
class Confirmed:
    """A setting on the real engine at a rate (requests/s): measured and simulated latency, whether the limits were kept."""

    setting: Setting
    rate: float
    requests: int
    measured: Latency
    simulated: Latency
    kept: bool


def positive(name: str, text: str | None) -> float | None:
    """A variable of the Makefile as a number, None where it is not given. Raises SpecError."""
    if not text:
        return None
    with suppress(ValueError):
        if 0 < float(text) <= MOST:
            return float(text)
    raise SpecError(f"{name}: got {text!r}; allowed: a number above 0, at most {MOST:g}")


def case_of(testbed: Testbed, model: str, trace: Trace, make: bool = False) -> Case:
    """What is asked, from Figure 9b's settings of the model on the testbed.

    Simulated with this machine's calibration where there is one, else with the testbed's; `make` one where there is neither.
    Raises SpecError for a model that is not there, a trace that is too short, a model without calibration.
    """
    figure = load_figure("fig9b")
    assert isinstance(figure, ServingFigure)
    sessions = {session.model: session for session in expand(figure, testbed, 1)}
    if model not in sessions:
        raise SpecError(f"MODEL: got {model!r}; allowed on testbed {testbed.testbed}: {', '.join(sorted(sessions))}")
    check_requests(trace, FEWEST_REQUESTS, "or there is no percentile to speak of")
    check_gaps(trace, testbed.scale)
    settings = sessions[model].engine
    here = calibration_here(testbed.testbed, settings)
    if here is None and settings.calibration is None and make:
        from experiments.calibrate.here import calibrate, settings_of  # not before: what fits takes long to import

        here = calibrate(*settings_of(testbed)[settings.model], testbed.testbed)
    name = str(here) if here else settings.calibration
    if name is None:
        raise SpecError(f"{model}: no calibration for testbed {testbed.testbed}; make calibrate makes one, on its machine")
    requests = min(figure.requests, len(trace.prompt))
    return Case(sessions[model], load_calibration(name), trace, requests, figure.max_model_len, figure.seeds[:SEEDS])


def serve_arguments(case: Case, setting: Setting) -> str:
    """What to paste into a shell: `vllm serve` with everything that the answer rests on, as our own engine is started."""
    source = re.search(r"config\.json of (\S+)", str(read_yaml(MODELS / f"{case.settings.model}.json")["_source"]))
    settings = replace(case.settings, max_budget=setting.budget, max_batch=setting.max_batch)
    variables = [f"{name}={value}" for name, value in serving_environment(settings).items()]
    words = ["vllm", "serve", source[1] if source else "MODEL", *command_line(serving_arguments(settings))]
    return " ".join([*variables, shlex.join(words)])


def show(case: Case, advice: Advice) -> None:
    """Print the answer in words, and the options beside the best as a table."""
    best, fixed = advice.best, advice.fixed_rate
    what = f"{case.model}: chunk size {best.setting.budget}, at most {best.setting.max_batch} requests in a step"
    many, limits = f"95 % interval {advice.low:.3g} to {advice.high:.3g}", describe(advice.limits)
    if fixed is None:
        words = f"{advice.value:.3g} requests/s ({many}) with {limits}; {WORDS[best.bound_by]} forbids more"
    else:
        words = f"{WORDS[advice.goal]} {advice.value:.3g} s ({many}) with {limits} at {fixed:g} requests/s"
    view = terminal.table("chunk", "batch", "QPS", "to best", "bound by", "TBT ms", "TTFT ms")
    for option in sorted((best, *advice.neighbours), key=lambda option: option.setting):
        kept = f"{option.rate:.3g}" if option.rate else "no"
        cost = f"{option.rate / best.rate - 1:+.0%}" if fixed is None else ""
        numbers = (f"{1e3 * option.latency.tbt_p99:.0f}", f"{1e3 * option.latency.ttft_p50:.0f}")
        view.add_row(str(option.setting.budget), str(option.setting.max_batch), kept, cost, WORDS[option.bound_by], *numbers)
    console.print(f"\n{what}: {words}", style="bold")
    console.print(view, soft_wrap=False)
    keys = "batch: most requests in a step; QPS: capacity, mean over seeds; P99 TBT and P50 TTFT about there"
    console.print(f"SIMULATED; {keys}, seed {case.seeds[0]}")
    console.print(f"evidence: {evidence(case)}")
    console.print(f"paste: {serve_arguments(case, best.setting)}")


def curves(case: Case, search: Search, settings: Sequence[Setting], limits: Latency, targets: Sequence[float]) -> pd.DataFrame:
    """Capacity near P99 TBT `targets` (s), from a quarter of the least to twice the most, one curve per setting:

    model, chunk_size, target, capacity (requests/s).
    """
    tables, near, around = [], 1.0, np.geomspace(min(targets) / 4, 2 * max(targets), TARGETS_SHOWN).tolist()
    for setting in settings:
        found = curve(search, setting, limits, case.seeds[0], around, near)
        near = max((rate for rate in found if rate > 0), default=near)
        values = {"model": case.model, "chunk_size": setting.budget, "target": around, "capacity": found}
        tables.append(pd.DataFrame(values))
    return pd.concat(tables, ignore_index=True)


def confirm(case: Case, advice: Advice, testbed: Testbed) -> list[Confirmed]:
    """Serve the best and its neighbours on the real engine for a short while, a little below their simulated capacities."""
    share = CONFIRM_AT if advice.fixed_rate is None else 1.0
    options = [option for option in (advice.best, *advice.neighbours) if option.rate]
    loads = [Load(option.setting.budget, option.setting.max_batch, share * option.rate) for option in options]
    seconds = testbed.serving.trial_seconds if testbed.serving else TRIAL_SECONDS
    found = []
    most = len(case.trace.prompt)
    sessions = load_sessions(case.session, loads, seconds, case.max_total, testbed.switch_chunk_size, most)
    for load, record in serve_loads(sessions, case.trace):
        setting, seen, count = Setting(load.budget, load.max_batch), latency(record), len(record.requests)
        predicted = replace(case, requests=count).search().serve(setting, load.rate, case.session.seed)
        found.append(Confirmed(setting, load.rate, count, seen, predicted, seen.within(advice.limits)[0] <= 0))
    return found


def show_confirmed(advice: Advice, found: Sequence[Confirmed]) -> None:
    """Print what was measured, and which setting it speaks for."""
    for entry in found:
        one, two = entry.measured, entry.simulated
        both = ((words, 1e3 * getattr(one, name), 1e3 * getattr(two, name)) for name, words in NAMES.items())
        pairs = ", ".join(f"{name} {measured:.1f} ms (simulated {simulated:.1f})" for name, measured, simulated in both)
        kept = "kept" if entry.kept else f"NOT kept, for {WORDS[one.within(advice.limits)[1]]}"
        load = f"chunk size {entry.setting.budget} at {entry.rate:.3g} requests/s"
        console.print(f"measured here, {entry.requests} requests: {load}: {pairs}: {kept}")
    final = settled(advice, found)
    if not any(entry.kept for entry in found):
        words = "no; none kept the targets on the engine, so take less load or looser targets"
    elif final == advice.best.setting:
        words = f"chunk size {final.budget} kept the targets on the engine"
    else:
        words = f"no; take chunk size {final.budget}, which kept them at the highest load of those measured"
    console.print(f"confirmed: {words}")


def settled(advice: Advice, found: Sequence[Confirmed]) -> Setting:
    """The last word: the best in simulation if it kept the limits on the engine or none did, else who did at the most load."""
    good = {entry.setting: entry.rate for entry in found if entry.kept}
    return advice.best.setting if not good or advice.best.setting in good else max(good, key=good.__getitem__)


def finite(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """asdict's dict_factory for JSON, which has no infinity: null."""
    return {key: None if value == math.inf else value for key, value in pairs}


def facts(case: Case, advice: Advice) -> dict[str, Any]:
    """The answer for machines: everything that was printed and what it rests on."""
    return {
        "model": case.model,
        "settings": asdict(case.settings),
        "simulated": True,
        "calibration": case.calibration.calibration,
        "calibration_error": asdict(case.calibration.error),
        "trace": {"name": case.trace.name, "kind": case.trace.kind, "sha256": case.trace.sha256},
        "requests": case.requests,
        "seeds": case.seeds,
        "scale": case.session.scale,
        "vllm_serve": serve_arguments(case, advice.best.setting),
        **asdict(advice, dict_factory=finite),
    }


def marks(case: Case, advice: Advice) -> dict[str, Any]:
    """The answer as a point of the capacity figure."""
    row = {"model": case.model, "target": advice.limits.tbt_p99, "capacity": advice.value}
    return row | {"low": advice.low, "high": advice.high, "label": str(advice.best.setting.budget)}


def draw(case: Case, search: Search, advice: Advice, where: str, path: Path) -> Path:
    """The capacity figure of one model with the answer in it; the PNG."""
    target = advice.limits.tbt_p99
    given = math.isfinite(target)
    settings = sorted({*case.settings_to_try(), advice.best.setting})
    table = curves(case, search, settings, advice.limits, [target if given else advice.best.latency.tbt_p99])
    points = pd.DataFrame([marks(case, advice)]).head(1 if given and advice.fixed_rate is None else 0)
    what = f"capacity on {where}; {describe(advice.limits)}; trace {case.trace.name}"
    lines = {case.model: {"target": target}} if given else {}
    title = f"SIMULATED ({case.calibration.calibration}): {what}"
    return save(capacity_figure(table, title, lines, points, case.settings.max_model_len), path)[0]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for bad input or targets that cannot be kept."""
    parser = arguments("analysis.advise.recommend", __doc__, "testbed", "trace", "out", "report")
    parser.add_argument("--model", default="", help="as Figure 9b names it")
    parser.add_argument("--tbt", help="target for P99 TBT, seconds")
    parser.add_argument("--ttft", help="target for P50 TTFT, seconds")
    parser.add_argument("--qps", help="requests per second: the load is given, the best latency is looked for")
    options = parse(parser, argv)
    tbt, ttft = positive("TBT_P99", options.tbt), positive("TTFT_P50", options.ttft)
    rate = positive("QPS", options.qps)
    if not (tbt or ttft or rate):
        raise SpecError("TBT_P99, TTFT_P50, QPS: got none; at least one is needed, such as TBT_P99=0.1")
    testbed, reason = choose_testbed(options.testbed, options.out)
    console.print(f"testbed {testbed.testbed} ({reason}): {testbed.title}")
    trace = choose_trace(options.trace, max_total=load_figure("fig9b").max_model_len)
    divided = f"; lengths divided by {testbed.scale} here" if testbed.scale > 1 else ""
    console.print(f"{describe_trace(trace)}{divided}")
    simulated = testbed.platform == "simulated"
    missing = ["a simulated testbed has no engine"] if simulated else problems(testbed, options.out, gpus())
    case = case_of(testbed, options.model, trace, make=not missing)
    limits, search = Latency(tbt or math.inf, ttft or math.inf, DELAY_LIMIT_S / testbed.scale), case.search()
    advice = advise_rate(case, search, limits, rate) if rate else advise(case, search, limits)
    show(case, advice)
    measured = [] if missing else confirm(case, advice, testbed)
    final = settled(advice, measured)
    if missing:
        console.print(f"not measured: {missing[0]}")
    else:
        show_confirmed(advice, measured)
    if final != advice.best.setting:
        console.print(f"paste: {serve_arguments(case, final)}")
    path = options.report / f"recommend-{testbed.testbed}-{case.model}"
    picture = draw(case, search, advice, testbed.title, path)
    answer = {"format": 1, "testbed": testbed.testbed, **facts(case, advice), "vllm_serve": serve_arguments(case, final)}
    answer |= {"recommended": asdict(final), "measured": [asdict(entry, dict_factory=finite) for entry in measured]}
    files = [Path(f"{path}.json"), picture]
    write_whole(files[0], to_json(answer))
    console.print(written(*files))
    result(**answer, files=files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
