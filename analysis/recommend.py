"""`make recommend`: the chunk size for a model, a machine, latency targets and a load; see docs/recommend.md."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.advice import Advice, Case, advise, advise_rate, describe, evidence
from analysis.capacity import DELAY_LIMIT_S, Latency, Search, Setting, curve, latency
from analysis.plots import save
from analysis.plots_capacity import capacity_figure
from experiments.calibrate_here import calibrate, settings_of
from experiments.cost_model import load_calibration
from experiments.doctor import choose_testbed, problems
from experiments.estimate import calibration_here
from experiments.expand import FEWEST_REQUESTS, expand
from experiments.provenance import ROOT, gpus
from experiments.spec import MODELS, ServingFigure, SpecError, Testbed, load_figure, read_yaml
from experiments.store import to_json
from experiments.terminal import command
from experiments.trials import TRIAL_SECONDS, Load, load_sessions, serve_loads
from experiments.workload import Trace, choose_trace, describe_trace

SEEDS = 4
WORDS = {"tbt_p99": "P99 TBT", "ttft_p50": "P50 TTFT", "delay_p50": "scheduling delay", "nothing": "nothing"}
TARGETS_SHOWN = 60  # P99 TBT targets of a capacity curve, spread evenly over their logarithm


CONFIRM_AT = 0.9  # of the simulated capacity: at the capacity itself a coin would decide


def positive(name: str, text: str | None) -> float | None:
    """A variable of the Makefile as a number, None where it is not given. Raises SpecError."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise SpecError(f"{name}: got {text!r}; allowed: a number above 0")
    return value


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
    if len(trace.prompt) < FEWEST_REQUESTS:
        raise SpecError(
            f"TRACE: {trace.name}: got {len(trace.prompt)} request{'s'[: len(trace.prompt) != 1]}; "
            f"allowed: at least {FEWEST_REQUESTS}, or there is no percentile to speak of"
        )
    settings = sessions[model].engine
    here = calibration_here(testbed.testbed, settings)
    if here is None and settings.calibration is None and make:
        here = calibrate(*settings_of(testbed)[settings.model], testbed.testbed)
    name = str(here) if here else settings.calibration
    if name is None:
        raise SpecError(f"{model}: no calibration for testbed {testbed.testbed}; make calibrate makes one, on its machine")
    requests = min(figure.requests, len(trace.prompt))
    return Case(sessions[model], load_calibration(name), trace, requests, figure.max_model_len, figure.seeds[:SEEDS])


def serve_arguments(case: Case, setting: Setting) -> str:
    """What to paste after `vllm serve`: everything that the answer rests on."""
    source = re.search(r"config\.json of (\S+)", str(read_yaml(MODELS / f"{case.settings.model}.json")["_source"]))
    values = {
        "max-num-batched-tokens": setting.budget,
        "max-num-seqs": setting.max_batch,
        "max-model-len": case.settings.max_model_len,
        "tensor-parallel-size": case.settings.tensor_parallel,
        "dtype": case.settings.dtype,
        "gpu-memory-utilization": case.settings.gpu_memory_utilization,
    }
    given = " ".join(f"--{name} {value}" for name, value in values.items() if value is not None)
    return f"vllm serve {source[1] if source else 'MODEL'} --enable-chunked-prefill {given}"


def sentences(case: Case, advice: Advice) -> Iterator[str]:
    """The answer in words."""
    best = advice.best.setting
    what = f"chunk size {best.budget}, at most {best.max_batch} requests in a step"
    many = f"95 % interval {advice.low:.3g} to {advice.high:.3g}"
    if advice.fixed_rate is None:
        bound = f"{WORDS[advice.best.bound_by]} forbids more"
        yield f"{case.model}: {what}: {advice.value:.3g} requests/s ({many}) with {describe(advice.limits)}; {bound}"
    else:
        kept = f"with {describe(advice.limits)} at {advice.fixed_rate:g} requests/s"
        yield f"{case.model}: {what}: {WORDS[advice.goal]} {advice.value:.3g} s ({many}) {kept}"
    yield f"evidence: {evidence(case)}"
    yield f"paste: {serve_arguments(case, advice.best.setting)}"


def show(case: Case, advice: Advice, console: Console) -> None:
    """Print the answer, and the options beside the best as a table."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("chunk", "batch", "QPS", "to best", "bound by", "TBT ms", "TTFT ms"):
        view.add_column(name, justify="right", no_wrap=True)
    for option in sorted((advice.best, *advice.neighbours), key=lambda option: option.setting):
        seen, kept = option.latency, f"{option.rate:.3g}" if option.rate else "no"
        cost = f"{option.rate / advice.best.rate - 1:+.0%}" if advice.fixed_rate is None else ""
        numbers = (f"{1e3 * seen.tbt_p99:.0f}", f"{1e3 * seen.ttft_p50:.0f}")
        view.add_row(str(option.setting.budget), str(option.setting.max_batch), kept, cost, WORDS[option.bound_by], *numbers)
    answer, *rest = sentences(case, advice)
    console.print(f"\n[bold]{answer}[/bold]", soft_wrap=True)
    console.print(view)
    keys = "batch: most requests in a step; QPS: capacity; P99 TBT and P50 TTFT about there"
    console.print(f"SIMULATED, seed {case.seeds[0]}; {keys}", soft_wrap=True)
    for line in rest:
        console.print(line, soft_wrap=True)


def curves(case: Case, search: Search, settings: Sequence[Setting], limits: Latency, targets: Sequence[float]) -> pd.DataFrame:
    """Capacity at each P99 TBT target (s), one curve per setting: model, chunk_size, target, capacity (requests/s)."""
    tables, near = [], 1.0
    for setting in settings:
        found = curve(search, setting, limits, case.seeds[0], targets, near)
        near = max((rate for rate in found if rate > 0), default=near)
        keys = {"model": case.model, "chunk_size": setting.budget}
        tables.append(pd.DataFrame({**keys, "target": targets, "capacity": found}))
    return pd.concat(tables, ignore_index=True)


def confirm(case: Case, advice: Advice, testbed: Testbed, console: Console) -> list[dict[str, Any]]:
    """Serve the best and its neighbours on the real engine for a short while, a little below their simulated capacities.

    One entry each: setting, rate (requests/s), measured and simulated latency of that very load, whether the limits were kept.
    """
    share = CONFIRM_AT if advice.fixed_rate is None else 1.0
    options = [option for option in (advice.best, *advice.neighbours) if option.rate]
    loads = [Load(option.setting.budget, option.setting.max_batch, share * option.rate) for option in options]
    seconds = testbed.serving.trial_seconds if testbed.serving else TRIAL_SECONDS
    found = []
    sessions = load_sessions(case.session, loads, seconds, case.max_total, testbed.switch_chunk_size)
    for load, record in serve_loads(sessions, case.trace, console.print):
        setting, seen = Setting(load.budget, load.max_batch), latency(record)
        predicted = replace(case, requests=len(record.requests)).search().serve(setting, load.rate, case.session.seed)
        entry = {"setting": setting, "rate": load.rate, "requests": len(record.requests), "measured": seen}
        found.append({**entry, "simulated": predicted, "kept": seen.within(advice.limits)[0] <= 0})
    return found


def show_confirmed(advice: Advice, found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what was measured, and which setting it speaks for."""
    for entry in found:
        pairs = [
            f"{WORDS[name]} {1e3 * getattr(entry['measured'], name):.1f} ms "
            f"(simulated {1e3 * getattr(entry['simulated'], name):.1f})"
            for name in ("tbt_p99", "ttft_p50")
        ]
        broken = WORDS[entry["measured"].within(advice.limits)[1]]
        kept = "kept" if entry["kept"] else f"NOT kept, for {broken}"
        words = f"chunk size {entry['setting'].budget} at {entry['rate']:.3g} requests/s: {', '.join(pairs)}: {kept}"
        console.print(f"measured here, {entry['requests']} requests: {words}", soft_wrap=True)
    final = settled(advice, found)
    if not any(entry["kept"] for entry in found):
        words = "no; none kept the targets on the engine, so take less load or looser targets"
    elif final == advice.best.setting:
        words = f"chunk size {final.budget} kept the targets on the engine"
    else:
        words = f"no; take chunk size {final.budget}, which kept them at the highest load of those measured"
    console.print(f"confirmed: {words}", soft_wrap=True)


def settled(advice: Advice, found: Sequence[Mapping[str, Any]]) -> Setting:
    """The last word: the best in simulation if it kept the limits on the engine or none did, else who did at the most load."""
    good = {entry["setting"]: float(entry["rate"]) for entry in found if entry["kept"]}
    return advice.best.setting if not good or advice.best.setting in good else max(good, key=good.__getitem__)


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
        **_plain(advice),
    }


def _plain(value: Any) -> Any:
    """For JSON: dataclasses as mappings, infinity, which it has not, as null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value


def spread(targets: Sequence[float]) -> list[float]:
    """P99 TBT targets (s) of a curve around these, from a quarter of the least to twice the most."""
    first, last = math.log(min(targets) / 4), math.log(2 * max(targets))
    return [math.exp(first + (last - first) * n / (TARGETS_SHOWN - 1)) for n in range(TARGETS_SHOWN)]


def marks(case: Case, advice: Advice) -> dict[str, Any]:
    """The answer as a point of the capacity figure."""
    row = {"model": case.model, "target": advice.limits.tbt_p99, "capacity": advice.value}
    return row | {"low": advice.low, "high": advice.high, "label": str(advice.best.setting.budget)}


def recommend(options: argparse.Namespace, console: Console) -> None:
    """Answer one question. Raises SpecError for bad input and for targets that cannot be kept."""
    tbt, ttft, rate = (positive(*pair) for pair in (("TBT_P99", options.tbt), ("TTFT_P50", options.ttft), ("QPS", options.qps)))
    if tbt is None and ttft is None and rate is None:
        raise SpecError("TBT_P99, TTFT_P50, QPS: got none; at least one is needed, such as TBT_P99=0.1")
    testbed, reason = choose_testbed(options.testbed, options.runs)
    console.print(f"testbed {testbed.testbed} ({reason}): {testbed.title}", soft_wrap=True)
    trace = choose_trace(options.trace, max_total=load_figure("fig9b").max_model_len)
    divided = f"; lengths divided by {testbed.scale} here" if testbed.scale > 1 else ""
    console.print(f"{describe_trace(trace)}{divided}", soft_wrap=True)
    simulated = testbed.platform == "simulated"
    missing = [] if simulated else problems(testbed, options.runs, gpus())
    case = case_of(testbed, options.model, trace, make=not simulated and not missing)
    limits = Latency(tbt or math.inf, ttft or math.inf, DELAY_LIMIT_S / testbed.scale)
    search = case.search()
    advice = advise(case, search, limits) if rate is None else advise_rate(case, search, limits, rate)
    show(case, advice, console)
    measured = []
    if missing or simulated:
        console.print(f"not measured: {missing[0] if missing else 'a simulated testbed has no engine'}", soft_wrap=True)
    else:
        measured = confirm(case, advice, testbed, console)
        show_confirmed(advice, measured, console)
        if (final := settled(advice, measured)) != advice.best.setting:
            console.print(f"paste: {serve_arguments(case, final)}", soft_wrap=True)
    name = options.report / f"recommend-{testbed.testbed}-{case.model}"
    picture = draw(case, search, advice, testbed.title, name)
    target = name.with_suffix(".json")
    answer = {**facts(case, advice), "measured": [_plain(entry) for entry in measured]}
    answer["recommended"] = _plain(settled(advice, measured))
    answer["vllm_serve"] = serve_arguments(case, settled(advice, measured))
    target.write_text(to_json({"format": 1, "testbed": testbed.testbed, **answer}))
    console.print(f"{target}, {picture.name}", soft_wrap=True)


def draw(case: Case, search: Search, advice: Advice, where: str, path: Path) -> Path:
    """The capacity figure of one model with the answer in it; the PNG."""
    target = advice.limits.tbt_p99
    given = math.isfinite(target)
    settings = sorted({*case.settings_to_try(), advice.best.setting})
    table = curves(case, search, settings, advice.limits, spread([target if given else advice.best.latency.tbt_p99]))
    points = pd.DataFrame([marks(case, advice)] if given and advice.fixed_rate is None else [], columns=[*marks(case, advice)])
    title = (
        f"SIMULATED ({case.calibration.calibration}): capacity on {where}; {describe(advice.limits)}; trace {case.trace.name}"
    )
    lines = {case.model: {"target": target}} if given else {}
    return save(capacity_figure(table, title, lines, points, case.settings.max_model_len), path)[0]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for bad input or targets that cannot be kept."""
    parser = argparse.ArgumentParser(prog="python -m analysis.recommend", description=__doc__)
    parser.add_argument("--testbed", default="auto")
    parser.add_argument("--model", default="")
    parser.add_argument("--tbt", help="target for P99 TBT, seconds")
    parser.add_argument("--ttft", help="target for P50 TTFT, seconds")
    parser.add_argument("--qps", help="requests per second: the load is given, the best latency is looked for")
    parser.add_argument("--trace", help="CSV as for fig9b, or a .json of vllm bench serve --save-detailed")
    parser.add_argument("--runs", type=Path, default=ROOT / "artifacts" / "runs")
    parser.add_argument("--report", type=Path, default=ROOT / "artifacts" / "report")
    options = parser.parse_args(argv)
    recommend(options, Console(highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
