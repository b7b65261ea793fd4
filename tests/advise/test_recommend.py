"""make recommend and make capacity from the command line: answers, files, and one line for whatever is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import check_advice
import numpy as np
import pandas as pd
import pytest
from known_engine import KNOWN

from analysis.advise import case as case_module
from analysis.advise import paper_capacity, recommend
from analysis.advise.advice import Advice, Confirmed, Option
from analysis.advise.capacity import Latency, Setting
from analysis.advise.case import Case
from analysis.advise.question import Question
from analysis.advise.recommend import case_of
from analysis.advise.tell import serve_arguments, show_confirmed
from experiments.cluster.trials import Load, load_sessions
from experiments.engine.arguments import serving_arguments
from experiments.engine.session import run_session, warm_up
from experiments.engine.vllm_engine import engine_arguments, environment
from experiments.machine.doctor import problems
from experiments.records.metrics import of_phase, point_phase
from experiments.records.provenance import gpus
from experiments.records.record import Record
from experiments.simulator.simulator import simulated_engine
from experiments.spec.expand import LoadPoint, Session, expand
from experiments.spec.spec import TESTBEDS, load_figure, load_model, load_testbed
from experiments.spec.traces import Trace
from experiments.spec.workload import synthetic_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 requests, so that a simulation takes milliseconds."""
    path = tmp_path_factory.mktemp("trace") / "mine.csv"
    drawn = synthetic_trace(48)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["num_prefill_tokens", "num_decode_tokens"])
        rows.writerows(zip(drawn.prompt.tolist(), drawn.output.tolist(), strict=True))
    return path


@pytest.fixture(autouse=True)
def _short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_module, "LEAST", 128)


def ask(report: Path, trace: Path, *arguments: str, model: str = "mistral-7b") -> int:
    where = ["--testbed", "a100-sim", "--trace", str(trace), "--report", str(report), "--out", str(report)]
    return recommend.main([*where, "--model", model, *arguments])


def test_recommendation(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, trace, "TBT_P99=0.1") == 0
    said = " ".join(capsys.readouterr().out.split())
    answer = json.loads((tmp_path / "recommend-a100-sim-mistral-7b.json").read_text())
    budget = answer["best"]["setting"]["budget"]
    assert f"mistral-7b: chunk size {budget}, at most 128 requests in a step" in said
    assert "trace mine.csv (file): 48 requests; prompt tokens P50" in said
    kernels = "a100-mistral-7b (Mistral-7B on 1 A100 80 GB SXM, kernels of vLLM 0.14.0)"
    assert (
        f"SIMULATED with calibration {kernels}, step times off by 2.8% on held-out data; {answer['requests']} requests" in said
    )
    assert f"trace mine.csv, drawn again of its 48 after {answer['warm_up']} left out, Poisson arrivals, 16 seeds" in said
    assert f"--max-num-batched-tokens {budget} --max-num-seqs 128 --max-model-len 8192" in said
    assert answer["simulated"] is True
    assert answer["low"] < answer["value"] < answer["high"]
    assert answer["best"]["latency"]["tbt_p99"] <= 0.1
    assert {path.suffix for path in tmp_path.glob("recommend-*")} == {".json", ".png", ".svg"}


def test_fixed_load(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, trace, "TTFT_P50=2", "QPS=1.5") == 0
    assert "P99 TBT" in capsys.readouterr().out
    answer = json.loads((tmp_path / "recommend-a100-sim-mistral-7b.json").read_text())
    assert answer["question"]["rate"] == 1.5


@pytest.mark.parametrize(
    ("arguments", "model", "words"),
    [
        (["TBT_P99=0"], "mistral-7b", "TBT_P99: got '0'; allowed: seconds, or milliseconds as 300ms: a number above 0"),
        (["TBT_P99=-1"], "mistral-7b", "TBT_P99: got '-1'"),
        (["TTFT_P50=nan"], "mistral-7b", "TTFT_P50: got 'nan'"),
        (["QPS=fast"], "mistral-7b", "QPS: got 'fast'"),
        (["TBT_P99=0.1"], "gpt-9", "MODEL: got 'gpt-9'; allowed on testbed a100-sim: mistral-7b, yi-34b"),
        (["TBT_P99=0.1"], "", "MODEL: got ''; allowed on testbed a100-sim: mistral-7b, yi-34b"),
        (["TBT_P99=0.001"], "yi-34b", "keeps that at the lowest load looked at (0.00098 requests/s); the closest is"),
        (["TTFT_P50=0.001"], "mistral-7b", "that at the lowest load looked at (0.00098 requests/s); the closest is"),
        (["TBT_P99=0.1", "QPS=99"], "mistral-7b", "at 99 requests/s: no chunk size keeps that; the closest is"),
        (["TBT_P99=0.1", "--testbed", "moon"], "mistral-7b", "no such file; there are:"),
        (["TBT_P99=0.1", "--trace", "none.csv"], "mistral-7b", "TRACE: none.csv: cannot be read"),
    ],
)
def test_one_line_for_what_is_wrong(
    arguments: list[str], model: str, words: str, tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, trace, *arguments, model=model) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not (out and words.startswith("MODEL"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("testbed", ["a100-sim", "cpu"])
def test_a_trace_of_one_token_outputs_is_refused_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], testbed: str
) -> None:
    output = load_testbed(testbed).scale
    short = tmp_path / "short.csv"
    short.write_text("num_prefill_tokens,num_decode_tokens\n" + f"100,{output}\n" * 40)
    report = tmp_path / "report"
    where = ["--testbed", testbed, "--out", str(tmp_path), "--report", str(report), "--trace", str(short)]
    assert recommend.main([*where, "--model", "mistral-7b", "TBT_P99=0.1"]) == 2
    came = f"at most {output} output token{'s'[: output > 1]} of a request, 1 on this testbed"
    assert f"error: TRACE: short.csv: got {came}; allowed: some with two there" in capsys.readouterr().err
    assert not report.exists()


def test_a_trace_of_one_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.csv").write_text("num_prefill_tokens,num_decode_tokens\n100,10\n")
    assert ask(tmp_path, tmp_path / "one.csv", "TBT_P99=0.1") == 2
    assert "TRACE: one.csv: got 1 request; allowed: at least 16" in capsys.readouterr().err


def test_capacity_of_the_papers_machines(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_capacity.main(["--trace", str(trace), "--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    commands = [line for line in out.splitlines()[:-1] if line.startswith("paste: ")]  # the last line names files
    assert max(len(line) for line in out.splitlines()[:-1] if line not in commands) <= 80
    said = " ".join(out.split())
    assert said.count("bound by") == 1 + said.count(", bound by")  # one heading for all models and targets
    assert said.count("strict target of the paper: ") == said.count("relaxed target of the paper: ") == 2
    answers = json.loads((tmp_path / "capacity-a100-sim.json").read_text())["answers"]
    assert [(a["model"], a["target"]) for a in answers] == [
        (model, name) for model in ("mistral-7b", "yi-34b") for name in ("strict", "relaxed")
    ]
    table = pd.read_csv(tmp_path / "capacity-a100-sim.csv")
    assert set(table["chunk_size"]) >= {256, 512, 1024, 2048, 4096, 8192}
    for answer in answers:  # what is recommended lies on its curve
        target, best = answer["question"]["targets"]["tbt_p99"], answer["best"]
        own = table[(table["model"] == answer["model"]) & (table["chunk_size"] == best["setting"]["budget"])]
        assert own[np.isclose(own["target"], target)]["capacity"].item() == pytest.approx(best["rate"], rel=0.02)
    for _, curve in table.dropna().groupby(["model", "chunk_size"]):
        assert (np.diff(curve["capacity"]) >= 0).all()
    assert (tmp_path / "capacity-a100-sim.png").is_file()
    assert (tmp_path / "capacity-a100-sim.svg").is_file()


@pytest.mark.parametrize(("option", "lines"), [("--json", 1), ("--quiet", 0)])
def test_commands_speak_json_or_not_at_all(
    option: str, lines: int, tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tmp_path, trace, "TBT_P99=0.1", option) == 0
    told = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "recommend-a100-sim-mistral-7b.json").read_text())
    assert [json.loads(line)["recommended"] for line in told] == [written["recommended"]] * lines
    assert paper_capacity.main(["--trace", str(trace), "--report", str(tmp_path), option]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [len(json.loads(line)["answers"]) for line in told] == [4] * lines


def test_capacity_is_of_simulations_at_the_papers_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_capacity.main(["--testbed", "cpu"]) == 2
    assert "TESTBED: got cpu; allowed: a simulated one at the paper's scale" in capsys.readouterr().err


SERVED = {
    f"{testbed}-{session.model}": session
    for testbed in sorted(path.stem for path in TESTBEDS.glob("*.yaml"))
    if load_testbed(testbed).models
    for session in expand(load_figure("fig9b"), load_testbed(testbed), 1)
}


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on import
@pytest.mark.parametrize("session", SERVED.values(), ids=SERVED)
def test_what_is_to_be_pasted_is_what_vllm_takes(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's own parser and its check of the model's config; the model's name stands for its config alone."""
    for name, value in environment(session.engine).items():
        monkeypatch.setenv(name, value)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    case = Case(session, KNOWN, synthetic_trace(), 1024, 8192, (42,))
    words = shlex.split(serve_arguments(case, Setting(768, 8)))
    start, longest = words.index("vllm"), session.engine.max_model_len
    assert words[start + 1] == "serve"
    assert ("OMP_NUM_THREADS=1" in words[:start]) == (session.engine.platform == "cpu")
    (tmp_path / "config.json").write_text(json.dumps(load_model(session.engine.model)))
    parsed = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", str(tmp_path), *words[start + 3 :]])
    arguments = AsyncEngineArgs.from_cli_args(parsed)
    assert arguments.create_model_config().max_model_len == longest
    assert (arguments.max_num_batched_tokens, arguments.max_num_seqs, arguments.max_model_len) == (768, 8, longest)
    ours = engine_arguments(replace(session.engine, max_budget=768, max_batch=8), str(tmp_path))
    for name in serving_arguments(session.engine):
        assert getattr(arguments, name) == ours[name]
    assert (ours["enable_prefix_caching"], ours["async_scheduling"], ours["enable_chunked_prefill"]) == (False, False, True)


def test_the_papers_models_are_pasted_by_their_own_names() -> None:
    case = case_of(load_testbed("a100-sim"), "yi-34b", synthetic_trace())
    assert serve_arguments(case, Setting(768, 64)) == (
        "vllm serve 01-ai/Yi-34B --enable-chunked-prefill --max-num-batched-tokens 768 --max-num-seqs 64 --max-model-len 8192 "
        "--tensor-parallel-size 2 --dtype float16 --no-enable-prefix-caching --no-async-scheduling --no-enforce-eager "
        "--attention-backend FLASH_ATTN --gpu-memory-utilization 0.85 --hf-overrides '{\"max_position_embeddings\": 8192}'"
    )


def test_loads_become_sessions() -> None:
    """One engine where the chunk size may be switched, else one for each setting; the same requests either way."""
    base = case_of(load_testbed("a100-sim"), "mistral-7b", synthetic_trace()).session
    loads = [Load(512, 128, 2.0), Load(1024, 128, 0.1), Load(512, 64, 2.0)]
    switched = load_sessions(base, loads, 30.0, 8192, switch=True, most=1024)
    assert [(s.engine.max_batch, s.engine.max_budget, len(s.trials)) for s in switched] == [(128, 1024, 2), (64, 512, 1)]
    fresh = load_sessions(base, loads, 30.0, 8192, switch=False, most=1024)
    assert [(s.engine.max_batch, s.engine.max_budget, len(s.trials)) for s in fresh] == [
        (128, 512, 1),
        (128, 1024, 1),
        (64, 512, 1),
    ]
    assert len({session.name for session in fresh}) == 3
    points = [trial.points[0] for session in switched for trial in session.trials]
    assert [(p.budget, p.rate, p.requests) for p in points if isinstance(p, LoadPoint)] == [
        (512, 2.0, 60),
        (1024, 0.1, 16),  # fewer would say nothing of a P99
        (512, 2.0, 60),
    ]
    short = load_sessions(base, loads, 30.0, 8192, switch=True, most=48)  # a trace that ends before the seconds do
    assert [point.requests for s in short for t in s.trials for point in t.points if isinstance(point, LoadPoint)] == [
        48,
        16,
        48,
    ]


def test_measured_capacity() -> None:
    """P99 TBT doubles from 2 to 4 requests/s: 1.41 times the first is half way on the logarithm of both."""
    rows = pd.DataFrame({"rate": [1.0, 2.0, 4.0], "tbt_p99": [0.01, 0.02, 0.04], "ttft_p50": 0.1, "delay_p50": 0.0})
    assert check_advice.measured_capacity(rows, Latency(tbt_p99=0.02 * math.sqrt(2))) == pytest.approx(2 * math.sqrt(2))
    assert math.isnan(check_advice.measured_capacity(rows, Latency(tbt_p99=0.005)))
    assert check_advice.measured_capacity(rows, Latency(tbt_p99=1.0)) == 4.0


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ((True, True), "confirmed: chunk size 512 kept the targets on the engine"),
        ((False, True), "confirmed: no; take chunk size 256, which kept them at the highest load of those measured"),
        ((False, False), "confirmed: no; none kept the targets"),
    ],
)
def test_what_is_said_of_the_measurements(kept: tuple[bool, bool], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    best = Option(Setting(512, 128), 2.0, "tbt_p99", Latency(tbt_p99=0.1, ttft_p50=0.2))
    advice = Advice(Question(Latency(tbt_p99=0.1)), best, (), 2.0, 1.9, 2.1, (2.0,))
    seen = (1.8, 60, Latency(tbt_p99=0.09, ttft_p50=0.21, delay_p50=0.0), Latency(tbt_p99=0.1, ttft_p50=0.2))
    found = [Confirmed(Setting(size, 128), *seen, ok) for size, ok in zip((512, 256), kept, strict=True)]
    show_confirmed(advice, found)
    said = " ".join(capsys.readouterr().out.split())
    assert words in said
    assert "chunk size 512 at 1.8 requests/s: P50 TTFT 210.0 ms (simulated 200.0), P99 TBT 90.0 ms (simulated 100.0)" in said


def simulated_loads(sessions: list[Session], trace: Trace) -> list[tuple[Load, Record]]:
    """experiments.cluster.trials.serve_loads without Ray, on simulated engines."""
    found = []
    for session in sessions:
        names = [trial.name for trial in session.trials]
        for result in run_session(session, names, partial(simulated_engine, seed=session.seed), trace):
            phase = point_phase(result.facts["phases"])
            role = result.facts["phases"][phase]
            load = Load(role["budget"], result.facts["settings"]["max_batch"], role["rate"])
            found.append((load, of_phase(result.record, phase)))
    return found


def test_the_engine_has_the_last_word(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A testbed with GPUs, played by the simulator: at most three loads are served, and their answers are written down."""
    monkeypatch.setattr(recommend, "problems", lambda *_: [])
    monkeypatch.setattr(recommend, "serve_loads", simulated_loads)
    monkeypatch.setattr(recommend, "TRIAL_SECONDS", 8.0)
    assert ask(tmp_path, trace, "TBT_P99=0.1", "--testbed", "a100") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("measured here, ") == 3
    assert "confirmed: " in said
    answer = json.loads((tmp_path / "recommend-a100-mistral-7b.json").read_text())
    assert len(answer["measured"]) == 3
    for entry in answer["measured"]:  # the simulator against itself: the probes before a load shift the jitter, no more
        assert entry["measured"]["tbt_p99"] == pytest.approx(entry["simulated"]["tbt_p99"], rel=0.1)
    best = next(entry for entry in answer["measured"] if entry["setting"] == answer["best"]["setting"])
    assert best["rate"] == pytest.approx(0.9 * answer["best"]["rate"])


@pytest.mark.parametrize(("option", "lines"), [("--json", 1), ("--quiet", 0)])
def test_advice_is_checked_on_the_engine(
    option: str, lines: int, tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the simulator in the engine's place, which takes no time: the advice is good, the time is a matter of chance."""
    monkeypatch.setattr(recommend, "serve_loads", simulated_loads)
    monkeypatch.setattr(recommend, "TRIAL_SECONDS", 4.0)
    monkeypatch.setattr(check_advice, "serve_loads", simulated_loads)
    monkeypatch.setattr(check_advice, "calibrate", lambda *_: None)
    monkeypatch.setattr(check_advice, "SECONDS", 2.0)
    paper = load_testbed("a100-2024-sim").calibrations  # three targets that 48 requests tell apart
    switching = dataclasses.replace(load_testbed("a100"), switch_chunk_size=True, calibrations=paper)
    monkeypatch.setattr(check_advice, "choose_testbed", lambda *_: (switching, ""))
    where = ["--trace", str(trace), "--report", str(tmp_path), "--out", str(tmp_path), "--seeds", "1"]
    assert check_advice.main([*where, option]) in (0, 1)
    told = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["good"] for line in told] == [[True] * 3] * lines
    table = pd.read_csv(tmp_path / "check-advice-a100-seed42.csv")
    assert table.groupby("budget").size().eq(7).all()


@pytest.mark.skipif(not problems(load_testbed("a100"), Path("/"), gpus()), reason="this machine has the GPUs")
def test_a_machine_without_the_engine_says_so(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, trace, "TBT_P99=0.1", "--testbed", "a100") == 0
    assert "not measured: " in capsys.readouterr().out


def test_an_engine_that_knows_only_the_longest_chunk_warms_up_within_its_context() -> None:
    base = case_of(load_testbed("a100-sim"), "mistral-7b", synthetic_trace()).session
    (session,) = load_sessions(base, [Load(8192, 128, 0.1)], 30.0, 8192, switch=False, most=1024)
    assert {r.prompt_tokens + r.output_tokens for phase in warm_up(session) for r in phase.requests} == {8192}
