"""Validity gates: what must hold of a run before its numbers may speak. A broken gate makes its claims INCONCLUSIVE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from analysis.load import Run, differing, repeat_ratios, serving_trials

NOISE_LIMIT = 0.25  # interquartile range of the probe step over its median, median over sessions
REPEAT_LIMIT = 1.15  # a session's first trial and its repetition at the end, median over sessions
LATENESS_SLACK_S = 0.002  # drawing up a request and the loop's own work between two steps
LOOKS = 2  # a first look and, with more replicates, one last


@dataclass(frozen=True)
class Gate:
    """One gate: its name, whether it holds, and the numbers."""

    gate: str
    ok: bool
    detail: str


def noise(run: Run) -> float:
    """The machine's noise: the probe step's interquartile range over its median within a session, median over sessions."""
    seconds: dict[str, list[float]] = {}
    for trial in run.trials:
        probes = [number for number, role in enumerate(trial.facts["phases"]) if role["role"] == "probe"]
        requests = trial.record.requests
        steps = requests.loc[requests["phase"].isin(probes) & (requests["first_step"] >= 0), "first_step"]
        seconds.setdefault(str(trial.facts["session"]), []).extend(trial.record.steps["seconds"].iloc[steps])
    spreads = []
    for values in seconds.values():
        series = pd.Series(values)
        spreads.append((series.quantile(0.75) - series.quantile(0.25)) / series.median())
    return float(pd.Series(spreads).median()) if spreads else math.nan


def _total(run: Run, table: str, column: str) -> int:
    return int(sum(getattr(trial.record, table)[column].sum() for trial in run.trials))


def _finished(run: Run) -> Gate:
    asked, got = _total(run, "requests", "output_tokens"), _total(run, "requests", "generated_tokens")
    cut = sum(trial.record.truncated for trial in run.trials)
    return Gate("requests finished", asked == got and not cut, f"{got} of {asked} tokens received, {cut} trials truncated")


def _planned(run: Run) -> Gate:
    planned = {(session, trial) for session, trials in run.plan["sessions"].items() for trial in trials}
    missing = sorted("/".join(pair) for pair in planned - {(t.facts["session"], t.facts["trial"]) for t in run.trials})
    detail = f"{len(missing)} of {len(planned)} trials missing{': ' if missing else ''}{', '.join(missing[:3])}"
    return Gate("every planned trial", not missing, detail)


def _platform(run: Run) -> Gate:
    """Claims are scoped by the testbed's name, so the machine must be the one that the testbed names."""
    platform, needs = run.plan["platform"], run.plan.get("requires", {})
    wrong = set()
    for trial in run.trials:
        cards = trial.facts["machine"].get("gpus", [])
        if bool(trial.facts["engine"].get("simulated")) != (platform == "simulated"):
            wrong.add("measured" if platform == "simulated" else "simulated")
        elif platform == "cuda" and not (needs and len(cards) >= needs["gpus"] and all(needs["gpu_name"] in c for c in cards)):
            wrong.add(f"GPUs: {', '.join(cards) or 'none'}; {needs.get('gpus', '?')} x {needs.get('gpu_name', '?')} are needed")
    return Gate("platform of the testbed", not wrong, "; ".join(sorted(wrong)) or f"{platform}, as testbed {run.testbed} says")


def _arrivals(run: Run) -> Gate:
    """Open loop: a request enters at the first step boundary after its arrival, so it can be late by one step at most."""
    if run.kind != "serving":
        return Gate("arrivals kept", True, "one request at a time, no arrivals to keep")
    late = 0
    for trial in run.trials:
        longest = trial.record.steps["seconds"].max()
        lateness = trial.record.requests["injected_s"] - trial.record.requests["arrival_s"]
        late += int(lateness.quantile(0.99) > longest + LATENESS_SLACK_S)
    p99 = serving_trials(run)["lateness_p99"].max()
    return Gate("arrivals kept", not late, f"{late} trials inject later than their longest step; worst P99 {p99:.3f} s")


def _budget(run: Run) -> Gate:
    over = 0
    for trial in run.trials:
        steps = trial.record.steps
        over += int((steps["prefill_tokens"] + steps["decode_tokens"] > steps["budget"]).sum())
    return Gate("budget obeyed", not over, f"{over} steps above their chunk size")


def _cache(run: Run) -> Gate:
    hits = _total(run, "requests", "cached_tokens")
    return Gate("no cache hit", not hits, f"{hits} prompt tokens came from a prefix cache")


def _preemption(run: Run) -> Gate:
    count = _total(run, "steps", "preempted")
    declared = bool(run.plan.get("may_preempt"))
    return Gate("no undeclared preemption", declared or not count, f"{count} preemptions{', declared' if declared else ''}")


def _clock(run: Run) -> Gate:
    wrong = 0
    for trial in run.trials:
        steps = trial.record.steps
        ends = steps["start_s"] + steps["seconds"]
        wrong += int(
            (steps["seconds"] <= 0).sum() + (steps["start_s"].iloc[1:].to_numpy() < ends.iloc[:-1].to_numpy() - 1e-9).sum()
        )
        wrong += int((trial.record.tokens["time_s"].diff() < 0).sum())
    return Gate("clock monotonic", not wrong, f"{wrong} steps or tokens end before they start, overlap or come out of order")


def _noise(run: Run) -> Gate:
    figure = noise(run)
    return Gate("machine noise", figure <= NOISE_LIMIT, f"{figure:.3f} of a fixed step's time, limit {NOISE_LIMIT}")


def _repeat(run: Run) -> Gate:
    ratio = float(repeat_ratios(run).median())
    ok = 1 / REPEAT_LIMIT <= ratio <= REPEAT_LIMIT
    return Gate("first trial repeated", ok, f"its repetition takes {ratio:.3f} times as long, limit {REPEAT_LIMIT} either way")


def _independent(run: Run) -> Gate:
    seeds: dict[str, set[tuple[str, int]]] = {}
    for trial in run.trials:
        seeds.setdefault(trial.facts["process"], set()).add((trial.facts["model"], trial.facts["seed"]))
    shared = sum(len(found) > 1 for found in seeds.values())
    return Gate("independent replicates", not shared, f"{shared} engine processes served more than one replicate")


def _alike(run: Run) -> Gate:
    found = differing(run)
    return Gate("one version, one machine type", not found, "; ".join(found) or "all trials alike")


def _looks(run: Run) -> Gate:
    return Gate("at most two looks", len(run.bags) <= LOOKS, f"{len(run.bags)} bags were joined, allowed {LOOKS}")


GATES: tuple[Callable[[Run], Gate], ...] = (
    _planned,
    _finished,
    _arrivals,
    _budget,
    _cache,
    _preemption,
    _clock,
    _noise,
    _repeat,
    _platform,
    _independent,
    _alike,
    _looks,
)


def check(run: Run) -> list[Gate]:
    """Every gate of a run."""
    return [gate(run) for gate in GATES]
