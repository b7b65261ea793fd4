"""The real engine, on the CPU: each engine in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bagit
import psutil
import pytest

pytest.importorskip("vllm")

from bench import cpu_settings, prefill, serve
from torture import tree

from analysis.gates import LATENESS_SLACK_S
from experiments.engine import Phase, Recorder, Request
from experiments.engine_process import engines
from experiments.metrics import saturation_throughput
from experiments.provenance import ROOT
from experiments.store import read_trial
from experiments.vllm_engine import EngineError, VllmEngine, engine_arguments, environment

pytestmark = pytest.mark.engine
SMALL = dataclasses.replace(cpu_settings(), max_budget=256, max_model_len=600, kv_cache_gib=1.0)


def test_switching_the_chunk_size_changes_no_steps_composition() -> None:
    budgets = (64, 96)
    fresh = [dataclasses.replace(SMALL, max_budget=budget) for budget in budgets]
    with engines([SMALL, *fresh]) as (switched, *built):
        for budget, own in zip([*budgets, SMALL.max_budget], [*built, switched], strict=True):
            for tokens in (1, 63, 64, 65, 255, 511, 599):
                batches = switched(prefill, budget, tokens)[1]
                assert batches == own(prefill, budget, tokens)[1]
                assert batches == tuple(min(budget, tokens - done) for done in range(0, tokens, budget))


def test_tensor_parallel_two_runs_on_two_cores() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    tp2 = dataclasses.replace(SMALL, model="tiny-tp2", tensor_parallel=2, threads=1)
    with engines([tp2]) as (run,):
        seconds, batches = run(prefill, 64, 200)
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
    """1,000 requests at five times the saturation rate."""
    tiny = dataclasses.replace(SMALL, model="tiny-tp2", max_budget=64, max_model_len=128)
    lengths = [(5 + 7 * n % 60, 1 + 5 * n % 12) for n in range(1000)]

    def load(rate: float, count: int) -> Phase:
        times = [n / rate if rate else 0.0 for n in range(count)]
        return Phase(64, tuple(Request(t, p, o, seed=n) for n, (t, (p, o)) in enumerate(zip(times, lengths, strict=False))))

    with engines([tiny]) as (run,):
        saturation = saturation_throughput(run(serve, load(0.0, 200)))
        memory = [_resident()]
        record = run(serve, load(5 * saturation, 1000))
        memory.append(_resident())
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
    lateness = requests["injected_s"] - requests["arrival_s"]
    assert lateness.quantile(0.99) <= steps["seconds"].max() + LATENESS_SLACK_S
    assert memory[1] <= memory[0] * 1.05


# No network but the loopback, where the system allows such a namespace: what is run needs none.
OFFLINE = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
if not shutil.which("ip") or subprocess.run([*OFFLINE, "true"], capture_output=True, check=False).returncode:
    OFFLINE = []


def gone(home: Path) -> bool:
    """Whether every process of a run with this TMPDIR ends in a minute: Ray's agents take half a one to notice its end."""
    until = time.monotonic() + 60
    while tree(home) and time.monotonic() < until:
        time.sleep(0.5)
    return not tree(home)


def test_end_to_end_killed_resumed_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(tempfile.mkdtemp(prefix="t-"))  # short: Ray's sockets lie in it
    monkeypatch.setenv("TMPDIR", str(home))
    command = [*OFFLINE, sys.executable, "-m", "experiments.run", "smoke", "--testbed", "cpu", "--out", str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout is not None
    ran = []
    for line in first.stdout:
        if line.startswith("[1/"):
            ran.append(line.split("] ")[1].split(",")[0])
            first.kill()
    first.wait()
    first.stdout.close()
    assert ran, "the first run ended before its first trial"
    assert gone(home)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ran += [line.split("] ")[1].split(",")[0] for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(ran) == len(set(ran)) <= 3
    bag = next(tmp_path.glob("smoke-cpu/bag-*"))
    bagit.Bag(str(bag)).validate()
    trials = sorted(bag.glob("data/trials/*/*"))
    assert [path.name for path in trials] == ["pass-0", "pass-0-repeat", "pass-1"]
    for path in trials:
        facts, record = read_trial(path)
        assert facts["engine"]["prefix_caching"] is False
        assert facts["engine"]["threads"] == 1
        assert facts["engine"]["executor_backend"] == "uni"
        assert (record.requests["cached_tokens"] == 0).all()
        assert (record.requests["generated_tokens"] == 1).all()
        assert (record.steps["prefill_tokens"] + record.steps["decode_tokens"] <= record.steps["budget"]).all()
        assert record.steps["prefill_tokens"].sum() == record.requests["prompt_tokens"].sum()
        assert len(record.tokens) == len(record.requests)
        assert record.steps["start_s"].is_monotonic_increasing
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "nothing to do" in again.stdout
    assert gone(home)
    shutil.rmtree(home)
