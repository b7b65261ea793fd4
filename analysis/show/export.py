"""A serving trial in the JSON result format of `vllm bench serve` 0.32: `make export`.

Keys, units and formulas are those of vllm/benchmarks/serve.py: times in seconds, summaries in milliseconds. One thing differs:
our `start_times`, and with them `ttfts` and `latencies`, count from a request's scheduled arrival, not from when it was sent,
so that a late injection shows (no coordinated omission). `duration` begins, as vLLM's, before the gap that precedes the first
request, where our own metrics begin with its arrival. Further keys, as --metadata adds them, say so and what the trial is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.judge.load import chunk_label
from experiments.records.errors import SpecError
from experiments.records.metrics import duration, of_phase, point_phase
from experiments.records.provenance import ROOT
from experiments.records.record import Record
from experiments.records.store import read_trial, to_json, trial_is_whole, write_whole
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.spec.workload import poisson_arrivals


def bench_result(facts: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """The measured phase of a serving trial as vLLM writes it. Raises SpecError for another kind of trial or no tokens."""
    name = f"{facts['session']}/{facts['trial']}"
    if facts["kind"] != "serving":
        raise SpecError(f"{name}: a trial of kind {facts['kind']}; allowed: serving")
    phase = point_phase(facts["phases"])
    role, record = facts["phases"][phase], of_phase(record, phase)
    if record.tokens.empty:
        raise SpecError(f"{name}: no request got a token; there is nothing to export")
    engine, model = facts["engine"]["engine"], facts["settings"]["model"]
    # vLLM's clock starts where the phase does, a drawn gap before the first request is sent.
    before = float(poisson_arrivals(role["rate"], 1, facts["seed"])[0]) if role["rate"] else 0.0
    head = {
        "date": datetime.fromisoformat(facts["started"]).strftime("%Y%m%d-%H%M%S"), "label": None,
        "endpoint_type": engine, "backend": engine, "model_id": model, "tokenizer_id": model,
        "num_prompts": len(record.requests), "request_rate": role["rate"] or "inf",
        "burstiness": 1.0, "max_concurrency": None,  # Poisson arrivals, whatever the engine is doing
        "qps": role["qps"], "chunk_size": chunk_label(role["chunk_size"]), "max_num_batched_tokens": role["budget"],
        "trace": facts["trace"]["name"], "start_times_are": "scheduled arrivals",
    }  # fmt: skip
    return (
        head | {key: facts[key] for key in ("figure", "testbed", "scale", "model", "seed", "trial")} | _results(record, before)
    )


def _results(record: Record, before: float) -> dict[str, Any]:
    """Lists with an entry for each request, in the order of arrival; totals and summaries of those that finished.

    before: seconds from the start of the phase to its first arrival.
    """
    requests, given = record.requests.sort_values("request"), record.tokens.groupby("request")["time_s"].agg(list)
    done = requests["last_step"] >= 0
    times = [given[name] if ok else [] for name, ok in zip(requests["request"], done, strict=True)]
    rows = pd.DataFrame({"start": requests["arrival_s"], "prompt": requests["prompt_tokens"], "times": times, "done": done})
    rows["tokens"], rows["itl"] = rows["times"].map(len), rows["times"].map(lambda own: np.diff(own).tolist())
    for column, which in (("ttft", 0), ("latency", -1)):
        rows[column] = (rows["times"].str[which] - rows["start"]).fillna(0.0)
    finished, seconds = rows[rows["done"]], before + duration(record)
    more = finished[finished["tokens"] > 1]
    inputs, outputs = int(finished["prompt"].sum()), int(finished["tokens"].sum())
    peak_tokens, peak_requests = _peaks(finished)
    lists = {"input_lens": "prompt", "output_lens": "tokens", "start_times": "start",
             "ttfts": "ttft", "itls": "itl", "latencies": "latency"}  # fmt: skip
    totals = {
        "duration": seconds, "completed": len(finished), "failed": len(rows) - len(finished),
        "total_input_tokens": inputs, "total_output_tokens": outputs,
        "request_throughput": len(finished) / seconds, "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds, "request_goodput": None, "rtfx": 0.0,  # rtfx: of audio
        "max_output_tokens_per_s": peak_tokens, "max_concurrent_requests": peak_requests,
        "queue_times": [0.0] * len(rows),  # of a client, which we have not
        "generated_texts": [""] * len(rows), "errors": ["" if ok else "not finished" for ok in rows["done"]],
    }  # fmt: skip
    summaries = _summary("ttft", finished["ttft"]) | _summary("e2el", finished["latency"])
    summaries |= _summary("tpot", (more["latency"] - more["ttft"]) / (more["tokens"] - 1))
    summaries |= _summary("itl", finished["itl"].explode().dropna())
    return totals | summaries | {key: rows[column].tolist() for key, column in lists.items()}


def _summary(name: str, seconds: pd.Series) -> dict[str, float]:
    """Mean, median, standard deviation (of the population) and P99, milliseconds; of nothing they are 0, as in vLLM."""
    values = 1e3 * (seconds.to_numpy(dtype=np.float64) if len(seconds) else np.zeros(1))
    found = {"mean": values.mean(), "median": np.median(values), "std": values.std(), "p99": np.percentile(values, 99)}
    return {f"{statistic}_{name}_ms": float(value) for statistic, value in found.items()}


def _peaks(done: pd.DataFrame) -> tuple[float, int]:
    """The most tokens given, and the most requests present, in any whole second since the first request."""
    first, last = done["start"].min(), (done["start"] + done["latency"]).max()
    tokens, present = np.zeros((2, math.ceil(last - first) + 1 if len(done) else 1))
    for start, times in zip(done["start"], done["times"], strict=True):
        np.add.at(tokens, (np.array(times) - first).astype(np.int64), 1)
        present[int(start - first) : int(times[-1] - first) + 1] += 1
    return float(tokens.max()), int(present.max())


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 if there is no such trial, it is of another kind or the file cannot be written."""
    parser = arguments("analysis.show.export", __doc__)
    parser.add_argument("trial", type=Path, help="a trial's directory, .../trials/SESSION/TRIAL")
    parser.add_argument("--out", type=Path, help="default: artifacts/report/FIGURE-TESTBED-SESSION-TRIAL.json")
    options = parse(parser, argv)
    if not trial_is_whole(options.trial):
        came = "none" if options.trial == Path() else options.trial
        raise SpecError(f"TRIAL: got {came}; allowed: the folder of a complete trial, .../trials/SESSION/TRIAL")
    facts, record = read_trial(options.trial)
    name = "-".join(str(facts[key]) for key in ("figure", "testbed", "session", "trial"))
    target = options.out or ROOT / "artifacts" / "report" / f"{name}.json"
    write_whole(target, to_json(bench_result(facts, record)))
    console.print(f"exported to {target}")
    result(exported=target, trial=options.trial)
    return 0


if __name__ == "__main__":
    sys.exit(main())
