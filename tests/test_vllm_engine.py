"""The real engine, on the CPU: each engine in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import bagit
import pandas as pd
import pytest

pytest.importorskip("vllm")

from experiments.bench import cpu_settings, engines
from experiments.provenance import ROOT
from experiments.store import read_trial
from experiments.vllm_engine import EngineError, VllmEngine, engine_arguments, environment

pytestmark = pytest.mark.engine
SMALL = dataclasses.replace(cpu_settings(), max_budget=256, max_model_len=600, kv_cache_gib=1.0)


def test_switching_the_chunk_size_changes_no_steps_composition() -> None:
    budgets = (64, 96, 256)
    fresh = [dataclasses.replace(SMALL, max_budget=budget) for budget in budgets]
    with engines([SMALL, *fresh]) as (switched, *built):
        for budget, own in zip(budgets, built, strict=True):
            for tokens in (1, 63, 64, 65, 255, 511, 599):
                batches = switched(budget, tokens, False)[1]
                assert batches == own(budget, tokens, False)[1]
                assert batches == tuple(min(budget, tokens - done) for done in range(0, tokens, budget))


def test_tensor_parallel_two_runs_on_two_cores() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    tp2 = dataclasses.replace(SMALL, model="tiny-tp2", tensor_parallel=2, threads=1)
    with engines([tp2]) as (run,):
        seconds, batches = run(64, 200, False)
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
    real = dataclasses.replace(SMALL, weights="/weights")
    assert engine_arguments(real, "/model")["load_format"] == "auto"
    assert engine_arguments(real, "/model")["model"] == "/weights"
    assert environment(SMALL)["OMP_NUM_THREADS"] == "2"


def test_a_step_above_the_chunk_size_is_an_error() -> None:
    engine = object.__new__(VllmEngine)

    class Batch:
        scheduled_new_reqs = ()
        num_scheduled_tokens = {"a": 65}  # noqa: RUF012
        preempted_req_ids = None

        class scheduled_cached_reqs:  # noqa: N801
            req_ids = ("a",)
            num_computed_tokens = (0,)

    from experiments.engine import Recorder

    recorder = Recorder()
    recorder.requests.append([0, 0, 64, 0.0, 0.0, 100, 1, 0, -1, -1, 0])
    engine._batch = Batch()
    with pytest.raises(EngineError, match="step 0 ran 65 tokens; the chunk size is 64"):
        engine._note_step(recorder, {"a": 0}, 64, 0.0, 0.1)


def test_end_to_end_from_the_command_to_the_bag(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.run", "smoke", "--testbed", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    bag = next(tmp_path.glob("smoke-cpu/bag-*"))
    bagit.Bag(str(bag)).validate()
    trials = sorted(bag.glob("data/trials/*/*"))
    assert [path.name for path in trials] == ["pass-0", "pass-0-repeat", "pass-1"]
    for path in trials:
        facts, record = read_trial(path)
        assert facts["engine"]["prefix_caching"] is False
        assert facts["engine"]["threads"] == 2
        assert facts["engine"]["executor_backend"] == "uni"
        assert (record.requests["cached_tokens"] == 0).all()
        assert (record.requests["generated_tokens"] == 1).all()
        assert (record.steps["prefill_tokens"] + record.steps["decode_tokens"] <= record.steps["budget"]).all()
        assert record.steps["prefill_tokens"].sum() == record.requests["prompt_tokens"].sum()
        assert isinstance(record.tokens, pd.DataFrame)
        assert len(record.tokens) == len(record.requests)
        assert record.steps["start_s"].is_monotonic_increasing
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "nothing to do" in again.stdout
    left = subprocess.run(["pgrep", "-f", "raylet|gcs_server|ray::"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
