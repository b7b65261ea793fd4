"""The KV cache that vLLM has left on a GPU, and its default chunk size: against what vLLM says itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.records.errors import SpecError
from experiments.simulator import memory
from experiments.simulator.calibration import CALIBRATIONS, load_calibration, weight_bytes
from experiments.simulator.memory import BLOCK, GIB, REPORTED, activation_bytes, gpu_memory, kv_blocks, vllm_default
from experiments.spec.expand import expand
from experiments.spec.spec import EngineSettings, load_figure, load_model, load_testbed

LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
QWEN = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip
EXPERTS = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960,
}  # fmt: skip
SHAPES = {"Llama-3.1-8B-Instruct": LLAMA, "Qwen2.5-7B-Instruct": QWEN}
PUBLISHED = pd.read_csv(CALIBRATIONS.parent / "reference" / "kv_cache.csv", comment="#")
SETTINGS = EngineSettings("simulated", "", 1, "bfloat16", "dummy", 8192, 1024, 8192, None, None, 0.95)


def settings_of(shape: dict[str, Any], folder: Path, **others: Any) -> EngineSettings:
    (folder / "config.json").write_text(json.dumps(shape))
    return replace(SETTINGS, model=str(folder / "config.json"), **others)


@pytest.mark.parametrize("row", PUBLISHED.to_dict("records"), ids=lambda row: f"{row['source']}-{row['model']}")
def test_the_kv_cache_is_what_vllm_says(row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GRAPHS", memory.GRAPHS * row["graphs"])
    same = {"tensor_parallel": row["tensor_parallel"], "gpu_memory_utilization": row["utilization"]}
    settings = settings_of(SHAPES[row["model"]], tmp_path, max_budget=row["chunk_size"], max_batch=row["requests"], **same)
    found = gpu_memory(settings, row["reported_gib"] * GIB)
    assert found.blocks * BLOCK == pytest.approx(row["tokens"], rel=0.01)


def test_activations_are_those_of_published_profiles() -> None:
    """llm-d-planner's report, GiB at steps of 8,192 tokens and 1,024 requests; the last, CodeLlama-7B, has few words."""
    code = LLAMA | {"intermediate_size": 11008, "vocab_size": 32016}
    for shape, split, gib in ((LLAMA, 1, 1.89), (LLAMA, 4, 1.89), (QWEN, 1, 2.21), (EXPERTS, 1, 2.68), (code, 1, 0.77)):
        assert activation_bytes(shape, split, 8192, 1024) / GIB == pytest.approx(gib, rel=0.06)


def test_weights_are_those_that_models_state() -> None:
    """In billions of numbers: Llama-3.1-8B has 8.03, Qwen3-30B-A3B 30.5."""
    assert weight_bytes(LLAMA | {"head_dim": 128}, 1, "bfloat16") / 2 == pytest.approx(8.03e9, rel=0.002)
    assert weight_bytes(EXPERTS, 1, "bfloat16") / 2 == pytest.approx(30.5e9, rel=0.005)
    assert weight_bytes(EXPERTS, 2, "fp8") == pytest.approx(30.5e9 / 2 + 2 * 151936 * 2048 / 2, rel=0.005)


@pytest.mark.parametrize("testbed", ["a100", "gpu-80g-pair", "gpu-80g", "gpu-24g"])
@pytest.mark.parametrize("figure", ["fig9a", "fig9b"])
def test_every_gpu_testbed_fits_its_card(testbed: str, figure: str) -> None:
    bed = load_testbed(testbed)
    for session in expand(load_figure(figure), bed, replicates=1):
        assert gpu_memory(session.engine, bed.requires.gpu_memory_gib * GIB).blocks * BLOCK >= session.engine.max_model_len


def test_what_does_not_fit_is_refused_before_loading() -> None:
    sessions = {s.model: s.engine for s in expand(load_figure("fig9a"), load_testbed("a100"), replicates=1)}
    yi = replace(sessions["yi-34b-200k"], tensor_parallel=1)
    came = r"64\.1 weights \+ 2\.8 a step \+ 1\.3 kept by vLLM \+ 3\.8 the longest request = 71\.8 GiB per GPU"
    with pytest.raises(
        SpecError, match=f"^yi-34b-200k: GPU memory: got {came}; allowed: 67.1, 0.85 of 79.0; use shorter prompts"
    ):
        gpu_memory(yi, 79 * GIB)
    with pytest.raises(SpecError, match="or more or larger GPUs"):
        gpu_memory(sessions["mistral-7b"], 21 * GIB)  # prompts of 16,384 tokens, unlike those of gpu-24g


def test_blocks_of_a_simulated_engine() -> None:
    """Of GPUs as vLLM leaves them; else what the testbed or the engine that was calibrated says."""
    sessions = {s.model: s.engine for s in expand(load_figure("fig9b"), load_testbed("a100-sim"), 1)}
    yi, calibration = sessions["yi-34b"], load_calibration("a100-yi-34b-tp2")
    assert calibration.device_memory_bytes == REPORTED["a100_sxm"] * GIB
    assert kv_blocks(yi, calibration) == gpu_memory(yi, 79.25 * GIB).blocks
    assert kv_blocks(replace(yi, kv_cache_gib=1.0), calibration) == 2**30 // (16 * 122_880)
    assert kv_blocks(yi, replace(calibration, kv_blocks=100)) == 100
    came = "got none; allowed: kv_cache_gib in the testbed, or kv_blocks or device_memory_bytes here"
    with pytest.raises(SpecError, match=f"^calibration a100-yi-34b-tp2: size of the KV cache: {came}$"):
        kv_blocks(yi, replace(calibration, device_memory_bytes=None))
    with pytest.raises(SpecError, match=r"yi-34b: GPU memory: got 32\.0 weights"):
        kv_blocks(replace(yi, gpu_memory_utilization=0.1), calibration)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{", "not the config.json of a model"),
        ("[]", "not the config.json of a model"),
        (json.dumps({"hidden_size": 8}), "intermediate_size: got none; allowed: a whole number"),
        (json.dumps(LLAMA | {"vocab_size": "many"}), "vocab_size: got 'many'; allowed: a whole number"),
    ],
)
def test_a_config_without_what_is_needed_is_one_line(given: str, words: str, tmp_path: Path) -> None:
    (path := tmp_path / "config.json").write_text(given)
    with pytest.raises(SpecError) as raised:
        load_model(str(path))
    assert str(raised.value).startswith(f"{path}: {words}")
    assert "\n" not in str(raised.value)


def test_what_a_config_leaves_out_is_filled_in(tmp_path: Path) -> None:
    shape = load_model(settings_of(LLAMA | {"num_key_value_heads": None}, tmp_path).model)
    assert (shape["num_key_value_heads"], shape["head_dim"]) == (32, 128)


def test_the_default_chunk_size_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own function, on a platform that says it is this GPU."""
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    server = pytest.importorskip("vllm.usage.usage_lib").UsageContext.OPENAI_API_SERVER

    class Platform:
        def __init__(self, name: str) -> None:
            self.name = name

        def get_device_name(self) -> str:
            return f"NVIDIA {self.name}"

        def get_device_total_memory(self) -> int:
            return int(REPORTED[self.name] * GIB)

        def is_tpu(self) -> bool:
            return False

        is_cpu = is_tpu

    for name in REPORTED:
        monkeypatch.setattr(arg_utils, "current_platform", Platform(name))
        tokens, requests = arg_utils.EngineArgs.get_batch_defaults(1)
        assert vllm_default(name, REPORTED[name] * GIB, 8192) == (tokens[server], requests[server])
