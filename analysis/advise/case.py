"""What is simulated: a model on a machine under a user's traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import numpy as np

from analysis.advise.capacity import Search, Setting
from analysis.advise.question import Question
from experiments.records.errors import SpecError
from experiments.records.metrics import Served
from experiments.records.record import Phase
from experiments.records.terminal import paragraph
from experiments.simulator.calibration import Calibration, at_speed
from experiments.simulator.memory import Memory, gpu_memory, vllm_default
from experiments.simulator.scheduler import Rows
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.expand import FEWEST_REQUESTS, Session, Traffic
from experiments.spec.spec import EngineSettings, ServingFigure, load_figure
from experiments.spec.traces import Trace, describe_trace
from experiments.spec.workload import check_requests, choose_trace, serving_requests

SMALL = 512  # tokens; below, tables of experts are known to be off by more
FIRST = 4  # seeds on which settings are compared
LEAST = 1024  # requests of a trial, at first
SEEDS_AGAIN = 16  # where a trace is drawn again: they tell how far it is from the traffic that it is a sample of


@dataclass(frozen=True)
class Case:
    """A model on a machine, as `session` has them, under a user's requests.

    `requests`: how many a simulation serves; `max_total`: prompt + output in the trace's tokens, before the session's scale.
    """

    session: Session
    calibration: Calibration
    trace: Trace = field(repr=False)
    requests: int
    max_total: int
    seeds: tuple[int, ...]
    warm_up: int = 0  # more requests, that come first and are left out
    hit: float = 0.0  # of each prompt, found in a prefix cache
    running: Setting | None = None  # of the server that the calibration was scaled to

    def lasting(self, requests: int) -> Case:
        """With trials of so many requests, after a warm-up: an eighth as many, and all who begin a closed loop at once."""
        return replace(self, requests=requests, warm_up=max(requests // 8, 2 * self.session.traffic.users))

    @property
    def sampled(self) -> float:
        """Where a trace is drawn again: of the variance over seeds, the share that is due to the trace, a sample as well."""
        return self.requests / (self.requests + len(self.trace.prompt)) if self.session.traffic.again else 0.0

    @property
    def model(self) -> str:
        """The figure's name of it."""
        return self.session.model

    @property
    def settings(self) -> EngineSettings:
        """Of the engine; chunk size and batch are what is looked for."""
        return self.session.engine

    @property
    def off(self) -> float:
        """How far off simulated times may be, relative: on held-out steps or, where more is known, on whole requests."""
        error = self.calibration.error
        return max(error.held_out, error.end_to_end or 0.0)

    def slower(self, factor: float) -> Case:
        """With every step longer by the factor, or shorter; small ones by what is known of them, where that is worse."""
        known, small = at_speed(self.calibration, 1 / factor), 1 + (self.calibration.error.small_steps or 0.0)
        more = max(small, factor) / factor if factor > 1 else min(1 / small, factor) / factor
        pairs = zip(known.linear.at, known.linear.seconds, strict=True)
        linear = replace(known.linear, seconds=tuple(s * (more if n < SMALL else 1.0) for n, s in pairs))
        return replace(self, calibration=replace(known, linear=linear))

    def settings_of(self, setting: Setting) -> EngineSettings:
        """The engine's with that chunk size and batch."""
        return replace(self.settings, max_budget=setting.budget, max_batch=setting.max_batch)

    def memory(self, setting: Setting) -> Memory:
        """Of a GPU that is not here. Raises SpecError where this setting leaves no KV cache."""
        return gpu_memory(self.settings_of(setting), self.calibration.device_memory_bytes or 0.0)

    def fits(self, setting: Setting) -> bool:
        """Whether the memory of a GPU that is not here allows it; elsewhere the engine says."""
        with suppress(SpecError):
            return not self.calibration.gpu or self.memory(setting).blocks > 0
        return False

    @property
    def default(self) -> Setting | None:
        """What the answer is compared with: as the server runs now, or what vLLM takes on this GPU where it is told nothing."""
        if self.running:
            return self.running
        gpu, reported = self.calibration.gpu, self.calibration.device_memory_bytes or 0.0
        return Setting(*vllm_default(gpu, reported, self.settings.max_model_len)) if gpu else None

    def search(self, question: Question) -> Search:
        """Capacities by simulation, of loads and latencies as they are asked for."""
        return Search(lambda setting, rate, seed: question.latency(self.served(setting, rate, seed)))

    @cached_property
    def served(self) -> Callable[[Setting, float, int], Served]:
        """What the requests see, simulated: setting, rate in requests/s, seed."""

        @cache
        def engine(setting: Setting, seed: int) -> SimulatedEngine:
            return SimulatedEngine(self.settings_of(setting), self.calibration, seed)

        @cache
        def asked(seed: int) -> Rows:
            count, session = self.warm_up + self.requests, self.session
            drawn = serving_requests(self.trace, 1.0, count, seed, self.max_total, session.scale, session.traffic)
            rows = engine(self.settings_to_try()[0], seed).requests(Phase(1, drawn))
            rows["cached_tokens"] = np.minimum(self.hit * rows["prompt_tokens"], rows["prompt_tokens"] - 1)
            rows["computed"] = rows["cached_tokens"]
            return rows

        def serve(setting: Setting, rate: float, seed: int) -> Served:
            requests = asked(seed).copy()  # all arrivals by a factor sooner or later, as serving_requests draws them
            requests["arrival_s"] /= rate
            requests["budget"] = setting.budget
            return engine(setting, seed).served(requests, self.warm_up)

        return serve

    @property
    def largest(self) -> int:
        """The largest step of interest, tokens: a whole prompt, room for one beside the decodes, or what is covered."""
        return min(max(self.settings.max_model_len, 2 * self.settings.max_batch), self.calibration.valid.tokens)

    def settings_to_try(self) -> list[Setting]:
        """Chunk sizes that double from twice the most requests in a step, so that decodes leave half of it, to unchunked."""
        batch, last = self.settings.max_batch, self.largest
        sizes = [batch * 2**n for n in range(1, (last // batch).bit_length()) if batch * 2**n < last]
        return [setting for size in (*sizes, last) if self.fits(setting := Setting(size, batch))] or [Setting(last, batch)]

    def beside(self, setting: Setting) -> set[Setting]:
        """The settings next to this one: chunk sizes half an octave apart, most requests in a step an octave."""
        base, most = self.settings.max_batch, self.calibration.valid.tokens
        octaves = [base * 2.0**n for n in range(-base.bit_length(), (most // base).bit_length())]
        sizes = {int(size * part) for size in octaves for part in (1, 1.5)} | {self.largest, setting.budget}
        near = [setting.budget, *around(setting.budget, sorted(sizes))]
        batches = [setting.max_batch, setting.max_batch // 2, 2 * setting.max_batch]
        pairs = {Setting(size, batch) for size in near for batch in batches if 1 <= batch <= base and 2 * batch <= size <= most}
        return {pair for pair in pairs - {setting} if self.fits(pair)}


def case_for(session: Session, calibration: Calibration, trace: Trace, max_total: int) -> Case:
    """With the seeds of Figure 9b, and its requests as far as the trace has them."""
    figure = load_figure("fig9b")
    assert isinstance(figure, ServingFigure)
    return Case(session, calibration, trace, min(figure.requests, len(trace.prompt)), max_total, figure.seeds[:FIRST])


def requests_asked(text: str | None, max_total: int, scale: int = 1) -> Trace:
    """The requests of TRACE, said; lengths are divided by the scale here. Raises SpecError where they are too few."""
    trace = choose_trace(text, max_total=max_total)
    paragraph(f"{describe_trace(trace)}{f'; lengths divided by {scale} here' if scale > 1 else ''}")
    check_requests(trace, FEWEST_REQUESTS, "or there is no percentile to speak of")
    return trace


def under(case: Case, question: Question) -> Case:
    """The case in the traffic that is asked about, as recorded where that is known. A user's own requests are drawn again."""
    trace, first = case.trace, case.seeds[0]
    recorded = trace.arrivals is not None and trace.arrivals[-1] > 0
    traffic = question.traffic or Traffic("trace" if recorded else "poisson")
    if traffic.arrivals == "trace" or trace.kind == "file":
        case = replace(case, seeds=tuple(range(first, first + SEEDS_AGAIN)))
        traffic = replace(traffic, again=True)
    return replace(case, session=replace(case.session, traffic=traffic), hit=question.hit).lasting(LEAST)


def around(budget: int, tried: Sequence[int]) -> list[int]:
    """The chunk sizes of the sweep that are next to this one."""
    return [*[size for size in tried if size < budget][-1:], *[size for size in tried if size > budget][:1]]


def evidence(case: Case) -> str:
    """What a simulated answer rests on."""
    error = f"step times off by {case.calibration.error.held_out:.1%} on held-out data"
    again = f", drawn again of its {len(case.trace.prompt)}" if case.session.traffic.again else ""
    left = f" after {case.warm_up} left out" if case.warm_up else ""
    served = f"{case.requests} requests of trace {case.trace.name}{again}{left}, {arriving(case)}, {len(case.seeds)} seeds"
    hit = f"; HIT={case.hit:g}: so much of every prompt is found in the prefix cache" if case.hit else ""
    return f"SIMULATED with calibration {case.calibration.calibration} ({case.calibration.title}), {error}; {served}{hit}"


def arriving(case: Case) -> str:
    """How the requests arrive, in words."""
    traffic = case.session.traffic
    if traffic.arrivals == "trace":
        return f"arrivals as recorded (CV of the gaps {case.trace.gap_cv:.3g})"
    known = {"gamma": f"gamma arrivals (CV {traffic.number:g})", "closed": f"{traffic.users} users in a closed loop"}
    return known.get(traffic.arrivals, "Poisson arrivals")
