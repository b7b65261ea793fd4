"""An engine on a virtual clock: the scheduler forms the batches, the cost model times them. Same records as the real one.

One plain loop, compiled: a step after the other, none left out or summed up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.records.errors import SpecError
from experiments.records.metrics import Served, served
from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS, Phase, Record
from experiments.simulator.calibration import Calibration, Floats, Jitter, load_calibration
from experiments.simulator.compiled import compiled, say_if_not_kept
from experiments.simulator.cost_model import PAUSE_S, CostModel, Costs, jitter_factors, step_seconds
from experiments.simulator.memory import kv_blocks
from experiments.simulator.scheduler import GAP, STEP, TOKEN, Rows, begin, rows, schedule, unserved, update
from experiments.spec.spec import EngineSettings

FIRST_SIZE = 1 << 15  # steps for which there is room at first
ASKED = ("arrival_s", "prompt_tokens", "output_tokens")  # of a request
Tables: TypeAlias = tuple[npt.NDArray[Any], ...]
DONE, FULL, LATE, REFUSED = range(4)  # why the loop stops


@compiled
def serve(
    requests: Rows, slots: Rows, state: Rows, steps: Rows, tokens: Rows, gaps: Rows,
    costs: Costs, mixed: Floats, alone: Floats, last: int, limit: float,
) -> int:  # fmt: skip
    """Step until the first `last` requests are served, the clock reaches `limit`, or whatever else is told.

    tokens: empty if no record is wanted. mixed, alone: the jitter of steps that hold prefill, and that only decode, by number.
    """
    now = state[0]
    while now.steps < len(mixed) and now.gaps + len(slots) < len(gaps):
        boundary = now.clock  # who comes while others enter waits for the next one, as in the real loop
        while now.entered < last and requests[now.entered].arrival_s <= boundary:
            requests[now.entered].injected_s, requests[now.entered].gaps = now.clock, now.gaps
            now.clock += costs.request_s
            now.entered += 1
        if now.running == 0 and now.head == now.entered:
            if now.entered == last:
                return DONE
            coming = requests[now.entered].arrival_s
            now.clock, now.cold = coming, costs.wake_s if coming - now.clock > PAUSE_S else 0.0
            continue
        if now.clock >= limit:
            return LATE
        step = steps[now.steps % len(steps)]
        step.start_s, step.budget = now.clock, requests[last - 1].budget
        schedule(requests, slots, now, step)
        prefill, pairs, context = step.prefill_tokens, step.prefill_pairs, step.decode_context
        step.seconds = step_seconds(costs, prefill, step.decode_tokens, step.prefill_requests, pairs, context)
        if step.seconds < 0:
            return REFUSED
        step.seconds = step.seconds * (mixed[now.steps] if prefill > 0 else alone[now.steps]) + now.cold
        now.clock, now.cold = now.clock + step.seconds, 0.0
        running = now.running
        given = update(requests, slots, now, gaps)
        for _ in range(min(running - now.running, last - now.coming)):  # a closed loop: who was served asks again
            requests[now.coming].arrival_s = now.clock + costs.front_s
            now.coming += 1
        for place in range(given if len(tokens) > 0 else 0):
            tokens[now.tokens].request, tokens[now.tokens].time_s = slots[place].given, now.clock
            now.tokens += 1
        now.clock += costs.between_s
    return FULL


@lru_cache(maxsize=64)  # a search simulates with the same seeds again and again
def drawn_jitter(jitter: Jitter, seed: int, count: int, only_decodes: bool) -> Floats:
    """Of the first `count` steps, FIRST_SIZE times a power of two."""
    half = count // 2 if count > FIRST_SIZE else 0
    known = [drawn_jitter(jitter, seed, half, only_decodes)] if half else []
    more = (jitter_factors(jitter, seed, at, FIRST_SIZE, only_decodes) for at in range(half, count, FIRST_SIZE))
    return np.concatenate([*known, *more])


class SimulatedEngine:
    """experiments.records.record.Engine without an engine. Every run draws its jitter afresh from `seed`, by step number.

    Raises SpecError if the calibration is for another model, or a run meets a step that it does not cover.
    """

    def __init__(self, settings: EngineSettings, calibration: Calibration, seed: int, num_kv_blocks: int | None = None) -> None:
        if settings.model not in calibration.models or settings.tensor_parallel != calibration.tensor_parallel:
            came, allowed = f"{settings.model} on {settings.tensor_parallel} GPUs", ", ".join(calibration.models)
            where = f"calibration {calibration.calibration}"
            raise SpecError(f"{where}: got {came}; allowed: {allowed} on {calibration.tensor_parallel}")
        self._settings, self._seed, self._cost = settings, seed, CostModel(calibration)
        self._blocks = kv_blocks(settings, calibration) if num_kv_blocks is None else num_kv_blocks
        say_if_not_kept()

    @property
    def facts(self) -> Mapping[str, Any]:
        calibration, names = self._cost.calibration, ("dtype", "tensor_parallel", "max_batch", "max_budget")
        known = {"calibration": calibration.calibration, "calibration_error": asdict(calibration.error), "load_s": 0.0}
        cache = {"block_size": calibration.block_size, "kv_blocks": self._blocks, "prefix_caching": False}
        scheduler = {"async_scheduling": False, "reserve_full_prompt": True}
        what = {"engine": "simulated", "simulated": True, "device": f"simulated: {calibration.title}"}
        return what | known | cache | scheduler | {name: getattr(self._settings, name) for name in names}

    def run(self, phases: Sequence[Phase], time_limit_s: float) -> Record:
        """Serve the phases in virtual time; see Engine. The time limit is virtual too."""
        asked = [self.requests(phase, number) for number, phase in enumerate(phases)]
        (*tables, _), truncated = self._serve(np.concatenate(asked).view(np.recarray), time_limit_s, record=True)
        parts = zip(tables, (REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS), strict=True)
        requests, steps, tokens = (pd.DataFrame({name: table[name] for name in names}, copy=False) for table, names in parts)
        return Record(requests, steps, tokens, truncated)

    def served(self, requests: Rows, warm_up: int = 0) -> Served:
        """What the requests of a phase saw but the first `warm_up`, and the gaps since these had come: as the phase's record
        tells it, which need not be made."""
        (rows, _, _, gaps), _ = self._serve(requests, np.inf, record=False)
        rows, gaps = rows[warm_up:], gaps[rows["gaps"][warm_up] :]
        front_s = self._cost.calibration.loop.front_s  # arrivals are at the engine, requests were sent so much earlier
        ttft, delay, e2e = (rows[moment] - rows["arrival_s"] + front_s for moment in ("first_token", "began", "last_token"))
        return served(rows["prompt_tokens"], rows["output_tokens"], ttft, delay, e2e, gaps)

    def requests(self, phase: Phase, number: int = 0) -> Rows:
        """The requests of a phase before it begins. Raises SpecError for what no engine could serve."""
        longest, largest, arrival = self._settings.max_model_len, self._settings.max_budget, 0.0
        if not 1 <= phase.budget <= largest:
            raise SpecError(f"phase {number}: budget: got {phase.budget}; allowed: 1 to {largest}")
        for n, request in enumerate(phase.requests):
            prompt, output = request.prompt_tokens, request.output_tokens
            if min(prompt, output) < 1 or prompt + output > longest:
                allowed = f"at least 1 each, together at most max_model_len ({longest})"
                raise SpecError(f"phase {number}: request: got {prompt} + {output} tokens; allowed: {allowed}")
            if not arrival <= request.arrival_s or phase.requests[0].arrival_s == np.inf:
                allowed = f"not before {arrival}, of the first finite"
                raise SpecError(f"phase {number}: arrival_s: got {request.arrival_s}; allowed: {allowed}")
            arrival, block = request.arrival_s, self._cost.calibration.block_size
            if (needed := -(-(prompt + output - 1) // block)) >= self._blocks:  # the last token generated is never cached
                came = f"{prompt} + {output} tokens need {needed} KV blocks"
                raise SpecError(f"phase {number}: request {n}: {came}; allowed: at most {self._blocks - 1}")
        table = unserved(*([getattr(request, name) for request in phase.requests] for name in ASKED))
        table["phase"], table["budget"] = number, phase.budget
        return table

    def _serve(self, requests: Rows, limit: float, record: bool) -> tuple[Tables, bool]:
        """Serve the requests, phase after phase: who entered, steps, tokens, gaps, and whether `limit` ended it."""
        jitter, size, first, why = self._cost.calibration.jitter, FIRST_SIZE, 0, DONE
        requests["request"] = requests["queue"] = np.arange(len(requests))
        slots, state = begin(self._settings.max_batch, self._cost.calibration.block_size, self._blocks)
        tokens, steps = rows(int(requests["output_tokens"].sum()) if record else 0, TOKEN), rows(size if record else 1, STEP)
        kinds = (False, jitter.decode_sigma is not None)  # who only decode may have their own sigma
        # Room for all gaps unless requests are preempted: to grow it costs copies, and what is not written takes no memory.
        pieces = -(-requests["prompt_tokens"] // requests["budget"])
        gaps = rows(int((2 * requests["output_tokens"] + pieces).sum()) + 2 * len(slots), GAP)
        for last in (np.flatnonzero(np.diff(requests["phase"], append=-1)) + 1).tolist():
            requests["arrival_s"][first:last] += state["clock"]
            state["coming"] = first + np.isfinite(requests["arrival_s"][first:last]).sum()
            first, why = last, FULL
            while why == FULL:
                mixed, alone = (drawn_jitter(jitter, self._seed, size, kind) for kind in kinds)
                why = serve(requests, slots, state, steps, tokens, gaps, self._cost.costs, mixed, alone, last, limit)
                if why == FULL and state[0].gaps + len(slots) >= len(gaps):
                    gaps = rows(2 * len(gaps), GAP, gaps)
                elif why == FULL:
                    size, steps = 2 * size, rows(2 * len(steps), STEP, steps)
            if why == REFUSED:  # says what is too much
                self._cost.step(*(int(steps[state[0].steps % len(steps)][name]) for name in list(STEP_COLUMNS)[3:8]))
            if why == LATE:
                break
        now = state[0]
        return (requests[: now.entered], steps[: now.steps], tokens[: now.tokens], gaps[: now.gaps]), why == LATE

    def close(self) -> None:
        """Nothing to free."""


def simulated_engine(settings: EngineSettings, seed: int) -> SimulatedEngine:
    """The engine that simulates a testbed's machine. Raises SpecError for a model without calibration there."""
    if settings.calibration is None:
        raise SpecError(f"calibrations: got none for {settings.model}; allowed: a testbed that names one for the model")
    return SimulatedEngine(settings, load_calibration(settings.calibration), seed)
