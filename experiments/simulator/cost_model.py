"""Seconds of one step from its composition. Coefficients come from a calibration file; what it does not cover is refused.

    seconds = the longer of device and host(requests that decode)
    device  = overhead + linear(tokens) + FLOPs of prefill attention / rate
              + decode(requests that decode) + KV bytes they read / bandwidth

`linear`, `decode` and `host` are piecewise linear and read off a profile: GPU kernels are not smooth, 1,024 tokens can cost
more than twice 512. The sum is the usual form of this field (Vidur, MLSys 2024, section 4.2). `host` is what the host needs to
launch a step; it is hidden where the device takes longer: 3 decodes beside a chunk cost 0.4 ms, 4 alone 49 to 68 (Table 2 and
Figure 2 of the paper's data). Each calibration states its own error.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.records.errors import SpecError
from experiments.records.record import STEP_COLUMNS
from experiments.simulator.calibration import Calibration, Floats, Jitter, Profile
from experiments.simulator.compiled import compiled

PAUSE_S = 0.005  # without work for longer, and the next step finds the caches cold
BATCH = list(STEP_COLUMNS)[3:8]  # what CostModel.step is told of a step, in its order
LIMITED = ("tokens", "requests that decode", "query-key pairs of prefill attention", "tokens of decode context")


class Costs(NamedTuple):
    """A calibration as the compiled loop takes it: seconds by tokens in a step, by requests that decode and at least by those,
    per query-key pair of prefill and per token of decode context; the largest step, as LIMITED; what a Loop adds."""

    fixed: Floats
    decode: Floats
    host: Floats
    pair_s: float
    masked_share: float
    context_s: float
    most: tuple[int, int, int, int]
    between_s: float
    request_s: float
    wake_s: float
    front_s: float


@compiled
def step_seconds(costs: Costs, prefill: int, decodes: int, pieces: int, pairs: int, context: int) -> float:
    """Seconds of one step without jitter, -1 for one outside the valid range. Counts as in CostModel.step."""
    tokens, most = prefill + decodes, costs.most
    if tokens > most[0] or decodes > most[1] or pairs > most[2] or context > most[3]:
        return -1.0
    masked = (prefill * prefill / pieces - prefill) / 2 if pieces > 0 else 0.0
    prompt_s = costs.pair_s * (pairs + costs.masked_share * masked)
    device_s = costs.fixed[tokens] + costs.decode[decodes] + costs.context_s * context + prompt_s
    return float(max(device_s, costs.host[decodes]))


def composition(prefill: int, before: int, decodes: int, context: int) -> tuple[int, int, int, int, int]:
    """A step as CostModel.step takes it: tokens of a prompt behind `before` others, and requests that decode at `context`."""
    return prefill, decodes, int(prefill > 0), prefill * before + prefill * (prefill + 1) // 2, decodes * context


class CostModel:
    """A calibration made ready for use. Raises SpecError for steps outside its valid range."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration, attention, valid = calibration, calibration.attention, calibration.valid
        tables = []
        for what, last in (("linear", valid.tokens), ("decode", valid.decode_tokens), ("host", valid.decode_tokens)):
            profile: Profile = getattr(calibration, what) or Profile((0, last), (0.0, 0.0))
            if (end := profile.at[-1]) < last:
                came, allowed = f"a profile to {end}", f"at least to the end of the valid range, {last}"
                raise SpecError(f"calibration {calibration.calibration}: {what}.at: got {came}; allowed: {allowed}")
            tables.append(profile.table())
        linear, decode, host = tables
        pair_s = attention.flop_per_pair / attention.flop_per_s
        context_s = attention.kv_bytes_per_token / attention.kv_bytes_per_s
        most, loop = dataclasses.astuple(valid), dataclasses.astuple(calibration.loop)
        fixed = calibration.overhead_s + linear
        self.costs = Costs(fixed, decode, host, pair_s, attention.masked_share, context_s, most, *loop)

    def step(self, prefill: int, decodes: int, pieces: int, pairs: int, context: int) -> float:
        """Seconds of one step without jitter. Counts as in STEP_COLUMNS, `pieces` being prefill_requests."""
        for what, came, most in zip(LIMITED, (prefill + decodes, decodes, pairs, context), self.costs.most, strict=True):
            if came > most:
                where = f"calibration {self.calibration.calibration}: {what} in a step"
                raise SpecError(f"{where}: got {came}; allowed: at most {most}")
        return step_seconds(self.costs, prefill, decodes, pieces, pairs, context)

    def seconds(self, steps: pd.DataFrame) -> Floats:
        """Seconds of a record's steps without jitter, shape (steps,)."""
        return np.array([self.step(*batch) for batch in steps[BATCH].to_numpy().tolist()])


def jitter_factors(jitter: Jitter, seed: int, first: int, count: int, only_decodes: bool = False) -> Floats:
    """Factors on the times of the steps numbered first to first + count - 1, shape (count,).

    Step i takes the i-th counter block (four words) of a Philox generator keyed by the seed, so that its factor does not depend
    on how the simulation got there: Box-Muller on two words, then whether and how much of a tail.
    """
    bits = np.random.Philox(key=seed)
    bits.advance(first)
    words = np.asarray(bits.random_raw(4 * count), dtype=np.uint64).reshape(count, 4)
    u = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1), ends excluded
    normal = np.sqrt(-2.0 * np.log(u[:, 0])) * np.cos(2.0 * np.pi * u[:, 1])
    sigma = jitter.decode_sigma if only_decodes and jitter.decode_sigma is not None else jitter.sigma
    factors = np.exp(sigma * normal - sigma**2 / 2)
    late = np.where(u[:, 2] < jitter.tail_share, -np.log(u[:, 3]) * jitter.tail_excess, 0.0)
    return np.asarray(factors * (1.0 + late))
