"""Whatever file a user has gives the requests in it, or one line that says what it is instead and the way on."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.records.errors import SpecError
from experiments.spec.traces import Trace, read_trace

HEADER = "num_prefill_tokens,num_decode_tokens\n"


class InMemory(type(Path())):  # type: ignore[misc]
    """A file that need not be written."""

    data: bytes

    def read_bytes(self) -> bytes:
        return self.data


def read(content: str | bytes, max_total: int | None = None) -> Trace:
    path = InMemory("a file.txt")
    path.data = content if isinstance(content, bytes) else content.encode()
    return read_trace(path, max_total)


def refused(content: str | bytes, *parts: str, max_total: int | None = None) -> None:
    with pytest.raises(SpecError) as error:
        read(content, max_total)
    text = str(error.value)
    assert text.startswith("TRACE: a file.txt: ")
    assert "\n" not in text
    assert len(text) < 500
    for part in parts:
        assert part in text, text


def lines(*objects: object) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)


def run(*pairs: tuple[int, int], **more: Any) -> dict[str, Any]:
    """A result of vllm bench serve --save-detailed."""
    lengths = {"input_lens": [p for p, _ in pairs], "output_lens": [o for _, o in pairs], "errors": [""] * len(pairs)}
    done = [pair for pair in pairs if pair[1]]
    totals = {
        "completed": len(done),
        "total_input_tokens": sum(p for p, _ in done),
        "total_output_tokens": sum(o for _, o in done),
    }
    return {"date": "20260101-000000", "duration": 4.0, "request_rate": 2.0, **totals, **lengths, **more}


def aiperf(start: float, prompt: int, output: int) -> dict[str, Any]:
    """A line of its profile_export.jsonl; of a failed request where there is no output."""
    head = {"metadata": {"request_start_ns": 1_759_813_207_000_000_000 + round(start * 1e9)}}
    if not output:
        return head | {"metrics": {"error_isl": {"value": prompt}}, "error": {"code": 499, "message": "cancelled"}}
    metrics = {"input_sequence_length": prompt, "output_sequence_length": output, "request_latency": 2.5}
    return head | {"metrics": {name: {"value": value, "unit": "-"} for name, value in metrics.items()}, "error": None}


def guidellm(start: float, prompt: int, output: int | None) -> dict[str, Any]:
    times = {"info": {"timings": {"queued": 0.5}}, "request_start_time": 7e8 + start}
    return {"prompt_tokens": prompt, "output_tokens": output, **times}


def table(header: str, row: str, *starts: str, end: str = "\n") -> str:
    """THREE as CSV; {t}, {p}, {o} in the row stand for start, prompt and output."""
    requests = zip(THREE, starts or ["", "", ""], strict=True)
    return header + end + "".join(row.format(t=t, p=p, o=o) + end for (_, p, o), t in requests)


THREE = [(0.0, 100, 20), (0.5, 200, 30), (2.0, 300, 1)]  # start, prompt, output: what every shape gives
PAIRS = [(prompt, output) for _, prompt, output in THREE]
AZURE = ("TIMESTAMP,ContextTokens,GeneratedTokens", "{t},{p},{o}")
USAGE = ("prompt_tokens", "completion_tokens")
BURST = "Timestamp,Session ID,Model,Request tokens,Response tokens,Total tokens,Log Type"
TIMED = {
    "vidur": table("arrived_at,num_prefill_tokens,num_decode_tokens", "{t},{p},{o}", "0.0", "0.5", "2"),
    "azure 2023": table(*AZURE, "2023-11-16 23:59:59.9", "2023-11-17 00:00:00.4000000", "2023-11-17 00:00:01.9", end="\r\n"),
    "azure 2024": table(*AZURE, "2024-05-10 00:00:00+00:00", "2024-05-10 00:00:00.500000+00:00", "2024-05-10 00:00:02+00:00"),
    "burstgpt": table(BURST, "{t},,GPT-4,{p},{o},9,API log", "5", "5.5", "7"),
    "splitwise": table("request_id,arrival_timestamp,prompt_size,token_size", "7,{t},{p},{o}", "0.25", "0.75", "2.25"),
    "production stack": table(
        ",prompt_tokens,generation_tokens,launch_time", "0,{p},{o},{t}", "17e8", "1700000000.5", "1700000002"
    ),
    "vllm's own": table("num_prompt_tokens,num_generation_tokens,arrival_time", "{p},{o},{t}", "1", "1.5", "3"),
    "epoch in ms": table("created_at,isl,osl", "{t},{p},{o}", "1700000000000", "1700000000500", "1700000002000"),
    "unsorted": "time_stamp,arrived_at,isl,osl\n,9,300,1\n,7,100,20\n,7.5,200,30\n",
    "mooncake": lines(*({"timestamp": 1000 * t, "input_length": p, "output_length": o, "hash_ids": [0]} for t, p, o in THREE)),
    "bailian": lines(*({"chat_id": 5, "timestamp": 61.25 + t, "input_length": p, "output_length": o} for t, p, o in THREE)),
    "vllm bench": json.dumps(run(*PAIRS, start_times=[7.5, 8.0, 9.5])),
    "aiperf": lines(*(aiperf(*one) for one in THREE), aiperf(3, 400, 0)),
    "guidellm": json.dumps(
        {
            "metadata": {"version": 1},
            "benchmarks": [
                {
                    "config": {"rates": [1.0]},
                    "requests": {
                        "successful": [guidellm(*one) for one in THREE],
                        "incomplete": [guidellm(3, 400, 5)],
                        "errored": [],
                    },
                }
            ],
        }
    ),
    "inference-perf": json.dumps(
        [{"start_time": 5.5 + t, "info": {"input_tokens": p, "output_tokens": o}, "error": None} for t, p, o in THREE]
    ),
    "openai usage": lines(*({"created": 17e8 + t, "usage": dict(zip(USAGE, sides, strict=True))} for t, *sides in THREE)),
}
UNTIMED = {
    "sarathi": table("num_prefill_tokens,num_decode_tokens,pd_ratio", "{p},{o},5.5"),
    "simulator": table("Request Id,request_num_prefill_tokens,request_num_decode_tokens", "0,{p},{o}"),
    "row names without a name of their column": "isl\tosl\nr1\t100\t20\nr2\t200\t30\nr3\t300\t1\n",
    "separator at the end of rows": HEADER + "100,20,\n200,30,\n300,1,\n",
    "vllm bench before start times": json.dumps(run(*PAIRS), indent=4),
    "vllm bench, all at once": json.dumps(run(*PAIRS, start_times=[1, 1.001, 1.002], request_rate="inf")),
    "vllm bench appended": json.dumps(run(PAIRS[0])) + "\n" + json.dumps(run(*PAIRS[1:])),
    "vllm sweep": json.dumps([run(PAIRS[0], start_times=[1]), run(*PAIRS[1:], start_times=[2, 3])]),
    "sglang": lines(run(*PAIRS, backend="sglang", itls=[[0.1], [0.2, 0.3], []])),
    "vllm sweep, as a table": pd.DataFrame([run(*PAIRS[:2], generated_texts=["a" * 200_000, ""]), run(PAIRS[2])]).to_csv(),
    "behind a comment and Excel's mark": "# ours\nsep=;\n" + table("input_len;output_len", "{p};{o}"),
    "separated by spaces": table("prompt_length output_length", "  {p}   {o}"),
    "anthropic, cached tokens apart": lines(
        *({"usage": {"input_tokens": p - 5, "cache_read_input_tokens": 5, "output_tokens": o}} for p, o in PAIRS)
    ),
    "llmperf": json.dumps(
        [{"error_code": None, "number_input_tokens": p, "number_output_tokens": o} for p, o in PAIRS]
        + [{"error_code": 429, "number_input_tokens": 9, "number_output_tokens": 9}]
    ),
}


@pytest.mark.parametrize("name", [*TIMED, *UNTIMED])
def test_every_shape(name: str) -> None:
    content = (TIMED | UNTIMED)[name]
    for data in (content.encode(), gzip.compress(content.encode())):
        trace = read(data)
        assert list(zip(trace.prompt.tolist(), trace.output.tolist(), strict=True)) == PAIRS
        assert trace.prompt.dtype == trace.output.dtype == np.int64
        assert (trace.arrivals is not None) == (name in TIMED)
        assert trace.arrivals is None or trace.arrivals.tolist() == pytest.approx([start for start, _, _ in THREE])
        assert trace.sha256 == hashlib.sha256(data).hexdigest()


def test_a_parquet_file(tmp_path: Path) -> None:
    table = pd.DataFrame({"timestamp": pd.to_datetime([3, 1, 2], unit="s", utc=True), "input_tokens": [9, 7, 8]})
    table.assign(output_tokens=1).to_parquet(tmp_path / "any")
    trace = read_trace(tmp_path / "any")
    assert trace.arrivals is not None
    assert (trace.prompt.tolist(), trace.arrivals.tolist()) == ([7, 8, 9], [0, 1, 2])


SPELLED = st.sampled_from(["{}", "{}.0", " {} ", '"{}"', "{:,}", "+{}"])


@given(
    pairs=st.lists(st.tuples(st.integers(1, 9_999_999), st.integers(1, 9_999_999)), min_size=1, max_size=8),
    separator=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    rename=st.sampled_from(
        [str.upper, str.title, str.strip, lambda name: f" {name.replace('_', ' ')} ", lambda name: f'"{name}"']
    ),
    index=st.booleans(),
    data=st.data(),
)
def test_a_table_is_read_however_it_is_spelled(
    pairs: list[tuple[int, int]], separator: str, end: str, encoding: str, rename: Any, index: bool, data: st.DataObject
) -> None:
    rows = [["", rename("num_decode_tokens"), rename("num_prefill_tokens")][not index :]]
    for n, (prompt, output) in enumerate(pairs):
        cells = [data.draw(SPELLED).format(number) for number in (output, prompt)]
        cells = [f'"{cell.strip()}"' if separator in cell else cell for cell in cells]
        rows.append(([str(n)] if index else []) + cells)
    limit = max(prompt + output for prompt, output in pairs)
    trace = read("".join(separator.join(row) + end for row in rows).encode(encoding), max(limit, 10_000_000))
    assert list(zip(trace.prompt.tolist(), trace.output.tolist(), strict=True)) == pairs


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["an empty file"]),
        ("\n\n", ["an empty file"]),
        (HEADER, ["a header without rows"]),
        (lines(run()), ["no requests"]),
        ("num_prefill_tokens\n1\n", ["got num_prefill_tokens without num_decode_tokens"]),
        ("a;b\n1;2\n", ["got 'a, b'", "docs/workload.md"]),
        ("[1, 2]", ["nothing with a name", "num_prefill_tokens"]),
        ("num_prefill_tokens," + HEADER + "1,2,3\n", ["two columns num_prefill_tokens"]),
        ("Prompt tokens,prompt_tokens,output_tokens\n1,2,3\n", ["two columns"]),
        (HEADER + '7,"8\n', ["row 2", "not valid CSV", "cut off"]),
        (HEADER + "7,8\n7,9\n7", ["cut off in row 4", "1 of 2 fields"]),
        (HEADER + "7," + "9" * 5000 + "\n", ["1 (100 %) without a number of tokens", "row 2"]),
        (HEADER + "12000000,5\n", ["more than 10,000,000", "12000000 + 5"]),
        (HEADER + "1,234,56\n", ["of other than 2 fields", "3 fields"]),
        ("num_prefill_tokens;num_decode_tokens\n374,0;12,5\n", ["without a number of tokens"]),  # decimal commas
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", ["a pointer of Git LFS", "git lfs pull"]),
        (b"PK\x03\x04rest", ["an archive", "unpack it"]),
        (b"PAR1rest", ["cut off or damaged Parquet"]),
        ("<!DOCTYPE html><html>", ["a web page", "fetch the file"]),
        (b"\x89PNG\xff", ["not text in UTF-8 (byte 0)"]),
        (gzip.compress(b"num" * 999)[:-9], ["cut off or damaged gzip"]),
        ('{"input_lens": [1, 2', ["cut off in line 1"]),
        (lines(run((1, 2))) + '{"input_lens": [1], "generated_texts": ["and {so} [on', ["cut off in line 2"]),
        ('{"input_lens": [1] "output_lens": [2]}', ["line 1: not valid JSON"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"input_lens": [' + "9" * 5000 + "]}", ["not valid JSON"]),
        (lines({**run((1, 2)), "output_lens": [1, 2, 3]}), ["input_lens, output_lens: got 1 and 3 values"]),
        (lines(run((9, 0), (9, 0), errors=["refused", "reset"])), ["every request failed", "'refused'", "server's log"]),
        ('{"completed": 0, "total_input_tokens": 0, "total_output_tokens": 0}', ["every request failed"]),
        (
            '{"completed": 4, "total_input_tokens": 2050, "total_output_tokens": 512}',
            ["a summary, 512 and 128 tokens at the mean", "--save-detailed", "TRACE=512/128"],
        ),
        ('{"completed": 4, "total_input_tokens": 2050, "input_lens": [1]}', ["input_lens without output_lens"]),  # embeddings
        ("run,completed,total_input_tokens,total_output_tokens\n0,2,20,10\n", ["TRACE=10/5"]),
        (lines({"input_sequence_length": {"avg": 550.4}, "output_sequence_length": {"avg": 15.9}}), ["TRACE=550/16"]),
        (
            json.dumps(
                {"benchmarks": [{"metrics": {f"{k}_token_count": {"successful": {"mean": 9.0}} for k in ("prompt", "output")}}]}
            ),
            ["TRACE=9/9"],
        ),
        (json.dumps({"results_number_input_tokens_mean": 5, "results_number_output_tokens_mean": 6}), ["TRACE=5/6"]),
        ("Metric,avg,min,max\nInput Sequence Length,550,1,2\n", ["a summary without its requests", "profile_export.jsonl"]),
        ("Run Info,Token Metrics\nRun ID,Input Tokens\n,Successful Mean\na,550\n", ["a summary without", "GuideLLM's JSON"]),
        (
            'Metric,avg\nOutput Sequence Length (tokens),15.9\nInput Sequence Length (tokens),"1,550.00"\n\nMetric,Value\n',
            ["TRACE=1550/16"],
        ),
        (
            "== Result ==\nSuccessful requests:   10   \nTotal input tokens:    5120\nTotal generated tokens:   1280\n",
            ["a summary, 512 and 128 tokens", "TRACE=512/128"],
        ),
        (lines({"data": [{"results": [{"input_tokens": 90, "output_tokens": 9, "num_model_requests": 3}]}]}), ["TRACE=30/3"]),
        (lines(aiperf(0, 5, 0), aiperf(1, 6, 0)), ["every request failed", "cancelled"]),
        (lines({"prompt_tokens": {"0": 5}, "completion_tokens": {"0": 7}}), ["prompt_tokens and completion_tokens", "a list"]),
        ("benchmarks:\n- config: {}\n", ["got YAML", "save it as JSON"]),
        (" \r\n<html>", ["a web page"]),
        (json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}]}]), ["texts (conversations)", "counts"]),
        (lines({"prompt": "hello", "output_tokens": 5}), ["texts (prompt)", "vllm bench serve"]),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_named_with_the_way_on(content: str | bytes, parts: list[str]) -> None:
    refused(content, *parts)


def test_half_a_character_is_no_matter() -> None:
    """As texts that were cut off hold it, which JSON may say and no string of pandas."""
    one, whole = {"input_lens": [5] * 4, "output_lens": [7] * 4}, "\U0001f600 \\ud83d"
    trace = read(json.dumps(one | {"errors": ["", "cut \ud83d", whole, ""]}))
    assert trace.notes[-1] == "left out: 2 (50 %) failed, first in row 2: 'cut \ufffd'"


def test_dots_may_part_thousands() -> None:
    """Where each has three digits behind it and smaller numbers have none; those of means are decimal points."""
    header = "prompt_len;output_len\n"
    trace = read(header + "1.234;10\n2.000;999\n7;1.000\n")
    assert list(zip(trace.prompt.tolist(), trace.output.tolist(), strict=True)) == [(1234, 10), (2000, 999), (7, 1000)]
    refused(header + "1.234;10.500\n2.000;9.125\n", "of no whole number of tokens")
    refused(header + "1.234;1000\n1.500;9\n", "of no whole number of tokens")
