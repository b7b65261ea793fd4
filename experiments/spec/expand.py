"""Figure x testbed -> sessions -> trials -> points, in the units of the machine. Pure: nothing is run here."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from experiments.records.errors import SpecError
from experiments.spec.spec import EngineSettings, Figure, Panel, PrefillFigure, ServingFigure, Testbed, load_model, name_of

REPEAT = "-repeat"  # suffix of the first trial when it is run again at the end of its session
SATURATION = "saturation"  # the trial that measures a model's saturation throughput
SATURATION_BATCHES = 6  # full batches of requests that it serves: with fewer than one the engine is never full
STEPS_PER_REQUEST = 50  # of the traces, roughly
FEWEST_REQUESTS = 16  # with some 30 tokens each, about 500 gaps for a P99


@dataclass(frozen=True)
class Point:
    """One (prompt length, chunk size) of 9a in the paper's units; `prompt_tokens` and `budget` are what is run, in tokens."""

    prompt_length: int
    chunk_size: int | None
    prompt_tokens: int
    budget: int


@dataclass(frozen=True)
class LoadPoint:
    """One (QPS, chunk size) of 9b in the paper's units; `rate` (requests per second) and `budget` (tokens) are what is run.

    qps 0 and rate 0 stand for saturation: all requests arrive at once.
    """

    qps: float
    chunk_size: int | None
    rate: float
    budget: int
    requests: int
    max_total: int  # tokens of prompt and output together, in the paper's units


@dataclass(frozen=True)
class Traffic:
    """How a trial's requests are drawn of a trace, and when they arrive. As it is: those of Figure 9b.

    poisson: see workload.poisson_arrivals. gamma: gaps of a gamma distribution with this CV (standard deviation over mean).
    trace: as recorded, drawn again. closed: so many users, each of whom asks again when served. `again`: requests are drawn
    with replacement, as from a sample of what comes.
    """

    arrivals: Literal["poisson", "gamma", "trace", "closed"] = "poisson"
    number: float = 0.0  # gamma: CV; closed: users
    again: bool = False

    @property
    def users(self) -> int:
        """Of a closed loop, else 0."""
        return round(self.number) if self.arrivals == "closed" else 0


AS_PUBLISHED = Traffic()


@dataclass(frozen=True)
class Trial:
    """What a session runs and stores at a time: points in the order they are run."""

    name: str
    points: tuple[Point | LoadPoint, ...]


@dataclass(frozen=True)
class Session:
    """One fresh engine process with one model loaded, for one model and seed."""

    name: str
    figure: str
    kind: str
    testbed: str
    model: str
    in_paper: bool
    scale: int
    seed: int
    engine: EngineSettings
    trials: tuple[Trial, ...] = field(repr=False)
    time_limit_s: float = 1800.0  # of a pass of 9a, which takes a minute at most; 9b states its own
    estimate_s: float = 0.0
    memory_gib: float = 0.0  # that it takes of its node
    traffic: Traffic = AS_PUBLISHED  # of a serving figure
    nvlink: bool = True  # whether its GPUs, where it has several, must be joined by it


def expand(
    figure: Figure, testbed: Testbed, replicates: int | None = None, saturation: Mapping[str, float] | None = None
) -> list[Session]:
    """All sessions of a figure on a testbed, longest first.

    saturation: model -> requests per second, for a serving figure on a testbed that maps QPS to fractions of it; None leaves
    the rates at 0, good for plans only. Raises SpecError for what cannot be run.
    """
    count = replicates if replicates is not None else figure.replicates or testbed.replicates
    if not 1 <= count <= len(figure.seeds):
        name = "replicates" if replicates is None else "REPLICATES"
        raise SpecError(f"{name}: got {count}; allowed: 1 to {len(figure.seeds)}, the seeds of {figure.figure}")
    sessions: list[Session] = []
    for number, model in enumerate(panel.model for panel in figure.panels):
        if model in testbed.models:
            for seed in figure.seeds[:count]:
                sessions += _panel_sessions(figure, number, testbed, seed, (saturation or {}).get(model, 0.0))
    if not sessions:
        wanted = ", ".join(panel.model for panel in figure.panels)
        raise SpecError(f"{testbed.testbed}.models: none of {figure.figure}'s models ({wanted})")
    return sorted(sessions, key=lambda session: -session.estimate_s)


def saturation_requests(figure: ServingFigure, testbed: Testbed) -> int:
    """How many requests a saturation trial serves."""
    return min(SATURATION_BATCHES * max(1, figure.max_batch // testbed.scale), figure.requests)


def saturation_sessions(figure: Figure, testbed: Testbed) -> list[Session]:
    """One session per model, to measure its saturation throughput at the smallest chunk size; none where it is not needed."""
    if not isinstance(figure, ServingFigure) or testbed.serving is None:
        return []
    sessions, longest = [], figure.max_model_len
    for panel in (panel for panel in figure.panels if panel.model in testbed.models):
        size = min(panel.chunk_sizes, key=lambda size: size or longest)
        budget = _scaled(size or longest, testbed, f"{figure.figure}: {panel.model}.chunk_sizes")
        point = LoadPoint(0.0, size, 0.0, budget, saturation_requests(figure, testbed), longest)
        trial, name = Trial(SATURATION, (point,)), f"{panel.model}-{SATURATION}"
        sessions.append(_session(figure, panel, testbed, figure.seeds[0], (trial,), name))
    return sessions


def _panel_sessions(figure: Figure, number: int, testbed: Testbed, seed: int, saturation: float) -> list[Session]:
    """The sessions of one model and seed: one, or one per chunk size where the engine must not switch it. Each runs its first
    trial again at the end, so that an order effect shows.

    Every second seed runs the order of the seed before it backwards, so that what a steady drift does to one it undoes in the
    other. With an order drawn afresh for each seed, drift alone gave up to 5 % wrong verdicts where 2.5 % are allowed.
    """
    panel, index = figure.panels[number], figure.seeds.index(seed)
    name, direction = f"{panel.model}-seed{seed}", -1 if index % 2 else 1
    order = random.Random(f"{figure.figure}/{panel.model}-seed{figure.seeds[index - index % 2]}")
    if isinstance(figure, PrefillFigure):
        points = _prefill_points(figure, number, testbed)
        orders = [order.sample(points, len(points))[::direction] for _ in range(figure.requests_per_point)][::direction]
        groups = {name: [Trial(f"pass-{number}", tuple(drawn)) for number, drawn in enumerate(orders)]}
    else:
        trials = _serving_trials(figure, number, testbed, saturation)
        if testbed.switch_chunk_size:
            groups = {name: order.sample(trials, len(trials))[::direction]}
        else:
            sizes = order.sample(panel.chunk_sizes, len(panel.chunk_sizes))[::direction]
            groups = {f"{name}-chunk{n or 'none'}": [t for t in trials if t.points[0].chunk_size == n] for n in sizes}
    again = {name: (*own, Trial(own[0].name + REPEAT, own[0].points)) for name, own in groups.items()}
    return [_session(figure, panel, testbed, seed, own, name) for name, own in again.items()]


def _session(figure: Figure, panel: Panel, testbed: Testbed, seed: int, trials: tuple[Trial, ...], name: str) -> Session:
    model = testbed.models[panel.model]
    tensor_parallel = testbed.tensor_parallel or panel.tensor_parallel
    if load_model(model)["num_key_value_heads"] % tensor_parallel:
        raise SpecError(f"{testbed.testbed}: tensor_parallel {tensor_parallel} does not divide {panel.model}'s KV heads")
    points = [point for trial in trials for point in trial.points]
    budgets = [point.budget for point in points]
    if min(budgets) < figure.max_batch // testbed.scale:
        raise SpecError(
            f"{figure.figure}: {panel.model}.chunk_sizes: got {min(budgets) * testbed.scale}; allowed: at least max_batch "
            f"({figure.max_batch}), or decodes alone could fill a step and starve the rest"
        )
    lengths = [point.prompt_tokens + 1 for point in points if isinstance(point, Point)]
    same = ("platform", "dtype", "weights", "threads", "kv_cache_gib", "gpu_memory_utilization")
    engine = EngineSettings(
        model=model,
        tensor_parallel=tensor_parallel,
        max_budget=max(budgets),
        max_batch=max(1, figure.max_batch // testbed.scale),
        max_model_len=max(lengths, default=figure.max_model_len // testbed.scale),
        calibration=(testbed.calibrations or {}).get(panel.model),
        **{name: getattr(testbed, name) for name in same},
    )
    return Session(
        name=name,
        figure=figure.figure,
        kind=figure.kind,
        testbed=testbed.testbed,
        model=panel.model,
        in_paper=panel.in_paper,
        scale=testbed.scale,
        seed=seed,
        engine=engine,
        trials=trials,
        time_limit_s=(testbed.serving or figure).time_limit_s if isinstance(figure, ServingFigure) else Session.time_limit_s,
        estimate_s=_estimate(trials, testbed),
        memory_gib=testbed.session_memory_gib,
        nvlink=testbed.nvlink,
    )


def _scaled(value: int, testbed: Testbed, what: str) -> int:
    if value % testbed.scale or value < testbed.scale:
        raise SpecError(f"{what}: got {value}, which the scale of testbed {testbed.testbed} ({testbed.scale}) does not divide")
    return value // testbed.scale


def _prefill_points(figure: PrefillFigure, number: int, testbed: Testbed) -> list[Point]:
    panel, most = figure.panels[number], testbed.max_prompt_length
    where, lengths = f"{figure.figure}: {panel.model}", [n for n in panel.prompt_lengths if n <= (most or n)]
    if not lengths:
        raise SpecError(f"{where}: no prompt length is within max_prompt_length {most} of {testbed.testbed}")
    if min(lengths) < 2 * testbed.scale or max(lengths) > figure.max_model_len:
        allowed = f"{2 * testbed.scale} to max_model_len ({figure.max_model_len})"
        raise SpecError(f"{where}.prompt_lengths: got {lengths}; allowed: {allowed}")
    points = []
    for length in lengths:
        tokens = _scaled(length, testbed, f"{where}.prompt_lengths") - 1
        for size in panel.chunk_sizes:
            points.append(Point(length, size, tokens, _scaled(size or max(lengths), testbed, f"{where}.chunk_sizes")))
    return points


def _serving_trials(figure: ServingFigure, number: int, testbed: Testbed, saturation: float) -> list[Trial]:
    """A trial for each (QPS, chunk size). Rate and number of requests depend on the QPS alone, so chunk sizes are paired."""
    panel, mapped, longest = figure.panels[number], testbed.serving, figure.max_model_len
    where = f"{figure.figure}: {panel.model}"
    fractions = sorted(mapped.load_fractions.get(panel.model, ())) if mapped else []
    if mapped and len(fractions) != len(panel.qps):
        came = f"{testbed.testbed}.serving.load_fractions: got {len(fractions)} for {panel.model}"
        raise SpecError(f"{came}; allowed: {len(panel.qps)}, one for each QPS of {where}")
    trials = []
    for rank, qps in enumerate(sorted(panel.qps)):
        rate, requests = qps, figure.requests
        if mapped:
            rate = round(saturation * fractions[rank], 4)
            requests = min(figure.requests, max(FEWEST_REQUESTS, round(rate * mapped.trial_seconds)))
        for size in panel.chunk_sizes:
            budget = _scaled(size or longest, testbed, f"{where}.chunk_sizes")
            point = LoadPoint(qps, size, rate, budget, requests, longest)
            trials.append(Trial(f"qps{name_of(qps)}-chunk{size or 'none'}", (point,)))
    return trials


def _estimate(trials: Sequence[Trial], testbed: Testbed) -> float:
    """Rough seconds of a session: load + steps + prompt tokens for prefill, its first trial twice to warm up; arrivals for
    serving; for plans only."""
    cost = testbed.estimate
    seconds = [cost.load_s]
    warm_up = [point for point in trials[0].points if isinstance(point, Point)]
    for point in (*warm_up, *(point for trial in trials for point in trial.points)):
        if isinstance(point, Point):
            seconds.append(-(-point.prompt_tokens // point.budget) * cost.step_s + point.prompt_tokens * cost.token_s)
        elif testbed.platform == "simulated":
            seconds.append(point.requests * STEPS_PER_REQUEST * cost.step_s)  # to compute, whatever the virtual time
        else:
            seconds.append(testbed.serving.trial_seconds * 1.2 if testbed.serving else point.requests / point.rate * 1.1)
    return math.fsum(seconds)  # the same in whatever order
