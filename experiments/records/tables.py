"""The tables of a trial: read within bounds, as a bag may come from anywhere, and checked whether they could have happened.

What a good machine would have done better is not asked here: that is for gates.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.records.documents import printable
from experiments.records.errors import SpecError
from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS, Record

TABLES = {"requests": REQUEST_COLUMNS, "steps": STEP_COLUMNS, "tokens": TOKEN_COLUMNS}
# Of a table. A simulated trial at the paper's scale has 70,000 steps and half a million tokens; it then takes 100 MB to judge.
MOST_ROWS = {"requests.csv": 200_000, "steps.parquet": 2_000_000, "tokens.parquet": 5_000_000}
ROW_BYTES = 160  # of requests.csv; numbers as we write them take 120
LEAST = {"budget": 1, "prompt_tokens": 1, "output_tokens": 1, "first_step": -1, "last_step": -1}  # of other columns 0
MOST = {"int64": 10**12, "float64": 1e9}
SLACK_S = 1e-6  # a time is a sum of others, rounded
Columns = Mapping[str, npt.NDArray[Any]]
Rules = Iterator[tuple[str, npt.NDArray[np.bool_]]]  # what is wrong, and in which rows


def bag_and_trial(path: Path) -> Path:
    """A trial's directory from its bag on: where an archive was unpacked says nothing."""
    return Path(*path.parts[-5:])


def read_table(path: Path) -> pd.DataFrame:
    """requests.csv, steps.parquet or tokens.parquet of a trial. Raises SpecError, with bag and trial."""
    read, where = _read_csv if path.suffix == ".csv" else _read_parquet, bag_and_trial(path.parent)
    try:
        return read(path, MOST_ROWS[path.name])
    except (OSError, ValueError, OverflowError, Warning, pa.ArrowException) as error:
        reason = printable(str(error).split("\n")[0])[:200]
        raise SpecError(f"{where}: {path.name}: cannot be read: {reason}; allowed: as we write it") from None


def rows_of(path: Path) -> int:
    """Rows of a Parquet file as its metadata says; 0 for what is none, which is refused when it is read."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError, pa.ArrowException):
        return 0


def _read_csv(path: Path, most: int) -> pd.DataFrame:
    with path.open("rb") as file:
        data = file.read(most * ROW_BYTES + 1)
    lines, commas = data.count(b"\n"), len(REQUEST_COLUMNS) - 1
    if len(data) > most * ROW_BYTES or lines > most + 1:
        raise ValueError(f"more than {most} rows of {ROW_BYTES} bytes")
    if data.count(b",") != commas * lines or not data.startswith(",".join(REQUEST_COLUMNS).encode() + b"\n"):
        raise ValueError(f"not a table of the columns {', '.join(REQUEST_COLUMNS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a float in a column of whole numbers is cut with a warning only
        return pd.read_csv(io.BytesIO(data), dtype=REQUEST_COLUMNS)


def _read_parquet(path: Path, most: int) -> pd.DataFrame:
    """Its metadata is read first: a few bytes can stand for billions of rows, and a column could hold anything."""
    columns = TABLES[path.stem]
    with pq.ParquetFile(path) as file:
        found = file.metadata
        kinds = [(field.name, str(field.type).replace("double", "float64")) for field in file.schema_arrow]
        if found.num_rows > most or kinds != list(columns.items()):
            raise ValueError(f"{found.num_rows} rows of {kinds}; allowed: {most} of {columns}")
        chunks = [found.row_group(g).column(c) for g in range(found.num_row_groups) for c in range(len(columns))]
        size, packed = sum(chunk.total_uncompressed_size for chunk in chunks), {chunk.compression for chunk in chunks}
        if size > 16 * len(columns) * most or packed - {"SNAPPY"}:
            raise ValueError(f"{size} bytes packed with {', '.join(sorted(packed))}; allowed: SNAPPY, 16 bytes a value")
        # Starting threads takes longer than reading a trial's table; split_blocks: the columns are not copied.
        table: pd.DataFrame = file.read(use_threads=False).to_pandas(use_threads=False, split_blocks=True, ignore_metadata=True)
        return table


def contradiction(record: Record, phases: Sequence[Mapping[str, Any]]) -> str | None:
    """The first thing in a record that cannot be, and in which row; None if there is none. phases: those of trial.json."""
    tables: dict[str, Columns] = {}
    for name, kinds in TABLES.items():
        table = getattr(record, name)
        if found := _out_of_range(name, table, kinds):
            return found
        tables[name] = {column: table[column].to_numpy() for column in kinds}
    requests, steps, tokens = tables.values()
    for what, wrong in chain(_order(requests, steps, tokens, phases), _links(requests, steps, tokens)):
        if wrong.any():
            return f"{what} (row {int(np.argmax(wrong)) + 1})"
    return _sums(requests, steps, tokens, phases, record.truncated)


def _out_of_range(name: str, table: pd.DataFrame, kinds: Mapping[str, str]) -> str | None:
    came = {column: str(kind) for column, kind in table.dtypes.items()}
    if list(came.items()) != list(kinds.items()):
        return f"{name}: columns: got {str(came)[:200]}; allowed: {dict(kinds)}"
    for column, kind in kinds.items() if len(table) else ():
        values, least, most = table[column].to_numpy(), LEAST.get(column, 0), MOST[kind]
        low, high = values.min(), values.max()
        if not (low >= least and high <= most):  # NaN is neither
            return f"{name}: {column}: got {low:g} to {high:g}; allowed: {least} to {most:g}"
    return None


def _order(requests: Columns, steps: Columns, tokens: Columns, phases: Sequence[Mapping[str, Any]]) -> Rules:
    """What each table says of itself, and of what trial.json says was asked."""
    first, last = requests["first_step"], requests["last_step"]
    yield "requests: not numbered in their order", requests["request"] != np.arange(len(first))
    yield "requests: phases out of order", np.diff(requests["phase"], prepend=0) < 0
    yield f"requests: a phase beyond the {len(phases)} of trial.json", requests["phase"] >= len(phases)
    for name in ("budget", "prompt_tokens"):
        said = np.array([phase.get(name, -1) for phase in phases])[requests["phase"]]
        yield f"requests: another {name} than its phase's in trial.json", (said >= 0) & (said != requests[name])
    yield "requests: arrivals out of order", np.diff(requests["arrival_s"], prepend=0.0) < -SLACK_S
    yield "requests: injected before its arrival", requests["injected_s"] < requests["arrival_s"] - SLACK_S
    yield "requests: more tokens than asked for", requests["generated_tokens"] > requests["output_tokens"]
    yield f"requests: a step beyond the {len(steps['start_s'])} there are", np.maximum(first, last) >= len(steps["start_s"])
    yield "requests: finished before it was scheduled", (last >= 0) & ((first < 0) | (first > last))
    yield "steps: starts out of order", np.diff(steps["start_s"], prepend=0.0) < 0
    yield f"tokens: of a request beyond the {len(first)} there are", tokens["request"] >= len(first)
    yield "tokens: times out of order", np.diff(tokens["time_s"], prepend=0.0) < 0


def _links(requests: Columns, steps: Columns, tokens: Columns) -> Rules:
    """What the three tables say of each other; rows are those of requests."""
    first, last, generated = requests["first_step"], requests["last_step"], requests["generated_tokens"]
    starts = np.append(steps["start_s"], np.nan)  # step -1 is none, and no comparison with NaN is true
    ends, times = starts + np.append(steps["seconds"], np.nan), tokens["time_s"]
    earliest, latest = np.full((2, len(first)), np.nan)
    latest[tokens["request"]] = times  # of several the last one stays
    earliest[tokens["request"][::-1]] = times[::-1]
    rows = np.bincount(tokens["request"], minlength=len(first))
    yield "requests: generated_tokens is not the number of its tokens", rows != generated
    yield "requests: tokens, but no step", (generated > 0) & (first < 0)
    yield "requests: finished without a token", (last >= 0) & (generated == 0)
    yield "requests: scheduled before it was injected", starts[first] < requests["injected_s"] - SLACK_S
    other = np.append(steps["budget"], 0)[first] != requests["budget"]
    yield "requests: another budget than its first step's", (first >= 0) & other
    yield "requests: a token before the end of its first step", earliest < ends[first] - SLACK_S
    yield "requests: last token not at the end of last_step", np.abs(latest - ends[last]) > SLACK_S


def _sums(requests: Columns, steps: Columns, tokens: Columns, phases: Sequence[Mapping[str, Any]], cut: bool) -> str | None:
    wanted = np.array([phase.get("requests", 1) for phase in phases])
    came = np.bincount(requests["phase"], minlength=len(phases))
    if (came > wanted).any() or (not cut and (came != wanted).any()):
        return f"requests: got {came.tolist()[:50]} in the phases; trial.json says {wanted.tolist()[:50]}"
    if cut or steps["preempted"].any() or requests["cached_tokens"].any() or (requests["last_step"] < 0).any():
        return None  # what was computed twice, or not at all, cannot be counted
    decoded = len(tokens["time_s"]) - len(requests["request"])  # the first token of each comes with the end of its prompt
    for column, count in (("prefill_tokens", requests["prompt_tokens"].sum()), ("decode_tokens", decoded)):
        if (got := steps[column].sum()) != count:
            return f"steps: {got} {column} in all; the requests say {count}"
    return None
