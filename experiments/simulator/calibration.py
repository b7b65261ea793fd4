"""A calibration: the coefficients of the cost model for one model on one machine, and what follows from the shape of a model.

Read from YAML, strictly; docs/simulator.md says what fixed each coefficient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from experiments.records.provenance import PACKAGE
from experiments.spec.spec import STRICT, Count, Name, load_model, path_of, read_spec

CALIBRATIONS = PACKAGE.parent / "artifacts" / "calibration"
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "fp8": 2}  # of a number; weights of layers take 1 in fp8
Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Total = Annotated[int, Field(ge=0)]
Texts = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Profile:
    """Seconds at some counts; in between they are interpolated, beyond the last they are unknown."""

    at: Annotated[tuple[int, ...], Field(min_length=1)]
    seconds: Annotated[tuple[NotNegative, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Profile:
        if len(self.at) != len(self.seconds) or any(a >= b for a, b in pairwise(self.at)) or self.at[0] not in (0, 1):
            raise ValueError("allowed: as many seconds as counts, counts rising from 0 or 1")
        return self

    def table(self) -> Floats:
        """Seconds of every count from 0 to the last, shape (last + 1,)."""
        return np.asarray(np.interp(np.arange(self.at[-1] + 1), self.at, self.seconds), dtype=np.float64)


@dataclass(frozen=True, config=STRICT)
class Attention:
    """Attention over the whole model, per GPU.

    Prefill: FLOPs of a query-key pair over a rate. `masked_share` is the part of the pairs above the causal diagonal that the
    kernel computes all the same: 0 for one that skips them, 1 for one that computes the whole square. Decode: bytes of KV cache
    per token of context over a bandwidth.
    """

    flop_per_pair: Positive
    flop_per_s: Positive
    masked_share: Share
    kv_bytes_per_token: Positive
    kv_bytes_per_s: Positive


@dataclass(frozen=True, config=STRICT)
class Jitter:
    """A step's time over its predicted time: lognormal with mean 1 and this sigma of the log.

    Steps that only decode have `decode_sigma` where that is known: they are short, and the same disturbance is more of them.
    On top of it a share of the steps (`tail_share`), which no prediction includes, takes longer by a factor of 1 + x, x
    exponential with mean `tail_excess`.
    """

    sigma: NotNegative
    tail_share: Share = 0.0
    tail_excess: NotNegative = 0.0
    decode_sigma: NotNegative | None = None


@dataclass(frozen=True, config=STRICT)
class Loop:
    """What a real engine's loop adds to its steps, seconds each.

    `between_s` passes from the end of a step to the start of the next, `request_s` more for each request that enters there;
    `wake_s` is what the first step after a pause takes longer, the caches being cold; `front_s` what a request needs before the
    engine has it, beside the steps: a server's HTTP and tokenization.
    """

    between_s: NotNegative = 0.0
    request_s: NotNegative = 0.0
    wake_s: NotNegative = 0.0
    front_s: NotNegative = 0.0


@dataclass(frozen=True, config=STRICT)
class ValidRange:
    """Largest step that the calibration covers; counts as in experiments.records.record.STEP_COLUMNS."""

    tokens: Count
    decode_tokens: Total
    prefill_pairs: Total
    decode_context: Total


@dataclass(frozen=True, config=STRICT)
class FitError:
    """Relative errors of step times: of the data fitted (mean and worst), and of data held out, with what they were.

    Of whole requests, where that is published: of prefill time relative to unchunked, P50 TTFT and P99 TBT, means.
    """

    residual_mean: NotNegative
    residual_worst: NotNegative
    held_out: NotNegative
    held_out_on: str
    prefill: NotNegative | None = None
    ttft_p50: NotNegative | None = None
    tbt_p99: NotNegative | None = None
    end_to_end: NotNegative | None = None  # the worst known of whole requests, where the machine itself was not measured
    small_steps: NotNegative | None = None  # of steps below 512 tokens, where these are known to be off by more


@dataclass(frozen=True, config=STRICT)
class Piece:
    """Steps of one size, first to last number of tokens, that a calibration was fitted to.

    `dropped`: how many of them were left out of the fit, as their time was too far from that of the others. `held_out`: mean
    relative error of those that were held out. `known_to`: standard error of their median time, relative.
    """

    tokens: tuple[Count, Count]
    only_decodes: bool
    steps: Count
    dropped: Total
    held_out: NotNegative | None
    known_to: NotNegative


@dataclass(frozen=True, config=STRICT)
class Calibration:
    """Everything fitted for one model on one machine, and where it is from. `fixed_by`: per parameter, what fixed it.

    `made_on`: what must be the same where it is used, such as the machine's type; empty for published data.
    """

    calibration: Name
    title: str
    models: Texts
    tensor_parallel: Count
    sources: Texts
    overhead_s: NotNegative
    linear: Profile
    decode: Profile
    attention: Attention
    jitter: Jitter
    valid: ValidRange
    error: FitError
    block_size: Count
    fixed_by: dict[str, str]
    loop: Loop = Loop()
    made_on: dict[str, str] = dataclasses.field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()  # of steps of a machine at hand, by size
    device_memory_bytes: Positive | None = None  # that CUDA reports of a card
    kv_blocks: Count | None = None  # of the engine of the machine at hand; of these two none: the testbed states a KV cache
    host: Profile | None = None  # seconds that a step takes at least, by requests that decode; None: the host hides nothing
    gpu: str = ""  # of which kernel tables speak, by their name for it; empty: another machine


def load_calibration(name: str) -> Calibration:
    """The calibration of that name, or of that YAML path. Raises SpecError for a missing, malformed or incomplete file."""
    return read_spec(path_of(name, CALIBRATIONS), Calibration)


def at_speed(calibration: Calibration, speed: float) -> Calibration:
    """The same machine at another speed, 1 as calibrated: every time of a step and between steps is divided by it."""

    def slowed(profile: Profile) -> Profile:
        return Profile(profile.at, tuple(seconds / speed for seconds in profile.seconds))

    rates, loop = calibration.attention, calibration.loop
    return dataclasses.replace(
        calibration,
        overhead_s=calibration.overhead_s / speed,
        linear=slowed(calibration.linear),
        decode=slowed(calibration.decode),
        host=slowed(calibration.host) if calibration.host else None,
        attention=dataclasses.replace(rates, flop_per_s=rates.flop_per_s * speed, kv_bytes_per_s=rates.kv_bytes_per_s * speed),
        loop=Loop(*(seconds / speed for seconds in dataclasses.astuple(loop))),
    )


def kv_bytes_per_token(shape: Mapping[str, Any], tensor_parallel: int, dtype: str) -> float:
    """Bytes of keys and values per token and GPU: 2 x head dimension x KV heads x layers x bytes per number."""
    heads = max(1.0, shape["num_key_value_heads"] / tensor_parallel)  # with more GPUs than heads each holds one
    return float(2 * shape["head_dim"] * heads * shape["num_hidden_layers"] * DTYPE_BYTES[dtype])


def attention_of(
    model: str, tensor_parallel: int, dtype: str, flop_per_s: float, masked_share: float, kv_bytes_per_s: float
) -> Attention:
    """Attention of a model shape at these rates: per query-key pair 2 FLOPs for the score and 2 for the value, per dimension,
    head and layer."""
    shape = load_model(model)
    flop = 4.0 * shape["head_dim"] * shape["num_attention_heads"] / tensor_parallel * shape["num_hidden_layers"]
    return Attention(flop, flop_per_s, masked_share, kv_bytes_per_token(shape, tensor_parallel, dtype), kv_bytes_per_s)


def mlp_of(shape: Mapping[str, Any]) -> tuple[int, int, int]:
    """Experts of a layer, how many of them a token goes through, and their width; a dense layer is a single one."""
    if (experts := shape.get("num_local_experts") or shape.get("num_experts") or 1) == 1:
        return 1, 1, shape["intermediate_size"]
    return experts, shape["num_experts_per_tok"], shape.get("moe_intermediate_size", shape["intermediate_size"])


def layer_numbers(shape: Mapping[str, Any], experts: int) -> float:
    """Weights of all layers with so many of their experts: projections of queries, keys, values, output, and MLP."""
    hidden, head = shape["hidden_size"], shape["head_dim"]
    attention = hidden * head * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"])
    return float(shape["num_hidden_layers"] * (attention + experts * 3 * hidden * mlp_of(shape)[2]))


def linear_flop_per_token(shape: Mapping[str, Any]) -> float:
    """FLOPs of all layers' matrix products per token, 2 per weight."""
    return 2.0 * layer_numbers(shape, mlp_of(shape)[1])


def weight_bytes(shape: Mapping[str, Any], tensor_parallel: int, dtype: str) -> float:
    """Bytes of weights per GPU: the layers' matrices, all experts; input embedding and output head, one if they are tied."""
    layers, tables = layer_numbers(shape, mlp_of(shape)[0]), 1 if shape.get("tie_word_embeddings") else 2
    ends, size = tables * shape["vocab_size"] * shape["hidden_size"], DTYPE_BYTES[dtype]
    return float(layers * (1 if dtype == "fp8" else size) + ends * size) / tensor_parallel
