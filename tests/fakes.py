"""A small engine for tests: constant cost per step and token, no vLLM."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.load import Run, TrialRecord
from experiments.engine import Phase, Record, Recorder
from experiments.expand import expand
from experiments.session import run_session
from experiments.spec import EngineSettings, load_figure, load_testbed

Factor = Callable[[int, int], float]  # (prompt tokens, chunk size in tokens) -> relative cost


class FakeEngine:
    """Prefill of n tokens in a step takes 10 ms + 0.1 ms per token; one request at a time."""

    def __init__(self, settings: EngineSettings, step_s: float = 0.01, token_s: float = 1e-4) -> None:
        self.settings, self.step_s, self.token_s = settings, step_s, token_s
        self.ran: list[Sequence[Phase]] = []
        self.closed = False

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"engine": "fake", "fake": "1", "vllm": "0", "torch": "0", "dtype": "float32", "threads": 1}

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
        return record


def synthetic_run(factor: Factor, noise: float = 0.01, testbed: str = "cpu", replicates: int = 5, bias: float = 0.0) -> Run:
    """A Figure 9a run in memory. noise: of every prefill; bias: spread between sessions of the smallest chunk size."""
    trials = []
    sessions = expand(load_figure("fig9a"), load_testbed(testbed), replicates)
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
    plan = {
        "figure": "fig9a",
        "testbed": testbed,
        "testbed_title": "synthetic",
        "platform": sessions[0].engine.platform,
        "scale": sessions[0].scale,
        "commit": {"commit": None, "modified": None},
        "identity": {},
        "not_run": [],
    }
    return Run("fig9a", testbed, (Path("bag-00000000-1"),), plan, tuple(trials))
