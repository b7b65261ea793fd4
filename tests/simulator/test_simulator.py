"""The virtual clock: timelines by hand, queueing laws, determinism; compiled and in plain Python."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.records.errors import SpecError
from experiments.records.metrics import gap_percentile, served_of, serving_metrics
from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS, Phase, Record, Request
from experiments.simulator import scheduler, simulator
from experiments.simulator.calibration import (
    Attention,
    Calibration,
    FitError,
    Jitter,
    Loop,
    Profile,
    ValidRange,
    load_calibration,
)
from experiments.simulator.simulator import SimulatedEngine, drawn_jitter
from experiments.spec.spec import EngineSettings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = EngineSettings("cuda", "mistral-7b", 1, "float16", "dummy", 2048, 128, 8192, None, None, 0.85)
ASKED = ("tbt_p99", "tbt_p50", "ttft_p50", "ttft_p90", "delay_p50")
TOY = Calibration(  # a step takes 1 s, 10 ms per token, 1 us per pair and 1 ms per token of decode context
    calibration="toy",
    title="a toy",
    models=("mistral-7b",),
    tensor_parallel=1,
    sources=("made up",),
    overhead_s=1.0,
    linear=Profile((1, 2049), (0.01, 20.49)),
    decode=Profile((0, 128), (0.0, 0.0)),
    attention=Attention(flop_per_pair=1.0, flop_per_s=1e6, masked_share=0.0, kv_bytes_per_token=1.0, kv_bytes_per_s=1e3),
    jitter=Jitter(0.0),
    valid=ValidRange(tokens=2048, decode_tokens=128, prefill_pairs=10**9, decode_context=10**6),
    error=FitError(0.0, 0.0, 0.0, "nothing"),
    block_size=16,
    fixed_by={},
    device_memory_bytes=80e9,
)


def simulate(requests: Sequence[Request], budget: int = 512, blocks: int = 10_000, calibration: Calibration = TOY) -> Record:
    engine = SimulatedEngine(SETTINGS, calibration, seed=3, num_kv_blocks=blocks)
    return engine.run([Phase(budget, tuple(requests))], 1e9)


def percentiles(engine: SimulatedEngine, phase: Phase) -> list[float]:
    return [*map(engine.served(engine.requests(phase)).percentile, ASKED)]


def poisson(rate: float, count: int, seed: int, prompt: int = 900, output: int = 120) -> list[Request]:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    lengths = zip(arrivals, rng.integers(1, prompt, count).tolist(), rng.integers(1, output, count).tolist(), strict=True)
    return [Request(*row) for row in lengths]


def test_single_request_by_hand() -> None:
    """100 prompt tokens in chunks of 64 at 5 s, 3 output tokens: two prefill steps, then two decodes."""
    record = simulate([Request(5.0, 100, 3)], budget=64)
    pairs = (64 * 65 // 2, 36 * 64 + 36 * 37 // 2)
    durations = [1.64 + pairs[0] * 1e-6, 1.36 + pairs[1] * 1e-6, 1.01 + 0.101, 1.01 + 0.102]
    assert record.steps["seconds"].tolist() == pytest.approx(durations, rel=1e-12)
    ends = 5.0 + np.cumsum(durations)
    assert record.steps["start_s"].tolist() == pytest.approx([5.0, *ends[:-1]], rel=1e-12)
    assert record.tokens["time_s"].tolist() == pytest.approx(ends[1:].tolist(), rel=1e-12)
    assert record.steps["prefill_tokens"].tolist() == [64, 36, 0, 0]
    assert record.steps["prefill_requests"].tolist() == [1, 1, 0, 0]
    assert record.steps["prefill_pairs"].tolist() == [*pairs, 0, 0]
    assert record.steps["decode_tokens"].tolist() == [0, 0, 1, 1]
    assert record.steps["decode_context"].tolist() == [0, 0, 101, 102]
    assert record.requests.to_dict("records") == [
        {
            "request": 0,
            "phase": 0,
            "budget": 64,
            "arrival_s": 5.0,
            "injected_s": 5.0,
            "prompt_tokens": 100,
            "output_tokens": 3,
            "generated_tokens": 3,
            "first_step": 0,
            "last_step": 3,
            "cached_tokens": 0,
        }
    ]


def test_arrival_waits_for_the_step_boundary() -> None:
    """The second request comes while the first step runs (0 to 1.10 s): it enters when that ends, and both share a step."""
    record = simulate([Request(0.0, 10, 2), Request(0.5, 20, 1)])
    first = 1.10 + 55e-6
    assert record.requests["injected_s"].tolist() == pytest.approx([0.0, first])
    assert record.steps["prefill_tokens"].tolist() == [10, 20]
    assert record.steps["decode_tokens"].tolist() == [0, 1]
    assert record.tokens["request"].tolist() == [0, 0, 1]
    at_boundary = simulate([Request(0.0, 10, 2), Request(float(record.steps["start_s"][1]), 20, 1)])
    assert at_boundary.requests["injected_s"][1] == record.steps["start_s"][1]


def test_what_the_loop_adds_by_hand() -> None:
    """Entering takes 0.1 s each, a step is followed by 0.01 s, and the first after a pause takes 0.5 s longer."""
    loop = Loop(between_s=0.01, request_s=0.1, wake_s=0.5)
    requests = [Request(0.0, 10, 2), Request(0.0, 10, 1), Request(10.0, 10, 1), Request(10.05, 10, 1)]
    record = simulate(requests, calibration=replace(TOY, loop=loop))
    first, second, cold, last = 1.20 + 110e-6, 1.01 + 0.011, 1.6 + 55e-6, 1.1 + 55e-6
    assert record.requests["injected_s"].tolist() == pytest.approx([0.0, 0.1, 10.0, 10.1 + cold + 0.01])
    assert record.steps["seconds"].tolist() == pytest.approx([first, second, cold, last])
    starts = [0.2, 0.2 + first + 0.01, 10.1, 10.2 + cold + 0.01]
    assert record.steps["start_s"].tolist() == pytest.approx(starts)
    ends = [starts[0] + first, starts[0] + first, starts[1] + second, starts[2] + cold, starts[3] + last]
    assert record.tokens["time_s"].tolist() == pytest.approx(ends)


def test_phases_follow_each_other() -> None:
    engine = SimulatedEngine(SETTINGS, TOY, seed=1)
    record = engine.run([Phase(64, (Request(0.0, 64, 1),)), Phase(32, (Request(2.0, 64, 1),))], 1e9)
    end = 1.64 + 2080e-6
    assert record.requests["arrival_s"].tolist() == pytest.approx([0.0, end + 2.0])
    assert record.steps["budget"].tolist() == [64, 32, 32]
    assert record.requests["phase"].tolist() == [0, 1]


def test_a_closed_loop_by_hand() -> None:
    """Two users: the third request comes when the first is served, the fourth when the third is."""
    inf = float("inf")
    record = simulate([Request(0.0, 10, 1), Request(0.0, 10, 3), Request(inf, 10, 1), Request(inf, 10, 1)])
    first, second, third = 1.2 + 110e-6, 1.11 + 55e-6 + 0.011, 1.11 + 55e-6 + 0.012
    assert record.steps["seconds"].tolist() == pytest.approx([first, second, third])
    assert record.requests["arrival_s"].tolist() == pytest.approx([0.0, 0.0, first, first + second])
    assert record.tokens["request"].tolist() == [0, 1, 1, 2, 1, 3]


@given(users=st.integers(1, 40), seed=st.integers(0, 99))
def test_in_a_closed_loop_as_many_are_served_as_there_are_users(users: int, seed: int) -> None:
    """One more comes whenever one is served, while any are left; and a phase after it begins as any other."""
    asked = [replace(r, arrival_s=0.0 if n < users else np.inf) for n, r in enumerate(poisson(1.0, 40, seed))]
    engine = SimulatedEngine(SETTINGS, TOY, seed=3, num_kv_blocks=10_000)
    requests = engine.run([Phase(512, tuple(asked)), Phase(64, (Request(1.0, 5, 1),))], 1e9).requests
    arrivals, ends = requests["arrival_s"].to_numpy()[:40], engine.run([Phase(512, tuple(asked))], 1e9).tokens
    last = ends.groupby("request")["time_s"].last().to_numpy()
    assert (np.diff(arrivals) >= 0).all()
    assert arrivals[users:].tolist() == sorted(last.tolist())[: 40 - users]
    assert requests["arrival_s"].iloc[40] == pytest.approx(last.max() + 1.0)


def test_what_a_prefix_cache_finds_is_not_computed() -> None:
    """60 of 100 prompt tokens: the others attend to all before them, and nothing else is cheaper."""
    engine = SimulatedEngine(SETTINGS, TOY, seed=1, num_kv_blocks=100)
    rows = engine.requests(Phase(512, (Request(0.0, 100, 2),)))
    rows["computed"] = rows["cached_tokens"] = 60
    seen = engine.served(rows)
    first = 1.0 + 0.4 + (40 * 60 + 40 * 41 // 2) * 1e-6
    assert seen.requests["ttft"] == pytest.approx([first])
    assert seen.gaps["seconds"][seen.gaps["count"] > 0] == pytest.approx([1.01 + 0.101])


def test_a_warm_up_is_left_out() -> None:
    """Of three requests, one after the other, the first; its gaps too, which are longer as its prompt is."""
    engine = SimulatedEngine(SETTINGS, TOY, seed=1)
    asked = tuple(Request(100.0 * n, 1000 if n == 0 else 10, 3) for n in range(3))
    every, later = (engine.served(engine.requests(Phase(512, asked)), skipped) for skipped in (0, 1))
    assert later.requests["ttft"] == pytest.approx(every.requests["ttft"][1:])
    assert every.percentile("tbt_p99") > 2.0 > 1.03 > later.percentile("tbt_p99")
    assert later.gaps["count"].sum() == 4


def test_time_limit_truncates() -> None:
    engine = SimulatedEngine(SETTINGS, TOY, seed=1)
    record = engine.run([Phase(64, (Request(0.0, 64, 50), Request(100.0, 64, 1)))], 10.0)
    assert record.truncated
    assert record.steps["start_s"].max() < 10.0 <= record.steps["start_s"].max() + record.steps["seconds"].iloc[-1]
    assert record.requests["last_step"].tolist() == [-1]
    assert record.requests["generated_tokens"].tolist() == [len(record.tokens)]


def test_room_for_steps_is_made_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial longer than the room there is at first: the same as with room enough, percentiles too."""
    calibration = replace(load_calibration("a100-mistral-7b"), jitter=Jitter(0.1, 0.01, 3.0, 0.2), loop=Loop(1e-3, 2e-2, 0.5))
    phases = [Phase(256, tuple(poisson(4.0, 100, seed))) for seed in (1, 2)]
    engine = SimulatedEngine(SETTINGS, calibration, seed=3, num_kv_blocks=130)
    whole, told = engine.run(phases, 1e9), percentiles(engine, phases[0])
    assert whole.steps["preempted"].sum() > 0
    monkeypatch.setattr(simulator, "FIRST_SIZE", 256)
    assert len(whole.steps) > 1024
    drawn_jitter.cache_clear()
    assert digest(engine.run(phases, 1e9)) == digest(whole)
    assert percentiles(engine, phases[0]) == told
    drawn_jitter.cache_clear()


def test_plain_python_does_the_same(tmp_path: Path) -> None:
    """Without compilation, and where no folder can be written, which is said once."""
    script = (
        "from tests.simulator.test_simulator import *; "
        "c = replace(load_calibration('a100-mistral-7b'), jitter=Jitter(0.05, 0.01, 1.0)); "
        "print(digest(simulate(poisson(4.0, 30, seed=1), 256, blocks=130, calibration=c)))"
    )
    home, told = tmp_path / "home", []
    for variables in ({}, {"NUMBA_DISABLE_JIT": "1"}, {"XDG_CACHE_HOME": str(home)}):
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        told.append(done.stdout)
    assert len(set(told)) == 1
    assert any(home.rglob("*.nbc"))


def test_columns_and_conservation() -> None:
    record = simulate(poisson(0.1, 60, seed=2))
    for frame, columns in ((record.requests, REQUEST_COLUMNS), (record.steps, STEP_COLUMNS), (record.tokens, TOKEN_COLUMNS)):
        assert {column: str(dtype) for column, dtype in frame.dtypes.items()} == columns
    requests, steps = record.requests, record.steps
    assert (requests["generated_tokens"] == requests["output_tokens"]).all()
    assert record.tokens["request"].value_counts().sort_index().tolist() == requests["output_tokens"].tolist()
    assert steps["prefill_tokens"].sum() == requests["prompt_tokens"].sum()
    assert steps["decode_tokens"].sum() == (requests["output_tokens"] - 1).sum()
    assert ((steps["prefill_tokens"] + steps["decode_tokens"]) <= steps["budget"]).all()
    assert (steps["start_s"].to_numpy()[1:] >= (steps["start_s"] + steps["seconds"]).to_numpy()[:-1] - 1e-9).all()
    last = record.tokens.groupby("request")["time_s"].last().to_numpy()
    ends = (steps["start_s"] + steps["seconds"]).to_numpy()
    assert last == pytest.approx(ends[requests["last_step"]], rel=1e-12)


def test_littles_law() -> None:
    """Mean number in the system = arrival rate x mean time in it; the left side is integrated step by step."""
    calibration = load_calibration("a100-mistral-7b")
    record = simulate(poisson(2.5, 3000, seed=9, prompt=3000, output=300), 512, calibration=calibration)
    requests, steps = record.requests, record.steps
    sojourn = record.tokens.groupby("request")["time_s"].last().to_numpy() - requests["arrival_s"].to_numpy()
    present = steps["decode_tokens"] + steps["prefill_requests"] + steps["waiting"]
    span = (steps["start_s"] + steps["seconds"]).iloc[-1] - requests["arrival_s"].iloc[0]
    mean_present = float((present * steps["seconds"]).sum() / span)
    assert mean_present == pytest.approx(len(requests) / span * sojourn.mean(), rel=0.01)


def test_utilisation_of_a_single_server() -> None:
    """One request at a time and equal service: M/D/1, mean wait = rho x service / (2 (1 - rho))."""
    engine = SimulatedEngine(replace(SETTINGS, max_batch=1), TOY, seed=1)
    rng = np.random.default_rng(4)
    service, load = 1.0 + 0.01 * 100 + 5050e-6, 0.6
    arrivals = np.cumsum(rng.exponential(service / load, 20_000)).tolist()
    record = engine.run([Phase(512, tuple(Request(arrival, 100, 1) for arrival in arrivals))], 1e9)
    wait = record.tokens["time_s"].to_numpy() - record.requests["arrival_s"].to_numpy() - service
    assert wait.mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def digest(record: Record) -> str:
    columns: list[npt.NDArray[np.generic]] = []
    for frame in (record.requests, record.steps, record.tokens):
        columns += [frame[name].to_numpy() for name in frame]
    return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()


def test_same_bytes_from_two_processes() -> None:
    script = (
        "from tests.simulator.test_simulator import *; "
        "c = replace(load_calibration('a100-mistral-7b'), jitter=Jitter(0.05, 0.01, 1.0)); "
        "print(digest(simulate(poisson(3.0, 300, seed=1), 256, blocks=150, calibration=c)))"
    )
    digests = set()
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_seed_changes_jitter_only() -> None:
    calibration = replace(TOY, jitter=Jitter(0.2))
    first, second = (
        SimulatedEngine(SETTINGS, calibration, seed).run([Phase(64, (Request(0.0, 300, 4),))], 1e9).steps for seed in (1, 2)
    )
    assert first["seconds"].tolist() != second["seconds"].tolist()
    assert first.drop(columns=["start_s", "seconds"]).equals(second.drop(columns=["start_s", "seconds"]))


def test_facts_say_simulated() -> None:
    facts = SimulatedEngine(SETTINGS, load_calibration("a100-mistral-7b"), seed=1).facts
    assert facts["simulated"] is True
    assert facts["calibration"] == "a100-mistral-7b"
    assert facts["calibration_error"]["held_out"] > 0
    # 0.85 of 79.25 GiB less 14.48e9 of weights, a step of 2,048 tokens, what vLLM keeps; over 16 tokens of 131,072 bytes
    used = 0.85 * 79.25 * 2**30 - 14.48e9 - 2048 * (4 * 2 * 4096 + 6 * 14336) - 1.29 * 2**30
    assert facts["kv_blocks"] == pytest.approx(used / (16 * 131_072), abs=5)


def test_refusals() -> None:
    with pytest.raises(SpecError, match="calibration toy: got yi-34b on 2 GPUs; allowed: mistral-7b on 1"):
        SimulatedEngine(replace(SETTINGS, model="yi-34b", tensor_parallel=2), TOY, seed=1)
    with pytest.raises(SpecError, match="phase 0: budget: got 4096; allowed: 1 to 2048"):
        simulate([Request(0.0, 10, 1)], budget=4096)
    with pytest.raises(SpecError, match=r"phase 0: request: got 8192 \+ 1 tokens; allowed: .* at most max_model_len \(8192\)"):
        simulate([Request(0.0, 8192, 1)])
    with pytest.raises(SpecError, match=r"phase 0: arrival_s: got 1\.0; allowed: not before 2\.0"):
        simulate([Request(2.0, 8, 1), Request(1.0, 8, 1)])
    with pytest.raises(SpecError, match="phase 0: budget: got 0; allowed: 1 to 2048"):
        simulate([Request(0.0, 10, 1)], budget=0)
    assert len(simulate([Request(0.0, 100, 29)], blocks=9).tokens) == 29  # 128 tokens are cached: the last one never is
    with pytest.raises(SpecError, match=r"phase 0: request 1: 100 \+ 30 tokens need 9 KV blocks; allowed: at most 8"):
        simulate([Request(0.0, 100, 29), Request(0.0, 100, 30)], blocks=9)


def test_leaving_the_calibrated_range_is_refused() -> None:
    narrow = replace(TOY, valid=replace(TOY.valid, decode_context=110))
    assert len(simulate([Request(0.0, 100, 11)], calibration=narrow).steps) == 11
    with pytest.raises(SpecError, match="calibration toy: tokens of decode context in a step: got 111; allowed: at most 110"):
        simulate([Request(0.0, 100, 30)], calibration=narrow)
    engine = SimulatedEngine(SETTINGS, narrow, seed=1)
    with pytest.raises(SpecError, match="tokens of decode context in a step: got 111; allowed: at most 110"):
        percentiles(engine, Phase(512, (Request(0.0, 100, 30),)))


@pytest.mark.parametrize("blocks", [10_000, 130])
@pytest.mark.parametrize("rate", [0.2, 4.0])
def test_percentiles_are_those_of_the_record(rate: float, blocks: int) -> None:
    """With 130 KV blocks sequences are preempted, and wait for a token over many steps."""
    calibration = replace(load_calibration("a100-mistral-7b"), jitter=Jitter(0.1, 0.01, 3.0))
    engine = SimulatedEngine(SETTINGS, calibration, seed=3, num_kv_blocks=blocks)
    phase = Phase(256, tuple(poisson(rate, 150, seed=5)))
    known = serving_metrics(engine.run([phase], 1e9))
    wanted = [known[name.replace("delay", "scheduling_delay")] for name in ASKED]
    assert percentiles(engine, phase) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    one, two = engine.served(engine.requests(phase)), served_of(engine.run([phase], 1e9))
    for name, values in one.requests.items():
        assert values == pytest.approx(two.requests[name], rel=1e-9, abs=1e-12, nan_ok=True)


def test_percentiles_of_single_tokens() -> None:
    """No request has two tokens: there is no gap between them."""
    engine = SimulatedEngine(SETTINGS, TOY, seed=1)
    assert percentiles(engine, Phase(64, (Request(1.0, 64, 1),)))[0] == 0.0


@given(seen=st.lists(st.tuples(st.floats(0.0, 9.0), st.integers(0, 40)), max_size=60), share=st.sampled_from([0.5, 0.9, 0.99]))
def test_percentile_of_gaps_seen_alike_is_numpys(seen: list[tuple[float, int]], share: float) -> None:
    gaps = np.array(seen, dtype=scheduler.GAP)
    each = np.repeat(gaps["seconds"], gaps["count"])
    assert gap_percentile(gaps, share) == pytest.approx(np.percentile(each, 100 * share) if len(each) else 0.0)
