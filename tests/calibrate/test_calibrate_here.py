"""Calibration of this machine: the fit against known engines, real steps left to `make calibrate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from known_engine import DECODING, KNOWN, SETTINGS

from experiments.calibrate import fit
from experiments.calibrate import here as calibrate_here
from experiments.calibrate.published import write
from experiments.engine.session import phases_of
from experiments.records.errors import SpecError
from experiments.records.record import STEP_COLUMNS, Phase
from experiments.simulator import estimate
from experiments.simulator.calibration import Calibration, Jitter, load_calibration
from experiments.simulator.cost_model import CostModel
from experiments.simulator.memory import GIB, gpu_memory
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.expand import expand
from experiments.spec.spec import EngineSettings, load_figure, load_testbed
from experiments.spec.workload import synthetic_trace


@contextmanager
def known_engines(settings: list[EngineSettings], _environment: dict[str, str]) -> Iterator[list[Any]]:
    """Stands in for engine_process.engines: the known engine in this process."""
    yield [partial(_call, SimulatedEngine(settings[0], KNOWN, seed=5))]


def _call(engine: SimulatedEngine, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(engine, *arguments)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_here, "engines", known_engines)
        path = calibrate_here.calibrate(SETTINGS, DECODING, "cpu", tmp_path_factory.mktemp("here"))
    return load_calibration(str(path))


def test_a_short_run_finds_a_known_engine(found: Calibration) -> None:
    assert found.loop.between_s == pytest.approx(KNOWN.loop.between_s, rel=0.01)
    assert found.loop.request_s == pytest.approx(KNOWN.loop.request_s, rel=0.1)
    assert found.loop.wake_s == pytest.approx(KNOWN.loop.wake_s, rel=0.1)
    assert found.jitter.sigma == pytest.approx(KNOWN.jitter.sigma, rel=0.15)
    assert found.jitter.decode_sigma == pytest.approx(KNOWN.jitter.decode_sigma, rel=0.15)
    assert found.error.held_out < 0.07
    assert found.block_size == 128
    for step in ((2047, 0, 1, 2047 * 1024, 0), (48, 16, 1, 48 * 500, 16 * 300), (0, 1, 0, 0, 200), (0, 16, 0, 0, 16 * 1000)):
        assert CostModel(found).step(*step) == pytest.approx(CostModel(KNOWN).step(*step), rel=0.08)


def test_the_calibration_covers_what_the_testbed_asks() -> None:
    """Within the range of the longest prompts and the fullest batch there can be."""
    for settings, decoding in calibrate_here.settings_of(load_testbed("cpu")).values():
        known = replace(KNOWN, models=(settings.model,))
        engine = SimulatedEngine(settings, known, seed=1)
        phases = calibrate_here.calibration_phases(settings, decoding, *calibrate_here._kv_cache(engine))
        record = engine.run(phases, 1e9)
        steps, paused, _ = fit.observed(record)
        valid = fit.fit_records(steps, settings, "x", "x", "x", 128).valid
        longest, budget, batch = settings.max_model_len, settings.max_budget, settings.max_batch
        last = min(budget, longest - 1)  # tokens of the largest step
        assert valid.tokens == last
        assert valid.decode_tokens == batch
        assert valid.prefill_pairs >= last * (longest - 1 - last) + last * (last + 1) // 2
        assert valid.decode_context >= batch * (decoding - 1)
        assert len(paused) >= 10
        assert record.steps["seconds"].sum() < 30  # at this made-up engine's speed, much like a real one's


def test_first_steps_of_a_shape_and_after_a_pause_stand_apart() -> None:
    record = SimulatedEngine(SETTINGS, replace(KNOWN, jitter=Jitter(0.0)), seed=1).run(
        [Phase(64, calibrate_here.calibration_phases(SETTINGS, DECODING, 1000, 128)[0].requests[:1])] * 2, 1e9
    )
    warm, paused, loop = fit.observed(record)
    tokens = record.steps["prefill_tokens"] + record.steps["decode_tokens"]
    assert len(warm) == len(record.steps) - tokens.nunique()
    assert not len(paused)
    assert (loop.between_s, loop.request_s, loop.wake_s) == (pytest.approx(4e-5), pytest.approx(5e-4), 0.0)


def test_a_calibration_holds_where_it_was_made(found: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "HERE", tmp_path)
    assert estimate.calibration_here("cpu", SETTINGS) is None
    write(found, tmp_path / "cpu-mistral-7b-w8.yaml")
    assert estimate.calibration_here("cpu", SETTINGS) == tmp_path / "cpu-mistral-7b-w8.yaml"
    assert estimate.calibration_here("cpu", replace(SETTINGS, threads=2)) is None
    assert estimate.calibration_here("cpu", replace(SETTINGS, model="yi-34b-w8")) is None
    monkeypatch.setattr(estimate, "machine", lambda: {"type": "another"})
    assert estimate.calibration_here("cpu", SETTINGS) is None


def test_a_simulated_testbed_has_no_engine_to_calibrate(capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate_here.main(["--testbed", "a100-sim"]) == 2
    assert capsys.readouterr().err == "error: --testbed: got a100-sim, which has no engine; allowed: a testbed with one\n"


@pytest.mark.parametrize(("option", "lines"), [("--json", 1), ("--quiet", 0)])
def test_the_command_speaks_json_or_not_at_all(
    option: str, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(KNOWN, path := tmp_path / "known.yaml")
    monkeypatch.setattr(calibrate_here, "calibrate", lambda *_: path)
    assert calibrate_here.main(["--testbed", "cpu", option]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == lines
    assert all(json.loads(line)["calibrations"][SETTINGS.model]["path"] == str(path) for line in told)


def records(count: int, seed: int, late: float = 0.0) -> pd.DataFrame:
    """Steps of a known engine with jitter of 5 %."""
    rng = np.random.default_rng(seed)
    prefill = rng.integers(0, 2, count) * rng.integers(1, 500, count)
    decodes = rng.integers(1, 17, count)
    pairs = prefill * rng.integers(0, 1000, count) + prefill * (prefill + 1) // 2
    context = decodes * rng.integers(1, 1000, count)
    seconds = 2e-3 + 4e-5 * (prefill + decodes) + 2e-8 * pairs + 1e-4 * decodes + 1e-7 * context
    seconds *= np.exp(rng.normal(0.0, 0.05, count)) * np.where(rng.random(count) < late, 4.0, 1.0)
    steps = pd.DataFrame(0, index=range(count), columns=list(STEP_COLUMNS)).astype(STEP_COLUMNS)
    filled = {"seconds": seconds, "prefill_tokens": prefill, "decode_tokens": decodes, "prefill_pairs": pairs}
    return steps.assign(**filled, decode_context=context, prefill_requests=(prefill > 0).astype(np.int64))


@pytest.mark.parametrize("late", [0.0, 0.02])
def test_fit_finds_a_known_engine(late: float, tmp_path: Path) -> None:
    fitted = fit.fit_records(records(1500, 1, late), SETTINGS, "here", "this machine", "600 made-up steps", block_size=128)
    unseen = records(1500, 2).query("prefill_pairs <= @fitted.valid.prefill_pairs")
    unseen = unseen.query("prefill_tokens + decode_tokens <= @fitted.valid.tokens")
    unseen = unseen.query("decode_context <= @fitted.valid.decode_context")
    predicted = CostModel(fitted).seconds(unseen)
    seconds = unseen["seconds"].to_numpy()
    assert predicted.sum() == pytest.approx(seconds.sum(), rel=0.02)
    assert np.abs(predicted / seconds - 1).mean() < 0.05  # jitter alone: 0.04
    assert fitted.jitter.sigma == pytest.approx(0.05, rel=0.15)
    assert fitted.jitter.tail_share == pytest.approx(late, abs=0.01)
    assert fitted.error.held_out < 0.06 + 3 * late
    path = tmp_path / "here.yaml"
    write(fitted, path)
    assert load_calibration(str(path)) == fitted


def test_fit_refuses_what_it_cannot_fit() -> None:
    steps = records(100, 1)
    with pytest.raises(SpecError, match=r"fit_records: x: got 59 steps, .* allowed: at least 60"):
        fit.fit_records(steps[:59], SETTINGS, "here", "t", "x", 16)
    with pytest.raises(SpecError, match=r"got 100 steps, 0 with prefill, 100 with decodes; allowed"):
        fit.fit_records(steps.assign(prefill_tokens=0), SETTINGS, "here", "t", "x", 16)


def test_noise_does_not_make_the_prediction_too_short() -> None:
    steps = records(1500, 1)
    steps["seconds"] *= np.exp(np.random.default_rng(3).normal(0.0, 0.25, len(steps)))
    fitted = CostModel(fit.fit_records(steps, SETTINGS, "here", "t", "x", 16))
    assert fitted.seconds(steps).sum() == pytest.approx(steps["seconds"].sum(), rel=0.02)


def few_long(factor: float) -> pd.DataFrame:
    """Steps of which the 12 last have more than 256 tokens; they take `factor` times as long."""
    steps = records(1500, 1)
    long = steps["prefill_tokens"] + steps["decode_tokens"] > 256
    few = steps[long][:12]
    return pd.concat([steps[~long], few.assign(seconds=factor * few["seconds"])], ignore_index=True)


def test_the_largest_steps_bend_the_profile_however_few_they_are() -> None:
    """All of them were taken for outliers, and the last piece of the profile then rose by nothing."""
    steps = few_long(1.8)
    fitted, slow = fit.fit_records(steps, SETTINGS, "here", "t", "x", 16), steps[-12:]
    assert np.median(CostModel(fitted).seconds(slow) / slow["seconds"]) == pytest.approx(1.0, abs=0.1)
    largest = fitted.pieces[-1]
    assert (largest.steps, largest.dropped) == (12, 0)
    assert largest.held_out is not None


def test_every_size_is_held_out_and_every_piece_of_the_profile_has_steps() -> None:
    steps = records(1500, 1)
    tokens = steps["prefill_tokens"] + steps["decode_tokens"]
    fitted = fit.fit_records(steps[(tokens <= 64) | (tokens > 256)], SETTINGS, "here", "t", "x", 16)
    assert all(piece.held_out is not None for piece in fitted.pieces if piece.steps > 1)
    assert 128 not in fitted.linear.at, "a bend without steps below it"
    assert sum(piece.steps for piece in fitted.pieces) == int(((tokens <= 64) | (tokens > 256)).sum())


def test_dropped_steps_are_counted_where_they_are() -> None:
    steps = few_long(1.0)
    steps.loc[len(steps) - 12, "seconds"] *= 6  # the first of its size, and so not held out
    before, after = (fit.fit_records(s, SETTINGS, "here", "t", "x", 16).pieces for s in (few_long(1.0), steps))
    assert before[-1].dropped == 0
    assert after[-1].dropped == 1


def test_sizes_of_whose_steps_little_is_known_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []

    def noisy(settings: list[EngineSettings], _environment: dict[str, str]) -> Any:
        engine = SimulatedEngine(settings[0], replace(KNOWN, jitter=Jitter(0.3)), seed=5)

        def call(function: Callable[..., Any], *phases: list[Phase]) -> Any:
            loads.extend(map(len, phases))
            return function(engine, *phases)

        return contextmanager(lambda: iter([[call]]))()

    monkeypatch.setattr(calibrate_here, "engines", noisy)
    calibrate_here.calibrate(SETTINGS, DECODING, "cpu", tmp_path)
    assert len(loads) == 1 + calibrate_here.AGAIN
    assert all(0 < again < loads[0] for again in loads[1:])


def test_a_calibration_that_is_cut_short_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_here, "engines", known_engines)
    monkeypatch.setattr(calibrate_here, "LIMIT_S", 2.0)
    came = r"mistral-7b-w8: its calibration took over 2 s, for \d+ of \d+ loads, so nothing is stored; end what else"
    with pytest.raises(SpecError, match=came):
        calibrate_here.calibrate(SETTINGS, DECODING, "cpu", tmp_path)
    assert not list(tmp_path.iterdir())


GPUS = [  # testbed, model, calibration that its speed is like, how many times slower it is
    ("gpu-24g", "mistral-7b", "a100-mistral-7b", 4.0),
    ("gpu-80g", "mistral-7b", "a100-mistral-7b", 1.0),
    ("gpu-80g-pair", "yi-34b", "a100-yi-34b-tp2", 1.0),
    ("a100", "yi-34b", "a100-2024-yi-34b-tp2", 1.0),
]


@pytest.mark.parametrize(("testbed", "model", "like", "slower"), GPUS)
def test_what_was_calibrated_on_a_gpu_can_be_simulated(
    testbed: str, model: str, like: str, slower: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the time limit, by a stand-in for the GPU; and every step of Figure 9 is in the range that it covers."""
    bed, known = load_testbed(testbed), load_calibration(like)
    settings, decoding = calibrate_here.settings_of(bed)[bed.models[model]]
    blocks = gpu_memory(settings, bed.requires.gpu_memory_gib * GIB).blocks
    parts = {name: getattr(known, name) for name in ("linear", "decode", "host") if getattr(known, name)}
    attention = replace(known.attention, flop_per_s=known.attention.flop_per_s / slower)
    known = replace(
        known,
        overhead_s=slower * known.overhead_s,
        attention=replace(attention, kv_bytes_per_s=attention.kv_bytes_per_s / slower),
        **{name: replace(part, seconds=tuple(slower * s for s in part.seconds)) for name, part in parts.items()},
    )

    def stand_in(settings: list[EngineSettings], _environment: dict[str, str]) -> Any:
        engine = SimulatedEngine(settings[0], known, seed=5, num_kv_blocks=blocks)
        return contextmanager(lambda: iter([[partial(_call, engine)]]))()

    monkeypatch.setattr(calibrate_here, "engines", stand_in)
    monkeypatch.setattr(calibrate_here, "environment_here", lambda *_: {})  # this machine has no GPU
    found = load_calibration(str(calibrate_here.calibrate(settings, decoding, testbed, tmp_path)))
    assert found.kv_blocks == blocks
    assert found.error.held_out < 0.1
    for figure in ("fig9a", "fig9b"):
        for session in (s for s in expand(load_figure(figure), bed, 1, {model: 1.0}) if s.model == model):
            engine = SimulatedEngine(session.engine, found, seed=1)
            assert engine.facts["kv_blocks"] == blocks
            phases, _ = phases_of(session, session.trials[0], synthetic_trace())
            assert not engine.run(phases, 1e9).truncated


def test_a_calibration_on_a_gpu_is_of_a_share_of_its_memory() -> None:
    settings, _ = calibrate_here.settings_of(load_testbed("gpu-80g"))["mistral-7b"]
    assert estimate.made_on(settings) != estimate.made_on(replace(settings, gpu_memory_utilization=0.9))


def test_where_each_chunk_size_has_its_engine_the_largest_is_calibrated() -> None:
    settings, decoding = calibrate_here.settings_of(load_testbed("a100"))["yi-34b"]
    assert (settings.max_budget, settings.max_model_len, decoding) == (2048, 8192, 8192)
    budgets = {phase.budget for phase in calibrate_here.calibration_phases(settings, decoding, 17095, 16)}
    assert budgets >= {512, 1024, 2048}


@pytest.mark.parametrize(
    ("testbed", "model", "like"),
    [("a100", "yi-34b", "a100-2024-yi-34b-tp2"), ("gpu-24g", "mistral-7b", "a100-mistral-7b")],
)
def test_a_testbed_declares_the_preemptions_that_simulation_shows(testbed: str, model: str, like: str) -> None:
    """Undeclared they are a broken gate, after hours on GPUs."""
    bed = load_testbed(testbed)
    sessions = [session for session in expand(load_figure("fig9b"), bed, 1, {model: 1.8}) if session.model == model]
    session = max(sessions, key=lambda session: session.engine.max_budget)
    trial = max(session.trials, key=lambda trial: trial.points[0].qps)  # type: ignore[union-attr]
    phases, _ = phases_of(session, trial, synthetic_trace())
    blocks = gpu_memory(session.engine, bed.requires.gpu_memory_gib * GIB).blocks
    record = SimulatedEngine(session.engine, load_calibration(like), session.seed, blocks).run(phases, 1e9)
    assert record.steps["preempted"].sum() > 0
    assert bed.may_preempt
