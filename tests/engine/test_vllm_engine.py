"""The real engine, on the CPU: each engine in a process of its own."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("vllm")

from bench import cpu_settings, prefill, serve

from experiments.engine.engine_process import engines
from experiments.engine.vllm_engine import EngineError, VllmEngine, engine_arguments, environment
from experiments.records.metrics import saturation_throughput
from experiments.records.record import Phase, Recorder, Request

pytestmark = pytest.mark.engine
SMALL = dataclasses.replace(cpu_settings(), max_budget=256, max_model_len=600, kv_cache_gib=1.0)


def test_switching_the_chunk_size_changes_no_steps_composition() -> None:
    with engines([SMALL, dataclasses.replace(SMALL, max_budget=64)]) as (switched, built):
        for budget, own in ((64, built), (SMALL.max_budget, switched)):
            for tokens in (1, 63, 64, 65, 255, 511, 599):
                batches = switched(prefill, budget, tokens)[1]
                assert batches == own(prefill, budget, tokens)[1]
                assert batches == tuple(min(budget, tokens - done) for done in range(0, tokens, budget))


def told(engine: VllmEngine) -> dict[str, Any]:
    return dict(engine.facts)


def test_tensor_parallel_two_runs_on_two_cores() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    tp2 = dataclasses.replace(SMALL, model="tiny-tp2", tensor_parallel=2, threads=1)
    with engines([tp2]) as (run,):
        seconds, batches = run(prefill, 64, 200)
        facts = run(told)
    computed = {name: facts[name] for name in ("cudagraph_mode", "cudagraph_sizes", "attention_backend", "model_runner")}
    assert computed == {"cudagraph_mode": "NONE", "cudagraph_sizes": [], "attention_backend": "CPU_ATTN", "model_runner": "v1"}
    assert batches == (64, 64, 64, 8)
    assert seconds > 0


def test_arguments_pin_what_the_measurement_rests_on() -> None:
    arguments = engine_arguments(SMALL, "/model")
    assert arguments["distributed_executor_backend"] == "uni"
    assert engine_arguments(dataclasses.replace(SMALL, tensor_parallel=2), "/model")["distributed_executor_backend"] == "mp"
    assert arguments["enable_prefix_caching"] is False
    assert arguments["async_scheduling"] is False
    assert arguments["max_num_batched_tokens"] == 256
    long = dataclasses.replace(SMALL, model="yi-34b", max_model_len=8192)
    assert engine_arguments(long, "/model")["hf_overrides"] == {"max_position_embeddings": 8192}
    assert arguments["enforce_eager"] is True
    gpu = dataclasses.replace(long, platform="cuda", dtype="float16", tensor_parallel=2, gpu_memory_utilization=0.85)
    mapped = engine_arguments(gpu, "/model")
    wanted = {"enforce_eager": False, "gpu_memory_utilization": 0.85, "dtype": "float16", "tensor_parallel_size": 2}
    assert wanted.items() <= mapped.items()
    assert mapped["async_scheduling"] is False
    assert "OMP_NUM_THREADS" not in environment(gpu)
    real = dataclasses.replace(SMALL, weights="/weights")
    assert engine_arguments(real, "/model")["load_format"] == "auto"
    assert engine_arguments(real, "/model")["model"] == "/weights"
    assert environment(SMALL)["OMP_NUM_THREADS"] == "1"


def test_a_step_above_the_chunk_size_is_an_error() -> None:
    engine = object.__new__(VllmEngine)

    class Batch:
        scheduled_new_reqs = ()
        num_scheduled_tokens = {"a": 65}  # noqa: RUF012
        preempted_req_ids = None

        class scheduled_cached_reqs:  # noqa: N801
            req_ids = ("a",)
            num_computed_tokens = (0,)

    recorder = Recorder()
    recorder.requests.append([0, 0, 64, 0.0, 0.0, 100, 1, 0, -1, -1, 0])
    engine._batch = Batch()
    with pytest.raises(EngineError, match="step 0 ran 65 tokens; the chunk size is 64"):
        engine._note_step(recorder, {"a": 0}, 64, 0.0, 0.1)


def _resident() -> int:
    return sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))


def test_overload_loses_nothing_keeps_order_and_memory_flat() -> None:
    """1,000 requests at five times the saturation rate; then 60 by 8 users in a closed loop."""
    tiny = dataclasses.replace(SMALL, model="tiny-tp2", max_budget=64, max_model_len=128)
    lengths = [(5 + 7 * n % 60, 1 + 5 * n % 12) for n in range(1000)]

    def load(rate: float, count: int) -> Phase:
        times = [n / rate if rate else 0.0 for n in range(count)]
        return Phase(64, tuple(Request(t, p, o, seed=n) for n, (t, (p, o)) in enumerate(zip(times, lengths, strict=False))))

    with engines([tiny]) as (run,):
        saturation = saturation_throughput(run(serve, burst := load(0.0, 200)))
        memory = [_resident()]
        record = run(serve, load(5 * saturation, 1000))
        memory.append(_resident())
        users = [
            dataclasses.replace(request, arrival_s=0.0 if n < 8 else math.inf) for n, request in enumerate(burst.requests[:60])
        ]
        closed = run(serve, Phase(64, tuple(users)))
    ends = closed.tokens.groupby("request")["time_s"].last().sort_values()
    assert closed.requests["arrival_s"][8:].tolist() == pytest.approx(ends[:52].tolist(), abs=1e-6)  # one more for each served
    requests, steps = record.requests, record.steps
    assert len(requests) == 1000
    assert (requests["generated_tokens"] == requests["output_tokens"]).all()
    assert len(record.tokens) == requests["output_tokens"].sum()
    assert requests["arrival_s"].is_monotonic_increasing
    assert requests["first_step"].is_monotonic_increasing  # first come, first served
    assert (requests["injected_s"] >= requests["arrival_s"]).all()
    assert (steps["prefill_tokens"] + steps["decode_tokens"] <= 64).all()
    assert (steps["decode_tokens"] + steps["prefill_requests"] <= tiny.max_batch).all()
    assert record.tokens["time_s"].is_monotonic_increasing
    # At the first boundary between steps after its arrival, or one later if it came as the loop was about to step.
    started = [np.searchsorted(steps["start_s"], requests[column]) for column in ("arrival_s", "injected_s")]
    assert (started[1] - started[0] <= 1).all()
    assert memory[1] <= memory[0] * 1.05
