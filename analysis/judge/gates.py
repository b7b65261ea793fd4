"""Validity gates: what must hold of a run before its numbers may speak. A broken gate makes its claims INCONCLUSIVE."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.judge.load import Run, differing, measurements, repeat_ratios
from analysis.judge.scope import place_of
from analysis.judge.stats import LEVELS
from experiments.spec.expand import SATURATION

NOISE_LIMIT = 0.25  # interquartile range of the probe step over its median, median over sessions
REPEAT_LIMIT = 1.15  # a session's first trial and its repetition at the end, median over sessions
OF_MACHINES = ("machine noise", "first trial repeated")  # a simulation has neither


@dataclass(frozen=True)
class Gate:
    """One gate: its name, whether it holds, and the numbers."""

    gate: str
    ok: bool
    detail: str


def noise(run: Run) -> float:
    """The machine's noise: the probe step's interquartile range over its median within a session, median over sessions.

    NaN if a session has no probe.
    """
    rows = [(trial.facts["session"], each) for trial in run.trials for each in trial.seen.probes or [math.nan]]
    seconds = pd.DataFrame(rows, columns=["session", "seconds"]).groupby("session")["seconds"]
    spreads = (seconds.quantile(0.75) - seconds.quantile(0.25)) / seconds.median()
    return float(spreads.median(skipna=False))


def _repeated(run: Run) -> Gate:
    """An order effect shows as a difference between a session's first trial and its repetition."""
    sessions = {trial.facts["session"] for trial in run.trials if trial.facts["trial"] != SATURATION}
    once = sessions - {trial.facts["session"] for trial in run.trials if trial.repeat}
    again = float(repeat_ratios(run).median(skipna=False))
    said = f"its repetition takes {again:.3f} times as long, limit {REPEAT_LIMIT} either way"
    said += f"; {len(once)} sessions have none" if once else ""
    return Gate("first trial repeated", not once and 1 / REPEAT_LIMIT <= again <= REPEAT_LIMIT, said)


def _platform(run: Run) -> Gate:
    """The machine must be what the plan says of it: claims are judged by what it is."""
    said, wrong = (run.plan["platform"], run.plan["scale"]), set()
    for trial in run.trials:
        place, cards = place_of(run, trial), trial.facts["machine"].get("gpus", [])
        if (place.platform, place.scale) != said:
            wrong.add(f"{place.platform}, scale {place.scale}")
        elif place.platform == "cuda" and len(cards) < place.tensor_parallel:
            wrong.add(f"{len(cards)} GPUs; {place.tensor_parallel} are needed")
    planned = f"{said[0]}, scale {said[1]}, as testbed {run.testbed} says"
    return Gate("platform of the testbed", not wrong, "; ".join([*sorted(wrong), f"not {planned}"]) if wrong else planned)


def _points(run: Run) -> Gate:
    """Claims name points in the paper's units; what was run must be that, and settings that are compared must meet one load."""
    wrong, loads = set(), dict[tuple[Any, ...], tuple[Any, ...]]()
    for trial in run.trials:
        facts = trial.facts
        for role in (role for role in facts["phases"] if role["role"] == "point"):
            budget, size, serving = role["budget"], role["chunk_size"], "qps" in role
            whole = facts["settings"]["max_model_len"] if serving else role["prompt_tokens"]
            right = budget >= whole if size is None else budget * facts["scale"] == size
            if serving:
                load = role["rate"], role["requests"]
                right &= load == loads.setdefault((facts["model"], facts["seed"], role["qps"]), load)
            else:
                right &= (role["prompt_tokens"] + 1) * facts["scale"] == role["prompt_length"]
            if not right:
                wrong.add(f"{facts['session']}/{facts['trial']}")
    said = f"{len(wrong)} trials ran other chunk sizes, lengths or rates than they name"
    return Gate("points as named", not wrong, f"{said}: {', '.join(sorted(wrong)[:3])}" if wrong else said)


def _arrivals(run: Run, late: int) -> Gate:
    if run.kind != "serving":
        return Gate("arrivals kept", True, "one request at a time, no arrivals to keep")
    p99 = measurements(run)["lateness_p99"].max()
    return Gate("arrivals kept", not late, f"{late} trials inject later than their longest step; worst P99 {p99:.3f} s")


def _planned(run: Run) -> Gate:
    """Compared both ways: nothing missing, and nothing there that would make more replicates, or of one more, than planned."""
    planned = {(session, trial) for session, trials in run.plan["sessions"].items() for trial in trials}
    there = Counter((trial.facts["session"], trial.facts["trial"]) for trial in run.trials)
    odd = {
        "missing": planned - there.keys(),
        "not planned": there.keys() - planned,
        "there twice": {key for key, count in there.items() if count > 1},
    }
    told = [f"{len(keys)} {what}: {', '.join('/'.join(key) for key in sorted(keys)[:3])}" for what, keys in odd.items() if keys]
    return Gate("trials as planned", not told, "; ".join(told) or f"{len(planned)} planned, each there once")


def check(run: Run) -> list[Gate]:
    """Every gate of a run."""
    counts = sum((trial.seen.counts for trial in run.trials), Counter[str]())
    asked, got, cut = (counts[name] for name in ("output_tokens", "generated_tokens", "truncated"))
    hits, preempted, wrong = counts["cached_tokens"], counts["preempted"], counts["disordered"]
    declared = ", declared" if run.plan.get("may_preempt") else ""
    spread, unlike = noise(run), differing(run)
    served = {(t.facts["process"], t.facts["model"], t.facts["seed"]) for t in run.trials}
    shared = sum(count > 1 for count in Counter(process for process, *_ in served).values())
    found = [
        _planned(run),
        Gate("requests finished", asked == got and not cut, f"{got} of {asked} tokens received, {cut} trials truncated"),
        _arrivals(run, counts["late"]),
        Gate("budget obeyed", not counts["over"], f"{counts['over']} steps above their chunk size"),
        Gate("no cache hit", not hits, f"{hits} prompt tokens came from a prefix cache"),
        Gate("no undeclared preemption", bool(declared) or not preempted, f"{preempted} preemptions{declared}"),
        Gate("clock monotonic", not wrong, f"{wrong} steps or tokens end before they start, overlap or come out of order"),
        Gate("machine noise", spread <= NOISE_LIMIT, f"{spread:.3f} of a fixed step's time, limit {NOISE_LIMIT}"),
        _repeated(run),
        _platform(run),
        _points(run),
        Gate("independent replicates", not shared, f"{shared} engine processes served more than one replicate"),
        Gate("one version, one machine type", not unlike, "; ".join(unlike) or "all trials alike"),
        Gate("at most two looks", len(run.bags) <= len(LEVELS), f"{len(run.bags)} bags were joined, allowed {len(LEVELS)}"),
    ]
    aside = OF_MACHINES if run.simulated else ()
    return [replace(gate, ok=True, detail="not applicable: simulated") if gate.gate in aside else gate for gate in found]
