"""Small engines for tests: scripted cost per step and token, no vLLM."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from analysis.judge.load import Run, TrialRecord
from experiments.engine.session import run_session
from experiments.records.provenance import sha256
from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS, Phase, Record, Recorder, frame
from experiments.simulator.calibration import CALIBRATIONS
from experiments.simulator.scheduler import GAP, STEP, begin, rows, schedule, unserved, update
from experiments.spec.expand import Session, expand
from experiments.spec.spec import FIGURES, TESTBEDS, EngineSettings, load_figure, load_testbed, path_of
from experiments.spec.workload import synthetic_trace

Factor = Callable[[int, int], float]  # (prompt tokens, chunk size in tokens) -> relative cost
StepCost = Callable[[int, int, int], float]  # (prefill tokens, decode tokens, chunk size), all in tokens -> seconds
A100 = ["NVIDIA A100-SXM4-80GB"] * 2
SATURATION = {"mistral-7b": 9.0, "yi-34b": 7.0}  # requests per second, as if measured


def fake_facts(settings: EngineSettings) -> dict[str, Any]:
    """Those of an engine that is on what its settings name."""
    found = {"engine": "fake", "fake": "1", "vllm": "0", "torch": "0", "dtype": "float32", "threads": 1}
    if settings.platform == "simulated":
        return found | {"simulated": True, "calibration": settings.calibration}
    return found | {"device": A100[0] if settings.platform == "cuda" else "cpu"}


class FakeEngine:
    """Prefill of n tokens in a step takes 10 ms + 0.1 ms per token; one request at a time."""

    def __init__(self, settings: EngineSettings, step_s: float = 0.01, token_s: float = 1e-4) -> None:
        self.settings, self.step_s, self.token_s = settings, step_s, token_s
        self.ran: list[Sequence[Phase]] = []
        self.closed = False

    @property
    def facts(self) -> Mapping[str, Any]:
        return fake_facts(self.settings)

    def run(self, phases: Sequence[Phase], time_limit_s: float) -> Record:
        self.ran.append(phases)
        recorder, now = Recorder(), 0.0
        for number, phase in enumerate(phases):
            for request in phase.requests:
                index, first, done = len(recorder.requests), len(recorder.steps), 0
                arrival = now
                while done < request.prompt_tokens:
                    count = min(phase.budget, request.prompt_tokens - done)
                    seconds = self.step_s + count * self.token_s
                    pairs = count * done + count * (count + 1) // 2
                    recorder.steps.append((now, seconds, phase.budget, count, 0, 1, pairs, 0, 0, 0))
                    now, done = now + seconds, done + count
                recorder.tokens.append((index, now))
                sizes = [request.prompt_tokens, request.output_tokens, 1]
                recorder.requests.append(
                    [index, number, phase.budget, arrival, arrival, *sizes, first, len(recorder.steps) - 1, 0]
                )
        return recorder.record(truncated=False)

    def close(self) -> None:
        self.closed = True


class ScriptedEngine(FakeEngine):
    """Prefill of a prompt takes prompt tokens x 1 ms x factor(prompt tokens, chunk size), with noise by seed."""

    def __init__(self, settings: EngineSettings, factor: Factor, noise: float, seed: int) -> None:
        super().__init__(settings)
        self.factor, self.noise, self.random = factor, noise, random.Random(seed)

    def run(self, phases: Sequence[Phase], time_limit_s: float) -> Record:
        record = super().run(phases, time_limit_s)
        for row in record.requests.itertuples():
            steps = slice(row.first_step, row.last_step)  # label slices include their end
            wanted = 1e-3 * row.prompt_tokens * self.factor(row.prompt_tokens, row.budget)
            wanted *= math.exp(self.random.gauss(0.0, self.noise))
            share = record.steps.loc[steps, "seconds"]
            record.steps.loc[steps, "seconds"] = share / share.sum() * wanted
        ends = record.steps["seconds"].cumsum()
        record.steps["start_s"] = ends.shift(1, fill_value=0.0)
        record.tokens["time_s"] = ends[record.requests["last_step"]].to_numpy()  # one token each
        for moment in ("arrival_s", "injected_s"):
            record.requests[moment] = record.steps["start_s"][record.requests["first_step"]].to_numpy()
        return record


class FakeServingEngine:
    """Serves arrivals with our scheduler on a clock that a scripted cost per step drives, with noise by seed."""

    def __init__(self, settings: EngineSettings, cost: StepCost, noise: float = 0.0, seed: int = 0) -> None:
        self.settings, self.cost, self.noise, self.random = settings, cost, noise, random.Random(seed)

    @property
    def facts(self) -> Mapping[str, Any]:
        return fake_facts(self.settings)

    def run(self, phases: Sequence[Phase], time_limit_s: float) -> Record:
        recorder, now = Recorder(), 0.0
        for number, phase in enumerate(phases):
            now = self._serve(recorder, number, phase, now)
        return recorder.record(truncated=False)

    def _serve(self, recorder: Recorder, number: int, phase: Phase, now: float) -> float:
        """One phase, from `now`; the time at which it is done."""
        asked = [(now + request.arrival_s, request.prompt_tokens, request.output_tokens) for request in phase.requests]
        requests, (slots, state) = unserved(*zip(*asked, strict=True)), begin(self.settings.max_batch, 16, 1 << 20)
        state["clock"], state["steps"], first, at = now, len(recorder.steps), len(recorder.requests), state[0]
        while at.running or at.head < at.entered or at.entered < len(requests):
            if not at.running and at.head == at.entered:
                at.clock = max(at.clock, requests.arrival_s[at.entered])
            while at.entered < len(requests) and requests.arrival_s[at.entered] <= at.clock:
                requests[at.entered].injected_s = at.clock
                at.entered += 1
            step, start = rows(1, STEP), at.clock
            step["budget"] = phase.budget
            schedule(requests, slots, at, step[0])
            prefill, decodes = int(step.prefill_tokens[0]), int(step.decode_tokens[0])
            seconds = self.cost(prefill, decodes, phase.budget) * math.exp(self.random.gauss(0.0, self.noise))
            pieces, waiting = int(step.prefill_requests[0]), int(step.waiting[0])
            recorder.steps.append((start, seconds, phase.budget, prefill, decodes, pieces, 0, 0, waiting, 0))
            at.clock, at.gaps = start + seconds, 0
            given = update(requests, slots, at, rows(self.settings.max_batch + 1, GAP))
            recorder.tokens.extend((first + int(place), start + seconds) for place in slots.given[:given])
        requests["request"] += first
        requests["phase"], requests["budget"] = number, phase.budget
        recorder.requests.extend(requests[list(REQUEST_COLUMNS)].tolist())
        return float(at.clock)

    def close(self) -> None:
        """Nothing to free."""


def chunked(prefill: int, decodes: int, budget: int) -> float:
    """As on a real machine: a fixed cost per step, so that small chunks pay it more often and large ones last longer."""
    return 5e-3 + 1e-4 * (prefill + decodes)


def serving_run(cost: StepCost = chunked, noise: float = 0.05, testbed: str = "cpu", replicates: int = 3) -> Run:
    """A Figure 9b run in memory. noise: of every step; testbed: name or YAML path."""
    trace = synthetic_trace()
    sessions = expand(load_figure("fig9b"), load_testbed(testbed), replicates, SATURATION)

    def trials(session: Session) -> list[TrialRecord]:
        names = [trial.name for trial in session.trials]
        results = run_session(session, names, lambda settings: FakeServingEngine(settings, cost, noise, session.seed), trace)
        return [
            TrialRecord(Path("in-memory"), {"format": 1, "session": r.session, "trial": r.trial, **r.facts}, r.record)
            for r in results
        ]

    return in_memory(sessions, tuple(trial for session in sessions for trial in trials(session)), testbed=testbed)


def synthetic_run(
    factor: Factor,
    noise: float = 0.01,
    testbed: str = "cpu",
    replicates: int = 5,
    bias: float = 0.0,
    figure: str = "fig9a",
) -> Run:
    """A Figure 9a run in memory. noise: of every prefill; bias: spread between sessions of the smallest chunk size.

    testbed, figure: names or YAML paths.
    """
    trials = []
    sessions = expand(load_figure(figure), load_testbed(testbed), replicates)
    for session in sessions:
        smallest = min(point.budget for point in session.trials[0].points)
        shift = math.exp(random.Random(f"{session.name}").gauss(0.0, bias))

        def shifted(tokens: int, budget: int, smallest: int = smallest, shift: float = shift) -> float:
            return factor(tokens, budget) * (shift if budget == smallest else 1.0)

        def make(settings: EngineSettings, shifted: Factor = shifted, seed: int = session.seed) -> ScriptedEngine:
            return ScriptedEngine(settings, shifted, noise, seed)

        for result in run_session(session, [trial.name for trial in session.trials], make):
            facts = {"format": 1, "session": result.session, "trial": result.trial, **result.facts}
            trials.append(TrialRecord(Path("in-memory"), facts, result.record))
    return in_memory(sessions, tuple(trials), figure, testbed)


def tiny_record() -> Record:
    """Three requests at chunk size 8, small enough to work out by hand, between two probes; phase 1 is the measured one."""
    requests = [
        [0, 0, 8, 0.0, 0.0, 4, 1, 1, 0, 0, 0],
        [1, 1, 8, 1.0, 1.0, 12, 3, 3, 1, 4, 0],
        [2, 1, 8, 1.2, 1.5, 4, 2, 2, 2, 3, 0],
        [3, 1, 8, 5.0, 5.0, 2, 1, 1, 5, 5, 0],
        [4, 2, 8, 6.0, 6.0, 4, 1, 1, 6, 6, 0],
    ]
    steps = [
        (0.0, 0.5, 8, 4, 0, 1, 10, 0, 0, 0),
        (1.0, 0.5, 8, 8, 0, 1, 36, 0, 0, 0),
        (1.5, 0.5, 8, 8, 0, 2, 52, 0, 0, 0),
        (2.0, 0.25, 8, 0, 2, 0, 0, 18, 0, 0),
        (2.25, 0.75, 8, 0, 1, 0, 0, 14, 0, 0),
        (5.0, 0.5, 8, 2, 0, 1, 3, 0, 0, 0),
        (6.0, 0.5, 8, 4, 0, 1, 10, 0, 0, 0),
    ]
    tokens = [(0, 0.5), (1, 2.0), (2, 2.0), (1, 2.25), (2, 2.25), (1, 3.0), (3, 5.5), (4, 6.5)]
    return Record(frame(requests, REQUEST_COLUMNS), frame(steps, STEP_COLUMNS), frame(tokens, TOKEN_COLUMNS))


def in_memory(sessions: Sequence[Session], trials: tuple[TrialRecord, ...], figure: str = "", testbed: str = "") -> Run:
    """The trials of these sessions as a run of one bag; figure and testbed as the sessions were expanded from."""
    first = sessions[0]
    files = {"figure": path_of(figure or first.figure, FIGURES), "testbed": path_of(testbed or first.testbed, TESTBEDS)}
    files |= {name: CALIBRATIONS / f"{name}.yaml" for session in sessions if (name := session.engine.calibration)}
    if first.engine.platform == "cuda":
        trials = tuple(replace(t, facts={**t.facts, "machine": {**t.facts["machine"], "gpus": A100}}) for t in trials)
    plan = {
        "figure": first.figure,
        "testbed": first.testbed,
        "testbed_title": "synthetic",
        "platform": first.engine.platform,
        "scale": first.scale,
        "commit": {"commit": None, "modified": None},
        "identity": {name: sha256(path) for name, path in files.items()},
        "not_run": [],
        "requires": asdict(load_testbed(testbed or first.testbed).requires),
        "sessions": {session.name: [trial.name for trial in session.trials] for session in sessions},
    }
    return Run(first.figure, first.testbed, (Path("bag-00000000-1"),), plan, trials)
