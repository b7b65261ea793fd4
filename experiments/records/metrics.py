"""Record -> metrics. Pure functions; seconds and tokens throughout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.records.record import Record

NAMES = {"ttft_p50": "P50 TTFT", "tbt_p99": "P99 TBT"}  # the two metrics of Figure 9b, as people write them
LATENCIES = {"ttft": "TTFT", "tbt": "TBT", "tpot": "TPOT", "e2e": "E2E"}  # of which a user may have targets
PERCENTS = (50, 90, 95, 99)


def time_unit(seconds: Iterable[float]) -> tuple[float, str]:
    """How people are shown these times: in milliseconds, or in seconds if one is ten or more. Factor and name."""
    return (1.0, "s") if max(seconds) >= 10 else (1e3, "ms")


def prefill_seconds(record: Record) -> pd.Series:
    """Prefill time of each request, seconds, indexed by phase: the summed time of the steps that process its prompt.

    For records in which one request runs at a time and asks for one token, as in Figure 9a, these are the steps from its
    first to its last; the original sums the steps that hold no decode token, which are the same. NaN if it did not finish.
    """
    spent_by = np.concatenate([[0.0], record.steps["seconds"].cumsum()])  # the start of each step
    requests = record.requests.set_index("phase")
    finished = requests[requests["last_step"] >= 0]
    spent = spent_by[finished["last_step"] + 1] - spent_by[finished["first_step"]]
    return pd.Series(spent, index=finished.index).reindex(requests.index)


def point_phase(phases: Sequence[Mapping[str, Any]]) -> int:
    """Which phase of a serving trial is the measured one."""
    return next(number for number, phase in enumerate(phases) if phase["role"] in ("point", "saturation"))


def of_phase(record: Record, phase: int) -> Record:
    """The part of a record that belongs to one phase: its requests, the steps from its first to its last, its tokens."""
    every, steps, tokens = record.requests, record.steps, record.tokens  # each look at a stored record reads it
    requests = every[every["phase"] == phase]
    first = requests.loc[requests["first_step"] >= 0, "first_step"]
    later = every.loc[(every["phase"] > phase) & (every["first_step"] >= 0), "first_step"]
    steps = steps.loc[first.min() : later.min() - 1 if len(later) else None] if len(first) else steps.iloc[:0]
    tokens = tokens[tokens["request"].isin(requests["request"])]
    return Record(requests, steps, tokens, record.truncated)


def request_metrics(record: Record) -> pd.DataFrame:
    """One row per finished request, indexed by request; seconds.

    ttft                first output token - scheduled arrival (not injection: no coordinated omission)
    scheduling_delay    start of the first step that holds the request - scheduled arrival
    latency             last output token - scheduled arrival
    normalized_latency  latency / output tokens (Yu et al., Orca, OSDI 2022)
    lateness            injection - scheduled arrival
    """
    requests = record.requests[record.requests["last_step"] >= 0].set_index("request")
    times = record.tokens.groupby("request")["time_s"].agg(["first", "last"]).reindex(requests.index)
    starts = record.steps["start_s"].reindex(requests["first_step"]).to_numpy()
    moments = {"ttft": times["first"], "scheduling_delay": starts, "latency": times["last"], "lateness": requests["injected_s"]}
    found = pd.DataFrame(moments).sub(requests["arrival_s"], axis=0)
    return found.assign(normalized_latency=found["latency"] / requests["generated_tokens"])


def tbt(record: Record) -> npt.NDArray[np.float64]:
    """Gaps between consecutive output tokens of the same request, seconds, all requests together (also called ITL)."""
    requests = record.tokens["request"].to_numpy()
    narrow = requests.astype(np.uint16) if len(requests) and requests.max() < 1 << 16 else requests
    order = np.argsort(narrow, kind="stable")  # of 16 bits numpy sorts by radix, three times as fast
    times: npt.NDArray[np.float64] = record.tokens["time_s"].to_numpy(dtype=np.float64)[order]
    new = np.diff(requests[order], prepend=-1) != 0
    gaps: npt.NDArray[np.float64] = np.diff(times)[~new[1:]]
    return gaps


@dataclass(frozen=True)
class Served:
    """What requests saw: of each its prompt_tokens and, in seconds, ttft, tpot, e2e and delay, shape (requests,); the gaps
    between tokens of a request, all together: `seconds`, and how many (`count`) saw the like.

    tpot, time per output token: what followed the first over its number, NaN of one token, as vllm bench serve has it; e2e: to
    the last token; delay: of scheduling. From arrival, as in request_metrics.
    """

    requests: Mapping[str, npt.NDArray[Any]]
    gaps: npt.NDArray[Any]

    def percentile(self, name: str) -> float:
        """Seconds of one like tbt_p99, linear interpolation; 0 of nothing."""
        kind, _, percent = name.partition("_p")
        if kind == "tbt":
            return gap_percentile(self.gaps, int(percent) / 100)
        sample = self.requests[kind]
        sample = sample[~np.isnan(sample)]
        return float(np.percentile(sample, int(percent))) if len(sample) else 0.0


def served(prompt: Any, output: Any, ttft: Any, delay: Any, e2e: Any, gaps: npt.NDArray[Any]) -> Served:
    """From lengths (tokens) and seconds of each request, and gaps."""
    prompt, output, ttft, delay, e2e = map(np.asarray, (prompt, output, ttft, delay, e2e))
    tpot = (e2e - ttft) / np.where(output > 1, output - 1.0, np.nan)
    return Served({"prompt_tokens": prompt, "ttft": ttft, "tpot": tpot, "e2e": e2e, "delay": delay}, gaps)


def seen_once(seconds: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Gaps as Served has them, each of one request."""
    gaps = np.ones(len(seconds), dtype=[("seconds", "f8"), ("count", "i8")])
    gaps["seconds"] = seconds
    return gaps


def served_of(record: Record) -> Served:
    """What the requests of a record saw; no request if it was cut short: who is missing would have seen the worst."""
    found, gaps = request_metrics(record), tbt(record)
    found = found.iloc[:0] if record.truncated else found
    lengths = record.requests.set_index("request").reindex(found.index)
    prompt, output = lengths["prompt_tokens"], lengths["generated_tokens"]
    return served(prompt, output, found["ttft"], found["scheduling_delay"], found["latency"], seen_once(gaps))


def gap_percentile(gaps: npt.NDArray[Any], share: float) -> float:
    """numpy's percentile, linear, of gaps that so many saw alike, seconds; 0 of none."""
    count = int(gaps["count"].sum())
    if not count:
        return 0.0
    at = max(0, int((4 * share - 3) * len(gaps)))
    longest = gaps[gaps["seconds"] >= np.partition(gaps["seconds"], at)[at]]  # four times the share: they nearly always suffice
    gaps = longest if longest["count"].sum() > (1 - share) * count + 1 else gaps
    gaps = gaps[np.argsort(gaps["seconds"])]
    reached, place = np.cumsum(gaps["count"]) + count - gaps["count"].sum(), share * (count - 1)
    around = np.searchsorted(reached, [int(place), min(int(place) + 1, count - 1)], side="right")
    return float(np.interp(place % 1, (0, 1), gaps["seconds"][around]))


def duration(record: Record) -> float:
    """Seconds from the first scheduled arrival to the last output token; NaN without tokens."""
    return float(record.tokens["time_s"].max() - record.requests["arrival_s"].min())


def serving_metrics(record: Record) -> dict[str, float]:
    """The metrics of a serving trial's measured phase; seconds, tokens, requests per second.

    tbt_p99, ttft_p50 and their like: percentiles, linear interpolation. utilisation: time in steps / duration.
    """
    requests, gaps, seconds = request_metrics(record), tbt(record), duration(record)
    values = {"requests": float(len(requests)), "duration": seconds}
    for name, sample in (("ttft", requests["ttft"]), ("tbt", gaps), ("scheduling_delay", requests["scheduling_delay"])):
        for percent in (50, 90, 99):
            values[f"{name}_p{percent}"] = float(np.percentile(sample, percent)) if len(sample) else math.nan
    return values | {
        "normalized_latency_p50": float(requests["normalized_latency"].median()),
        "lateness_p99": float(requests["lateness"].quantile(0.99)),
        "output_tokens_per_s": len(record.tokens) / seconds,
        "requests_per_s": len(requests) / seconds,
        "utilisation": float(record.steps["seconds"].sum()) / seconds,
    }


def saturation_throughput(record: Record) -> float:
    """Requests finished per second while the engine is full: the middle three fifths of the finishing times.

    All requests arrive at once; the start, when none can be finished, and the end, when the batch runs empty, are left out.
    """
    finished = np.sort(record.tokens.groupby("request")["time_s"].max().to_numpy())
    low, high = round(0.2 * len(finished)), round(0.8 * len(finished)) - 1
    return float((high - low) / (finished[high] - finished[low]))
