"""An engine on a virtual clock: the scheduler forms the batches, the cost model times them. Same records as the real one.

A run of steps in which the same tokens go to the same requests and nobody arrives is computed at once; that agrees with
stepping one by one to a nanosecond (`jump=False`, tests/simulator/test_simulator.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.errors import SpecError
from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, Phase, Record, frame
from experiments.simulator.cost_model import (
    PAUSE_S,
    Calibration,
    CostModel,
    Floats,
    Ints,
    jitter_factors,
    kv_blocks,
    load_calibration,
)
from experiments.simulator.scheduler import Batch, Scheduler
from experiments.simulator.scheduler import Sequence as Running
from experiments.spec.spec import EngineSettings

JITTER_CHUNK = 1 << 14  # steps whose jitter is drawn at a time
drawn_jitter = lru_cache(maxsize=128)(jitter_factors)  # a search simulates with the same seeds again and again; 17 MB at most


class SimulatedEngine:
    """experiments.records.record.Engine without an engine. Every run draws its jitter afresh from `seed`, by step number.

    Raises SpecError if the calibration is for another model, or a run meets a step that it does not cover.
    """

    def __init__(
        self, settings: EngineSettings, calibration: Calibration, seed: int, num_kv_blocks: int | None = None, jump: bool = True
    ) -> None:
        if settings.model not in calibration.models or settings.tensor_parallel != calibration.tensor_parallel:
            came, allowed = f"{settings.model} on {settings.tensor_parallel} GPUs", ", ".join(calibration.models)
            where = f"calibration {calibration.calibration}"
            raise SpecError(f"{where}: got {came}; allowed: {allowed} on {calibration.tensor_parallel}")
        self._settings, self._seed, self._jump = settings, seed, jump
        self._cost = CostModel(calibration)
        self._blocks = kv_blocks(settings, calibration) if num_kv_blocks is None else num_kv_blocks

    @property
    def facts(self) -> Mapping[str, Any]:
        calibration = self._cost.calibration
        return {
            "engine": "simulated",
            "simulated": True,
            "device": f"simulated: {calibration.title}",
            "load_s": 0.0,
            "calibration": calibration.calibration,
            "calibration_error": asdict(calibration.error),
            "prefix_caching": False,
            "async_scheduling": False,
            "reserve_full_prompt": True,
            "block_size": calibration.block_size,
            "kv_blocks": self._blocks,
            **{name: getattr(self._settings, name) for name in ("dtype", "tensor_parallel", "max_batch", "max_budget")},
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
            self._check(phase, number)
            scheduler = Scheduler(phase.budget, self._settings.max_batch, self._cost.calibration.block_size, self._blocks)
            if not trial.serve(phase, number, scheduler, time_limit_s):
                return trial, False
        return trial, True

    def close(self) -> None:
        """Nothing to free."""

    def _check(self, phase: Phase, number: int) -> None:
        if not 1 <= phase.budget <= self._settings.max_budget:
            raise SpecError(f"phase {number}: budget: got {phase.budget}; allowed: 1 to {self._settings.max_budget}")
        limit, arrival = self._settings.max_model_len, 0.0
        for request in phase.requests:
            prompt, output = request.prompt_tokens, request.output_tokens
            if min(prompt, output) < 1 or prompt + output > limit:
                allowed = f"at least 1 each, together at most max_model_len ({limit})"
                raise SpecError(f"phase {number}: request: got {prompt} + {output} tokens; allowed: {allowed}")
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
        self._clock, self._steps = 0.0, 0
        self._paused = False  # whether nothing ran for a while before the next step
        self._jitter = {False: np.empty(0), True: np.empty(0)}  # of steps that only decode? -> factors
        self._seconds, self._ends = array("d"), array("d")  # of steps
        self._starts: list[float] = []  # of segments
        self._segments: list[tuple[int, ...]] = []  # steps, tokens given per step, then STEP_COLUMNS from budget on
        self._given = array("q")  # the requests that get a token, segment after segment
        self._sequences: list[Running] = []
        self._requests: list[list[float]] = []  # REQUEST_COLUMNS of each; generated_tokens are filled in at the end

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
                sequence = Running(len(self._sequences), request.prompt_tokens, request.output_tokens)
                self._sequences.append(sequence)
                times, sizes = (arrivals[entered], self._clock), (sequence.prompt, sequence.output)
                self._requests.append([sequence.index, number, phase.budget, *times, *sizes, 0, -1, -1, 0])
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
        while len(jitter := self._jitter[not prefill]) < first + steps:
            more = drawn_jitter(cost.calibration.jitter, self._seed, len(jitter), JITTER_CHUNK, not prefill)
            self._jitter[not prefill] = np.concatenate([jitter, more])
        base = cost.step(prefill, decodes, pieces, pairs, context)
        # From step to step each decode's context grows by a token. Only one prompt can be in the middle, so all `prefill`
        # tokens are its, and each of them meets the `prefill` tokens computed in between.
        more_pairs, more_context = prefill * prefill, decodes
        growth = cost.pair_s * more_pairs + cost.context_s * more_context
        clock, note_seconds, note_end = start, self._seconds.append, self._ends.append
        for done, factor in enumerate(jitter[first : first + steps].tolist()):
            seconds = (base + growth * done) * factor + (0.0 if done else cold)
            clock += seconds + between
            note_seconds(seconds)
            note_end(clock - between)
            if clock >= until:
                steps = done + 1
                break
        self._clock = clock
        if steps > 1:  # refuses the last if it is out of range
            cost.step(prefill, decodes, pieces, pairs + more_pairs * (steps - 1), context + more_context * (steps - 1))
        waiting = len(scheduler.running) + len(scheduler.waiting) - batch.size
        row = (prefill, decodes, pieces, pairs, context, waiting, len(batch.preempted))
        self._segments.append((steps, len(given), scheduler.budget, *row))
        self._starts.append(start)
        self._given.extend(given)
        self._steps += steps
        for sequence in scheduler.update(batch, steps):
            self._requests[sequence.index][9] = self._steps - 1

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
            if self._requests[sequence.index][8] < 0:
                self._requests[sequence.index][8] = self._steps
        return (prefill, batch.size - len(batch.pieces), len(batch.pieces), pairs, batch.context), given

    def record(self, truncated: bool) -> Record:
        """The record of everything that happened."""
        rows = np.array(self._segments, dtype=np.int64).reshape(-1, 10)
        repeats, given = rows[:, 0], rows[:, 1]
        firsts = np.cumsum(repeats) - repeats
        place = np.arange(self._steps) - np.repeat(firsts, repeats)  # of a step within its segment
        ends, columns = np.array(self._ends), np.repeat(rows[:, 2:].T, repeats, axis=1)
        starts = np.empty(self._steps)
        starts[1:] = ends[:-1] + self._cost.calibration.loop.between_s
        starts[firsts] = self._starts
        columns[4] += columns[1] ** 2 * place  # as in _step
        columns[5] += columns[2] * place
        counts = dict(zip(list(STEP_COLUMNS)[2:], columns, strict=True))
        steps = pd.DataFrame({"start_s": starts, "seconds": np.array(self._seconds), **counts}, copy=False)
        per_step = np.repeat(given, repeats)
        offset = np.repeat(np.cumsum(given) - given, repeats) - (np.cumsum(per_step) - per_step)
        token_of = np.repeat(offset, per_step)
        token_of += np.arange(len(token_of))
        receivers = np.frombuffer(self._given, dtype=np.int64)[token_of] if len(token_of) else np.empty(0, dtype=np.int64)
        tokens = pd.DataFrame({"request": receivers, "time_s": np.repeat(ends, per_step)})
        for row, sequence in zip(self._requests, self._sequences, strict=True):
            row[7] = sequence.generated
        return Record(frame(self._requests, REQUEST_COLUMNS), steps, tokens, truncated)

    def percentiles(self) -> tuple[float, float, float]:
        """See SimulatedEngine. Within a segment all gaps of a step are one number, so they are counted, not listed."""
        rows = np.array(self._segments, dtype=np.int64).reshape(-1, 10)
        repeats, given = rows[:, 0], rows[:, 1]
        last = np.cumsum(repeats) - 1  # step of each segment
        first = last - repeats + 1
        ends, ids = np.array(self._ends), np.frombuffer(self._given, dtype=np.int64)
        order = np.argsort(ids.astype(np.uint16) if len(self._requests) < 1 << 16 else ids, kind="stable")
        segment = np.repeat(np.arange(len(rows)), given)[order]  # request after request, those that gave it tokens
        new = np.diff(ids[order], prepend=-1) != 0
        across = (ends[first[segment[1:]]] - ends[last[segment[:-1]]])[~new[1:]]
        within = np.delete(np.diff(ends, prepend=0.0), first)
        gaps = np.concatenate([across, within])
        counts = np.concatenate([np.ones(len(across), dtype=np.int64), np.repeat(given, repeats - 1)])
        arrival, first_step = np.array(self._requests)[:, [3, 8]].T
        ttft = ends[first[segment[new]]] - arrival
        delay = np.array(self._starts)[np.searchsorted(last, first_step)] - arrival
        return _percentile(gaps, counts, 0.99), float(np.median(ttft)), float(np.median(delay))


def _percentile(values: Floats, counts: Ints, share: float) -> float:
    """numpy's percentile, linear, of values that occur `counts` times each; 0 of none."""
    order = np.argsort(values)
    reached = np.cumsum(counts[order])
    if not len(reached) or not reached[-1]:
        return 0.0
    place = share * (int(reached[-1]) - 1)
    low, high = values[order][np.searchsorted(reached, [int(place), min(int(place) + 1, reached[-1] - 1)], side="right")]
    return float(low + (high - low) * (place - int(place)))
