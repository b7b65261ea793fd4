from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from analysis.judge.stats import MOST_REPLICATES, Sample, holm, replicates_needed, sample
from experiments.spec.spec import load_figure

logs = st.lists(st.floats(-2, 2).map(lambda value: round(value, 6)), min_size=3, max_size=12)


@given(logs)
def test_p_values_are_scipys_one_sample_t_test(values: list[float]) -> None:
    if np.std(values) < 1e-9:
        return
    seen = Sample(np.array(values))
    assert seen.p_above(1.1) == pytest.approx(scipy_stats.ttest_1samp(values, math.log(1.1), alternative="greater").pvalue)
    assert seen.p_below(1.1) == pytest.approx(scipy_stats.ttest_1samp(values, math.log(1.1), alternative="less").pvalue)
    interval = scipy_stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert seen.interval() == pytest.approx((math.exp(interval.low), math.exp(interval.high)))


@settings(max_examples=20, deadline=None)  # statsmodels is slow to start and slower to adjust
@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_is_statsmodels_holm(values: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    assert holm(values) == pytest.approx(list(multitest.multipletests(values, method="holm")[1]))


def test_one_replicate_knows_nothing() -> None:
    one = sample([1.5])
    assert one.interval() == (0.0, math.inf)
    assert one.p_above(1.0) == one.p_below(2.0) == 1.0
    assert replicates_needed(one, np.abs(one.mean), 0.025) == 0


def test_replicates_without_spread_are_certain() -> None:
    same = sample([1.5, 1.5, 1.5])
    assert same.p_above(1.0) == 0.0
    assert same.p_below(1.0) == 1.0
    assert same.p_above(1.5) == same.p_below(1.5) == 1.0


@pytest.mark.parametrize("ratios", [[], [0.0], [-1.0], [math.nan], [math.inf]])
def test_ratios_must_be_positive_numbers(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="positive numbers are needed"):
        sample(ratios)


@pytest.mark.parametrize("error", [-0.5, math.nan, math.inf])
def test_an_error_cannot_narrow_an_interval(error: float) -> None:
    with pytest.raises(ValueError, match="allowed: 0 or a positive number"):
        sample([1.1, 1.2], error)


@pytest.mark.parametrize(("effect", "spread"), [(0.05, 0.05), (0.1, 0.1), (0.03, 0.04)])
def test_replicates_needed_have_the_power_they_promise(effect: float, spread: float) -> None:
    rng = np.random.default_rng(7)
    z = np.array([-1.0, 1.0, -1.0, 1.0]) * spread * math.sqrt(3) / 2  # standard deviation `spread` to the digit
    needed = int(replicates_needed(Sample(effect + z), np.array(effect), 0.025))
    assert 4 < needed <= MOST_REPLICATES
    draws = rng.normal(effect, spread, size=(4000, needed))
    passed = scipy_stats.ttest_1samp(draws, 0.0, axis=1, alternative="greater").pvalue <= 0.025
    assert 0.77 <= passed.mean() <= 0.93


def test_no_number_of_replicates_settles_no_effect() -> None:
    seen = sample([0.9, 1.1, 0.95, 1.0526])
    assert replicates_needed(seen, np.abs(seen.mean), 0.025) == 0


@pytest.mark.parametrize("figure", ["fig9a", "fig9b"])
def test_no_more_replicates_are_advised_than_there_are_seeds(figure: str) -> None:
    assert len(load_figure(figure).seeds) >= MOST_REPLICATES
