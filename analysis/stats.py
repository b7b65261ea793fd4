"""Intervals and tests of the verdicts: t over replicates, on log ratios paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.025  # one-sided, so that the 95 % intervals shown and the tests agree
MOST_REPLICATES = 100  # beyond this the advice is that the effect cannot be settled by repetition


@dataclass(frozen=True)
class Sample:
    """Log ratios, one per replicate. Ratios are shown; tests are on their logs, where a factor is a distance."""

    logs: tuple[float, ...]
    systematic: float = 0.0  # log units by which the mean itself may be off, however many replicates: a simulation's error

    @property
    def n(self) -> int:
        """Replicates."""
        return len(self.logs)

    @property
    def mean(self) -> float:
        """Mean log ratio."""
        return float(np.mean(self.logs))

    @property
    def error(self) -> float:
        """Standard error of the mean log ratio; NaN below two replicates."""
        return float(np.std(self.logs, ddof=1) / math.sqrt(self.n)) if self.n > 1 else math.nan

    @property
    def ratio(self) -> float:
        """Geometric mean of the ratios."""
        return math.exp(self.mean)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided t interval of the ratio, unadjusted; (0, inf) below two replicates, where nothing is known."""
        if self.n < 2:
            return 0.0, math.inf
        half = float(stats.t.ppf(0.5 + confidence / 2, self.n - 1)) * self.error + self.systematic
        return math.exp(self.mean - half), math.exp(self.mean + half)

    def p_above(self, bound: float) -> float:
        """One-sided p value of "the ratio is above bound" (null: at most). 1 below two replicates."""
        return self._p(self.mean - math.log(bound))

    def p_below(self, bound: float) -> float:
        """One-sided p value of 'the ratio is below bound'."""
        return self._p(math.log(bound) - self.mean)

    def _p(self, distance: float) -> float:
        if self.n < 2:
            return 1.0
        distance -= self.systematic
        if self.error == 0.0:  # replicates equal to the last digit: a simulation without jitter
            return 0.0 if distance > 0 else 1.0
        return float(stats.t.sf(distance / self.error, self.n - 1))


def sample(ratios: Sequence[float], error: float = 0.0) -> Sample:
    """Ratios, one per replicate, and the relative error they share -> Sample. Raises ValueError for a ratio that is no
    positive number."""
    if not ratios or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ValueError(f"ratios: got {list(ratios)}; positive numbers are needed")
    return Sample(tuple(math.log(ratio) for ratio in ratios), math.log1p(error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979): adjusted p values, in the order given."""
    count, running = len(p_values), 0.0
    adjusted = [1.0] * count
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def replicates_needed(seen: Sample, bound: float, level: float, power: float = 0.8) -> int | None:
    """Replicates with which a test of 'beyond bound' succeeds with this power, if effect and spread stay as seen.

    Power of the one-sided t test from the noncentral t distribution. None if more than MOST_REPLICATES would be needed.
    """
    if seen.n < 2:
        return None
    spread = seen.error * math.sqrt(seen.n)
    distance = abs(seen.mean - math.log(bound)) - seen.systematic
    if distance <= 0:
        return None
    for count in range(seen.n + 1, MOST_REPLICATES + 1):
        if spread == 0.0:
            return count
        critical = stats.t.ppf(1 - level, count - 1)
        if stats.nct.sf(critical, count - 1, distance / spread * math.sqrt(count)) >= power:
            return count
    return None
