"""What vLLM leaves of a GPU's memory for its KV cache, and the steps that it takes where it is told none.

vLLM 0.32, v1/worker/gpu_worker.py, determine_available_memory: the memory that CUDA reports x gpu_memory_utilization, less what
the process holds after loading, the peak of the largest step above that, and an estimate of the CUDA graphs. What a step needs
at most, and what the process holds, was read off vLLM's own profiles of 20 models on H100 (vLLM 0.17 to 0.19,
github.com/llm-d-incubation/llm-d-planner, accuracy/accuracy_report.md); docs/simulator.md has the check against others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.records.errors import SpecError
from experiments.simulator.calibration import Calibration, kv_bytes_per_token, mlp_of, weight_bytes
from experiments.spec.spec import EngineSettings, load_model

GIB = 2**30
BLOCK = 16  # tokens, vLLM's default on GPUs
UTILIZATION = 0.92  # vLLM's default
# GiB that CUDA reports, as vLLM's start-up lines have it; of others a share of what the maker states.
REPORTED = {"a100_sxm": 79.25, "h100_sxm": 79.19, "h200_sxm": 139.8, "b200_sxm": 178.35, "gb200": 184.31, "l40s": 44.39}
SHARE = 0.99
LOGIT = 14  # bytes for each request of a step and entry of the vocabulary: the sampler's copies of the logits
NON_TORCH = {1: 0.25, 2: 2.1}  # GiB, of one GPU and, with NCCL's buffers, of each of several
GRAPHS = 1.04  # GiB, mean over the models (0.51 to 1.85)


@dataclass(frozen=True)
class Memory:
    """Of each GPU, bytes: what vLLM may use, what of it is no KV cache, and a token of KV cache."""

    budget: float
    weights: float
    activations: float
    kept: float
    per_token: float

    @property
    def beside(self) -> float:
        """What is no KV cache."""
        return self.weights + self.activations + self.kept

    @property
    def blocks(self) -> int:
        """KV blocks of BLOCK tokens; negative if not even the weights fit."""
        return int((self.budget - self.beside) // (BLOCK * self.per_token))

    def __str__(self) -> str:
        """What is no KV cache, GiB."""
        parts = {"weights": self.weights, "a step": self.activations, "kept by vLLM": self.kept}
        return " + ".join(f"{size / GIB:.1f} {name}" for name, size in parts.items())

    @property
    def told(self) -> str:
        """In a line."""
        left = f"{(self.budget - self.beside) / GIB:.1f} of {self.budget / GIB:.1f} GiB per GPU"
        return f"{self}, which leaves {left} for the KV cache"


def activation_bytes(shape: Mapping[str, Any], tensor_parallel: int, tokens: int, requests: int) -> float:
    """Peak of a step of so many tokens and requests: the wider of a layer and the sampler, and the workspace of experts."""
    experts, active, width = mlp_of(shape)
    hidden, inner = 2.0 * tokens * shape["hidden_size"], 6.0 * tokens * width / tensor_parallel
    workspace = active * (hidden + inner) if experts > 1 else 0.0
    layer = 4 * hidden + (inner if experts == 1 else 0.0)
    return float(workspace + max(layer, 2.5 * hidden + LOGIT * requests * shape["vocab_size"]))


def gpu_memory(settings: EngineSettings, reported: float) -> Memory:
    """Of a GPU that reports so many bytes. Raises SpecError where no request of the greatest length fits."""
    shape, split, share = load_model(settings.model), settings.tensor_parallel, settings.gpu_memory_utilization or UTILIZATION
    found = Memory(
        budget=reported * share,
        weights=weight_bytes(shape, split, settings.dtype),
        activations=activation_bytes(shape, split, settings.max_budget, settings.max_batch),
        kept=(NON_TORCH[min(split, 2)] + GRAPHS) * GIB,
        per_token=kv_bytes_per_token(shape, split, settings.dtype),
    )
    if found.blocks * BLOCK < settings.max_model_len:
        longest = settings.max_model_len * found.per_token
        came = f"{found} + {longest / GIB:.1f} the longest request = {(found.beside + longest) / GIB:.1f} GiB per GPU"
        allowed = f"{found.budget / GIB:.1f}, {share:g} of {reported / GIB:.1f}"
        raise SpecError(
            f"{settings.model}: GPU memory: got {came}; allowed: {allowed}; use shorter prompts, or more or larger GPUs"
        )
    return found


def kv_blocks(settings: EngineSettings, calibration: Calibration) -> int:
    """KV blocks of a simulated engine: of the testbed's KV cache, those of the engine that was calibrated, or what a GPU has.

    Raises SpecError if the memory is unknown or too small.
    """
    if settings.kv_cache_gib is not None:
        per_token = kv_bytes_per_token(load_model(settings.model), settings.tensor_parallel, settings.dtype)
        return int(settings.kv_cache_gib * GIB // (calibration.block_size * per_token))
    if calibration.kv_blocks is not None:
        return calibration.kv_blocks
    if calibration.device_memory_bytes is None:
        allowed = "kv_cache_gib in the testbed, or kv_blocks or device_memory_bytes here"
        raise SpecError(f"calibration {calibration.calibration}: size of the KV cache: got none; allowed: {allowed}")
    return gpu_memory(settings, calibration.device_memory_bytes).blocks


def vllm_default(gpu: str, reported: float, max_model_len: int) -> tuple[int, int]:
    """The chunk size and the most requests in a step that `vllm serve` takes on this GPU where it is told none.

    vLLM 0.32, engine/arg_utils.py, get_batch_defaults, for the server.
    """
    if reported >= 160 * GIB:
        tokens, requests = 16384, 1024
    elif reported >= 70 * GIB and "a100" not in gpu:
        tokens, requests = 8192, 1024
    else:
        tokens, requests = 2048, 256
    return min(tokens, requests * max_model_len), requests
