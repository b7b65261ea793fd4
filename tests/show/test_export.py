"""The export against vLLM's own code, on the same raw token times."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import random
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine, serving_run, tiny_record

from analysis.judge.load import TrialRecord
from analysis.show import export
from experiments.engine.session import run_session
from experiments.records.metrics import of_phase, point_phase, serving_metrics
from experiments.records.record import Record
from experiments.records.store import Run as Store
from experiments.spec.expand import Session

FACTS: dict[str, Any] = {
    "kind": "serving",
    "figure": "fig9b",
    "testbed": "cpu",
    "scale": 8,
    "model": "mistral-7b",
    "session": "mistral-7b-seed42",
    "trial": "qps1-chunk64",
    "seed": 42,
    "phases": [{"role": "probe"}, {"role": "point", "qps": 1.0, "rate": 2.5, "chunk_size": 64, "budget": 8}, {"role": "probe"}],
    "trace": {"name": "synthetic-sharegpt"},
    "settings": {"model": "mistral-7b-w8"},
    "engine": {"engine": "vllm"},
    "started": "2026-11-22T18:05:04.123+00:00",
}


GAP = -math.log(1 - random.Random(42).random()) / 2.5  # the first of seed 42, seconds


def unfinished(record: Record) -> Record:
    """The same, but the first measured request never got its last token."""
    requests = record.requests.copy()
    requests.loc[requests["request"] == 1, "last_step"] = -1
    return dataclasses.replace(record, requests=requests, truncated=True)


@pytest.fixture(scope="module")
def trial() -> TrialRecord:
    return serving_run(replicates=1).trials[0]


def test_times_and_units_by_hand() -> None:
    found = export.bench_result(FACTS, tiny_record())
    assert found["ttfts"] == pytest.approx([1.0, 0.8, 0.5])
    assert [len(gaps) for gaps in found["itls"]] == [2, 1, 0]
    assert found["itls"][0] == pytest.approx([0.25, 0.75])
    assert found["start_times"] == [1.0, 1.2, 5.0]
    assert (found["input_lens"], found["output_lens"]) == ([12, 4, 2], [3, 2, 1])
    assert found["median_ttft_ms"] == pytest.approx(800)
    assert found["median_itl_ms"] == pytest.approx(250)
    assert found["mean_tpot_ms"] == pytest.approx((500 + 250) / 2)  # the request of one token has none
    assert found["median_e2el_ms"] == pytest.approx(1050)
    assert found["duration"] == pytest.approx(4.5 + GAP)
    assert found["total_token_throughput"] == pytest.approx((18 + 6) / (4.5 + GAP))
    assert (found["completed"], found["failed"], found["errors"]) == (3, 0, ["", "", ""])
    assert (found["date"], found["request_rate"], found["model_id"]) == ("20261122-180504", 2.5, "mistral-7b-w8")
    assert found["start_times_are"] == "scheduled arrivals"
    saturated = FACTS | {"phases": [{"role": "probe"}, FACTS["phases"][1] | {"rate": 0.0}]}
    found = export.bench_result(saturated, tiny_record())
    assert (found["request_rate"], found["duration"]) == ("inf", 4.5)  # all at once, without a gap


def test_it_agrees_with_our_own_metrics(trial: TrialRecord) -> None:
    found, role = export.bench_result(trial.facts, trial.record), point_phase(trial.facts["phases"])
    ours = serving_metrics(of_phase(trial.record, role))
    assert found["median_ttft_ms"] == pytest.approx(1e3 * ours["ttft_p50"])
    assert found["p99_itl_ms"] == pytest.approx(1e3 * ours["tbt_p99"])
    assert found["output_throughput"] < ours["output_tokens_per_s"]


def test_duration_is_that_of_the_phase_as_on_the_clock_of_vllm(trial: TrialRecord, vllm_serve: ModuleType) -> None:
    record, phase = trial.record, point_phase(trial.facts["phases"])
    before = of_phase(record, phase - 1).steps.iloc[-1]  # no time passes here between two phases
    last = of_phase(record, phase).tokens["time_s"].max()
    found = export.bench_result(trial.facts, record)
    assert found["duration"] == pytest.approx(last - (before["start_s"] + before["seconds"]))
    assert found["output_throughput"] == pytest.approx(found["total_output_tokens"] / found["duration"])
    benchmark, requests = (inspect.getsource(part) for part in (vllm_serve.benchmark, vllm_serve.get_request))
    assert benchmark.index("benchmark_start_time = time.perf_counter()") < benchmark.index("in get_request(")
    assert requests.index("await asyncio.sleep(sleep_interval_s)") < requests.index("yield request")  # the first one too


@pytest.fixture(scope="module")
def vllm_serve() -> ModuleType:
    pytest.importorskip("vllm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.benchmarks import serve

    return serve  # type: ignore[no-any-return]


def theirs(serve: ModuleType, record: Record, seconds: float) -> dict[str, Any]:
    """What vLLM computes of a record's raw times, under the names it writes."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    outputs = []
    for row in record.requests.to_dict("records"):
        output = RequestFuncOutput(prompt_len=row["prompt_tokens"], start_time=row["arrival_s"], error="not finished")
        if row["last_step"] >= 0:
            times = record.tokens.loc[record.tokens["request"] == row["request"], "time_s"].tolist()
            output.success, output.error, output.output_tokens = True, "", len(times)
            output.ttft, output.latency = times[0] - row["arrival_s"], times[-1] - row["arrival_s"]
            output.itl = np.diff(times).tolist()
        outputs.append(output)
    metrics, lengths = serve.calculate_metrics([], outputs, seconds, None, [99.0], {})
    found: dict[str, Any] = {"output_lens": lengths}
    for field in dataclasses.fields(metrics):
        value = getattr(metrics, field.name)
        if field.name.startswith("percentiles_"):
            found[f"p99_{field.name.removeprefix('percentiles_')}"] = value[0][1]
        elif field.name != "request_goodput":
            found[field.name + ("_tokens" if field.name in ("total_input", "total_output") else "")] = value
    return found


@pytest.mark.parametrize("which", ["tiny", "unfinished", "trial"])
def test_every_number_is_the_one_that_vllm_computes(which: str, vllm_serve: ModuleType, trial: TrialRecord) -> None:
    whole = {"tiny": tiny_record(), "unfinished": unfinished(tiny_record()), "trial": trial.record}[which]
    facts = trial.facts if which == "trial" else FACTS
    found = export.bench_result(facts, whole)
    expected = theirs(vllm_serve, of_phase(whole, point_phase(facts["phases"])), found["duration"])
    assert len(expected) > 25
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key


def test_every_key_that_vllm_writes_is_there(vllm_serve: ModuleType, trial: TrialRecord) -> None:
    benchmark, main = inspect.getsource(vllm_serve.benchmark), inspect.getsource(vllm_serve.main_async)
    results = benchmark[benchmark.index("        result = {") :]
    keys = set(re.findall(r'^            "(\w+)": ', results[: results.index("}\n")], re.MULTILINE))
    keys |= set(re.findall(r'result_json\["(\w+)"\] =', main))
    keys -= {"ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps"}  # written only where asked for
    assert {"duration", "itls", "start_times", "date", "burstiness"} <= keys
    assert keys <= set(export.bench_result(trial.facts, trial.record))


@pytest.fixture
def stored(trial: TrialRecord, tmp_path: Path) -> Path:
    return Store(tmp_path / "fig9b-cpu", {"figure": "fig9b"}).write_trial(
        trial.facts["session"], trial.facts["trial"], trial.facts, trial.record
    )


def test_the_command_writes_a_file(
    stored: Path, trial: TrialRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "result.json"
    assert export.main([str(stored), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"exported to {out}\n"
    written = json.loads(out.read_text())
    assert export.main([str(stored), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"exported": str(out), "trial": str(stored)}
    assert export.main([str(stored), "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert written["completed"] == written["num_prompts"] > 30
    assert written["ttfts"] == export.bench_result(trial.facts, trial.record)["ttfts"]


def test_a_bad_path_is_one_line(
    stored: Path, smoke_session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = next(iter(run_session(smoke_session, {"pass-0"}, FakeEngine)))
    prefill = Store(tmp_path / "smoke-cpu", {"figure": "smoke"}).write_trial(
        result.session, result.trial, result.facts, result.record
    )
    (stored.parent / "half").mkdir()
    file = stored / "trial.json"
    cases = {path: f"TRIAL: got {path}; allowed: " for path in (tmp_path / "nothing", stored.parent / "half", file)}
    cases |= {Path(): "TRIAL: got none; allowed: "}
    cases |= {prefill: "allowed: serving"}
    for path, said in cases.items():
        assert export.main(["" if path == Path() else str(path), "--out", str(tmp_path / "x.json")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
        assert error.count("\n") == 1
    assert export.main([str(stored), "--out", str(file / "x.json")]) == 2  # below a file
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_nothing_received_is_refused() -> None:
    record = tiny_record()
    silent = dataclasses.replace(record, requests=record.requests.assign(last_step=-1), tokens=record.tokens.iloc[:0])
    with pytest.raises(export.SpecError, match="no request got a token"):
        export.bench_result(FACTS, silent)
