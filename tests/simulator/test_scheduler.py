"""The scheduler against vLLM's own, token by token, and against its own promises."""

from __future__ import annotations

import json
import os
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.simulator.scheduler import GAP, STEP, Rows, begin, rows, schedule, unserved, update

WORKLOADS = int(os.environ.get("WORKLOADS", "300"))  # random ones, half of them with KV pressure; make conformance: 3,000
Steps = list[tuple[list[tuple[int, int]], int]]  # per step: (request, tokens) in the order of the batch, and how many preempted


@dataclass(frozen=True)
class Workload:
    """`requests`: (step at whose start it arrives, prompt tokens, output tokens), in the order of arrival."""

    budget: int
    max_batch: int
    block_size: int
    num_blocks: int
    requests: tuple[tuple[int, int, int], ...]


@st.composite
def workloads(draw: st.DrawFn, tight: bool) -> Workload:
    """Prompts of less than a block up to many chunks. `tight`: the cache holds little more than the largest request."""
    block_size = draw(st.sampled_from([1, 2, 3, 8, 16, 128]))
    lengths = st.one_of(st.integers(1, 40), st.integers(1, 400))
    requests = draw(st.lists(st.tuples(st.integers(0, 40), lengths, st.integers(1, 60)), min_size=1, max_size=24))
    largest = max(-(-(prompt + output) // block_size) for _, prompt, output in requests)
    num_blocks = largest + 1 + draw(st.integers(0, 6)) if tight else 24 * largest + 1
    max_batch = draw(st.integers(1, 24))
    budget = draw(st.one_of(st.integers(1, 24), st.integers(1, 600)))
    return Workload(budget, max_batch, block_size, num_blocks, tuple(sorted(requests, key=lambda request: request[0])))


def step_by_step(load: Workload) -> Iterator[tuple[Rows, Rows, Any, Any]]:
    """Requests, slots and state after each step was scheduled, and the step; the clock counts steps."""
    arrivals, prompts, outputs = zip(*load.requests, strict=True)
    requests, (slots, state) = unserved(arrivals, prompts, outputs), begin(load.max_batch, load.block_size, load.num_blocks)
    now = state[0]
    while now.running or now.head < len(requests):
        while now.entered < len(requests) and arrivals[now.entered] <= now.clock:
            now.entered += 1
        step = rows(1, STEP)[0]
        step.budget = load.budget
        schedule(requests, slots, now, step)
        yield requests, slots, now, step
        now.clock, now.gaps = now.clock + 1, 0
        update(requests, slots, now, rows(load.max_batch + 1, GAP))


def ours(load: Workload) -> Steps:
    """The batches of our scheduler."""
    steps = ((slots[: now.scheduled], step) for _, slots, now, step in step_by_step(load))
    return [
        (list(zip(batch["request"].tolist(), batch["tokens"].tolist(), strict=True)), int(step.preempted))
        for batch, step in steps
    ]


def vllm_config(folder: Path, block_size: int) -> Any:
    """A vLLM configuration for a model of which only the shape exists."""
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig

    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 64, "max_position_embeddings": 100_000}
    (folder / "config.json").write_text(json.dumps(shape))
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=100_000)
    scheduling = SchedulerConfig(
        max_num_seqs=24,
        max_num_batched_tokens=100_000,
        max_model_len=100_000,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        async_scheduling=False,
    )
    cache = CacheConfig(block_size=block_size, enable_prefix_caching=False)
    return VllmConfig(model_config=model, scheduler_config=scheduling, cache_config=cache)


def theirs(config: Any, load: Workload) -> Steps:
    """The batches of vLLM's scheduler; every step's output is one token for whoever has all its tokens computed."""
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(block_size=load.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config.cache_config.num_gpu_blocks = load.num_blocks
    config.cache_config.block_size = load.block_size
    config.scheduler_config.max_num_seqs = load.max_batch
    config.scheduler_config.max_num_batched_tokens = load.budget
    scheduler = VllmScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=load.num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=load.block_size,
    )
    assert scheduler.scheduler_reserve_full_isl  # vLLM's default; ours knows no other
    pending: deque[tuple[int, Any]] = deque()
    for number, (step, prompt, output) in enumerate(load.requests):
        sampling = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
        sampling.update_from_generation_config({}, None)
        pending.append((step, Request(str(number), [1] * prompt, sampling, None)))
    steps: Steps = []
    while pending or scheduler.has_unfinished_requests():
        while pending and pending[0][0] <= len(steps):
            scheduler.add_request(pending.popleft()[1])
        batch = scheduler.schedule()
        counts = batch.num_scheduled_tokens
        steps.append(([(int(name), tokens) for name, tokens in counts.items()], len(batch.preempted_req_ids or ())))
        requests = [scheduler.requests[name] for name in counts]
        sampled = [[7] if request.num_computed_tokens >= request.num_tokens else [] for request in requests]
        places = {name: place for place, name in enumerate(counts)}
        scheduler.update_from_output(batch, ModelRunnerOutput(list(counts), places, sampled))
    return steps


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with warnings.catch_warnings():  # torch and vllm warn of their own affairs when imported
        warnings.simplefilter("ignore")
        pytest.importorskip("vllm")
        config = vllm_config(tmp_path_factory.mktemp("model"), block_size=16)
        theirs(config, Workload(4, 1, 16, 4, ((0, 4, 1),)))
    return config


@pytest.mark.parametrize("tight", [False, True], ids=["without KV pressure", "with KV pressure"])
@settings(max_examples=WORKLOADS // 2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_batches_equal_vllm(configuration: Any, tight: bool, data: st.DataObject) -> None:
    load = data.draw(workloads(tight))
    assert ours(load) == theirs(configuration, load)


def test_kv_pressure_is_met(configuration: Any) -> None:
    """Two growing sequences in a cache for one and a half: the younger is preempted, again in both schedulers alike."""
    load = Workload(64, 8, 4, 16, ((0, 20, 25), (1, 20, 25)))
    steps = ours(load)
    assert sum(preempted for _, preempted in steps) >= 1
    assert steps == theirs(configuration, load)


@settings(max_examples=200, deadline=None)
@given(load=workloads(tight=True))
def test_batches_respect_limits(load: Workload) -> None:
    for requests, slots, now, step in step_by_step(load):
        batch, running = slots[: now.scheduled], requests[slots["request"][: now.running]]
        assert step.preempted or batch["tokens"].min(initial=1) >= 1
        assert batch["tokens"].sum() == step.prefill_tokens + step.decode_tokens <= load.budget
        assert step.prefill_requests + step.decode_tokens == now.scheduled <= now.running <= load.max_batch
        assert step.waiting == now.entered - now.head + now.running - now.scheduled
        assert now.free + running["blocks"].sum() == load.num_blocks - 1
        assert now.free >= 0
        left = running["prompt_tokens"] + running["generated_tokens"] - running["computed"]
        assert (left[:-1] == 1).all() or step.prefill_requests > 1  # only the last was in the middle of its prompt before
    assert (requests["generated_tokens"] == requests["output_tokens"]).all()
    assert now.free == load.num_blocks - 1
