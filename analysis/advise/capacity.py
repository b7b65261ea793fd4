"""The highest load that keeps latency targets: bisection over the rate of requests, for any way of serving a load.

Capacity as in the paper (Sarathi-Serve, OSDI 2024, section 5.1): the highest rate at which P99 TBT is within its target and
the median scheduling delay at most 2 s. All settings see the same requests, arriving at the same moments but for a factor
(common random numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from experiments.records.metrics import LATENCIES, PERCENTS

GRID = 10  # rates looked at per factor of two; between two of them capacity is interpolated
LOWEST = -10 * GRID  # a request every 17 minutes: one at a time
HIGHEST = 10 * GRID
DELAY_LIMIT_S = 2.0
TARGETS = {f"{kind}_p{percent}": f"P{percent} {words}" for kind, words in LATENCIES.items() for percent in PERCENTS}
WORDS = {**TARGETS, "goodput": "goodput", "delay_p50": "median scheduling delay", "nothing": "nothing"}  # what may bind
CURVE_STEPS = (GRID // 2, 5 * GRID // 2)  # below the highest rate
JUMP, FINEST = 1.7, 3  # where P99 TBT rises by more, a curve is looked at more closely, down to these steps


@dataclass(frozen=True, order=True)
class Setting:
    """What is to be chosen: the chunk size (tokens per step) and the most requests in a step, as the engine takes them."""

    budget: int
    max_batch: int


class Latency(dict[str, float]):
    """By their names in WORDS: what requests saw under a load, seconds; as limits, the most they may see.

    Of `goodput`: what the worst of the share that counts saw, over its targets; the limit is 1.
    """

    def within(self, limits: Latency) -> tuple[float, str]:
        """The worst log ratio to its limit, at most 0 if all are kept, and which latency that is."""
        ratios = {name: self[name] / limit for name, limit in limits.items()}
        name = max(ratios, key=ratios.__getitem__, default="nothing")
        return math.log(max(ratios.get(name, 0.0), 1e-9)), name


@dataclass(frozen=True)
class Capacity:
    """The highest rate (requests/s) that keeps the limits, 0 if none does, and which latency forbids more."""

    rate: float
    bound_by: str


@dataclass
class Search:
    """Looks for capacities and remembers every load served: they tell of all targets.

    `serve`: setting, rate in requests/s, seed -> latency.
    """

    serve: Callable[[Setting, float, int], Latency]
    seen: dict[tuple[Setting, int], dict[float, Latency]] = field(default_factory=dict)  # (setting, seed) -> step -> latency

    def rate(self, step: float) -> float:
        """Requests per second at a step of the grid."""
        return float(2.0 ** (step / GRID))

    def at(self, setting: Setting, step: float, seed: int) -> Latency:
        """The latency at a step of the grid, or between, served once."""
        seen = self.seen.setdefault((setting, seed), {})
        if step not in seen:
            seen[step] = self.serve(setting, self.rate(step), seed)
        return seen[step]

    def keeps(self, setting: Setting, rate: float, limits: Latency, seed: int) -> bool:
        """Whether the limits are kept at this very rate; 0: one request at a time. What is kept at more is kept at less."""
        step = GRID * math.log2(rate) if rate else LOWEST
        known = {at: seen.within(limits)[0] <= 0 for at, seen in self.seen.get((setting, seed), {}).items()}
        if not all(kept for at, kept in known.items() if at <= step):
            return False
        return any(kept for at, kept in known.items() if at >= step) or self.at(setting, step, seed).within(limits)[0] <= 0

    def capacity(self, setting: Setting, limits: Latency, seed: int, near: float = 1.0) -> Capacity:
        """Gallops from the rate `near` to a bracket, halves it to neighbours of the grid, interpolates the log ratio there.

        Latencies grow with the rate but for noise; of several crossings the lowest that is seen counts.
        """

        def excess(step: float) -> float:
            return self.at(setting, step, seed).within(limits)[0]

        seen = self.seen.setdefault((setting, seed), {})
        high = min((step for step in seen if excess(step) > 0), default=float(HIGHEST))
        low = max((step for step in seen if step < high and excess(step) <= 0), default=float(LOWEST - 1))
        step, stride = float(round(GRID * math.log2(near))) if near else float(LOWEST), 1
        while high - low > 1:
            step = min(max(step, low + 1), high - 1) if high - low >= 2 else (low + high) / 2
            if excess(step) > 0:
                high, step = step, step - stride
            else:
                low, step = step, step + stride
            stride *= 2
            if stride > high - low:  # galloped past what is known: halve
                step = (low + high) // 2
        if low < LOWEST:
            return Capacity(0.0, self.at(setting, LOWEST, seed).within(limits)[1])
        if high == HIGHEST:
            return Capacity(self.rate(low), "nothing")
        below, (above, bound_by) = excess(low), self.at(setting, high, seed).within(limits)
        share = 0.0 if math.isinf(above) else -below / (above - below)
        return Capacity(self.rate(low + share * (high - low)), bound_by)


def curve(search: Search, setting: Setting, limits: Latency, seed: int, targets: Sequence[float], near: float) -> list[float]:
    """Capacity (requests/s) at each P99 TBT target (s), the other limits as given; NaN below the lowest load looked at.

    Up to what the other limits allow, rates half an octave apart and, where P99 TBT jumps, in between; interpolated.
    """
    others = Latency({name: limit for name, limit in limits.items() if name != "tbt_p99"})
    top = search.capacity(setting, others, seed, near)
    if not top.rate:
        return [math.nan] * len(targets)
    last = math.floor(GRID * math.log2(top.rate))
    for distance in (0, *CURVE_STEPS):
        search.at(setting, last - distance, seed)

    def points() -> list[tuple[float, float]]:
        seen = sorted(search.seen[setting, seed].items())
        return [(step, latency["tbt_p99"]) for step, latency in seen if LOWEST < step <= last + 1]

    while jumps := [(a + b) // 2 for (a, p), (b, q) in pairwise(points()) if b - a > FINEST and q > JUMP * p]:
        search.at(setting, jumps[-1], seed)
    steps, p99 = (np.array(column, dtype=np.float64) for column in zip(*points(), strict=True))
    rates = np.minimum(2.0 ** (steps / GRID), top.rate)
    known = np.log(np.maximum.accumulate(p99))
    return list(map(float, np.exp(np.interp(np.log(targets), known, np.log(rates), left=math.nan))))
