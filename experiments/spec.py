"""What to measure: figure x testbed -> sessions -> trials -> points.

Figures hold the science in the paper's units; testbeds hold the machine and may divide every length by `scale`.
Both are strict: an unknown key, a wrong type or an impossible value is a SpecError of one line.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Hashable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

PACKAGE = Path(__file__).resolve().parent
FIGURES, TESTBEDS, MODELS = PACKAGE / "figures", PACKAGE / "testbeds", PACKAGE / "models"
STRICT = ConfigDict(extra="forbid", strict=True)
REPEAT = "-repeat"  # suffix of the first trial when it is run again at the end of its session


class SpecError(ValueError):
    """Bad input, told in one line: what, where, what came, what is allowed."""


def _chunk_size(value: object) -> int | None:
    if value == "unchunked":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000:
        return value
    raise ValueError("allowed: a number of tokens from 1 to 1,000,000, or unchunked")


ChunkSize = Annotated[int | None, BeforeValidator(_chunk_size)]  # None: unchunked
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Amount = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]


Counts = Annotated[tuple[Count, ...], Field(min_length=1)]
ChunkSizes = Annotated[tuple[ChunkSize, ...], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class PrefillPanel:
    """One model of Figure 9a. Lengths and chunk sizes in tokens."""

    model: Name
    tensor_parallel: Count
    in_paper: bool
    prompt_lengths: Counts
    chunk_sizes: ChunkSizes


@dataclass(frozen=True, config=STRICT)
class PrefillFigure:
    """One request at a time, prompts of L-1 tokens and one output token."""

    figure: Name
    title: str
    source: str
    kind: Literal["prefill"]
    requests_per_point: Count
    max_batch: Count
    max_model_len: Count
    seeds: Counts
    panels: Annotated[tuple[PrefillPanel, ...], Field(min_length=1)]
    replicates: Count | None = None  # None: the testbed's


Figure = PrefillFigure


@dataclass(frozen=True, config=STRICT)
class Requires:
    """What a machine must have; memory and disk in GiB, driver as its major version."""

    cores: Count
    memory_gib: Amount
    disk_gib: Amount
    gpus: int = 0
    gpu_memory_gib: float = 0.0
    driver: int = 0


@dataclass(frozen=True, config=STRICT)
class Estimate:
    """Rough cost of a session, for plans and progress only: seconds to load, per step and per prompt token."""

    load_s: Amount
    step_s: Amount
    token_s: Amount


@dataclass(frozen=True, config=STRICT)
class Testbed:
    """A machine and how the figures are mapped to it."""

    testbed: Name
    title: str
    platform: Literal["cpu", "cuda"]
    scale: Count
    replicates: Count
    models: dict[str, str]
    dtype: Literal["float16", "bfloat16", "float32"]
    weights: Annotated[str, Field(min_length=1)]  # dummy, or a folder of real weights
    estimate: Estimate
    requires: Requires
    session_memory_gib: Amount
    tensor_parallel: Count | None = None  # None: the figure's
    threads: Count | None = None
    kv_cache_gib: Amount | None = None
    gpu_memory_utilization: Amount | None = None
    max_prompt_length: Count | None = None


@dataclass(frozen=True, config=STRICT)
class EngineSettings:
    """Everything an engine needs to start. Lengths in tokens, memory in GiB."""

    platform: str
    model: str
    tensor_parallel: int
    dtype: str
    weights: str
    max_budget: int
    max_batch: int
    max_model_len: int
    threads: int | None
    kv_cache_gib: float | None
    gpu_memory_utilization: float | None


@dataclass(frozen=True)
class Point:
    """One setting that is measured, in the paper's units; `prompt_tokens` and `budget` are what is run, in tokens."""

    prompt_length: int
    chunk_size: int | None
    prompt_tokens: int
    budget: int


@dataclass(frozen=True)
class Trial:
    """What a session runs and stores at a time: points in the order they are run."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Session:
    """One fresh engine process with one model loaded, for one model and seed."""

    name: str
    figure: str
    kind: str
    testbed: str
    model: str
    in_paper: bool
    scale: int
    seed: int
    engine: EngineSettings
    trials: tuple[Trial, ...] = field(repr=False)
    estimate_s: float = 0.0


T = TypeVar("T")


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises SpecError for a missing, unreadable, empty or malformed file."""
    try:
        data = yaml.load(path.read_bytes().decode("utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise SpecError(f"{path}: no such file; there are: {known}") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not text in UTF-8 (byte {error.start}); a YAML mapping is expected") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).split("\n")[0] or type(error).__name__
        raise SpecError(f"{path}: {f'line {mark.line + 1}: ' if mark else ''}not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        came = "an empty file" if data is None else f"a {type(data).__name__}"
        raise SpecError(f"{path}: {came} where a mapping of keys to values is expected")
    return data


def read_spec(path: Path, shape: type[T]) -> T:
    """Read a YAML file into a frozen dataclass. Raises SpecError naming file, key, value and what is allowed."""
    data = read_yaml(path)
    try:  # through JSON, in which pydantic's strict mode still takes a mapping for a dataclass and a list for a tuple
        return TypeAdapter(shape).validate_json(json.dumps(data, default=str))
    except ValueError as error:
        if not isinstance(error, ValidationError):  # a YAML alias to itself
            raise SpecError(f"{path}: not a plain mapping: {error}") from None
        raise SpecError(f"{path}: {_first_problem(error, shape)}") from None


def _first_problem(error: ValidationError, shape: type) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "(top level)"
    if first["type"] == "unexpected_keyword_argument":
        known = ", ".join(field.name for field in dataclasses.fields(shape)) if len(first["loc"]) == 1 else ""
        return f"{key}: unknown key{f'; allowed: {known}' if known else ''}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; it must be given"
    came = repr(first["input"])
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{key}: got {came if len(came) <= 80 else came[:77] + '...'}; allowed: {message.removeprefix('allowed: ')}"


def load_figure(name: str) -> Figure:
    """The figure of that name, or of that YAML path. Raises SpecError."""
    path = Path(name) if name.endswith(".yaml") else FIGURES / f"{name}.yaml"
    return read_spec(path, PrefillFigure)


def load_testbed(name: str) -> Testbed:
    """The testbed of that name, or of that YAML path. Raises SpecError."""
    path = Path(name) if name.endswith(".yaml") else TESTBEDS / f"{name}.yaml"
    return read_spec(path, Testbed)


def load_model(name: str) -> dict[str, Any]:
    """The Hugging Face config of a model shape, without our `_source` note. Raises SpecError for an unknown model."""
    path = MODELS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in MODELS.glob("*.json")))
        raise SpecError(f"models: unknown model {name!r}; there are: {known}")
    config = json.loads(path.read_text())
    return {key: value for key, value in config.items() if key != "_source"}


def _scaled(value: int, testbed: Testbed, what: str) -> int:
    if value % testbed.scale or value < testbed.scale:
        raise SpecError(f"{what}: got {value}, which the scale of testbed {testbed.testbed} ({testbed.scale}) does not divide")
    return value // testbed.scale


def _points(panel: PrefillPanel, testbed: Testbed, figure: Figure) -> list[Point]:
    where = f"{figure.figure}: {panel.model}"
    lengths = [n for n in panel.prompt_lengths if n <= (testbed.max_prompt_length or n)]
    if not lengths:
        raise SpecError(
            f"{where}: no prompt length is within max_prompt_length {testbed.max_prompt_length} of {testbed.testbed}"
        )
    if min(lengths) < 2 * testbed.scale or max(lengths) > figure.max_model_len:
        raise SpecError(
            f"{where}.prompt_lengths: got {lengths}; allowed: {2 * testbed.scale} to max_model_len ({figure.max_model_len})"
        )
    unchunked = max(lengths)
    points = []
    for length in lengths:
        for chunk_size in panel.chunk_sizes:
            budget = _scaled(chunk_size or unchunked, testbed, f"{where}.chunk_sizes")
            points.append(Point(length, chunk_size, _scaled(length, testbed, f"{where}.prompt_lengths") - 1, budget))
    smallest = min(point.budget for point in points)
    if smallest < figure.max_batch // testbed.scale:
        raise SpecError(
            f"{where}.chunk_sizes: got {smallest * testbed.scale}; allowed: at least max_batch ({figure.max_batch}), "
            "or decodes alone could fill a step and starve the rest"
        )
    return points


def _passes(points: Sequence[Point], figure: Figure, label: str) -> tuple[Trial, ...]:
    """Randomised passes over all points; the first is repeated at the end, so that an order effect shows."""
    order = random.Random(label)
    trials = [Trial(f"pass-{n}", tuple(order.sample(points, len(points)))) for n in range(figure.requests_per_point)]
    return (*trials, Trial(trials[0].name + REPEAT, trials[0].points))


def _estimate(trials: Sequence[Trial], testbed: Testbed) -> float:
    """Seconds of a session, from the testbed's rough costs: load + steps + prompt tokens."""
    cost = testbed.estimate
    seconds = cost.load_s
    for point in (point for trial in trials for point in trial.points):
        seconds += -(-point.prompt_tokens // point.budget) * cost.step_s + point.prompt_tokens * cost.token_s
    return seconds


def expand(figure: Figure, testbed: Testbed, replicates: int | None = None) -> list[Session]:
    """All sessions of a figure on a testbed, longest first. Raises SpecError for what cannot be run."""
    count = replicates if replicates is not None else figure.replicates or testbed.replicates
    if not 1 <= count <= len(figure.seeds):
        raise SpecError(f"replicates: got {count}; allowed: 1 to {len(figure.seeds)}, the seeds of {figure.figure}")
    if len(set(figure.seeds)) != len(figure.seeds):
        raise SpecError(f"{figure.figure}.seeds: got a seed twice; allowed: different seeds, or replicates are not independent")
    sessions = []
    for panel in figure.panels:
        if panel.model not in testbed.models:
            continue
        shape = load_model(testbed.models[panel.model])
        tensor_parallel = testbed.tensor_parallel or panel.tensor_parallel
        if shape["num_key_value_heads"] % tensor_parallel:
            raise SpecError(f"{testbed.testbed}: tensor_parallel {tensor_parallel} does not divide {panel.model}'s KV heads")
        points = _points(panel, testbed, figure)
        settings = EngineSettings(
            platform=testbed.platform,
            model=testbed.models[panel.model],
            tensor_parallel=tensor_parallel,
            dtype=testbed.dtype,
            weights=testbed.weights,
            max_budget=max(point.budget for point in points),
            max_batch=max(1, figure.max_batch // testbed.scale),
            max_model_len=max(point.prompt_tokens for point in points) + 1,
            threads=testbed.threads,
            kv_cache_gib=testbed.kv_cache_gib,
            gpu_memory_utilization=testbed.gpu_memory_utilization,
        )
        for seed in figure.seeds[:count]:
            name = f"{panel.model}-seed{seed}"
            trials = _passes(points, figure, f"{figure.figure}/{name}")
            sessions.append(
                Session(
                    name=name,
                    figure=figure.figure,
                    kind=figure.kind,
                    testbed=testbed.testbed,
                    model=panel.model,
                    in_paper=panel.in_paper,
                    scale=testbed.scale,
                    seed=seed,
                    engine=settings,
                    trials=trials,
                    estimate_s=_estimate(trials, testbed),
                )
            )
    if not sessions:
        raise SpecError(
            f"{testbed.testbed}.models: none of {figure.figure}'s models ({', '.join(p.model for p in figure.panels)})"
        )
    return sorted(sessions, key=lambda session: -session.estimate_s)
