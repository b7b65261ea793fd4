"""Request lengths, and arrivals where they are known, out of the files that people have."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from experiments.records.errors import SpecError

COLUMNS = ("num_prefill_tokens", "num_decode_tokens")
MAX_TOKENS = 10_000_000  # of one request; far above any model, far below where float64 would blur the cut
Kind = Literal["file", "fetched", "synthetic"]
Lengths: TypeAlias = npt.NDArray[np.int64]


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
    arrivals: npt.NDArray[np.float64] | None = None  # shape (requests,), ascending, the first is 0
    cached: float | None = None  # the share of prompt tokens that prefix caching would find, where the file tells
    notes: tuple[str, ...] = ()  # what else was understood, such as how many requests were left out and why


def load_trace(path: Path, max_total: int | None = None, kind: Kind = "file") -> Trace:
    """Read a CSV with the columns num_prefill_tokens and num_decode_tokens; others are ignored.

    Raises SpecError naming file, row (the header is row 1), column and value for whatever is not a whole number of tokens from
    1 to MAX_TOKENS, and for a row whose prompt + output exceeds `max_total` where that is given.
    """
    try:
        data = path.read_bytes()
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows = [(f"{path}: row {reader.line_num}", fields) for fields in reader if fields]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not text in UTF-8 (byte {error.start})"
        raise SpecError(f"{path}: cannot be read: {reason}; a CSV file is expected") from None
    except csv.Error as error:
        raise SpecError(f"{path}: row {reader.line_num}: not valid CSV: {error}") from None
    if len(rows) < 2:
        raise SpecError(f"{path}: got {'a header without rows' if rows else 'an empty file'}; allowed: at least one request")
    header = [name.strip() for name in rows[0][1]]
    for column in COLUMNS:
        if header.count(column) != 1:
            raise SpecError(f"{rows[0][0]}: got {','.join(header)[:60]!r}; allowed: a header with one column {column}")
    pairs = [_lengths(where, header, fields, max_total or MAX_TOKENS) for where, fields in rows[1:]]
    return _trace(path, data, pairs, kind)


def load_bench_result(path: Path, max_total: int | None = None) -> Trace:
    """Request lengths out of a result file that `vllm bench serve --save-result --save-detailed` wrote; failed requests are
    left out. Raises SpecError naming the file, the key and what is wrong."""
    try:
        data = path.read_bytes()
        found = json.loads(data)
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else "not valid JSON"
        raise SpecError(f"{path}: {reason}; a result file of vllm bench serve is expected") from None
    for key in ("input_lens", "output_lens"):
        values = found.get(key) if isinstance(found, dict) else None
        if not isinstance(values, list) or not all(type(n) is int and 0 <= n <= MAX_TOKENS for n in values):
            came = "nothing" if values is None else repr(values)[:60]
            raise SpecError(f"{path}: {key}: got {came}; allowed: a list of tokens, as vllm bench serve --save-detailed writes")
    inputs, outputs = found["input_lens"], found["output_lens"]
    pairs = [list(pair) for pair in zip(inputs, outputs, strict=False) if min(pair) > 0]
    if len(inputs) != len(outputs) or not pairs:
        came = f"{len(inputs)} and {len(outputs)} lengths, {len(pairs)} requests that gave tokens"
        raise SpecError(f"{path}: input_lens, output_lens: got {came}; allowed: as many of each, at least one request")
    if max_total and (longest := max(map(sum, pairs))) > max_total:
        raise SpecError(f"{path}: input_lens + output_lens: got {longest} tokens; allowed: at most {max_total:,}")
    duration = found.get("duration")
    seconds = float(duration) if isinstance(duration, int | float) and 0 < duration < math.inf else None
    return _trace(path, data, pairs, "file", seconds)


def _trace(path: Path, data: bytes, pairs: list[list[int]], kind: Kind, seconds: float | None = None) -> Trace:
    prompt, output = np.array(pairs, dtype=np.int64).T
    return Trace(path.name, sha256(data).hexdigest(), prompt, output, kind, seconds)


def describe_trace(trace: Trace) -> str:
    """What was understood of a trace, in one line: requests, percentiles of lengths in tokens, duration where it is known."""
    count = len(trace.prompt)
    parts = [f"trace {trace.name} ({trace.kind}): {count:,} requests"]
    for name, lengths in (("prompt", trace.prompt), ("output", trace.output)):
        parts.append(f"{name} tokens " + ", ".join(f"P{p} {np.percentile(lengths, p):,.0f}" for p in (50, 90, 99)))
    seconds = trace.duration_s
    parts.append(f"served in {seconds:,.1f} s, {count / seconds:.2f} requests/s" if seconds else "no arrival times in it")
    return "; ".join([*parts, *trace.notes])


def _lengths(where: str, header: list[str], fields: list[str], limit: int) -> list[int]:
    if len(fields) != len(header):
        raise SpecError(f"{where}: got {len(fields)} fields; allowed: {len(header)}, as in the header")
    texts = [fields[header.index(column)].strip() for column in COLUMNS]
    for column, text in zip(COLUMNS, texts, strict=True):
        if not re.fullmatch("[1-9][0-9]{0,7}", text):
            raise SpecError(f"{where}: {column}: got {text[:60]!r}; allowed: a whole number from 1 to {MAX_TOKENS:,}")
    if sum(pair := [int(text) for text in texts]) > limit:
        raise SpecError(f"{where}: {' + '.join(COLUMNS)}: got {' + '.join(texts)} tokens; allowed: at most {limit:,}")
    return pair
