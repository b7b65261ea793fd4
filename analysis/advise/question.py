"""What a user asks: latency targets, traffic, and a load, or else the highest. Made of make's variables, here alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from analysis.advise.capacity import DELAY_LIMIT_S, TARGETS, WORDS, Latency
from experiments.records.errors import SpecError
from experiments.records.metrics import LATENCIES, Served
from experiments.spec.expand import Traffic
from experiments.spec.traces import Trace
from experiments.spec.workload import check_gaps

VARIABLES = (*(name.upper() for name in TARGETS), "GOODPUT", "QPS", "CONCURRENCY", "ARRIVALS", "HIT")
SHOWN = ("tbt_p99", "ttft_p50", "delay_p50")  # of every load, whatever is asked
MOST = 1e6  # seconds, requests per second: what a figure may say, too
MOST_CV, MOST_USERS, MOST_HIT = 100.0, 5_000, 0.99  # users: the synthetic trace has requests for the longest trial of them
LEAST_QPS = 1e-3  # a request every 17 minutes, as the lowest that is looked at; far below, clocks are too coarse
LONG_S, LONG_E2E_S = 10.0, 1e3  # a target beyond it may have been meant in milliseconds


def kind_of(name: str) -> str:
    """tbt of tbt_p99."""
    return name.partition("_p")[0]


@dataclass(frozen=True)
class Question:
    """Targets (s); `goodput`: the share of requests that keep all of them, each for itself, in the place of percentiles.

    `rate`: a load that is given, requests/s; that of a closed loop always is; else the highest is looked for. `traffic`: None
    for what the trace tells. `hit`: share of each prompt that prefix caching finds. `delay_s`: the most median scheduling
    delay, beyond which a load counts as more than is carried.
    """

    targets: Latency = field(default_factory=Latency)
    goodput: float | None = None
    rate: float | None = None
    traffic: Traffic | None = None
    hit: float = 0.0
    delay_s: float = DELAY_LIMIT_S

    @property
    def users(self) -> int:
        """Of a closed loop, else 0."""
        return self.traffic.users if self.traffic else 0

    @property
    def load(self) -> str:
        """The load that is given, in words; empty where the highest is looked for."""
        return f"with {self.users} users" if self.users else f"at {self.rate:g} requests/s" if self.rate else ""

    @property
    def limits(self) -> Latency:
        """What must be kept; in a closed loop the load never exceeds what is carried."""
        asked = self.targets if self.goodput is None else {"goodput": 1.0}
        return Latency(asked if self.users else {**asked, "delay_p50": self.delay_s})

    @property
    def goal(self) -> str:
        """What is made best: the rate or, where that is given, the latency of which no target speaks."""
        if not self.load:
            return "rate"
        kinds = {kind_of(name) for name in self.targets}
        first, later = "ttft" in kinds, bool(kinds & {"tbt", "tpot"})
        return "e2e_p50" if first == later else "ttft_p50" if later else "tbt_p99"

    def latency(self, seen: Served) -> Latency:
        """What is asked about, and SHOWN; infinite where there is no request."""
        names = [name for name in dict.fromkeys((*SHOWN, self.goal, *self.targets)) if name in WORDS]
        if not len(seen.requests["ttft"]):
            return Latency(dict.fromkeys([*names, "goodput"], math.inf))
        found = Latency({name: seen.percentile(name) for name in names})
        if self.goodput is not None:
            ratios = [np.nan_to_num(seen.requests[kind_of(name)]) / target for name, target in self.targets.items()]
            found["goodput"] = float(np.quantile(np.max(ratios, axis=0), self.goodput, method="inverted_cdf"))
        return found

    def check(self, trace: Trace, scale: int) -> None:
        """Raises SpecError if it speaks of the time between tokens where there is none, lengths divided by `scale`."""
        if any(kind_of(name) in ("tbt", "tpot") for name in (*self.targets, self.goal)):
            check_gaps(trace, scale)

    def __str__(self) -> str:
        if self.goodput is None:
            return describe(self.limits) or "no target"
        each = describe(Latency({kind_of(name): target for name, target in self.targets.items()}))
        delay = "" if self.users else f"; {describe(Latency(delay_p50=self.delay_s))}"
        return f"{self.goodput:.4g} of the requests with {each}{delay}"


def describe(latency: Latency) -> str:
    """Latencies in words, those that are finite."""
    words = WORDS | LATENCIES
    parts = ((name, f"{value:.3g}{' times its targets' if name == 'goodput' else ' s'}") for name, value in latency.items())
    return ", ".join(f"{words[name]} {told}" for name, told in parts if latency[name] < math.inf)


def asked(words: Sequence[str]) -> Question:
    """The question in words like TBT_P99=0.1, those of VARIABLES; an empty value is not given. Raises SpecError."""
    given: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in VARIABLES or not equals or name in given:
            came = "it twice" if name in given else "that"
            raise SpecError(f"{word!r}: got {came}; allowed: NAME=value, {', '.join(VARIABLES)}")
        given[name] = text.strip()
    given = {name: text for name, text in given.items() if text}
    targets = Latency({name: _seconds(name.upper(), given[name.upper()]) for name in TARGETS if name.upper() in given})
    share = "a share of the requests, such as 0.95: "
    goodput = _number("GOODPUT", given["GOODPUT"], 1.0, share) if "GOODPUT" in given else None
    kinds = [kind_of(name) for name in targets]
    if goodput is not None and (not kinds or "tbt" in kinds or len({*kinds}) < len(kinds)):
        came = ", ".join(name.upper() for name in targets) or "no target"
        raise SpecError(f"GOODPUT: got {came} with it; allowed: one target each of TTFT, TPOT, E2E, of which a request has one")
    traffic, rate = _traffic(given), _number("QPS", given["QPS"], least=LEAST_QPS) if "QPS" in given else None
    if rate and traffic and traffic.users:
        came = f"{given['QPS']} and {traffic.users} users"
        raise SpecError(f"QPS: got {came}; allowed: one of them, as users who ask again when served make their own load")
    hit = _number("HIT", given["HIT"], MOST_HIT, "a share of the prompt tokens, such as 0.4: ") if "HIT" in given else 0.0
    return Question(targets, goodput, rate, traffic, hit)


def _traffic(given: Mapping[str, str]) -> Traffic | None:
    """Of ARRIVALS=poisson, trace, gamma:CV, closed:N, or CONCURRENCY=N, which is the last."""
    arrivals, users = given.get("ARRIVALS", ""), given.get("CONCURRENCY", "")
    if arrivals and users and arrivals != f"closed:{users}":
        same = f"ARRIVALS=closed:{users} is the same"
        raise SpecError(f"CONCURRENCY: got {users} and ARRIVALS={arrivals}; allowed: one of them, {same}")
    kind, _, number = (f"closed:{users}" if users else arrivals).partition(":")
    if kind == "closed":
        if number.isdecimal() and 1 <= int(number) <= MOST_USERS:
            return Traffic("closed", float(number))
        came = f"CONCURRENCY: got {users!r}; allowed:" if users else f"ARRIVALS: got {arrivals!r}; allowed: closed:N,"
        raise SpecError(f"{came} a whole number of users from 1 to {MOST_USERS:,}")
    if kind == "gamma":
        return Traffic("gamma", _number("ARRIVALS", number, MOST_CV, "the CV of the gaps, as gamma:2: ", came=arrivals))
    if arrivals and arrivals not in ("poisson", "trace"):
        raise SpecError(f"ARRIVALS: got {arrivals!r}; allowed: poisson, trace, gamma:CV, closed:N")
    return Traffic("trace" if arrivals == "trace" else "poisson") if arrivals else None


def _number(name: str, text: str, most: float = MOST, what: str = "", least: float = 0.0, came: str = "") -> float:
    with suppress(ValueError):
        if least < float(text) <= most:
            return float(text)
    raise SpecError(f"{name}: got {(came or text)!r}; allowed: {what}a number above {least:g}, at most {most:g}")


def _seconds(name: str, text: str) -> float:
    """A target: 0.3, 0.3s or 300ms."""
    unit = re.search("m?s$", text)
    value = _number(name, text[: unit.start()] if unit else text, what="seconds, or milliseconds as 300ms: ", came=text)
    if not unit and value > (LONG_E2E_S if name.startswith("E2E") else LONG_S):
        raise SpecError(f"{name}: got {text}, which is in seconds: were milliseconds meant? allowed: {text}ms, or {text}s")
    return value / 1e3 if unit and unit[0] == "ms" else value
