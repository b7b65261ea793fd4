"""The JSON documents of a run: read within bounds, of the form that we write. A bag may come from anywhere.

Every name in them fits NAME, so it may become a path; every text is printable. Keys that are not named here are kept.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from experiments.records.errors import SpecError, first_problem
from experiments.records.record import RECORD_FORMAT

MOST_BYTES = 2**20  # of a document; the longest that a run of 20 seeds writes is a tenth of it
MOST_DEPTH, MOST_TEXT, MOST_INT = 12, 2000, 2**53


def printable(data: Any) -> Any:
    """The same with every text free of control characters and cut at MOST_TEXT: it may be meant for the terminal."""
    if isinstance(data, str):
        text = data[:MOST_TEXT]
        return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if isinstance(data, dict):
        return {printable(key): printable(value) for key, value in data.items()}
    return [printable(value) for value in data] if isinstance(data, list) else data


def _moment(text: str) -> str:
    if not datetime.fromisoformat(text).tzinfo:
        raise ValueError("a moment in ISO 8601, with its time zone")
    return text


def _of_this_version(number: object) -> object:
    if number != RECORD_FORMAT:
        raise ValueError(f"record format {RECORD_FORMAT}, which this version reads")
    return number


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,120}$")]
Moment = Annotated[str, AfterValidator(_moment)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Amount = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Platform = Literal["cpu", "cuda", "simulated"]


class Phase(TypedDict):
    """What a phase of a trial is; of a point, where it lies in the figure."""

    role: Literal["warm-up", "probe", "point", "saturation"]
    budget: NotRequired[Count]
    chunk_size: NotRequired[Count | None]
    prompt_length: NotRequired[Count]
    prompt_tokens: NotRequired[Count]
    qps: NotRequired[Amount]
    rate: NotRequired[Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]]
    requests: NotRequired[Count]


class Settings(TypedDict):
    """EngineSettings as data."""

    platform: Platform
    model: Name
    tensor_parallel: Count
    dtype: Name
    weights: str
    max_budget: Count
    max_batch: Count
    max_model_len: Count
    threads: Count | None
    kv_cache_gib: Amount | None
    gpu_memory_utilization: Amount | None
    calibration: NotRequired[Name | None]


def _known(settings: Settings) -> Settings:
    if unknown := sorted(set(settings) - set(Settings.__annotations__)):
        raise ValueError(f"{', '.join(Settings.__annotations__)}; not {unknown[0]}")
    return settings


class HeldOut(TypedDict):  # of steps that a calibration was not fitted to
    held_out: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


def _told(engine: Engine) -> Engine:
    if ("calibration" in engine) != ("calibration_error" in engine):
        raise ValueError("a calibration together with its error")
    return engine


class Engine(TypedDict):  # what it says of itself
    engine: Name
    simulated: NotRequired[bool]
    load_s: NotRequired[Amount]
    kv_blocks: NotRequired[Count]
    calibration: NotRequired[Name]
    calibration_error: NotRequired[HeldOut]


class Machine(TypedDict):  # what a trial ran on
    type: str
    gpus: NotRequired[list[str]]


class Trace(TypedDict):  # where the lengths of requests are from
    name: str
    kind: str


class Facts(TypedDict):
    """trial.json."""

    format: Annotated[Any, AfterValidator(_of_this_version)]
    figure: Name
    kind: Literal["prefill", "serving"]
    testbed: Name
    scale: Count
    model: Name
    in_paper: bool
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    session: Name
    trial: Name
    process: Name
    phases: Annotated[list[Phase], Field(min_length=1)]
    trace: Trace | None
    settings: Annotated[Settings, AfterValidator(_known)]
    engine: Annotated[Engine, AfterValidator(_told)]
    machine: Machine
    node: NotRequired[str]
    started: Moment
    ended: Moment
    truncated: bool


# What a measured phase must say.
OF_POINT = {
    "prefill": {"chunk_size", "budget", "prompt_length", "prompt_tokens"},
    "serving": {"chunk_size", "budget", "qps", "rate", "requests"},
}


def _measured(facts: Facts) -> Facts:
    kind, points = facts["kind"], [phase for phase in facts["phases"] if phase["role"] in ("point", "saturation")]
    if not points or (kind == "serving" and len(points) > 1):
        raise ValueError(f"{len(points)} measured phases; {'one' if kind == 'serving' else 'at least one'} in a {kind} trial")
    if absent := sorted({key for point in points for key in OF_POINT[kind] - set(point)}):
        raise ValueError(f"each measured phase with its {', '.join(absent)}")
    return facts


class Commit(TypedDict):  # of the tree that made a run
    commit: str | None
    modified: bool | None


class Requires(TypedDict):  # of a machine, as far as claims rest on it
    gpus: Annotated[int, Field(ge=0, le=1000)]
    gpu_name: str


class Plan(TypedDict):
    """plan.json."""

    figure: Name
    testbed: Name
    testbed_title: str
    platform: Platform
    scale: Count
    identity: dict[Name, str]
    commit: Commit
    sessions: dict[Name, list[Name]]
    not_run: list[str]
    may_preempt: NotRequired[bool]
    requires: NotRequired[Requires]


class Slot(TypedDict):  # when a session was to run, seconds from the start of the driver
    session: Name
    node: str
    start_s: Amount
    end_s: Amount


class Schedule(TypedDict):  # what one start of the driver planned
    planned: Moment
    slots: Annotated[list[Slot], Field(max_length=10_000)]


FACTS = TypeAdapter(Annotated[Facts, AfterValidator(_measured)])
PLAN, SCHEDULES = TypeAdapter(Plan), TypeAdapter(list[Schedule])


def read_document(path: Path, shape: TypeAdapter[Any], where: str = "") -> Any:
    """A JSON document of a run. where: how errors call it. Raises SpecError: document, key, what came, what is allowed."""
    where = where or str(path)
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        data = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique)
        _check_bounds(data)
        return shape.validate_python(printable(data), strict=True, extra="allow")
    except ValidationError as error:
        raise SpecError(f"{where}: {first_problem(error)}") from None
    except OSError as error:
        raise SpecError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{where}: refused: {printable(str(error))[:200]}; allowed: JSON as we write it") from None


def _check_bounds(value: Any, depth: int = 0) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"nested deeper than {MOST_DEPTH}")
    if isinstance(value, str) and len(value) > MOST_TEXT:
        raise ValueError(f"a text of {len(value)} characters; at most {MOST_TEXT}")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for inner in value if isinstance(value, list) else ():
        _check_bounds(inner, depth + 1)


def _whole(text: str) -> int:
    if abs(number := int(text)) > MOST_INT:
        raise ValueError(f"number {text[:20]}: at most {MOST_INT}")
    return number


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"number {text[:20]}: finite ones only")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found
