"""make capacity: what it says of the paper's choice is what its numbers say; a user's trace is taken whole or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.advise import paper_capacity
from analysis.advise.advice import TIE, Advice, Option
from analysis.advise.capacity import WORDS, Latency, Setting
from analysis.advise.case import Case
from analysis.advise.question import Question
from analysis.advise.recommend import case_of
from experiments.spec.spec import load_testbed
from experiments.spec.workload import synthetic_trace

options = st.builds(
    Option,
    st.builds(Setting, st.sampled_from([256, 512, 768, 1024, 2048]), st.sampled_from([32, 64, 128])),
    st.floats(0.1, 10.0),
    st.sampled_from(["tbt_p99", "delay_p50"]),
    st.builds(Latency, tbt_p99=st.floats(0.01, 1.0), ttft_p50=st.floats(0.01, 9.0), delay_p50=st.floats(0.0, 2.0)),
)


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of(load_testbed("a100-sim"), "mistral-7b", synthetic_trace())


@given(best=options, paper=options, beside=options)
def test_the_why_does_not_contradict_its_numbers(case: Case, best: Option, paper: Option, beside: Option) -> None:
    advice = Advice(Question(Latency(tbt_p99=0.1)), best, (beside,), best.rate, best.rate, best.rate, (best.rate,))
    words = paper_capacity.explain(case, advice, paper)
    if paper.setting.budget == best.setting.budget:
        assert words.startswith("the paper's choice too; beside it ")
        return
    numbers, why = words.rsplit(": ", 1)
    gap = paper.rate / best.rate - 1
    assert f"({gap:+.1%})" in numbers
    assert all(
        f"bound by {WORDS[option.bound_by]}, P99 TBT {1e3 * option.latency['tbt_p99']:.0f} ms" in numbers
        for option in (best, paper)
    )
    assert ("the same within" in why) == (abs(gap) <= TIE)
    assert ("missed" in why) == (gap > TIE)
    if "smaller" in why:
        assert best.setting.budget < paper.setting.budget
    if "reaches the target" in why:
        assert paper.bound_by == "tbt_p99"
    if "limits it" in why:
        assert why.startswith(f"{WORDS[paper.bound_by]}, not P99 TBT")
        assert paper.bound_by != "tbt_p99"
    if costs := re.search(r"takes ([\d.]+) us a token, one of \d+ ([\d.]+)", why):
        assert float(costs[1]) >= float(costs[2])
    if best.setting.max_batch != paper.setting.max_batch:
        assert f"at most {paper.setting.max_batch} requests in a step" in numbers


def test_a_model_that_is_not_the_papers_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_capacity.main(["--model=Qwen/Qwen3-8B"]) == 2
    assert "MODEL: got 'Qwen/Qwen3-8B'; allowed: mistral-7b, yi-34b; others with GPU=" in capsys.readouterr().err


def test_a_request_longer_than_the_model_takes_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{100 + n},10\n" for n in range(15))
    (tmp_path / "mine.csv").write_text(f"num_prefill_tokens,num_decode_tokens\n{rows}8000,193\n")
    assert paper_capacity.main(["--trace", str(tmp_path / "mine.csv"), "--report", str(tmp_path / "report")]) == 2
    assert "got 15 requests" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
