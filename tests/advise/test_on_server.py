"""Advice for a server that runs: from results of its benchmark back to what made them; what cannot be explained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_engine import KNOWN, SETTINGS

from analysis.advise import recommend
from analysis.advise.capacity import Setting
from analysis.advise.case import Case
from analysis.advise.on_server import Bench, Scales, as_is, errors, fitted, read_benches
from experiments.calibrate.published import write
from experiments.records.errors import SpecError
from experiments.records.record import Phase, Request
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.expand import expand
from experiments.spec.spec import load_figure, load_testbed
from experiments.spec.workload import poisson_arrivals, synthetic_trace

TRUTH = Scales(1.4, 3e-3, 8e-3)
ERROR = replace(KNOWN.error, end_to_end=None, held_out=0.03)
SESSION = next(s for s in expand(load_figure("fig9b"), load_testbed("cpu"), 1) if s.engine.model == SETTINGS.model)
CASE = as_is(Case(SESSION, replace(KNOWN, error=ERROR), synthetic_trace(), 1024, 8192, (42,)))


def result(rate: float, seed: int, budget: int = 128, count: int = 150, **changes: Any) -> dict[str, Any]:
    """What `vllm bench serve --save-detailed` would save of a server that is as TRUTH has it."""
    draw = np.random.default_rng(seed)
    lengths = np.stack([draw.integers(108, 325, count), draw.integers(26, 79, count)], axis=1).tolist()
    arrivals = poisson_arrivals(rate, count, seed).tolist()
    engine = SimulatedEngine(replace(SETTINGS, max_batch=16, max_budget=budget), TRUTH.applied(KNOWN), seed)
    record = engine.run([Phase(budget, tuple(Request(at, *own) for at, own in zip(arrivals, lengths, strict=True)))], 1e9)
    times = record.tokens.groupby("request")["time_s"].agg(list)
    first = [own[0] - at + TRUTH.front_s for own, at in zip(times, arrivals, strict=True)]
    found = {
        "request_rate": rate,
        "max_concurrency": None,
        "duration": max(map(max, times)),
        "completed": count,
        "input_lens": [prompt for prompt, _ in lengths],
        "output_lens": [output for _, output in lengths],
        "start_times": [1000.0 + at for at in arrivals],
        "ttfts": first,
        "itls": [np.diff(own).tolist() for own in times],
        "errors": [""] * count,
    }
    return found | changes


def benches(*results: dict[str, Any], folder: Path, told: str = "128/16") -> list[Bench]:
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, one in zip(paths, results, strict=True):
        path.write_text(json.dumps(one))
    return read_benches(",".join(map(str, paths)), told)


def test_scales_come_back_and_foretell_a_third_load_and_another_chunk_size(tmp_path: Path) -> None:
    found = benches(result(1.5, 1), result(2.6, 2), folder=tmp_path)
    scales = fitted(CASE, found)
    assert scales.steps == pytest.approx(TRUTH.steps, rel=0.07)
    third, _ = benches(result(2.0, 3), result(0.5, 3), folder=tmp_path)
    other, _ = benches(result(2.6, 4, 256), result(0.5, 3), folder=tmp_path, told="256/16")
    assert max(map(abs, errors(CASE, scales, third).values())) < 0.1
    assert max(map(abs, errors(CASE, scales, other).values())) < 0.1
    unscaled = errors(CASE, Scales(1.0, KNOWN.loop.between_s, 0.0), third)
    assert abs(unscaled["ttft_p50"]) > 0.2  # so the scales are what makes it right


def test_what_the_client_saw_by_hand(tmp_path: Path) -> None:
    """Sixteen requests, sent a second apart in another order; one of 20 failed and counts for nothing."""
    count = 20
    lists = {
        "input_lens": [8] * count,
        "output_lens": [3] * 19 + [0],
        "ttfts": [0.5] * 19 + [0.0],
        "errors": [""] * 19 + ["no"],
    }
    lists |= {"itls": [[0.1, 0.3]] * 19 + [[]], "start_times": [50.0 + n for n in reversed(range(count))]}
    path = tmp_path / "both.jsonl"  # --append-result: one after the other
    slow = lists | {"start_times": [9.0 * n for n in range(count)], "request_rate": "inf", "max_concurrency": 4}
    path.write_text("\n".join(json.dumps({"request_rate": 1.0, **one}) for one in (lists, slow)))
    first, second = read_benches(str(path), "64/8")
    assert first.setting == Setting(64, 8)
    assert first.arrivals.tolist() == list(range(19))
    assert first.lengths == ((8, 3),) * 19
    assert (first.users, second.users) == (0, 4)
    assert first.seen.requests["e2e"].tolist() == pytest.approx([0.9] * 19)
    assert first.seen.requests["tpot"].tolist() == pytest.approx([0.2] * 19)
    assert first.seen.percentile("tbt_p50") == pytest.approx(0.2)
    assert first.rate == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "told", "words"),
    [
        ([{}, {}], "128/16", "got 0.json with requests sent at 1.69/s, 1.json with requests sent at 1.69/s; allowed: two runs"),
        ([{}], "128/16", "got 0.json with requests sent at 1.69/s; allowed: two runs or more, the fastest at least 1.2 times"),
        ([{"itls": None}], "128/16", "got no itls; allowed: what vllm bench serve --save-result --save-detailed writes"),
        ([{"ttfts": [0.0] * 150}], "128/16", "got 0 of 150 requests answered; allowed: at least 16, and 95% of them"),
        ([{}], "", "SERVED: got '' for "),
        ([{}], "128", "SERVED: got '128' for "),
        ([{}], "16/128", "SERVED: got '16/128' for "),
        ([{}], "0/16", "allowed: SERVED=2048/256, the server's --max-num-batched-tokens and --max-num-seqs"),
    ],
)
def test_what_is_no_use_is_told_in_a_line(changes: list[dict[str, Any]], told: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as error:
        benches(*(result(1.5, 1, **one) for one in changes), folder=tmp_path, told=told)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "got 'hello'; allowed: what vllm bench serve --save-result --save-detailed writes"),
        (
            '{"total_input_tokens": 90, "total_output_tokens": 60, "completed": 3}',
            "got a summary, 30 and 20 tokens at the mean",
        ),
        ('{"input_lens": [1, 2', "cut off in line 1"),
        (None, "cannot be read: No such file or directory; allowed: files, separated by commas; what vllm bench serve"),
    ],
)
def test_what_is_no_result_is_told_without_advice_on_traces(text: str | None, words: str, tmp_path: Path) -> None:
    if text:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(SpecError) as error:
        read_benches(str(tmp_path / "a.json"), "128/16")
    assert str(error.value).startswith(f"BENCH: {tmp_path / 'a.json'}: ")
    assert words in str(error.value)
    assert "TRACE" not in str(error.value)


def test_settings_of_a_server_without_its_results_are_refused() -> None:
    with pytest.raises(SpecError, match="SERVED: got 128/16 without BENCH"):
        read_benches("", "128/16")
    assert read_benches("", "") == []


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's calibration is KNOWN."""
    write(replace(KNOWN, error=ERROR), tmp_path / "known.yaml")
    monkeypatch.setattr(recommend, "calibration_here", lambda *_: tmp_path / "known.yaml")


def ask(folder: Path, *results: dict[str, Any], question: str = "TBT_P99=40ms") -> int:
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, one in zip(paths, results, strict=True):
        path.write_text(json.dumps(one | {"max_num_batched_tokens": "128", "max_num_seqs": "16"}))  # as --metadata has it
    options = ["--testbed=cpu", "--model=mistral-7b", f"--report={folder}", f"--bench={','.join(map(str, paths))}"]
    return recommend.main([*options, "--", question])


@pytest.mark.usefixtures("calibrated")
def test_advice_for_a_server_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, result(1.5, 1), result(2.6, 2)) == 0
    said = " ".join(capsys.readouterr().out.split())
    answer = json.loads((tmp_path / "recommend-cpu-mistral-7b.json").read_text())
    assert answer["default"]["setting"] == {"budget": 128, "max_batch": 16}
    assert answer["server"]["steps"] == pytest.approx(TRUTH.steps, rel=0.1)
    assert answer["calibration_error"]["end_to_end"] == answer["server"]["end_to_end"] < 0.2
    assert answer["trace"]["name"] == "1.json"  # the server's own requests, undivided
    assert answer["scale"] == 1
    best = answer["best"]["setting"]
    for words in (
        "the server, from calibration known: steps take 1.4",
        "0.json: 150 requests at 1.69/s, chunk size 128: P50 TTFT ",
        "128, now",
        "scaled to 2 runs of a server",
        f"paste: --max-num-batched-tokens {best['budget']} --max-num-seqs {best['max_batch']}, all else as the server has it",
        "this (its lengths have the same means, not the same spread): vllm bench serve --model mistral-7b ",
        "each foretold without it within ",
    ):
        assert words in said


@pytest.mark.usefixtures("calibrated")
def test_a_server_that_no_scale_explains_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its TTFT comes from elsewhere than its steps: the same at any load, but for a few."""
    odd = [result(rate, seed, ttfts=[0.02] * 75 + [9.0] * 75) for seed, rate in enumerate((1.5, 2.6))]
    assert ask(tmp_path, *odd) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "between these runs and calibration known, however it is scaled; allowed: at most 25%" in lines[0]


def test_without_a_calibration_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(recommend, "calibration_here", lambda *_: None)
    assert ask(tmp_path, result(1.5, 1), result(2.6, 2)) == 2
    assert "no calibration for testbed cpu; make calibrate makes one" in capsys.readouterr().err
