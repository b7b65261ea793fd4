"""A trace: prompt tokens, output tokens and arrivals of requests, out of a file; what cannot be used is left out and told."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.records.errors import SpecError
from experiments.spec.formats import all_failed, find_requests, number_at

MAX_TOKENS = 10_000_000  # of one request; far above any model, far below where float64 would blur the cut
FIXED = 32768  # requests of a trace in which all are alike; as many as the longest trial of make recommend draws
EPOCHS = ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3))  # times since 1970 in ns, us, ms: above this, seconds in the unit
GROUPED = r"[-+]?\d{1,3}(?:([,_' \u00a0\u202f])\d{3})(?:\1\d{3})*(?:\.0*)?"  # digits in threes
Kind = Literal["file", "fetched", "fixed", "synthetic"]
Lengths: TypeAlias = npt.NDArray[np.int64]
Times: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Trace:
    """Request lengths in tokens, shape (requests,) each, and where the file has them the requests' arrivals.

    With arrivals, seconds from the first one's, the requests stand in their order. `sha256` is the file's, or that of the drawn
    numbers.
    """

    name: str
    sha256: str
    prompt: Lengths
    output: Lengths
    kind: Kind
    duration_s: float | None = None  # of the run it was recorded in, where that is known
    arrivals: Times | None = None  # shape (requests,), ascending, the first is 0
    cached: float | None = None  # the share of prompt tokens that prefix caching would find, where the file tells
    notes: tuple[str, ...] = ()  # what else was understood, such as how many requests were left out and why

    @property
    def gap_cv(self) -> float:
        """Coefficient of variation of the gaps between arrivals; NaN without arrivals."""
        gaps = np.diff(self.arrivals) if self.arrivals is not None else np.full(1, math.nan)
        return float(gaps.std() / gaps.mean())


def read_trace(path: Path, max_total: int | None = None, kind: Kind = "file") -> Trace:
    """The trace in a file, or with a path PROMPT/OUTPUT where there is no such file, FIXED requests of these numbers of tokens.

    Requests that cannot be used are left out, and `notes` says which: failed ones, those without a whole number of tokens
    from 1 on both sides, those of more than `max_total` tokens in all. Raises SpecError where they are more than half, and for
    what is no trace: what is wrong, where, and the way on.
    """
    where, most = str(path) if kind == "fetched" else f"TRACE: {path}", max_total or MAX_TOKENS
    try:
        alike = None if path.exists() else re.fullmatch("([0-9]{1,8})/([0-9]{1,8})", str(path))
        prompt, output = map(int, alike.groups()) if alike else (1, 1)
        if not prompt or not output or prompt + output > most:
            came = f"got {prompt:,} prompt and {output:,} output tokens"
            raise SpecError(f"{came}; allowed: 1 or more of each, at most {most:,} together")
        data = b"prompt_len,output_len" + f"\n{prompt},{output}".encode() * FIXED if alike else path.read_bytes()
        return _trace(str(path) if alike else path.name, data, max_total, "fixed" if alike else kind)
    except OSError as error:
        raise SpecError(f"{where}: cannot be read: {error.strerror}; a file with requests is expected") from None
    except RecursionError:
        raise SpecError(f"{where}: nested too deeply; a file with requests is expected") from None
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def describe_trace(trace: Trace) -> str:
    """What was understood of a trace, in one line: requests, percentiles of lengths in tokens, what is known of arrivals (CV:
    the coefficient of variation) and of prefix caching, what was left out."""
    count, seconds = len(trace.prompt), trace.duration_s
    parts = [f"trace {trace.name} ({trace.kind}): {count:,} requests"]
    for name, lengths in (("prompt", trace.prompt), ("output", trace.output)):
        parts.append(f"{name} tokens " + ", ".join(f"P{p} {np.percentile(lengths, p):,.0f}" for p in (50, 90, 99)))
    if trace.arrivals is not None:
        rate = f"{1 / np.diff(trace.arrivals).mean():.3g} requests/s, CV of the gaps {trace.gap_cv:.2f}"
        parts.append(f"arriving over {trace.arrivals[-1]:,.1f} s, {rate}")
    elif seconds:
        parts.append(f"served in {seconds:,.1f} s, {count / seconds:.2f} requests/s")
    else:
        parts.append("no arrival times in it")
    if trace.cached is not None:
        parts.append(f"prefix caching would find {trace.cached:.0%} of the prompt tokens (HIT={trace.cached:.2g})")
    return "; ".join([*parts, *trace.notes])


def _numbers(column: pd.Series[Any]) -> pd.Series[float]:
    """As floats: 374, 374.0 and 1,234 as they are read; NaN for what is no number."""
    text = column.map(str).astype(object)
    numbers = pd.to_numeric(text, errors="coerce").astype(float)
    odd = text[numbers.isna()].str.strip()
    grouped = odd[odd.str.fullmatch(GROUPED).astype(bool)].str.replace(r"[^-\d.]", "", regex=True)
    numbers = numbers.fillna(pd.to_numeric(grouped).astype(float))
    return numbers.where(np.isfinite(numbers))


def _tokens(requests: pd.DataFrame) -> list[pd.Series[float]]:
    """Prompt and output tokens as numbers. Dots part thousands where there are three digits behind each, and not in all."""
    sides = [requests["prompt"], requests["output"]]
    found = [_numbers(side) for side in sides]
    if any((side % 1 > 0).any() for side in found):
        text = pd.concat(sides).map(str).str.strip()
        dotted = text.str.contains(".", regex=False)
        grouped = text[dotted].str.fullmatch(r"\d{1,3}(\.\d{3})+").all() and not text[~dotted].str.contains(r"\d{4}").any()
        if grouped and text[~dotted].str.fullmatch(r"\d{1,3}").any():
            return [_numbers(side.map(str).str.replace(".", "", regex=False)) for side in sides]
    return found


def _arrivals(use: pd.DataFrame, unit: float) -> tuple[Times | None, str]:
    """Seconds from the first start, shape (requests,), in the file's order; or None, and the reason where there is one."""
    if use["start"].isna().all():
        return None, ""
    times = _numbers(use["start"])
    if times.isna().all():
        dates = pd.to_datetime(use["start"].map(str), utc=True, errors="coerce", format="ISO8601")
        times, unit = (dates - dates.min()).dt.total_seconds(), 1.0
    unit = next((seconds for least, seconds in EPOCHS if times.median() > least), unit)
    if (lost := times.isna()).any():
        row, said = use[lost].iloc[0][["row", "start"]]
        unread = f"{lost.sum():,} start times cannot be read, as seconds or ISO 8601 are"
        return None, f"no arrivals: {unread}, first in row {row}: {str(said)[:40]!r}"
    if times.min() == times.max():
        return None, "no arrivals: all start at once"
    return np.asarray((times - times.min()) * unit, np.float64), ""


def _cached(use: pd.DataFrame, prompt: Lengths) -> float | None:
    """The share of prompt tokens in blocks whose hashes, from the first on, came before; nothing is ever evicted."""
    hashes = use["hashes"].tolist()
    if not all(isinstance(ids, list) and ids and all(type(one) is int for one in ids) for ids in hashes):
        return None
    block = 2 ** math.ceil(math.log2(max(tokens / len(ids) for tokens, ids in zip(prompt, hashes, strict=True))))
    seen: set[int] = set()
    found = 0
    for tokens, ids in zip(prompt.tolist(), hashes, strict=True):
        found += min(block * sum(1 for _ in takewhile(seen.__contains__, ids)), tokens)
        seen.update(ids)
    return float(found / prompt.sum())


def _trace(name: str, data: bytes, max_total: int | None, kind: Kind) -> Trace:
    runs = find_requests(data)
    every = pd.concat([run.requests for run in runs], ignore_index=True)
    use, prompt, output, notes = _usable(every, max_total or MAX_TOKENS)
    columns, ended = runs[0].columns, [run for run in runs if not (run.requests["trouble"] == "failed").all()]
    arrivals, reason = _arrivals(use, columns.unit)
    if len(ended) > 1 and arrivals is not None:
        arrivals, reason = None, f"no arrivals: {len(ended)} runs in it, one after the other"
    if arrivals is not None:
        order = np.argsort(arrivals, kind="stable")
        use, prompt, output, arrivals = use.iloc[order], prompt[order], output[order], arrivals[order]
    seconds = sum(number_at(run.node, "duration") for run in ended)
    if kind == "file":
        notes = ["read from " + ", ".join(filter(None, columns[:3])), *filter(None, [reason]), *notes]
    known = seconds if 0 < seconds < math.inf else None
    return Trace(name, sha256(data).hexdigest(), prompt, output, kind, known, arrivals, _cached(use, prompt), tuple(notes))


def _usable(every: pd.DataFrame, limit: int) -> tuple[pd.DataFrame, Lengths, Lengths, list[str]]:
    """Those that can be used, their tokens, and what the others are. Raises SpecError where these are more than half."""
    prompt, output = _tokens(every)
    bad: dict[str, pd.Series[bool]] = {what: every["trouble"] == what for what in every["trouble"].unique() if what}
    bad |= {
        "without a number of tokens": prompt.isna() | output.isna(),
        "of a negative number of tokens": (prompt < 0) | (output < 0),
        "of no whole number of tokens": (prompt % 1 > 0) | (output % 1 > 0),
        "without prompt tokens": prompt == 0,
        "without output tokens": output == 0,
        f"of more than {limit:,} tokens": prompt + output > limit,
    }
    which = np.select([mask.to_numpy(dtype=bool) for mask in bad.values()], range(1, len(bad) + 1), 0)
    told = []
    for number, what in enumerate(bad, 1):
        if len(places := np.flatnonzero(which == number)):
            one = every.iloc[places[0]]
            said = str(one["said"] or f"{one['prompt']} + {one['output']}")[:60]
            told.append(f"{len(places):,} ({100 * len(places) / len(every):.3g} %) {what}, first in row {one['row']}: {said!r}")
    lost = np.count_nonzero(which)
    if (which == 1).all() and next(iter(bad)) == "failed":
        raise all_failed(said)
    if 2 * lost > len(every):
        raise SpecError(f"got {len(every):,} requests, of which {'; '.join(told)}; allowed: at most half that cannot be used")
    lengths = (side[which == 0].to_numpy().astype(np.int64) for side in (prompt, output))
    return every[which == 0], *lengths, ["left out: " + "; ".join(told)] if told else []
