"""One trial of a sealed run and what is seen in its record: everything that gates, claims and tables ask of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from experiments.records.errors import SpecError
from experiments.records.metrics import of_phase, point_phase, prefill_seconds, serving_metrics
from experiments.records.record import Record
from experiments.records.store import StoredRecord, read_trial
from experiments.spec.expand import REPEAT

LATENESS_SLACK_S = 0.002  # drawing up a request and the loop's own work between two steps


class Seen(NamedTuple):
    """What is seen in a record: a few numbers of tables that may be long."""

    probes: list[float]  # seconds of the fixed steps with which the trial begins
    counts: Counter[str]  # tokens asked for and received, and what gates count
    metrics: dict[int, dict[str, float]]  # measured phase -> its `seconds` in a prefill trial, else metrics.serving_metrics


@dataclass(frozen=True)
class TrialRecord:
    """One trial: where it lies, its facts (trial.json) and its record."""

    path: Path
    facts: dict[str, Any]
    record: Record

    @property
    def repeat(self) -> bool:
        """Whether this is the first trial of its session run again at the end."""
        return str(self.facts["trial"]).endswith(REPEAT)

    @property
    def simulated(self) -> bool:
        """Whether its engine was a simulation."""
        return bool(self.facts["engine"].get("simulated"))

    @cached_property
    def seen(self) -> Seen:
        """Computed once, in one reading of the tables."""
        phases, record = self.facts["phases"], self.record
        record = Record(record.requests, record.steps, record.tokens, record.truncated)
        requests, metrics = record.requests, dict[int, dict[str, float]]()
        probes = requests["phase"].isin([number for number, role in enumerate(phases) if role["role"] == "probe"])
        steps = record.steps["seconds"].iloc[requests.loc[probes & (requests["first_step"] >= 0), "first_step"]]
        if self.facts["kind"] == "prefill":
            times = prefill_seconds(record).reindex(range(len(phases)))  # a trial that was cut short has not begun them all
            metrics = {int(str(phase)): {"seconds": seconds} for phase, seconds in times.items()}
        elif phases[phase := point_phase(phases)]["role"] == "point":
            metrics = {phase: serving_metrics(of_phase(record, phase))}
        return Seen(steps.tolist(), _counts(record), metrics)


def _counts(record: Record) -> Counter[str]:
    requests, steps, tokens = record.requests, record.steps, record.tokens
    found = Counter({name: int(requests[name].sum()) for name in ("output_tokens", "generated_tokens", "cached_tokens")})
    found["preempted"], found["truncated"] = int(steps["preempted"].sum()), int(record.truncated)
    found["over"] = int((steps["prefill_tokens"] + steps["decode_tokens"] > steps["budget"]).sum())
    after = steps["start_s"] >= (steps["start_s"] + steps["seconds"]).shift() - 1e-9
    for right in (steps["seconds"] > 0, after.iloc[1:], tokens["time_s"].diff().iloc[1:] >= 0):
        found["disordered"] += int((~right).sum())  # NaN is wrong
    # Open loop: a request enters at the first step boundary after its arrival, so it can be late by one step at most.
    lateness = (requests["injected_s"] - requests["arrival_s"]).quantile(0.99)
    found["late"] = int(not lateness <= steps["seconds"].max() + LATENESS_SLACK_S)  # so that NaN is late
    return found


def load_trial(path: Path, plan: dict[str, Any]) -> TrialRecord:
    """A trial, checked; facts and what was seen stay in memory, its tables do not, so that a run takes the memory of one.

    Raises SpecError for what is no record of ours, or a trial that is not of its plan or not where it says.
    """
    facts, record = read_trial(path)
    wanted = {key: plan[key] for key in ("figure", "testbed", "scale")} | {"session": path.parent.name, "trial": path.name}
    for key, value in wanted.items():
        if facts[key] != value:
            where = Path(*path.parts[-5:], "trial.json")
            raise SpecError(f"{where}: {key}: got {facts[key]!r}; allowed: {value!r}, as the plan or the folder says")
    trial = TrialRecord(path, facts, record)
    stored = replace(trial, record=StoredRecord(path, record.truncated))
    stored.__dict__["seen"] = trial.seen
    return stored
