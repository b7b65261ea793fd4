"""What is asked of an engine in Figure 9b: Poisson arrivals, request lengths from a trace, prompt token ids.

Arrivals and lengths follow the original experiment to the last digit: microsoft/sarathi-serve, branch osdi-sarathi-serve,
sarathi/benchmark/request_generator (synthetic_, poisson_request_interval_ and trace_request_length_generator.py).
"""

from __future__ import annotations

import http.client
import math
import random
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field
from pydantic.dataclasses import dataclass as spec_dataclass

from experiments.records.errors import SpecError
from experiments.records.provenance import PACKAGE
from experiments.records.record import Request
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.spec.expand import AS_PUBLISHED, Traffic
from experiments.spec.spec import STRICT, read_spec
from experiments.spec.traces import MAX_TOKENS, Lengths, Trace, read_trace

TRACES = PACKAGE.parent / "artifacts" / "traces"
SOURCE, TABLE = TRACES / "sharegpt.yaml", TRACES / "synthetic_sharegpt.csv"
FETCHED = TRACES / "sharegpt.fetched.csv"  # never in git
MAX_REQUESTS, MAX_SEED, TRACE_MAX = 1_000_000, 2**32 - 1, 8192  # the original's trace was filtered to 8192 tokens
FIRST_ID = 3  # ids below are padding, start and end in the Llama vocabularies


@spec_dataclass(frozen=True, config=STRICT)
class TraceSource:
    """Where a trace can be fetched and how to know it."""

    url: Annotated[str, Field(pattern=r"^https?://[!-~]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=1, le=1 << 30)]


def _check(where: str, **ranges: tuple[float, float, float]) -> None:
    for what, (value, low, high) in ranges.items():
        if not low <= value <= high:  # also refuses NaN
            raise SpecError(f"{where}: {what}: got {value}; allowed: {low:,} to {high:,}")


def poisson_arrivals(qps: float, count: int, seed: int) -> npt.NDArray[np.float64]:
    """Arrival times in seconds, shape (count,). The gaps are min(-ln(1-u)/qps, 3/qps); a gap precedes the first request.

    Source: poisson_request_interval_generator.py, where u is Python's `random` that nothing else draws from. Raises SpecError.
    """
    _check("poisson_arrivals", qps=(qps, 1e-6, 1e6), count=(count, 1, MAX_REQUESTS), seed=(seed, 0, MAX_SEED))
    uniform = random.Random(seed).random
    longest = 1.0 / qps * 3.0  # rounded as the original rounds it: 3/qps differs in the last digit
    return np.cumsum([min(-math.log(1.0 - uniform()) / qps, longest) for _ in range(count)])  # adds one after the other


def arrival_times(traffic: Traffic, trace: Trace, qps: float, count: int, seed: int) -> npt.NDArray[np.float64]:
    """Arrival times in seconds, shape (count,); infinity: as soon as another request is served.

    Recorded and gamma gaps are scaled, all by one factor, so that their mean is the rate's. Raises SpecError.
    """
    if traffic.arrivals == "poisson":
        return poisson_arrivals(qps, count, seed)
    _check("arrivals", qps=(qps, 1e-6, 1e6), count=(count, 1, MAX_REQUESTS))
    if traffic.users:
        return np.where(np.arange(count) < traffic.users, 0.0, np.inf)
    if traffic.arrivals == "gamma":
        gaps = np.random.default_rng(seed).gamma(traffic.number**-2, size=count)
    elif trace.arrivals is None or not trace.arrivals[-1]:
        raise SpecError(f"TRACE: {trace.name}: got no arrival times; allowed: ARRIVALS=poisson, gamma:CV or closed:N")
    else:
        gaps = np.diff(trace.arrivals, prepend=-trace.arrivals[-1] / max(1, len(trace.arrivals) - 1))
        gaps = gaps[drawn(traffic, len(gaps), count, seed)]
    return np.asarray(np.cumsum(gaps) * (count / qps / max(float(gaps.sum()), 1e-300)))


def drawn(traffic: Traffic, requests: int, count: int, seed: int) -> Lengths:
    """Which of so many requests of a trace a trial serves, in its order, shape (count,).

    As the original has it, pandas' sample(frac=1, random_state=seed), which is this permutation. `again`, in two stages: a
    trace of the same length is drawn with replacement, then the trial from that, so that trials differ as traces do that might
    have been recorded instead (bootstrap; Efron, 1979). Recorded arrivals stay with their requests, and these in blocks of an
    eighth of the trace, so that bursts stay whole (circular blocks; Politis and Romano, 1992).
    """
    if not traffic.again:
        return np.random.RandomState(seed).permutation(requests)[:count]
    rng, block = np.random.default_rng(seed), min(count, -(-requests // 8)) if traffic.arrivals == "trace" else 1
    starts = rng.choice(rng.integers(requests, size=-(-requests // block)), -(-count // block))
    return np.asarray(((starts[:, None] + np.arange(block)) % requests).ravel()[:count])


def trace_lengths(
    trace: Trace, count: int, seed: int, max_total: int, traffic: Traffic = AS_PUBLISHED
) -> tuple[Lengths, Lengths]:
    """The (prompt, output) lengths in tokens of the requests that are drawn of the trace, shape (count,) each.

    Source: trace_request_length_generator.py. Where prompt + output exceeds `max_total` both lose their share of the excess,
    rounded up, but keep one token. Raises SpecError for a count above the trace's length if it is not drawn again: the original
    dies there, as a trace is never used twice.
    """
    most = MAX_REQUESTS if traffic.again else len(trace.prompt)
    _check(trace.name, count=(count, 1, most), seed=(seed, 0, MAX_SEED), max_total=(max_total, 2, MAX_TOKENS))
    rows = drawn(traffic, len(trace.prompt), count, seed)
    both = np.stack([trace.prompt, trace.output])
    total = both.sum(axis=0)
    share = np.ceil(np.maximum(total - max_total, 0) * (both / total)).astype(np.int64)
    prompt, output = np.maximum(both - share, 1)[:, rows]
    return prompt, output


def check_requests(trace: Trace, least: int, reason: str) -> None:
    """Raises SpecError if a trace has fewer requests than will be drawn from it: none is ever used twice."""
    if (count := len(trace.prompt)) < least:
        raise SpecError(f"TRACE: {trace.name}: got {count} request{'s'[: count != 1]}; allowed: at least {least:,}, {reason}")


def check_gaps(trace: Trace, scale: int) -> None:
    """Raises SpecError if no request gives a second token, lengths divided by `scale`: there is no time between tokens then."""
    if (longest := int(trace.output.max())) <= scale:
        came = f"at most {longest} output token{'s'[: longest > 1]} of a request, {-(-longest // scale)} on this testbed"
        raise SpecError(f"TRACE: {trace.name}: got {came}; allowed: some with two there, or there is no time between tokens")


def synthetic_trace(count: int = 30731, seed: int = 2024) -> Trace:
    """A stand-in for the original's trace: inverse-CDF sampling from its percentiles. Raises SpecError.

    Every row of the table is an equal share of the requests: the range of their prompts, then the deciles of their outputs.
    Kolmogorov-Smirnov distance from the original: about 0.01 for each of prompt, output and total.
    """
    _check("synthetic_trace", count=(count, 1, MAX_REQUESTS), seed=(seed, 0, MAX_SEED))
    table = np.loadtxt(TABLE, delimiter=",")
    share, prompt_u, output_u = np.random.Generator(np.random.PCG64(seed)).random((3, count))
    start = np.floor(share * len(table)) * table.shape[1]  # of the drawn row, in the table laid end to end
    positions = np.stack([start + prompt_u, start + 2 + output_u * (table.shape[1] - 3)])
    prompt, output = np.rint(np.interp(positions, np.arange(table.size), table.ravel())).astype(np.int64)
    output = np.minimum(output, TRACE_MAX - prompt)
    digest = sha256(np.stack([prompt, output]).tobytes()).hexdigest()
    return Trace("synthetic-sharegpt", digest, prompt, output, "synthetic")


def choose_trace(trace_file: str | None, fetched: Path = FETCHED, max_total: int | None = None) -> Trace:
    """The user's file if one is given, else the fetched trace if there, else a synthetic.

    max_total: what the model allows for prompt + output; longer requests in the user's file are left out, others are cut, see
    trace_lengths, and the share is noted. Raises SpecError.
    """
    if trace_file:
        return read_trace(Path(trace_file), max_total)
    if not fetched.is_file():
        return _noting_cuts(synthetic_trace(), max_total)
    digest, expected = sha256(fetched.read_bytes()).hexdigest(), read_spec(SOURCE, TraceSource).sha256
    if digest != expected:
        raise SpecError(f"{fetched}: sha256: got {digest}; allowed: {expected}; delete it, then fetch the trace again")
    return _noting_cuts(read_trace(fetched, kind="fetched"), max_total)


def _noting_cuts(trace: Trace, max_total: int | None) -> Trace:
    if not max_total or not (share := float(np.mean(trace.prompt + trace.output > max_total))):
        return trace
    return replace(trace, notes=(*trace.notes, f"{share:.0%} of them cut to {max_total:,} tokens"))


def fetch_trace(spec_yaml: Path = SOURCE, target: Path = FETCHED) -> None:
    """Download the trace to `target`, whole and with the right digest or not at all. Raises SpecError."""
    source = read_spec(spec_yaml, TraceSource)
    if target.is_file() and sha256(target.read_bytes()).hexdigest() == source.sha256:
        return
    try:
        with urllib.request.urlopen(source.url, timeout=60) as answer:
            data = answer.read(source.bytes + 1)  # no more than shows that it is too long
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.request.HTTPError):
            error.close()
        reason = " ".join(str(error).split())
        raise SpecError(f"{source.url}: not fetched: {reason}; without it the trace is synthetic") from None
    digest = sha256(data).hexdigest()
    if digest != source.sha256:
        raise SpecError(f"{source.url}: got sha256 {digest} of {len(data)} bytes; allowed: {source.sha256} of {source.bytes}")
    write_whole(target, data)


def serving_requests(
    trace: Trace, qps: float, count: int, seed: int, max_total: int, scale: int = 1, traffic: Traffic = AS_PUBLISHED
) -> tuple[Request, ...]:
    """The requests of one trial, of Figure 9b if nothing else is said; the same for every chunk size.

    A testbed's `scale` divides lengths, rounding up; prompt + output stays within max_total // scale. Raises SpecError.
    """
    prompt, output = trace_lengths(trace, count, seed, max_total, traffic)
    arrivals = arrival_times(traffic, trace, qps, count, seed)
    _check("serving_requests", scale=(scale, 1, max_total // 2))
    limit = max_total // scale
    output = np.minimum(-(-output // scale), limit - 1)
    prompt = np.minimum(-(-prompt // scale), limit - output)  # two roundings up can exceed the limit by one or two
    seeds = np.random.SeedSequence(seed).generate_state(count, np.uint64) >> np.uint64(1)  # 63 bits: fits an int64 column
    return tuple(map(Request, *(column.tolist() for column in (arrivals, prompt, output, seeds))))


def prompt_ids(request: Request, vocab_size: int) -> list[int]:
    """Random token ids in [3, vocab_size), one per prompt token, drawn from the request's seed. Raises SpecError."""
    _check("prompt_ids", vocab_size=(vocab_size, FIRST_ID + 1, 2**31))
    generator = np.random.Generator(np.random.PCG64(request.seed))
    ids: list[int] = generator.integers(FIRST_ID, vocab_size, request.prompt_tokens).tolist()
    return ids


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the original's trace, which is no part of the project; 0 when it is there, 2 with one line of reason when not."""
    parse(arguments("experiments.spec.workload", main.__doc__), argv)
    fetch_trace(SOURCE, FETCHED)
    trace = choose_trace(None, FETCHED)
    console.print(f"{FETCHED.name}: {len(trace.prompt):,} requests, sha256 {trace.sha256}")
    result(trace=FETCHED.name, requests=len(trace.prompt), sha256=trace.sha256)
    return 0


if __name__ == "__main__":
    sys.exit(main())
