"""What is said of an answer, and drawn: a table of whole columns, who queues, the chunk size advised before all others."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.advise.advice import Advice, Option
from analysis.advise.capacity import WORDS, Latency, Setting
from analysis.advise.case import Case
from analysis.advise.question import asked
from analysis.advise.recommend import case_of
from analysis.advise.tell import show_headline, show_options
from analysis.show.plots_advice import capacity_figure
from experiments.spec.spec import load_testbed
from experiments.spec.workload import synthetic_trace


def answer(words: list[str], bound_by: str) -> tuple[Case, Advice]:
    """768, beside others that are 2 % off."""
    rates = {512: 3.27, 768: 3.34, 1024: 3.41, 16384: 0.334}
    low, best, high, default = (
        Option(Setting(size, 128), rate, bound_by, Latency(dict.fromkeys(WORDS, 54.321 * rate / 3.34)))
        for size, rate in rates.items()
    )
    case = case_of(load_testbed("a100-sim"), "mistral-7b", synthetic_trace())
    return case, Advice(asked(words), best, (low, high), 3.34, 3.0, 3.6, (3.34,), default)


@pytest.mark.parametrize(
    ("words", "bound_by", "headings"),
    [
        (["TBT_P99=1"], "delay_p50", "TTFT TBT"),
        (["GOODPUT=0.95", "TTFT_P99=1", "TPOT_P99=50ms", "ARRIVALS=gamma:2"], "goodput", "TTFT TTFT TBT TPOT"),
        (["TTFT_P99=1", "TBT_P50=9", "TPOT_P99=1", "E2E_P99=99"], "ttft_p99", "TTFT TBT TBT TPOT E2E"),
        (["QPS=2"], "nothing", "TTFT TBT E2E"),
        (["QPS=2", "TTFT_P90=9", "TTFT_P99=1", "TBT_P90=1", "TPOT_P99=1"], "tbt_p90", "TTFT TTFT TBT TPOT E2E"),
    ],
)
def test_the_table_has_its_columns_whole_in_80(
    words: list[str], bound_by: str, headings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_options({"": answer(words, bound_by)})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rule = next(number for number, line in enumerate(lines) if "───" in line)
    assert " ".join(lines[rule - 1].split()) == f"chunk batch QPS best {'bound by ' * (bound_by != 'nothing')}{headings}"
    rows = [line.replace(", vLLM's", "").split() for line in lines[rule + 1 : rule + 5]]
    assert [row[:2] for row in rows] == [[size, "128"] for size in ("512", "768", "1024", "16384")]
    assert [row[3] for row in rows] == ["-2%", "+0%", "+2%", "-90%"]
    assert rows[1].count("54321") == len(headings.split())
    assert "within 2% of the best the smallest chunk is advised" in " ".join(" ".join(lines[rule:]).split())


def test_more_users_than_requests_in_a_step_queue(capsys: pytest.CaptureFixture[str]) -> None:
    for users, said in ((128, False), (1000, True)):
        show_headline(*answer([f"CONCURRENCY={users}"], "nothing"))
        assert ("872 queue at any time" in " ".join(capsys.readouterr().out.split())) is said


def test_the_chunk_size_advised_is_bold_and_no_two_curves_are_alike() -> None:
    sizes = [256, 512, 768, 1024, 2048, 4096, 8192]
    curves = pd.DataFrame([{"model": "m", "chunk_size": s, "target": t, "capacity": 1.0} for s in sizes for t in (0.1, 0.2)])
    marks = pd.DataFrame([{"model": "m", "target": 0.1, "capacity": 1.0, "low": 0.9, "high": 1.1, "label": "768"}])
    figure = capacity_figure(curves, "", {}, marks, 8192)
    drawn = {str(line.get_label()): line for line in figure.axes[0].lines if str(line.get_label()).startswith("chunk")}
    assert max(drawn, key=lambda label: drawn[label].get_linewidth()) == "chunk size 768 (recommended)"
    looks = {(str(line.get_color()), str(vars(line)["_dash_pattern"])) for line in drawn.values()}
    assert len(looks) == len(drawn) == len(sizes)
