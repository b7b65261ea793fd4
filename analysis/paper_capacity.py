"""`make capacity`: capacity against the P99 TBT target on the paper's machines, simulated; the paper's choices beside ours."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic.dataclasses import dataclass as spec_dataclass
from rich.console import Console

from analysis.advice import TIE, Advice, Case, Option, advise, option
from analysis.capacity import Latency, Search, Setting
from analysis.load import REFERENCE
from analysis.plots import save
from analysis.plots_capacity import capacity_figure
from analysis.recommend import WORDS, case_of, curves, facts, marks, show, spread
from experiments.cost_model import CostModel
from experiments.provenance import ROOT
from experiments.spec import STRICT, SpecError, load_testbed, read_spec
from experiments.store import to_json
from experiments.terminal import command
from experiments.workload import choose_trace, describe_trace


@spec_dataclass(frozen=True, config=STRICT)
class PaperTargets:
    """artifacts/reference/capacity.yaml: targets in seconds, chunk sizes in tokens, by the paper's names for its targets."""

    source: str
    delay_p50: float
    chunk_sizes: dict[str, int]
    tbt_p99: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Compared:
    """Our advice and the paper's choice under one of its targets."""

    name: str
    advice: Advice
    paper: Option


def compare(case: Case, search: Search, paper: PaperTargets) -> Iterator[Compared]:
    """Each of the paper's targets for a model."""
    for name, target in paper.tbt_p99[case.model].items():
        limits = Latency(tbt_p99=target, delay_p50=paper.delay_p50)
        advice = advise(case, search, limits)
        chosen = Setting(paper.chunk_sizes[name], case.settings.max_batch)
        yield Compared(name, advice, option(search, chosen, limits, case.seeds[0], advice.best.rate))


def chunk_seconds(case: Case, size: int) -> float:
    """Microseconds a token of a step that holds nothing but the first chunk of a prompt."""
    return 1e6 * CostModel(case.calibration).step(size, 0, 1, size * (size + 1) // 2, 0) / size


def explain(case: Case, compared: Compared) -> str:
    """How the paper's choice compares, and why, from what bounds each."""
    best, paper = compared.advice.best, compared.paper

    def carries(other: Option) -> str:
        seen = f"P99 TBT {1e3 * other.latency.tbt_p99:.0f} ms there"
        cost = f"{other.rate / best.rate - 1:+.1%}"
        return f"{other.setting.budget} carries {other.rate:.3g} requests/s ({cost}), bound by {WORDS[other.bound_by]}, {seen}"

    if best.setting.budget == paper.setting.budget:
        return f"the paper's choice too; beside it {'; '.join(map(carries, compared.advice.neighbours))}"
    if paper.bound_by == "tbt_p99":
        why = "its steps are too long for the target in this simulation"
    elif best.rate > paper.rate * (1 + TIE):
        why = (
            f"P99 TBT binds neither, so throughput decides; in this calibration a full chunk of {paper.setting.budget} takes "
            f"{chunk_seconds(case, paper.setting.budget):.1f} us a token, one of {best.setting.budget} "
            f"{chunk_seconds(case, best.setting.budget):.1f}"
        )
    else:
        why = f"the same within {TIE:.0%}, where the smaller chunk size is taken as its TBT is lower"
    return f"the paper chose otherwise: {carries(paper)}: {why}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m analysis.paper_capacity", description=__doc__)
    parser.add_argument("--testbed", default="a100-sim")
    parser.add_argument("--trace", help="CSV as for fig9b, or a .json of vllm bench serve --save-detailed")
    parser.add_argument("--report", type=Path, default=ROOT / "artifacts" / "report")
    options = parser.parse_args(argv)
    console, began = Console(highlight=False), time.perf_counter()
    run(options, console)
    console.print(f"{time.perf_counter() - began:.1f} s")
    return 0


def run(options: argparse.Namespace, console: Console) -> None:
    """All models of the paper's table that the testbed has. Raises SpecError."""
    testbed, paper = load_testbed(options.testbed), read_spec(REFERENCE / "capacity.yaml", PaperTargets)
    if testbed.scale > 1 or testbed.platform != "simulated":
        raise SpecError(f"TESTBED: got {testbed.testbed}; allowed: a simulated one at the paper's scale, such as a100-sim")
    trace = choose_trace(options.trace)
    console.print(describe_trace(trace), soft_wrap=True)
    tables, points, answers = [], [], []
    for model in paper.tbt_p99:
        case = case_of(testbed, model, trace)
        search, targets = case.search(), spread(list(paper.tbt_p99[model].values()))
        tables.append(curves(case, search, case.settings_to_try(), Latency(delay_p50=paper.delay_p50), targets))
        for compared in compare(case, search, paper):
            show(case, compared.advice, console)
            words = explain(case, compared)
            console.print(f"{compared.name} target of the paper: {words}", soft_wrap=True)
            points.append(marks(case, compared.advice))
            answers.append({"target": compared.name, "paper": words, **facts(case, compared.advice)})
    table = pd.concat(tables, ignore_index=True)
    target = options.report / f"capacity-{testbed.testbed}"
    title = f"SIMULATED: capacity on {testbed.title}, median scheduling delay at most {paper.delay_p50:g} s; trace {trace.name}"
    drawn = save(capacity_figure(table, title, paper.tbt_p99, pd.DataFrame(points), case.settings.max_model_len), target)
    table.to_csv(target.with_suffix(".csv"), index=False)
    target.with_suffix(".json").write_text(to_json({"format": 1, "source": paper.source, "answers": answers}))
    console.print(f"{target}.csv, .json, {', '.join(path.suffix for path in drawn)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
