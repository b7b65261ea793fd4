"""Validity gates: what must hold of a run before its numbers may speak. A broken gate makes its claims INCONCLUSIVE."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from analysis.judge.load import Run, differing, probe_steps, repeat_ratios, serving_trials
from analysis.judge.stats import LEVELS

NOISE_LIMIT = 0.25  # interquartile range of the probe step over its median, median over sessions
REPEAT_LIMIT = 1.15  # a session's first trial and its repetition at the end, median over sessions
LATENESS_SLACK_S = 0.002  # drawing up a request and the loop's own work between two steps


@dataclass(frozen=True)
class Gate:
    """One gate: its name, whether it holds, and the numbers."""

    gate: str
    ok: bool
    detail: str


def noise(run: Run) -> float:
    """The machine's noise: the probe step's interquartile range over its median within a session, median over sessions."""
    seconds = probe_steps(run).groupby("session")["seconds"]
    return float(((seconds.quantile(0.75) - seconds.quantile(0.25)) / seconds.median()).median())


def _total(run: Run, table: str, column: str) -> int:
    return int(sum(getattr(trial.record, table)[column].sum() for trial in run.trials))


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
        lateness = trial.record.requests["injected_s"] - trial.record.requests["arrival_s"]
        late += bool(lateness.quantile(0.99) > trial.record.steps["seconds"].max() + LATENESS_SLACK_S)
    p99 = serving_trials(run)["lateness_p99"].max()
    return Gate("arrivals kept", not late, f"{late} trials inject later than their longest step; worst P99 {p99:.3f} s")


def _steps(run: Run) -> tuple[Gate, Gate]:
    over = wrong = 0
    for trial in run.trials:
        steps, times = trial.record.steps, trial.record.tokens["time_s"]
        over += int((steps["prefill_tokens"] + steps["decode_tokens"] > steps["budget"]).sum())
        overlap = steps["start_s"] < (steps["start_s"] + steps["seconds"]).shift() - 1e-9
        wrong += int((steps["seconds"] <= 0).sum() + overlap.sum() + (times.diff() < 0).sum())
    said = f"{wrong} steps or tokens end before they start, overlap or come out of order"
    return Gate("budget obeyed", not over, f"{over} steps above their chunk size"), Gate("clock monotonic", not wrong, said)


def check(run: Run) -> list[Gate]:
    """Every gate of a run."""
    planned = {(session, trial) for session, trials in run.plan["sessions"].items() for trial in trials}
    absent = sorted("/".join(pair) for pair in planned - {(t.facts["session"], t.facts["trial"]) for t in run.trials})
    absences = f"{len(absent)} of {len(planned)} trials missing{': ' if absent else ''}{', '.join(absent[:3])}"
    asked, got = _total(run, "requests", "output_tokens"), _total(run, "requests", "generated_tokens")
    cut = sum(trial.record.truncated for trial in run.trials)
    hits, preempted = _total(run, "requests", "cached_tokens"), _total(run, "steps", "preempted")
    declared = ", declared" if run.plan.get("may_preempt") else ""
    spread, again = noise(run), float(repeat_ratios(run).median())
    alike = 1 / REPEAT_LIMIT <= again <= REPEAT_LIMIT
    served = {(t.facts["process"], t.facts["model"], t.facts["seed"]) for t in run.trials}
    shared = sum(count > 1 for count in Counter(process for process, *_ in served).values())
    unlike = differing(run)
    budget, clock = _steps(run)
    return [
        Gate("every planned trial", not absent, absences),
        Gate("requests finished", asked == got and not cut, f"{got} of {asked} tokens received, {cut} trials truncated"),
        _arrivals(run),
        budget,
        Gate("no cache hit", not hits, f"{hits} prompt tokens came from a prefix cache"),
        Gate("no undeclared preemption", bool(declared) or not preempted, f"{preempted} preemptions{declared}"),
        clock,
        Gate("machine noise", spread <= NOISE_LIMIT, f"{spread:.3f} of a fixed step's time, limit {NOISE_LIMIT}"),
        Gate("first trial repeated", alike, f"its repetition takes {again:.3f} times as long, limit {REPEAT_LIMIT} either way"),
        _platform(run),
        Gate("independent replicates", not shared, f"{shared} engine processes served more than one replicate"),
        Gate("one version, one machine type", not unlike, "; ".join(unlike) or "all trials alike"),
        Gate("at most two looks", len(run.bags) <= len(LEVELS), f"{len(run.bags)} bags were joined, allowed {len(LEVELS)}"),
    ]
