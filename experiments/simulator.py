"""An engine on a virtual clock: the scheduler forms the batches, the cost model times them. Same records as the real one.

A run of steps in which the same tokens go to the same requests and nobody arrives is computed at once; that agrees with
stepping one by one to a nanosecond (`jump=False`, tests/test_simulator.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from experiments.cost_model import PAUSE_S, Calibration, CostModel, Floats, Ints, jitter_factors, kv_blocks, load_calibration
from experiments.engine import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS, Phase, Record
from experiments.scheduler import Batch, Scheduler
from experiments.scheduler import Sequence as Running
from experiments.spec import EngineSettings, SpecError

JITTER_CHUNK = 1 << 14  # steps whose jitter is drawn at a time
SHORT = 8  # steps up to which plain floats are faster than arrays
drawn_jitter = lru_cache(maxsize=128)(jitter_factors)  # a search simulates with the same seeds again and again; 17 MB at most


class SimulatedEngine:
    """experiments.engine.Engine without an engine. Every run draws its jitter afresh from `seed`, by step number.

    Raises SpecError if the calibration is for another model, or a run meets a step that it does not cover.
    """

    def __init__(
        self,
        settings: EngineSettings,
        calibration: Calibration,
        seed: int,
        num_kv_blocks: int | None = None,
        jump: bool = True,
    ) -> None:
        if settings.model not in calibration.models or settings.tensor_parallel != calibration.tensor_parallel:
            raise SpecError(
                f"calibration {calibration.calibration}: got {settings.model} on {settings.tensor_parallel} GPUs; "
                f"allowed: {', '.join(calibration.models)} on {calibration.tensor_parallel}"
            )
        self._settings, self._seed, self._jump = settings, seed, jump
        self._cost = CostModel(calibration)
        self._blocks = kv_blocks(settings, calibration) if num_kv_blocks is None else num_kv_blocks

    @property
    def facts(self) -> Mapping[str, Any]:
        calibration = self._cost.calibration
        return {
            "engine": "simulated",
            "simulated": True,
            "calibration": calibration.calibration,
            "calibration_error": asdict(calibration.error),
            "device": f"simulated: {calibration.title}",
            "dtype": self._settings.dtype,
            "tensor_parallel": self._settings.tensor_parallel,
            "prefix_caching": False,
            "async_scheduling": False,
            "reserve_full_prompt": True,
            "block_size": calibration.block_size,
            "kv_blocks": self._blocks,
            "max_batch": self._settings.max_batch,
            "max_budget": self._settings.max_budget,
            "load_s": 0.0,
        }

    def run(self, phases: Sequence[Phase], time_limit_s: float) -> Record:
        """Serve the phases in virtual time; see Engine. The time limit is virtual too."""
        trial, whole = self._serve(phases, time_limit_s)
        return trial.record(truncated=not whole)

    def percentiles(self, phase: Phase) -> tuple[float, float, float]:
        """P99 TBT, P50 TTFT and median scheduling delay of a phase, seconds: those of its record, which need not be made."""
        return self._serve([phase], np.inf)[0].percentiles()

    def _serve(self, phases: Sequence[Phase], time_limit_s: float) -> tuple[_Trial, bool]:
        """A trial of these phases, and whether it came to its end."""
        trial = _Trial(self._cost, self._seed, self._jump)
        for number, phase in enumerate(phases):
            if not 1 <= phase.budget <= self._settings.max_budget:
                raise SpecError(f"phase {number}: budget: got {phase.budget}; allowed: 1 to {self._settings.max_budget}")
            self._check(phase, number)
            block_size = self._cost.calibration.block_size
            scheduler = Scheduler(phase.budget, self._settings.max_batch, block_size, self._blocks)
            if not trial.serve(phase, number, scheduler, time_limit_s):
                return trial, False
        return trial, True

    def close(self) -> None:
        """Nothing to free."""

    def _check(self, phase: Phase, number: int) -> None:
        limit, arrival = self._settings.max_model_len, 0.0
        for request in phase.requests:
            if min(request.prompt_tokens, request.output_tokens) < 1 or request.prompt_tokens + request.output_tokens > limit:
                raise SpecError(
                    f"phase {number}: request: got {request.prompt_tokens} + {request.output_tokens} tokens; "
                    f"allowed: at least 1 each, together at most max_model_len ({limit})"
                )
            if not arrival <= request.arrival_s < np.inf:
                raise SpecError(f"phase {number}: arrival_s: got {request.arrival_s}; allowed: finite, not before {arrival}")
            arrival = request.arrival_s


def simulated_engine(settings: EngineSettings, seed: int) -> SimulatedEngine:
    """The engine that simulates a testbed's machine. Raises SpecError for a model without calibration there."""
    if settings.calibration is None:
        raise SpecError(f"calibrations: got none for {settings.model}; allowed: a testbed that names one for the model")
    return SimulatedEngine(settings, load_calibration(settings.calibration), seed)


class _Trial:
    """The virtual clock of one trial and what happened by it.

    Steps are noted in segments, one row of `segments` for a run of like steps, and unfolded at the end.
    """

    def __init__(self, cost: CostModel, seed: int, jump: bool) -> None:
        self._cost, self._seed, self._jump = cost, seed, jump
        self._clock = 0.0
        self._paused = False  # whether nothing ran for a while before the next step
        self._steps = 0
        self._jitter = {False: np.empty(0), True: np.empty(0)}  # of steps that only decode? -> factors
        self._seconds = np.empty(JITTER_CHUNK)
        self._ends = np.empty(JITTER_CHUNK)
        self._starts: list[float] = []  # of segments
        self._segments: list[tuple[int, ...]] = []  # steps, tokens given per step, then STEP_COLUMNS from budget on
        self._given = array("q")  # the requests that get a token, segment after segment
        self._requests: list[tuple[Running, int, int, float, float]] = []  # sequence, phase, budget, arrival, injection
        self._first: list[int] = []
        self._last: list[int] = []

    def serve(self, phase: Phase, number: int, scheduler: Scheduler, time_limit_s: float) -> bool:
        """One phase; False if the time limit ended it. A request enters at the first step boundary at or after its arrival."""
        begin = self._clock
        arrivals = [begin + request.arrival_s for request in phase.requests]
        arrivals.append(np.inf)  # after the last one nobody comes
        entered, loop = 0, self._cost.calibration.loop
        while True:
            clock = self._clock
            while arrivals[entered] <= clock:  # who comes while others enter waits for the next boundary, as in the real loop
                request = phase.requests[entered]
                sequence = Running(len(self._requests), request.prompt_tokens, request.output_tokens)
                self._requests.append((sequence, number, phase.budget, arrivals[entered], self._clock))
                self._first.append(-1)
                self._last.append(-1)
                scheduler.add(sequence)
                entered += 1
                self._clock += loop.request_s
            if not scheduler.running and not scheduler.waiting:
                if entered == len(phase.requests):
                    return True
                self._paused, self._clock = arrivals[entered] - self._clock > PAUSE_S, arrivals[entered]
                continue
            if self._clock >= time_limit_s:
                scheduler.catch_up()
                return False
            self._step(scheduler, min(arrivals[entered], time_limit_s))

    def _step(self, scheduler: Scheduler, until: float) -> None:
        """One step, or a run of like steps of which none starts at or after `until`."""
        batch = scheduler.schedule()
        (prefill, decodes, pieces, pairs, context), given = self._compose(batch)
        steps = scheduler.repeats(batch) if self._jump else 1
        first, start, cost = self._steps, self._clock, self._cost
        between, cold = cost.calibration.loop.between_s, cost.calibration.loop.wake_s if self._paused else 0.0
        self._paused = False
        only_decodes = not prefill
        while len(jitter := self._jitter[only_decodes]) < first + steps:
            more = drawn_jitter(cost.calibration.jitter, self._seed, len(jitter), JITTER_CHUNK, only_decodes)
            self._jitter[only_decodes] = np.concatenate([jitter, more])
        if len(self._seconds) < first + steps:
            self._seconds, self._ends = (np.concatenate([a, np.empty_like(a)]) for a in (self._seconds, self._ends))
        base, per_step = cost.step(prefill, decodes, pieces, pairs, context), _growth(prefill, decodes)
        growth = cost.pair_s * per_step[0] + cost.context_s * per_step[1]
        if steps <= SHORT:
            clock, done = start, 0
            for factor in jitter[first : first + steps].tolist():
                seconds = (base + growth * done) * factor + (0.0 if done else cold)
                clock += seconds + between
                self._seconds[first + done], self._ends[first + done] = seconds, clock - between
                done += 1
                if clock >= until:
                    break
            self._clock, steps = clock, done
        else:
            run = (base + growth * np.arange(steps)) * jitter[first : first + steps]
            run[0] += cold
            nexts = np.add.accumulate(np.concatenate([[start], run + between]))[1:]  # when the steps after these start
            steps = min(steps, int(np.searchsorted(nexts, until)) + 1)
            self._seconds[first : first + steps], self._ends[first : first + steps] = run[:steps], nexts[:steps] - between
            self._clock = float(nexts[steps - 1])
        pairs_last, context_last = pairs + per_step[0] * (steps - 1), context + per_step[1] * (steps - 1)
        cost.step(prefill, decodes, pieces, pairs_last, context_last)  # refuses the last if it is out of range
        waiting = len(scheduler.running) + len(scheduler.waiting) - batch.size
        row = (prefill, decodes, pieces, pairs, context, waiting, len(batch.preempted))
        self._segments.append((steps, len(given), scheduler.budget, *row))
        self._starts.append(start)
        self._given.extend(given)
        self._steps += steps
        for sequence in scheduler.update(batch, steps):
            self._last[sequence.index] = self._steps - 1

    def _compose(self, batch: Batch) -> tuple[tuple[int, int, int, int, int], list[int]]:
        """prefill_tokens, decode_tokens, prefill_requests, prefill_pairs, decode_context; and who is to be given a token."""
        prefill = pairs = 0
        given = [*batch.decodes]
        for sequence, tokens in batch.pieces:
            computed = sequence.computed
            if computed + tokens == sequence.known:
                given.append(sequence.index)
            prefill += tokens
            pairs += tokens * computed + tokens * (tokens + 1) // 2
            if self._first[sequence.index] < 0:
                self._first[sequence.index] = self._steps
        return (prefill, batch.size - len(batch.pieces), len(batch.pieces), pairs, batch.context), given

    def record(self, truncated: bool) -> Record:
        """The record of everything that happened."""
        rows = np.array(self._segments, dtype=np.int64).reshape(-1, 10)
        repeats, given = rows[:, 0], rows[:, 1]
        firsts = np.cumsum(repeats) - repeats
        place = np.arange(self._steps) - np.repeat(firsts, repeats)  # of a step within its segment
        ends, columns = self._ends[: self._steps], np.repeat(rows[:, 2:], repeats, axis=0)
        starts = np.empty(self._steps)
        starts[1:] = ends[:-1] + self._cost.calibration.loop.between_s
        starts[firsts] = self._starts
        columns[:, 4] += columns[:, 1] ** 2 * place  # as in _growth
        columns[:, 5] += columns[:, 2] * place
        steps = pd.DataFrame(dict(zip(list(STEP_COLUMNS)[2:], columns.T, strict=True)), copy=False)
        steps.insert(0, "start_s", starts)
        steps.insert(1, "seconds", self._seconds[: self._steps])
        per_step = np.repeat(given, repeats)
        offset = np.repeat(np.cumsum(given) - given, repeats) - (np.cumsum(per_step) - per_step)
        token_of = np.repeat(offset, per_step)
        token_of += np.arange(len(token_of))
        requests = np.frombuffer(self._given, dtype=np.int64)[token_of] if len(token_of) else np.empty(0, dtype=np.int64)
        tokens = pd.DataFrame({"request": requests, "time_s": np.repeat(ends, per_step)}, columns=list(TOKEN_COLUMNS))
        return Record(self._request_frame(), steps.astype(STEP_COLUMNS), tokens.astype(TOKEN_COLUMNS), truncated)

    def percentiles(self) -> tuple[float, float, float]:
        """See SimulatedEngine. Within a segment all gaps of a step are one number, so they are counted, not listed."""
        rows = np.array(self._segments, dtype=np.int64).reshape(-1, 10)
        repeats, given = rows[:, 0], rows[:, 1]
        last = np.cumsum(repeats) - 1  # step of each segment
        first = last - repeats + 1
        ends, ids = self._ends[: self._steps], np.frombuffer(self._given, dtype=np.int64)
        order = np.argsort(ids.astype(np.uint16) if len(self._requests) < 1 << 16 else ids, kind="stable")
        segment = np.repeat(np.arange(len(rows)), given)[order]  # request after request, those that gave it tokens
        new = np.diff(ids[order], prepend=-1) != 0
        across = (ends[first[segment[1:]]] - ends[last[segment[:-1]]])[~new[1:]]
        within = np.delete(np.diff(ends, prepend=0.0), first)
        gaps = np.concatenate([across, within])
        counts = np.concatenate([np.ones(len(across), dtype=np.int64), np.repeat(given, repeats - 1)])
        arrival = np.array([row[3] for row in self._requests])
        ttft = ends[first[segment[new]]] - arrival
        delay = np.array(self._starts)[np.searchsorted(last, self._first)] - arrival
        return _percentile(gaps, counts, 0.99), float(np.median(ttft)), float(np.median(delay))

    def _request_frame(self) -> pd.DataFrame:
        """One row per request that entered."""
        rows = [
            (s.index, phase, budget, arrival, injected, s.prompt, s.output, s.generated, first, last, 0)
            for (s, phase, budget, arrival, injected), first, last in zip(self._requests, self._first, self._last, strict=True)
        ]
        return pd.DataFrame(rows, columns=list(REQUEST_COLUMNS)).astype(REQUEST_COLUMNS)


def _percentile(values: Floats, counts: Ints, share: float) -> float:
    """numpy's percentile, linear, of values that occur `counts` times each; 0 of none."""
    order = np.argsort(values)
    reached = np.cumsum(counts[order])
    if not len(reached) or not reached[-1]:
        return 0.0
    place = share * (int(reached[-1]) - 1)
    low, high = values[order][np.searchsorted(reached, [int(place), min(int(place) + 1, reached[-1] - 1)], side="right")]
    return float(low + (high - low) * (place - int(place)))


def _growth(prefill: int, decodes: int) -> tuple[int, int]:
    """How prefill_pairs and decode_context grow from one step of a run to the next.

    Each decode's context grows by a token. Only one prompt can be in the middle, so all `prefill` tokens are its, and each of
    them meets the `prefill` tokens computed in between.
    """
    return prefill * prefill, decodes
