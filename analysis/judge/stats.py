"""Intervals and tests of the verdicts: t over replicates, on log ratios paired by seed.

Everything here works along the last axis, so that the rule that judges one run also judges thousands of synthetic ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
from scipy import special  # not scipy.stats, which takes half a second to import

Array = npt.NDArray[np.float64]

# One-sided, of a first look and of a last one with more replicates. A first look cannot know whether another will follow, so
# the two share 2.5 % beforehand. The first has most of it: at 1.25 % a 10 % effect at 5 % noise needs 7 replicates, not 6.
LEVELS = (0.02, 0.005)
POWER = 0.8  # wanted of advice on the number of replicates
MOST_REPLICATES = 20  # as many seeds as the figures have; what needs more is not settled by repetition


@dataclass(frozen=True, eq=False)
class Sample:
    """Log ratios, (..., replicates). Ratios are shown; tests are on their logs, where a factor is a distance."""

    logs: Array
    systematic: float = 0.0  # log units by which the mean itself may be off, however many replicates: a simulation's error

    @property
    def n(self) -> int:
        """Replicates."""
        return int(self.logs.shape[-1])

    @cached_property
    def mean(self) -> Array:
        """Mean log ratio."""
        return np.asarray(self.logs.mean(axis=-1))

    @cached_property
    def error(self) -> Array:
        """Standard error of the mean log ratio; NaN below two replicates."""
        if self.n < 2:
            return np.full_like(self.mean, math.nan)
        return np.asarray(self.logs.std(axis=-1, ddof=1) / math.sqrt(self.n))

    @property
    def ratio(self) -> Array:
        """Geometric mean of the ratios."""
        return np.exp(self.mean)

    def interval(self) -> tuple[Array, Array]:
        """Two-sided 95 % t interval of the ratio, unadjusted; (0, inf) below two replicates, where nothing is known."""
        if self.n < 2:
            return np.zeros_like(self.mean), np.full_like(self.mean, math.inf)
        half = special.stdtrit(self.n - 1, 0.975) * self.error + self.systematic
        return np.exp(self.mean - half), np.exp(self.mean + half)

    def p_above(self, bound: float) -> Array:
        """One-sided p value of "the ratio is above bound" (null: at most). bound: from 0; 1 below two replicates."""
        return self._p(self.mean - (math.log(bound) if bound else -math.inf))

    def p_below(self, bound: float) -> Array:
        """One-sided p value of "the ratio is below bound", which may be infinite."""
        return self._p((math.log(bound) if bound else -math.inf) - self.mean)

    def _p(self, distance: Array) -> Array:
        if self.n < 2:
            return np.ones_like(distance)
        distance, error = distance - self.systematic, self.error
        same = error == 0.0  # replicates equal to the last digit: a simulation without jitter
        tail = special.stdtr(self.n - 1, -distance / np.where(same, 1.0, error))  # the upper tail of t
        return np.where(same, distance <= 0, tail)


def sample(ratios: Sequence[float], error: float = 0.0) -> Sample:
    """Ratios, one per replicate, and the relative error they share -> Sample. Raises ValueError for a ratio that is no
    positive number, or an error that is negative or none."""
    if not ratios or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ValueError(f"ratios: got {list(ratios)}; positive numbers are needed")
    if not 0 <= error < math.inf:  # a negative one would narrow the interval past itself
        raise ValueError(f"error: got {error}; allowed: 0 or a positive number")
    return Sample(np.log(np.asarray(ratios, dtype=np.float64)), math.log1p(error))


def holm(p_values: npt.ArrayLike) -> Array:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979) along the last axis, in the order given."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, axis=-1, kind="stable")
    steps = np.arange(values.shape[-1], 0, -1) * np.take_along_axis(values, order, axis=-1)
    adjusted = np.empty_like(values)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0), axis=-1)
    return adjusted


@cache
def _detectable(level: float) -> Array:
    """Distance, in standard deviations of a replicate, that n replicates detect with POWER; n = 3 to MOST_REPLICATES.

    Power of the one-sided t test from the noncentral t distribution.
    """
    n = np.arange(3, MOST_REPLICATES + 1)
    critical = special.stdtrit(n - 1, 1 - level)
    return np.asarray(special.nctdtrinc(n - 1, 1 - POWER, critical) / np.sqrt(n))


def replicates_needed(seen: Sample, distance: Array, level: float) -> npt.NDArray[np.int64]:
    """Replicates in all with which a test succeeds with POWER, if distance from the bound and spread stay as seen.

    distance: log units. 0 where more than MOST_REPLICATES would be needed, or nothing is known.
    """
    if seen.n < 2:
        return np.zeros(distance.shape, dtype=np.int64)
    spread = np.maximum(seen.error * math.sqrt(seen.n), 1e-12)
    count = 3 + np.searchsorted(-_detectable(level), -(distance - seen.systematic) / spread)
    count = np.maximum(count, seen.n + 1)
    return np.where(count <= MOST_REPLICATES, count, 0)
