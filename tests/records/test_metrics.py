"""The metrics against numbers worked out by hand; see fakes.tiny_record."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from fakes import tiny_record

from experiments.records import metrics
from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS, Record, frame

POINT = metrics.of_phase(tiny_record(), 1)


def test_the_measured_phase_is_cut_out_of_its_trial() -> None:
    assert metrics.point_phase([{"role": "probe"}, {"role": "point"}, {"role": "probe"}]) == 1
    assert metrics.point_phase([{"role": "probe"}, {"role": "saturation"}]) == 1
    assert POINT.requests["request"].tolist() == [1, 2, 3]
    assert POINT.steps["start_s"].tolist() == [1.0, 1.5, 2.0, 2.25, 5.0]
    assert POINT.tokens["time_s"].tolist() == [2.0, 2.0, 2.25, 2.25, 3.0, 5.5]


def test_times_of_a_request_count_from_its_scheduled_arrival() -> None:
    found = metrics.request_metrics(POINT)
    assert found.index.tolist() == [1, 2, 3]
    assert found["ttft"].tolist() == pytest.approx([2.0 - 1.0, 2.0 - 1.2, 5.5 - 5.0])
    assert found["scheduling_delay"].tolist() == pytest.approx([0.0, 1.5 - 1.2, 0.0])
    assert found["latency"].tolist() == pytest.approx([3.0 - 1.0, 2.25 - 1.2, 5.5 - 5.0])
    assert found["normalized_latency"].tolist() == pytest.approx([2.0 / 3, 1.05 / 2, 0.5 / 1])
    assert found["lateness"].tolist() == pytest.approx([0.0, 0.3, 0.0])


def test_tbt_is_within_a_request_never_between_two() -> None:
    assert sorted(metrics.tbt(POINT)) == pytest.approx([0.25, 0.25, 0.75])


def test_the_metrics_of_a_trial() -> None:
    found = metrics.serving_metrics(POINT)
    assert found["requests"] == 3
    assert found["duration"] == pytest.approx(5.5 - 1.0)
    assert found["ttft_p50"] == pytest.approx(0.8)
    assert found["ttft_p90"] == pytest.approx(0.8 + 0.8 * (1.0 - 0.8))  # 0.9 of the way from the first to the third of three
    assert found["tbt_p50"] == pytest.approx(0.25)
    assert found["tbt_p99"] == pytest.approx(0.25 + 0.98 * (0.75 - 0.25))
    assert found["scheduling_delay_p50"] == 0
    assert found["scheduling_delay_p99"] == pytest.approx(0.98 * 0.3)
    assert found["normalized_latency_p50"] == pytest.approx(0.525)
    assert found["lateness_p99"] == pytest.approx(0.98 * 0.3)
    assert found["output_tokens_per_s"] == pytest.approx(6 / 4.5)
    assert found["requests_per_s"] == pytest.approx(3 / 4.5)
    assert found["utilisation"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.75 + 0.5) / 4.5)


def test_an_unfinished_request_has_no_times() -> None:
    requests = POINT.requests.copy()
    requests.loc[requests["request"] == 1, "last_step"] = -1
    cut = dataclasses.replace(POINT, requests=requests, truncated=True)
    assert metrics.request_metrics(cut).index.tolist() == [2, 3]
    assert metrics.serving_metrics(cut)["ttft_p50"] == pytest.approx((0.8 + 0.5) / 2)


def test_nothing_received_is_not_a_number() -> None:
    nothing = Record(POINT.requests.assign(last_step=-1), POINT.steps, POINT.tokens.iloc[:0], truncated=True)
    found = metrics.serving_metrics(nothing)
    assert found["requests"] == 0
    assert all(math.isnan(found[name]) for name in ("duration", "ttft_p50", "tbt_p99", "lateness_p99"))


def test_saturation_is_the_rate_of_the_middle() -> None:
    """Ten requests: the first takes 5 s, then one every half second, the last two stragglers long after."""
    ends = [5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5, 20.0, 30.0]
    requests = [[n, 0, 8, 0.0, 0.0, 4, 1, 1, 0, 0, 0] for n in range(10)]
    tokens = frame(list(enumerate(ends)), TOKEN_COLUMNS)
    record = Record(frame(requests, REQUEST_COLUMNS), frame([], STEP_COLUMNS), tokens)
    assert metrics.saturation_throughput(record) == pytest.approx(5 / (8.5 - 6.0))


def test_prefill_time_is_the_sum_of_its_steps() -> None:
    record = tiny_record()
    lone = record.requests[record.requests["request"].isin([0, 3, 4])].assign(phase=[0, 1, 2])
    found = metrics.prefill_seconds(dataclasses.replace(record, requests=lone))
    np.testing.assert_allclose(found, [0.5, 0.5, 0.5])
