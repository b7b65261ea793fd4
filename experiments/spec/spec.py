"""What to measure and where: figures and testbeds, read from YAML into frozen dataclasses.

Figures hold the science in the paper's units; testbeds hold the machine and may divide every length by `scale`.
Both are strict: an unknown key, a wrong type or an impossible value is a SpecError of one line.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from experiments.records.errors import SpecError, first_problem

FIGURES, TESTBEDS, MODELS = (Path(__file__).resolve().parent / name for name in ("figures", "testbeds", "models"))
STRICT = ConfigDict(extra="forbid", strict=True)
T = TypeVar("T")


def _chunk_size(value: object) -> int | None:
    if value == "unchunked":
        return None
    if type(value) is int and 1 <= value <= 1_000_000:
        return value
    raise ValueError("allowed: a number of tokens from 1 to 1,000,000, or unchunked")


def name_of(value: object) -> str:
    """What a chunk size, a length, a QPS or a panel is called in the names of sessions and trials."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(getattr(value, "model", "unchunked" if value is None else value))


def slug(name: str) -> str:
    """A name, a path too, as part of a file's name."""
    return re.sub("[^A-Za-z0-9.-]+", "-", name).strip("-")


def _each_once(values: tuple[T, ...]) -> tuple[T, ...]:
    """Sessions, trials and points go by these names: what is called the same would be measured once and counted twice."""
    names = [name_of(value) for value in values]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"allowed: each once; {twice[0]} is there twice")
    return values


ChunkSize = Annotated[int | None, BeforeValidator(_chunk_size)]  # None: unchunked
EachOnce = AfterValidator(_each_once)
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Amount = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
Counts = Annotated[tuple[Count, ...], Field(min_length=1), EachOnce]
ChunkSizes = Annotated[tuple[ChunkSize, ...], Field(min_length=1), EachOnce]
Fractions = Annotated[tuple[Annotated[float, Field(gt=0, le=2)], ...], Field(min_length=1)]


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
    panels: Annotated[tuple[PrefillPanel, ...], Field(min_length=1), EachOnce]
    replicates: Count | None = None  # None: the testbed's


@dataclass(frozen=True, config=STRICT)
class ServingPanel:
    """One model of Figure 9b. Chunk sizes in tokens, QPS in requests per second."""

    model: Name
    tensor_parallel: Count
    in_paper: bool
    chunk_sizes: ChunkSizes
    qps: Annotated[tuple[Amount, ...], Field(min_length=1), EachOnce]


@dataclass(frozen=True, config=STRICT)
class ServingFigure:
    """Requests of a trace arriving as a Poisson process, whatever the engine is doing (open loop)."""

    figure: Name
    title: str
    source: str
    kind: Literal["serving"]
    requests: Count
    max_batch: Count
    max_model_len: Count
    time_limit_s: Amount
    seeds: Counts
    panels: Annotated[tuple[ServingPanel, ...], Field(min_length=1), EachOnce]
    replicates: Count | None = None


Panel = PrefillPanel | ServingPanel
Figure = PrefillFigure | ServingFigure
KINDS: dict[str, type[PrefillFigure] | type[ServingFigure]] = {"prefill": PrefillFigure, "serving": ServingFigure}


@dataclass(frozen=True, config=STRICT)
class Requires:
    """What a machine must have; memory and disk in GiB, driver as its major version."""

    cores: Count
    memory_gib: Amount
    disk_gib: Amount
    gpus: int = 0
    gpu_memory_gib: float = 0.0
    gpu_name: str = ""  # part of the name by which nvidia-smi lists them; claims are made of a machine, not of a testbed's name
    driver: int = 0


@dataclass(frozen=True, config=STRICT)
class Estimate:
    """Rough cost of a session, for plans and progress only: seconds to load, per step and per prompt token."""

    load_s: Amount
    step_s: Amount
    token_s: Amount


@dataclass(frozen=True, config=STRICT)
class Serving:
    """How Figure 9b is mapped to a machine that is not the paper's.

    A model's QPS, from low to high, become these fractions of the saturation throughput measured there; a trial's arrivals
    last about `trial_seconds`.
    """

    load_fractions: dict[str, Fractions]
    trial_seconds: Amount
    time_limit_s: Amount


@dataclass(frozen=True, config=STRICT)
class Testbed:
    """A machine and how the figures are mapped to it."""

    testbed: Name
    title: str
    platform: Literal["cpu", "cuda", "simulated"]
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
    serving: Serving | None = None  # None: the paper's QPS and number of requests
    calibrations: dict[str, str] | None = None  # model -> calibration that describes this machine, for the simulator
    may_preempt: bool = False  # whether preemptions for want of KV blocks are expected here, and declared by this
    switch_chunk_size: bool = True  # False: Figure 9b takes a fresh engine for each chunk size
    nvlink: bool = True  # whether the GPUs of a session must be joined by it


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
    calibration: str | None = None


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, variable: str = "") -> dict[str, Any]:
    """Read a YAML mapping. Raises SpecError for a missing, unreadable, empty or malformed file. variable: that names it."""
    try:
        data = yaml.load(path.read_bytes().decode("utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        where = f"{variable}: {path}" if variable else path
        raise SpecError(f"{where}: no such file; there are: {_names(path.parent, '*.yaml')}") from None
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


def _names(folder: Path, pattern: str) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob(pattern))) or "none"


def read_spec(path: Path, shape: type[T], data: dict[str, Any] | None = None) -> T:
    """A YAML file, or what was read of it, as a frozen dataclass. Raises SpecError: file, key, value, what is allowed."""
    data = read_yaml(path) if data is None else data
    try:  # through JSON, in which pydantic's strict mode still takes a mapping for a dataclass and a list for a tuple
        return TypeAdapter(shape).validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise SpecError(f"{path}: {first_problem(error, inspect.signature(shape).parameters)}") from None
    except ValueError as error:  # a YAML alias to itself
        raise SpecError(f"{path}: not a plain mapping: {error}") from None


def path_of(name: str, folder: Path) -> Path:
    """Where the YAML file of that name lies; a name that ends in .yaml is a path itself."""
    return Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"


def load_figure(name: str) -> Figure:
    """The figure of that name, or of that YAML path. Raises SpecError."""
    data = read_yaml(path := path_of(name, FIGURES), "FIGURE")
    if (kind := data.get("kind", "prefill")) not in [*KINDS]:
        raise SpecError(f"{path}: kind: got {kind!r}; allowed: {', '.join(KINDS)}")
    return read_spec(path, KINDS[kind], data)


def load_testbed(name: str) -> Testbed:
    """The testbed of that name, or of that YAML path. Raises SpecError."""
    return read_spec(path := path_of(name, TESTBEDS), Testbed, read_yaml(path, "TESTBED"))


FILLED = ("num_key_value_heads", "head_dim")  # null stands for their default
NEEDED = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
NEEDED += ["vocab_size", "max_position_embeddings"]


def model_path(name: str) -> Path:
    """Where the shape of a model lies: one of ours by name, or the path of a config.json."""
    return Path(name) if name.endswith(".json") else MODELS / f"{name}.json"


def load_model(name: str) -> dict[str, Any]:
    """The Hugging Face config of a model shape, one of ours by name or the path of a config.json, without our `_source` note.

    What many leave out is filled in as transformers does: heads of keys and values, and their size. Raises SpecError for an
    unknown model, and for a file that is no such config.
    """
    path = model_path(name)
    if not path.is_file():
        raise SpecError(f"models: unknown model {name!r}; there are: {_names(MODELS, '*.json')}")
    try:
        config = json.loads(path.read_text())
        found = {key: value for key, value in config.items() if key != "_source" and (value is not None or key not in FILLED)}
    except (OSError, ValueError, AttributeError) as error:
        allowed = "a JSON object as Hugging Face has it"
        raise SpecError(f"{path}: not the config.json of a model: {error}; allowed: {allowed}") from None
    experts = (found.get("num_local_experts") or found.get("num_experts") or 1) != 1
    for key in (*NEEDED, *(key for key in FILLED if key in found), *["num_experts_per_tok"] * experts):
        if type(value := found.get(key)) is not int or value < 1:
            came = "none" if value is None else repr(value)[:60]
            raise SpecError(f"{path}: {key}: got {came}; allowed: a whole number, as in the config.json of a text model")
    heads = found["num_attention_heads"]
    return {"num_key_value_heads": heads, "head_dim": found["hidden_size"] // heads} | found
