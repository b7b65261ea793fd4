"""What an engine is started with: by us and, what the speed rests on, by whoever pastes a `vllm serve` command of ours."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.records.provenance import own_folder
from experiments.spec.spec import EngineSettings, load_model

# On GPUs, the same on each: left to itself vLLM takes FlashInfer on B200, which would fetch kernels from the network.
ATTENTION_BACKEND = "FLASH_ATTN"


def serving_arguments(settings: EngineSettings) -> dict[str, Any]:
    """The arguments of vLLM's EngineArgs that speed and capacity rest on: the same wherever these settings are served."""
    arguments: dict[str, Any] = {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": settings.max_budget,
        "max_num_seqs": settings.max_batch,
        "max_model_len": settings.max_model_len,
        "tensor_parallel_size": settings.tensor_parallel,
        "dtype": "bfloat16" if settings.dtype == "fp8" else settings.dtype,  # fp8: of the layers' weights alone
        "enable_prefix_caching": False,
        "async_scheduling": False,  # its outputs lag a step, so a token's time would be the next step's
        "enforce_eager": settings.platform == "cpu",
    }
    if settings.dtype == "fp8":
        arguments["quantization"] = "fp8"
    if settings.platform != "cpu":
        arguments["attention_backend"] = ATTENTION_BACKEND
    if settings.gpu_memory_utilization:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.max_model_len > load_model(settings.model)["max_position_embeddings"]:
        # Yi-34B states 4,096 positions; the paper serves 8,192. RoPE needs no table of that size.
        arguments["hf_overrides"] = {"max_position_embeddings": settings.max_model_len}
    return arguments


def serving_environment(settings: EngineSettings) -> dict[str, str]:
    """The environment variables that they rest on, which vLLM has no arguments for.

    OMP_NUM_THREADS: prefill takes 1.7 times as long with 1 thread as with 2, and Ray sets it to the task's CPUs.
    """
    if settings.platform != "cpu":
        return {}
    space = str(max(1, round(settings.kv_cache_gib or 1)))
    variables = {"OMP_NUM_THREADS": str(settings.threads or 1), "VLLM_CPU_KVCACHE_SPACE": space}
    if settings.tensor_parallel > 1:  # without explicit cores a NUMA assertion fails
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(settings.tensor_parallel)))
    return variables


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments as vLLM's command line takes them, word by word; what is off is switched off, as defaults change."""
    words = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def model_folder(config: Mapping[str, Any]) -> Path:
    """A model for vLLM: a folder with this config.json. Its path goes by its content, as the key of vLLM's cache of compiled
    code goes by the path: under a random name every engine would compile anew."""
    text = json.dumps(config)
    name = f"model-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder = own_folder(name) or Path(tempfile.mkdtemp(prefix="model-"))
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(text)
    Path(file.name).replace(folder / "config.json")  # whole at any moment: engines may load side by side
    return folder
