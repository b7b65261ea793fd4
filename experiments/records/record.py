"""What an engine is and what it leaves behind: the protocol and the record types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd

RECORD_FORMAT = 1  # raised whenever a column below changes its meaning

REQUEST_COLUMNS = {
    "request": "int64",  # number within the trial, in the order of scheduled arrival
    "phase": "int64",  # which phase of the trial it belongs to
    "budget": "int64",  # tokens, the chunk size in force
    "arrival_s": "float64",  # scheduled arrival, from the start of the trial
    "injected_s": "float64",  # when the engine was given the request
    "prompt_tokens": "int64",
    "output_tokens": "int64",  # asked for
    "generated_tokens": "int64",  # received
    "first_step": "int64",  # the step in which it was first scheduled, -1 if never
    "last_step": "int64",  # the step that gave its last token, -1 if unfinished
    "cached_tokens": "int64",  # prompt tokens found in a prefix cache; must be zero
}
STEP_COLUMNS = {
    "start_s": "float64",  # from the start of the trial
    "seconds": "float64",
    "budget": "int64",  # tokens
    "prefill_tokens": "int64",
    "decode_tokens": "int64",  # = requests that decode in this step
    "prefill_requests": "int64",
    "prefill_pairs": "int64",  # query-key pairs of prefill attention: sum of n*context + n*(n+1)/2
    "decode_context": "int64",  # tokens of context read by the decodes, the new one included
    "waiting": "int64",  # requests injected but not scheduled in this step
    "preempted": "int64",  # requests preempted when this step was scheduled
}
TOKEN_COLUMNS = {"request": "int64", "time_s": "float64"}  # one row per output token, in the order received


@dataclass(frozen=True)
class Request:
    """One request. `arrival_s` counts from the start of its phase, infinity: it comes as soon as another one is served (closed
    loop); `seed` draws its prompt's token ids."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Phase:
    """Requests served under one chunk size (`budget`, tokens per step); the next phase starts when all are done."""

    budget: int
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Record:
    """What a trial leaves: raw facts only. Columns as above; `truncated` if a time limit cut it short."""

    requests: pd.DataFrame
    steps: pd.DataFrame
    tokens: pd.DataFrame
    truncated: bool = False


class Engine(Protocol):
    """Serves phases of requests and records what happened. One model, one process."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Versions, devices and settings as the engine itself reports them."""

    def run(self, phases: Sequence[Phase], time_limit_s: float) -> Record:
        """Serve the phases one after the other. Requests enter at their scheduled arrival (open loop)."""

    def close(self) -> None:
        """Free devices and child processes."""


def frame(rows: Sequence[Sequence[Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Rows -> data frame with exactly these columns and types."""
    return pd.DataFrame(list(rows), columns=list(columns)).astype(dict(columns))


@dataclass
class Recorder:
    """Collects the rows of one trial, step by step."""

    requests: list[list[Any]] = field(default_factory=list)
    steps: list[tuple[Any, ...]] = field(default_factory=list)
    tokens: list[tuple[int, float]] = field(default_factory=list)

    def record(self, truncated: bool) -> Record:
        """The record of everything collected."""
        requests, steps = frame(self.requests, REQUEST_COLUMNS), frame(self.steps, STEP_COLUMNS)
        return Record(requests, steps, frame(self.tokens, TOKEN_COLUMNS), truncated)
