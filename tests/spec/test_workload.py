"""Arrivals and lengths are the original's to the last digit; whatever a user can get wrong is told in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from experiments.records.errors import SpecError
from experiments.records.record import Request
from experiments.spec import traces, workload
from experiments.spec.expand import Traffic
from experiments.spec.spec import read_spec

ORIGINAL = Path(__file__).parents[3] / "shared" / "data" / "sharegpt_8k_filtered_stats_llama2_tokenizer.csv"
needs_original = pytest.mark.skipif(not ORIGINAL.is_file(), reason="the original's trace is no part of the project")
HEADER = "num_prefill_tokens,num_decode_tokens\n"
TINY = b"num_prefill_tokens,num_decode_tokens,pd_ratio\n10,5,2\n20,4,5\n30,3,10\n"
GOLDEN_ARRIVALS = {  # QPS -> sha256 of 1024 little-endian doubles, computed from the original's formula with glibc's log
    0.55: "d0566c7f9219314adcdfe41090aded8e1289866c905af139c520f9bbcce68db9",
    1.0: "047cacc2e1a54c60e3add70b411cf070c8c0853b066dd69feac556de2d77e99f",
    3.0: "a2f353d44e026b996c464627d5f61778a908959b8a53864403e93ea4b7e973a8",
}
GOLDEN_SYNTHETIC = "b5349865023ac6a547d81b8fee61c296ff1170335f436f338ee3926c27eb2529"
LENGTHS = st.lists(st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)), min_size=1, max_size=40)


def trace_of(pairs: list[tuple[int, int]]) -> traces.Trace:
    prompt, output = np.array(pairs, dtype=np.int64).T
    return traces.Trace("made.csv", "0" * 64, prompt, output, "file")


def expected_lengths(frame: pd.DataFrame, count: int, seed: int, limit: int) -> list[list[int]]:
    """The original's procedure, written anew: row by row in Python's own numbers, shuffled by pandas."""
    rows = []
    for prompt, output in zip(frame["num_prefill_tokens"].tolist(), frame["num_decode_tokens"].tolist(), strict=True):
        total = prompt + output
        excess = max(total - limit, 0)
        cut = [n - math.ceil(excess * (n / total)) for n in (prompt, output)]
        rows.append([max(n, 1) for n in cut])
    return pd.DataFrame(rows).sample(frac=1, random_state=seed).head(count).to_numpy().tolist()


def one_line(error: pytest.ExceptionInfo[SpecError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


# Arrivals


def original_arrivals(qps: float, count: int, seed: int) -> list[float]:
    """The original's procedure, written anew with the global generator, whose state is put back."""
    state = random.getstate()
    try:
        random.seed(seed)
        now: float = 0
        times = []
        for _ in range(count):
            gap = -math.log(1.0 - random.random()) / qps
            now = now + min(gap, (1.0 / qps) * 3.0)
            times.append(now)
        return times
    finally:
        random.setstate(state)


@pytest.mark.parametrize("qps", [0.55, 1.0, 3.0])
def test_arrivals_are_the_original_ones_bit_for_bit(qps: float) -> None:
    assert workload.poisson_arrivals(qps, 1024, 42).tolist() == original_arrivals(qps, 1024, 42)


def test_arrivals_of_seed_42_never_change() -> None:
    for qps, digest in GOLDEN_ARRIVALS.items():
        assert hashlib.sha256(workload.poisson_arrivals(qps, 1024, 42).astype("<f8").tobytes()).hexdigest() == digest


@given(qps=st.floats(1e-3, 1e3), count=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
def test_arrivals_are_monotone_with_bounded_gaps_and_a_stable_prefix(qps: float, count: int, seed: int) -> None:
    arrivals = workload.poisson_arrivals(qps, count, seed)
    gaps = np.diff(arrivals, prepend=0.0)
    assert arrivals.shape == (count,)
    assert (gaps >= 0).all()
    assert (gaps <= 3 / qps * (1 + 1e-9)).all()
    assert workload.poisson_arrivals(qps, count + 5, seed)[:count].tolist() == arrivals.tolist()


def test_arrivals_leave_the_global_generators_alone() -> None:
    before, numpy_before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    workload.serving_requests(workload.synthetic_trace(50), 1.0, 20, 42, 8192)
    assert random.getstate() == before
    assert np.random.get_state()[1].tolist() == numpy_before  # type: ignore[index]


@pytest.mark.parametrize(
    ("qps", "count", "seed", "what"),
    [
        *((qps, 1, 1, "qps") for qps in (0.0, -1.0, math.nan, math.inf, 1e-300)),
        *((1.0, count, 1, "count") for count in (0, -1, 10**9)),
        *((1.0, 1, seed, "seed") for seed in (-1, 2**32)),
    ],
)
def test_arrivals_refuse_what_makes_no_sense(qps: float, count: int, seed: int, what: str) -> None:
    with pytest.raises(SpecError) as error:
        workload.poisson_arrivals(qps, count, seed)
    one_line(error, what, "got", "allowed")


# Lengths


@needs_original
@pytest.mark.parametrize("limit", [8192, 4096, 1024])
def test_lengths_are_the_original_ones(limit: int) -> None:
    lengths = workload.trace_lengths(traces.read_trace(ORIGINAL), 2000, 42, limit)
    assert np.stack(lengths, axis=1).tolist() == expected_lengths(pd.read_csv(ORIGINAL), 2000, 42, limit)


@needs_original
def test_the_original_trace_is_the_one_that_is_fetched() -> None:
    trace = traces.read_trace(ORIGINAL, max_total=8192)
    source = read_spec(workload.SOURCE, workload.TraceSource)
    assert (trace.sha256, ORIGINAL.stat().st_size) == (source.sha256, source.bytes)
    assert len(trace.prompt) == len(trace.output) == 30731


@given(pairs=LENGTHS, seed=st.integers(0, 2**32 - 1), limit=st.integers(2, 30_000), data=st.data())
def test_lengths_fit_and_follow_the_original(pairs: list[tuple[int, int]], seed: int, limit: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(pairs)))
    prompt, output = workload.trace_lengths(trace_of(pairs), count, seed, limit)
    assert prompt.dtype == output.dtype == np.int64
    assert min(prompt.min(), output.min()) >= 1
    assert (prompt + output).max() <= limit
    frame = pd.DataFrame(pairs, columns=["num_prefill_tokens", "num_decode_tokens"])
    assert np.stack([prompt, output], axis=1).tolist() == expected_lengths(frame, count, seed, limit)


@given(prompt=st.integers(1, 9_999_999), output=st.integers(1, 9_999_999), limit=st.integers(2, 10_000_000))
def test_a_request_of_any_allowed_size_is_cut_to_fit(prompt: int, output: int, limit: int) -> None:
    cut_prompt, cut_output = workload.trace_lengths(trace_of([(prompt, output)]), 1, 0, limit)
    assert 1 <= cut_prompt[0] <= prompt
    assert 1 <= cut_output[0] <= output
    assert cut_prompt[0] + cut_output[0] <= limit


@pytest.mark.parametrize(
    ("count", "seed", "limit", "what"),
    [(4, 0, 99, "count: got 4; allowed: 1 to 3"), (1, -1, 99, "seed"), (1, 0, 1, "max_total")],
)
def test_lengths_refuse_more_than_the_trace_holds(count: int, seed: int, limit: int, what: str) -> None:
    with pytest.raises(SpecError) as error:
        workload.trace_lengths(trace_of([(1, 2), (3, 4), (5, 6)]), count, seed, limit)
    one_line(error, "made.csv", what)


# The synthetic trace


@needs_original
def test_the_synthetic_trace_is_close_to_the_original() -> None:
    original, synthetic = traces.read_trace(ORIGINAL), workload.synthetic_trace()
    assert len(synthetic.prompt) == len(original.prompt)
    for pick in (lambda t: t.prompt, lambda t: t.output, lambda t: t.prompt + t.output):
        assert ks_2samp(pick(original), pick(synthetic)).statistic <= 0.02


def test_the_synthetic_trace_has_the_published_percentiles() -> None:
    trace = workload.synthetic_trace()
    # Table 2 of the paper, openchat_sharegpt4: median and P90 of prompt (1730, 5696) and of output (415, 834) tokens
    measured = [np.quantile(lengths, q) for lengths in (trace.prompt, trace.output) for q in (0.5, 0.9)]
    assert measured == pytest.approx([1730, 5696, 415, 834], rel=0.04)


def test_the_synthetic_trace_never_changes() -> None:
    trace = workload.synthetic_trace()
    assert (trace.kind, trace.name, trace.sha256) == ("synthetic", "synthetic-sharegpt", GOLDEN_SYNTHETIC)


@given(count=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_synthetic_requests_are_possible_ones(count: int, seed: int) -> None:
    trace = workload.synthetic_trace(count, seed)
    assert trace.prompt.shape == trace.output.shape == (count,)
    assert min(trace.prompt.min(), trace.output.min()) >= 1
    assert (trace.prompt + trace.output).max() <= 8192


def test_a_synthetic_trace_of_nothing_is_refused() -> None:
    with pytest.raises(SpecError) as error:
        workload.synthetic_trace(0)
    one_line(error, "count: got 0; allowed: 1 to")


# Fetching and choosing


class Server(BaseHTTPRequestHandler):
    """Serves TINY, except under the paths that go wrong."""

    def do_GET(self) -> None:
        if self.path == "/missing.csv":
            self.send_error(404)
            return
        body = TINY + b"1,1,1\n" * 1000 if self.path == "/long.csv" else TINY
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:20] if self.path == "/broken.csv" else body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - inherited
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def source_yaml(folder: Path, url: str, data: bytes = TINY) -> Path:
    path = folder / "source.yaml"
    path.write_text(f"url: {url}\nsha256: {hashlib.sha256(data).hexdigest()}\nbytes: {len(data)}\n")
    return path


def test_a_good_trace_is_fetched_once_and_whole(tmp_path: Path, url: str) -> None:
    target = tmp_path / "trace.csv"
    target.write_bytes(b"an earlier, broken one")
    workload.fetch_trace(source_yaml(tmp_path, f"{url}/trace.csv"), target)
    assert target.read_bytes() == TINY
    workload.fetch_trace(source_yaml(tmp_path, "http://127.0.0.1:1/never-asked.csv"), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.yaml", "trace.csv"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("missing.csv", ["404", "synthetic"]),
        ("long.csv", [f"of {len(TINY) + 1} bytes", "allowed"]),
        ("broken.csv", ["got sha256", "of 20 bytes"]),
    ],
)
def test_a_failed_fetch_leaves_nothing(tmp_path: Path, url: str, name: str, parts: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        workload.fetch_trace(source_yaml(tmp_path, f"{url}/{name}"), tmp_path / "trace.csv")
    one_line(error, f"{url}/{name}", *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["source.yaml"]


def test_a_wrong_digest_keeps_what_was_there(tmp_path: Path, url: str) -> None:
    target = tmp_path / "trace.csv"
    target.write_bytes(b"mine")
    with pytest.raises(SpecError) as error:
        workload.fetch_trace(source_yaml(tmp_path, f"{url}/trace.csv", TINY[:-1] + b"\r"), target)
    one_line(error, hashlib.sha256(TINY).hexdigest(), "allowed")
    assert target.read_bytes() == b"mine"


def test_a_refused_connection_and_a_strange_url_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        closed = server.server_port
    for url, part in [(f"http://127.0.0.1:{closed}/t.csv", "refused"), ("http://[bad/t.csv", ""), ("file:///etc/hosts", "url")]:
        with pytest.raises(SpecError) as error:
            workload.fetch_trace(source_yaml(tmp_path, f"'{url}'"), tmp_path / "trace.csv")
        one_line(error, part)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, url: str) -> None:
    (tmp_path / "nowhere").write_text("")
    target = tmp_path / "nowhere" / "trace.csv"
    with pytest.raises(OSError, match="File exists") as error:
        workload.fetch_trace(source_yaml(tmp_path, f"{url}/trace.csv"), target)
    assert error.value.filename == str(target)


def test_the_users_file_comes_first_then_the_fetched_then_the_synthetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "SOURCE", source_yaml(tmp_path, "http://127.0.0.1:1/t.csv"))
    fetched, mine = tmp_path / "fetched.csv", tmp_path / "mine.csv"
    mine.write_text(HEADER + "1,2\n")
    assert workload.choose_trace(None, fetched).kind == "synthetic"
    assert workload.choose_trace("", fetched).kind == "synthetic"
    fetched.write_bytes(TINY)
    assert workload.choose_trace(None, fetched).kind == "fetched"
    assert workload.choose_trace(str(mine), fetched).prompt.tolist() == [1]
    fetched.write_bytes(TINY[:-3])
    with pytest.raises(SpecError) as error:
        workload.choose_trace(None, fetched)
    one_line(error, "fetched.csv: sha256: got", hashlib.sha256(TINY).hexdigest(), "delete it")
    assert workload.choose_trace(str(mine), fetched).kind == "file"


def test_the_command_says_what_it_fetched(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workload, "FETCHED", tmp_path / "trace.csv")
    monkeypatch.setattr(workload, "SOURCE", source_yaml(tmp_path, f"{url}/missing.csv"))
    assert workload.main([]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1
    monkeypatch.setattr(workload, "SOURCE", source_yaml(tmp_path, f"{url}/trace.csv"))
    assert workload.main([]) == 0
    assert capsys.readouterr().out == f"trace.csv: 3 requests, sha256 {hashlib.sha256(TINY).hexdigest()}\n"
    assert workload.main(["--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert workload.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"trace": "trace.csv", "requests": 3, "sha256": hashlib.sha256(TINY).hexdigest()}


def test_the_trace_is_fetched_from_a_fixed_commit_and_not_shipped() -> None:
    source = read_spec(workload.SOURCE, workload.TraceSource)
    assert any(len(part) == 40 and set(part) <= set("0123456789abcdef") for part in source.url.split("/"))
    assert source.url.startswith("https://")
    assert workload.TABLE.stat().st_size < 5000


# Requests


@given(pairs=LENGTHS, seed=st.integers(0, 2**32 - 1), limit=st.integers(64, 30_000), scale=st.integers(1, 32))
def test_requests_combine_arrivals_and_scaled_lengths(pairs: list[tuple[int, int]], seed: int, limit: int, scale: int) -> None:
    trace = trace_of(pairs)
    requests = workload.serving_requests(trace, 2.0, len(pairs), seed, limit, scale)
    assert [request.arrival_s for request in requests] == workload.poisson_arrivals(2.0, len(pairs), seed).tolist()
    assert all(type(value) is int for r in requests for value in (r.prompt_tokens, r.output_tokens, r.seed))
    assert len({request.seed for request in requests}) == len(requests)
    for request, prompt, output in zip(requests, *workload.trace_lengths(trace, len(pairs), seed, limit), strict=True):
        assert request.prompt_tokens + request.output_tokens <= limit // scale
        assert 1 <= request.output_tokens <= math.ceil(output / scale)
        assert math.ceil(prompt / scale) - 2 <= request.prompt_tokens <= math.ceil(prompt / scale)
        assert request.prompt_tokens >= 1


def test_requests_do_not_depend_on_how_many_or_how_fast() -> None:
    trace = workload.synthetic_trace(500)
    few, many = (workload.serving_requests(trace, 1.0, count, 7, 8192) for count in (10, 200))
    assert many[:10] == few
    fast = workload.serving_requests(trace, 4.0, 10, 7, 8192)
    assert [(r.prompt_tokens, r.output_tokens, r.seed) for r in fast] == [
        (r.prompt_tokens, r.output_tokens, r.seed) for r in few
    ]


def test_a_scale_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(SpecError) as error:
        workload.serving_requests(trace_of([(1, 1)]), 1.0, 1, 0, 64, 33)
    one_line(error, "scale: got 33; allowed: 1 to 32")


@given(tokens=st.integers(0, 300), seed=st.integers(0, 2**63 - 1), vocabulary=st.integers(4, 200_000))
def test_prompt_ids_are_seeded_and_within_the_vocabulary(tokens: int, seed: int, vocabulary: int) -> None:
    request = Request(0.0, tokens, 1, seed)
    ids = workload.prompt_ids(request, vocabulary)
    assert len(ids) == tokens
    assert all(type(token) is int and 3 <= token < vocabulary for token in ids)
    assert workload.prompt_ids(request, vocabulary) == ids


def test_prompts_differ_between_requests() -> None:
    requests = workload.serving_requests(trace_of([(64, 1)] * 20), 1.0, 20, 1, 8192)
    assert len({tuple(workload.prompt_ids(request, 32000)) for request in requests}) == 20


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(SpecError) as error:
        workload.prompt_ids(Request(0.0, 4, 1), 3)
    one_line(error, "vocab_size: got 3; allowed: 4")


RECORDED = np.array([0.0, 0.0, 1.0, 1.5, 9.5, 10.0])


def recorded_trace(arrivals: np.ndarray = RECORDED) -> traces.Trace:
    trace = trace_of([(100 + n, 10 + n) for n in range(len(arrivals))])
    return dataclasses.replace(trace, arrivals=arrivals)


@given(count=st.integers(1, 400), seed=st.integers(0, 99), kind=st.sampled_from(["gamma", "trace"]), qps=st.floats(0.01, 100))
def test_the_rate_is_kept_to_the_last_arrival(count: int, seed: int, kind: Any, qps: float) -> None:
    traffic = Traffic(kind, 3.0, again=True)
    arrivals = workload.arrival_times(traffic, recorded_trace(np.arange(50.0)), qps, count, seed)
    assert arrivals.shape == (count,)
    assert (np.diff(arrivals) >= 0).all()
    assert arrivals[-1] == pytest.approx(count / qps)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_cv_asked_for(cv: float) -> None:
    gaps = np.diff(workload.arrival_times(Traffic("gamma", cv), recorded_trace(), 2.0, 100_000, 1))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_in_a_closed_loop_the_users_come_at_once() -> None:
    assert workload.arrival_times(Traffic("closed", 2), recorded_trace(), 5.0, 4, 1).tolist() == [0, 0, math.inf, math.inf]


def test_recorded_gaps_stay_with_their_requests_and_in_their_order() -> None:
    """In blocks of an eighth of the trace; the first gap, which was not recorded, is the mean of the others."""
    recorded = np.cumsum(np.arange(1.0, 81.0)) - 1.0
    requests = workload.serving_requests(recorded_trace(recorded), 1.0, 80, 7, 8192, traffic=Traffic("trace", again=True))
    gaps = np.diff([request.arrival_s for request in requests], prepend=0.0)
    places = np.array([request.prompt_tokens - 100 for request in requests])
    known = np.concatenate([[recorded[-1] / 79], np.diff(recorded)])[places]
    assert gaps == pytest.approx(known * 80 / known.sum())
    assert (np.diff(places.reshape(8, 10)) % 80 == 1).all()


def test_without_times_there_are_no_recorded_arrivals() -> None:
    said = r"TRACE: made\.csv: got no arrival times; allowed: ARRIVALS=poisson, gamma:CV or closed:N"
    for trace in (trace_of([(1, 1)] * 20), recorded_trace(np.zeros(20))):
        with pytest.raises(SpecError, match=said):
            workload.arrival_times(Traffic("trace", again=True), trace, 1.0, 20, 1)


def test_a_trial_drawn_again_differs_from_the_trace_as_another_trace_would() -> None:
    """The mean of 1,000 requests drawn of 25: its spread over seeds is that of means of 25, not of 1,000."""
    trace = trace_of([(n + 1, 1) for n in range(25)])
    means = [workload.trace_lengths(trace, 1000, seed, 8192, Traffic(again=True))[0].mean() for seed in range(400)]
    assert np.mean(means) == pytest.approx(13.0, abs=0.25)
    assert np.std(means) == pytest.approx(trace.prompt.std() * math.sqrt(1 / 25 + 1 / 1000), rel=0.12)


def test_a_trace_that_is_longer_than_asked_for_says_how_much_is_cut(tmp_path: Path) -> None:
    none = tmp_path / "none.csv"
    told = {most: traces.describe_trace(workload.choose_trace(None, none, most)) for most in (None, 8192, 2048)}
    assert told[None] == told[8192]
    trace = workload.synthetic_trace()
    share = np.mean(trace.prompt + trace.output > 2048)
    assert told[2048] == f"{told[None]}; {share:.0%} of them cut to 2,048 tokens"
