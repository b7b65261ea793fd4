"""A serving trial in the JSON result format of `vllm bench serve` 0.32: `python -m analysis.export TRIAL_DIR [--out FILE]`.

Keys, units and formulas are those of vllm/benchmarks/serve.py: times in seconds, summaries in milliseconds. One thing differs:
our `start_times`, and with them `ttfts` and `latencies`, count from a request's scheduled arrival, not from when it was sent,
so that a late injection shows (no coordinated omission). Further keys, as --metadata adds them, say so and what the trial is.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.load import chunk_label
from experiments.engine import Record
from experiments.metrics import duration, of_phase, point_phase
from experiments.provenance import ROOT
from experiments.spec import SpecError
from experiments.store import read_trial, to_json, trial_is_whole


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
    date = datetime.fromisoformat(facts["started"]).strftime("%Y%m%d-%H%M%S")
    head = {"date": date, "endpoint_type": engine, "backend": engine, "label": None, "model_id": model, "tokenizer_id": model}
    head |= {"num_prompts": len(record.requests), "request_rate": role["rate"] or "inf"}
    head |= {"burstiness": 1.0, "max_concurrency": None}  # Poisson arrivals, whatever the engine is doing
    head |= {key: facts[key] for key in ("figure", "testbed", "scale", "model", "seed", "trial")}
    head |= {"qps": role["qps"], "chunk_size": chunk_label(role["chunk_size"]), "max_num_batched_tokens": role["budget"]}
    return head | {"trace": facts["trace"]["name"], "start_times_are": "scheduled arrivals"} | _results(record)


def _results(record: Record) -> dict[str, Any]:
    """Lists with an entry for each request, in the order of arrival; totals and summaries of those that finished."""
    requests, given = record.requests.sort_values("request"), record.tokens.groupby("request")["time_s"].agg(list)
    finished = requests["last_step"] >= 0
    times = [given[name] if ok else [] for name, ok in zip(requests["request"], finished, strict=True)]
    rows = pd.DataFrame({"start": requests["arrival_s"], "prompt": requests["prompt_tokens"], "times": times, "done": finished})
    rows["ttft"] = [own[0] - start if own else 0.0 for own, start in zip(times, rows["start"], strict=True)]
    rows["latency"] = [own[-1] - start if own else 0.0 for own, start in zip(times, rows["start"], strict=True)]
    rows["tokens"], rows["itl"] = [len(own) for own in times], [np.diff(own).tolist() for own in times]
    done, seconds = rows[rows["done"]], duration(record)
    more = done[done["tokens"] > 1]
    samples = {"ttft": done["ttft"], "tpot": (more["latency"] - more["ttft"]) / (more["tokens"] - 1)}
    samples |= {"itl": pd.Series(list(chain(*done["itl"])), dtype=float), "e2el": done["latency"]}
    inputs, outputs, (peak_tokens, peak_requests) = int(done["prompt"].sum()), int(done["tokens"].sum()), _peaks(done)
    result: dict[str, Any] = {"duration": seconds, "completed": len(done), "failed": len(rows) - len(done)}
    result |= {"total_input_tokens": inputs, "total_output_tokens": outputs, "request_throughput": len(done) / seconds}
    result |= {"request_goodput": None, "output_throughput": outputs / seconds}
    result |= {"total_token_throughput": (inputs + outputs) / seconds, "rtfx": 0.0}  # rtfx: of audio
    result |= {"max_output_tokens_per_s": peak_tokens, "max_concurrent_requests": peak_requests}
    lists = {"input_lens": "prompt", "output_lens": "tokens", "ttfts": "ttft", "itls": "itl", "latencies": "latency"}
    result |= {key: rows[column].tolist() for key, column in (lists | {"start_times": "start"}).items()}
    result |= {"queue_times": [0.0] * len(rows), "generated_texts": [""] * len(rows)}  # queue: of a client, which we have not
    result |= {"errors": ["" if ok else "not finished" for ok in rows["done"]]}
    return result | {key: value for name, sample in samples.items() for key, value in _summary(name, sample).items()}


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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 if there is no such trial, it is of another kind or the file cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m analysis.export", description=__doc__.split("\n")[0])
    parser.add_argument("trial", type=Path, help="a trial's directory, .../trials/SESSION/TRIAL")
    parser.add_argument("--out", type=Path, help="default: artifacts/report/FIGURE-TESTBED-SESSION-TRIAL.json")
    options = parser.parse_args(argv)
    try:
        if not trial_is_whole(options.trial):
            raise SpecError(f"{options.trial}: no complete trial; allowed: a directory .../trials/SESSION/TRIAL of a run")
        facts, record = read_trial(options.trial)
        name = "-".join(str(facts[key]) for key in ("figure", "testbed", "session", "trial"))
        target = options.out or ROOT / "artifacts" / "report" / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(to_json(bench_result(facts, record)))
    except (SpecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"exported to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
