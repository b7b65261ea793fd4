"""The names under which files record requests: one table of shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from experiments.records.errors import SpecError

SHAPES = (  # columns or keys: prompt tokens, output tokens, what else must be there; start times; seconds in their unit
    ("num_prefill_tokens num_decode_tokens", "arrived_at", 1),  # Sarathi-Serve, Vidur
    ("request_num_prefill_tokens request_num_decode_tokens", "", 1),  # what their simulators write
    ("input_lens output_lens", "start_times", 1),  # vllm bench serve, SGLang
    ("context_tokens generated_tokens", "timestamp", 1),  # Azure
    ("request_tokens response_tokens", "timestamp", 1),  # BurstGPT
    ("input_length output_length chat_id", "timestamp", 1),  # Qwen-Bailian
    ("input_length output_length", "timestamp", 1e-3),  # Mooncake; AIPerf and Dynamo take its form
    ("input_sequence_length output_sequence_length", "request_start_ns", 1e-9),  # AIPerf
    ("prompt_tokens output_tokens", "request_start_time", 1),  # GuideLLM
    ("prompt_tokens completion_tokens", "start_time", 1),  # OpenAI's usage, LiteLLM
    ("prompt_tokens generation_tokens", "launch_time", 1),  # vLLM production stack
    ("num_prompt_tokens num_generation_tokens", "arrival_time", 1),  # what vLLM itself keeps of a request
    ("input_tokens output_tokens", "start_time", 1),  # inference-perf, OpenTelemetry, Anthropic's usage
    ("number_input_tokens number_output_tokens", "", 1),  # LLMPerf
    ("prompt_size token_size", "arrival_timestamp", 1),  # SplitwiseSim
    ("prompt_len output_len", "", 1),
    ("input_len output_len", "", 1),
    ("prompt_length output_length", "", 1),
    ("num_input_tokens num_output_tokens", "", 1),
    ("prompt_tokens generated_tokens", "", 1),
    ("isl osl", "", 1),
)
STARTS = ("arrived_at", "arrival_time", "start_time", "timestamp", "created", "created_at")  # where a shape has no other
SUMMED = "num_model_requests"  # beside tokens that are sums over so many requests


class Columns(NamedTuple):
    """The columns of a shape as the file names them, and the seconds in the unit of its start times."""

    prompt: str
    output: str
    start: str | None
    unit: float


def plain(name: str) -> str:
    """A column's or key's name without case, punctuation, and the keys above it; AIPerf keeps values under `value`."""
    return re.sub("[^a-z0-9]", "", name.removesuffix(".value").rpartition(".")[2].lower())


def pick(names: Iterable[str]) -> Columns | None:
    """The columns of the first shape that is there. Raises SpecError where one is there twice."""
    at: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name.count(".")):
        at.setdefault(plain(name), []).append(name)
    if plain(SUMMED) in at:
        return None
    for needed, start, unit in SHAPES:
        keys = [plain(name) for name in needed.split()]
        if not all(key in at for key in keys):
            continue
        for same in (at[key] for key in keys[:2]):
            if len({name.count(".") for name in same[:2]}) < len(same[:2]):
                raise SpecError(f"got two columns {same[0]}; allowed: one of each name; rename the other")
        starts = [name for name in (start, *STARTS) if plain(name) in at]
        first = at[plain(starts[0])][0] if starts else None
        return Columns(at[keys[0]][0], at[keys[1]][0], first, unit if starts[:1] == [start] else 1)
    return None
