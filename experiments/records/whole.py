"""Is a record one that could have happened? Checked once, where it is read, for every command alike.

What a good machine would have done better is not asked here: that is for gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS, Record

TABLES = {"requests": REQUEST_COLUMNS, "steps": STEP_COLUMNS, "tokens": TOKEN_COLUMNS}
LEAST = {"budget": 1, "prompt_tokens": 1, "output_tokens": 1, "first_step": -1, "last_step": -1}  # of other columns 0
MOST = {"int64": 10**12, "float64": 1e9}
SLACK_S = 1e-6  # a time is a sum of others, rounded
Columns = Mapping[str, npt.NDArray[Any]]
Rules = Iterator[tuple[str, npt.NDArray[np.bool_]]]  # what is wrong, and in which rows


def contradiction(record: Record, phases: Sequence[Mapping[str, Any]]) -> str | None:
    """The first thing in a record that cannot be: what it is, and in which row; None if there is none.

    phases: what trial.json says of them. Checked are columns, types and ranges, the order of rows, and what the tables and the
    phases say of each other.
    """
    tables: dict[str, Columns] = {}
    for name, kinds in TABLES.items():
        table = getattr(record, name)
        if found := _out_of_range(name, table, kinds):
            return found
        tables[name] = {column: table[column].to_numpy() for column in kinds}
    requests, steps, tokens = tables.values()
    for rules in (_order(requests, steps, tokens, len(phases)), _links(requests, steps, tokens), _phases(requests, phases)):
        for what, wrong in rules:
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


def _order(requests: Columns, steps: Columns, tokens: Columns, phases: int) -> Rules:
    first, last = requests["first_step"], requests["last_step"]
    yield "requests: not numbered in their order", requests["request"] != np.arange(len(first))
    yield "requests: phases out of order", np.diff(requests["phase"], prepend=0) < 0
    yield f"requests: a phase beyond the {phases} of trial.json", requests["phase"] >= phases
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
    rows = np.bincount(tokens["request"], minlength=len(first))
    yield "requests: generated_tokens is not the number of its tokens", rows != generated
    yield "requests: tokens, but no step", (generated > 0) & (first < 0)
    yield "requests: finished without a token", (last >= 0) & (generated == 0)
    started = np.flatnonzero(first >= 0)
    early = steps["start_s"][first[started]] < requests["injected_s"][started] - SLACK_S
    yield "requests: scheduled before it was injected", _at(started, early, len(first))
    other = steps["budget"][first[started]] != requests["budget"][started]
    yield "requests: another budget than its first step's", _at(started, other, len(first))
    times, (earliest, latest) = tokens["time_s"], np.zeros((2, len(first)))
    latest[tokens["request"]] = times  # of several the last one stays
    earliest[tokens["request"][::-1]] = times[::-1]
    given = np.flatnonzero(generated > 0)
    end = steps["start_s"][first[given]] + steps["seconds"][first[given]]
    yield "requests: a token before the end of its first step", _at(given, earliest[given] < end - SLACK_S, len(first))
    done = np.flatnonzero(last >= 0)
    end = steps["start_s"][last[done]] + steps["seconds"][last[done]]
    yield "requests: last token not at the end of last_step", _at(done, np.abs(latest[done] - end) > SLACK_S, len(first))


def _at(rows: npt.NDArray[np.int64], wrong: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    found = np.zeros(count, dtype=np.bool_)
    found[rows] = wrong
    return found


def _phases(requests: Columns, phases: Sequence[Mapping[str, Any]]) -> Rules:
    """What trial.json says of the phases and what was asked in them."""
    for column, key in (("budget", "budget"), ("prompt_tokens", "prompt_tokens")):
        said = np.array([phase.get(key, -1) for phase in phases])[requests["phase"]]
        yield f"requests: another {key} than its phase's in trial.json", (said >= 0) & (said != requests[column])


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
