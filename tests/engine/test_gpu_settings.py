"""What vLLM makes of our settings for GPUs: its own functions, called on the CPU."""

from __future__ import annotations

import dataclasses
import json
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from bench import cpu_settings

from experiments.engine.arguments import model_folder
from experiments.engine.vllm_engine import EngineError, InWorker, VllmEngine, engine_arguments, environment
from experiments.spec.spec import load_figure, load_model

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of torch, on import
ON_GPU = dataclasses.replace(cpu_settings(), platform="cuda", dtype="float16", tensor_parallel=2, threads=None)


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The environment of an engine on a GPU, and a cache of its own."""
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)  # vLLM sets it for good where it starts on a CPU
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    variables = environment(ON_GPU)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


def test_no_variable_has_a_name_that_vllm_does_not_know(variables: dict[str, str]) -> None:
    from vllm import envs

    assert {name for name in variables if name.startswith("VLLM_")} <= set(envs.environment_variables)
    assert (variables["NCCL_SOCKET_IFNAME"], variables["GLOO_SOCKET_IFNAME"]) == ("lo", "lo")


def test_no_sampler_is_compiled_as_the_engine_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    monkeypatch.setattr(topk_topp_sampler, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    assert topk_topp_sampler.flashinfer_sampler_supported() is False


def test_tensor_parallel_workers_are_not_forked() -> None:
    from vllm.utils.system_utils import get_mp_context

    assert get_mp_context().get_start_method() == "spawn"


def test_the_attention_backend_does_not_follow_the_gpu() -> None:
    from vllm.config import AttentionConfig

    asked = AttentionConfig(backend=engine_arguments(ON_GPU, "/model")["attention_backend"]).backend
    assert asked is not None
    assert asked.get_path() == "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    assert "attention_backend" not in engine_arguments(cpu_settings(), "/model")


def test_what_is_compiled_for_a_model_is_found_again(tmp_path: Path) -> None:
    """The key of vLLM's cache of compiled code goes by the path of the model."""
    from vllm.config import ModelConfig

    mistral, yi = load_model("mistral-7b"), load_model("yi-34b")
    once, again = model_folder(mistral), model_folder(dict(mistral))
    assert once == again != model_folder(yi)
    assert json.loads((once / "config.json").read_text()) == mistral
    assert [path.name for path in once.iterdir()] == ["config.json"]

    def key(folder: Path) -> str:  # a model as vLLM knows it, but for all that it reads from the folder
        model = object.__new__(ModelConfig)
        model.model, model.multimodal_config = str(folder), None
        return str(model.compute_hash())

    keys = [key(folder) for folder in (once, again, tmp_path / "model-x")]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(("most_requests", "largest"), [(16, 32), (128, 256), (512, 512)])
def test_steps_of_up_to_twice_the_most_requests_run_from_cuda_graphs(most_requests: int, largest: int) -> None:
    """As docs/decisions.md says; the figures' batch is 128."""
    from vllm.config import CUDAGraphMode, VllmConfig

    compilation: Any = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, post_init_cudagraph_sizes=lambda: None)
    compilation.max_cudagraph_capture_size = compilation.cudagraph_capture_sizes = None
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=most_requests, max_num_batched_tokens=8192),
        uniform_decode_query_len=1,
        performance_mode="balanced",
    )
    VllmConfig._set_cudagraph_sizes(config)
    assert compilation.max_cudagraph_capture_size == max(compilation.cudagraph_capture_sizes) == largest
    assert load_figure("fig9b").max_batch == load_figure("fig9a").max_batch == 128


def worker(backend: str) -> InWorker:
    """A worker that computes with CUDA graphs and this attention backend."""
    found, group = InWorker(), SimpleNamespace(backend=SimpleNamespace(get_name=lambda: backend))
    graphs = SimpleNamespace(cudagraph_mode=SimpleNamespace(name="FULL_AND_PIECEWISE"), cudagraph_capture_sizes=[4, 2, 1])
    found.vllm_config, found.use_v2_model_runner = SimpleNamespace(compilation_config=graphs), True
    found.model_runner = SimpleNamespace(attn_groups=[[group], [group]])
    return found


def checked(monkeypatch: pytest.MonkeyPatch, *backends: str) -> None:
    """The check of an engine whose workers compute with these."""
    engine = object.__new__(VllmEngine)
    engine._settings, engine._waits, engine._ways = ON_GPU, True, [worker(backend).ways() for backend in backends]
    known = {"executor_backend": "mp", "prefix_caching": False, "async_scheduling": False}
    monkeypatch.setattr(VllmEngine, "facts", known | engine._ways[0])
    engine._engine = SimpleNamespace(collective_rpc=lambda _name: [*repeat(True, 2)])
    engine._check()


def test_how_the_workers_compute_is_recorded_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker("FLASH_ATTN").ways() == {
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "cudagraph_sizes": [1, 2, 4],
        "attention_backend": "FLASH_ATTN",
        "model_runner": "v2",
    }
    checked(monkeypatch, "FLASH_ATTN", "FLASH_ATTN")
    with pytest.raises(EngineError, match="attention_backend: got 'FLASHINFER' although 'FLASH_ATTN' was asked for"):
        checked(monkeypatch, "FLASHINFER", "FLASHINFER")
    with pytest.raises(EngineError, match="allowed: all alike"):
        checked(monkeypatch, "FLASH_ATTN", "FLASHINFER")
