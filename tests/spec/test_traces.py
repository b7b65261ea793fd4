"""Whatever file a user has gives the requests in it, or one line that says what is wrong and the way on."""

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
from experiments.spec.traces import Trace, describe_trace, read_trace
from experiments.spec.workload import choose_trace

KEYS = ["input_lens", "output_lens", "isl", "osl", "start_time", "error", "hash_ids"]
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
    assert text.startswith("a file.txt: ")
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
    return {"date": "20260101-000000", "duration": 4.0, "request_rate": "inf", **totals, **lengths, **more}


def aiperf(start: int, prompt: int, output: int | None) -> dict[str, Any]:
    metrics = {"input_sequence_length": prompt, "output_sequence_length": output, "request_latency": 2.5}
    done = {name: {"value": value, "unit": "tokens"} for name, value in metrics.items()}
    failed = {"error": {"code": 499, "type": "Cancelled", "message": "after 0 s"}, "metrics": {"error_isl": {"value": prompt}}}
    return {"metadata": {"request_start_ns": start}, "metrics": done, "error": None} | (failed if output is None else {})


def guidellm(start: float, prompt: int, output: int | None) -> dict[str, Any]:
    return {"request_start_time": start, "prompt_tokens": prompt, "output_tokens": output, "info": {"timings": {"queued": 0.5}}}


# Every shape gives these: three requests of 100/20, 200/30 and 300/1 tokens.
SHAPES: dict[str, tuple[str, list[float] | None]] = {
    "sarathi": ("num_prefill_tokens,num_decode_tokens,pd_ratio\n100,20,5\n200,30,6.7\n300,1,300\n", None),
    "vidur": ("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,20\n0.5,200,30\n2,300,1\n", [0, 0.5, 2]),
    "vidur metrics": (
        "Request Id,request_num_prefill_tokens,request_num_decode_tokens\n0,100,20\n1,200,30\n2,300,1\n",
        None,
    ),
    "azure 2023": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 23:59:59.9000000,100,20\r\n"
        "2023-11-17 00:00:00.4000000,200,30\r\n2023-11-17 00:00:01.9000000,300,1\r\n",
        [0, 0.5, 2],
    ),
    "azure 2024": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,100,20\n2024-05-10 00:00:00.500000+00:00,200,30\n"
        "2024-05-10 00:00:02.000000+00:00,300,1\n",
        [0, 0.5, 2],
    ),
    "burstgpt": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,,1.5,ChatGPT,100,20,120,API log\n6,7,2,GPT-4,200,30,230,Conversation log\n45,,2,GPT-4,300,1,301,API log\n",
        [0, 1, 40],
    ),
    "mooncake": (
        lines(
            {"timestamp": 0, "input_length": 100, "output_length": 20, "hash_ids": [0]},
            {"timestamp": 3000, "input_length": 200, "output_length": 30, "hash_ids": [1]},
            {"timestamp": 3001, "input_length": 300, "output_length": 1, "hash_ids": [2]},
        ),
        [0, 3, 3.001],
    ),
    "bailian": (
        lines(
            *(
                {
                    "chat_id": n,
                    "parent_chat_id": -1,
                    "timestamp": t,
                    "input_length": p,
                    "output_length": o,
                    "type": "text",
                    "turn": 1,
                }
                for n, (t, p, o) in enumerate([(61.25, 100, 20), (62.25, 200, 30), (65.0, 300, 1)])
            )
        ),
        [0, 1, 3.75],
    ),
    "vllm bench": (json.dumps(run((100, 20), (200, 30), (300, 1), start_times=[7.5, 8.0, 9.5])), [0, 0.5, 2]),
    "vllm bench before start times": (json.dumps(run((100, 20), (200, 30), (300, 1)), indent=4), None),
    "vllm bench appended": (json.dumps(run((100, 20))) + "\n" + json.dumps(run((200, 30), (300, 1))), None),
    "vllm sweep": (json.dumps([run((100, 20), start_times=[1]), run((200, 30), (300, 1), start_times=[2, 3])]), None),
    "sglang": (lines(run((100, 20), (200, 30), (300, 1), backend="sglang", itls=[[0.1], [0.2, 0.3], []])), None),
    "guidellm": (
        json.dumps(
            {
                "metadata": {"version": 1},
                "benchmarks": [
                    {
                        "config": {"profile": {"rates": [1.0]}},
                        "requests": {
                            "successful": [guidellm(7e8, 100, 20), guidellm(7e8 + 0.5, 200, 30), guidellm(7e8 + 2, 300, 1)],
                            "incomplete": [guidellm(7e8 + 3, 400, 5)],
                            "errored": [],
                        },
                    }
                ],
            }
        ),
        [0, 0.5, 2],
    ),
    "aiperf": (
        lines(
            aiperf(1_759_813_207_000_000_000, 100, 20),
            aiperf(1_759_813_207_500_000_000, 200, 30),
            aiperf(1_759_813_208_000_000_000, 250, None),
            aiperf(1_759_813_209_000_000_000, 300, 1),
        ),
        [0, 0.5, 2],
    ),
    "inference-perf": (
        json.dumps(
            [
                {"start_time": 5.5, "info": {"input_tokens": 100, "output_tokens": 20}, "request": "{}", "error": None},
                {"start_time": 6.0, "info": {"input_tokens": 200, "output_tokens": 30}, "request": "{}", "error": None},
                {"start_time": 7.5, "info": {"input_tokens": 300, "output_tokens": 1}, "request": "{}", "error": None},
            ]
        ),
        [0, 0.5, 2],
    ),
    "llmperf": (
        json.dumps(
            [
                {"error_code": None, "number_input_tokens": 100, "number_output_tokens": 20},
                {"error_code": 429, "number_input_tokens": 100, "number_output_tokens": 20},
                {"error_code": None, "number_input_tokens": 200, "number_output_tokens": 30},
                {"error_code": None, "number_input_tokens": 300, "number_output_tokens": 1},
            ]
        ),
        None,
    ),
    "splitwise": (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
        "0,2,0,0.25,1,100,20\n1,2,0,0.75,1,200,30\n2,2,0,2.25,1,300,1\n",
        [0, 0.5, 2],
    ),
    "production stack": (
        ",prompt_tokens,generation_tokens,launch_time\n0,100,20,1700000000\n1,200,30,1700000000.5\n2,300,1,1700000002\n",
        [0, 0.5, 2],
    ),
    "openai usage": (
        lines(
            *(
                {
                    "id": "x",
                    "created": 1_700_000_000 + t,
                    "usage": {"prompt_tokens": p, "completion_tokens": o, "total_tokens": p + o},
                }
                for t, p, o in [(0, 100, 20), (1, 200, 30), (3, 300, 1)]
            )
        ),
        [0, 1, 3],
    ),
    "unsorted, epoch in ms": (
        "created_at,isl,osl\n1700000002000,300,1\n1700000000000,100,20\n1700000000500,200,30\n",
        [0, 0.5, 2],
    ),
    "row names without a name of their column": (
        "num_prefill_tokens\tnum_decode_tokens\nr1\t100\t20\nr2\t200\t30\nr3\t300\t1\n",
        None,
    ),
    "separator at the end of rows": (HEADER + "100,20,\n200,30,\n300,1,\n", None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name: str) -> None:
    content, arrivals = SHAPES[name]
    for data in (content.encode(), gzip.compress(content.encode())):
        trace = read(data)
        assert (trace.prompt.tolist(), trace.output.tolist()) == ([100, 200, 300], [20, 30, 1])
        assert trace.prompt.dtype == trace.output.dtype == np.int64
        assert (None if trace.arrivals is None else trace.arrivals.tolist()) == (
            None if arrivals is None else pytest.approx(arrivals)
        )
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


# What cannot be used


def test_each_kind_of_bad_row_is_left_out_and_told_with_its_first() -> None:
    bad = "7,0\n0,7\n-7,8\n7,x\n7,\n7.5,2\n1,2,3\n8000,193\n8001,193\n7,nan\n"
    trace = read(HEADER + "10,5\n" * 10 + bad, max_total=8192)
    assert trace.prompt.tolist() == [10] * 10
    assert trace.notes == (
        "read from num_prefill_tokens, num_decode_tokens",
        "left out: 1 (5 %) of other than 2 fields, first in row 18: '3 fields'; "
        "3 (15 %) without a number of tokens, first in row 15: '7 + x'; "
        "1 (5 %) of a negative number of tokens, first in row 14: '-7 + 8'; "
        "1 (5 %) of no whole number of tokens, first in row 17: '7.5 + 2'; "
        "1 (5 %) without prompt tokens, first in row 13: '0 + 7'; "
        "1 (5 %) without output tokens, first in row 12: '7 + 0'; "
        "2 (10 %) of more than 8,192 tokens, first in row 19: '8000 + 193'",
    )


def test_requests_that_failed_are_left_out_whatever_their_lengths() -> None:
    trace = read(json.dumps(run((10, 5), (11, 6), (12, 0), (13, 7), errors=["", "", "Connection reset", "Timeout"])))
    assert trace.prompt.tolist() == [10, 11]
    assert trace.notes[-1] == "left out: 2 (50 %) failed, first in row 3: 'Connection reset'"


def test_more_than_half_unusable_is_refused_with_the_shares() -> None:
    refused(
        HEADER + "10,5\n" + "9000,1\n" * 2 + "7,0\n",
        "got 4 requests, of which 1 (25 %) without output tokens, first in row 5: '7 + 0'; 2 (50 %) of more than 8,192 tokens",
        "allowed: at most half",
        max_total=8192,
    )
    assert len(read(HEADER + "10,5\n" + "9000,1\n", 8192).prompt) == 1


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
        (json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}]}]), ["texts (conversations)", "counts"]),
        (lines({"prompt": "hello", "output_tokens": 5}), ["texts (prompt)", "vllm bench serve"]),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_named_with_the_way_on(content: str | bytes, parts: list[str]) -> None:
    refused(content, *parts)


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    for name, part in [("none.csv", "No such file"), (".", "directory"), ("x" * 300, "too long")]:
        with pytest.raises(SpecError) as error:
            read_trace(tmp_path / name)
        assert part in str(error.value)


def test_requests_that_are_all_alike() -> None:
    trace = choose_trace("512/128", max_total=8192)
    assert (trace.name, trace.kind) == ("512/128", "fixed")
    assert (set(trace.prompt), set(trace.output), len(trace.prompt)) == ({512}, {128}, 8192)
    assert trace.sha256 != choose_trace("512/129").sha256
    with pytest.raises(SpecError) as error:
        choose_trace("8192/1", max_total=8192)
    assert "8,192 (100 %) of more than 8,192 tokens" in str(error.value)


# What else it says


def test_starts_that_cannot_be_used_give_no_arrivals() -> None:
    header = "timestamp,num_prefill_tokens,num_decode_tokens\n"
    for rows, note in [
        ("1,9,9\nnoon,9,9\n", "no arrivals: 1 start times cannot be read, first in row 3: 'noon'"),
        ("1,9,9\n1,9,9\n", "no arrivals: all start at once"),
    ]:
        trace = read(header + rows)
        assert (len(trace.prompt), trace.arrivals, trace.notes[1]) == (2, None, note)
    two_runs = read(lines(run((9, 9), start_times=[1]), run((9, 9), start_times=[5])))
    assert (two_runs.arrivals, two_runs.duration_s) == (None, 8.0)
    assert two_runs.notes[1] == "no arrivals: 2 runs in it, one after the other"


def test_arrivals_count_from_the_first_request_that_is_used() -> None:
    trace = read("arrived_at,num_prefill_tokens,num_decode_tokens\n1,9,0\n5,8,8\n3,7,7\n")
    assert trace.arrivals is not None
    assert (trace.arrivals.tolist(), trace.prompt.tolist()) == ([0, 2], [7, 8])


def test_the_share_that_prefix_caching_would_find() -> None:
    trace = read(
        lines(
            {"timestamp": 0, "input_length": 1000, "output_length": 9, "hash_ids": [0, 1]},
            {"timestamp": 1, "input_length": 1300, "output_length": 9, "hash_ids": [0, 2, 3]},  # one block of 512
            {
                "timestamp": 2,
                "input_length": 1000,
                "output_length": 9,
                "hash_ids": [0, 1],
            },  # all 1,000, its last block in part
            {"timestamp": 3, "input_length": 700, "output_length": 9, "hash_ids": [4, 1]},  # not from the first block on
        )
    )
    assert trace.cached == pytest.approx(1512 / 4000)
    assert "; prefix caching would find 38% of the prompt tokens; " in describe_trace(trace)
    assert read(HEADER + "1,1\n").cached is None


def test_the_line_that_says_what_was_understood() -> None:
    made = "arrived_at,isl,osl\n" + "".join(f"{t},{10 * n},{n}\n" for n, t in enumerate([0, 0, 1, 2, 5]))
    assert describe_trace(read(made)) == (  # gaps 1, 1, 3: their mean is 5/3, their standard deviation sqrt(8)/3
        "trace a file.txt (file): 4 requests; prompt tokens P50 25, P90 37, P99 40; output tokens P50 2, P90 4, P99 4; "
        "arriving over 5.0 s, 0.6 requests/s, CV of the gaps 0.57; read from isl, osl, arrived_at; "
        "left out: 1 (20 %) without prompt tokens, first in row 2: '0 + 0'"
    )
    assert "; served in 4.0 s, 0.50 requests/s; read from input_lens" in describe_trace(read(lines(run((9, 9), (9, 9)))))
    assert "; no arrival times in it; " in describe_trace(read(HEADER + "1,1\n"))


@given(
    st.binary(max_size=300)
    | st.text('019.,-\n"', max_size=40).map(lambda text: (HEADER + text).encode())
    | st.binary(max_size=30).map(gzip.compress)
    | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    ).map(lambda value: json.dumps([value]).encode())
)
def test_any_bytes_give_a_trace_or_one_line(data: bytes) -> None:
    told, shortest, gaps = "", 1, np.zeros(1)
    try:
        trace = read(data)
        shortest = min(trace.prompt.min(), trace.output.min())
        gaps = gaps if trace.arrivals is None else np.diff(trace.arrivals)
    except SpecError as error:
        told = str(error)
    assert len(told.splitlines()) <= 1
    assert shortest >= 1
    assert (gaps >= 0).all()
