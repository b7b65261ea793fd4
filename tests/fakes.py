"""A small engine for tests: constant cost per step and token, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.engine import Phase, Record, Recorder
from experiments.spec import EngineSettings


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
