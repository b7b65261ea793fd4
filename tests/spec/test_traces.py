"""Which requests of a file are used, when they came, and what is said of it; any bytes give a trace or one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_formats import HEADER, lines, read, refused, run

from experiments.records.errors import SpecError
from experiments.spec.traces import describe_trace, read_trace
from experiments.spec.workload import choose_trace

KEYS = [
    "input_lens",
    "output_lens",
    "isl",
    "osl",
    "start_time",
    "error",
    "hash_ids",
    "total_input_tokens",
    "total_output_tokens",
]


# What cannot be used


def test_each_kind_of_bad_row_is_left_out_and_told_with_its_first() -> None:
    bad = "7,0\n0,7\n-7,8\n7,x\n7,\n7.5,2\n1,2,3\n8000,193\n8001,193\n7,nan\n"
    trace = read(HEADER + "10,5\n" * 10 + bad, max_total=8192)
    assert trace.prompt.tolist() == [10] * 10
    assert trace.notes == (
        "read from num_prefill_tokens, num_decode_tokens",
        "left out: 1 (5 %) of other than 2 fields, first in row 18: '3 fields'; "
        "3 (15 %) without a number of tokens, first in row 15: '7 + x'; "
        "1 (5 %) of a negative number of tokens, first in row 14: '-7 + 8'; "
        "1 (5 %) of no whole number of tokens, first in row 17: '7.5 + 2'; "
        "1 (5 %) without prompt tokens, first in row 13: '0 + 7'; "
        "1 (5 %) without output tokens, first in row 12: '7 + 0'; "
        "2 (10 %) of more than 8,192 tokens, first in row 19: '8000 + 193'",
    )


def test_requests_that_failed_are_left_out_whatever_their_lengths() -> None:
    trace = read(json.dumps(run((10, 5), (11, 6), (12, 0), (13, 7), errors=["", "", "Connection reset", "Timeout"])))
    assert trace.prompt.tolist() == [10, 11]
    assert trace.notes[-1] == "left out: 2 (50 %) failed, first in row 3: 'Connection reset'"


def test_more_than_half_unusable_is_refused_with_the_shares() -> None:
    refused(
        HEADER + "10,5\n" + "9000,1\n" * 2 + "7,0\n",
        "got 4 requests, of which 1 (25 %) without output tokens, first in row 5: '7 + 0'; 2 (50 %) of more than 8,192 tokens",
        "allowed: at most half",
        max_total=8192,
    )
    assert len(read(HEADER + "10,5\n" + "9000,1\n", 8192).prompt) == 1


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    for name, part in [("none.csv", "No such file"), (".", "directory"), ("x" * 300, "too long")]:
        with pytest.raises(SpecError) as error:
            read_trace(tmp_path / name)
        assert part in str(error.value)


def test_requests_that_are_all_alike() -> None:
    trace = choose_trace("512/128", max_total=8192)
    assert (trace.name, trace.kind) == ("512/128", "fixed")
    assert (set(trace.prompt), set(trace.output), len(trace.prompt)) == ({512}, {128}, 32768)
    assert trace.sha256 != choose_trace("512/129").sha256
    for asked, came in (("8192/1", "8,192 prompt and 1"), ("2000/0", "2,000 prompt and 0"), ("0/9", "0 prompt and 9")):
        with pytest.raises(SpecError) as error:
            choose_trace(asked, max_total=8192)
        told = f"TRACE: {asked}: got {came} output tokens; allowed: 1 or more of each, at most 8,192 together"
        assert str(error.value) == told


# What else it says


def test_starts_that_cannot_be_used_give_no_arrivals() -> None:
    header = "timestamp,num_prefill_tokens,num_decode_tokens\n"
    for rows, note in [
        ("1,9,9\nnoon,9,9\n", "no arrivals: 1 start times cannot be read, as seconds or ISO 8601 are, first in row 3: 'noon'"),
        ("1,9,9\n1,9,9\n", "no arrivals: all start at once"),
    ]:
        trace = read(header + rows)
        assert (len(trace.prompt), trace.arrivals, trace.notes[1]) == (2, None, note)
    two_runs = read(lines(run((9, 9), start_times=[1]), run((9, 9), start_times=[5])))
    assert (two_runs.arrivals, two_runs.duration_s) == (None, 8.0)
    assert two_runs.notes[1] == "no arrivals: 2 runs in it, one after the other"


def test_arrivals_count_from_the_first_request_that_is_used() -> None:
    trace = read("arrived_at,num_prefill_tokens,num_decode_tokens\n1,9,0\n5,8,8\n3,7,7\n")
    assert trace.arrivals is not None
    assert (trace.arrivals.tolist(), trace.prompt.tolist()) == ([0, 2], [7, 8])


def test_the_share_that_prefix_caching_would_find() -> None:
    trace = read(
        lines(
            {"timestamp": 0, "input_length": 1000, "output_length": 9, "hash_ids": [0, 1]},
            {"timestamp": 1, "input_length": 1300, "output_length": 9, "hash_ids": [0, 2, 3]},  # one block of 512
            {
                "timestamp": 2,
                "input_length": 1000,
                "output_length": 9,
                "hash_ids": [0, 1],
            },  # all 1,000, its last block in part
            {"timestamp": 3, "input_length": 700, "output_length": 9, "hash_ids": [4, 1]},  # not from the first block on
        )
    )
    assert trace.cached == pytest.approx(1512 / 4000)
    assert "; prefix caching would find 38% of the prompt tokens (HIT=0.38); " in describe_trace(trace)
    assert read(HEADER + "1,1\n").cached is None


def test_the_line_that_says_what_was_understood() -> None:
    made = "arrived_at,isl,osl\n" + "".join(f"{t},{10 * n},{n}\n" for n, t in enumerate([0, 0, 1, 2, 5]))
    assert describe_trace(read(made)) == (  # gaps 1, 1, 3: their mean is 5/3, their standard deviation sqrt(8)/3
        "trace a file.txt (file): 4 requests; prompt tokens P50 25, P90 37, P99 40; output tokens P50 2, P90 4, P99 4; "
        "arriving over 5.0 s, 0.6 requests/s, CV of the gaps 0.57; read from isl, osl, arrived_at; "
        "left out: 1 (20 %) without prompt tokens, first in row 2: '0 + 0'"
    )
    assert "; served in 4.0 s, 0.50 requests/s; read from input_lens" in describe_trace(read(lines(run((9, 9), (9, 9)))))
    assert "; no arrival times in it; " in describe_trace(read(HEADER + "1,1\n"))


@given(
    st.binary(max_size=300)
    | st.text('019.,-\n"', max_size=40).map(lambda text: (HEADER + text).encode())
    | st.binary(max_size=30).map(gzip.compress)
    | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    ).map(lambda value: json.dumps([value]).encode())
)
def test_any_bytes_give_a_trace_or_one_line(data: bytes) -> None:
    told, shortest, gaps = "", 1, np.zeros(1)
    try:
        trace = read(data)
        shortest = min(trace.prompt.min(), trace.output.min())
        gaps = gaps if trace.arrivals is None else np.diff(trace.arrivals)
    except SpecError as error:
        told = str(error)
    assert len(told.splitlines()) <= 1
    assert shortest >= 1
    assert (gaps >= 0).all()
